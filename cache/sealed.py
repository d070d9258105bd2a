"""Parquet files of which every byte is covered by one checksum, and which know their own name.

Parquet's page checksums leave headers, footer and statistics unprotected. Here the footer's metadata hold the file's name
and the CRC-32C of the whole file, computed with zeros in its own place. Any Parquet reader reads such a file.
"""

import io
import re
from collections.abc import Iterator, Sequence

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

_NAME, _SEAL = "mtpd.name", "mtpd.crc32c"
_BLANK = b"00000000"
# a binary of eight bytes that follows its key in Thrift's compact protocol
_PLACE = re.compile(rb"mtpd\.crc32c\x18\x08([0-9a-f]{8})")
# what a row and a byte on disk may become in memory, so that a forged file cannot take the machine down: rows hold noise
_FREE_ROWS, _FREE_BYTES, _BYTES_A_BYTE = 2**16, 2**24, 64


class BrokenSealError(ValueError):
    """The bytes are not the file that was written under this name."""


def seal(table: pa.Table, name: str, dictionary: Sequence[str] = ()) -> bytes:
    """A table as the bytes of a sealed Parquet file.

    Args:
        name: under which it will be stored.
        dictionary: columns of few distinct values.
    """
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, compression="zstd", use_dictionary=list(dictionary)) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({_NAME: name, _SEAL: _BLANK.decode()})
    data = sink.getvalue()
    start, end = _place(data)
    return b"".join((data[:start], b"%08x" % _checksum(data, start, end), data[end:]))


def unseal(
    data: bytes,
    name: str,
    schema: pa.Schema,
    columns: Sequence[str],
    dictionary: Sequence[str] = (),
    *,
    sealed: bool = True,
) -> Iterator[pa.Table]:
    """The inverse of `seal`: the table, in pieces of at most about a million rows, and of one at least.

    Args:
        schema: what the file must hold.
        columns: those wanted.
        dictionary: columns to be returned as dictionaries.
        sealed: False for files of format version 1.

    Raises:
        BrokenSealError: other bytes than were written, or a file of another name or schema.
    """
    try:
        if sealed:
            start, end = _place(data)
            if int(data[start:end], 16) != _checksum(data, start, end):
                raise BrokenSealError("does not match its checksum")
        file = pq.ParquetFile(
            pa.BufferReader(data), page_checksum_verification=not sealed, read_dictionary=list(dictionary)
        )
        _check(file.metadata, len(data), name if sealed else None)
        wanted = _with_dictionaries(schema, dictionary)
        if not file.schema_arrow.remove_metadata().equals(wanted):
            raise BrokenSealError("has other columns than a file of this kind")
        if file.num_row_groups == 0:
            yield wanted.empty_table().select(list(columns))
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, columns=list(columns))
    except (pa.ArrowException, OSError, KeyError, ValueError, UnicodeDecodeError) as error:
        raise error if isinstance(error, BrokenSealError) else BrokenSealError(str(error)) from error


def _with_dictionaries(schema: pa.Schema, columns: Sequence[str]) -> pa.Schema:
    for name in columns:
        field = pa.field(name, pa.dictionary(pa.int32(), schema.field(name).type))
        schema = schema.set(schema.get_field_index(name), field)
    return schema


def _check(metadata: pq.FileMetaData, size: int, name: str | None) -> None:
    stored = (metadata.metadata or {}).get(_NAME.encode())
    if name is not None and stored != name.encode():
        raise BrokenSealError(f"was written as {stored.decode() if stored else 'nothing'}: it is not where it belongs")
    groups = [metadata.row_group(n) for n in range(metadata.num_row_groups)]
    uncompressed = sum(group.total_byte_size for group in groups)
    if metadata.num_rows > _FREE_ROWS + size or uncompressed > _FREE_BYTES + _BYTES_A_BYTE * size:
        raise BrokenSealError(f"claims {metadata.num_rows} rows of {uncompressed} bytes in {size} bytes")


def _place(data: bytes) -> tuple[int, int]:
    places = list(_PLACE.finditer(data, max(0, len(data) - 2**20)))
    if len(places) != 1:
        raise BrokenSealError("has no checksum" if not places else "has more than one checksum")
    return places[0].span(1)


def _checksum(data: bytes, start: int, end: int) -> int:
    content = np.frombuffer(data, np.uint8)  # read-only: the C function takes its slices without copying them
    checksum = google_crc32c.value(content[:start])
    checksum = google_crc32c.extend(checksum, _BLANK)
    return int(google_crc32c.extend(checksum, content[end:]))
