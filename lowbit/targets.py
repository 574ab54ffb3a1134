"""Targets: which operations of any tool's file a runtime or a chip leaves to the CPU, or refuses.

    findings(content, "model.tflite", "hexagon-delegate")
        -> [Finding("CONV_2D 0 (makes 'y')", "strides (4, 4), at most 3 are allowed: ...", False)]

| target           | what it is                                        | what it does not take         |
|------------------|---------------------------------------------------|-------------------------------|
| litert           | LiteRT's default interpreter, XNNPACK first       | built-in kernel, or refused   |
| tflite-micro     | TensorFlow Lite Micro with its reference kernels  | the whole file is refused, or |
|                  |                                                   | computed wrongly              |
| hexagon-delegate | TFLite's delegate for Hexagon DSPs, up to v66     | runs on the CPU               |
| ethos-u          | Arm's compiler Vela, for Ethos-U55 and U65        | runs on the CPU               |

The tables are what the projects' own documents and sources say; docs/export.md tells which of them
we ran.  Files are read, never run.
"""

import dataclasses
from collections.abc import Iterable, Iterator

from lowbit import lint, tflite_file, tflite_view

TARGETS = ("litert", "tflite-micro", "hexagon-delegate", "ethos-u")


@dataclasses.dataclass(frozen=True)
class Finding:
    """An operation that a target does not take."""

    label: str  # "CONV_2D 3 (makes 'conv')"
    text: str  # the limit, the value, what is allowed, and what happens
    refused: bool  # the target refuses the whole file; else only this operation falls back

    def __str__(self) -> str:
        return f"{self.label}: {self.text}"


def findings(content: bytes, name: str, target: str) -> list[Finding]:
    """Returns what of a `.tflite` file a target does not take, in the file's order.

    Nothing for a damaged file, whose damage `lint.faults` names.

    Args:
      content: the file's bytes.
      name: for error messages.
      target: one of `TARGETS`.

    Raises:
      TFLiteFileError: where the bytes are no `.tflite` file at all.
      ValueError: for an unknown target.
    """
    if target not in TARGETS:
        raise ValueError(f"target {target!r} is not one of {', '.join(TARGETS)}")
    graphs, damage = tflite_view.describe(tflite_file.parse(content, name), content)
    if damage:
        return []
    if target == "litert":
        return _litert(content, name, graphs)
    limits, happens, refuses = _TARGETS[target]
    more = {"ethos-u": _ethos_u_stops, "tflite-micro": _micro_wrong}.get(target)
    return [
        Finding(operation.label, f"{limit}: {happens}", refuses)
        for graph in graphs
        for operation in graph.operations
        for limit in limits(operation)
    ] + (more(graphs) if more else [])


# --- what the limits are about ------------------------------------------------------------------

# op: positions of its input and weights
_WEIGHTED = {op: positions[:2] for op, positions in lint.WEIGHTED.items()}
_NARROW = ("int2", "int4", "uint4")


def _tensor(operation, position):
    return operation.inputs[position] if position < len(operation.inputs) else None


def _option(operation, field, default=0):
    return getattr(operation.options, field, default)


def _pair(operation, first, second) -> tuple[int, int]:
    """Returns two options, (height, width), 1 where the operation has none."""
    return _option(operation, first, 1), _option(operation, second, 1)


def _strides(operation):
    return _pair(operation, "strideH", "strideW")


def _dilations(operation):
    return _pair(operation, "dilationHFactor", "dilationWFactor")


def _filter(operation):
    return _pair(operation, "filterHeight", "filterWidth")


def _padding(operation) -> str:
    return tflite_file.PADDING_NAMES.get(_option(operation, "padding"), "unknown")


def _activation(operation) -> str:
    number = _option(operation, "fusedActivationFunction")
    return tflite_file.ACTIVATION_NAMES.get(number, f"activation {number}")


def _tensors(operation) -> list[tflite_view.Tensor]:
    return [each for each in (*operation.inputs, *operation.outputs) if each is not None]


def _listed(values: Iterable) -> str:
    *others, last = map(str, values)
    return f"{', '.join(others)} or {last}" if others else last


def _not_constant(operation, positions) -> Iterator[str]:
    for position in positions:
        tensor = _tensor(operation, position)
        if tensor is not None and tensor.data is None and tflite_view.size_bytes(tensor):
            yield f"{tensor.label} is computed, a constant is allowed"


def _not_dtype(operation, positions, allowed) -> Iterator[str]:
    chosen = operation.inputs if positions is None else map(_at(operation), positions)
    for tensor in chosen:
        if tensor is not None and tensor.dtype not in allowed:
            yield f"{tensor.label} is {tensor.dtype}, {_listed(allowed)} is allowed"


