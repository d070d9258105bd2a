"""Stages that are trained while their cache fills."""

import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.runner import Runner

from cache import (
    Lease,
    MissingRowsError,
    RunProgress,
    load_index,
    make_plan,
    open_storage,
    prepare,
    write_progress,
    write_unit,
)
from tests import models
from tests.trainer import precompute
from trainer import (
    Recipe,
    Teacher,
    UnitComputer,
    first_epoch,
    parse_recipe,
    read_annotations,
    stage_config,
    stage_dir,
    teacher_info,
    train_stage,
)
from trainer.checkpoint import read_weights


def recipe_of(data: Path, folder: Path, on_missing: str, workers: int = 0) -> Recipe:
    stages = [{"teacher": "small", "mechanisms": [{"type": "MGDLoss", "loss_weight": 1e-3}], "epochs": 2}]
    content = models.recipe(data, folder, stages=stages)
    content["cache"]["on_missing"] = on_missing
    content["student"]["cfg_options"]["train_dataloader.num_workers"] = workers
    return parse_recipe(content, "test")


def test_the_rows_that_are_computed_first_are_those_of_the_first_epoch_in_its_order(data: Path, tmp_path: Path) -> None:
    recipe = recipe_of(data, tmp_path, "wait")
    cfg = stage_config(recipe, 1, "online")
    loader = Runner.build_dataloader(cfg.train_dataloader, seed=recipe.training.seed)
    dataset, views = loader.dataset, len(recipe.policy)
    read = [(dataset.get_data_info(item)["img_id"], item % views) for batch in loader.batch_sampler for item in batch]
    ids = read_annotations(recipe.dataset.train.ann_file, "test").images.ids
    first = [(int(ids[member // views]), member % views) for member in first_epoch(recipe).tolist()]
    assert 0 < len(first) < ids.size  # images without objects are not trained on
    assert sorted(set(read)) == sorted(first)
    if not cfg.train_dataloader.batch_sampler.by_shape:
        assert read[: len(first)] == first
    else:  # batches of one shape are taken as they become full
        turns = [first.index(row) for row in dict.fromkeys(read)]
        assert np.corrcoef(turns, np.arange(len(turns)))[0, 1] > 0.7


class Filler(threading.Thread):
    """A precompute in a thread, slower than the student; the teacher is built before, for that draws random numbers."""

    def __init__(self, recipe: Recipe, units: int | None = None) -> None:
        super().__init__(daemon=True)
        self._begun = None if units is None else stage_dir(recipe, 1) / "stage.json"
        self._storage, self._info = open_storage(recipe.cache.uri), teacher_info(recipe, "small")
        self._plan = make_plan(
            read_annotations(recipe.dataset.train.ann_file, "test").images,
            recipe.policy,
            self._info,
            committed=load_index(self._storage, self._info),
            unit_rows=recipe.cache.unit_rows,
            first=first_epoch(recipe),
        )
        spec = recipe.teachers["small"]
        teacher = Teacher.of_group(spec, self._info)
        self._computer = UnitComputer(teacher, self._info, recipe.policy, recipe.dataset.train, spec.batch_size)
        self._units = units
        self.committed: list[float] = []

    def run(self) -> None:
        with Lease(self._storage, self._info.name) as lease:
            said = RunProgress(lease.run, "here", 1, "running", "", 0.0, None, 0.0, 40, 0, 0, 0, 0, (), 1, 0)
            write_progress(self._storage, self._info.name, said)
            prepare(self._storage, self._plan)
            for unit in list(self._plan.units())[: self._units]:
                time.sleep(0.3)
                write_unit(self._storage, self._info, unit, self._computer.run(unit)[0])
                self.committed.append(time.time())
            while self._begun is not None and not self._begun.exists():
                time.sleep(0.1)
            time.sleep(4.0 if self._begun else 0.0)  # until the student waits
            write_progress(self._storage, self._info.name, replace(said, state="done"))


def test_a_stage_trained_while_its_cache_fills_is_the_one_trained_from_a_full_cache(data: Path, tmp_path: Path) -> None:
    full, filling = recipe_of(data, tmp_path / "full", "error"), recipe_of(data, tmp_path / "filling", "wait")
    precompute.fill(full, "small")
    expected = train_stage(full, 1)
    filler = Filler(filling)
    filler.start()
    result = train_stage(filling, 1)
    filler.join()
    assert (stage_dir(filling, 1) / "stage.json").stat().st_mtime < filler.committed[1], "nothing was waited for"
    assert result.metrics == expected.metrics
    a, b = (read_weights(one.student, "test") for one in (expected, result))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_precompute_that_ends_too_early_ends_training_in_one_message(data: Path, tmp_path: Path) -> None:
    recipe = recipe_of(data, tmp_path, "wait", workers=1)
    filler = Filler(recipe, units=2)
    filler.start()
    with pytest.raises(MissingRowsError) as caught:
        train_stage(recipe, 1)
    filler.join()
    message = str(caught.value)
    assert message.startswith(f"{recipe.cache.uri}: waited for the row of image ")
    assert "of teacher 'small', which will not come: " in message
    assert " ended without it. Run `mtpd precompute" in message
    assert "\n" not in message
