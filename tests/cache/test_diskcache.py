"""The bounded folder of rows: what is in it is right or not served, whatever happened to it."""

import errno
import fcntl
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cache import TeacherCache, open_storage
from cache.diskcache import DiskCache
from cache.shard import Bytes
from tests.cache import make
from tests.cache.object_store import Bucket, Proxy, bucket, proxy  # noqa: F401 - fixtures

END = 12  # bytes that follow a row
fork = multiprocessing.get_context("fork")


def data(number: int, nbytes: int = 1000) -> Bytes:
    return np.random.default_rng(number).integers(0, 256, nbytes, np.uint8)


def put(kept: DiskCache, number: int, nbytes: int = 1000) -> None:
    kept.put(f"group/64x64/{number}", number, data(number, nbytes))


def has(kept: DiskCache, number: int, nbytes: int = 1000) -> bool:
    """Whether a row is kept; if it is, it must be the right one."""
    found = kept.get(f"group/64x64/{number}", number, nbytes)
    assert found is None or np.array_equal(found, data(number, nbytes))
    return found is not None


def files(folder: Path) -> list[Path]:
    """Rows and what shall become rows."""
    return [path for path in folder.rglob("*") if path.is_file() and path.name != "bytes.count"]


def row_file(kept: DiskCache, number: int) -> Path:
    (path,) = kept.folder.rglob(f"64x64/{number}")
    return path


def in_child(work: Callable[[], object]) -> int:
    child = fork.Process(target=work)
    child.start()
    child.join(30)
    assert child.exitcode is not None
    return child.exitcode


# --- the bound


def _add(kept: DiskCache, first: int) -> None:
    for number in range(first, first + 150):
        put(kept, number % 120, 20_000 + number % 7 * 1000)  # some that others add too


def test_the_bound_holds_at_every_moment_while_processes_add_at_once(tmp_path: Path) -> None:
    kept = DiskCache(tmp_path, 300_000)
    children = [fork.Process(target=_add, args=(kept, first)) for first in (0, 40, 80, 120)]
    for child in children:
        child.start()
    largest, looks = 0, 0
    while any(child.is_alive() for child in children):
        for count in tmp_path.rglob("bytes.count"):
            with count.open() as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # nobody renames or deletes: the sum is of one moment
                largest = max(largest, sum(path.stat().st_size for path in files(tmp_path)))
                looks += 1
    assert [child.exitcode for child in children] == [0] * 4
    assert looks > 20
    assert 200_000 < largest <= 300_000
    assert kept.used_bytes() == sum(path.stat().st_size for path in files(tmp_path)) <= 300_000


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    kept = DiskCache(tmp_path, 10 * (1000 + END))
    for number in range(10):
        put(kept, number)
        os.utime(row_file(kept, number), (number, number))
    assert all(row_file(kept, number).exists() for number in range(10))
    assert has(kept, 0)
    assert has(kept, 1)
    put(kept, 10)
    here = [number for number in range(11) if has(kept, number)]
    assert here == [0, 1, 4, 5, 6, 7, 8, 9, 10], "a tenth is freed at once"


def test_a_row_that_is_larger_than_the_bound_or_added_again_costs_no_other(tmp_path: Path) -> None:
    kept = DiskCache(tmp_path, 10 * (1000 + END))
    for number in range(9):
        put(kept, number)
    put(kept, 99, 10_200)
    assert not has(kept, 99, 10_200)
    for _ in range(50):
        put(kept, 3)
    assert sum(has(kept, number) for number in range(9)) >= 8
    assert kept.used_bytes() <= kept.limit


def test_a_smaller_bound_than_before_is_reached_with_the_next_row(tmp_path: Path) -> None:
    for number in range(9):
        put(DiskCache(tmp_path, 100_000), number)
    smaller = DiskCache(tmp_path, 3 * (1000 + END))
    put(smaller, 9)
    assert smaller.used_bytes() <= smaller.limit
    assert has(smaller, 9)


def test_other_files_in_the_folder_are_neither_counted_nor_deleted(tmp_path: Path) -> None:
    mine = [tmp_path / "thesis.tex", tmp_path / "64x64" / "7", tmp_path / ".hidden.tmp"]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * 50_000)
        os.utime(path, (0, 0))
    kept = DiskCache(tmp_path, 5_000)
    for number in range(20):
        put(kept, number)
    assert has(kept, 19)
    assert 2_000 < kept.used_bytes() <= 5_000
    assert all(path.stat().st_size == 50_000 for path in mine)