def _at(operation):
    return lambda position: _tensor(operation, position)


# --- LiteRT -------------------------------------------------------------------------------------

# op: {dtype of the input: dtypes of weights with a kernel}; what is not named is not judged.  Run in
# ai-edge-litert 2.3, with and without XNNPACK.
LITERT_WEIGHTS = {
    "CONV_2D": {
        **{"int8": ("int8", "int4"), "int16": ("int8", "int4")},
        "uint8": ("uint8", "int8", "int4"),
    },
    "DEPTHWISE_CONV_2D": {
        **{"int8": ("int8", "int4"), "int16": ("int8",), "uint8": ("uint8",)},
        "float32": ("float32", "int8"),
    },
    "FULLY_CONNECTED": {
        **dict.fromkeys(("int8", "int16"), ("int8", "int4", "int2")),
        "float32": ("float32", "int8", "uint8", "int4", "int2"),
        "uint8": ("uint8", "int8", "int4", "int2"),
    },
    "TRANSPOSE_CONV": {
        **{"int8": ("int8",), "int16": ("int8",), "uint8": ("uint8",)},
        "float32": ("float32", "float16", "int8"),
    },
}
# op: (dtype of the input, of the output) without a kernel, run as above.
LITERT_WITHOUT = {
    "RELU_0_TO_1": (("int16", "int16"),),
    "QUANTIZE": (("int16", "uint8"),),
}
# What happens by the kernel of `delegate.placement_of`; no kernel: the last.
_LITERT_HAPPENS = {
    "builtin": lint.KERNEL_TEXTS["builtin"],
    "refused": "the default interpreter refuses the file, or computes wrongly",
}


def _litert(content, name, graphs) -> list[Finding]:
    placed = _placements(content, name)  # of the first graph
    found = []
    for number, graph in enumerate(graphs):
        for position, operation in enumerate(graph.operations):
            kernel, reason = "unknown", ""
            if number == 0 and position < len(placed):
                kernel, reason = placed[position]
            if kernel != "refused":
                for limit in _litert_limits(operation):
                    kernel, reason = "refused", limit
            if kernel in _LITERT_HAPPENS:
                text = f"{reason}: {_LITERT_HAPPENS[kernel]}"
                found.append(Finding(operation.label, text, kernel == "refused"))
    return found


def _placements(content, name) -> list[tuple[str, str]]:
    try:
        return lint.placements(tflite_file.read(content, name))
    except tflite_file.TFLiteFileError:
        return []


def _litert_limits(operation) -> Iterator[str]:
    if operation.op == "CUSTOM":
        yield "a custom operator, which only an application that registers it has"
    if operation.op in LITERT_WEIGHTS:
        source, weights = (_tensor(operation, each) for each in _WEIGHTED[operation.op])
        if source is not None and weights is not None:
            allowed = LITERT_WEIGHTS[operation.op].get(source.dtype)
            if allowed is not None and weights.dtype not in allowed:
                yield (
                    f"{weights.dtype} weights with {source.dtype} activations, "
                    f"{_listed(allowed)} is allowed"
                )
            elif source.dtype == "uint8" and weights.scale.size > 1:
                yield f"{weights.scale.size} scales of weights with uint8 activations, 1 is allowed"
    source = _tensor(operation, 0)
    if source is not None and operation.outputs:
        pair = (source.dtype, operation.outputs[0].dtype)
        if pair in LITERT_WITHOUT.get(operation.op, ()):
            yield f"{pair[0]} to {pair[1]}"


# --- TensorFlow Lite Micro ----------------------------------------------------------------------

