"""What the kernels share: scales of a node, its clamps, and accumulators back to codes."""

import numpy as np

from lowbit import fixed_point


def product_scale(graph, node):
    """Returns scale_a * scale_b / scale_output in float32, as the kernels compute it for MUL."""
    first, second = (graph.tensors[name].scale for name in node.inputs)
    return first * second / graph.tensors[node.outputs[0]].scale


def weighted_scale_fp32(graph, node):
    """Returns input_scale * weight_scale / output_scale in float32, (1,) or (channels,)."""
    source, weight, output = weighted_tensors(graph, node)
    return source.scale * weight.quantization.scale / output.scale


def weighted_scale_double(graph, node):
    """Returns input_scale * weight_scale / output_scale in float64, (1,) or (channels,).

    FULLY_CONNECTED with one weight scale multiplies the two float32 scales in float32 first.
    """
    source, weight, output = weighted_tensors(graph, node)
    scale = weight.quantization.scale
    if node.op == "FULLY_CONNECTED" and scale.size == 1:
        return np.float64(source.scale * scale) / np.float64(output.scale)
    return np.float64(source.scale) * np.float64(scale) / np.float64(output.scale)


def tensors(graph, node, *names):
    return tuple(graph.tensors[name] for name in names)


def ends(graph, node):
    """Returns (first input, first output) of a node."""
    return tensors(graph, node, node.inputs[0], node.outputs[0])


def in_vectors(fast, rest, lanes):
    """Returns what a built-in kernel computes with vectors: `rest` where an image's end fills none.

    Args:
      fast, rest: equal shapes (batch, ...), the results with vectors and without.
      lanes: codes of a vector.
    """
    places = np.arange(rest[0].size).reshape(rest.shape[1:])
    return np.where(places < rest[0].size // lanes * lanes, fast, rest)


def weighted_tensors(graph, node):
    """Returns (input, weights, output) of a convolution or dense layer."""
    source = node.inputs[2 if node.op == "TRANSPOSE_CONV" else 0]
    return tensors(graph, node, source, node.inputs[1], node.outputs[0])


def _quantized_bound(value, tensor, kernel):
    """Returns the code of a clamp's real bound.

    XNNPACK rounds value / scale + zero_point with ties to even, the built-in kernels round
    value / scale with ties away from zero: RELU6 on scale 2.4 and zero point 3 is clamped at
    2.5 + 3 = 5.5, code 6 here and there, but at zero point 4 at code 6 or 7.
    """
    centred = np.float32(value) / tensor.scale
    if kernel == "xnnpack":
        return int(np.rint(centred + np.float32(tensor.zero_point)))
    return int(round_half_away(centred)) + tensor.zero_point


def clamp_range(node, tensor, kernel):
    """Returns the (lowest, highest) output code that the fused activation lets through."""
    low, high = np.iinfo(tensor.dtype).min, np.iinfo(tensor.dtype).max
    activation = node.attributes.get("activation")
    bounds = {None: (None, None), "RELU": (0, None), "RELU6": (0, 6), "RELU_N1_TO_1": (-1, 1)}
    bounds |= {"RELU_0_TO_1": (0, 1)}  # an operation of its own alone
    if node.op in bounds:
        activation = node.op
    if activation not in bounds:
        raise ValueError(
            f"node {node.name!r}: activation must be one of {sorted(map(str, bounds))}, "
            f"got {activation!r}"
        )
    lower, upper = bounds[activation]
    if lower is not None:
        low = max(low, _quantized_bound(lower, tensor, kernel))
    if upper is not None:
        high = min(high, _quantized_bound(upper, tensor, kernel))
    return low, high


def round_half_away(x):
    """Returns x rounded to nearest, ties away from zero, in the dtype of x: C's round()."""
    whole = np.trunc(x)
    return whole + np.where(np.abs(x - whole) >= 0.5, np.sign(x), x.dtype.type(0))


def finish(centred, node, tensor, kernel):
    """Returns codes: adds the zero point to `centred` codes, clamps, and casts."""
    low, high = clamp_range(node, tensor, kernel)
    zero_point = tensor.zero_point
    # Clamping first keeps float32 exact: the sum with the zero point stays below 2^9.
    clamped = np.clip(centred, low - zero_point, high - zero_point)
    return (clamped + zero_point).astype(tensor.dtype)


def requantize(accumulator, double_scale, node, tensor, kernel, fp32_scale, multiply=None):
    """Returns output codes of an accumulator.

    Args:
      accumulator: (..., channels); whole numbers, int64 unless the kernel is XNNPACK's.
      double_scale: real multiplier in float64, (channels,), (1,) or scalar, of fixed point.
      fp32_scale: real multiplier in float32, of the same shape, of XNNPACK.
      multiply: how fixed point rounds, one of `fixed_point`'s; None: twice, as most kernels.
    """
    if kernel == "xnnpack":
        centred = fixed_point.requantize_fp32(accumulator, fp32_scale)
    else:
        multiply = multiply or fixed_point.multiply_by_quantized_multiplier
        centred = multiply(accumulator, *fixed_point.quantize_multiplier(double_scale))
    return finish(centred, node, tensor, kernel)


def centred(array, tensor, dtype=np.int64):
    """Returns code - zero_point in the given dtype."""
    return np.subtract(array, tensor.zero_point, dtype=dtype)


def leaky_ratios(graph, node, dtype=np.float32):
    """Returns (s_in / s_out, s_in * alpha / s_out), computed in dtype."""
    source, output = (tensor.scale.astype(dtype) for tensor in ends(graph, node))
    alpha = dtype(np.float32(node.attributes["alpha"]))
    return source / output, source * alpha / output


def check_not_negative(node, codes, tensor):
    """Raises ValueError where a code is below its zero point: the interpreter stops there."""
    if codes.min(initial=tensor.zero_point) < tensor.zero_point:
        raise ValueError(f"node {node.name!r}: {node.op} of a negative value, code {codes.min()}")
