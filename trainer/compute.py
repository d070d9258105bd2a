"""One unit of a plan -> its targets: decode, make the views, run the teacher, quantise. Runs without ray."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import google_crc32c
import mmcv
import numpy as np
import torch

from cache import DenseArrays, DenseLevel, Detections, Encoded, GroupInfo, Row, RowTargets, Unit, ViewPolicy, encode
from trainer.teacher import Teacher
from trainer.transforms import ApplyView


@dataclass(frozen=True)
class Failure:
    """An (image, view) that has no targets, and why."""

    image_id: int
    view: int
    file_name: str
    reason: str


@dataclass(frozen=True)
class Pixels:
    """A view, decoded.

    Attributes:
        image: (3, h, w) uint8, BGR, not padded.
        crc32c: checksum of the image file's bytes.
    """

    row: Row
    image: torch.Tensor
    crc32c: int


class UnitComputer:
    """Turns units into targets.

    Args:
        teacher: on its device.
        info: the group that the targets are for.
        img_dir: folder of the images.
        batch_size: views in one forward pass.
        decoders: threads that decode.
    """

    def __init__(
        self, teacher: Teacher, info: GroupInfo, policy: ViewPolicy, img_dir: str, batch_size: int, decoders: int = 1
    ) -> None:
        self._teacher, self._info, self._batch_size = teacher, info, batch_size
        self._img_dir = Path(img_dir)
        self._view = ApplyView([list(scale) for scale in policy.scales], policy.flip)
        self._pool = ThreadPoolExecutor(decoders, thread_name_prefix="decode")

    def decode(self, unit: Unit) -> tuple[list[Pixels], list[Failure]]:
        """Read a unit's images, each once, and make their views. Images that cannot be used are returned as failures."""
        return self.decode_rows(unit.rows)

    def decode_rows(self, rows: Sequence[Row]) -> tuple[list[Pixels], list[Failure]]:
        """`decode` of some rows; those of one image follow each other."""
        by_image = [list(group) for _, group in groupby(rows, key=lambda row: row.image_id)]
        views: list[Pixels] = []
        failures: list[Failure] = []
        for pixels, failed in self._pool.map(self._decode_image, by_image):
            views += pixels
            failures += failed
        return views, failures

    def maps(self, pixels: Pixels) -> dict[str, torch.Tensor]:
        """The teacher's maps of one view as they would be quantised: per level (C, h, w) float32 on the CPU."""
        output = self._teacher([pixels.image], detect=False)
        return {name: maps[0].float().cpu() for name, maps in output.features.items()}

    def compute(self, views: Sequence[Pixels]) -> tuple[list[RowTargets], list[Failure]]:
        """Run the teacher and quantise on its device. Rows with NaN or Inf are refused and returned as failures."""
        targets: list[RowTargets] = []
        failures: list[Failure] = []
        for start in range(0, len(views), self._batch_size):
            batch = views[start : start + self._batch_size]
            output = self._teacher([pixels.image for pixels in batch])
            encoded = {name: encode(maps, self._info.precision) for name, maps in output.features.items()}
            for n, pixels in enumerate(batch):
                dense = _dense_arrays(output.dense[n]) if output.dense else {}
                reason = _not_finite(encoded, n, output.detections[n], dense, self._info.precision)
                if reason:
                    failures.append(_failure(pixels.row, reason))
                else:
                    targets.append(_row_targets(pixels, encoded, n, output.detections[n], dense))
        return targets, failures

    def run(self, unit: Unit) -> tuple[list[RowTargets], list[Failure]]:
        """Decode and compute, one after the other."""
        views, unusable = self.decode(unit)
        targets, refused = self.compute(views)
        return targets, unusable + refused

    def _decode_image(self, rows: list[Row]) -> tuple[list[Pixels], list[Failure]]:
        first = rows[0]
        try:
            content = (self._img_dir / first.file_name).read_bytes()
        except OSError as error:
            return [], [_failure(row, f"cannot be read: {error.strerror}") for row in rows]
        try:
            image = mmcv.imfrombytes(content)  # as mmdet's LoadImageFromFile decodes it
        except Exception as error:  # noqa: BLE001 - decoders raise what they like on damaged files
            return [], [_failure(row, f"cannot be decoded: {error}") for row in rows]
        if image is None:
            return [], [_failure(row, "cannot be decoded") for row in rows]
        height, width = image.shape[:2]
        if (width, height) != (first.width, first.height):
            reason = f"is {width}x{height}, the annotation file says {first.width}x{first.height}"
            return [], [_failure(row, reason) for row in rows]
        crc = int(google_crc32c.value(content))
        return [Pixels(row, self._make_view(image, row), crc) for row in rows], []

    def _make_view(self, image: np.ndarray, row: Row) -> torch.Tensor:
        view = self._view({"img": image, "img_shape": image.shape[:2], "ori_shape": image.shape[:2], "view": row.view})[
            "img"
        ]
        if view.shape[:2] != (row.view_height, row.view_width):
            raise RuntimeError(
                f"view {row.view} of {row.file_name} is {view.shape[:2]}, planned {row.view_height, row.view_width}"
            )
        return torch.from_numpy(np.ascontiguousarray(view.transpose(2, 0, 1)))


def _failure(row: Row, reason: str) -> Failure:
    return Failure(row.image_id, row.view, row.file_name, reason)


def _dense_arrays(dense: Mapping[str, DenseLevel]) -> dict[str, DenseArrays]:
    """Dense outputs as they are stored."""
    return {
        level: {
            "index": of.indices.to(torch.int32).cpu().numpy(),
            "logits": of.logits.half().cpu().numpy(),
            "terms": of.terms.half().cpu().numpy(),
        }
        for level, of in dense.items()
    }


def _not_finite(
    encoded: dict[str, Encoded], n: int, detections: Detections, dense: Mapping[str, DenseArrays], precision: str
) -> str | None:
    bad = [name for name, level in encoded.items() if not level.finite[n]]
    if bad:
        overflow = " or beyond float16's range (cache.precision: int8 has none)" if precision == "float16" else ""
        return f"the teacher gave NaN or Inf{overflow} on {', '.join(bad)}"
    if not (np.isfinite(detections.boxes).all() and np.isfinite(detections.scores).all()):
        return "the teacher gave NaN or Inf in its detections"
    for level, of in dense.items():
        if not all(np.isfinite(of[role]).all() for role in ("logits", "terms")):
            return f"the teacher's dense head gave NaN, Inf or more than float16 holds on {level}"
    return None


def _row_targets(
    pixels: Pixels, encoded: dict[str, Encoded], n: int, detections: Detections, dense: Mapping[str, DenseArrays]
) -> RowTargets:
    return RowTargets(
        row=pixels.row,
        values={name: level.values[n].numpy() for name, level in encoded.items()},
        scales={name: level.scales[n].numpy() for name, level in encoded.items() if level.scales is not None},
        snr={name: float(level.snr[n]) for name, level in encoded.items()},
        detections=detections,
        image_crc32c=pixels.crc32c,
        dense=dense,
    )
