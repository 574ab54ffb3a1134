"""Each layer in a small network: exported whole; simulator, interpreter and Keras give equal codes."""

import hypothesis
import hypothesis.strategies as st
import keras
import numpy as np
import pytest

from eval import conformance, layer_cases, parity
from lowbit import (
    calibration,
    kernels,
    lint,
    lowering,
    mlir,
    placement,
    results,
    runtimes,
    spec,
    tflite_file,
)
from lowbit.functional import UnsupportedModelError
from lowbit.kernels import elementwise

L, ops = keras.layers, keras.ops


@pytest.fixture(scope="module")
def network():
    """Returns network(case) -> (quantized model, images): the layer between convolutions."""

    def build(case):
        plan = conformance.Plan((case,), (9, 7), 5, 0)
        model, _ = conformance.build(plan)
        placed = placement.place(model, spec.scheme("w8a8"))
        images = conformance.smooth_images(np.random.default_rng(0), 8, 9, 7)
        calibration.calibrate(placed, np.split(images, 2))
        return placed, images

    return build


# One spelling of each layer; the others are among the slow tests.
QUICK = (
    *(
        "convolution, dilated",
        "convolution, batch norm, relu6",
        "depthwise, multiplier 2, strides 2",
    ),
    *("separable", "dense on an image", "batch norm alone", "add of three", "concatenate"),
    *("max pooling, same", "average pooling", "zero padding", "cropping", "rescaling"),
    *("softmax over channels", "relu6 of a pool", "a layer called twice", "subtract, relu"),
    *(
        "multiply three",
        "squeeze and excite, flat",
        "add, broadcast",
        "maximum",
        "minimum of three",
    ),
    *("global max pooling, flat", "upsampling 3 by 1", "upsampling, bilinear", "resizing down"),
    *("tanh", "silu", "gelu", "leaky relu", "permute to channels first", "groups, batch norm"),
    *("a group for each channel", "transposed, same, window 3, strides (2, 1)"),
    *("transposed, same, window 1, strides 2", "transposed, output padding"),
    *("hard swish of a depthwise layer", "hard sigmoid, flat", "hard swish with a layer"),
    *("ops: sums", "ops: pools", "ops: movers", "ops: slices", "ops: split"),
    *("prelu", "elu", "layer normalization", "average", "a hard sigmoid joined"),
)


def test_the_quick_cases_are_cases():
    assert set(QUICK) < set(layer_cases.CASES)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if case in QUICK else pytest.mark.slow)
        for case in layer_cases.CASES
    ],
)
def test_a_layer_has_the_kernels_codes(network, case):
    placed, images = network(case)
    graph = lowering.lower(placed)
    names = [node.name for node in graph.nodes]
    between = graph.nodes[names.index("before") + 1 : names.index("after")]
    _, operations = layer_cases.CASES[case]
    assert [node.op for node in between if node.op in operations] == operations
    content = tflite_file.write(graph)
    assert lint.faults(content, io="int8") == []
    (name,) = graph.inputs
    tensor = graph.tensors[name]
    codes = runtimes.input_codes(images, "int8", tensor.scale, tensor.zero_point)
    for flavour in conformance.flavours(graph):
        rows = parity.compare_nodes(tflite_file.read(content), codes, flavour)
        assert [row for row in rows if row["differing"]] == []
        assert min(row["distinct"] for row in rows) >= 16
        runner = runtimes.interpreter(content, flavour)
        shipped = np.concatenate([runtimes.invoke(runner, row[None]) for row in codes])
        simulated = kernels.run(graph, {name: codes}, flavour)[graph.outputs[0]]
        np.testing.assert_array_equal(simulated, shipped)
        if flavour == "xnnpack":
            (ours,) = runtimes.run_keras(placed, [images])
            output = graph.tensors[graph.outputs[0]]
            ours = np.rint(ours / output.scale).astype(np.int64) + output.zero_point
            np.testing.assert_array_equal(ours, shipped.reshape(ours.shape))


def test_random_networks_have_the_kernels_codes(tmp_path):
    config = conformance.Config(models=4, seed=3, output_dir=str(tmp_path))
    row = conformance.check(config)
    assert (row["models"], row["differing"], row["keras_differing"]) == (4, 0, 0)
    assert row["codes"] > 10000
    assert len(results.read_rows(tmp_path / "random_networks.csv")) == 4


