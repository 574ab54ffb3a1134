"""The flatbuffer writer and reader: what is written is read back, damage gives one clear error."""

import errno
import json
import os
import subprocess
import sys

import hypothesis
import numpy as np
import pytest
from ai_edge_litert import interpreter as litert
from ai_edge_litert import schema_py_generated as schema
from hypothesis import strategies

from lowbit import files, integer_graph, kernels, operator_versions, tflite_file

MANIFEST = {"scheme": "w8a8", "preprocess": "127.5,127.5", "versions": {"lowbit": "0.1.0"}}


# No shrinking: a failure would take a minute to be told.
BOUNDED = hypothesis.settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
)


# --- graphs -------------------------------------------------------------------------------------


def quantization(scale, zero_point=0, axis=None):
    scale = np.atleast_1d(np.asarray(scale, np.float32))
    zero_point = np.full(scale.shape, zero_point, np.int64)
    return integer_graph.Quantization(scale, zero_point, axis if scale.size > 1 else None)


def activation(name, shape, scale=0.1, zero_point=0, dtype="int8"):
    mapping = None if dtype == "float32" else quantization(scale, zero_point)
    return integer_graph.Tensor(name, shape, dtype, mapping)


def constant(name, data, scale=None, axis=None):
    mapping = None if scale is None else quantization(scale, 0, axis)
    return integer_graph.Tensor(name, data.shape, data.dtype.name, mapping, data)


def weights(rng, shape):
    return rng.integers(-127, 128, shape).astype(np.int8)


