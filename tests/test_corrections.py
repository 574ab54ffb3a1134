"""Corrections of a network: oracles in NumPy, and small real networks before and after."""

import itertools

import keras
import numpy as np
import pytest
from keras import layers as L

from lowbit import affine, calibration, layers, lowering, placement, quantizers, spec, walk
from lowbit import rewrites as rewrites_lib
from lowbit.models import batch_norms
from ptq import adaround, corrections, equalization, error_feedback, moments, recipes

W4 = spec.scheme("w4a8").weights


def correlated(rng, groups, taps, rows=400):
    """Returns inputs (groups, rows, taps) that are as correlated as activations are."""
    mix = rng.normal(size=(groups, taps, taps)) / np.sqrt(taps)
    common = rng.normal(size=(groups, rows, 1))
    return np.maximum(rng.normal(size=(groups, rows, taps)) @ mix + common + 0.3, 0)


def problem(seed, groups=3, taps=5, outputs=4):
    rng = np.random.default_rng(seed)
    x = correlated(rng, groups, taps)
    centred = x - x.mean(axis=1, keepdims=True)
    covariance = centred.transpose(0, 2, 1) @ centred / x.shape[1]
    weights = rng.normal(size=(groups, taps, outputs))
    scale = np.abs(weights).max(axis=1) / 7
    return weights, error_feedback.damped(covariance), scale, np.zeros_like(scale)


def error_of(codes, weights, hessian, scale):
    return error_feedback.error(codes * scale[:, None, :] - weights, hessian)


# --- error feedback -----------------------------------------------------------------------------


