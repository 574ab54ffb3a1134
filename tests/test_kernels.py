"""The simulator against the interpreter: single operations, then a network; 0 codes differ."""

import dataclasses
import functools
import itertools
import math

import numpy as np
import pytest
from ai_edge_litert import interpreter as litert

from lowbit import integer_graph, kernels, tflite_file
from lowbit.kernels import delegate, weighted

RESOLVERS = {
    "reference": litert.OpResolverType.BUILTIN_REF,
    "xnnpack": litert.OpResolverType.AUTO,
}
FLAVOURS = tuple(RESOLVERS)
DISTINCT = 16  # codes at least, so that "all equal" is not "all saturated"
CENTRED = {"activation": None}


# --- graphs -------------------------------------------------------------------------------------


def activation(name, shape, scale=0.1, zero_point=0, dtype="int8"):
    if dtype == "float32":
        return integer_graph.Tensor(name, tuple(shape), dtype)
    quantization = integer_graph.Quantization(
        np.array([scale], np.float32), np.array([zero_point], np.int64)
    )
    return integer_graph.Tensor(name, tuple(shape), dtype, quantization)


def constant(name, data, scale=None, axis=None):
    quantization = None
    if scale is not None:
        scale = np.atleast_1d(np.asarray(scale, np.float32))
        axis = axis if scale.size > 1 else None
        quantization = integer_graph.Quantization(scale, np.zeros(scale.shape, np.int64), axis)
    return integer_graph.Tensor(name, data.shape, data.dtype.name, quantization, data)


def graph_of(tensors, nodes, inputs, outputs):
    return integer_graph.IntegerGraph(
        {tensor.name: tensor for tensor in tensors}, tuple(nodes), tuple(inputs), tuple(outputs)
    )


def single(op, inputs, output, attributes):
    """A graph of one node, whose inputs without data are the graph's."""
    node = integer_graph.Node(
        op, op.lower(), tuple(tensor.name for tensor in inputs), (output.name,), attributes
    )
    free = [tensor.name for tensor in inputs if tensor.data is None]
    return graph_of([*inputs, output], [node], free, [output.name])


