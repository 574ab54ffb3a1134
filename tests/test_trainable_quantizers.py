"""Learned ranges, soft and stochastic rounding, binary weights: values to the last bit, gradients
against the papers' formulas in NumPy and against finite differences."""

import dataclasses

import hypothesis
import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies

from lowbit import affine, binary, dsq, fakequant, lsq, pact, spec, stochastic

WEIGHTS = [spec.QuantSpec(bits, symmetric=True, narrow_range=True) for bits in range(2, 9)]
ASYMMETRIC = [spec.QuantSpec(bits) for bits in range(2, 9)]  # activations, and weights too
OTHERS = [
    spec.QuantSpec(16, symmetric=True, narrow_range=True),
    spec.QuantSpec(4, symmetric=True),  # with the code that has no positive twin
    spec.QuantSpec(4, symmetric=True, signed=False),
    spec.QuantSpec(3, signed=False, narrow_range=True),
]
SPECS = [*WEIGHTS, *ASYMMETRIC, *OTHERS]
FUNCTIONS = {
    "pact": pact.fake_quantize,
    "lsq": lsq.fake_quantize,
    "dsq": dsq.fake_quantize,
    "stochastic": stochastic.fake_quantize,
}
RANGES = [
    (-1.3, 2.7),
    (-2.0, 2.0),
    (0.0, 6.0),
    (-3.0, 9.0),  # ReLU6, and not the range, clips above
    (2.1, 3.5),
    (-5.0, 0.0),  # with ReLU a single code is left
    (0.0, 0.0),
    (-1e-40, 1e-40),
    (-1e-3, 1e30),
]


def brief(one):
    sides = "symmetric" if one.symmetric else "asymmetric"
    return f"{one.bits}-{sides}" + "-narrow" * one.narrow_range + "-unsigned" * (not one.signed)


def run_eagerly(function):
    return function


def run_in_graph(function):
    return tf.function(function, autograph=False)


HIGHEST = {"relu6": 6, "unit": 1}  # values that an activation function cuts at
RUNNERS = {"eager": run_eagerly, "graph": run_in_graph}


def gradients(function, upstream, *values, runner="eager", **named):
    """Returns NumPy gradients of sum(upstream * function(*values)) for each value, named ones last."""
    count = len(values)

    def compute(*tensors):
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            y = function(*tensors[:count], **dict(zip(named, tensors[count:], strict=True)))
            loss = tf.reduce_sum(y * upstream)
        found = tape.gradient(loss, tensors, unconnected_gradients="zero")
        return [tf.convert_to_tensor(gradient) for gradient in found]

    tensors = [tf.constant(value, tf.float32) for value in (*values, *named.values())]
    return [gradient.numpy() for gradient in RUNNERS[runner](compute)(*tensors)]


def around(low, high, rng, count=400):
    """float32 (n, 4): values in and around a range, ties, its bounds, zeros and infinities."""
    reach = max(abs(low), abs(high), 1e-3)
    inside = rng.uniform(min(low, 0) - 0.2 * reach, max(high, 0) + 0.2 * reach, count)
    ties = (np.arange(-6, 6) + 0.5) * reach / 7
    special = [low, high, 0.0, -0.0, np.inf, -np.inf, reach * 1e3, -reach * 1e3]
    return np.float32(np.concatenate([inside, ties, special])).reshape(-1, 4)


# --- forward: the bits of fakequant -------------------------------------------------------------


@pytest.mark.parametrize("one", SPECS, ids=brief)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_are_fakequants_to_the_last_bit(name, one, rng):
    # Activation functions are fused into activations; of weights' specs one is enough.
    fused = ("relu", "relu6") if one in [*ASYMMETRIC, WEIGHTS[0], OTHERS[0]] else ()
    for low, high in RANGES:
        x = around(low, high, rng)
        bounds = [np.float32(low), np.float32(high)]
        found = FUNCTIONS[name](x, *bounds, one).numpy()
        np.testing.assert_array_equal(found, affine.fake_quantize(x, *bounds, one))
        for activation in fused:
            found = FUNCTIONS[name](x, *bounds, one, activation).numpy()
            expected = fakequant.fake_quantize(x, *bounds, one, activation).numpy()
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("one", [*WEIGHTS[::3], *ASYMMETRIC[::3]], ids=brief)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_channel_has_its_range(name, one, rng):
    one = dataclasses.replace(one, axis=-1)
    low, high = np.float32(RANGES[:-1]).T.copy()  # the range of 1e30 would make the others dead
    for rank in range(1, 6):
        x = rng.normal(0, 3, (2, 1, 3, 2)[: rank - 1] + (len(low),)).astype(np.float32)
        expected = affine.fake_quantize(x, low, high, one)
        np.testing.assert_array_equal(FUNCTIONS[name](x, low, high, one).numpy(), expected)
        of_x, of_low, of_high = gradients(
            lambda x, low, high: FUNCTIONS[name](x, low, high, one), x, x, low, high
        )
        assert of_x.shape == x.shape and of_low.shape == of_high.shape == low.shape


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("one, activation", [(WEIGHTS[0], None), (ASYMMETRIC[2], "relu6")])
def test_one_loop_and_a_graph_change_nothing(name, one, activation, rng):
    x = rng.normal(0, 4, (50, 20)).astype(np.float32)
    bounds = [np.float32(-2.9), np.float32(7.3)]

    def quantize(compiled):
        return lambda *tensors: FUNCTIONS[name](*tensors, one, activation, compiled=compiled)

    expected = fakequant.fake_quantize(x, *bounds, one, activation).numpy()
    compiled = RUNNERS["graph"](quantize(True))(*(tf.constant(t) for t in (x, *bounds)))
    np.testing.assert_array_equal(compiled.numpy(), expected)
    plain = gradients(quantize(False), x, x, *bounds)
    for runner, loop in (("eager", True), ("graph", False)):
        for found, value in zip(
            gradients(quantize(loop), x, x, *bounds, runner=runner), plain, strict=True
        ):
            # Sums of 1000 values of size 16, added in another order.
            np.testing.assert_allclose(found, value, rtol=1e-4, atol=0.02)


