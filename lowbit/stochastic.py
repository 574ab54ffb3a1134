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

    def backward(upstream, parameters, low, high, x, *others):
        of_x = fakequant.as_one_loop(fakequant.pass_inside, compiled)(upstream, x, low, high)
        return of_x, *(ops.zeros_like(other) for other in others)

    inputs = (x, minimum, maximum, noise)
    return fakequant.with_gradients(backward, inputs, spec, activation, compiled, noise=True)


def noise(shape, seed_generator: keras.random.SeedGenerator):
    """Returns float32 noise of a shape, uniform in [-1/2, 1/2)."""
    return keras.random.uniform(shape, -0.5, 0.5, "float32", seed=seed_generator)