def output_size(size, window, stride, padding, dilation=1):
    if padding == "SAME":
        return -(-size // stride)
    return (size - (window - 1) * dilation - 1) // stride + 1


@dataclasses.dataclass(frozen=True)
class Window:
    """One convolution's geometry and scales."""

    size: tuple[int, int] = (9, 7)
    channels: int = 5
    filters: int = 18  # for depthwise: the depth multiplier
    window: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    padding: str = "SAME"
    activation: str | None = None
    input_zero_point: int = -7
    output_zero_point: int = 5
    per_channel: bool = True
    powers_of_two: bool = False  # makes exact ties frequent
    spread: float = 50.0  # standard deviation of the output in codes
    output_scale: float = 0.0731


def weighted_tensors(case, rng, weight_shape, axis, fan_in, channels):
    """Input scale, weights, bias and output scale that spread outputs over the codes."""
    weight = rng.integers(-127, 128, weight_shape).astype(np.int8)
    input_scale = 0.0173
    # A product of uniform codes has a standard deviation of about 74 * 73.
    real = case.spread / (5400.0 * np.sqrt(fan_in))
    real = real * rng.uniform(0.5, 2.0, channels if case.per_channel else 1)
    output_scale = case.output_scale
    if case.powers_of_two:
        input_scale, output_scale = 0.25, 0.5
        real = 2.0 ** np.round(np.log2(real))
    scale = (real * output_scale / input_scale).astype(np.float32)
    bias = rng.integers(-4000, 4000, channels).astype(np.int32)
    return (
        np.float32(input_scale),
        constant("w", weight, scale, axis),
        constant("b", bias, scale * np.float32(input_scale), 0),
        np.float32(output_scale),
    )


def convolution(op, case, seed=0):
    rng = np.random.default_rng(seed)
    height, width = case.window
    attributes = {
        "strides": case.strides,
        "dilations": case.dilations,
        "padding": case.padding,
        "activation": case.activation,
    }
    if op == "CONV_2D":
        channels, axis, fan_in = case.filters, 0, height * width * case.channels
        weight_shape = (channels, height, width, case.channels)
    else:
        channels, axis, fan_in = case.channels * case.filters, 3, height * width
        weight_shape = (1, height, width, channels)
        attributes["depth_multiplier"] = case.filters
    input_scale, weight, bias, output_scale = weighted_tensors(
        case, rng, weight_shape, axis, fan_in, channels
    )
    rows, columns = (
        output_size(*sizes[:3], case.padding, sizes[3])
        for sizes in zip(case.size, case.window, case.strides, case.dilations, strict=True)
    )
    return single(
        op,
        [
            activation("x", (1, *case.size, case.channels), input_scale, case.input_zero_point),
            weight,
            bias,
        ],
        activation("y", (1, rows, columns, channels), output_scale, case.output_zero_point),
        attributes,
    )


def dense(case, seed=0, with_bias=True, keep_num_dims=False):
    rng = np.random.default_rng(seed)
    input_scale, weight, bias, output_scale = weighted_tensors(
        case, rng, (case.filters, case.channels), 0, case.channels, case.filters
    )
    lead = (1, 3) if keep_num_dims else (1,)
    inputs = [
        activation("x", (*lead, case.channels), input_scale, case.input_zero_point),
        weight,
        bias,
    ]
    return single(
        "FULLY_CONNECTED",
        inputs if with_bias else inputs[:2],
        activation("y", (*lead, case.filters), output_scale, case.output_zero_point),
        {"activation": case.activation, "keep_num_dims": keep_num_dims},
    )


def mean(size, scales, zero_points, keep_dims=False, axes=(1, 2), channels=96):
    shape = (1, *size, channels)
    reduced = {axis % 4 for axis in axes}
    output = [
        1 if axis in reduced else length
        for axis, length in enumerate(shape)
        if keep_dims or axis not in reduced
    ]
    return single(
        "MEAN",
        [
            activation("x", shape, scales[0], zero_points[0]),
            constant("axes", np.array(axes, np.int32)),
        ],
        activation("y", output, scales[1], zero_points[1]),
        {"keep_dims": keep_dims},
    )


# --- the oracle ---------------------------------------------------------------------------------


def random_inputs(graph, batch=3, seed=1):
    """Uniform codes, or floats over 1.2 times the output's range, for every graph input."""
    rng = np.random.default_rng(seed)
    inputs = {}
    for name in graph.inputs:
        tensor = graph.tensors[name]
        shape = (batch, *tensor.shape[1:])
        if tensor.dtype == "float32":
            reach = 150 * graph.tensors[graph.outputs[0]].scale
            inputs[name] = rng.uniform(-reach, reach, shape).astype(np.float32)
        else:
            limits = np.iinfo(tensor.dtype)
            inputs[name] = rng.integers(limits.min, limits.max + 1, shape).astype(tensor.dtype)
    return inputs


def interpreter_of(graph, flavour):
    result = litert.Interpreter(
        model_content=tflite_file.write(graph),
        experimental_op_resolver_type=RESOLVERS[flavour],
        num_threads=1,
    )
    result.allocate_tensors()
    return result


def interpret(graph, inputs, flavour):
    """Outputs of the interpreter, image by image at the graph's own batch of 1."""
    model = interpreter_of(graph, flavour)
    images = []
    for i in range(len(next(iter(inputs.values())))):
        for name, detail in zip(graph.inputs, model.get_input_details(), strict=True):
            model.set_tensor(detail["index"], inputs[name][i : i + 1])
        model.invoke()
        images.append([model.get_tensor(d["index"]) for d in model.get_output_details()])
    stacked = [np.concatenate(arrays) for arrays in zip(*images, strict=True)]
    return dict(zip(graph.outputs, stacked, strict=True))


def delegated(graph):
    """Whether the default interpreter gives the graph's only node to XNNPACK."""
    operations = interpreter_of(graph, "xnnpack")._get_ops_details()
    return any(operation["op_name"] == "DELEGATE" for operation in operations)


def assert_equal_codes(graph, flavour, inputs=None, distinct=DISTINCT):
    inputs = random_inputs(graph) if inputs is None else inputs
    expected = interpret(graph, inputs, flavour)
    actual = kernels.run(graph, inputs, flavour)
    for name in graph.outputs:
        assert actual[name].dtype == expected[name].dtype
        assert actual[name].shape == expected[name].shape
        differing = np.count_nonzero(actual[name] != expected[name])
        assert differing == 0, f"{differing} of {actual[name].size} codes of {name!r} differ"
        assert len(np.unique(expected[name])) >= distinct
    if flavour == "xnnpack" and len(graph.nodes) == 1:
        placement = delegate.placement_of(graph, graph.nodes[0])
        assert placement[0] == ("xnnpack" if delegated(graph) else "builtin"), placement


every_flavour = pytest.mark.parametrize("flavour", FLAVOURS)


# --- convolutions and dense layers --------------------------------------------------------------

CONVOLUTIONS = {
    "plain": Window(),
    "valid": Window(padding="VALID", window=(2, 3)),
    "strided same": Window(strides=(2, 2), size=(10, 7)),
    "strided valid": Window(strides=(2, 1), padding="VALID", size=(11, 8)),
    "even window": Window(window=(4, 2), size=(12, 9)),
    "one column": Window(window=(5, 1), size=(13, 1), filters=30),
    "dilated": Window(dilations=(2, 2), size=(12, 11)),
    "dilated valid": Window(dilations=(3, 2), padding="VALID", size=(14, 13)),
    "pointwise": Window(window=(1, 1), channels=33),
    "pointwise strided": Window(window=(1, 1), strides=(2, 2), channels=33),
    "per tensor": Window(per_channel=False),
    "ties": Window(powers_of_two=True, size=(16, 16)),
    "ties, other zero points": Window(
        powers_of_two=True, size=(16, 16), input_zero_point=127, output_zero_point=-128
    ),
    "saturating": Window(spread=400.0),
    "relu": Window(activation="RELU", output_zero_point=-128),
    "relu6": Window(activation="RELU6", output_zero_point=-128, output_scale=6 / 255),
    "relu6 cut": Window(activation="RELU6", output_zero_point=-100, output_scale=0.0731),
    "relu n1 to 1": Window(activation="RELU_N1_TO_1", output_scale=0.02),
    "large multiplier": Window(spread=50.0, input_zero_point=-128, output_scale=1e-3),
}


@every_flavour
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolution(case, flavour):
    assert_equal_codes(convolution("CONV_2D", CONVOLUTIONS[case]), flavour)


@every_flavour
@pytest.mark.parametrize("depth_multiplier", [1, 3])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_depthwise_convolution(case, depth_multiplier, flavour):
    geometry = dataclasses.replace(CONVOLUTIONS[case], filters=depth_multiplier)
    assert_equal_codes(convolution("DEPTHWISE_CONV_2D", geometry), flavour)


@every_flavour
def test_dead_channel(flavour):
    graph = convolution("CONV_2D", Window())
    weight, bias = graph.tensors["w"], graph.tensors["b"]
    scale = weight.quantization.scale.copy()
    scale[3] = 1e-12
    data = weight.data.copy()
    data[3] = 0
    tensors = dict(graph.tensors)
    tensors["w"] = constant("w", data, scale, 0)
    tensors["b"] = constant("b", bias.data, scale * graph.tensors["x"].scale, 0)
    assert_equal_codes(dataclasses.replace(graph, tensors=tensors), flavour)


DENSE = {
    "per channel": Window(channels=77, filters=40),
    "per tensor": Window(channels=77, filters=40, per_channel=False),
    "relu6": Window(
        channels=64, filters=40, activation="RELU6", output_scale=6 / 255, output_zero_point=-128
    ),
    "ties": Window(channels=64, filters=60, powers_of_two=True, per_channel=False),
    "ties per channel": Window(channels=64, filters=60, powers_of_two=True),
    "saturating": Window(channels=64, filters=60, spread=400.0),
    # Above 65,794 inputs' worth of |w| * 255 a sum can pass 2^24, where float32 is not exact.
    "float64 sums": Window(channels=3000, filters=40, input_zero_point=-128),
}


@every_flavour
@pytest.mark.parametrize("case", DENSE)
def test_dense(case, flavour):
    graph = dense(DENSE[case])
    assert_equal_codes(graph, flavour, random_inputs(graph, batch=40))


@every_flavour
@pytest.mark.parametrize("seed", range(4))
def test_dense_random(seed, flavour):
    rng = np.random.default_rng(seed)
    case = Window(
        channels=int(rng.integers(30, 200)),
        filters=int(rng.integers(20, 90)),
        input_zero_point=int(rng.integers(-128, 128)),
        output_zero_point=int(rng.integers(-30, 30)),
        per_channel=bool(seed % 2),
        output_scale=float(rng.uniform(0.01, 1.0)),
    )
    graph = dense(case, seed)
    assert_equal_codes(graph, flavour, random_inputs(graph, batch=100))


@every_flavour
def test_dense_without_bias(flavour):
    assert_equal_codes(dense(Window(channels=50, filters=60), with_bias=False), flavour)


@every_flavour
def test_dense_keeps_dimensions(flavour):
    assert_equal_codes(dense(Window(channels=50, filters=20), keep_num_dims=True), flavour)


def test_float32_products_only_where_exact():
    small = np.full((2, 100), 127, np.int8)
    assert weighted._accumulator_dtype(small, (1,), None) is np.float32
    large = np.full((2, 519), 127, np.int8)  # 519 * 127 * 255 = 16,807,815 >= 2^24
    assert weighted._accumulator_dtype(large, (1,), None) is np.float64
    bias = np.array([2**24, 0], np.int32)
    assert weighted._accumulator_dtype(small, (1,), bias) is np.float64


def test_blocks_do_not_change_codes(monkeypatch):
    graph = convolution("CONV_2D", Window())
    inputs = random_inputs(graph, batch=5)
    whole = kernels.run(graph, inputs)["y"]
    monkeypatch.setattr(weighted, "BLOCK_BYTES", 1)
    np.testing.assert_array_equal(kernels.run(graph, inputs)["y"], whole)


# --- elementwise --------------------------------------------------------------------------------


def binary(op, scales, zero_points=(-7, 3, 5), activation_name=None, shape=(1, 6, 5, 7)):
    first, second, output = (
        activation(name, shape, scale, zero_point)
        for name, scale, zero_point in zip("aby", scales, zero_points, strict=True)
    )
    return single(op, [first, second], output, {"activation": activation_name})


SUMS = {
    "random": (0.0713, 0.0391, 0.0933),
    "equal": (0.05, 0.05, 0.1),
    "ties": (0.5, 0.25, 1.0),
    "saturating": (0.5, 0.3, 0.1),
    "one small": (0.1, 0.0002, 0.1),
    "one below the delegate's bound": (0.1, 0.00009, 0.1),
}


@every_flavour
@pytest.mark.parametrize("scales", SUMS)
@pytest.mark.parametrize("op", ["ADD", "SUB"])
def test_sum(op, scales, flavour):
    assert_equal_codes(binary(op, SUMS[scales]), flavour)


PRODUCTS = {
    "random": (0.0713, 0.0391, 0.2033),
    "ties": (0.5, 0.25, 8.0),
    "saturating": (0.5, 0.3, 0.5),
    "small": (0.01, 0.01, 0.01),
}


@every_flavour
@pytest.mark.parametrize("scales", PRODUCTS)
def test_product(scales, flavour):
    assert_equal_codes(binary("MUL", PRODUCTS[scales]), flavour)


@every_flavour
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("op", ["ADD", "SUB", "MUL"])
def test_binary_random(op, seed, flavour):
    rng = np.random.default_rng(seed)
    output = rng.uniform(0.01, 1.0)
    scales = (output * rng.uniform(0.1, 2.0), output * rng.uniform(0.1, 2.0), output)
    if op == "MUL":
        scales = (scales[0], rng.uniform(0.005, 0.03), output)
    zero_points = tuple(int(z) for z in rng.integers(-60, 60, 3))
    assert_equal_codes(binary(op, scales, zero_points), flavour)


@every_flavour
@pytest.mark.parametrize("op", ["ADD", "SUB", "MUL"])
@pytest.mark.parametrize("name", ["RELU", "RELU6", "RELU_N1_TO_1"])
def test_fused_activation(op, name, flavour):
    scales = (0.02, 0.03, 0.025) if op != "MUL" else (0.1, 0.1, 0.025)
    assert_equal_codes(binary(op, scales, (-7, 3, -90), name), flavour)


@every_flavour
@pytest.mark.parametrize("op", ["ADD", "SUB", "MUL"])
def test_broadcast_constant(op, flavour):
    second = np.random.default_rng(0).integers(-127, 128, 7).astype(np.int8)
    graph = single(
        op,
        [activation("a", (1, 6, 5, 7), 0.07, -7), constant("b", second, 0.03)],
        activation("y", (1, 6, 5, 7), 0.1, 5),
        CENTRED,
    )
    assert_equal_codes(graph, flavour)


@every_flavour
@pytest.mark.parametrize("half", [1.5, 2.5, 7.5, 42.5, 60.5])
@pytest.mark.parametrize("zero_point", [-60, -61])
def test_clamp_between_two_codes(half, zero_point, flavour):
    """6 / scale ends in .5: the flavours round it differently."""
    scale = 6 / half
    graph = binary("ADD", (scale, scale, scale), (3, -4, zero_point), "RELU6")
    assert_equal_codes(graph, flavour, distinct=2)
    pool = single(
        "MAX_POOL_2D",
        [activation("x", (1, 4, 4, 9), scale, zero_point)],
        activation("y", (1, 3, 3, 9), scale, zero_point),
        {"filter": (2, 2), "strides": (1, 1), "padding": "VALID", "activation": "RELU6"},
    )
    assert_equal_codes(pool, flavour, distinct=2)


@every_flavour
@pytest.mark.parametrize("op", ["RELU", "RELU6"])
@pytest.mark.parametrize("ratio", [1.0, 0.5, 2.37, 0.31])
def test_relu(op, ratio, flavour):
    graph = single(
        op,
        [activation("x", (1, 6, 5, 7), 0.05 * ratio, -20)],
        activation("y", (1, 6, 5, 7), 0.05, -110),
        {},
    )
    assert_equal_codes(graph, flavour)


# --- pooling and reduction ----------------------------------------------------------------------


@every_flavour
@pytest.mark.parametrize("op", ["AVERAGE_POOL_2D", "MAX_POOL_2D"])
@pytest.mark.parametrize(
    "window, strides, padding, name",
    [
        ((2, 2), (2, 2), "VALID", None),
        ((3, 3), (2, 2), "SAME", None),
        ((3, 2), (1, 1), "SAME", "RELU6"),
        ((2, 2), (3, 3), "SAME", None),
        ((9, 7), (1, 1), "VALID", None),
        ((1, 1), (1, 1), "VALID", "RELU"),
    ],
)
def test_pool(op, window, strides, padding, name, flavour):
    size = tuple(
        output_size(*sizes, padding) for sizes in zip((9, 7), window, strides, strict=True)
    )
    graph = single(
        op,
        [activation("x", (1, 9, 7, 40), 0.03, -90)],
        activation("y", (1, *size, 40), 0.03, -90),
        {"filter": window, "strides": strides, "padding": padding, "activation": name},
    )
    # The largest of 63 uniform codes is nearly always among the top 10.
    assert_equal_codes(graph, flavour, distinct=2 if (op, window[0]) == ("MAX_POOL_2D", 9) else 16)


MEAN_SIZES = [(1, 1), (1, 7), (2, 2), (3, 3), (4, 4), (5, 6), (7, 7), (8, 8), (10, 11), (16, 16)]


@every_flavour
@pytest.mark.parametrize("size", MEAN_SIZES)
def test_mean(size, flavour):
    inputs = None
    for scales, zero_points in itertools.product(
        [(0.0235, 0.0235), (0.0235, 0.0117), (0.02, 0.015), (0.5, 0.25), (0.5, 0.375)],
        [(-128, -128), (-5, 4), (-47, -47)],
    ):
        graph = mean(size, scales, zero_points)
        if inputs is None:
            inputs = clustered_inputs(graph)
        assert_equal_codes(graph, flavour, inputs)


def clustered_inputs(graph):
    """Codes whose means differ from channel to channel, between -118 and -40."""
    shape = graph.tensors["x"].shape
    rng = np.random.default_rng(2)
    centre = rng.uniform(-118, -40, (4, 1, 1, shape[3]))
    codes = np.rint(centre + rng.normal(0, 10, (4, *shape[1:])))
    return {"x": np.clip(codes, -128, 127).astype(np.int8)}


@every_flavour
@pytest.mark.parametrize("keep_dims", [False, True])
@pytest.mark.parametrize("axes", [(1, 2), (2, 1), (-3, -2), (1,), (3,), (2, 3)])
def test_mean_axes(axes, keep_dims, flavour):
    graph = mean((6, 9), (0.05, 0.005), (-5, 4), keep_dims, axes)
    assert_equal_codes(graph, flavour, random_inputs(graph, batch=8))


# --- softmax, quantize, dequantize --------------------------------------------------------------


@every_flavour
@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize("scale", [0.02, 0.1, 0.7])
def test_softmax(classes, scale, flavour):
    graph = single(
        "SOFTMAX",
        [activation("x", (1, classes), scale, 11)],
        activation("y", (1, classes), 1 / 256, -128),
        {"beta": 1.0},
    )
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 1, (60, classes))
    logits[:, 0] = rng.uniform(-4, 4 + np.log(classes), 60)  # one class of any probability
    codes = np.rint(logits / scale) - 90
    inputs = {"x": np.clip(codes, -128, 127).astype(np.int8)}
    # 217 codes of 0.02 are a factor of e^4.3: no class of 1,000 can reach 5 %.
    assert_equal_codes(graph, flavour, inputs, 8 if (classes, scale) == (1000, 0.02) else 16)