# Builtin operators that the Python package of October 2026 registers, all there are
# (python/tflite_micro/python_ops_resolver.cc); a firmware registers those that it needs.
MICRO_OPERATORS = frozenset(
    (
        *("ABS", "ADD", "ADD_N", "ARG_MAX", "ARG_MIN", "ASSIGN_VARIABLE", "AVERAGE_POOL_2D"),
        *("BATCH_MATMUL", "BATCH_TO_SPACE_ND", "BROADCAST_ARGS", "BROADCAST_TO", "CALL_ONCE"),
        *("CAST", "CEIL", "CONCATENATION", "CONV_2D", "COS", "CUMSUM", "DEPTH_TO_SPACE"),
        *("DEPTHWISE_CONV_2D", "DEQUANTIZE", "DIV", "DYNAMIC_UPDATE_SLICE", "ELU"),
        *("EMBEDDING_LOOKUP", "EQUAL", "EXP", "EXPAND_DIMS", "FILL", "FLOOR", "FLOOR_DIV"),
        *("FLOOR_MOD", "FULLY_CONNECTED", "GATHER", "GATHER_ND", "GREATER", "GREATER_EQUAL"),
        *("HARD_SWISH", "IF", "L2_NORMALIZATION", "L2_POOL_2D", "LEAKY_RELU", "LESS"),
        *("LESS_EQUAL", "LOG", "LOGICAL_AND", "LOGICAL_NOT", "LOGICAL_OR", "LOGISTIC"),
        *("LOG_SOFTMAX", "MAXIMUM", "MAX_POOL_2D", "MEAN", "MINIMUM", "MIRROR_PAD", "MUL"),
        *("NEG", "NOT_EQUAL", "PACK", "PAD", "PADV2", "PRELU", "QUANTIZE", "READ_VARIABLE"),
        *("REDUCE_ALL", "REDUCE_MAX", "REDUCE_MIN", "RELU", "RELU6", "RESHAPE"),
        *("RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR", "REVERSE_V2", "ROUND", "RSQRT"),
        *("SELECT_V2", "SHAPE", "SIN", "SLICE", "SOFTMAX", "SPACE_TO_BATCH_ND"),
        *("SPACE_TO_DEPTH", "SPLIT", "SPLIT_V", "SQRT", "SQUARE", "SQUARED_DIFFERENCE"),
        *("SQUEEZE", "STRIDED_SLICE", "SUB", "SUM", "SVDF", "TANH", "TRANSPOSE"),
        *("TRANSPOSE_CONV", "UNIDIRECTIONAL_SEQUENCE_LSTM", "UNPACK", "VAR_HANDLE", "WHILE"),
        "ZEROS_LIKE",
    )
)
# op: {dtype of the input: dtypes of weights}.  "Hybrid models are not supported on TFLite Micro."
# Run: each pair of float32, int8, uint8, int16 with int2, int4, int8, uint8, float16, float32.
_MICRO_CONVOLUTION = {"float32": ("float32",), "int8": ("int8", "int4"), "int16": ("int8",)}
MICRO_WEIGHTS = {
    **dict.fromkeys(("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"), _MICRO_CONVOLUTION),
    "TRANSPOSE_CONV": {"float32": ("float32",), "int8": ("int8",), "int16": ("int8",)},
}
# op: {dtype of the input: of the output}.  Run.
MICRO_CONVERSIONS = {
    "QUANTIZE": {
        **{"float32": ("int8", "int16"), "int16": ("int8", "int16", "int32")},
        **{"int8": ("int8", "uint8", "int16", "int32"), "uint8": ("int8",)},
    },
    "DEQUANTIZE": dict.fromkeys(("int8", "uint8", "int16"), ("float32",)),
}
# op: dtypes of the input.  Run, for each operation that we write.
_MICRO_COMMON = ("float32", "int8", "int16")
MICRO_INPUTS = {
    **dict.fromkeys(
        (
            *("ADD", "SUB", "MUL", "MAXIMUM", "MINIMUM", "AVERAGE_POOL_2D", "MAX_POOL_2D", "MEAN"),
            *("SOFTMAX", "LOGISTIC", "TANH", "LEAKY_RELU", "RELU", "RELU6", "TRANSPOSE"),
        ),
        _MICRO_COMMON,
    ),
    # These take indices too.
    **dict.fromkeys(("CONCATENATION", "PAD", "SLICE"), (*_MICRO_COMMON, "int32", "int64", "bool")),
    "RESIZE_BILINEAR": ("float32", "int8"),
    "RESIZE_NEAREST_NEIGHBOR": (*_MICRO_COMMON, "int32"),
}
# op: positions of inputs of which the kernel says "Non-constant ... tensor is not supported"
MICRO_CONSTANTS = {
    **dict.fromkeys(
        (
            *("BROADCAST_TO", "EXPAND_DIMS", "PAD", "PADV2", "RESIZE_BILINEAR"),
            *("RESIZE_NEAREST_NEIGHBOR", "SPLIT_V", "TRANSPOSE"),
        ),
        (1,),
    ),
    **dict.fromkeys(("FILL", "SPLIT"), (0,)),
    "SPLIT_V": (2,),
    "STRIDED_SLICE": (1, 2, 3),
}
# A fused clip's code, clip / scale, must fit int32 ("no_integer_overflow_from_quantization"); pools
# run all the same.  Such scales are those of layers whose output is 0.  Run.
MICRO_CLIPS = {"RELU6": 6.0, "RELU_N1_TO_1": 1.0}
MICRO_CODES = 2.0**31
MICRO_TRANSPOSED_AXES = 5  # at most; run


