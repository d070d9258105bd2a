import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cache import decode, encode


def maps(seed: int, magnitude: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(2, 5, 1, 1, generator=generator) * 10
    return torch.randn(2, 5, 7, 9, generator=generator) * spread * magnitude


@given(st.integers(0, 2**31), st.sampled_from([1e-6, 1e-2, 1.0, 1e3]))
def test_int8_is_off_by_at_most_half_a_step(seed: int, magnitude: float) -> None:
    original = maps(seed, magnitude)
    stored = encode(original, "int8")
    assert stored.values.dtype == torch.int8
    assert stored.scales is not None
    error = (decode(stored.values, stored.scales) - original).abs()
    step = original.abs().amax(dim=(2, 3), keepdim=True) / 127
    assert (error <= step * 0.5001 + 1e-12).all()


def test_the_recorded_error_is_the_real_one() -> None:
    original = maps(3)
    for precision in ("int8", "float16"):
        stored = encode(original, precision)
        restored = decode(stored.values, stored.scales)
        noise = (restored - original).double().square().sum(dim=(1, 2, 3))
        expected = 10 * torch.log10(original.double().square().sum(dim=(1, 2, 3)) / noise)
        torch.testing.assert_close(stored.snr.double(), expected, rtol=1e-5, atol=1e-4)


def test_a_channel_of_zeros_stays_zero_and_loses_nothing() -> None:
    original = torch.zeros(1, 3, 4, 4)
    stored = encode(original, "int8")
    assert torch.equal(decode(stored.values, stored.scales), original)
    assert stored.finite.all()
    assert torch.isinf(stored.snr).all()


@pytest.mark.parametrize("precision", ["int8", "float16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_value_marks_its_image_and_no_other(precision: str, value: float) -> None:
    original = maps(1)
    original[1, 2, 3, 4] = value
    assert encode(original, precision).finite.tolist() == [True, False]


def test_overflow_of_float16_is_not_finite() -> None:
    assert encode(torch.full((1, 1, 2, 2), 1e6), "float16").finite.tolist() == [False]
    assert encode(torch.full((1, 1, 2, 2), 1e6), "int8").finite.tolist() == [True]
