"""What micro-batches cannot do is refused, with the key; and how sums over them come about."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from mmdet.registry import MODELS

from cache import RecipeError
from tests import models
from tests.trainer.workers import train
from trainer import batch_note, parse_recipe, parts, stage_config
from trainer.config import load_config
from trainer.student_losses import sum_over_parts

ROOT = Path(__file__).parents[2]


def _alone(data: Path, folder: Path, student: str, training: dict[str, Any], **options: Any) -> dict[str, Any]:
    content = models.recipe(data, folder, student=student, stages=[{"epochs": 1}])
    content["student"]["cfg_options"] |= options
    return {**content, "training": training}


@pytest.mark.parametrize(
    ("student", "options", "message"),
    [
        ("retinanet-r18", {}, r"micro_batch: 20 batch normalisations .* \(backbone\.bn1, .*norm_eval: true"),
        ("cascade-rcnn-r18", {"model.backbone.norm_eval": True}, r"micro_batch: how the losses of a CascadeRCNN"),
        ("cascade-mask-rcnn-dcn", {"model.backbone.norm_eval": True}, r"micro_batch: how the losses of a CascadeRCNN"),
    ],
)
def test_a_student_that_cannot_be_cut_is_refused(
    data: Path, tmp_path: Path, student: str, options: dict[str, Any], message: str
) -> None:
    content = _alone(data, tmp_path, student, {"micro_batch": 2}, **options)
    with pytest.raises(RecipeError, match=rf"(?s)training\.{message}"):
        train(content, 1, 1)


@pytest.mark.parametrize(
    ("config", "known"),
    [
        ("mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py", True),
        ("ms_rcnn/ms-rcnn_r50-caffe_fpn_1x_coco.py", False),  # these two have a loss more beside their masks'
        ("point_rend/point-rend_r50-caffe_fpn_ms-1x_coco.py", False),
    ],
)
def test_a_head_with_losses_of_its_own_does_not_pass_for_a_plain_one(config: str, known: bool) -> None:
    model = load_config(f"mmdet::{config}", {"model.backbone.init_cfg": None}, "test").model
    assert sum_over_parts(MODELS.build(model)) is known


def test_what_relates_all_samples_is_refused_in_micro_batches() -> None:
    with (
        parts.cut(2, 2),
        pytest.raises(RecipeError, match=r"training\.micro_batch: FBKDLoss relates all samples"),
        parts.recording(),
    ):
        parts.joint(torch.ones(3), "FBKDLoss")


def test_gradients_through_sums_over_micro_batches_are_those_of_the_whole() -> None:
    values = torch.tensor([1.0, 2, 3, 4, 6], dtype=torch.float64, requires_grad=True)
    expected = values.square().sum() / 5 - (values.sum() / 5) ** 2
    (gradient,) = torch.autograd.grad(expected, values)

    def addend(own: torch.Tensor) -> torch.Tensor:
        parts.next_micro_batch()
        count = parts.whole(torch.tensor(float(len(own)), dtype=torch.float64))
        return own.square().sum() / count - (parts.agreed(own.sum()) / count) ** 2 / parts.count()

    pieces = (slice(0, 2), slice(2, 5))
    with parts.cut(2, 5):
        with torch.no_grad(), parts.recording():
            for piece in pieces:
                addend(values[piece])
        losses = [addend(values[piece]) for piece in pieces]
    assert torch.stack(losses).sum().item() == pytest.approx(expected.item())
    found = sum(torch.autograd.grad(loss, values)[0] for loss in losses)
    assert torch.allclose(found, gradient)


def test_more_workers_than_samples_and_other_accumulation_are_refused(data: Path, tmp_path: Path) -> None:
    content = _alone(data, tmp_path, "retinanet-r18", {"workers": 5})  # the student's config has batches of 4
    with pytest.raises(RecipeError, match=r"training\.workers: 5 workers cannot share a total batch of 4"):
        stage_config(parse_recipe(content, "test"), 1)
    content = _alone(data, tmp_path, "retinanet-r18", {}, **{"optim_wrapper.accumulative_counts": 2})
    with pytest.raises(RecipeError, match=r"accumulative_counts: .*training\.micro_batch"):
        stage_config(parse_recipe(content, "test"), 1)


def test_a_learning_rate_that_follows_the_batch_counts_it_once(data: Path, tmp_path: Path) -> None:
    content = _alone(data, tmp_path, "retinanet-r18", {"workers": 4, "batch_size": 8}, **{"auto_scale_lr.enable": True})
    cfg = stage_config(parse_recipe(content, "test"), 1)
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(0.01 * 8 / 16)
    assert not cfg.auto_scale_lr.enable
    assert cfg.train_dataloader.batch_size == cfg.model.batch_size == 8
    content["student"]["cfg_options"]["auto_scale_lr.base_batch_size"] = None
    with pytest.raises(RecipeError, match=r"auto_scale_lr\.enable: .*\{auto_scale_lr\.base_batch_size: 16\}"):
        stage_config(parse_recipe(content, "test"), 1)


@pytest.mark.parametrize(
    ("training", "options", "noted"),
    [
        ({}, {}, "rate of 0.01 is for 16 samples a step .* steps have 4: set training.batch_size: 16, or "),
        ({"batch_size": 32}, {}, "steps have 32"),
        ({"batch_size": 16}, {}, None),
        ({}, {"auto_scale_lr.enable": True}, None),
        ({}, {"optim_wrapper.optimizer.lr": 0.0025}, None),
        ({}, {"auto_scale_lr": None}, None),
    ],
)
def test_steps_that_the_learning_rate_is_not_made_for_are_noted(
    data: Path, tmp_path: Path, training: dict[str, Any], options: dict[str, Any], noted: str | None
) -> None:
    note = batch_note(parse_recipe(_alone(data, tmp_path, "retinanet-r18", training, **options), "test"))
    assert note is None if noted is None else re.search(noted, note)


def test_the_projects_own_configs_say_what_their_learning_rates_are_made_for(data: Path, tmp_path: Path) -> None:
    for config in (
        "recipes/demo/retinanet_r18_w16.py",
        "benchmarks/configs/gfl_r18.py",
        "benchmarks/configs/retinanet_swin.py",
    ):
        student = {"config": str(ROOT / config)}
        content = models.recipe(data, tmp_path) | {"student": student, "stages": [{"epochs": 1}]}
        assert batch_note(parse_recipe(content, "test")) is None
        assert batch_note(parse_recipe(content | {"training": {"batch_size": 4}}, "test"))
