"""Requantization arithmetic of TFLite's integer kernels: accumulators back to codes.

The real multiplier M = input_scale * weight_scale / output_scale is applied in one of two ways:

    fixed point   M = multiplier * 2^(shift - 31),  2^30 <= multiplier < 2^31   (Jacob et al., 2018)
    fp32          rint(float32(accumulator) * float32(M))                                  (XNNPACK)

Most reference kernels round the fixed-point product twice: at bit 31 with ties upwards, then at the
right shift with ties away from zero.  fp32 rounds once to 24 bits, then ties to even.  The two ways
differ by 1 in about 1 code of 1000 (231 of 228,004 outputs of random convolutions).

All functions take and return NumPy arrays, or scalars that broadcast.
"""

import numpy as np

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


def quantize_multiplier(real: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    """Returns (multiplier, shift), both int32, with real ~ multiplier * 2^(shift - 31).

    The multiplier lies in [2^30, 2^31), so the relative error is at most 2^-31.  A real below
    2^-32, and so also that of a dead channel, becomes (0, 0).

    Args:
      real: non-negative, any shape, for example (channels,).

    Raises:
      ValueError: a multiplier is negative or not finite, or 2^31 or more.
    """
    real = np.asarray(real, np.float64)
    if not np.all(np.isfinite(real)) or np.any(real < 0) or np.any(real >= 2.0**31):
        raise ValueError(f"multipliers must lie in [0, 2^31), got {real!r}")
    fraction, shift = np.frexp(real)
    multiplier = np.floor(fraction * 2.0**31 + 0.5).astype(np.int64)
    overflow = multiplier == 2**31  # fraction within 2^-32 of 1: 0.5 * 2^(shift + 1) is the same
    multiplier = np.where(overflow, 2**30, multiplier)
    shift = np.where(overflow, shift + 1, shift)
    vanishes = shift < -31
    return (
        np.where(vanishes, 0, multiplier).astype(np.int32),
        np.where(vanishes, 0, shift).astype(np.int32),
    )


def saturating_rounding_doubling_high_mul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns floor(a * b / 2^31 + 1/2) as int64: to nearest, ties upwards.

    gemmlowp adds 2^30, or 1 - 2^30 to a negative product, and divides with truncation: the same.
    Only -2^31 * -2^31 leaves the int32 range, and saturates.

    Args:
      a: integers in the int32 range.
      b: integers in the int32 range, broadcast against `a`.
    """
    product = np.asarray(a, np.int64) * np.asarray(b, np.int64)
    return np.minimum((product + 2**30) >> 31, INT32_MAX)


def rounding_divide_by_pot(x: np.ndarray, exponent: np.ndarray | int) -> np.ndarray:
    """Returns x / 2^exponent rounded to nearest, ties away from zero, as int64.

    Args:
      x: integers.
      exponent: in [0, 31], broadcast against `x`.
    """
    x = np.asarray(x, np.int64)
    exponent = np.asarray(exponent, np.int64)
    mask = (np.int64(1) << exponent) - 1
    threshold = (mask >> 1) + (x < 0)
    return (x >> exponent) + ((x & mask) > threshold)


def multiply_by_quantized_multiplier(
    x: np.ndarray, multiplier: np.ndarray, shift: np.ndarray
) -> np.ndarray:
    """Returns x * multiplier * 2^(shift - 31) as int64, rounded twice: TFLite's default.

    Args:
      x: int32 accumulators; x * 2^max(shift, 0) must stay in the int32 range, else it saturates
        here, where the kernels' own result is undefined.
      multiplier: as `quantize_multiplier` gives, broadcast against `x`.
      shift: the same.
    """
    shift = np.asarray(shift, np.int64)
    shifted = np.asarray(x, np.int64) << np.maximum(shift, 0)
    shifted = np.clip(shifted, INT32_MIN, INT32_MAX)
    product = saturating_rounding_doubling_high_mul(shifted, multiplier)
    return rounding_divide_by_pot(product, np.maximum(-shift, 0))


def multiply_by_quantized_multiplier_ties_up(
    x: np.ndarray, multiplier: np.ndarray, shift: np.ndarray
) -> np.ndarray:
    """Returns x * multiplier * 2^(shift - 31) as int64, rounded twice, ties upwards both times.

    The vector code of the optimized kernels does this (NEON's VQRDMULH and VRSHL).

    Args:
      x: int32 accumulators.
      multiplier: as `quantize_multiplier` gives, broadcast against `x`.
      shift: the same.
    """
    shift = np.asarray(shift, np.int64)
    shifted = np.clip(np.asarray(x, np.int64) << np.maximum(shift, 0), INT32_MIN, INT32_MAX)
    product = saturating_rounding_doubling_high_mul(shifted, multiplier)
    right = np.maximum(-shift, 0)
    return (product + ((np.int64(1) << right) >> 1)) >> right


def wrap32(x: np.ndarray) -> np.ndarray:
    """Returns integers as int32 arithmetic holds them, modulo 2^32, in int64."""
    return np.asarray(x, np.int64).astype(np.int32).astype(np.int64)


def to_int32(real: np.ndarray) -> np.ndarray:
    """Returns floats cast to int32 as x86 does, in int64: INT32_MIN for all that does not fit."""
    fits = (real >= INT32_MIN) & (real <= INT32_MAX)
    return np.where(fits, np.where(fits, real, 0).astype(np.int64), INT32_MIN)


def multiply_wrapping(x: np.ndarray, multiplier: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Returns x * multiplier * 2^(shift - 31) as int64, rounded twice; x * 2^shift wraps in int32.

    Arguments as `multiply_by_quantized_multiplier`, which saturates instead.
    """
    shift = np.asarray(shift, np.int64)
    shifted = wrap32(np.asarray(x, np.int64) << np.maximum(shift, 0))
    product = saturating_rounding_doubling_high_mul(shifted, multiplier)
    return rounding_divide_by_pot(product, np.maximum(-shift, 0))


def multiply_int64(x: np.ndarray, multiplier: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Returns x * multiplier * 2^(shift - 31) for int64 accumulators, in int64, wrapped to int32.

    The multiplier is first cut to 15 bits (relative error up to 2^-16), then the product is rounded
    once, ties upwards: the convolutions of int16 activations.

    Args:
      x: int64, |x| < 2^47.
      multiplier: as `quantize_multiplier` gives, broadcast against `x`.
      shift: the same, below 15.
    """
    multiplier = np.asarray(multiplier, np.int64)
    reduced = np.where(multiplier < 0x7FFF0000, (multiplier + (1 << 15)) >> 16, 0x7FFF)
    total = 15 - np.asarray(shift, np.int64)
    product = np.asarray(x, np.int64) * reduced
    return wrap32((product + (np.int64(1) << (total - 1))) >> total)


def requantize_fp32(accumulator: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Returns rint(float32(accumulator) * float32(scale)) as float32: ties to even, as XNNPACK.

    Args:
      accumulator: whole numbers, of any integer or floating type; beyond 2^24 they are rounded to
        float32 first, as the kernels' own conversion does.
      scale: broadcast against `accumulator`.
    """
    product = np.asarray(accumulator, np.float32) * np.asarray(scale, np.float32)
    return np.rint(product)


def exp_on_negative_values(a, integer_bits=5):
    """Returns exp(a) with 31 fractional bits for a <= 0 with 31 - integer_bits of them, int64.

    exp(a) = exp(r) * product of exp(-2^k) over the bits of the multiple of 1/4 taken off a, with
    r in [-1/4, 0) by a polynomial around -1/8 (gemmlowp, fixedpoint.h).
    """
    fraction = 31 - integer_bits
    quarter = 1 << (fraction - 2)
    remainder = (a & (quarter - 1)) - quarter
    result = _exp_on_last_quarter(remainder << integer_bits)
    taken_off = remainder - a
    for exponent in range(-2, integer_bits):
        factor = int(np.floor(np.exp(-(2.0**exponent)) * 2.0**31 + 0.5))
        lowered = saturating_rounding_doubling_high_mul(result, np.int64(factor))
        result = np.where(taken_off & (1 << (fraction + exponent)), lowered, result)
    return np.where(a == 0, INT32_MAX, result)


def _exp_on_last_quarter(a):
    """Returns exp(a) for a in [-1/4, 0), both with 31 fractional bits, int64."""
    multiply = saturating_rounding_doubling_high_mul
    constant = np.int64(np.floor(np.exp(-0.125) * 2.0**31 + 0.5))
    third = np.int64(715827883)  # 1/3
    x = a + (1 << 28)
    x2 = multiply(x, x)
    x3 = multiply(x2, x)
    x4 = multiply(x2, x2)
    fourth_over_4 = rounding_divide_by_pot(x4, 2)
    tail = rounding_divide_by_pot(multiply(fourth_over_4 + x3, third) + x2, 1)
    return constant + multiply(constant, x + tail)


def reciprocal(total):
    """Returns (1 / normalized total with 31 fractional bits, bits of the normalization), int64.

    Three Newton steps on 1 / (1 + x), x = 2^-unit_bits * total - 1 in [0, 1) (gemmlowp).

    Args:
      total: positive, with 19 fractional bits.
    """
    headroom = 32 - np.frexp(total.astype(np.float64))[1].astype(np.int64)
    unit_bits = 12 - headroom
    half_minus = (total << headroom) - (1 << 31)
    x = two_over_one_plus(half_minus)
    return np.minimum(x << 1, INT32_MAX), unit_bits


def two_over_one_plus(a):
    """Returns 2 / (1 + a) with 29 fractional bits for a in [0, 1) with 31: three Newton steps."""
    half_denominator = (a + INT32_MAX + 1) >> 1
    multiply = saturating_rounding_doubling_high_mul
    x = 1515870810 + multiply(half_denominator, np.int64(-1010580540))  # 48/17 - 32/17 * d
    for _ in range(3):
        step = (1 << 29) - multiply(half_denominator, x)
        x = x + (multiply(x, step) << 2)
    return x


def logistic(a):
    """Returns 1 / (1 + exp(-a)) with 31 fractional bits of a with 27, int64 (gemmlowp)."""
    positive = two_over_one_plus(exp_on_negative_values(-np.abs(a), integer_bits=4)) << 1
    positive = np.minimum(positive, INT32_MAX)
    result = np.where(a > 0, positive, INT32_MAX - positive)
    return np.where(a == 0, 1 << 30, result)


def tanh(a):
    """Returns tanh(a) with 31 fractional bits of a with 27, int64 (gemmlowp)."""
    # With 5 integer bits instead of 4 the same bits are twice a.
    exponential = exp_on_negative_values(-np.abs(a), integer_bits=5)
    magnitude = (two_over_one_plus(exponential) - (1 << 29)) << 2
    return np.sign(a) * np.minimum(magnitude, INT32_MAX)


def reciprocal_root(value):
    """Returns (multiplier with 31 fractional bits, shift to the left): 1 / sqrt(value), value >= 1.

    Five Newton steps x * (3 - d * x^2) / 2 from x = 1, d in [1/4, 1) with 28 fractional bits, and a
    factor sqrt(1/2) for the bit that d's shift leaves over (TFLite, GetInvSqrtQuantizedMultiplierExp).
    """
    if value <= 1:
        return INT32_MAX, 0

    def multiply(a, b):
        return int(saturating_rounding_doubling_high_mul(np.int64(a), np.int64(b)))

    def shifted(a, bits):
        return min(max(a << bits, -INT32_MAX - 1), INT32_MAX)

    shift = 11
    while value >= 1 << 29:
        value, shift = value // 4, shift + 1
    pairs = (31 - value.bit_length()) // 2 - 1
    value, shift = value << 2 * pairs, shift - pairs
    half = int(rounding_divide_by_pot(np.int64(value >> 1), 1))
    x, three_halves = 1 << 28, 3 << 27
    for _ in range(5):
        cubed = shifted(multiply(multiply(x, x), x), 6)
        x = shifted(multiply(three_halves, x) - multiply(half, cubed), 3)
    x = multiply(x, 1518500250)  # sqrt(1/2)
    return (x << -shift, 0) if shift < 0 else (x, -shift)
