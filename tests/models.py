"""Small random-weight variants of the configs that ship inside mmdet, and recipes made of them."""

import logging
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import MODELS

from trainer.config import load_config

_FPN = {"model.neck.out_channels": 16}
_SWIN = {
    "model.backbone.embed_dims": 8,
    "model.backbone.depths": [1, 1, 1, 1],
    "model.backbone.num_heads": [1, 1, 2, 2],
    "model.backbone.init_cfg": None,
}
_RESNET = {
    "model.backbone.depth": 18,
    "model.backbone.base_channels": 8,
    "model.backbone.frozen_stages": -1,
    "model.backbone.norm_eval": False,
    "model.backbone.init_cfg": None,
    "model.neck.in_channels": [8, 16, 32, 64],
}
_RETINA_HEAD = {
    "model.bbox_head.num_classes": 6,
    "model.bbox_head.in_channels": 16,
    "model.bbox_head.feat_channels": 16,
    "model.bbox_head.stacked_convs": 1,
}
_ROI_HEAD = {
    "model.rpn_head.in_channels": 16,
    "model.rpn_head.feat_channels": 16,
    "model.roi_head.bbox_roi_extractor.out_channels": 16,
    "model.roi_head.bbox_head.in_channels": 16,
    "model.roi_head.bbox_head.fc_out_channels": 32,
    "model.roi_head.bbox_head.num_classes": 6,
    "model.roi_head.mask_roi_extractor.out_channels": 16,
    "model.roi_head.mask_head.in_channels": 16,
    "model.roi_head.mask_head.conv_out_channels": 16,
    "model.roi_head.mask_head.num_classes": 6,
    "model.roi_head.mask_head.num_convs": 1,
}
_BOX_ROI_HEAD = {key: value for key, value in _ROI_HEAD.items() if "mask" not in key}
_MOBILENET = {
    "model.backbone": {
        "_delete_": True,
        "type": "MobileNetV2",
        "widen_factor": 0.25,
        "out_indices": [1, 2, 4, 6],  # strides 4, 8, 16, 32
    },
    "model.neck.in_channels": [8, 8, 24, 80],
}
_DENSE_HEAD = {**_RETINA_HEAD, "model.neck.out_channels": 16}
_GROUPED_HEAD = {**_DENSE_HEAD, "model.bbox_head.norm_cfg": {"type": "GN", "num_groups": 4, "requires_grad": True}}
_REPPOINTS_HEAD = {
    **_GROUPED_HEAD,
    "model.bbox_head.point_feat_channels": 16,
    "model.neck.norm_cfg.num_groups": 4,
}
# a basic block has no deformable convolutions: these need bottlenecks
_RESNET50 = {
    **_RESNET,
    "model.backbone.depth": 50,
    "model.backbone.base_channels": 8,
    "model.neck.in_channels": [32, 64, 128, 256],
}
_CASCADE_HEAD = {
    **{key: value for key, value in _ROI_HEAD.items() if ".bbox_head." not in key and ".mask_head." not in key},
    **{
        f"model.roi_head.bbox_head.{stage}.{key}": value
        for stage in range(3)
        for key, value in (("in_channels", 16), ("fc_out_channels", 32), ("num_classes", 6))
    },
}
_CASCADE_MASKS = {"in_channels": 16, "conv_out_channels": 16, "num_classes": 6, "num_convs": 1}
_HTC_SEMANTICS = {
    "model.roi_head.semantic_roi_extractor.out_channels": 16,
    "model.roi_head.semantic_head.in_channels": 16,
    "model.roi_head.semantic_head.conv_out_channels": 16,
    "model.roi_head.semantic_head.num_convs": 1,
}
_DINO = {
    "model.num_queries": 60,
    "model.backbone.base_channels": 8,
    "model.backbone.depth": 18,
    "model.backbone.init_cfg": None,
    "model.neck.in_channels": [16, 32, 64],
    "model.neck.out_channels": 32,
    "model.encoder.num_layers": 1,
    "model.encoder.layer_cfg.self_attn_cfg.embed_dims": 32,
    "model.encoder.layer_cfg.ffn_cfg.embed_dims": 32,
    "model.encoder.layer_cfg.ffn_cfg.feedforward_channels": 32,
    "model.decoder.num_layers": 2,
    "model.decoder.layer_cfg.self_attn_cfg.embed_dims": 32,
    "model.decoder.layer_cfg.cross_attn_cfg.embed_dims": 32,
    "model.decoder.layer_cfg.ffn_cfg.embed_dims": 32,
    "model.decoder.layer_cfg.ffn_cfg.feedforward_channels": 32,
    "model.positional_encoding.num_feats": 16,
    "model.bbox_head.num_classes": 6,
    "model.bbox_head.embed_dims": 32,
}

