"""A stage on two nodes that loses a worker, then a node; and the same by torchrun, undisturbed."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
import yaml
from ray.cluster_utils import Cluster

from cache import MtpdError
from services.train import train
from tests import models
from tests.trainer import precompute
from trainer import parse_recipe, stage_dir
from trainer.checkpoint import read_weights

SAME = 8  # the step whose checkpoints must be equal bit for bit: behind the kill, before the node is lost
TOLERANCE = 1e-4  # of the weights at the end: from the lost node on one worker takes each step, not two


@pytest.fixture(autouse=True)
def _no_ray_left() -> Iterator[None]:
    yield
    ray.shutdown()


def _content(data: Path, folder: Path, workers: Any) -> dict[str, Any]:
    stages = [{"teacher": "small", "mechanisms": [{"type": "MGDLoss", "loss_weight": 1e-3}], "epochs": 4}]
    content = models.recipe(data, folder, stages=stages)
    content["student"]["cfg_options"]["train_cfg.val_interval"] = 4
    content["training"] = {"workers": workers, "cpus": 1, "checkpoint_steps": 1, "batch_size": 4}
    return content


def test_code_that_fails_alike_twice_is_not_tried_again_and_says_where(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = models.recipe(data, tmp_path, stages=[{"epochs": 1}])
    content["student"]["cfg_options"]["model.bbox_head.loss_bbox.type"] = "NoSuchLoss"
    content["training"] = {"cpus": 1}
    with pytest.raises(MtpdError, match=r"twice the same, .*: KeyError: .*NoSuchLoss.* \(.*\.py:\d+\)"):
        train(parse_recipe(content, "test"), [1])
    assert capsys.readouterr().out.count("a worker failed") == 1


def _wait(condition: Callable[[], Any], still: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert still(), "it ended before"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _steps(folder: Path) -> int:
    return max((int(file.stem[5:]) for file in folder.glob("iter_*.pth")), default=0)


def _take(folder: Path, step: int, still: Callable[[], bool]) -> dict[str, Any]:
    """A step's checkpoint, once the next one is begun: the last two are kept."""
    _wait(lambda: _steps(folder) > step, still)
    copy = folder.parent / f"kept_{step}.pth"
    shutil.copy(folder / f"iter_{step}.pth", copy)
    assert zipfile.is_zipfile(copy)
    return torch.load(copy, weights_only=False)


def test_a_killed_worker_and_a_lost_node_cost_the_steps_since_the_last_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = _content(data, tmp_path / "plain", 2)
    precompute.fill(parse_recipe(content, "test"), "small")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    plain = stage_dir(parse_recipe(content, "test"), 1)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "trainer"]
    torchrun = subprocess.Popen(
        [*command, str(tmp_path / "recipe.yaml"), "--stage", "1"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    expected = _take(plain, SAME, lambda: torchrun.poll() is None)
    output, _ = torchrun.communicate(timeout=240)
    assert torchrun.returncode == 0, output.decode()[-3000:]

    disturbed = {**_content(data, tmp_path / "disturbed", {"min": 1, "max": 2}), "cache": content["cache"]}
    recipe = parse_recipe(disturbed, "test")
    folder = stage_dir(recipe, 1)
    # Ray counts a lost node in for up to 20 s: workers that cannot start there are given up sooner than after its minute
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        lost = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        results: list[Any] = []
        driver = threading.Thread(target=lambda: results.extend(train(recipe, [1], quiet=True)), daemon=True)
        driver.start()
        _wait(lambda: _steps(folder) >= 3, driver.is_alive)
        workers = _training_workers()
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        found = _take(folder, SAME, driver.is_alive)
        assert not set(workers) & set(_training_workers()), "the steps were made by those that were to die"
        cluster.remove_node(lost, allow_graceful=False)
        driver.join(timeout=240)
        assert results, "it failed, or it hangs"
    finally:
        ray.shutdown()
        cluster.shutdown()
    for part in ("state_dict", "optimizer"):
        assert _equal(found[part], expected[part]), part
    a, b = (read_weights(of / "student.pth", "test") for of in (plain, folder))
    assert a.keys() == b.keys()
    assert not all(torch.equal(a[name], b[name]) for name in a), "two workers made the last steps, not one"
    apart = {name: float((b[name] - value).abs().max()) for name, value in a.items()}
    print(max(apart.items(), key=lambda item: item[1]))
    assert max(apart.values()) < TOLERANCE, apart


def _training_workers() -> list[int]:
    """Ids of the processes that train."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found += [process.pid] if "RayTrainWorker" in " ".join(process.cmdline()) else []
    return sorted(found)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b
