"""Where quantization hurts, channel by channel (NumPy): errors, outliers, memory.

Values have their channels on the last axis; kernels are flat, (taps, output channels).

    SQNR_c       = 10 log10(sum w_c^2 / sum (w_c - Q(w_c))^2)      whitepaper appendix A, in dB
    mean shift_c = (E[y_q] - E[y_f]) / std(y_f)                    what bias correction repairs
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

# A channel is dead where its largest weight is this much below the tensor's: affine.SCALE_FLOOR_RATIO
# then rules its scale.
DEAD_RATIO = 2.0**-20
# A channel whose standard deviation is this much below its root mean square does not vary: a shift
# in units of it says nothing.
CONSTANT_RATIO = 1e-3


@dataclasses.dataclass(frozen=True)
class ChannelSums:
    """What two streams of values, float and quantized, differ by; float64 (channels,) sums."""

    count: int  # values of one channel
    reference: np.ndarray
    reference_squared: np.ndarray
    error: np.ndarray  # quantized - reference
    error_squared: np.ndarray

    def __add__(self, other: "ChannelSums") -> "ChannelSums":
        return ChannelSums(
            self.count + other.count,
            self.reference + other.reference,
            self.reference_squared + other.reference_squared,
            self.error + other.error,
            self.error_squared + other.error_squared,
        )

    def sqnr_db(self) -> np.ndarray:
        """Returns each channel's SQNR; inf without error, -inf where the reference is zero."""
        return decibels(self.reference_squared, self.error_squared)

    def total_sqnr_db(self) -> float:
        """Returns the SQNR of all channels together."""
        return float(decibels(self.reference_squared.sum(), self.error_squared.sum()))

    def mean_shift(self) -> np.ndarray:
        """Returns (E[y_q] - E[y_f]) / std(y_f) of each channel; NaN where y_f does not vary."""
        mean = self.reference / self.count
        power = self.reference_squared / self.count
        deviation = np.sqrt(np.maximum(power - mean**2, 0))
        varies = deviation > CONSTANT_RATIO * np.sqrt(power)
        shift = self.error / self.count / np.where(varies, deviation, 1)
        return np.where(varies, shift, np.nan)


def compare(reference: np.ndarray, quantized: np.ndarray) -> ChannelSums:
    """Returns the sums of one batch; the batches' sums add up.

    Args:
      reference, quantized: float (..., channels) of one shape.
    """
    channels = reference.shape[-1]
    flat = reference.reshape(-1, channels)
    error = quantized.reshape(-1, channels) - flat
    # Squares in float32 are off by 6e-8, which no SQNR below 120 dB shows; sums need float64.
    return ChannelSums(
        len(flat),
        flat.sum(axis=0, dtype=np.float64),
        np.square(flat).sum(axis=0, dtype=np.float64),
        error.sum(axis=0, dtype=np.float64),
        np.square(error).sum(axis=0, dtype=np.float64),
    )


def decibels(signal: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Returns 10 log10(signal / noise) of powers; inf without noise, -inf without signal."""
    signal, noise = np.asarray(signal, np.float64), np.asarray(noise, np.float64)
    with np.errstate(divide="ignore"):
        ratio = np.log10(np.where(signal > 0, signal, 0)) - np.log10(np.where(noise > 0, noise, 1))
    return np.where(noise > 0, 10 * ratio, np.inf)


def kernel_sqnr_db(kernel: np.ndarray, quantized: np.ndarray) -> np.ndarray:
    """Returns the SQNR in dB of each output channel of flat kernels (taps, channels)."""
    kernel = np.asarray(kernel, np.float64)
    noise = np.square(kernel - np.asarray(quantized, np.float64)).sum(axis=0)
    return decibels(np.square(kernel).sum(axis=0), noise)


def mean_of_finite(values: np.ndarray) -> float:
    """Returns the mean of the finite values; inf where there is none (nothing was lost)."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else float("inf")


@dataclasses.dataclass(frozen=True)
class Outliers:
    """What is uneven in a kernel's channels."""

    range_ratio: float  # largest of the channels' largest |weight|, over their median
    dead_channels: int  # their largest weight is below 2^-20 of the tensor's, or every code is zero
    lost_channels: int  # of these, those that are not so small: quantization made them zero
    kurtosis: float  # E[(w - mean)^4] / variance^2 of the whole tensor: 3 for normal weights


def outliers(kernel: np.ndarray, quantized: np.ndarray) -> Outliers:
    """Returns a folded kernel's outliers.

    Args:
      kernel: float (taps, channels).
      quantized: the same quantized and back.
    """
    kernel = np.asarray(kernel, np.float64)
    largest = np.abs(kernel).max(axis=0)
    small, zero = is_dead(kernel), (np.asarray(quantized) == 0).all(axis=0)
    median = np.median(largest)
    ratio = largest.max() / median if median > 0 else np.inf
    centred = kernel - kernel.mean()
    variance = np.square(centred).mean()
    kurtosis = (centred**4).mean() / variance**2 if variance > 0 else np.nan
    return Outliers(
        float(ratio), int((small | zero).sum()), int((zero & ~small).sum()), float(kurtosis)
    )


def is_dead(kernel: np.ndarray) -> np.ndarray:
    """Returns which channels of (taps, channels) hold nothing above 2^-20 of the largest weight."""
    largest = np.abs(np.asarray(kernel, np.float64)).max(axis=0)
    return largest <= DEAD_RATIO * largest.max()


def gains(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Returns the factors g_c that bring `other` nearest to `reference`: least squares, float32.

    g_c = sum(reference_c other_c) / sum(other_c^2), 1 where that is zero or negative

    Cross-layer equalization scales a layer's channels and undoes it in the next layer.  Where the
    median |log2 g_c| is below 0.1 the channels count as not scaled, and all g_c are 1: 4-bit
    weights change gains by a few percent, equalization by factors.

    Args:
      reference, other: float (..., channels): a tensor of two float networks.
    """
    channels = reference.shape[-1]
    reference, other = (x.reshape(-1, channels).astype(np.float64) for x in (reference, other))
    product, power = (reference * other).sum(axis=0), np.square(other).sum(axis=0)
    fits = (product > 0) & (power > 0)
    gain = np.where(fits, product, 1) / np.where(fits, power, 1)
    if not fits.any() or np.median(np.abs(np.log2(gain[fits]))) < 0.1:
        return np.ones(channels, np.float32)
    return gain.astype(np.float32)


def live_elements(
    steps: Sequence[tuple[Sequence[int], int]], elements: dict[int, int], outputs: Sequence[int]
) -> list[int]:
    """Returns how many elements are held while each step runs: its inputs, its output, and whatever
    a later step or the caller still reads.

    Args:
      steps: (inputs, output) of each operation, in order; buffers are numbers.
      elements: of each buffer.
      outputs: buffers that are never given back.
    """
    last = {}
    for index, (inputs, output) in enumerate(steps):
        last |= dict.fromkeys((*inputs, output), index)
    last |= dict.fromkeys(outputs, len(steps))
    held = set(elements) - {output for _, output in steps}  # the network's inputs
    counts = []
    for index, (_, output) in enumerate(steps):
        held.add(output)
        counts.append(sum(elements[value] for value in held))
        held = {value for value in held if last.get(value, -1) > index}
    return counts


def packed_bytes(elements: int, bits: int) -> int:
    """Returns the bytes of that many values of `bits` bits, packed."""
    return -(-elements * bits // 8)
