"""THE definition of the arithmetic (NumPy): every other file is tested against this one.

    code = clip(rint(x / scale) + zero_point, lowest, highest)     whitepaper eq. 1, 2
    x'   = (code - zero_point) * scale                             whitepaper eq. 3

Everything is float32 in exactly this order of operations, so that `fakequant` (TensorFlow, JAX) gives
the same bits.  Ties round half to even, as XNNPACK does; zero is always exactly representable.
docs/numerics.md has the contract in full.
"""

import numpy as np

from lowbit import spec as spec_lib

# A channel whose scale is this much smaller than the tensor's largest is dead: batch norm's gamma
# fell to zero there.  Real MobileNet-v2 has such channels (1.2e-7 against 1e-2 elsewhere); without
# the floor their bias, at s_in * s_w, would not fit in int32 nor their multiplier in 32 bits.
SCALE_FLOOR_RATIO = np.float32(2.0**-20)
# The scale of a tensor that is zero throughout: any value is exact, and 1 keeps multipliers tame.
ZERO_RANGE_SCALE = np.float32(1.0)

# |bias| in int32 codes.  Above it the weights of the channel are lost beside its bias anyway
# (accumulators reach 2**20), float32 holds such biases to a quarter of a code, and XNNPACK's
# conversion of the accumulator to float32 (exact to 2**24) stays exact.
BIAS_LIMIT = 2**22
# In int64 codes beside 16-bit activations: the kernels shift a 48-bit accumulator, whose products
# take 2**22 for each of up to 2**17 weights.
BIAS_LIMIT_16 = 2**40
RANGE_LIMIT = 1e30

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


def integer_bounds(spec: spec_lib.QuantSpec) -> tuple[int, int]:
    """Returns the lowest and the highest code of `spec`: the table in `spec.QuantSpec`."""
    if spec.signed:
        highest = 2 ** (spec.bits - 1) - 1
        return -highest - (not spec.narrow_range), highest
    return 0, 2**spec.bits - 1 - spec.narrow_range


