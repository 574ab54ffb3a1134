"""Models that tfmot trained: read whole, exported to the codes of its own conversion, or refused."""

import dataclasses
import json
import pathlib
import shutil
import zipfile

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

from export import tflite as export_tool
from lowbit import affine, functional, lint, lowering, manifest, runtimes, tflite_file
from lowbit.models import tfmot_file
from ptq import import_tfmot

TINY = pathlib.Path(__file__).parent / "data" / "tfmot_tiny.h5"
LAYERS = ("stem", "dw", "project", "branch", "classes")  # with weights, in the order of both files


@pytest.fixture(scope="module")
def images():
    """200 of the digits that the network was not trained on, in [0, 1]."""
    from sklearn import datasets

    return (datasets.load_digits().images[1500:1700] / 16).astype(np.float32)[..., None]


@pytest.fixture(scope="module")
def exported():
    """Returns the integer graphs of both settings, by name."""
    graphs = {}
    for weight_ranges in import_tfmot.WEIGHT_RANGES:
        model, unused = import_tfmot.build(tfmot_file.read(TINY), weight_ranges)
        assert unused == ["add", "branch"]  # the concatenation that reads both has a range
        graphs[weight_ranges] = lowering.lower(model)
    return graphs


def theirs():
    return TINY.with_suffix(".tflite").read_bytes()


# --- what is read -------------------------------------------------------------------------------


def test_h5_and_keras_hold_the_same_model(images):
    h5, archive = (tfmot_file.read(TINY.with_suffix(suffix)) for suffix in (".h5", ".keras"))
    assert h5.input_range == archive.input_range == (0.0, 1.0)
    assert h5.ranges == archive.ranges and h5.ranges_before == archive.ranges_before
    assert set(h5.ranges) == {"stem_relu", "dw_relu", "project_bn", "add", "branch", "join"}
    assert set(h5.ranges_before) == {"classes"}
    assert list(h5.kernel_ranges) == list(archive.kernel_ranges) == list(LAYERS)
    names = [call.name for call in functional.trace(h5.network).calls]
    assert names[:4] == ["stem_pad", "stem", "stem_bn", "stem_relu"]
    for ours, other in zip(h5.network.weights, archive.network.weights, strict=True):
        np.testing.assert_array_equal(ours, other)
    outputs = [model.network(images, training=False) for model in (h5, archive)]
    np.testing.assert_array_equal(*outputs)
    assert h5.network.get_layer("classes").activation is keras.activations.softmax


@pytest.mark.parametrize("bounds", [(-1.0, 1.0), (-0.3, 5.1), (0.0, 1.0), (-2.0, 0.0), (-6.0, 5.9)])
def test_ranges_are_nudged_as_tensorflow_does(bounds):
    x = np.linspace(-8, 8, 4001, dtype=np.float32)
    expected = tf.quantization.fake_quant_with_min_max_vars(x, *bounds).numpy()
    low, high = tfmot_file.nudged(*bounds)
    assert (low, high) == (expected.min(), expected.max())


@pytest.mark.parametrize("shape", [(3, 3, 4, 5), (3, 3, 6, 1), (40, 7)])
def test_weights_move_onto_the_grid_of_tensorflow(rng, shape):
    kernel = rng.normal(size=shape).astype(np.float32)
    high = rng.uniform(0.5, 3, shape[-1]).astype(np.float32)
    expected = tf.quantization.fake_quant_with_min_max_vars_per_channel(
        kernel, -high, high, narrow_range=True
    )
    actual = tfmot_file.on_grid(kernel, -high, high)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)


# --- what is exported ---------------------------------------------------------------------------


def weighted(graph):
    ops = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
    nodes = (node for node in graph.nodes if node.op in ops)
    found = [[graph.tensors[name] for name in (*node.inputs, *node.outputs)] for node in nodes]
    return dict(zip(LAYERS, found, strict=True))


def test_the_files_ranges_give_the_weights_of_tfmots_conversion(exported):
    ours, other = weighted(exported["file"]), weighted(tflite_file.read(theirs()))
    for name in LAYERS:
        (x, kernel, bias, y), (other_x, other_kernel, other_bias, other_y) = ours[name], other[name]
        np.testing.assert_array_equal(kernel.data, other_kernel.data, name)
        np.testing.assert_allclose(y.scale, other_y.scale, rtol=2**-16)
        assert y.zero_point == other_y.zero_point
        if name == "branch":  # reads `add`: on the concatenation's scale in ours
            assert x.scale < other_x.scale
        else:
            np.testing.assert_allclose(x.scale, other_x.scale, rtol=2**-16)
            assert np.abs(bias.data - other_bias.data).max() <= 1


