"""The checker: each fault, in a real file that has it, is named with its tensor or operation."""

import dataclasses
import json
import os
import subprocess
import sys

import flatbuffers
import hypothesis
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from hypothesis import strategies

from export import check, graph_json, summary
from lowbit import integer_graph, kernels, lint, runtimes, tflite_file

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CONV = {"strides": (1, 1), "dilations": (1, 1), "padding": "SAME", "activation": None}
POOL = {"filter": (2, 2), "strides": (2, 2), "padding": "VALID", "activation": None}


# No shrinking: a failure would take a minute to be told.
BOUNDED = hypothesis.settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
)


# --- a clean network, and one thing changed in it -----------------------------------------------


def quantization(scale, zero_point=0, axis=None):
    scale = np.atleast_1d(np.asarray(scale, np.float32))
    zero_point = np.broadcast_to(np.int64(zero_point), scale.shape).copy()
    return integer_graph.Quantization(scale, zero_point, axis)


def activation(name, shape, scale=0.1, zero_point=0, dtype="int8"):
    mapping = None if dtype == "float32" else quantization(scale, zero_point)
    return integer_graph.Tensor(name, tuple(shape), dtype, mapping)


def constant(name, data, scale=None, axis=None):
    mapping = None if scale is None else quantization(scale, 0, axis)
    return integer_graph.Tensor(name, data.shape, data.dtype.name, mapping, data)


def weighted(name, shape, axis, input_scale):
    """Kernel and bias, one scale per channel."""
    rng = np.random.default_rng(len(name))
    scale = np.linspace(0.002, 0.004, shape[axis]).astype(np.float32)
    return (
        constant(f"{name}/kernel", rng.integers(-127, 128, shape).astype(np.int8), scale, axis),
        constant(
            f"{name}/bias",
            rng.integers(-99, 99, shape[axis]).astype(np.int32),
            np.float32(input_scale) * scale,
            0,
        ),
    )


def node(op, inputs, output, **attributes):
    return integer_graph.Node(op, output, tuple(inputs), (output,), attributes)


def clean_graph() -> integer_graph.IntegerGraph:
    """conv, depthwise, add, pool, concat, reshape, dense, softmax; int8 in and out."""
    tensors = [
        activation("x", (1, 4, 4, 3), 0.02, -1),
        *weighted("conv", (4, 3, 3, 3), 0, 0.02),
        activation("conv", (1, 4, 4, 4), 0.05, 3),
        *weighted("depthwise", (1, 3, 3, 4), 3, 0.05),
        activation("depthwise", (1, 4, 4, 4), 0.06, -4),
        activation("add", (1, 4, 4, 4), 0.07, 5),
        activation("pool", (1, 2, 2, 4), 0.07, 5),
        activation("concat", (1, 2, 2, 8), 0.07, 5),
        constant("flat/shape", np.array([1, 32], np.int32)),
        activation("flat", (1, 32), 0.07, 5),
        *weighted("dense", (5, 32), 0, 0.07),
        activation("logits", (1, 5), 0.1, 9),
        activation("output", (1, 5), 1 / 256, -128),
    ]
    nodes = (
        node("CONV_2D", ("x", "conv/kernel", "conv/bias"), "conv", **CONV),
        node(
            *("DEPTHWISE_CONV_2D", ("conv", "depthwise/kernel", "depthwise/bias"), "depthwise"),
            **CONV,
            depth_multiplier=1,
        ),
        node("ADD", ("conv", "depthwise"), "add", activation=None),
        node("MAX_POOL_2D", ("add",), "pool", **POOL),
        node("CONCATENATION", ("pool", "pool"), "concat", axis=3, activation=None),
        node("RESHAPE", ("concat", "flat/shape"), "flat", new_shape=(1, 32)),
        node(
            *("FULLY_CONNECTED", ("flat", "dense/kernel", "dense/bias"), "logits"),
            activation=None,
            keep_num_dims=False,
        ),
        node("SOFTMAX", ("logits",), "output", beta=1.0),
    )
    by_name = {tensor.name: tensor for tensor in tensors}
    return integer_graph.IntegerGraph(by_name, nodes, ("x",), ("output",))


CLEAN = clean_graph()
MANIFEST = {"scheme": "w8a8", "preprocess": "tf", "io": "int8", "versions": {"lowbit": "0.1.0"}}
CONTENT = tflite_file.write(CLEAN, MANIFEST)


def replaced(*tensors) -> integer_graph.IntegerGraph:
    """The clean graph with tensors of these names instead of its own."""
    changed = CLEAN.tensors | {tensor.name: tensor for tensor in tensors}
    return dataclasses.replace(CLEAN, tensors=changed)


def with_tensor(name, **fields) -> list[str]:
    tensor = dataclasses.replace(CLEAN.tensors[name], **fields)
    return lint.faults(tflite_file.write(replaced(tensor)))


def with_scale(name, scale=None, zero_point=None) -> list[str]:
    mapping = CLEAN.tensors[name].quantization
    scale = mapping.scale if scale is None else np.asarray(scale, np.float32)
    zero_point = mapping.zero_point if zero_point is None else np.asarray(zero_point, np.int64)
    changed = integer_graph.Quantization(scale, zero_point, mapping.axis)
    return with_tensor(name, quantization=changed)


