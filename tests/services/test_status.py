"""`mtpd status` from what runs leave in the store: under way, killed, failed, done; on disk and in a bucket; and of stages."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from cache import Lease, LocalStorage, Storage, find_garbage, open_storage, prepare, read_progress, verify, write_unit
from cache.layout import PROGRESS
from services import status as state
from services.cli import app
from services.journal import Journal
from tests import models
from tests.cache import make
from tests.cache.object_store import Bucket, bucket  # noqa: F401 - a fixture
from tests.trainer import precompute
from trainer import Failure, load_recipe, parse_recipe, stage_dir, teacher_info, train_stage

GROUP = make.info()
LOST = Failure(6, 1, "6.jpg", "cannot be decoded")


def compute(storage: Storage, units: int | None = None, lost: tuple[Failure, ...] = ()) -> state.GroupStatus:
    """A run on a part of its units, with the journal that the driver keeps. What its status was before it ended."""
    with Lease(storage, GROUP.name) as lease:
        plan = make.plan(storage, GROUP, make.images(6))
        prepare(storage, plan)
        with Journal(storage, plan, lease, actors=2, period=0.05) as journal:
            began = time.monotonic()
            for unit in list(plan.units())[:units]:
                targets = make.targets(GROUP, unit)
                journal.count(len(targets), write_unit(storage, GROUP, unit, targets), lost)
                journal.update(began, retried=1)
            time.sleep(0.3)
            return state.group_status(storage, GROUP)


def check_run_under_way(storage: Storage) -> None:
    under_way = compute(storage, 1, (LOST,))
    assert (under_way.state, under_way.rows, under_way.planned, under_way.failed) == ("running", 4, 12, 1)
    assert under_way.holder is not None
    assert under_way.holder.pid == os.getpid()
    # 5 of 12 rows are done with, in at least 0.3 seconds
    assert under_way.rate is not None
    assert 0 < under_way.rate < 5 / 0.25
    assert under_way.seconds_left == pytest.approx(7 / under_way.rate)
    ended = state.group_status(storage, GROUP)
    assert (ended.state, ended.rows, ended.holder, ended.seconds_left) == ("incomplete", 4, None, None)
    assert [f.reason for f in ended.failures] == ["cannot be decoded"]
    compute(storage)
    ended = state.group_status(storage, GROUP)
    assert (ended.state, ended.rows, ended.failed) == ("complete", 12, 0)


def test_a_run_under_way_and_after_it(tmp_path: Path) -> None:
    check_run_under_way(LocalStorage(tmp_path))


def test_a_recipe_counts_its_own_images_in_a_group_that_others_fill_too(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    compute(storage)
    ids = make.images(6).ids
    other = state.Wanted(np.concatenate([ids[:4], ids.max() + np.arange(1, 3)]), 2)
    found = state.group_status(storage, GROUP, other)
    assert (found.state, found.rows, found.planned) == ("incomplete", 8, 12)
    found = state.group_status(storage, GROUP, state.Wanted(ids, 2))
    assert (found.state, found.rows, found.planned) == ("complete", 12, 12)


def test_the_same_in_a_bucket(bucket: Bucket) -> None:  # noqa: F811
    check_run_under_way(open_storage(bucket.uri))


def test_a_killed_run_has_stopped_and_a_failed_one_says_why(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    child = os.fork()
    if not child:
        Journal.__exit__ = lambda *_: os._exit(9)  # type: ignore[method-assign]
        compute(storage, 2)
    os.waitpid(child, 0)
    found = state.group_status(storage, GROUP)
    assert (found.state, found.rows, found.holder) == ("stopped", 8, None)
    assert found.last_sign is not None
    assert time.time() - found.last_sign < 60
    plan = make.plan(storage, GROUP, make.images(6))
    with Lease(storage, GROUP.name) as lease, pytest.raises(OSError, match="full"), Journal(storage, plan, lease, 1):
        raise OSError("the disk is full")
    found = state.group_status(storage, GROUP)
    assert (found.state, found.message, found.rows) == ("failed", "the disk is full", 8)


def test_who_lost_the_lease_does_not_write_over_what_another_run_tells(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    make.fill(storage, GROUP, make.images(3))
    plan = make.plan(storage, GROUP, make.images(6))
    with Lease(storage, GROUP.name) as old, Journal(storage, plan, old, 1, period=100) as journal:
        old._lost.set()
        (tmp_path / GROUP.name / PROGRESS).write_text("another's")
        journal.count(4, 1, ())
    assert (tmp_path / GROUP.name / PROGRESS).read_text() == "another's"


def test_gc_and_verify_leave_the_record_alone_and_a_damaged_one_is_none(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    compute(storage)
    assert read_progress(storage, GROUP.name) is not None
    assert list(find_garbage(storage, GROUP)) == []
    report = verify(storage, GROUP)
    assert (report.damages, report.uncommitted) == ([], [])
    file = tmp_path / GROUP.name / PROGRESS
    record = json.loads(file.read_text())
    for damage in ({"rows": "many"}, {"begun": float("nan")}, {"state": "asleep"}, {"failures": None}):
        file.write_text(json.dumps({**record, **damage}))
        assert read_progress(storage, GROUP.name) is None
        found = state.group_status(storage, GROUP)
        assert (found.state, found.rows, found.planned) == ("complete", 12, 12)


class Steps:
    """Time, in which watching waits for the next thing to happen instead of seconds."""

    def __init__(self, *steps: Callable[[], object]) -> None:
        self.left = list(steps)
        self.time, self.strftime = time.time, time.strftime

    def sleep(self, _seconds: float) -> None:
        self.left.pop(0)()


def test_watching_a_job_goes_on_between_its_parts_until_its_last_stage_is_done(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parse_recipe(models.recipe(data, tmp_path), "test")
    target = state.Target(open_storage(recipe.cache.uri), recipe)

    def done(stage: int) -> None:
        stage_dir(recipe, stage).mkdir(parents=True)
        (stage_dir(recipe, stage) / "result.json").write_text('{"metrics": {}}')

    def removed(teacher: str) -> None:  # `mtpd gc --finished`
        shutil.rmtree(tmp_path / "cache" / teacher_info(recipe, teacher).name)

    steps = Steps(
        lambda: precompute.fill(recipe, "small"),
        lambda: precompute.fill(recipe, "swin"),
        lambda: done(1),
        lambda: removed("small"),
        lambda: done(2),
    )
    monkeypatch.setattr(state, "time", steps)
    state.watch(target, 1)
    assert steps.left == []


def test_watching_a_cache_ends_when_its_groups_are_complete_or_one_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = LocalStorage(tmp_path)
    steps = Steps(lambda: compute(storage, 1), lambda: compute(storage))
    monkeypatch.setattr(state, "time", steps)
    state.watch(state.Target(storage, None), 1)
    assert steps.left == []
    (tmp_path / "other").mkdir()
    storage = LocalStorage(tmp_path / "other")
    compute(storage, 1)
    plan = make.plan(storage, GROUP, make.images(6))
    with Lease(storage, GROUP.name) as lease, pytest.raises(OSError, match="full"), Journal(storage, plan, lease, 1):
        raise OSError("the disk is full")
    state.watch(state.Target(storage, None), 1)


def test_stages_of_a_recipe(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    content = models.recipe(data, tmp_path)
    content["stages"][0]["epochs"] = 2
    file.write_text(yaml.safe_dump(content))
    recipe = load_recipe(file)
    precompute.fill(recipe, "small")
    pulses = []
    trained = train_stage(recipe, 1, listen=pulses.append)
    ran = CliRunner().invoke(app, ["status", str(file), "--json"], catch_exceptions=False)
    found = json.loads(ran.output)
    assert [(g["teacher"], g["state"], g["rows"], g["planned"]) for g in found["groups"]] == [
        ("small", "complete", 40, 40),
        ("swin", "empty", 0, 40),
    ]
    first, second = found["stages"]
    assert (first["state"], first["epoch"], first["epochs"]) == ("done", 2, 2)
    assert first["metrics"]["bbox_mAP"] >= 0
    assert first["losses"]["loss"] > 0
    assert (second["state"], second["epoch"]) == ("not begun", 0)
    # the pulses counted every step, and the time of each
    assert sum(p.steps for p in pulses) == pulses[-1].iterations == 10
    assert sum(p.images for p in pulses) == trained.images
    assert all(0 < p.data_seconds < p.seconds for p in pulses)
    # killed now, and looked at later
    (stage_dir(recipe, 1) / "result.json").unlink()
    pulse = stage_dir(recipe, 1) / "pulse.json"
    for written, expected in ((time.time(), "training"), (time.time() - 3600, "stopped")):
        pulse.write_text(json.dumps({**json.loads(pulse.read_text()), "written": written}))
        assert state.status(state.Target(open_storage(recipe.cache.uri), recipe)).stages[0].state == expected
    # killed before its first pulse
    pulse.unlink()
    os.utime(stage_dir(recipe, 1) / "stage.json", (time.time() - 3600,) * 2)
    shown = CliRunner().invoke(app, ["status", str(file)], catch_exceptions=False).output
    assert "stopped" in shown
    assert "1:00:0" in shown