def every_operation() -> integer_graph.IntegerGraph:
    """A network with each operation of tflite_file.OPTIONS, which the interpreter can run."""
    rng = np.random.default_rng(0)
    tensors, nodes = {}, []

    def add(tensor):
        tensors[tensor.name] = tensor
        return tensor.name

    def node(op, inputs, output, **attributes):
        name = add(output)
        nodes.append(integer_graph.Node(op, name, tuple(inputs), (name,), attributes))
        return name

    def weighted(name, shape, axis, source, per_channel=True):
        channels = shape[axis]
        scale = rng.uniform(0.001, 0.01, channels if per_channel else 1).astype(np.float32)
        bias = rng.integers(-500, 500, channels).astype(np.int32)
        return (
            add(constant(f"{name}/kernel", weights(rng, shape), scale, axis)),
            add(constant(f"{name}/bias", bias, tensors[source].scale * scale, 0)),
        )

    conv = {"strides": (2, 1), "dilations": (1, 1), "padding": "SAME", "activation": "RELU6"}
    pool = {"filter": (2, 3), "strides": (1, 2), "padding": "VALID", "activation": None}
    x = add(activation("x", (1, 9, 8, 3), dtype="float32"))
    x = node("QUANTIZE", [x], activation("codes", (1, 9, 8, 3), 0.02, -3))
    first = [x, *weighted("conv", (4, 3, 3, 3), 0, x)]
    x = node("CONV_2D", first, activation("conv", (1, 5, 8, 4), 0.05, -128), **conv)
    x = node(
        "CONV_2D",
        [x, *weighted("dilated", (4, 2, 2, 4), 0, x, per_channel=False)],
        activation("dilated", (1, 4, 5, 4), 0.06, 4),
        **{"strides": (1, 1), "dilations": (1, 3), "padding": "VALID", "activation": None},
    )
    x = node(
        "DEPTHWISE_CONV_2D",
        [x, *weighted("depthwise", (1, 3, 2, 8), 3, x)],
        activation("depthwise", (1, 4, 5, 8), 0.07, 5),
        **{"strides": (1, 1), "dilations": (2, 1), "padding": "SAME", "activation": "RELU"},
        depth_multiplier=2,
    )
    convolved = x
    for op, kind in (("ADD", None), ("SUB", "RELU"), ("MUL", "RELU_N1_TO_1")):
        target = activation(op.lower(), (1, 4, 5, 8), 0.1, 1)
        x = node(op, [x, convolved], target, activation=kind)
    x = node("RELU", [x], activation("relu", (1, 4, 5, 8), 0.1, -128))
    x = node("RELU6", [x], activation("relu6", (1, 4, 5, 8), 0.03, -128))
    x = node("MAX_POOL_2D", [x], activation("max", (1, 3, 2, 8), 0.03, -128), **pool)
    average = pool | {"padding": "SAME", "strides": (1, 1)}
    y = node("AVERAGE_POOL_2D", [x], activation("average", (1, 3, 2, 8), 0.03, -128), **average)
    joined = activation("joined", (1, 3, 2, 16), 0.03, -128)
    x = node("CONCATENATION", [x, y], joined, axis=3, activation=None)
    paddings = add(constant("paddings", np.array([(0, 0), (1, 0), (0, 2), (0, 0)], np.int32)))
    x = node("PAD", [x, paddings], activation("pad", (1, 4, 4, 16), 0.03, -128))
    begin = add(constant("begin", np.array([0, 1, 0, 0], np.int32)))
    size = add(constant("size", np.array([1, 3, 4, 16], np.int32)))
    x = node("SLICE", [x, begin, size], activation("slice", (1, 3, 4, 16), 0.03, -128))
    order = add(constant("order", np.array([0, 2, 1, 3], np.int32)))
    x = node("TRANSPOSE", [x, order], activation("turned", (1, 4, 3, 16), 0.03, -128))
    larger = add(constant("larger", np.array([8, 3], np.int32)))
    centres = {"align_corners": False, "half_pixel_centers": False}
    resized = activation("resized", (1, 8, 3, 16), 0.03, -128)
    x = sliced = node("RESIZE_NEAREST_NEIGHBOR", [x, larger], resized, **centres)
    x = node("MAXIMUM", [x, sliced], activation("maximum", (1, 8, 3, 16), 0.03, -128))
    x = node("MINIMUM", [x, sliced], activation("minimum", (1, 8, 3, 16), 0.03, -128))
    same = add(constant("same", np.array([8, 3], np.int32)))
    halves = {"align_corners": False, "half_pixel_centers": True}
    smooth = activation("smooth", (1, 8, 3, 16), 0.03, -128)
    x = node("RESIZE_BILINEAR", [x, same], smooth, **halves)
    whole = add(constant("whole", np.array([1, 8, 3, 16], np.int32)))
    kernel, bias = weighted("transposed", (16, 3, 2, 16), 0, x)
    deconv = {"strides": (1, 1), "padding": "SAME", "activation": None}
    transposed = activation("transposed", (1, 8, 3, 16), 0.05, -4)
    x = node("TRANSPOSE_CONV", [whole, kernel, x, bias], transposed, **deconv)
    x = node("RELU_0_TO_1", [x], activation("clipped", (1, 8, 3, 16), 1 / 255, -128))
    x = node("LOGISTIC", [x], activation("sigmoid", (1, 8, 3, 16), 1 / 256, -128))
    x = node("TANH", [x], activation("tanh", (1, 8, 3, 16), 1 / 128, 0))
    x = node("GELU", [x], activation("gelu", (1, 8, 3, 16), 0.01, -60), approximate=False)
    x = node("LEAKY_RELU", [x], activation("leaky", (1, 8, 3, 16), 0.01, -60), alpha=0.25)
    slopes = add(constant("slopes", np.full((1, 1, 16), 9, np.int8), [0.01]))
    x = node("PRELU", [x, slopes], activation("prelu", (1, 8, 3, 16), 0.01, -60))
    ranges = {"begin": (0, 0, 0, 0), "end": (1, 8, 3, 16), "strides": (1, 1, 1, 2)}
    cuts = [add(constant(f"cut_{k}", np.array(v, np.int32))) for k, v in ranges.items()]
    masks = [f"{key}_mask" for key in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")]
    even = add(constant("one_more", np.array([(0, 0), (0, 0), (0, 1), (0, 0)], np.int32)))
    strided = activation("strided", (1, 8, 3, 8), 0.01, -60)
    x = node("STRIDED_SLICE", [x, *cuts], strided, **dict.fromkeys(masks, 0))
    x = node("RELU", [x], activation("positive", (1, 8, 3, 8), 0.01, -128))
    x = node("RSQRT", [x], activation("root", (1, 8, 3, 8), 0.02, -128))
    x = node("PAD", [x, even], activation("even", (1, 8, 4, 8), 0.02, -128))
    x = node("SPACE_TO_DEPTH", [x], activation("deep", (1, 4, 2, 32), 0.02, -128), block_size=2)
    back = add(constant("back", np.array([1, 4, 4, 16], np.int32)))
    x = node(
        "RESHAPE", [x, back], activation("flat", (1, 4, 4, 16), 0.02, -128), new_shape=(1, 4, 4, 16)
    )
    axes = add(constant("axes", np.array([1, 2], np.int32)))
    kept = node("MEAN", [x, axes], activation("kept", (1, 1, 1, 16), 0.02, 7), keep_dims=True)
    x = node("MEAN", [x, axes], activation("mean", (1, 16), 0.02, 7), keep_dims=False)
    shape = add(constant("shape", np.array([1, 4, 4], np.int32)))
    z = node("RESHAPE", [x, shape], activation("rows", (1, 4, 4), 0.02, 7), new_shape=(1, 4, 4))
    kept_dense = activation("kept_dense", (1, 4, 2), 0.02, 7)
    dense = [z, *weighted("kept_dense", (2, 4), 0, z)]
    z = node("FULLY_CONNECTED", dense, kept_dense, activation=None, keep_num_dims=True)
    dense = [x, *weighted("dense", (5, 16), 0, x)]
    logits = activation("logits", (1, 5), 0.1, 3)
    x = node("FULLY_CONNECTED", dense, logits, activation=None, keep_num_dims=False)
    x = node("SOFTMAX", [x], activation("probabilities", (1, 5), 1 / 256, -128), beta=0.5)
    x = node("DEQUANTIZE", [x], activation("output", (1, 5), dtype="float32"))
    return integer_graph.IntegerGraph(
        tensors, tuple(nodes), ("x",), (x, kept, z), "network", "every operation"
    )


GRAPH = every_operation()
CONTENT = tflite_file.write(GRAPH, MANIFEST)


def assert_same_tensor(read, written):
    assert (read.name, read.shape, read.dtype) == (written.name, written.shape, written.dtype)
    assert (read.quantization is None) == (written.quantization is None)
    if written.quantization is not None:
        assert read.quantization.scale.dtype == np.float32
        np.testing.assert_array_equal(read.quantization.scale, written.quantization.scale)
        np.testing.assert_array_equal(read.quantization.zero_point, written.quantization.zero_point)
        assert read.quantization.axis == written.quantization.axis
    assert (read.data is None) == (written.data is None)
    if written.data is not None:
        assert read.data.dtype == written.data.dtype
        np.testing.assert_array_equal(read.data, written.data)


# --- round trips --------------------------------------------------------------------------------


NOT_IN_BUILTIN_REF = {"ELU": {}, "DEPTH_TO_SPACE": {"block_size": 2}}


def test_the_test_graph_has_every_operation():
    assert {node.op for node in GRAPH.nodes} == set(tflite_file.OPTIONS) - set(NOT_IN_BUILTIN_REF)


@pytest.mark.parametrize("op", NOT_IN_BUILTIN_REF)
def test_an_operation_that_builtin_ref_lacks_survives(op):
    shapes = ((1, 2, 3, 8), (1, 4, 6, 2) if op == "DEPTH_TO_SPACE" else (1, 2, 3, 8))
    tensors = {name: activation(name, shape) for name, shape in zip("xy", shapes, strict=True)}
    node = integer_graph.Node(op, "y", ("x",), ("y",), NOT_IN_BUILTIN_REF[op])
    graph = integer_graph.IntegerGraph(tensors, (node,), ("x",), ("y",))
    content = tflite_file.write(graph)
    assert tflite_file.read(content).nodes == (node,)
    runner = litert.Interpreter(model_content=content)
    runner.allocate_tensors()
    assert tuple(runner.get_output_details()[0]["shape"]) == shapes[1]


def test_every_operation_and_attribute_is_read_back():
    read = tflite_file.read(CONTENT)
    assert (read.name, read.description) == (GRAPH.name, GRAPH.description)
    assert (read.inputs, read.outputs) == (GRAPH.inputs, GRAPH.outputs)
    assert list(read.tensors) == list(GRAPH.tensors)
    assert list(read.nodes) == list(GRAPH.nodes)
    for name, tensor in GRAPH.tensors.items():
        assert_same_tensor(read.tensors[name], tensor)


def test_reading_and_writing_again_gives_the_same_bytes():
    assert tflite_file.write(tflite_file.read(CONTENT), MANIFEST) == CONTENT


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "int64", "float32", "bool"])
@pytest.mark.parametrize(
    "shape", [(), (1,), (3,), (2, 3), (2, 1, 3), (1, 2, 1, 3), (1, 2, 1, 3, 2)]
)
def test_constants_of_every_dtype_and_rank_are_read_back(dtype, shape):
    data = np.random.default_rng(1).integers(0, 120, shape).astype(dtype)
    tensor = constant("data", np.asarray(data))
    graph = integer_graph.IntegerGraph({"data": tensor}, (), ("data",), ("data",))
    assert_same_tensor(tflite_file.read(tflite_file.write(graph)).tensors["data"], tensor)


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_scales_along_each_axis_are_read_back(axis):
    data = weights(np.random.default_rng(2), (2, 3, 4, 5))
    scale = np.linspace(0.1, 0.2, data.shape[axis])
    zero_point = np.arange(data.shape[axis], dtype=np.int64) - 2
    mapping = integer_graph.Quantization(scale.astype(np.float32), zero_point, axis)
    tensor = integer_graph.Tensor("data", data.shape, "int8", mapping, data)
    graph = integer_graph.IntegerGraph({"data": tensor}, (), ("data",), ("data",))
    assert_same_tensor(tflite_file.read(tflite_file.write(graph)).tensors["data"], tensor)


