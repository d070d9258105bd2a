"""`mtpd run` on a real cluster of two CPUs where students wait: teachers are filled while stages train."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch

from cache import TeacherLoadError
from services.overlap import run_job
from tests import models
from trainer import parse_recipe, stage_dir


@pytest.fixture(autouse=True)
def two_cpus() -> Iterator[None]:
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def test_a_precompute_that_fails_beside_training_leaves_the_trained_stage_and_is_gone_on_with(
    data: Path, tmp_path: Path, capsys
) -> None:
    content = models.recipe(data, tmp_path)
    content["cache"]["on_missing"] = "wait"
    content["actors"], content["training"] = {"max": 1, "cpus": 1}, {"cpus": 1}
    recipe = parse_recipe(content, "test")
    whole = torch.load(recipe.teachers["swin"].checkpoint)
    broken = tmp_path / "broken.pth"
    torch.save({"state_dict": dict(list(whole["state_dict"].items())[:-1])}, broken)
    swin = recipe.teachers["swin"].model_copy(update={"checkpoint": str(broken)})
    failing = recipe.model_copy(update={"teachers": {**recipe.teachers, "swin": swin}})
    with pytest.raises(TeacherLoadError, match=r"teachers\.swin"):
        run_job(failing)
    printed = capsys.readouterr()
    assert "small then swin: filled by 1 of 1 actors while the stages train" in printed.out
    assert "the precompute ended: teachers.swin" in printed.err
    assert (stage_dir(recipe, 1) / "student.pth").exists()
    interrupts = signal.getsignal(signal.SIGINT)
    fills, stages = run_job(recipe)
    assert signal.getsignal(signal.SIGINT) is interrupts, "Ray Train's own is left behind"
    printed = capsys.readouterr().out
    # the first stage is trained: its teacher is not needed any more
    assert [(result.teacher, result.computed) for result in fills] == [("swin", 40)]
    assert [result.stage for result in stages] == [1, 2]
    assert printed.index("stage 1 of 2 (small, 1 epochs): done before") < printed.index("teacher swin: 40 rows in")
