from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def made(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A run of two stages of two epochs, evaluated after each."""
    from services.records import keep_recipe
    from tests import models
    from tests.trainer import precompute
    from trainer import parse_recipe, train_stage

    folder = tmp_path_factory.mktemp("report")
    content = models.recipe(data, folder)
    content["views"]["flip"] = "none"
    content["student"]["cfg_options"]["train_cfg.val_interval"] = 1
    for stage in content["stages"]:
        stage["epochs"] = 2
    for teacher in content["teachers"].values():
        teacher["batch_size"] = 4
    recipe = parse_recipe(content, "test")
    keep_recipe(recipe)
    for name in recipe.teachers:
        assert not precompute.fill(recipe, name)
    for number in (1, 2):
        train_stage(recipe, number)
    return recipe, Path(recipe.work_dir)