# --- gradients: no NaN --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pact", "lsq", "dsq"])
@pytest.mark.parametrize("one", [WEIGHTS[0], *ASYMMETRIC[::6], OTHERS[0]], ids=brief)
@pytest.mark.parametrize("activation", fakequant.ACTIVATIONS)
def test_gradients_are_always_finite(name, one, activation, rng):
    # Two bits, symmetric and narrow, under ReLU: one interval.  (-5, 0) under ReLU: none.
    alpha = np.float32([0.0, -1.0, 1e-30, 1e-4, 0.2, 0.5, 1.0, 3.0])
    settings = {"alpha": alpha} if name == "dsq" else {}
    for bounds in RANGES:
        x = np.repeat(around(*bounds, rng, 20).reshape(-1, 1), len(alpha), axis=1)
        upstream = rng.normal(size=x.shape).astype(np.float32)
        found = gradients(
            lambda x, low, high, **settings: FUNCTIONS[name](
                x, low, high, one, activation, **settings
            ),
            upstream,
            *(x, *bounds),
            **settings,
        )
        for gradient in found:
            assert np.isfinite(gradient).all(), bounds
        assert not found[0][np.isinf(x)].any()


# --- PACT ---------------------------------------------------------------------------------------


def clamps_gradients(x, upstream, bounds, one, activation):
    """The formulas of pact's docstring, and where the activation function is what clips."""
    scale, zero_point = affine.scale_and_zero_point(*bounds, one)
    lowest, highest = affine.integer_bounds(one)
    code_low = lowest if activation is None else max(lowest, int(zero_point))
    code_high = highest
    if activation in HIGHEST:
        bound = np.float32(HIGHEST[activation])
        code_high = min(highest, int(zero_point) + int(np.rint(bound / scale)))
    low, high = (np.float32(code - zero_point) * scale for code in (code_low, code_high))
    of_x = np.where((low <= x) & (x <= high), upstream, 0)
    of_minimum = upstream[x < low].sum() if activation is None else 0
    of_maximum = upstream[x > high].sum() if code_high == highest else 0
    return of_x, of_minimum, of_maximum, low, high


@pytest.mark.parametrize("activation", fakequant.ACTIVATIONS)
@pytest.mark.parametrize("bounds", [(-3.0, 9.0), (0.0, 5.0), (0.0, 6.1)], ids=str)
@pytest.mark.parametrize("runner, compiled", [("eager", False), ("graph", True)])
def test_pact_is_the_clamps_gradient(activation, bounds, compiled, runner, rng):
    one, bounds = spec.QuantSpec(), np.float32(bounds)
    x = rng.uniform(-5, 12, 2000).astype(np.float32)
    *_, low, high = clamps_gradients(x, x, bounds, one, activation)
    steps = [low, high, 0, np.nextafter(low, np.float32(-99)), np.nextafter(high, np.float32(99))]
    steps += [np.nextafter(low, np.float32(99)), np.nextafter(high, np.float32(-99))]
    x = np.concatenate([x, steps]).astype(np.float32)
    x = x[(x == 0) | (np.abs(x) > 1e-30)]  # TensorFlow takes subnormal numbers for zero
    upstream = rng.integers(-8, 9, x.size).astype(np.float32)  # whole: sums have no rounding

    def quantize(x, low, high):
        return pact.fake_quantize(x, low, high, one, activation, compiled)

    found = gradients(quantize, upstream, x, *bounds, runner=runner)
    expected = clamps_gradients(x, upstream, bounds, one, activation)[:3]
    for gradient, value in zip(found, expected, strict=True):
        np.testing.assert_array_equal(gradient, value)
    if activation is None:
        assert expected[2] != 0


def test_pact_of_each_channels_range(rng):
    one = spec.QuantSpec(axis=-1)
    x = rng.normal(0, 2, (5, 6, 3)).astype(np.float32)
    low, high = np.float32([-1, -2, 0]), np.float32([1, 0.5, 3])
    upstream = rng.integers(-8, 9, x.shape).astype(np.float32)
    found = gradients(lambda *tensors: pact.fake_quantize(*tensors, one), upstream, x, low, high)
    for channel in range(3):
        expected = clamps_gradients(
            x[..., channel], upstream[..., channel], (low[channel], high[channel]), one, None
        )
        np.testing.assert_array_equal(found[0][..., channel], expected[0])
        assert (found[1][channel], found[2][channel]) == expected[1:3]


def test_range_penalty_is_a_sum_of_squares():
    bounds = [tf.Variable([1.0, -2.0]), tf.Variable(3.0)]
    with tf.GradientTape() as tape:
        penalty = pact.range_penalty(bounds, 0.5)
    assert penalty.numpy() == 7.0
    of_first, of_second = tape.gradient(penalty, bounds)
    np.testing.assert_array_equal(of_first.numpy(), [1.0, -2.0])
    assert of_second.numpy() == 3.0
    assert pact.range_penalty([], 0.5) == 0


