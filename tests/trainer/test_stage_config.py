"""What becomes of a student's own config in a stage's, and which of them are refused before anything runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.registry import PARAM_SCHEDULERS

from cache import RecipeError
from tests import models
from trainer import Recipe, parse_recipe, stage_config
from trainer.schedule import set_schedule


def recipe_of(data: Path, folder: Path, epochs: int = 12, config: str | None = None, **options: Any) -> Recipe:
    content = models.recipe(data, folder)
    content["student"]["cfg_options"] |= options
    content["student"]["config"] = config or content["student"]["config"]
    content["stages"] = [{"epochs": epochs}]
    return parse_recipe(content, "test")


def with_schedule(data: Path, folder: Path, given: Any, epochs: int = 12) -> Recipe:
    """A student whose config has this ``param_scheduler``: one, several or none."""
    shipped = models.recipe(data, folder)["student"]["config"]
    one = dict(given, _delete_=True) if isinstance(given, dict) else given
    (folder / "student.py").write_text(f"_base_ = {shipped!r}\nparam_scheduler = {one!r}\n")
    return recipe_of(data, folder, epochs, str(folder / "student.py"))


def rates(cfg: Config) -> list[float]:
    """The learning rate of every step of a stage, of a base rate of 1, by mmengine's own schedulers."""
    epochs, data = cfg.train_cfg.max_epochs, DATASETS.build(cfg.train_dataloader.dataset)
    data.full_init()
    steps = -(-len(data) // data.views // cfg.train_dataloader.batch_size)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    built = [
        PARAM_SCHEDULERS.build(
            {"end": epochs if one.get("by_epoch", True) else epochs * steps} | one,
            default_args=dict(optimizer=optimizer, epoch_length=steps),
        )
        for one in cfg.param_scheduler
    ]
    found = []
    for step in range(1, epochs * steps + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for scheduler in built:
            if not scheduler.by_epoch or step % steps == 0:
                scheduler.step()
    return found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"custom_hooks": [{"type": "YOLOXModeSwitchHook", "num_last_epochs": 15}]},
            "YOLOXModeSwitchHook, .*custom_hooks: ",
        ),
        (
            {"model.data_preprocessor.batch_augments": [{"type": "BatchFixedSizePad", "size": [96, 128]}]},
            r"batch_augments, .*model\.data_preprocessor\.batch_augments: null",
        ),
        (
            {"optim_wrapper.constructor": "LearningRateDecayOptimizerConstructor"},
            r"optim_wrapper\.constructor: LearningRateDecay.*DefaultOptimWrapperConstructor",
        ),
    ],
)
def test_what_looks_for_its_detector_elsewhere_is_refused(
    data: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=rf"^student\.config: .*{message}"):
        stage_config(recipe_of(data, tmp_path, **options), 1)


def test_a_second_pipeline_goes_the_way_of_the_first(data: Path, tmp_path: Path) -> None:
    hooks = [{"type": "PipelineSwitchHook", "switch_epoch": 280}, {"type": "EMAHook"}]
    cfg = stage_config(recipe_of(data, tmp_path, custom_hooks=hooks), 1)
    assert [hook["type"] for hook in cfg.custom_hooks] == ["EMAHook", "SeedStepHook"]


def test_what_lasts_no_epoch_of_a_short_stage_is_left_out_of_its_schedule(data: Path, tmp_path: Path) -> None:
    long = [
        {"type": "QuadraticWarmupLR", "by_epoch": True, "begin": 0, "end": 5},
        {"type": "CosineAnnealingLR", "by_epoch": True, "begin": 5, "end": 285, "T_max": 285},
        {"type": "ConstantLR", "by_epoch": True, "factor": 1, "begin": 285, "end": 300},
    ]
    options = {"train_cfg.max_epochs": 300, "param_scheduler": long}
    cfg = stage_config(recipe_of(data, tmp_path, **options), 1)
    assert [(one.type, one.begin, one.end) for one in cfg.param_scheduler] == [
        ("CosineAnnealingLR", 0, 11),
        ("ConstantLR", 11, 12),
    ]


WARM_UP = {"type": "LinearLR", "start_factor": 0.001, "by_epoch": False, "begin": 0, "end": 500}


