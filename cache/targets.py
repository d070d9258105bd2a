"""`Targets`: what one teacher gives for one (image, view), and how its arrays lie in one buffer."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from cache import codec
from cache.detections import Detections
from cache.layout import ArraySpec, GroupInfo, bucket_size
from cache.shard import Bytes

_TORCH_DTYPES = {
    "int8": torch.int8,
    "uint8": torch.uint8,
    "float16": torch.float16,
    "float32": torch.float32,
    "int32": torch.int32,
}
_ALIGNMENT = 16
_MAPS = ("map", "scale")


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
        arrays: as `GroupInfo.arrays` orders them.
        sizes: per level h and w of its stored map.
        map_sizes: per level rows and columns of the detector's map, before pooling.
        dense_shapes: per level rows, columns and anchors of the dense head's own map.
        offsets: where each array begins.
        nbytes: of the buffer.
    """

    arrays: tuple[ArraySpec, ...]
    sizes: dict[str, tuple[int, int]]
    map_sizes: dict[str, tuple[int, int]]
    dense_shapes: dict[str, tuple[int, int, int]]
    offsets: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(
        cls, info: GroupInfo, bucket: str, levels: Sequence[str] | None = None, *, dense: bool = True
    ) -> "RowLayout":
        """The layout of a bucket's rows: of all levels' maps or of some, with the dense outputs or without."""
        arrays = tuple(
            array
            for array in info.arrays(bucket)
            if (dense if array.role not in _MAPS else levels is None or array.level in levels)
        )
        sizes = {level.name: level.stored_size(*bucket_size(bucket)) for level in info.levels}
        map_sizes = {level.name: level.map_size(*bucket_size(bucket)) for level in info.levels}
        shapes = {dense.name: (*dense.map_size(*bucket_size(bucket)), dense.anchors) for dense in info.dense}
        steps = [-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays]
        offsets = [sum(steps[:n]) for n in range(len(steps))]
        return cls(arrays, sizes, map_sizes, shapes, tuple(offsets), sum(steps))

    @cached_property
    def contiguous(self) -> bool:
        """Whether the arrays follow each other without a gap."""
        return self.nbytes == sum(array.nbytes for array in self.arrays)

    def rows(self, buffer: Bytes) -> list[Bytes]:
        """The bytes of each array, as views into a buffer of `nbytes`."""
        return [buffer[at : at + array.nbytes] for at, array in zip(self.offsets, self.arrays, strict=True)]

    def stored(self, buffer: Tensor, level: str) -> tuple[Tensor, Tensor | None]:
        """One level's stored map, and its scales (None for float16), as views into a buffer (uint8)."""
        found = {a.role: _typed(buffer[at:], a) for at, a in self._placed() if a.level == level and a.role in _MAPS}
        return found["map"], found.get("scale")

    def dense(self, buffer: Tensor) -> dict[str, DenseLevel]:
        """Per level its dense outputs, restored from a buffer (uint8) on the buffer's device."""
        return self.assembled((_typed(buffer[at:], a), a) for at, a in self._placed() if a.role not in _MAPS)

    def assembled(self, arrays: Iterable[tuple[Tensor, ArraySpec]]) -> dict[str, DenseLevel]:
        """Per level its dense outputs, of the arrays that hold them."""
        found: dict[str, dict[str, Tensor]] = {}
        for values, array in arrays:
            found.setdefault(array.level, {})[array.role] = values
        return {
            level: DenseLevel(of["index"].long(), of["logits"].float(), of["terms"].float(), self.dense_shapes[level])
            for level, of in found.items()
        }

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
        rows: Sequence[Bytes] | Tensor,
        detections: Callable[[], Detections] | None,
    ) -> None:
        self.image_id, self.view, self.layout = image_id, view, layout
        self._rows, self._read_detections = rows, detections

    @cached_property
    def features(self) -> dict[str, Tensor]:
        """Per level (C, h, w) int8 or float16, or for int4 (C, ceil(h * w / 2)) uint8, as stored.

        May be a view into a mapped shard: not to be written to.
        """
        return {a.level: one for a, one in self._tensors if a.role == "map"}

    @cached_property
    def scales(self) -> dict[str, Tensor]:
        """Per level (C,) float32, ``value = stored * scale``; empty for float16."""
        return {a.level: one for a, one in self._tensors if a.role == "scale"}

    @cached_property
    def dense(self) -> dict[str, DenseLevel]:
        """Per level the dense head's outputs at its best positions; empty if they are not stored."""
        return self.layout.assembled((one, a) for a, one in self._tensors if a.role not in _MAPS)

    @cached_property
    def detections(self) -> Detections | None:
        """What the teacher detected in this view; None in a group that stores no detections.

        Raises:
            CorruptShardError: the unit's part of the detections is damaged or gone.
        """
        return None if self._read_detections is None else self._read_detections()

    @property
    def buffer(self) -> Tensor | None:
        """The one buffer (uint8) in which all arrays lie as `layout` says; None for targets that are views."""
        return self._rows if isinstance(self._rows, Tensor) else None

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
        place = np.empty(self.layout.nbytes, np.uint8) if out is None else out.numpy()[: self.layout.nbytes]
        if self.layout.arrays and self.layout.contiguous:
            np.concatenate(self._pieces, out=place)  # one call instead of one for each array
        else:
            for own, row in zip(self.layout.rows(place), self._pieces, strict=True):
                own[:] = row
        return Targets(
            self.image_id,
            self.view,
            self.layout,
            torch.from_numpy(place) if out is None else out,
            self._read_detections,
        )

    @property
    def _pieces(self) -> Sequence[Bytes]:
        return self.layout.rows(self._rows.numpy()) if isinstance(self._rows, Tensor) else self._rows

    @cached_property
    def _tensors(self) -> list[tuple[ArraySpec, Tensor]]:
        if isinstance(self._rows, Tensor):
            place, layout = self._rows.numpy(), self.layout
            return [(a, _tensor(place, a, at)) for a, at in zip(layout.arrays, layout.offsets, strict=True)]
        return [(a, _tensor(row, a)) for a, row in zip(self.layout.arrays, self._rows, strict=True)]


def _typed(raw: Tensor, array: ArraySpec) -> Tensor:
    return raw[: array.nbytes].view(_TORCH_DTYPES[array.dtype]).view(array.shape)


def _tensor(place: Bytes, array: ArraySpec, offset: int = 0) -> Tensor:
    # bytes off the network or out of a decompressor cannot be written to, and torch has no such tensors
    own = place if place.flags.writeable else place.copy()
    # numpy's views cost a third of torch's
    return torch.from_numpy(np.ndarray(array.shape, array.dtype, own, offset))