def requantize(source, target, ratio, zero_points, size):
    return single(
        "QUANTIZE",
        [activation("x", (1, size), 0.05 * ratio, zero_points[0], source)],
        activation("y", (1, size), 0.05, zero_points[1], target),
        {},
    )


@every_flavour
@pytest.mark.parametrize(
    "source, target, zero_points",
    [
        ("float32", "int8", (0, -7)),
        ("float32", "uint8", (0, 121)),
        ("int8", "int8", (9, -3)),
        ("uint8", "int8", (128, 0)),
        ("uint8", "int8", (120, -3)),
        ("int8", "uint8", (0, 128)),
    ],
)
@pytest.mark.parametrize("size", [15, 250])
def test_quantize(source, target, zero_points, size, flavour):
    for ratio in (1.0, 0.5, 0.33, 0.0041, 0.003, 1.7, 60.0):
        if source == "float32" and ratio != 1.0:
            continue
        graph = requantize(source, target, ratio, zero_points, size)
        # 256 codes times 0.004 is one code; times 60, all but 4 codes saturate.
        distinct = 1 if ratio < 0.01 else 3 if ratio > 50 else DISTINCT
        assert_equal_codes(graph, flavour, random_inputs(graph, batch=6), distinct)


@every_flavour
@pytest.mark.parametrize("zero_point", [0, -7, 8])
@pytest.mark.parametrize("scale", [0.5, 0.05, 1 / 3])
def test_quantize_float_ties(scale, zero_point, flavour):
    graph = single(
        "QUANTIZE",
        [activation("x", (1, 600), dtype="float32")],
        activation("y", (1, 600), scale, zero_point),
        {},
    )
    halves = np.arange(-300, 300, dtype=np.float32)[None] / 2 * graph.tensors["y"].scale
    assert_equal_codes(graph, flavour, {"x": halves})


