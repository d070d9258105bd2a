"""One Zarr v3 shard, as bytes: inner chunks with their checksums, then the index, then the index's checksum.

The layout is the ``sharding_indexed`` codec with ``index_location: end``, inner codecs ``bytes, crc32c`` and index codecs
``bytes, crc32c``, so that any Zarr v3 implementation reads what is written here. It is written here, not by zarr-python,
for one reason: a row that holds nothing must stay absent from the index instead of becoming a chunk of zeros, and a row
of zeros must be stored; zarr-python offers one or the other for a whole array.
"""

from collections.abc import Mapping
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

ABSENT = np.uint64(2**64 - 1)
_CRC_BYTES = 4


class DamagedBytesError(ValueError):
    """The bytes are not a shard, or a checksum does not match; callers name the unit."""


def encode(chunks: Mapping[int, npt.NDArray[Any]], slots: int) -> list[bytes | memoryview]:
    """The bytes of a shard, as buffers to be written one after the other (nothing is copied).

    Args:
        chunks: the array of each filled slot, contiguous, little-endian.
        slots: chunks a full shard has.
    """
    index = np.full((slots, 2), ABSENT, dtype="<u8")
    buffers: list[bytes | memoryview] = []
    offset = 0
    for slot, chunk in sorted(chunks.items()):
        data = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8)
        index[slot] = offset, data.nbytes + _CRC_BYTES
        buffers += [data.data, _crc(data)]
        offset += data.nbytes + _CRC_BYTES
    table = index.reshape(-1).view(np.uint8)
    return [*buffers, table.tobytes(), _crc(table)]


def size(chunk_bytes: int, filled: int, slots: int) -> int:
    """Bytes of a shard with ``filled`` of its ``slots`` taken, each chunk of ``chunk_bytes``."""
    return filled * (chunk_bytes + _CRC_BYTES) + 16 * slots + _CRC_BYTES


def read_index(data: npt.NDArray[np.uint8], slots: int) -> npt.NDArray[np.uint64]:
    """Offsets and lengths (slots, 2) from a whole shard, `ABSENT` where a slot is empty.

    Raises:
        DamagedBytesError: too short, a wrong checksum, or a chunk that lies outside the shard.
    """
    start = data.size - (16 * slots + _CRC_BYTES)
    if start < 0:
        raise DamagedBytesError(f"{data.size} bytes are too few for a shard of {slots} rows")
    table = data[start : data.size - _CRC_BYTES]
    if _crc(table) != data[data.size - _CRC_BYTES :].tobytes():
        raise DamagedBytesError("the shard's index does not match its checksum")
    index = np.frombuffer(table.tobytes(), dtype="<u8").reshape(slots, 2)
    filled = index[index[:, 0] != ABSENT]
    if filled.size and int((filled[:, 0] + filled[:, 1]).max()) > start:
        raise DamagedBytesError("the shard's index points outside the shard")
    return index


def read_chunk(
    data: npt.NDArray[np.uint8], index: npt.NDArray[np.uint64], slot: int, chunk_bytes: int, *, verify: bool
) -> npt.NDArray[np.uint8]:
    """The bytes of one slot, as a view into ``data``.

    Raises:
        DamagedBytesError: the slot is empty, of another length, or does not match its checksum.
    """
    offset, length = int(index[slot, 0]), int(index[slot, 1])
    if index[slot, 0] == ABSENT:
        raise DamagedBytesError(f"slot {slot} is empty")
    if length != chunk_bytes + _CRC_BYTES:
        raise DamagedBytesError(f"slot {slot} has {length} bytes, expected {chunk_bytes + _CRC_BYTES}")
    chunk = data[offset : offset + chunk_bytes]
    if verify and _crc(chunk) != data[offset + chunk_bytes : offset + length].tobytes():
        raise DamagedBytesError(f"slot {slot} does not match its checksum")
    return chunk


def _crc(data: npt.NDArray[np.uint8]) -> bytes:
    data = data.view()
    data.flags.writeable = False  # the C function takes no other buffer
    return int(google_crc32c.value(data)).to_bytes(_CRC_BYTES, "little")
