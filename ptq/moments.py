"""First and second moments of a layer's inputs: all that the layer-wise corrections need of images.

A layer is y = w^T x + b at each output position, x its K input values (a convolution's taps), for
each of G groups: a depthwise convolution has a group for each channel, the others have one.  With
x_q the input in the quantized network and x_f in the float one, over images and positions:

    mean_q = E[x_q]                     mean_f = E[x_f]                          (G, K)
    covariance = E[(x_q - mean_q)(x_q - mean_q)^T]                               (G, K, K)
    cross = E[(x_q - mean_q)(x_f - mean_f)^T]                                    (G, K, K)
"""

import dataclasses
from collections.abc import Iterable

import keras
import numpy as np

from lowbit import layers

# Neighbouring positions say nearly the same: 400 of an image's 12,544 give a mean that is as good
# (the images' own spread is far larger), at a thirtieth of the time.
POSITIONS = 400
# A channel of a depthwise convolution has 9 weights to find, not hundreds.
DEPTHWISE_POSITIONS = 100


@dataclasses.dataclass(frozen=True)
class Moments:
    """Float64 arrays as at the top of this file, and the number of positions they come from."""

    mean_q: np.ndarray
    mean_f: np.ndarray
    covariance: np.ndarray | None  # None where only means were asked for
    cross: np.ndarray | None
    count: int


def observe(
    layer: keras.layers.Layer,
    pairs: Iterable[tuple[np.ndarray, np.ndarray]],
    seed: int = 0,
    only_means: bool = False,
) -> Moments:
    """Returns the moments of a weighted layer's inputs.

    Args:
      layer: one of layers.WEIGHTED.
      pairs: (quantized, float) inputs, float32 (n, ...) each.
      seed: of the positions that are drawn; both streams are read at the same ones.
      only_means: True leaves the second moments out.

    Raises:
      ValueError: where there is no input, or one is not finite: names the layer.
    """
    rng = np.random.default_rng(seed)
    depthwise = isinstance(layer, layers.QuantizedDepthwiseConv2D)
    products = _depthwise_products if depthwise else _dense_products
    shifts, sums, count = None, None, 0
    for pair in pairs:
        both = _taps(layer, pair, rng)
        # Products of float32 values far from zero would lose the spread around them.
        if shifts is None:
            shifts = [
                [np.float32(tap.mean(axis=0, dtype=np.float64)) for tap in taps] for taps in both
            ]
        taps_q, taps_f = (
            [tap - shift for tap, shift in zip(*stream, strict=True)]
            for stream in zip(both, shifts, strict=True)
        )
        batch = [_sums(taps, depthwise) for taps in (taps_q, taps_f)]
        if not only_means:
            batch += products(taps_q, taps_f)
        sums = batch if sums is None else [a + b for a, b in zip(sums, batch, strict=True)]
        count += len(taps_q[0])
    if sums is None:
        raise ValueError(f"layer {layer.name}: no input was observed")
    if not all(np.isfinite(array).all() for array in sums):
        raise ValueError(f"layer {layer.name}: its inputs hold NaN or infinity")
    above_q, above_f, *second = (array / count for array in sums)  # of the shifts
    shift_q, shift_f = (_by_group(np.float64(stream), depthwise) for stream in shifts)
    means = above_q + shift_q, above_f + shift_f
    if only_means:
        return Moments(*means, None, None, count)
    square, product = second
    return Moments(
        *means,
        square - above_q[:, :, None] * above_q[:, None, :],
        product - above_q[:, :, None] * above_f[:, None, :],
        count,
    )


def grouped(layer: keras.layers.Layer, kernel: np.ndarray) -> np.ndarray:
    """Returns a kernel as (G, K, outputs of a group), in the order of `Moments`' taps."""
    if isinstance(layer, layers.QuantizedDepthwiseConv2D):
        height, width, channels, multiplier = kernel.shape
        return kernel.transpose(2, 0, 1, 3).reshape(channels, height * width, multiplier)
    return kernel.reshape(1, -1, kernel.shape[-1])


def ungrouped(layer: keras.layers.Layer, weights: np.ndarray) -> np.ndarray:
    """Returns the kernel of `grouped` weights, in the layer's shape."""
    shape = tuple(layer.kernel.shape)
    if isinstance(layer, layers.QuantizedDepthwiseConv2D):
        height, width, channels, multiplier = shape
        return weights.reshape(channels, height, width, multiplier).transpose(1, 2, 0, 3)
    return weights.reshape(shape)


def _sums(taps, depthwise):
    """Returns the sum of x over positions, float64 (G, K)."""
    return _by_group([tap.sum(axis=0, dtype=np.float64) for tap in taps], depthwise)


def _by_group(values, depthwise):
    """Returns (G, K) of one array (channels,) for each tap."""
    return np.stack(values, axis=1) if depthwise else np.concatenate(values)[None]


def _dense_products(taps_q, taps_f):
    """Returns the sums of x_q x_q^T and x_q x_f^T over positions, one group."""
    x_q, x_f = np.concatenate(taps_q, axis=1), np.concatenate(taps_f, axis=1)
    return [np.float64(x_q.T @ other)[None] for other in (x_q, x_f)]


def _depthwise_products(taps_q, taps_f):
    """Returns the same with a group for each channel: products tap by tap, nothing transposed."""
    return [
        np.array(
            [[np.einsum("pc,pc->c", a, b) for b in taps] for a in taps_q], np.float64
        ).transpose(2, 0, 1)
        for taps in (taps_q, taps_f)
    ]


def _taps(layer, inputs, rng):
    """Returns for each input its taps, float32 (positions, channels) each, at places drawn once."""
    if isinstance(layer, layers.QuantizedDense):
        return [[x.reshape(-1, x.shape[-1])] for x in inputs]
    limit = POSITIONS
    if isinstance(layer, layers.QuantizedDepthwiseConv2D):
        limit = DEPTHWISE_POSITIONS
    height, width = inputs[0].shape[1:3]
    tops, top_count = _starts(layer, 0, height)
    lefts, left_count = _starts(layer, 1, width)
    places = top_count * left_count
    chosen = rng.choice(places, min(places, limit), replace=False)
    top, left = tops[chosen // left_count], lefts[chosen % left_count]
    taps = [[] for _ in inputs]
    for i in range(layer.kernel_size[0]):
        for j in range(layer.kernel_size[1]):
            y, x = top + i * layer.dilation_rate[0], left + j * layer.dilation_rate[1]
            inside = ((y >= 0) & (y < height) & (x >= 0) & (x < width))[None, :, None]
            at = (slice(None), np.clip(y, 0, height - 1), np.clip(x, 0, width - 1))
            for tap, values in zip(taps, inputs, strict=True):
                picked = values[at] if inside.all() else values[at] * inside
                tap.append(picked.reshape(-1, values.shape[-1]))
    return taps


def _starts(layer, axis, size):
    """Returns where each output's first tap lies along an axis, padding included, and how many."""
    stride = layer.strides[axis]
    reach = (layer.kernel_size[axis] - 1) * layer.dilation_rate[axis] + 1
    if layer.padding == "same":
        count = -(-size // stride)
        before = max((count - 1) * stride + reach - size, 0) // 2
    else:
        count, before = (size - reach) // stride + 1, 0
    return np.arange(count) * stride - before, count