def single(op, inputs, output, **attributes) -> list[str]:
    """The faults of a file with one operation."""
    tensors = {tensor.name: tensor for tensor in (*inputs, output)}
    free = tuple(tensor.name for tensor in inputs if tensor.data is None)
    made = node(op, tuple(tensor.name for tensor in inputs), output.name, **attributes)
    return lint.faults(
        tflite_file.write(integer_graph.IntegerGraph(tensors, (made,), free, (output.name,)))
    )


def edited(edit, content=CONTENT) -> bytes:
    """The file after `edit(model)` changed the flatbuffer's objects."""
    model = tflite_file.parse(content)
    edit(model)
    builder = flatbuffers.Builder(len(content))
    builder.Finish(model.Pack(builder), file_identifier=tflite_file.FILE_IDENTIFIER)
    return bytes(builder.Output())


def edited_tensor(name, **fields) -> list[str]:
    def edit(model):
        (tensor,) = [t for t in model.subgraphs[0].tensors if t.name == name.encode()]
        for field, value in fields.items():
            target = tensor if hasattr(tensor, field) else tensor.quantization
            setattr(target, field, value)

    return lint.faults(edited(edit))


def renamed_operation(op, to, content=CONTENT) -> bytes:
    """The file with another operation in the place of `op`, as tools with more operations make."""

    def edit(model):
        (code,) = [
            code
            for code in model.operatorCodes
            if code.builtinCode == tflite_file.OPERATOR_NUMBERS[op]
        ]
        code.builtinCode = tflite_file.OPERATOR_NUMBERS[to]
        code.deprecatedBuiltinCode = min(code.builtinCode, 127)

    return edited(edit, content)


def assert_only(found, *words):
    """Asserts that there is one fault, a line that has each of the words."""
    assert len(found) == 1, found
    assert "\n" not in found[0]
    for word in words:
        assert word in found[0], found[0]


# --- no fault -----------------------------------------------------------------------------------


def test_a_clean_file_has_no_fault():
    for io in ("any", "int8"):
        assert lint.faults(CONTENT, "m.tflite", io) == []


def with_boundary(dtype) -> integer_graph.IntegerGraph:
    """The clean graph with QUANTIZE and DEQUANTIZE (or a second QUANTIZE) at its edges."""
    outer = [activation("in", (1, 4, 4, 3), 0.02, 127, dtype)]
    outer.append(activation("out", (1, 5), 1 / 256, 0, dtype))
    last = "DEQUANTIZE" if dtype == "float32" else "QUANTIZE"
    nodes = (node("QUANTIZE", ("in",), "x"), *CLEAN.nodes, node(last, ("output",), "out"))
    return dataclasses.replace(replaced(*outer), nodes=nodes, inputs=("in",), outputs=("out",))


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_conversions_at_the_edge_are_no_fault_where_io_allows_them(dtype):
    content = tflite_file.write(with_boundary(dtype))
    assert lint.faults(content) == []
    assert lint.faults(content, io=dtype) == []
    found = lint.faults(content, io="int8")
    assert len(found) == 2
    assert f"tensor 'in': input is {dtype}, --io=int8" in found[0]
    assert f"tensor 'out': output is {dtype}, --io=int8" in found[1]
    assert len(lint.faults(CONTENT, io=dtype)) == 2


def test_an_unknown_io_is_refused():
    with pytest.raises(ValueError, match="int4.*any, int8, int16, uint8, float32"):
        lint.faults(CONTENT, io="int4")


# --- float --------------------------------------------------------------------------------------


def test_a_float_tensor_inside_is_named_with_its_neighbours():
    middle = activation("middle", (1, 4, 4, 4), dtype="float32")
    nodes = (
        CLEAN.nodes[0],
        node("DEQUANTIZE", ("conv",), "middle"),
        node("QUANTIZE", ("middle",), "again"),
        *CLEAN.nodes[1:],
    )
    graph = replaced(middle, activation("again", (1, 4, 4, 4), 0.05, 3))
    found = lint.faults(tflite_file.write(dataclasses.replace(graph, nodes=nodes)))
    assert len(found) == 3
    assert "tensor 'middle': float32 inside the graph, made by DEQUANTIZE 1" in found[0]
    assert "read by QUANTIZE 2 (makes 'again')" in found[0]
    assert "DEQUANTIZE 1 (makes 'middle'): int8 to float32 inside the graph" in found[1]
    assert "QUANTIZE 2 (makes 'again'): float32 to int8 inside the graph" in found[2]


def test_a_float_input_that_a_kernel_reads_is_a_fault():
    source = activation("x", (1, 5), dtype="float32")
    found = single("SOFTMAX", [source], activation("y", (1, 5), 1 / 256, -128), beta=1.0)
    assert_only(found, "tensor 'x': float32 inside the graph, read by SOFTMAX 0 (makes 'y')")


def test_float16_weights_are_a_fault():
    half = np.ones((4,), np.float16)
    assert_only(
        lint.faults(tflite_file.write(replaced(constant("half", half)))),
        "tensor 'half': float16 inside the graph",
    )


