"""The record of committed rows: one Parquet part a unit, compacted from time to time. A row not in it does not exist."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cache.errors import CorruptShardError
from cache.hierarchy import read_document
from cache.index import Index
from cache.layout import MANIFEST, MANIFEST_COPY, GroupInfo, part
from cache.sealed import BrokenSealError, seal, unseal
from cache.storage import Storage

_PLACES = ("image_id", "view", "bucket", "row", "unit_rows", "source")


def schema(info: GroupInfo) -> pa.Schema:
    """Columns of the manifest.

    ``row`` is the row in the bucket's arrays; ``unit_rows`` the rows of a full unit of that bucket (not in version 1);
    ``height`` and ``width`` are the view's pixels without padding; ``source`` hashes the image's annotation entry (file name
    and size); ``image_crc32c`` is the checksum of the image file's bytes (and of those that a sampled view mixes in);
    ``snr_<level>`` is the quantisation's signal-to-noise ratio in dB.
    """
    fields = [
        pa.field("image_id", pa.int64()),
        pa.field("view", pa.int32()),
        pa.field("bucket", pa.string()),
        pa.field("row", pa.int64()),
        pa.field("unit_rows", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field("source", pa.uint64()),
        pa.field("image_crc32c", pa.uint32()),
    ]
    if info.version == 1:
        fields = [field for field in fields if field.name != "unit_rows"]
    return pa.schema(fields + [pa.field(f"snr_{level.name}", pa.float32()) for level in info.levels])


def write_part(storage: Storage, info: GroupInfo, unit: str, rows: pa.Table) -> None:
    """Commit a unit: from here on its rows exist."""
    _write(storage, part(info.name, "manifest", unit), rows)


def part_names(storage: Storage, info: GroupInfo) -> list[str]:
    """The parts that are not compacted yet."""
    return storage.names(f"{info.name}/manifest", ".parquet")


def read_table(storage: Storage, info: GroupInfo, columns: Sequence[str] | None = None) -> pa.Table:
    """All committed rows: the compacted manifest and the parts written since. A row may occur twice, with equal values.

    ``bucket`` is a dictionary column.

    Raises:
        CorruptShardError: a file is not the Parquet that was written.
    """
    wanted = [name for name in columns or schema(info).names if name in schema(info).names]
    return pa.concat_tables(read_tables(storage, info, wanted)).unify_dictionaries()


@dataclass(frozen=True)
class RowRecord:
    """What the manifest says of one row.

    Attributes:
        bucket, row: its place.
        height, width: of the view in pixels, without padding.
        image_crc32c: checksum of the image file (and of those that a sampled view mixes in) when the row was computed.
        snr: per level, dB.
    """

    image_id: int
    view: int
    bucket: str
    row: int
    height: int
    width: int
    image_crc32c: int
    snr: dict[str, float]


def records_of(storage: Storage, info: GroupInfo, image_id: int) -> list[RowRecord]:
    """What the manifest says of an image's rows, by view.

    Raises:
        CorruptShardError: the manifest is damaged.
    """
    found: dict[int, RowRecord] = {}
    for table in read_tables(storage, info, schema(info).names):
        for one in table.filter(pc.equal(table["image_id"], image_id)).to_pylist():
            snr = {level.name: float(one[f"snr_{level.name}"]) for level in info.levels}
            names = ("image_id", "view", "bucket", "row", "height", "width", "image_crc32c")
            found[one["view"]] = RowRecord(**{name: one[name] for name in names}, snr=snr)
    return [found[view] for view in sorted(found)]


def read_tables(storage: Storage, info: GroupInfo, columns: Sequence[str]) -> Iterator[pa.Table]:
    """`read_table` in pieces, for manifests of many millions of rows."""
    yield empty(info, columns)
    while True:
        names = part_names(storage, info)
        try:
            parts = [table for name in names for table in read_one(storage, name, info, columns)]
            break
        except FileNotFoundError:
            continue  # compacted away between the listing and the read: the compacted manifest has it now
    yield from parts
    # read after the parts: what was compacted meanwhile is then found here
    yield from _read_compacted(storage, info, columns)


def _read_compacted(storage: Storage, info: GroupInfo, columns: Sequence[str]) -> Iterator[pa.Table]:
    """The compacted manifest; nothing where there never was one.

    Raises:
        CorruptShardError: it is damaged, or lost: it is written before its copy, and removed behind it.
    """
    name = f"{info.name}/{MANIFEST}"
    for lost in (False, True):
        try:
            yield from read_one(storage, name, info, columns)
            return
        except FileNotFoundError as error:
            if not storage.exists(f"{info.name}/{MANIFEST_COPY}"):
                return
            if lost:  # a compaction that wrote both after the first look was not the reason
                raise CorruptShardError(
                    f"{storage.where(name)}: is missing, and its copy is there. Run `mtpd verify {storage.where()} --repair`, "
                    "which restores it."
                ) from error


def read_one(storage: Storage, name: str, info: GroupInfo, columns: Sequence[str]) -> Iterator[pa.Table]:
    """The rows of one file, in pieces.

    Raises:
        FileNotFoundError: there is none.
        CorruptShardError: it is not the Parquet that was written.
    """
    data = storage.read(name)
    try:
        yield from unseal(data, name, schema(info), columns, ["bucket"], sealed=info.version > 1)
    except BrokenSealError as error:
        raise CorruptShardError(
            f"{storage.where(name)}: {error}. Run `mtpd verify {storage.where()} --repair`, then `mtpd precompute RECIPE`: "
            "the rows that this file recorded are computed again."
        ) from error


def compact(storage: Storage, info: GroupInfo) -> int:
    """Fold the parts into one file, then remove them. Only the holder of the lease may do this.

    Returns:
        Parts that were folded.
    """
    names = part_names(storage, info)
    if names:
        replace(storage, info, read_table(storage, info), names)
    return len(names)


def replace(storage: Storage, info: GroupInfo, rows: pa.Table, parts: Sequence[str]) -> None:
    """Make ``rows`` the compacted manifest, then remove parts that it covers.

    It is written twice: one flipped byte must not cost the record of every row. What is killed on the way leaves both, or
    one of them and the parts.
    """
    rows = _unique(rows)
    for name in (MANIFEST, MANIFEST_COPY):
        _write(storage, f"{info.name}/{name}", rows)
    for name in parts:
        storage.delete(name)


def load_index(storage: Storage, info: GroupInfo) -> Index:
    """The index of a group's committed rows.

    Raises:
        CorruptShardError: the manifest is damaged.
    """
    return _index(storage, info, read_tables(storage, info, _places(info)))


def index_parts(storage: Storage, info: GroupInfo, names: Sequence[str]) -> Index:
    """The index of some parts alone.

    Raises:
        FileNotFoundError: one is not there any more: it was compacted.
        CorruptShardError: one is damaged.
    """
    return _index(storage, info, (table for name in names for table in read_one(storage, name, info, _places(info))))


def _places(info: GroupInfo) -> list[str]:
    return [name for name in _PLACES if name in schema(info).names]


def _index(storage: Storage, info: GroupInfo, tables: Iterable[pa.Table]) -> Index:
    if info.version == 1:
        tables = (t.append_column("unit_rows", _unit_rows_of_version_1(storage, info, t)) for t in tables)
    try:
        return Index(tables)
    except ValueError as error:
        raise CorruptShardError(
            f"{storage.where(info.name)}: the manifest contradicts itself ({error}). Run `mtpd verify {storage.where()} "
            "--repair`, then `mtpd precompute RECIPE`."
        ) from error


def _write(storage: Storage, name: str, rows: pa.Table) -> None:
    storage.write(name, [seal(rows.replace_schema_metadata(None), name, ["bucket"])])


def empty(info: GroupInfo, columns: Sequence[str]) -> pa.Table:
    table = schema(info).empty_table().select(list(columns))
    if "bucket" not in columns:
        return table
    return table.set_column(columns.index("bucket"), "bucket", table["bucket"].dictionary_encode())


def _unique(table: pa.Table) -> pa.Table:
    """Each row once, by image and view; the last of several."""
    ids, views = table["image_id"].to_numpy(), table["view"].to_numpy()
    order = np.lexsort((views, ids))
    ids, views = ids[order], views[order]
    last = np.append((ids[1:] != ids[:-1]) | (views[1:] != views[:-1]), True) if ids.size else np.zeros(0, np.bool_)
    table = table.take(pa.array(order[last]))
    at = table.schema.get_field_index("bucket")
    return table.set_column(at, "bucket", table["bucket"].cast(pa.string()))


def _unit_rows_of_version_1(storage: Storage, info: GroupInfo, table: pa.Table) -> pa.ChunkedArray:
    """What version 1 kept in the arrays' metadata only."""
    rows: dict[str, int] = {}
    for bucket in pc.unique(table["bucket"]).to_pylist():
        document: Any = read_document(storage, f"{info.name}/{bucket}/{info.levels[0].name}/zarr.json") or {}
        try:
            rows[bucket] = int(document["chunk_grid"]["configuration"]["chunk_shape"][0])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise CorruptShardError(
                f"{storage.where(info.name)}/{bucket}: the arrays' metadata cannot be read, and format version 1 keeps the "
                "size of a unit nowhere else. Delete the group and run `mtpd precompute`."
            ) from error
    values = [rows[bucket] for bucket in table["bucket"].to_pylist()]
    return pa.chunked_array([pa.array(values, pa.int32())])
