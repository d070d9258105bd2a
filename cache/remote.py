"""Rows of shards in object storage: ranges of objects, fetched at once, with the shards' ends kept in memory."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cache import shard
from cache.layout import ArraySpec, GroupInfo
from cache.objects import ChangedObjectError, ObjectStorage
from cache.shard import Bytes, DamagedBytesError, Tail

_MAX_UNITS = 1024
# bytes that do not match their checksum are fetched again before they are called damaged
_TRIES = 3


@dataclass(frozen=True)
class _Shard:
    name: str
    tag: str
    tail: Tail
    array: ArraySpec
    label: int


class RemoteRows:
    """Reads rows of shards in object storage. Every row is checked."""

    def __init__(self, storage: ObjectStorage, info: GroupInfo) -> None:
        self._storage, self._info = storage, info
        self._units: OrderedDict[tuple[str, int], list[_Shard]] = OrderedDict()

    def read(
        self, arrays: Sequence[ArraySpec], bucket: str, unit: int, slots: int, slot: int, label: int | None
    ) -> list[Bytes]:
        """The bytes of one row in each array; see `MappedRows.read`.

        Raises:
            StorageError: the storage does not answer.
            DamagedBytesError, FileNotFoundError: what is stored is not what was written.
        """
        for attempt in range(1, _TRIES + 1):
            try:
                return self._fetch(self._ends(arrays, bucket, unit, slots), slot, label)
            except (ChangedObjectError, DamagedBytesError):
                # written anew since its end was read, or damaged on the way
                self._units.pop((bucket, unit), None)
                if attempt == _TRIES:
                    raise
        raise AssertionError("unreachable")

    def forget(self, bucket: str, unit: int) -> None:
        """Read a unit's ends anew when it is read next: it was written anew."""
        self._units.pop((bucket, unit), None)

    def _ends(self, arrays: Sequence[ArraySpec], bucket: str, unit: int, slots: int) -> list[_Shard]:
        key = bucket, unit
        if key in self._units:
            self._units.move_to_end(key)
            return self._units[key]
        info = self._info

        def read_end(array: ArraySpec) -> _Shard:
            name = array.shard(info.name, bucket, unit)
            end, size, tag = self._storage.read_end(name, shard.tail_bytes(slots, labelled=info.version > 1))
            tail = shard.read_tail(
                np.frombuffer(end, np.uint8), size, slots, array.nbytes, info.compression, info.version
            )
            return _Shard(name, tag, tail, array, shard.array_label(info.name, bucket, array.name))

        self._units[key] = self._storage.map(read_end, arrays)
        if len(self._units) > _MAX_UNITS:
            self._units.popitem(last=False)
        return self._units[key]

    def _fetch(self, shards: Sequence[_Shard], slot: int, label: int | None) -> list[Bytes]:
        def fetch(one: _Shard) -> Bytes:
            offset, length = one.tail.find(slot, None if label is None else label ^ one.label)
            stored = np.frombuffer(self._storage.read_range(one.name, offset, length, one.tag), np.uint8)
            return shard.decompress(shard.read_chunk(stored, verify=True), one.array.nbytes, self._info.compression)

        return self._storage.map(fetch, shards)