def test_a_float_output_that_is_read_again_is_a_fault():
    graph = with_boundary("float32")
    nodes = (*graph.nodes, node("QUANTIZE", ("out",), "codes"))
    graph = dataclasses.replace(
        graph,
        nodes=nodes,
        tensors=graph.tensors | {"codes": activation("codes", (1, 5))},
        outputs=("out", "codes"),
    )
    assert_only(lint.faults(tflite_file.write(graph)), "tensor 'out': float32 inside the graph")


def test_requantizing_int8_inside_is_a_fault():
    nodes = (
        CLEAN.nodes[0],
        node("QUANTIZE", ("conv",), "again"),
        *(
            dataclasses.replace(
                each, inputs=tuple("again" if name == "conv" else name for name in each.inputs)
            )
            for each in CLEAN.nodes[1:]
        ),
    )
    graph = dataclasses.replace(replaced(activation("again", (1, 4, 4, 4), 0.05, 3)), nodes=nodes)
    assert_only(
        lint.faults(tflite_file.write(graph)),
        "QUANTIZE 1 (makes 'again'): int8 to int8 inside the graph; give its two sides one range",
    )


# --- shapes and bytes ---------------------------------------------------------------------------


def test_a_dynamic_batch_is_one_fault_of_the_input():
    def edit(model):
        for tensor in model.subgraphs[0].tensors:
            if tensor.name in (b"x", b"conv", b"output"):
                tensor.shapeSignature = [-1, *tensor.shape[1:].tolist()]

    assert_only(
        lint.faults(edited(edit)),
        "tensor 'x': dynamic batch (-1, 4, 4, 3), and 2 tensors behind it",
    )


def test_a_dynamic_size_inside_is_named():
    found = edited_tensor("pool", shapeSignature=[1, -1, 2, 4])
    assert_only(found, "tensor 'pool': dynamic shape (1, -1, 2, 4)")


def test_a_shape_below_zero_is_named():
    found = edited_tensor("pool", shape=np.array([1, -2, 2, 4], np.int32))
    assert_only(found, "tensor 'pool': dynamic shape (1, -2, 2, 4)")
    found = edited_tensor(
        "pool", shape=np.array([1, -2, 2, 4], np.int32), shapeSignature=[1, 2, 2, 4]
    )
    assert_only(found, "tensor 'pool': shape (1, -2, 2, 4) has a size below 0")


def test_a_buffer_of_another_length_is_named():
    def edit(model):
        (tensor,) = [t for t in model.subgraphs[0].tensors if t.name == b"dense/kernel"]
        model.buffers[tensor.buffer].data = np.zeros(159, np.uint8)

    found = lint.faults(edited(edit))
    assert_only(found, "tensor 'dense/kernel': 159 bytes, 160 needed for int8 (5, 32)")


def test_packed_weights_have_half_a_byte_each():
    def edit(model):
        (tensor,) = [t for t in model.subgraphs[0].tensors if t.name == b"dense/kernel"]
        tensor.type = tflite_file.DTYPE_NUMBERS["int4"]
        model.buffers[tensor.buffer].data = np.zeros(80, np.uint8)
        for code in model.operatorCodes:
            if code.builtinCode == tflite_file.OPERATOR_NUMBERS["FULLY_CONNECTED"]:
                code.version = 10

    assert lint.faults(edited(edit)) == []


# --- scales and zero points ---------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, -0.1, np.nan, np.inf])
def test_a_scale_that_is_not_finite_and_positive_is_named(value):
    found = with_scale("dense/kernel", [0.002, 0.0025, value, 0.0035, 0.004])
    assert (
        f"tensor 'dense/kernel': scale {np.float32(value)} of channel 2 is not finite" in found[0]
    )
    found = with_scale("conv", [value])
    assert found[0].startswith(
        f"tensor 'conv': scale {np.float32(value)} is not finite and above 0"
    )


def test_a_zero_point_outside_the_dtype_is_named():
    found = with_scale("add", zero_point=[200])
    assert "tensor 'add': zero point 200 is outside int8, [-128, 127]" in found[0]
    found = single("QUANTIZE", [activation("x", (1, 2), 0.1, -1, "uint8")], activation("y", (1, 2)))
    assert_only(found, "tensor 'x': zero point -1 is outside uint8, [0, 255]")


def test_int16_activations_with_a_zero_point_are_a_fault():
    tensors = [activation(name, (1, 2), 0.1, 0, "int16") for name in ("x", "y")]
    assert single("ADD", [tensors[0], tensors[0]], tensors[1], activation=None) == []
    tensors[1] = activation("y", (1, 2), 0.1, -3, "int16")
    found = single("ADD", [tensors[0], tensors[0]], tensors[1], activation=None)
    assert_only(found, "tensor 'y': zero point -3, int16 kernels take 0 only")


def test_an_activation_without_a_scale_is_a_fault():
    assert "tensor 'add': int8 without a scale" in with_tensor("add", quantization=None)[0]


def test_an_activation_with_scales_per_channel_is_a_fault():
    found = with_tensor("logits", quantization=quantization(np.full(5, 0.1), 9, 1))
    assert "tensor 'logits': 5 scales on an activation" in found[0]


