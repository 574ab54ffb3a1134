"""ONNX files: the exact form gives the simulator's codes of XNNPACK, optimized or not; qdq nearly."""

import dataclasses

import keras
import numpy as np
import onnx
import onnxruntime as runtime
import pytest

from export import onnx as onnx_export
from lowbit import (
    boundary,
    calibration,
    integer_graph,
    kernels,
    lowering,
    onnx_file,
    placement,
    spec,
    tflite_file,
)
from lowbit.data import preprocess
from lowbit.onnx_file import common

LEVELS = {
    "all": runtime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "basic": runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "none": runtime.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
SHAPE = (1, 6, 5, 3)


def session(content, level="all"):
    options = runtime.SessionOptions()
    options.graph_optimization_level = LEVELS[level]
    options.intra_op_num_threads = 1
    # Processors without VNNI add products in 16 bits otherwise.
    options.add_session_config_entry("session.x64quantprecision", "1")
    return runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def tensor(name, shape, scale=None, zero_point=0, dtype="int8", data=None, axis=None):
    quantization = None
    if scale is not None:
        scale = np.atleast_1d(np.asarray(scale, np.float32))
        quantization = integer_graph.Quantization(scale, np.full(scale.shape, zero_point), axis)
    return integer_graph.Tensor(name, tuple(shape), dtype, quantization, data)


def constant(name, values):
    data = np.asarray(values, np.int32)
    return tensor(name, data.shape, dtype="int32", data=data)


def graph_of(op, inputs, output, **attributes):
    """Returns a graph of one node."""
    names = tuple(each.name for each in inputs)
    node = integer_graph.Node(op, "node", names, (output.name,), attributes)
    outside = tuple(dict.fromkeys(each.name for each in inputs if each.data is None))
    tensors = {each.name: each for each in (*inputs, output)}
    return integer_graph.IntegerGraph(tensors, (node,), outside, node.outputs)


def weighted(rng, op, source, kernel_shape, output_shape, spread=2000, **attributes):
    """Returns a convolution or dense layer with random codes and a scale for each channel."""
    channels = output_shape[-1]
    axis = 3 if op == "DEPTHWISE_CONV_2D" else 0
    kernel = rng.integers(-127, 128, kernel_shape).astype(np.int8)
    scale = rng.uniform(0.002, 0.01, channels).astype(np.float32)
    deviation = 0.006 * source.scale * 5400 * np.sqrt(kernel.size / channels)
    bias = rng.integers(-spread, spread, channels).astype(np.int32)
    return graph_of(
        op,
        [
            source,
            tensor("kernel", kernel_shape, scale, data=kernel, axis=axis),
            tensor("bias", bias.shape, source.scale * scale, dtype="int32", data=bias, axis=0),
        ],
        tensor("out", output_shape, deviation / 60, rng.integers(-128, 60)),
        **attributes,
    )


def cases():
    """Returns {name: graph} of every operation."""
    rng = np.random.default_rng(7)
    _, height, width, channels = SHAPE
    x = tensor("x", SHAPE, 0.031, -11)
    same = dataclasses.replace(x, name="out")
    window = {"strides": (1, 1), "dilations": (1, 1)}
    found = {}
    for padding, (rows, columns) in {"SAME": (3, 3), "VALID": (2, 2)}.items():
        options = window | {"padding": padding, "strides": (2, 2)}
        found[f"CONV_2D {padding}"] = weighted(
            rng, "CONV_2D", x, (7, 3, 3, 3), (1, rows, columns, 7), activation="RELU6", **options
        )
        found[f"DEPTHWISE_CONV_2D {padding}"] = weighted(
            rng,
            "DEPTHWISE_CONV_2D",
            x,
            (1, 3, 3, 6),
            (1, rows, columns, 6),
            depth_multiplier=2,
            activation=None,
            **options,
        )
    dilated = window | {"padding": "SAME", "dilations": (2, 2), "activation": None}
    found["CONV_2D dilated"] = weighted(rng, "CONV_2D", x, (4, 3, 3, 3), (*SHAPE[:3], 4), **dilated)
    # Sums beyond 2^24: of products, and of the bias.
    point = window | {"padding": "VALID", "activation": "RELU"}
    wide = tensor("x", (1, 2, 2, 3000), 0.02, -128)
    found["CONV_2D wide"] = weighted(
        rng, "CONV_2D", wide, (4, 1, 1, 3000), (1, 2, 2, 4), 2**25, **point
    )
    flat = tensor("x", (1, 90), 0.02, 4)
    found["FULLY_CONNECTED"] = weighted(
        rng, "FULLY_CONNECTED", flat, (11, 90), (1, 11), activation=None, keep_num_dims=False
    )
    found["FULLY_CONNECTED large bias"] = weighted(
        rng, "FULLY_CONNECTED", flat, (11, 90), (1, 11), 2**30, activation=None, keep_num_dims=False
    )
    found["FULLY_CONNECTED on images"] = weighted(
        rng, "FULLY_CONNECTED", x, (4, 3), (*SHAPE[:3], 4), activation=None, keep_num_dims=True
    )
    for op, scale in {"ADD": 0.06, "SUB": 0.06, "MUL": 0.02}.items():
        out = tensor("out", SHAPE, scale, -20)
        for name, shape in {"": SHAPE, "channels ": (1, 1, 1, 3), "flat ": (1, 3)}.items():
            other = tensor("y", shape, 0.044, 25)
            found[f"{op} {name}".strip()] = graph_of(op, [x, other], out, activation="RELU")
        numbers = tensor("y", (3,), 0.044, 25, data=np.array([-100, 3, 90], np.int8))
        found[f"{op} constant"] = graph_of(op, [x, numbers], out, activation=None)
        tiny = tensor("out", SHAPE, 2e-4 * scale, 3)  # XNNPACK leaves this ratio
        found[f"{op} built-in"] = graph_of(op, [x, other], tiny, activation=None)
    ends = [tensor(name, SHAPE, 0.01, 127) for name in "xy"]
    found["ADD small ratio"] = graph_of(
        "ADD", ends, tensor("out", SHAPE, 1.3, 127), activation=None
    )
    for keeps, shape in ((True, (1, 1, 1, 3)), (False, (1, 3))):
        out = tensor("out", shape, 0.009, 7)
        found[f"MEAN {keeps}"] = graph_of(
            "MEAN", [x, constant("axes", [1, 2])], out, keep_dims=keeps
        )
    out = tensor("out", SHAPE[:3], 0.02, 7)
    found["MEAN of channels"] = graph_of("MEAN", [x, constant("axes", [3])], out, keep_dims=False)
    for op in ("AVERAGE_POOL_2D", "MAX_POOL_2D"):
        out = dataclasses.replace(same, shape=(1, 3, 3, 3))
        options = {"filter": (2, 2), "strides": (2, 2), "padding": "SAME", "activation": None}
        found[op] = graph_of(op, [x], out, **options)
    for axis, shape in {3: (1, 6, 5, 2), 1: (1, 4, 5, 3)}.items():
        joined = list(SHAPE)
        joined[axis] += shape[axis]
        other = dataclasses.replace(x, name="y", shape=shape)
        out = dataclasses.replace(same, shape=tuple(joined))
        found[f"CONCATENATION {axis}"] = graph_of(
            "CONCATENATION", [x, other], out, axis=axis, activation=None
        )
    for shape in ((1, 90), (1, 30, 3), (1, 5, 6, 3), (1, 3, 30, 1)):
        out = dataclasses.replace(same, shape=shape)
        found[f"RESHAPE {shape}"] = graph_of("RESHAPE", [x, constant("to", shape)], out)
    vector = dataclasses.replace(x, shape=(1, 90))
    found["RESHAPE to an image"] = graph_of("RESHAPE", [vector, constant("to", SHAPE)], same)
    amounts = constant("amounts", [(0, 0), (1, 2), (0, 3), (0, 0)])
    found["PAD"] = graph_of("PAD", [x, amounts], dataclasses.replace(same, shape=(1, 9, 8, 3)))
    limits = [constant("begin", [0, 1, 2, 0]), constant("size", [1, 4, 3, 3])]
    found["SLICE"] = graph_of("SLICE", [x, *limits], dataclasses.replace(same, shape=(1, 4, 3, 3)))
    for order in ((0, 2, 1, 3), (0, 3, 1, 2)):
        out = dataclasses.replace(same, shape=tuple(SHAPE[axis] for axis in order))
        found[f"TRANSPOSE {order}"] = graph_of("TRANSPOSE", [x, constant("order", order)], out)
    for size in ((12, 10), (7, 13)):
        out = dataclasses.replace(same, shape=(1, *size, 3))
        options = {"align_corners": False, "half_pixel_centers": False}
        found[f"RESIZE_NEAREST_NEIGHBOR {size}"] = graph_of(
            "RESIZE_NEAREST_NEIGHBOR", [x, constant("size", size)], out, **options
        )
    other = dataclasses.replace(x, name="y")
    for op in ("MAXIMUM", "MINIMUM"):
        found[op] = graph_of(op, [x, other], same)
    for op in ("RELU", "RELU6"):
        found[op] = graph_of(op, [x], tensor("out", SHAPE, x.scale, x.zero_point))
    found["LOGISTIC"] = graph_of("LOGISTIC", [x], tensor("out", SHAPE, 1 / 256, -128))
    found["TANH"] = graph_of("TANH", [x], tensor("out", SHAPE, 1 / 128, 0))
    smaller = tensor("out", SHAPE, 0.021, -40)
    found["GELU"] = graph_of("GELU", [x], smaller, approximate=False)
    found["LEAKY_RELU"] = graph_of("LEAKY_RELU", [x], smaller, alpha=float(np.float32(0.1)))
    for shape in ((1, 300), SHAPE):
        source = tensor("x", shape, 0.09, 12)
        found[f"SOFTMAX {shape}"] = graph_of(
            "SOFTMAX", [source], tensor("out", shape, 1 / 256, -128), beta=1.0
        )
    found["QUANTIZE"] = graph_of("QUANTIZE", [x], smaller)
    pixels = tensor("x", SHAPE, 1.0, 0, "uint8")
    found["QUANTIZE uint8"] = graph_of("QUANTIZE", [pixels], tensor("out", SHAPE, 1.0, -128))
    real = tensor("x", SHAPE, dtype="float32")
    found["QUANTIZE float32"] = graph_of("QUANTIZE", [real], smaller)
    found["DEQUANTIZE"] = graph_of("DEQUANTIZE", [x], tensor("out", SHAPE, dtype="float32"))
    return found


CASES = cases()
# What the kernels round in a way of their own, and the share of codes that may differ, by 1.
INEXACT = {"AVERAGE_POOL_2D": 0.25, "LEAKY_RELU": 0.12, "QUANTIZE": 0.15}
NEARLY = ("ADD", "SUB", "MEAN", "SOFTMAX", "LOGISTIC", "TANH", "GELU")  # close to ties


def random_inputs(graph, rng):
    found = {}
    for name in graph.inputs:
        made = graph.tensors[name]
        if made.dtype == "float32":
            found[name] = rng.normal(0, 1, made.shape).astype(np.float32)
        else:
            limits = np.iinfo(made.dtype)
            codes = rng.integers(limits.min, limits.max + 1, made.shape)
            found[name] = codes.astype(made.dtype)
    return found


def differences(graph, content, rng, level="all", count=5):
    """Returns |code - simulated code| of random inputs."""
    runner = session(content, level)
    distances = []
    for _ in range(count):
        inputs = random_inputs(graph, rng)
        (found,) = runner.run(None, inputs)
        wanted = kernels.run(graph, inputs)[graph.outputs[0]]
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
        distances.append(np.abs(found.astype(np.float64) - wanted.astype(np.float64)))
    return np.concatenate(distances)


def test_every_operation_is_here():
    tested = {graph.nodes[0].op for graph in CASES.values()}
    assert tested == set(common.OPERATIONS)


@pytest.mark.parametrize(
    "level", ["all", *(pytest.param(each, marks=pytest.mark.slow) for each in ("basic", "none"))]
)
@pytest.mark.parametrize("case", CASES)
def test_the_exact_form_has_the_kernels_codes(case, level, rng):
    content = onnx_file.write(CASES[case], "exact")
    onnx.checker.check_model(onnx.load_model_from_string(content), full_check=True)
    assert differences(CASES[case], content, rng, level).max() == 0


@pytest.mark.parametrize("case", CASES)
def test_qdq_has_most_of_the_kernels_codes(case, rng):
    graph = CASES[case]
    op = graph.nodes[0].op
    content = onnx_file.write(graph)
    onnx.checker.check_model(onnx.load_model_from_string(content), full_check=True)
    distance = differences(graph, content, rng, count=20)
    if case == "QUANTIZE" or op in INEXACT and op != "QUANTIZE":
        assert distance.max() <= 1 and (distance > 0).mean() < INEXACT[op]
    elif op in NEARLY:
        assert distance.max() <= 1 and (distance > 0).mean() < 0.02
    else:
        assert distance.max() == 0


def reals(graph, codes):
    """Returns {name: real numbers} of {name: codes}."""
    found = {}
    for name, values in codes.items():
        made = graph.tensors[name]
        real = made.quantization is not None
        found[name] = (values - np.float64(made.zero_point)) * made.scale if real else values
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_form_in_float16_is_the_operation_on_real_numbers(case, rng):
    graph = CASES[case]
    if case == "FULLY_CONNECTED large bias":
        with pytest.raises(ValueError, match=r"weights or biases reach .* float16 cannot hold"):
            onnx_file.write(graph, "float16")
        return
    content = onnx_file.write(graph, "float16")
    onnx.checker.check_model(onnx.load_model_from_string(content), full_check=True)
    inputs = random_inputs(graph, rng)
    given = {name: each.astype(np.float16) for name, each in reals(graph, inputs).items()}
    (found,) = session(content).run(None, given)
    wanted = kernels.run(graph, inputs)
    (output,) = graph.outputs
    made = graph.tensors[output]
    scale = made.scale if made.quantization else 1.0
    if made.quantization:  # nothing bounds real numbers
        limits = np.iinfo(made.dtype)
        codes = found / np.float64(scale) + made.zero_point
        found = reals(graph, {output: np.clip(codes, limits.min, limits.max)})[output]
    assert found.shape == wanted[output].shape
    assert np.abs(found - reals(graph, wanted)[output]).max() < 0.8 * scale


# Alone in a network, between a Transpose at either end, they are no operation of the HTP's.
NOT_ON_HTP = ("TRANSPOSE (0, 2, 1, 3)", "TRANSPOSE (0, 3, 1, 2)", "QUANTIZE float32", "DEQUANTIZE")


@pytest.mark.slow
@pytest.mark.usefixtures("qualcomm")
@pytest.mark.parametrize("case", CASES)
def test_qdq_on_the_emulated_htp(case, rng):
    from lowbit.devices import hexagon

    graph = CASES[case]
    codes = [random_inputs(graph, rng) for _ in range(4)]
    inputs = [np.concatenate([each[name] for each in codes]) for name in graph.inputs]
    if case in NOT_ON_HTP:
        with pytest.raises(
            hexagon.RefusedError, match="does not take .*nothing may run on the CPU"
        ):
            hexagon.run(graph, inputs)
        return
    (found,) = hexagon.run(graph, inputs).outputs
    wanted = np.concatenate([kernels.run(graph, each)[graph.outputs[0]] for each in codes])
    distance = np.abs(found.astype(int) - wanted)
    op = graph.nodes[0].op
    share = {"AVERAGE_POOL_2D": 0.25, "MUL": 0.12}.get(op, 0.06)
    most = 4 if "built-in" in case else 1
    assert distance.max() <= most and (distance > 0).mean() <= share


@pytest.mark.parametrize("op", ["ADD", "SUB", "MUL"])
def test_all_pairs_of_codes(op):
    every = np.arange(-128, 128, dtype=np.int8)
    shape = (1, 256, 256, 1)
    # Scales in no simple ratio, so that hardly a sum is a tie.
    first, second = tensor("x", shape, 0.03123457, -11), tensor("y", shape, 0.04434217, 25)
    out = tensor("out", shape, 0.06117171, -20)
    graph = graph_of(op, [first, second], out, activation=None)
    inputs = {
        "x": np.broadcast_to(every[None, :, None, None], shape).copy(),
        "y": np.broadcast_to(every[None, None, :, None], shape).copy(),
    }
    wanted = kernels.run(graph, inputs)["out"]
    (found,) = session(onnx_file.write(graph, "exact")).run(None, inputs)
    np.testing.assert_array_equal(found, wanted)
    (found,) = session(onnx_file.write(graph)).run(None, inputs)
    assert (found != wanted).sum() <= 8


def branching():
    """Returns a network with what the small graphs lack: a branch, a flatten, a normalization."""
    image = keras.Input((16, 12, 3))
    x = keras.layers.Conv2D(8, 3, strides=2, padding="same", use_bias=False)(image)
    x = keras.layers.ReLU(6.0)(keras.layers.BatchNormalization()(x))
    y = keras.layers.DepthwiseConv2D(3, padding="same")(x)
    y = keras.layers.Conv2D(8, 1)(y)
    x = keras.layers.Concatenate()([keras.layers.Add()([x, y]), y])
    x = keras.layers.MaxPooling2D(2)(x)
    x = keras.layers.Dense(24, activation="relu")(keras.layers.Flatten()(x))
    return keras.Model(image, keras.layers.Softmax()(keras.layers.Dense(10)(x)))


@pytest.fixture(scope="module")
def network():
    """Returns (graph, input codes) of a quantized network."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    placed = placement.place(branching(), spec.scheme("w8a8"))
    images = rng.normal(0, 0.4, (24, 16, 12, 3)).astype(np.float32)
    calibration.calibrate(placed, np.split(images, 2))
    graph = lowering.lower(placed, "a test")
    limits = np.iinfo(np.int8)
    return graph, rng.integers(limits.min, limits.max + 1, (24, 16, 12, 3)).astype(np.int8)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("layout", onnx_file.LAYOUTS)
def test_a_network_in_the_exact_form(network, layout, level):
    graph, codes = network
    runner = session(onnx_file.write(graph, "exact", layout=layout), level)
    wanted = kernels.run(graph, {graph.inputs[0]: codes})[graph.outputs[0]]
    outside = codes if layout == "NHWC" else np.moveaxis(codes, 3, 1)
    found = [runner.run(None, {graph.inputs[0]: image[None]})[0] for image in outside]
    np.testing.assert_array_equal(np.concatenate(found), wanted)


@pytest.mark.parametrize("activations", onnx_file.ACTIVATIONS)
def test_a_network_in_qdq_is_fused(network, activations, tmp_path):
    graph, codes = network
    content = onnx_file.write(graph, activations=activations)
    options = runtime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    # Not both: there is no kernel of int8 activations and uint8 weights.
    entry = {"uint8": "session.x64quantprecision", "int8": "session.qdqisint8allowed"}[activations]
    options.add_session_config_entry(entry, "1")
    runner = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    operators = {node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node}
    assert {"QLinearConv", "QLinearAdd", "QGemm"} <= operators
    assert not {"Conv", "Gemm", "Add"} & operators
    wanted = kernels.run(graph, {graph.inputs[0]: codes})[graph.outputs[0]]
    found = [runner.run(None, {graph.inputs[0]: image[None]})[0] for image in codes]
    distance = np.abs(np.concatenate(found).astype(int) - wanted)
    assert distance.max() <= 3 and (distance > 0).mean() < 0.2


@pytest.mark.parametrize("form", ["qdq", "exact"])
@pytest.mark.parametrize("io", ["float32", "uint8"])
def test_other_inputs_and_outputs(network, form, io, rng):
    graph, _ = network
    if io == "float32":
        graph = boundary.with_float_io(graph)
    else:
        graph = boundary.with_pixel_io(graph, preprocess.parse("tf"))
    distance = differences(graph, onnx_file.write(graph, form), rng, count=10)
    if form == "exact":
        assert distance.max() == 0
    else:
        scale = graph.tensors[graph.nodes[-1].inputs[0]].scale if io == "float32" else 1
        assert distance.max() <= 3.01 * scale


def test_the_same_graph_gives_the_same_bytes_and_keeps_its_facts(network):
    graph, _ = network
    for form in onnx_file.FORMS:
        first = onnx_file.write(graph, form, {"preprocess": "tf"})
        assert first == onnx_file.write(graph, form, {"preprocess": "tf"})
        assert onnx_file.read_manifest(first) == {"preprocess": "tf"}
        assert onnx_file.read_manifest(onnx_file.write(graph, form)) == {}


def test_weights_stay_in_one_byte(network):
    graph, _ = network
    codes = sum(each.data.nbytes for each in graph.tensors.values() if each.data is not None)
    for form in ("qdq", "exact"):
        assert len(onnx_file.write(graph, form)) < codes + 25000
    assert len(onnx_file.write(graph, "float16")) > 2 * codes


def test_what_has_no_form_is_named():
    x = tensor("x", SHAPE, 0.1, dtype="int16")
    wide = graph_of("RELU", [x], dataclasses.replace(x, name="out"))
    with pytest.raises(ValueError, match=r"node node \(RELU\): tensor x is int16"):
        onnx_file.write(wide)
    with pytest.raises(ValueError, match="no ONNX form of ELU; known are ADD"):
        onnx_file.write(graph_of("ELU", [x], dataclasses.replace(x, name="out")))
    with pytest.raises(ValueError, match="'fast' is not one of"):
        onnx_file.write(CASES["RELU"], "fast")


def test_the_tool(network, tmp_path):
    graph, _ = network
    path = tmp_path / "model.tflite"
    path.write_bytes(tflite_file.write(graph, {"preprocess": "tf"}))
    output = tmp_path / "model.onnx"
    row = onnx_export.export(
        onnx_export.Config(str(path), str(output), form="exact", layout="NCHW", check=3)
    )
    assert row["outputs_compared"] == 30 and row["outputs_differing"] == 0
    assert row["size_bytes"] == output.stat().st_size
    facts = onnx_file.read_manifest(output.read_bytes())
    assert facts["preprocess"] == "tf" and facts["form"] == "exact"
    row = onnx_export.export(onnx_export.Config(str(path), str(output)))
    assert row["activations"] == "uint8" and "outputs_compared" not in row
