"""The demo's last and strongest teacher: RetinaNet with a small Swin Transformer."""

_base_ = "mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py"

model = dict(
    backbone=dict(
        embed_dims=32,
        depths=[2, 2, 4, 2],
        num_heads=[2, 4, 8, 16],
        drop_path_rate=0.1,
        init_cfg=None,
    ),
    neck=dict(in_channels=[64, 128, 256], out_channels=64),
    bbox_head=dict(
        num_classes=6,
        in_channels=64,
        feat_channels=64,
        stacked_convs=2,
        anchor_generator=dict(octave_base_scale=2),
    ),
)
