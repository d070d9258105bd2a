"""The record of committed rows: one Parquet part a unit, compacted from time to time. A row not in it does not exist."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cache.errors import CorruptShardError
from cache.hierarchy import read_document
from cache.layout import MANIFEST, MANIFEST_COPY, GroupInfo, bucket_size, part
from cache.sealed import BrokenSealError, seal, unseal
from cache.storage import Storage

_ABSENT = -1
_ROW_BITS = 40
_MAX_UNIT_ROWS = 2**20
_MAX_VIEWS = 2**10
_STEP = 1024
_PLACES = ("image_id", "view", "bucket", "row", "unit_rows", "source")
IntArray = npt.NDArray[np.int64]


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
    with suppress(FileNotFoundError):
        yield from read_one(storage, f"{info.name}/{MANIFEST}", info, columns)


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


def load_index(storage: Storage, info: GroupInfo) -> "Index":
    """The index of a group's committed rows.

    Raises:
        CorruptShardError: the manifest is damaged.
    """
    tables = read_tables(storage, info, [name for name in _PLACES if name in schema(info).names])
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


class Location(NamedTuple):
    """Where a committed row is: its bucket and its row in the bucket's arrays."""

    bucket: str
    row: int


@dataclass(frozen=True)
class _Piece:
    """Rows of an index in the making: ids and sources of the images, then per row its image, view and place."""

    ids: IntArray
    sources: npt.NDArray[np.uint64]
    at: npt.NDArray[np.int32]
    views: npt.NDArray[np.int16]
    places: IntArray


