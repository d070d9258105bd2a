"""What becomes of a student's own config in a stage's, and which of them are refused before anything runs."""

import json
from pathlib import Path
from typing import Any

import pytest

from cache import RecipeError
from tests import models
from trainer import Recipe, parse_recipe, stage_config


def recipe_of(data: Path, folder: Path, **options: Any) -> Recipe:
    content = models.recipe(data, folder)
    content["student"]["cfg_options"] |= options
    content["stages"] = [{"epochs": 12}]
    return parse_recipe(content, "test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"custom_hooks": [{"type": "YOLOXModeSwitchHook", "num_last_epochs": 15}]},
            "YOLOXModeSwitchHook, .*custom_hooks: ",
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
