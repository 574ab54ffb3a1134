"""Layers without an integer form: in float between quantizers, named, refused by --strict."""

import keras
import numpy as np
import pytest

from eval import conformance
from export import tflite
from lowbit import (
    calibration,
    foreign,
    layers,
    lint,
    lowering,
    manifest,
    placement,
    runtimes,
    spec,
    tflite_file,
)
from lowbit.functional import UnsupportedModelError
from ptq import quantize

L, ops = keras.layers, keras.ops


def network(middle):
    image = keras.Input((9, 8, 3))
    x = L.Conv2D(6, 3, padding="same", activation="relu", name="before")(image)
    x = middle(x)
    x = L.Conv2D(4, 1, name="after")(x)
    model = keras.Model(image, L.GlobalAveragePooling2D()(x))
    return conformance.randomized(model, np.random.default_rng(0))


def attended(x):
    flat = L.Reshape((-1, x.shape[-1]))(x)
    y = L.MultiHeadAttention(2, 3, name="attention")(flat, flat)
    return L.Reshape(x.shape[1:])(y)


# name: (what is made of x, layers in float, operations of the file among others)
CASES = {
    "selu": (lambda x: L.Activation("selu", name="odd")(x), ["odd"], {"EXP"}),
    "group normalization": (
        lambda x: L.GroupNormalization(3, name="odd")(x),
        ["odd"],
        {"RSQRT", "MEAN"},
    ),
    "softmax over rows": (lambda x: L.Softmax(axis=1, name="odd")(x), ["odd"], {"SOFTMAX"}),
    "attention": (attended, ["attention"], {"BATCH_MATMUL", "SOFTMAX"}),
    "two": (
        lambda x: L.Activation("softplus", name="b")(L.Activation("selu", name="a")(x)),
        ["a", "b"],
        {"LOG"},
    ),
}


@pytest.fixture(scope="module")
def images():
    return conformance.smooth_images(np.random.default_rng(1), 12, 9, 8)


def placed_and_lowered(middle, images, scheme="w8a8"):
    model = network(middle)
    placed = placement.place(model, spec.scheme(scheme), strict=False)
    if calibration.observed_points(placed):
        calibration.calibrate(placed, [images])
    return model, placed, lowering.lower(placed)


@pytest.mark.parametrize("case", CASES)
def test_a_layer_in_float_between_integers(case, images):
    middle, names, operations = CASES[case]
    model, placed, graph = placed_and_lowered(middle, images)
    assert placement.float_layers(placed) == names
    content = tflite_file.write(graph)
    read = tflite_file.read(content)
    kinds = [node.op for node in read.nodes]
    assert operations <= set(kinds) and kinds.count("CONV_2D") == 2
    assert lint.faults(content, io="int8", floats=True) == []
    inside = lint.faults(content, io="int8")
    assert any("float32 inside the graph" in fault for fault in inside)
    convolutions = [node for node in read.nodes if node.op == "CONV_2D"]
    assert {read.tensors[node.outputs[0]].dtype for node in convolutions} == {"int8"}
    found = np.concatenate(list(runtimes.run_litert(content, [images], "xnnpack", 1)))
    expected = np.asarray(placed(images))
    scale = graph.tensors[graph.outputs[0]].scale
    assert np.abs(found - expected).max() <= 1.01 * scale  # float kernels: 1 code, near a tie
    floats = np.asarray(model(images))
    assert np.abs(found - floats).max() < 0.1 * np.ptp(floats)


@pytest.mark.parametrize("scheme", ["float32", "dynamic", "w8a16"])
def test_a_layer_in_float_in_other_precisions(scheme, images):
    model, _, graph = placed_and_lowered(CASES["selu"][0], images, scheme)
    content = tflite_file.write(graph)
    found = np.concatenate(list(runtimes.run_litert(content, [images], "xnnpack", 1)))
    assert np.abs(found - np.asarray(model(images))).max() < {"float32": 1e-5}.get(scheme, 0.02)


def test_strict_refuses_and_names_the_layer():
    with pytest.raises(UnsupportedModelError, match=r"odd \(GroupNormalization, after before\)"):
        placement.place(network(CASES["group normalization"][0]), spec.scheme("w8a8"))


