"""Stochastic quantization: rounding whose expectation is x (whitepaper section 2.3); training only.

    y = (clip(rint(x / scale + noise) + zero_point, code_low, code_high) - zero_point) * scale

with noise uniform in [-1/2, 1/2): inside the range the expectation of y is x.  The paper's noise is
a uniform number in front of its own rounding; read as one code wide it is this (docs/numerics.md).
`affine.quantize_stochastic` is the same in NumPy.  Gradient: `fakequant`'s, and none for the range.
"""

import keras
from keras import ops

from lowbit import fakequant
from lowbit import spec as spec_lib


def fake_quantize(
    x,
    minimum,
    maximum,
    spec: spec_lib.QuantSpec,
    activation: str | None = None,
    noise=0.0,
    compiled: bool = False,
):
    """Returns x with noise quantized to the range and back.

    Args:
      x: float32, any shape; channels on its last axis where `spec.axis` is set.
      minimum, maximum: float32: scalars, or (channels,).
      spec: bits, symmetric, narrow_range, signed; `axis` None or the last axis.
      activation: None, "relu" or "relu6", applied before the quantization.
      noise: float32 in [-1/2, 1/2), x's shape (see `noise`), in codes; 0 is
        `fakequant.fake_quantize` to the last bit.
      compiled: as in `fakequant.fake_quantize`.

    Returns:
      float32, the shape of `x`.
    """

    @ops.custom_gradient
    def quantize_and_back(x, minimum, maximum, noise):
        parameters = fakequant.quantization(minimum, maximum, spec, activation)
        scale, zero_point, code_low, code_high = parameters

        def gradient(*arguments, upstream=None):
            upstream = fakequant.upstream_of(arguments, upstream)
            low, high = (code_low - zero_point) * scale, (code_high - zero_point) * scale
            of_x = fakequant.as_one_loop(fakequant.pass_inside, compiled)(upstream, x, low, high)
            return of_x, *(ops.zeros_like(other) for other in (minimum, maximum, noise))

        return fakequant.as_one_loop(_forward, compiled)(x, noise, *parameters), gradient

    arguments = (x, minimum, maximum, noise)
    return quantize_and_back(*(ops.convert_to_tensor(each, "float32") for each in arguments))


def _forward(x, noise, scale, zero_point, code_low, code_high):
    codes = ops.clip(ops.round(x / scale + noise) + zero_point, code_low, code_high)
    return (codes - zero_point) * scale


def noise(shape, seed_generator: keras.random.SeedGenerator):
    """Returns float32 noise of a shape, uniform in [-1/2, 1/2)."""
    return keras.random.uniform(shape, -0.5, 0.5, "float32", seed=seed_generator)
