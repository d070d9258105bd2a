"""Floats to stored numbers and back, per image and channel, with the error measured where it is made.

Runs on whatever device the maps are on, so that only the small stored numbers leave it. The same maps give the same bytes
on every device: scales are chosen among candidates by counting, which no device rounds differently.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cache.layout import Precision

_INT8_MAX = 127
_INT4_MAX = 7
_BINS = 256
_CANDIDATES = 64


@dataclass(frozen=True)
class Encoded:
    """One level of a batch, as it is stored.

    Attributes:
        values: on the CPU; (N, C, h, w) int8 or float16, or (N, C, ceil(h * w / 2)) uint8 for int4.
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

    int8 and int4 are symmetric. int8: the largest magnitude of an image's channel becomes 127. int4: values from -7 to 7,
    beyond which they are clipped; where, is chosen for each image's channel to minimise the squared error. A channel of
    zeros has scale 0.

    Args:
        maps: (N, C, h, w), floating point, any device.
        precision: what to store.
    """
    maps = maps.float()
    scales = None
    if precision == "float16":
        values = restored = maps.half()
    else:
        largest = _INT8_MAX if precision == "int8" else _INT4_MAX
        peaks = maps.abs().amax(dim=(2, 3))
        scales = peaks / largest if precision == "int8" else _int4_scales(maps, peaks)
        divisor = torch.where(scales > 0, scales, torch.ones_like(scales))
        numbers = (maps / divisor[:, :, None, None]).round_().clamp_(-largest, largest)
        values = restored = numbers.to(torch.int8)
        if precision == "int4":
            values = pack(values)
    difference = decode(restored, scales).sub_(maps)
    # norms per channel first: float32 sums over a whole map would lose digits, a float64 copy of it costs more than all else
    signal = torch.linalg.vector_norm(maps, dim=(2, 3)).double().square().sum(dim=1)
    noise = torch.linalg.vector_norm(difference, dim=(2, 3)).double().square().sum(dim=1)
    snr = torch.where(noise > 0, 10 * torch.log10(signal / noise), torch.full_like(noise, torch.inf))
    finite = torch.isfinite(signal) & torch.isfinite(noise)
    return Encoded(values.cpu(), None if scales is None else scales.cpu(), snr.float().cpu(), finite.cpu())


def decode(values: Tensor, scales: Tensor | None, size: tuple[int, int] | None = None) -> Tensor:
    """Restore floats from stored numbers.

    Args:
        values: (..., C, h, w) int8 or float16, or (..., C, ceil(h * w / 2)) uint8 for int4.
        scales: (..., C) float32, or None for float16.
        size: h and w of an int4 map.

    Returns:
        (..., C, h, w) float32 on the device of ``values``.
    """
    if values.dtype == torch.uint8:
        if size is None:
            raise ValueError("int4 maps need their size to be restored")
        values = unpack(values, size)
    maps = values.float()
    return maps if scales is None else maps.mul_(scales[..., None, None])


def pool(maps: Tensor, window: int) -> Tensor:
    """Average (N, C, h, w) over windows of ``window`` x ``window``, to (N, C, ceil(h / window), ceil(w / window)).

    Windows that reach over the edge average what is inside.
    """
    if window == 1:
        return maps
    return F.avg_pool2d(maps, window, ceil_mode=True, count_include_pad=False)


def pack(values: Tensor) -> Tensor:
    """(..., h, w) int8 from -8 to 7 -> (..., ceil(h * w / 2)) uint8: the first of two numbers in the low four bits."""
    flat = F.pad(values.flatten(-2), (0, values.shape[-2:].numel() % 2))
    return (flat[..., 0::2] & 0x0F | flat[..., 1::2] << 4).view(torch.uint8)


def unpack(packed: Tensor, size: tuple[int, int]) -> Tensor:
    """The inverse of `pack`: (..., h, w) int8."""
    both = packed.view(torch.int8)
    # shifting left, then right again, brings the sign along
    flat = torch.stack(((both << 4) >> 4, both >> 4), dim=-1).flatten(-2)
    return flat[..., : size[0] * size[1]].reshape(*packed.shape[:-1], *size)


def _int4_scales(maps: Tensor, peaks: Tensor) -> Tensor:
    """(N, C): of 64 evenly spaced clipping points the one with the least squared error, on a histogram of magnitudes."""
    rows, columns = maps.shape[0] * maps.shape[1], maps.shape[2] * maps.shape[3]
    magnitudes, peak = maps.abs().reshape(rows, columns), peaks.reshape(rows, 1)
    safe = torch.where((peak > 0) & peak.isfinite(), peak, torch.ones_like(peak))
    bins = (magnitudes * (_BINS / safe)).nan_to_num_(0, 0, 0).clamp_(0, _BINS - 1).to(torch.int64)
    offsets = torch.arange(rows, device=maps.device)[:, None] * _BINS
    counts = torch.bincount((bins + offsets).flatten(), minlength=rows * _BINS).view(rows, _BINS).double()
    best = (counts @ _clipping_errors(maps.device)).argmin(dim=1) + 1
    return (peak[:, 0] * best.float() / (_CANDIDATES * _INT4_MAX)).view(peaks.shape)


def _clipping_errors(device: torch.device) -> Tensor:
    """(bins, candidates) float64: squared error of a magnitude in a bin when clipped at a candidate, peak = 1."""
    centres = (torch.arange(_BINS, device=device, dtype=torch.float64) + 0.5) / _BINS
    scales = torch.arange(1, _CANDIDATES + 1, device=device, dtype=torch.float64) / (_CANDIDATES * _INT4_MAX)
    restored = (centres[:, None] / scales).round().clamp(max=_INT4_MAX) * scales
    return (restored - centres[:, None]).square()
