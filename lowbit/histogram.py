"""A histogram of a stream of values in bounded memory, the same whatever their order (NumPy).

    2**exponent > every |x|,   width = 2**exponent / (BINS / 2)
    bin b counts the values with (b - BINS/2) * width <= x < (b + 1 - BINS/2) * width

A bin of a wider histogram is a union of bins of a narrower one, because the widths are powers of
two: `merge` loses nothing, and is associative and commutative.  Zeros are counted apart: after a
ReLU they are half of the values, quantized without error whatever the range, and would hide how
the others lie.
"""

import dataclasses
import math

import numpy as np

BINS = 8192  # at least 2,048 between zero and the largest |x|: 8 for each of 255 codes
# Tensors that are smaller throughout (2**-98 is 3e-30) count in the bins beside zero.
SMALLEST_EXPONENT = -98


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Counts of values; `zeros` are not in `counts`."""

    counts: np.ndarray  # int64 (BINS,)
    zeros: int
    exponent: int
    lowest: float  # exactly, zeros included
    highest: float


def exponent_above(lowest: float, highest: float) -> int:
    """Returns the exponent e of the smallest power of two above both |bounds|, at least -98."""
    largest = max(abs(lowest), abs(highest))  # frexp gives zero the exponent of one
    return max(math.frexp(largest)[1], SMALLEST_EXPONENT) if largest else SMALLEST_EXPONENT


def of(x: np.ndarray) -> Histogram:
    """Returns the histogram of float32 `x`, any shape; raises ValueError where it is not finite."""
    x = np.asarray(x, np.float32)
    lowest, highest = float(x.min()), float(x.max())
    check_finite(lowest, highest)
    bins_per_unit = np.float32(2.0 ** (math.log2(BINS // 2) - exponent_above(lowest, highest)))
    index = np.floor(x.reshape(-1) * bins_per_unit).astype(np.int64) + BINS // 2
    return from_counts(np.bincount(index, minlength=BINS), (x == 0).sum(), lowest, highest)


def from_counts(counts: np.ndarray, zeros: int, lowest: float, highest: float) -> Histogram:
    """Returns the histogram of values that were counted elsewhere.

    Args:
      counts: integers (BINS,), zeros counted in the bin that begins with zero.
      zeros: how many of them are zero.
      lowest, highest: of the values; `exponent_above` them is the one that the bins belong to.

    Raises:
      ValueError: where a bound is NaN or infinite.
    """
    check_finite(lowest, highest)
    counts = np.array(counts, np.int64)
    counts[BINS // 2] -= int(zeros)
    exponent = exponent_above(lowest, highest)
    return Histogram(counts, int(zeros), exponent, float(lowest), float(highest))


def check_finite(lowest: float, highest: float) -> None:
    """Raises ValueError where a bound is NaN or infinite."""
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        raise ValueError(f"activations run from {lowest} to {highest}: not finite")


def merge(one: Histogram, other: Histogram) -> Histogram:
    """Returns the histogram of both streams."""
    exponent = max(one.exponent, other.exponent)
    return Histogram(
        _widened(one, exponent) + _widened(other, exponent),
        one.zeros + other.zeros,
        exponent,
        min(one.lowest, other.lowest),
        max(one.highest, other.highest),
    )


def _widened(histogram, exponent):
    shift = min(exponent - histogram.exponent, 62)
    if shift == 0:
        return histogram.counts
    half = BINS // 2
    wider = np.zeros(BINS, np.int64)
    np.add.at(wider, (np.arange(-half, half) >> shift) + half, histogram.counts)
    return wider


def bins(histogram: Histogram) -> tuple[np.ndarray, np.ndarray]:
    """Returns float64 edges (n + 1,) and counts (n,) of the bins between lowest and highest.

    The first and the last edge are the lowest and the highest value: a bin in which all values are
    the same (6.0 after a ReLU6) may have no width.  n is 1 at least.
    """
    half = BINS // 2
    width = 2.0**histogram.exponent / half
    first = int(np.floor(histogram.lowest / width)) + half
    last = int(np.floor(histogram.highest / width)) + half
    edges = (np.arange(first, last + 2) - half) * width
    edges[0], edges[-1] = histogram.lowest, histogram.highest
    return edges, histogram.counts[first : last + 1]
