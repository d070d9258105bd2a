"""One unit of a plan -> its targets: decode, make the views, run the teacher, quantise. Runs without ray."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

import google_crc32c
import numpy as np
import torch
from mmdet.registry import TRANSFORMS

from cache import (
    DenseArrays,
    DenseLevel,
    Detections,
    Encoded,
    GroupInfo,
    Policy,
    Row,
    RowTargets,
    SampledPolicy,
    Unit,
    encode,
)
from trainer.images import UnusableImageError, read_image
from trainer.specs import SplitSpec
from trainer.teacher import Teacher, TeacherOutput
from trainer.transforms import view_config

# rows whose sampled views are made twice before anything is written
_REPLAYED = 8


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
        crc32c: checksum of the image file's bytes, followed by those of the files that the view mixes in.
    """

    row: Row
    image: torch.Tensor
    crc32c: int


class UnitComputer:
    """Turns units into targets.

    Args:
        teacher: on its device.
        info: the group that the targets are for.
        split: annotation file and folder of the images.
        batch_size: views in one forward pass.
        decoders: threads that decode.
    """

    def __init__(
        self, teacher: Teacher, info: GroupInfo, policy: Policy, split: SplitSpec, batch_size: int, decoders: int = 1
    ) -> None:
        self._teacher, self._info, self._batch_size = teacher, info, batch_size
        self._img_dir = Path(split.img_dir)
        self._view = TRANSFORMS.build(view_config(policy, split.ann_file, split.img_dir))
        self._sampled = isinstance(policy, SampledPolicy)
        self._replay_checked, self._replay_lock = not self._sampled, threading.Lock()
        self._pool = ThreadPoolExecutor(decoders, thread_name_prefix="decode")

    def decode(self, unit: Unit) -> tuple[list[Pixels], list[Failure]]:
        """Read a unit's images, each once, and make their views. Images that cannot be used are returned as failures.

        Raises:
            RecipeError: a sampled view made twice differs; some views of the first unit are checked.
        """
        with self._replay_lock:  # other calls wait: nothing is written before the check
            if not self._replay_checked:
                self._view.check_replay([(row.image_id, row.view) for row in unit.rows[:_REPLAYED]])
                self._replay_checked = True
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

    def look(self, pixels: Pixels) -> TeacherOutput:
        """What the teacher gives of one view, before anything of it is quantised."""
        return self._teacher([pixels.image], detect=self._info.detections)

    def compute(
        self,
        views: Sequence[Pixels],
        timed: Callable[[Literal["forward", "quantise"], float, float], None] | None = None,
    ) -> tuple[list[RowTargets], list[Failure]]:
        """Run the teacher and quantise on its device. Rows with NaN or Inf are refused and returned as failures.

        Args:
            timed: given each batch's forward and its quantisation, begin and end by ``time.monotonic``. A GPU may still be at
                work on maps when a forward ends here: its detections, if any, are waited for, the rest by the quantisation.
        """
        targets: list[RowTargets] = []
        failures: list[Failure] = []
        for start in range(0, len(views), self._batch_size):
            batch = views[start : start + self._batch_size]
            begin = time.monotonic()
            output = self._teacher([pixels.image for pixels in batch], detect=self._info.detections)
            middle = time.monotonic()
            encoded = {name: encode(maps, self._info.precision) for name, maps in output.features.items()}
            if timed is not None:
                timed("forward", begin, middle)
                timed("quantise", middle, time.monotonic())
            for n, pixels in enumerate(batch):
                dense = _dense_arrays(output.dense[n]) if output.dense else {}
                found = output.detections[n] if output.detections else None
                reason = _not_finite(encoded, n, found, dense, self._info.precision)
                if reason:
                    failures.append(_failure(pixels.row, reason))
                else:
                    targets.append(_row_targets(pixels, encoded, n, found, dense))
        return targets, failures

    def run(self, unit: Unit) -> tuple[list[RowTargets], list[Failure]]:
        """Decode and compute, one after the other."""
        views, unusable = self.decode(unit)
        targets, refused = self.compute(views)
        return targets, unusable + refused

    def _decode_image(self, rows: list[Row]) -> tuple[list[Pixels], list[Failure]]:
        if self._sampled:
            return self._sample_image(rows)
        first = rows[0]
        try:
            image, content = read_image(self._img_dir / first.file_name, first.width, first.height)
        except UnusableImageError as error:
            return [], [_failure(row, str(error)) for row in rows]
        crc = int(google_crc32c.value(content))
        return [Pixels(row, self._make_view(image, row), crc) for row in rows], []

    def _sample_image(self, rows: list[Row]) -> tuple[list[Pixels], list[Failure]]:
        try:
            loaded = self._view.load(rows[0].image_id)
        except UnusableImageError as error:
            return [], [_failure(row, str(error)) for row in rows]
        views, failures = [], []
        for row in rows:
            try:
                made = self._view.make(loaded, row.view)
            except UnusableImageError as error:
                failures.append(_failure(row, str(error)))
            else:
                views.append(Pixels(row, _as_tensor(made["img"], row), made["files_crc32c"]))
        return views, failures

    def _make_view(self, image: np.ndarray, row: Row) -> torch.Tensor:
        made = self._view({"img": image, "img_shape": image.shape[:2], "ori_shape": image.shape[:2], "view": row.view})
        return _as_tensor(made["img"], row)


def _as_tensor(view: np.ndarray, row: Row) -> torch.Tensor:
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
    encoded: dict[str, Encoded], n: int, found: Detections | None, dense: Mapping[str, DenseArrays], precision: str
) -> str | None:
    bad = [name for name, level in encoded.items() if not level.finite[n]]
    if bad:
        overflow = " or beyond float16's range (cache.precision: int8 has none)" if precision == "float16" else ""
        return f"the teacher gave NaN or Inf{overflow} on {', '.join(bad)}"
    if found is not None and not (np.isfinite(found.boxes).all() and np.isfinite(found.scores).all()):
        return "the teacher gave NaN or Inf in its detections"
    for level, of in dense.items():
        if not all(np.isfinite(of[role]).all() for role in ("logits", "terms")):
            return f"the teacher's dense head gave NaN, Inf or more than float16 holds on {level}"
    return None


def _row_targets(
    pixels: Pixels, encoded: dict[str, Encoded], n: int, found: Detections | None, dense: Mapping[str, DenseArrays]
) -> RowTargets:
    return RowTargets(
        row=pixels.row,
        values={name: level.values[n].numpy() for name, level in encoded.items()},
        scales={name: level.scales[n].numpy() for name, level in encoded.items() if level.scales is not None},
        snr={name: float(level.snr[n]) for name, level in encoded.items()},
        detections=found,
        image_crc32c=pixels.crc32c,
        dense=dense,
    )