def test_training_keeps_the_weights_of_sublayers(images):
    _, placed, _ = placed_and_lowered(CASES["attention"][0], images)
    before = placed.get_layer("attention").get_weights()
    again = layers.rebuilt(placed, lambda layer: {}).get_layer("attention").get_weights()
    assert len(before) == 8
    for ours, theirs in zip(again, before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "layer",
    [
        L.Resizing(5, 5, interpolation="nearest", name="odd"),
        L.BatchNormalization(axis=1, name="odd"),
        L.Normalization(axis=1, mean=np.arange(9.0), variance=np.arange(1.0, 10), name="odd"),
        L.ELU(0.5, name="odd"),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_arguments_that_no_kernel_knows_leave_a_layer_in_float(layer, images):
    model, placed, graph = placed_and_lowered(
        lambda x: type(layer).from_config(layer.get_config())(x), images, "float32"
    )
    assert placement.float_layers(placed) == ["odd"]
    content = tflite_file.write(graph)
    found = np.concatenate(list(runtimes.run_litert(content, [images], "xnnpack", 1)))
    np.testing.assert_allclose(found, np.asarray(model(images)), rtol=1e-5, atol=1e-5)


def test_an_identity_is_dropped(images):
    _, placed, _ = placed_and_lowered(lambda x: L.Identity()(x), images)
    assert placement.float_layers(placed) == []


def test_the_converters_route_takes_no_layer_in_float(tmp_path, images):
    _, placed, _ = placed_and_lowered(CASES["selu"][0], images)
    path = tmp_path / "ptq.keras"
    manifest.save_model(placed, path, {"scheme": "w8a8", "preprocess": "tf"})
    with pytest.raises(ValueError, match="--route=mlir takes no layers in float: odd"):
        tflite.export(
            tflite.Config(model=str(path), output=str(tmp_path / "m.tflite"), route="mlir")
        )


class Unsaved(keras.layers.Layer):
    """A layer that Keras cannot copy: its argument is not in its configuration."""

    def __init__(self, factor, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor

    def call(self, x):
        return self.factor * x


class Turned(keras.layers.Layer):
    """A layer that TensorFlow Lite has no built-in operation for."""

    def call(self, x):
        import tensorflow as tf

        return tf.math.digamma(tf.nn.relu(x) + 1.0)


def test_what_cannot_stay_in_float_is_named():
    with pytest.raises(
        UnsupportedModelError, match=r"odd .*nor can it stay in float: it cannot be"
    ):
        placement.place(
            network(lambda x: Unsaved(2, name="odd")(x)), spec.scheme("w8a8"), strict=False
        )
    layer = Turned(name="odd")
    with pytest.raises(UnsupportedModelError, match="odd has no integer form, and the converter"):
        foreign.converted(layer, [(1, 3, 3, 2)])


def test_what_no_kernel_takes_is_said_when_it_is_quantized(tmp_path, images, capsys):
    path, output = tmp_path / "float.keras", tmp_path / "ptq.keras"
    manifest.save_model(network(keras.layers.ELU(name="odd")), path, {"preprocess": "tf"})
    pictures = tmp_path / "images.npz"
    np.savez(pictures, x=np.uint8(127.5 * images + 127.5), y=np.arange(len(images)) % 4)
    config = {"model": str(path), "dataset": str(pictures), "calibration_images": 6}
    for scheme, exportable in (("w8a8", True), ("w8a16", False)):
        row = quantize.quantize(quantize.Config(**config, output=str(output), scheme=scheme))
        assert row["exportable"] == exportable
    said = "w8a16 can be simulated, not exported: layer odd: no kernel takes 16-bit ELU"
    assert said in capsys.readouterr().err
    with pytest.raises(UnsupportedModelError, match="layer odd: no kernel takes 16-bit ELU"):
        tflite.export(tflite.Config(model=str(output), output=str(tmp_path / "model.tflite")))


def test_the_tools_name_what_stays_in_float_and_strict_refuses(tmp_path, images, capsys):
    path, output = tmp_path / "float.keras", tmp_path / "ptq.keras"
    manifest.save_model(network(CASES["group normalization"][0]), path, {"preprocess": "tf"})
    pictures = tmp_path / "images.npz"
    np.savez(pictures, x=np.uint8(127.5 * images + 127.5), y=np.arange(len(images)) % 4)
    config = {"model": str(path), "dataset": str(pictures), "calibration_images": 6}
    with pytest.raises(UnsupportedModelError, match=r"odd \(GroupNormalization"):
        quantize.quantize(quantize.Config(**config, output=str(output), strict=True))
    row = quantize.quantize(quantize.Config(**config, output=str(output), override="after=a8"))
    assert row["exportable"]
    quantize.quantize(quantize.Config(**config, output=str(output)))
    assert "layer odd has no integer form and stays in float" in capsys.readouterr().err
    written = tmp_path / "model.tflite"
    with pytest.raises(
        ValueError, match="1 layers have no integer form and would run in float: odd"
    ):
        tflite.export(tflite.Config(model=str(output), output=str(written), strict=True))
    assert not written.exists()
    row = tflite.export(tflite.Config(model=str(output), output=str(written)))
    assert row["in_float"] == ["odd"] and written.is_file()
    assert any("inside the graph" in fault for fault in lint.faults(written.read_bytes()))
