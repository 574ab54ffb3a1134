"""The MLIR converter as an oracle of our writer, and files with uint8 or float32 input and output."""

import keras
import numpy as np
import pytest

from lowbit import (
    affine,
    boundary,
    calibration,
    integer_graph,
    kernels,
    lowering,
    mlir,
    placement,
    runtimes,
    spec,
    tflite_file,
)
from lowbit.data import preprocess as preprocessing

WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")


def float_network():
    """Every kind of operation that both routes know, in a net of 16x16 images."""
    keras.utils.set_random_seed(3)
    layers = keras.layers
    x = image = keras.Input((16, 16, 3))
    x = layers.Conv2D(8, 3, padding="same", strides=2, use_bias=False, name="stem")(x)
    x = layers.BatchNormalization(name="stem_bn")(x)
    x = left = layers.ReLU(6.0, name="stem_relu")(x)
    x = layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2, name="depthwise")(x)
    x = layers.ReLU(name="depthwise_relu")(x)
    x = layers.Conv2D(8, 1, name="project")(x)
    x = layers.Add(name="add")([x, left])
    x = layers.ZeroPadding2D(((0, 1), (1, 0)), name="pad")(x)
    a = layers.MaxPooling2D(2, padding="same", name="max_pool")(x)
    b = layers.AveragePooling2D(2, padding="same", name="average_pool")(x)
    x = layers.Concatenate(name="concatenate")([a, b])
    x = layers.Conv2D(12, 3, activation="relu", name="head")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    x = layers.Reshape((1, 1, 12), name="reshape")(x)
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dense(10, name="logits")(x)
    model = keras.Model(image, layers.Softmax(name="softmax")(x))
    for layer in model.layers:
        if getattr(layer, "use_bias", False):
            layer.bias.assign(np.random.default_rng(1).normal(size=layer.bias.shape) * 0.1)
    return model


