"""Train the demo's teachers with stock mmdet and write the checkpoints kept beside this file.

    python recipes/demo/train_teachers.py WORK_DIR [r18_w20] [swin_w32]

Both are trained from random weights on 2,400 generated scenes, of which the demo's student sees the first few hundred, and
evaluated on the scenes that the demo evaluates on. The checkpoints hold float16 weights, for half the bytes.
"""

import argparse
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.runner import Runner

from trainer.scenes import CLASSES, generate

HERE = Path(__file__).parent
SCALE = (192, 144)
SCENES, SEED = 2400, 0
VAL_SCENES, VAL_FIRST_ID = 200, 1_000_001
RECIPES = {
    "r18_w20": dict(epochs=8, optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05)),
    "swin_w32": dict(epochs=20, optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05)),
}


def config(name: str, data: Path, work_dir: Path) -> Config:
    """The mmengine config of one teacher's training."""
    epochs, optimizer = RECIPES[name]["epochs"], RECIPES[name]["optimizer"]
    cfg = Config.fromfile(HERE / f"retinanet_{name}.py")
    train = [
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations", with_bbox=True),
        dict(type="Resize", scale=SCALE, keep_ratio=True),
        dict(type="RandomFlip", prob=0.5),
        dict(type="PackDetInputs"),
    ]
    meta = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
    test = [train[0], train[2], train[1], dict(type="PackDetInputs", meta_keys=meta)]

    def loader(split: str, pipeline: list[dict], training: bool) -> dict:
        return dict(
            batch_size=8,
            num_workers=0,
            persistent_workers=False,
            sampler=dict(type="DefaultSampler", shuffle=training),
            dataset=dict(
                type="CocoDataset",
                metainfo=dict(classes=CLASSES),
                ann_file=str(data / "annotations" / f"{split}.json"),
                data_prefix=dict(img=str(data / split)),
                pipeline=pipeline,
                test_mode=not training,
            ),
        )

    cfg.train_dataloader = loader("train", train, True)
    cfg.val_dataloader = cfg.test_dataloader = loader("val", test, False)
    cfg.val_evaluator = cfg.test_evaluator = dict(
        type="CocoMetric", metric="bbox", ann_file=str(data / "annotations" / "val.json")
    )
    cfg.train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=epochs, val_interval=6)
    cfg.optim_wrapper = dict(
        type="OptimWrapper",
        optimizer=optimizer,
        clip_grad=dict(max_norm=10.0),
        paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
    )
    cfg.param_scheduler = [
        dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=300),
        dict(type="CosineAnnealingLR", by_epoch=True, T_max=epochs, eta_min_ratio=0.01, convert_to_iter_based=True),
    ]
    cfg.work_dir = str(work_dir / name)
    cfg.default_hooks.logger.interval = 100
    cfg.default_hooks.checkpoint.max_keep_ckpts = 1
    cfg.randomness = dict(seed=SEED)
    cfg.resume = True  # goes on from the last epoch if it was stopped
    return cfg


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("names", nargs="*", default=list(RECIPES))
    arguments = parser.parse_args()
    data = arguments.work_dir / "scenes"
    if not (data / "annotations" / "val.json").exists():
        generate(data, "train", SCENES, seed=SEED)
        generate(data, "val", VAL_SCENES, seed=SEED, first_id=VAL_FIRST_ID)
    for name in arguments.names:
        runner = Runner.from_cfg(config(name, data, arguments.work_dir))
        runner.train()
        weights = {k: v.half() if v.is_floating_point() else v for k, v in runner.model.state_dict().items()}
        torch.save({"state_dict": weights, "meta": {"dataset_meta": {"classes": CLASSES}}}, HERE / f"{name}.pth")


if __name__ == "__main__":
    main()