def scale_and_zero_point(
    minimum: np.ndarray, maximum: np.ndarray, spec: spec_lib.QuantSpec
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the scale and the zero point that cover a range, with zero exactly on a code.

    asymmetric: scale = (max(maximum, 0) - min(minimum, 0)) / (highest - lowest)
                zero_point = clip(rint(lowest - min(minimum, 0) / scale), lowest, highest)
    symmetric:  scale = max(|minimum|, |maximum|) / highest, zero_point = 0

    A range that does not hold zero is stretched to it ((2.1, 3.5) becomes (0, 3.5), whitepaper
    section 2.1).  A zero range gets scale 1; a channel's scale is at least 2**-20 of the largest.
    Scales are rounded to 16 significant bits, see `round_scale`.

    Args:
      minimum, maximum: float, any equal shape (a scalar, or one value a channel).
      spec: bits, symmetric, narrow_range, signed.

    Returns:
      scale float32 and zero_point int64, both of the shape of `minimum`.

    Raises:
      ValueError: where a bound is NaN or beyond 1e30, or minimum > maximum.
    """
    minimum, maximum = np.asarray(minimum, np.float32), np.asarray(maximum, np.float32)
    if not (np.all(np.abs(minimum) <= RANGE_LIMIT) and np.all(np.abs(maximum) <= RANGE_LIMIT)):
        raise ValueError(f"range [{minimum}, {maximum}] is not finite, or leaves +-{RANGE_LIMIT:g}")
    if (minimum > maximum).any():
        raise ValueError(f"range minimum {minimum} is above its maximum {maximum}")
    lowest, highest = integer_bounds(spec)
    # Times the reciprocal: compilers turn a division by a constant into that, one bit off.
    low, high = np.minimum(minimum, np.float32(0)), np.maximum(maximum, np.float32(0))
    if spec.symmetric:
        scale = np.maximum(-low, high) * (np.float32(1) / np.float32(highest))
    else:
        scale = (high - low) * (np.float32(1) / np.float32(highest - lowest))
    scale = round_scale(floor_scale(scale))
    if spec.symmetric:
        return scale, np.zeros(scale.shape, np.int64)
    zero_point = np.rint(np.float32(lowest) - low / scale)
    return scale, np.clip(zero_point, lowest, highest).astype(np.int64)


def floor_scale(scale: np.ndarray) -> np.ndarray:
    """Returns scale, at least 2**-20 of the largest one; all 1 where every scale is zero.

    A subnormal largest scale counts as zero: TensorFlow flushes subnormal numbers, NumPy does not.
    """
    scale = np.asarray(scale, np.float32)
    largest = np.max(scale, initial=np.float32(0))
    if largest < np.finfo(np.float32).tiny:
        return np.full_like(scale, ZERO_RANGE_SCALE)
    floor = np.maximum(largest * SCALE_FLOOR_RATIO, np.finfo(np.float32).tiny)
    return np.maximum(scale, floor)


def round_scale(scale: np.ndarray) -> np.ndarray:
    """Returns scale, float32, rounded to 16 significant bits (relative change at most 2**-16).

    (code - zero_point) * scale is then exact in float32 for 8-bit codes, so the bounds of a range
    say its scale exactly: every tool that is given bounds finds the same scale to the last bit.
    Computed on the bits (round half up on the 8 that go), because a compiler that contracts
    multiply and add would change any rounding that is written in floating point.
    """
    bits = np.ascontiguousarray(scale, np.float32).view(np.int32)
    return ((bits + 128) & -256).view(np.float32).reshape(np.shape(scale))


def along_axis(values: np.ndarray, axis: int | None, rank: int) -> np.ndarray:
    """Returns per-channel values reshaped so that they broadcast along `axis` of a `rank`-D array."""
    values = np.asarray(values)
    if axis is None:
        return values.reshape(()) if values.size == 1 else values
    shape = [1] * rank
    shape[axis] = -1
    return values.reshape(shape)


def observed_range(x: np.ndarray, axis: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the smallest and the largest value of `x`, float32: scalars, or one for each channel."""
    x = np.asarray(x, np.float32)
    if axis is None:
        return x.min(initial=np.float32(0)), x.max(initial=np.float32(0))
    others = tuple(a for a in range(x.ndim) if a != axis % x.ndim)
    return x.min(axis=others), x.max(axis=others)


def quantize(
    x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, spec: spec_lib.QuantSpec
) -> np.ndarray:
    """Returns the codes of `x`: clip(rint(x / scale) + zero_point, lowest, highest).

    Args:
      x: float, any shape.
      scale, zero_point: scalars, or one value for each index of `spec.axis`.

    Returns:
      int32, the shape of `x`.

    Raises:
      ValueError: where `x` holds NaN, which has no code (infinities saturate).
    """
    x = np.asarray(x, np.float32)
    if np.isnan(x).any():
        raise ValueError(f"{int(np.isnan(x).sum())} of {x.size} values to quantize are NaN")
    return _to_codes(np.rint(_scaled(x, scale, spec)), zero_point, x.ndim, spec)


def quantize_stochastic(
    x: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray,
    spec: spec_lib.QuantSpec,
    rng: np.random.Generator,
) -> np.ndarray:
    """Returns codes with expectation x / scale + zero_point: floor(x / scale + u), u in [0, 1).

    Whitepaper section 2.3 with its noise read as one code wide (docs/numerics.md); for training
    only.  Arguments and result as `quantize`.
    """
    x = np.asarray(x, np.float32)
    if np.isnan(x).any():
        raise ValueError(f"{int(np.isnan(x).sum())} of {x.size} values to quantize are NaN")
    noisy = np.floor(_scaled(x, scale, spec).astype(np.float64) + rng.random(x.shape))
    return _to_codes(noisy, zero_point, x.ndim, spec)


def _scaled(x, scale, spec):
    with np.errstate(over="ignore"):  # 1e38 / 1e-9 is inf, and inf saturates as it should
        return x / along_axis(np.asarray(scale, np.float32), spec.axis, x.ndim)


def _to_codes(rounded, zero_point, rank, spec):
    lowest, highest = integer_bounds(spec)
    # Clipped before the zero point is added, in float64: 1e30 + 3 must not become an int first.
    codes = rounded.astype(np.float64) + along_axis(zero_point, spec.axis, rank)
    return np.clip(codes, lowest, highest).astype(np.int32)


def dequantize(
    codes: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, axis: int | None = None
) -> np.ndarray:
    """Returns (codes - zero_point) * scale, float32, the shape of `codes`."""
    codes = np.asarray(codes)
    offset = codes.astype(np.int64) - along_axis(np.asarray(zero_point, np.int64), axis, codes.ndim)
    return offset.astype(np.float32) * along_axis(np.asarray(scale, np.float32), axis, codes.ndim)


def fake_quantize(
    x: np.ndarray, minimum: np.ndarray, maximum: np.ndarray, spec: spec_lib.QuantSpec
) -> np.ndarray:
    """Returns dequantize(quantize(x)) for the range [minimum, maximum]; float32, shape of `x`."""
    scale, zero_point = scale_and_zero_point(minimum, maximum, spec)
    return dequantize(quantize(x, scale, zero_point, spec), scale, zero_point, spec.axis)


def quantize_input(x: np.ndarray, scale: float, zero_point: int, dtype: str) -> np.ndarray:
    """Returns the codes of a model input; the one function that every runtime, test and tool uses.

    One rule for all matters: with x / 127.5 - 1 and scale 1 / 127.5 every pixel is a tie, and half
    to even leaves 215 codes where floor(x + 0.5) leaves 255; one code at the input moves hundreds
    of logits.

    Args:
      x: float32 (n, ...), normalized as the model was trained.
      scale, zero_point: of the input tensor.
      dtype: "int8", "uint8" or "int16": the input tensor's.

    Returns:
      Codes of `dtype`, the shape of `x`.
    """
    info = np.iinfo(dtype)
    spec = spec_lib.QuantSpec(bits=info.bits, signed=info.min < 0)
    return quantize(x, np.float32(scale), np.int64(zero_point), spec).astype(dtype)


def quantize_bias(
    bias: np.ndarray, input_scale: np.float32, weight_scale: np.ndarray, dtype: str = "int32"
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the codes of a bias at scale s_in * s_w[c], zero point 0 (Jacob et al., eq. 11).

    Args:
      bias: float (channels,).
      input_scale: of the activation that the weights multiply.
      weight_scale: float32 (channels,), or (1,) for per-tensor weights.
      dtype: "int32", or "int64" beside int16 activations.

    Returns:
      codes of `dtype` (channels,) and their scale float32, the shape of `weight_scale`.

    Raises:
      ValueError: where a code leaves `dtype`; `minimum_weight_scale` prevents it.
    """
    scale = np.float64(input_scale) * np.asarray(weight_scale, np.float64)
    codes = np.rint(np.asarray(bias, np.float64) / scale)
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    if (codes < low).any() or (codes > high).any():
        channel = int(np.abs(codes).argmax())
        raise ValueError(
            f"bias {float(np.ravel(bias)[channel])} of channel {channel} needs code "
            f"{codes[channel]:.4g} at scale {float(np.ravel(scale)[channel % scale.size])}; "
            f"{dtype} holds {low} to {high}"
        )
    return codes.astype(dtype), scale.astype(np.float32)


def bias_limit(input_bits: int) -> int:
    """Returns how many codes a bias may have beside activations of so many bits."""
    return BIAS_LIMIT if input_bits <= 8 else BIAS_LIMIT_16


def minimum_weight_scale(
    bias: np.ndarray, input_scale: np.float32, input_bits: int = 8
) -> np.ndarray:
    """Returns the smallest weight scales at which |bias| <= `bias_limit` codes, float32 (channels,)."""
    limit = np.float32(input_scale) * np.float32(bias_limit(input_bits))
    return round_scale(np.abs(np.asarray(bias, np.float32)) / limit)


def sqnr_db(reference: np.ndarray, approximation: np.ndarray) -> float:
    """Returns 10 log10(sum reference^2 / sum (reference - approximation)^2), whitepaper appendix A."""
    reference = np.asarray(reference, np.float64)
    noise = np.square(reference - np.asarray(approximation, np.float64)).sum()
    signal = np.square(reference).sum()
    if noise == 0:
        return float("inf")
    return float(10 * np.log10(signal / noise)) if signal else float("-inf")
