"""Lint: what keeps a `.tflite` file from being fully integer, or its numbers from being right.

    lint.faults(content, "model.tflite")  -> []                       nothing wrong
                                          -> ["tensor 'conv/bias': scale of channel 3 is ..."]

It takes any tool's file, reads the flatbuffer alone and never runs it: an interpreter crashes on
some damaged files.  The rules are TFLite's 8-bit quantization specification, and what the kernels
demand beyond it:

| what                    | rule                                                                  |
|-------------------------|-----------------------------------------------------------------------|
| tensors                 | integer; float32 only as input of the first QUANTIZE or output of the |
|                         | last DEQUANTIZE (not of files whose scheme leaves activations in      |
|                         | float); static shapes; bytes as many as the shape says                |
| activations             | one scale; int16: zero point 0                                        |
| weights                 | zero point 0; int8 in [-127, 127]; one scale, or one per channel      |
|                         | along `WEIGHTED`'s axis                                               |
| bias                    | int32 (int16 activations: or int64), scale s_in * s_w, zero point 0   |
| multiplier              | 2^-32 <= s_in * s_w / s_out < 256                                     |
| pools, concat, pad, ... | input and output of the same scale and zero point (`SAME_SCALE`)      |
| softmax, logistic, tanh | a fixed output scale and zero point (`FIXED_OUTPUT`)                  |
| operator versions       | those of operator_versions.operator_version, or higher                |
"""

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from lowbit import (
    integer_graph,
    operator_versions,
    runtime_versions,
    spec,
    tflite_file,
    tflite_view,
)
from lowbit.kernels import delegate

IO = ("any", "int8", "int16", "uint8", "float32")  # dtype that inputs and outputs must have

FLOATS = ("float16", "float32", "float64", "bfloat16", "float8_e4m3fn", "float8_e5m2")
QUANTIZED = ("int2", "int4", "uint4", "int8", "uint8", "int16")  # of activations and weights
# op: (input, weights, bias: positions among the node's inputs; axis of the weights' channels)
WEIGHTED = {
    "CONV_2D": (0, 1, 2, 0),
    "DEPTHWISE_CONV_2D": (0, 1, 2, 3),
    "FULLY_CONNECTED": (0, 1, 2, 0),
    "TRANSPOSE_CONV": (2, 1, 3, 0),
}
# XNNPACK refuses a model with a multiplier of 256; below 2^-32 TFLite's multiplier becomes 0.
MULTIPLIER_RANGE = (2.0**-32, 2.0**8)
BIAS_SCALE_TOLERANCE = 1e-6  # relative; converters round s_in * s_w in float32, 6e-8, or twice
# An int64 accumulator is shifted as a 48-bit number (int16 activations).
SATURATED = {"int32": 2**31 - 1, "int64": 2**47 - 1}

