"""Mechanisms on heads against computations that loop over positions, on real small detectors and images of two sizes."""

from typing import Any

import pytest
import torch
from mmdet.registry import MODELS
from torch import nn

from cache import RecipeError
from tests.models import SMALL
from trainer.config import load_config
from trainer.dense import decode, dense_outputs, dense_shape, flat_outputs, strides

CLASSES = 6
_RESNET = {key: value for key, value in SMALL["retinanet-r18"][1].items() if "bbox_head" not in key}
_NORM = {"type": "GN", "num_groups": 4, "requires_grad": True}
_HEAD = {
    "model.bbox_head.num_classes": CLASSES,
    "model.bbox_head.in_channels": 16,
    "model.bbox_head.feat_channels": 16,
    "model.bbox_head.stacked_convs": 2,
}
_NORMED = {**_RESNET, **_HEAD, "model.bbox_head.norm_cfg": _NORM}
_FCOS = {"model.backbone.norm_cfg": {"type": "BN", "requires_grad": True}, "model.backbone.style": "pytorch"}
DETECTORS: dict[str, tuple[str, dict[str, Any]]] = {
    "retinanet": ("mmdet::retinanet/retinanet_r50_fpn_1x_coco.py", {**_RESNET, **_HEAD}),
    "gfl": ("mmdet::gfl/gfl_r50_fpn_1x_coco.py", _NORMED),
    "atss": ("mmdet::atss/atss_r50_fpn_1x_coco.py", _NORMED),
    "fcos": (
        "mmdet::fcos/fcos_r50-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco.py",
        {**_NORMED, **_FCOS},
    ),
    "reppoints": (
        "mmdet::reppoints/reppoints-moment_r50_fpn_1x_coco.py",
        {**_RESNET, **_HEAD, "model.bbox_head.point_feat_channels": 16},
    ),
    "mask-rcnn": SMALL["mask-rcnn-r18"],
}
DENSE = ("retinanet", "gfl", "atss", "fcos", "reppoints")


def detector(name: str, seed: int = 0) -> nn.Module:
    """A small detector whose heads are as uneven as trained ones."""
    torch.manual_seed(seed)
    config, options = DETECTORS[name]
    model = MODELS.build(load_config(config, options, "student.config").model)
    generator = torch.Generator().manual_seed(seed)
    # as they are initialised, heads give nearly the same everywhere
    for key, parameter in model.named_parameters():
        if "head" in key and parameter.dim() == 4:
            parameter.data = torch.randn(parameter.shape, generator=generator) * (2 / parameter[0].numel()) ** 0.5
    return model


@pytest.mark.parametrize("name", DENSE)
def test_dense_outputs_are_the_heads_maps_at_its_best_positions(name: str) -> None:
    model = detector(name).eval()
    head = model.bbox_head
    with torch.no_grad():
        outputs = head(model.extract_feat(torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(0))))
        found = dense_outputs(head, outputs, top_k=20)
    anchors, classes, terms = dense_shape(head)
    for level, stride in enumerate(strides(head)):
        logits, boxes = outputs[0][level], outputs[1][level]
        rows, columns = logits.shape[-2:]
        for n in range(2):
            dense = found[n][stride]
            assert dense.shape == (rows, columns, anchors)
            assert dense.indices.shape == (min(20, rows * columns * anchors),)
            best = logits[n].view(anchors, classes, -1).amax(dim=1).flatten().sort(descending=True).values
            torch.testing.assert_close(dense.logits.amax(dim=1), best[: len(dense.indices)])
            for index, own, box in zip(dense.indices.tolist(), dense.logits, dense.terms, strict=True):
                cell, a = divmod(index, anchors)
                y, x = divmod(cell, columns)
                assert torch.equal(own, logits[n, a * classes : (a + 1) * classes, y, x])
                assert torch.equal(box, boxes[n, a * terms : (a + 1) * terms, y, x])


@pytest.mark.parametrize("name", DENSE)
def test_dense_boxes_are_those_that_the_head_predicts_whether_it_trains_or_not(name: str) -> None:
    model = detector(name).eval()
    head = model.bbox_head
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(1, 16, *size, generator=generator) for size in ((5, 7), (3, 4), (2, 2), (1, 1), (1, 1))]
    head.test_cfg.update(score_thr=0.0, nms_pre=10**5, min_bbox_size=-1)
    meta = dict(img_shape=(10**4, 10**4), scale_factor=(1.0, 1.0))
    with torch.no_grad():
        predicted = head.predict_by_feat(*head(features), batch_img_metas=[meta], cfg=head.test_cfg, with_nms=False)
        expected = predicted[0].bboxes
        for mode in (False, True):
            head.train(mode)
            outputs = head(features)
            boxes = []
            for level, (logits, terms) in enumerate(flat_outputs(head, outputs)):
                shape = outputs[0][level].shape[-2:]
                boxes.append(decode(head, level, torch.arange(logits.shape[1]), shape, terms[0]))
            ours = torch.cat(boxes).clamp(0, 10**4)
            assert len({tuple(box) for box in expected.round().tolist()}) > 20
            # a prediction for each position and class, in an order of its own
            distance = torch.cdist(ours, expected, compute_mode="donot_use_mm_for_euclid_dist")
            assert distance.amin(dim=1).max() < 0.01
            assert distance.amin(dim=0).max() < 0.01


def test_other_heads_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"dense outputs are those of RetinaHead, .*; this detector has a RPNHead"):
        dense_shape(detector("mask-rcnn").rpn_head)