# --- LSQ ----------------------------------------------------------------------------------------


def grid(bounds, one, activation=None):
    """float64 step, zero point, and the codes that the activation function leaves."""
    scale, zero_point = affine.scale_and_zero_point(*np.float32(bounds), one)
    lowest, highest = affine.integer_bounds(one)
    code_low = max(lowest, int(zero_point)) if activation else lowest
    code_high = highest
    if activation in HIGHEST:
        bound = np.float32(HIGHEST[activation])
        code_high = min(highest, int(np.rint(bound / scale + np.float32(zero_point))))
    return float(scale), int(zero_point), code_low, code_high


def papers_step_gradient(x, upstream, step, lowest, highest):
    """LSQ eq. 3, one value at a time, float64."""
    total = 0.0
    for value, share in zip(np.float64(x).ravel(), np.float64(upstream).ravel(), strict=True):
        v = value / step
        total += share * (lowest if v < lowest else highest if v > highest else np.rint(v) - v)
    return total


@pytest.mark.parametrize("one", [*WEIGHTS[::3], *OTHERS[:3]], ids=brief)
@pytest.mark.parametrize("bounds", [(-1.3, 2.7), (-2.7, 1.3), (-2.0, 2.0)], ids=str)
def test_lsq_of_a_symmetric_range_is_the_papers_step_gradient(one, bounds, rng):
    x = rng.normal(0, 1.5, 600).astype(np.float32)
    upstream = rng.normal(size=x.shape).astype(np.float32)
    step, _, lowest, highest = grid(bounds, one)
    expected = papers_step_gradient(x, upstream, step, lowest, highest) / highest
    of_x, of_minimum, of_maximum = gradients(
        lambda *tensors: lsq.fake_quantize(*tensors, one, gradient_scale=False),
        upstream,
        x,
        *bounds,
    )
    inside = (lowest * step <= x) & (x <= highest * step)
    np.testing.assert_array_equal(of_x, np.where(inside, upstream, 0))
    larger, other = (
        (of_maximum, of_minimum) if bounds[1] >= -bounds[0] else (-of_minimum, of_maximum)
    )
    np.testing.assert_allclose(larger, expected, rtol=1e-4, atol=1e-4)
    assert other == 0 and expected != 0


def lsqs_asymmetric_gradients(x, upstream, bounds, one, activation):
    """d/dmaximum and d/dminimum of the staircase with its rounding errors held, float64.

    y = step * (x / step + error) inside, minimum below, maximum above, and
    step = (maximum - minimum) / N: differences of that, not the formulas.
    """
    step, zero_point, code_low, code_high = grid(bounds, one, activation)
    lowest, highest = affine.integer_bounds(one)
    error = np.rint(np.float64(x) / step) - np.float64(x) / step
    below, above = x < (code_low - zero_point) * step, x > (code_high - zero_point) * step

    def loss(minimum, maximum):
        y = x + (maximum - minimum) / (highest - lowest) * error
        y[below] = 0 if activation else minimum
        y[above] = 6 if code_high < highest else maximum
        return (y * upstream).sum()

    (low, high), h = bounds, 1e-3  # linear: any difference is exact
    of_minimum = (loss(low + h, high) - loss(low - h, high)) / (2 * h)
    of_maximum = (loss(low, high + h) - loss(low, high - h)) / (2 * h)
    return 0 if activation else of_minimum, of_maximum


@pytest.mark.parametrize("one", [*ASYMMETRIC[::2], OTHERS[3]], ids=brief)
@pytest.mark.parametrize("activation", fakequant.ACTIVATIONS)
@pytest.mark.parametrize("bounds", [(-1.3, 2.7), (0.0, 6.0), (-3.0, 9.0)], ids=str)
def test_lsq_of_an_asymmetric_range(one, bounds, activation, rng):
    x = rng.uniform(-6, 12, 600).astype(np.float32)
    upstream = rng.normal(size=x.shape).astype(np.float32)
    of_x, *of_range = gradients(
        lambda *tensors: lsq.fake_quantize(*tensors, one, activation, gradient_scale=False),
        upstream,
        x,
        *bounds,
    )
    expected = lsqs_asymmetric_gradients(x, upstream, bounds, one, activation)
    np.testing.assert_allclose(of_range, expected, rtol=1e-4, atol=2e-4)
    step, zero_point, code_low, code_high = grid(bounds, one, activation)
    inside = ((code_low - zero_point) * step <= x) & (x <= (code_high - zero_point) * step)
    np.testing.assert_array_equal(of_x, np.where(inside, upstream, 0))


