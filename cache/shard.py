"""One Zarr v3 shard, as bytes: inner chunks with their checksums, labels, then the index, then the index's checksum.

The layout is the ``sharding_indexed`` codec with ``index_location: end``, inner codecs ``bytes, crc32c`` (or ``bytes, zstd,
crc32c``) and index codecs ``bytes, crc32c``, so that any Zarr v3 implementation reads what is written here. It is written
here, not by zarr-python, for two reasons. A row that holds nothing must stay absent from the index instead of becoming a
chunk of zeros, and a row of zeros must be stored; zarr-python offers one or the other for a whole array. And between chunks
and index, where other implementations do not look, lies a label for each row: which (image, view) of which array it is, so
that an intact shard in the wrong place is noticed.
"""

import hashlib
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cache.layout import Compression

ABSENT = 2**64 - 1
_CRC_BYTES = 4
_INDEX_BYTES, _LABEL_BYTES = 16, 8
_ZSTD_LEVEL = 3
Bytes = npt.NDArray[np.uint8]


class DamagedBytesError(ValueError):
    """The bytes are not what was written; callers name the unit."""


@dataclass(frozen=True)
class Chunk:
    """One row of one array, as stored.

    Attributes:
        data: compressed if the array is; without its checksum.
        label: see `row_label`; 0 in format version 1.
    """

    data: Bytes
    label: int


@dataclass(frozen=True)
class Tail:
    """What a shard's end says of its rows.

    Attributes:
        offsets: per slot where its chunk begins, -1 where the slot is empty.
        lengths: per slot the bytes of its chunk, checksum included.
        labels: per slot; empty in format version 1.
    """

    offsets: list[int]
    lengths: list[int]
    labels: list[int]

    def find(self, slot: int, label: int | None) -> tuple[int, int]:
        """Offset and length of a row's chunk.

        Raises:
            DamagedBytesError: the slot is empty, or holds another row.
        """
        if self.offsets[slot] < 0:
            raise DamagedBytesError(f"slot {slot} is empty")
        if self.labels and self.labels[slot] != label:
            raise DamagedBytesError(f"slot {slot} holds another row: the shard is not where it belongs")
        return self.offsets[slot], self.lengths[slot]


def row_label(image_id: int, view: int, source: int) -> int:
    """64 bits that name a row, to be combined with `array_label` by exclusive or."""
    return int.from_bytes(
        hashlib.blake2b(struct.pack("<qqQ", image_id, view, source), digest_size=8).digest(), "little"
    )


def array_label(group: str, bucket: str, array: str) -> int:
    """64 bits that name an array."""
    return int.from_bytes(hashlib.blake2b(f"{group}/{bucket}/{array}".encode(), digest_size=8).digest(), "little")


def compress(row: npt.NDArray[Any], compression: Compression) -> Bytes:
    """The bytes of a chunk, without its checksum. ``row`` is contiguous and little-endian."""
    data: Bytes = np.ascontiguousarray(row).reshape(-1).view(np.uint8)
    if compression == "none":
        return data
    packed = pa.Codec("zstd", compression_level=_ZSTD_LEVEL).compress(pa.py_buffer(data))
    return np.frombuffer(packed, np.uint8)


def decompress(data: Bytes, nbytes: int, compression: Compression) -> Bytes:
    """The inverse of `compress`, for a row of ``nbytes``; never allocates more.

    Raises:
        DamagedBytesError: the data does not hold so many bytes.
    """
    if compression == "zstd":
        try:
            restored = pa.Codec("zstd").decompress(pa.py_buffer(data), decompressed_size=nbytes)
        except (pa.ArrowException, OSError) as error:
            raise DamagedBytesError(f"not a zstd frame of {nbytes} bytes ({error})") from error
        data = np.frombuffer(restored, np.uint8)
    if data.size != nbytes:
        raise DamagedBytesError(f"a row has {data.size} bytes, expected {nbytes}")
    return data


