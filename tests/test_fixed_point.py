"""Fixed-point arithmetic against Python's unbounded integers and fractions."""

import fractions
import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from lowbit import fixed_point

INT32 = st.integers(fixed_point.INT32_MIN, fixed_point.INT32_MAX)
ACCUMULATORS = st.integers(-(2**26), 2**26)
MULTIPLIERS = st.integers(2**30, 2**31 - 1)
REALS = st.floats(2.0**-31, 2.0**8, allow_nan=False)


def half_up(value: fractions.Fraction) -> int:
    return math.floor(value + fractions.Fraction(1, 2))


def half_away(value: fractions.Fraction) -> int:
    return int(math.copysign(half_up(abs(value)), value))


def expected_product(x, multiplier, shift, first, second):
    """Rounds x * 2^max(shift, 0) * multiplier / 2^31, then divides by 2^max(-shift, 0)."""
    product = first(fractions.Fraction(x * 2 ** max(shift, 0) * multiplier, 2**31))
    return second(fractions.Fraction(product, 2 ** max(-shift, 0)))


@hypothesis.given(REALS)
def test_quantize_multiplier_is_within_half_a_unit(real):
    multiplier, shift = map(int, fixed_point.quantize_multiplier(real))
    assert 2**30 <= multiplier < 2**31
    quantized = fractions.Fraction(multiplier) * fractions.Fraction(2) ** (shift - 31)
    unit = fractions.Fraction(2) ** (shift - 31)
    assert abs(quantized - fractions.Fraction(real)) <= unit / 2


@pytest.mark.parametrize(
    "real, expected",
    [
        (0.5, (2**30, 0)),
        (1.0, (2**30, 1)),
        (255.0, (255 * 2**23, 8)),
        (np.nextafter(1.0, 0.0), (2**30, 1)),  # rounds up to 2^31, and so to the next power
        (2.0**-32, (2**30, -31)),
        (np.nextafter(2.0**-33, 0.0), (0, 0)),
        (0.0, (0, 0)),
    ],
)
def test_quantize_multiplier_at_edges(real, expected):
    assert tuple(map(int, fixed_point.quantize_multiplier(real))) == expected


def test_quantize_multiplier_takes_channels():
    reals = np.array([0.75, 0.001, 0.0, 3.0])
    multipliers, shifts = fixed_point.quantize_multiplier(reals)
    assert multipliers.dtype == shifts.dtype == np.int32
    for real, multiplier, shift in zip(reals, multipliers, shifts, strict=True):
        assert (multiplier, shift) == tuple(map(int, fixed_point.quantize_multiplier(real)))


@pytest.mark.parametrize("real", [-1e-3, np.nan, np.inf, 2.0**31])
def test_quantize_multiplier_refuses(real):
    with pytest.raises(ValueError, match=r"must lie in \[0, 2\^31\)"):
        fixed_point.quantize_multiplier(np.array([0.5, real]))


@hypothesis.given(INT32, INT32)
@hypothesis.example(fixed_point.INT32_MIN, fixed_point.INT32_MIN)
@hypothesis.example(-3, 2**30)
@hypothesis.example(3, 2**30)
def test_saturating_rounding_doubling_high_mul(a, b):
    expected = min(half_up(fractions.Fraction(a * b, 2**31)), fixed_point.INT32_MAX)
    assert fixed_point.saturating_rounding_doubling_high_mul(a, b) == expected


@hypothesis.given(INT32, st.integers(0, 31))
@hypothesis.example(-12, 3)  # Jacob et al., appendix B: -1.5 must become -2
@hypothesis.example(12, 3)
def test_rounding_divide_by_pot(x, exponent):
    expected = half_away(fractions.Fraction(x, 2**exponent))
    assert fixed_point.rounding_divide_by_pot(x, exponent) == expected


@hypothesis.given(ACCUMULATORS, MULTIPLIERS, st.integers(-31, 4))
@hypothesis.example(-69, 2**30, 0)
def test_multiply_by_quantized_multiplier(x, multiplier, shift):
    expected = expected_product(x, multiplier, shift, half_up, half_away)
    assert fixed_point.multiply_by_quantized_multiplier(x, multiplier, shift) == expected


@hypothesis.given(ACCUMULATORS, MULTIPLIERS, st.integers(-31, 4))
@hypothesis.example(-3, 2**30, -1)
def test_ties_up(x, multiplier, shift):
    expected = expected_product(x, multiplier, shift, half_up, half_up)
    assert fixed_point.multiply_by_quantized_multiplier_ties_up(x, multiplier, shift) == expected


def test_left_shift_saturates():
    result = fixed_point.multiply_by_quantized_multiplier([2**30, -(2**30)], 2**30, 4)
    np.testing.assert_array_equal(result, [2**30, -(2**30)])


def test_vectors_equal_scalars():
    rng = np.random.default_rng(0)
    x = rng.integers(-(2**24), 2**24, (50, 7))
    multiplier, shift = fixed_point.quantize_multiplier(rng.uniform(1e-6, 3.0, 7))
    for multiply in (
        fixed_point.multiply_by_quantized_multiplier,
        fixed_point.multiply_by_quantized_multiplier_ties_up,
    ):
        for channel in range(7):
            np.testing.assert_array_equal(
                multiply(x, multiplier, shift)[:, channel],
                multiply(x[:, channel], multiplier[channel], shift[channel]),
            )


@pytest.mark.parametrize(
    "accumulator, scale, expected",
    [(5, 0.5, 2.0), (7, 0.5, 4.0), (-5, 0.5, -2.0), (2**24 + 1, 1.0, 2.0**24), (10, 0.1, 1.0)],
)
def test_requantize_fp32(accumulator, scale, expected):
    result = fixed_point.requantize_fp32(np.array([accumulator]), np.float32(scale))
    assert result.dtype == np.float32 and result.tolist() == [expected]


@hypothesis.given(st.integers(1, 2**31 - 1))
@hypothesis.example(1)
@hypothesis.example(2**27)
def test_reciprocal_root(value):
    multiplier, shift = fixed_point.reciprocal_root(value)
    found = multiplier * 2.0 ** (shift - 31)
    # Five Newton steps from 1 leave the ends of [1/4, 1) off by 2e-4 of themselves, or less.
    assert abs(found * np.sqrt(value) - 1) < 3e-4