@pytest.mark.parametrize("name", ["lsq", "dsq"])
@pytest.mark.parametrize("one", [WEIGHTS[1], ASYMMETRIC[1]], ids=brief)
@pytest.mark.parametrize("activation", fakequant.ACTIVATIONS)
def test_channels_learn_as_tensors_of_their_own(name, one, activation, rng):
    x = rng.normal(0, 3, (4, 5, 6, 3)).astype(np.float32)
    upstream = rng.normal(size=x.shape).astype(np.float32)
    low, high = np.float32([-1, -2, -8]), np.float32([1, 0.5, 9])

    def quantize(spec_of_x):
        return lambda *tensors: FUNCTIONS[name](*tensors, spec_of_x, activation)

    per_channel = dataclasses.replace(one, axis=-1)
    together = gradients(quantize(per_channel), upstream, x, low, high)
    for channel in range(3):
        alone = gradients(
            quantize(one), upstream[..., channel], x[..., channel], low[channel], high[channel]
        )
        for found, expected in zip(together, alone, strict=True):
            np.testing.assert_allclose(found[..., channel], expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("one", [WEIGHTS[0], WEIGHTS[2], WEIGHTS[6]], ids=brief)
@pytest.mark.parametrize("axis", [None, -1])
@pytest.mark.parametrize("count", [None, 77])
def test_sgd_on_a_symmetric_range_moves_the_step_as_the_papers_sgd(one, axis, count, rng):
    one = dataclasses.replace(one, axis=axis)
    channels, rate = 4, 0.01
    x = rng.normal(size=(3, 3, 8, channels)).astype(np.float32)
    upstream = rng.normal(size=x.shape).astype(np.float32)
    maximum = np.float32([0.8, 1.0, 1.5, 2.0]) if axis else np.float32(1.2)
    gradient = gradients(
        lambda x, maximum: lsq.fake_quantize(x, -maximum, maximum, one, count=count),
        upstream,
        x,
        maximum,
    )[1]
    lowest, highest = affine.integer_bounds(one)
    steps, _ = affine.scale_and_zero_point(-maximum, maximum, one)
    for index in range(channels if axis else 1):
        here = (..., index) if axis else ...
        papers = papers_step_gradient(
            x[here], upstream[here], float(steps.flat[index]), lowest, highest
        )
        step_change = -rate * papers / np.sqrt((count or x[here].size) * highest)
        range_change = -rate * gradient.flat[index]
        np.testing.assert_allclose(range_change / highest, step_change, rtol=2e-4, atol=1e-9)


@pytest.mark.parametrize("one", [ASYMMETRIC[0], ASYMMETRIC[6]], ids=brief)
def test_sgd_on_a_relus_range_moves_the_step_as_the_papers_sgd(one, rng):
    x = rng.normal(size=(40, 9)).astype(np.float32)
    upstream = rng.normal(size=x.shape).astype(np.float32)
    largest = 2**one.bits - 1
    _, of_minimum, of_maximum = gradients(
        lambda *tensors: lsq.fake_quantize(*tensors, one, "relu", count=9), upstream, x, 0.0, 1.1
    )
    step, _, _, _ = grid((0.0, 1.1), one, "relu")
    papers = papers_step_gradient(x, upstream, step, 0, largest)
    assert of_minimum == 0
    np.testing.assert_allclose(of_maximum / largest, papers / np.sqrt(9 * largest), rtol=2e-4)


def test_lsq_counts_a_batch_that_a_graph_does_not_know(rng):
    one = ASYMMETRIC[2]

    @tf.function(input_signature=[tf.TensorSpec([None, 5]), tf.TensorSpec([]), tf.TensorSpec([])])
    def compute(x, low, high):
        with tf.GradientTape() as tape:
            tape.watch(high)
            loss = tf.reduce_sum(lsq.fake_quantize(x, low, high, one))
        return tape.gradient(loss, high)

    for batch in (1, 12):
        x = rng.normal(size=(batch, 5)).astype(np.float32)
        found = compute(x, -1.0, 0.7)
        count = x.size
        expected = gradients(
            lambda *tensors: lsq.fake_quantize(*tensors, one, count=count),  # noqa: B023
            np.ones_like(x),
            x,
            -1.0,
            0.7,
        )[2]
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("start", [0.3, 6.0])
@pytest.mark.parametrize("one", [WEIGHTS[0], WEIGHTS[1], WEIGHTS[2]], ids=brief)
def test_lsq_learns_nearly_the_best_range(one, start, rng):
    # Descent on the mean square error of normal weights; brute force says what is possible.
    x = rng.normal(size=2000).astype(np.float32)

    def error(maximum):
        quantized = affine.fake_quantize(x, np.float32(-maximum), np.float32(maximum), one)
        return np.square(quantized - x).mean()

    maximum = tf.Variable(start)
    optimizer = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.15, 150))

    @tf.function(autograph=False)
    def step():
        with tf.GradientTape() as tape:
            y = lsq.fake_quantize(x, -maximum, maximum, one)
            loss = tf.reduce_sum(tf.square(y - x))
        optimizer.apply([tape.gradient(loss, maximum)], [maximum])

    optimizer.build([maximum])
    for _ in range(150):
        step()
    best = min(error(bound) for bound in np.linspace(0.3, 6, 400))
    assert error(maximum.numpy()) < 1.1 * best < 0.5 * error(start)


# --- DSQ ----------------------------------------------------------------------------------------


def papers_soft(x, low, high, intervals, alpha):
    """DSQ eq. 3-8 as printed, float64, elementwise."""
    step = (high - low) / intervals
    k = np.log(2 / alpha - 1) / step
    s = 1 / np.tanh(0.5 * k * step)
    i = np.clip(np.floor((x - low) / step), 0, intervals - 1)
    m = low + (i + 0.5) * step
    soft = low + step * (i + (s * np.tanh(k * (x - m)) + 1) / 2)
    return np.where(x < low, low, np.where(x > high, high, soft))


