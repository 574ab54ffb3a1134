"""Images resized: nearest pixels, and bilinear between codes that share one scale."""

import numpy as np

from lowbit.kernels import requantization, windows


def resize_nearest_neighbor(graph, node, inputs, kernel):
    """RESIZE_NEAREST_NEIGHBOR: each output pixel is one input pixel, see `nearest`; same in all."""
    corners, half = (node.attributes[name] for name in ("align_corners", "half_pixel_centers"))
    picked, sizes = inputs[0], np.ravel(inputs[1]).tolist()
    windows.check_output(graph, node, [len(picked), *sizes, *picked.shape[3:]])
    for axis, wanted in zip((1, 2), sizes, strict=True):
        picked = np.take(picked, nearest(picked.shape[axis], wanted, corners, half), axis=axis)
    return picked


def nearest(
    size: int, wanted: int, align_corners: bool = False, half_pixel_centers: bool = False
) -> np.ndarray:
    """Returns which of `size` pixels each of `wanted` shows: floor((i + offset) * step) in float32.

    offset is 1/2 with half_pixel_centers, else 0; step is size / wanted.  With align_corners the step
    is (size - 1) / (wanted - 1), and is rounded with ties away from zero instead.
    """
    if align_corners and wanted > 1:
        step = np.float32(size - 1) / np.float32(wanted - 1)
    else:
        step = np.float32(size) / np.float32(wanted)
    offset = np.float32(0.5 if half_pixel_centers else 0)
    places = (np.arange(wanted, dtype=np.float32) + offset) * step
    places = requantization.round_half_away(places) if align_corners else np.floor(places)
    return np.clip(places.astype(np.int64), 0, size - 1)


def resize_bilinear(graph, node, inputs, kernel):
    """RESIZE_BILINEAR of codes on one scale; exact.

    Reference, and built-in with int16: weights of 10 bits, one rounding, ties away from zero.
    XNNPACK: weights of 11 bits, one rounding, ties upwards.  The built-in kernel of int8 never runs:
    the delegate takes the node or refuses the model.
    """
    corners, half = (node.attributes[name] for name in ("align_corners", "half_pixel_centers"))
    delegated = kernel == "xnnpack"
    bits, places = (11, places_in_float) if delegated else (10, _places_in_integers)
    codes, sizes = inputs[0].astype(np.int64), np.ravel(inputs[1]).tolist()
    windows.check_output(graph, node, [len(codes), *sizes, *codes.shape[3:]])
    for axis, wanted in zip((1, 2), sizes, strict=True):
        first, second, weight = places(codes.shape[axis], wanted, corners, half)
        weight = weight.reshape([-1 if i == axis else 1 for i in range(4)])
        low, high = (np.take(codes, index, axis) for index in (first, second))
        codes = (low << bits) + (high - low) * weight
    half_unit = 1 << (2 * bits - 1)
    if delegated:
        rounded = (codes + half_unit) >> (2 * bits)
    else:
        rounded = np.sign(codes) * ((np.abs(codes) + half_unit) >> (2 * bits))
    return rounded.astype(inputs[0].dtype)


def _places_in_integers(size, wanted, corners, half):
    """Returns (first pixel, second pixel, weight of the second with 10 fractional bits)."""
    if corners and wanted > 1:
        step = ((size - 1 << 10) + (wanted - 1) // 2) // (wanted - 1)
    else:
        step = ((size << 10) + wanted // 2) // wanted
    place = np.arange(wanted, dtype=np.int64) * step
    if half:
        place += step // 2 - (1 << 9)
    # C divides towards zero.
    first = np.maximum(np.trunc(place / 1024).astype(np.int64), 0)
    second = np.minimum(np.trunc((place + 1023) / 1024).astype(np.int64), size - 1)
    return first, second, place - (first << 10)


def places_in_float(
    size: int, wanted: int, align_corners: bool = False, half_pixel_centers: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (first pixel, second pixel, weight of the second with 11 fractional bits), int64."""
    less = 1 if align_corners and wanted != 1 else 0
    step = np.float32(size - less) / np.float32(wanted - less)
    place = np.arange(wanted, dtype=np.float32) * step
    if half_pixel_centers and not align_corners:
        place = place + (np.float32(0.5) * step - np.float32(0.5))
    place = np.clip(place, np.float32(0), np.float32(size - 1))
    first = place.astype(np.int64)
    weight = np.rint((place - first.astype(np.float32)) * np.float32(2048)).astype(np.int64)
    return first, np.minimum(first + 1, size - 1), weight
