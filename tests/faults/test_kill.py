"""kill -9 of the driver, of an actor and of all of Ray in the middle of a precompute, then the same command again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from cache import BudgetError, TeacherCache
from services.precompute import fill
from tests import models
from tests.trainer import precompute
from trainer import generate, load_recipe, parse_recipe

MTPD = str(Path(sys.executable).with_name("mtpd"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    """A recipe of many small units, and the features of an undisturbed run."""
    root = tmp_path_factory.mktemp("kill")
    generate(root / "data", "train", 60, seed=11)
    generate(root / "data", "val", 1, seed=11, first_id=1000)
    content = models.recipe(root / "data", root)
    content["actors"] = {"max": 1, "cpus": 1}
    recipe = parse_recipe(content, "test")
    assert precompute.fill(recipe, "small") == []
    return content, _features(recipe.cache.uri)


def _features(uri: str) -> dict[tuple[int, int], torch.Tensor]:
    cache = TeacherCache.open(uri, "small")
    return {key: torch.cat([t.flatten() for t in cache[key].features.values()]).clone() for key in cache}


def _descendants(pid: int, pattern: str) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            if pattern in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def _parts(folder: Path) -> dict[str, int]:
    return {f.name: f.stat().st_mtime_ns for f in folder.glob("small-*/manifest/*.parquet")}


def _wait_for_parts(folder: Path, child: subprocess.Popen, count: int) -> None:
    deadline = time.monotonic() + 240
    while len(_parts(folder)) < count:
        assert child.poll() is None, "the precompute ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("victim", ["driver", "actor", "ray"])
def test_a_killed_precompute_ends_with_the_same_rows(undisturbed, tmp_path: Path, victim: str) -> None:
    content, expected = undisturbed
    file = tmp_path / "recipe.yaml"
    content = {**content, "cache": {**content["cache"], "uri": str(tmp_path / "cache")}}
    file.write_text(yaml.safe_dump(content))
    command = [MTPD, "precompute", str(file), "--teacher", "small"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    _wait_for_parts(tmp_path / "cache", child, 3)
    if victim == "driver":
        os.kill(child.pid, signal.SIGKILL)
    elif victim == "actor":
        actors = _descendants(child.pid, "ray::TeacherActor")
        assert actors
        for process in actors:
            process.send_signal(signal.SIGKILL)
        # while the next actor loads, a second driver is told who writes
        second = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        if second.returncode == 1:
            assert f"process {child.pid}" in second.stderr
            assert "Traceback" not in second.stderr
        else:
            # the first was done before the second looked: then there was nothing left to do
            assert "all 120 rows are in the cache" in second.stdout
    else:
        for process in _descendants(child.pid, ""):
            process.send_signal(signal.SIGKILL)
        os.kill(child.pid, signal.SIGKILL)
    output, _ = child.communicate(timeout=240)
    if victim == "actor":
        # the run itself goes on
        assert child.returncode == 0, output
        assert "a teacher actor died" in output
    else:
        assert child.returncode == -signal.SIGKILL
        time.sleep(2)  # what a killed driver leaves behind is gone by then
        before = set(_committed(tmp_path / "cache"))
        assert 0 < len(before) < len(expected)
        shards = {f: f.stat().st_mtime_ns for f in (tmp_path / "cache").rglob("c/*/0/0/0")}
        units = {(bucket, row // 4) for bucket, row in before}
        again = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert again.returncode == 0, again.stdout + again.stderr
        # no unit that was committed is written a second time
        for shard, stamp in shards.items():
            if (shard.parts[-7], int(shard.parts[-4])) in units:
                assert shard.stat().st_mtime_ns == stamp, shard
    features = _features(str(tmp_path / "cache"))
    assert features.keys() == expected.keys()
    assert all(torch.equal(features[key], value) for key, value in expected.items())


def _committed(folder: Path) -> list[tuple[str, int]]:
    cache = TeacherCache.open(str(folder), "small")
    places = [cache.index.find(*key) for key in cache]
    return [(place.bucket, place.row) for place in places if place is not None]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_ends_in_one_message_and_loses_nothing(undisturbed, tmp_path: Path) -> None:
    content, expected = undisturbed
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("this machine does not allow mounts")
    try:
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump({**content, "cache": {**content["cache"], "uri": str(disk / "cache")}}))
        command = [MTPD, "precompute", str(file), "--teacher", "small"]
        with pytest.raises(BudgetError, match="the plan needs"):
            fill(load_recipe(file), "small")
        forced = subprocess.run([*command, "--force"], capture_output=True, text=True, timeout=240, check=False)
        assert forced.returncode == 1, forced.stdout
        assert "the disk is full" in forced.stderr
        assert "Traceback" not in forced.stderr
        kept = _features(str(disk / "cache"))
        assert 0 < len(kept) < len(expected)
        assert all(torch.equal(expected[key], value) for key, value in kept.items())
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        again = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert again.returncode == 0, again.stderr
        assert _features(str(disk / "cache")).keys() == expected.keys()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)