# --- damage


def test_no_changed_file_is_served(tmp_path: Path) -> None:
    kept = DiskCache(tmp_path, 100_000)
    for number in range(2):
        put(kept, number, 40)
    path = row_file(kept, 0)
    whole = path.read_bytes()
    changes = [whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :] for at in range(len(whole))]
    changes += [whole[:length] for length in range(len(whole))]
    changes += [whole + b"\0", b"\0" + whole, b"\0" * len(whole), row_file(kept, 1).read_bytes()]
    for change in changes:
        path.write_bytes(change)
        assert not has(kept, 0, 40)
    path.write_bytes(whole)
    assert has(kept, 0, 40)
    assert kept.get("group/64x64/0", 1, 40) is None, "another image's row"
    assert kept.get("group/64x64/0", 0, 41) is None, "another shape"
    path.unlink()
    path.mkdir()
    assert not has(kept, 0, 40)
    put(kept, 0, 40)  # cannot be kept, which is no error
    path.rmdir()
    put(kept, 0, 40)
    assert has(kept, 0, 40)


def test_a_row_of_another_cache_is_not_served_though_it_is_of_the_same_image(tmp_path: Path) -> None:
    kept = DiskCache(tmp_path, 100_000)
    for group in ("one", "two"):
        kept.put(f"{group}/64x64/0", 7, data(len(group) + ord(group[0])))
    one, two = (kept.folder.rglob(f"{group}/64x64/0") for group in ("one", "two"))
    next(two).replace(next(one))
    assert kept.get("one/64x64/0", 7, 1000) is None


@pytest.mark.parametrize("content", [b"", b"\1\2\3", b"\0" * 16, b"\xff" * 16, b"\1" * 100], ids=repr)
def test_a_damaged_count_is_counted_anew_and_costs_no_row(tmp_path: Path, content: bytes) -> None:
    kept = DiskCache(tmp_path, 10 * (1000 + END))
    for number in range(5):
        put(kept, number)
    (count,) = tmp_path.rglob("bytes.count")
    count.write_bytes(content)
    put(kept, 5)
    assert all(has(kept, number) for number in range(6))
    for number in range(6, 30):
        put(kept, number)
        assert kept.used_bytes() <= kept.limit


# --- killed, full, forbidden


def _killed_before_the_name(kept: DiskCache) -> None:
    Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign,assignment]
    put(kept, 77, 5000)


def _killed_in_the_middle(kept: DiskCache) -> None:
    for number in range(10**6):
        put(kept, number % 40, 200_000)


def test_what_a_killed_writer_leaves_counts_and_goes_first(tmp_path: Path) -> None:
    kept = DiskCache(tmp_path, 20_000)
    for number in range(5):
        put(kept, number)
    assert in_child(lambda: _killed_before_the_name(kept)) == -signal.SIGKILL
    (left,) = [path for path in files(tmp_path) if path.name.startswith(".")]
    assert kept.used_bytes() == 5 * (1000 + END) + 5000 + END
    assert not has(kept, 77, 5000)
    for number in range(5, 15):
        put(kept, number)
        assert kept.used_bytes() <= kept.limit
    assert not left.exists()
    assert all(has(kept, number) for number in range(1, 15))


def test_writers_killed_at_any_moment_leave_only_right_rows_within_the_bound(tmp_path: Path) -> None:
    kept = DiskCache(tmp_path, 2_000_000)
    for attempt in range(8):
        child = fork.Process(target=_killed_in_the_middle, args=(kept,))
        child.start()
        time.sleep(0.03 + attempt * 0.007)
        child.kill()
        child.join()
        assert sum(path.stat().st_size for path in files(tmp_path)) <= kept.limit
    assert any(has(kept, number, 200_000) for number in range(40))
    for number in range(40):
        has(kept, number, 200_000)  # none is wrong
        put(kept, 50 + number, 200_000)
        assert has(kept, 50 + number, 200_000), "the lock of a killed writer is free"
    assert kept.used_bytes() <= kept.limit