def test_weights_get_a_scale_for_each_channel(exported):
    for graph, scales in ((exported["kernel"], 10), (exported["file"], 1)):
        dense = weighted(graph)["classes"][1].quantization.scale
        assert len(dense) == 10 and len(set(dense.tolist())) == scales
        assert len(weighted(graph)["dw"][1].quantization.scale) == 4
    largest = np.abs(weighted(exported["kernel"])["classes"][1].data.astype(int)).max(axis=1)
    np.testing.assert_array_equal(largest, 127)


def test_files_are_clean_and_classify_as_tfmots(exported, images):
    def codes(content):
        runner = runtimes.interpreter(content)
        scale, zero_point = runner.get_input_details()[0]["quantization"]
        rows = affine.quantize_input(images, scale, zero_point, "int8")
        return np.concatenate([runtimes.invoke(runner, row[None]) for row in rows]).astype(int)

    expected = codes(theirs())
    for graph in exported.values():
        content = tflite_file.write(graph, {"scheme": "w8a8"})
        assert lint.faults(content, io="int8") == []
        actual = codes(content)
        assert np.abs(actual - expected).max() <= 12
        assert (actual.argmax(axis=1) == expected.argmax(axis=1)).mean() >= 0.98
    assert len(lint.faults(theirs())) == 2  # a dynamic batch, and QUANTIZE inside the graph


def test_the_tool_saves_what_export_takes(tmp_path):
    saved = tmp_path / "quantized.keras"
    row = import_tfmot.import_model(
        import_tfmot.Config(model=str(TINY), output=str(saved), preprocess="0,255")
    )
    assert row["unused_ranges"] == ["add", "branch"] and row["widened"] == []
    facts = manifest.load_facts(saved)
    assert (facts["scheme"], facts["preprocess"]) == ("w8a8", "0,255")
    made = export_tool.export(
        export_tool.Config(model=str(saved), output=str(tmp_path / "m.tflite"), io="uint8")
    )
    assert made["io"] == "uint8" and made["in_float"] == []


# --- what is refused ----------------------------------------------------------------------------


def test_tensors_without_a_range_are_named():
    trained = tfmot_file.read(TINY)
    ranges = {name: bounds for name, bounds in trained.ranges.items() if name != "project_bn"}
    without = dataclasses.replace(trained, ranges=ranges, input_range=None)
    with pytest.raises(ValueError, match="all but input, project: the file has no range"):
        import_tfmot.build(without)


