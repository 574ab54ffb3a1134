"""Range estimators against one pass over everything; folding against Keras' own layers."""

import numpy as np
import pytest

from lowbit import fold, histogram, ranges
from lowbit import spec as spec_lib

BATCHES = (7, 1, 16, 8)
SPEC = spec_lib.QuantSpec(8)


@pytest.fixture
def stream(rng):
    """Returns batches whose scale grows, so that the histogram must double its limit."""
    return [
        (rng.normal(0.2, 0.5 * 3**index, (count, 6, 5, 4))).astype(np.float32)
        for index, count in enumerate(BATCHES)
    ]


def observed(estimator, batches):
    state = estimator.init()
    for batch in batches:
        state = estimator.update(state, ranges.summarize(batch))
    return state


@pytest.mark.parametrize("name", ranges.CALIBRATORS)
def test_streaming_equals_one_batch(name, stream):
    estimator = ranges.estimator(name)
    streamed = estimator.result(observed(estimator, stream), SPEC)
    singles = [image[None] for batch in stream for image in batch]
    one_by_one = estimator.result(observed(estimator, singles), SPEC)
    whole = estimator.result(observed(estimator, [np.concatenate(stream)]), SPEC)
    assert streamed == one_by_one == whole


def test_min_max_is_that_of_everything(stream):
    everything = np.concatenate(stream)
    low, high = ranges.MinMax().result(observed(ranges.MinMax(), stream), SPEC)
    assert (low, high) == (everything.min(), everything.max())


def test_moving_average_is_a_loop_over_images(stream):
    everything = np.concatenate(stream).reshape(sum(BATCHES), -1)
    low, high = float(everything[0].min()), float(everything[0].max())
    for image in everything[1:]:
        low, high = 0.8 * low + 0.2 * image.min(), 0.8 * high + 0.2 * image.max()
    estimator = ranges.MovingAverage(decay=0.8)
    found = estimator.result(observed(estimator, stream), SPEC)
    np.testing.assert_allclose(found, (low, high), 1e-6)


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
def test_percentile_is_within_a_bin_of_sorting(percentile, rng):
    parts = [rng.normal(0.3, 1.0, (50, 200)).astype(np.float32) * (1 + i) for i in range(20)]
    estimator = ranges.Percentile(percentile)
    state = observed(estimator, parts)
    low, high = estimator.result(state, SPEC)
    everything = np.sort(np.concatenate(parts), axis=None)
    outside = round(everything.size * (100 - percentile) / 200)
    limit = 2.0**state.exponent
    assert np.abs(everything).max() <= limit < 2 * np.abs(everything).max()
    width = 2 * limit / histogram.BINS
    lowest_kept, highest_kept = everything[outside], everything[-1 - outside]
    # (100 - 99.9) / 200 is not exact: the end may lie in the bin of the value next to it.
    assert low <= lowest_kept and everything[outside - 1] <= low + width
    assert high >= highest_kept and everything[-outside] >= high - width
    expected = np.percentile(everything, [(100 - percentile) / 2, (100 + percentile) / 2])
    np.testing.assert_allclose((lowest_kept, highest_kept), expected, rtol=5e-3)
    # No more than the stated share is cut off.
    assert (everything < low).sum() <= outside and (everything > high).sum() <= outside


def test_percentile_100_is_min_max(stream):
    estimator = ranges.Percentile(100.0)
    everything = np.concatenate(stream)
    found = estimator.result(observed(estimator, stream), SPEC)
    assert found == (everything.min(), everything.max())


def test_percentile_of_relu_starts_at_zero(stream):
    relu = [np.maximum(batch, 0) for batch in stream]
    for percentile in (99.0, 99.99, 100.0):
        state = observed(ranges.Percentile(), relu)
        low, high = ranges.Percentile(percentile).result(state, SPEC)
        assert low == 0 < high <= max(batch.max() for batch in relu)


