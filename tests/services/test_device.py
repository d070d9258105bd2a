"""A GPU that Ray gives and torch cannot use ends in a word about it, not in a run on the CPUs that takes days."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from cache import MtpdError, RecipeError, TeacherLoadError
from services.measure import measure_job
from services.order import find_order
from services.precompute import fill, plan_teacher
from services.train import train
from tests import models
from tests.trainer import precompute
from trainer import Recipe, choose_rows, parse_recipe, with_candidates

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use this machine's GPU")


@pytest.fixture(scope="module", autouse=True)
def node_with_a_gpu_in_name_only() -> Iterator[None]:
    ray.init("local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def measured_order(recipe: Recipe) -> object:
    """An order for which one accuracy is to be measured; its features are there."""
    for name in (candidates := with_candidates(recipe)).teachers:
        precompute.fill(candidates, name, choose_rows(range(1, 21), 2, 8))
    return find_order(recipe)


def trained(recipe: Recipe) -> object:
    precompute.fill(recipe, "small")
    return train(recipe, [1], quiet=True)


@pytest.mark.parametrize(
    ("work", "error", "keys"),
    [
        (lambda recipe: fill(recipe, "small"), TeacherLoadError, "teachers.small / actors.gpus"),
        (measured_order, TeacherLoadError, "teachers.swin / actors.gpus"),
        (
            lambda recipe: measure_job(recipe, [plan_teacher(recipe, "small")]),
            RecipeError,
            "actors.gpus, training.gpus",
        ),
        (trained, RecipeError, "training.gpus"),  # the last: Ray Train keeps the GPU of workers that did not start
    ],
    ids=["precompute", "order", "plan", "train"],
)
def test_a_gpu_that_torch_cannot_use_is_told(
    data: Path, tmp_path: Path, work: Callable[[Recipe], Any], error: type[MtpdError], keys: str
) -> None:
    content = models.recipe(data, tmp_path)
    content["student"]["checkpoint"] = str(models.checkpoint("retinanet-r18", data, seed=1))
    content["order"] = {"images": 8}
    content["teachers"]["small"]["ap"] = 10.0
    content["stages"] = content["stages"][:1]
    content["training"] = {"cpus": 1}
    with pytest.raises(error, match=r"was given a GPU that torch cannot use \(driver, image\); mend it") as caught:
        work(parse_recipe(content, "test"))
    assert type(caught.value) is error  # not Ray's, whose message is a traceback
    assert str(caught.value).startswith(f"{keys}: ")