PLANS = st.builds(
    conformance.Plan,
    st.lists(st.sampled_from(sorted(layer_cases.CASES)), min_size=1, max_size=4).map(tuple),
    st.tuples(st.integers(7, 15), st.integers(7, 15)),
    st.integers(2, 7),
    st.integers(0, 2**20),
)


@pytest.mark.slow
@hypothesis.settings(max_examples=15, deadline=None, derandomize=True)
@hypothesis.given(PLANS)
def test_any_network_of_these_layers_has_the_kernels_codes(plan):
    row = conformance.compare(plan)
    assert (row["refused"], row["differing"]) == ("", 0)


def test_a_network_that_differs_is_cut_down_to_what_differs(tmp_path, monkeypatch):
    original = elementwise.multiply

    def one_off(graph, node, inputs, kernel):
        return original(graph, node, inputs, kernel) ^ 1

    monkeypatch.setitem(kernels.KERNELS, "MUL", one_off)
    plan = conformance.Plan(("maximum", "square", "permute"), (9, 8), 4, 0)
    assert conformance.compare(plan)["differing"] > 0
    assert conformance.shrunk(plan).cases == ("square",)
    with pytest.raises(
        ValueError, match=r"codes differ and 0 faults, the first in .*--cases='square'"
    ):
        config = conformance.Config(models=1, cases="permute; square", output_dir=str(tmp_path))
        conformance.check(config)


@pytest.mark.slow
def test_the_table_of_layers(tmp_path):
    cases = "depthwise; elementary"
    with pytest.raises(ValueError, match="--cases: 'elementary' is none of convolution; "):
        conformance.check(conformance.Config(cases=cases, output_dir=str(tmp_path)))
    cases = "depthwise; hard swish"
    row = conformance.check(conformance.Config(cases=cases, output_dir=str(tmp_path)))
    rows = results.read_rows(tmp_path / "conformance.csv")
    assert (row["cases"], len(rows), row["differing"]) == (2, 2 * len(conformance.PRECISIONS), 0)
    assert {int(found["faults"]) for found in rows} == {0}
    page = (tmp_path / "conformance.md").read_text()
    assert "| depthwise | 0 of " in page and "version '7'" in page
    for found in rows:
        if found["precision"] in ("float32", "w8"):
            assert float(found["error"]) < 1e-5


@pytest.mark.filterwarnings("ignore:Statistics for quantized inputs:UserWarning")
@pytest.mark.parametrize(
    "case",
    [
        "subtract",
        "squeeze and excite",
        "maximum",
        "upsampling",
        "permute",
        "silu",
        "tanh",
        "gelu",
        "leaky relu",
    ],
)
def test_the_converters_route_has_the_same_operations(network, case):
    placed, _ = network(case)
    graph = lowering.lower(placed)
    converted = tflite_file.read(mlir.convert(graph))
    # A dense layer with a scale a channel becomes a convolution there.
    found, wanted = (
        {node.op for node in each.nodes} - {"FULLY_CONNECTED", "RESHAPE"}
        for each in (converted, graph)
    )
    assert found == wanted


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            L.UpSampling2D(2, interpolation="bicubic", name="up"),
            "up is an UpSampling2D .*bicubic.*allowed are nearest, bilinear",
        ),
        (
            lambda x: ops.exp(x),
            r"operation exp\w* \(keras.ops, Exp\) has no quantized form; .*Add, Cl",
        ),
        (lambda x: x / ops.sigmoid(x), r"TrueDivide\) has arguments that no integer kernel takes"),
        (lambda x: ops.mean(x, axis=0), r"Mean\) has arguments that no integer kernel takes"),
        (lambda x: ops.clip(x, 0, 1), r"Clip\) has arguments that no integer kernel takes"),
    ],
)
def test_what_has_no_form_is_named(layer, message):
    image = keras.Input((8, 8, 3))
    with pytest.raises(UnsupportedModelError, match=message):
        placement.place(keras.Model(image, layer(image)), spec.scheme("w8a8"))
