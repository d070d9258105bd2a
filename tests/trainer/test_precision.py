"""Teachers and students in lower precision: every call alike, heads in float32, nothing that mmcv has no operator for."""

import json
import math
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS

from cache import RecipeError
from tests import models
from tests.trainer import precompute
from trainer import Teacher, parse_recipe, stage_dir, train_stage
from trainer.config import load_config
from trainer.precision import refuse_unknown
from trainer.specs import TeacherSpec


@pytest.mark.parametrize("autocast", [None, "bfloat16"])
def test_a_teacher_gives_the_same_in_every_call_and_inside_its_students_autocast(
    data: Path, autocast: str | None
) -> None:
    teacher = Teacher(TeacherSpec.model_validate(models.teacher("retinanet-swin", data, autocast=autocast)), "t")
    image = torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    first = teacher([image])
    for inside in (False, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            again = teacher([image])
        for level, maps in first.features.items():
            assert again.features[level].dtype == torch.float32
            assert torch.equal(again.features[level], maps), (level, inside)
        assert (again.detections[0].boxes == first.detections[0].boxes).all()


@pytest.mark.parametrize("student", ["mask-rcnn-r18", "fcos-r18"])
def test_students_whose_heads_know_no_bfloat16_train_in_it(data: Path, tmp_path: Path, student: str) -> None:
    content = models.recipe(data, tmp_path, student=student)
    content["stages"] = [{**content["stages"][0], "mechanisms": [{"type": "PKDLoss"}]}]
    content["training"] = {"amp": "bfloat16"}
    recipe = parse_recipe(content, "test")
    precompute.fill(recipe, "small")
    assert train_stage(recipe, 1).images == 20
    (log,) = stage_dir(recipe, 1).glob("*/vis_data/scalars.json")
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    losses = [value for step in steps for name, value in step.items() if "loss" in name]
    assert losses
    assert all(math.isfinite(value) for value in losses)


def test_deformable_convolutions_are_refused_in_bfloat16() -> None:
    options = {
        "model.backbone.init_cfg": None,
        "model.backbone.depth": 50,
        "model.backbone.base_channels": 8,
        "model.backbone.dcn": {"type": "DCNv2", "deform_groups": 1, "fallback_on_stride": False},
        "model.backbone.stage_with_dcn": [False, True, True, True],
        "model.neck.in_channels": [32, 64, 128, 256],
    }
    detector = MODELS.build(load_config("mmdet::retinanet/retinanet_r50_fpn_1x_coco.py", options, "student").model)
    refuse_unknown(detector, "float16", "training.amp")
    with pytest.raises(RecipeError, match=r"training\.amp: bfloat16: backbone\.layer2\.0\.conv2 is a deformable"):
        refuse_unknown(detector, "bfloat16", "training.amp")
