"""Convolutions and FULLY_CONNECTED: sums of products, exact, then requantized.

How fixed point rounds x * multiplier * 2^(shift - 31), weights of 2, 4 and 8 bits alike:

| node                                     | reference            | built-in on x86 with AVX         |
|------------------------------------------|----------------------|----------------------------------|
| CONV_2D, int8 activations                | twice: up, then away | twice, ties up both times        |
| CONV_2D in groups                        | twice: up, then away | the same                         |
| DEPTHWISE_CONV_2D, channels below 8(n/8) | twice: up, then away | twice, ties up both times        |
| DEPTHWISE_CONV_2D, the last n mod 8      | twice: up, then away | the same                         |
| TRANSPOSE_CONV                           | as DEPTHWISE_CONV_2D | as DEPTHWISE_CONV_2D             |
| FULLY_CONNECTED                          | float64, ties away   | twice, ties up both times        |
| convolutions, int16 activations          | 15-bit multiplier, once, ties up | the same             |
| FULLY_CONNECTED, int16 activations       | float64, ties away   | the same (with a bias)           |

micro is reference, but for FULLY_CONNECTED: twice: up, then away.

"up" and "away" say where a tie goes: upwards, away from zero.  On other processors the built-in
matrix products can round once (x86 without AVX, by test; 64-bit ARM, by its source).
"""

import functools
import math

import numpy as np

from lowbit import fixed_point
from lowbit.kernels import requantization, windows

BLOCK_BYTES = 64 * 2**20  # of a convolution's arrays at a time; larger blocks are no faster


def _accumulator_dtype(weight, axes, bias):
    """Returns float32 where every partial sum is provably below 2^24 and so exact, else float64.

    The bound is sum |w| * 255 + |bias|: no code lies further than 255 from its zero point.
    """
    bound = np.abs(weight.astype(np.int64)).sum(axis=axes).reshape(-1) * 255
    if bias is not None:
        bound = bound + np.abs(bias.astype(np.int64))
    return np.float32 if bound.max() < 2**24 else np.float64


def _weighted(graph, node, inputs, kernel, axes, accumulate):
    """Returns codes of a convolution or dense layer whose products `accumulate` sums.

    Args:
      axes: of the weights, to sum over for the bound on one output channel's accumulator.
      accumulate: (centred input, weight in the same dtype) -> (..., channels) sums.
    """
    source, _, output = requantization.weighted_tensors(graph, node)
    weight = inputs[1]
    bias = inputs[2] if len(inputs) > 2 else None
    dtype = _accumulator_dtype(weight, axes, bias)
    wide = source.dtype == "int16"
    if wide:
        dtype = np.float64  # exact below 2^53; the bias, of up to 48 bits, is added to integers
    blocks = []
    images = _block_images(weight, output)
    for start in range(0, len(inputs[0]), images):
        image = requantization.centred(inputs[0][start : start + images], source, dtype)
        sums = accumulate(image, weight.astype(dtype))
        if wide or kernel != "xnnpack":
            sums = sums.astype(np.int64)
        if bias is not None:
            sums += bias.astype(sums.dtype)
        blocks.append(_codes(graph, node, sums, kernel))
    return np.concatenate(blocks)


def _codes(graph, node, sums, kernel):
    """Returns the output codes of sums (..., channels)."""
    source, weight, output = requantization.weighted_tensors(graph, node)
    if source.dtype == "int16":
        scale = np.float64(source.scale) * np.float64(weight.quantization.scale)
        real = scale / np.float64(output.scale)
        if node.op != "FULLY_CONNECTED":
            multiplier = fixed_point.quantize_multiplier(real)
            return requantization.finish(
                fixed_point.multiply_int64(sums, *multiplier), node, output, kernel
            )
        if len(node.inputs) > 2 or kernel == "reference":
            centred = requantization.round_half_away(sums.astype(np.float64) * real)
            return requantization.finish(fixed_point.to_int32(centred), node, output, kernel)
        sums = fixed_point.wrap32(sums)  # without a bias: a matrix product of int32
    if node.op == "FULLY_CONNECTED" and weight.dtype == "int4" and kernel == "xnnpack":
        # The kernel multiplies by 16 * weight: 16 * sum wraps in int32.
        sums = (sums.astype(np.int64) + 2**27) % 2**28 - 2**27
    if node.op == "FULLY_CONNECTED" and kernel == "reference":
        real = sums.astype(np.float64) * requantization.weighted_scale_double(graph, node)
        return requantization.finish(requantization.round_half_away(real), node, output, kernel)
    return requantization.requantize(
        sums,
        requantization.weighted_scale_double(graph, node),
        node,
        output,
        kernel,
        requantization.weighted_scale_fp32(graph, node),
        _rounding(node, source, weight, kernel),
    )


