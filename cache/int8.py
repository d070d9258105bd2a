"""int8 of maps on a CPU: compiled, for one pass to find a channel's peak and one for all the rest cost a third of eight.

The operators of torch, which a GPU runs, take a pass each. The numbers are the same to the last bit. Importing this module
compiles it, which takes a second: only who encodes on a CPU does.
"""

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

_STEPS = np.float32(127)
_MAGNITUDE = np.int32(0x7FFFFFFF)
# sums may be taken in any order, nothing else: steps and rounded values must be those of every other device
_ANY_ORDER = {"reassoc", "nsz"}

Floats = npt.NDArray[np.float32]


@numba.njit("UniTuple(float32, 2)(int32)", nogil=True, error_model="numpy")
def _step(peak: Any) -> Any:
    """(step, steps of one) of a channel whose largest magnitude has these bits."""
    step = np.int32(peak).view(np.float32) / _STEPS
    return step, np.float32(1) / step


@numba.njit(
    "void(float32[:,::1], int32[:,::1], int32, int8[:,::1], float32[::1], float32[::1], float32[::1])",
    nogil=True,
    error_model="numpy",
    fastmath=_ANY_ORDER,
)
def _encode(rows: Any, bits: Any, smallest: Any, values: Any, scales: Any, signal: Any, noise: Any) -> None:
    for r in range(rows.shape[0]):
        # magnitudes are ordered as their bits are, NaN and Inf above all: a comparison that compiles to few instructions
        peak = smallest
        for i in range(rows.shape[1]):
            peak = max(peak, bits[r, i] & _MAGNITUDE)
        scales[r], steps = _step(peak)
        energy, error = np.float32(0), np.float32(0)
        for i in range(rows.shape[1]):
            number = rows[r, i] * steps
            nearest = np.rint(number)
            values[r, i] = np.int8(np.int32(nearest))
            energy += number * number
            error += (number - nearest) * (number - nearest)
        signal[r], noise[r] = np.sqrt(energy), np.sqrt(error)


def encode_int8(
    rows: Floats, values: npt.NDArray[np.int8], scales: Floats, signal: Floats, noise: Floats, *, smallest: float
) -> None:
    """Encode channels; holds no lock of Python's.

    Args:
        rows: (R, n) float32, contiguous.
        values: (R, n); filled with the numbers, -127 to 127.
        scales: (R,); filled with the step, peak / 127.
        signal, noise: (R,); filled with the norms of a channel and of its error in steps; not finite where the channel is not.
        smallest: a channel's peak counts as no less.
    """
    _encode(rows, rows.view(np.int32), np.float32(smallest).view(np.int32), values, scales, signal, noise)
