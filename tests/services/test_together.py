"""Several teachers filled at once on one Ray: the error of one, and an interruption of all."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from cache import TeacherCache, TeacherLoadError, lease_holder, open_storage, read_progress
from services.precompute import fill_all
from tests import models
from trainer import Recipe, parse_recipe, teacher_info

TEACHERS = ["swin", "small"]


@pytest.fixture(autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def interrupt_after_a_commit(recipe: Recipe) -> None:
    """Ctrl-C when the first part of a manifest is there."""
    deadline = time.monotonic() + 120
    while not list(Path(recipe.cache.uri).glob("*/manifest/*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_stops_all_and_a_teacher_that_cannot_be_loaded_does_not_stop_the_other(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = models.recipe(data, tmp_path)
    content["actors"] = {"max": 1, "cpus": 1}
    recipe = parse_recipe(content, "test")
    storage = open_storage(recipe.cache.uri)
    groups = {name: teacher_info(recipe, name).name for name in TEACHERS}
    thread = threading.Thread(target=interrupt_after_a_commit, args=(recipe,))
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        fill_all(recipe, TEACHERS)
    thread.join()
    for name in TEACHERS:
        told = read_progress(storage, groups[name])
        assert told is not None
        assert told.state == "interrupted"
        assert lease_holder(storage, groups[name]) is None

    # the weights of another detector: the file is there, and only the actor finds that they do not fit
    content["teachers"]["swin"]["checkpoint"] = content["teachers"]["small"]["checkpoint"]
    wrong = parse_recipe(content, "test")
    with pytest.raises(TeacherLoadError):
        fill_all(wrong, TEACHERS)
    assert len(TeacherCache.open(recipe.cache.uri, "small")) == 40
    said = capsys.readouterr()
    assert "teacher swin: " in said.err
    assert "teacher small: " in said.out
    assert "written to small-" in said.out