def test_a_schedule_in_iterations_runs_over_the_whole_stage(data: Path, tmp_path: Path) -> None:
    """Five steps an epoch, for 19 of 20 images have objects."""
    polynomial = {"type": "PolyLR", "by_epoch": False, "begin": 0, "end": 7000, "power": 1.0}
    found = rates(stage_config(with_schedule(data, tmp_path, polynomial), 1))
    assert len(found) == 60
    assert found == pytest.approx([1 - step / 59 for step in range(60)], abs=1e-9)
    del polynomial["end"]
    assert rates(stage_config(with_schedule(data, tmp_path, [polynomial]), 1)) == pytest.approx(found)
    cosine = {"type": "CosineAnnealingLR", "by_epoch": False, "begin": 500, "end": 90500, "T_max": 90000}
    cfg = stage_config(with_schedule(data, tmp_path, [WARM_UP, cosine]), 1)
    assert [(one.begin, one.end) for one in cfg.param_scheduler] == [(0, 6), (6, 60)]
    assert cfg.param_scheduler[1].T_max == 54
    found = rates(cfg)
    assert (found[0], found[5]) == pytest.approx((0.001, 1))
    assert (found[33], found[59]) == pytest.approx((0.5, 0.00085), abs=1e-4)
    # of three epochs a tenth is one step, in which mmengine's warm-up would begin and never rise
    assert rates(stage_config(recipe_of(data, tmp_path, 3), 1)) == pytest.approx([1] * 10 + [0.1] * 5)
    # a base rate that falls to an end is not a warm-up
    falling = {"type": "LinearLR", "start_factor": 1.0, "end_factor": 0.5, "by_epoch": False, "begin": 0, "end": 900}
    found = rates(stage_config(with_schedule(data, tmp_path, [falling]), 1))
    assert (found[0], found[-1]) == pytest.approx((1, 0.5))


@pytest.mark.parametrize(
    ("epochs", "given", "expected"),
    [
        (6, {"type": "StepLR", "step_size": 8}, [1] * 20 + [0.1] * 10),
        (6, {"type": "ExponentialLR", "gamma": 0.5}, [0.25**epoch for epoch in range(6) for _ in range(5)]),
        (6, {"type": "MultiStepLR", "milestones": [4, 8], "begin": 2}, [1] * 15 + [0.1] * 10 + [0.01] * 5),
        (
            2,
            {"type": "MultiStepLR", "milestones": [60000, 80000], "by_epoch": False, "end": 90000},
            [1] * 7 + [0.1] * 2 + [0.01],
        ),
        (24, None, [1] * 120),
    ],
)
def test_every_kind_of_schedule_is_stretched(
    data: Path, tmp_path: Path, epochs: int, given: dict[str, Any] | None, expected: list[float]
) -> None:
    cfg = stage_config(with_schedule(data, tmp_path, given, epochs), 1)
    assert rates(cfg) == pytest.approx(expected)


def test_one_cycle_and_periods_fill_a_longer_stage(data: Path, tmp_path: Path) -> None:
    cycle = {"type": "OneCycleLR", "eta_max": 1.0, "total_steps": 12}
    found = rates(stage_config(with_schedule(data, tmp_path, cycle, 24), 1))
    assert max(found) == pytest.approx(1, abs=0.02)
    assert found.index(max(found)) == pytest.approx(0.3 * len(found), abs=6)
    assert found[-1] < 1e-3
    restarts = {"type": "CosineRestartLR", "periods": [4, 8], "restart_weights": [1, 0.5], "eta_min": 0}
    found = rates(stage_config(with_schedule(data, tmp_path, restarts, 24), 1))
    assert (found[0], found[40]) == (1, 0.5)
    assert max(found[35:40]) < 0.1 > found[-1]


