"""Object storage: held to what a local directory does, then through every fault that a network has."""

import json
import logging
import multiprocessing
import pickle
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pytest
import torch
import zarr
from obstore.exceptions import GenericError, NotSupportedError
from torch.utils.data import DataLoader, Dataset

from cache import (
    CorruptShardError,
    Follower,
    Lease,
    LeaseHeldError,
    LocalStorage,
    MtpdError,
    RecipeError,
    Storage,
    StorageError,
    TeacherCache,
    compact,
    open_storage,
    part_names,
    remote,
)
from cache import objects as module
from cache.layout import LEASE, MANIFEST, MANIFEST_COPY
from cache.objects import ObjectStorage
from tests.cache import make
from tests.cache.object_store import (  # noqa: F401 - fixtures
    ERRORS,
    KEY,
    SECRET,
    Bucket,
    Proxy,
    Request,
    bucket,
    new_forkserver,
    proxy,
    randomly,
)

Key = tuple[int, int]


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return LocalStorage(tmp_path / "cache")
    return open_storage(request.getfixturevalue("bucket").uri)


def contents(cache: TeacherCache) -> dict[Key, list[bytes]]:
    """Every byte of every row."""
    return {key: row(cache, key) for key in cache.keys()}  # noqa: SIM118 - a cache is no mapping of its values


def row(cache: TeacherCache, key: Key) -> list[bytes]:
    read = cache[key]
    tensors = [*read.features.values(), *read.scales.values()]
    found = read.detections
    return [t.numpy().tobytes() for t in tensors] + [a.tobytes() for a in (found.boxes, found.scores, found.labels)]


def files(folder: Path) -> dict[str, bytes]:
    return {
        f"some/prefix/{path.relative_to(folder).as_posix()}": path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


# --- the contract


def test_what_is_written_is_read_listed_and_deleted(storage: Storage) -> None:
    written = {"a/b": b"1", "a/c.json": b"\0\xff" * 9, "a/d/e": b"", "ab/x": b"near", "top.json": b"{}"}
    for name, content in written.items():
        # as the writer gives them: buffers of any kind, which together are the content
        assert storage.write(name, [content[:1], memoryview(content)[1:]]) == len(content)
    storage.write("a/b", [b"longer than before"])
    written["a/b"] = b"longer than before"
    assert {name: storage.read(name) for name in written} == written
    assert storage.names("a") == ["a/b", "a/c.json"]
    assert storage.names("a", ".json") == ["a/c.json"]
    assert storage.folders() == ["a", "ab"]
    assert storage.folders("a") == ["d"]
    assert {e.name: e.size for e in storage.walk("a")} == {n: len(c) for n, c in written.items() if n[:2] == "a/"}
    assert {e.name for e in storage.walk("")} == set(written)
    assert all(abs(e.modified - time.time()) < 60 for e in storage.walk(""))
    storage.delete("a/b")
    assert not storage.exists("a/b")
    assert storage.names("a") == ["a/c.json"]


def test_what_was_never_written_is_absent_and_no_fault(storage: Storage) -> None:
    with pytest.raises(FileNotFoundError, match="x/y"):
        storage.read("x/y")
    assert not storage.exists("x/y")
    assert storage.names("x") == storage.folders("x") == storage.folders() == list(storage.walk("x")) == []
    storage.delete("x/y")
    storage.write("x/y/z", [b""])
    assert not storage.exists("x/y"), "a folder is no file"


def test_the_end_of_what_was_written_its_size_and_its_stamp(storage: Storage) -> None:
    storage.write("a", [b"0123456789"])
    assert storage.read_end("a", 4) == (b"6789", 10, storage.stamp("a"))
    assert storage.read_end("a", 99)[:2] == (b"0123456789", 10)
    with pytest.raises(FileNotFoundError):
        storage.read_end("b", 4)


def test_a_reader_follows_what_is_committed_compacted_and_taken_out(storage: Storage) -> None:
    group = make.info()
    make.fill(storage, group, make.images(3))
    follower = Follower(storage, group)
    assert len(follower.index) == 6
    assert follower.refresh() == []
    compact(storage, group)  # as every run does first
    make.fill(storage, group, make.images(6))
    assert follower.refresh() is None
    assert len(follower.index) == 12
    compact(storage, group)
    assert follower.refresh() is None
    assert len(follower.index) == 12
    assert follower.refresh() == []
    for name in (MANIFEST_COPY, MANIFEST):
        storage.delete(f"{group.name}/{name}")
    assert follower.refresh() is None
    assert len(follower.index) == 0


def test_a_write_whose_source_breaks_leaves_what_was_there(storage: Storage) -> None:
    storage.write("a", [b"old"])

    def buffers() -> Iterator[bytes]:
        yield b"new"
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError):
        storage.write("a", buffers())
    assert storage.read("a") == b"old"


