"""Create a teacher's group, and write one unit: every shard first, the part of the manifest last."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import zarr
from zarr.codecs import Crc32cCodec

from cache import detections, manifest, shard
from cache.detections import Detections
from cache.errors import CorruptShardError
from cache.layout import (
    FORMAT_VERSION,
    GroupInfo,
    Level,
    bucket_size,
    features_shard,
    part,
    scales_shard,
)
from cache.plan import Plan, Row, Unit
from cache.storage import LocalStorage


@dataclass(frozen=True)
class RowTargets:
    """All that is stored of one (image, view).

    Attributes:
        values: per level (C, h, w), int8 or float16.
        scales: per level (C,) float32; empty for float16.
        snr: per level, dB.
        image_crc32c: checksum of the image file's bytes.
    """

    row: Row
    values: Mapping[str, npt.NDArray[Any]]
    scales: Mapping[str, npt.NDArray[np.float32]]
    snr: Mapping[str, float]
    detections: Detections
    image_crc32c: int


def prepare(storage: LocalStorage, plan: Plan) -> None:
    """Create or extend the Zarr hierarchy so that every row of the plan has its place. Writes metadata only."""
    store = zarr.storage.LocalStore(storage.root)
    root = zarr.open_group(store, mode="a", zarr_format=3)
    dataset = {"images": int(plan.images.ids.size), "fingerprint": plan.dataset_digest}
    root.update_attributes({"format_version": FORMAT_VERSION, "views": plan.policy.to_json(), "dataset": dataset})
    group = root.require_group(plan.info.name)
    group.update_attributes(plan.info.to_attributes())
    for bucket in plan.buckets:
        height, width = bucket_size(bucket.name)
        folder = group.require_group(bucket.name)
        for name, chunk, dtype in _arrays(plan.info, height, width):
            shape = (bucket.rows, *chunk)
            if name in folder:
                array = folder[name]
                assert isinstance(array, zarr.Array)
                if array.shape[0] < bucket.rows:
                    array.resize(shape)
                continue
            folder.create_array(
                name,
                shape=shape,
                chunks=(1, *chunk),
                shards=(bucket.slots, *chunk),
                dtype=dtype,
                compressors=[Crc32cCodec()],
                fill_value=0,
            )


def _arrays(info: GroupInfo, height: int, width: int) -> list[tuple[str, tuple[int, ...], str]]:
    """Name, shape of one row and dtype of each of a bucket's arrays."""
    arrays: list[tuple[str, tuple[int, ...], str]] = []
    for level in info.levels:
        arrays.append((level.name, (level.channels, *level.map_size(height, width)), info.precision))
        if info.precision == "int8":
            arrays.append((f"{level.name}_scale", (level.channels,), "float32"))
    return arrays


def write_unit(storage: LocalStorage, info: GroupInfo, unit: Unit, targets: list[RowTargets]) -> int:
    """Write a unit's shards and detections, then commit the rows of ``targets``.

    Rows that were committed earlier (``unit.kept``) are carried over byte for byte. Rows of the unit that are not in
    ``targets`` stay absent. Writing a unit twice is harmless.

    Returns:
        Bytes written.

    Raises:
        CorruptShardError: a row to be carried over is damaged.
        BudgetError: the disk is full; nothing of the unit is committed.
    """
    written = 0
    for level in info.levels:
        path = features_shard(info.name, unit.bucket, level.name, unit.index)
        shape = (level.channels, *level.map_size(*bucket_size(unit.bucket)))
        written += _write_shard(
            storage, path, unit, shape, info.precision, {t.row.row: t.values[level.name] for t in targets}
        )
        if info.precision == "int8":
            path = scales_shard(info.name, unit.bucket, level.name, unit.index)
            rows = {t.row.row: t.scales[level.name] for t in targets}
            written += _write_shard(storage, path, unit, (level.channels,), "float32", rows)
    written += _write_detections(storage, info.name, unit, {t.row.row: t.detections for t in targets})
    manifest.write_part(storage, info.name, unit.name, _manifest_rows(unit, info.levels, targets))
    return written


def _write_shard(
    storage: LocalStorage,
    path: str,
    unit: Unit,
    shape: tuple[int, ...],
    dtype: str,
    rows: Mapping[int, npt.NDArray[Any]],
) -> int:
    expected = np.dtype(dtype).newbyteorder("<")
    chunks: dict[int, npt.NDArray[Any]] = {}
    for row, array in rows.items():
        if array.shape != shape or array.dtype != expected:
            raise ValueError(f"{path}: row {row} is {array.dtype} {array.shape}, the plan says {expected} {shape}")
        chunks[unit.slot(row)] = array
    if unit.kept:
        chunk_bytes = expected.itemsize * int(np.prod(shape))
        try:
            data = np.frombuffer(storage.read(path), np.uint8)
            index = shard.read_index(data, unit.slots)
            for row in unit.kept:
                slot = unit.slot(row)
                chunks[slot] = shard.read_chunk(data, index, slot, chunk_bytes, verify=True)
        except (FileNotFoundError, shard.DamagedBytesError) as error:
            raise _cannot_carry_over(storage, path, error) from error
    return storage.write(path, shard.encode(chunks, unit.slots))


def _write_detections(storage: LocalStorage, group: str, unit: Unit, rows: dict[int, Detections]) -> int:
    path = part(group, "detections", unit.name)
    table = detections.to_table(dict(sorted(rows.items())))
    if unit.kept:
        try:
            before = detections.from_parquet(storage.read(path))
        except (OSError, pa.ArrowException) as error:
            raise _cannot_carry_over(storage, path, error) from error
        kept = pc.is_in(before["row"], value_set=pa.array(unit.kept, pa.int64()))
        table = pa.concat_tables([before.filter(kept), table]).sort_by("row")
    return storage.write(path, [detections.to_parquet(table)])


def _cannot_carry_over(storage: LocalStorage, path: str, error: Exception) -> CorruptShardError:
    return CorruptShardError(
        f"{storage.path(path)}: rows committed earlier cannot be carried over ({error}). Delete the folder "
        f"{storage.path(path.split('/')[0])} and run `mtpd precompute` again."
    )


def _manifest_rows(unit: Unit, levels: tuple[Level, ...], targets: list[RowTargets]) -> pa.Table:
    columns: dict[str, list[Any]] = {
        "image_id": [t.row.image_id for t in targets],
        "view": [t.row.view for t in targets],
        "bucket": [unit.bucket] * len(targets),
        "row": [t.row.row for t in targets],
        "height": [t.row.view_height for t in targets],
        "width": [t.row.view_width for t in targets],
        "source": [t.row.source for t in targets],
        "image_crc32c": [t.image_crc32c for t in targets],
    }
    for level in levels:
        columns[f"snr_{level.name}"] = [t.snr[level.name] for t in targets]
    return pa.table(columns, schema=manifest.schema(levels))
