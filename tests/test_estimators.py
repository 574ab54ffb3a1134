"""Histograms, and ranges by error, entropy and saturation, against brute force and plain loops."""

import dataclasses
import functools

import hypothesis
import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit import affine, auto_ranges, calibration, clipping, histogram, placement, ranges
from lowbit import spec as spec_lib

BITS_8 = spec_lib.QuantSpec(8)
BITS_4 = spec_lib.QuantSpec(4)
SYMMETRIC_4 = spec_lib.QuantSpec(4, symmetric=True, narrow_range=True)
SYMMETRIC_16 = spec_lib.QuantSpec(16, symmetric=True, narrow_range=True)
OF_HISTOGRAM = ("percentile", "mse", "entropy", "saturation")


def result(name, x, spec=BITS_8):
    estimator = ranges.estimator(name)
    summary = ranges.summarize(np.asarray(x, np.float32)[None])
    return estimator.result(estimator.update(estimator.init(), summary), spec)


def squared_error(x, low, high, spec):
    x = np.asarray(x, np.float32)
    return np.square(affine.fake_quantize(x, low, high, spec) - x.astype(np.float64)).sum()


# --- the histogram ------------------------------------------------------------------------------

# Products with 2^-100 must stay normal numbers: TensorFlow flushes the others to zero.
magnitudes = st.floats(2.0**-20, 2.0**99, width=32)
signed = st.one_of(st.just(0.0), magnitudes, magnitudes.map(lambda x: -x))
values = st.lists(signed, min_size=1, max_size=20)


@hypothesis.settings(max_examples=40)
@given(st.lists(values, min_size=1, max_size=5), st.randoms())
def test_merging_in_any_order_is_one_histogram(parts, random):
    whole = histogram.of(np.array(sum(parts, []), np.float32))
    random.shuffle(parts)
    merged = functools.reduce(histogram.merge, (histogram.of(np.array(p)) for p in parts))
    np.testing.assert_array_equal(merged.counts, whole.counts)
    assert dataclasses.replace(merged, counts=0) == dataclasses.replace(whole, counts=0)
    assert merged.counts.sum() + merged.zeros == sum(map(len, parts))


@given(values)
def test_bins_hold_their_values(found):
    x = np.array(found, np.float32)
    edges, counts = histogram.bins(histogram.of(x))
    assert edges[0] == x.min() and edges[-1] == x.max()
    place = np.searchsorted(edges[:-1], x[x != 0], side="right") - 1
    np.testing.assert_array_equal(counts, np.bincount(place, minlength=len(counts)))


@hypothesis.settings(max_examples=40)
@given(st.lists(signed, min_size=4, max_size=4))
def test_the_graph_counts_as_numpy_does(found):
    x = np.array(found, np.float32).reshape(2, 2)
    counts, zeros = calibration._counts(x, calibration._extremes(x))
    ours = histogram.from_counts(counts, zeros, x.min(), x.max())
    theirs = histogram.of(x)
    np.testing.assert_array_equal(ours.counts, theirs.counts)
    assert dataclasses.replace(ours, counts=0) == dataclasses.replace(theirs, counts=0)


# --- degenerate data ----------------------------------------------------------------------------

DEGENERATE = {
    "constant": np.full(50, 3.0),
    "negative constant": np.full(50, -3.0),
    "zeros": np.zeros(50),
    "one value": np.array([2.5]),
    "positive": np.linspace(2, 3, 1000),
    "negative": np.linspace(-3, -2, 1000),
    "one outlier": np.append(np.linspace(-1, 1, 30000), 100.0),
    "zero and one value": np.array([0.0] * 1000 + [6.0]),
    "two values": np.array([-1.0, 1.0]),
    "tiny": np.linspace(-1e-33, 2e-33, 100),
    "huge": np.linspace(-1e29, 1e29, 100),
}


@pytest.mark.parametrize("spec", [BITS_8, BITS_4, SYMMETRIC_16], ids=lambda s: str(s.bits))
@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("name", ranges.ESTIMATORS)
def test_degenerate_values_give_a_usable_range(name, case, spec):
    x = DEGENERATE[case].astype(np.float32)
    low, high = result(name, x, spec)
    assert x.min() <= low <= high <= x.max()
    affine.scale_and_zero_point(low, high, spec)
    if np.ptp(x) == 0:
        assert low == high == x[0]
    if case != "one outlier" and spec.bits > 4 and name != "saturation":
        # Nothing to clip: as good as the range of the values.
        ours, theirs = squared_error(x, low, high, spec), squared_error(x, x.min(), x.max(), spec)
        assert ours <= 1.5 * theirs + 1e-12 * np.square(x.astype(np.float64)).sum()


