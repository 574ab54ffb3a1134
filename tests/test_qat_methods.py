"""Training forms: they compute what the plain model computes, learn, and become plain again."""

import keras
import numpy as np
import pytest

from lowbit import (
    affine,
    calibration,
    layers,
    lowering,
    placement,
    quantizers,
    ranges,
    runtimes,
    spec,
    tflite_file,
)
from qat import losses, methods, rates, stability


def network(seed=0, residual=False):
    keras.utils.set_random_seed(seed)
    x = image = keras.Input((12, 12, 3))
    x = keras.layers.Conv2D(8, 3, strides=2, padding="same", use_bias=False, name="conv0")(x)
    x = keras.layers.BatchNormalization(name="bn0")(x)
    x = first = keras.layers.ReLU(6.0, name="relu0")(x)
    x = keras.layers.DepthwiseConv2D(3, padding="same", use_bias=False, name="depthwise")(x)
    x = keras.layers.BatchNormalization(name="bn1")(x)
    x = keras.layers.ReLU(name="relu1")(x)
    x = keras.layers.Conv2D(8, 1, name="conv1")(x)
    if residual:
        x = keras.layers.Add(name="add")([x, first])
        x = keras.layers.ReLU(name="relu2")(x)
        x = keras.layers.Conv2D(8, 1, name="conv2")(x)
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    x = keras.layers.Dense(5, name="logits")(x)
    model = keras.Model(image, x)
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.gamma.assign(rng.uniform(-1.5, 1.5, layer.gamma.shape))
            layer.moving_mean.assign(rng.normal(0, 0.1, layer.gamma.shape))
            layer.moving_variance.assign(rng.uniform(0.2, 2, layer.gamma.shape))
    return model


def images(count=16, seed=1):
    return np.random.default_rng(seed).uniform(-1, 1, (count, 12, 12, 3)).astype(np.float32)


def quantized(scheme="w8a8", residual=False, **options):
    placed = placement.place(network(residual=residual), spec.bits(scheme, **options))
    if calibration.observed_points(placed):
        calibration.calibrate(placed, [images()], ranges.estimator("minmax"))
    return placed


def steps(model, count=1, optimizer=0.05, target=None):
    """Trains; returns each step's loss.  Few steps eagerly: a graph takes 3 s to trace."""
    optimizer = keras.optimizers.SGD(optimizer) if isinstance(optimizer, float) else optimizer
    target = target or losses.labels(np.arange(5), 5)
    trainee = target.trainee(model)
    trainee.compile(optimizer, target.losses, jit_compile=False, run_eagerly=count < 8)
    wanted = target.wanted(images(), np.arange(16) % 5)
    return [float(np.ravel(trainee.train_on_batch(images(), wanted))[0]) for _ in range(count)]


def outputs(model):
    return np.concatenate(list(runtimes.run_keras(model, [images()])))


def names_that_moved(before, after):
    return {
        f"{layer.name}/{variable.name}"
        for layer in after.layers
        for variable, old in zip(
            layer.variables, before.get_layer(layer.name).variables, strict=True
        )
        if not np.array_equal(variable, old)
    }


