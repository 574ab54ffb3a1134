"""Functions of a single code, by a table of all 256."""

import math

import numpy as np

from lowbit import fixed_point
from lowbit.kernels import requantization


def logistic(graph, node, inputs, kernel):
    """LOGISTIC: 1 / (1 + exp(-x)), to output scale 1/256 and zero point -128.

    Exact but for about 1 of 100,000 table entries, which lie on ties (float32 forms, with the C
    library's expf too, miss as many).
    """
    return _looked_up(graph, node, inputs[0], kernel, _sigmoid, _logistic_fixed_point)


def tanh(graph, node, inputs, kernel):
    """TANH, to output scale 1/128 and zero point 0; exact."""
    return _looked_up(graph, node, inputs[0], kernel, np.tanh, _tanh_fixed_point)


def gelu(graph, node, inputs, kernel):
    """GELU: x / 2 * (1 + erf(x / sqrt(2))); exact."""
    if node.attributes["approximate"]:
        raise ValueError(f"node {node.name!r}: an approximate GELU is not known")
    erf = np.vectorize(math.erf, otypes=[np.float64])
    return _looked_up(
        graph, node, inputs[0], kernel, lambda x: x / 2 * (1 + erf(x * math.sqrt(0.5)))
    )


def leaky_relu(graph, node, inputs, kernel):
    """LEAKY_RELU: x, or alpha * x below zero; exact in both flavours."""
    source, output = requantization.ends(graph, node)
    codes = requantization.centred(inputs[0], source)
    ratios = requantization.leaky_ratios(graph, node)
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


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _looked_up(graph, node, codes, kernel, function, in_fixed_point=None):
    """Returns the function of every code, by the table of 256 that the kernel makes.

    With in_fixed_point the reference kernel computes with 4 integer bits: in_fixed_point(its real
    input with 27 fractional bits) gives the result with 31; far out it is saturated.  The others
    make float32 tables, XNNPACK with ties to even.
    """
    source, output = requantization.ends(graph, node)
    every = np.arange(-128, 128, dtype=np.int64) - source.zero_point
    if kernel == "reference" and in_fixed_point is not None:
        multiplier, shift = fixed_point.quantize_multiplier(float(source.scale) * 2.0**27)
        radius = int(np.floor(15 * 2.0 ** (27 - int(shift))))
        inside = np.clip(every, -radius, radius)
        real = fixed_point.multiply_by_quantized_multiplier(inside, multiplier, shift)
        bits = 31 + int(np.rint(np.log2(output.scale)))
        centred = fixed_point.rounding_divide_by_pot(in_fixed_point(real), bits)
        low, high = (np.iinfo(np.int8).min, np.iinfo(np.int8).max)
        centred = np.where(every <= -radius, low - output.zero_point, centred)
        centred = np.where(every >= radius, high - output.zero_point, centred)
    else:
        real = (every.astype(np.float32) * source.scale).astype(np.float64)
        values = function(real).astype(np.float32) * (np.float32(1) / output.scale)
        centred = np.rint(values) if kernel == "xnnpack" else requantization.round_half_away(values)
    table = requantization.finish(centred, node, output, kernel)
    return table[codes.astype(np.int64) + 128]


def _logistic_fixed_point(a):
    """Returns 1 / (1 + exp(-a)) with 31 fractional bits of a with 27 (gemmlowp, fixedpoint.h)."""
    exponential = fixed_point.exp_on_negative_values(-np.abs(a), integer_bits=4)
    positive = np.minimum(fixed_point.two_over_one_plus(exponential) << 1, fixed_point.INT32_MAX)
    result = np.where(a > 0, positive, fixed_point.INT32_MAX - positive)
    return np.where(a == 0, 1 << 30, result)


def _tanh_fixed_point(a):
    """Returns tanh(a) with 31 fractional bits of a with 27 (gemmlowp, fixedpoint.h)."""
    # With 5 integer bits instead of 4 the same bits are twice a.
    exponential = fixed_point.exp_on_negative_values(-np.abs(a), integer_bits=5)
    magnitude = (fixed_point.two_over_one_plus(exponential) - (1 << 29)) << 2
    magnitude = np.minimum(magnitude, fixed_point.INT32_MAX)
    return np.where(a == 0, 0, np.sign(a) * magnitude)