@pytest.mark.parametrize("name", ("percentile", "entropy"))
def test_one_outlier_of_thirty_thousand_is_cut(name):
    low, high = result(name, DEGENERATE["one outlier"], BITS_4)
    assert -1 <= low < -0.9 and 0.9 < high < 2


@pytest.mark.parametrize("name", OF_HISTOGRAM)
def test_zeros_of_a_relu_do_not_move_the_range(name, rng):
    positive = rng.gamma(1.0, 1.0, 5000)
    for zeros in (1, 50_000):
        assert result(name, np.append(positive, np.zeros(zeros)), BITS_4) == result(
            name, np.append(positive, 0.0), BITS_4
        )


@pytest.mark.parametrize("name", OF_HISTOGRAM)
def test_a_mirrored_tensor_has_the_mirrored_range(name, rng):
    # Bins are half open, and a mirrored one lends its edge to its neighbour: one bin of 2,048.
    x = rng.gamma(0.7, 1.0, 20000).astype(np.float32)
    low, high = result(name, x, BITS_4)
    mirrored = result(name, -x, BITS_4)
    np.testing.assert_allclose((-mirrored[1], -mirrored[0]), (low, high), atol=0.012 * x.max())


# --- mse ----------------------------------------------------------------------------------------

HEAVY = {
    "normal": lambda rng: rng.normal(0.7, 1, 20000),
    "student": lambda rng: rng.standard_t(3, 20000),
    "relu": lambda rng: np.maximum(rng.standard_t(4, 20000), 0),
    "relu6": lambda rng: np.clip(rng.normal(3, 4, 20000), 0, 6),
    "negative": lambda rng: -rng.gamma(0.5, 1, 20000),
}
SPECS = {
    "2 bits": spec_lib.QuantSpec(2),
    "3 bits": spec_lib.QuantSpec(3),
    "4 bits": BITS_4,
    "8 bits": BITS_8,
    "4 bits symmetric": SYMMETRIC_4,
}


@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize("kind", HEAVY)
def test_mse_is_within_a_hundredth_of_brute_force(kind, bits, rng):
    x, spec = HEAVY[kind](rng).astype(np.float32), SPECS[bits]
    lowest, highest = min(x.min(), 0.0), max(x.max(), 0.0)
    ours = squared_error(x, *result("mse", x, spec), spec)
    if spec.symmetric:
        reach = max(-lowest, highest)
        tried = [(-reach * f, reach * f) for f in np.linspace(0.02, 1, 150)]
    elif lowest < 0 < highest:
        fractions = np.linspace(0.04, 1, 25)
        tried = [(lowest * f, highest * g) for f in fractions for g in fractions]
    else:
        tried = [(lowest * f, highest * f) for f in np.linspace(0.02, 1, 150)]
    best = min(squared_error(x, low, high, spec) for low, high in tried)
    assert ours <= 1.01 * best
    if kind != "relu6" and spec.bits < 8:
        assert ours < 0.9 * squared_error(x, lowest, highest, spec)


@pytest.mark.parametrize("spec", [*SPECS.values(), SYMMETRIC_16], ids=str)
def test_squared_error_of_bins_is_that_of_even_values(spec, rng):
    left = np.sort(rng.uniform(-3, 3, 40))
    right, counts = left + rng.uniform(0, 0.3, 40), rng.integers(0, 9, 40)
    right[:3] = left[:3]
    low, high = np.array([-3.0, -0.4, -1.7]), np.array([3.3, 2.0, 0.1])
    found = ranges.squared_error(left, right, counts, low, high, spec)
    inside = (np.arange(20001) + 0.5) / 20001
    for index in range(3):
        x = left[:, None] + (right - left)[:, None] * inside
        scale, zero_point = affine.scale_and_zero_point(low, high, spec)
        code = np.rint(x / float(scale[index])) + zero_point[index]
        code = np.clip(code, *affine.integer_bounds(spec))
        error = np.square((code - zero_point[index]) * float(scale[index]) - x).mean(axis=1)
        assert found[index] == pytest.approx(counts @ error, rel=1e-4)


# --- entropy ------------------------------------------------------------------------------------