SLOW = ("dsq_alpha", "dsq_fixed", "stochastic", "ternary")  # 5 s each


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
        for name in methods.METHODS
    ],
)
def test_a_training_form_computes_learns_and_becomes_plain(name):
    scheme = "w2a8" if name in ("binary", "ternary") else "w8a8"
    model = quantized(scheme)
    trained = methods.prepare(model, name)
    if name not in ("lsq", "dsq"):  # those start from a weight range of their own
        np.testing.assert_array_equal(
            outputs(trained),
            outputs(model),
        )
    before = methods.prepare(model, name)
    steps(trained, 1, 1e-4 if name == "lsq" else 0.05)
    moved = names_that_moved(before, trained)
    what = "kernel_gain" if name == "gains" else "kernel"
    assert {f"{layer}/{what}" for layer in ("conv0", "depthwise", "conv1", "logits")} <= moved
    assert name != "gains" or not any(path.endswith("/kernel") for path in moved)
    learns = {"pact": "relu0_quantizer/maximum", "lsq": "conv0/kernel_maximum"}
    learns |= {"dsq": "conv0/kernel_alpha", "ste": "relu0_quantizer/maximum"}
    assert name not in learns or learns[name] in moved
    if name == "dsq":
        assert "relu0_quantizer/alpha" in moved

    saved = methods.plain(trained)
    assert {q.method for q in quantizers.activation_quantizers(saved)} == {"ste"}
    assert {q.mode for q in quantizers.activation_quantizers(saved)} == {"frozen"}
    assert {layer.weight_method for layer in layers.weighted_layers(saved)} == {"ste"}
    assert not any("alpha" in variable.path for variable in saved.variables)
    calibration.widen_for_kernels(saved)
    graph = lowering.lower(saved)
    content = tflite_file.write(graph)
    ours = np.concatenate(list(runtimes.run_simulator(graph, [images()], "xnnpack")))
    theirs = np.concatenate(list(runtimes.run_litert(content, [images()], "xnnpack")))
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(outputs(saved), theirs)
    if name in ("binary", "ternary"):
        for node in graph.nodes:
            codes = [graph.tensors[i].data for i in node.inputs if i.endswith("/kernel")]
            for found in codes:
                assert set(np.unique(found)) <= ({-1, 1} if name == "binary" else {-1, 0, 1})


@pytest.mark.parametrize("scheme", ["w4a8", "w4a8_per_tensor", "w3a8_asymmetric"])
def test_gains_keep_the_codes(scheme):
    model = methods.prepare(quantized(scheme), "gains")
    for layer in layers.weighted_layers(model):
        # Else the averages move the folded kernel under a range that all channels share.
        layer.batch_norm_frozen = True
    before = {layer.name: codes(layer) for layer in layers.weighted_layers(model)}
    found = steps(model, 5, rates.Adam(0.02))
    assert found[-1] < found[0]
    saved = methods.plain(model)
    for layer in layers.weighted_layers(saved):
        np.testing.assert_array_equal(codes(layer), before[layer.name])
        gain = np.array(model.get_layer(layer.name).gains())
        assert np.abs(gain - 1).max() > 0.01
    # What training saw but for the rounding of scales to 16 bits and of integer additions
    np.testing.assert_allclose(outputs(saved), np.array(model(images(), training=True)), atol=0.15)


def codes(layer):
    kernel = np.array(layer.folded()[0])
    scale, zero_point = layer.numpy_scale(kernel)
    return np.rint(kernel.reshape(-1, layer.output_channels()) / scale) + zero_point


@pytest.mark.parametrize(
    ("name", "scheme", "frozen"),
    [
        ("ste", "w4a4", True),
        ("ste", "w8a8_per_tensor", False),
        ("lsq", "w4a4", False),
        ("lsq", "w8a8_per_tensor", True),
        ("gains", "w4a4", False),
        ("gains", "w8a8_per_tensor", True),
        ("dsq", "w4a4", True),
    ],
)
def test_rates_in_steps_of_the_quantizers(name, scheme, frozen):
    """Adam's first update is its rate times the factor, whatever the gradient."""
    model = methods.prepare(quantized(scheme), name, "trainable")
    for layer in layers.weighted_layers(model):
        layer.batch_norm_frozen = frozen
    factors = rates.in_steps(model)
    # The unit is a step of the codes, of every channel, whatever the batch norm makes of the kernel.
    layer = model.get_layer("depthwise")
    kernel = np.array(layer.folded()[0])
    scale, _ = layer.numpy_scale(kernel)
    if layer.weight_spec.axis is None:
        highest = affine.integer_bounds(layer.weight_spec)[1]
        own = np.abs(kernel).max(axis=(0, 1, 3)) / highest
        assert own.min() < 0.9 * scale  # or the test shows nothing
        scale = np.clip(own, 1e-3 * scale, scale)
    factor = np.abs(np.array(layer.fold_factor()))
    if name != "gains":
        alive = factor > 1e-3 * factor.max()
        unit = factors[layer.kernel.path].reshape(-1) * factor
        np.testing.assert_allclose(unit[alive], np.broadcast_to(scale, factor.shape)[alive], 1e-5)
    before = {v.path: np.array(v) for v in model.trainable_variables}
    assert set(before) - set(factors) <= {path for path in before if "alpha" in path}
    steps(model, 1, rates.Adam(0.25, factors=factors))
    for variable in model.trainable_variables:
        moved = np.abs(np.array(variable) - before[variable.path])
        wanted = 0.25 * np.broadcast_to(factors.get(variable.path, 1.0), moved.shape)
        # A gradient of zero moves nothing, a tiny one less (Adam's epsilon).
        assert (moved <= 1.001 * wanted + 1e-6).all(), variable.path
        if variable.name == "kernel":
            assert (moved > 0.9 * wanted).mean() > 0.5


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        *(("lsq", each) for each in ("w4a4", "w2a4", "w3a8_per_tensor", "w4a8_asymmetric")),
        *(("dsq", each) for each in ("w2a4", "w3a8_per_tensor", "w4a8_asymmetric")),
        *(("stochastic", "w4a4"), ("ste", "w2a4")),
    ],
)
def test_every_granularity_learns_and_the_loss_falls(name, scheme):
    model = methods.prepare(quantized(scheme), name)
    found = steps(model, 6, 0.001 if name == "lsq" else 0.1)
    assert np.isfinite(found).all()
    assert min(found[3:]) < found[0]