def test_zero_points_and_scales_of_different_number_are_a_fault():
    found = edited_tensor("dense/kernel", zeroPoint=np.zeros(3, np.int64))
    assert_only(found, "tensor 'dense/kernel': 3 zero points for 5 scales")


def test_scales_that_are_not_one_per_channel_are_a_fault():
    found = with_tensor("dense/kernel", quantization=quantization([0.002, 0.004], 0, 0))
    assert "tensor 'dense/kernel': 2 scales, axis 0 has 5 channels" in found[0]


def test_an_axis_that_the_tensor_lacks_is_a_fault():
    found = edited_tensor("dense/kernel", quantizedDimension=2)
    assert "tensor 'dense/kernel': quantized_dimension 2 is no axis of (5, 32)" in found[0]


# --- weights, bias, multiplier ------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, op, axis, wrong",
    [
        ("conv/kernel", "CONV_2D", 0, 3),
        ("depthwise/kernel", "DEPTHWISE_CONV_2D", 3, 0),
        ("dense/kernel", "FULLY_CONNECTED", 0, 1),
    ],
)
def test_the_wrong_axis_of_weights_is_a_fault(name, op, axis, wrong):
    found = edited_tensor(name, quantizedDimension=wrong)
    expected = f"tensor '{name}' of {op}: quantized_dimension {wrong}, the kernel takes {axis}"
    assert expected in found


def transpose_conv(axis) -> bytes:
    """A TRANSPOSE_CONV, which the writer does not know: a FULLY_CONNECTED's inputs, shuffled."""
    kernel, bias = weighted("up", (3, 2, 2, 4), axis, 0.1)
    tensors = [
        constant("shape", np.array([1, 8, 8, 3], np.int32)),
        *(kernel, activation("x", (1, 4, 4, 4), 0.1), bias, activation("y", (1, 8, 8, 3), 0.2)),
    ]
    made = node(
        *("ADD", ("x", "up/kernel", "shape", "up/bias"), "y"),
        activation=None,
    )
    graph = integer_graph.IntegerGraph({t.name: t for t in tensors}, (made,), ("x",), ("y",))

    def edit(model):
        operator = model.subgraphs[0].operators[0]
        first, second, third, fourth = operator.inputs
        operator.inputs = [third, second, first, fourth]

    return edited(edit, renamed_operation("ADD", "TRANSPOSE_CONV", tflite_file.write(graph)))


def test_transposed_convolutions_have_their_channels_first():
    assert lint.faults(transpose_conv(0)) == []
    found = lint.faults(transpose_conv(3))
    assert (
        "tensor 'up/kernel' of TRANSPOSE_CONV: quantized_dimension 3, the kernel takes 0" in found
    )


def test_a_zero_point_of_weights_is_a_fault():
    found = with_scale("conv/kernel", zero_point=[0, 0, 2, 0])
    assert_only(found, "tensor 'conv/kernel' of CONV_2D: weight zero point 2 of channel 2")


def test_weights_without_a_scale_are_a_fault():
    expected = "tensor 'conv/kernel' of CONV_2D: int8 weights without a scale"
    assert with_tensor("conv/kernel", quantization=None) == [expected]


def test_weights_of_minus_128_are_a_fault():
    data = CLEAN.tensors["conv/kernel"].data.copy()
    data[1, 0, 0, :2] = -128
    found = with_tensor("conv/kernel", data=data)
    assert_only(found, "tensor 'conv/kernel' of CONV_2D: 2 weights of -128")


def test_a_bias_of_the_wrong_dtype_is_a_fault():
    data = CLEAN.tensors["conv/bias"].data.astype(np.int64)
    found = with_tensor("conv/bias", data=data, dtype="int64")
    assert_only(found, "tensor 'conv/bias' of CONV_2D: int64 bias, int8 activations take int32")
    data = data.astype(np.float32)
    found = with_tensor("conv/bias", data=data, dtype="float32", quantization=None)
    assert any("tensor 'conv/bias' of CONV_2D: float32 bias" in fault for fault in found)


def wide_dense(bias_dtype) -> list[str]:
    kernel, bias = weighted("dense", (5, 8), 0, 0.01)
    bias = dataclasses.replace(bias, dtype=bias_dtype, data=bias.data.astype(bias_dtype))
    source = activation("x", (1, 8), 0.01, 0, "int16")
    target = activation("y", (1, 5), 0.01, 0, "int16")
    options = {"activation": None, "keep_num_dims": False}
    return single("FULLY_CONNECTED", [source, kernel, bias], target, **options)


def test_int16_activations_take_a_wide_bias():
    assert wide_dense("int64") == wide_dense("int32") == []
    expected = "tensor 'dense/bias' of FULLY_CONNECTED: int16 bias, int16 activations take int64"
    assert_only(wide_dense("int16"), expected)


def test_a_bias_scale_that_is_not_the_product_is_a_fault():
    scale = CLEAN.tensors["dense/bias"].quantization.scale.astype(np.float64)
    assert with_scale("dense/bias", scale * (1 + 4e-7)) == []
    scale[3] *= 1 + 4e-6
    found = with_scale("dense/bias", scale)
    assert_only(found, "tensor 'dense/bias' of FULLY_CONNECTED: bias scale", "of channel 3 is not")


