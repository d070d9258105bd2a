"""Detections: ragged soft targets, one Parquet part a unit."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cache.sealed import seal, unseal

SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64()),
        pa.field("boxes", pa.list_(pa.list_(pa.float32(), 4))),
        pa.field("scores", pa.list_(pa.float32())),
        pa.field("labels", pa.list_(pa.int32())),
        pa.field("masks", pa.list_(pa.binary())),
    ]
)


@dataclass(frozen=True)
class Detections:
    """What a teacher detected in one view, best first as the detector gave them.

    Attributes:
        boxes: (k, 4) float32, ``x1, y1, x2, y2`` in view pixels.
        scores: (k,) float32 in [0, 1].
        labels: (k,) int32, index into the teacher's classes.
        masks: k COCO compressed-RLE ``counts`` over the view's height x width without padding; None if the teacher has
            no masks.
    """

    boxes: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int32]
    masks: tuple[bytes, ...] | None = None

    def resized(self, factor: float) -> "Detections":
        """The same with boxes in pixels of the view resized by a factor; masks stay over the view."""
        return self if factor == 1 else replace(self, boxes=self.boxes * np.float32(factor))

    def __len__(self) -> int:
        return int(self.scores.size)


def to_table(rows: Mapping[int, Detections]) -> pa.Table:
    """Detections of the rows of one unit, keyed by row in the bucket."""
    columns = {
        "row": list(rows),
        "boxes": [d.boxes.astype(np.float32).tolist() for d in rows.values()],
        "scores": [d.scores.astype(np.float32) for d in rows.values()],
        "labels": [d.labels.astype(np.int32) for d in rows.values()],
        "masks": [None if d.masks is None else list(d.masks) for d in rows.values()],
    }
    return pa.table(columns, schema=SCHEMA)


def to_parquet(table: pa.Table, name: str) -> bytes:
    """The bytes of the part that is stored under ``name``."""
    return seal(table, name)


def from_parquet(data: bytes, name: str, version: int) -> pa.Table:
    """The inverse of `to_parquet`, for any format version.

    Raises:
        BrokenSealError: (a ValueError) other bytes than were written under this name.
    """
    return pa.concat_tables(unseal(data, name, SCHEMA, SCHEMA.names, sealed=version > 1))


def from_table(table: pa.Table) -> dict[int, Detections]:
    """The inverse of `to_table`."""
    return {
        row["row"]: Detections(
            np.asarray(row["boxes"], np.float32).reshape(-1, 4),
            np.asarray(row["scores"], np.float32),
            np.asarray(row["labels"], np.int32),
            None if row["masks"] is None else tuple(row["masks"]),
        )
        for row in table.to_pylist()
    }
