"""Where it hurts: SQNR, shift, sensitivity, outliers and memory against NumPy and by hand."""

import csv
import dataclasses
import json

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from eval import layers as diagnosing
from lowbit import (
    affine,
    calibration,
    diagnosis,
    layers,
    manifest,
    metrics,
    placement,
    runtimes,
    spec,
)

L = keras.layers


def small_mobilenet():
    """A convolution, two separable blocks with batch norm and ReLU6, a residual add, logits."""
    x = image = keras.Input((12, 12, 3))
    x = L.Conv2D(6, 3, strides=2, padding="same", use_bias=False, name="conv")(x)
    x = L.ReLU(6.0, name="conv_relu")(L.BatchNormalization(name="conv_bn")(x))
    y = L.DepthwiseConv2D(3, padding="same", use_bias=False, name="dw")(x)
    y = L.ReLU(6.0, name="dw_relu")(L.BatchNormalization(name="dw_bn")(y))
    y = L.Conv2D(6, 1, use_bias=False, name="pw")(y)
    y = L.BatchNormalization(name="pw_bn")(y)
    x = L.Add(name="add")([x, y])
    x = L.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(image, L.Dense(10, name="logits")(x), name="small")


def quantized(model, images, scheme="w8a8"):
    placed = placement.place(model, spec.scheme(scheme))
    calibration.calibrate(placed, [images])
    return placed


@pytest.fixture
def network(randomize, smooth_images):
    """(float model, quantized model, images)."""
    keras.utils.set_random_seed(1)
    model, images = randomize(small_mobilenet()), smooth_images(12, 12)
    return model, quantized(model, images), images


def run(model, x):
    """Runs a model op by op: nothing to compile."""
    return keras.ops.convert_to_numpy(model(x))


def diagnose(model, placed, images, sensitivity=True):
    pair = diagnosing.pair_up(placed, model, "quantized", "float")
    gains, _ = diagnosing.compare_float_forms(pair, images)
    whole = diagnosing.compare_activations(pair, gains, [images[:8], images[8:]])
    alone = {}
    if sensitivity:
        alone = diagnosing.quantize_alone(pair, gains, [images[:8], images[8:]])
    return pair, gains, whole, alone


def folded(model, name):
    """The folded kernel and bias of a layer `name` with batch norm `name`_bn, in NumPy."""
    norm, layer = model.get_layer(f"{name}_bn"), model.get_layer(name)
    gamma, beta, mean, variance = (np.asarray(w) for w in norm.get_weights())
    factor = gamma / np.sqrt(variance + np.float32(norm.epsilon))
    kernel = layer.get_weights()[0]
    if kernel.shape[-1] == 1:
        return kernel * factor[:, None], beta - mean * factor
    return kernel * factor, beta - mean * factor


# --- the pure computations ------------------------------------------------------------------------