def test_the_ranges_that_learning_starts_from():
    model = methods.prepare(quantized("w2a8"), "lsq")
    layer = model.get_layer("conv0")
    kernel = np.asarray(layer.kernel).reshape(-1, 8)
    usual = 2 * np.abs(kernel).mean(axis=0)  # Q is 1: codes -1, 0, 1
    largest = np.abs(kernel).max(axis=0)
    np.testing.assert_allclose(layer.kernel_maximum, np.minimum(usual, largest), rtol=1e-6)
    factor = np.asarray(layer.gamma / layer._deviation())
    low, high = (np.asarray(bound) for bound in layer.stored_bounds())
    np.testing.assert_allclose(high, np.asarray(layer.kernel_maximum) * np.abs(factor), rtol=1e-6)
    np.testing.assert_array_equal(low, -high)


def test_binary_weights_need_two_bits_a_scale_a_channel():
    with pytest.raises(ValueError, match="quantizer=binary: layer conv0 .* 2-bit"):
        methods.prepare(quantized("w2a8_per_tensor"), "binary")
    # Wider layers, overridden ones, stay as they are.
    kept = methods.prepare(quantized("w2a8", ends="w8a8"), "binary")
    found = {layer.name: layer.weight_method for layer in layers.weighted_layers(kept)}
    assert found == {"conv0": "ste", "depthwise": "binary", "conv1": "binary", "logits": "ste"}


# --- distillation -------------------------------------------------------------------------------


def test_distillation_is_the_divergence_from_the_teacher():
    teacher = network()
    model = quantized("w4a8")
    for temperature in (1.0, 4.0):
        target = losses.distillation(teacher, temperature)
        (loss,) = steps(model, 1, 1e-9, target)
        trained = methods.prepare(model, "ste")
        t, s = (
            np.float64(keras.ops.convert_to_numpy(one(images(), training=training))) / temperature
            for one, training in ((teacher, False), (trained, True))
        )
        p, q = (np.exp(z - z.max(axis=1, keepdims=True)) for z in (t, s))
        p, q = p / p.sum(axis=1, keepdims=True), q / q.sum(axis=1, keepdims=True)
        wanted = temperature**2 * (p * np.log(p / q)).sum(axis=1).mean()
        np.testing.assert_allclose(loss, wanted, rtol=0.05)


def test_features_add_a_distance_that_is_zero_for_the_teacher_itself():
    teacher = network()
    target = losses.distillation(teacher, features=2.0)
    wanted = target.wanted(images(), None)
    assert [x.shape for x in wanted] == [(16, 5), (16, 8)]
    assert float(target.losses[1](wanted[1], wanted[1])) == 0
    np.testing.assert_allclose(float(target.losses[1](wanted[1], 0 * wanted[1])), 2.0, rtol=1e-5)
    assert steps(quantized("w4a8"), 1, 1e-9, target)[0] > 0