# op: positions of the inputs that the output shares its scale with; None: all.
SAME_SCALE = {
    **dict.fromkeys(("CONCATENATION", "MAXIMUM", "MINIMUM", "PACK")),
    **dict.fromkeys(
        (
            *("AVERAGE_POOL_2D", "MAX_POOL_2D", "PAD", "MIRROR_PAD", "RESHAPE", "SQUEEZE"),
            *("EXPAND_DIMS", "RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR", "TRANSPOSE", "SLICE"),
            *("STRIDED_SLICE", "SPACE_TO_DEPTH", "DEPTH_TO_SPACE", "SPACE_TO_BATCH_ND"),
            *("BATCH_TO_SPACE_ND", "GATHER", "GATHER_ND", "TILE", "BROADCAST_TO", "UNPACK"),
            *("SPLIT_V", "REDUCE_MAX", "REDUCE_MIN"),
        ),
        (0,),
    ),
    "PADV2": (0, 2),
    "SPLIT": (1,),
    **dict.fromkeys(("SELECT", "SELECT_V2"), (1, 2)),
}
# op: how many of its first inputs cannot be left out; 1 of the others in tflite_file.OPTIONS
REQUIRED_INPUTS = {
    **dict.fromkeys(("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "ADD", "SUB", "MUL"), 2),
    **dict.fromkeys(("MAXIMUM", "MINIMUM", "MEAN", "PAD", "TRANSPOSE", "PRELU"), 2),
    **{"RESIZE_NEAREST_NEIGHBOR": 2, "RESIZE_BILINEAR": 2, "SLICE": 3, "TRANSPOSE_CONV": 3},
    "STRIDED_SLICE": 4,
}
_UNIT = {"int8": (1 / 256, -128), "uint8": (1 / 256, 0), "int16": (1 / 32768, 0)}
_SIGNED_UNIT = {"int8": (1 / 128, 0), "uint8": (1 / 128, 128), "int16": (1 / 32768, 0)}
# op: {output dtype: (scale, zero point)}, which its kernel assumes
FIXED_OUTPUT = {
    "LOGISTIC": _UNIT,
    "SOFTMAX": _UNIT,
    "TANH": _SIGNED_UNIT,
    "L2_NORMALIZATION": _SIGNED_UNIT,
    "LOG_SOFTMAX": {"int8": (16 / 256, 127), "uint8": (16 / 256, 255)},
}


# --- faults -------------------------------------------------------------------------------------


def faults(
    content: bytes, name: str = "model", io: str = "any", floats: bool | None = None
) -> list[str]:
    """Returns a line for each thing wrong with a `.tflite` file, naming its tensor or operation.

    Args:
      content: the file's bytes.
      name: for error messages.
      io: dtype that the graph's inputs and outputs must have; "any": also float32, where only
        QUANTIZE and DEQUANTIZE stand between it and integers.
      floats: whether operations in float are right; None: where the file's scheme has them.

    Raises:
      TFLiteFileError: where the bytes are no `.tflite` file at all.
      ValueError: for an unknown `io`.
    """
    if io not in IO:
        raise ValueError(f"io {io!r} is not one of {', '.join(IO)}")
    model = tflite_file.parse(content, name)
    graphs, found = tflite_view.describe(model, content)
    if found:
        return found
    tensors = [tensor for graph in graphs for tensor in graph.tensors]
    if floats is None:
        floats = computes_in_float(manifest(content) or {})
    if not floats and not any(tensor.scale.size or tensor.blockwise for tensor in tensors):
        count = sum(tensor.dtype in FLOATS for tensor in tensors)
        return [f"float model: none of its {len(tensors)} tensors is quantized, {count} are float"]
    for graph in graphs:
        found += _io_faults(graph, io)
        if not floats:
            found += _float_faults(graph)
        found += _shape_faults(graph)
        found += _order_faults(graph)
        for tensor in graph.tensors:
            found += _bytes_faults(tensor)
            found += _quantization_faults(tensor)
        for operation in graph.operations:
            if not floats:
                found += _converts(operation, graph)
            for check in (
                _missing_inputs,
                _weights,
                _bias,
                _multiplier,
                _same_scale,
                _fixed,
                _version,
            ):
                found += check(operation, graph)
    return found


def verify(content: bytes, name: str = "model") -> None:
    """Raises where a file, of any scheme, breaks what an interpreter relies on without a check.

    Indices and types that exist, inputs that cannot be left out, constants of as many bytes as their
    shapes say, and every tensor computed before it is read.

    Raises:
      TFLiteFileError: names the file and the first such tensor or operation.
    """
    graphs, found = tflite_view.describe(tflite_file.parse(content, name), content)
    for graph in graphs:
        found += _negative_sizes(graph)
        found += _order_faults(graph)
        for tensor in graph.tensors:
            found += _bytes_faults(tensor)
        for operation in graph.operations:
            found += _missing_inputs(operation, graph)
    if found:
        raise tflite_file.TFLiteFileError(f"{name}: damaged: {found[0]}")


def computes_in_float(facts: Mapping) -> bool:
    """Returns whether one of the schemes that a file's facts name leaves activations in float."""
    try:
        named = spec.bits(facts["scheme"], *(facts.get(flag) for flag in spec.BITS_FLAGS))
    except (KeyError, ValueError, TypeError, AttributeError):
        return False
    return any(
        scheme.activations is None or (number and scheme.weights is None)
        for number, scheme in enumerate(named.schemes())
    )


def _io_faults(graph, io) -> Iterable[str]:
    for tensor in graph.tensors:
        enters, leaves = tensor.index in graph.inputs, tensor.index in graph.outputs
        if (enters or leaves) and io not in ("any", tensor.dtype):
            side = "input" if enters else "output"
            yield f"{tensor.label}: {side} is {tensor.dtype}, --io={io} asks for {io}"


def _float_faults(graph) -> Iterable[str]:
    makers = {tensor.index: made for made in graph.operations for tensor in made.outputs}
    readers: dict[int, list[tflite_view.Operation]] = {}
    for operation in graph.operations:
        for tensor in operation.inputs:
            if tensor is not None:
                readers.setdefault(tensor.index, []).append(operation)
    for tensor in graph.tensors:
        reads, maker = readers.get(tensor.index, []), makers.get(tensor.index)
        enters, leaves = tensor.index in graph.inputs, tensor.index in graph.outputs
        if tensor.dtype in FLOATS:
            first = enters and reads and all(read.op == "QUANTIZE" for read in reads)
            last = leaves and maker is not None and maker.op == "DEQUANTIZE" and not reads
            if tensor.dtype != "float32" or not (first or last):
                where = f", made by {maker.label}" if maker else ""
                where += f", read by {reads[0].label}" if reads else ""
                yield f"{tensor.label}: {tensor.dtype} inside the graph{where}"


def _shape_faults(graph) -> Iterable[str]:
    dynamic = [tensor for tensor in graph.tensors if min(tensor.signature, default=1) < 0]
    entering = [tensor for tensor in dynamic if tensor.index in graph.inputs]
    # What is computed from a dynamic input is dynamic too: one line says it for all of them.
    for tensor in entering or dynamic:
        batch_only = min(tensor.signature[1:], default=1) >= 0
        text = f"{tensor.label}: dynamic {'batch' if batch_only else 'shape'} {tensor.signature}"
        others = len(dynamic) - len(entering)
        yield f"{text}, and {others} tensors behind it" if entering and others else text
    yield from _negative_sizes(graph)


def _negative_sizes(graph) -> Iterable[str]:
    for tensor in graph.tensors:
        if min(tensor.signature, default=1) >= 0 and min(tensor.shape, default=1) < 0:
            yield f"{tensor.label}: shape {tensor.shape} has a size below 0"


def _order_faults(graph) -> Iterable[str]:
    made = {tensor.index for operation in graph.operations for tensor in operation.outputs}
    later = set(made) - graph.inputs
    for operation in graph.operations:
        for tensor in operation.inputs:
            if tensor is not None and tensor.index in later:
                yield f"{operation.label}: reads {tensor.label} before it is computed"
        later -= {tensor.index for tensor in operation.outputs}
    if not graph.inputs and not graph.outputs:
        return  # a subgraph that control flow calls
    known = graph.inputs | made
    read = [tensor for operation in graph.operations for tensor in operation.inputs]
    read += [graph.tensors[index] for index in sorted(graph.outputs)]
    for tensor in dict.fromkeys(read):
        if tensor is None or tensor.index in known or tensor.data is not None or tensor.special:
            continue
        if tflite_view.size_bytes(tensor):  # else it is a constant without elements
            yield f"{tensor.label}: is read, but nothing computes it"


def _bytes_faults(tensor) -> Iterable[str]:
    if (
        tensor.data is None
        or tensor.special
        or tensor.dtype not in tflite_view.BITS
        or min(tensor.shape, default=1) < 0
    ):
        return
    needed = tflite_view.size_bytes(tensor)
    if tensor.data.size != needed:
        yield (
            f"{tensor.label}: {tensor.data.size} bytes, {needed} needed for "
            f"{tensor.dtype} {tensor.shape}"
        )


def _quantization_faults(tensor) -> Iterable[str]:
    label, scale, zero_point = tensor.label, tensor.scale, tensor.zero_point
    if tensor.blockwise or tensor.dtype in FLOATS:
        return
    if scale.size == 0:
        if tensor.dtype in QUANTIZED and tensor.data is None:
            yield f"{label}: {tensor.dtype} without a scale"
        return
    wrong = ~(np.isfinite(scale) & (scale > 0))
    if wrong.any():
        channel = int(wrong.argmax())
        yield f"{label}: scale {scale[channel]}{_channel(scale, channel)} is not finite and above 0"
    if zero_point.size not in (0, scale.size):
        yield f"{label}: {zero_point.size} zero points for {scale.size} scales"
    if scale.size > 1:
        if tensor.data is None:
            yield f"{label}: {scale.size} scales on an activation; kernels take one"
        if not 0 <= tensor.axis < len(tensor.shape):
            yield f"{label}: quantized_dimension {tensor.axis} is no axis of {tensor.shape}"
        elif scale.size != tensor.shape[tensor.axis]:
            yield (
                f"{label}: {scale.size} scales, axis {tensor.axis} has {tensor.shape[tensor.axis]} "
                "channels; 1 scale or one per channel"
            )
    low, high = _limits(tensor.dtype)
    outside = (zero_point < low) | (zero_point > high)
    if outside.any():
        channel = int(outside.argmax())
        yield (
            f"{label}: zero point {zero_point[channel]}{_channel(zero_point, channel)} is outside "
            f"{tensor.dtype}, [{low}, {high}]"
        )
    elif tensor.dtype == "int16" and zero_point.any():
        yield f"{label}: zero point {zero_point[zero_point != 0][0]}, int16 kernels take 0 only"


def _limits(dtype) -> tuple[int, int]:
    bits = tflite_view.BITS.get(dtype, 64)
    if dtype.startswith("uint") or dtype == "bool":
        return 0, 2**bits - 1
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def _channel(array, channel) -> str:
    return f" of channel {channel}" if array.size > 1 else ""


def _missing_inputs(operation, graph) -> Iterable[str]:
    del graph
    if operation.op in tflite_file.OPTIONS:
        needed = REQUIRED_INPUTS.get(operation.op, 1)
        given = operation.inputs[:needed]
        if len(given) < needed or None in given:
            yield f"{operation.label}: lacks one of its first {needed} inputs"


def _converts(operation, graph) -> Iterable[str]:
    if operation.op not in ("QUANTIZE", "DEQUANTIZE") or not operation.inputs:
        return
    source, target = operation.inputs[0], operation.outputs[0]
    enters = source is not None and source.index in graph.inputs
    if target.index in graph.outputs or (enters and operation.op == "QUANTIZE"):
        return
    if source is not None and source.dtype == target.dtype and _has_fixed_range(source, graph):
        return
    dtypes = f"{source.dtype if source else 'nothing'} to {target.dtype}"
    advice = "; give its two sides one range" if source and source.dtype == target.dtype else ""
    yield f"{operation.label}: {dtypes} inside the graph{advice}"


def _has_fixed_range(tensor, graph) -> bool:
    """Returns whether a kernel sets a tensor's scale, or saturation at 0 and 1 its range.

    Where such a tensor joins others (a tanh in a concatenation), only a QUANTIZE can bring it to
    their scale.
    """
    maker = next((made for made in graph.operations if tensor in made.outputs), None)
    if maker is None or tensor.scale.size != 1 or tensor.dtype not in _TO_ONE:
        return False
    steps, lowest = _TO_ONE[tensor.dtype]
    saturates = abs(steps * float(tensor.scale[0]) - 1) < 1e-4 and tensor.zero_point[0] == lowest
    return maker.op in FIXED_OUTPUT or (maker.op in WEIGHTED and saturates)


# dtype: (codes from 0 to 1, code of 0) of a range [0, 1]
_TO_ONE = {"int8": (255, -128), "uint8": (255, 0), "int16": (32767, 0)}


def _parts(operation):
    """Returns (input, weights, bias, output, axis); each None where the node has no such thing."""
    if operation.op not in WEIGHTED:
        return None, None, None, None, 0
    *positions, axis = WEIGHTED[operation.op]
    chosen = [
        operation.inputs[position] if position < len(operation.inputs) else None
        for position in positions
    ]
    return *chosen, operation.outputs[0], axis


def _weights(operation, graph) -> Iterable[str]:
    del graph
    _, weights, _, _, axis = _parts(operation)
    if weights is None or weights.data is None or weights.dtype not in QUANTIZED:
        return
    label = f"{weights.label} of {operation.op}"
    if weights.scale.size == 0 and not weights.blockwise:
        yield f"{label}: {weights.dtype} weights without a scale"
    if weights.scale.size > 1 and weights.axis != axis:
        yield f"{label}: quantized_dimension {weights.axis}, the kernel takes {axis}"
    # uint8 weights, of files before 2019, are asymmetric.
    if weights.dtype != "uint8" and weights.zero_point.any():
        channel = int((weights.zero_point != 0).argmax())
        where = _channel(weights.zero_point, channel)
        yield f"{label}: weight zero point {weights.zero_point[channel]}{where}, kernels assume 0"
    if weights.dtype == "int8":
        count = int((weights.data == 128).sum())  # the byte of -128
        if count:
            yield f"{label}: {count} weights of -128, the range is [-127, 127]"


def _bias(operation, graph) -> Iterable[str]:
    del graph
    source, weights, bias, _, _ = _parts(operation)
    if source is None or weights is None or bias is None or source.dtype not in QUANTIZED:
        return
    label = f"{bias.label} of {operation.op}"
    allowed = ("int64", "int32") if source.dtype == "int16" else ("int32",)
    if bias.dtype not in allowed:
        yield f"{label}: {bias.dtype} bias, {source.dtype} activations take {' or '.join(allowed)}"
        return
    if bias.zero_point.any():
        yield f"{label}: bias zero point {bias.zero_point[bias.zero_point != 0][0]} is not 0"
    if bias.data is not None and bias.data.size % np.dtype(bias.dtype).itemsize == 0:
        codes = bias.data.copy().view(bias.dtype)
        saturated = (codes >= SATURATED[bias.dtype]) | (codes <= -SATURATED[bias.dtype])
        if saturated.any():
            channel = int(saturated.argmax())
            yield f"{label}: bias code {codes[channel]} of channel {channel} is saturated"
    if bias.scale.size == 0:
        yield f"{label}: bias without a scale"
    elif source.scale.size == 1 and weights.scale.size:
        if bias.scale.size not in (1, weights.scale.size) and weights.scale.size != 1:
            yield f"{label}: {bias.scale.size} bias scales for {weights.scale.size} weight scales"
            return
        with np.errstate(all="ignore"):
            product = source.scale.astype(np.float64) * weights.scale
            error = np.abs(bias.scale / product - 1)
        wrong = ~(error <= BIAS_SCALE_TOLERANCE)
        # The MLIR converter lets operations share an all-zero bias, whose scale does not matter.
        if wrong.any() and (bias.data is None or bias.data.any()):
            channel = int(wrong.argmax())
            values = np.broadcast_to(bias.scale, wrong.shape), np.broadcast_to(product, wrong.shape)
            yield (
                f"{label}: bias scale {values[0][channel]:.8g}{_channel(wrong, channel)} is not "
                f"input scale * weight scale = {values[1][channel]:.8g}"
            )


def _multiplier(operation, graph) -> Iterable[str]:
    del graph
    source, weights, _, output, _ = _parts(operation)
    if source is None or weights is None or source.scale.size != 1 or output.scale.size != 1:
        return
    with np.errstate(all="ignore"):
        multiplier = source.scale.astype(np.float64) * weights.scale / output.scale
    low, high = MULTIPLIER_RANGE
    wrong = ~((multiplier >= low) & (multiplier < high))
    if wrong.any():
        channel, others = int(wrong.argmax()), int(wrong.sum()) - 1
        more = f" (and of {others} other channels)" if others else ""
        yield (
            f"{operation.label}: requantization multiplier {multiplier[channel]:.6g} of channel "
            f"{channel}{more} is outside [2^-32, 256): scales {source.scale[0]:.6g} * "
            f"{weights.scale[channel]:.6g} / {output.scale[0]:.6g}"
        )


def _same_scale(operation, graph) -> Iterable[str]:
    del graph
    if operation.op not in SAME_SCALE:
        return
    positions = SAME_SCALE[operation.op]
    sources = [
        tensor
        for position, tensor in enumerate(operation.inputs)
        if tensor is not None and (positions is None or position in positions)
    ]
    for target in operation.outputs:
        # The uint8 concatenation kernel rescales; the others do not.
        rescales = operation.op == "CONCATENATION" and target.dtype == "uint8"
        if target.dtype not in QUANTIZED or rescales:
            continue
        for source in sources:
            if source.dtype in QUANTIZED and _map(source) != _map(target):
                yield (
                    f"{operation.label}: {source.label} has scale and zero point {_map(source)}, "
                    f"{target.label} {_map(target)}; {operation.op} does not rescale"
                )


def _map(tensor) -> tuple[float, int] | None:
    """Returns (scale, zero point) of a per-tensor quantized tensor, None for any other."""
    if tensor.scale.size != 1:
        return None
    zero_point = int(tensor.zero_point[0]) if tensor.zero_point.size else 0
    return float(tensor.scale[0]), zero_point


def _fixed(operation, graph) -> Iterable[str]:
    del graph
    if operation.op not in FIXED_OUTPUT:
        return
    output = operation.outputs[0]
    expected = FIXED_OUTPUT[operation.op].get(output.dtype)
    if expected is not None and _map(output) != expected:
        yield (
            f"{operation.label}: output scale and zero point {_map(output)}, kernels assume "
            f"{expected}"
        )


def _version(operation, graph) -> Iterable[str]:
    del graph
    inputs = [tensor for tensor in operation.inputs if tensor is not None]
    # QUANTIZE: every version knows 8-bit codes.  The table is that of int8 activations.
    if operation.op not in tflite_file.OPTIONS or operation.op == "QUANTIZE" or not inputs:
        return
    if inputs[0].dtype != "int8" or operation.outputs[0].dtype not in ("int8", "float32"):
        return
    needed = _needed_version(operation, inputs)
    if needed is not None and operation.version < needed:
        yield (
            f"{operation.label}: operator version {operation.version}, int8 needs {needed}: an old "
            "runtime would load and misread it"
        )


def _needed_version(operation, inputs) -> int | None:
    tensors = {
        str(tensor.index): integer_graph.Tensor(
            str(tensor.index),
            tensor.shape,
            tensor.dtype,
            integer_graph.Quantization(tensor.scale, np.zeros(tensor.scale.shape, np.int64)),
        )
        for tensor in (*inputs, *operation.outputs)
    }
    keep = getattr(operation.options, "keepNumDims", False)
    node = integer_graph.Node(
        operation.op,
        operation.label,
        tuple(str(tensor.index) for tensor in inputs),
        tuple(str(tensor.index) for tensor in operation.outputs),
        {"keep_num_dims": bool(keep)},
    )
    try:
        with np.errstate(all="ignore"):
            return operator_versions.operator_version(node, tensors)
    except (ValueError, IndexError):  # scales or inputs that lack: faults of their own
        return None


# --- notes --------------------------------------------------------------------------------------


def notes(content: bytes, name: str = "model", placement: bool = True) -> list[str]:
    """Returns lines about a `.tflite` file that are no faults: size, origin, kernels, runtime.

    Args:
      content: the file's bytes.
      name: for error messages.
      placement: whether to name each operation that leaves the XNNPACK delegate.

    Raises:
      TFLiteFileError: where the bytes are no `.tflite` file at all.
    """
    model = tflite_file.parse(content, name)
    tensors = [tensor for subgraph in model.subgraphs for tensor in subgraph.tensors]
    dtypes = Counter(tflite_file.DTYPE_NAMES.get(tensor.type, "unknown") for tensor in tensors)
    counts = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common())
    operations = sum(len(subgraph.operators or ()) for subgraph in model.subgraphs)
    found = [f"{len(content)} bytes, {operations} operations, {len(tensors)} tensors: {counts}"]
    facts = manifest(content)
    if facts is None:
        found.append("not written by lowbit")
    else:
        versions = facts.get("versions")
        version = versions.get("lowbit", "") if isinstance(versions, Mapping) else ""
        keys = [key for key in ("scheme", "preprocess", "io") if key in facts]
        rest = ", ".join(f"{key} {facts[key]}" for key in keys)
        found.append(tflite_file.line(f"written by lowbit {version}: {rest}".rstrip(" :")))
    left = _placement_notes(content, name)
    return found + (left if placement else left[:1]) + _runtime_notes(model)


def minimum_runtime(content: bytes, name: str = "model") -> str | None:
    """Returns the earliest TensorFlow Lite that knows all operator versions of a file.

    None where one of them is in no runtime that our table knows.

    Raises:
      TFLiteFileError: where the bytes are no `.tflite` file at all.
    """
    operators = tflite_file.operators(tflite_file.parse(content, name))
    if runtime_versions.unknown(operators):
        return None
    return runtime_versions.minimum_runtime(operators)[0]


def _runtime_notes(model) -> list[str]:
    operators = tflite_file.operators(model)
    runtime, asks = runtime_versions.minimum_runtime(operators)
    newer = ", ".join(
        f"{op} version {version}" for op, version in runtime_versions.unknown(operators)
    )
    found = []
    if runtime is not None:
        found.append(f"needs TensorFlow Lite {runtime}: {asks[0]} version {asks[1]}")
    if newer:
        found.append(
            tflite_file.line(
                f"runtime unknown: the table of TensorFlow {runtime_versions.NEWEST} lacks {newer}"
            )
        )
    stated = tflite_file.stated_runtime(model)
    if runtime is not None and stated not in (None, runtime):
        found.append(
            f"states {tflite_file.MIN_RUNTIME_NAME} {stated}; its operators need {runtime}"
        )
    return found


def manifest(content: bytes) -> dict | None:
    """Returns what lowbit stored in the file; None for another tool's, or where it is damaged."""
    try:
        facts = tflite_file.read_manifest(content)
    except (ValueError, TypeError, IndexError):
        return None
    return facts if isinstance(facts, dict) and facts else None


def _placement_notes(content, name) -> list[str]:
    try:
        graph = tflite_file.read(content, name)
    except tflite_file.TFLiteFileError as error:
        return [f"kernels unknown: {' '.join(str(error).split())}"]
    placed = placements(graph)
    kernels = Counter(kernel for kernel, _ in placed)
    found = [
        f"{node.op} {number}: {KERNEL_TEXTS[kernel]}: {reason}"
        for number, (node, (kernel, reason)) in enumerate(zip(graph.nodes, placed, strict=True))
        if kernel in KERNEL_TEXTS and _eight_bit(graph, node)
    ]
    text = f"{kernels['xnnpack']} of {len(graph.nodes)} operations run in the XNNPACK delegate"
    unknown = sum(
        kernel == "unknown" or not _eight_bit(graph, node)
        for node, (kernel, _) in zip(graph.nodes, placed, strict=True)
    )
    return [f"{text}, {unknown} are not known" if unknown else text, *found]


def placements(graph: integer_graph.IntegerGraph) -> list[tuple[str, str]]:
    """Returns `delegate.placement_of` for each node of any file's graph.

    The kernel is "unknown" of operations that the simulator lacks, and of those in float.
    """
    return [_placement(graph, node) for node in graph.nodes]


def _placement(graph, node) -> tuple[str, str]:
    if node.op not in tflite_file.OPTIONS or not _integer(graph, node):
        return "unknown", ""
    try:
        with np.errstate(all="ignore"):  # scales of 0 and NaN are faults of their own
            return delegate.placement_of(graph, node)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return "unknown", ""


KERNEL_TEXTS = {
    "builtin": "built-in kernel instead of XNNPACK",
    "refused": "the default interpreter refuses the whole model",
}


def _edges(graph, node) -> list[str]:
    return [graph.tensors[name].dtype for name in (*node.inputs[:1], *node.outputs[:1])]


def _eight_bit(graph, node) -> bool:
    dtypes = _edges(graph, node)
    return any(dtype in ("int8", "uint8") for dtype in dtypes) and "int16" not in dtypes


def _integer(graph, node) -> bool:
    return any(dtype in ("int8", "uint8", "int16") for dtype in _edges(graph, node))
