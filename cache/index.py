"""Where each committed row is, in memory: what a manifest of millions of rows is read into."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cache.layout import bucket_size

_ABSENT = -1
_ROW_BITS = 40
MAX_VIEWS = 2**10
_MAX_UNIT_ROWS = 2**20
_STEP = 1024
IntArray = npt.NDArray[np.int64]


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
        self._count()

    def joined(self, newer: "Index") -> "Index":
        """An index of this one's rows and another's of the same group; of a row that is in both, the other's place counts.

        A few copies of this one's arrays, whatever the other's size. This one stays as it is, for threads that read it.

        Raises:
            ValueError: units of one bucket have different sizes.
        """
        if not len(newer) or not len(self):
            return newer if len(newer) else self
        both = Index([])
        both.unit_rows = self.unit_rows | newer.unit_rows
        for bucket, slots in self.unit_rows.items():
            if both.unit_rows[bucket] != slots:
                raise ValueError(f"units of bucket {bucket} have different sizes")
        both.buckets = self.buckets + [name for name in newer.buckets if name not in self.buckets]
        codes = np.array([both.buckets.index(name) for name in newer.buckets], np.int64)
        at = np.searchsorted(self.image_ids, newer.image_ids)
        new = self.image_ids[np.minimum(at, self.image_ids.size - 1)] != newer.image_ids
        both.image_ids = np.insert(self.image_ids, at[new], newer.image_ids[new])
        both.sources = np.insert(self.sources, at[new], newer.sources[new])
        more = max(0, newer._places.shape[1] - self._places.shape[1])
        wide = np.pad(self._places, ((0, 0), (0, more)), constant_values=_ABSENT) if more else self._places
        both._places = np.insert(wide, at[new], _ABSENT, axis=0)
        rows, columns = np.nonzero(newer._places != _ABSENT)
        places = newer._places[rows, columns]
        moved = (codes[places >> _ROW_BITS] << _ROW_BITS) | (places & ((1 << _ROW_BITS) - 1))
        both._places[np.searchsorted(both.image_ids, newer.image_ids[rows]), columns] = moved
        both._count()
        return both

    def _count(self) -> None:
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
        if views.min() < 0 or views.max() >= MAX_VIEWS:
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