def encode(chunks: Mapping[int, Chunk], slots: int) -> Iterator[bytes | memoryview]:
    """The bytes of a shard, as buffers to be written one after the other: chunks are not copied, and a chunk's checksum is
    computed when its turn comes.

    Args:
        chunks: of each filled slot.
        slots: chunks that a full shard has.
    """
    index = np.full((slots, 2), ABSENT, dtype="<u8")
    labels = np.zeros(slots, dtype="<u8")
    offset = 0
    for slot, chunk in sorted(chunks.items()):
        index[slot] = offset, chunk.data.nbytes + _CRC_BYTES
        labels[slot] = chunk.label
        crc = _crc(chunk.data)  # first: what is written next is then in the processor's cache
        yield chunk.data.data
        yield crc
        offset += chunk.data.nbytes + _CRC_BYTES
    for table in (labels, index.reshape(-1)):
        yield table.tobytes()
        yield _crc(table.view(np.uint8))


def size(chunk_bytes: int, filled: int, slots: int) -> int:
    """Bytes of a shard with ``filled`` of its ``slots`` taken by chunks of ``chunk_bytes`` each."""
    return filled * (chunk_bytes + _CRC_BYTES) + tail_bytes(slots, labelled=True)


def tail_bytes(slots: int, *, labelled: bool) -> int:
    """Bytes of a shard's labels and index with their checksums."""
    labels = _LABEL_BYTES * slots + _CRC_BYTES if labelled else 0
    return labels + _INDEX_BYTES * slots + _CRC_BYTES


def read_tail(
    tail: Bytes, shard_bytes: int, slots: int, chunk_bytes: int, compression: Compression, version: int
) -> Tail:
    """Read a shard's end.

    Args:
        tail: its last `tail_bytes`.
        shard_bytes: size of the whole shard.
        chunk_bytes: of one row, not compressed.
        version: of the format.

    Raises:
        DamagedBytesError: too short, too long, a wrong checksum, or a chunk that cannot be one of this array.
    """
    start = shard_bytes - tail_bytes(slots, labelled=version > 1)
    if start < 0:
        raise DamagedBytesError(f"{shard_bytes} bytes are too few for a shard of {slots} rows")
    index_at = tail.size - (_INDEX_BYTES * slots + _CRC_BYTES)
    index = _checked(tail[index_at:], "index").reshape(slots, 2)
    labels = _checked(tail[:index_at], "labels").tolist() if version > 1 else []
    filled = index[index[:, 0] != ABSENT]
    # sums of unsigned numbers wrap around: compare, do not add
    if filled.size and (int(filled[:, 1].max()) > start or bool((filled[:, 0] > start - filled[:, 1]).any())):
        raise DamagedBytesError("the index points outside the shard")
    if int(filled[:, 1].sum()) != start:
        raise DamagedBytesError(f"{start} bytes of chunks, the index says {int(filled[:, 1].sum())}")
    if compression == "none" and bool((filled[:, 1] != chunk_bytes + _CRC_BYTES).any()):
        raise DamagedBytesError(f"a chunk is not {chunk_bytes + _CRC_BYTES} bytes long")
    if bool((filled[:, 1] <= _CRC_BYTES).any()):
        raise DamagedBytesError("a chunk is empty")
    offsets = np.where(index[:, 0] == ABSENT, 0, index[:, 0]).astype(np.int64)
    offsets[index[:, 0] == ABSENT] = -1
    return Tail(offsets.tolist(), index[:, 1].tolist(), labels)


def tail_of(shard: Bytes, slots: int, chunk_bytes: int, compression: Compression, version: int) -> Tail:
    """`read_tail` of a whole shard."""
    end = shard[max(0, shard.size - tail_bytes(slots, labelled=version > 1)) :]
    return read_tail(end, shard.size, slots, chunk_bytes, compression, version)


def read_chunk(stored: Bytes, *, verify: bool) -> Bytes:
    """A chunk without its checksum, as a view into ``stored``.

    Raises:
        DamagedBytesError: it does not match its checksum.
    """
    data = stored[: stored.size - _CRC_BYTES]
    if verify and _crc(data) != stored[stored.size - _CRC_BYTES :].tobytes():
        raise DamagedBytesError("a row does not match its checksum")
    return data


def _checked(table: Bytes, what: str) -> npt.NDArray[np.uint64]:
    data = table[: table.size - _CRC_BYTES]
    if _crc(data) != table[table.size - _CRC_BYTES :].tobytes():
        raise DamagedBytesError(f"the shard's {what} does not match its checksum")
    return np.frombuffer(data.tobytes(), dtype="<u8")


def _crc(data: npt.NDArray[Any]) -> bytes:
    data = data.view()
    data.flags.writeable = False  # the C function takes no other buffer
    return int(google_crc32c.value(data)).to_bytes(_CRC_BYTES, "little")