def _micro_limits(operation) -> Iterator[str]:
    op = operation.op
    if op not in MICRO_OPERATORS:
        yield f"{op} is not among the {len(MICRO_OPERATORS)} operators with a kernel"
        return
    if any(tensor.dtype == "int2" for tensor in _tensors(operation)):
        yield "an int2 tensor, which its file format does not know; int4 and wider are allowed"
        return
    if op in MICRO_WEIGHTS:
        yield from _micro_weights(operation)
    elif op in MICRO_CONVERSIONS:
        source = _tensor(operation, 0)
        allowed = MICRO_CONVERSIONS[op]
        if source is not None and source.dtype not in allowed:
            yield f"{source.label} is {source.dtype}, {_listed(allowed)} is allowed"
        elif source is not None and operation.outputs[0].dtype not in allowed[source.dtype]:
            yield (
                f"{source.dtype} to {operation.outputs[0].dtype}, "
                f"to {_listed(allowed[source.dtype])} is allowed"
            )
    elif op in MICRO_INPUTS:
        yield from _not_dtype(operation, (0,), MICRO_INPUTS[op])
    yield from _not_constant(operation, MICRO_CONSTANTS.get(op, ()))
    yield from _micro_clip(operation)
    source = _tensor(operation, 0)
    if op == "TRANSPOSE" and source is not None and len(source.shape) > MICRO_TRANSPOSED_AXES:
        yield f"{len(source.shape)} axes, at most {MICRO_TRANSPOSED_AXES} are allowed"


def _micro_clip(operation):
    clip, scale = MICRO_CLIPS.get(_activation(operation)), operation.outputs[0].scale
    if operation.op in ("AVERAGE_POOL_2D", "MAX_POOL_2D"):
        return
    if clip is not None and scale.size == 1 and 0 < scale[0] < clip / MICRO_CODES:
        yield (
            f"fused {_activation(operation)} with output scale {scale[0]:.6g}, at least "
            f"{clip / MICRO_CODES:.6g} is allowed"
        )


def _micro_wrong(graphs) -> list[Finding]:
    """Returns each RELU6 to another scale or zero point: it runs, but its kernel only clamps codes."""
    found = []
    for operation in (each for graph in graphs for each in graph.operations):
        source = _tensor(operation, 0)
        if operation.op != "RELU6" or source is None or not operation.outputs:
            continue
        maps = [
            (tensor.scale.tolist(), tensor.zero_point.tolist())
            for tensor in (source, operation.outputs[0])
        ]
        if maps[0] != maps[1]:
            text = (
                f"from scale and zero point {maps[0]} to {maps[1]}, the same are allowed: the kernel "
                "only clamps, and computes wrongly"
            )
            found.append(Finding(operation.label, text, True))
    return found


def _micro_weights(operation):
    source, weights = (_tensor(operation, each) for each in _WEIGHTED[operation.op])
    if source is None or weights is None:
        return
    table = MICRO_WEIGHTS[operation.op]
    if source.dtype not in table:
        yield f"{source.label} is {source.dtype}, {_listed(table)} is allowed"
    elif weights.dtype not in table[source.dtype]:
        yield (
            f"{weights.dtype} weights with {source.dtype} activations, "
            f"{_listed(table[source.dtype])} is allowed"
        )
    elif operation.op == "FULLY_CONNECTED" and weights.dtype == "int4" and weights.scale.size > 1:
        yield f"{weights.scale.size} scales of int4 weights, 1 is allowed"


# --- Hexagon delegate ---------------------------------------------------------------------------