def test_error_is_the_mean_square_of_the_centred_outputs():
    rng = np.random.default_rng(0)
    x = correlated(rng, 2, 6)
    centred = x - x.mean(axis=1, keepdims=True)
    covariance = centred.transpose(0, 2, 1) @ centred / x.shape[1]
    difference = rng.normal(size=(2, 6, 3))
    expected = np.square(centred @ difference).mean(axis=1)
    np.testing.assert_allclose(error_feedback.error(difference, covariance), expected, rtol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_feedback_is_gptq_written_out(seed):
    """The paper's loop: after each weight the rest moves by the error over H^-1's diagonal."""
    weights, hessian, scale, zero_point = problem(seed, groups=1, taps=70)
    feedback = error_feedback.feedback(hessian)
    got = error_feedback.with_feedback(weights, feedback, scale, zero_point, W4)[0]
    order = feedback.order[0]
    h, left = hessian[0][np.ix_(order, order)], weights[0][order].copy()
    expected = np.empty_like(left)
    for j in range(len(h)):
        inverse = np.linalg.inv(h[j:, j:])
        expected[j] = np.clip(np.rint(left[j] / scale[0]), -7, 7)
        error = (left[j] - expected[j] * scale[0]) / inverse[0, 0]
        left[j:] -= inverse[:, :1] * error
    np.testing.assert_array_equal(got[order], expected)


@pytest.mark.parametrize("seed", range(6))
def test_feedback_and_descent_lower_the_error_and_come_near_the_best_codes(seed):
    weights, hessian, scale, zero_point = problem(seed)
    arguments = weights, hessian, scale
    nearest = error_feedback.nearest(weights, scale, zero_point, W4)
    feedback = error_feedback.with_feedback(
        weights, error_feedback.feedback(hessian), scale, zero_point, W4
    )
    descended = error_feedback.descend(feedback, *arguments, zero_point, W4, sweeps=20)
    costs = [error_of(codes, *arguments) for codes in (nearest, feedback, descended)]
    assert costs[1].sum() < 0.95 * costs[0].sum()
    assert (costs[2] <= costs[1] * (1 + 1e-12)).all()
    # All codes within 2 of nearest: 5^5 for each output.
    steps = np.array(list(itertools.product(range(-2, 3), repeat=5)))
    best = np.empty_like(costs[0])
    for g, o in np.ndindex(best.shape):
        every = np.clip(nearest[g, :, o] + steps, -7, 7) * scale[g, o] - weights[g, :, o]
        best[g, o] = np.einsum("nk,kl,nl->n", every, hessian[g], every).min()
    assert costs[2].sum() <= 1.25 * best.sum()


def test_descent_leaves_no_single_code_to_improve():
    weights, hessian, scale, zero_point = problem(7)
    start = error_feedback.nearest(weights, scale, zero_point, W4)
    codes = error_feedback.descend(start, weights, hessian, scale, zero_point, W4, sweeps=50)
    cost = error_of(codes, weights, hessian, scale)
    for tap, step in itertools.product(range(5), (-1, 1)):
        moved = codes.copy()
        moved[:, tap] = np.clip(moved[:, tap] + step, -7, 7)
        assert (error_of(moved, weights, hessian, scale) >= cost - 1e-12).all()


@pytest.mark.parametrize("scheme", ["w4a8", "w8a8", "w2a8", "w4a8_asymmetric"])
@pytest.mark.parametrize("rounding", ["nearest", "error_feedback", "adaround"])
def test_codes_stay_in_bounds(scheme, rounding):
    weights, hessian, _, _ = problem(1)
    settings = corrections.Settings(rounding, clipping=True)
    weight_spec = spec.scheme(scheme).weights
    codes, scale, zero_point = corrections.quantize(weights, hessian, weight_spec, settings)
    lowest, highest = affine.integer_bounds(weight_spec)
    shifted = codes + zero_point[:, None, :]
    assert lowest <= shifted.min() and shifted.max() <= highest
    np.testing.assert_array_equal(codes, np.rint(codes))


def test_an_input_that_never_varies_costs_nothing_and_breaks_nothing():
    weights, hessian, scale, zero_point = problem(2)
    covariance = hessian.copy()
    covariance[:, 2] = covariance[:, :, 2] = 0
    covariance[1] = 0  # a dead group
    damped = error_feedback.damped(covariance)
    codes = error_feedback.with_feedback(
        weights, error_feedback.feedback(damped), scale, zero_point, W4
    )
    assert np.isfinite(codes).all()
    np.testing.assert_array_equal(
        codes[1], error_feedback.nearest(weights, scale, zero_point, W4)[1]
    )


@pytest.mark.parametrize("seed", range(3))
def test_adaround_rounds_up_or_down_and_beats_nearest(seed):
    weights, hessian, scale, zero_point = problem(seed, groups=4, taps=9, outputs=8)
    codes = adaround.rounded(weights, hessian, scale, zero_point, W4)
    scaled = weights / scale[:, None, :]
    assert ((codes == np.floor(scaled)) | (codes == np.ceil(scaled))).all()
    nearest = error_feedback.nearest(weights, scale, zero_point, W4)
    arguments = weights, hessian, scale
    assert error_of(codes, *arguments).sum() < 0.9 * error_of(nearest, *arguments).sum()


# --- moments ------------------------------------------------------------------------------------


def weighted(layer, shape):
    """Returns a placed layer's quantized form and its number of outputs, for inputs of `shape`."""
    inputs = keras.Input(shape)
    model = keras.Model(inputs, layer(inputs))
    placed = placement.place(
        model, spec.scheme("w8a8"), further=[rewrites_lib.bake_batch_norms], weight_range="stored"
    )
    (found,) = layers.weighted_layers(placed)
    return found


@pytest.mark.parametrize(
    "layer, shape",
    [
        (L.Conv2D(5, 3, strides=2, padding="same"), (7, 8, 3)),
        (L.Conv2D(5, (3, 2), padding="valid", dilation_rate=2), (9, 8, 3)),
        (L.Conv2D(4, 1), (6, 6, 7)),
        (L.DepthwiseConv2D(3, strides=2, padding="same", depth_multiplier=2), (8, 7, 3)),
        (L.DepthwiseConv2D(3, padding="valid"), (6, 6, 4)),
        (L.Dense(5), (11,)),
    ],
)
def test_moments_say_the_mean_and_the_spread_of_the_outputs(layer, shape):
    """w^T mean + b and w^T covariance w, against the layer's own outputs."""
    layer = weighted(layer, shape)
    rng = np.random.default_rng(0)
    layer.bias.assign(rng.normal(size=layer.bias.shape))
    batches = [rng.normal(size=(n, *shape)).astype(np.float32) for n in (5, 3)]
    pairs = [(x, 2 * x + 1) for x in batches]
    observed = moments.observe(layer, pairs)
    kernel, bias = (np.array(array, np.float64) for array in layer.folded())
    weights = moments.grouped(layer, kernel)
    np.testing.assert_array_equal(moments.ungrouped(layer, weights), kernel)
    outputs = [
        np.array(layer.linear(keras.ops.convert_to_tensor(x), layer.kernel)) + bias for x in batches
    ]
    outputs = np.concatenate([y.reshape(-1, y.shape[-1]) for y in outputs])
    assert observed.count == len(outputs)
    mean = np.einsum("gko,gk->go", weights, observed.mean_q).reshape(-1) + bias
    np.testing.assert_allclose(mean, outputs.mean(axis=0), atol=1e-5)
    spread = error_feedback.error(weights, observed.covariance).reshape(-1)
    np.testing.assert_allclose(spread, outputs.var(axis=0), rtol=1e-4)
    if len(shape) == 1 or layer.padding == "valid":  # no borders: the float stream is 2 x + 1
        np.testing.assert_allclose(observed.cross, 2 * observed.covariance, atol=1e-5)
        np.testing.assert_allclose(observed.mean_f, 2 * observed.mean_q + 1, atol=1e-5)


def test_moments_of_many_positions_are_a_sample(monkeypatch):
    monkeypatch.setattr(moments, "POSITIONS", 10)
    layer = weighted(L.Conv2D(4, 1), (20, 20, 3))
    x = np.random.default_rng(0).normal(size=(8, 20, 20, 3)).astype(np.float32)
    assert moments.observe(layer, [(x, x)]).count == 80


def test_moments_keep_a_small_spread_far_from_zero():
    layer = weighted(L.Conv2D(4, 1), (8, 8, 3))
    spread = np.random.default_rng(0).normal(size=(4, 8, 8, 3))
    x = (1000 + 0.01 * spread).astype(np.float32)
    observed = moments.observe(layer, [(x, x)])
    expected = np.cov(np.float64(x).reshape(-1, 3).T, bias=True)
    np.testing.assert_allclose(observed.covariance[0], expected, rtol=1e-2, atol=1e-7)
    constant = np.full((4, 8, 8, 3), 5.7, np.float32)
    for covariance in (
        observed.covariance,
        moments.observe(layer, [(constant, constant)]).covariance,
    ):
        assert np.linalg.eigvalsh(error_feedback.damped(covariance)).min() > 0


def test_moments_refuse_nothing_and_nan():
    layer = weighted(L.Conv2D(4, 1), (2, 2, 3))
    with pytest.raises(ValueError, match="no input was observed"):
        moments.observe(layer, [])
    x = np.full((1, 2, 2, 3), np.nan, np.float32)
    with pytest.raises(ValueError, match=f"{layer.name}: its inputs hold NaN"):
        moments.observe(layer, [(x, x)])


def test_regression_finds_the_weights_behind_the_outputs(monkeypatch):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 3000, 6))
    noisy = x @ (np.eye(6) + 0.3 * rng.normal(size=(6, 6)))  # the quantized stream
    weights = rng.normal(size=(1, 6, 3))
    observed = moments.Moments(
        noisy.mean(axis=1),
        x.mean(axis=1),
        np.cov(noisy[0].T, bias=True)[None],
        ((noisy[0] - noisy[0].mean(0)).T @ (x[0] - x[0].mean(0)) / 3000)[None],
        3000,
    )
    monkeypatch.setattr(corrections, "RIDGE_PER_TAP", 0)
    monkeypatch.setattr(corrections, "RIDGE", 1e-9)
    found = corrections.regression(weights, observed)
    np.testing.assert_allclose(noisy @ found, x @ weights, atol=0.2)
    # With a ridge beyond all covariance the weights stay.
    monkeypatch.setattr(corrections, "RIDGE", 1e9)
    np.testing.assert_allclose(corrections.regression(weights, observed), weights, atol=1e-6)


