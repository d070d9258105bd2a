"""The demo's first teacher: the student with a backbone 1.5 times as wide and a deeper head."""

_base_ = "retinanet_r18_w16.py"

model = dict(
    backbone=dict(base_channels=24),
    neck=dict(in_channels=[24, 48, 96, 192]),
    bbox_head=dict(stacked_convs=2),
)