# --- bits by layer ------------------------------------------------------------------------------


def bits_of(model):
    weights = {layer.name: layer.weight_spec.bits for layer in layers.weighted_layers(model)}
    activations = {
        q.name.removesuffix("_quantizer"): q.spec.bits
        for q in quantizers.activation_quantizers(model)
    }
    return weights, activations


def test_ends_and_overrides_set_bits_by_layer():
    weights, activations = bits_of(quantized("w4a4", ends="w8a8"))
    assert weights == {"conv0": 8, "depthwise": 4, "conv1": 4, "logits": 8}
    assert activations == {"input": 8, "relu0": 4, "relu1": 4, "conv1": 4, "pool": 8, "logits": 8}
    weights, activations = bits_of(quantized("w4a4", overrides="*=w8a8,conv?=w2a8,conv1=w3a5"))
    assert weights == {"conv0": 2, "depthwise": 8, "conv1": 3, "logits": 8}
    assert activations["relu0"] == 8 and activations["conv1"] == 5
    with pytest.raises(
        ValueError, match="no layer's name matches 'stem.*'; the layers are input, conv0"
    ):
        quantized("w4a4", overrides="stem*=w8a8")
    with pytest.raises(ValueError, match="--override: 'conv0' is not PATTERN=SCHEME"):
        spec.bits("w8a8", "conv0")
    with pytest.raises(ValueError, match="--ends: scheme 'w9' is unknown"):
        spec.bits("w8a8", ends="w9")


def test_additions_keep_their_bits_and_readers_get_a_copy():
    model = quantized("w4a4", residual=True, ends="w8a8", additions="w8a8")
    weights, activations = bits_of(model)
    assert weights == {"conv0": 8, "depthwise": 4, "conv1": 4, "conv2": 4, "logits": 8}
    assert activations == {
        "input": 8,
        "relu0": 8,  # the addition reads it
        "depthwise_input": 4,
        "relu1": 4,
        "conv1": 8,
        "relu2": 8,
        "conv2_input": 4,
        "conv2": 4,
        "pool": 8,
        "logits": 8,
    }
    for name, bits in (("depthwise_input", 4), ("relu2", 8)):
        quantizer = model.get_layer(f"{name}_quantizer")
        values = keras.Model(model.inputs, quantizer.output).predict(images(), verbose=0)
        assert len(np.unique(values)) <= 2**bits
    with pytest.raises(ValueError, match="4-bit activations"):
        lowering.lower(model)
    # Nothing to copy where the additions' bits are those of all.
    assert "depthwise_input" not in bits_of(quantized("w4a8", residual=True, additions="w8a8"))[1]


# --- stability ----------------------------------------------------------------------------------


def test_oscillations_are_counted_as_the_paper_counts_them():
    codes = np.array([[0, 0, 0]])
    state = stability._State(codes)
    m = stability.MOMENTUM
    # The first weight goes up and down; the second climbs; the third stays.
    path = [[1, 1, 0], [0, 2, 0], [1, 3, 0], [1, 3, 0], [0, 3, 0]]
    expected = 0.0
    for new, jumps in zip(path, [0, 1, 1, 0, 1], strict=True):
        state.follow(np.array([new]), None)
        expected = m * jumps + (1 - m) * expected
        np.testing.assert_allclose(state.frequency, [[expected, 0, 0]], rtol=1e-6)


def test_frozen_weights_stay_on_their_code():
    model = methods.prepare(quantized("w4a8"), "lsq")
    watch = stability.Oscillations(model, threshold=0.5 * stability.MOMENTUM)
    layer = model.get_layer("conv1")
    kernel = np.asarray(layer.kernel)
    _, scale, _ = stability._codes(layer)
    for sign in (1, -1, 1, -1):
        layer.kernel.assign(kernel + sign * 0.6 * scale)
        watch.update()
    assert watch.shares()["conv1"] > 0.5
    frozen = watch.states[[one.name for one in watch.layers].index("conv1")].frozen
    held, _, _ = stability._codes(layer)
    layer.kernel.assign(kernel * 5 + 1)
    watch.update()
    codes, _, _ = stability._codes(layer)
    np.testing.assert_array_equal(codes[frozen], held[frozen])
    assert (codes[~frozen] != held[~frozen]).any() or frozen.all()