@every_flavour
@pytest.mark.parametrize("dtype, zero_point", [("int8", -9), ("uint8", 130)])
def test_dequantize(dtype, zero_point, flavour):
    graph = single(
        "DEQUANTIZE",
        [activation("x", (1, 256), 0.0371, zero_point, dtype)],
        activation("y", (1, 256), dtype="float32"),
        {},
    )
    assert_equal_codes(graph, flavour)


# --- moving codes -------------------------------------------------------------------------------


@every_flavour
@pytest.mark.parametrize("axis, count", [(3, 2), (-1, 3), (2, 2), (1, 5), (3, 6)])
def test_concatenation(axis, count, flavour):
    shape = [1, 4, 5, 6]
    inputs = [activation(f"x{i}", shape, 0.1, -4) for i in range(count)]
    shape[axis] *= count
    attributes = {"axis": axis, "activation": None}
    graph = single("CONCATENATION", inputs, activation("y", shape, 0.1, -4), attributes)
    assert_equal_codes(graph, flavour)


@every_flavour
@pytest.mark.parametrize("shape", [(1, 120), (1, 20, 6), (1, 2, 2, 30)])
def test_reshape(shape, flavour):
    graph = single(
        "RESHAPE",
        [activation("x", (1, 4, 5, 6)), constant("shape", np.array(shape, np.int32))],
        activation("y", shape),
        {"new_shape": shape},
    )
    assert_equal_codes(graph, flavour)


@every_flavour
@pytest.mark.parametrize("paddings", [((1, 1), (0, 2), (0, 0)), ((0, 0), (0, 0), (3, 1))])
def test_pad(paddings, flavour):
    paddings = np.array(((0, 0), *paddings), np.int32)
    shape = np.array((1, 4, 5, 6)) + paddings.sum(axis=1)
    graph = single(
        "PAD",
        [activation("x", (1, 4, 5, 6), 0.1, -77), constant("paddings", paddings)],
        activation("y", tuple(int(n) for n in shape), 0.1, -77),
        {},
    )
    assert_equal_codes(graph, flavour)


@every_flavour
@pytest.mark.parametrize(
    "begin, size",
    [((0, 1, 1, 0), (1, 3, 4, 6)), ((0, 0, 2, 3), (1, 4, 1, 2)), ((0, 2, 0, 0), (1, -1, 5, 6))],
)
def test_slice(begin, size, flavour):
    source = activation("x", (1, 4, 5, 6), 0.1, -77)
    # A size of -1 takes all that is left.
    left = zip(source.shape, begin, size, strict=True)
    shape = tuple(length - first if count == -1 else count for length, first, count in left)
    where = [
        constant("begin", np.array(begin, np.int32)),
        constant("size", np.array(size, np.int32)),
    ]
    graph = single("SLICE", [source, *where], activation("y", shape, 0.1, -77), {})
    assert_equal_codes(graph, flavour, random_inputs(graph, batch=6))


# --- placement ----------------------------------------------------------------------------------


def placed(graph):
    return delegate.placement_of(graph, graph.nodes[0])


@pytest.mark.parametrize("op", ["ADD", "SUB"])
@pytest.mark.parametrize("ratio", [2.0**-11, 2.0**-10, 1.0, 255.0, 256.0])
def test_sum_placement(op, ratio):
    graph = binary(op, (0.125 * ratio, 0.125, 0.125))
    kernel, reason = placed(graph)
    assert (kernel == "xnnpack") == delegated(graph) == (2.0**-10 <= ratio < 256)
    assert (reason == "") == (kernel == "xnnpack")


@pytest.mark.parametrize("ratio", [2.0**-17, 2.0**-16, 1.0, 255.0, 256.0])
def test_product_placement(ratio):
    graph = binary("MUL", (0.125, ratio, 0.125))
    assert (placed(graph)[0] == "xnnpack") == delegated(graph) == (2.0**-16 <= ratio < 256)


@pytest.mark.parametrize("ratio", [2.0**-9, 2.0**-8, 128.0, 129.0])
def test_quantize_placement(ratio):
    graph = requantize("int8", "int8", ratio, (0, 0), 20)
    assert (placed(graph)[0] == "xnnpack") == delegated(graph) == (2.0**-8 <= ratio <= 128)


