"""Teacher targets on their way through a batch: from each image's own maps to padded maps with a mask."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from cache import DenseLevel, Detections, RowLayout, decode, pool


class TeacherMaps(Protocol):
    """One image's targets, wherever they come from.

    Attributes:
        map_sizes: per level the rows and columns of the detector's own map, before pooling.
        dense: per level the sparse outputs of the teacher's dense head; empty if they were not asked for.
        detections: what the teacher detected, boxes in pixels of the view; None if it was not asked for.
    """

    @property
    def map_sizes(self) -> dict[str, tuple[int, int]]: ...

    @property
    def dense(self) -> Mapping[str, DenseLevel]: ...

    @property
    def detections(self) -> Detections | None: ...

    def level(self, name: str) -> Tensor:
        """A level's map (C, h, w) float32, pooled where the recipe says so."""


@dataclass
class CachedMaps:
    """Features as they travel from the cache to the student's device: still quantised, all in one piece.

    Attributes:
        buffer: uint8, every level's maps and scales.
        layout: where each lies in the buffer.
        detections: on the CPU; None if they were not asked for.
        top_k: positions a level of the dense outputs that are wanted; more may be stored.
        kept: whether the local disk had the row; None for a cache of which none is kept.
    """

    buffer: Tensor
    layout: RowLayout
    detections: Detections | None = None
    top_k: int = 0
    kept: bool | None = None

    @property
    def map_sizes(self) -> dict[str, tuple[int, int]]:
        """Per level the rows and columns of the detector's own map."""
        return self.layout.map_sizes

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "CachedMaps":
        """The same on another device."""
        return replace(self, buffer=self.buffer.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "CachedMaps":
        """The same in pinned memory; torch's DataLoader calls this."""
        return replace(self, buffer=self.buffer.pin_memory())

    @property
    def dense(self) -> Mapping[str, DenseLevel]:
        """Per level the dense outputs, on the device of the buffer."""
        k, stored = self.top_k, self.layout.dense(self.buffer)  # the best first
        return {
            level: DenseLevel(of.indices[:k], of.logits[:k], of.terms[:k], of.shape) for level, of in stored.items()
        }

    def level(self, name: str) -> Tensor:
        """A level's map, dequantised on the device of the buffer."""
        return decode(*self.layout.stored(self.buffer, name), self.layout.sizes[name])


@dataclass
class LiveMaps:
    """Features that a live teacher gave.

    Attributes:
        maps: per level (C, h, w), pooled where the recipe says so.
        map_sizes: per level the rows and columns before pooling.
        dense, detections: see `TeacherMaps`.
    """

    maps: dict[str, Tensor]
    map_sizes: dict[str, tuple[int, int]]
    dense: Mapping[str, DenseLevel] = field(default_factory=dict)
    detections: Detections | None = None

    def level(self, name: str) -> Tensor:
        """A level's map."""
        return self.maps[name].float()


def assemble(batch: Sequence[TeacherMaps], level: str, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """One level of a batch, dequantised, at the size of the student's map.

    An image's own map lies at the top left; what the student's batch pads at the right and bottom has no target.

    Args:
        size: rows and columns of the student's map.

    Returns:
        Maps (N, C, H, W) float32, zero outside each image's own map, and the mask (N, 1, H, W) bool of those own maps.
    """
    height, width = size
    own = [targets.level(level)[:, :height, :width] for targets in batch]
    maps = torch.zeros(len(own), own[0].shape[0], height, width, device=own[0].device)
    valid = torch.zeros(len(own), 1, height, width, dtype=torch.bool, device=own[0].device)
    for n, one in enumerate(own):
        maps[n, :, : one.shape[1], : one.shape[2]] = one
        valid[n, :, : one.shape[1], : one.shape[2]] = True
    return maps, valid


def own_maps(own: Sequence[tuple[int, int]], size: Sequence[int], device: torch.device) -> Tensor:
    """Where the images' own maps lie in a batch's.

    Args:
        own: per image rows and columns of its own map.
        size: rows and columns of the batch's.

    Returns:
        (N, 1, H, W) bool.
    """
    inside = torch.zeros(len(own), 1, *size, dtype=torch.bool, device=device)
    for n, (rows, columns) in enumerate(own):
        inside[n, :, :rows, :columns] = True
    return inside


def pool_student(maps: Tensor, own: Sequence[tuple[int, int]], window: int) -> Tensor:
    """Average a student's maps as the teacher's stored ones were: over windows, and in each image's own map only.

    Args:
        maps: (N, C, H, W).
        own: per image the rows and columns of its own map.

    Returns:
        (N, C, ceil(H / window), ceil(W / window)).
    """
    if window == 1:
        return maps
    inside = own_maps(own, maps.shape[-2:], maps.device).to(maps.dtype)
    return pool(maps * inside, window) / pool(inside, window).clamp(min=1e-6)