# op: (lowest, highest version) that the delegate takes.
# Source: tflite/delegates/hexagon/utils.cc of LiteRT, the state of 2026.
HEXAGON_VERSIONS = {
    **dict.fromkeys(
        (
            *("ADD", "ARG_MAX", "ARG_MIN", "AVERAGE_POOL_2D", "CONCATENATION", "DEPTH_TO_SPACE"),
            *("L2_NORMALIZATION", "LOGISTIC", "MAXIMUM", "MAX_POOL_2D", "MEAN", "MINIMUM"),
            *("MIRROR_PAD", "MUL", "PACK", "PAD", "QUANTIZE", "RELU6", "SLICE", "SOFTMAX"),
            *("SPACE_TO_DEPTH", "SPLIT", "STRIDED_SLICE", "SUB", "TANH", "TRANSPOSE"),
        ),
        (1, 2),
    ),
    **dict.fromkeys(("RELU", "RSQRT", "SQUARED_DIFFERENCE"), (2, 2)),
    **dict.fromkeys(
        (
            *("CONV_2D", "DEPTHWISE_CONV_2D", "RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR"),
            "TRANSPOSE_CONV",
        ),
        (1, 3),
    ),
    "FULLY_CONNECTED": (1, 4),
    **dict.fromkeys(("HARD_SWISH", "NEG", "RESHAPE"), (1, 1)),
}
# op: positions of the inputs that must have 8 bits, None: all.  Others: the first.
HEXAGON_EIGHT_BIT = {
    **dict.fromkeys(("ADD", "SUB", "MUL", "MAXIMUM", "MINIMUM", "SQUARED_DIFFERENCE"), (0, 1)),
    **dict.fromkeys(("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"), (0, 1)),
    **dict.fromkeys(("CONCATENATION", "PACK")),
    "TRANSPOSE_CONV": (1, 2),
    "SPLIT": (1,),
}
HEXAGON_CONSTANTS = {
    **dict.fromkeys(("MEAN", "MIRROR_PAD", "PAD"), (1,)),
    **dict.fromkeys(("RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR"), (1,)),
    **{"FULLY_CONNECTED": (2,), "SPLIT": (0,), "SLICE": (1, 2), "STRIDED_SLICE": (1, 2, 3)},
}
_CLIPS = ("NONE", "RELU", "RELU6", "RELU_N1_TO_1")
HEXAGON_ACTIVATIONS = {
    **dict.fromkeys(("ADD", "SUB", "MUL", "CONV_2D", "DEPTHWISE_CONV_2D"), _CLIPS),
    "FULLY_CONNECTED": _CLIPS,
    **dict.fromkeys(("AVERAGE_POOL_2D", "MAX_POOL_2D", "L2_NORMALIZATION"), ("NONE",)),
}
HEXAGON_RANK = 4  # at most; README.md of the delegate
HEXAGON_STRIDE = 3  # at most
HEXAGON_SAME_WINDOW = 12  # at most, of a MAX_POOL_2D with padding SAME
HEXAGON_DEPTHWISE_HEIGHT = 2  # at least; older releases: a width of 3
HEXAGON_BILINEAR_SIZE = 65  # at most; README.md, and older releases' source


def _hexagon_limits(operation) -> Iterator[str]:
    op = operation.op
    if op not in HEXAGON_VERSIONS:
        yield f"{op} is not among the {len(HEXAGON_VERSIONS)} operators that it has"
        return
    low, high = HEXAGON_VERSIONS[op]
    if not low <= operation.version <= high:
        yield f"operator version {operation.version}, {low} to {high} are allowed"
    eight = ("int8",) if op in ("RSQRT", "SQUARED_DIFFERENCE") else ("int8", "uint8")
    yield from _not_dtype(operation, HEXAGON_EIGHT_BIT.get(op, (0,)), eight)
    for tensor in _tensors(operation):
        if len(tensor.shape) > HEXAGON_RANK:
            yield f"{tensor.label} has {len(tensor.shape)} axes, at most {HEXAGON_RANK} are allowed"
    yield from _not_constant(operation, HEXAGON_CONSTANTS.get(op, ()))
    activation = _activation(operation)
    if activation not in HEXAGON_ACTIVATIONS.get(op, (activation,)):
        yield f"fused {activation}, {_listed(HEXAGON_ACTIVATIONS[op])} is allowed"
    if op in ("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV"):
        if max(_strides(operation)) > HEXAGON_STRIDE:
            yield f"strides {_strides(operation)}, at most {HEXAGON_STRIDE} are allowed"
    if op == "CONV_2D" and _dilations(operation) != (1, 1):
        yield f"dilations {_dilations(operation)}, (1, 1) is allowed"
    if op == "DEPTHWISE_CONV_2D":
        yield from _hexagon_depthwise(operation)
    if op == "FULLY_CONNECTED":
        weights = _tensor(operation, 1)
        if weights is not None and weights.scale.size > 1:
            yield f"{weights.scale.size} scales of weights, 1 is allowed (per tensor)"
        if _option(operation, "keepNumDims", False):
            yield "keep_num_dims true, false is allowed"
    if op == "MAX_POOL_2D" and _padding(operation) == "SAME":
        if max(_filter(operation)) > HEXAGON_SAME_WINDOW:
            yield (
                f"window {_filter(operation)} with padding SAME, at most {HEXAGON_SAME_WINDOW} "
                "is allowed"
            )
    if op == "RESIZE_BILINEAR":
        size = operation.outputs[0].shape[1:3]
        if max(size, default=0) > HEXAGON_BILINEAR_SIZE:
            yield f"size {size}, at most {HEXAGON_BILINEAR_SIZE} is allowed"
    if op == "STRIDED_SLICE":
        for field in ("ellipsisMask", "newAxisMask"):
            if _option(operation, field):
                yield f"{field} {_option(operation, field)}, 0 is allowed"


