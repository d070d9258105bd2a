"""A disk that is full or read-only, for real."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cache import BudgetError, Lease, LocalStorage, RecipeError, TeacherCache, compact, verify
from tests.cache import make

GROUP = make.info()
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty disk of 200 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("this machine does not allow mounts")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False)


def test_what_was_committed_before_a_disk_filled_up_or_was_made_read_only_stays(disk: Path) -> None:
    storage = LocalStorage(disk / "cache")
    with Lease(storage, GROUP.name), pytest.raises(BudgetError, match="the disk is full while writing"):
        make.fill(storage, GROUP, make.images(200))
    committed = TeacherCache.open(str(storage.root), "t").keys()
    assert 0 < len(committed) < 400
    assert not list(disk.rglob("*.tmp"))
    # the compacted manifest may not fit: then the parts stay, and nothing is lost
    with suppress(BudgetError):
        compact(storage, GROUP)
    assert TeacherCache.open(str(storage.root), "t").keys() == committed

    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    cache = TeacherCache.open(str(storage.root), "t")
    assert all(cache[key].features for key in committed)
    report = verify(storage, GROUP)
    assert report.damaged_units == []
    assert report.rows == len(committed)
    with pytest.raises(RecipeError, match="cannot be written to"), Lease(storage, GROUP.name):
        pass
    with pytest.raises(RecipeError, match="cannot be written to"):
        make.fill(storage, GROUP, make.images(200))