def test_the_scale_of_a_bias_of_zeros_does_not_matter():
    tensor = CLEAN.tensors["dense/bias"]
    scale = quantization(tensor.quantization.scale * 2, 0, 0)
    assert with_tensor("dense/bias", data=tensor.data * 0, quantization=scale) == []


def test_a_bias_without_a_scale_or_with_too_few_is_a_fault():
    expected = "tensor 'dense/bias' of FULLY_CONNECTED: bias without a scale"
    assert with_tensor("dense/bias", quantization=None) == [expected]
    found = with_tensor("dense/bias", quantization=quantization([0.1, 0.2], 0, 0))
    assert "tensor 'dense/bias' of FULLY_CONNECTED: 2 bias scales for 5 weight scales" in found


def test_a_zero_point_of_a_bias_is_a_fault():
    found = with_scale("dense/bias", zero_point=[0, 0, 0, 0, 7])
    assert_only(found, "tensor 'dense/bias' of FULLY_CONNECTED: bias zero point 7 is not 0")


@pytest.mark.parametrize("code", [2**31 - 1, -(2**31) + 1, -(2**31)])
def test_a_saturated_bias_is_a_fault(code):
    data = CLEAN.tensors["conv/bias"].data.copy()
    data[2] = code
    found = with_tensor("conv/bias", data=data)
    assert_only(found, f"tensor 'conv/bias' of CONV_2D: bias code {code} of channel 2 is saturated")


@pytest.mark.parametrize("weight_scale", [2.0**11, 2.0**-40])
def test_a_multiplier_out_of_bounds_names_the_channel(weight_scale):
    scale = CLEAN.tensors["dense/kernel"].quantization.scale.copy()
    scale[[1, 4]] = weight_scale
    kernel = dataclasses.replace(
        CLEAN.tensors["dense/kernel"], quantization=quantization(scale, 0, 0)
    )
    bias = dataclasses.replace(
        CLEAN.tensors["dense/bias"], quantization=quantization(np.float32(0.07) * scale, 0, 0)
    )
    found = lint.faults(tflite_file.write(replaced(kernel, bias)))
    assert_only(
        found,
        "FULLY_CONNECTED 6 (makes 'logits'): requantization multiplier",
        "of channel 1 (and of 1 other channels) is outside [2^-32, 256)",
    )


# --- operations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "SOFTMAX"])
def test_a_version_too_low_is_a_fault(op):
    def edit(model):
        for code in model.operatorCodes:
            if code.builtinCode == tflite_file.OPERATOR_NUMBERS[op]:
                code.version = 1

    assert_only(lint.faults(edited(edit)), f"{op} ", "operator version 1, int8 needs")


def test_a_version_higher_than_needed_is_no_fault():
    def edit(model):
        for code in model.operatorCodes:
            code.version += 5

    assert lint.faults(edited(edit)) == []


@pytest.mark.parametrize(
    "op, name", [("MAX_POOL_2D", "pool"), ("CONCATENATION", "concat"), ("RESHAPE", "flat")]
)
def test_operations_that_do_not_rescale_keep_their_scale(op, name):
    for fields in ({"scale": [0.0701]}, {"zero_point": [6]}):
        found = [fault for fault in with_scale(name, **fields) if fault.startswith(op)]
        assert found
        assert f"tensor '{name}'" in found[0]
        assert "does not rescale" in found[0]


@pytest.mark.parametrize(
    "op", [op for op, positions in lint.SAME_SCALE.items() if positions in (None, (0,))]
)
def test_each_operation_of_the_table_is_known_and_checked(op):
    tensors = [activation("x", (1, 2)), activation("y", (1, 2), 0.1, 1)]
    graph = integer_graph.IntegerGraph(
        {t.name: t for t in tensors}, (node("RELU", ("x",), "y"),), ("x",), ("y",)
    )
    found = lint.faults(renamed_operation("RELU", op, tflite_file.write(graph)))
    assert any(f"{op} does not rescale" in fault for fault in found)


@pytest.mark.parametrize(
    "op, dtype", [(op, dtype) for op, dtypes in lint.FIXED_OUTPUT.items() for dtype in dtypes]
)
def test_fixed_output_scales(op, dtype):
    scale, zero_point = lint.FIXED_OUTPUT[op][dtype]
    for factor in (1, 2):
        source = activation("x", (1, 2), 0.1, 0, dtype)
        target = activation("y", (1, 2), scale * factor, zero_point, dtype)
        graph = integer_graph.IntegerGraph(
            {"x": source, "y": target}, (node("RELU", ("x",), "y"),), ("x",), ("y",)
        )
        found = lint.faults(renamed_operation("RELU", op, tflite_file.write(graph)))
        if factor == 1:
            assert found == []
        else:
            assert_only(found, f"{op} 0 (makes 'y'): output scale and zero point")


def test_softmax_of_another_scale_is_a_fault():
    assert_only(with_scale("output", [1 / 255]), "SOFTMAX 7 (makes 'output'): output scale")


def test_an_operation_before_its_input_is_a_fault():
    nodes = (CLEAN.nodes[1], CLEAN.nodes[0], *CLEAN.nodes[2:])
    found = lint.faults(tflite_file.write(dataclasses.replace(CLEAN, nodes=nodes)))
    assert_only(found, "DEPTHWISE_CONV_2D 0", "reads tensor 'conv' before it is computed")


