"""Floats to stored numbers and back, per image and channel, with the error measured where it is made.

Runs on whatever device the maps are on, so that only the small stored numbers leave it. The same maps give the same numbers
on every device: int4's clipping is chosen among candidates by counting, which no device rounds differently.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cache.layout import Precision

_INT8_MAX = 127
_INT4_MAX = 7
_BINS = 256
_CANDIDATES = 64
_SAMPLE = 4096
_MOST_GROWTH = 1.1
_CPU_BLOCK = 2**18
# magnitudes are measured in steps of a channel's peak, which must not be too small to divide by
_SMALLEST = 1e-30
_STORED = {"float16": "float16", "int8": "int8", "int4": "uint8"}


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
    beyond which they are clipped; where, is chosen for each image's channel to minimise the squared error. What is restored
    with the least error is a little too small (by 1 to 2 % of a detector's features), always, which a loss that sums squared
    errors, such as MGD, learns; so the stored scale makes up for it: the error is then uncorrelated with the map. A channel
    of zeros has scale 0.

    Args:
        maps: (N, C, h, w), floating point, any device.
        precision: what to store.
    """
    images, channels, height, width = maps.shape
    rows = maps.reshape(images * channels, height * width)
    count, length = rows.shape
    columns = -(-length // 2) if precision == "int4" else length
    if maps.device.type == "cpu":
        # numpy asks for huge pages, torch does not: they halve what the first touch of a unit costs
        values = torch.from_numpy(np.empty((count, columns), _STORED[precision]))
    else:
        values = torch.empty(count, columns, dtype=getattr(torch, _STORED[precision]), device=maps.device)
    scales, signal, noise = torch.empty(3, count, device=maps.device)
    if precision == "int8" and maps.device.type == "cpu":
        from cache.int8 import encode_int8  # compiles: readers, and writers with a GPU, never need it

        # one thread has it done before others have begun
        numbers = rows.float().contiguous()
        encode_int8(*(part.numpy() for part in (numbers, values, scales, signal, noise)), smallest=_SMALLEST)
    else:
        # a CPU makes several passes over each value: in blocks that stay in its cache, and in the same memory for all of
        # them, they cost a third
        block = max(1, _CPU_BLOCK // length) if maps.device.type == "cpu" else count
        scratch = torch.empty(2, min(block, count), length, device=maps.device)
        parts = zip(*(torch.split(whole, block) for whole in (rows, values, scales, signal, noise)), strict=True)
        for own, own_values, own_scales, own_signal, own_noise in parts:
            numbers, nearest = scratch[:, : len(own)]
            _encode_rows(own.float(), precision, own_values, own_scales, own_signal, own_noise, numbers, nearest)
    scales.masked_fill_(signal == 0, 0)
    signal, noise = ((norms.double() * scales).square().view(images, channels).sum(dim=1) for norms in (signal, noise))
    snr = torch.where(noise > 0, 10 * torch.log10(signal / noise), torch.full_like(noise, torch.inf))
    shape = (images, channels, -1) if precision == "int4" else maps.shape
    return Encoded(
        values.view(shape).cpu(),
        None if precision == "float16" else scales.view(images, channels).cpu(),
        snr.float().cpu(),
        (torch.isfinite(signal) & torch.isfinite(noise)).cpu(),
    )


def _encode_rows(
    rows: Tensor,
    precision: Precision,
    values: Tensor,
    scales: Tensor,
    signal: Tensor,
    noise: Tensor,
    numbers: Tensor,
    nearest: Tensor,
) -> None:
    """Encode channels (R, h * w) float32 on the memory of ``numbers`` and ``nearest``, which are as large.

    Fills ``values`` (R, ...), ``scales`` (R,), and ``signal`` and ``noise`` (R,): the norms of the channel and of its error, in
    steps of the scale; they are not finite where the channel is not.
    """
    if precision == "float16":
        values.copy_(rows)
        scales.fill_(1)
        torch.linalg.vector_norm(rows, dim=1, out=signal)
        torch.linalg.vector_norm(nearest.copy_(values).sub_(rows), dim=1, out=noise)
        return
    peaks = torch.maximum(rows.amax(dim=1), -rows.amin(dim=1)).clamp_(min=_SMALLEST)
    if precision == "int8":
        torch.div(peaks, _INT8_MAX, out=scales)
    else:
        scales.copy_(_int4_steps(rows, peaks))
    torch.mul(rows, scales.reciprocal()[:, None], out=numbers)
    torch.linalg.vector_norm(numbers, dim=1, out=signal)
    torch.round(numbers, out=nearest)
    if precision == "int8":  # the peak is 127 steps: nothing to clip
        values.copy_(nearest)
        torch.linalg.vector_norm(numbers.sub_(nearest), dim=1, out=noise)
        return
    values.copy_(pack(nearest.clamp_(-_INT4_MAX, _INT4_MAX).to(torch.int8)))
    grown = _unshrunk(signal, numbers, nearest)
    torch.linalg.vector_norm(numbers.div_(grown[:, None]).sub_(nearest), dim=1, out=noise)
    signal.div_(grown)
    scales.mul_(grown)


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
    """(..., n) int8 from -8 to 7 -> (..., ceil(n / 2)) uint8: the first of two numbers in the low four bits."""
    pairs = F.pad(values, (0, values.shape[-1] % 2)).view(torch.int16)  # the first is the low byte
    return (pairs & 0x0F | pairs >> 4 & 0xF0).to(torch.uint8)


def unpack(packed: Tensor, size: tuple[int, int]) -> Tensor:
    """The inverse of `pack`: (..., h, w) int8."""
    both = packed.view(torch.int8)
    # shifting left, then right again, brings the sign along
    flat = torch.stack(((both << 4) >> 4, both >> 4), dim=-1).flatten(-2)
    return flat[..., : size[0] * size[1]].reshape(*packed.shape[:-1], *size)


def _int4_steps(rows: Tensor, peaks: Tensor) -> Tensor:
    """(R,): the step of 64 evenly spaced clipping points with the least squared error, on a histogram of magnitudes."""
    sample = rows[:, :: -(-rows.shape[1] // _SAMPLE)].abs()  # the best point is flat: no need to see every value
    bins = (sample * (_BINS / peaks)[:, None]).nan_to_num_(0, 0, 0).clamp_(0, _BINS - 1).to(torch.int64)
    offsets = torch.arange(peaks.shape[0], device=peaks.device)[:, None] * _BINS
    counts = torch.bincount((bins + offsets).flatten(), minlength=peaks.shape[0] * _BINS).view(-1, _BINS).double()
    if sample.shape[1] < rows.shape[1]:
        counts[:, -1] += sample.shape[1] / rows.shape[1]  # the peak, which the sample may have missed
    best = (counts @ _clipping_errors(peaks.device)).argmin(dim=1) + 1
    return peaks * best.float() / (_CANDIDATES * _INT4_MAX)


def _unshrunk(norms: Tensor, numbers: Tensor, nearest: Tensor) -> Tensor:
    """(R,): by how much restored channels must grow for their regression on the original ones to have slope 1; bounded."""
    common = (numbers * nearest).sum(dim=1).double()
    grown = torch.where(common > 0, norms.double().square() / common, torch.ones_like(common))
    # what is clipped of an outlier shrinks it too: to make up for that would blow up all the others
    return grown.clamp_(max=_MOST_GROWTH).float()


@lru_cache(maxsize=8)
def _clipping_errors(device: torch.device) -> Tensor:
    """(bins, candidates) float64: squared error of a magnitude in a bin when clipped at a candidate, peak = 1."""
    centres = (torch.arange(_BINS, device=device, dtype=torch.float64) + 0.5) / _BINS
    scales = torch.arange(1, _CANDIDATES + 1, device=device, dtype=torch.float64) / (_CANDIDATES * _INT4_MAX)
    restored = (centres[:, None] / scales).round().clamp(max=_INT4_MAX) * scales
    return (restored - centres[:, None]).square()
