"""The demo's first teacher: the student with a backbone 1.25 times as wide."""

_base_ = "retinanet_r18_w16.py"

model = dict(backbone=dict(base_channels=20), neck=dict(in_channels=[20, 40, 80, 160]))