def test_a_tensor_that_nothing_computes_is_a_fault():
    def edit(model):
        model.subgraphs[0].operators[2].inputs = [0, 6]
        model.subgraphs[0].inputs = []

    assert_only(lint.faults(edited(edit)), "tensor 'x': is read, but nothing computes it")


def test_an_input_that_cannot_be_left_out_is_a_fault():
    def edit(model):
        model.subgraphs[0].operators[2].inputs = [3, -1]

    assert_only(lint.faults(edited(edit)), "ADD 2 (makes 'add'): lacks one of its first 2 inputs")


def test_versions_of_what_lacks_a_shape_or_inputs_are_no_stumbling_block():
    assert edited_tensor("x", shape=[])
    found = lint.faults(renamed_operation("SOFTMAX", "CONV_2D"))
    assert "CONV_2D 7 (makes 'output'): lacks one of its first 2 inputs" in found


# --- other tools' files -------------------------------------------------------------------------


@pytest.fixture(scope="module", name="float_file")
def float_file_fixture():
    """What TensorFlow's converter makes of a small float Keras model."""
    import keras
    import tensorflow as tf

    inputs = keras.Input((4, 4, 3))
    x = keras.layers.Conv2D(2, 3, activation="relu")(inputs)
    outputs = keras.layers.Dense(2)(keras.layers.Flatten()(x))
    model = keras.Model(inputs, outputs)
    function = tf.function(lambda x: model(x), input_signature=[tf.TensorSpec((1, 4, 4, 3))])
    concrete = [function.get_concrete_function()]
    return tf.lite.TFLiteConverter.from_concrete_functions(concrete, model).convert()


@pytest.mark.filterwarnings("ignore")  # of the converter
def test_a_float_file_of_the_converter_is_one_clear_fault(float_file):
    assert_only(lint.faults(float_file), "float model: none of its", "tensors is quantized")
    assert "not written by lowbit" in lint.notes(float_file)


# --- damage -------------------------------------------------------------------------------------


def check_everything(content):
    for function in (lint.faults, lint.notes):
        try:
            lines = function(content)
        except tflite_file.TFLiteFileError as error:
            lines = [str(error)]
        assert all("\n" not in line for line in lines)


@hypothesis.settings(BOUNDED, max_examples=80)
@hypothesis.given(strategies.integers(0, len(CONTENT) - 1), strategies.integers(1, 255))
def test_a_changed_byte_never_trips_the_checker(position, change):
    content = bytearray(CONTENT)
    content[position] ^= change
    check_everything(bytes(content))


def test_a_file_cut_short_never_trips_the_checker():
    for length in range(0, len(CONTENT), 37):
        check_everything(CONTENT[:length])


def test_indices_and_types_that_do_not_exist_are_named():
    def edit(model):
        subgraph = model.subgraphs[0]
        subgraph.operators[0].inputs = [0, 99, -1]
        subgraph.operators[1].opcodeIndex = 77
        subgraph.operators[2].outputs = None
        subgraph.tensors[3].type = 111
        subgraph.outputs = [-5]

    found = "; ".join(lint.faults(edited(edit)))
    assert "CONV_2D 0: tensor 99 is not among the 16 tensors" in found
    assert "operation 1: unknown operator code 77" in found
    assert "ADD 2: has no output" in found
    assert "tensor 'conv': unknown type 111" in found
    assert "the graph's input or output -5 is not among its tensors" in found


def test_a_tensor_name_stays_on_its_line():
    name = "evil\nfault: \x1b[31m" + "long" * 99
    tensor = dataclasses.replace(activation("add", (1, 4, 4, 4), 0.07, 200), name=name)

    def edit(model):
        (target,) = [t for t in model.subgraphs[0].tensors if t.name == b"add"]
        target.name, target.quantization.zeroPoint = tensor.name.encode(), [200]

    found = lint.faults(edited(edit))
    assert all(line.isprintable() for line in found)
    assert found[0].startswith("tensor 'evil?fault: ?[31mlong") and len(found[0]) < 200


def test_a_signature_of_what_does_not_exist_is_named():
    def subgraph(model):
        model.signatureDefs[0].subgraphIndex = 7

    def tensor(model):
        model.signatureDefs[0].inputs[0].tensorIndex = 99

    label = "signature 'serving_default'"
    assert_only(lint.faults(edited(subgraph)), f"{label}: subgraph 7 is none of 1")
    assert_only(lint.faults(edited(tensor)), f"{label}: tensor 99 is not among the 16 tensors")


def test_an_operation_without_an_output_is_no_damage(tmp_path):
    def edit(model):
        code = schema.OperatorCodeT()
        code.builtinCode = tflite_file.OPERATOR_NUMBERS["ASSIGN_VARIABLE"]
        code.deprecatedBuiltinCode = 127
        operator = schema.OperatorT()
        operator.opcodeIndex, operator.inputs = len(model.operatorCodes), [3, 3]
        model.operatorCodes.append(code)
        model.subgraphs[0].operators.append(operator)

    content = edited(edit)
    lint.verify(content)
    assert tflite_file.read(content).nodes[-1].name == "ASSIGN_VARIABLE#8"
    row = summary.summarize(summary.Config(model=save(tmp_path, content)))
    assert row["operations"] == 9