class Index:
    """Where each committed (image, view) is, in memory: about 8 bytes a row and 16 an image.

    Args:
        tables: the manifest's rows in pieces; of a row that occurs twice the later counts.

    Attributes:
        image_ids: (n,) int64, sorted: the images with at least one row.
        sources: (n,) uint64: the `source` of each.
        unit_rows: per bucket the rows of a full unit.

    Raises:
        ValueError: rows that cannot be.
    """

    def __init__(self, tables: Iterable[pa.Table]) -> None:
        self.unit_rows: dict[str, int] = {}
        self.buckets: list[str] = []
        # pieces are made small at once: a manifest of ten million rows must not lie in memory as columns
        pieces = [self._piece(table) for table in tables if table.num_rows]
        every = np.concatenate([piece.ids for piece in pieces]) if pieces else np.zeros(0, np.int64)
        sources = np.concatenate([piece.sources for piece in pieces]) if pieces else np.zeros(0, np.uint64)
        if bool((every[1:] >= every[:-1]).all()):
            first = np.append(True, every[1:] != every[:-1]) if every.size else np.zeros(0, np.bool_)
            self.image_ids, self.sources = every[first], sources[first]
            positions = np.cumsum(first) - 1
        else:
            self.image_ids, at, positions = np.unique(every, return_index=True, return_inverse=True)
            self.sources = sources[at]
        views = max((piece.views.max(initial=0) for piece in pieces), default=0)
        self._places = np.full((self.image_ids.size, int(views) + 1), _ABSENT, dtype=np.int64)
        begin = 0
        for piece in pieces:
            self._places[positions[begin : begin + piece.ids.size][piece.at], piece.views] = piece.places
            begin += piece.ids.size
        self._rows = int((self._places != _ABSENT).sum())
        self._landmarks: list[int] = self.image_ids[::_STEP].tolist()

    def _piece(self, table: pa.Table) -> "_Piece":
        bucket = table["bucket"].unify_dictionaries().combine_chunks()
        bucket = bucket.chunk(0) if isinstance(bucket, pa.ChunkedArray) else bucket
        local = bucket.indices.to_numpy(zero_copy_only=False)
        self._learn(bucket.dictionary.to_pylist(), local, table["unit_rows"].to_numpy())
        codes = np.array([self.buckets.index(name) for name in bucket.dictionary.to_pylist()], np.int64)
        ids, views, rows, sources = (table[name].to_numpy() for name in ("image_id", "view", "row", "source"))
        if rows.min() < 0 or rows.max() >= 1 << _ROW_BITS:
            raise ValueError("a row's number is out of range")
        if views.min() < 0 or views.max() >= _MAX_VIEWS:
            raise ValueError("a view's number is out of range")
        places = (codes << _ROW_BITS)[local] | rows
        if not bool((ids[1:] >= ids[:-1]).all()):
            order = np.argsort(ids, kind="stable")
            ids, views, sources, places = ids[order], views[order], sources[order], places[order]
        starts = np.append(True, ids[1:] != ids[:-1])
        at = (np.cumsum(starts) - 1).astype(np.int32)
        return _Piece(ids[starts], sources[starts], at, views.astype(np.int16), places)

    def _learn(self, names: list[str], codes: npt.NDArray[np.int32], unit_rows: npt.NDArray[np.int32]) -> None:
        """Take in a piece's buckets and the sizes of their units."""
        largest = np.zeros(len(names), np.int64)
        largest[codes] = unit_rows
        if bool((largest[codes] != unit_rows).any()) or int(unit_rows.min()) < 1:
            raise ValueError("units of one bucket have different sizes, or none")
        for name, rows in zip(names, largest.tolist(), strict=True):
            bucket_size(name)
            if rows > _MAX_UNIT_ROWS or (rows and self.unit_rows.setdefault(name, rows) != rows):
                raise ValueError(f"a unit of bucket {name} has {rows} rows")
            if name not in self.buckets:
                self.buckets.append(name)

    def __len__(self) -> int:
        return self._rows

    def __contains__(self, key: tuple[int, int]) -> bool:
        return self.find(*key) is not None

    def find(self, image_id: int, view: int) -> Location | None:
        """The place of a row, or None if it is not committed."""
        place = self._find(image_id, view)[1]
        return None if place == _ABSENT else self._location(place)

    def source(self, image_id: int) -> int:
        """The `source` of an image that has rows."""
        return int(self.sources[self._find(image_id, 0)[0]])

    def committed(self, image_ids: IntArray, views: int) -> npt.NDArray[np.bool_]:
        """Which rows are committed: (n, views) for n images."""
        found = np.zeros((image_ids.size, views), dtype=np.bool_)
        if self.image_ids.size == 0:
            return found
        at = np.minimum(np.searchsorted(self.image_ids, image_ids), self.image_ids.size - 1)
        known = self.image_ids[at] == image_ids
        width = min(views, self._places.shape[1])
        found[:, :width] = (self._places[at, :width] != _ABSENT) & known[:, None]
        return found

    def sources_of(self, image_ids: IntArray) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.uint64]]:
        """Which images have rows, and (where they do) the source of each."""
        if self.image_ids.size == 0:
            return np.zeros(image_ids.size, np.bool_), np.zeros(image_ids.size, np.uint64)
        at = np.minimum(np.searchsorted(self.image_ids, image_ids), self.image_ids.size - 1)
        return self.image_ids[at] == image_ids, self.sources[at]

    def occupied(self) -> dict[str, IntArray]:
        """The committed rows of every bucket, sorted."""
        places = np.sort(self._places[self._places != _ABSENT])
        bounds = np.searchsorted(places, np.arange(len(self.buckets) + 1, dtype=np.int64) << _ROW_BITS)
        rows = places & ((1 << _ROW_BITS) - 1)
        return {name: rows[bounds[code] : bounds[code + 1]] for code, name in enumerate(self.buckets)}

    def keys(self) -> list[tuple[int, int]]:
        """Every committed (image id, view), by image id."""
        at, views = np.nonzero(self._places != _ABSENT)
        return list(zip(self.image_ids[at].tolist(), views.tolist(), strict=True))

    def _find(self, image_id: int, view: int) -> tuple[int, int]:
        # first among every 1024th id, which stay in the processor's cache, then among 1024; a memoryview's items are Python
        # numbers: bisecting it is several times faster than a search on the array
        ids = self.image_ids.data
        first = max(0, bisect_right(self._landmarks, image_id) - 1) * _STEP
        at = bisect_left(ids, image_id, first, min(first + _STEP, len(ids)))
        if at == len(ids) or ids[at] != image_id or not 0 <= view < self._places.shape[1]:
            return at, _ABSENT
        return at, self._places.data[at, view]

    def _location(self, place: int) -> Location:
        return Location(self.buckets[place >> _ROW_BITS], place & ((1 << _ROW_BITS) - 1))
