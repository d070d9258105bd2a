"""RetinaNet Swin-T, trained as mmdet trains its Mask R-CNN Swin-T: multi-scale, crops, AdamW, 36 epochs, mixed precision.

Inferred. MTPD loads checkpoints of this name (retinanet_swin-t-p4-w7_fpn_fp16_ms-crop-3x_coco), but neither they nor their
configs were released: this is mmdet's swin/mask-rcnn_swin-t-p4-w7_fpn_amp-ms-crop-3x_coco.py without its masks. Its AP is
not known; a third party's RetinaNet Swin-T of 36 epochs with AdamW reached 44.6.
"""

_base_ = "mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py"

_sides = [(side, 1333) for side in range(480, 801, 32)]
_resize = dict(type="RandomChoiceResize", scales=_sides, keep_ratio=True)
_crop = [
    dict(type="RandomChoiceResize", scales=[(400, 1333), (500, 1333), (600, 1333)], keep_ratio=True),
    dict(type="RandomCrop", crop_type="absolute_range", crop_size=(384, 600), allow_negative_crop=True),
]
train_pipeline = [
    dict(type="LoadImageFromFile", backend_args=None),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="RandomChoice", transforms=[[_resize], [*_crop, _resize]]),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))

train_cfg = dict(max_epochs=36)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", begin=0, end=36, by_epoch=True, milestones=[27, 33], gamma=0.1),
]
_no_decay = dict(decay_mult=0.0)
optim_wrapper = dict(
    type="AmpOptimWrapper",
    paramwise_cfg=dict(
        custom_keys={
            "absolute_pos_embed": _no_decay,
            "relative_position_bias_table": _no_decay,
            "norm": _no_decay,
        }
    ),
    optimizer=dict(_delete_=True, type="AdamW", lr=0.0001, betas=(0.9, 0.999), weight_decay=0.05),
)