def papers_gradients(x, low, high, intervals, alpha):
    """dQ/dx, dQ/dlow, dQ/dhigh, dQ/dalpha of eq. 10-13, by hand, inside the range, float64."""
    step = (high - low) / intervals
    k, s = np.log(2 / alpha - 1) / step, 1 / (1 - alpha)
    i = np.clip(np.floor((x - low) / step), 0, intervals - 1)
    from_middle = x - (low + (i + 0.5) * step)
    t = np.tanh(k * from_middle)
    sech2 = 1 - t**2
    q = i + (s * t + 1) / 2
    of_k_alpha = -2 / (step * alpha * (2 - alpha))
    of_alpha = step / 2 * (t / (1 - alpha) ** 2 + s * sech2 * from_middle * of_k_alpha)
    share = (i + 0.5) / intervals
    phi_low = s * sech2 * (k / (step * intervals) * from_middle - k * (1 - share))
    phi_high = s * sech2 * (-k / (step * intervals) * from_middle - k * share)
    of_low = 1 - q / intervals + step / 2 * phi_low
    of_high = q / intervals + step / 2 * phi_high
    return step / 2 * s * k * sech2, of_low, of_high, of_alpha


def differences(function, *values, h=1e-6):
    """Central differences of an elementwise float64 function for each of its values."""
    result = []
    for index, value in enumerate(values):
        up, down = list(values), list(values)
        up[index], down[index] = value + h, value - h
        result.append((function(*up) - function(*down)) / (2 * h))
    return result


def test_the_papers_formulas_are_the_soft_staircases_derivatives(rng):
    low, high = rng.uniform(-3, -1, 500), rng.uniform(1, 4, 500)
    intervals, alpha = rng.integers(1, 16, 500), rng.uniform(0.02, 0.5, 500)
    x = low + rng.uniform(1e-4, 1 - 1e-4, 500) * (high - low)
    found = papers_gradients(x, low, high, intervals, alpha)
    numeric = differences(
        lambda x, low, high, alpha: papers_soft(x, low, high, intervals, alpha), x, low, high, alpha
    )
    for gradient, difference in zip(found, numeric, strict=True):
        np.testing.assert_allclose(gradient, difference, rtol=1e-4, atol=1e-4)