def _hexagon_depthwise(operation):
    source, weights = _tensor(operation, 0), _tensor(operation, 1)
    dilated = _dilations(operation) != (1, 1)
    if dilated and _strides(operation) != (1, 1):
        yield (
            f"dilations {_dilations(operation)} with strides {_strides(operation)}, only strides "
            "(1, 1) are allowed with them"
        )
    multiplier = _option(operation, "depthMultiplier", 1)
    depth = source.shape[3] if source is not None and len(source.shape) == 4 else None
    if multiplier != 1 and (dilated or depth != 1):
        yield (
            f"depth_multiplier {multiplier} of {depth} channels, 1 is allowed (others of 1 channel "
            "without dilation)"
        )
    if weights is not None and len(weights.shape) > 1:
        if weights.shape[1] < HEXAGON_DEPTHWISE_HEIGHT:
            yield (
                f"window of height {weights.shape[1]}, at least {HEXAGON_DEPTHWISE_HEIGHT} "
                "is allowed"
            )


# --- Ethos-U ------------------------------------------------------------------------------------

# Source: SUPPORTED_OPS.md of Vela 5.2.0, Ethos-U55 and Ethos-U65.  The limits of operations that we
# write were run with it.
ETHOS_U_OPERATORS = frozenset(
    (
        *("ABS", "ADD", "ARG_MAX", "AVERAGE_POOL_2D", "BATCH_MATMUL", "CONCATENATION", "CONV_2D"),
        *("DEPTHWISE_CONV_2D", "ELU", "EXP", "EXPAND_DIMS", "FULLY_CONNECTED", "GELU"),
        *("HARD_SWISH", "LEAKY_RELU", "LOG", "LOGISTIC", "MAXIMUM", "MAX_POOL_2D", "MEAN"),
        *("MINIMUM", "MIRROR_PAD", "MUL", "NEG", "PACK", "PAD", "PADV2", "PRELU", "QUANTIZE"),
        *("REDUCE_MAX", "REDUCE_MIN", "RELU", "RELU6", "RELU_0_TO_1", "RELU_N1_TO_1", "RESHAPE"),
        *("RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR", "REVERSE_V2", "RSQRT", "SLICE"),
        *("SOFTMAX", "SPLIT", "SPLIT_V", "SQUARED_DIFFERENCE", "SQUEEZE", "STRIDED_SLICE", "SUB"),
        *("SUM", "TANH", "TILE", "TRANSPOSE", "TRANSPOSE_CONV", "UNIDIRECTIONAL_SEQUENCE_LSTM"),
        "UNPACK",
    )
)
ETHOS_U_DTYPES = ("int8", "uint8", "int16")
# Their document does not exclude 32-bit feature maps.
ETHOS_U_WIDE = (
    *("ADD", "ARG_MAX", "BATCH_MATMUL", "EXPAND_DIMS", "FULLY_CONNECTED", "MIRROR_PAD", "MUL"),
    *("NEG", "RESHAPE", "SQUEEZE", "SUB", "SUM", "TRANSPOSE"),
)
# op: dtypes of the input, where they are fewer
ETHOS_U_INPUTS = {
    **{"ELU": ("int8",), "GELU": ("int8", "uint8"), "BATCH_MATMUL": ("int8",)},
    **{"LOG": ("int8", "int16"), "RSQRT": ("int8", "int16")},
}
ETHOS_U_CONSTANTS = {
    **dict.fromkeys(("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"), (2,)),
    **dict.fromkeys(("MEAN", "MIRROR_PAD", "PAD", "PADV2", "TRANSPOSE"), (1,)),
    **{"TRANSPOSE_CONV": (3,), "SLICE": (1, 2), "STRIDED_SLICE": (1, 2, 3)},
}
ETHOS_U_STRIDE = 3  # at most; beyond it without padding and dilation only, depthwise never
ETHOS_U_SAME_WINDOW = 8  # height and width at most, of an AVERAGE_POOL_2D with padding SAME
ETHOS_U_WINDOW_HEIGHT = 256  # at most, of a pooling window
ETHOS_U_WINDOW_AREA = 256 * 256
ETHOS_U_REDUCED_AXIS = 4096  # MEAN: an axis is shorter
ETHOS_U_REDUCED = {"int8": 2**24, "uint8": 2**23, "int16": 2**16}  # MEAN: elements at most
ETHOS_U_SOFTMAX_AREA = 65536  # height times width is less
ETHOS_U_SCALES = (2, 4, 8)  # of a resized image
# What Vela 5.2.0 does with narrower weights, by their dtype.
_VELA_STOPS = {"int4": "a floating-point exception", "uint4": "an error", "int2": "an error"}