def changed(path, change):
    """Copies the model to `path`; change(configuration, file) alters it."""
    shutil.copy(TINY, path)
    with h5py.File(path, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        change({entry["config"]["name"]: entry for entry in config["config"]["layers"]}, file)
        file.attrs["model_config"] = json.dumps(config)
    return path


def inner(layers, name):
    return layers[f"quant_{name}"]["config"]["layer"]


def assign(file, name, value):
    dataset = file["model_weights"][name]
    dataset[...] = np.full(dataset.shape, value)


RELU_MAXIMUM = "quant_stem_relu/quant_stem_relu/output_max:0"
CHANGES = {
    "layer add is a Lambda; allowed are Activation, Add,": lambda layers, file: inner(
        layers, "add"
    ).update(class_name="Lambda"),
    "layer dw_relu has activation 'elu'; allowed are linear": lambda layers, file: inner(
        layers, "dw_relu"
    )["config"].update(activation="elu"),
    "layer stem has quantize config Mine; allowed are tfmot's": lambda layers, file: layers[
        "quant_stem"
    ]["config"]["quantize_config"].update(class_name="Mine"),
    "has quantizer AllValuesQuantizer of 4 bits": lambda layers, file: layers["quantize_layer"][
        "config"
    ]["quantizer"]["config"].update(num_bits=4),
    "layer stem has data_format 'channels_first'": lambda layers, file: inner(layers, "stem")[
        "config"
    ].update(data_format="channels_first"),
    "layer quant_dw is called 2 times; once": lambda layers, file: layers["quant_dw"][
        "inbound_nodes"
    ].append([["quant_stem_relu", 0, 0, {}]]),
    "is a model of Keras 3": lambda layers, file: layers["quant_dw"].update(
        inbound_nodes=[{"args": [], "kwargs": {}}]
    ),
    "layer dw reads a layer that is not in the file": lambda layers, file: layers[
        "quant_dw"
    ].update(inbound_nodes=[[["nothing", 0, 0, {}]]]),
    r"layer project: its kernel has shape \(1, 1, 4, 4\), needed is \(3, 3, 4, 4\)": (
        lambda layers, file: inner(layers, "project")["config"].update(kernel_size=[3, 3])
    ),
    "layer stem: its kernel has shape None": lambda layers, file: file[
        "model_weights/quant_stem"
    ].pop("stem"),
    r"stem_relu: the range of its output is \[nan, ": lambda layers, file: assign(
        file, RELU_MAXIMUM.replace("max", "min"), np.nan
    ),
    r"stem_relu: the range of its output is \[-6, 6\], where tfmot begins": lambda layers, file: (
        assign(file, RELU_MAXIMUM, 6),
        assign(file, RELU_MAXIMUM.replace("max", "min"), -6),
    ),
    r"layer dw: the range of its depthwise_kernel .* only symmetric": lambda layers, file: assign(
        file, "quant_dw/quant_dw/depthwise_kernel_max:0", 1
    ),
}


@pytest.mark.parametrize("message", CHANGES)
def test_what_cannot_be_read_is_named(tmp_path, message):
    path = changed(tmp_path / "changed.h5", CHANGES[message])
    with pytest.raises(tfmot_file.TfmotFileError, match=message) as caught:
        tfmot_file.read(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_models_without_quantizers_are_refused(tmp_path):
    def unwrap(layers, file):
        for entry in layers.values():
            if entry["class_name"] == "QuantizeWrapperV2":
                entry.update(entry["config"]["layer"])

    path = changed(tmp_path / "plain.h5", unwrap)
    with pytest.raises(tfmot_file.TfmotFileError, match="none of its 17 layers has a quantizer"):
        tfmot_file.read(path)


def test_absent_and_damaged_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.h5: no such file"):
        tfmot_file.read(tmp_path / "none.h5")
    with pytest.raises(tfmot_file.TfmotFileError, match="a folder"):
        tfmot_file.read(tmp_path)
    for suffix in (".h5", ".keras"):
        content = TINY.with_suffix(suffix).read_bytes()
        path = tmp_path / f"damaged{suffix}"
        for damaged in (b"", b"text", content[: len(content) // 2], content[:-100]):
            path.write_bytes(damaged)
            with pytest.raises(tfmot_file.TfmotFileError, match="damaged") as caught:
                tfmot_file.read(path)
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    path = changed(tmp_path / "weights.h5", lambda layers, file: None)
    with h5py.File(path, "r+") as file:
        del file.attrs["model_config"]
    with pytest.raises(tfmot_file.TfmotFileError, match="holds no model configuration"):
        tfmot_file.read(path)


def test_variables_larger_than_the_file_are_not_loaded(tmp_path):
    def enlarge(layers, file):
        group = file["model_weights/quant_stem/stem"]
        del group["kernel:0"]
        group.create_dataset("kernel:0", (10**6, 10**6), "f4", chunks=(1, 1000))

    path = changed(tmp_path / "large.h5", enlarge)
    with pytest.raises(tfmot_file.TfmotFileError, match="more than the file holds"):
        tfmot_file.read(path)


def test_archives_that_lack_a_variable(tmp_path):
    path = tmp_path / "short.keras"
    with zipfile.ZipFile(TINY.with_suffix(".keras")) as archive:
        config = archive.read("config.json")
        weights = archive.read("model.weights.h5")
    (tmp_path / "weights.h5").write_bytes(weights)
    with h5py.File(tmp_path / "weights.h5", "r+") as file:
        del file["layers/quantize_wrapper_v2_1/vars/4"]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", config)
        archive.write(tmp_path / "weights.h5", "model.weights.h5")
    with pytest.raises(
        tfmot_file.TfmotFileError, match="layer stem has 4 variables, not .'kernel'"
    ):
        tfmot_file.read(path)
