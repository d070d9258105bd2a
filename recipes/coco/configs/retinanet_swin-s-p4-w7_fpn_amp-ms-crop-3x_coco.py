"""RetinaNet Swin-S: as the Swin-T beside it, with 18 blocks in the third stage. Inferred, as that one is; its AP is not known."""

_base_ = "./retinanet_swin-t-p4-w7_fpn_amp-ms-crop-3x_coco.py"

model = dict(
    backbone=dict(
        depths=[2, 2, 18, 2],
        init_cfg=dict(
            type="Pretrained",
            checkpoint="https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_small_patch4_window7_224.pth",
        ),
    )
)