def _rounding(node, source, weight, kernel):
    """Returns how fixed point rounds, of `fixed_point`: see the table above."""
    up = fixed_point.multiply_by_quantized_multiplier_ties_up
    away = fixed_point.multiply_by_quantized_multiplier
    if kernel != "builtin":
        return away
    if node.op == "FULLY_CONNECTED":
        return up
    if node.op == "CONV_2D":
        return up if source.shape[-1] == weight.shape[-1] else away
    return _in_eights


def _in_eights(x, multiplier, shift):
    """Returns x * multiplier * 2^(shift - 31): vectors of 8 channels round ties up both times."""
    channels = x.shape[-1]
    return np.where(
        np.arange(channels) < channels - channels % 8,
        fixed_point.multiply_by_quantized_multiplier_ties_up(x, multiplier, shift),
        fixed_point.multiply_by_quantized_multiplier(x, multiplier, shift),
    )


def _block_images(weight, output):
    """Returns how many images' patches, sums and eight arrays of requantization fit a block."""
    channels = output.shape[-1]
    positions = int(np.prod(output.shape[1:-1]))
    image_bytes = positions * (weight.size // channels + 8 * channels) * 8
    return max(1, BLOCK_BYTES // image_bytes)


def conv_2d(graph, node, inputs, kernel):
    """CONV_2D: sum over a window of (x - zero_point) * w, plus bias; exact in both flavours.

    Weights of fewer channels than the input has stand for groups of equal size.
    """
    return _weighted(graph, node, inputs, kernel, (1, 2, 3), functools.partial(conv_sums, node))


def conv_sums(node, image, weight):
    """Returns sums (batch, rows, columns, out) as one product of patches and weights."""
    strides, dilations = node.attributes["strides"], node.attributes["dilations"]
    out, height, width, channels = weight.shape
    if image.shape[3] != channels:
        groups = image.shape[3] // channels
        if image.shape[3] % channels or out % groups:
            raise ValueError(
                f"node {node.name!r}: the input has {image.shape[3]} channels, the weights {channels}"
            )
        parts = zip(np.split(image, groups, axis=3), np.split(weight, groups), strict=True)
        return np.concatenate([conv_sums(node, *part) for part in parts], axis=-1)
    span = (1 + (height - 1) * dilations[0], 1 + (width - 1) * dilations[1])
    image = windows.pad_image(image, windows.padding(node, image.shape, span))
    size = windows.output_size(image, span, strides)
    matrix = weight.reshape(out, -1).T
    if (height, width) == (1, 1):
        patches = windows.tap(image, 0, 0, strides, size)
        return (patches.reshape(-1, channels) @ matrix).reshape(*patches.shape[:3], out)
    taps = [
        windows.tap(image, i * dilations[0], j * dilations[1], strides, size)
        for i in range(height)
        for j in range(width)
    ]
    patches = np.stack(taps, axis=3).reshape(-1, matrix.shape[0])
    return (patches @ matrix).reshape(-1, *size, out)


def depthwise_conv_2d(graph, node, inputs, kernel):
    """DEPTHWISE_CONV_2D: output channel c * depth_multiplier + m reads input channel c; exact."""
    return _weighted(
        graph, node, inputs, kernel, (0, 1, 2), functools.partial(depthwise_sums, node)
    )


def depthwise_sums(node, image, weight):
    """Returns sums (batch, rows, columns, channels * depth_multiplier), one image at a time.

    One image's sums stay in cache while the taps are added; the whole batch's would not.
    """
    strides, dilations = node.attributes["strides"], node.attributes["dilations"]
    depth_multiplier = node.attributes["depth_multiplier"]
    _, height, width, channels = weight.shape
    if image.shape[3] * depth_multiplier != channels:
        raise ValueError(
            f"node {node.name!r}: {image.shape[3]} input channels * depth_multiplier "
            f"{depth_multiplier} must be the weights' {channels} channels"
        )
    if depth_multiplier > 1:
        image = np.repeat(image, depth_multiplier, axis=3)
    span = (1 + (height - 1) * dilations[0], 1 + (width - 1) * dilations[1])
    image = windows.pad_image(image, windows.padding(node, image.shape, span))
    size = windows.output_size(image, span, strides)
    sums = np.zeros((image.shape[0], *size, channels), image.dtype)
    product = np.empty((1, *size, channels), image.dtype)
    for n in range(len(image)):
        for i in range(height):
            for j in range(width):
                tap = windows.tap(
                    image[n : n + 1], i * dilations[0], j * dilations[1], strides, size
                )
                np.multiply(tap, weight[0, i, j], out=product)
                sums[n : n + 1] += product
    return sums


def transpose_conv(graph, node, inputs, kernel):
    """TRANSPOSE_CONV (shape, w (out, h, w, in), x, bias): each (x - zero_point) * w is added to output
    pixel i * stride + tap - before; requantized as a convolution's.

    `before` is 0 for VALID; for SAME that of the convolution from the output's size back to the input.
    """
    size, weight, image, *bias = inputs
    windows.check_output(graph, node, np.ravel(size).tolist())
    sums = functools.partial(_transposed_sums, node, np.ravel(size)[1:3].tolist())
    return _weighted(graph, node, [image, weight, *bias], kernel, (1, 2, 3), sums)


def _transposed_sums(node, wanted, image, weight):
    """Returns sums (batch, rows, columns, out) of the wanted (rows, columns)."""
    strides, (out, *window, channels) = node.attributes["strides"], weight.shape
    before = [0, 0]
    if node.attributes["padding"] == "SAME":
        before = [
            windows.same_padding(*each)[0] for each in zip(wanted, window, strides, strict=True)
        ]
    canvas_size = [
        max((size - 1) * stride + reach, first + end)
        for size, stride, reach, first, end in zip(
            image.shape[1:3], strides, window, before, wanted, strict=True
        )
    ]
    # Damaged strides must not fill the memory: what lies beyond the output is cut off below.
    if math.prod(canvas_size) > max(windows.SMALL_IMAGE, windows.PADDED * math.prod(wanted)):
        raise ValueError(
            f"node {node.name!r}: strides {tuple(strides)} and a window of {tuple(window)} do not "
            f"fit an output of {tuple(wanted)}"
        )
    canvas = np.zeros((len(image), *canvas_size, out), image.dtype)
    flat = image.reshape(-1, channels)
    for i in range(window[0]):
        for j in range(window[1]):
            product = (flat @ weight[:, i, j, :].T).reshape(*image.shape[:3], out)
            windows.tap(canvas, i, j, strides, image.shape[1:3])[...] += product
    (top, left), (rows, columns) = before, wanted
    return canvas[:, top : top + rows, left : left + columns]


def fully_connected(graph, node, inputs, kernel):
    """FULLY_CONNECTED: x (batch, in) times w (out, in) transposed, plus bias; exact."""
    rows = inputs[0].reshape(-1, inputs[1].shape[1])
    flat = _weighted(graph, node, [rows, *inputs[1:]], kernel, (1,), lambda x, weight: x @ weight.T)
    if node.attributes.get("keep_num_dims"):
        return flat.reshape(*inputs[0].shape[:-1], -1)
    return flat
