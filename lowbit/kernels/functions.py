"""Functions of a single code, by a table of all 256."""

import functools
import math

import numpy as np

from lowbit import fixed_point
from lowbit.kernels import c_library, requantization


def logistic(graph, node, inputs, kernel):
    """LOGISTIC: 1 / (1 + exp(-x)), to output scale 1/256 and zero point -128.

    XNNPACK's is rounded to float32 from a longer one, micro is fixed point, the others float32.
    """
    if kernel == "micro":
        return _looked_up_fixed_point(graph, node, inputs[0], kernel, fixed_point.logistic)

    def sigmoid(x):
        if kernel == "xnnpack":
            far = np.clip(x.astype(np.float64), -100, 100)  # where it is 0 or 1, as in the kernel
            return (1 / (1 + np.exp(-far))).astype(np.float32)
        return np.float32(1) / (np.float32(1) + c_library.float32("exp", -x))

    return _looked_up(graph, node, inputs[0], kernel, sigmoid)


def tanh(graph, node, inputs, kernel):
    """TANH, to output scale 1/128 and zero point 0; micro is fixed point, the others float32."""
    if kernel == "micro":
        return _looked_up_fixed_point(graph, node, inputs[0], kernel, fixed_point.tanh)
    return _looked_up(graph, node, inputs[0], kernel, functools.partial(c_library.float32, "tanh"))


def gelu(graph, node, inputs, kernel):
    """GELU: x / 2 * erfc(-x / sqrt(2)), which is x / 2 * (1 + erf(x / sqrt(2)))."""
    if node.attributes["approximate"]:
        raise ValueError(f"node {node.name!r}: an approximate GELU is not known")
    half, root = np.float32(0.5), np.float32(-math.sqrt(0.5))
    return _looked_up(
        graph, node, inputs[0], kernel, lambda x: half * x * c_library.float32("erfc", x * root)
    )


def leaky_relu(graph, node, inputs, kernel):
    """LEAKY_RELU: x, or alpha * x below zero; exact in all flavours."""
    source, output = requantization.ends(graph, node)
    codes = requantization.centred(inputs[0], source)
    ratios = requantization.leaky_ratios(
        graph, node, np.float64 if kernel == "micro" else np.float32
    )
    if kernel == "xnnpack":
        above, below = (int(np.rint(np.float32(256) * ratio)) for ratio in ratios)
        scaled = codes * np.where(codes >= 0, above, below)
        return requantization.finish((scaled + 128) >> 8, node, output, kernel)
    above, below = (
        fixed_point.multiply_by_quantized_multiplier(
            codes, *fixed_point.quantize_multiplier(float(ratio))
        )
        for ratio in ratios
    )
    return requantization.finish(np.where(codes >= 0, above, below), node, output, kernel)


def elu(graph, node, inputs, kernel):
    """ELU: x, or exp(x) - 1 below zero, with micro's 1 taken off in float32; not in the others."""

    def function(x):
        below = np.minimum(x, np.float32(0))
        if kernel == "micro":
            below = c_library.float32("exp", below) - np.float32(1)
        else:
            below = np.expm1(below.astype(np.float64)).astype(np.float32)
        return np.where(x > 0, x, below)

    return _looked_up(graph, node, inputs[0], kernel, function)


def rsqrt(graph, node, inputs, kernel):
    """RSQRT: 1 / sqrt(x) in fixed point; of 0 the largest code; the same in all kernels."""
    source, output = requantization.ends(graph, node)
    requantization.check_not_negative(node, inputs[0], source)
    values = inputs[0].astype(np.int64) - source.zero_point
    real = 1 / (math.sqrt(float(source.scale)) * float(output.scale))
    multiplier, shift = fixed_point.quantize_multiplier(real)
    places = np.arange(1, max(int(values.max(initial=0)), 1) + 1)
    roots = np.array([fixed_point.reciprocal_root(int(place)) for place in places])
    # With 20 fractional bits, as the kernel keeps them between its two roundings.
    scaled = fixed_point.multiply_by_quantized_multiplier(
        np.int64(1), roots[:, 0], roots[:, 1] + 20
    )
    centred = fixed_point.multiply_by_quantized_multiplier(scaled, multiplier, shift - 20)
    largest = np.iinfo(output.dtype).max - output.zero_point
    table = requantization.finish(np.array([largest, *centred]), node, output, kernel)
    return table[values]


def prelu(graph, node, inputs, kernel):
    """PRELU: x, or alpha * x below zero with a factor for each channel; the same in all kernels."""
    source, alpha, output = requantization.tensors(graph, node, *node.inputs, node.outputs[0])
    codes = requantization.centred(inputs[0], source)
    products = codes * requantization.centred(inputs[1], alpha)
    ratio = float(source.scale) / float(output.scale)
    above, below = (
        fixed_point.multiply_by_quantized_multiplier(x, *fixed_point.quantize_multiplier(real))
        for x, real in ((codes, ratio), (products, ratio * float(alpha.scale)))
    )
    return requantization.finish(np.where(codes >= 0, above, below), node, output, kernel)


def _looked_up(graph, node, codes, kernel, function):
    """Returns the function of every code, by the table of 256 that the kernel makes in float32.

    built-in  round(f(x) * (1 / scale)) + zero point, ties away from zero
    XNNPACK   rint(f(x) * (1 / scale) + zero point): the sum is rounded to float32 first, which makes
              ties of what lies within 4e-6 of one
    """
    source, output = requantization.ends(graph, node)
    every = np.arange(-128, 128, dtype=np.int64) - source.zero_point
    values = function(every.astype(np.float32) * source.scale) * (np.float32(1) / output.scale)
    if kernel == "xnnpack":
        centred = np.rint(values + np.float32(output.zero_point)) - output.zero_point
    else:
        centred = requantization.round_half_away(values)
    table = requantization.finish(centred, node, output, kernel)
    return table[codes.astype(np.int64) + 128]


def _looked_up_fixed_point(graph, node, codes, kernel, function):
    """Returns the function of every code, computed in fixed point (micro).

    Args:
      function: real input with 27 fractional bits -> result with 31; beyond 15 it is saturated.
    """
    source, output = requantization.ends(graph, node)
    every = np.arange(-128, 128, dtype=np.int64) - source.zero_point
    multiplier, shift = fixed_point.quantize_multiplier(float(source.scale) * 2.0**27)
    radius = int(np.floor(15 * 2.0 ** (27 - int(shift))))
    real = fixed_point.multiply_by_quantized_multiplier(
        np.clip(every, -radius, radius), multiplier, shift
    )
    bits = 31 + int(np.rint(np.log2(output.scale)))
    centred = fixed_point.rounding_divide_by_pot(function(real), bits)
    centred = np.where(np.abs(every) < radius, centred, np.sign(every) * 256)
    table = requantization.finish(centred, node, output, kernel)
    return table[codes.astype(np.int64) + 128]
