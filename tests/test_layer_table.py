"""Each layer in a small network: exported whole; simulator, interpreter and Keras give equal codes."""

import keras
import numpy as np
import pytest

from eval import parity
from lowbit import (
    calibration,
    kernels,
    lint,
    lowering,
    mlir,
    placement,
    runtimes,
    spec,
    tflite_file,
)
from lowbit.functional import UnsupportedModelError

L = keras.layers


def conv(x, filters=5, size=1, **options):
    return L.Conv2D(filters, size, padding="same", **options)(x)


def excite(x):
    """Squeeze and excite: a product with one factor for each channel."""
    pooled = L.GlobalAveragePooling2D(keepdims=True)(x)
    return L.Multiply(name="out")([x, conv(pooled, x.shape[-1], activation="relu6")])


def flat_excite(x):
    pooled = L.GlobalAveragePooling2D()(x)
    return L.Multiply(name="out")([L.Dense(x.shape[-1], activation="relu6")(pooled), x])


# name: (layer under test on x of (n, h, w, 5), operations that it becomes)
CASES = {
    "subtract": (lambda x: L.Subtract(name="out")([conv(x), x]), ["SUB"]),
    "subtract, relu": (
        lambda x: L.ReLU(name="out")(L.Subtract()([x, conv(x)])),
        ["SUB"],
    ),
    "multiply": (lambda x: L.Multiply(name="out")([conv(x), x]), ["MUL"]),
    "square": (lambda x: L.Multiply(name="out")([x, x]), ["MUL"]),
    "multiply three": (lambda x: L.Multiply(name="out")([conv(x), x, conv(x)]), ["MUL", "MUL"]),
    "multiply, relu6": (lambda x: L.ReLU(6.0, name="out")(L.Multiply()([x, conv(x)])), ["MUL"]),
    "squeeze and excite": (excite, ["MUL"]),
    "squeeze and excite, flat": (flat_excite, ["MUL"]),
    "add, broadcast": (
        lambda x: L.Add(name="out")([x, L.GlobalAveragePooling2D(keepdims=True)(x)]),
        ["ADD"],
    ),
    "maximum": (lambda x: L.Maximum(name="out")([conv(x), x]), ["MAXIMUM"]),
    "minimum": (lambda x: L.Minimum(name="out")([conv(x), x]), ["MINIMUM"]),
    "minimum of three": (
        lambda x: L.Minimum(name="out")([conv(x), x, conv(x)]),
        ["MINIMUM", "MINIMUM"],
    ),
    "global max pooling": (
        lambda x: L.GlobalMaxPooling2D(keepdims=True, name="out")(x),
        ["MAX_POOL_2D"],
    ),
    "global max pooling, flat": (
        lambda x: L.Reshape((1, 1, 5))(L.GlobalMaxPooling2D(name="out")(x)),
        ["MAX_POOL_2D", "RESHAPE", "RESHAPE"],
    ),
    "upsampling": (lambda x: L.UpSampling2D(2, name="out")(x), ["RESIZE_NEAREST_NEIGHBOR"]),
    "upsampling 3 by 1": (
        lambda x: L.UpSampling2D((3, 1), name="out")(x),
        ["RESIZE_NEAREST_NEIGHBOR"],
    ),
    "sigmoid": (lambda x: L.Activation("sigmoid", name="out")(x), ["LOGISTIC"]),
    "tanh": (lambda x: conv(x, activation="tanh"), ["TANH"]),
    "silu": (lambda x: conv(x, activation="silu"), ["LOGISTIC", "MUL"]),
    "gelu": (lambda x: L.Activation("gelu", name="out")(x), ["GELU"]),
    "leaky relu": (lambda x: L.LeakyReLU(0.1, name="out")(x), ["LEAKY_RELU"]),
    "relu with a slope": (lambda x: L.ReLU(negative_slope=0.3, name="out")(x), ["LEAKY_RELU"]),
    "activation leaky_relu": (lambda x: conv(x, activation="leaky_relu"), ["LEAKY_RELU"]),
    "swish": (
        lambda x: L.Multiply(name="out")([x, L.Activation("sigmoid")(x)]),
        ["LOGISTIC", "MUL"],
    ),
    "permute": (lambda x: L.Permute((2, 1, 3), name="out")(x), ["TRANSPOSE"]),
    "permute to channels first": (lambda x: L.Permute((3, 1, 2), name="out")(x), ["TRANSPOSE"]),
}


@pytest.fixture
def network(randomize, smooth_images):
    """Returns network(case) -> (quantized model, images): the layer between convolutions."""

    def build(case):
        keras.utils.set_random_seed(0)
        image = keras.Input((9, 7, 3))
        x = conv(image, 5, 3, name="before")
        x = L.GlobalAveragePooling2D()(conv(CASES[case][0](x), 6, 3, name="after"))
        model = randomize(keras.Model(image, L.Dense(20, name="logits")(x)))
        placed = placement.place(model, spec.scheme("w8a8"))
        images = smooth_images(24, 9, 7)
        calibration.calibrate(placed, np.split(images, 2))
        return placed, images

    return build


@pytest.mark.parametrize("case", CASES)
def test_a_layer_has_the_kernels_codes(network, case):
    placed, images = network(case)
    graph = lowering.lower(placed)
    _, operations = CASES[case]
    found = [node.op for node in graph.nodes]
    assert [op for op in found if op in operations] == operations
    content = tflite_file.write(graph)
    assert lint.faults(content, io="int8") == []
    (name,) = graph.inputs
    tensor = graph.tensors[name]
    codes = runtimes.input_codes(images[:8], "int8", tensor.scale, tensor.zero_point)
    for flavour in runtimes.KERNELS:
        rows = parity.compare_nodes(tflite_file.read(content), codes, flavour)
        assert [row for row in rows if row["differing"]] == []
        assert min(row["distinct"] for row in rows) >= 16
        runner = runtimes.interpreter(content, flavour)
        shipped = np.concatenate([runtimes.invoke(runner, row[None]) for row in codes])
        simulated = kernels.run(graph, {name: codes}, flavour)[graph.outputs[0]]
        np.testing.assert_array_equal(simulated, shipped)
        if flavour == "xnnpack":
            (ours,) = runtimes.run_keras(placed, [images[:8]])
            output = graph.tensors[graph.outputs[0]]
            ours = np.rint(ours / output.scale).astype(np.int64) + output.zero_point
            np.testing.assert_array_equal(ours, shipped.reshape(ours.shape))


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
            L.UpSampling2D(2, interpolation="bilinear", name="up"),
            "up is an UpSampling2D .*bilinear",
        ),
    ],
)
def test_what_has_no_form_is_named(layer, message):
    image = keras.Input((8, 8, 3))
    with pytest.raises(UnsupportedModelError, match=message):
        placement.place(keras.Model(image, layer(image)), spec.scheme("w8a8"))
