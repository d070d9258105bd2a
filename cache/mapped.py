"""Rows of local shards: mapped, sliced through their index, nothing copied."""

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakSet

import torch

from cache import pagecache, shard
from cache.layout import ArraySpec, GroupInfo
from cache.shard import Bytes, DamagedBytesError, Tail
from cache.storage import LocalStorage

# a process may hold 65,530 maps by Linux's default; the rest is left to others. All readers of a process share them
_ALL_MAPS, _MAX_MAPS = 49_152, 16_384
# views into maps, 160 bytes each: units of small rows have many
_MAX_VIEWS = 2**20
_readers: "WeakSet[MappedRows]" = WeakSet()
# no row's label: those have 64 bits
_NONE = -1


@dataclass(frozen=True, slots=True)
class _Row:
    """One row in every array of its unit.

    Attributes:
        label: on which all arrays agree, `_NONE` if they do not; None in format version 1.
        chunks: views into the maps, with their checksums if these are to be checked.
        address: of the first chunk.
    """

    label: int | None
    chunks: list[Bytes]
    address: int


@dataclass(frozen=True, slots=True)
class _Unit:
    """A unit's rows, None where a slot is empty. They are made when the unit is mapped: after a row's copy nothing else is in
    the processor's cache, and what a read costs beside its copy is the number of objects that it has to look at.

    Attributes:
        visible: whether the kernel says which pages are in memory.
        maps: how many of them it holds.
    """

    rows: list[_Row | None]
    visible: bool
    maps: int


class MappedRows:
    """Reads rows of shards in a local directory.

    Args:
        verify: check the checksum of every row that is read.
    """

    def __init__(self, storage: LocalStorage, info: GroupInfo, *, verify: bool) -> None:
        self._storage, self._info, self._verify = storage, info, verify
        self._units: OrderedDict[tuple[str, int], _Unit] = OrderedDict()
        self._maps = self._views = 0
        _readers.add(self)

    def read(
        self, arrays: Sequence[ArraySpec], bucket: str, unit: int, slots: int, slot: int, label: int | None
    ) -> list[Bytes]:
        """The bytes of one row in each array; where rows are not compressed, views into the maps.

        Args:
            label: of the row; None in format version 1.

        Raises:
            DamagedBytesError, FileNotFoundError: what is stored is not what was written.
        """
        key = bucket, unit
        mapped = self._units.get(key)
        if mapped is None:
            mapped = self._units[key] = self._map_unit(arrays, bucket, unit, slots)
            self._count(mapped, 1)
            most = min(_MAX_MAPS, _ALL_MAPS // len(_readers))
            while len(self._units) > 1 and (self._maps > most or self._views > _MAX_VIEWS):
                self._count(self._units.popitem(last=False)[1], -1)
        else:
            self._units.move_to_end(key)
        row = mapped.rows[slot]
        if row is None:
            raise DamagedBytesError(f"slot {slot} is empty")
        if row.label != label:
            raise DamagedBytesError(f"slot {slot} holds another row: the shard is not where it belongs")
        chunks = row.chunks
        if not (mapped.visible and pagecache.seems_resident(row.address, chunks[0].size)):
            for chunk in chunks:
                pagecache.fetch(chunk.ctypes.data, chunk.size)
        if self._verify:
            chunks = [shard.read_chunk(chunk, verify=True) for chunk in chunks]
        if self._info.compression != "none":
            pairs = zip(chunks, arrays, strict=True)
            chunks = [shard.decompress(chunk, array.nbytes, self._info.compression) for chunk, array in pairs]
        return chunks

    def forget(self, bucket: str, unit: int) -> None:
        """Map a unit anew when it is read next: it was written anew."""
        if (mapped := self._units.pop((bucket, unit), None)) is not None:
            self._count(mapped, -1)

    def _count(self, mapped: _Unit, sign: int) -> None:
        self._maps += sign * mapped.maps
        self._views += sign * mapped.maps * len(mapped.rows)

    def _map_unit(self, arrays: Sequence[ArraySpec], bucket: str, unit: int, slots: int) -> _Unit:
        shards = [self._map(array, bucket, unit, slots) for array in arrays]
        names = [shard.array_label(self._info.name, bucket, array.name) for array in arrays]
        rows = [self._row(shards, names, slot) for slot in range(slots)]
        finest = self._storage.path(arrays[0].shard(self._info.name, bucket, unit))
        return _Unit(rows, os.access(finest, os.W_OK), len(arrays))

    def _row(self, shards: Sequence[tuple[Bytes, Tail]], names: Sequence[int], slot: int) -> _Row | None:
        if any(tail.offsets[slot] < 0 for _, tail in shards):
            return None
        labels = {
            tail.labels[slot] ^ name if tail.labels else None for (_, tail), name in zip(shards, names, strict=True)
        }
        places = [(data, tail.offsets[slot], tail.lengths[slot]) for data, tail in shards]
        chunks = [data[offset : offset + length] for data, offset, length in places]
        if not self._verify:
            chunks = [shard.read_chunk(chunk, verify=False) for chunk in chunks]
        return _Row(labels.pop() if len(labels) == 1 else _NONE, chunks, chunks[0].ctypes.data)

    def _map(self, array: ArraySpec, bucket: str, unit: int, slots: int) -> tuple[Bytes, Tail]:
        info = self._info
        file = self._storage.path(array.shard(info.name, bucket, unit))
        size = file.stat().st_size
        if size == 0:
            raise DamagedBytesError("the shard is empty")
        # a private map that keeps no file descriptor open: tens of thousands of shards may be mapped at once
        data = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8).numpy()
        pagecache.expect_random_reads(data.ctypes.data, size)
        return data, shard.tail_of(data, slots, array.nbytes, info.compression, info.version)