# name -> (shipped config, cfg_options)
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "retinanet-r18": ("mmdet::retinanet/retinanet_r50_fpn_1x_coco.py", {**_RESNET, **_FPN, **_RETINA_HEAD}),
    "retinanet-swin": (
        "mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py",
        {**_SWIN, **_FPN, **_RETINA_HEAD, "model.neck.in_channels": [16, 32, 64]},
    ),
    "mask-rcnn-swin": (
        "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py",
        {**_SWIN, **_FPN, **_ROI_HEAD, "model.neck.in_channels": [8, 16, 32, 64]},
    ),
    "mask-rcnn-r18": ("mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py", {**_RESNET, **_FPN, **_ROI_HEAD}),
    "gfl-r18": ("mmdet::gfl/gfl_r50_fpn_1x_coco.py", {**_RESNET, **_GROUPED_HEAD}),
    # maps of 24 channels, so that students of 16 need adapters
    "atss-r18": (
        "mmdet::atss/atss_r50_fpn_1x_coco.py",
        {**_RESNET, **_GROUPED_HEAD, "model.neck.out_channels": 24, "model.bbox_head.in_channels": 24},
    ),
    # its config is a caffe one: BGR, its own means, deviations of 1
    "fcos-r18": ("mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py", {**_RESNET, **_GROUPED_HEAD}),
    "reppoints-r18": (
        "mmdet::reppoints/reppoints-moment_r50_fpn-gn_head-gn_1x_coco.py",
        {**_RESNET, **_REPPOINTS_HEAD},
    ),
    "faster-rcnn-r18": ("mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py", {**_RESNET, **_FPN, **_BOX_ROI_HEAD}),
    "cascade-rcnn-r18": (
        "mmdet::cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py",
        {**_RESNET, **_FPN, **{k: v for k, v in _CASCADE_HEAD.items() if "mask" not in k}},
    ),
    "cascade-mask-rcnn-dcn": (
        "mmdet::dcn/cascade-mask-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py",
        {
            **_RESNET50,
            **_FPN,
            **_CASCADE_HEAD,
            **{f"model.roi_head.mask_head.{key}": value for key, value in _CASCADE_MASKS.items()},
        },
    ),
    "htc-r18": (
        "mmdet::htc/htc_r50_fpn_1x_coco.py",
        {
            **_RESNET,
            **_FPN,
            **_CASCADE_HEAD,
            **_HTC_SEMANTICS,
            **{
                f"model.roi_head.mask_head.{stage}.{key}": value
                for stage in range(3)
                for key, value in _CASCADE_MASKS.items()
            },
        },
    ),
    "retinanet-mobilenet": ("mmdet::retinanet/retinanet_r50_fpn_1x_coco.py", {**_DENSE_HEAD, **_MOBILENET}),
    "mask-rcnn-mobilenet": ("mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py", {**_FPN, **_ROI_HEAD, **_MOBILENET}),
    "dino-r18": ("mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py", _DINO),
}

_LOADERS = {
    f"{split}_dataloader.{key}": value
    for split in ("train", "val")
    for key, value in (("num_workers", 0), ("persistent_workers", False))
}


def checkpoint(name: str, folder: Path, seed: int = 0) -> Path:
    """A checkpoint of a small detector with initialised, untrained weights."""
    path = folder / f"{name}-{seed}.pth"
    if not path.exists():
        config, options = SMALL[name]
        torch.manual_seed(seed)
        model = MODELS.build(load_config(config, options, "test").model)
        logging.disable(logging.INFO)  # init_weights lists every parameter
        model.init_weights()
        logging.disable(logging.NOTSET)
        torch.save({"state_dict": model.state_dict()}, path)
    return path


def teacher(name: str, folder: Path, **more: Any) -> dict[str, Any]:
    """The recipe's entry of a small teacher."""
    config, options = SMALL[name]
    return {"config": config, "cfg_options": dict(options), "checkpoint": str(checkpoint(name, folder)), **more}


def recipe(data: Path, folder: Path, *, student: str = "retinanet-r18", **more: Any) -> dict[str, Any]:
    """The content of a recipe on generated data: two teachers, two stages, everything under ``folder``."""
    config, options = SMALL[student]
    loaders = {**_LOADERS, "train_dataloader.batch_size": 4}
    return {
        "dataset": {
            split: {"ann_file": str(data / "annotations" / f"{split}.json"), "img_dir": str(data / split)}
            for split in ("train", "val")
        },
        "views": {"scale": [128, 96], "flip": "both"},
        "cache": {"uri": str(folder / "cache"), "precision": "float16", "unit_rows": 4},
        "teachers": {
            "small": teacher("retinanet-r18", data),
            "swin": teacher("retinanet-swin", data),
        },
        "student": {"config": config, "cfg_options": {**options, **loaders}},
        "stages": [
            {"teacher": "small", "mechanisms": [{"type": "PKDLoss", "loss_weight": 1.0}], "epochs": 1},
            {"teacher": "swin", "mechanisms": [{"type": "MGDLoss", "loss_weight": 1e-3}], "epochs": 1},
        ],
        "work_dir": str(folder / "work"),
        **more,
    }