def test_percentile_cuts_one_outlier(rng):
    x = rng.uniform(-1, 1, (100, 1000)).astype(np.float32)
    x[50, 500] = 100.0
    low, high = ranges.Percentile(99.99).result(observed(ranges.Percentile(99.99), [x]), SPEC)
    assert -1 <= low < -0.98 and 0.98 < high < 1.02


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", range(len(BATCHES)))
@pytest.mark.parametrize("name", ranges.CALIBRATORS)
def test_values_that_are_not_finite_are_refused(name, place, bad, stream):
    stream[place][0, 2, 3, 1] = bad
    estimator = ranges.estimator(name)
    with pytest.raises(ValueError, match="not finite"):
        estimator.result(observed(estimator, stream), SPEC)


@pytest.mark.parametrize("name", ranges.CALIBRATORS)
def test_no_data_is_refused(name):
    estimator = ranges.estimator(name)
    with pytest.raises(ValueError, match="no activation was observed"):
        estimator.result(estimator.init(), SPEC)


def test_unknown_estimator_lists_the_known():
    with pytest.raises(ValueError, match="'kl' is unknown; allowed are minmax, moving_average, "):
        ranges.estimator("kl")


# --- folding ------------------------------------------------------------------------------------


GAMMAS = {
    "positive": lambda rng, n: rng.uniform(0.5, 2, n),
    "negative": lambda rng, n: -rng.uniform(0.5, 2, n),
    "zero": lambda rng, n: np.where(np.arange(n) % 2, 1.5, 0),
    "tiny": lambda rng, n: np.where(np.arange(n) % 2, 1.5, 1e-12),
}


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("kind", ["conv", "depthwise1", "depthwise2", "dense"])
def test_folded_equals_keras_layers(kind, use_bias, gamma, rng):
    keras = pytest.importorskip("keras")
    make = {
        "conv": lambda: keras.layers.Conv2D(5, 3, padding="same", use_bias=use_bias),
        "depthwise1": lambda: keras.layers.DepthwiseConv2D(3, use_bias=use_bias),
        "depthwise2": lambda: keras.layers.DepthwiseConv2D(
            3, depth_multiplier=2, use_bias=use_bias
        ),
        "dense": lambda: keras.layers.Dense(5, use_bias=use_bias),
    }[kind]
    layer, norm = make(), keras.layers.BatchNormalization(epsilon=1e-3)
    x = rng.normal(size=(4, 3) if kind == "dense" else (2, 6, 6, 3)).astype(np.float32)
    norm(layer(x))
    channels = norm.gamma.shape[0]
    vectors = {
        "gamma": GAMMAS[gamma](rng, channels),
        "beta": rng.normal(size=channels),
        "moving_mean": rng.normal(size=channels),
        "moving_variance": rng.uniform(1e-3, 3, channels),
    }
    for name, value in vectors.items():
        getattr(norm, name).assign(value.astype(np.float32))
    bias = rng.normal(size=channels).astype(np.float32) if use_bias else np.zeros(channels)
    if use_bias:
        layer.bias.assign(bias)
    expected = keras.ops.convert_to_numpy(norm(layer(x), training=False))
    kernel, bias = fold.fold_batch_norm(
        keras.ops.convert_to_numpy(layer.kernel), bias, *vectors.values(), epsilon=1e-3
    )
    assert kernel.shape == layer.kernel.shape and kernel.dtype == bias.dtype == np.float32
    assert bias.shape == (channels,)
    folded = type(layer).from_config(layer.get_config() | {"use_bias": True})
    folded.build(x.shape)
    folded.kernel.assign(kernel)
    folded.bias.assign(bias)
    # Two orders of the same float32 products: a few units in the last place of the largest.
    atol = 2e-6 * max(1, np.abs(expected).max())
    np.testing.assert_allclose(keras.ops.convert_to_numpy(folded(x)), expected, rtol=0, atol=atol)


def test_vectors_that_do_not_fit_are_refused():
    vectors = [np.ones(7)] * 5
    for shape in [(3, 3, 2, 4), (2, 4)]:
        with pytest.raises(ValueError, match=r"7 batch-norm channels do not fit a kernel \("):
            fold.fold_batch_norm(np.ones(shape), *vectors, epsilon=1e-3)
