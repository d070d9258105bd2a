"""Every family of teacher with every family of student: both build, targets fit, and distillation makes its loss smaller."""

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from mmdet.datasets import CocoDataset
from mmdet.registry import MODELS
from mmengine.dataset import pseudo_collate

from tests import models
from trainer import CLASSES, Distiller, LiveMaps, Teacher, TeacherOutput, TeacherSpec
from trainer.checkpoint import inherit, read_weights
from trainer.config import load_config

STEPS = 4
DENSE = {f"P{k}": 16 for k in (3, 4, 5, 6, 7)}
TWO_STAGE = {f"P{k}": 16 for k in (2, 3, 4, 5, 6)}
TEACHERS = {
    "retinanet-r18": DENSE,
    "gfl-r18": DENSE,
    "atss-r18": {f"P{k}": 24 for k in (3, 4, 5, 6, 7)},
    "fcos-r18": DENSE,
    "reppoints-r18": DENSE,
    "faster-rcnn-r18": TWO_STAGE,
    "mask-rcnn-swin": TWO_STAGE,
    "cascade-rcnn-r18": TWO_STAGE,
    "cascade-mask-rcnn-dcn": TWO_STAGE,
    "htc-r18": TWO_STAGE,
    "dino-r18": {f"P{k}": 32 for k in (3, 4, 5, 6)},
}
STUDENTS = (
    "retinanet-r18",
    "gfl-r18",
    "fcos-r18",
    "reppoints-r18",
    "faster-rcnn-r18",
    "mask-rcnn-r18",
    "retinanet-mobilenet",
    "mask-rcnn-mobilenet",
)
# what a dense head scores before its training is below its threshold: predict would have nothing to do
NO_THRESHOLD = {"model.test_cfg.score_thr": 0.0}


@pytest.fixture(scope="module")
def views(data: Path) -> list[dict[str, Any]]:
    """Two views of different shapes with boxes and masks, as a loader gives them."""
    pipeline = [
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
        dict(type="ApplyView", scale=[128, 96], flip="none"),
        dict(type="PackDetInputs"),
    ]
    dataset = CocoDataset(
        ann_file=str(data / "annotations" / "train.json"),
        data_prefix=dict(img=str(data / "train")),
        metainfo=dict(classes=CLASSES),
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=[],
        serialize_data=False,
    )
    shapes = {}
    for info in (dataset.get_data_info(n) for n in range(len(dataset))):
        shapes.setdefault((info["height"], info["width"]), {**info, "view": 0})
    dataset.pipeline = type(dataset.pipeline)(pipeline)
    return [dataset.pipeline(info) for info in list(shapes.values())[:2]]


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.INFO)  # init_weights lists every parameter
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def students() -> dict[str, dict[str, Any]]:
    """The configs of the students' models."""
    return {name: load_config(*models.SMALL[name], "test").model for name in STUDENTS}


def targets(name: str, data: Path, views: list[dict[str, Any]], **more: Any) -> tuple[Teacher, list[TeacherOutput]]:
    """What a teacher gives for each view, with detections."""
    entry = models.teacher(name, data, **more)
    if not any(part in name for part in ("rcnn", "htc", "dino")):
        entry["cfg_options"] = {**entry["cfg_options"], **NO_THRESHOLD}
    teacher = Teacher(TeacherSpec.model_validate(entry), name)
    return teacher, [teacher([view["inputs"]]) for view in views]


@dataclass
class Course:
    """The distillation loss before and after some steps, and the levels that it matched."""

    first: float
    last: float
    levels: list[str]


def distil(
    student: dict[str, Any],
    teacher: Teacher,
    outputs: list[TeacherOutput],
    views: list[dict[str, Any]],
    mechanism: dict[str, Any],
    capture: list[str] | None = None,
) -> Course:
    torch.manual_seed(0)
    levels = {level.name: [level.channels, level.stride, level.pool] for level in teacher.levels}
    model = Distiller(copy.deepcopy(student), [mechanism], {"t": {"levels": levels}}, capture=capture or ["neck"])
    model.init_weights()
    model.train()
    maps = [LiveMaps({name: m[0] for name, m in o.features.items()}, o.map_sizes) for o in outputs]
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    course = []
    for _ in range(STEPS + 1):
        batch = model.data_preprocessor(pseudo_collate(copy.deepcopy(views)), True)
        for sample, own in zip(batch["data_samples"], maps, strict=True):
            sample.teacher_maps = {"t": own}
        torch.manual_seed(1)  # the masks of MGD and the samples of R-CNN are the same in every step
        losses = model(**batch, mode="loss")
        course.append(losses[f"loss_{mechanism['type']}"].item())
        total, _ = model.parse_losses(losses)
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 35)
        optimizer.step()
    return Course(course[0], course[-1], list(next(iter(model.mechanisms.values())).pairs))


@pytest.mark.parametrize("name", list(TEACHERS))
def test_every_student_learns_what_the_teacher_shows(
    data: Path, views: list[dict[str, Any]], students: dict[str, dict[str, Any]], name: str
) -> None:
    teacher, outputs = targets(name, data, views)
    assert {level.name: level.channels for level in teacher.levels} == TEACHERS[name]
    for view, output in zip(views, outputs, strict=True):
        (found,), size = output.detections, view["inputs"].shape[-2:]
        assert len(found) > 0
        assert (found.boxes >= -1e-3).all()
        assert (found.boxes[:, [2, 3]] <= [size[1] + 1e-3, size[0] + 1e-3]).all()
        assert set(found.labels.tolist()) <= set(range(6))
        assert (found.masks is not None) == ("mask" in name or "htc" in name)
        alone = teacher([view["inputs"]], detect=False).features
        assert all(torch.equal(alone[level], maps) for level, maps in output.features.items()), "heads change no map"
    for student, config in students.items():
        course = distil(config, teacher, outputs, views, {"type": "FeatureMatchingLoss"})
        ours = TWO_STAGE if "rcnn" in student else DENSE
        assert course.levels == [level for level in ours if level in TEACHERS[name]], student
        assert course.last < 0.95 * course.first, f"{student}: {course}"


