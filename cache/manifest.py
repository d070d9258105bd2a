"""The record of committed rows: one Parquet part a unit, compacted when a run ends. A row not in it does not exist."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from cache.errors import CorruptShardError
from cache.layout import MANIFEST, Level, part
from cache.storage import LocalStorage

_ABSENT = -1
_ROW_BITS = 40
IntArray = npt.NDArray[np.int64]


def schema(levels: Sequence[Level]) -> pa.Schema:
    """Columns of the manifest.

    ``row`` is the row in the bucket's arrays; ``height`` and ``width`` are the view's pixels without padding; ``source``
    hashes the image's annotation entry (file name and size); ``image_crc32c`` is the checksum of the image file's bytes;
    ``snr_<level>`` is the quantisation's signal-to-noise ratio in dB.
    """
    fields = [
        pa.field("image_id", pa.int64()),
        pa.field("view", pa.int32()),
        pa.field("bucket", pa.string()),
        pa.field("row", pa.int64()),
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field("source", pa.uint64()),
        pa.field("image_crc32c", pa.uint32()),
    ]
    return pa.schema(fields + [pa.field(f"snr_{level.name}", pa.float32()) for level in levels])


def write_part(storage: LocalStorage, group: str, unit: str, rows: pa.Table) -> None:
    """Commit a unit: from here on its rows exist."""
    storage.write(part(group, "manifest", unit), [_to_parquet(rows)])


def read_table(storage: LocalStorage, group: str, levels: Sequence[Level]) -> pa.Table:
    """All committed rows: the compacted manifest and the parts written since. A row may occur twice, with equal values.

    Raises:
        CorruptShardError: a file is not the Parquet that was written.
    """
    while True:
        tables = [schema(levels).empty_table()]
        names = storage.names(f"{group}/manifest", ".parquet")
        try:
            tables += [_from_parquet(storage, name, levels) for name in names]
        except FileNotFoundError:
            continue  # compacted away between the listing and the read: the compacted manifest has it now
        # read after the parts: what was compacted meanwhile is then found here
        if storage.exists(f"{group}/{MANIFEST}"):
            tables.append(_from_parquet(storage, f"{group}/{MANIFEST}", levels))
        return pa.concat_tables(tables)


def compact(storage: LocalStorage, group: str, levels: Sequence[Level]) -> pa.Table:
    """Fold the parts into one file, then remove them. Only the holder of the lease may do this.

    Returns:
        Every committed row, each once, by bucket and row.
    """
    names = storage.names(f"{group}/manifest", ".parquet")
    table = read_table(storage, group, levels)
    table = _unique(table)
    if names:
        storage.write(f"{group}/{MANIFEST}", [_to_parquet(table)])
        for name in names:
            storage.delete(name)
    return table


def _unique(table: pa.Table) -> pa.Table:
    keys = np.stack([table["image_id"].to_numpy(), table["view"].to_numpy().astype(np.int64)])
    _, first = np.unique(keys, axis=1, return_index=True)
    return table.take(first).sort_by([("bucket", "ascending"), ("row", "ascending")])


def _to_parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def _from_parquet(storage: LocalStorage, name: str, levels: Sequence[Level]) -> pa.Table:
    data = storage.read(name)
    try:
        table = pq.read_table(io.BytesIO(data), page_checksum_verification=True)
        return table.select(schema(levels).names).cast(schema(levels))
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise CorruptShardError(
            f"{storage.path(name)}: not a readable manifest ({error}). Delete it and run `mtpd precompute`: the rows it "
            "recorded are computed again."
        ) from error


@dataclass(frozen=True)
class Location:
    """Where a committed row is: its bucket and its row in the bucket's arrays."""

    bucket: str
    row: int


class Index:
    """Where each committed (image, view) is, in memory: about 8 bytes a row and 16 an image.

    Attributes:
        image_ids: (n,) int64, sorted: the images with at least one row.
        sources: (n,) uint64: the `source` of each.
        buckets: names of the buckets; what `places` refers to.
    """

    def __init__(self, table: pa.Table) -> None:
        ids = table["image_id"].to_numpy()
        views = table["view"].to_numpy().astype(np.int64)
        encoded = table["bucket"].combine_chunks().dictionary_encode()
        if isinstance(encoded, pa.ChunkedArray):
            encoded = encoded.combine_chunks()
        self.buckets: list[str] = encoded.dictionary.to_pylist()
        codes = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
        self.image_ids, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
        self.sources: npt.NDArray[np.uint64] = table["source"].to_numpy()[first]
        self._places = np.full((self.image_ids.size, int(views.max(initial=0)) + 1), _ABSENT, dtype=np.int64)
        self._places[inverse, views] = (codes << _ROW_BITS) | table["row"].to_numpy()
        self._rows = int((self._places != _ABSENT).sum())

    def __len__(self) -> int:
        return self._rows

    def __contains__(self, key: tuple[int, int]) -> bool:
        return self.find(*key) is not None

    def find(self, image_id: int, view: int) -> Location | None:
        """The place of a row, or None if it is not committed."""
        at = int(np.searchsorted(self.image_ids, image_id))
        if at == self.image_ids.size or self.image_ids[at] != image_id or not 0 <= view < self._places.shape[1]:
            return None
        place = int(self._places[at, view])
        return None if place == _ABSENT else self._location(place)

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
        places = self._places[self._places != _ABSENT]
        codes, rows = places >> _ROW_BITS, places & ((1 << _ROW_BITS) - 1)
        return {name: np.sort(rows[codes == code]) for code, name in enumerate(self.buckets)}

    def keys(self) -> list[tuple[int, int]]:
        """Every committed (image id, view), by image id."""
        at, views = np.nonzero(self._places != _ABSENT)
        return list(zip(self.image_ids[at].tolist(), views.tolist(), strict=True))

    def _location(self, place: int) -> Location:
        return Location(self.buckets[place >> _ROW_BITS], place & ((1 << _ROW_BITS) - 1))
