"""Operations on int16 codes whose arithmetic is not that of int8, and QUANTIZE to and from them.

Activations have zero point 0.  Two kernels exist, "reference" (BUILTIN_REF) and "builtin" (the default
interpreter: its XNNPACK delegate takes no int16 node).  ADD, LOGISTIC, TANH and QUANTIZE from float32
differ between the two.  The others: a 31-bit multiplier, two roundings, in int32 arithmetic that wraps.
"""

import itertools
import math

import numpy as np

from lowbit import fixed_point
from lowbit.kernels import elementwise, int16_tables, requantization


def _signed_multiplier(real):
    """Returns (multiplier, shift) of a real that may be negative."""
    multiplier, shift = fixed_point.quantize_multiplier(abs(real))
    return int(math.copysign(1, real)) * np.int64(multiplier), shift


def _clamped(centred, node, output):
    low, high = requantization.clamp_range(node, output, "builtin")
    return np.clip(centred, low, high).astype(output.dtype)


def add(graph, node, inputs, kernel):
    """ADD: both inputs * 2^15, three 31-bit multipliers; see `_add_or_subtract`."""
    return _add_or_subtract(graph, node, inputs, kernel, 1)


def subtract(graph, node, inputs, kernel):
    """SUB: as ADD with the second input's sign changed."""
    return _add_or_subtract(graph, node, inputs, kernel, -1)


def _add_or_subtract(graph, node, inputs, kernel, sign):
    """Returns codes of ADD or SUB.

    x_i * 2^15 * (s_i / (2 * larger)), summed in int32, times 2 * larger / (2^15 * s_out); every
    product is rounded twice.  The vectors of the built-in ADD round the first two once instead:
    their shifts are joined, x_i * 2^(15 + shift_i) * multiplier_i.

    The file must say pot_scale_int16 = False: else scales that are powers of two are refused, or run
    another kernel, or abort the process.

    Raises:
      ValueError: an input scale is 2^14 or more times the output's, where the kernels abort.
    """
    first, second = (graph.tensors[name] for name in node.inputs)
    output = graph.tensors[node.outputs[0]]
    a, b = elementwise.aligned(graph, node, [x.astype(np.int64) for x in inputs])
    twice_larger = 2.0 * max(float(first.scale), float(second.scale))
    real = twice_larger / (2.0**15 * float(output.scale))
    if real >= 1:
        raise ValueError(
            f"node {node.name!r}: the larger input scale / output scale must be below 2^14, "
            f"got {real * 2**14:.6g}"
        )
    out = fixed_point.quantize_multiplier(real)
    factors = [
        fixed_point.quantize_multiplier(float(t.scale) / twice_larger) for t in (first, second)
    ]
    scaled = [
        fixed_point.multiply_wrapping(x << 15, *factor)
        for x, factor in zip((a, b), factors, strict=True)
    ]
    total = fixed_point.multiply_wrapping(scaled[0] + sign * scaled[1], *out)
    if kernel == "builtin" and node.op == "ADD" and _vectors(graph, node):
        joined = []
        for x, (multiplier, shift) in zip((a, b), factors, strict=True):
            left = 15 + int(shift)
            shifted = fixed_point.wrap32(x << left) if left >= 0 else x >> -left
            joined.append(fixed_point.saturating_rounding_doubling_high_mul(shifted, multiplier))
        fast = fixed_point.multiply_wrapping(joined[0] + joined[1], *out)
        total = requantization.in_vectors(fast, total, 16)
    return _clamped(total, node, output)


def _vectors(graph, node):
    """Whether the built-in kernel runs its vectors: the same shapes but for leading axes of 1."""
    first, second = (
        tuple(itertools.dropwhile(lambda size: size == 1, graph.tensors[name].shape))
        for name in node.inputs
    )
    return first == second


def multiply(graph, node, inputs, kernel):
    """MUL: a * b in int32, 31-bit multiplier, rounded twice; the same in both."""
    first, second = (graph.tensors[name] for name in node.inputs)
    output = graph.tensors[node.outputs[0]]
    a, b = elementwise.aligned(graph, node, [x.astype(np.int64) for x in inputs])
    real = first.scale * second.scale / output.scale
    centred = fixed_point.multiply_wrapping(a * b, *fixed_point.quantize_multiplier(float(real)))
    return _clamped(centred, node, output)


def relu(graph, node, inputs, kernel):
    """RELU, RELU6: 31-bit multiplier of float32 s_in / s_out, rounded twice, clamped; same in both."""
    source, output = requantization.ends(graph, node)
    real = fixed_point.quantize_multiplier(float(source.scale / output.scale))
    return _clamped(fixed_point.multiply_wrapping(inputs[0], *real), node, output)


def leaky_relu(graph, node, inputs, kernel):
    """LEAKY_RELU: x or x * alpha, 31-bit multipliers of float32 ratios, rounded twice; same in both."""
    source, output = requantization.ends(graph, node)
    alpha = np.float32(node.attributes["alpha"])
    codes = inputs[0].astype(np.int64)
    above, below = (
        fixed_point.multiply_wrapping(codes, *_signed_multiplier(float(real)))
        for real in (source.scale / output.scale, source.scale * alpha / output.scale)
    )
    return _clamped(np.where(codes >= 0, above, below), node, output)


def quantize(graph, node, inputs, kernel):
    """QUANTIZE: float32 to int16, or codes to codes by a 31-bit multiplier, rounded twice.

    Codes go from int16 to int16 or int8, and from int8 to int16; the same in both flavours.

    From float32 the reference divides by the scale in float32 and rounds ties away from zero.  The
    built-in's vectors of 8 multiply by float32(1 / scale) and round ties to even; what is left over
    at the end of an image is divided in float64, ties away from zero.  What does not fit int32
    becomes its lowest value, also where it is positive.
    """
    source, output = requantization.ends(graph, node)
    if source.dtype == "float32":
        real = fixed_point.to_int32(requantization.round_half_away(inputs[0] / output.scale))
        if kernel == "builtin":
            fast = fixed_point.to_int32(np.rint(inputs[0] * (np.float32(1) / output.scale)))
            rest = inputs[0].astype(np.float64) / np.float64(output.scale)
            rest = fixed_point.to_int32(requantization.round_half_away(rest))
            real = requantization.in_vectors(fast, rest, 8)
        return _clamped(real, node, output)
    real = float(source.scale) / float(output.scale)
    codes = inputs[0].astype(np.int64) - source.zero_point
    centred = fixed_point.multiply_wrapping(codes, *fixed_point.quantize_multiplier(real))
    low, high = np.iinfo(output.dtype).min, np.iinfo(output.dtype).max
    return np.clip(fixed_point.wrap32(centred + output.zero_point), low, high).astype(output.dtype)


# What is not named here is computed as with int8.
KERNELS = {
    "ADD": add,
    "GELU": int16_tables.gelu,
    "LEAKY_RELU": leaky_relu,
    "LOGISTIC": int16_tables.logistic,
    "MUL": multiply,
    "QUANTIZE": quantize,
    "RELU": relu,
    "RELU6": relu,
    "RSQRT": int16_tables.rsqrt,
    "SOFTMAX": int16_tables.softmax,
    "SUB": subtract,
    "TANH": int16_tables.tanh,
}
