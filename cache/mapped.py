"""Rows of local shards: mapped, sliced through their index, nothing copied."""

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cache import pagecache, shard
from cache.layout import ArraySpec, GroupInfo
from cache.shard import Bytes, DamagedBytesError, Tail
from cache.storage import LocalStorage

# a process may hold 65,530 maps by Linux's default; the rest is left to others
_MAX_MAPS = 16_384


@dataclass(frozen=True)
class _Mapped:
    data: Bytes
    address: int
    visible: bool
    tail: Tail
    array: ArraySpec
    label: int


class MappedRows:
    """Reads rows of shards in a local directory.

    Args:
        verify: check the checksum of every row that is read.
    """

    def __init__(self, storage: LocalStorage, info: GroupInfo, *, verify: bool) -> None:
        self._storage, self._info, self._verify = storage, info, verify
        self._units: OrderedDict[tuple[str, int], list[_Mapped]] = OrderedDict()

    def read(
        self, arrays: Sequence[ArraySpec], bucket: str, unit: int, slots: int, slot: int, label: int | None
    ) -> list[Bytes]:
        """The bytes of one row in each array; where rows are not compressed, views into the maps.

        Args:
            label: of the row; None in format version 1.

        Raises:
            DamagedBytesError, FileNotFoundError: what is stored is not what was written.
        """
        if not arrays:
            return []
        key = bucket, unit
        mapped = self._units.get(key)
        if mapped is None:
            mapped = self._units[key] = [self._map(array, bucket, unit, slots) for array in arrays]
            if len(self._units) * len(arrays) > _MAX_MAPS:
                self._units.popitem(last=False)
        else:
            self._units.move_to_end(key)
        places = [one.tail.find(slot, None if label is None else label ^ one.label) for one in mapped]
        finest, (start, nbytes) = mapped[0], places[0]
        if not (finest.visible and pagecache.seems_resident(finest.address + start, nbytes)):
            for one, (offset, length) in zip(mapped, places, strict=True):
                pagecache.fetch(one.address + offset, length)
        rows = []
        for one, (offset, length) in zip(mapped, places, strict=True):
            data = shard.read_chunk(one.data[offset : offset + length], verify=self._verify)
            if self._info.compression != "none":
                data = shard.decompress(data, one.array.nbytes, self._info.compression)
            rows.append(data)
        return rows

    def _map(self, array: ArraySpec, bucket: str, unit: int, slots: int) -> _Mapped:
        info = self._info
        file = self._storage.path(array.shard(info.name, bucket, unit))
        size = file.stat().st_size
        if size == 0:
            raise DamagedBytesError("the shard is empty")
        # a private map that keeps no file descriptor open: tens of thousands of shards may be mapped at once
        data = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8).numpy()
        address = data.__array_interface__["data"][0]
        pagecache.expect_random_reads(address, size)
        tail = shard.tail_of(data, slots, array.nbytes, info.compression, info.version)
        return _Mapped(
            data, address, os.access(file, os.W_OK), tail, array, shard.array_label(info.name, bucket, array.name)
        )
