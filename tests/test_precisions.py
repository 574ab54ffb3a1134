"""Every precision that export writes: what the file holds, and that it computes what Keras does."""

import keras
import numpy as np
import pytest

from export import tflite
from lowbit import calibration, lint, lowering, manifest, placement, runtimes, spec, tflite_file

L = keras.layers
RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(-1, 1, (64, 12, 11, 3)).astype(np.float32)


def network(depthwise=True):
    keras.utils.set_random_seed(0)
    x = image = keras.Input((12, 11, 3))
    x = L.Conv2D(8, 3, strides=2, padding="same", use_bias=False, name="conv")(x)
    x = before = L.ReLU(6.0, name="relu6")(L.BatchNormalization(name="norm")(x))
    if depthwise:
        x = L.DepthwiseConv2D(3, padding="same", activation="relu", name="depthwise")(x)
    x = L.Add(name="add")([before, L.Conv2D(8, 1, name="project")(x)])
    pooled = [L.MaxPooling2D(2, name="max")(x), L.AveragePooling2D(2, name="average")(x)]
    x = L.Conv2D(12, 3, activation="sigmoid", name="gates")(L.Concatenate(name="both")(pooled))
    x = L.Dense(10, name="logits")(L.GlobalAveragePooling2D(name="mean")(x))
    model = keras.Model(image, L.Softmax(name="softmax")(x))
    for weight in model.trainable_variables:
        weight.assign(np.random.default_rng(1).normal(0, 0.4, weight.shape))
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Returns a function: scheme and overrides to the path of a saved model and its Keras model."""
    folder, made = tmp_path_factory.mktemp("precisions"), {}

    def save(scheme, override=None, depthwise=True):
        key = (scheme, override, depthwise)
        if key not in made:
            bits = spec.bits(scheme, override)
            model = placement.place(network(depthwise), bits)
            if calibration.observed_points(model):
                calibration.calibrate(model, [IMAGES])
            path = folder / f"{len(made)}.keras"
            facts = {"scheme": scheme, "override": override, "preprocess": "127.5,127.5"}
            manifest.save_model(model, path, facts)
            made[key] = str(path), model
        return made[key]

    return save


def exported(tmp_path, model, **options):
    output = tmp_path / "model.tflite"
    row = tflite.export(tflite.Config(model=model, output=str(output), **options))
    content = output.read_bytes()
    assert row["size_bytes"] == len(content)
    return content, row


def outputs(content, kernels="xnnpack"):
    return np.concatenate(list(runtimes.run_litert(content, [IMAGES], kernels, threads=1)))


@pytest.mark.parametrize("kernels", runtimes.KERNELS)
@pytest.mark.parametrize(
    "scheme, tolerance",
    [
        # Of probabilities.  Kernels in float32 sum in another order than Keras.
        *[("float32", 2e-6), ("w8", 2e-6), ("w4", 2e-6), ("w2", 2e-6)],
        ("float16", 2e-3),  # 11 bits of each weight
        ("dynamic", 4e-2),  # 8 bits of each activation, by the kernel
        ("w8a16", 4e-4),  # 15 bits of each activation
        ("w4a16", 4e-4),
    ],
)
def test_a_file_computes_what_the_keras_model_does(tmp_path, saved, scheme, tolerance, kernels):
    path, model = saved(scheme)
    content, row = exported(tmp_path, path)
    own = "int16" if scheme.endswith("16") and scheme != "float16" else "float32"
    assert (row["io"], row["scheme"]) == (own, scheme)
    assert lint.faults(content, io=own) == []
    expected = np.asarray(model(IMAGES))
    np.testing.assert_allclose(outputs(content, kernels), expected, atol=tolerance)
    assert np.ptp(expected) > 0.3  # outputs that say something


def dtypes(content):
    """Returns {tensor: dtype} of the constants of weighted layers."""
    graph = tflite_file.read(content)
    return {
        name: t.dtype for name, t in graph.tensors.items() if t.data is not None and "/" in name
    }


def test_what_each_scheme_holds(tmp_path, saved):
    held = {}
    for scheme in ("float32", "float16", "w8", "dynamic", "w8a16", "w8a8"):
        found = dtypes(exported(tmp_path, saved(scheme)[0])[0])
        held[scheme] = (
            {found["conv/kernel"], found["depthwise/kernel"], found["logits/kernel"]},
            {found["conv/bias"]},
        )
    assert held == {
        "float32": ({"float32"}, {"float32"}),
        "float16": ({"float16"}, {"float16"}),
        "w8": ({"int8"}, {"float32"}),
        "dynamic": ({"int8"}, {"float32"}),
        "w8a16": ({"int8"}, {"int64"}),
        "w8a8": ({"int8"}, {"int32"}),
    }


def test_dynamic_weights_meet_the_kernel_and_others_are_dequantized(tmp_path, saved):
    def ops(scheme):
        return [node.op for node in tflite_file.read(exported(tmp_path, saved(scheme)[0])[0]).nodes]

    assert ops("dynamic") == ops("float32")
    assert ops("w8").count("DEQUANTIZE") == 5  # a kernel each
    assert ops("float16").count("DEQUANTIZE") == 10  # kernels and biases
    assert "DEQUANTIZE" not in ops("w8a16") + ops("w8a8")


@pytest.mark.parametrize("scheme", ["w4a8", "w2a8", "w3", "w4"])
def test_packed_weights_take_half_the_bytes_and_mean_the_same(tmp_path, saved, scheme):
    path, _ = saved(scheme)
    whole, packed = (
        exported(tmp_path, path, weight_storage=storage)[0] for storage in ("int8", "packed")
    )
    graphs = [tflite_file.read(content) for content in (whole, packed)]
    for name, dtype in dtypes(packed).items():
        if name.endswith("/kernel"):
            assert dtype == ("int2" if scheme == "w2a8" and name == "logits/kernel" else "int4")
            assert dtypes(whole)[name] == "int8"
        codes = [graph.tensors[name].data for graph in graphs]
        np.testing.assert_array_equal(*codes)
    weights = sum(t.data.size for name, t in graphs[0].tensors.items() if name.endswith("/kernel"))
    assert len(whole) - len(packed) > 0.4 * weights
    assert lint.faults(packed) == []
    near = 2e-6 if scheme in ("w3", "w4") else 0.03  # built-in kernels round otherwise than XNNPACK
    np.testing.assert_allclose(outputs(whole), outputs(packed), atol=near)


def test_packed_depthwise_weights_beside_int16_are_refused(tmp_path, saved):
    with pytest.raises(
        ValueError, match="layer depthwise: .*computes wrongly.*--weight_storage=int8"
    ):
        exported(tmp_path, saved("w4a16")[0], weight_storage="packed")
    content, _ = exported(tmp_path, saved("w4a16", None, False)[0], weight_storage="packed")
    _, model = saved("w4a16", None, False)
    np.testing.assert_allclose(outputs(content), np.asarray(model(IMAGES)), atol=4e-4)


def test_a_layer_in_float_between_integer_ones(tmp_path, saved):
    path, model = saved("w8a8", "project=a8")
    content, row = exported(tmp_path, path)
    graph = tflite_file.read(content)
    around = [
        node.op for node in graph.nodes if "project" in node.outputs[0] or node.op == "DEQUANTIZE"
    ]
    assert around == ["DEQUANTIZE", "CONV_2D", "QUANTIZE"]
    assert graph.tensors["project/kernel"].dtype == "float32"
    assert row["io"] == "int8"
    assert lint.faults(content) == []  # the file says that it was asked for
    without = tflite_file.write(graph, {"scheme": "w8a8"})
    assert any("float32 inside the graph" in fault for fault in lint.faults(without))
    # Keras computes that layer in floats, whose sums may end on another side of a tie.
    steps = np.abs(outputs(content) - np.asarray(model(IMAGES))) * 256
    assert steps.max() <= 2 and (steps > 0).mean() < 0.05


def test_float_from_one_layer_on(tmp_path, saved):
    path, model = saved("w8a8", "logits=w8,softmax=w8")
    content, row = exported(tmp_path, path, io="float32")
    graph = tflite_file.read(content)
    assert (
        graph.tensors[graph.outputs[0]].dtype == graph.tensors[graph.inputs[0]].dtype == "float32"
    )
    assert [node.op for node in graph.nodes][-3:] == ["DEQUANTIZE", "FULLY_CONNECTED", "SOFTMAX"]
    np.testing.assert_allclose(outputs(content), np.asarray(model(IMAGES)), atol=0.02)


@pytest.mark.parametrize(
    "scheme, options, message",
    [
        ("w8a16", {"io": "int8"}, "--io=int8: the activations of .* are int16"),
        ("w8a8", {"io": "int16"}, "--io=int16: the activations of .* are int8"),
        ("float32", {"io": "uint8"}, "--io=uint8 needs int8 activations; .* is float32"),
        ("w8a16", {"io": "uint8"}, "--io=uint8 needs int8 activations; .* is int16"),
        ("dynamic", {"route": "mlir"}, "--route=mlir writes int8 activations"),
        ("w8a16", {"route": "mlir"}, "--route=mlir writes int8 activations"),
        ("w4a8", {"route": "mlir", "weight_storage": "packed"}, "--route=mlir writes int8"),
        ("a8", {}, "a8 can be simulated only: an integer kernel needs integer weights"),
    ],
)
def test_what_a_precision_cannot_do(tmp_path, saved, scheme, options, message):
    with pytest.raises(ValueError, match=message):
        exported(tmp_path, saved(scheme)[0], **options)
    assert not (tmp_path / "model.tflite").exists()


def test_float_io_of_int16(tmp_path, saved):
    path, model = saved("w8a16")
    content, _ = exported(tmp_path, path, io="float32")
    assert lint.faults(content, io="float32") == []
    np.testing.assert_allclose(outputs(content), np.asarray(model(IMAGES)), atol=4e-4)


def test_float16_refuses_weights_that_it_cannot_hold(saved):
    model = placement.place(network(), spec.scheme("float16"))
    layer = model.get_layer("project")
    layer.kernel.assign(np.full(layer.kernel.shape, 7e4))
    with pytest.raises(ValueError, match="layer project: its kernel holds 7e\\+04, float16 ends"):
        lowering.lower(model, "", lowering.Storage(float16=True))