@pytest.mark.parametrize("count", [5, 6])
def test_concatenation_placement(count):
    inputs = [activation(f"x{i}", (1, 8)) for i in range(count)]
    attributes = {"axis": 1, "activation": None}
    graph = single("CONCATENATION", inputs, activation("y", (1, 8 * count)), attributes)
    assert (placed(graph)[0] == "xnnpack") == delegated(graph) == (count <= 5)


REFUSED = {
    "CONV_2D": convolution("CONV_2D", Window(spread=2e7, window=(1, 1), powers_of_two=True)),
    "FULLY_CONNECTED": dense(Window(spread=2e8, channels=64, per_channel=False)),
    "CONCATENATION": single(
        "CONCATENATION",
        [activation("a", (1, 8), 0.1), activation("b", (1, 8), 0.2)],
        activation("y", (1, 16), 0.1),
        {"axis": 1, "activation": None},
    ),
    "PAD": single(
        "PAD",
        [activation("x", (1, 8)), constant("paddings", np.array([[0, 0], [1, 1]], np.int32))],
        activation("y", (1, 10), zero_point=3),
        {},
    ),
    "SLICE": single(
        "SLICE",
        [
            activation("x", (1, 8)),
            constant("begin", np.array([0, 1], np.int32)),
            constant("size", np.array([1, 3], np.int32)),
        ],
        activation("y", (1, 3), zero_point=3),
        {},
    ),
}


@pytest.mark.parametrize("op", REFUSED)
def test_refused_models(op):
    graph = REFUSED[op]
    kernel, reason = placed(graph)
    assert kernel == "refused" and reason
    with pytest.raises((RuntimeError, ValueError)):
        interpreter_of(graph, "xnnpack")
    with pytest.raises(ValueError, match=op.lower()):
        kernels.run(graph, random_inputs(graph))


def test_largest_multiplier_that_loads():
    graph = convolution("CONV_2D", Window(window=(1, 1), per_channel=False))
    tensors = dict(graph.tensors)
    below = np.nextafter(np.float32(256), np.float32(0))
    for largest, kernel in ((below, "xnnpack"), (256, "refused")):
        tensors |= {name: activation(name, graph.tensors[name].shape, 1.0) for name in "xy"}
        tensors["w"] = constant("w", graph.tensors["w"].data, largest)
        tensors["b"] = constant("b", graph.tensors["b"].data, largest)
        changed = dataclasses.replace(graph, tensors=dict(tensors))
        assert placed(changed)[0] == kernel
        if kernel == "xnnpack":
            assert delegated(changed)


# --- networks -----------------------------------------------------------------------------------


@functools.cache
def network():
    """Convolution, depthwise, residual ADD, average pool, MEAN, dense and SOFTMAX."""
    stem = convolution("CONV_2D", Window(size=(16, 16), channels=3, filters=8))
    rng = np.random.default_rng(5)
    tensors = {name: stem.tensors[name] for name in ("x", "w", "b")}
    tensors["stem"] = activation("stem", (1, 16, 16, 8), 0.0731, 5)
    nodes = [dataclasses.replace(stem.nodes[0], outputs=("stem",))]

    weight = rng.integers(-127, 128, (1, 3, 3, 8)).astype(np.int8)
    scale = np.full(8, 0.004, np.float32)
    tensors["dw"] = constant("dw", weight, scale, 3)
    tensors["db"] = constant("db", np.zeros(8, np.int32), scale * np.float32(0.0731), 0)
    tensors["depthwise"] = activation("depthwise", (1, 16, 16, 8), 0.08, -3)
    attributes = stem.nodes[0].attributes | {"depth_multiplier": 1}
    nodes.append(
        integer_graph.Node(
            "DEPTHWISE_CONV_2D", "depthwise", ("stem", "dw", "db"), ("depthwise",), attributes
        )
    )
    tensors["sum"] = activation("sum", (1, 16, 16, 8), 0.09, 2)
    nodes.append(integer_graph.Node("ADD", "sum", ("stem", "depthwise"), ("sum",), CENTRED))
    tensors["pooled"] = activation("pooled", (1, 8, 8, 8), 0.09, 2)
    pooling = {"filter": (2, 2), "strides": (2, 2), "padding": "VALID", "activation": None}
    nodes.append(integer_graph.Node("AVERAGE_POOL_2D", "pool", ("sum",), ("pooled",), pooling))
    tensors["axes"] = constant("axes", np.array([1, 2], np.int32))
    tensors["mean"] = activation("mean", (1, 8), 0.01, 4)
    nodes.append(
        integer_graph.Node("MEAN", "mean", ("pooled", "axes"), ("mean",), {"keep_dims": False})
    )
    weight = rng.integers(-127, 128, (40, 8)).astype(np.int8)
    tensors["fw"] = constant("fw", weight, 0.02)
    tensors["fb"] = constant("fb", rng.integers(-99, 99, 40).astype(np.int32), 0.0002)
    tensors["logits"] = activation("logits", (1, 40), 0.03, 0)
    attributes = {"activation": None, "keep_num_dims": False}
    nodes.append(
        integer_graph.Node("FULLY_CONNECTED", "fc", ("mean", "fw", "fb"), ("logits",), attributes)
    )
    tensors["y"] = activation("y", (1, 40), 1 / 256, -128)
    nodes.append(integer_graph.Node("SOFTMAX", "softmax", ("logits",), ("y",), {"beta": 1.0}))
    return graph_of(tensors.values(), nodes, ["x"], ["logits", "y"])


@every_flavour
def test_network(flavour):
    inputs = random_inputs(network(), batch=4)
    assert_equal_codes(network(), flavour, inputs)


def test_intermediate_outputs():
    inputs = random_inputs(network(), batch=2)
    values = kernels.run(network(), inputs, outputs=("x", "sum", "logits"))
    assert list(values) == ["x", "sum", "logits"]
    assert values["x"] is inputs["x"] and values["sum"].shape == (2, 16, 16, 8)
    np.testing.assert_array_equal(values["logits"], kernels.run(network(), inputs)["logits"])


def test_run_node_needs_only_its_inputs():
    inputs = random_inputs(network(), batch=2)
    values = kernels.run(network(), inputs, outputs=("stem", "depthwise", "sum"))
    node = network().nodes[2]
    (result,) = kernels.run_node(network(), node, [values["stem"], values["depthwise"]], "xnnpack")
    np.testing.assert_array_equal(result, values["sum"])


# --- errors -------------------------------------------------------------------------------------


def test_unknown_operation():
    graph = single("FROBNICATE", [activation("x", (1, 4))], activation("y", (1, 4)), {})
    with pytest.raises(ValueError, match="frobnicate.*no kernel for 'FROBNICATE'"):
        kernels.run(graph, random_inputs(graph))


def test_unknown_flavour():
    with pytest.raises(ValueError, match="kernels must be one of .*'gemmlowp'"):
        kernels.run(network(), random_inputs(network()), "gemmlowp")


def test_missing_input():
    with pytest.raises(ValueError, match="input 'x' is missing"):
        kernels.run(network(), {})


