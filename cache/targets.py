"""`Targets`: what one teacher gives for one (image, view), and how its arrays lie in one buffer."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from cache import codec
from cache.detections import Detections
from cache.layout import ArraySpec, GroupInfo, bucket_size
from cache.shard import Bytes

_TORCH_DTYPES = {"int8": torch.int8, "uint8": torch.uint8, "float16": torch.float16, "float32": torch.float32}
_ALIGNMENT = 16


@dataclass(frozen=True)
class DenseLevel:
    """A dense head's outputs of one level at the positions where its highest class logit is largest, best first.

    Attributes:
        indices: (k,) int64, ``(y * w + x) * anchors + anchor``, as mmdet flattens a head's maps.
        logits: (k, classes) float32, before sigmoid or softmax.
        terms: (k, ...) float32, the box terms of the same positions as the head gives them: deltas, distances, or a
            distribution's logits.
        shape: rows, columns and anchors of the teacher's own map, which the indices count in.
    """

    indices: Tensor
    logits: Tensor
    terms: Tensor
    shape: tuple[int, int, int]


@dataclass(frozen=True)
class RowLayout:
    """How the arrays of one row of a bucket lie behind each other in a buffer.

    Attributes:
        arrays: maps and scales of the levels, as `GroupInfo.arrays` orders them.
        sizes: per level h and w of its stored map.
        map_sizes: per level rows and columns of the detector's map, before pooling.
        offsets: where each array begins.
        nbytes: of the buffer.
    """

    arrays: tuple[ArraySpec, ...]
    sizes: dict[str, tuple[int, int]]
    map_sizes: dict[str, tuple[int, int]]
    offsets: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, info: GroupInfo, bucket: str, levels: Sequence[str] | None = None) -> "RowLayout":
        """The layout of a bucket's rows, of all levels or of some."""
        arrays = tuple(array for array in info.arrays(bucket) if levels is None or array.level in levels)
        sizes = {level.name: level.stored_size(*bucket_size(bucket)) for level in info.levels}
        map_sizes = {level.name: level.map_size(*bucket_size(bucket)) for level in info.levels}
        steps = [-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays]
        offsets = [sum(steps[:n]) for n in range(len(steps))]
        return cls(arrays, sizes, map_sizes, tuple(offsets), sum(steps))

    def rows(self, buffer: Bytes) -> list[Bytes]:
        """The bytes of each array, as views into a buffer of `nbytes`."""
        return [buffer[at : at + array.nbytes] for at, array in zip(self.offsets, self.arrays, strict=True)]

    def features(self, buffer: Tensor) -> dict[str, Tensor]:
        """Per level its stored maps, as views into a buffer (uint8)."""
        return {a.level: _typed(buffer[at:], a) for at, a in self._placed() if a.name == a.level}

    def scales(self, buffer: Tensor) -> dict[str, Tensor]:
        """Per level its scales, as views into a buffer (uint8); empty for float16."""
        return {a.level: _typed(buffer[at:], a) for at, a in self._placed() if a.name != a.level}

    def _placed(self) -> Iterator[tuple[int, ArraySpec]]:
        return zip(self.offsets, self.arrays, strict=True)


class Targets:
    """All that one teacher gives for one (image, view).

    Attributes:
        image_id, view: what it was computed from.
        layout: of the arrays.
    """

    def __init__(
        self,
        image_id: int,
        view: int,
        layout: RowLayout,
        rows: Sequence[Bytes],
        detections: Callable[[], Detections],
        buffer: Tensor | None = None,
    ) -> None:
        self.image_id, self.view, self.layout = image_id, view, layout
        self._rows, self._read_detections, self._buffer = rows, detections, buffer

    @cached_property
    def features(self) -> dict[str, Tensor]:
        """Per level (C, h, w) int8 or float16, or for int4 (C, ceil(h * w / 2)) uint8, as stored.

        May be a view into a mapped shard: not to be written to.
        """
        return {a.level: _tensor(row, a) for row, a in self._pairs() if a.name == a.level}

    @cached_property
    def scales(self) -> dict[str, Tensor]:
        """Per level (C,) float32, ``value = stored * scale``; empty for float16."""
        return {a.level: _tensor(row, a) for row, a in self._pairs() if a.name != a.level}

    @cached_property
    def detections(self) -> Detections:
        """What the teacher detected in this view.

        Raises:
            CorruptShardError: the unit's part of the detections is damaged or gone.
        """
        return self._read_detections()

    @property
    def buffer(self) -> Tensor | None:
        """The one buffer (uint8) in which all arrays lie as `layout` says; None for targets that are views."""
        return self._buffer

    def dequantize(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Per level (C, h, w) float32 on ``device``; the stored numbers travel, the floats are made there."""
        return {
            name: codec.decode(
                values.to(device),
                self.scales[name].to(device) if name in self.scales else None,
                self.layout.sizes[name],
            )
            for name, values in self.features.items()
        }

    def copy(self, out: Tensor | None = None) -> "Targets":
        """The same in memory of its own: one buffer, which no shard keeps alive and which travels in one piece.

        Args:
            out: the buffer to use, uint8, of ``layout.nbytes`` or more.
        """
        # numpy asks for huge pages, torch does not: half of the time of a copy is page faults without them
        buffer = torch.from_numpy(np.empty(self.layout.nbytes, np.uint8)) if out is None else out
        rows = self.layout.rows(buffer.numpy())
        for own, row in zip(rows, self._rows, strict=True):
            own[:] = row
        return Targets(self.image_id, self.view, self.layout, rows, self._read_detections, buffer)

    def _pairs(self) -> Iterator[tuple[Bytes, ArraySpec]]:
        return zip(self._rows, self.layout.arrays, strict=True)


def _typed(raw: Tensor, array: ArraySpec) -> Tensor:
    return raw[: array.nbytes].view(_TORCH_DTYPES[array.dtype]).view(array.shape)


def _tensor(row: Bytes, array: ArraySpec) -> Tensor:
    # bytes off the network or out of a decompressor cannot be written to, and torch has no such tensors
    own = row if row.flags.writeable else row.copy()
    return torch.from_numpy(own.view(array.dtype).reshape(array.shape))  # numpy's views cost a third of torch's
