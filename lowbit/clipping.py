"""Ranges of weights by their error (NumPy): a clipped range rounds the rest of the channel finer.

For each channel w (n,) of a flat kernel, the range with the smallest

    error = d^T H d,   d = Q(w) - w

where H (n, n) is the second moment E[x x^T] of the inputs that meet the weights: then the error is
that of the layer's output.  Without H it is the squared error of the weights themselves.

The search is a grid over fractions of the channel's own range.  For symmetric codes q it ends with
steps of the exact minimum over the scale, s = q^T H w / q^T H q, each kept where it is better.
"""

import numpy as np

from lowbit import affine
from lowbit import spec as spec_lib

FRACTIONS = tuple(np.linspace(1, 0.04, 49).tolist())
_REFINEMENTS = 3


def clip_weights(
    flat_kernel: np.ndarray,
    spec: spec_lib.QuantSpec,
    second_moment: np.ndarray | None = None,
    candidates: tuple[float, ...] = FRACTIONS,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ranges with the smallest error, never worse than the weights' own.

    Args:
      flat_kernel: float (n, channels), output channels last.
      spec: of the weights; axis None is one range for the tensor.
      second_moment: of the inputs: None; (n,), the diagonal of H; (n, n), H; or (channels, n, n),
        an H for each channel (depthwise).
      candidates: fractions of the smallest and the largest weight, in (0, 1]; 1 is always tried.

    Returns:
      minimum and maximum, float32 (channels,), or (1,) for one range.

    Raises:
      ValueError: where the second moment does not fit the kernel or is not finite.
    """
    w = np.asarray(flat_kernel, np.float32)
    moment = _checked(second_moment, w)
    per_channel = spec.axis is not None
    low, high = affine.observed_range(w, 1 if per_channel else None)
    low, high = np.minimum(np.atleast_1d(low), 0), np.maximum(np.atleast_1d(high), 0)
    if spec.symmetric:
        high = np.maximum(-low, high)
        low = -high

    def error(low, high):
        scale, zero_point = affine.scale_and_zero_point(low, high, spec)
        noise = _energy(_rounded(w, scale, zero_point, spec) - w, moment)
        return noise if per_channel else noise.sum(keepdims=True)

    best = (low, high)
    smallest = error(low, high)

    def try_range(low, high):
        nonlocal best, smallest
        found = error(low, high)
        better = found < smallest
        smallest = np.where(better, found, smallest)
        best = np.where(better, low, best[0]), np.where(better, high, best[1])

    if spec.symmetric:
        for fraction in candidates:
            try_range(low * np.float32(fraction), high * np.float32(fraction))
        for _ in range(_REFINEMENTS):
            exact = _best_scale(w, best, spec, moment) * affine.integer_bounds(spec)[1]
            # Beyond the weights' own range lies nothing that codes could be better for.
            exact = np.clip(exact, high * np.float32(1e-3), high).astype(np.float32)
            try_range(-exact, exact)
        return best
    # Pairs from every fourth fraction, then each end alone around the best pair.
    coarse = np.array(candidates[::4], np.float32)
    for fraction in coarse:
        for other in coarse:
            try_range(low * fraction, high * other)
    reach = np.abs(np.diff(np.append(1, coarse))).max()
    for _ in range(_REFINEMENTS):
        center = best
        for offset in np.linspace(-reach, reach, 9, dtype=np.float32):
            try_range(np.clip(center[0] + offset * low, low, 0), center[1])
        center = best
        for offset in np.linspace(-reach, reach, 9, dtype=np.float32):
            try_range(center[0], np.clip(center[1] + offset * high, 0, high))
        reach /= 4
    return best


def _checked(second_moment, w):
    if second_moment is None:
        return None
    moment = np.asarray(second_moment, np.float32)
    n, channels = w.shape
    if moment.shape not in ((n,), (n, n), (channels, n, n)):
        raise ValueError(
            f"second moment of shape {moment.shape} does not fit a kernel of shape {w.shape}; "
            f"allowed are ({n},), ({n}, {n}) and ({channels}, {n}, {n})"
        )
    if not np.isfinite(moment).all():
        raise ValueError("second moment holds NaN or infinity")
    return moment


def _times(moment, d):
    """Returns H d, (n, channels)."""
    if moment is None:
        return d
    if moment.ndim == 1:
        return moment[:, None] * d
    if moment.ndim == 2:
        return moment @ d
    return np.einsum("cij,jc->ic", moment, d)


def _energy(d, moment):
    """Returns d^T H d for each channel, float64 (channels,)."""
    return np.einsum("ic,ic->c", d, _times(moment, d), dtype=np.float64)


def _rounded(w, scale, zero_point, spec):
    """Returns Q(w) with scales (channels,) or (1,): `affine.fake_quantize`, without its checks."""
    lowest, highest = affine.integer_bounds(spec)
    offset = zero_point.astype(np.float32)
    return np.clip(np.rint(w / scale), lowest - offset, highest - offset) * scale


def _best_scale(w, bounds, spec, moment):
    """Returns the scales with the smallest error for the codes that a range gives, float64."""
    scale, zero_point = affine.scale_and_zero_point(*bounds, spec)
    codes = _rounded(w, scale, zero_point, spec) / scale
    product = _times(moment, codes)
    above = np.einsum("ic,ic->c", product, w, dtype=np.float64)
    below = np.einsum("ic,ic->c", product, codes, dtype=np.float64)
    if spec.axis is None:
        above, below = above.sum(keepdims=True), below.sum(keepdims=True)
    return np.where(below > 0, above / np.where(below > 0, below, 1), scale)