def _ethos_u_limits(operation) -> Iterator[str]:
    op = operation.op
    if op not in ETHOS_U_OPERATORS:
        yield f"{op} is not among the {len(ETHOS_U_OPERATORS)} operators that it has"
        return
    allowed = (*ETHOS_U_DTYPES, "int32") if op in ETHOS_U_WIDE else ETHOS_U_DTYPES
    activations = [each for each in operation.inputs if each is not None and each.data is None]
    made = () if op == "ARG_MAX" else operation.outputs  # of indices
    for tensor in (*activations, *made):
        if tensor.dtype not in allowed:
            yield f"{tensor.label} is {tensor.dtype}, {_listed(allowed)} is allowed"
            break
        if min(tensor.signature[1:], default=1) < 0:
            yield f"{tensor.label} has the dynamic shape {tensor.signature}, a static one is allowed"
            break
    if op in ETHOS_U_INPUTS:
        yield from _not_dtype(operation, (0,), ETHOS_U_INPUTS[op])
    yield from _not_constant(operation, ETHOS_U_CONSTANTS.get(op, ()))
    if op in _WEIGHTED:
        weights = _tensor(operation, _WEIGHTED[op][1])
        if weights is not None and weights.dtype not in ("int8", "uint8", *_NARROW):
            yield f"{weights.label} is {weights.dtype}, int8 or uint8 is allowed"
    if op in _ETHOS_U_CHECKS:
        yield from _ETHOS_U_CHECKS[op](operation)


def _ethos_u_stops(graphs) -> list[Finding]:
    """Returns the operations whose weights of fewer than 8 bits end the compiler."""
    found = []
    for operation in (each for graph in graphs for each in graph.operations):
        narrow = [each for each in _tensors(operation) if each.dtype in _NARROW]
        if narrow:
            text = (
                f"{narrow[0].label} is {narrow[0].dtype}, int8 or uint8 is allowed: Vela 5.2.0 "
                f"ends with {_VELA_STOPS[narrow[0].dtype]} and compiles nothing"
            )
            found.append(Finding(operation.label, text, True))
    return found