@pytest.mark.parametrize("array", [np.zeros((2, 16, 16, 3)), np.zeros((2, 16, 15, 3), np.int8)])
def test_wrong_input(array):
    with pytest.raises(ValueError, match="'x' must be int8 of shape"):
        kernels.run(network(), {"x": array})


def test_output_that_nothing_computes():
    with pytest.raises(ValueError, match="no node .*computes"):
        kernels.run(network(), random_inputs(network()), outputs=("nonesuch",))


def test_channels_that_do_not_match():
    graph = convolution("CONV_2D", Window())
    tensors = dict(graph.tensors, x=activation("x", (1, 9, 7, 4)))
    changed = dataclasses.replace(graph, tensors=tensors)
    with pytest.raises(ValueError, match="conv_2d.*4 channels, the weights 5"):
        kernels.run(changed, random_inputs(changed))


@pytest.mark.parametrize("attribute, value", [("padding", "FULL"), ("activation", "TANH")])
def test_wrong_attribute(attribute, value):
    graph = convolution("CONV_2D", Window())
    node = graph.nodes[0]
    node = dataclasses.replace(node, attributes=dict(node.attributes) | {attribute: value})
    changed = dataclasses.replace(graph, nodes=(node,))
    with pytest.raises(ValueError, match=f"conv_2d.*{value}"):
        kernels.run(changed, random_inputs(changed))


# --- functions of one code: every code ----------------------------------------------------------

FIXED = {"LOGISTIC": (1 / 256, -128), "TANH": (1 / 128, 0)}
NO_ELU = ("ELU", "reference")  # BUILTIN_REF has none


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("scale", [0.003, 0.0173, 1 / 32, 0.0731, 0.11, 0.25, 1.7, 300.0])
@pytest.mark.parametrize("op", FIXED)
def test_functions_of_one_code_for_all_256_codes(op, scale, flavour):
    for zero_point in (-128, -7, 0, 5, 127):
        shape = (1, 16, 16, 1)
        graph = single(
            op,
            [activation("x", shape, scale, zero_point)],
            activation("y", shape, *FIXED[op]),
            {},
        )
        codes = np.arange(-128, 128, dtype=np.int8).reshape(shape)
        assert_equal_codes(graph, flavour, {"x": codes}, distinct=1)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("ratio", [0.01, 0.2, 0.731, 1.0, 1.9])
@pytest.mark.parametrize(
    ("op", "attributes"),
    [
        ("GELU", {"approximate": False}),
        ("LEAKY_RELU", {"alpha": float(np.float32(0.1))}),
        ("LEAKY_RELU", {"alpha": 0.5}),
        ("LEAKY_RELU", {"alpha": 0.0}),
        ("LEAKY_RELU", {"alpha": float(np.float32(1.3))}),
        ("ELU", {}),
    ],
)
def test_functions_on_free_scales_for_all_256_codes(op, attributes, ratio, flavour):
    shape = (1, 16, 16, 1)
    codes = np.arange(-128, 128, dtype=np.int8).reshape(shape)
    cases = ((0.0173, -7, 5), (0.05, -128, -100), (0.1, 40, 0), (300.0, 3, -20))
    for scale, zero_point, output_zero_point in cases:
        graph = single(
            op,
            [activation("x", shape, scale, zero_point)],
            activation("y", shape, scale / ratio, output_zero_point),
            attributes,
        )
        if (op, flavour) != NO_ELU:
            assert_equal_codes(graph, flavour, {"x": codes}, distinct=1)


REAL_FUNCTIONS = {
    "LOGISTIC": lambda x: 1 / (1 + np.exp(-x)),
    "TANH": np.tanh,
    "GELU": lambda x: x / 2 * (1 + np.vectorize(math.erf)(x * math.sqrt(0.5))),
    "ELU": lambda x: np.where(x > 0, x, np.expm1(x)),
}


@pytest.mark.parametrize(
    "op, flavour",
    [(op, flavour) for op in REAL_FUNCTIONS for flavour in FLAVOURS if (op, flavour) != NO_ELU],
)
def test_functions_within_a_hundred_thousandth_of_a_tie(op, flavour):
    """There float32 decides: expf, tanhf, erfcf of the C library, and where the zero point is added."""
    rng = np.random.default_rng(0)
    codes = np.arange(-128, 128, dtype=np.int8).reshape(1, 16, 16, 1)
    found = 0
    while found < 30:
        scale, zero_point = np.float32(np.exp(rng.uniform(-4.5, -2.0))), int(rng.integers(-60, 60))
        output = (np.float32(scale * rng.uniform(0.6, 1.2)), int(rng.integers(-110, -60)))
        output = FIXED.get(op, output)
        reals = (codes.ravel().astype(np.float32) - np.float32(zero_point)) * scale
        exact = REAL_FUNCTIONS[op](reals.astype(np.float64)) / float(output[0]) + output[1]
        near = (np.abs(exact % 1 - 0.5) < 1e-5) & (np.abs(exact) < 127)
        found += near.sum()
        if near.any():
            graph = single(
                op,
                [activation("x", codes.shape, scale, zero_point)],
                activation("y", codes.shape, *output),
                {"approximate": False} if op == "GELU" else {},
            )
            assert_equal_codes(graph, flavour, {"x": codes}, distinct=1)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("scale", [1e-4, 0.003, 0.0731, 0.25, 3.0])
def test_reciprocal_roots_for_all_codes(scale, flavour):
    shape = (1, 16, 16, 1)
    codes = np.arange(-128, 128, dtype=np.int8).reshape(shape)
    for factor, zero_point in ((0.004, -128), (0.02, -100), (0.0007, 0)):
        graph = single(
            "RSQRT",
            [activation("x", shape, scale, -128)],
            activation("y", shape, factor / np.sqrt(scale), zero_point),
            {},
        )
        assert_equal_codes(graph, flavour, {"x": codes}, distinct=1)


def test_a_reciprocal_root_of_a_negative_value_is_refused():
    shape = (1, 2, 2, 1)
    graph = single("RSQRT", [activation("x", shape, 0.1, 3)], activation("y", shape, 0.1), {})
    with pytest.raises(ValueError, match="RSQRT of a negative value, code -5"):
        kernels.run(graph, {"x": np.full(shape, -5, np.int8)})


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("dtype", ["int8", "int16"])
@pytest.mark.parametrize("alpha_shape", [(1, 1, 5), (7, 6, 5)])
def test_prelu(alpha_shape, dtype, flavour):
    rng = np.random.default_rng(0)
    shape, zero_points = (1, 7, 6, 5), (-7, 5) if dtype == "int8" else (0, 0)
    alpha = constant("a", rng.integers(-127, 128, alpha_shape).astype(np.int8), 0.004)
    graph = single(
        "PRELU",
        [activation("x", shape, 0.02, zero_points[0], dtype), alpha],
        activation("y", shape, 0.013, zero_points[1], dtype),
        {},
    )
    assert_equal_codes(graph, flavour)


