"""Operations on each code, or on two of them: sums, products, clamps, changes of scale."""

import numpy as np

from lowbit import fixed_point
from lowbit.kernels import requantization, windows


def add(graph, node, inputs, kernel):
    """ADD: a + b on two scales.

    Exact, but for the built-in kernel where an input's scale is 256 or more times the output's:
    its vectors hold sums in 16 bits, and wrap beyond 32767 codes where this saturates.
    """
    return _add_or_subtract(graph, node, inputs, kernel, sign=1)


def subtract(graph, node, inputs, kernel):
    """SUB: a - b on two scales; exact in both flavours."""
    return _add_or_subtract(graph, node, inputs, kernel, sign=-1)


def _add_or_subtract(graph, node, inputs, kernel, sign):
    first, second, output = requantization.tensors(graph, node, *node.inputs, node.outputs[0])
    a, b = _both_centred(graph, node, inputs)
    if kernel == "xnnpack":
        # The larger multiplier has 21 bits, so that 2 * 255 * 2^21 still fits int32.
        ratios = np.array([first.scale / output.scale, second.scale / output.scale])
        shift = 21 - int(np.frexp(ratios.max())[1])
        multipliers = np.rint(np.ldexp(ratios.astype(np.float64), shift)).astype(np.int64)
        total = a * multipliers[0] + sign * b * multipliers[1] + (1 << (shift - 1))
        return requantization.finish(total >> shift, node, output, kernel)
    # 2^20 keeps 8-bit codes within int32 and loses nothing; twice the larger scale makes both
    # multipliers at most 1/2.
    twice_larger = 2.0 * max(float(first.scale), float(second.scale))
    scaled = [
        fixed_point.multiply_by_quantized_multiplier(
            codes << 20, *fixed_point.quantize_multiplier(float(tensor.scale) / twice_larger)
        )
        for codes, tensor in ((a, first), (b, second))
    ]
    real = twice_larger / (2.0**20 * float(output.scale))
    total = fixed_point.multiply_by_quantized_multiplier(
        scaled[0] + sign * scaled[1], *fixed_point.quantize_multiplier(real)
    )
    return requantization.finish(total, node, output, kernel)


def multiply(graph, node, inputs, kernel):
    """MUL: a * b * scale_a * scale_b / scale_output.

    Exact, but for the built-in kernel at a multiplier of 256 or more: see ADD.
    """
    first, second, output = requantization.tensors(graph, node, *node.inputs, node.outputs[0])
    a, b = _both_centred(graph, node, inputs)
    product = a * b
    scale = requantization.product_scale(graph, node)
    if kernel == "micro":
        scale = float(first.scale) * float(second.scale) / float(output.scale)
    return requantization.requantize(product, scale, node, output, kernel, scale)


def relu(graph, node, inputs, kernel):
    """RELU, RELU6, RELU_0_TO_1: requantizes, then clamps; always a built-in kernel; exact.

    Micro's RELU6 only clamps: with another scale or zero point than the input's its codes are wrong.
    """
    source, output = requantization.ends(graph, node)
    if kernel == "micro" and node.op == "RELU6":
        return np.clip(inputs[0], *requantization.clamp_range(node, source, kernel))
    ratio = source.scale / output.scale
    if kernel == "micro":
        ratio = float(source.scale) / float(output.scale)
    return requantization.requantize(
        requantization.centred(inputs[0], source), ratio, node, output, kernel, ratio
    )


def quantize(graph, node, inputs, kernel):
    """QUANTIZE: float32 to codes, or codes to codes on another scale; exact in both flavours.

    From float32, XNNPACK multiplies by float32(1 / scale) where the built-in kernel divides.
    """
    source, output = requantization.ends(graph, node)
    if source.dtype == "float32":
        if kernel == "xnnpack":
            centred = np.rint(inputs[0] * (np.float32(1) / output.scale))
        else:
            centred = requantization.round_half_away(inputs[0] / output.scale)
        return requantization.finish(centred, node, output, kernel)
    codes = requantization.centred(inputs[0], source)
    if kernel == "xnnpack":
        multiplier = int(np.rint(np.float32(256) * (source.scale / output.scale)))
        return requantization.finish((codes * multiplier + 128) >> 8, node, output, kernel)
    multiplier, shift = fixed_point.quantize_multiplier(float(source.scale) / float(output.scale))
    centred = fixed_point.multiply_by_quantized_multiplier(codes, multiplier, shift)
    if kernel == "builtin":
        # Vectors of 16 codes round ties upwards; what is left over at the end of an image does not.
        up = fixed_point.multiply_by_quantized_multiplier_ties_up(codes, multiplier, shift)
        centred = requantization.in_vectors(up, centred, 16)
    return requantization.finish(centred, node, output, kernel)


def dequantize(graph, node, inputs, kernel):
    """DEQUANTIZE: scale * (code - zero_point) in float32; the same in all kernels."""
    source = graph.tensors[node.inputs[0]]
    return requantization.centred(inputs[0], source, np.float32) * source.scale


def maximum(graph, node, inputs, kernel):
    """MAXIMUM of codes that share one scale; the same in all kernels."""
    return np.maximum(*aligned(graph, node, inputs))


def minimum(graph, node, inputs, kernel):
    """MINIMUM of codes that share one scale; the same in all kernels."""
    return np.minimum(*aligned(graph, node, inputs))


def aligned(graph, node, arrays):
    """Returns two arrays that broadcast: one of fewer axes than the other gets them behind the batch's.

    A constant has no batch, and NumPy's own rule serves.
    """
    rank = max(x.ndim for x in arrays)
    both = [
        x.reshape(len(x), *(1,) * (rank - x.ndim), *x.shape[1:])
        if graph.tensors[name].data is None
        else x
        for name, x in zip(node.inputs, arrays, strict=True)
    ]
    windows.check_output(graph, node, np.broadcast_shapes(*(x.shape for x in both)))
    return both


def _both_centred(graph, node, inputs):
    """Returns code - zero_point of the two inputs, int64, shaped so that they broadcast."""
    tensors = requantization.tensors(graph, node, *node.inputs)
    both = zip(inputs, tensors, strict=True)
    return aligned(graph, node, [requantization.centred(*each) for each in both])
