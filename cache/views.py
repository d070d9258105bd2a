"""Views: which deterministic versions of an image exist, and how large each is. Pure arithmetic.

A view is what mmdet's ``Resize(scale, keep_ratio=True)``, then a horizontal flip or none, make of an image. The sizes
computed here are those that mmcv computes (``mmcv.rescale_size``), without mmcv.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
Flip = Literal["both", "none"]


@dataclass(frozen=True)
class View:
    """One deterministic version of any image.

    Attributes:
        index: the small integer that names the view in the cache.
        scale: the box (long edge, short edge), in pixels, into which the image is resized with its aspect ratio kept.
        flip: mirrored horizontally after the resize.
    """

    index: int
    scale: tuple[int, int]
    flip: bool


@dataclass(frozen=True)
class ViewPolicy:
    """Every scale, without and with the flip: view ``2 * i`` is scale ``i``, view ``2 * i + 1`` its mirror image.

    With ``flip="none"`` view ``i`` is scale ``i``.
    """

    scales: tuple[tuple[int, int], ...]
    flip: Flip = "both"

    def __len__(self) -> int:
        return len(self.scales) * (2 if self.flip == "both" else 1)

    def __getitem__(self, index: int) -> View:
        if not 0 <= index < len(self):
            raise IndexError(f"view {index}: this policy has views 0 to {len(self) - 1}")
        if self.flip == "both":
            return View(index, self.scales[index // 2], bool(index % 2))
        return View(index, self.scales[index], False)

    def __iter__(self) -> Iterator[View]:
        return (self[index] for index in range(len(self)))

    def to_json(self) -> dict[str, Any]:
        """The policy as plain JSON, as stored in the cache and hashed into the fingerprint."""
        return {"scale": [list(scale) for scale in self.scales], "flip": self.flip}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "ViewPolicy":
        """The inverse of `to_json`."""
        return cls(tuple((int(a), int(b)) for a, b in record["scale"]), record["flip"])


def resized(widths: IntArray, heights: IntArray, scale: tuple[int, int]) -> tuple[IntArray, IntArray]:
    """Sizes after a keep-ratio resize into ``scale``.

    Args:
        widths, heights: original sizes in pixels, any shape.
        scale: (long edge, short edge) in either order, in pixels.

    Returns:
        Widths and heights in pixels, rounded as mmcv rounds them.
    """
    long_edge, short_edge = max(scale), min(scale)
    # the order of operations is mmcv's: another one rounds some sizes to the next pixel
    factor = np.minimum(long_edge / np.maximum(heights, widths), short_edge / np.minimum(heights, widths))
    return (widths * factor + 0.5).astype(np.int64), (heights * factor + 0.5).astype(np.int64)


def padded(sizes: IntArray, divisor: int) -> IntArray:
    """Sizes after padding at the right and bottom to a multiple of ``divisor`` pixels."""
    return -(-sizes // divisor) * divisor
