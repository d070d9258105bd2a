"""Mechanisms on heads against computations that loop over positions, on real small detectors and images of two sizes."""

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_overlaps
from mmdet.structures.mask import BitmapMasks
from mmengine.logging import MMLogger
from mmengine.structures import InstanceData
from pycocotools import mask as coco_mask
from torch import Tensor, nn

from cache import DenseLevel, Detections, Level, RecipeError, level_name
from tests.models import SMALL
from trainer.assignment import assign
from trainer.capture import recorded
from trainer.config import load_config
from trainer.dense import decode, dense_outputs, dense_shape, flat_outputs, place, strides
from trainer.mechanisms import Batch, CrossKDLoss, DenseLogitLoss, DetectionLoss, LDLoss

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
    "softmax": (
        "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py",
        {**_RESNET, **_HEAD, "model.bbox_head.loss_cls": {"_delete_": True, "type": "CrossEntropyLoss"}},
    ),
    "mask-rcnn": SMALL["mask-rcnn-r18"],
    "paa": ("mmdet::paa/paa_r50_fpn_1x_coco.py", _NORMED),
    "gfl-one": ("mmdet::gfl/gfl_r50_fpn_1x_coco.py", {**_NORMED, "model.bbox_head.num_classes": 1}),
}
DENSE = ("retinanet", "gfl", "atss", "fcos", "reppoints")


def detector(name: str, seed: int = 0) -> nn.Module:
    """A small detector whose heads are as uneven as trained ones."""
    return deepcopy(_built(name, seed))


@cache
def _built(name: str, seed: int) -> nn.Module:
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


SIZES = [(96, 128), (64, 96)]  # padded views of two images in one batch
LEVELS = tuple(Level(f"P{k}", 16, 2**k) for k in (3, 4, 5, 6, 7))
BOXES = [[[10.0, 12.0, 70.0, 80.0], [60.0, 20.0, 120.0, 60.0], [4.0, 60.0, 30.0, 90.0]], [[8.0, 8.0, 50.0, 56.0]]]


def samples(sizes: list[tuple[int, int]], mask: bool = False) -> list[DetDataSample]:
    made = []
    for size, boxes in zip(sizes, BOXES, strict=True):
        meta = dict(
            img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0), batch_input_shape=(96, 128), pad_shape=size
        )
        truth = InstanceData(bboxes=torch.tensor(boxes), labels=torch.arange(len(boxes)) + 1)
        if mask:
            bitmaps = np.zeros((len(boxes), 96, 128), np.uint8)
            for bitmap, (x1, y1, x2, y2) in zip(bitmaps, boxes, strict=True):
                bitmap[int(y1) : int(y2), int(x1) : int(x2)] = 1
            truth.masks = BitmapMasks(bitmaps, 96, 128)
        made.append(DetDataSample(metainfo=meta, gt_instances=truth))
    return made


def images(sizes: list[tuple[int, int]]) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.zeros(2, 3, 96, 128)
    for n, (height, width) in enumerate(sizes):
        inputs[n, :, :height, :width] = torch.randn(3, height, width, generator=generator)
    return inputs


def step(student: nn.Module, teacher: nn.Module, sizes: list[tuple[int, int]] = SIZES, top_k: int = 10**6) -> Batch:
    """One step of a student beside a teacher that saw each image alone."""
    student.train()
    teacher.eval().requires_grad_(False)
    inputs, truth = images(sizes), samples(sizes, mask=hasattr(student, "roi_head"))
    with recorded(student) as made:
        student.loss(inputs, truth)
    alone = [teacher.extract_feat(inputs[n : n + 1, :, :h, :w]) for n, (h, w) in enumerate(sizes)]
    targets, valid = {}, {}
    for level, own in zip(LEVELS, made["features"], strict=True):
        k = LEVELS.index(level)
        targets[level.name], valid[level.name] = torch.zeros(2, 16, *own.shape[-2:]), torch.zeros(2, 1, *own.shape[-2:])
        for n, maps in enumerate(alone):
            h, w = maps[k].shape[-2:]
            targets[level.name][n, :, :h, :w], valid[level.name][n, :, :h, :w] = maps[k][0], 1
        valid[level.name] = valid[level.name].bool()
    dense = None
    if hasattr(teacher, "bbox_head"):
        found = [dense_outputs(teacher.bbox_head, teacher.bbox_head(maps), top_k)[0] for maps in alone]
        dense = [{level_name(stride): level for stride, level in of_image.items()} for of_image in found]
    return Batch(
        maps={},
        targets=targets,
        valid=valid,
        samples=truth,
        inputs=inputs,
        student=student,
        features=tuple(made["features"]),
        head_outputs=made.get("head"),
        dense=dense,
        teacher_head=getattr(teacher, "bbox_head", None),
    )


