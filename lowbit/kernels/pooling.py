"""Pooling windows, and the mean over an image."""

import functools

import numpy as np

from lowbit import fixed_point
from lowbit.kernels import requantization, windows


def _pool_taps(node, image, value):
    """Returns the taps of a pooling window, each (batch, rows, columns, channels)."""
    window, strides = node.attributes["filter"], node.attributes["strides"]
    image = windows.pad_image(image, windows.padding(node, image.shape, window), value)
    size = windows.output_size(image, window, strides)
    for i in range(window[0]):
        for j in range(window[1]):
            yield windows.tap(image, i, j, strides, size)


def average_pool_2d(graph, node, inputs, kernel):
    """AVERAGE_POOL_2D: code sum / n, ties away from zero; n counts only codes inside the image."""
    output = graph.tensors[node.outputs[0]]
    inside = np.ones((1, *inputs[0].shape[1:3], 1), np.int64)
    total = sum(tap for tap in _pool_taps(node, inputs[0].astype(np.int64), 0))
    count = sum(tap for tap in _pool_taps(node, inside, 0))
    mean = np.sign(total) * ((np.abs(total) + count // 2) // count)
    low, high = requantization.clamp_range(node, output, kernel)
    return np.clip(mean, low, high).astype(output.dtype)


def max_pool_2d(graph, node, inputs, kernel):
    """MAX_POOL_2D: the largest code of the window; the same in all kernels."""
    output = graph.tensors[node.outputs[0]]
    largest = functools.reduce(
        np.maximum, _pool_taps(node, inputs[0], np.iinfo(inputs[0].dtype).min)
    )
    low, high = requantization.clamp_range(node, output, kernel)
    return np.clip(largest, low, high)


def mean(graph, node, inputs, kernel):
    """MEAN over the constant axes: sum of (code - zero_point) times scale ratio / n; exact.

    XNNPACK rounds sum * scale + offset, all in float32, where the offset holds both zero points:
    ties in the output code, not in the centred one, go to even.  A build whose compiler fuses the
    multiplication and the addition (64-bit ARM) can differ by 1 at such ties.

    The reference kernel folds 1/n into the fixed-point multiplier with a truncating division.
    """
    source, output = requantization.ends(graph, node)
    axes = tuple(sorted({int(axis) % inputs[0].ndim for axis in np.ravel(inputs[1])}))
    count = int(np.prod([inputs[0].shape[axis] for axis in axes]))
    keep_dims = bool(node.attributes["keep_dims"])
    total = inputs[0].sum(axis=axes, keepdims=keep_dims, dtype=np.int64)
    if kernel == "xnnpack":
        scale = source.scale / output.scale * (np.float32(1) / np.float32(count))
        offset = np.float32(output.zero_point) - np.float32(count * source.zero_point) * scale
        codes = np.rint(total.astype(np.float32) * scale + offset)
        return requantization.finish(codes - output.zero_point, node, output, kernel)
    total = fixed_point.wrap32(total - count * source.zero_point)
    multiplier, shift = fixed_point.quantize_multiplier(float(source.scale) / float(output.scale))
    extra = min(count.bit_length() - 1, 32, 31 + int(shift))
    multiplier = np.int64((int(multiplier) << extra) // count)
    centred = fixed_point.multiply_wrapping(total, multiplier, int(shift) - extra)
    return requantization.finish(centred, node, output, kernel)