def test_a_config_that_is_counted_in_iterations_is_trained_for_epochs(data: Path, tmp_path: Path) -> None:
    shipped = "mmdet::retinanet/retinanet_r50_fpn_90k_coco.py"
    cfg = stage_config(recipe_of(data, tmp_path, config=shipped), 1)
    warm_up, steps = cfg.param_scheduler
    assert (warm_up.end, steps.end, steps.milestones) == (6, 60, [40, 53])
    assert cfg.train_cfg == dict(type="ResumableEpochLoop", max_epochs=12, val_interval=1)
    assert cfg.log_processor.by_epoch


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            [WARM_UP, {"type": "MultiStepLR", "by_epoch": False, "milestones": [60000, 80000]}],
            r"param_scheduler\.1 \(MultiStepLR\) is counted in iterations.*: \{param_scheduler\.1\.end: 90000\}",
        ),
        (
            {"type": "StepLR", "by_epoch": False, "step_size": 30000},
            r"param_scheduler \(StepLR\) is counted in iterations.*: \{param_scheduler\.end: 90000\}",
        ),
    ],
)
def test_a_schedule_of_unknown_length_is_refused_with_the_key(
    data: Path, tmp_path: Path, given: Any, message: str
) -> None:
    with pytest.raises(RecipeError, match=rf"^student\.config: {message}"):
        stage_config(with_schedule(data, tmp_path, given), 1)
    # the key that it names is the way out
    end = {f"param_scheduler.{'1.' if isinstance(given, list) else ''}end": 90000}
    stage_config(recipe_of(data, tmp_path, 12, str(tmp_path / "student.py"), **end), 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"train_cfg": {"_delete_": True, "max_iters": 90000}},
            r"param_scheduler\.1 \(MultiStepLR\) is counted in epochs.*: \{train_cfg\.max_epochs: 12\}",
        ),
        ({"train_cfg.max_epochs": None}, r"train_cfg has neither.*: \{train_cfg\.max_epochs: 12\}"),
    ],
)
def test_a_training_of_unknown_epochs_is_refused_with_the_key(
    data: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=rf"^student\.config: {message}"):
        stage_config(recipe_of(data, tmp_path, **options), 1)


@pytest.mark.parametrize(
    ("epochs", "milestones"),
    [
        (1, [1]),  # never reached
        (2, [1]),
        (3, [2]),
        (4, [3]),
        (5, [3, 4]),
        (6, [4, 5]),
        (12, [8, 11]),
        (24, [16, 22]),
        (36, [24, 33]),
    ],
)
def test_schedules_of_a_set_of_cocos_size_are_the_published_ones(
    data: Path, tmp_path: Path, epochs: int, milestones: list[int]
) -> None:
    recipe = recipe_of(data, tmp_path, epochs, **{"train_dataloader.batch_size": 16})  # eight GPUs with two images each
    cfg = stage_config(recipe, 1)
    fresh = models.load_config(recipe.student.config, recipe.student.cfg_options, "test")
    set_schedule(fresh, epochs, steps=7330, images=118_287)
    warm_up, steps = fresh.param_scheduler
    assert (warm_up.type, warm_up.start_factor, warm_up.begin, warm_up.end) == ("LinearLR", 0.001, 0, 500)
    assert (steps.type, steps.milestones, steps.gamma, steps.end) == ("MultiStepLR", milestones, 0.1, epochs)
    assert (cfg.optim_wrapper.optimizer.lr, cfg.optim_wrapper.optimizer.momentum) == (0.01, 0.9)
    assert cfg.optim_wrapper.clip_grad == {"max_norm": 35.0, "norm_type": 2}


@pytest.mark.parametrize("change", ["no objects", "small images"])
def test_a_data_set_of_which_nothing_is_left_is_refused_with_the_way_out(
    data: Path, tmp_path: Path, change: str
) -> None:
    content = json.loads((data / "annotations" / "train.json").read_text())
    if change == "no objects":
        content["annotations"] = []
    else:
        content["images"] = [{**image, "width": 31} for image in content["images"]]
    file = tmp_path / "train.json"
    file.write_text(json.dumps(content))

    def made(**options: Any) -> Recipe:
        recipe = recipe_of(data, tmp_path, **options)
        train = recipe.dataset.train.model_copy(update={"ann_file": str(file)})
        return recipe.model_copy(update={"dataset": recipe.dataset.model_copy(update={"train": train})})

    with pytest.raises(RecipeError, match=r"dataset\.train: .*leaves out every image .*filter_empty_gt: false"):
        stage_config(made(), 1)
    kept = {"train_dataloader.dataset.filter_cfg": {"filter_empty_gt": False, "min_size": 0}}
    stage_config(made(**kept), 1)