def stored_rows(batch: Batch, classes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Position by position: the student's logits, the teacher's."""
    for n, of_image in enumerate(batch.dense):
        for level, dense in enumerate(of_image.values()):
            _, columns, anchors = dense.shape
            for index, theirs in zip(dense.indices.tolist(), dense.logits, strict=True):
                cell, a = divmod(index, anchors)
                y, x = divmod(cell, columns)
                yield batch.head_outputs[0][level][n, a * classes : (a + 1) * classes, y, x], theirs


@pytest.mark.parametrize("name", ["retinanet", "gfl", "reppoints"])
def test_dense_logits_are_compared_where_the_teacher_stored_them(name: str) -> None:
    batch = step(detector(name), detector(name, seed=1), top_k=15)
    total, expected, kl, rows = 0.0, 0.0, 0.0, 0
    for s, t in stored_rows(batch, CLASSES):
        s, t = s.double(), t.double()  # the logarithms of a score and of its complement
        p, q = t.sigmoid(), s.sigmoid()
        total += ((p - q).abs() * -(p * q.log() + (1 - p) * (1 - q).log())).sum()
        expected += p.max()
        softened = [(one / 10).softmax(0) for one in (t, s)]
        kl += 100 * (softened[0] * (softened[0] / softened[1]).log()).mean()
        rows += 1
    qfl = DenseLogitLoss(LEVELS, LEVELS, loss_weight=3.0)(batch)
    torch.testing.assert_close(qfl, (3 * total / max(expected, 1)).float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        DenseLogitLoss(LEVELS, LEVELS, mode="kl")(batch), (kl / rows).float(), rtol=1e-4, atol=1e-5
    )


def test_softmax_heads_rank_by_their_foreground_and_are_matched_by_kl() -> None:
    batch = step(detector("softmax"), detector("softmax", seed=1), top_k=15)
    dense = batch.dense[0]["P3"]
    foreground = dense.logits.softmax(dim=1)[:, :CLASSES].amax(dim=1)
    assert dense.logits.shape == (15, CLASSES + 1)
    assert (foreground.diff() <= 0).all()
    assert DenseLogitLoss(LEVELS, LEVELS)(batch) == DenseLogitLoss(LEVELS, LEVELS, mode="kl")(batch)


def test_of_one_class_the_class_part_of_ld_is_nothing_which_is_logged_once() -> None:
    student, teacher = detector("gfl-one"), detector("gfl-one", seed=1)
    for mechanism in (DenseLogitLoss(LEVELS, LEVELS), LDLoss(LEVELS, LEVELS)):
        mechanism.refuse_unfit(student, teacher)
    DenseLogitLoss(LEVELS, LEVELS).refuse_unfit(detector("paa"), detector("atss"))  # asks for no positives
    batch = step(student, teacher)
    for sample in batch.samples:
        sample.gt_instances.labels[:] = 0
    told: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = told.append
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    try:
        classes = LDLoss(LEVELS, LEVELS, ld_weight=0.0)
        assert classes(batch) == classes(batch) == 0
    finally:
        logger.removeHandler(handler)
    assert [record.levelname for record in told] == ["WARNING"]
    assert LDLoss(LEVELS, LEVELS)(batch) > 0


def test_dense_logits_outside_of_the_students_map_are_left_out() -> None:
    positions, inside = place(
        DenseLevel(torch.tensor([0, 7, 17, 23]), torch.empty(4, 1), torch.empty(4, 1), (3, 4, 2)), (5, 3)
    )
    assert inside.tolist() == [True, False, True, False]  # columns 0, 3, 0, 3
    assert positions.tolist() == [0, (2 * 3 + 0) * 2 + 1]


def test_the_box_term_is_giou_weighted_by_the_teachers_score() -> None:
    batch = step(detector("retinanet"), detector("retinanet", seed=1), top_k=15)
    alone = DenseLogitLoss(LEVELS, LEVELS)(batch)
    both = DenseLogitLoss(LEVELS, LEVELS, box_weight=2.0)(batch)
    head, total, trust = batch.student.bbox_head, 0.0, 0.0
    for n, of_image in enumerate(batch.dense):
        for level, dense in enumerate(of_image.values()):
            size = batch.head_outputs[0][level].shape[-2:]
            maps = batch.head_outputs[1][level][n]
            anchors = head.prior_generator.single_level_grid_priors(size, level, device="cpu")
            for index, logits, terms in zip(dense.indices.tolist(), dense.logits, dense.terms, strict=True):
                cell, a = divmod(index, 9)
                y, x = divmod(cell, dense.shape[1])
                anchor = anchors[(y * size[1] + x) * 9 + a][None]
                ours, theirs = (head.bbox_coder.decode(anchor, d[None]) for d in (maps[a * 4 : a * 4 + 4, y, x], terms))
                total += logits.sigmoid().max() * (1 - bbox_overlaps(ours, theirs, mode="giou", is_aligned=True))
                trust += logits.sigmoid().max()
    torch.testing.assert_close(both - alone, (2 * total / max(trust, 1))[0], rtol=1e-4, atol=1e-5)


def test_ld_with_all_positions_is_that_of_mmdets_ld_head() -> None:
    student, teacher = detector("gfl"), detector("gfl", seed=1)
    batch = step(student, teacher)
    config, options = DETECTORS["gfl"]
    model = load_config(config, options, "student.config").model
    loss = dict(type="KnowledgeDistillationKLDivLoss", loss_weight=0.25, T=10)
    head = MODELS.build({**model.bbox_head, "type": "LDHead", "loss_ld": loss, "train_cfg": model.train_cfg})
    head.load_state_dict(student.bbox_head.state_dict())
    soft = [torch.zeros_like(maps) for maps in batch.head_outputs[1]]
    for n, of_image in enumerate(batch.dense):
        for maps, dense in zip(soft, of_image.values(), strict=True):
            for index, terms in zip(dense.indices.tolist(), dense.terms, strict=True):
                maps[n, :, index // dense.shape[1], index % dense.shape[1]] = terms
    truth, meta = [s.gt_instances for s in batch.samples], [s.metainfo for s in batch.samples]
    expected = sum(head.loss_by_feat(*batch.head_outputs, truth, meta, soft)["loss_ld"])
    ours = LDLoss(LEVELS, LEVELS, kd_weight=0.0)
    assert expected > 0.1
    torch.testing.assert_close(ours(batch), expected)
    assert ours.coverage == 1.0


def test_ld_and_class_distillation_at_the_stored_positives_alone() -> None:
    batch = step(detector("gfl"), detector("gfl", seed=1), top_k=60)
    head = batch.student.bbox_head
    labels = assign(head, [m.shape[-2:] for m in batch.head_outputs[0]], batch.samples, torch.device("cpu")).labels
    ld, kd, positives, found = 0.0, 0.0, sum(int((of_level < CLASSES).sum()) for of_level in labels), 0
    for level, (scores, boxes) in enumerate(zip(*batch.head_outputs, strict=True)):
        of_level = []
        for n, of_image in enumerate(batch.dense):
            dense = list(of_image.values())[level]
            for index, logits, terms in zip(dense.indices.tolist(), dense.logits, dense.terms, strict=True):
                y, x = divmod(index, dense.shape[1])
                if labels[level][n, y * scores.shape[-1] + x] == CLASSES:
                    continue
                s = scores[n, :, y, x]
                p, q = (logits / 2).softmax(0), (s / 2).softmax(0)
                of_level.append(4 * (p * (p / q).log()).mean())
                for p, q in zip(terms.view(4, 17), boxes[n, :, y, x].view(4, 17), strict=True):
                    p, q = (p / 10).softmax(0), (q / 10).softmax(0)
                    ld += 0.25 / 4 * s.sigmoid().max() * 100 * (p * (p / q).log()).mean()
        kd += 10 * sum(of_level) / max(1, len(of_level))
        found += len(of_level)
    mechanism = LDLoss(LEVELS, LEVELS)
    torch.testing.assert_close(mechanism(batch), ld + kd, rtol=1e-4, atol=1e-5)
    assert 0 < found < positives
    assert mechanism.coverage == found / positives
    assert not mechanism.state_dict()


def test_lds_valuable_region_lies_around_the_positives() -> None:
    batch = step(detector("gfl"), detector("gfl", seed=1))
    head, total = batch.student.bbox_head, 0.0
    sizes = [tuple(m.shape[-2:]) for m in batch.head_outputs[0]]
    priors = [g.tolist() for g in head.prior_generator.grid_priors(sizes, device="cpu")]
    for n, sample in enumerate(batch.samples):
        own = [(-(-SIZES[n][0] // s), -(-SIZES[n][1] // s)) for s in strides(head)]
        inside = [
            [i for i in range(h * w) if i // w < oh and i % w < ow] for (h, w), (oh, ow) in zip(sizes, own, strict=True)
        ]
        best: dict[tuple[int, int], float] = {}
        for box in sample.gt_instances.bboxes.tolist():
            near = []
            for level, of_level in enumerate(inside):
                near += sorted((_distance(priors[level][i], box), _iou(priors[level][i], box)) for i in of_level)[:9]
            ious = torch.tensor([iou for _, iou in near])
            threshold = float(ious.mean() + ious.std())
            for level, of_level in enumerate(inside):
                for i in of_level:
                    a, iou = priors[level][i], _iou(priors[level][i], box)
                    span = [max(a[k + 2], box[k + 2]) - min(a[k], box[k]) for k in range(2)]
                    diou = iou - _distance(a, box) / (span[0] ** 2 + span[1] ** 2)
                    if 0.25 * threshold <= diou < threshold:
                        best[level, i] = max(best.get((level, i), 0.0), iou)
        for (level, i), weight in best.items():
            y, x = divmod(i, sizes[level][1])
            dense = list(batch.dense[n].values())[level]
            terms = dense.terms[dense.indices.tolist().index(y * dense.shape[1] + x)]
            for p, q in zip(terms.view(4, 17), batch.head_outputs[1][level][n, :, y, x].view(4, 17), strict=True):
                p, q = (p / 10).softmax(0), (q / 10).softmax(0)
                total += 0.25 / 16 * weight * 100 * (p * (p / q).log()).mean()
    assert total > 0
    ours = LDLoss(LEVELS, LEVELS, ld_weight=0.0, kd_weight=0.0, vlr_weight=0.25)
    torch.testing.assert_close(ours(batch), total, rtol=1e-4, atol=1e-5)


def _iou(a: list[float], b: list[float]) -> float:
    w, h = (max(0.0, min(a[k + 2], b[k + 2]) - max(a[k], b[k])) for k in range(2))
    area = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return w * h / (area - w * h)


def _distance(a: list[float], b: list[float]) -> float:
    """Squared, of the centres."""
    return sum(((a[k] + a[k + 2]) - (b[k] + b[k + 2])) ** 2 / 4 for k in range(2))


def detections(masks: bool = False, score: float = 1.0) -> list[Detections]:
    """What a teacher detects that finds exactly the truth."""
    found = []
    for size, boxes in zip(SIZES, BOXES, strict=True):
        rles = []
        for x1, y1, x2, y2 in boxes:
            bitmap = np.zeros(size, np.uint8, order="F")
            bitmap[int(y1) : int(y2), int(x1) : int(x2)] = 1
            rles.append(coco_mask.encode(bitmap)["counts"])
        labels = np.arange(len(boxes), dtype=np.int32) + 1
        scores = np.full(len(boxes), score, np.float32)
        found.append(Detections(np.array(boxes, np.float32), scores, labels, tuple(rles) if masks else None))
    return found


@pytest.mark.parametrize("name", ["retinanet", "reppoints", "mask-rcnn"])
def test_detections_are_learnt_as_ground_truth_is_on_the_features_of_the_step(name: str) -> None:
    student = detector(name).train()
    mask = name == "mask-rcnn"
    batch = replace(
        step(student, detector("retinanet", 1)) if not mask else _two_stage(student), detections=detections(mask)
    )
    mechanism = DetectionLoss(LEVELS, LEVELS, loss_weight=0.5)
    torch.manual_seed(7)
    torch.rand(3), torch.rand(1)  # the draws of the boxes, before two-stage samplers draw
    truth = student.loss(batch.inputs, samples(SIZES, mask))
    expected = 0.5 * student.parse_losses(truth)[0]
    runs = []
    handle = student.backbone.register_forward_hook(lambda *_: runs.append(1))
    torch.manual_seed(7)
    torch.testing.assert_close(mechanism(batch), expected)
    handle.remove()
    assert not runs
    assert "extract_feat" not in vars(student)


def _two_stage(student: nn.Module) -> Batch:
    inputs = images(SIZES)
    return Batch({}, {}, {}, samples(SIZES, mask=True), inputs, student, tuple(student.extract_feat(inputs)))


def test_masks_of_a_view_follow_a_student_of_reduced_input() -> None:
    batch = _two_stage(detector("mask-rcnn").train())
    small = samples([(48, 64), (32, 48)])
    for sample in small:
        sample.set_metainfo(dict(scale_factor=(0.5, 0.5)))
    found = [one.resized(0.5) for one in detections(masks=True)]
    truth = DetectionLoss(LEVELS, LEVELS)._pseudo(0, small[0], found[0], replace(batch, input_scale=0.5)).gt_instances
    for bitmap, (x1, y1, x2, y2) in zip(truth.masks.masks, truth.bboxes.int().tolist(), strict=True):
        assert bitmap[y1:y2, x1:x2].all()
        assert bitmap.sum() == (y2 - y1) * (x2 - x1)
    assert truth.masks.masks.shape == (3, 96, 128)


def test_a_detection_counts_as_often_as_its_score_says_and_the_draw_is_torchs() -> None:
    student = detector("retinanet")
    batch = step(student, detector("retinanet", 1))
    boxes = np.tile(np.array([[8, 8, 40, 40]], np.float32), (2000, 1))
    boxes[1000:] += 600  # outside of the image: nothing to learn from
    found = Detections(boxes, np.full(2000, 0.3, np.float32), np.zeros(2000, np.int32))
    drawn = DetectionLoss(LEVELS, LEVELS)
    torch.manual_seed(3)
    kept = drawn._pseudo(0, batch.samples[0], found, batch).gt_instances.bboxes
    assert 240 < len(kept) < 360
    assert kept.max() == 40
    torch.manual_seed(3)
    assert len(drawn._pseudo(0, batch.samples[0], found, batch).gt_instances.bboxes) == len(kept)
    for threshold, count in ((0.29, 1000), (0.31, 0)):
        of = DetectionLoss(LEVELS, LEVELS, score_threshold=threshold)
        assert len(of._pseudo(0, batch.samples[0], found, batch).gt_instances.bboxes) == count


@pytest.mark.parametrize("name", ["fcos", "gfl", "mask-rcnn"])
def test_images_without_detections_teach_the_background(name: str) -> None:
    student = detector(name).train()
    batch = _two_stage(student) if name == "mask-rcnn" else step(student, detector("retinanet", 1))
    empty = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32), ())
    loss = DetectionLoss(LEVELS, LEVELS)(replace(batch, detections=[empty, empty]))
    loss.backward()
    assert torch.isfinite(loss)
    assert loss > 0


_PREDICTORS = {
    "retinanet": ("retina_cls", "retina_reg"),
    "gfl": ("gfl_cls", "gfl_reg"),
    "atss": ("atss_cls", "atss_reg"),
    "fcos": ("conv_cls", "conv_reg"),
}


def convolved(head: nn.Module, branch: str, count: int, x: Tensor) -> Tensor:
    """A tower's map after some convolutions, before the activation, written out."""
    for n, module in enumerate(getattr(head, f"{branch}_convs")[:count]):
        x = module.conv(x.relu() if n else x)
        x = module.norm(x) if module.with_norm else x
    return x


def predicted(name: str, head: nn.Module, level: int, cls: Tensor, reg: Tensor, index: int) -> dict[str, Tensor]:
    """What the rest of a head says of its towers' maps (1, C, h, w): per position, written out."""
    out = {}
    for branch, x in (("cls", cls), ("reg", reg)):
        for module in getattr(head, f"{branch}_convs")[index:]:
            x = module.conv(x)
            x = (module.norm(x) if module.with_norm else x).relu()
        out[branch] = x
    logits = getattr(head, _PREDICTORS[name][0])(out["cls"])[0]
    terms = getattr(head, _PREDICTORS[name][1])(out["reg"])[0]
    if name != "retinanet":
        terms = head.scales[level](terms)
    anchors = head.prior_generator.single_level_grid_priors(logits.shape[-2:], level, device="cpu")
    a, (h, w) = head.num_base_priors, logits.shape[-2:]
    rows = {"logits": logits.view(a, -1, h, w).permute(2, 3, 0, 1).flatten(0, 2)}
    terms = terms.view(a, -1, h, w).permute(2, 3, 0, 1).flatten(0, 2)
    if name == "gfl":
        return {**rows, "bins": terms.view(-1, 4, 17)}
    if name == "fcos":
        left, top, right, bottom = (terms.clamp(min=0) * strides(head)[level]).unbind(1)
        x, y = anchors.unbind(1)
        return {**rows, "boxes": torch.stack([x - left, y - top, x + right, y + bottom], dim=1)}
    if name == "atss":
        rows["centre"] = head.atss_centerness(out["reg"])[0].flatten()
    return {**rows, "boxes": head.bbox_coder.decode(anchors, terms)}


@pytest.mark.parametrize("name", list(_PREDICTORS))
def test_crosskd_compares_what_the_teachers_head_makes_of_the_students_tower(name: str) -> None:
    batch = step(detector(name), detector(name, seed=1))
    student, teacher = batch.student.bbox_head, batch.teacher_head
    assigned = assign(student, [m.shape[-2:] for m in batch.features], batch.samples, torch.device("cpu"))
    index, anchors = (0 if name == "fcos" else 1), student.num_base_priors
    cls, reg, ctr, trust = 0.0, 0.0, 0.0, 0.0
    for level, feature in enumerate(batch.features):
        own = [(-(-h // strides(student)[level]), -(-w // strides(student)[level])) for h, w in SIZES]
        crops = [batch.targets[LEVELS[level].name][n : n + 1, :, :h, :w] for n, (h, w) in enumerate(own)]
        tower = {}
        for branch in ("cls", "reg"):
            theirs = [convolved(teacher, branch, index, crop) for crop in crops]
            ours = convolved(student, branch, index, feature)
            ours = [ours[n : n + 1, :, :h, :w] for n, (h, w) in enumerate(own)]
            all_ours, all_theirs = (torch.cat([m.flatten(2) for m in maps], dim=2) for maps in (ours, theirs))
            moments = [
                m(dim=2)[:, :, None, None] for m in (all_ours.mean, all_ours.std, all_theirs.mean, all_theirs.std)
            ]
            crossed = [(m - moments[0]) / (moments[1] + 1e-6) * moments[3] + moments[2] for m in ours]
            tower[branch] = [[m.relu() if index else m for m in maps] for maps in (theirs, crossed)]
        for n, (h, w) in enumerate(own):
            p, q = (predicted(name, teacher, level, tower["cls"][k][n], tower["reg"][k][n], index) for k in (0, 1))
            full = feature.shape[-2:]
            weights = assigned.weights[level][n].view(*full, anchors)[:h, :w].flatten()
            positive = assigned.labels[level][n].view(*full, anchors)[:h, :w].flatten() < CLASSES
            soft, hard = p["logits"].double().sigmoid(), q["logits"].double().sigmoid()
            each = -(soft * hard.log() + (1 - soft) * (1 - hard).log()) * (soft - hard).abs()
            cls += (each.sum(1) * weights).sum()
            v = p["logits"].sigmoid().amax(1) * (weights > 0)
            trust += v.sum()
            if name == "gfl":
                told, said = p["bins"].softmax(2), q["bins"].softmax(2)
                reg += ((told * (told / said).log()).sum((1, 2)) * v).sum()
            else:
                mode = "iou" if name == "fcos" else "giou"
                overlap = bbox_overlaps(q["boxes"], p["boxes"], mode=mode, is_aligned=True)
                reg += ((-overlap.clamp(min=1e-6).log() if name == "fcos" else 1 - overlap) * v).sum()
            if name == "atss":
                soft, hard = p["centre"].sigmoid()[positive], q["centre"].sigmoid()[positive]
                ctr -= (soft * hard.log() + (1 - soft) * (1 - hard).log()).sum()
    average = assigned.average
    parts = {
        "retinanet": (cls + reg) / average,
        "gfl": cls / average + 4 * reg / (4 * trust),
        "atss": (cls + reg + ctr) / average,
        "fcos": (0.4 * cls + 0.75 * reg) / average,
    }
    torch.testing.assert_close(CrossKDLoss(LEVELS, LEVELS)(batch), parts[name].float(), rtol=1e-3, atol=1e-4)


def test_the_teachers_predictions_are_those_of_its_live_head() -> None:
    batch = step(detector("gfl"), detector("gfl", seed=1))
    seen = []
    head = batch.teacher_head
    handle = head.gfl_cls.register_forward_hook(lambda _m, _i, output: seen.append(output))
    CrossKDLoss(LEVELS, LEVELS)(batch)
    handle.remove()
    for n, of_image in enumerate(batch.dense):  # teacher's outputs, live on each image alone
        for level, dense in enumerate(of_image.values()):
            ours = seen[n * 5 + level][0].flatten(1).T[dense.indices]
            torch.testing.assert_close(ours, dense.logits, rtol=1e-4, atol=1e-5)


CASES = {
    "DenseLogitLoss": (DenseLogitLoss, "gfl"),
    "LDLoss": (LDLoss, "gfl"),
    "CrossKDLoss": (CrossKDLoss, "gfl"),
    "CrossKDLoss-retinanet": (CrossKDLoss, "retinanet"),
}


@pytest.mark.parametrize("case", list(CASES))
def test_gradients_reach_the_student_alone_and_following_them_lowers_the_loss(case: str) -> None:
    kind, name = CASES[case]
    student, teacher = detector(name), detector(name, seed=1)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    mechanism = kind(LEVELS, LEVELS)
    assert not list(mechanism.parameters())
    optimizer = torch.optim.SGD(student.parameters(), 1e-3)
    losses = []
    for _ in range(4):
        loss = mechanism(step(student, teacher))
        losses.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 5.0)
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(
        student.get_parameter(key).grad.abs().sum() > 0
        for key in ("backbone.conv1.weight", "neck.fpn_convs.0.conv.weight")
    )
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not teacher.bbox_head.training
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "student", "teacher", "message"),
    [
        (DenseLogitLoss, "mask-rcnn", "retinanet", "DenseLogitLoss: student: .* has no dense head"),
        (DenseLogitLoss, "retinanet", "mask-rcnn", "DenseLogitLoss: teacher: .* has no dense head"),
        (DenseLogitLoss, "gfl", "retinanet", "DenseLogitLoss: the teacher's head has 9 anchors and 6 class logits"),
        (LDLoss, "retinanet", "retinanet", "LDLoss: the student's RetinaHead gives boxes, not distributions"),
        (LDLoss, "gfl", "fcos", "LDLoss: the teacher gives 4 box terms a position, the student 4 x .* = 68"),
        (CrossKDLoss, "reppoints", "reppoints", "CrossKDLoss: a RepPointsHead is none of RetinaHead"),
        (CrossKDLoss, "atss", "gfl", "CrossKDLoss: the student has a ATSSHead, the teacher a GFLHead"),
        (
            CrossKDLoss,
            "paa",
            "atss",
            "CrossKDLoss: student: a PAAHead finds its positives in another way than a ATSSHead",
        ),
        (
            partial(DenseLogitLoss, mode="kl"),
            "gfl-one",
            "gfl-one",
            r"DenseLogitLoss\.mode: kl .* Take qfl, the default",
        ),
        (DetectionLoss, "mask-rcnn", "retinanet", "DetectionLoss: the student learns masks, the teacher gives none"),
    ],
)
def test_heads_that_do_not_fit_are_refused(kind: Any, student: str, teacher: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        kind(LEVELS, LEVELS).refuse_unfit(detector(student), detector(teacher))


def test_other_anchors_scales_or_depths_are_refused() -> None:
    pupil, master = detector("retinanet"), detector("retinanet", seed=1)
    for kind in (CrossKDLoss, DenseLogitLoss):
        kind(LEVELS, LEVELS).refuse_unfit(pupil, master)
    with pytest.raises(RecipeError, match="reused_teacher_head_idx is 3, the student's head has 2 convolutions"):
        CrossKDLoss(LEVELS, LEVELS, reused_teacher_head_idx=3).refuse_unfit(pupil, master)
    reduced = [replace(level, stride=2 * level.stride) for level in LEVELS]
    with pytest.raises(RecipeError, match="the student sees its views at another scale than the teacher"):
        CrossKDLoss(reduced, LEVELS).refuse_unfit(pupil, master)
    with pytest.raises(RecipeError, match=r"DenseLogitLoss.levels: .* name levels that both have"):
        DenseLogitLoss(LEVELS, LEVELS, levels=["P2"]).refuse_unfit(pupil, master)
    master.bbox_head.prior_generator.base_anchors[1] += 1
    with pytest.raises(RecipeError, match="the heads' strides or anchors differ"):
        CrossKDLoss(LEVELS, LEVELS).refuse_unfit(pupil, master)
    with pytest.raises(RecipeError, match="the anchors of teacher and student differ on P4"):
        DenseLogitLoss(LEVELS, LEVELS).refuse_unfit(pupil, master)
    # where the anchors are the same nothing is wrong
    DenseLogitLoss(LEVELS, LEVELS, levels=["P3", "P5"]).refuse_unfit(pupil, master)
    # a point of FCOS and an anchor of GFL stand for one cell: their logits compare, their boxes do not
    DenseLogitLoss(LEVELS, LEVELS).refuse_unfit(detector("gfl"), detector("fcos"))
    with pytest.raises(
        RecipeError, match="box_weight: boxes of a FCOSHead are not read as those of the student's GFLHead"
    ):
        DenseLogitLoss(LEVELS, LEVELS, box_weight=1.0).refuse_unfit(detector("gfl"), detector("fcos"))
    with pytest.raises(RecipeError, match="P3 of the teacher is stored pooled"):
        CrossKDLoss(LEVELS, (Level("P3", 16, 8, 2), *LEVELS[1:]))


@pytest.mark.parametrize(
    ("neck", "refused"),
    [
        ({}, None),  # a plain pyramid puts out its convolutions' maps as they are
        ({"model.neck.norm_cfg": {"type": "BN"}}, "P3, P4, P5, P6, P7"),
        ({"model.neck.type": "PAFPN"}, "P4, P5"),
    ],
)
def test_maps_that_the_teachers_head_does_not_read_are_refused(neck: dict[str, Any], refused: str | None) -> None:
    config, options = DETECTORS["retinanet"]
    master = MODELS.build(load_config(config, {**options, **neck}, "test").model)
    crosskd, pupil = CrossKDLoss(LEVELS, LEVELS), detector("retinanet")
    crosskd.refuse_unfit(pupil, master)
    message = (
        rf"CrossKDLoss: .* does not read what is captured on {refused}; capture the maps that it reads \(its neck\)"
    )
    with pytest.raises(RecipeError, match=message) if refused else nullcontext():
        crosskd.refuse_unfit(pupil, master, [f"neck.fpn_convs.{k}.conv" for k in range(5)])
    assert master.training


def test_a_class_that_the_student_does_not_have_is_refused() -> None:
    batch = step(detector("retinanet"), detector("retinanet", seed=1))
    found = detections()[0]
    other = replace(batch, detections=[replace(found, labels=found.labels + 9)] * 2)
    with pytest.raises(RecipeError, match="the teacher detects class 12, the student has 6 classes"):
        DetectionLoss(LEVELS, LEVELS)(other)
