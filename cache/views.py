"""Views: which deterministic versions of an image exist, and how large each is. Pure arithmetic.

Two kinds of policy. `ViewPolicy`: a view is what mmdet's ``Resize(scale, keep_ratio=True)``, then a horizontal flip or none,
make of an image; the sizes computed here are those that mmcv computes (``mmcv.rescale_size``), without mmcv.
`SampledPolicy`: a view is what a pipeline of transforms draws, replayed from a seed, and all views have one size.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
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

    @property
    def mirrors(self) -> bool:
        """Whether view ``2 * i + 1`` is the mirror image of view ``2 * i``."""
        return self.flip == "both"

    def sizes(self, view: int, widths: IntArray, heights: IntArray) -> tuple[IntArray, IntArray]:
        """Widths and heights of one view, in pixels without padding, of images of any number; see `resized`."""
        return resized(widths, heights, self[view].scale)

    def to_json(self) -> dict[str, Any]:
        """The policy as plain JSON, as stored in the cache and hashed into the fingerprint."""
        return {"scale": [list(scale) for scale in self.scales], "flip": self.flip}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "ViewPolicy":
        """The inverse of `to_json`."""
        return cls(tuple((int(a), int(b)) for a, b in record["scale"]), record["flip"])


@dataclass(frozen=True)
class SampledPolicy:
    """``count`` views of every image, each drawn once by a pipeline of random transforms and padded to one size.

    Attributes:
        count: views of an image.
        size: (height, width) in pixels of every view; what a draw leaves free at the right and bottom is padding that belongs
            to the view.
        record: all else that decides a view's pixels, as plain JSON: the pipeline, its seed, the padding's value, and what of
            the annotations it sees.
    """

    count: int
    size: tuple[int, int]
    record: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.count

    @property
    def mirrors(self) -> bool:
        """Whether view ``2 * i + 1`` is the mirror image of view ``2 * i``: never."""
        return False

    def sizes(self, view: int, widths: IntArray, heights: IntArray) -> tuple[IntArray, IntArray]:
        """Widths and heights of one view, in pixels: the same for every image and view."""
        height, width = self.size
        return np.full_like(widths, width), np.full_like(heights, height)

    def to_json(self) -> dict[str, Any]:
        """The policy as plain JSON, as stored in the cache and hashed into the fingerprint."""
        return {"sampled": {**self.record, "count": self.count, "size": list(self.size)}}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "SampledPolicy":
        """The inverse of `to_json`."""
        rest = dict(record["sampled"])
        height, width = rest.pop("size")
        return cls(rest.pop("count"), (int(height), int(width)), rest)


Policy = ViewPolicy | SampledPolicy


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