def test_what_an_interpreter_cannot_check_is_refused_before_it():
    lint.verify(CONTENT)
    rng = np.random.default_rng(0)

    def index(model):
        model.signatureDefs[0].subgraphIndex = 1

    def order(model):
        model.subgraphs[0].operators.reverse()

    def size(model):
        model.buffers[1].data = rng.integers(0, 9, 7).astype(np.uint8)

    def left_out(model):
        model.subgraphs[0].operators[2].inputs = [3, -1]

    for edit, message in (
        (index, "subgraph 1 is none of 1"),
        (order, "before it is computed"),
        (size, "7 bytes, 108 needed"),
        (left_out, "lacks one of its first 2 inputs"),
    ):
        for function in (lint.verify, runtimes.interpreter):
            with pytest.raises(tflite_file.TFLiteFileError, match=f"model: damaged: .*{message}"):
                function(edited(edit))


@pytest.mark.parametrize("kernels_name", runtimes.KERNELS)
def test_a_file_that_kills_the_interpreter_does_not_kill_us(kernels_name):
    """SOFTMAX without an input scale: every index is right, but the reference kernel aborts."""
    runtimes.try_out(CONTENT, "m.tflite", kernels_name)

    def no_scale(model):
        model.subgraphs[0].tensors[14].quantization = None

    def two_sizes(model):
        model.subgraphs[0].tensors[0].shape = [1, 4, 4, 2]

    if kernels_name == "reference":
        with pytest.raises(ValueError, match="m.tflite: LiteRT .*dies of it: SIG"):
            runtimes.try_out(edited(no_scale), "m.tflite", kernels_name)
    with pytest.raises(ValueError, match="m.tflite: LiteRT .* refuses the model"):
        runtimes.try_out(edited(two_sizes), "m.tflite", kernels_name)


def test_a_file_without_an_output_cannot_be_run():
    def edit(model):
        model.subgraphs[0].outputs, model.signatureDefs[0].outputs = [], []

    content = edited(edit)
    runtimes.try_out(content, "m.tflite")
    with pytest.raises(ValueError, match="the model has 1 inputs and 0 outputs; 1 input and an"):
        next(runtimes.run_litert(content, [np.zeros((1, 4, 4, 3), np.float32)], threads=1))


def test_a_node_that_does_not_fit_its_tensors_is_named():
    def run(edit):
        graph = tflite_file.read(edited(edit))
        tensor = graph.tensors["x"]
        return kernels.run(graph, {"x": np.zeros(tensor.shape, np.int8)}, "reference")

    def operator(number, **fields):
        def edit(model):
            for field, value in fields.items():
                target = model.subgraphs[0].operators[number]
                setattr(target if hasattr(target, field) else target.builtinOptions, field, value)

        return edit

    def scale(model):
        model.subgraphs[0].tensors[3].quantization.scale = np.float32([np.nan])

    largest = 2**31 - 1
    for edit, message in (
        (operator(0, builtinOptions=None, builtinOptionsType=0), "'conv'.*KeyError: 'strides'"),
        (operator(0, strideH=0), r"'conv': a window of \(3, 3\) with strides \(0, 1\)"),
        (operator(0, dilationHFactor=largest), "'conv': a window of .* does not fit an image"),
        (operator(3, filterHeight=largest, padding=0), "'pool': a window of .* does not fit"),
        (operator(3, filterHeight=5), "'pool': a window of .*VALID, does not fit"),
        (operator(2, inputs=[3]), "'add' .* cannot be computed: not enough values"),
        (operator(2, outputs=[6, 7]), "'.*' .ADD.: .* has 2 outputs; its kernel computes 1"),
        (scale, "'conv' .* tensor 'conv': scale nan is not finite and above 0"),
    ):
        with pytest.raises(ValueError, match=f"node {message}"):
            run(edit)


def test_paddings_beyond_the_output_are_refused_before_memory_is_taken():
    x, y = activation("x", (1, 4, 4, 1)), activation("y", (1, 4, 4, 1))
    paddings = constant("paddings", np.array([(0, 0), (0, 2**31 - 1), (0, 0), (0, 0)], np.int32))
    graph = integer_graph.IntegerGraph(
        {"x": x, "y": y, "paddings": paddings},
        (node("PAD", ("x", "paddings"), "y"),),
        ("x",),
        ("y",),
    )
    with pytest.raises(ValueError, match="node 'y': makes .*, its tensor is"):
        kernels.run(graph, {"x": np.zeros((1, 4, 4, 1), np.int8)})


def test_a_batch_is_not_padded():
    tensors = (
        activation("x", (1, 4, 4, 1)),
        constant("paddings", np.array([[0, 2**20], [0, 0], [0, 0], [0, 0]], np.int32)),
        activation("y", (1, 4, 4, 1)),
    )
    made = node("PAD", ("x", "paddings"), "y")
    graph = integer_graph.IntegerGraph({t.name: t for t in tensors}, (made,), ("x",), ("y",))
    with pytest.raises(ValueError, match="node 'y': PAD adds .0, 1048576. to the batch axis"):
        kernels.run(graph, {"x": np.zeros((1, 4, 4, 1), np.int8)})


