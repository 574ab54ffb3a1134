"""Simulated quantization against `affine` to the last bit, and its gradients against NumPy."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from lowbit import affine, fakequant, spec

SCHEME_SPECS = sorted(
    {s.weights for s in spec.SCHEMES.values() if s.weights is not None}
    | {s.activations for s in spec.SCHEMES.values() if s.activations is not None},
    key=str,
)
INT8 = spec.QuantSpec()
PER_TENSOR_RANGES = [
    (-1.3, 2.7),
    (0.0, 6.0),
    (2.1, 3.5),
    (-3.5, -2.1),
    (-1e-3, 1e30),
    (0.0, 0.0),
    (-1e-40, 1e-40),
    (-1.0, 1.0),
]


def around(low, high, rng, count=4096):
    """Values inside and outside a range, with its bounds, zero and infinities."""
    reach = max(abs(low), abs(high), 1e-3)
    inside = rng.uniform(min(low, 0) - 0.1 * reach, max(high, 0) + 0.1 * reach, count)
    special = [low, high, 0.0, -0.0, np.inf, -np.inf, reach * 1e3, -reach * 1e3]
    return np.concatenate([inside, special]).astype(np.float32).reshape(-1, 4)


def run_eagerly(function):
    return function


def run_in_graph(function):
    return tf.function(function, autograph=False)


def run_in_xla(function):
    return tf.function(function, jit_compile=True, autograph=False)


HIGHEST = {"relu6": 6, "unit": 1}  # values that an activation function cuts at
RUNNERS = {"eager": run_eagerly, "graph": run_in_graph, "xla": run_in_xla}


# --- forward: bit for bit -----------------------------------------------------------------------


@pytest.mark.parametrize("one", SCHEME_SPECS, ids=str)
@pytest.mark.parametrize("runner", ["eager", "graph"])
def test_scale_has_the_same_bits(one, runner, rng):
    compute = RUNNERS[runner](lambda low, high: fakequant.scale_and_zero_point(low, high, one))
    low = -np.abs(rng.normal(0, 10.0 ** rng.uniform(-6, 6, 200)))
    high = np.abs(rng.normal(0, 10.0 ** rng.uniform(-6, 6, 200)))
    low[:20], high[20:40] = 0, 0
    for bounds in (
        (low, high),  # spread over 12 decades: some channels are at the floor
        (low[:3] * 0, high[:3] * 0),
        *((np.float32(a), np.float32(b)) for a, b in PER_TENSOR_RANGES),
        *zip(low[30:40], high[30:40], strict=True),
    ):
        low_and_high = [np.asarray(bound, np.float32) for bound in bounds]
        scale, zero_point = affine.scale_and_zero_point(*low_and_high, one)
        ours, our_zero_point = compute(*(tf.constant(bound) for bound in low_and_high))
        np.testing.assert_array_equal(ours.numpy(), scale)
        np.testing.assert_array_equal(our_zero_point.numpy(), zero_point)


@pytest.mark.parametrize("one", SCHEME_SPECS, ids=str)
@pytest.mark.parametrize("runner", RUNNERS)
def test_a_compiler_does_not_change_the_scale(one, runner, rng):
    # A graph optimizer may turn x / 255 into x * (1 / 255): another bit in every third quotient,
    # which moves one in 250 scales of 16 bits.
    low = -rng.uniform(0, 1, 50_000).astype(np.float32)
    high = rng.uniform(1, 8, 50_000).astype(np.float32)
    scale, zero_point = affine.scale_and_zero_point(low, high, one)
    compute = RUNNERS[runner](lambda low, high: fakequant.scale_and_zero_point(low, high, one))
    found, found_zero_point = compute(tf.constant(low), tf.constant(high))
    np.testing.assert_array_equal(found.numpy(), scale)
    np.testing.assert_array_equal(found_zero_point.numpy(), zero_point)


@pytest.mark.parametrize("one", SCHEME_SPECS, ids=str)
@pytest.mark.parametrize(
    "runner, compiled", [("eager", False), ("eager", True), ("graph", True), ("xla", False)]
)
def test_per_tensor_has_the_same_bits(one, compiled, runner, rng):
    compute = RUNNERS[runner](
        lambda x, low, high: fakequant.fake_quantize(x, low, high, one, compiled=compiled)
    )
    for low, high in PER_TENSOR_RANGES:
        x = around(low, high, rng)
        bounds = np.float32(low), np.float32(high)
        expected = affine.fake_quantize(x, *bounds, one)
        found = compute(tf.constant(x), *(tf.constant(bound) for bound in bounds)).numpy()
        np.testing.assert_array_equal(found, expected)
        if (low, high) == (-1.3, 2.7):
            assert len(np.unique(expected)) >= min(16, 2**one.bits // 2)


@pytest.mark.parametrize("one", SCHEME_SPECS, ids=str)
@pytest.mark.parametrize("runner", RUNNERS)
def test_per_channel_has_the_same_bits(one, runner, rng):
    one = dataclasses.replace(one, axis=-1)
    x = (rng.normal(size=(3, 3, 4, 7)) * 10.0 ** np.array([0, -1, 1, -3, 2, -30, 0])).astype("f4")
    x[..., 6] = np.abs(x[..., 6]) + 1
    bounds = affine.observed_range(x, -1)
    expected = affine.fake_quantize(x, *bounds, one)
    compute = RUNNERS[runner](lambda x, low, high: fakequant.fake_quantize(x, low, high, one))
    found = compute(tf.constant(x), *(tf.constant(bound) for bound in bounds)).numpy()
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(expected)) >= min(16, 2**one.bits)


@pytest.mark.parametrize("runner", RUNNERS)
def test_weights_with_a_given_scale_have_the_same_bits(runner, rng):
    one = spec.QuantSpec(symmetric=True, narrow_range=True, axis=-1)
    x = rng.normal(size=(3, 3, 4, 7)).astype(np.float32)
    scale = affine.round_scale(rng.uniform(0.005, 0.05, 7).astype(np.float32))
    zero = np.zeros(7, np.float32)
    expected = affine.dequantize(affine.quantize(x, scale, zero, one), scale, zero, -1)
    compute = RUNNERS[runner](lambda x, s, z: fakequant.fake_quantize_weights(x, s, z, one))
    found = compute(tf.constant(x), tf.constant(scale), tf.constant(zero)).numpy()
    np.testing.assert_array_equal(found, expected)


def test_round_scale_has_the_same_bits(rng):
    values = np.ldexp(rng.uniform(1, 2, 3000), rng.integers(-99, 99, 3000))
    values = np.concatenate([values, 1 + np.arange(2048) * 2.0**-23]).astype(np.float32)
    found = fakequant.round_scale(tf.constant(values)).numpy()
    np.testing.assert_array_equal(found, affine.round_scale(values))


@pytest.mark.parametrize("activation, function", [
    ("relu", lambda x: np.maximum(x, 0)),
    ("relu6", lambda x: np.clip(x, 0, 6)),
    ("unit", lambda x: np.clip(x, 0, 1)),
])  # fmt: skip
@pytest.mark.parametrize("bounds", [(-2.0, 4.0), (-3.0, 9.0), (0.0, 6.0), (0.0, 2.5), (-5.0, 0.0)])
@pytest.mark.parametrize("compiled", [False, True])
def test_fused_activation_is_the_activation_quantized(activation, function, bounds, compiled, rng):
    bounds = tuple(np.float32(bound) for bound in bounds)
    x = around(-8.0, 12.0, rng)
    found = fakequant.fake_quantize(tf.constant(x), *bounds, INT8, activation, compiled=compiled)
    expected = affine.fake_quantize(function(x), *bounds, INT8)
    np.testing.assert_array_equal(found.numpy(), expected)
    if bounds[1] > 0:
        assert len(np.unique(expected)) >= 16


@pytest.mark.parametrize("activation", ["gelu", "Relu", ""])
def test_unknown_activation_is_refused(activation):
    with pytest.raises(ValueError, match=f"'{activation}' is not one of .*relu6"):
        fakequant.apply_activation(tf.zeros(3), activation)


# --- gradients ----------------------------------------------------------------------------------


def clamp(bounds, one, activation):
    """Returns the float32 (low, high) that a range and a fused activation leave."""
    scale, zero_point = affine.scale_and_zero_point(*bounds, one)
    code_low, code_high = affine.integer_bounds(one)
    if activation is not None:
        code_low = max(code_low, int(zero_point))
    if activation in HIGHEST:
        bound = np.float32(HIGHEST[activation])
        code_high = min(code_high, int(zero_point) + int(np.rint(bound / scale)))
    return [np.float32(code - zero_point) * scale for code in (code_low, code_high)]


@pytest.mark.parametrize("activation", fakequant.ACTIVATIONS)
@pytest.mark.parametrize("bounds", [(-2.0, 4.0), (-3.0, 9.0), (0.0, 5.0), (0.0, 6.1)], ids=str)
@pytest.mark.parametrize("runner, compiled", [("eager", False), ("graph", True)])
def test_gradient_passes_inside_the_range(activation, bounds, compiled, runner, rng):
    bounds = tuple(np.float32(bound) for bound in bounds)
    low, high = clamp(bounds, INT8, activation)
    x = rng.uniform(-5, 12, 2000).astype(np.float32)
    steps = [low, high, 0, np.nextafter(low, np.float32(-99)), np.nextafter(high, np.float32(99))]
    steps += [np.nextafter(low, np.float32(99)), np.nextafter(high, np.float32(-99))]
    x = np.concatenate([x, steps]).astype(np.float32)
    x = x[(x == 0) | (np.abs(x) > 1e-30)]  # TensorFlow takes subnormal numbers for zero
    upstream = rng.normal(size=x.size).astype(np.float32)

    def gradients(x, low, high):
        with tf.GradientTape() as tape:
            tape.watch([x, low, high])
            y = fakequant.fake_quantize(x, low, high, INT8, activation, compiled)
            loss = tf.reduce_sum(y * upstream)
        return tape.gradient(loss, [x, low, high], unconnected_gradients="zero")

    found = RUNNERS[runner](gradients)(*(tf.constant(value) for value in (x, *bounds)))
    np.testing.assert_array_equal(found[0].numpy(), np.where((low <= x) & (x <= high), upstream, 0))
    assert not found[1].numpy().any() and not found[2].numpy().any()


def test_gradient_of_weights_is_clipped(rng):
    one = spec.QuantSpec(4, symmetric=True, narrow_range=True, axis=-1)
    kernel = tf.Variable(rng.normal(size=(3, 3, 4, 5)).astype(np.float32))
    scale = affine.round_scale(np.float32([0.01, 0.1, 0.2, 0.5, 1.0]))
    upstream = rng.normal(size=(3, 3, 4, 5)).astype(np.float32)
    with tf.GradientTape() as tape:
        y = fakequant.fake_quantize_weights(kernel, tf.constant(scale), tf.zeros(5), one)
        loss = tf.reduce_sum(y * upstream)
    inside = np.abs(kernel.numpy()) <= 7 * scale
    assert 0.1 < inside.mean() < 0.9
    found = tape.gradient(loss, kernel).numpy()
    np.testing.assert_array_equal(found, np.where(inside, upstream, 0))
