"""What the caches of runs hold, what filling them took, and how many teacher forwards that saved."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cache import (
    CorruptShardError,
    GroupInfo,
    MtpdError,
    Storage,
    TeacherCache,
    list_groups,
    open_storage,
    references,
)
from services.runs import Run


@dataclass(frozen=True)
class StoredLevel:
    """One level of a group: its channels, stride and pooling window, and the median SNR of its quantisation in dB."""

    name: str
    channels: int
    stride: int
    pool: int
    snr: float


@dataclass(frozen=True)
class Filling:
    """What the recorded precomputes of one group did, together.

    Attributes:
        rows: computed and committed; as many forwards.
        failures: of the last run.
        seconds: loading the teacher included.
        device_share: share of the actors' time in which their device was busy, weighted by the runs' seconds.
    """

    runs: int
    rows: int
    failures: int
    seconds: float
    written_bytes: int
    device_share: float

    @property
    def rate(self) -> float:
        """Images (views) a second."""
        return self.rows / max(self.seconds, 1e-9)


@dataclass(frozen=True)
class CacheFacts:
    """One teacher's group.

    Attributes:
        rows: committed.
        bytes_on_disk: of all its files.
        filling: None where no precompute of it is recorded with these runs.
    """

    uri: str
    info: GroupInfo
    rows: int
    bytes_on_disk: int
    levels: tuple[StoredLevel, ...]
    filling: Filling | None


@dataclass(frozen=True)
class Forwards:
    """Teacher forwards of some runs.

    Attributes:
        used: (teacher, image, view)s that students were trained on: what teachers beside them would have made.
        computed: made to fill the caches: what is recorded, but at least one for each row that is there; None if of a group
            that a stage was trained from neither the records nor the rows are there.
        live: made by teachers beside the students.
    """

    used: int
    computed: int | None
    live: int

    @property
    def made(self) -> int | None:
        """All that were made."""
        return None if self.computed is None else self.computed + self.live

    @property
    def saved(self) -> int | None:
        """How many were not made because targets were read from a cache."""
        return None if self.made is None else self.used - self.made


def cache_facts(runs: Sequence[Run]) -> tuple[list[CacheFacts], list[str]]:
    """The groups of the runs' teachers.

    Returns:
        The groups, and a sentence on each cache or group that cannot be read.
    """
    facts: list[CacheFacts] = []
    missing: list[str] = []
    wanted: dict[str, dict[str, None]] = {}
    for run in sorted(runs, key=lambda run: -len(run.teachers)):  # its longest sequence gives the order
        if isinstance(uri := _uri(run), str):
            wanted.setdefault(uri, {}).update(dict.fromkeys(run.teachers))
    for uri, teachers in wanted.items():
        if not teachers:
            continue
        try:
            storage = open_storage(uri)
            groups = [
                info
                for teacher in teachers
                for info in _groups_read(storage, teacher, [r for r in runs if _uri(r) == uri])
            ]
        except MtpdError as error:
            missing.append(f"The cache cannot be read: {error}")
            continue
        if absent := [name for name in teachers if name not in {info.teacher for info in groups}]:
            missing.append(
                f"The cache {storage.where()} holds nothing of {', '.join(absent)} that these runs read: deleted, or never "
                "filled."
            )
        for info in sorted(groups, key=lambda info: list(teachers).index(info.teacher)):
            filling = _filling(runs, info.name)
            if filling is None:
                where = f" ({storage.where(info.name)})" if len(wanted) > 1 else ""
                missing.append(
                    f"No precompute of teacher {info.teacher}{where} is recorded with these runs, so its throughput is not "
                    "known; its rows were in the cache before."
                )
            try:
                cache = TeacherCache.open(uri, info.teacher, fingerprint=info.record)
                snr = cache.fidelity() if len(cache) else {}
                size = bytes_on_disk(storage, info.name)
            except MtpdError as error:
                missing.append(f"The group {info.name} cannot be read: {error}")
                continue
            levels = tuple(
                StoredLevel(level.name, level.channels, level.stride, level.pool, snr.get(level.name, float("nan")))
                for level in info.levels
            )
            facts.append(CacheFacts(storage.where(), info, len(cache), size, levels, filling))
    return facts, missing


def bytes_on_disk(storage: Storage, group: str) -> int:
    """Of all files of a group: its shards, and the manifest, the detections and the attributes beside them."""
    return sum(entry.size for entry in storage.walk(group))


def count_forwards(runs: Sequence[Run], facts: Sequence[CacheFacts]) -> Forwards:
    """The teacher forwards of the stages that are done, and of filling the caches that they read."""
    stages = [stage for run in runs for stage in run.done]
    used, live = sum(stage.targets for stage in stages), sum(stage.live_forwards for stage in stages)
    rows: dict[str, int] = {}  # by group: recorded with the runs, or there
    for group in {fill["group"] for run in runs for name in run.teachers for fill in run.fills.get(name, ())}:
        filling = _filling(runs, group)
        rows[group] = filling.rows if filling else 0
    for fact in facts:
        rows[fact.info.name] = max(rows.get(fact.info.name, 0), fact.rows)
    read = {name for stage in stages for name in stage.groups}
    known = read <= rows.keys() and bool(rows or used == live)
    return Forwards(used, sum(rows.values()) if known else None, live)


def _uri(run: Run) -> Any:
    return run.recipe.get("cache", {}).get("uri")


def _groups_read(storage: Storage, teacher: str, runs: Sequence[Run]) -> list[GroupInfo]:
    """The groups of a teacher that these runs' stages read, or will; other recipes' lie beside them.

    Which they are is known of a stage that was begun, and of the others where their recipe left a record in the cache. If
    neither is known of one that is not begun, or of any, all of the teacher's groups are taken.
    """
    groups = list_groups(storage, teacher)
    named = {name for run in runs for stage in run.stages for name in stage.groups}
    try:
        recorded = {
            one.work_dir: {name for name, use in one.groups.items() if use.teacher == teacher}
            for one in references(storage)
        }
    except CorruptShardError:
        recorded = {}
    for run in runs:
        if any(teacher in stage.teachers and not stage.begun for stage in run.stages):
            wanted = recorded.get(str(run.recipe.get("work_dir")))
            if not wanted:
                return groups
            named |= wanted
    teachers_own = {name for name in named if name.rpartition("-")[0] == teacher}
    return [info for info in groups if info.name in teachers_own] if teachers_own else groups


def _filling(runs: Sequence[Run], group: str) -> Filling | None:
    records: list[dict[str, Any]] = [
        record for run in runs for records in run.fills.values() for record in records if record["group"] == group
    ]
    if not records:
        return None
    records.sort(key=lambda record: record["ended"])
    seconds = sum(record["seconds"] for record in records)
    return Filling(
        len(records),
        sum(record["computed"] for record in records),
        records[-1]["failures"],
        seconds,
        sum(record["written_bytes"] for record in records),
        sum(record["device_share"] * record["seconds"] for record in records) / max(seconds, 1e-9),
    )