def test_a_swap_is_refused_unless_the_content_is_the_expected_one(storage: Storage) -> None:
    assert not storage.swap("g/x", b"something", b"1")
    assert storage.swap("g/x", None, b"1")
    assert not storage.swap("g/x", None, b"2")
    assert not storage.swap("g/x", b"2", b"3")
    assert storage.swap("g/x", b"1", b"2")
    assert not storage.swap("g/x", b"1", None)
    assert storage.read("g/x") == b"2"
    assert storage.swap("g/x", b"2", None)
    assert not storage.exists("g/x")


@pytest.mark.parametrize("expected", [None, b"before"])
def test_of_many_swaps_at_once_one_wins(bucket: Bucket, proxy: Proxy, expected: bytes | None) -> None:  # noqa: F811
    storage = open_storage(bucket.uri)
    if expected is not None:
        storage.write("x", [expected])
    proxy.rule = lambda one: "delay" if one.method == "PUT" else None  # everyone has looked before anyone writes
    barrier = threading.Barrier(8)
    wins = []

    def swap(number: int) -> None:
        barrier.wait()
        if storage.swap("x", expected, str(number).encode()):
            wins.append(number)

    threads = [threading.Thread(target=swap, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1
    assert storage.read("x") == str(wins[0]).encode()


def test_a_swap_whose_answer_is_lost_was_made_all_the_same(bucket: Bucket, proxy: Proxy) -> None:  # noqa: F811
    storage = open_storage(bucket.uri)
    proxy.rule = lambda one: "lost" if one.method == "PUT" and one.nth % 2 == 0 else None
    assert storage.swap("x", None, b"1")
    assert storage.swap("x", b"1", b"2")
    assert not storage.swap("x", b"1", b"3")
    assert storage.read("x") == b"2"
    assert proxy.faults["lost"] == 2


# --- a cache in a bucket


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("precision", ["float16", "int8", "int4"])
def test_a_cache_in_a_bucket_is_the_one_on_a_disk(
    bucket: Bucket,  # noqa: F811
    tmp_path: Path,
    precision: str,
    compression: str,
) -> None:
    group = replace(make.info(precision=precision), compression=compression)  # type: ignore[arg-type]
    for storage in (open_storage(bucket.uri), LocalStorage(tmp_path)):
        make.fill(storage, group, make.images(4))
    assert bucket.contents() == files(tmp_path)
    cache = TeacherCache.open(bucket.uri, "t", fingerprint=group.record)
    assert contents(cache) == contents(TeacherCache.open(str(tmp_path), "t"))
    root = zarr.open_group(zarr.storage.ObjectStore(obstore.store.from_url(bucket.uri), read_only=True), mode="r")
    arrays = {name: array[:] for name, array in root[f"{group.name}/64x64"].arrays()}
    for key in cache.keys():  # noqa: SIM118
        place = cache.index.find(*key)
        assert place is not None
        for name, values in cache[key].features.items():
            assert np.array_equal(arrays[name][place.row], values.numpy())
        for name, values in cache[key].scales.items():
            assert np.array_equal(arrays[f"{name}_scale"][place.row], values.numpy())


def test_a_second_fill_computes_what_is_missing_and_compaction_leaves_one_file(bucket: Bucket) -> None:  # noqa: F811
    storage, group = open_storage(bucket.uri), make.info()
    make.fill(storage, group, make.images(4), skip={2})
    before = contents(TeacherCache.open(bucket.uri, "t"))
    assert len(before) == 6
    compact(storage, group)
    assert part_names(storage, group) == []
    assert contents(TeacherCache.open(bucket.uri, "t")) == before
    second = make.fill(storage, group, make.images(5))
    assert sorted({r.image_id for unit in second.units() for r in unit.rows}) == [2, 5]
    after = contents(TeacherCache.open(bucket.uri, "t"))
    assert len(after) == 10
    assert before.items() <= after.items()
    assert make.plan(storage, group, make.images(5)).todo == 0


def test_a_lease_in_a_bucket_has_one_holder_who_renews_it(bucket: Bucket) -> None:  # noqa: F811
    storage = open_storage(bucket.uri)
    with Lease(storage, "g", seconds=0.3) as lease:
        with pytest.raises(LeaseHeldError, match=rf"{bucket.uri}/g/{LEASE}"), Lease(storage, "g"):
            pass
        before = storage.read(f"g/{LEASE}")
        time.sleep(0.3)
        assert storage.read(f"g/{LEASE}") != before
        lease.check()
    assert not storage.exists(f"g/{LEASE}")


def test_a_lease_in_a_bucket_is_taken_over_when_it_is_not_renewed(bucket: Bucket) -> None:  # noqa: F811
    storage = open_storage(bucket.uri)
    dead = {"run": "x", "host": "elsewhere", "pid": 1, "started": "", "since": 0, "renewed": 0}
    storage.write(f"g/{LEASE}", [json.dumps(dead).encode()])
    started = time.monotonic()
    with Lease(storage, "g", seconds=0.5) as lease:
        assert time.monotonic() - started >= 0.5
        thief = json.dumps({**dead, "host": "thief"}).encode()
        storage.write(f"g/{LEASE}", [thief])
        time.sleep(0.4)
        with pytest.raises(LeaseHeldError, match="thief"):
            lease.check()
    assert storage.read(f"g/{LEASE}") == thief, "another's lease was given back"


def test_a_unit_that_grew_since_its_end_was_read_gives_the_right_row(bucket: Bucket) -> None:  # noqa: F811
    storage, group = open_storage(bucket.uri), make.info()
    make.fill(storage, group, make.images(2), skip={1})
    compact(storage, group)
    cache = TeacherCache.open(bucket.uri, "t")
    before = row(cache, (2, 0))
    # one unit: its rows move by two whole chunks, and what lies where they were is intact and of the right size
    (unit,) = make.fill(storage, group, make.images(2)).units()
    assert len(unit.kept) == 2
    assert row(cache, (2, 0)) == before


def test_a_unit_that_changes_all_the_time_ends_in_an_error_that_says_so(bucket: Bucket, proxy: Proxy) -> None:  # noqa: F811
    make.fill(open_storage(bucket.uri), make.info(), make.images(2))
    cache = TeacherCache.open(bucket.uri, "t")
    proxy.rule = lambda one: "PreconditionFailed" if "if-match" in one.headers else None
    with pytest.raises(StorageError, match="again and again"):
        cache[1, 0]


def test_a_store_that_knows_no_ranges_from_the_end_is_read(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    make.fill(open_storage(bucket.uri), make.info(), make.images(2))
    cache = TeacherCache.open(bucket.uri, "t")
    expected = contents(cache)
    get = obstore.get

    def azure(store: Any, name: str, *, options: Any = None) -> Any:
        if isinstance((options or {}).get("range"), dict):
            raise NotSupportedError("Azure does not support suffix range requests")
        return get(store, name, options=options)

    monkeypatch.setattr(obstore, "get", azure)
    assert contents(TeacherCache.open(bucket.uri, "t")) == expected


def test_objects_larger_than_a_part_survive_faults_in_every_part(
    bucket: Bucket,  # noqa: F811
    proxy: Proxy,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_PART_BYTES", 5 * 2**20)
    monkeypatch.setattr(module, "_TRIES", 12)
    content = np.random.default_rng(0).bytes(11 * 2**20)

    def rule(one: Request) -> str | None:
        if one.method == "POST" and "uploadId" in one.path:
            # the answer is lost, and the repetition finds nothing left to be completed
            return ("lost", "NoSuchUpload", None)[min(one.nth, 2)]
        return ("reset", "InternalError", "lost", None)[min(one.nth, 3)] if "partNumber" in one.path else None

    proxy.rule = rule
    storage = open_storage(bucket.uri)
    assert storage.write("large", [content]) == len(content)
    assert proxy.faults >= Counter({"reset": 3, "InternalError": 3, "lost": 4, "NoSuchUpload": 1})
    proxy.rule = lambda one: "cut" if one.nth < 2 else None
    assert storage.read("large") == content


# --- faults


def test_a_fill_and_a_read_through_heavy_faults_give_exactly_the_right_values(
    bucket: Bucket,  # noqa: F811
    proxy: Proxy,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group = make.info()

    def work(storage: Storage) -> None:
        with Lease(storage, group.name):
            make.fill(storage, group, make.images(7), skip={3})
            compact(storage, group)
            make.fill(storage, group, make.images(7))  # carries rows over
            compact(storage, group)

    work(LocalStorage(tmp_path))
    chances = {
        "InternalError": 0.05, "SlowDown": 0.05, "reset": 0.07, "lost": 0.07, "cut": 0.1, "delay": 0.05,
        "flip": 0.15, "short": 0.1,
    }  # fmt: skip
    proxy.rule = randomly(1, chances)
    monkeypatch.setattr(remote, "_TRIES", 6)  # a row may be damaged again where it goes on after a break
    work(open_storage(bucket.uri))
    assert contents(TeacherCache.open(bucket.uri, "t")) == contents(TeacherCache.open(str(tmp_path), "t"))
    assert set(proxy.faults) == set(chances), "a kind of fault was never met"
    assert sum(proxy.faults.values()) > 60
    proxy.rule = lambda _: None
    assert bucket.contents() == files(tmp_path)


@pytest.mark.parametrize("damage", ["flip", "short"])
def test_one_wrong_answer_gives_right_values_or_an_error_never_others(
    bucket: Bucket,  # noqa: F811
    proxy: Proxy,  # noqa: F811
    damage: str,
) -> None:
    make.fill(open_storage(bucket.uri), make.info(), make.images(2))

    def read() -> list[bytes]:
        return row(TeacherCache.open(bucket.uri, "t"), (2, 1))

    expected, right = read(), 0
    begun = len(proxy.requests)
    read()
    length = len(proxy.requests) - begun
    assert length > 8
    for nth in range(length):
        begun = len(proxy.requests)
        proxy.rule = lambda _, at=begun + nth: damage if len(proxy.requests) == at else None
        try:
            assert read() == expected
            right += 1
        except MtpdError:
            pass
        assert proxy.faults[damage] == nth + 1
    assert right >= 8, "what belongs to a row is fetched again"


@contextmanager
def impatient(monkeypatch: pytest.MonkeyPatch, **client: str) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setitem(module._RETRY, "max_retries", 1)
        patch.setattr(module, "_TRIES", 2)
        patch.setattr(module, "_CLIENT", {**module._CLIENT, **client})
        module._open.cache_clear()
        yield
    module._open.cache_clear()


EVERYTHING: dict[str, Callable[[Storage], object]] = {
    "exists": lambda s: s.exists("an/object"),
    "read": lambda s: s.read("an/object"),
    "write": lambda s: s.write("an/object", [b"x"]),
    "names": lambda s: s.names("an/object"),
    "folders": lambda s: s.folders("an/object"),
    "walk": lambda s: list(s.walk("an/object")),
    "delete": lambda s: s.delete("an/object"),
    "swap": lambda s: s.swap("an/object", None, b"x"),
}


@pytest.mark.parametrize("death", ["refused", "InternalError", "reset", "cut", "silence"])
def test_a_dead_endpoint_is_an_error_in_bounded_time_that_names_the_object(
    bucket: Bucket,  # noqa: F811
    proxy: Proxy,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    death: str,
) -> None:
    make.fill(open_storage(bucket.uri), make.info(), make.images(1))
    cache = TeacherCache.open(bucket.uri, "t")
    if death == "refused":
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    proxy.rule = lambda _: death
    with impatient(monkeypatch, timeout="150ms"):
        with pytest.raises(StorageError, match=f"{bucket.uri}/t-.*/c/0/0.*after 2 tries") as caught:
            cache[1, 0]
        assert KEY not in str(caught.value)
        assert SECRET not in str(caught.value)
        storage = open_storage(bucket.uri)
        for name in EVERYTHING if death == "refused" else ("read",):
            with pytest.raises(StorageError, match=f"{bucket.uri}/an/object"):
                EVERYTHING[name](storage)


def test_no_further_try_is_begun_when_patience_is_over(
    bucket: Bucket,  # noqa: F811
    proxy: Proxy,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_PATIENCE_SECONDS", 0.0)
    proxy.rule = lambda _: "SlowDown"
    with pytest.raises(StorageError, match=r"after 1 tries .*SlowDown"):
        open_storage(bucket.uri).read("x")
    assert len(proxy.requests) == 1 + module._RETRY["max_retries"]


@pytest.mark.parametrize("code", [code for code, status in ERRORS.items() if status == 403])
def test_refused_access_is_the_recipes_matter_and_is_not_tried_again(bucket: Bucket, proxy: Proxy, code: str) -> None:  # noqa: F811
    proxy.rule = lambda _: code
    storage = open_storage(bucket.uri)
    for name, operation in EVERYTHING.items():
        if name == "exists":
            continue  # the answer to a HEAD has no body, and no code in it
        with pytest.raises(RecipeError, match=rf"cache\.uri: {bucket.uri}/an/object.*{code}") as caught:
            operation(storage)
        assert KEY not in str(caught.value)
        assert SECRET not in str(caught.value)
    assert len(proxy.requests) == len(EVERYTHING) - 1
    with pytest.raises(RecipeError, match="access was refused"):
        storage.exists("an/object")


def test_no_credentials_are_the_recipes_matter(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    calls = []

    def head(*_: object) -> None:
        calls.append(1)
        raise GenericError("Error performing PUT http://169.254.169.254/latest/api/token in 90s, after 8 retries")

    monkeypatch.setattr(obstore, "head", head)
    with pytest.raises(RecipeError, match="Give credentials"):
        open_storage(bucket.uri).exists("x")
    assert len(calls) == 1


def test_a_bucket_that_is_not_there_is_named(bucket: Bucket) -> None:  # noqa: F811
    uri = bucket.uri.replace("bucket-", "nobucket-")
    storage = open_storage(uri)
    for name, operation in EVERYTHING.items():
        if name not in ("exists", "delete"):
            with pytest.raises(RecipeError, match=f"{uri}/an/object: there is no such bucket"):
                operation(storage)
    with pytest.raises(RecipeError, match="there is no such bucket"):
        TeacherCache.open(uri, "t")


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "remove", "misplace", "detections"])
def test_damage_in_the_bucket_is_named_with_its_unit(bucket: Bucket, damage: str) -> None:  # noqa: F811
    storage, group = open_storage(bucket.uri), make.info()
    make.fill(storage, group, make.images(4))
    cache = TeacherCache.open(bucket.uri, "t")
    place = cache.index.find(4, 0)
    assert place is not None
    unit, slot = divmod(place.row, 4)
    name = f"{group.name}/{place.bucket}/P3/c/{unit}/0/0/0"
    content = bytearray(storage.read(name))
    content[slot * (4 * 8 * 8 + 4) + 9] ^= 1
    if damage == "remove":
        storage.delete(name)
    elif damage == "detections":
        storage.delete(f"{group.name}/detections/part-{place.bucket}-{unit:06d}.parquet")
    else:
        other = storage.read(f"{group.name}/{place.bucket}/P3/c/{1 - unit}/0/0/0")
        changed = {"flip": bytes(content), "truncate": bytes(content[:-5]), "empty": b"", "misplace": other}
        bucket.put(name, changed[damage])
    with pytest.raises(CorruptShardError, match=f"unit {place.bucket}-{unit:06d} of teacher 't' is damaged") as caught:
        row(cache, (4, 0))
    assert "\n" not in str(caught.value)
    if damage == "flip":
        row(cache, (4, 1))  # a row of the same shard


# --- processes


def _forked(cache: TeacherCache, uri: str, answer: Connection) -> None:
    said = []
    for attempt in (
        lambda: cache[1, 0],
        lambda: open_storage(uri).read("zarr.json"),
        lambda: TeacherCache.open(uri, "t"),
    ):
        try:
            attempt()
        except MtpdError as error:
            said.append((type(error), str(error)))
    answer.send(said)


def test_a_process_forked_after_use_is_told_at_once_and_does_not_hang(bucket: Bucket) -> None:  # noqa: F811
    make.fill(open_storage(bucket.uri), make.info(), make.images(1))
    cache = TeacherCache.open(bucket.uri, "t")
    before = contents(cache)
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_forked, args=(cache, bucket.uri, theirs))
    child.start()
    try:
        assert ours.poll(15), "the child hangs"
        said = ours.recv()
        child.join(15)
        assert child.exitcode == 0
    finally:
        child.kill()
    assert [kind for kind, _ in said] == [MtpdError] * 3
    assert all("forkserver" in message and bucket.uri in message for _, message in said)
    assert contents(cache) == before


class Rows(Dataset[list[bytes]]):
    def __init__(self, cache: TeacherCache) -> None:
        self.cache, self.keys = cache, cache.keys()

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> list[bytes]:
        torch.set_num_threads(1)
        return row(self.cache, self.keys[index])


@pytest.mark.usefixtures("new_forkserver")
def test_workers_that_are_not_forked_read_a_cache_that_is_in_use(bucket: Bucket, tmp_path: Path) -> None:  # noqa: F811
    make.fill(open_storage(bucket.uri), make.info(), make.images(3))
    cache = TeacherCache.open(bucket.uri, "t", local_dir=str(tmp_path))
    expected = contents(cache)
    loaders = [
        DataLoader(Rows(cache), batch_size=None, num_workers=1, multiprocessing_context=context, timeout=60)
        for context in ("forkserver", "spawn")
    ]
    for begun in [iter(loader) for loader in loaders]:  # both begin to start before either is waited for
        assert list(begun) == list(expected.values())


# --- credentials


def test_no_credential_is_written_pickled_shown_or_logged(
    bucket: Bucket,  # noqa: F811
    proxy: Proxy,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen: list[str] = []
    with caplog.at_level(logging.DEBUG):
        storage, group = open_storage(bucket.uri), make.info()
        with Lease(storage, group.name):
            make.fill(storage, group, make.images(2))
            seen += [f"{name} {content!r}" for name, content in bucket.contents().items()]
        compact(storage, group)
        cache = TeacherCache.open(bucket.uri, "t")
        row(cache, (1, 0))
        seen += [f"{name} {content!r}" for name, content in bucket.contents().items()]
        assert any(LEASE in one for one in seen)
        for thing in (storage, cache):
            seen += [repr(thing), str(thing), repr(vars(thing)), repr(pickle.dumps(thing))]
        for fault in (*ERRORS, "reset", "cut", "lost"):
            proxy.rule = lambda _, fault=fault: fault
            with impatient(monkeypatch):
                for operation in (
                    *EVERYTHING.values(),
                    lambda _: cache[2, 0],
                    lambda _: TeacherCache.open(bucket.uri, "t"),
                ):
                    try:
                        operation(storage)
                    except (MtpdError, FileNotFoundError) as error:
                        seen += [str(error), repr(error), *traceback.format_exception(error)]
    seen += [caplog.text, *capfd.readouterr()]
    assert len(seen) > 60
    for secret in (KEY, SECRET):
        assert all(secret not in one for one in seen)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://thekey:thesecret@bucket/prefix",
        "s3://thekey:the/secret@bucket/prefix",
        "s3://bucket/prefix?X-Amz-Credential=thekey&X-Amz-Signature=thesecret",
        "az://bucket/prefix?sig=thesecret",
        "gs://bucket/prefix#thesecret",
    ],
)
def test_a_uri_with_credentials_is_refused_and_not_repeated(uri: str) -> None:
    for attempt in (open_storage, ObjectStorage, lambda text: TeacherCache.open(text, "t")):
        with pytest.raises(RecipeError, match="holds credentials or parameters") as caught:
            attempt(uri)
        for part in ("thekey", "secret"):
            assert part not in str(caught.value)
            assert part not in repr(caught.value)


def test_a_uri_without_a_bucket_is_refused() -> None:
    with pytest.raises(RecipeError, match="names no bucket"):
        open_storage("s3://")
