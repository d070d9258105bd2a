"""`mtpd ls`: what a cache holds, group by group, and which recipes need it."""

from dataclasses import dataclass
from datetime import UTC, datetime

from cache import (
    CorruptShardError,
    GroupInfo,
    Precision,
    Reference,
    Storage,
    TeacherCache,
    differences,
    list_groups,
    planned_views,
    references,
)
from services.present import ago, complain, say, size, table


@dataclass(frozen=True)
class User:
    """A recipe that a group was filled for, or that trained from it.

    Attributes:
        used: when a run last said so, in seconds since the epoch.
        stages: that read the group.
        needs: a stage that reads the group is not trained yet: `mtpd gc` keeps it for this recipe.
    """

    name: str
    work_dir: str
    used: float
    stages: tuple[int, ...]
    needs: bool


@dataclass(frozen=True)
class Entry:
    """One teacher's group.

    Attributes:
        differs: from the group of the same teacher most alike, one line each; empty without another.
        views: of each image; None where that is not known.
        rows: committed; None where the manifest is damaged.
        bytes: of all its files.
        levels: per level channels, stride and the window of the pooling.
        snr: median signal-to-noise ratio per level, dB; empty without rows.
        dense: per level how many positions of the dense head are stored.
        head: whether the head's weights are.
        detections: whether it has rows with detections.
        written: when a file of it last was, in seconds since the epoch; None for a folder without files.
        problem: what is damaged.
    """

    teacher: str
    group: str
    fingerprint: str
    differs: tuple[str, ...]
    version: int
    precision: Precision
    compression: str
    views: int | None
    rows: int | None
    bytes: int
    levels: dict[str, tuple[int, int, int]]
    snr: dict[str, float]
    dense: dict[str, int]
    head: bool
    detections: bool
    written: float | None
    users: tuple[User, ...]
    problem: str = ""

    @property
    def used(self) -> float | None:
        """When a run last said that it uses the group."""
        return max((user.used for user in self.users), default=None)


def entries(storage: Storage) -> list[Entry]:
    """Every group, by teacher.

    Raises:
        StorageError: the object storage does not answer.
    """
    infos = sorted(list_groups(storage, unreadable=lambda error: complain(str(error))), key=lambda info: info.name)
    try:
        known = references(storage)
    except CorruptShardError as error:
        complain(str(error))
        known = []
    return [_entry(storage, info, infos, known) for info in infos]


def _entry(storage: Storage, info: GroupInfo, infos: list[GroupInfo], known: list[Reference]) -> Entry:
    rows, snr, problem = None, {}, ""
    try:
        cache = TeacherCache.open(_uri(storage), info.teacher, fingerprint=info.record)
        rows = len(cache)
        snr = cache.fidelity() if rows else {}
    except CorruptShardError as error:
        problem = str(error)
    files = list(storage.walk(info.name))
    siblings = (other for other in infos if other.teacher == info.teacher and other is not info)
    diffs = min((list(differences(other.record, info.record)) for other in siblings), key=len, default=[])
    return Entry(
        teacher=info.teacher,
        group=info.name,
        fingerprint=info.digest,
        differs=tuple(diffs),
        version=info.version,
        precision=info.precision,
        compression=info.compression,
        views=planned_views(storage, info),
        rows=rows,
        bytes=sum(file.size for file in files),
        levels={level.name: (level.channels, level.stride, level.pool) for level in info.levels},
        snr=snr,
        dense={dense.name: dense.top_k for dense in info.dense},
        head=info.head is not None,
        detections=bool(rows) and info.detections,
        written=max((file.modified for file in files), default=None),
        users=tuple(
            User(one.name, one.work_dir, one.used, one.groups[info.name].stages, one.needs(info.name))
            for one in known
            if info.name in one.groups
        ),
        problem=problem,
    )


def _uri(storage: Storage) -> str:
    return storage.where().rstrip("/")


def show(found: list[Entry]) -> None:
    """A table for people, and below it what differs and who needs what."""
    if not found:
        say("no teacher's targets are in this cache")
        return
    rows = [
        [
            one.group,
            "?" if one.rows is None else f"{one.rows:,}",
            size(one.bytes),
            one.precision,
            _levels(one),
            _more(one),
            "-" if one.views is None else one.views,
            one.version,
            _date(one.written),
            _date(one.used),
        ]
        for one in found
    ]
    columns = ["group", "rows", "bytes", "precision", "levels (dB)", "also", "views", "format", "written", "used"]
    table("cache", columns, rows)
    for one in found:
        if one.problem:
            complain(f"{one.group}: {one.problem}")
        for line in one.differs[:4]:
            say(f"{one.group} differs from another group of {one.teacher}: {line}")
        if len(one.differs) > 4:
            say(f"  and in {len(one.differs) - 4} more fields (--json)")
        for user in one.users:
            stages = (
                f"stage{'s' * (len(user.stages) != 1)} {', '.join(map(str, user.stages))}"
                if user.stages
                else "no stage"
            )
            state = "needs it" if user.needs else "is done with it"
            say(f"{one.group}: {user.name} ({user.work_dir}, {stages}) {state}, last used {ago(user.used)} ago")


def _levels(entry: Entry) -> str:
    named = [
        f"{name}{f'/{pool}' if pool > 1 else ''}{f' {entry.snr[name]:.1f}' if name in entry.snr else ''}"
        for name, (_, _, pool) in entry.levels.items()
    ]
    return ", ".join(named) or "none"


def _more(entry: Entry) -> str:
    parts = ["detections"] * entry.detections + ["head"] * entry.head
    if entry.dense:
        parts.append(f"top {max(entry.dense.values())} dense")
    return ", ".join(parts) or "-"


def _date(moment: float | None) -> str:
    return "-" if moment is None else datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M")