def test_weights_that_do_not_lie_in_order_are_written_in_order():
    data = weights(np.random.default_rng(3), (3, 4)).T
    assert not data.flags.c_contiguous
    graph = integer_graph.IntegerGraph({"d": constant("d", data)}, (), ("d",), ("d",))
    np.testing.assert_array_equal(
        tflite_file.read(tflite_file.write(graph)).tensors["d"].data, data
    )


def test_the_batch_is_one_and_static():
    subgraph = tflite_file.parse(CONTENT).subgraphs[0]
    for index in (*subgraph.inputs, *subgraph.outputs):
        assert subgraph.tensors[index].shape[0] == 1
    assert all(tensor.shapeSignature is None for tensor in subgraph.tensors)


@pytest.mark.parametrize(
    "op, dtypes, version",
    [
        *[("CONV_2D", "int8 int8 int8", 3), ("CONV_2D", "int8 int4 int8", 7)],
        *[("CONV_2D", "int16 int8 int16", 4), ("CONV_2D", "float32 float32 float32", 1)],
        *[("CONV_2D", "float32 int8 float32", 2), ("DEPTHWISE_CONV_2D", "float32 int8 float32", 4)],
        *[("DEPTHWISE_CONV_2D", "int8 int8 int8", 3), ("DEPTHWISE_CONV_2D", "int8 int4 int8", 7)],
        *[("DEPTHWISE_CONV_2D", "int16 int8 int16", 5), ("FULLY_CONNECTED", "int8 int8 int8", 4)],
        *[("FULLY_CONNECTED", "int8 int4 int8", 10), ("FULLY_CONNECTED", "int8 int2 int8", 14)],
        *[("FULLY_CONNECTED", "int16 int4 int16", 13), ("FULLY_CONNECTED", "int16 int8 int16", 7)],
        *[("FULLY_CONNECTED", "float32 int8 float32", 3), ("ADD", "int8 int8 int8", 2)],
        *[("ADD", "int16 int16 int16", 3), ("SUB", "int16 int16 int16", 5)],
        *[("RESHAPE", "int8 int32 int8", 1), ("SOFTMAX", "int8 int8 int8", 2)],
        *[("DEQUANTIZE", "int8 int8 float32", 2), ("DEQUANTIZE", "int4 int4 float32", 6)],
        *[("DEQUANTIZE", "float16 float16 float32", 3), ("QUANTIZE", "float32 float32 int8", 1)],
        *[("QUANTIZE", "float32 float32 int16", 2), ("MUL", "int16 int16 int16", 4)],
    ],
)
def test_operator_versions_are_those_of_the_converter(op, dtypes, version):
    node = integer_graph.Node(op, "node", ("x", "w"), ("y",))
    tensors = {
        name: activation(name, (1, 4), dtype=dtype)
        for name, dtype in zip("xwy", dtypes.split(), strict=True)
    }
    assert operator_versions.operator_version(node, tensors) == version