def entropy_in_loops(x, spec, bins, step, smoothing):
    """The docstring of ranges.Entropy, value by value and bin by bin; no two-power bins in between.

    Returns the divergence of each threshold, in bins.
    """
    x = x[x != 0]
    reach = np.abs(x).max()
    place = np.minimum(np.floor(x / reach * bins), bins - 1).astype(int)
    levels = 2**spec.bits - spec.narrow_range
    left, right = min(place.min(), 0), max(place.max() + 1, 0)
    divergences = {}
    for threshold in range(bins, 0, -step):
        first, last = max(left, -threshold), min(right, threshold)
        if last - first < levels:
            break
        inside = [float((place == b).sum()) for b in range(first, last)]
        p = list(inside)
        p[0] += (place < first).sum()
        p[-1] += (place >= last).sum()
        q = [0.0] * len(p)
        for level in range(levels):
            members = [b for b in range(len(p)) if b * levels // len(p) == level]
            filled = [b for b in members if p[b] > 0]
            for b in filled:
                q[b] = sum(inside[m] for m in members) / len(filled)
        support = [b for b in range(len(p)) if p[b] > 0]
        divergences[threshold] = sum(
            p[b] / sum(p)
            * np.log(
                (p[b] / sum(p))
                / ((1 - smoothing) * q[b] / sum(q) + smoothing / len(support))
            )
            for b in support
        )  # fmt: skip
    return divergences


@pytest.mark.parametrize("kind", ["student", "relu", "negative"])
def test_entropy_is_that_of_plain_loops(kind, rng):
    # The largest value is a power of two: the bins of both then lie on the same edges.
    x = HEAVY[kind](rng)
    x = (x / np.abs(x).max() * 8).astype(np.float32)
    estimator = ranges.Entropy(bins=128, step=4)
    low, high = estimator.result(ranges.summarize(x[None]).histogram, BITS_4)
    found = round(max(-low, high) / 8 * 128)
    divergences = entropy_in_loops(x, BITS_4, 128, 4, estimator.smoothing)
    assert found in divergences
    assert divergences[found] <= 1.02 * min(divergences.values()) + 1e-9
    assert min(divergences.values()) < 0.9 * divergences[128]  # there was something to choose


def test_entropy_without_enough_bins_keeps_the_values_range(rng):
    x = rng.standard_t(3, 5000)
    assert result("entropy", x, SYMMETRIC_16) == pytest.approx((x.min(), x.max()))


# --- saturation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", HEAVY)
def test_saturation_is_the_smallest_range_within_its_share(kind, bits, rng):
    x = HEAVY[kind](rng).astype(np.float32)
    low, high = result("saturation", x, spec_lib.QuantSpec(bits))
    limit = 4.0 ** -(bits + 1) * np.square(x.astype(np.float64)).sum() / 2
    width = 2.0 ** histogram.of(x).exponent / (histogram.BINS // 2)

    def beyond(end, sign):
        return np.square(np.maximum(sign * x.astype(np.float64) - sign * end, 0)).sum()

    if x.max() > 0:
        assert beyond(high, 1) <= 1.02 * limit  # values are not spread evenly over their bins
        assert beyond(high - 2 * width, 1) > 0.98 * limit
    if x.min() < 0:
        assert beyond(low, -1) <= 1.02 * limit
        assert beyond(low + 2 * width, -1) > 0.98 * limit


# --- weights ------------------------------------------------------------------------------------


def kernel_error(w, low, high, spec, moment):
    d = affine.fake_quantize(w, low, high, spec) - w.astype(np.float64)
    return np.array([d[:, c] @ moment(c) @ d[:, c] for c in range(w.shape[1])])


@pytest.mark.parametrize("weighting", ["none", "diagonal", "full", "each channel"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("per_channel", [True, False])
def test_clipped_weights_are_as_good_as_brute_force(per_channel, symmetric, weighting, rng):
    n, channels = 30, 4
    axis = -1 if per_channel else None
    spec = spec_lib.QuantSpec(3, symmetric=symmetric, narrow_range=symmetric, axis=axis)
    w = rng.standard_t(3, (n, channels)).astype(np.float32)
    x = rng.normal(size=(channels, 200, n)) * rng.gamma(0.5, 1, n)
    moments = np.einsum("cki,ckj->cij", x, x).astype(np.float32) / 200
    given_moment, moment = {
        "none": (None, lambda c: np.eye(n)),
        "diagonal": (np.diag(moments[0]), lambda c: np.diag(np.diag(moments[0]))),
        "full": (moments[0], lambda c: moments[0]),
        "each channel": (moments, lambda c: moments[c]),
    }[weighting]
    low, high = clipping.clip_weights(w, spec, given_moment)
    assert low.dtype == high.dtype == np.float32
    assert low.shape == high.shape == ((channels,) if per_channel else (1,))
    ours = kernel_error(w, low, high, spec, moment)
    own = (np.minimum(w.min(axis=0), 0), np.maximum(w.max(axis=0), 0))
    if not per_channel:
        own = own[0].min(keepdims=True), own[1].max(keepdims=True)
    fractions = np.linspace(0.05, 1, 20, dtype=np.float32)
    tried = [
        kernel_error(w, own[0] * f, own[1] * g, spec, moment) for f in fractions for g in fractions
    ]
    if per_channel:
        best = np.min(tried, axis=0)
    else:
        ours, best = ours.sum(), np.sum(tried, axis=1).min()
    assert (ours <= 1.03 * best).all()
    assert (ours <= kernel_error(w, *own, spec, moment)).all() or not per_channel
    assert ours.sum() < 0.9 * kernel_error(w, *own, spec, moment).sum()


def test_clipping_of_degenerate_kernels():
    spec = spec_lib.QuantSpec(4, symmetric=True, narrow_range=True, axis=-1)
    w = np.array([[0, 1, -2, 1e-9], [0, 1, -2, 0]], np.float32)
    low, high = clipping.clip_weights(w, spec)
    quantized = affine.fake_quantize(w, low, high, spec)
    np.testing.assert_allclose(quantized[:, :3], w[:, :3], rtol=1e-4)
    with pytest.raises(ValueError, match=r"shape \(3,\) does not fit a kernel of shape \(2, 4\)"):
        clipping.clip_weights(w, spec, np.ones(3))
    with pytest.raises(ValueError, match="NaN"):
        clipping.clip_weights(w, spec, np.array([1, np.nan]))


# --- auto ---------------------------------------------------------------------------------------


@pytest.fixture
def network(rng):
    """Returns network(kernel): an input of two channels, read behind padding by a 1x1 convolution."""

    def build(kernel):
        inputs = keras.Input((6, 6, 2))
        padded = keras.layers.ZeroPadding2D(1)(inputs)
        outputs = keras.layers.Conv2D(1, 1, use_bias=False)(padded)
        model = keras.Model(inputs, outputs)
        model.layers[-1].kernel.assign(np.reshape(kernel, (1, 1, 2, 1)))
        return placement.place(model, spec_lib.scheme("w8a4"))

    return build


def two_channels(rng, count=20):
    """Channel 0 is normal; channel 1 has rare values that are 30 times as large."""
    images = rng.normal(size=(count, 6, 6, 2)).astype(np.float32)
    images[..., 1] *= np.where(rng.random((count, 6, 6)) < 0.02, 30, 0)
    return images


@pytest.mark.parametrize("kernel", [(1.0, 0.0), (0.0, 1.0), (1.0, 0.05)])
def test_auto_picks_what_the_reader_feels_least(kernel, network, rng):
    model, images = network(kernel), two_channels(rng)
    points = calibration.observed_points(model)
    quantizer = points[0][0]
    state = ranges.Auto().init()
    for image in images:
        state = ranges.Auto().update(state, ranges.summarize(image[None]))
    by_name = ranges.Auto().result(state, quantizer.spec)
    assert list(by_name) == list(ranges.ESTIMATORS)

    def error(bounds):
        noise = affine.fake_quantize(images[:16], *bounds, quantizer.spec) - images[:16]
        noise, energy = (np.square(x @ np.array(kernel)).sum((1, 2)) for x in (noise, images[:16]))
        return np.median(noise / np.maximum(energy, 1e-30))

    errors = {name: error(bounds) for name, bounds in by_name.items()}
    best = min(errors, key=errors.get)
    assert errors[best] < 0.9 * max(errors.values())
    observed, count = calibration.observe(model, np.split(images, 4), ranges.estimator("auto"))
    assert count == 20
    np.testing.assert_allclose(observed[quantizer][0], by_name[best], rtol=1e-6)
    if kernel[1] == 0:  # nobody reads the channel with the outliers
        assert observed[quantizer][0][1] < 0.5 * images.max()


def test_readers_of_every_kind_are_found(rng):
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 3, padding="same", activation="relu", name="first")(inputs)
    y = keras.layers.Conv2D(4, 3, padding="same", name="branch")(x)
    z = keras.layers.Add(name="add")([x, y])
    pooled = keras.layers.MaxPooling2D(2, name="pool")(z)
    flat = keras.layers.Flatten(name="flat")(pooled)
    model = placement.place(
        keras.Model(inputs, keras.layers.Dense(3, name="dense")(flat)), spec_lib.scheme("w8a4")
    )
    images = rng.normal(size=(3, 8, 8, 3)).astype(np.float32)
    extremes, _ = calibration.observe(model, [images])  # leaves a node behind
    found = {
        quantizer.name: [
            ([one.name for one in path], layer and layer.name)
            for path, layer in auto_ranges._readers(model, tensor)
        ]
        for quantizer, _, tensor in calibration.observed_points(model)
    }
    assert list(found.values()) == [
        [([], "first")],
        [([], "branch"), ([], None)],
        [([], None)],
        [(["pool", "flat"], "dense")],
        [([], None)],
    ]
    observed, _ = calibration.observe(model, [images], ranges.estimator("auto"))
    *_, (output, _, _) = calibration.observed_points(model)
    np.testing.assert_array_equal(observed[output], extremes[output])  # logits are not clipped
