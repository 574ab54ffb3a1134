"""Range estimators (NumPy): from a stream of activations to one range, in bounded memory.

An estimator is a frozen dataclass with three pure methods: state = init(); state = update(state,
summary) for each batch; (minimum, maximum) = result(state, spec), where `spec` says into which
codes the range will be divided.  Every range lies within the values seen.

    minmax          the smallest and the largest value
    moving_average  of each image's smallest and largest value
    percentile      leaves out a share of the values
    saturation      leaves out a share of the energy: saturation error alone
    mse             smallest sum of saturation and rounding error
    entropy         smallest KL divergence between the values' distribution and the codes'
    auto            of these, for each tensor, the one with the smallest error behind the layers that
                    read it: `auto_ranges` chooses, here they share one pass over the images
"""

import dataclasses
from typing import ClassVar

import numpy as np

from lowbit import affine, histogram
from lowbit import spec as spec_lib


@dataclasses.dataclass(frozen=True)
class Summary:
    """What the estimators need to know of a batch of one tensor."""

    extremes: np.ndarray  # (images, 2): each image's smallest and largest value
    histogram: histogram.Histogram | None  # of all values; None where no estimator asks for it


def summarize(x: np.ndarray) -> Summary:
    """Returns the summary of float32 `x` (images, ...); raises ValueError if it is not finite."""
    flat = x.reshape(len(x), -1)
    return Summary(np.stack([flat.min(axis=1), flat.max(axis=1)], axis=1), histogram.of(x))


@dataclasses.dataclass(frozen=True)
class MinMax:
    """The smallest and the largest value ever seen."""

    needs_histogram: ClassVar[bool] = False

    def init(self):
        return None

    def update(self, state, summary: Summary):
        # NumPy's minimum hands NaN on, where Python's min(1.0, nan) is 1.0.
        low, high = float(summary.extremes[:, 0].min()), float(summary.extremes[:, 1].max())
        if state is not None:
            low, high = float(np.minimum(state[0], low)), float(np.maximum(state[1], high))
        return low, high

    def result(self, state, spec: spec_lib.QuantSpec) -> tuple[float, float]:
        return _checked(state)


@dataclasses.dataclass(frozen=True)
class MovingAverage:
    """Exponential moving average of each image's smallest and largest value (Jacob et al., 3.1).

    r <- decay * r + (1 - decay) * image's value, started at the first image's.
    """

    decay: float = 0.9
    needs_histogram: ClassVar[bool] = False

    def init(self):
        return None

    def update(self, state, summary: Summary):
        for low, high in summary.extremes.tolist():
            if state is None:
                state = (low, high)
            state = (
                self.decay * state[0] + (1 - self.decay) * low,
                self.decay * state[1] + (1 - self.decay) * high,
            )
        return state

    def result(self, state, spec: spec_lib.QuantSpec) -> tuple[float, float]:
        return _checked(state)


def _checked(state) -> tuple[float, float]:
    if state is None:
        raise ValueError("no activation was observed: the calibration data is empty")
    histogram.check_finite(*state)
    return state


class _OfHistogram:
    """Estimators whose state is one histogram: they can share it."""

    needs_histogram: ClassVar[bool] = True

    def init(self):
        return None

    def update(self, state, summary: Summary):
        if state is None:
            return summary.histogram
        return histogram.merge(state, summary.histogram)

    def result(self, state, spec: spec_lib.QuantSpec) -> tuple[float, float]:
        if state is None:
            return _checked(None)
        if state.lowest == state.highest:
            return state.lowest, state.highest
        return self._range(state, spec)


@dataclasses.dataclass(frozen=True)
class Percentile(_OfHistogram):
    """The range that leaves out (100 - percentile)/2 percent of the values at each end.

    Zeros do not count, and are always in the range.  An end where every value lies in one bin
    stays exact.
    """

    percentile: float = 99.99

    def _range(self, state, spec):
        edges, counts = histogram.bins(state)
        total = counts.sum()
        outside = total * (1 - self.percentile / 100) / 2
        cumulative = np.cumsum(counts)
        first = int(np.searchsorted(cumulative, outside, side="right"))
        last = int(np.searchsorted(cumulative, total - outside, side="left"))
        low, high = float(edges[first]), float(edges[last + 1])
        if state.zeros:
            low, high = min(low, 0.0), max(high, 0.0)
        return low, high