def test_kernel_sqnr_is_affines_of_each_channel(rng):
    kernel = rng.normal(size=(9, 5)).astype(np.float32)
    kernel[:, 4] = 0
    quant = spec.QuantSpec(8, symmetric=True, narrow_range=True, axis=1)
    back = affine.fake_quantize(kernel, *affine.observed_range(kernel, 1), quant)
    found = diagnosis.kernel_sqnr_db(kernel, back)
    expected = [affine.sqnr_db(kernel[:, c], back[:, c]) for c in range(5)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert found[4] == np.inf
    assert diagnosis.kernel_sqnr_db(np.zeros((2, 1)), np.ones((2, 1)))[0] == -np.inf


@given(
    hnp.arrays(np.int64, (12, 3), elements=st.integers(-512, 512)),
    hnp.arrays(np.int64, (12, 3), elements=st.integers(-64, 64)),
    st.integers(1, 11),
)
def test_sums_of_batches_are_the_sums_of_all(reference, error, cut):
    # Multiples of 1/64: their squares are exact in float32.
    reference, error = (np.float32(x) / np.float32(64) for x in (reference, error))
    other = reference + error
    parts = diagnosis.compare(reference[:cut], other[:cut]) + diagnosis.compare(
        reference[cut:], other[cut:]
    )
    whole = diagnosis.compare(reference, other)
    for field in dataclasses.fields(parts):
        np.testing.assert_array_equal(getattr(parts, field.name), getattr(whole, field.name))
    assert whole.count == 12
    np.testing.assert_array_equal(whole.error, error.sum(axis=0))
    expected = affine.sqnr_db(reference, other)
    assert whole.total_sqnr_db() == pytest.approx(expected)


def test_mean_shift_in_standard_deviations(rng):
    reference = rng.normal(3, 2, (5000, 3)).astype(np.float32)
    reference[:, 2] = 7  # does not vary: no unit to measure a shift in
    shift = diagnosis.compare(reference, reference + np.float32([0.5, -1, 1])).mean_shift()
    deviation = reference[:, :2].std(axis=0)
    np.testing.assert_allclose(shift[:2], [0.5, -1] / deviation, rtol=1e-4)
    assert np.isnan(shift[2])


def test_outliers(rng):
    kernel = rng.normal(size=(2000, 8))
    even = diagnosis.outliers(kernel, kernel)
    assert even.kurtosis == pytest.approx(3, abs=0.2)
    assert even.range_ratio < 1.5
    assert (even.dead_channels, even.lost_channels) == (0, 0)
    kernel[:, 0] *= 1000
    kernel[:, 1] *= 1e-9  # dead before it is quantized
    quant = spec.QuantSpec(8, symmetric=True, narrow_range=True)
    kernel = kernel.astype(np.float32)
    back = affine.fake_quantize(kernel, *affine.observed_range(kernel), quant)
    found = diagnosis.outliers(kernel, back)
    largest = np.abs(kernel).max(axis=0)
    assert found.range_ratio == pytest.approx(largest.max() / np.median(largest))
    assert found.range_ratio > 500
    # One step is 1000 * 3.5 / 127: seven channels round to zero, one of them was dead before.
    assert (found.dead_channels, found.lost_channels) == (7, 6)
    assert found.kurtosis > 8


def test_gains_see_equalization_and_not_noise(rng):
    reference = np.abs(rng.normal(size=(4, 6, 6, 5))).astype(np.float32)
    scale = np.float32([0.1, 0.5, 1, 4, 9])
    np.testing.assert_allclose(diagnosis.gains(reference, reference * scale), 1 / scale, rtol=1e-5)
    noisy = reference * np.float32([0.97, 1.02, 1, 1.03, 0.99])
    assert (diagnosis.gains(reference, noisy) == 1).all()
    dead = reference * np.float32([0, 4, 4, 4, 4])
    np.testing.assert_allclose(diagnosis.gains(reference, dead), [1, 0.25, 0.25, 0.25, 0.25])


def test_ties_that_a_lower_index_wins():
    outputs = np.float32([[1, 3, 3], [3, 3, 1], [0, 1, 2], [5, 5, 5]])
    assert metrics.tied_at_top(outputs) == 3
    assert metrics.ties_decided_against(outputs, np.array([2, 0, 1, 1])) == 2


def test_memory_of_three_layers_by_hand():
    x = image = keras.Input((8, 8, 3))
    x = L.Conv2D(4, 3, padding="same", activation="relu", name="a")(x)  # 8 * 8 * 4
    y = L.Conv2D(4, 3, padding="same", name="b")(x)
    y = L.Add(name="c")([x, y])
    y = L.Flatten(name="flat")(y)  # the same bytes
    model = keras.Model(image, L.Dense(2, name="d")(y))
    placed = placement.place(model, spec.scheme("w8a8"))
    trace = diagnosing.functional.trace(placed)
    live = diagnosing.live_elements(trace)
    names = [tensor.name for tensor in diagnosing.tensors(trace)]
    assert names == ["input", "a", "b", "c", "d"]
    image_size, size = 8 * 8 * 3, 8 * 8 * 4
    expected = [image_size, image_size + size, 2 * size, 3 * size, size + 2]
    assert [live[tensor.end] for tensor in diagnosing.tensors(trace)] == expected
    assert [diagnosis.packed_bytes(5, bits) for bits in diagnosing.WIDTHS] == [20, 10, 5, 3]


# --- a network ------------------------------------------------------------------------------------


def test_weight_sqnr_of_each_channel_against_affine(network):
    model, placed, images = network
    pair, gains, whole, _ = diagnose(model, placed, images, sensitivity=False)
    assert gains == {}
    rows, channel_rows = diagnosing.describe(pair, gains, whole, {})
    for name in ("conv", "dw", "pw"):
        kernel, _ = folded(model, name)
        flat = kernel.reshape(-1, 6)
        quant = spec.QuantSpec(8, symmetric=True, narrow_range=True, axis=1)
        back = affine.fake_quantize(flat, *affine.observed_range(flat, 1), quant)
        expected = [affine.sqnr_db(flat[:, c], back[:, c]) for c in range(6)]
        found = [row["weight_sqnr_db"] for row in channel_rows if row["layer"] == name]
        # TensorFlow folds batch norm within an ulp of NumPy, 1e-7 of a weight.
        np.testing.assert_allclose(found, expected, atol=0.01)
        (row,) = (row for row in rows if row["layer"] == name)
        assert row["channel_sqnr_db"] == pytest.approx(np.mean(found))
        assert row["weight_sqnr_db"] == pytest.approx(affine.sqnr_db(flat, back), abs=0.01)
        assert row["lowest_channel"] == int(np.argmin(found))
    assert [row["layer"] for row in rows] == ["input", "conv", "dw", "pw", "add", "pool", "logits"]


def test_outputs_and_shift_are_those_of_the_two_models(network):
    model, placed, images = network
    pair, gains, whole, _ = diagnose(model, placed, images, sensitivity=False)
    np.testing.assert_allclose(whole.reference_outputs, run(model, images), atol=1e-4)
    ours = np.concatenate(list(runtimes.run_keras(placed, [images])))
    np.testing.assert_allclose(whole.outputs, ours, atol=1e-5)
    rows, _ = diagnosing.describe(pair, gains, whole, {})
    named = {row["layer"]: row for row in rows}
    assert named["logits"]["output_sqnr_db"] == pytest.approx(
        affine.sqnr_db(whole.reference_outputs, whole.outputs), abs=0.01
    )
    error = (whole.outputs - whole.reference_outputs).mean(axis=0)
    expected = np.abs(error / whole.reference_outputs.std(axis=0)).mean()
    assert named["logits"]["mean_shift"] == pytest.approx(expected, rel=1e-3)
    relu = run(keras.Model(model.input, model.get_layer("dw_relu").output), images)
    y = keras.Model(placed.input, placed.get_layer("dw_relu_quantizer").output)
    codes = run(y, images)
    assert named["dw"]["output_sqnr_db"] == pytest.approx(affine.sqnr_db(relu, codes), abs=0.01)


def test_a_bias_that_is_off_shows_as_shift(network):
    model, placed, images = network
    layer = placed.get_layer("pw")
    layer.beta.assign_add(np.float32([0, 0, 0.5, 0, 0, 0]))
    placed.get_layer("pw_quantizer").maximum.assign_add([1.0])  # room for it
    pair, gains, whole, _ = diagnose(model, placed, images, sensitivity=False)
    # The float form itself moved, and by more than nothing: no rounding did that.
    assert diagnosing.compare_float_forms(pair, images)[1] > 1e-4
    _, channel_rows = diagnosing.describe(pair, gains, whole, {})
    shift = [row["mean_shift"] for row in channel_rows if row["layer"] == "pw"]
    values = run(keras.Model(model.input, model.get_layer("pw_bn").output), images)
    assert shift[2] == pytest.approx(0.5 / values[..., 2].std(), rel=0.1)
    assert max(np.abs(np.delete(shift, 2))) < 0.3 * shift[2]


def test_each_layer_alone_equals_a_model_where_only_it_was_quantized_by_hand(network):
    model, placed, images = network
    pair, _, _, alone = diagnose(model, placed, images)
    ranked = diagnosing.sensitivity_rows(pair, alone)
    found = {(row["quantized"], row["part"]): row for row in ranked}
    assert [row["kl"] for row in ranked] == sorted((row["kl"] for row in ranked), reverse=True)
    # 4 layers with weights; 7 tensors, each with a range of its own.
    assert len(found) == 4 + 7
    reference = run(model, images)

    def check(outputs, row):
        expected = float(metrics.kl_divergence(reference, outputs).mean())
        assert row["kl"] == pytest.approx(expected, rel=0.02, abs=1e-9)
        same = (outputs.argmax(axis=1) == reference.argmax(axis=1)).mean()
        assert row["agreement"] == pytest.approx(same)

    # Weights: the folded kernel quantized by affine, and unfolded into the float model.
    for name in ("conv", "dw", "pw"):
        kernel, _ = folded(model, name)
        flat = kernel.reshape(-1, 6)
        quant = spec.QuantSpec(8, symmetric=True, narrow_range=True, axis=1)
        back = affine.fake_quantize(flat, *affine.observed_range(flat, 1), quant)
        layer = model.get_layer(name)
        before = layer.get_weights()
        factor = kernel.reshape(-1, 6) / before[0].reshape(-1, 6)
        layer.set_weights([(back / factor).reshape(before[0].shape)])
        check(run(model, images), found[name, "weights"])
        layer.set_weights(before)
    # Activations: cut the float model behind the tensor, quantize it, run the rest.
    for tensor, quantizer in (("dw_relu", "dw_relu_quantizer"), ("add", "add_quantizer")):
        middle = model.get_layer(tensor)
        head = keras.Model(model.input, [middle.output, model.get_layer("conv_relu").output])
        values, skip = run(head, images)
        bounds = [float(bound) for bound in placed.get_layer(quantizer).range()]
        values = affine.fake_quantize(values, *bounds, spec.QuantSpec(8))
        if tensor == "add":
            rest = model.get_layer("pool")(values)
        else:
            rest = model.get_layer("pw_bn")(model.get_layer("pw")(values))
            rest = model.get_layer("pool")(rest + skip)
        outputs = keras.ops.convert_to_numpy(model.get_layer("logits")(rest))
        check(outputs, found[quantizer.removesuffix("_quantizer"), "activation"])


def test_sensitivity_leaves_the_models_as_they_were(network):
    model, placed, images = network
    before = run(placed, images)
    switches = [layer.weights_enabled for layer in layers.weighted_layers(placed)]
    diagnose(model, placed, images)
    assert [layer.weights_enabled for layer in layers.weighted_layers(placed)] == switches
    np.testing.assert_array_equal(before, run(placed, images))


def test_a_planted_channel_of_1000_times_the_others_is_found(randomize, smooth_images):
    keras.utils.set_random_seed(2)
    model, images = randomize(small_mobilenet()), smooth_images(12, 12)
    kernel = model.get_layer("pw").get_weights()[0]
    kernel[..., 3] *= 1000
    model.get_layer("pw").set_weights([kernel])
    kernel, bias = model.get_layer("logits").get_weights()
    kernel[3] /= 1000  # its part in the logits stays what it was
    model.get_layer("logits").set_weights([kernel, bias])
    placed = quantized(model, images, "w8a8_per_tensor")
    pair, gains, whole, alone = diagnose(model, placed, images)
    rows, _ = diagnosing.describe(pair, gains, whole, alone)
    weighted = [row for row in rows if "range_ratio" in row]
    assert min(weighted, key=lambda row: row["channel_sqnr_db"])["layer"] == "pw"
    assert max(weighted, key=lambda row: row["range_ratio"])["layer"] == "pw"
    named = {row["layer"]: row for row in weighted}
    assert named["pw"]["lost_channels"] == 5
    ranked = diagnosing.sensitivity_rows(pair, alone)
    weights = [row["quantized"] for row in ranked if row["part"] == "weights"]
    assert weights[0] == "pw"
    # The figure of the whole tensor does not show it: the one large channel is all its power.
    assert named["pw"]["weight_sqnr_db"] > 35
    assert named["pw"]["channel_sqnr_db"] < 20


def test_an_equalized_model_is_measured_in_the_float_models_units(randomize, smooth_images):
    keras.utils.set_random_seed(3)
    x = image = keras.Input((12, 12, 3))
    x = L.Conv2D(6, 3, strides=2, padding="same", activation="relu", name="a")(x)
    x = L.DepthwiseConv2D(3, padding="same", activation="relu", name="b")(x)
    x = L.GlobalAveragePooling2D(name="pool")(L.Conv2D(8, 1, activation="relu", name="c")(x))
    model, images = randomize(keras.Model(image, x)), smooth_images(12, 12)
    other = keras.models.clone_model(model)
    other.set_weights(model.get_weights())
    first, second = np.float32([8, 0.25, 2, 16, 0.5, 4]), np.float32([4, 4, 0.5, 8, 0.125, 2])
    for name, inwards, outwards in (("a", None, first), ("b", first, second), ("c", second, None)):
        kernel, bias = other.get_layer(name).get_weights()
        if outwards is not None:
            kernel = kernel * (outwards[:, None] if name == "b" else outwards)
            bias = bias * outwards
        if inwards is not None:
            kernel = kernel / inwards[:, None]
        other.get_layer(name).set_weights([kernel, bias])
    np.testing.assert_allclose(run(model, images), run(other, images))
    pair, gains, whole, alone = diagnose(model, quantized(other, images), images)
    assert diagnosing.compare_float_forms(pair, images)[1] == pytest.approx(0, abs=1e-9)
    rows, _ = diagnosing.describe(pair, gains, whole, alone)
    named = {row["layer"]: row for row in rows}
    assert [name for name in named if named[name]["rescaled"]] == ["a", "b"]
    found = gains[pair.ours.calls[diagnosing.tensors(pair.ours)[1].end].output]
    np.testing.assert_allclose(found, 1 / first, rtol=1e-5)
    # Powers of two and a range for each channel: the weights are exactly the plain model's.
    plain = diagnose(model, quantized(model, images), images)
    same = {row["layer"]: row for row in diagnosing.describe(*plain)[0]}
    for name in ("a", "b"):
        assert named[name]["channel_sqnr_db"] == pytest.approx(same[name]["channel_sqnr_db"])
        assert named[name]["weights_kl"] == pytest.approx(same[name]["weights_kl"], rel=1e-3)
        assert named[name]["output_sqnr_db"] > 15
        assert named[name]["mean_shift"] < 0.2


def test_weights_alone_have_no_activation_to_switch(randomize, smooth_images):
    model, images = randomize(small_mobilenet()), smooth_images(12, 12)
    placed = placement.place(model, spec.scheme("w4"))
    pair, gains, whole, alone = diagnose(model, placed, images)
    parts = {row["part"] for row in diagnosing.sensitivity_rows(pair, alone)}
    assert parts == {"weights"}
    rows, _ = diagnosing.describe(pair, gains, whole, alone)
    assert rows[0]["output_sqnr_db"] == np.inf  # the input stays float
    placed = placement.place(model, spec.scheme("a8"))
    calibration.calibrate(placed, [images])
    pair, gains, whole, alone = diagnose(model, placed, images)
    parts = {row["part"] for row in diagnosing.sensitivity_rows(pair, alone)}
    assert parts == {"activation"}
    rows, _ = diagnosing.describe(pair, gains, whole, alone)
    assert not any("weight_sqnr_db" in row for row in rows)


def test_a_layer_called_twice_is_quantized_in_both_calls(randomize, smooth_images):
    keras.utils.set_random_seed(4)
    shared = L.Conv2D(3, 3, padding="same", name="shared")
    image = keras.Input((12, 12, 3))
    x = L.GlobalAveragePooling2D(name="pool")(shared(L.ReLU(name="relu")(shared(image))))
    model, images = randomize(keras.Model(image, x)), smooth_images(12, 12)
    placed = quantized(model, images, "w4a8")
    pair, _, _, alone = diagnose(model, placed, images)
    rows = diagnosing.sensitivity_rows(pair, alone)
    (row,) = [row for row in rows if row["part"] == "weights"]
    reference = run(model, images)
    kernel, bias = shared.get_weights()
    flat = kernel.reshape(-1, 3)
    quant = spec.QuantSpec(4, symmetric=True, narrow_range=True, axis=1)
    back = affine.fake_quantize(flat, *affine.observed_range(flat, 1), quant)
    shared.set_weights([back.reshape(kernel.shape), bias])
    expected = metrics.kl_divergence(reference, run(model, images)).mean()
    assert row["kl"] == pytest.approx(float(expected), rel=0.01)


# --- pictures and the command ---------------------------------------------------------------------


def assert_drawn(path):
    pixels = np.asarray(Image.open(path).convert("L"), np.float64)
    assert pixels.std() > 10, f"{path} is blank"
    # Ink in the left and in the right half.
    half = pixels.shape[1] // 2
    assert min(pixels[:, :half].std(), pixels[:, half:].std()) > 4, path


def test_the_whitepapers_figures(tmp_path):
    keras.utils.set_random_seed(0)
    model = keras.applications.MobileNet((32, 32, 3), alpha=0.25, weights=None, classes=10)
    series = diagnosing.sqnr_histogram(model, "conv_dw_1")
    assert {len(values) for values in series.values()} == {8}
    assert {len(v) for v in diagnosing.sqnr_histogram(model, "conv_pw_9").values()} == {128}
    norm = model.get_layer("conv_dw_1_bn")
    norm.moving_variance.assign(np.float32([1, 1, 1, 1, 1, 1, 1, 1e-4]))
    before, after = diagnosing.kernels_of(model, "conv_dw_1")
    assert before.shape == after.shape == (9, 8)
    factor = 1 / np.sqrt(np.asarray(norm.moving_variance) + np.float32(norm.epsilon))
    np.testing.assert_allclose(after, before * factor, rtol=1e-5)
    spread = diagnosing.sqnr_histogram(model, "conv_dw_1")
    # The folded outlier takes the range from the others, where all share one.
    assert np.median(spread["asymmetric per layer"]) < 30
    assert np.median(spread["symmetric per channel"]) > 40
    for number in (18, 19, 20):
        diagnosing.draw_figure(number, model, tmp_path / f"{number}.png")
        assert_drawn(tmp_path / f"{number}.png")
    with pytest.raises(ValueError, match=r"figure 17 is not one of 18, 19, 20"):
        diagnosing.draw_figure(17, model, tmp_path / "17.png")
    with pytest.raises(ValueError, match="no layer 'conv_dw_99' with weights; it has conv1, conv"):
        diagnosing.sqnr_histogram(model, "conv_dw_99")


@pytest.fixture
def saved(network, tmp_path):
    model, placed, _ = network
    manifest.save_model(model, tmp_path / "float.keras", {})
    manifest.save_model(placed, tmp_path / "ptq.keras", {"preprocess": "tf", "scheme": "w8a8"})
    return tmp_path


def config(folder, **options):
    values = {"model": "ptq.keras", "reference": "float.keras", **options}
    for name in ("model", "reference"):
        values[name] = str(folder / values[name])
    return diagnosing.Config(**{"dataset": "digits", "output_dir": str(folder / "out"), **values})


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_command(saved, monkeypatch, capfd):
    flags = [f"--model={saved / 'ptq.keras'}", f"--reference={saved / 'float.keras'}"]
    flags += ["--dataset=digits", "--limit=20", "--batch_size=16", "--sensitivity"]
    flags.append(f"--output_dir={saved / 'out'}")
    monkeypatch.setattr("sys.argv", ["tool", *flags])
    diagnosing.main()
    printed = capfd.readouterr()
    (line,) = printed.out.splitlines()
    row = json.loads(line)
    assert (row["images"], row["scheme"]) == (20, "w8a8")
    assert "lost_channels" in printed.err
    assert "retracing" not in printed.err
    out = saved / "out"
    tensors = read(out / "layers.csv")
    assert [one["layer"] for one in tensors] == [
        "input", "conv", "dw", "pw", "add", "pool", "logits"
    ]  # fmt: skip
    assert len(read(out / "layers_channels.csv")) == 3 + 5 * 6 + 10
    ranked = read(out / "layers_sensitivity.csv")
    assert len(ranked) == 11
    by_layer = {one["layer"]: one for one in tensors}
    for one in ranked:
        if one["part"] == "weights":
            assert by_layer[one["quantized"]]["weights_kl"] == one["kl"]
    assert read(out / "layers_summary.csv")[0]["images"] == "20"
    pictures = sorted(path.name for path in out.glob("*.png"))
    parts = ("folding", "histogram", "memory", "ranges", "sensitivity", "sqnr")
    assert pictures == [f"layers_{part}.png" for part in parts]
    for name in pictures:
        assert_drawn(out / name)


BAD_INPUT = [
    ({"limit": 0}, "--limit=0 and --batch_size=16 must be at least 1"),
    ({"model": "float.keras", "preprocess": "tf"}, "float.keras is not a model that ptq.quantize"),
    ({"reference": "ptq.keras"}, "is quantized already"),
    ({"model": "m.tflite"}, "m.tflite: layers are compared in Keras"),
    ({"reference": "none.keras"}, "none.keras: no such file"),
    ({"layer": "conv9"}, "--layer=conv9 is not one of conv, dw, pw, logits"),
]


def test_bad_input_is_one_clear_line_and_leaves_no_file(saved):
    for options, message in BAD_INPUT:
        with pytest.raises((ValueError, OSError), match=message):
            diagnosing.diagnose(config(saved, **options))
        assert not (saved / "out").exists()


def test_another_network_is_refused(network):
    model, placed, _ = network
    image = keras.Input((12, 12, 3))
    x = L.Conv2D(6, 3, strides=2, padding="same", name="conv")(image)
    x = L.GlobalAveragePooling2D(name="other_pool")(L.ReLU(6.0, name="conv_relu")(x))
    with pytest.raises(ValueError, match="where the one has dw the other has other_pool"):
        diagnosing.pair_up(placed, keras.Model(image, x), "ptq.keras", "float.keras")
    wider = keras.models.clone_model(
        model,
        clone_function=lambda layer: layer.__class__.from_config(
            layer.get_config() | ({"units": 11} if layer.name == "logits" else {})
        ),
    )
    with pytest.raises(ValueError, match=r"logits gives \(10,\) in the one, \(11,\) in the other"):
        diagnosing.pair_up(placed, wider, "ptq.keras", "float.keras")
