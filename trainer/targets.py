"""Teacher targets on their way through a batch: from each image's own maps to padded maps with a mask."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cache import decode


@dataclass
class TeacherMaps:
    """One image's features as they travel with its data sample: still quantised, so that little is moved.

    Attributes:
        values: per level (C, h, w), int8, float16 or float32.
        scales: per level (C,) float32; absent where the values are floats.
    """

    values: dict[str, Tensor]
    scales: dict[str, Tensor]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "TeacherMaps":
        """The same on another device; mmdet's data preprocessor calls this."""
        return TeacherMaps(
            {name: v.to(device, non_blocking=non_blocking) for name, v in self.values.items()},
            {name: s.to(device, non_blocking=non_blocking) for name, s in self.scales.items()},
        )

    def cuda(self) -> "TeacherMaps":
        """The same on the current GPU."""
        return self.to("cuda")

    def pin_memory(self) -> "TeacherMaps":
        """The same in pinned memory; torch's DataLoader calls this."""
        return TeacherMaps(
            {name: v.pin_memory() for name, v in self.values.items()},
            {name: s.pin_memory() for name, s in self.scales.items()},
        )


def assemble(batch: Sequence[TeacherMaps], level: str, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """One level of a batch, dequantised, at the size of the student's map.

    An image's own map lies at the top left; what the student's batch pads at the right and bottom has no target.

    Args:
        size: rows and columns of the student's map.

    Returns:
        Maps (N, C, H, W) float32, zero outside each image's own map, and the mask (N, 1, H, W) bool of those own maps.
    """
    first = batch[0].values[level]
    height, width = size
    maps = torch.zeros(len(batch), first.shape[0], height, width, device=first.device)
    valid = torch.zeros(len(batch), 1, height, width, dtype=torch.bool, device=first.device)
    for n, targets in enumerate(batch):
        own = decode(targets.values[level], targets.scales.get(level))[:, :height, :width]
        maps[n, :, : own.shape[1], : own.shape[2]] = own
        valid[n, :, : own.shape[1], : own.shape[2]] = True
    return maps, valid
