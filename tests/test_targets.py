"""Targets: the same small files that the runtimes themselves took, left to the CPU, or refused.

The interpreter of LiteRT runs here.  TensorFlow Lite Micro's and Vela's answers were recorded from
tflite_micro 0.dev20261023182759 and ethos-u-vela 5.2.0 (--accelerator-config ethos-u55-128), which
ran each of these files; no one ran the Hexagon delegate: its table is its source.
"""

import json

import flatbuffers
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from export import check
from lowbit import integer_graph, runtimes, targets, tflite_file

CONV = {"strides": (1, 1), "dilations": (1, 1), "padding": "SAME", "activation": None}
LARGEST = {"int8": 127, "uint8": 127, "int4": 7, "int2": 1}


# --- files of one operation ---------------------------------------------------------------------


def quantization(scale, zero_point=0, axis=None):
    scale = np.atleast_1d(np.asarray(scale, np.float32))
    return integer_graph.Quantization(scale, np.full(scale.shape, zero_point, np.int64), axis)


def activation(name, shape, dtype="int8", scale=0.1, zero_point=0):
    mapping = None if dtype == "float32" else quantization(scale, zero_point)
    return integer_graph.Tensor(name, tuple(shape), dtype, mapping)


def constant(name, values, dtype="int32"):
    data = np.array(values, dtype)
    return integer_graph.Tensor(name, data.shape, dtype, None, data)


def weights(shape, axis, dtype="int8", per_channel=True):
    if dtype.startswith("float"):
        return constant("w", np.ones(shape), dtype)
    largest = LARGEST[dtype]
    codes = np.random.default_rng(0).integers(-largest, largest + 1, shape)
    data = (codes + 128).astype(np.uint8) if dtype == "uint8" else codes.astype(np.int8)
    scale = np.full(shape[axis], 0.01) if per_channel else 0.01
    mapping = quantization(scale, 0, axis if per_channel else None)
    return integer_graph.Tensor("w", data.shape, dtype, mapping, data)


def bias(count, source, per_channel=True):
    if source == "float32":
        return constant("b", np.zeros(count), "float32")
    dtype = "int64" if source == "int16" else "int32"
    scale = np.full(count, 0.001) if per_channel else 0.001
    mapping = quantization(scale, 0, 0 if per_channel else None)
    return integer_graph.Tensor("b", (count,), dtype, mapping, np.zeros(count, dtype))


def single(op, inputs, output, **attributes) -> bytes:
    node = integer_graph.Node(
        op, output.name, tuple(each.name for each in inputs), (output.name,), attributes
    )
    tensors = {each.name: each for each in (*inputs, output)}
    free = tuple(each.name for each in inputs if each.data is None)
    return tflite_file.write(integer_graph.IntegerGraph(tensors, (node,), free, (output.name,)))


def weighted(op, source="int8", kernel="int8", per_channel=True) -> bytes:
    """A convolution of any kind, or a dense layer, of 4 channels."""
    made = bias(4, source, per_channel)
    if op == "FULLY_CONNECTED":
        return single(
            *(op, [activation("x", (1, 8), source), weights((4, 8), 0, kernel, per_channel), made]),
            activation("y", (1, 4), source, 0.5),
            **{"activation": None, "keep_num_dims": False},
        )
    x, y = activation("x", (1, 8, 8, 4), source), activation("y", (1, 8, 8, 4), source, 0.5)
    if op == "CONV_2D":
        return single(op, [x, weights((4, 3, 3, 4), 0, kernel, per_channel), made], y, **CONV)
    if op == "DEPTHWISE_CONV_2D":
        kernel = weights((1, 3, 3, 4), 3, kernel, per_channel)
        return single(op, [x, kernel, made], y, **CONV, depth_multiplier=1)
    return single(
        *(op, [constant("s", [1, 16, 16, 4]), weights((4, 3, 3, 4), 0, kernel, per_channel), x]),
        activation("y", (1, 16, 16, 4), source, 0.5),
        **{"strides": (2, 2), "padding": "SAME", "activation": None},
    )