# One value, range and alpha a channel: every sum has one term, so gradients compare one by one.
def spread(one, rng, count=600, activation=None):
    one = dataclasses.replace(one, axis=-1)
    low, high = rng.uniform(-3, -0.5, count), rng.uniform(0.5, 9, count)
    if activation and not one.symmetric:
        low[: count // 2] = 0
    x = rng.uniform(-4, 10, count)
    alpha = rng.uniform(0.02, 0.48, count)
    return one, *(np.float32(values) for values in (x, low, high, alpha))


@pytest.mark.parametrize("one", [*ASYMMETRIC[:3], ASYMMETRIC[6], OTHERS[3]], ids=brief)
@pytest.mark.parametrize("compiled", [False, True])
def test_dsq_of_an_asymmetric_range_is_the_papers_gradient(one, compiled, rng):
    one, x, low, high, alpha = spread(one, rng)
    found = gradients(
        lambda x, low, high, alpha: dsq.fake_quantize(
            x, low, high, one, alpha=alpha, compiled=compiled
        ),
        np.ones_like(x),
        *(x, low, high, alpha),
    )
    scale, zero_point = affine.scale_and_zero_point(low, high, one)
    lowest, highest = affine.integer_bounds(one)
    l, u = ((code - zero_point) * np.float64(scale) for code in (lowest, highest))  # noqa: E741
    inside, below, above = (l <= x) & (x <= u), x < l, x > u
    assert min(mask.sum() for mask in (inside, below, above)) > 20
    of_x, of_l, of_u, of_alpha = papers_gradients(
        np.float64(x), l, u, highest - lowest, np.float64(alpha)
    )
    expected = (
        np.where(inside, of_x, 0),
        np.where(inside, of_l, below),
        np.where(inside, of_u, above),
        np.where(inside, of_alpha, 0),
    )
    for gradient, value in zip(found, expected, strict=True):
        np.testing.assert_allclose(gradient, value, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("one", [*WEIGHTS[:3], WEIGHTS[6], *OTHERS[1:3]], ids=brief)
def test_dsq_of_a_symmetric_range_is_the_derivative_of_the_tied_staircase(one, rng):
    one, x, low, high, alpha = spread(one, rng)
    found = gradients(
        lambda x, low, high, alpha: dsq.fake_quantize(x, low, high, one, alpha=alpha),
        np.ones_like(x),
        *(x, low, high, alpha),
    )
    lowest, highest = affine.integer_bounds(one)
    scale, _ = affine.scale_and_zero_point(low, high, one)
    side = np.float64(scale) * highest

    def tied(x, side, alpha):
        return papers_soft(x, side * lowest / highest, side, highest - lowest, alpha)

    x, alpha = np.float64(x), np.float64(alpha)
    near = (np.abs(x - side) < 1e-4) | (np.abs(x - side * lowest / highest) < 1e-4)
    assert near.mean() < 0.01
    of_x, of_side, of_alpha = differences(tied, x, side, alpha)
    maximum_is_larger = high >= -low
    expected = (
        of_x,
        np.where(maximum_is_larger, 0, -of_side),
        np.where(maximum_is_larger, of_side, 0),
        of_alpha,
    )
    for gradient, value in zip(found, expected, strict=True):
        np.testing.assert_allclose(gradient[~near], value[~near], rtol=2e-3, atol=2e-3)
    assert 0.05 < maximum_is_larger.mean() < 0.99


@pytest.mark.parametrize("one", [ASYMMETRIC[0], ASYMMETRIC[2], *WEIGHTS[:2]], ids=brief)
@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_dsq_under_an_activation_function_keeps_zero_in_place(one, activation, rng):
    one, x, low, high, alpha = spread(one, rng, activation=activation)
    found = gradients(
        lambda x, low, high, alpha: dsq.fake_quantize(x, low, high, one, activation, alpha=alpha),
        np.ones_like(x),
        *(x, low, high, alpha),
    )
    lowest, highest = affine.integer_bounds(one)
    scale, zero_point = affine.scale_and_zero_point(low, high, one)
    code_high = np.full(x.shape, highest)
    if activation == "relu6":
        code_high = np.minimum(highest, np.rint(np.float32(6) / scale + np.float32(zero_point)))
    parts = highest if one.symmetric else highest - lowest
    span = np.float64(scale) * parts
    top = np.float64(scale) * (code_high - zero_point)
    by_range = code_high == highest
    x, alpha = np.float64(x), np.float64(alpha)
    many = 300  # intervals above zero, more than any x reaches: the clips are taken out below
    numeric = differences(
        lambda x, span, alpha: papers_soft(x, 0 * span, span / parts * many, many, alpha),
        np.clip(x, 0.1, None),
        span,
        alpha,
    )
    sure = (x < 0) | (x > 0.1)
    sure &= np.abs(x - top) > 1e-3
    inside, above = (x > 0) & (x < top), x > top
    of_x, of_span, of_alpha = (np.where(inside, values, 0) for values in numeric)
    of_span = np.where(above & by_range, 1, of_span)
    maximum_moves = (high >= -low) | (not one.symmetric)
    of_minimum = np.where(maximum_moves, 0, -of_span)
    expected = of_x, of_minimum, np.where(maximum_moves, of_span, 0), of_alpha
    for gradient, value in zip(found, expected, strict=True):
        np.testing.assert_allclose(gradient[sure], value[sure], rtol=2e-3, atol=2e-3)
    assert sure.mean() > 0.9 and inside.sum() > 50 and above.sum() > 50


@pytest.mark.parametrize("one", [ASYMMETRIC[0], WEIGHTS[1]], ids=brief)
@pytest.mark.parametrize("axis, alpha_shape", [(None, ()), (-1, ()), (-1, (3,)), (None, (3,))])
def test_dsq_sums_to_the_shapes_of_range_and_alpha(one, axis, alpha_shape, rng):
    x = rng.normal(0, 1.5, (4, 5, 3)).astype(np.float32)
    upstream = rng.normal(size=x.shape).astype(np.float32)
    low, high = np.float32([-1, -2, -1.5]), np.float32([2.5, 3, 1])
    if axis is None:
        low, high = low[0], high[0]
    alpha = np.float32([0.1, 0.2, 0.4]) if alpha_shape else np.float32(0.3)

    def quantize(x, low, high, alpha):
        return dsq.fake_quantize(x, low, high, dataclasses.replace(one, axis=axis), alpha=alpha)

    def alone(x, low, high, alpha):
        return dsq.fake_quantize(x, low, high, dataclasses.replace(one, axis=-1), alpha=alpha)

    found = gradients(quantize, upstream, x, low, high, alpha)
    # The same with a range and an alpha for every single value, then summed here.
    full = [np.broadcast_to(values, x.shape).ravel() for values in (x, low, high, alpha)]
    single = [each.reshape(x.shape) for each in gradients(alone, upstream.ravel(), *full)]
    for gradient, values, like in zip(found, single, (x, low, high, alpha), strict=True):
        assert gradient.shape == np.shape(like)
        axes = tuple(range(x.ndim - np.ndim(like)))
        np.testing.assert_allclose(gradient, values.sum(axis=axes), rtol=1e-3, atol=1e-3)


def test_dsqs_alpha_is_limited_and_finds_its_way_back(rng):
    one = spec.QuantSpec(2, axis=-1)
    x, low, high = rng.uniform(-1, 2, 300), np.full(300, -1.0), np.full(300, 2.0)
    upstream = rng.choice([-1.0, 1.0], 300).astype(np.float32)

    def at(alpha):
        return gradients(
            lambda x, low, high, alpha: dsq.fake_quantize(x, low, high, one, alpha=alpha),
            upstream,
            *(x, low, high, np.full(300, alpha)),
        )

    for alpha, limit, sign in ((0.7, 0.5, 1), (0.5, 0.5, 1), (-0.3, 1e-4, -1), (1e-4, 1e-4, -1)):
        beyond, within = at(alpha), at(limit + (1e-6 if sign < 0 else -1e-4))
        for found, expected in zip(beyond[:3], within[:3], strict=True):
            np.testing.assert_allclose(found, expected, rtol=0.05, atol=0.05)
        of_alpha = beyond[3]
        # Descent leads back: never further out, and not nowhere.
        assert (of_alpha * sign >= 0).all() and (of_alpha * sign > 0).sum() > 20
        assert ((of_alpha != 0) <= (within[3] * sign > 0)).all()


@hypothesis.given(strategies.floats(-2, 2, width=32), strategies.floats(2**-100, 2**100, width=32))
def test_alphas_limits(alpha, step):
    clipped = float(dsq.clip_alpha(np.float32(alpha), np.float32(step)))
    smallest, largest = dsq.ALPHA_RANGE
    assert np.float32(smallest) <= clipped <= largest
    k = np.log(2 / clipped - 1) / step
    assert k <= dsq.K_LIMIT * 1.001 or clipped == largest
    if smallest <= alpha <= largest and np.log(2 / alpha - 1) / step <= dsq.K_LIMIT * 0.999:
        assert clipped == np.float32(alpha)


def test_soft_quantize_is_the_papers_function_and_differentiable(rng):
    for intervals in (1, 3, 15):
        x = np.float32(rng.uniform(-2, 3, 400))
        low, high, alpha = np.float32(-1.1), np.float32(2.3), np.float32(0.15)
        found = dsq.soft_quantize(x, low, high, intervals, alpha).numpy()
        wide = [np.float64(each) for each in (x, low, high, alpha)]
        expected = papers_soft(*wide[:3], intervals, wide[3])
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        inside = (x > low) & (x < high)
        shares = [np.full_like(x, each) for each in (low, high, alpha)]
        by_hand = papers_gradients(*wide[:3], intervals, wide[3])
        automatic = gradients(
            lambda x, low, high, alpha: dsq.soft_quantize(x, low, high, intervals, alpha),  # noqa: B023
            np.ones_like(x),
            x,
            *shares,
        )
        for gradient, value in zip(automatic, by_hand, strict=True):
            np.testing.assert_allclose(gradient[inside], value[inside], rtol=1e-3, atol=1e-3)
        np.testing.assert_array_equal(automatic[1][x < low], 1)
        np.testing.assert_array_equal(automatic[2][x > high], 1)


def test_soft_quantize_is_hard_in_the_limit_and_meets_its_bounds():
    x = np.float32([-1, -0.6, -0.4, 0.4, 0.6, 1.0, 1.4, 1.6, 2.0, np.inf, -np.inf])
    soft = dsq.soft_quantize(x, -1.0, 2.0, 3, 1e-30).numpy()
    np.testing.assert_allclose(soft, [-1, -1, 0, 0, 1, 1, 1, 2, 2, 2, -1], atol=1e-5)
    of_x, of_low, of_high = gradients(
        lambda x, low, high: dsq.soft_quantize(x, low, high, 3, 0.2),
        np.ones(11),
        x,
        np.full(11, -1.0),
        np.full(11, 2.0),
    )
    assert np.isfinite([of_x, of_low, of_high]).all()
    for bounds in ((0.0, 0.0), (1.5, 1.5)):  # a range of one point
        values = dsq.soft_quantize(x, *bounds, 3, 0.2).numpy()
        np.testing.assert_array_equal(values, np.full(11, bounds[0]))
        for gradient in gradients(
            lambda x, low, high: dsq.soft_quantize(x, low, high, 3, 0.2), np.ones(11), x, *bounds
        ):
            assert np.isfinite(gradient).all()


def test_a_hard_staircase_has_the_lsq_gradient_nowhere_and_a_soft_one_nearly(rng):
    # alpha = 0.5 is the softest: its slope lies between 0.82 and 1.1, straight-through's is 1.
    x = rng.uniform(-1, 2, 500).astype(np.float32)
    one = spec.QuantSpec(4)
    of_x, _, _ = gradients(
        lambda *tensors: dsq.fake_quantize(*tensors, one, alpha=0.5), np.ones(500), x, -1.0, 2.0
    )
    inside = of_x[(x > -0.99) & (x < 1.99)]
    assert 0.8239 - 1e-3 < inside.min() < 0.84 and 1.09 < inside.max() < 1.0987 + 1e-3


# --- stochastic ---------------------------------------------------------------------------------


@pytest.mark.parametrize("one", [ASYMMETRIC[0], ASYMMETRIC[6], WEIGHTS[2]], ids=brief)
def test_stochastic_rounding_has_the_expectation_x(one):
    seeds = keras.random.SeedGenerator(7)
    values, draws = np.linspace(-1.2, 2.2, 60, dtype=np.float32), 20_000
    x = np.broadcast_to(values, (draws, 60))
    y = stochastic.fake_quantize(x, -1.0, 2.0, one, noise=stochastic.noise(x.shape, seeds)).numpy()
    step, zero_point, lowest, highest = grid((-1.0, 2.0), one)
    expected = np.clip(values, (lowest - zero_point) * step, (highest - zero_point) * step)
    # The standard deviation is at most step / 2.
    np.testing.assert_allclose(
        y.mean(axis=0, dtype=np.float64), expected, atol=5 * step / 2 / np.sqrt(draws)
    )
    codes = y / step
    np.testing.assert_allclose(codes, np.rint(codes), atol=1e-3)
    inside = (expected == values) & (np.abs(values) > 0)
    assert (np.abs(y - x)[:, inside] < step * 1.001).all()  # one of the two neighbours


def test_noise_is_half_a_code_wide_and_follows_its_seed():
    first, again, other = (
        stochastic.noise((1000, 7), keras.random.SeedGenerator(seed)).numpy() for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.99 and first.dtype == np.float32
    assert first.min() >= -0.5 and first.max() < 0.5 and first.min() < -0.49 < 0.49 < first.max()
    seeds = keras.random.SeedGenerator(1)
    draws = [stochastic.noise((5,), seeds).numpy() for _ in range(2)]
    assert (draws[0] != draws[1]).all()


@pytest.mark.parametrize("activation", fakequant.ACTIVATIONS)
@pytest.mark.parametrize("compiled", [False, True])
def test_stochastic_gradient_is_fakequants(activation, compiled, rng):
    one, bounds = ASYMMETRIC[2], (-1.3, 7.0)
    x = rng.uniform(-3, 9, (30, 10)).astype(np.float32)
    noise = rng.uniform(-0.5, 0.5, x.shape).astype(np.float32)
    upstream = rng.normal(size=x.shape).astype(np.float32)
    found = gradients(
        lambda x, low, high, noise: stochastic.fake_quantize(
            x, low, high, one, activation, noise, compiled
        ),
        upstream,
        *(x, *bounds, noise),
        runner="graph",
    )
    expected = gradients(
        lambda *tensors: fakequant.fake_quantize(*tensors, one, activation), upstream, x, *bounds
    )
    np.testing.assert_array_equal(found[0], expected[0])
    assert not any(gradient.any() for gradient in found[1:])
    y = stochastic.fake_quantize(x, *bounds, one, activation, noise).numpy()
    step, zero_point, code_low, code_high = grid(bounds, one, activation)
    codes = np.clip(np.rint(x / np.float32(step) + noise) + zero_point, code_low, code_high)
    np.testing.assert_array_equal(y, np.float32(codes - zero_point) * np.float32(step))


# --- binary and ternary -------------------------------------------------------------------------


def binary_in_numpy(w):
    a = np.abs(np.float64(w)).mean()
    return np.where(w >= 0, a, -a), a


def ternary_in_numpy(w):
    w = np.float64(w)
    large = np.abs(w) > 0.7 * np.abs(w).mean()
    a = np.abs(w[large]).mean() if large.any() else 0.0
    return np.where(large, np.sign(w) * a, 0.0), a


IN_NUMPY = {"binary": binary_in_numpy, "ternary": ternary_in_numpy}


@pytest.mark.parametrize("name", binary.METHODS)
@pytest.mark.parametrize(
    "shape", [(6,), (40, 6), (9, 4, 6), (3, 3, 4, 6), (2, 3, 3, 4, 6)], ids=str
)
@pytest.mark.parametrize("per_channel", [True, False])
def test_one_and_two_bit_weights(name, shape, per_channel, rng):
    kernel = rng.normal(0, [0.1, 1, 2, 0.5, 3, 0.01], shape).astype(np.float32)
    if len(shape) > 1:
        kernel.flat[3] = 0.0
    values, a = (each.numpy() for each in binary.METHODS[name](kernel, per_channel))
    assert values.dtype == a.dtype == np.float32
    assert values.shape == shape and a.shape == ((6,) if per_channel else ())
    for channel in range(6 if per_channel else 1):
        here = (..., channel) if per_channel else ...
        expected, expected_a = IN_NUMPY[name](kernel[here])
        np.testing.assert_allclose(a.flat[channel], expected_a, rtol=2**-15)
        # To the last bit: codes times the scale.
        np.testing.assert_array_equal(values[here], np.sign(expected) * a.flat[channel])


@pytest.mark.parametrize("name", binary.METHODS)
@pytest.mark.parametrize("per_channel", [True, False])
def test_a_stored_range_gives_the_values_back(name, per_channel, rng):
    kernel = rng.normal(size=(3, 3, 5, 8)).astype(np.float32)
    dead = kernel * np.float32([1, 0, 1e-9, 1e-30, 1e-39, 1, 3, 1e-6])
    tiny = kernel * np.float32(1e-35)
    for w in (
        kernel,
        dead,
        tiny,
        kernel * 0,
        -kernel * 0,
        np.full_like(kernel, 0.3),
        kernel * 1e20,
    ):
        values, a = (each.numpy() for each in binary.METHODS[name](w, per_channel))
        one = dataclasses.replace(binary.SPEC, axis=-1 if per_channel else None)
        np.testing.assert_array_equal(affine.fake_quantize(values, -a, a, one), values)
        np.testing.assert_array_equal(a, affine.round_scale(a))
        if not w.any():
            assert not values.any() and not a.any()
        else:
            assert np.isfinite(values).all() and a.max() > 0


def test_the_sign_of_zero_is_plus():
    values, a = binary.binarize(np.float32([[0.0], [-0.0], [2.0], [-2.0]]))
    np.testing.assert_array_equal(values.numpy(), [[1], [1], [1], [-1]])
    assert a.numpy() == 1


@pytest.mark.parametrize("runner", RUNNERS)
def test_gradients_of_one_and_two_bit_weights(runner, rng):
    kernel = rng.normal(size=(3, 3, 4, 5)).astype(np.float32)
    kernel.flat[:2] = 1.0, -1.0
    upstream = rng.normal(size=kernel.shape).astype(np.float32)
    for limit in (1.0, 0.5):
        (found,) = gradients(
            lambda w: binary.binarize(w, limit=limit)[0],  # noqa: B023
            upstream,
            kernel,
            runner=runner,
        )
        np.testing.assert_array_equal(found, np.where(np.abs(kernel) <= limit, upstream, 0))
    (found,) = gradients(lambda w: binary.ternarize(w)[0], upstream, kernel, runner=runner)
    np.testing.assert_array_equal(found, upstream)
    for function in binary.METHODS.values():  # the scale is a constant
        (found,) = gradients(lambda w: function(w)[1], upstream[0, 0, 0], kernel, runner=runner)  # noqa: B023
        assert not found.any()


@pytest.mark.parametrize("name", binary.METHODS)
def test_a_variable_in_a_graph(name, rng):
    kernel = tf.Variable(rng.normal(0, 0.3, size=(9, 5)).astype(np.float32))

    @tf.function(autograph=False)
    def compute():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(binary.METHODS[name](kernel)[0])
        return tape.gradient(loss, kernel)

    expected = np.ones((9, 5)) if name == "ternary" else np.abs(kernel.numpy()) <= 1
    np.testing.assert_array_equal(compute().numpy(), expected)