MASKS = dict.fromkeys(
    [f"{key}_mask" for key in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")], 0
)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_strided_slice(dtype, flavour):
    parts = ((0, 1, 0, 2), (1, 6, 7, 5), (1, 2, 3, 1))
    names = zip(("begin", "end", "strides"), parts, strict=True)
    constants = [constant(name, np.array(values, np.int32)) for name, values in names]
    graph = single(
        "STRIDED_SLICE",
        [activation("x", (1, 7, 7, 6), 0.1, 0, dtype), *constants],
        activation("y", (1, 3, 3, 3), 0.1, 0, dtype),
        MASKS,
    )
    assert_equal_codes(graph, flavour)
    turned = dataclasses.replace(graph, nodes=(dataclasses.replace(graph.nodes[0]),))
    turned.tensors["strides"].data[1] = -1
    with pytest.raises(ValueError, match=r"STRIDED_SLICE has strides \[1, -1, 3, 1\] or a mask"):
        kernels.run(turned, random_inputs(turned))


@pytest.mark.parametrize("block", [2, 3])
@pytest.mark.parametrize("op", ["DEPTH_TO_SPACE", "SPACE_TO_DEPTH"])
def test_blocks_and_channels(op, block):
    small, large = (1, 4, 3, 2 * block**2), (1, 4 * block, 3 * block, 2)
    shapes = (small, large) if op == "DEPTH_TO_SPACE" else (large, small)
    source, output = (activation(name, shape) for name, shape in zip("xy", shapes, strict=True))
    graph = single(op, [source], output, {"block_size": block})
    assert_equal_codes(graph, "xnnpack")
    if op == "DEPTH_TO_SPACE":  # BUILTIN_REF has no version 2 of it
        with pytest.raises(ValueError, match="BUILTIN_REF has no DEPTH_TO_SPACE of version 2"):
            kernels.run(graph, random_inputs(graph), "reference")
    else:
        assert_equal_codes(graph, "reference")


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_fully_connected_within_a_billionth_of_a_tie(flavour):
    """The reference kernel multiplies in float64; 31-bit multipliers would round 1 of 4 otherwise."""
    rng = np.random.default_rng(0)
    count, wanted = 400_000, 500
    middle, bias = rng.integers(0, 60, count) + 0.5, rng.integers(500, 60_000, count)
    source, target = np.float32(0.058974266), np.float32(0.02377987)
    scale = (middle / bias * float(target) / float(source)).astype(np.float32)
    real = float(source) * scale.astype(np.float64) / float(target) * bias
    nearest = np.argsort(np.abs(real - middle))[:wanted]
    scale, bias = scale[nearest], bias[nearest].astype(np.int32)
    graph = single(
        "FULLY_CONNECTED",
        [
            activation("x", (1, 4), source, 3),
            constant("w", np.ones((wanted, 4), np.int8), scale, 0),
            constant("b", bias, scale * source, 0),
        ],
        activation("y", (1, wanted), target, -4),
        CENTRED | {"keep_num_dims": False},
    )
    assert_equal_codes(graph, flavour, {"x": np.full((1, 4), 3, np.int8)})


# --- int16 activations, weights of 4 and 2 bits -------------------------------------------------


def wide(graph):
    """The graph with int16 activations: zero points 0, scales 1/256, int64 biases."""
    tensors = {}
    for name, tensor in graph.tensors.items():
        if tensor.data is None:
            tensor = activation(name, tensor.shape, tensor.scale / 256, dtype="int16")
        elif tensor.dtype == "int32" and tensor.quantization is not None:
            data = tensor.data.astype(np.int64) * 256 + 17
            tensor = constant(name, data, tensor.quantization.scale / 256, 0)
        tensors[name] = tensor
    return dataclasses.replace(graph, tensors=tensors)


def packed(graph, dtype):
    """The graph with weights of 4 or 2 bits in place of 8, of scales that keep the outputs' spread."""
    weight = graph.tensors["w"]
    largest = {"int4": 7, "int2": 1}[dtype]
    data = np.clip(np.rint(weight.data * (largest / 90)), -largest - 1, largest).astype(np.int8)
    scale = weight.quantization.scale * np.float32(90 / largest)
    tensor = dataclasses.replace(constant("w", data, scale, weight.quantization.axis), dtype=dtype)
    bias = constant("b", graph.tensors["b"].data // 90, scale * graph.tensors["x"].scale, 0)
    return dataclasses.replace(graph, tensors=dict(graph.tensors) | {"w": tensor, "b": bias})


WIDE = ("plain", "strided same", "dilated valid", "per tensor", "ties", "saturating", "relu6 cut")


@every_flavour
@pytest.mark.parametrize("op", ["CONV_2D", "DEPTHWISE_CONV_2D"])
@pytest.mark.parametrize("case", WIDE)
def test_int16_convolution(case, op, flavour):
    geometry = CONVOLUTIONS[case]
    if op == "DEPTHWISE_CONV_2D":
        geometry = dataclasses.replace(geometry, filters=3)
    assert_equal_codes(wide(convolution(op, geometry)), flavour)


@every_flavour
@pytest.mark.parametrize("case", DENSE)
def test_int16_dense(case, flavour):
    assert_equal_codes(wide(dense(DENSE[case])), flavour)


@every_flavour
def test_int16_bias_beyond_int32(flavour):
    graph = wide(dense(Window(channels=30, filters=20)))
    bias = graph.tensors["b"]
    data = bias.data + np.arange(20) * 2**36
    tensors = dict(graph.tensors) | {"b": constant("b", data, bias.quantization.scale, 0)}
    tensors["y"] = activation("y", (1, 20), 3e4 * tensors["y"].scale, dtype="int16")
    assert_equal_codes(dataclasses.replace(graph, tensors=tensors), flavour)


@every_flavour
@pytest.mark.parametrize("op", ["CONV_2D", "FULLY_CONNECTED"])
def test_int16_with_packed_weights(op, flavour):
    graph = dense(DENSE["ties"]) if op == "FULLY_CONNECTED" else convolution(op, Window())
    assert_equal_codes(wide(packed(graph, "int4")), flavour)


@every_flavour
@pytest.mark.parametrize("scales", SUMS)
@pytest.mark.parametrize("op", ["ADD", "SUB"])
def test_int16_sum(op, scales, flavour):
    assert_equal_codes(wide(binary(op, SUMS[scales], shape=(1, 6, 5, 7))), flavour)


@every_flavour
@pytest.mark.parametrize("op", ["ADD", "SUB", "MUL"])
@pytest.mark.parametrize("name", [None, "RELU", "RELU6"])
@pytest.mark.parametrize("shapes", [((1, 8, 3, 4), (1, 1, 1, 4)), ((1, 5, 4), (1, 5, 4))])
def test_int16_binary(op, name, shapes, flavour):
    first, second = (
        activation(each, shape, scale, dtype="int16")
        for each, shape, scale in zip("ab", shapes, (3e-4, 2e-4), strict=True)
    )
    output = activation("y", shapes[0], 3e-4 if op != "MUL" else 2e-3, dtype="int16")
    graph = single(op, [first, second], output, {"activation": name})
    assert_equal_codes(graph, flavour, random_inputs(graph, batch=30))


def test_an_int16_sum_that_aborts_the_interpreter_is_refused():
    graph = wide(binary("ADD", (20000.0, 1.0, 1.0)))
    with pytest.raises(
        ValueError, match=r"'add': the larger input scale .* below 2\^14, got 20000"
    ):
        kernels.run(graph, random_inputs(graph))


@every_flavour
@pytest.mark.parametrize("op, window", [("AVERAGE_POOL_2D", (3, 2)), ("MAX_POOL_2D", (2, 2))])
def test_int16_pool(op, window, flavour):
    attributes = {"filter": window, "strides": (2, 1), "padding": "SAME", "activation": None}
    x = activation("x", (1, 9, 8, 5), 1e-3, dtype="int16")
    graph = single(op, [x], activation("y", (1, 5, 8, 5), 1e-3, dtype="int16"), attributes)
    assert_equal_codes(graph, flavour)


@every_flavour
@pytest.mark.parametrize("size", [(7, 7), (1, 1), (3, 5), (40, 50)])
def test_int16_mean(size, flavour):
    assert_equal_codes(wide(mean(size, (0.07, 0.02), (0, 0))), flavour)


@every_flavour
@pytest.mark.parametrize("scale", [2.0**-12, 2.0**-11, 3e-5, 1.3e-4, 7e-4])
@pytest.mark.parametrize(
    "op, attributes",
    [
        *[("LOGISTIC", {}), ("TANH", {}), ("GELU", {"approximate": False})],
        *[("LEAKY_RELU", {"alpha": 0.3}), ("RELU", {}), ("RELU6", {})],
    ],
)
def test_int16_functions_for_all_65536_codes(op, attributes, scale, flavour):
    shape = (1, 256, 256, 1)
    output = 1 / 32768 if op in ("LOGISTIC", "TANH") else scale * 1.3
    tensors = [
        activation(name, shape, s, dtype="int16") for name, s in (("x", scale), ("y", output))
    ]
    graph = single(op, tensors[:1], tensors[1], attributes)
    codes = np.arange(-(2**15), 2**15).astype(np.int16).reshape(shape)
    assert_equal_codes(graph, flavour, {"x": codes})


@every_flavour
@pytest.mark.parametrize("scale, output_scale", [(5e-4, 0.003), (1e-4, 0.01), (0.01, 1e-3)])
def test_int16_reciprocal_roots_for_all_codes(scale, output_scale, flavour):
    shape = (1, 256, 128, 1)
    source, output = (
        activation(name, shape, s, dtype="int16") for name, s in (("x", scale), ("y", output_scale))
    )
    graph = single("RSQRT", [source], output, {})
    codes = np.arange(2**15).astype(np.int16).reshape(shape)
    assert_equal_codes(graph, flavour, {"x": codes})
    with pytest.raises(ValueError, match="RSQRT of a negative value, code -32768"):
        kernels.run(graph, {"x": -1 - codes}, flavour)


@every_flavour
@pytest.mark.parametrize("classes, scale", [(2, 1e-3), (10, 1e-4), (1000, 4e-4)])
def test_int16_softmax(classes, scale, flavour):
    tensors = [activation("x", (1, classes), scale, dtype="int16")]
    output = activation("y", (1, classes), 1 / 32768, dtype="int16")
    graph = single("SOFTMAX", tensors, output, {"beta": 1.0})
    rng = np.random.default_rng(0)
    codes = np.clip(rng.normal(0, 3 / scale, (40, classes)), -32768, 32767).astype(np.int16)
    assert_equal_codes(graph, flavour, {"x": codes})


@every_flavour
@pytest.mark.parametrize(
    "source, target",
    [("float32", "int16"), ("int8", "int16"), ("int16", "int16"), ("int16", "int8")],
)
@pytest.mark.parametrize("size", [37, 512])
def test_int16_quantize(source, target, size, flavour):
    scales = {"float32": None, "int8": 0.05, "int16": 3e-4}
    x = activation("x", (1, size), scales[source], 0, source)
    graph = single("QUANTIZE", [x], activation("y", (1, size), 2.1 * scales[target], 0, target), {})
    assert_equal_codes(graph, flavour, random_inputs(graph, batch=20))


@every_flavour
def test_int16_dequantize(flavour):
    x = activation("x", (1, 50), 3e-4, dtype="int16")
    graph = single("DEQUANTIZE", [x], activation("y", (1, 50), dtype="float32"), {})
    assert_equal_codes(graph, flavour)


@pytest.mark.parametrize("op", ["CONV_2D", "DEPTHWISE_CONV_2D"])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_packed_convolution(case, op):
    geometry = CONVOLUTIONS[case]
    if op == "DEPTHWISE_CONV_2D":
        geometry = dataclasses.replace(geometry, filters=3)
    graph = packed(convolution(op, geometry), "int4")
    assert_equal_codes(graph, "xnnpack")  # by the built-in kernel, as the check of placement says
    if op == "CONV_2D":
        assert_equal_codes(graph, "reference")


def test_packed_depthwise_weights_are_refused_where_they_do_not_load():
    graph = packed(convolution("DEPTHWISE_CONV_2D", Window(filters=2)), "int4")
    with pytest.raises(
        ValueError, match="depthwise.*BUILTIN_REF has no DEPTHWISE_CONV_2D of version 7"
    ):
        kernels.run(graph, random_inputs(graph), "reference")
    with pytest.raises((RuntimeError, ValueError), match="DEPTHWISE_CONV_2D' version '7'"):
        interpreter_of(graph, "reference")
    with pytest.raises(ValueError, match="computes wrongly with 4-bit weights and 16-bit"):
        kernels.run(wide(graph), random_inputs(wide(graph)))


@every_flavour
@pytest.mark.parametrize("dtype", ["int4", "int2"])
@pytest.mark.parametrize("channels", [64, 62, 63])  # rows of whole bytes at both, 4 or no width
@pytest.mark.parametrize("per_channel", [True, False])
def test_packed_dense(channels, dtype, per_channel, flavour):
    case = Window(channels=channels, filters=40, per_channel=per_channel)
    graph = packed(dense(case), dtype)
    assert_equal_codes(graph, flavour, random_inputs(graph, batch=40))


@every_flavour
def test_packed_dense_sums_beyond_27_bits(flavour):
    graph = packed(dense(Window(channels=64, filters=40)), "int4")
    bias = graph.tensors["b"]
    data = bias.data + (np.arange(40, dtype=np.int32) % 3 - 1) * np.int32(2**27)
    tensors = dict(graph.tensors) | {"b": constant("b", data, bias.quantization.scale, 0)}
    assert_equal_codes(dataclasses.replace(graph, tensors=tensors), flavour)


GROUPED = Window(channels=3, filters=18, size=(9, 8))


@every_flavour
@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_grouped_convolution(dtype, per_channel, flavour):
    graph = convolution("CONV_2D", dataclasses.replace(GROUPED, per_channel=per_channel))
    if dtype == "int4":
        graph = packed(graph, dtype)
    x = graph.tensors["x"]
    tensors = dict(graph.tensors) | {"x": dataclasses.replace(x, shape=(1, 9, 8, 9))}
    assert_equal_codes(dataclasses.replace(graph, tensors=tensors), flavour)