def test_frozen_weights_under_a_batch_norm_stay_too():
    model = methods.prepare(quantized("w4a8"), "ste")
    watch = stability.Oscillations(model, threshold=0.0)
    layer = model.get_layer("conv0")
    state = watch.states[[one.name for one in watch.layers].index("conv0")]
    kernel = np.asarray(layer.kernel)
    codes = stability._codes(layer)[0]
    state.frozen[:] = True
    # Far from the largest weights, which set the scale here.
    layer.kernel.assign(kernel + 0.3 * np.abs(kernel).max() * (np.abs(kernel) < 0.2))
    watch.update()
    inner = np.abs(codes) < 6
    np.testing.assert_array_equal(stability._codes(layer)[0][inner], codes[inner])


def test_batch_norms_are_estimated_anew():
    model = methods.prepare(quantized("w4a8"), "ste", "frozen")
    layer = model.get_layer("conv0")
    for one in layers.weighted_layers(model):
        one.batch_norm_frozen = True
    parts = [images(8, seed) for seed in range(4)]
    momentum = layer.batch_norm["momentum"]
    assert stability.reestimate_batch_norms(model, parts) == 4
    assert layer.batch_norm["momentum"] == momentum and layer.batch_norm_frozen
    # Its input is the image alone, so the mean follows from the weights that it had each time.
    first = methods.prepare(quantized("w4a8"), "ste", "frozen")
    other = first.get_layer("conv0")
    stability.reestimate_batch_norms(first, parts[:1])
    x = keras.ops.convert_to_numpy(first.get_layer("input_quantizer")(parts[0]))
    z = keras.ops.convert_to_numpy(keras.ops.conv(x, other.kernel, strides=2, padding="same"))
    np.testing.assert_allclose(other.moving_mean, z.mean(axis=(0, 1, 2)), atol=0.02)
    np.testing.assert_allclose(other.moving_variance, z.var(axis=(0, 1, 2)), rtol=0.05)


def test_dampening_draws_weights_to_their_codes():
    model = methods.prepare(quantized("w4a8"), "ste")
    layer = model.get_layer("conv1")
    off = []
    for coefficient in (0.0, 30.0):
        trained = methods.prepare(model, "ste")
        for one in layers.weighted_layers(trained):
            one.dampening = coefficient
        steps(trained, 5, 1e-3)
        layer = trained.get_layer("conv1")
        _, scale, _ = stability._codes(layer)
        v = np.asarray(layer.kernel).reshape(-1, 8) / scale
        off.append(np.abs(v - np.rint(v)).mean())
    assert off[1] < off[0]


def test_batch_norm_without_correction_puts_the_batch_in_the_weights():
    model = methods.prepare(quantized("w8"), "ste")
    layer = model.get_layer("conv0")
    layer.weights_enabled = False
    x = images(8)
    z = keras.ops.convert_to_numpy(keras.ops.conv(x, layer.kernel, strides=2, padding="same"))
    mean, variance = z.mean(axis=(0, 1, 2)), z.var(axis=(0, 1, 2))
    wanted = (z - mean) / np.sqrt(variance + layer.batch_norm["epsilon"])
    wanted = wanted * np.asarray(layer.gamma) + np.asarray(layer.beta)
    layer.batch_norm_mode = "none"
    np.testing.assert_allclose(layer(x, training=True), wanted, atol=1e-4)


def test_alphas_name_the_layers_that_read_a_tensor():
    model = methods.prepare(quantized("w4a4", residual=True, additions="w8a8"), "dsq")
    found = {(row["layer"], row["part"]): row["read_by"] for row in methods.alphas(model)}
    assert {layer for layer, part in found if part == "weights"} == {
        *("conv0", "depthwise", "conv1", "conv2", "logits")
    }
    assert found["input", "activations"] == "conv0"
    assert found["depthwise_input", "activations"] == "depthwise"
    assert found["relu0", "activations"] == ""  # the addition and the copy read it
    assert found["conv1", "weights"] == ""
    assert methods.alphas(methods.prepare(model, "ste")) == []
