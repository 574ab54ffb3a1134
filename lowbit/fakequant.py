"""Simulated quantization in `keras.ops`: the arithmetic of `affine`, bit for bit, with gradients.

Forward (whitepaper eq. 1-3, an activation function fused as the kernels fuse it, by clamping codes):

    y = (clip(rint(x / scale) + zero_point, code_low, code_high) - zero_point) * scale

Gradient: straight-through with clipping (whitepaper eq. 14, 15), and none for the range:

    dL/dx = dL/dy where low <= x <= high, else 0              low  = (code_low - zero_point) * scale
                                                              high = (code_high - zero_point) * scale

The same forward with gradients for the range: `pact`, `lsq`, `dsq`; with noise: `stochastic`.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence

import keras
import numpy as np
from keras import ops

from lowbit import affine
from lowbit import spec as spec_lib

ACTIVATIONS = (None, "relu", "relu6", "unit")  # unit: clipped at 0 and 1
_HIGHEST = {"relu6": 6.0, "unit": 1.0}

_TINY = 1.1754943508222875e-38  # smallest normal float32
_FLOOR_RATIO = float(affine.SCALE_FLOOR_RATIO)


def scale_and_zero_point(minimum, maximum, spec: spec_lib.QuantSpec):
    """Returns float32 (scale, zero_point), the same bits as `affine.scale_and_zero_point`.

    Args:
      minimum, maximum: float32 tensors of equal shape: scalars, or one value a channel.
    """
    return _traced(_scale_and_zero_point, spec)(minimum, maximum)


def _scale_and_zero_point(minimum, maximum, spec):
    lowest, highest = affine.integer_bounds(spec)
    low, high = ops.minimum(minimum, 0.0), ops.maximum(maximum, 0.0)
    if spec.symmetric:
        scale = ops.maximum(-low, high) * float(np.float32(1) / np.float32(highest))
    else:
        scale = (high - low) * float(np.float32(1) / np.float32(highest - lowest))
    largest = ops.max(scale)
    floor = ops.maximum(largest * _FLOOR_RATIO, _TINY)
    zero_scale = float(affine.ZERO_RANGE_SCALE)
    scale = round_scale(ops.where(largest < _TINY, zero_scale, ops.maximum(scale, floor)))
    if spec.symmetric:
        return scale, ops.zeros_like(scale)
    return scale, ops.clip(ops.round(float(lowest) - low / scale), lowest, highest)


def round_scale(scale):
    """Returns scale rounded to 16 significant bits: `affine.round_scale`."""
    bits = ops.view(ops.convert_to_tensor(scale, "float32"), "int32")
    return ops.view(ops.bitwise_and(bits + 128, -256), "float32")


def activation_codes(activation: str | None, scale, zero_point, spec: spec_lib.QuantSpec):
    """Returns the lowest and highest code, float32 scalars, that a fused activation leaves."""
    lowest, highest = (float(bound) for bound in affine.integer_bounds(spec))
    code_low, code_high = ops.full_like(scale, lowest), ops.full_like(scale, highest)
    if activation is not None:
        code_low = ops.maximum(code_low, zero_point)
    if activation in _HIGHEST:
        # As XNNPACK clamps: the sum is rounded, which differs where 6 / scale ends in .5.
        highest_code = ops.round(_HIGHEST[activation] / scale + zero_point)
        code_high = ops.minimum(code_high, highest_code)
    return code_low, code_high


def apply_activation(x, activation: str | None):
    """Returns the activation function of x in float; raises ValueError for an unknown name."""
    if activation is None:
        return x
    if activation == "relu":
        return ops.relu(x)
    if activation == "relu6":
        return ops.relu6(x)
    if activation == "unit":
        return ops.clip(x, 0.0, 1.0)
    raise ValueError(f"activation {activation!r} is not one of {ACTIVATIONS}")


def fake_quantize(
    x,
    minimum,
    maximum,
    spec: spec_lib.QuantSpec,
    activation: str | None = None,
    compiled: bool = False,
):
    """Returns x quantized to the range and back; the formulas are at the top of this file.

    Args:
      x: float32, any shape; channels on its last axis where `spec.axis` is set.
      minimum, maximum: float32: scalars, or (channels,).
      spec: bits, symmetric, narrow_range, signed; `axis` None or the last axis.
      activation: one of ACTIVATIONS, applied before the quantization.
      compiled: True runs forward and backward each as one XLA loop on the TensorFlow backend: 2 ms
        for 2.7 million values on 2 cores, op by op 5 ms.  The result is the same to the last bit.

    Returns:
      float32, the shape of `x`.
    """
    parameters = quantization(minimum, maximum, spec, activation)
    return straight_through(x, *parameters, compiled=compiled)


def quantization(minimum, maximum, spec: spec_lib.QuantSpec, activation: str | None = None):
    """Returns float32 (scale, zero_point, code_low, code_high), each of the shape of `minimum`."""
    return _traced(_quantization, spec, activation)(minimum, maximum)


def _quantization(minimum, maximum, spec, activation):
    scale, zero_point = _scale_and_zero_point(minimum, maximum, spec)
    return scale, zero_point, *activation_codes(activation, scale, zero_point, spec)


def fake_quantize_weights(kernel, scale, zero_point, spec: spec_lib.QuantSpec):
    """Returns weights quantized and back with a given scale; forward and gradient as above.

    Args:
      kernel: float32, output channels on the last axis.
      scale, zero_point: float32 scalars, or (channels,).
    """
    code_low, code_high = activation_codes(None, scale, zero_point, spec)
    return straight_through(kernel, scale, zero_point, code_low, code_high)


def fake_quantize_average(x, minimum, maximum, spec: spec_lib.QuantSpec):
    """Returns means of quantized values rounded to codes and back, ties away from zero.

    TFLite's AVERAGE_POOL_2D divides a sum of codes by their number n, (sum + n/2) / n, and ties are
    7% of its results.  The mean of floats is a little off the tie; means are 1/n apart, so 1e-4
    finds it for every n below 5,000.  Gradient: straight through.
    """
    scale, zero_point = scale_and_zero_point(minimum, maximum, spec)
    lowest, highest = affine.integer_bounds(spec)

    @ops.custom_gradient
    def round_and_back(x):
        code = x / scale + zero_point
        rounded = ops.sign(code) * ops.floor(ops.abs(code) + 0.5001)
        y = (ops.clip(rounded, lowest, highest) - zero_point) * scale
        return y, lambda *arguments, upstream=None: upstream_of(arguments, upstream)

    return round_and_back(x)


def straight_through(x, scale, zero_point, code_low, code_high, compiled: bool = False):
    """Returns x to codes and back, with the gradient at the top of this file."""
    low, high = (code_low - zero_point) * scale, (code_high - zero_point) * scale

    @ops.custom_gradient
    def quantize_and_back(x):
        def gradient(*arguments, upstream=None):
            upstream = upstream_of(arguments, upstream)
            return as_one_loop(pass_inside, compiled)(upstream, x, low, high)

        return as_one_loop(forward, compiled)(x, scale, zero_point, code_low, code_high), gradient

    return quantize_and_back(x)


def with_gradients(
    backward: Callable,
    inputs: Sequence,
    spec: spec_lib.QuantSpec,
    activation: str | None = None,
    compiled: bool = False,
    noise: bool = False,
):
    """Returns x quantized to a range and back, with a quantizer's own gradients.

    Args:
      backward: (upstream, parameters, low, high, *inputs) gives the gradient of each input; the
        parameters are `quantization`'s, low and high as at the top of this file.
      inputs: x, minimum, maximum, and what else has a gradient; float32.
      spec, activation, compiled: as in `fake_quantize`.
      noise: True adds the last input to the codes before they are rounded.
    """

    @ops.custom_gradient
    def quantize_and_back(*inputs):
        x, minimum, maximum = inputs[:3]
        # In here, because JAX refuses a custom gradient that encloses a value with a gradient.
        parameters = quantization(minimum, maximum, spec, activation)
        scale, zero_point, code_low, code_high = parameters

        def gradient(*arguments, upstream=None):
            upstream = upstream_of(arguments, upstream)
            low, high = (code_low - zero_point) * scale, (code_high - zero_point) * scale
            return backward(upstream, parameters, low, high, *inputs)

        if noise:
            return as_one_loop(_forward_with_noise, compiled)(x, inputs[-1], *parameters), gradient
        return as_one_loop(forward, compiled)(x, *parameters), gradient

    return quantize_and_back(*(ops.cast(each, "float32") for each in inputs))


def forward(x, scale, zero_point, code_low, code_high):
    """Returns x to codes and back: the one forward of every quantizer here, without a gradient."""
    codes = ops.clip(ops.round(x / scale) + zero_point, code_low, code_high)
    return (codes - zero_point) * scale


def _forward_with_noise(x, noise, scale, zero_point, code_low, code_high):
    codes = ops.clip(ops.round(x / scale + noise) + zero_point, code_low, code_high)
    return (codes - zero_point) * scale


def pass_inside(upstream, x, low, high):
    """Returns upstream where low <= x <= high, else 0."""
    return ops.where(ops.logical_and(x >= low, x <= high), upstream, ops.zeros_like(upstream))


def upstream_of(arguments, upstream):
    """Returns dL/dy, which the backends hand to a gradient function in different ways."""
    return arguments[0] if upstream is None else upstream


def sum_to(values, like):
    """Returns values summed to the shape of `like`: to a scalar, or to the last axis."""
    if len(like.shape) == 0:
        return ops.sum(values)
    return ops.sum(values, axis=tuple(range(len(values.shape) - 1)))


def as_one_loop(function, compiled: bool = True):
    """Returns function run as one XLA loop where `compiled`; itself otherwise, and on JAX."""
    return _compiled(function) if compiled else function


@contextlib.contextmanager
def without_retracing_warnings():
    """Silences TensorFlow's advice while layers run one by one: each has a shape of its own."""
    logger = logging.getLogger("tensorflow")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


if keras.config.backend() == "tensorflow":
    import tensorflow as tf

    @functools.cache
    def _traced(function, *settings):
        """Returns function(minimum, maximum, *settings) as one operation of the caller's graph.

        A MobileNet-v2 asks for 380 scales of 25 small operations each; traced one by one they took
        15 of the 33 seconds until the first batch.
        """
        return tf.function(
            lambda minimum, maximum: function(minimum, maximum, *settings), autograph=False
        )

    @functools.cache
    def _compiled(function):
        return tf.function(function, jit_compile=True, autograph=False)

else:  # JAX compiles the whole step

    def _traced(function, *settings):
        return lambda minimum, maximum: function(minimum, maximum, *settings)

    def _compiled(function):
        return function
