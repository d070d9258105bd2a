"""Create a teacher's group, and write one unit: every shard first, the part of the manifest last."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cache import detections, manifest, shard
from cache.detections import Detections
from cache.errors import CorruptShardError, StaleCacheError
from cache.hierarchy import documents, group_document, write_changed
from cache.layout import FORMAT_VERSION, ArraySpec, GroupInfo, Role, part
from cache.plan import Plan, Row, Unit
from cache.shard import Chunk
from cache.storage import Storage

# by role: (k,) int32 positions, (k, classes) float16 logits, (k, terms) float16 box terms
DenseArrays = Mapping[Role, npt.NDArray[Any]]
# one waits for the disk while the other computes checksums
_WRITERS = 2


@dataclass(frozen=True)
class RowTargets:
    """All that is stored of one (image, view).

    Attributes:
        values: per level what `encode` gave for one image: (C, h, w) int8 or float16, or (C, ceil(h * w / 2)) uint8.
        scales: per level (C,) float32; empty for float16.
        snr: per level, dB.
        detections: None where the group stores none.
        dense: per level what is stored of the dense head; empty if nothing is.
        image_crc32c: checksum of the image file's bytes.
    """

    row: Row
    values: Mapping[str, npt.NDArray[Any]]
    scales: Mapping[str, npt.NDArray[np.float32]]
    snr: Mapping[str, float]
    detections: Detections | None
    image_crc32c: int
    dense: Mapping[str, DenseArrays] = field(default_factory=dict)

    def stored(self, array: ArraySpec) -> npt.NDArray[Any]:
        """What goes into an array."""
        if array.role == "map":
            return self.values[array.level]
        return self.scales[array.level] if array.role == "scale" else self.dense[array.level][array.role]


def prepare(storage: Storage, plan: Plan) -> None:
    """Create or extend the Zarr hierarchy so that every row of the plan has its place. Writes metadata only.

    Raises:
        StaleCacheError: the group was begun in an earlier format version.
    """
    if plan.info.version != FORMAT_VERSION:
        raise StaleCacheError(
            f"{storage.where(plan.info.name)}: written in format version {plan.info.version}, which this release reads but does "
            "not extend. Point cache.uri elsewhere and run `mtpd precompute`."
        )
    dataset = {"images": int(plan.images.ids.size), "fingerprint": plan.dataset_digest}
    root = {"format_version": FORMAT_VERSION, "views": plan.policy.to_json(), "dataset": dataset}
    buckets = {bucket.name: (bucket.rows, bucket.slots) for bucket in plan.buckets}
    wanted = {"zarr.json": group_document(root)} | documents(plan.info, buckets)
    write_changed(storage, wanted)


def write_unit(
    storage: Storage,
    info: GroupInfo,
    unit: Unit,
    targets: Sequence[RowTargets],
    fence: Callable[[], None] = lambda: None,
) -> int:
    """Write a unit's shards and, where the group stores them, detections, then commit the rows of ``targets``.

    Rows that were committed earlier (``unit.kept``) are carried over byte for byte. Rows of the unit that are not in
    ``targets`` stay absent. Writing a unit twice is harmless.

    Args:
        fence: called before anything is written and again before the commit; it raises if this run must not write any more.

    Returns:
        Bytes written.

    Raises:
        CorruptShardError: a row to be carried over is damaged.
        BudgetError: the disk is full; nothing of the unit is committed.
        StorageError: the object storage does not answer; nothing of the unit is committed.
    """
    fence()

    def write(array: ArraySpec) -> int:
        rows = [(t.row, t.stored(array)) for t in targets]
        return _write_shard(storage, info, unit, array, rows)

    with ThreadPoolExecutor(_WRITERS, thread_name_prefix="shards") as pool:
        written = sum(pool.map(write, info.arrays(unit.bucket)))
    if info.detections:
        written += _write_detections(storage, info, unit, targets)
    fence()
    manifest.write_part(storage, info, unit.name, _manifest_rows(info, unit, targets))
    return written


def _write_shard(
    storage: Storage, info: GroupInfo, unit: Unit, array: ArraySpec, rows: list[tuple[Row, npt.NDArray[Any]]]
) -> int:
    path = array.shard(info.name, unit.bucket, unit.index)
    expected = np.dtype(array.dtype).newbyteorder("<")
    here = shard.array_label(info.name, unit.bucket, array.name)
    chunks: dict[int, Chunk] = {}
    for row, values in rows:
        if values.shape != array.shape or values.dtype != expected:
            raise ValueError(
                f"{path}: row {row.row} is {values.dtype} {values.shape}, the plan says {expected} {array.shape}"
            )
        label = here ^ shard.row_label(row.image_id, row.view, row.source)
        chunks[unit.slot(row.row)] = Chunk(shard.compress(values, info.compression), label)
    if unit.kept:
        try:
            data = np.frombuffer(storage.read(path), np.uint8)
            tail = shard.tail_of(data, unit.slots, array.nbytes, info.compression, info.version)
            for slot in map(unit.slot, unit.kept):
                offset, length = tail.find(slot, tail.labels[slot])
                chunks[slot] = Chunk(shard.read_chunk(data[offset : offset + length], verify=True), tail.labels[slot])
        except (FileNotFoundError, shard.DamagedBytesError) as error:
            raise _cannot_carry_over(storage, path, error) from error
    return storage.write(path, shard.encode(chunks, unit.slots))


def _write_detections(storage: Storage, info: GroupInfo, unit: Unit, targets: Sequence[RowTargets]) -> int:
    path = part(info.name, "detections", unit.name)
    rows: dict[int, Detections] = {}
    for target in targets:
        if target.detections is None:
            raise ValueError(f"{path}: row {target.row.row} has no detections, which this group stores")
        rows[target.row.row] = target.detections
    table = detections.to_table(dict(sorted(rows.items())))
    if unit.kept:
        try:
            before = detections.from_parquet(storage.read(path), path, info.version)
        except (FileNotFoundError, ValueError) as error:
            raise _cannot_carry_over(storage, path, error) from error
        kept = pc.is_in(before["row"], value_set=pa.array(unit.kept, pa.int64()))
        table = pa.concat_tables([before.filter(kept), table]).sort_by("row")
    return storage.write(path, [detections.to_parquet(table, path)])


def _cannot_carry_over(storage: Storage, path: str, error: Exception) -> CorruptShardError:
    return CorruptShardError(
        f"{storage.where(path)}: rows committed earlier cannot be carried over ({error}). Run `mtpd verify {storage.where()} "
        "--repair`, then `mtpd precompute` again."
    )


def _manifest_rows(info: GroupInfo, unit: Unit, targets: Sequence[RowTargets]) -> pa.Table:
    columns: dict[str, list[Any]] = {
        "image_id": [t.row.image_id for t in targets],
        "view": [t.row.view for t in targets],
        "bucket": [unit.bucket] * len(targets),
        "row": [t.row.row for t in targets],
        "unit_rows": [unit.slots] * len(targets),
        "height": [t.row.view_height for t in targets],
        "width": [t.row.view_width for t in targets],
        "source": [t.row.source for t in targets],
        "image_crc32c": [t.image_crc32c for t in targets],
    }
    for level in info.levels:
        columns[f"snr_{level.name}"] = [t.snr[level.name] for t in targets]
    return pa.table(columns, schema=manifest.schema(info))