# --- rewrites of the float network --------------------------------------------------------------


def inverted_residual(activation):
    inputs = keras.Input((12, 12, 4))
    x = L.Conv2D(8, 3, strides=2, padding="same", use_bias=False)(inputs)
    x = activation(L.BatchNormalization()(x))
    y = activation(L.BatchNormalization()(L.Conv2D(16, 1, use_bias=False)(x)))
    y = L.DepthwiseConv2D(3, padding="same", use_bias=False)(y)
    y = activation(L.BatchNormalization()(y))
    y = L.BatchNormalization()(L.Conv2D(8, 1, use_bias=False)(y))
    x = L.Add()([x, y])
    x = activation(L.BatchNormalization()(L.Conv2D(12, 1)(x)))
    return keras.Model(inputs, L.Dense(5)(L.GlobalAveragePooling2D()(x)))


def relu(x):
    return L.ReLU()(x)


def relu6(x):
    return L.ReLU(6.0)(x)


@pytest.fixture
def far_below_six(randomize):
    """Returns a model with random weights whose batch norms keep its values far below 6."""

    def calm(model):
        for layer in randomize(model).layers:
            if isinstance(layer, L.BatchNormalization):
                layer.gamma.assign(0.2 * layer.gamma)
                layer.beta.assign(0.2 * layer.beta)
        return model

    return calm