@hypothesis.given(
    dtype=strategies.sampled_from(["int2", "int4"]),
    shape=strategies.lists(strategies.integers(0, 5), min_size=1, max_size=4),
    seed=strategies.integers(0, 2**16),
)
def test_packed_codes_come_back(dtype, shape, seed):
    bits = tflite_file.PACKED_BITS[dtype]
    codes = np.random.default_rng(seed).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape)
    codes = codes.astype(np.int8)
    tensor = integer_graph.Tensor("w", tuple(shape), dtype, None, codes)
    packed = tflite_file._packed(tensor)
    assert packed.size == -(-codes.size * bits // 8)
    np.testing.assert_array_equal(tflite_file._unpacked(packed, bits, codes.size), codes.ravel())


def test_codes_too_large_to_pack_are_refused():
    tensor = integer_graph.Tensor("w", (2,), "int4", None, np.array([3, 8], np.int8))
    with pytest.raises(ValueError, match="tensor w: codes leave int4"):
        tflite_file._packed(tensor)


def test_dense_and_multiply_raise_their_version_for_what_old_runtimes_lack():
    codes = tflite_file.parse(CONTENT).operatorCodes
    versions = {}
    for code in codes:
        op = tflite_file.OPERATOR_NAMES[code.builtinCode]
        versions.setdefault(op, set()).add(code.version)
    assert versions["FULLY_CONNECTED"] == {4, 5}  # 5: keep_num_dims
    assert versions["MUL"] == {2}
    node = integer_graph.Node("MUL", "node", ("x", "x"), ("y",))
    tensors = {"x": activation("x", (1,), 2.0), "y": activation("y", (1,), 4.0)}
    assert operator_versions.operator_version(node, tensors) == 3  # 2 * 2 / 4 >= 1


def test_an_unknown_operation_is_refused_by_name():
    tensors = {name: activation(name, (1, 2)) for name in ("x", "y")}
    node = integer_graph.Node("CEIL", "act", ("x",), ("y",))
    graph = integer_graph.IntegerGraph(tensors, (node,), ("x",), ("y",))
    with pytest.raises(ValueError, match="node act: no writer for CEIL"):
        tflite_file.write(graph)


# --- the flatbuffer -----------------------------------------------------------------------------


def test_the_same_graph_gives_the_same_bytes():
    assert tflite_file.write(every_operation(), dict(reversed(MANIFEST.items()))) == CONTENT


def test_the_bytes_do_not_depend_on_the_process():
    program = (
        "import sys; from lowbit import tflite_file;"
        "content = sys.stdin.buffer.read();"
        "facts = tflite_file.read_manifest(content);"
        "again = tflite_file.write(tflite_file.read(content), facts);"
        "sys.stdout.write(str(again == content))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        input=CONTENT,
        capture_output=True,
        env=os.environ | {"PYTHONHASHSEED": "7"},
        cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
        check=True,
    )
    assert result.stdout == b"True"


def test_the_identifier_is_tflite():
    assert CONTENT[4:8] == b"TFL3"
    assert schema.Model.GetRootAsModel(CONTENT, 0).Version() == 3


def test_every_buffer_starts_at_a_multiple_of_16():
    model = schema.Model.GetRootAsModel(CONTENT, 0)
    starts = []
    for index in range(model.BuffersLength()):
        table = model.Buffers(index)._tab
        field = table.Offset(4)  # of `data`, the first field of Buffer
        if field:
            starts.append(table.Vector(field))
    assert len(starts) == sum(t.data is not None for t in GRAPH.tensors.values()) + 2  # metadata
    assert [start % tflite_file.BUFFER_ALIGNMENT for start in starts] == [0] * len(starts)


def test_buffer_zero_is_empty():
    assert tflite_file.parse(CONTENT).buffers[0].data is None


def test_the_manifest_is_read_back():
    assert tflite_file.read_manifest(CONTENT) == MANIFEST
    assert tflite_file.read_manifest(tflite_file.write(GRAPH)) == {}
    assert tflite_file.read_manifest(tflite_file.write(GRAPH, {})) == {}
    facts = {"name": "Größe ≠ 0", "nested": [1, 2.5, None, True]}
    assert tflite_file.read_manifest(tflite_file.write(GRAPH, facts)) == facts


@pytest.fixture(scope="module", name="runner")
def runner_fixture():
    runner = litert.Interpreter(
        model_content=CONTENT, experimental_op_resolver_type=litert.OpResolverType.BUILTIN_REF
    )
    runner.allocate_tensors()
    return runner


def test_the_interpreter_loads_the_file_and_knows_our_tensors(runner):
    details = {entry["name"]: entry for entry in runner.get_tensor_details()}
    for name, tensor in GRAPH.tensors.items():
        assert tuple(details[name]["shape"]) == tensor.shape
        assert details[name]["dtype"] == np.dtype(tensor.dtype)
        if tensor.quantization is not None:
            scales = details[name]["quantization_parameters"]["scales"]
            np.testing.assert_array_equal(scales, tensor.quantization.scale)


def test_the_interpreter_sees_the_signature(runner):
    signatures = runner.get_signature_list()
    assert list(signatures) == ["serving_default"]
    assert set(signatures["serving_default"]["inputs"]) == set(GRAPH.inputs)
    assert set(signatures["serving_default"]["outputs"]) == set(GRAPH.outputs)


def test_the_interpreter_computes_what_the_graph_says(runner):
    x = np.random.default_rng(4).normal(0, 1, GRAPH.tensors["x"].shape).astype(np.float32)
    runner.set_tensor(runner.get_input_details()[0]["index"], x)
    runner.invoke()
    expected = kernels.run(GRAPH, {"x": x}, "reference")
    for details, name in zip(runner.get_output_details(), GRAPH.outputs, strict=True):
        found = runner.get_tensor(details["index"])
        assert len(np.unique(expected[name])) > 1
        np.testing.assert_array_equal(found, expected[name])


# --- damage -------------------------------------------------------------------------------------


def read_everything(content):
    """Reads all there is; a damaged file may raise TFLiteFileError and nothing else."""
    for function in (tflite_file.parse, tflite_file.read, tflite_file.read_manifest):
        try:
            function(content)
        except tflite_file.TFLiteFileError as error:
            assert str(error)


@pytest.mark.parametrize(
    "content", [b"", b"TFL3", b"\0" * 8, b"\0\0\0\0TFL3", b"PK\3\4" * 9, b"[1]" * 5]
)
def test_other_files_are_refused(content):
    with pytest.raises(tflite_file.TFLiteFileError):
        tflite_file.parse(content)


def test_a_file_cut_short_is_refused_and_named():
    lengths = [*range(0, 200), *range(200, len(CONTENT) - 64, 61)]
    for length in lengths:
        read_everything(CONTENT[:length])
        with pytest.raises(tflite_file.TFLiteFileError, match=r"m\.tflite"):
            tflite_file.read(CONTENT[:length], "m.tflite")


def test_a_file_that_lacks_its_last_bytes_gives_no_other_exception():
    for length in range(len(CONTENT) - 64, len(CONTENT)):
        read_everything(CONTENT[:length])


@hypothesis.settings(BOUNDED, max_examples=200)
@hypothesis.given(strategies.integers(0, len(CONTENT) - 1), strategies.integers(1, 255))
def test_a_changed_byte_gives_no_other_exception(position, change):
    content = bytearray(CONTENT)
    content[position] ^= change
    read_everything(bytes(content))


@hypothesis.settings(BOUNDED, max_examples=100)
@hypothesis.given(strategies.binary(max_size=300))
def test_noise_behind_the_identifier_gives_no_other_exception(noise):
    read_everything(noise[:4].ljust(4, b"\0") + b"TFL3" + noise[4:])


def edited(edit) -> bytes:
    """The test file after `edit(model)` changed the flatbuffer's objects."""
    model = tflite_file.parse(CONTENT)
    edit(model)
    builder = tflite_file.flatbuffers.Builder(len(CONTENT))
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def shared_lists(subgraphs, tensors) -> bytes:
    """A file whose subgraphs are one subgraph, and its tensors one tensor."""
    builder = tflite_file.flatbuffers.Builder(1024)

    def vector(start, entry, count):
        start(builder, count)
        for _ in range(count):
            builder.PrependUOffsetTRelative(entry)
        return builder.EndVector()

    schema.TensorStart(builder)
    tensor = schema.TensorEnd(builder)
    shared = vector(schema.SubGraphStartTensorsVector, tensor, tensors)
    schema.SubGraphStart(builder)
    schema.SubGraphAddTensors(builder, shared)
    subgraph = schema.SubGraphEnd(builder)
    shared = vector(schema.ModelStartSubgraphsVector, subgraph, subgraphs)
    schema.BufferStart(builder)
    buffers = vector(schema.ModelStartBuffersVector, schema.BufferEnd(builder), 1)
    schema.ModelStart(builder)
    schema.ModelAddSubgraphs(builder, shared)
    schema.ModelAddBuffers(builder, buffers)
    builder.Finish(schema.ModelEnd(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def test_lists_that_share_entries_do_not_fill_the_memory():
    assert len(tflite_file.parse(shared_lists(1, 9)).subgraphs[0].tensors) == 9
    content = shared_lists(5000, 5000)  # 25 million tensors in 40 kB
    with pytest.raises(
        tflite_file.TFLiteFileError, match="m: damaged: its lists have more entries"
    ):
        tflite_file.parse(content, "m")


def test_what_keeps_a_file_from_being_read_is_named():
    def operator(model, name):
        (found,) = [
            each
            for each in model.subgraphs[0].operators
            if tflite_file.operator_name(model, each) == name
        ]
        return found

    def missing_tensor(model):
        operator(model, "SOFTMAX").inputs = [999]

    def unnamed_output(model):
        model.subgraphs[0].outputs = [-1]

    def other_options(model):
        operator(model, "SOFTMAX").builtinOptions = schema.AddOptionsT()
        operator(model, "SOFTMAX").builtinOptionsType = tflite_file.OPTION_NUMBERS["AddOptions"]

    def unknown_padding(model):
        operator(model, "MAX_POOL_2D").builtinOptions.padding = 77

    def negative_shape(model):
        (tensor,) = [each for each in model.subgraphs[0].tensors if each.name == b"order"]
        tensor.shape = [-2, -2]

    for edit, message in (
        (missing_tensor, "m: damaged: SOFTMAX 37: tensor 999 is not among the 67 tensors"),
        (unnamed_output, "m: damaged: the graph's input or output -1 is not among its tensors"),
        (
            other_options,
            "m: damaged: SOFTMAX 37 .makes 'prob.*: has AddOptions, not SoftmaxOptions",
        ),
        (unknown_padding, "m: damaged: unknown padding 77; known are SAME, VALID"),
        (negative_shape, r"m: damaged: tensor order: 16 bytes do not fill int32 \(-2, -2\)"),
    ):
        with pytest.raises(tflite_file.TFLiteFileError, match=message):
            tflite_file.read(edited(edit), "m")


def changed_manifest(content: bytes | None, buffer: int | None = None) -> bytes:
    """Returns the test file with other bytes, or another buffer number, as its manifest."""
    model = tflite_file.parse(tflite_file.write(GRAPH, {"a": 1}))
    entry = model.metadata[0]
    model.buffers[entry.buffer].data = None if content is None else np.frombuffer(content, np.uint8)
    entry.buffer = entry.buffer if buffer is None else buffer
    builder = tflite_file.flatbuffers.Builder(len(CONTENT))
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


@pytest.mark.parametrize(
    "content, buffer",
    [
        *[(b"{", None), (b"\xff\xfe", None), (b"[1]", None), (None, None), (b"{}", 9999)],
        *[(b'{"a": ' + b"[" * 99_999, None), (b'{"scheme": 1e999}', None)],
        *[(b'{"class_names": 3}', None), (b'{"a": "\x80"}', None)],
    ],
    ids=[
        *["not JSON", "not UTF-8", "no object", "no bytes", "no such buffer"],
        *["too deep", "infinite", "no names", "no text"],
    ],
)
def test_a_damaged_manifest_is_named(content, buffer):
    with pytest.raises(tflite_file.TFLiteFileError, match="manifest") as raised:
        tflite_file.read_manifest(changed_manifest(content, buffer))
    assert "codec" not in str(raised.value)  # Python's words for what is no UTF-8


def test_a_buffer_of_another_length_names_the_tensor():
    model = tflite_file.parse(CONTENT)
    (tensor,) = [t for t in model.subgraphs[0].tensors if t.name == b"dense/kernel"]
    model.buffers[tensor.buffer].data = np.zeros(79, np.uint8)
    builder = tflite_file.flatbuffers.Builder(len(CONTENT))
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    with pytest.raises(
        tflite_file.TFLiteFileError, match="dense/kernel: 79 bytes do not fill int8"
    ):
        tflite_file.read(bytes(builder.Output()))


def test_tensors_of_the_same_name_stay_apart():
    model = tflite_file.parse(CONTENT)
    for index in (1, 2):
        model.subgraphs[0].tensors[index].name = b"same"
    builder = tflite_file.flatbuffers.Builder(len(CONTENT))
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    assert list(tflite_file.read(bytes(builder.Output())).tensors)[1:3] == ["same", "same#2"]


def test_load_bytes_names_the_path(tmp_path):
    path = tmp_path / "m.tflite"
    with pytest.raises(FileNotFoundError, match=r"m\.tflite: no such file"):
        tflite_file.load_bytes(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        tflite_file.load_bytes(tmp_path)
    path.write_bytes(CONTENT[:999])
    with pytest.raises(tflite_file.TFLiteFileError, match=r"m\.tflite: damaged or cut short"):
        tflite_file.load_bytes(path)
    path.write_bytes(CONTENT)
    assert tflite_file.load_bytes(path) == CONTENT


# --- files are written whole or not at all --------------------------------------------------------


def test_save_bytes_replaces_a_file(tmp_path):
    path = tmp_path / "m.tflite"
    for content in (b"earlier", CONTENT, b""):
        files.save_bytes(content, path)
        assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["m.tflite"]


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("earlier", [b"earlier", None])
def test_a_failed_write_keeps_the_earlier_file(tmp_path, monkeypatch, function, earlier):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "m.tflite"
    if earlier is not None:
        path.write_bytes(earlier)
    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match="No space left on device"):
        files.save_bytes(CONTENT, path)
    assert os.listdir(tmp_path) == ([] if earlier is None else ["m.tflite"])
    assert earlier is None or path.read_bytes() == earlier


def test_a_full_disk_keeps_the_earlier_file(tmp_path):
    """A real failing write: the process may write 1000 bytes to a file, the rest is refused."""
    path = tmp_path / "m.tflite"
    path.write_bytes(b"earlier")
    program = (
        "import resource, sys; from lowbit import files;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
        "files.save_bytes(bytes(200_000), sys.argv[1])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        capture_output=True,
        text=True,
        cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
        check=False,
    )
    assert result.returncode == 1
    assert "File too large" in result.stderr
    assert os.listdir(tmp_path) == ["m.tflite"]
    assert path.read_bytes() == b"earlier"


def test_a_missing_folder_is_an_os_error_that_names_the_path(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        files.save_bytes(b"", tmp_path / "absent" / "m.tflite")


def test_the_manifest_is_one_json_object():
    entry, _ = tflite_file.parse(CONTENT).metadata
    data = tflite_file.parse(CONTENT).buffers[entry.buffer].data
    assert json.loads(bytes(data)) == MANIFEST