@dataclasses.dataclass(frozen=True)
class Saturation(_OfHistogram):
    """The smallest range whose saturation error is at most a share of the energy.

        sum over x > b of (x - b)^2 <= share / 2 * sum of x^2,  and so below a

    The share is 4**-(bits + 1): a signal that fills its range evenly has a rounding error of
    4**-bits of its energy (6.02 dB a bit), and saturation may cost a quarter of that.  Unlike
    `mse` it does not weigh saturation against rounding: where outliers hold the energy it keeps
    them, however coarse the codes become.  The whitepaper's author says in his slides that TFLite
    goes by "saturation error" and gives no formula; this one is ours.  Ends lie on bin edges.
    """

    share: float | None = None  # None: 4**-(bits + 1)

    def _range(self, state, spec):
        share = 4.0 ** -(spec.bits + 1) if self.share is None else self.share
        edges, counts = histogram.bins(state)
        limit = share * _power_sum(edges, counts, 2).sum() / 2
        low = -_saturated_end(-edges[::-1], counts[::-1], limit) if state.lowest < 0 else 0.0
        high = _saturated_end(edges, counts, limit) if state.highest > 0 else 0.0
        return _kept_within(state, low, high)


def _kept_within(state, low, high):
    """Returns a range that holds zero, (low, high), without the part of it where no value is."""
    return max(low, min(state.lowest, high)), min(high, max(state.highest, low))


def _power_sum(edges, counts, power):
    """Returns each bin's sum of x**power, its values spread evenly over it; (n,)."""
    left, right = edges[:-1], edges[1:]
    # (r^(p+1) - l^(p+1)) / ((p+1) (r - l)) without the quotient
    terms = [left**p * right ** (power - p) for p in range(power + 1)]
    return counts * sum(terms) / (power + 1)


def _saturated_end(edges, counts, limit):
    """Returns the smallest edge b >= 0 with sum over x > b of (x - b)^2 <= limit."""
    sums = [_power_sum(edges, counts, power) for power in range(3)]
    # Of the bins from each edge on: one more edge than bins, nothing beyond the last.
    zeroth, first, second = (np.append(np.cumsum(s[::-1])[::-1], 0.0) for s in sums)
    error = second - 2 * edges * first + edges**2 * zeroth
    # The differences of large sums: as exact as 1e-12 of the energy.
    return float(edges[(edges >= 0) & (error <= limit + 1e-12 * second[0])][0])


@dataclasses.dataclass(frozen=True)
class MeanSquaredError(_OfHistogram):
    """The range with the smallest sum of (Q(x) - x)^2, Q being `affine`'s quantizer with its bits.

    Both ends are searched: on a geometric grid of fractions of the smallest and the largest value
    (2**0 to 2**-10), then around the best pair with steps halved to 1%.
    Symmetric codes, and values on one side of zero, leave one number to search.
    """

    def _range(self, state, spec):
        edges, counts = histogram.bins(state)
        filled = counts > 0
        fine = edges[:-1][filled], edges[1:][filled], counts[filled]
        # A grid over both ends has 441 pairs: on all bins they take 0.2 s a tensor, on these 0.01.
        coarse = _joined(*fine, 512)
        lowest, highest = min(state.lowest, 0.0), max(state.highest, 0.0)
        two_sided = lowest < 0 < highest and not spec.symmetric

        def ends(log2_low, log2_high):
            if spec.symmetric:  # one threshold
                threshold = max(-lowest, highest) * 2.0**log2_high
                return np.maximum(lowest, -threshold), np.minimum(highest, threshold)
            return lowest * 2.0**log2_low, highest * 2.0**log2_high

        best, step = (0.0, 0.0), 0.5 if two_sided else 0.125
        offsets, values = -np.arange(0, 10 + step, step), coarse
        while step > 2**-7:
            low, high = np.meshgrid(offsets, offsets) if two_sided else (offsets, offsets)
            low, high = np.minimum(best[0] + low.ravel(), 0), np.minimum(best[1] + high.ravel(), 0)
            index = int(np.argmin(squared_error(*values, *ends(low, high), spec)))
            best, step = (low[index], high[index]), step / 2
            offsets, values = np.arange(-2, 3) * step, fine
        low, high = ends(*best)
        return _kept_within(state, float(low), float(high))