def in_float(model, images):
    with layers.in_float(model):
        return np.array(keras.Model(model.inputs, model.outputs).predict_on_batch(images))


def placed(model, *rewrites, scheme="w8a8"):
    return placement.place(
        model,
        spec.scheme(scheme),
        further=[rewrites_lib.bake_batch_norms, *rewrites],
        weight_range="stored",
    )


def test_baking_changes_no_output(randomize, smooth_images):
    model = randomize(inverted_residual(relu6))
    images = smooth_images(4, 12, 12, 4)
    found = placed(model)
    assert all(layer.batch_norm is None for layer in layers.weighted_layers(found))
    np.testing.assert_allclose(
        in_float(found, images), model.predict_on_batch(images), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("rewrite", [equalization.equalize, equalization.absorb])
def test_rewrites_change_no_output_of_a_relu_network(rewrite, randomize, smooth_images):
    model = randomize(inverted_residual(relu))
    images = smooth_images(4, 12, 12, 4)
    if rewrite is equalization.absorb:
        # High biases are absorbed exactly where no value falls below them.
        for layer in model.layers:
            if isinstance(layer, L.BatchNormalization):
                layer.beta.assign(layer.beta + 40 * (np.arange(layer.beta.shape[0]) % 2))
                layer.gamma.assign(0.01 * layer.gamma)
    before = placed(model)
    after = placed(model, rewrite)
    changed = [
        not np.allclose(a.bias, b.bias)
        for a, b in zip(layers.weighted_layers(before), layers.weighted_layers(after), strict=True)
    ]
    assert sum(changed) >= 2
    np.testing.assert_allclose(
        in_float(after, images), in_float(before, images), rtol=1e-3, atol=1e-3
    )


def test_equalized_channels_have_equal_ranges(far_below_six):
    model = far_below_six(inverted_residual(relu6))
    found = layers.weighted_layers(placed(model, equalization.equalize))
    # expand, depthwise, project are a chain; the stem feeds two readers, the last conv the dense.
    _, expand, depthwise, project, last, dense = (np.abs(np.array(x.kernel)) for x in found)
    outputs = expand.max(axis=(0, 1, 2)), depthwise.max(axis=(0, 1)).reshape(-1)
    inputs = depthwise.max(axis=(0, 1)).reshape(-1), project.max(axis=(0, 1, 3))
    for ours, theirs in zip(outputs, inputs, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-2)
    np.testing.assert_allclose(last.max(axis=(0, 1, 2)), dense.max(axis=1), rtol=1e-2)


def fused_activations(model):
    return [
        node.arguments.kwargs.get("activation")
        for quantizer in quantizers.activation_quantizers(model)
        for node in quantizer._inbound_nodes
    ]


def test_equalized_relu6_becomes_relu_where_it_cuts_nothing(far_below_six, randomize):
    model = far_below_six(inverted_residual(relu6))
    # input, stem, expand, depthwise, project, add, last conv, mean, dense
    expected = [None, "relu6", "relu", "relu", None, None, "relu", None, None]
    assert fused_activations(placed(model, equalization.equalize)) == expected
    for layer in model.layers:
        if isinstance(layer, L.BatchNormalization):
            layer.beta.assign(layer.beta + 5.5)  # now much lies above 6
    expected = [None, "relu6", "relu6", "relu6", None, None, "relu6", None, None]
    assert fused_activations(placed(model, equalization.equalize)) == expected


def test_a_layer_called_twice_is_not_equalized(randomize):
    inputs = keras.Input((6, 6, 4))
    shared = L.Conv2D(4, 1)
    model = randomize(keras.Model(inputs, L.Conv2D(3, 1)(shared(shared(inputs)))))
    (first, _), (second, _) = (
        [x.get_weights() for x in layers.weighted_layers(placed(model, *rewrites))]
        for rewrites in ((), (equalization.equalize,))
    )
    for ours, theirs in zip(first, second, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("activation", [None, "relu", "relu6"])
def test_analytic_mean_is_that_of_many_draws(activation):
    rng = np.random.default_rng(0)
    mean, deviation = np.array([-3.0, 0.0, 0.5, 5.0, 9.0]), np.array([1.0, 2.0, 0.1, 3.0, 0.0])
    draws = rng.normal(size=(400_000, 5)) * deviation + mean
    expected = {
        None: draws,
        "relu": np.maximum(draws, 0),
        "relu6": np.clip(draws, 0, 6),
    }[activation].mean(axis=0)
    got = equalization.activation_mean(mean, deviation, activation)
    np.testing.assert_allclose(got, expected, atol=0.02)


def test_analytic_bias_correction_restores_the_mean(rng):
    """Two layers, the first one's outputs exactly as its batch norm says."""
    inputs = keras.Input((8, 8, 6))
    x = L.ReLU()(L.BatchNormalization(epsilon=1e-6)(L.Conv2D(32, 1, use_bias=False)(inputs)))
    model = keras.Model(inputs, L.Conv2D(8, 1)(x))
    images = rng.normal(size=(64, 8, 8, 6)).astype(np.float32)
    kernel = rng.normal(size=(1, 1, 6, 32)).astype(np.float32)
    beta = rng.normal(size=32).astype(np.float32)
    z = images @ kernel[0, 0]
    ones = np.ones(32, np.float32)
    model.layers[1].set_weights([kernel])
    model.layers[2].set_weights([ones, beta, z.mean(axis=(0, 1, 2)), z.var(axis=(0, 1, 2))])
    model.layers[4].set_weights(
        [rng.normal(size=(1, 1, 32, 8)).astype(np.float32), np.zeros(8, np.float32)]
    )
    scheme = spec.scheme("w3")  # coarse weights, float activations: the shift is theirs
    shifts = []
    for rewrites in ((), (lambda network: equalization.correct_biases(network, scheme),)):
        found = placement.place(
            model, scheme, further=[rewrites_lib.bake_batch_norms, *rewrites], weight_range="stored"
        )
        # The first layer's own error is not the second's to mend.
        layers.weighted_layers(found)[0].weights_enabled = False
        got = np.array(found.predict_on_batch(images)).mean(axis=(0, 1, 2))
        shifts.append(np.abs(got - in_float(placed(model), images).mean(axis=(0, 1, 2))).mean())
    assert shifts[1] < 0.1 * shifts[0]


# --- the walk, and whole recipes ----------------------------------------------------------------


def calibrated(model, images, scheme="w8a8", names=("bias_empirical",)):
    quantized, reference = recipes.place(model, spec.scheme(scheme), recipes.check(names))
    calibration.calibrate(quantized, np.split(images, 2))
    return quantized, reference


def test_walk_gives_what_the_whole_models_compute(randomize, smooth_images):
    model = randomize(inverted_residual(relu6))
    images = smooth_images(8, 12, 12, 4)
    quantized, reference = calibrated(model, images)
    wanted = {}
    for name, placed_model in (("quantized", quantized), ("float", reference)):
        tensors = [x.input for x in layers.weighted_layers(placed_model)]
        if name == "float":
            with layers.in_float(placed_model):
                wanted[name] = keras.Model(placed_model.inputs, tensors).predict_on_batch(images)
        else:
            wanted[name] = layers.QuantizedModel(placed_model.inputs, tensors).predict_on_batch(
                images
            )
    names = []
    for step in walk.walk(quantized, reference, np.split(images, 4), len(images)):
        names.append(step.layer.name)
        assert step.count == 6
        got = [np.concatenate(parts) for parts in zip(*step.inputs(), strict=True)]
        scale = step.layer.input_quantizer().scale_and_zero_point()[0]
        difference = np.abs(got[0] - wanted["quantized"][step.index]) / scale
        assert (difference > 0.5).mean() < 0.01 and difference.max() < 1.5  # codes
        low, high = (np.array(bound) for bound in step.layer.input_quantizer().range())
        clipped = np.clip(wanted["float"][step.index], low, high)
        np.testing.assert_allclose(got[1], clipped, rtol=2e-3, atol=5e-3)
    assert names == [layer.name for layer in layers.weighted_layers(quantized)]


def test_walk_sees_what_was_assigned_before(randomize, smooth_images):
    model = randomize(inverted_residual(relu6))
    images = smooth_images(4, 12, 12, 4)
    quantized, reference = calibrated(model, images)
    for step in walk.walk(quantized, reference, [images], 4):
        (pair,) = step.inputs()
        if step.index == 0:
            step.layer.kernel.assign(np.zeros(step.layer.kernel.shape))
            step.layer.bias.assign(np.full(step.layer.bias.shape, 1.0))
        if step.index == 1:
            assert np.ptp(pair[0]) == 0 < np.ptp(pair[1])


def test_walk_counts_its_images(randomize, smooth_images):
    model = randomize(inverted_residual(relu6))
    images = smooth_images(4, 12, 12, 4)
    quantized, reference = calibrated(model, images)
    for announced, message in ((3, "more than the 3"), (5, "4 images came, 5 were")):
        with pytest.raises(ValueError, match=message):
            next(walk.walk(quantized, reference, np.split(images, 2), announced))


BIAS = ("bias_empirical",)
FITTED = ("clipping", "regression", "error_feedback", "bias_empirical")
LEARNT = ("equalization", "absorption", "adaround", "bias_empirical")


@pytest.mark.parametrize(
    "scheme, names",
    [
        ("w8a8", BIAS),
        pytest.param("w8a8", FITTED, marks=pytest.mark.slow),
        ("w4a8", FITTED),
        pytest.param("w4a8", LEARNT, marks=pytest.mark.slow),
        ("w4a8_per_tensor", LEARNT),
        pytest.param("w4a8_asymmetric", FITTED, marks=pytest.mark.slow),
        ("w4", BIAS),
    ],
)
def test_corrections_bring_the_output_nearer_to_float(scheme, names, randomize, smooth_images):
    model = randomize(inverted_residual(relu6))
    images = smooth_images(48, 12, 12, 4)
    # The rewrites take the batch norms at their word.
    batch_norms.calibrate_batch_norms(model, images)
    wanted = model.predict_on_batch(images[:16])
    errors = []
    for some in ((), names):
        quantized, reference = recipes.place(model, spec.scheme(scheme), recipes.check(some))
        if spec.scheme(scheme).activations is not None:
            calibration.calibrate(quantized, np.split(images[16:], 2))
        if reference is not None:
            recipes.correct(quantized, reference, recipes.check(some), np.split(images[16:], 2), 32)
        errors.append(np.square(np.array(quantized.predict_on_batch(images[:16])) - wanted).mean())
    # At 8 bits per channel little is left to win.
    limit = 0.01 * np.var(wanted) if scheme == "w8a8" else 0.9 * errors[0]
    assert errors[1] < limit


def test_corrected_codes_are_the_files(tmp_path, randomize, smooth_images):
    """What the corrections chose is what a saved, reloaded and lowered model holds."""
    model = randomize(inverted_residual(relu6))
    images = smooth_images(24, 12, 12, 4)
    names = recipes.check(("clipping", "regression", "error_feedback", "bias_empirical"))
    quantized, reference = calibrated(model, images, "w4a8", names)
    recipes.correct(quantized, reference, names, np.split(images, 2), 24)
    quantized.save(tmp_path / "q.keras")
    loaded = keras.saving.load_model(tmp_path / "q.keras")
    graph = lowering.lower(loaded)
    for layer in layers.weighted_layers(quantized):
        tensor = graph.tensors[f"{layer.name}/kernel"]
        kernel, scale = np.array(layer.kernel), tensor.quantization.scale
        codes = tensor.data.astype(np.float32)
        assert np.abs(codes).max() <= 7
        if tensor.quantization.axis == 0:
            codes = np.moveaxis(codes, 0, -1)
        step = scale.reshape(kernel.shape[-2:] if tensor.quantization.axis == 3 else (-1,))
        off = kernel / step - codes.reshape(kernel.shape)
        # Weights keep what training can go on from: their place in the code's cell, off its ties,
        # and inside the range, where the gradient passes.
        assert 0 < np.abs(off).max() < 0.46
        assert (np.abs(kernel) <= 7.00001 * step).all()


@pytest.mark.parametrize("kind", ["one image", "black", "dead channel", "tiny"])
def test_awkward_networks_are_corrected(kind, randomize, smooth_images):
    model = randomize(inverted_residual(relu))
    images = smooth_images(8, 12, 12, 4)
    if kind == "one image":
        images = images[:1]
    elif kind == "black":
        images = np.zeros_like(images)
    elif kind == "dead channel":
        norm = next(x for x in model.layers if isinstance(x, L.BatchNormalization))
        norm.gamma.assign(norm.gamma * (np.arange(8) > 0))
        norm.beta.assign(np.where(np.arange(8) > 0, norm.beta, 5.7))
    else:
        model = keras.Model(
            model.input, L.Dense(3)(L.Flatten()(L.Conv2D(6, 1)(L.Conv2D(6, 3)(model.input))))
        )
        model.layers[1].kernel.assign(1e-8 * model.layers[1].kernel)
    names = recipes.check(FITTED)
    wanted = model.predict_on_batch(images)
    quantized, reference = recipes.place(model, spec.scheme("w8a8"), names)
    calibration.calibrate(quantized, [images])
    recipes.correct(quantized, reference, names, [images], len(images))
    got = np.array(quantized.predict_on_batch(images))
    assert np.abs(got - wanted).max() <= 0.1 * np.abs(wanted).max()


def test_means_of_a_concatenation_along_the_height_are_unknown(randomize):
    inputs = keras.Input((6, 6, 4))
    branches = [L.ReLU()(L.BatchNormalization()(L.Conv2D(8, 1)(inputs))) for _ in range(2)]
    model = randomize(keras.Model(inputs, L.Conv2D(3, 1)(L.Concatenate(axis=1)(branches))))
    names = recipes.check(["bias_analytic"])
    recipes.place(model, spec.scheme("w4a8"), names)


def test_unknown_corrections_are_refused():
    with pytest.raises(ValueError, match="with clipping take bias_empirical"):
        recipes.check(["bias_analytic", "clipping"])
    with pytest.raises(ValueError, match="'gptq' is unknown; allowed are equalization, absorption"):
        recipes.check(["gptq"])
    with pytest.raises(ValueError, match="two ways to round"):
        recipes.check(["adaround", "error_feedback"])
    assert recipes.check(["bias_empirical", "equalization"]) == ("equalization", "bias_empirical")
