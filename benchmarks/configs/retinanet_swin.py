"""The demo's Swin teacher to be trained on other data: its backbone begins with what the demo's learned from drawn scenes."""

_base_ = "../../recipes/demo/retinanet_swin_w32.py"

model = dict(
    backbone=dict(
        convert_weights=False,
        init_cfg=dict(_delete_=True, type="Pretrained", checkpoint="recipes/demo/swin_w32.pth"),
    ),
)

train_dataloader = dict(batch_size=8, num_workers=0, persistent_workers=False)
val_dataloader = dict(num_workers=0, persistent_workers=False)
train_cfg = dict(val_interval=100)
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
)
auto_scale_lr = dict(base_batch_size=8)