def _joined(left, right, counts, most):
    """Returns the bins with neighbours joined until there are at most `most`."""
    each = -(-len(counts) // most)
    starts = np.arange(0, len(counts), each)
    ends = np.minimum(starts + each, len(counts)) - 1
    return left[starts], right[ends], np.add.reduceat(counts, starts)


def squared_error(
    left: np.ndarray,
    right: np.ndarray,
    counts: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    spec: spec_lib.QuantSpec,
) -> np.ndarray:
    """Returns the sum of (Q(x) - x)^2 of n bins for each of k ranges; float64 (k,).

    The values of a bin are spread evenly over it, and integrated, in units of the scale:

        t = x / scale + zero_point,  c = clip(rint(t), lowest, highest)
        integral of (t - c)^2 dt = c / 12 + (t - c)^3 / 3

    so that codes may be narrower than bins, too (16 bits).

    Args:
      left, right: float64 (n,), where each bin begins and ends; equal where it is one value.
      counts: (n,).
      low, high: float (k,).
    """
    lowest, highest = affine.integer_bounds(spec)
    scales, zero_points = affine.scale_and_zero_point(low, high, spec)
    edges = np.stack([left, right])
    errors = np.empty(len(scales))
    for index, (scale, zero_point) in enumerate(
        zip(scales.tolist(), zero_points.tolist(), strict=True)
    ):
        t = edges * (1 / scale) + zero_point
        c = np.clip(np.rint(t), lowest, highest)
        offset = t - c
        below, above = c * (1 / 12) + offset * offset * offset * (1 / 3)
        width = t[1] - t[0]
        # A bin as narrow as rounding noise (its values are all the same) counts as a point.
        point = width < 1e-6
        mean = np.where(point, offset[0] ** 2, (above - below) / np.where(point, 1, width))
        errors[index] = (counts @ mean) * scale**2
    return errors


@dataclasses.dataclass(frozen=True)
class Entropy(_OfHistogram):
    """The threshold with the smallest KL(P || Q), after TensorRT (Migacz, GTC 2017, slides 36-39).

    `bins` equal bins from zero to the largest |x|, and as many on the other side where there are
    values.  For a threshold T the range is [max(smallest value, -T), min(largest value, T)], and
        P  its bins, the values outside added to the first and the last one
        Q  its bins without those values, joined to as many groups as there are codes; each
           group's sum spread evenly over those of its bins where P is not zero
    both normalized, and Q smoothed by 1e-4 of an even distribution over the bins of P, because
    Q = 0 where P > 0 would be an infinite divergence.

    Where we differ from the slides: they have |x| in 2,048 bins and 128 groups, for codes
    symmetric about zero; here one threshold serves both ends, and all 2**bits codes lie between
    them.  Zeros do not count.  T begins where each code has a bin; with more codes than bins
    nothing is to be learned, and the range is that of the values.
    """

    bins: int = 2048
    step: int = 8  # bins between two thresholds
    smoothing: float = 1e-4

    def _range(self, state, spec):
        reach = max(-state.lowest, state.highest)
        left = int(np.floor(min(state.lowest, 0) / reach * self.bins))
        right = int(np.ceil(max(state.highest, 0) / reach * self.bins))
        edges, counts = histogram.bins(state)
        cumulative = np.concatenate([[0], np.cumsum(counts)])
        counts = np.diff(
            np.interp(np.arange(left, right + 1) / self.bins * reach, edges, cumulative)
        )
        levels = 2**spec.bits - spec.narrow_range
        best, best_divergence = self.bins, np.inf
        for threshold in range(self.bins, 0, -self.step):
            first, last = max(left, -threshold) - left, min(right, threshold) - left
            if last - first < levels:
                break
            divergence = self._divergence(counts, first, last, levels)
            if divergence < best_divergence:
                best, best_divergence = threshold, divergence
        threshold = best / self.bins * reach
        return max(state.lowest, -threshold), min(state.highest, threshold)

    def _divergence(self, counts, first, last, levels):
        inside = counts[first:last]
        p = inside.copy()
        p[0] += counts[:first].sum()
        p[-1] += counts[last:].sum()
        if not inside.any():
            return np.inf
        support = p > 0
        groups = (np.arange(len(inside)) * levels) // len(inside)
        sums = np.bincount(groups, inside, levels)
        widths = np.bincount(groups, support, levels)
        q = (sums / np.maximum(widths, 1))[groups][support]
        p = p[support] / p.sum()
        q = (1 - self.smoothing) * q / q.sum() + self.smoothing / len(q)
        return float(np.sum(p * np.log(p / q)))


@dataclasses.dataclass(frozen=True)
class Auto:
    """Every estimator's range at once, from one moving average and one histogram."""

    needs_histogram: ClassVar[bool] = True

    def init(self):
        return None, None

    def update(self, state, summary: Summary):
        return (
            MovingAverage().update(state[0], summary),
            _OfHistogram().update(state[1], summary),
        )

    def result(self, state, spec: spec_lib.QuantSpec) -> dict[str, tuple[float, float]]:
        average, counted = state
        found = {}
        states = {
            "minmax": None if counted is None else (counted.lowest, counted.highest),
            "moving_average": average,
        }
        for name, one in ESTIMATORS.items():
            found[name] = one.result(states.get(name, counted), spec)
        return found


ESTIMATORS = {
    "minmax": MinMax(),
    "moving_average": MovingAverage(),
    "percentile": Percentile(),
    "mse": MeanSquaredError(),
    "entropy": Entropy(),
    "saturation": Saturation(),
}
CALIBRATORS = (*ESTIMATORS, "auto")


def estimator(name: str):
    """Returns the named estimator; raises ValueError with the allowed names otherwise."""
    if name == "auto":
        return Auto()
    if name not in ESTIMATORS:
        raise ValueError(f"calibrator {name!r} is unknown; allowed are {', '.join(CALIBRATORS)}")
    return ESTIMATORS[name]