def images(count, size=16):
    random = np.random.default_rng(7)
    coarse = random.uniform(0, 255, (count, size // 4, size // 4, 3))
    return np.kron(coarse, np.ones((1, 4, 4, 1))).astype(np.uint8)


@pytest.fixture(scope="module", params=["w8a8", "w8a8_dense_per_tensor", "w8a8_per_tensor"])
def graph(request):
    model = placement.place(float_network(), spec.scheme(request.param))
    batch = preprocessing.apply(images(16), preprocessing.parse("tf"))
    calibration.calibrate(model, [batch])
    return lowering.lower(model)


def codes_of(content, kernels_name, codes):
    runner = runtimes.interpreter(content, kernels_name)
    return np.concatenate([runtimes.invoke(runner, row[None]) for row in codes])


def input_codes(graph, batch):
    tensor = graph.tensors[graph.inputs[0]]
    return affine.quantize_input(batch, tensor.scale, tensor.zero_point, tensor.dtype)


# TensorFlow's converter warns that it was given no statistics, which fake-quant makes needless.
@pytest.mark.filterwarnings("ignore:Statistics for quantized inputs")
def test_writer_and_mlir_converter_agree_to_the_last_code(graph):
    direct, converted = tflite_file.write(graph), mlir.convert(graph)
    ours, theirs = (
        [node for node in tflite_file.read(content).nodes if node.op in WEIGHTED]
        for content in (direct, converted)
    )
    assert len(ours) == len(theirs) == 5
    other = tflite_file.read(converted)
    for node, twin in zip(ours, theirs, strict=True):
        for position, allowed in ((1, 0), (2, 1)):
            codes = graph.tensors[node.inputs[position]].data
            twin_codes = other.tensors[twin.inputs[position]].data
            difference = np.abs(codes.reshape(-1).astype(np.int64) - twin_codes.reshape(-1))
            assert difference.max() <= allowed, node.name
    batch = preprocessing.apply(images(32), preprocessing.parse("tf"))
    codes = input_codes(graph, batch)
    for name in runtimes.KERNELS:
        outputs = codes_of(direct, name, codes)
        assert len(np.unique(outputs)) >= 16
        assert (outputs != codes_of(converted, name, codes)).sum() == 0


@pytest.mark.filterwarnings("ignore:Statistics for quantized inputs")
def test_a_bias_of_equal_entries_survives_the_converter(graph):
    """Left alone, the converter quantizes such a bias with channel 0's scale, silently."""
    node = next(node for node in graph.nodes if node.op == "CONV_2D")
    bias = graph.tensors[node.inputs[2]]
    equal = np.rint(0.05 / np.broadcast_to(bias.quantization.scale, bias.shape)).astype(np.int32)
    scale = bias.quantization.scale
    tensors = dict(graph.tensors)
    tensors[bias.name] = integer_graph.Tensor(
        bias.name,
        bias.shape,
        "int32",
        integer_graph.Quantization(scale, np.zeros(scale.shape, np.int64), bias.quantization.axis),
        equal,
    )
    changed = integer_graph.IntegerGraph(tensors, graph.nodes, graph.inputs, graph.outputs)
    converted = tflite_file.read(mlir.convert(changed))
    twin = next(node for node in converted.nodes if node.op == "CONV_2D")
    assert np.abs(converted.tensors[twin.inputs[2]].data.astype(np.int64) - equal).max() <= 1


def test_float_io_gives_the_int8_files_codes(graph):
    batch = preprocessing.apply(images(16), preprocessing.parse("tf"))
    outer = boundary.with_float_io(graph)
    assert [node.op for node in outer.nodes][:1] == ["QUANTIZE"]
    assert outer.nodes[-1].op == "DEQUANTIZE"
    content = tflite_file.write(outer)
    output = graph.tensors[graph.outputs[0]]
    inner = codes_of(tflite_file.write(graph), "xnnpack", input_codes(graph, batch))
    real = codes_of(content, "xnnpack", batch)
    assert real.dtype == np.float32
    expected = affine.dequantize(inner, output.scale, output.zero_point)
    np.testing.assert_array_equal(real, expected)
    simulated = kernels.run(outer, {outer.inputs[0]: batch}, "xnnpack")[outer.outputs[0]]
    np.testing.assert_array_equal(simulated, real)


@pytest.mark.parametrize("text", ["tf", "torch", "caffe", "raw", "127,128"])
def test_uint8_io_normalizes_inside_the_file(text):
    preprocess = preprocessing.parse(text)
    pixels = images(16)
    batch = preprocessing.apply(pixels, preprocess)
    model = placement.place(float_network(), spec.scheme("w8a8"))
    calibration.calibrate(model, [batch])
    graph = lowering.lower(model)
    outer = boundary.with_pixel_io(graph, preprocess)
    content = tflite_file.write(outer)
    for name in runtimes.KERNELS:
        raw = codes_of(content, name, pixels)
        assert raw.dtype == np.uint8
        simulated = kernels.run(outer, {outer.inputs[0]: pixels}, name)[outer.outputs[0]]
        np.testing.assert_array_equal(simulated, raw)
    # The file's own normalization against the one function that quantizes inputs.
    inside = kernels.run(outer, {outer.inputs[0]: pixels}, "xnnpack", outputs=list(graph.inputs))
    difference = np.abs(inside[graph.inputs[0]].astype(np.int64) - input_codes(graph, batch))
    assert difference.max() <= 1
    # The bias is rounded to 1/127 of a pixel: 0.8% of the codes lie that near to a tie.
    assert (difference > 0).mean() < 0.02


def test_uint8_io_needs_an_image_input():
    graph = integer_graph.IntegerGraph({}, (), ("a", "b"), ("c",))
    with pytest.raises(ValueError, match="needs one image input"):
        boundary.with_pixel_io(graph, preprocessing.parse("tf"))


@pytest.mark.filterwarnings("ignore:Statistics for quantized inputs")
def test_the_mlir_route_names_what_it_cannot_express(graph):
    with pytest.raises(ValueError, match="raw uint8 pixels"):
        mlir.convert(boundary.with_pixel_io(graph, preprocessing.parse("tf")))
