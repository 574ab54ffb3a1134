"""Range estimators (NumPy): from a stream of activations to one range, in bounded memory.

An estimator is a frozen dataclass with three pure methods: state = init(); state = update(state, x)
for each batch; (minimum, maximum) = result(state).  `x` is float32 of any shape whose first axis is
the image.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class MinMax:
    """The smallest and the largest value ever seen."""

    def init(self):
        return None

    def update(self, state, x: np.ndarray):
        low, high = float(x.min()), float(x.max())
        if state is not None:  # NumPy's hands NaN on, where Python's min(1.0, nan) is 1.0
            low, high = float(np.minimum(state[0], low)), float(np.maximum(state[1], high))
        return low, high

    def result(self, state) -> tuple[float, float]:
        return _checked(state)


@dataclasses.dataclass(frozen=True)
class MovingAverage:
    """Exponential moving average of each image's smallest and largest value (Jacob et al., 3.1).

    r <- decay * r + (1 - decay) * batch value, started at the first image's.
    """

    decay: float = 0.9

    def init(self):
        return None

    def update(self, state, x: np.ndarray):
        flat = x.reshape(len(x), -1)
        for low, high in zip(flat.min(axis=1).tolist(), flat.max(axis=1).tolist(), strict=True):
            if state is None:
                state = (low, high)
            state = (
                self.decay * state[0] + (1 - self.decay) * low,
                self.decay * state[1] + (1 - self.decay) * high,
            )
        return state

    def result(self, state) -> tuple[float, float]:
        return _checked(state)


@dataclasses.dataclass(frozen=True)
class Percentile:
    """The range that leaves out (100 - percentile)/2 percent of the values at each end.

    The values are counted in a histogram over [-limit, limit] whose limit doubles when a value
    falls outside (neighbouring bins merge exactly), so memory does not grow with the stream.  An
    end where every value lies in one bin beside zero (ReLU's zeros) stays exact: the result never
    leaves the smallest and the largest value seen.
    """

    percentile: float = 99.99
    bins: int = 8192  # even; the resolution at the end is at least limit/4096 = 1/32 of a code

    def init(self):
        return None

    def update(self, state, x: np.ndarray):
        low, high = float(x.min()), float(x.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError(f"activations run from {low} to {high}: not finite")
        reach = max(abs(low), abs(high), 1e-30)
        if state is None:
            state = (np.zeros(self.bins, np.int64), 2.0 ** np.ceil(np.log2(reach)), low, high)
        counts, limit, lowest, highest = state
        while reach > limit:
            merged = counts.reshape(-1, 2).sum(axis=1)
            counts = np.pad(merged, self.bins // 4)
            limit *= 2
        counts = counts + np.histogram(x, bins=self.bins, range=(-limit, limit))[0]
        return counts, limit, min(lowest, low), max(highest, high)

    def result(self, state) -> tuple[float, float]:
        if state is None:
            return _checked(None)
        counts, limit, lowest, highest = state
        edges = np.linspace(-limit, limit, self.bins + 1)
        total = counts.sum()
        outside = total * (1 - self.percentile / 100) / 2
        cumulative = np.cumsum(counts)
        first = int(np.searchsorted(cumulative, outside, side="right"))
        last = int(np.searchsorted(cumulative, total - outside, side="left"))
        return max(float(edges[first]), lowest), min(float(edges[last + 1]), highest)


def _checked(state) -> tuple[float, float]:
    if state is None:
        raise ValueError("no activation was observed: the calibration data is empty")
    if not np.isfinite(state).all():
        raise ValueError(f"activations run from {state[0]} to {state[1]}: not finite")
    return state


ESTIMATORS = {
    "minmax": MinMax(),
    "moving_average": MovingAverage(),
    "percentile": Percentile(),
}


def estimator(name: str):
    """Returns the named estimator; raises ValueError with the allowed names otherwise."""
    if name not in ESTIMATORS:
        raise ValueError(f"calibrator {name!r} is unknown; allowed are {', '.join(ESTIMATORS)}")
    return ESTIMATORS[name]
