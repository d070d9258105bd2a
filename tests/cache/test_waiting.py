"""Waiting for a row: it comes, or what was to commit it has failed on it, ended, was killed, or never was there."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cache import (
    FailedRow,
    Lease,
    LocalStorage,
    MissingRowsError,
    RowWaiter,
    RunProgress,
    TeacherCache,
    await_first_row,
    compact,
    write_progress,
    write_unit,
)
from tests.cache import make

NONE = RunProgress("", "", 0, "running", "", 0.0, None, 0.0, 24, 0, 0, 0, 0, (), 1, 0)
PATIENCE = 0.3


def begun(path: Path) -> tuple[LocalStorage, list, RowWaiter, TeacherCache]:
    """A cache in which the first unit is committed, the units that are left, and a waiter."""
    storage, group = LocalStorage(path), make.info()
    plan = make.plan(storage, group, make.images(12))
    make.prepare(storage, plan)
    first, *rest = plan.units()
    write_unit(storage, group, first, make.targets(group, first))
    cache = TeacherCache.open(str(path), "t")
    return storage, rest, RowWaiter(cache, print, PATIENCE), cache


def key(unit) -> tuple[int, int]:
    return unit.rows[0].image_id, unit.rows[0].view


@pytest.mark.parametrize("compacted", [False, True])
def test_a_row_that_is_committed_meanwhile_comes(tmp_path: Path, compacted: bool) -> None:
    storage, rest, waiter, cache = begun(tmp_path)
    group = cache.info

    def precompute() -> None:
        with Lease(storage, group.name):
            time.sleep(2 * PATIENCE)  # longer than it is waited for somebody
            for unit in rest[:2]:
                write_unit(storage, group, unit, make.targets(group, unit))
                if compacted:
                    compact(storage, group)
            time.sleep(0.5)

    writer = threading.Thread(target=precompute, daemon=True)
    writer.start()
    waiter.wait(*key(rest[0]))
    waiter.wait(*key(rest[1]))
    writer.join()
    assert all(len(cache[key(unit)].detections) == key(unit)[0] % 3 for unit in rest[:2])


@pytest.mark.parametrize(
    ("state", "message", "reason"),
    [
        ("running", "", "could not compute it: 7.jpg: no such file"),
        ("done", "", "could not compute it: 7.jpg: no such file"),
        ("done", "", "ended without it"),
        ("failed", "teacher actors keep dying", "failed: teacher actors keep dying"),
        ("interrupted", "", "was interrupted"),
    ],
)
def test_the_end_of_a_precompute_that_was_watched_ends_the_wait(
    tmp_path: Path, state: str, message: str, reason: str
) -> None:
    storage, rest, waiter, cache = begun(tmp_path)
    group, (image, view) = cache.info, key(rest[0])
    failures = (FailedRow(image, view, "7.jpg", "no such file"),) if "7" in reason else ()
    errors: list[str] = []

    def student() -> None:
        with pytest.raises(MissingRowsError) as caught:
            RowWaiter(cache, print, 600.0).wait(image, view)
        errors.append(str(caught.value))

    with Lease(storage, group.name) as lease:
        now = replace(NONE, run=lease.run)
        # what a run before this one said of the row is no word of this one
        write_progress(storage, group.name, replace(NONE, run="before", failures=(FailedRow(image, view, "", "old"),)))
        waiting = threading.Thread(target=student, daemon=True)
        waiting.start()
        time.sleep(0.5)
        assert waiting.is_alive()
        write_progress(storage, group.name, replace(now, state=state, message=message, failures=failures))
        if state == "running":
            waiting.join(timeout=30)
    waiting.join(timeout=30)
    assert not waiting.is_alive()
    (error,) = errors
    assert reason in error
    assert f"image {image}, view {view} of teacher 't'" in error
    assert "mtpd precompute RECIPE --teacher t" in error
    if state != "running":
        late = _waited_in_vain(waiter, image, view)
        assert reason in late
        assert ("no precompute of it is running; the last one" in late) == (not failures)


def _waited_in_vain(waiter: RowWaiter, image: int, view: int) -> str:
    with pytest.raises(MissingRowsError) as caught:
        waiter.wait(image, view)
    return str(caught.value)


def test_a_killed_precompute_ends_the_wait(tmp_path: Path) -> None:
    _, rest, waiter, cache = begun(tmp_path)
    code = (
        "import sys, time; from pathlib import Path; from dataclasses import replace\n"
        "from cache import Lease, LocalStorage, write_progress; from tests.cache.test_waiting import NONE\n"
        "storage = LocalStorage(Path(sys.argv[1]))\n"
        "with Lease(storage, sys.argv[2]) as lease:\n"
        "    write_progress(storage, sys.argv[2], replace(NONE, run=lease.run, pid=4711, host='here'))\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), cache.info.name],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"held\n"
    timer = threading.Timer(3 * PATIENCE, lambda: os.kill(child.pid, signal.SIGKILL))
    timer.start()
    started = time.monotonic()
    error = _waited_in_vain(waiter, *key(rest[0]))
    assert time.monotonic() - started > 3 * PATIENCE  # not before it was killed
    child.wait()
    assert "process 4711 on here) was killed, and none was started again" in error


def test_a_group_that_is_begun_meanwhile_is_waited_for(tmp_path: Path) -> None:
    storage, group = LocalStorage(tmp_path), make.info()
    with pytest.raises(MissingRowsError, match=r"any row of teacher 't'.* no precompute of it is running"):
        await_first_row(str(tmp_path), "t", group.record, print, PATIENCE)
    timer = threading.Timer(0.5, lambda: make.fill(storage, group, make.images(2)))
    timer.start()
    await_first_row(str(tmp_path), "t", group.record, print, 60.0)
    assert len(TeacherCache.open(str(tmp_path), "t")) > 0
    timer.join()