def convolution(size=8, window=3, batch=1, op="CONV_2D", multiplier=1, **options) -> bytes:
    options = {**CONV, **options}
    reach = (window - 1) * options["dilations"][0] + 1
    stride = options["strides"][0]
    made = -(-size // stride) if options["padding"] == "SAME" else -(-(size - reach + 1) // stride)
    channels = 4 * multiplier
    if op == "CONV_2D":
        kernel = weights((channels, window, window, 4), 0)
    else:
        options["depth_multiplier"] = multiplier
        kernel = weights((1, window, window, channels), 3)
    return single(
        *(op, [activation("x", (batch, size, size, 4)), kernel, bias(channels, "int8")]),
        activation("y", (batch, made, made, channels), scale=0.5),
        **options,
    )


def pool(op, window, padding, size=16, stride=1, activation_function=None) -> bytes:
    if isinstance(window, int):
        window = (window, window)
    width = size if window[1] == window[0] else 4
    made = [
        -(-side // stride) if padding == "SAME" else -(-(side - length + 1) // stride)
        for side, length in zip((size, width), window, strict=True)
    ]
    options = {"filter": window, "strides": (stride, stride), "padding": padding}
    return single(
        *(op, [activation("x", (1, size, width, 4))], activation("y", (1, *made, 4))),
        **options,
        activation=activation_function,
    )


def resize(op, before, after, half_pixel_centers=False, align_corners=False, dtype="int8") -> bytes:
    return single(
        *(op, [activation("x", (1, *before, 4), dtype), constant("s", after)]),
        activation("y", (1, *after, 4), dtype),
        **{"align_corners": align_corners, "half_pixel_centers": half_pixel_centers},
    )


def unary(op, source="int8", target=None, shape=(1, 8), **attributes) -> bytes:
    made = activation("y", shape, target or source, 0.2)
    return single(op, [activation("x", shape, source)], made, **attributes)


def pairwise(op, source="int8", scale=0.1, shape=(1, 8), **attributes) -> bytes:
    x, z = activation("x", shape, source), activation("z", shape, source)
    return single(op, [x, z], activation("y", shape, source, scale), **attributes)


def mean(shape, axes, dtype="int8") -> bytes:
    made = [size for axis, size in enumerate(shape) if axis not in axes]
    inputs = [activation("x", shape, dtype), constant("axes", axes)]
    return single("MEAN", inputs, activation("y", made, dtype), keep_dims=False)


def transposed(after, strides, padding="SAME") -> bytes:
    x = activation("x", (1, 8, 8, 4))
    return single(
        *("TRANSPOSE_CONV", [constant("s", [1, *after, 4]), weights((4, 3, 3, 4), 0), x]),
        activation("y", (1, *after, 4), scale=0.5),
        **{"strides": strides, "padding": padding, "activation": None},
    )


def edited(content, edit) -> bytes:
    """The file after `edit(model)` changed the flatbuffer's objects."""
    model = tflite_file.parse(content)
    edit(model)
    builder = flatbuffers.Builder(len(content))
    builder.Finish(model.Pack(builder), file_identifier=tflite_file.FILE_IDENTIFIER)
    return bytes(builder.Output())


def op_name(value) -> str | None:
    """A test's name: the operation of the file."""
    if not isinstance(value, bytes):
        return None
    return tflite_file.operators(tflite_file.parse(value))[0][0]


def found(content, target) -> list[str]:
    return [str(each) for each in targets.findings(content, "m.tflite", target)]


def outcome(content, target) -> str:
    """ "taken", "falls back" or "refused"."""
    refused = [each.refused for each in targets.findings(content, "m.tflite", target)]
    return "refused" if any(refused) else "falls back" if refused else "taken"


def assert_only(lines, *words):
    assert len(lines) == 1, lines
    for word in words:
        assert word in lines[0], lines[0]


# --- any target ---------------------------------------------------------------------------------


def test_a_plain_file_has_no_finding_but_for_dense_channels_on_hexagon():
    for target in targets.TARGETS:
        assert found(convolution(), target) == []
    for target in ("litert", "tflite-micro", "ethos-u"):
        assert found(weighted("FULLY_CONNECTED"), target) == []
    assert_only(found(weighted("FULLY_CONNECTED"), "hexagon-delegate"), "4 scales of weights")
    assert found(weighted("FULLY_CONNECTED", per_channel=False), "hexagon-delegate") == []


def test_an_unknown_target_is_refused():
    with pytest.raises(ValueError, match="'edge-tpu' is not one of litert, tflite-micro, hexagon"):
        targets.findings(convolution(), "m", "edge-tpu")


def test_the_tables_name_operators_that_exist():
    known = set(tflite_file.OPERATOR_NUMBERS)
    for table in (
        *(targets.MICRO_OPERATORS, targets.MICRO_INPUTS, targets.MICRO_CONSTANTS),
        *(targets.HEXAGON_VERSIONS, targets.HEXAGON_CONSTANTS, targets.HEXAGON_ACTIVATIONS),
        *(targets.ETHOS_U_OPERATORS, targets.ETHOS_U_WIDE, targets.ETHOS_U_CONSTANTS),
    ):
        assert set(table) <= known


@pytest.mark.parametrize(
    "content",
    [
        weighted("DEPTHWISE_CONV_2D"),
        resize("RESIZE_BILINEAR", (8, 8), (12, 12)),
        mean((1, 4), (1,)),
    ],
    ids=["convolution", "resize", "mean"],
)
@hypothesis.settings(deadline=None, derandomize=True, database=None, max_examples=60)
@hypothesis.given(position=strategies.integers(0, 10**6), change=strategies.integers(1, 255))
def test_a_changed_byte_never_trips_a_target(content, position, change):
    changed = bytearray(content)
    changed[position % len(content)] ^= change
    for target in targets.TARGETS:
        try:
            lines = found(bytes(changed), target)
        except tflite_file.TFLiteFileError:
            continue
        assert all("\n" not in line for line in lines)


# --- LiteRT, run here ---------------------------------------------------------------------------


def runs(content, kernels) -> bool:
    try:
        runner = runtimes.interpreter(content, kernels)
        for detail in runner.get_input_details():
            runner.set_tensor(detail["index"], np.zeros(detail["shape"], detail["dtype"]))
        runner.invoke()
    except (ValueError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("source", ["int8", "int16", "float32"])
@pytest.mark.parametrize(
    "op", ["CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV"]
)
def test_litert_refuses_the_weights_that_its_interpreter_refuses(op, source):
    for kernel in ("int8", "int4", "int2"):
        if op == "DEPTHWISE_CONV_2D" and (source, kernel) == ("int16", "int4"):
            continue  # runs, and computes wrongly
        if op == "CONV_2D" and (source, kernel) == ("float32", "int2"):
            continue  # not judged
        content = weighted(op, source, kernel)
        refused = outcome(content, "litert") == "refused"
        assert refused != runs(content, "xnnpack"), (op, source, kernel)


@pytest.mark.parametrize(
    "content",
    [
        *(unary("RELU_0_TO_1", "int16"), unary("RELU_0_TO_1", "int8")),
        *(unary("QUANTIZE", "int16", "uint8"), unary("QUANTIZE", "int16", "int8")),
        *(unary("QUANTIZE", "uint8", "int8"), unary("GELU", "int16", approximate=False)),
    ],
    ids=op_name,
)
def test_litert_refuses_the_types_that_its_interpreter_refuses(content):
    refused = outcome(content, "litert") == "refused"
    assert refused != (runs(content, "xnnpack") and runs(content, "builtin"))


def test_litert_names_what_leaves_xnnpack():
    softmax = single(
        *("SOFTMAX", [activation("x", (1, 8))], activation("y", (1, 8), "int8", 1 / 256, -128)),
        beta=1.0,
    )
    assert outcome(softmax, "litert") == "falls back"
    assert found(softmax, "litert") == [
        "SOFTMAX 0 (makes 'y'): the delegate takes no 8-bit SOFTMAX: built-in kernel instead of "
        "XNNPACK"
    ]
    assert "16-bit CONV_2D" in found(weighted("CONV_2D", "int16"), "litert")[0]


# --- TensorFlow Lite Micro, recorded ------------------------------------------------------------

# (operation, activations): weights, per channel, that ran; refused were all others of int2, int4,
# int8, float32 and float16.
MICRO_RAN = {
    **dict.fromkeys((("CONV_2D", "int8"), ("DEPTHWISE_CONV_2D", "int8")), ("int8", "int4")),
    **{("FULLY_CONNECTED", "int8"): ("int8",), ("TRANSPOSE_CONV", "int8"): ("int8",)},
    **{("CONV_2D", "int16"): ("int8",), ("DEPTHWISE_CONV_2D", "int16"): ("int8",)},
    **{("FULLY_CONNECTED", "int16"): ("int8",), ("TRANSPOSE_CONV", "int16"): ("int8",)},
    **{("CONV_2D", "float32"): ("float32",), ("DEPTHWISE_CONV_2D", "float32"): ("float32",)},
    **{("FULLY_CONNECTED", "float32"): ("float32",), ("TRANSPOSE_CONV", "float32"): ("float32",)},
    **{("CONV_2D", "uint8"): (), ("FULLY_CONNECTED", "uint8"): ()},
}


@pytest.mark.parametrize("op, source", MICRO_RAN)
def test_micro_takes_the_weights_that_ran(op, source):
    for kernel in ("int2", "int4", "int8", "float16", "float32"):
        taken = outcome(weighted(op, source, kernel), "tflite-micro") == "taken"
        assert taken == (kernel in MICRO_RAN[op, source]), (op, source, kernel)


def test_micro_takes_packed_dense_weights_of_one_scale_alone():
    content = weighted("FULLY_CONNECTED", "int8", "int4", per_channel=False)
    assert outcome(content, "tflite-micro") == "taken"
    content = weighted("FULLY_CONNECTED", "int8", "int4")
    assert_only(found(content, "tflite-micro"), "4 scales of int4 weights, 1 is allowed")


@pytest.mark.parametrize(
    "content, expected",
    [
        (unary("GELU", approximate=False), "refused"),
        (unary("RELU_0_TO_1"), "refused"),
        (unary("LEAKY_RELU", "int16", alpha=0.1), "taken"),
        (unary("LEAKY_RELU", "uint8", alpha=0.1), "refused"),
        (unary("RELU", "int16"), "taken"),
        (resize("RESIZE_BILINEAR", (8, 8), (16, 16)), "taken"),
        (resize("RESIZE_BILINEAR", (8, 8), (16, 16), dtype="int16"), "refused"),
        (resize("RESIZE_NEAREST_NEIGHBOR", (8, 8), (16, 16), dtype="int16"), "taken"),
        (pairwise("ADD", "int16", activation=None), "taken"),
        (pairwise("ADD", "uint8", activation=None), "refused"),
        (unary("RESHAPE", "uint8", new_shape=(1, 8)), "taken"),
        (unary("QUANTIZE", "uint8", "int8"), "taken"),
        (unary("QUANTIZE", "int8", "uint8"), "taken"),
        (unary("QUANTIZE", "uint8", "int16"), "refused"),
        (unary("QUANTIZE", "float32", "uint8"), "refused"),
        (unary("QUANTIZE", "float32", "int16"), "taken"),
        (unary("DEQUANTIZE", "uint8", "float32"), "taken"),
        (unary("DEQUANTIZE", "float16", "float32"), "refused"),
        (convolution(strides=(5, 5)), "taken"),
        (convolution(batch=2), "taken"),
    ],
    ids=op_name,
)
def test_micro_answers_as_recorded(content, expected):
    assert outcome(content, "tflite-micro") == expected


def test_micro_names_the_operator_the_types_and_what_happens():
    assert_only(
        found(unary("GELU", approximate=False), "tflite-micro"),
        "GELU 0 (makes 'y'): GELU is not among the",
        "the interpreter refuses the file",
    )
    assert_only(
        found(weighted("CONV_2D", "float32", "int8"), "tflite-micro"),
        "int8 weights with float32 activations, float32 is allowed",
    )


@pytest.mark.parametrize("scale, taken", [(2.7e-9, False), (2.9e-9, True)])
def test_micro_computes_the_clip_in_int32(scale, taken):
    x, z, y = (activation(name, (1, 8), scale=scale) for name in "xzy")
    for clip in ("RELU6", "RELU"):
        content = single("ADD", [x, z], y, activation=clip)
        assert (outcome(content, "tflite-micro") == "taken") == (taken or clip == "RELU")


def test_micro_takes_no_computed_parameters():
    content = resize("RESIZE_NEAREST_NEIGHBOR", (8, 8), (16, 16))

    def computed(model):
        (size,) = [each for each in model.subgraphs[0].tensors if each.name == b"s"]
        size.buffer = 0

    for target in ("tflite-micro", "hexagon-delegate"):
        lines = found(edited(content, computed), target)
        assert_only(lines, "tensor 's' is computed, a constant is allowed")


# --- Hexagon, by its source ---------------------------------------------------------------------


def test_hexagon_takes_8_bits_alone():
    lines = found(weighted("CONV_2D", "int8", "int4"), "hexagon-delegate")
    assert "operator version 7, 1 to 3 are allowed: runs on the CPU" in lines[0]
    assert "tensor 'w' is int4, int8 or uint8 is allowed" in lines[1]
    lines = found(pairwise("MAXIMUM", "int16"), "hexagon-delegate")
    assert "operator version 4, 1 to 2 are allowed: runs on the CPU" in lines[0]
    assert "tensor 'x' is int16, int8 or uint8 is allowed" in lines[1]
    assert found(pairwise("MAXIMUM", "uint8"), "hexagon-delegate") == []


@pytest.mark.parametrize(
    "content, limit",
    [
        (convolution(strides=(4, 4)), "strides (4, 4), at most 3 are allowed"),
        (convolution(strides=(3, 3)), None),
        (convolution(dilations=(2, 2)), "dilations (2, 2), (1, 1) is allowed"),
        (convolution(op="DEPTHWISE_CONV_2D", dilations=(2, 2)), None),
        (
            convolution(op="DEPTHWISE_CONV_2D", dilations=(2, 2), strides=(2, 2)),
            "dilations (2, 2) with strides (2, 2)",
        ),
        (convolution(op="DEPTHWISE_CONV_2D", multiplier=2), "depth_multiplier 2 of 4 channels"),
        (convolution(op="DEPTHWISE_CONV_2D", window=1), "height 1, at least 2 is allowed"),
        (convolution(op="DEPTHWISE_CONV_2D", window=5), None),
        (pool("MAX_POOL_2D", 13, "SAME"), "window (13, 13) with padding SAME, at most 12"),
        (pool("MAX_POOL_2D", 13, "VALID"), None),
        (pool("MAX_POOL_2D", 2, "SAME", activation_function="RELU6"), "fused RELU6, NONE is"),
        (pairwise("ADD", activation="RELU6"), None),
        (pairwise("ADD", activation="RELU6", shape=(1, 1, 1, 1, 8)), "has 5 axes, at most 4"),
        # A product of scales of at least the output's is version 3.
        (pairwise("MUL", scale=0.005, activation=None), "operator version 3, 1 to 2 are allowed"),
        (pairwise("MUL", scale=0.02, activation=None), None),
        (resize("RESIZE_BILINEAR", (8, 8), (66, 66)), "size (66, 66), at most 65 is allowed"),
        (resize("RESIZE_BILINEAR", (8, 8), (65, 65), half_pixel_centers=True), None),
        (unary("GELU", approximate=False), "GELU is not among the"),
        (unary("LEAKY_RELU", alpha=0.1), "LEAKY_RELU is not among the"),
        (mean((1, 8, 8, 4), (1, 2)), None),
    ],
    ids=op_name,
)
def test_each_limit_of_hexagon(content, limit):
    lines = found(content, "hexagon-delegate")
    if limit is None:
        assert lines == []
        return
    assert limit in lines[0] and lines[0].endswith(": runs on the CPU")
    assert outcome(content, "hexagon-delegate") == "falls back"


# --- Ethos-U, recorded --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, expected",
    [
        *[(weighted(op, "int16"), "taken") for op in ("CONV_2D", "DEPTHWISE_CONV_2D")],
        *[(weighted(op, "int16"), "taken") for op in ("FULLY_CONNECTED", "TRANSPOSE_CONV")],
        (weighted("CONV_2D", "int8", "int4"), "refused"),
        (weighted("FULLY_CONNECTED", "int8", "int2"), "refused"),
        (weighted("CONV_2D", "float32", "float32"), "falls back"),
        (weighted("CONV_2D", "float32", "int8"), "falls back"),
        (convolution(9, 3, strides=(3, 3)), "taken"),
        (convolution(9, 3, strides=(4, 4)), "falls back"),  # SAME pads
        (convolution(8, 3, strides=(4, 4)), "taken"),  # SAME pads nothing
        (convolution(9, 3, strides=(4, 4), padding="VALID"), "taken"),
        (convolution(16, 3, strides=(4, 4), dilations=(2, 2), padding="VALID"), "falls back"),
        (convolution(8, 3, op="DEPTHWISE_CONV_2D", strides=(4, 4)), "falls back"),
        (convolution(batch=2), "taken"),
        (pool("AVERAGE_POOL_2D", 8, "SAME"), "taken"),
        (pool("AVERAGE_POOL_2D", 9, "SAME"), "falls back"),
        (pool("AVERAGE_POOL_2D", 9, "VALID"), "taken"),
        (pool("MAX_POOL_2D", 9, "SAME"), "taken"),
        (pool("AVERAGE_POOL_2D", (257, 1), "VALID", 260), "falls back"),
        (pool("MAX_POOL_2D", (257, 1), "VALID", 260), "falls back"),
        (pool("MAX_POOL_2D", 5, "SAME", 9, stride=5), "falls back"),
        (mean((1, 8, 8, 4), (1, 2)), "taken"),
        (mean((2, 4, 4, 4), (1, 2)), "falls back"),
        (mean((1, 8, 8, 4), (3,)), "falls back"),
        (mean((1, 2, 5000, 1), (1, 2)), "falls back"),
        (mean((1, 300, 300, 1), (1, 2), "int16"), "falls back"),
        (resize("RESIZE_NEAREST_NEIGHBOR", (8, 8), (16, 16), True), "taken"),
        (resize("RESIZE_NEAREST_NEIGHBOR", (8, 8), (24, 24)), "falls back"),
        (resize("RESIZE_NEAREST_NEIGHBOR", (8, 8), (16, 32)), "falls back"),
        (resize("RESIZE_NEAREST_NEIGHBOR", (8, 8), (4, 4)), "falls back"),
        (resize("RESIZE_NEAREST_NEIGHBOR", (4, 4), (64, 64)), "falls back"),
        (resize("RESIZE_BILINEAR", (8, 8), (32, 32)), "taken"),
        (resize("RESIZE_BILINEAR", (8, 8), (32, 32), True), "falls back"),
        (resize("RESIZE_BILINEAR", (8, 8), (15, 15), align_corners=True), "taken"),
        (resize("RESIZE_BILINEAR", (1, 1), (5, 5), True), "taken"),
        (pairwise("MAXIMUM"), "taken"),
        (pairwise("MAXIMUM", scale=0.2), "falls back"),
        (pairwise("ADD", shape=(1, 2, 2, 2, 4), activation=None), "taken"),
        (unary("GELU", approximate=False), "taken"),
        (unary("GELU", "int16", approximate=False), "falls back"),
        (unary("DEQUANTIZE", "int8", "float32"), "falls back"),
        (unary("QUANTIZE", "float32", "int8"), "falls back"),
        (unary("QUANTIZE", "uint8", "int8"), "taken"),
    ],
    ids=op_name,
)
def test_ethos_u_answers_as_recorded(content, expected):
    assert outcome(content, "ethos-u") == expected


@pytest.mark.parametrize(
    "strides, after, padding, expected",
    [
        ((1, 1), (8, 8), "SAME", "taken"),
        ((2, 2), (16, 16), "SAME", "taken"),
        ((2, 2), (15, 15), "SAME", "falls back"),
        ((2, 2), (17, 17), "VALID", "taken"),
        ((3, 3), (24, 24), "SAME", "falls back"),
    ],
)
def test_ethos_u_answers_for_transposed_convolutions_as_recorded(strides, after, padding, expected):
    assert outcome(transposed(after, strides, padding), "ethos-u") == expected


def test_ethos_u_wants_static_shapes():
    def dynamic(model):
        for tensor in model.subgraphs[0].tensors[:1]:
            tensor.shapeSignature = [1, -1, -1, 4]

    lines = found(edited(convolution(), dynamic), "ethos-u")
    assert_only(lines, "has the dynamic shape (1, -1, -1, 4), a static one is allowed")


# --- the command --------------------------------------------------------------------------------


def run(tmp_path, content, target, capsys):
    path = tmp_path / "m.tflite"
    path.write_bytes(content)
    try:
        row = check.check(check.Config(model=str(path), target=target))
        captured = capsys.readouterr()
    except check.FaultsFound:
        captured = capsys.readouterr()
        row = json.loads(captured.out)
    return row, captured.err.splitlines()


def test_what_falls_back_is_no_fault(tmp_path, capsys):
    row, lines = run(tmp_path, convolution(strides=(4, 4)), "hexagon-delegate", capsys)
    assert (row["target"], row["unsupported"], row["faults"]) == ("hexagon-delegate", 1, 0)
    assert row["first_unsupported"].startswith("CONV_2D 0 (makes 'y'): strides (4, 4), at most 3")
    assert [line for line in lines if line.startswith("falls back: ")] == [
        f"falls back: hexagon-delegate: {row['first_unsupported']}"
    ]


def test_what_is_refused_is_a_fault(tmp_path, capsys):
    row, lines = run(tmp_path, weighted("CONV_2D", "int16", "int4"), "tflite-micro", capsys)
    assert (row["unsupported"], row["faults"]) == (1, 1)
    assert row["first_fault"] == f"tflite-micro: {row['first_unsupported']}"
    assert f"fault: {row['first_fault']}" in lines
    assert not any(line.startswith("falls back") for line in lines)


def test_operations_are_counted_not_lines(tmp_path, capsys):
    row, lines = run(tmp_path, pairwise("MAXIMUM", "int16"), "hexagon-delegate", capsys)
    assert (row["unsupported"], sum(line.startswith("falls back") for line in lines)) == (1, 3)


def test_without_a_target_nothing_is_asked_of_one(tmp_path, capsys):
    row, lines = run(tmp_path, weighted("CONV_2D", "int16", "int4"), "any", capsys)
    assert (row["target"], row["unsupported"], row["first_unsupported"]) == ("any", 0, None)
    assert row["faults"] == 0
    assert not any(line.startswith("falls back") for line in lines)


def test_litert_does_not_say_twice_what_leaves_xnnpack(tmp_path, capsys):
    content = weighted("CONV_2D", "int8", "int4")
    _, noted = run(tmp_path, content, "any", capsys)
    row, lines = run(tmp_path, content, "litert", capsys)
    assert sum("built-in kernel instead of XNNPACK" in line for line in noted) == 1
    assert sum("built-in kernel instead of XNNPACK" in line for line in lines) == 1
    assert (row["unsupported"], row["faults"]) == (1, 0)