def bare(name: str) -> list[str]:
    """The convolutions that the official MGD hooks: of P3 to P7 in dense detectors, of P2 to P5 in two-stage ones."""
    return [f"neck.fpn_convs.{i}.conv" for i in range(4 if "rcnn" in name or "htc" in name else 5)]


@pytest.mark.parametrize("name", [name for name in TEACHERS if name != "dino-r18"])
def test_the_bare_convolutions_of_every_pyramid_are_captured_before_their_norm(
    data: Path, views: list[dict[str, Any]], name: str
) -> None:
    teacher, outputs = targets(name, data, views, capture=bare(name))
    neck, after = targets(name, data, views)
    assert [level.name for level in teacher.levels] == (
        ["P2", "P3", "P4", "P5"] if "P2" in TEACHERS[name] else ["P3", "P4", "P5", "P6", "P7"]
    )
    for place, level in enumerate(teacher.levels):
        conv, put_out = outputs[0].features[level.name], after[0].features[level.name]
        norm = neck._model.neck.fpn_convs[place].norm
        assert (norm is not None) == (name == "reppoints-r18")
        torch.testing.assert_close(conv if norm is None else norm(conv), put_out)
        assert torch.equal(conv, put_out) == (norm is None)


@pytest.mark.parametrize(
    ("name", "student", "levels"),
    [
        ("retinanet-swin", "retinanet-r18", ["P3", "P4", "P5", "P6", "P7"]),
        ("reppoints-r18", "reppoints-r18", ["P3", "P4", "P5", "P6", "P7"]),
        ("cascade-mask-rcnn-dcn", "mask-rcnn-r18", ["P2", "P3", "P4", "P5"]),
        ("mask-rcnn-swin", "retinanet-r18", ["P3", "P4", "P5"]),
        ("gfl-r18", "faster-rcnn-r18", ["P3", "P4", "P5"]),
    ],
)
def test_mgd_on_bare_convolutions_pairs_levels_by_stride_and_learns(
    data: Path,
    views: list[dict[str, Any]],
    students: dict[str, dict[str, Any]],
    name: str,
    student: str,
    levels: list[str],
) -> None:
    teacher, outputs = targets(name, data, views, capture=bare(name))
    mechanism = {"type": "MGDLoss", "loss_weight": 1e-3}
    course = distil(students[student], teacher, outputs, views, mechanism, bare(student))
    assert course.levels == levels
    assert course.last < 0.95 * course.first, course


# what of the neck and heads the rows of MTPD's table cannot take over; everything else is the teacher's, as in its released code
ROWS = {
    ("retinanet-r18", "retinanet-r18"): set(),
    ("retinanet-swin", "retinanet-r18"): {
        *(f"neck.lateral_convs.{i}.conv.weight" for i in range(3)),
        "neck.fpn_convs.3.conv.weight",  # P6 is made from C5, whose channels differ
    },
    ("cascade-mask-rcnn-dcn", "mask-rcnn-r18"): {f"neck.lateral_convs.{i}.conv.weight" for i in range(4)},
    ("mask-rcnn-swin", "mask-rcnn-r18"): {f"neck.lateral_convs.{i}.conv.weight" for i in range(4)},
    ("reppoints-r18", "reppoints-r18"): set(),
    ("htc-r18", "mask-rcnn-r18"): {f"neck.lateral_convs.{i}.conv.weight" for i in range(4)},
}


@pytest.mark.parametrize(("name", "student"), list(ROWS))
def test_a_student_inherits_what_the_paper_says(data: Path, name: str, student: str) -> None:
    config, options = models.SMALL[student]
    if name != student:  # as in the real pairs: other widths behind the lateral convolutions
        channels = [24, 48, 96, 192]
        options = {**options, "model.backbone.base_channels": 24, "model.neck.in_channels": channels}
    model = MODELS.build(load_config(config, options, "test").model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    teacher = read_weights(models.checkpoint(name, data), "test")
    result = inherit(model, teacher)
    assert set(result.left) == ROWS[name, student]
    cascade = "roi_head.bbox_head.0.fc_reg.weight" in teacher
    for key, value in model.state_dict().items():
        if key.startswith("backbone.") or key in result.left:
            assert torch.equal(value, before[key]), key
        elif cascade and "fc_reg" in key:  # four numbers for all classes, once per class
            assert torch.equal(value.unflatten(0, (6, 4)), teacher[_first_stage(key)].expand(6, 4, *value.shape[1:]))
        else:
            assert torch.equal(value, teacher[_first_stage(key) if cascade else key]), key


def _first_stage(key: str) -> str:
    return key.replace("bbox_head.", "bbox_head.0.").replace("mask_head.", "mask_head.0.")


def test_a_backbone_that_a_recipe_replaces_stays_replaced_however_often_it_is_read() -> None:
    first, second = (load_config(*models.SMALL["retinanet-mobilenet"], "test").model.backbone for _ in range(2))
    assert first == second
    assert first.widen_factor == 0.25
    assert "depth" not in second
