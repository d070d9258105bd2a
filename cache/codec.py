"""Floats to stored numbers and back, per image and channel, with the error measured where it is made.

Runs on whatever device the maps are on, so that only the small stored numbers leave it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cache.layout import Precision

_INT8_MAX = 127


@dataclass(frozen=True)
class Encoded:
    """One level of a batch, as it is stored.

    Attributes:
        values: (N, C, h, w), int8 or float16, on the CPU.
        scales: (N, C) float32 on the CPU, ``value = stored * scale``; None for float16.
        snr: (N,) float32 on the CPU: signal-to-noise ratio of each image's map in dB; inf where nothing was lost.
        finite: (N,) bool on the CPU: False where the map held NaN or Inf, or overflowed float16; such a row must
            not be stored.
    """

    values: Tensor
    scales: Tensor | None
    snr: Tensor
    finite: Tensor


@torch.no_grad()
def encode(maps: Tensor, precision: Precision) -> Encoded:
    """Quantise one level of a batch.

    int8 is symmetric: the largest magnitude of an image's channel becomes 127. A channel of zeros has scale 0.

    Args:
        maps: (N, C, h, w), floating point, any device.
        precision: what to store.
    """
    maps = maps.float()
    scales = None
    if precision == "int8":
        scales = maps.abs().amax(dim=(2, 3)) / _INT8_MAX
        divisor = torch.where(scales > 0, scales, torch.ones_like(scales))
        values = (maps / divisor[:, :, None, None]).round().clamp(-_INT8_MAX, _INT8_MAX).to(torch.int8)
    else:
        values = maps.half()
    restored = decode(values, scales)
    signal = maps.double().square().sum(dim=(1, 2, 3))
    noise = (restored.double() - maps.double()).square().sum(dim=(1, 2, 3))
    snr = torch.where(noise > 0, 10 * torch.log10(signal / noise), torch.full_like(noise, torch.inf))
    finite = torch.isfinite(restored).flatten(1).all(dim=1) & torch.isfinite(maps).flatten(1).all(dim=1)
    return Encoded(values.cpu(), None if scales is None else scales.cpu(), snr.float().cpu(), finite.cpu())


def decode(values: Tensor, scales: Tensor | None) -> Tensor:
    """Restore floats from stored numbers.

    Args:
        values: (..., C, h, w) int8 or float16.
        scales: (..., C) float32, or None for float16.

    Returns:
        (..., C, h, w) float32 on the device of ``values``.
    """
    maps = values.float()
    return maps if scales is None else maps * scales[..., None, None]
