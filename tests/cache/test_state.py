"""Writers, kills, second writers, compaction, gc, damage and readers in any order, against a model of what must be readable."""

import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

from cache import (
    Lease,
    LeaseHeldError,
    LocalStorage,
    TeacherCache,
    compact,
    encode,
    fence,
    find_garbage,
    prepare,
    remove,
    repair,
    verify,
    write_unit,
)
from tests.cache import make

Key = tuple[int, int]
GROUP = make.info()
seeds = st.integers(0, 2**32)


class Killed(BaseException):
    """The process ended here."""


class Mortal(LocalStorage):
    """A storage whose process is killed at its n-th change: a write leaves its temporary file, a delete does nothing."""

    left: int

    def __new__(cls, root: Path, changes: int) -> "Mortal":
        made = super().__new__(cls)
        object.__setattr__(made, "left", changes)
        return made

    def __init__(self, root: Path, changes: int) -> None:
        super().__init__(root)

    def _live(self) -> None:
        object.__setattr__(self, "left", self.left - 1)
        if self.left < 0:
            raise Killed

    def write(self, name: str, buffers: Iterable[bytes | memoryview], *, durable: bool = True) -> int:
        content = b"".join(buffers)
        try:
            self._live()
        except Killed:
            target = self.path(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.with_name(f".{target.name}.{random.random()}.tmp").write_bytes(content[: len(content) // 2])
            raise
        return super().write(name, [content], durable=False)

    def delete(self, name: str) -> None:
        self._live()
        super().delete(name)


def expected(key: Key) -> bytes:
    image_id, view = key
    parts = []
    for level in GROUP.levels:
        stored = encode(make.features(image_id, view, level, 64, 64), "int8")
        assert stored.scales is not None
        parts += [stored.values[0].numpy().tobytes(), stored.scales[0].numpy().tobytes()]
    return b"".join(parts)


def read(cache: TeacherCache, key: Key) -> bytes:
    targets = cache[key]
    assert len(targets.detections) == key[0] % 3
    return b"".join(
        targets.features[n].numpy().tobytes() + targets.scales[n].numpy().tobytes() for n in targets.features
    )


class Store(RuleBasedStateMachine):
    readers: Bundle[tuple[TeacherCache, frozenset[Key]]] = Bundle("readers")

    @initialize()
    def begin(self) -> None:
        self.root = Path(tempfile.mkdtemp())
        self.storage = LocalStorage(self.root)
        self.images = 4
        self.committed: set[Key] = set()
        self._run(10**6, self._fill, frozenset())

    def teardown(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)

    def _run(self, changes: int, work: Callable[[LocalStorage, str], None], *arguments: frozenset[int]) -> None:
        """Do work under the lease in a process that is killed after so many changes."""
        mortal = Mortal(self.root, changes)
        lease = Lease(self.storage, GROUP.name)
        lease.__enter__()
        try:
            work(mortal, lease.run, *arguments)
        except Killed:
            lease._stop.set()
            lease._thread.join()
            file = self.root / GROUP.name / "lease.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"pid": 2**22 + 1}))
        else:
            lease.__exit__(None, None, None)

    def _fill(self, storage: LocalStorage, run: str, failing: frozenset[int]) -> None:
        compact(storage, GROUP)
        plan = make.plan(storage, GROUP, make.images(self.images))
        prepare(storage, plan)
        for unit in plan.units():
            targets = make.targets(GROUP, unit, skip=failing)
            if not targets:
                continue
            try:
                write_unit(storage, GROUP, unit, targets, lambda: fence(storage, GROUP.name, run))
            finally:
                if (self.root / GROUP.name / "manifest" / f"part-{unit.name}.parquet").exists():
                    self.committed |= {(t.row.image_id, t.row.view) for t in targets}

    @rule(seed=seeds, failing=st.frozensets(st.integers(1, 24), max_size=3))
    def images_are_added_and_a_writer_runs_and_may_be_killed(self, seed: int, failing: frozenset[int]) -> None:
        # drawn from a seed: hypothesis likes small numbers and the same ones, but every moment must have its turn
        rng = random.Random(seed)
        self.images = min(24, self.images + rng.randrange(4))
        self._run(rng.randrange(20), self._fill, failing)

    @rule()
    def a_writer_runs_to_the_end(self) -> None:
        self._run(10**6, self._fill, frozenset())
        assert len(self.committed) == 2 * self.images

    @rule(seed=seeds)
    def a_compaction_runs_and_may_be_killed(self, seed: int) -> None:
        self._run(random.Random(seed).randrange(8), lambda storage, run: (compact(storage, GROUP), None)[1])

    @rule()
    def a_second_writer_is_refused(self) -> None:
        with Lease(self.storage, GROUP.name), pytest.raises(LeaseHeldError), Lease(self.storage, GROUP.name):
            pass

    @rule()
    def a_writer_that_lost_its_lease_changes_nothing(self) -> None:
        plan = make.plan(self.storage, GROUP, make.images(self.images + 1))
        unit = next(plan.units())
        before = {f: f.read_bytes() for f in self.root.rglob("*") if f.is_file() and "lease" not in f.name}
        with Lease(self.storage, GROUP.name), pytest.raises(LeaseHeldError):
            write_unit(
                self.storage, GROUP, unit, make.targets(GROUP, unit), lambda: fence(self.storage, GROUP.name, "old")
            )
        assert {f: f.read_bytes() for f in self.root.rglob("*") if f.is_file() and "lease" not in f.name} == before

    @rule()
    def garbage_is_collected(self) -> None:
        for garbage in list(find_garbage(self.storage, GROUP)):
            remove(self.storage, garbage)
        assert not [g for g in find_garbage(self.storage, GROUP) if g.reason == "not committed"]

    @precondition(lambda self: self.committed)
    @rule(seed=seeds)
    def a_unit_is_damaged_and_repaired(self, seed: int) -> None:
        shards = sorted((self.root / GROUP.name / "64x64").rglob("c/*/0*"))
        file = random.Random(seed).choice([f for f in shards if f.is_file()] or sorted(self.root.rglob("c/*/0/0/0")))
        file.write_bytes(file.read_bytes()[:-1])
        report = verify(self.storage, GROUP)
        repair(self.storage, report)
        lost = set()
        for bucket, unit in report.damaged_units:
            lost |= {k for k in self.committed if (p := self.places.get(k)) and (p[0], p[1] // 4) == (bucket, unit)}
        self.committed -= lost
        assert verify(self.storage, GROUP).damages == []

    @rule(target=readers)
    def a_reader_opens(self) -> tuple[TeacherCache, frozenset[Key]]:
        cache = TeacherCache.open(str(self.root), "t")
        for key in self.committed:
            read(cache, key)  # its maps are open from here on
        return cache, frozenset(self.committed)

    @rule(reader=readers)
    def an_old_reader_still_reads_what_it_saw(self, reader: tuple[TeacherCache, frozenset[Key]]) -> None:
        cache, keys = reader
        for key in keys:
            features = cache[key].features  # mapped when it opened: what happened to the files since does not matter
            values = [features[n].numpy().tobytes() + cache[key].scales[n].numpy().tobytes() for n in features]
            assert b"".join(values) == expected(key)

    @invariant()
    def exactly_what_was_committed_can_be_read(self) -> None:
        if not hasattr(self, "root"):
            return
        cache = TeacherCache.open(str(self.root), "t")
        assert set(cache.keys()) == self.committed
        self.places = {}
        for key in self.committed:
            assert read(cache, key) == expected(key)
            place = cache.index.find(*key)
            assert place is not None
            self.places[key] = (place.bucket, place.row)


TestStore = Store.TestCase
TestStore.settings = settings(
    max_examples=18, stateful_step_count=15, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