def _on_a_full_disk(kept: DiskCache) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))  # a write stops in the middle, as on a full disk
    put(kept, 1)
    assert not has(kept, 1)
    assert has(kept, 0)
    os._exit(7)


def test_a_full_disk_keeps_nothing_and_is_no_error(tmp_path: Path) -> None:
    kept = DiskCache(tmp_path, 20_000)
    put(kept, 0)
    assert in_child(lambda: _on_a_full_disk(kept)) == 7
    assert len(files(tmp_path)) == 1
    put(kept, 1)
    assert has(kept, 1)


def test_a_folder_that_cannot_be_written_to_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper", Path("/proc/nowhere"), Path("/dev/null/x")):
        kept = DiskCache(folder, 20_000)
        put(kept, 0)
        assert not has(kept, 0)
        assert kept.used_bytes() == 0
    kept = DiskCache(tmp_path / "kept", 20_000)
    put(kept, 0)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    # a disk that became read-only: even the removal of what is not there is refused
    for place, name in ((Path, "mkdir"), (Path, "touch"), (Path, "unlink"), (Path, "replace"), (os, "utime")):
        monkeypatch.setattr(place, name, refuse)
    put(kept, 1)
    assert not has(kept, 1)
    assert has(kept, 0), "what is there can be read all the same"


def test_rows_that_cannot_be_deleted_keep_others_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = DiskCache(tmp_path, 5 * (1000 + END))
    for number in range(5):
        put(kept, number)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "another user's")

    monkeypatch.setattr(Path, "unlink", refuse)
    put(kept, 5)
    assert [number for number in range(6) if has(kept, number)] == [0, 1, 2, 3, 4]
    assert kept.used_bytes() <= kept.limit


# --- in front of a bucket


def test_a_hit_needs_no_request_and_a_damaged_file_only_its_own(
    bucket: Bucket,  # noqa: F811
    proxy: Proxy,  # noqa: F811
    tmp_path: Path,
) -> None:
    make.fill(open_storage(bucket.uri), make.info(), make.images(4))

    def opened() -> TeacherCache:
        return TeacherCache.open(bucket.uri, "t", local_dir=str(tmp_path))

    def read(cache: TeacherCache) -> dict[tuple[int, int], list[bytes]]:
        return {
            key: [t.numpy().tobytes() for t in (*cache[key].features.values(), *cache[key].scales.values())]
            for key in cache.keys()  # noqa: SIM118
        }

    expected = read(TeacherCache.open(bucket.uri, "t"))
    assert not files(tmp_path)
    assert read(opened()) == expected
    assert len(files(tmp_path)) == 8
    again = opened()
    proxy.rule = lambda _: "AccessDenied"
    before = len(proxy.requests)
    assert read(again) == expected
    assert len(proxy.requests) == before
    proxy.rule = lambda _: None
    damaged = files(tmp_path)[3]
    content = bytearray(damaged.read_bytes())
    content[50] ^= 4
    damaged.write_bytes(content)
    assert read(opened()) == expected
    rows = [one for one in proxy.requests[before:] if one.of_row]
    assert len(rows) == 8, "the ends of one unit's four arrays, and one row of each"
    content[50] ^= 4
    assert damaged.read_bytes() == content, "the right row is kept again"


def test_a_bound_smaller_than_the_cache_and_a_folder_in_the_way_change_no_value(
    bucket: Bucket,  # noqa: F811
    tmp_path: Path,
) -> None:
    make.fill(open_storage(bucket.uri), make.info(), make.images(3))
    plain = TeacherCache.open(bucket.uri, "t")
    (tmp_path / "file").write_text("in the way")
    small = TeacherCache.open(bucket.uri, "t", local_dir=str(tmp_path / "small"), local_bytes=1000)
    blocked = TeacherCache.open(bucket.uri, "t", local_dir=str(tmp_path / "file"))
    one_level = TeacherCache.open(bucket.uri, "t", levels=["P4"], local_dir=str(tmp_path / "small"), local_bytes=1000)
    for _ in range(2):
        for key in plain.keys():  # noqa: SIM118
            expected = plain[key].dequantize()
            for cache in (small, blocked, one_level):
                found = cache[key].dequantize()
                assert all(found[name].equal(expected[name]) for name in cache.levels)
            assert sum(path.stat().st_size for path in files(tmp_path / "small")) <= 1000
    assert files(tmp_path / "small")
