"""One conformance table for the quantized layers; the whitepaper's batch norm; the quantizer."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from lowbit import affine, layers, quantizers, spec

NORM = {"epsilon": 1e-3, "momentum": 0.9}
PER_CHANNEL = spec.QuantSpec(symmetric=True, narrow_range=True, axis=-1)
PER_TENSOR = spec.QuantSpec(symmetric=True, narrow_range=True)
INT8 = spec.QuantSpec()
# Both sides do the same float32 sums in another order (the batch norm's factor is multiplied into
# the kernel, not into the output): units in the last place of the largest term, 1e-7 each.
RELATIVE = 1e-5

GEOMETRIES = [("same", 1, 1), ("valid", 1, 1), ("same", 2, 1), ("valid", 2, 1), ("same", 1, 2)]
KINDS = {
    "conv": (keras.layers.Conv2D, layers.QuantizedConv2D, {"filters": 4, "kernel_size": 3}),
    "depthwise": (
        keras.layers.DepthwiseConv2D,
        layers.QuantizedDepthwiseConv2D,
        {"kernel_size": 3},
    ),
    "depthwise2": (
        keras.layers.DepthwiseConv2D,
        layers.QuantizedDepthwiseConv2D,
        {"kernel_size": 3, "depth_multiplier": 2},
    ),
    "dense": (keras.layers.Dense, layers.QuantizedDense, {"units": 4}),
}
TABLE = [
    (kind, geometry, use_bias, with_norm)
    for kind, use_bias, with_norm in itertools.product(KINDS, (False, True), (False, True))
    for geometry in (GEOMETRIES if kind != "dense" else [None])
]


def numpy(tensor):
    return keras.ops.convert_to_numpy(tensor)


def assert_close(found, expected):
    expected = numpy(expected)
    scale = max(float(np.abs(expected).max(initial=0)), 1e-3)
    np.testing.assert_allclose(numpy(found), expected, rtol=0, atol=RELATIVE * scale)


def pair(kind, geometry, use_bias, with_norm, rng, weight_spec=PER_CHANNEL, gamma=None):
    """Returns (x, quantized layer, float layer, float batch norm or None) with the same weights."""
    float_type, quantized_type, config = KINDS[kind]
    config = config | {"use_bias": use_bias}
    if geometry is not None:
        padding, strides, dilation = geometry
        config |= {"padding": padding, "strides": strides, "dilation_rate": dilation}
    x = rng.normal(0.5, 1, (6, 5) if kind == "dense" else (3, 8, 8, 5)).astype(np.float32)
    float_layer = float_type(**config)
    float_layer.build(x.shape)
    quantized = quantized_type(
        **config, weight_spec=weight_spec, batch_norm=NORM if with_norm else None
    )
    quantized.build(x.shape)
    values = {"kernel": rng.normal(0, 0.4, float_layer.kernel.shape)}
    channels = quantized.output_channels()
    if use_bias:
        values["bias"] = rng.normal(0, 1, channels)
    norm = None
    if with_norm:
        norm = keras.layers.BatchNormalization(**NORM)
        norm.build((*x.shape[:-1], channels))
        values |= {
            "gamma": rng.uniform(0.5, 2, channels) if gamma is None else gamma(channels),
            "beta": rng.normal(0, 1, channels),
            "moving_mean": rng.normal(0, 1, channels),
            "moving_variance": rng.uniform(0.5, 3, channels),
        }
    for name, value in values.items():
        value = value.astype(np.float32)
        getattr(quantized, name).assign(value)
        getattr(float_layer if name in ("kernel", "bias") else norm, name).assign(value)
    return x, quantized, float_layer, norm


def run_twin(float_layer, norm, x, training):
    y = float_layer(x)
    return y if norm is None else norm(y, training=training)


def run_with_gradients(function, variables, upstream=None):
    """Returns the output, and the gradients of sum(upstream * output)."""
    with tf.GradientTape() as tape:
        y = function()
        upstream = np.cos(np.arange(np.prod(y.shape))).reshape(y.shape).astype(np.float32)
        loss = tf.reduce_sum(y * upstream)
    gradients = tape.gradient(loss, [v.value for v in variables], unconnected_gradients="zero")
    return numpy(y), [numpy(gradient) for gradient in gradients]


# --- quantizers off: the float twin -------------------------------------------------------------


@pytest.mark.parametrize("kind, geometry, use_bias, with_norm", TABLE)
def test_without_quantizers_is_the_float_twin(kind, geometry, use_bias, with_norm, rng):
    x, quantized, float_layer, norm = pair(kind, geometry, use_bias, with_norm, rng)
    quantized.weights_enabled = False
    assert_close(quantized(x, training=False), run_twin(float_layer, norm, x, False))

    names = ["kernel"] + ["bias"] * use_bias + ["gamma", "beta"] * with_norm
    ours = [getattr(quantized, name) for name in names]
    twins = [getattr(float_layer if n in ("kernel", "bias") else norm, n) for n in names]
    y, gradients = run_with_gradients(lambda: quantized(x, training=True), ours)
    expected, expected_gradients = run_with_gradients(
        lambda: run_twin(float_layer, norm, x, True), twins
    )
    assert_close(y, expected)
    for name, found, value in zip(names, gradients, expected_gradients, strict=True):
        if name == "bias" and with_norm:  # the batch mean takes it away: zero but for rounding
            assert np.abs(found).max() < 1e-4 and np.abs(value).max() < 1e-4
        else:
            assert_close(found, value)
    if with_norm:
        assert_close(quantized.moving_mean, norm.moving_mean)
        assert_close(quantized.moving_variance, norm.moving_variance)


# --- quantizers on ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight_spec", [PER_CHANNEL, PER_TENSOR], ids=["channel", "tensor"])
def test_inference_uses_the_codes_of_the_folded_kernel(kind, weight_spec, rng):
    geometry = None if kind == "dense" else ("same", 1, 1)
    x, quantized, float_layer, norm = pair(kind, geometry, True, True, rng, weight_spec)
    factor = numpy(norm.gamma) / np.sqrt(numpy(norm.moving_variance) + np.float32(1e-3))
    kernel = numpy(float_layer.kernel)
    shape = kernel.shape[-2:] if kind.startswith("depthwise") else (-1,)
    flat = (kernel * factor.reshape(shape)).reshape(-1, factor.size)
    axis = None if weight_spec.axis is None else 1
    bounds = affine.observed_range(flat, axis)
    expected = affine.fake_quantize(
        flat, *bounds, spec.QuantSpec(symmetric=True, narrow_range=True, axis=axis)
    )
    folded, _ = quantized.folded()
    found = numpy(quantized.quantize_kernel(folded, *quantized.kernel_scale(folded)))
    np.testing.assert_array_equal(found.reshape(flat.shape), expected)
    assert len(np.unique(expected)) >= 16
    quantized_twin = run_twin(float_layer, norm, x, False)
    error = numpy(quantized(x, training=False)) - numpy(quantized_twin)
    assert 1e-4 < np.abs(error).max() < 0.02 * np.abs(numpy(quantized_twin)).max()


@pytest.mark.parametrize("kind, geometry, use_bias, with_norm", TABLE[::3])
@pytest.mark.parametrize("weight_spec", [PER_CHANNEL, PER_TENSOR], ids=["channel", "tensor"])
def test_after_the_freeze_training_is_inference(
    kind, geometry, use_bias, with_norm, weight_spec, rng
):
    x, quantized, *_ = pair(kind, geometry, use_bias, with_norm, rng, weight_spec)
    quantized.batch_norm_frozen = True
    before = [numpy(variable) for variable in quantized.non_trainable_variables]
    training, inference = (numpy(quantized(x, training=flag)) for flag in (True, False))
    np.testing.assert_array_equal(training, inference)
    for variable, value in zip(quantized.non_trainable_variables, before, strict=True):
        np.testing.assert_array_equal(numpy(variable), value)


GAMMAS = {
    "zero": lambda n: np.where(np.arange(n) == 1, 0.0, 1.5),
    "tiny": lambda n: np.where(np.arange(n) == 1, 1e-12, 1.5),
    "tiny negative": lambda n: np.where(np.arange(n) == 1, -1e-12, 1.5),
    "negative": lambda n: np.where(np.arange(n) == 1, -1.0, 1.5),
    "all zero": np.zeros,
}


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight_spec", [PER_CHANNEL, PER_TENSOR], ids=["channel", "tensor"])
def test_dead_channels_survive(kind, weight_spec, gamma, rng):
    geometry = None if kind == "dense" else ("same", 1, 1)
    x, quantized, float_layer, norm = pair(
        kind, geometry, True, True, rng, weight_spec, GAMMAS[gamma]
    )
    assert np.isfinite(numpy(quantized(x, training=False))).all()
    ours = [quantized.kernel, quantized.gamma, quantized.beta]
    twins = [float_layer.kernel, norm.gamma, norm.beta]
    y, gradients = run_with_gradients(lambda: quantized(x, training=True), ours)
    expected, expected_gradients = run_with_gradients(
        lambda: run_twin(float_layer, norm, x, True), twins
    )
    for array in (y, *gradients, *(numpy(v) for v in quantized.variables)):
        assert np.isfinite(array).all()
    deviation = np.sqrt(numpy(norm.moving_variance))
    mean_error = np.abs(numpy(quantized.moving_mean) - numpy(norm.moving_mean)) / deviation
    variance = numpy(quantized.moving_variance) / numpy(norm.moving_variance)
    dead = np.abs(numpy(norm.gamma)) < layers.GAMMA_FLOOR
    assert dead.sum() == {"negative": 0, "all zero": dead.size}.get(gamma, 1)
    # A dead channel has its float kernel, the others one of 8 bits.
    np.testing.assert_array_less(mean_error, np.where(dead, RELATIVE, 0.05))
    np.testing.assert_array_less(np.abs(variance - 1), np.where(dead, RELATIVE, 0.05))
    assert_close(gradients[1][dead], expected_gradients[1][dead])  # gamma can grow again
    assert_close(gradients[2], expected_gradients[2])
    assert np.abs(y - expected).max() < 0.1 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("kind", ["conv", "depthwise", "depthwise2"])
@pytest.mark.parametrize(
    "weight_spec",
    [
        pytest.param(PER_CHANNEL, id="channel"),
        pytest.param(PER_TENSOR, id="tensor"),
    ],
)
def test_statistics_of_a_small_channel_stay_right(kind, weight_spec, rng):
    gamma = lambda n: np.where(np.arange(n) == 1, 2e-3, 1.5)  # noqa: E731
    x, quantized, float_layer, norm = pair(
        kind, ("same", 1, 1), False, True, rng, weight_spec, gamma
    )
    for _ in range(20):
        quantized(x, training=True)
        run_twin(float_layer, norm, x, training=True)
    np.testing.assert_allclose(
        numpy(quantized.moving_variance), numpy(norm.moving_variance), rtol=0.1
    )


def test_whitepaper_equations_22_to_31(rng):
    x, quantized, *_ = pair("conv", ("valid", 1, 1), False, True, rng)
    kernel, gamma, beta, mean, variance = (
        numpy(getattr(quantized, name)).astype(np.float64)
        for name in ("kernel", "gamma", "beta", "moving_mean", "moving_variance")
    )
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))

    def conv(weights):
        return np.einsum("nyxchw,hwco->nyxo", windows.astype(np.float64), weights)

    sigma = np.sqrt(variance + 1e-3)
    corrected = kernel * gamma / sigma  # eq. 23
    one = spec.QuantSpec(symmetric=True, narrow_range=True, axis=3)
    quantized_kernel = affine.fake_quantize(corrected, *affine.observed_range(corrected, 3), one)
    z = conv(quantized_kernel)  # eq. 24
    # In the paper mean_B and sigma_B are those of conv(kernel); here of z * sigma / gamma.
    unscaled = z * sigma / gamma
    mean_b, variance_b = unscaled.mean(axis=(0, 1, 2)), unscaled.var(axis=(0, 1, 2))
    sigma_b = np.sqrt(variance_b + 1e-3)
    c = sigma_b / sigma  # eq. 22
    expected = z / c + beta - gamma * mean_b / sigma_b  # eq. 25, 26, 27
    assert_close(quantized(x, training=True), expected)
    new_mean, new_variance = 0.9 * mean + 0.1 * mean_b, 0.9 * variance + 0.1 * variance_b
    assert_close(quantized.moving_mean, new_mean)
    assert_close(quantized.moving_variance, new_variance)

    quantized.batch_norm_frozen = True
    new_sigma = np.sqrt(new_variance + 1e-3)
    corrected = numpy(quantized.kernel) * (gamma / new_sigma).astype(np.float32)
    quantized_kernel = affine.fake_quantize(corrected, *affine.observed_range(corrected, 3), one)
    bias = beta - gamma * mean_b / sigma_b  # eq. 30
    bias += gamma * (mean_b / sigma_b - new_mean / new_sigma)  # eq. 31
    expected = conv(quantized_kernel) + bias  # eq. 28, 29
    found = numpy(quantized(x, training=True))
    # float64 here, float32 there: a weight near a tie may take the neighbouring code.
    assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", [False, True])
def test_one_step_of_sgd_changes_the_weights(kind, frozen, rng):
    geometry = None if kind == "dense" else ("same", 2, 1)
    x, quantized, *_ = pair(kind, geometry, False, True, rng)
    quantized.batch_norm_frozen = frozen
    before = [numpy(variable) for variable in quantized.trainable_variables]
    assert [v.name for v in quantized.trainable_variables] == ["kernel", "gamma", "beta"]
    optimizer = keras.optimizers.SGD(0.1)
    _, gradients = run_with_gradients(
        lambda: quantized(x, training=True), quantized.trainable_variables
    )
    optimizer.apply(
        [tf.constant(gradient) for gradient in gradients], quantized.trainable_variables
    )
    for variable, value, gradient in zip(
        quantized.trainable_variables, before, gradients, strict=True
    ):
        assert (numpy(variable) != value).mean() > 0.5
        np.testing.assert_allclose(numpy(variable), value - 0.1 * gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_fused_activation_is_refused(kind):
    _, quantized_type, config = KINDS[kind]
    with pytest.raises(ValueError, match="loud: the activation belongs to the quantizer"):
        quantized_type(**config, activation="relu", name="loud")


@pytest.mark.parametrize("kind", KINDS)
def test_configuration_round_trip(kind):
    _, quantized_type, config = KINDS[kind]
    layer = quantized_type(
        **config,
        weight_spec=PER_CHANNEL,
        batch_norm=NORM,
        batch_norm_frozen=True,
        weights_enabled=False,
    )
    again = quantized_type.from_config(layer.get_config())
    assert again.get_config() == layer.get_config()
    assert again.weight_spec == PER_CHANNEL and again.batch_norm == NORM
    assert again.batch_norm_frozen and not again.weights_enabled


def test_saved_model_computes_the_same_bits(tmp_path, randomize, smooth_images):
    inputs = x = keras.Input((8, 8, 3))
    x = quantizers.ActivationQuantizer(INT8, initial_range=(-1, 1), name="in")(x)
    x = layers.QuantizedConv2D(4, 3, weight_spec=PER_CHANNEL, batch_norm=NORM)(x)
    shared = quantizers.ActivationQuantizer(INT8, slots=2, initial_range=(0, 6), name="shared")
    x = shared(x, slot=0, activation="relu6", label="first")
    x = layers.QuantizedDepthwiseConv2D(
        3, depth_multiplier=2, weight_spec=PER_TENSOR, batch_norm=NORM
    )(x)
    x = shared(x, slot=1, activation="relu")
    x = keras.layers.Flatten()(x)
    x = layers.QuantizedDense(10, weight_spec=spec.QuantSpec(4, axis=-1))(x)
    x = quantizers.ActivationQuantizer(INT8, initial_range=(-5, 5), mode="moving")(x)
    model = randomize(layers.QuantizedModel(inputs, x))
    shared.minimum.assign([-0.5, -1.0])
    shared.maximum.assign([2.0, 5.0])
    images = smooth_images(16)
    expected = model.predict(images, verbose=0)
    assert len(np.unique(expected)) >= 16
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded) is layers.QuantizedModel
    np.testing.assert_array_equal(loaded.predict(images, verbose=0), expected)
    for ours, theirs in zip(loaded.variables, model.variables, strict=True):
        np.testing.assert_array_equal(numpy(ours), numpy(theirs))
    for ours, theirs in zip(loaded.layers, model.layers, strict=True):
        assert ours.get_config() == theirs.get_config()


# --- the activation quantizer -------------------------------------------------------------------


def test_moving_average_of_two_slots_is_a_loop(rng):
    quantizer = quantizers.ActivationQuantizer(
        INT8, slots=2, mode="moving", decay=0.9, initial_range=(-1.0, 2.0)
    )
    quantizer.build()
    low, high = np.float64([-1, -1]), np.float64([2, 2])
    for _ in range(5):
        for slot, activation in ((0, None), (1, "relu6")):
            x = rng.normal(0.5, 4, (4, 5)).astype(np.float32)
            seen = x if activation is None else np.clip(x, 0, 6)
            low[slot] = 0.9 * low[slot] + 0.1 * seen.min()
            high[slot] = 0.9 * high[slot] + 0.1 * seen.max()
            y = quantizer(x, slot=slot, activation=activation, training=True)
            # The range is that after the update, and the union of the slots.
            bounds = [numpy(bound) for bound in quantizer.range()]
            np.testing.assert_allclose(bounds, (low.min(), high.max()), rtol=1e-5)
            np.testing.assert_array_equal(numpy(y), affine.fake_quantize(seen, *bounds, INT8))
        before = numpy(quantizer.minimum)
        quantizer(x * 100, slot=None, training=True)  # rounds, does not observe
        quantizer(x * 100, slot=0, training=False)
        np.testing.assert_array_equal(numpy(quantizer.minimum), before)
    np.testing.assert_allclose(numpy(quantizer.minimum), low, rtol=1e-5)
    np.testing.assert_allclose(numpy(quantizer.maximum), high, rtol=1e-5)


@pytest.mark.parametrize("shape", [(50,), (6, 7), (2, 4, 4, 3)])
@pytest.mark.parametrize("slots", [1, 2])
def test_trainable_range_gets_gradients(shape, slots, rng):
    quantizer = quantizers.ActivationQuantizer(
        INT8, slots=slots, mode="trainable", initial_range=(-0.5, 0.75)
    )
    quantizer.build()
    quantizer.maximum.assign([0.75, 0.25][:slots])
    x = rng.normal(size=shape).astype(np.float32)
    assert quantizer.trainable_variables == [quantizer.minimum, quantizer.maximum]
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(quantizer(x, training=True))
    minimum, maximum = tape.gradient(loss, [v.value for v in quantizer.trainable_variables])
    scale, zero_point = quantizer.scale_and_zero_point()
    low, high = affine.dequantize(np.array([-128, 127]), scale, zero_point)
    np.testing.assert_allclose(numpy(minimum), np.full(slots, (x < low).sum() / slots))
    expected = np.zeros(slots)
    expected[0] = (x > high).sum()  # the slot that is the union's end
    np.testing.assert_allclose(numpy(maximum), expected)
    assert (x < low).sum() > 0 and (x > high).sum() > 0


@pytest.mark.parametrize("mode", ["frozen", "fixed"])
def test_frozen_range_does_not_move(mode, rng):
    quantizer = quantizers.ActivationQuantizer(INT8, mode=mode, initial_range=(-1.0, 1.5))
    x = rng.normal(0, 9, (8, 9)).astype(np.float32)
    training, inference = (numpy(quantizer(x, training=flag)) for flag in (True, False))
    np.testing.assert_array_equal(training, inference)
    np.testing.assert_array_equal(training, affine.fake_quantize(x, -1.0, 1.5, INT8))
    assert [float(numpy(bound)) for bound in quantizer.range()] == [-1.0, 1.5]
    assert not quantizer.trainable_variables


def test_modes_follow_each_other_and_fixed_stays():
    quantizer = quantizers.ActivationQuantizer(INT8, initial_range=(0, 1))
    quantizer.build()
    for mode, trainable in [("moving", 0), ("trainable", 2), ("frozen", 0)]:
        quantizer.set_mode(mode)
        assert quantizer.mode == mode and len(quantizer.trainable_variables) == trainable
    fixed = quantizers.ActivationQuantizer(INT8, mode="fixed", initial_range=(0, 1))
    fixed.build()
    fixed.set_mode("trainable")
    assert fixed.mode == "fixed" and not fixed.trainable_variables
    with pytest.raises(ValueError, match="range mode 'ema' is not one of .*'moving'"):
        quantizer.set_mode("ema")
    with pytest.raises(ValueError, match="lazy: range mode 'ema' is not one of"):
        quantizers.ActivationQuantizer(INT8, mode="ema", name="lazy")


@pytest.mark.parametrize("config", [{"spec": None}, {"spec": INT8, "enabled": False}], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_without_quantization_floats_pass(config, training, rng):
    quantizer = quantizers.ActivationQuantizer(**config, mode="moving", initial_range=(-1, 1))
    x = rng.normal(0, 9, (8, 9)).astype(np.float32)
    np.testing.assert_array_equal(numpy(quantizer(x, training=training)), x)
    relu6 = numpy(quantizer(x, activation="relu6", training=training))
    np.testing.assert_array_equal(relu6, np.clip(x, 0, 6))
    assert [float(numpy(bound)) for bound in quantizer.range()] == [-1, 1]


def test_quantizer_configuration_round_trip():
    quantizer = quantizers.ActivationQuantizer(
        INT8, slots=3, mode="moving", decay=0.5, initial_range=(-1, 2), enabled=False, name="q"
    )
    again = quantizers.ActivationQuantizer.from_config(quantizer.get_config())
    assert again.get_config() == quantizer.get_config()
    assert again.spec == INT8 and again.initial_range == (-1, 2) and again.slots == 3