def test_strides_beyond_the_output_are_refused_before_memory_is_taken():
    kernel, bias = weighted("up", (3, 2, 2, 4), 0, 0.1)
    size = constant("size", np.array([1, 8, 8, 3], np.int32))
    tensors = [size, kernel, activation("x", (1, 4, 4, 4)), bias, activation("y", (1, 8, 8, 3))]
    codes = np.zeros((1, 4, 4, 4), np.int8)

    def run(strides):
        made = node(
            *("TRANSPOSE_CONV", ("size", "up/kernel", "x", "up/bias"), "y"),
            **{"strides": strides, "padding": "VALID", "activation": None},
        )
        graph = integer_graph.IntegerGraph({t.name: t for t in tensors}, (made,), ("x",), ("y",))
        return kernels.run(graph, {"x": codes})["y"]

    assert run((2, 2)).shape == (1, 8, 8, 3)
    with pytest.raises(ValueError, match="node 'y': strides .* do not fit an output of .8, 8"):
        run((2**31 - 1, 2))


def test_a_number_that_json_lacks_is_named(tmp_path):
    def edit(model):
        model.subgraphs[0].operators[7].builtinOptions.beta = np.nan

    config = graph_json.Config(save(tmp_path, edited(edit)), str(tmp_path / "m.json"))
    with pytest.raises(ValueError, match=r"m\.tflite: beta of SOFTMAX 'output': NaN"):
        graph_json.export(config)


# --- notes and the command ----------------------------------------------------------------------


def test_notes_tell_size_origin_and_kernels():
    notes = lint.notes(CONTENT)
    assert notes[0] == f"{len(CONTENT)} bytes, 8 operations, 16 tensors: 12 int8, 4 int32"
    assert notes[1] == "written by lowbit 0.1.0: scheme w8a8, preprocess tf, io int8"
    assert notes[2] == "7 of 8 operations run in the XNNPACK delegate"
    assert notes[3].startswith("SOFTMAX 7: built-in kernel instead of XNNPACK: the delegate takes")
    assert lint.notes(tflite_file.write(CLEAN))[1] == "not written by lowbit"


def test_notes_do_not_claim_kernels_for_operations_that_are_not_known():
    notes = lint.notes(renamed_operation("SOFTMAX", "CEIL"))
    assert notes[2] == "7 of 8 operations run in the XNNPACK delegate, 1 are not known"


def save(tmp_path, content) -> str:
    path = tmp_path / "m.tflite"
    path.write_bytes(content)
    return str(path)


def test_the_row_of_a_clean_file(tmp_path, capsys):
    row = check.check(check.Config(model=save(tmp_path, CONTENT), io="int8"))
    assert (row["tool"], row["faults"], row["first_fault"]) == ("export.check", 0, None)
    assert (row["scheme"], row["size_bytes"]) == ("w8a8", len(CONTENT))
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    captured = capsys.readouterr()
    assert captured.out == ""  # cli.run prints the row
    assert "fault:" not in captured.err


def test_faults_are_lines_on_stderr_and_the_row_is_printed(tmp_path, capsys):
    path = save(tmp_path, CONTENT)
    with pytest.raises(check.FaultsFound, match="2 faults, the first: tensor 'x': input is int8"):
        check.check(check.Config(model=path, io="float32"))
    captured = capsys.readouterr()
    assert len([line for line in captured.err.splitlines() if line.startswith("fault: ")]) == 2
    row = json.loads(captured.out)
    assert row["faults"] == 2
    assert row["first_fault"].startswith("tensor 'x'")


@pytest.mark.parametrize("content", [b"", b"not a model", CONTENT[:-600], CONTENT[:50]])
def test_a_damaged_file_is_one_error_that_names_it(tmp_path, capsys, content):
    with pytest.raises(tflite_file.TFLiteFileError, match=r"m\.tflite: (not a|damaged)"):
        check.check(check.Config(model=save(tmp_path, content)))
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def run_command(*arguments):
    command = [sys.executable, "-m", "export.check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_the_command(tmp_path):
    path = save(tmp_path, CONTENT)
    clean = run_command(f"--model={path}")
    assert clean.returncode == 0, clean.stderr
    assert len(clean.stdout.splitlines()) == 1
    assert json.loads(clean.stdout)["faults"] == 0

    faulty = run_command(f"--model={path}", "--io=uint8")
    assert faulty.returncode == 1
    assert len(faulty.stdout.splitlines()) == 1
    assert json.loads(faulty.stdout)["faults"] == 2
    lines = faulty.stderr.splitlines()
    assert sum(line.startswith("fault: tensor '") for line in lines) == 2
    assert lines[-1].startswith(f"error: {path}: 2 faults, the first: tensor 'x'")

    damaged = run_command(f"--model={save(tmp_path, CONTENT[:999])}")
    assert (damaged.returncode, damaged.stdout) == (1, "")
    assert damaged.stderr == f"error: {path}: damaged or cut short at 999 bytes\n"


def test_the_command_needs_neither_keras_nor_tensorflow():
    program = (
        "import sys; from export import check;"
        "sys.exit(bool({'keras', 'tensorflow'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