def _pads(operation, window) -> bool:
    """Returns whether padding SAME adds anything to the first input."""
    source = _tensor(operation, 0)
    if _padding(operation) != "SAME" or source is None or len(source.shape) != 4:
        return False
    return any(
        (-(-size // max(stride, 1)) - 1) * stride + (length - 1) * dilation + 1 > size
        for size, stride, length, dilation in zip(
            source.shape[1:3],
            _strides(operation),
            window,
            _dilations(operation),
            strict=True,
        )
    )


def _ethos_u_stride(operation, window):
    strides = _strides(operation)
    if max(strides) > ETHOS_U_STRIDE:
        dilated = _dilations(operation) != (1, 1)
        if dilated or _pads(operation, window):
            yield (
                f"strides {strides} with {'dilation' if dilated else 'padding'}, at most "
                f"{ETHOS_U_STRIDE} are allowed"
            )


def _ethos_u_convolution(operation):
    weights = _tensor(operation, 1)
    if weights is not None and len(weights.shape) == 4:
        yield from _ethos_u_stride(operation, weights.shape[1:3])


def _ethos_u_depthwise(operation):
    if max(_strides(operation)) > ETHOS_U_STRIDE:
        yield f"strides {_strides(operation)}, at most {ETHOS_U_STRIDE} are allowed"


def _ethos_u_pool(operation):
    window = _filter(operation)
    yield from _ethos_u_stride(operation, window)
    if operation.op == "AVERAGE_POOL_2D" and _pads(operation, window):
        if max(window) > ETHOS_U_SAME_WINDOW:
            yield (
                f"window {window} with padding SAME, at most {ETHOS_U_SAME_WINDOW} high and wide "
                "is allowed"
            )
    elif window[0] > ETHOS_U_WINDOW_HEIGHT or window[0] * window[1] > ETHOS_U_WINDOW_AREA:
        yield (
            f"window {window}, a height of at most {ETHOS_U_WINDOW_HEIGHT} and an area of at most "
            f"{ETHOS_U_WINDOW_AREA} is allowed"
        )


def _ethos_u_transposed(operation):
    weights, source = _tensor(operation, 1), _tensor(operation, 2)
    if weights is None or source is None or len(weights.shape) != 4 or len(source.shape) != 4:
        return
    strides, window, sizes = _strides(operation), weights.shape[1:3], source.shape[1:3]
    flat = [size == length == 1 for size, length in zip(sizes, window, strict=True)]
    allowed = strides in ((1, 1), (2, 2)) or strides == (1, 2) and flat[0]
    if not allowed and not (strides == (2, 1) and flat[1]):
        yield f"strides {strides}, (1, 1) or (2, 2) is allowed"
        return
    same = _padding(operation) == "SAME"
    expected = tuple(
        size * stride + (0 if same else max(length - stride, 0))
        for size, stride, length in zip(sizes, strides, window, strict=True)
    )
    made = operation.outputs[0].shape[1:3]
    if made != expected:
        yield f"makes {made} of {sizes} with strides {strides}, {expected} is allowed"


def _ethos_u_mean(operation):
    source, axes = _tensor(operation, 0), _tensor(operation, 1)
    if source is None or not source.shape or axes is None or axes.data is None:
        return
    if axes.dtype != "int32" or axes.data.size % 4:
        return
    shape = source.shape
    reduced = {int(axis) % len(shape) for axis in axes.data.copy().view("int32")}
    if len(shape) == 4 and shape[0] != 1:
        yield f"a batch of {shape[0]}, 1 is allowed"
    long = [shape[axis] for axis in reduced if shape[axis] >= ETHOS_U_REDUCED_AXIS]
    if long:
        yield f"an axis of {long[0]} is averaged, fewer than {ETHOS_U_REDUCED_AXIS} are allowed"
    count = 1
    for axis in reduced:
        count *= shape[axis]
    most = ETHOS_U_REDUCED.get(source.dtype, count)
    if count > most:
        yield f"{count} {source.dtype} values are averaged, at most {most} are allowed"
    if len(shape) - 1 in reduced and all(size != 1 for size in shape[-3:]):
        yield f"averages channels of {shape}, which is allowed where a height, width or depth is 1"


def _ethos_u_resize(operation):
    source, target = _tensor(operation, 0), operation.outputs[0]
    if source is None or len(source.shape) != 4 or len(target.shape) != 4:
        return
    before, after = source.shape[1:3], target.shape[1:3]
    if before in ((1, 1), after) or min(before) < 1:
        return
    less = 1 if _option(operation, "alignCorners", False) else 0
    if min(before) <= less:
        return
    scales = tuple((new - less) / (old - less) for new, old in zip(after, before, strict=True))
    bilinear = operation.op == "RESIZE_BILINEAR"
    halves = bilinear and _option(operation, "halfPixelCenters", False)
    allowed = ETHOS_U_SCALES[:1] if halves else ETHOS_U_SCALES
    alone = 1 in after and 1.0 in scales
    if (scales[0] != scales[1] and not alone) or max(scales) not in allowed:
        yield (
            f"{before} to {after}{' with half-pixel centers' if halves else ''}, both sizes times "
            f"{_listed(allowed)} is allowed"
        )


def _ethos_u_same_map(operation):
    maps = {
        (tensor.scale.tobytes(), tensor.zero_point.tobytes())
        for tensor in (*operation.inputs[:2], *operation.outputs[:1])
        if tensor is not None
    }
    if len(maps) > 1:
        yield "inputs and output of different scales or zero points, one for all is allowed"


def _ethos_u_softmax(operation):
    source = _tensor(operation, 0)
    if source is not None and len(source.shape) > 2:
        height, width = source.shape[-3:-1]
        if height * width >= ETHOS_U_SOFTMAX_AREA:
            yield f"{height} x {width} positions, fewer than {ETHOS_U_SOFTMAX_AREA} are allowed"


_ETHOS_U_CHECKS = {
    "CONV_2D": _ethos_u_convolution,
    "DEPTHWISE_CONV_2D": _ethos_u_depthwise,
    "TRANSPOSE_CONV": _ethos_u_transposed,
    **dict.fromkeys(("AVERAGE_POOL_2D", "MAX_POOL_2D"), _ethos_u_pool),
    **dict.fromkeys(("RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR"), _ethos_u_resize),
    **dict.fromkeys(("MAXIMUM", "MINIMUM"), _ethos_u_same_map),
    "MEAN": _ethos_u_mean,
    "SOFTMAX": _ethos_u_softmax,
}

# target: (its limits, what happens beyond them, whether it then refuses the whole file)
_TARGETS = {
    "tflite-micro": (_micro_limits, "the interpreter refuses the file", True),
    "hexagon-delegate": (_hexagon_limits, "runs on the CPU", False),
    "ethos-u": (_ethos_u_limits, "runs on the CPU", False),
}
