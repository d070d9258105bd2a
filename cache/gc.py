"""Find and remove what nothing needs: temporary files, units without a record, whole groups."""

import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

from cache.errors import StaleCacheError
from cache.layout import LEASE, GroupInfo
from cache.lease import Lease, is_held
from cache.storage import Entry, Storage
from cache.verify import committed_units, unit_of

Reason = Literal["temporary file", "not committed", "superseded", "stage is done"]
# a temporary file that is older than this is of a writer that was killed
_TEMPORARY_SECONDS = 3600.0


@dataclass(frozen=True)
class Garbage:
    """Files of a group that nothing needs.

    Attributes:
        reason: why; for the last two the files are the whole group.
        held: a run holds the group's lease, or held it when it died: nothing is removed while one does.
    """

    info: GroupInfo
    reason: Reason
    names: tuple[str, ...]
    size: int
    held: bool

    @property
    def whole(self) -> bool:
        """The group itself is garbage."""
        return self.reason in ("superseded", "stage is done")


def find_garbage(storage: Storage, info: GroupInfo) -> Iterator[Garbage]:
    """What a group holds beside what its manifest covers.

    Raises:
        CorruptShardError: the manifest cannot be read: nothing is garbage then.
        StaleCacheError: the group is of format version 1, which does not say which files its rows need.
    """
    if info.version == 1:
        raise StaleCacheError(
            f"{storage.where(info.name)}: written in format version 1; only the whole group can be removed."
        )
    committed = committed_units(storage, info)
    temporary, uncommitted = [], []
    for entry in storage.walk(info.name):
        file = entry.name.rpartition("/")[2]
        unit = unit_of(info, entry.name)
        if file.startswith(".") and file.endswith(".tmp"):
            if time.time() - entry.modified > _TEMPORARY_SECONDS:
                temporary.append(entry)
        elif unit is not None and unit not in committed:
            uncommitted.append(entry)
    if temporary:
        yield _garbage(storage, info, "temporary file", temporary)
    if uncommitted:
        yield _garbage(storage, info, "not committed", uncommitted)


def whole_group(storage: Storage, info: GroupInfo, reason: Literal["superseded", "stage is done"]) -> Garbage:
    """Everything that a group holds."""
    return _garbage(storage, info, reason, list(storage.walk(info.name)))


def remove(storage: Storage, garbage: Garbage) -> None:
    """Remove garbage, under the group's lease.

    What is not committed is decided anew under the lease, for a run may have committed it meanwhile. A whole group goes
    manifest first, so that what is killed on the way leaves no row whose bytes are gone.

    Raises:
        LeaseHeldError: a run writes this group.
    """
    info = garbage.info
    with Lease(storage, info.name) as lease:
        committed = committed_units(storage, info) if garbage.reason == "not committed" else set()
        for name in sorted(garbage.names, key=_order):
            lease.check()
            if unit_of(info, name) not in committed and not name.endswith(LEASE):
                storage.delete(name)
    if garbage.whole:
        for entry in list(storage.walk(info.name)):
            if entry.name.endswith(".lock"):  # of the lease that was just given back
                storage.delete(entry.name)
        storage.prune(info.name)


def _garbage(storage: Storage, info: GroupInfo, reason: Reason, entries: Collection[Entry]) -> Garbage:
    size = sum(entry.size for entry in entries)
    return Garbage(info, reason, tuple(entry.name for entry in entries), size, is_held(storage, info.name))


def _order(name: str) -> tuple[int, str]:
    """Manifest, then targets, then the group's own attributes and locks."""
    parts = name.split("/")
    if parts[1].startswith("manifest"):
        return 0, name
    return (2 if len(parts) == 2 else 1), name
