"""`.tflite` files: writes an integer graph as a flatbuffer and reads one back.

The same graph gives the same bytes.  Operator versions are those that TFLite's own converter would
set, so that a runtime too old for an operation refuses the file instead of misreading it.  Codes of 2
and 4 bits are packed, the first one in the lowest bits of a byte.
"""

import json
import math
import os
import pathlib
import struct
from collections.abc import Mapping

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from lowbit import integer_graph, operator_versions, runtime_versions

MANIFEST_NAME = (
    "lowbit"  # of the metadata entry that holds preprocess, scheme and versions, as JSON
)
# Of the metadata entry with the earliest runtime, which the converter writes too: 16 bytes, text
# and then zeros.
MIN_RUNTIME_NAME = "min_runtime_version"
MIN_RUNTIME_BYTES = 16
FILE_IDENTIFIER = b"TFL3"
BUFFER_ALIGNMENT = 16  # schema.fbs: Buffer.data is force_align: 16, so that weights can be mapped


class TFLiteFileError(ValueError):
    """The bytes are not a `.tflite` file that can be read."""


def _numbers(enumeration) -> dict[str, int]:
    return {name: value for name, value in vars(enumeration).items() if not name.startswith("_")}


OPERATOR_NUMBERS = _numbers(schema.BuiltinOperator)
OPERATOR_NAMES = {number: name for name, number in OPERATOR_NUMBERS.items()}
DTYPE_NUMBERS = {name.lower(): number for name, number in _numbers(schema.TensorType).items()}
DTYPE_NAMES = {number: name for name, number in DTYPE_NUMBERS.items()}
OPTION_NUMBERS = _numbers(schema.BuiltinOptions)
PADDING_NUMBERS = _numbers(schema.Padding)
PADDING_NAMES = {number: name for name, number in PADDING_NUMBERS.items()}
ACTIVATION_NUMBERS = _numbers(schema.ActivationFunctionType)
ACTIVATION_NAMES = {number: name for name, number in ACTIVATION_NUMBERS.items()}


WITHOUT_OUTPUT = ("CALL_ONCE", "ASSIGN_VARIABLE", "HASHTABLE_IMPORT")  # operations
PACKED_BITS = {"int2": 2, "int4": 4}  # of dtypes that NumPy lacks; in memory they are int8


# --- operator options: one row an operation, read and written from the same table ---------------

_STRIDES = {"strides": ("strideH", "strideW")}
_DILATIONS = {"dilations": ("dilationHFactor", "dilationWFactor")}
_FILTER = {"filter": ("filterHeight", "filterWidth")}
_PADDING = {"padding": "padding"}
_ACTIVATION = {"activation": "fusedActivationFunction"}

# op: (options table of the schema, {our attribute: its field or (height field, width field)})
OPTIONS = {
    "CONV_2D": ("Conv2DOptions", _STRIDES | _DILATIONS | _PADDING | _ACTIVATION),
    "DEPTHWISE_CONV_2D": (
        "DepthwiseConv2DOptions",
        _STRIDES | _DILATIONS | _PADDING | _ACTIVATION | {"depth_multiplier": "depthMultiplier"},
    ),
    "FULLY_CONNECTED": (
        "FullyConnectedOptions",
        _ACTIVATION | {"keep_num_dims": "keepNumDims"},
    ),
    "TRANSPOSE_CONV": ("TransposeConvOptions", _STRIDES | _PADDING | _ACTIVATION),
    "ADD": ("AddOptions", _ACTIVATION),
    "SUB": ("SubOptions", _ACTIVATION),
    "MUL": ("MulOptions", _ACTIVATION),
    "AVERAGE_POOL_2D": ("Pool2DOptions", _FILTER | _STRIDES | _PADDING | _ACTIVATION),
    "MAX_POOL_2D": ("Pool2DOptions", _FILTER | _STRIDES | _PADDING | _ACTIVATION),
    "MEAN": ("ReducerOptions", {"keep_dims": "keepDims"}),
    "CONCATENATION": ("ConcatenationOptions", {"axis": "axis"} | _ACTIVATION),
    "RESHAPE": ("ReshapeOptions", {"new_shape": "newShape"}),
    "SOFTMAX": ("SoftmaxOptions", {"beta": "beta"}),
    "PAD": ("PadOptions", {}),
    "SLICE": ("SliceOptions", {}),
    "TRANSPOSE": ("TransposeOptions", {}),
    "MAXIMUM": ("MaximumMinimumOptions", {}),
    "MINIMUM": ("MaximumMinimumOptions", {}),
    "RESIZE_NEAREST_NEIGHBOR": (
        "ResizeNearestNeighborOptions",
        {"align_corners": "alignCorners", "half_pixel_centers": "halfPixelCenters"},
    ),
    "RESIZE_BILINEAR": (
        "ResizeBilinearOptions",
        {"align_corners": "alignCorners", "half_pixel_centers": "halfPixelCenters"},
    ),
    "LOGISTIC": (None, {}),
    "TANH": (None, {}),
    "GELU": ("GeluOptions", {"approximate": "approximate"}),
    "LEAKY_RELU": ("LeakyReluOptions", {"alpha": "alpha"}),
    "ELU": (None, {}),
    "PRELU": (None, {}),
    "RSQRT": (None, {}),
    "STRIDED_SLICE": (
        "StridedSliceOptions",
        {
            "begin_mask": "beginMask",
            "end_mask": "endMask",
            "ellipsis_mask": "ellipsisMask",
            "new_axis_mask": "newAxisMask",
            "shrink_axis_mask": "shrinkAxisMask",
        },
    ),
    "DEPTH_TO_SPACE": ("DepthToSpaceOptions", {"block_size": "blockSize"}),
    "SPACE_TO_DEPTH": ("SpaceToDepthOptions", {"block_size": "blockSize"}),
    "RELU": (None, {}),
    "RELU6": (None, {}),
    "RELU_0_TO_1": (None, {}),
    "QUANTIZE": ("QuantizeOptions", {}),
    "DEQUANTIZE": ("DequantizeOptions", {}),
}


# Attribute of a node that another tool wrote: its operator as the file had it, and its version.
VERBATIM = "verbatim"


# --- write --------------------------------------------------------------------------------------


class _AlignedBuffer(schema.BufferT):
    """A buffer whose bytes start at a multiple of 16, which the generated class does not see to."""

    def Pack(self, builder):
        vector = None
        if self.data is not None:
            content = np.ascontiguousarray(self.data).view(np.uint8).tobytes()
            builder.StartVector(1, len(content), BUFFER_ALIGNMENT)
            builder.head -= len(content)
            builder.Bytes[builder.head : builder.head + len(content)] = content
            vector = builder.EndVector()
        schema.BufferStart(builder)
        if vector is not None:
            schema.BufferAddData(builder, vector)
        return schema.BufferEnd(builder)


def write(graph: integer_graph.IntegerGraph, manifest: Mapping | None = None) -> bytes:
    """Returns the graph as a `.tflite` flatbuffer.

    Args:
      graph: batch size 1; tensors in any order.
      manifest: JSON-able facts about the model, stored as metadata.

    Raises:
      ValueError: names the node whose operation this writer does not know.
    """
    model = schema.ModelT()
    model.version = 3
    model.description = graph.description.encode()
    model.buffers = [_AlignedBuffer()]  # buffer 0 is the empty one, by convention
    model.operatorCodes, model.metadata = [], []

    subgraph = schema.SubGraphT()
    subgraph.name = graph.name.encode()
    subgraph.tensors, subgraph.operators = [], []
    model.subgraphs = [subgraph]

    indices: dict[str, int] = {}
    for name, tensor in graph.tensors.items():
        indices[name] = len(subgraph.tensors)
        subgraph.tensors.append(_write_tensor(tensor, model))
    codes: dict[tuple[str, int], int] = {}
    for node in graph.nodes:
        subgraph.operators.append(_write_operator(node, graph, indices, codes, model))
    subgraph.inputs = [indices[name] for name in graph.inputs]
    subgraph.outputs = [indices[name] for name in graph.outputs]
    model.signatureDefs = [_write_signature(graph, indices)]
    if manifest is not None:
        content = json.dumps(dict(manifest), sort_keys=True).encode()
        _add_metadata(model, MANIFEST_NAME, content)
    runtime, _ = runtime_versions.minimum_runtime(codes)
    padded = (runtime or "").encode().ljust(MIN_RUNTIME_BYTES, b"\0")
    _add_metadata(model, MIN_RUNTIME_NAME, padded)

    builder = flatbuffers.Builder(
        sum(_size_bytes(tensor) for tensor in graph.tensors.values()) + 65536
    )
    builder.Finish(model.Pack(builder), file_identifier=FILE_IDENTIFIER)
    return bytes(builder.Output())


def _size_bytes(tensor):
    return 0 if tensor.data is None else tensor.data.nbytes + BUFFER_ALIGNMENT


def _write_tensor(tensor, model):
    result = schema.TensorT()
    result.name = tensor.name.encode()
    result.shape = np.array(tensor.shape, np.int32)
    result.type = DTYPE_NUMBERS[tensor.dtype]
    result.buffer = 0
    if tensor.quantization is not None:
        parameters = schema.QuantizationParametersT()
        parameters.scale = np.asarray(tensor.quantization.scale, np.float32)
        parameters.zeroPoint = np.asarray(tensor.quantization.zero_point, np.int64)
        parameters.quantizedDimension = tensor.quantization.axis or 0
        result.quantization = parameters
    if tensor.data is not None:
        buffer = _AlignedBuffer()
        buffer.data = _packed(tensor)
        result.buffer = len(model.buffers)
        model.buffers.append(buffer)
    return result


def _packed(tensor) -> np.ndarray:
    """Returns a constant's values, flat, those of 2 and 4 bits packed into bytes."""
    if tensor.dtype not in PACKED_BITS:
        return np.ascontiguousarray(tensor.data, np.dtype(tensor.dtype)).reshape(-1)
    bits = PACKED_BITS[tensor.dtype]
    codes = np.asarray(tensor.data, np.int8).reshape(-1)
    if codes.min(initial=0) < -(2 ** (bits - 1)) or codes.max(initial=0) >= 2 ** (bits - 1):
        raise ValueError(f"tensor {tensor.name}: codes leave {tensor.dtype}")
    per_byte = 8 // bits
    codes = np.pad(codes, (0, -codes.size % per_byte)).view(np.uint8) & (2**bits - 1)
    shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(bits)
    return np.bitwise_or.reduce(codes.reshape(-1, per_byte) << shifts, axis=1).astype(np.uint8)


def _unpacked(content, bits, count) -> np.ndarray:
    """Returns `count` codes of packed bytes, int8."""
    shifts = np.arange(8 // bits, dtype=np.uint8) * np.uint8(bits)
    codes = (content[:, None] >> shifts).reshape(-1)[:count] << np.uint8(8 - bits)
    return codes.view(np.int8) >> (8 - bits)


def _write_operator(node, graph, indices, codes, model):
    held, version = node.attributes.get(VERBATIM, (None, None))
    if held is None and node.op not in OPTIONS:
        raise ValueError(
            f"node {node.name}: no writer for {node.op}; known are {', '.join(OPTIONS)}"
        )
    key = (node.op, version or operator_versions.operator_version(node, graph.tensors))
    if key not in codes:
        code = schema.OperatorCodeT()
        code.builtinCode = OPERATOR_NUMBERS[node.op]
        code.deprecatedBuiltinCode = min(code.builtinCode, 127)
        code.version = key[1]
        codes[key] = len(model.operatorCodes)
        model.operatorCodes.append(code)
    operator = schema.OperatorT()
    operator.opcodeIndex = codes[key]
    operator.inputs = [indices[name] for name in node.inputs]
    operator.outputs = [indices[name] for name in node.outputs]
    if held is not None:
        operator.builtinOptions, operator.builtinOptionsType = (
            held.builtinOptions,
            held.builtinOptionsType,
        )
        operator.builtinOptions2, operator.builtinOptions2Type = (
            held.builtinOptions2,
            held.builtinOptions2Type,
        )
        return operator
    table, fields = OPTIONS[node.op]
    if table is not None:
        options = getattr(schema, f"{table}T")()
        for attribute, field in fields.items():
            _set_option(options, field, attribute, node.attributes[attribute])
        if node.op in ("ADD", "SUB"):
            # The default, true, makes int16 kernels with scales of powers of two fail or abort.
            options.potScaleInt16 = False
        operator.builtinOptions = options
        operator.builtinOptionsType = OPTION_NUMBERS[table]
    return operator


def _set_option(options, field, attribute, value):
    if isinstance(field, tuple):
        for name, number in zip(field, value, strict=True):
            setattr(options, name, int(number))
    elif attribute == "padding":
        options.padding = PADDING_NUMBERS[value]
    elif attribute == "activation":
        options.fusedActivationFunction = ACTIVATION_NUMBERS[value or "NONE"]
    else:
        setattr(options, field, list(value) if isinstance(value, tuple) else value)


def _write_signature(graph, indices):
    signature = schema.SignatureDefT()
    signature.signatureKey = b"serving_default"
    signature.subgraphIndex = 0

    def entries(names):
        maps = []
        for name in names:
            entry = schema.TensorMapT()
            entry.name, entry.tensorIndex = name.encode(), indices[name]
            maps.append(entry)
        return maps

    signature.inputs, signature.outputs = entries(graph.inputs), entries(graph.outputs)
    return signature


def _add_metadata(model, name, content):
    buffer = _AlignedBuffer()
    buffer.data = np.frombuffer(content, np.uint8)
    entry = schema.MetadataT()
    entry.name, entry.buffer = name.encode(), len(model.buffers)
    model.buffers.append(buffer)
    model.metadata.append(entry)


# --- read ---------------------------------------------------------------------------------------

_UNREADABLE = (struct.error, IndexError, TypeError, ValueError, AttributeError, OverflowError)
_RANK_LIMIT = 64  # of NumPy's arrays


def parse(content: bytes, name: str = "model") -> schema.ModelT:
    """Returns the flatbuffer's objects; `name` is for error messages.

    Raises:
      TFLiteFileError: where the bytes are no `.tflite` file, are cut short, or unfold to more
        entries than they hold.
    """
    if len(content) < 8 or content[4:8] != FILE_IDENTIFIER:
        raise TFLiteFileError(f"{name}: not a .tflite file (bytes 4 to 8 are not 'TFL3')")
    try:
        root = schema.Model.GetRootAsModel(content, 0)
        if _exceeds(root, len(content) // 4):
            raise TFLiteFileError(
                f"{name}: damaged: its lists have more entries than {len(content)} bytes hold"
            )
        model = schema.ModelT.InitFromObj(root)
        complete = bool(model.subgraphs) and all(
            0 <= tensor.buffer < len(model.buffers)
            for subgraph in model.subgraphs
            for tensor in subgraph.tensors
        )
    except TFLiteFileError:
        raise
    except _UNREADABLE as error:
        raise TFLiteFileError(f"{name}: damaged or cut short at {len(content)} bytes") from error
    if not complete:
        raise TFLiteFileError(f"{name}: damaged: no subgraph, or a tensor without a buffer")
    return model


def _exceeds(root, most) -> bool:
    """Returns whether the lists of a flatbuffer have more than `most` entries.

    An entry takes 4 bytes.  A list that many others refer to counts each time, as it is read each
    time: 5000 subgraphs that share 5000 tensors fit 40 kB, and would fill the memory.
    """
    for count in _list_lengths(root):
        most -= count
        if most < 0:
            return True
    return False


def _list_lengths(root):
    yield root.OperatorCodesLength() + root.BuffersLength() + root.MetadataLength()
    yield root.SubgraphsLength() + root.SignatureDefsLength()
    for subgraph in map(root.Subgraphs, range(root.SubgraphsLength())):
        yield subgraph.TensorsLength() + subgraph.OperatorsLength()
        yield subgraph.InputsLength() + subgraph.OutputsLength()
        for tensor in map(subgraph.Tensors, range(subgraph.TensorsLength())):
            yield tensor.ShapeLength() + tensor.ShapeSignatureLength()
            yield tensor.VariantTensorsLength()
            parameters, sparsity = tensor.Quantization(), tensor.Sparsity()
            if parameters is not None:
                yield parameters.ScaleLength() + 2 * parameters.ZeroPointLength()
            if sparsity is not None:
                yield sparsity.DimMetadataLength()
        for operator in map(subgraph.Operators, range(subgraph.OperatorsLength())):
            yield operator.InputsLength() + operator.OutputsLength()
    for signature in map(root.SignatureDefs, range(root.SignatureDefsLength())):
        yield signature.InputsLength() + signature.OutputsLength()


def buffer_array(model: schema.ModelT, tensor: schema.TensorT) -> np.ndarray | None:
    """Returns a constant tensor's values, shaped; None for an activation.

    Raises:
      TFLiteFileError: where the buffer's length is not the shape's.
    """
    data = model.buffers[tensor.buffer].data
    if data is None or len(data) == 0:
        return None
    name, shape = DTYPE_NAMES[tensor.type], _shape(tensor)
    content, count = np.asarray(data, np.uint8), math.prod(shape)
    bits = PACKED_BITS.get(name) or 8 * np.dtype(name).itemsize
    if (
        min(shape, default=1) < 0
        or len(shape) > _RANK_LIMIT
        or content.size != -(-count * bits // 8)
    ):
        raise TFLiteFileError(
            f"tensor {line(tensor.name)}: {content.size} bytes do not fill {name} {shape}"
        )
    if name in PACKED_BITS:
        return _unpacked(content, bits, count).reshape(shape)
    return content.view(name).reshape(shape)


def _text(name: bytes | str | None) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else (name or "")


def line(text: bytes | str | None) -> str:
    """Returns a text of one line: converters join dozens of names, damage leaves control codes."""
    text = "".join(letter if letter.isprintable() else "?" for letter in _text(text))
    return text if len(text) <= 120 else f"{text[:117]}..."


def label(tensor: schema.TensorT, index: int) -> str:
    """Returns "tensor 'name'", of one line, or "tensor #index" where it has no name."""
    text = line(tensor.name)
    return f"tensor '{text}'" if text else f"tensor #{index}"


def _shape(tensor) -> tuple[int, ...]:
    return tuple(sequence(tensor.shape))


def sequence(values) -> list:
    """Returns a flatbuffer vector (None, an array or a list of objects) as a list."""
    return [] if values is None else values.tolist() if hasattr(values, "tolist") else list(values)


def damage(model: schema.ModelT, subgraph: schema.SubGraphT) -> list[str]:
    """Returns a line for each type, index and operator code of a subgraph that does not exist."""
    tensors, operations = subgraph.tensors, sequence(subgraph.operators)
    found = [
        f"{label(tensor, index)}: unknown type {tensor.type}"
        for index, tensor in enumerate(tensors)
        if tensor.type not in DTYPE_NAMES
    ]
    known = range(len(tensors))
    for number, operation in enumerate(operations):
        if operation.opcodeIndex >= len(model.operatorCodes or []):
            found.append(f"operation {number}: unknown operator code {operation.opcodeIndex}")
            continue
        op = operator_name(model, operation)
        text = f"{op} {number}"
        reads = [index for index in sequence(operation.inputs) if index != -1]
        makes = sequence(operation.outputs)
        for index in (*reads, *makes):
            if index not in known:
                found.append(f"{text}: tensor {index} is not among the {len(tensors)} tensors")
        if not makes and op not in WITHOUT_OUTPUT:
            found.append(f"{text}: has no output")
    for index in (*sequence(subgraph.inputs), *sequence(subgraph.outputs)):
        if index not in known:
            found.append(f"the graph's input or output {index} is not among its tensors")
    return found


def operator_name(model: schema.ModelT, operator: schema.OperatorT) -> str:
    """Returns the builtin operator's name, also from files that set only the deprecated field."""
    code = model.operatorCodes[operator.opcodeIndex]
    number = max(code.builtinCode, code.deprecatedBuiltinCode)
    return OPERATOR_NAMES.get(number, f"operator {number}")


def operators(model: schema.ModelT) -> list[tuple[str, int]]:
    """Returns (op, version) of all subgraphs' operations, each once, in the file's order.

    Operations of an unknown operator code are left out; `damage` names them.
    """
    codes = sequence(model.operatorCodes)
    pairs = [
        (operator_name(model, operation), codes[operation.opcodeIndex].version)
        for subgraph in model.subgraphs
        for operation in sequence(subgraph.operators)
        if operation.opcodeIndex < len(codes)
    ]
    return list(dict.fromkeys(pairs))


def stated_runtime(model: schema.ModelT) -> str | None:
    """Returns the `min_runtime_version` that a file states; None without one, or where it is empty."""
    for entry in model.metadata or []:
        if _text(entry.name) == MIN_RUNTIME_NAME and entry.buffer < len(model.buffers):
            data = model.buffers[entry.buffer].data
            text = b"" if data is None else np.asarray(data, np.uint8).tobytes()
            return line(text.rstrip(b"\0")) or None
    return None


def read(content: bytes, name: str = "model", verbatim: bool = False) -> integer_graph.IntegerGraph:
    """Returns the first subgraph of a `.tflite` file as an integer graph.

    Tensors without a name, or with another's, get "#index" appended.

    Args:
      verbatim: nodes hold their options as the file has them, as `VERBATIM`, for `write` to repeat.

    Raises:
      TFLiteFileError: for damaged bytes.
    """
    model = parse(content, name)
    subgraph = model.subgraphs[0]
    found = damage(model, subgraph)
    if found:
        raise TFLiteFileError(f"{name}: damaged: {found[0]}")
    try:
        names, tensors = [], {}
        for index, tensor in enumerate(subgraph.tensors):
            text = _text(tensor.name)
            unique = text if text and text not in tensors else f"{text}#{index}"
            names.append(unique)
            tensors[unique] = integer_graph.Tensor(
                unique,
                _shape(tensor),
                DTYPE_NAMES[tensor.type],
                _read_quantization(tensor.quantization),
                buffer_array(model, tensor) if DTYPE_NAMES[tensor.type] in _ARRAY_DTYPES else None,
            )
        nodes = tuple(
            _read_operator(model, operator, number, names, verbatim)
            for number, operator in enumerate(subgraph.operators or [])
        )
        return integer_graph.IntegerGraph(
            tensors,
            nodes,
            tuple(names[index] for index in sequence(subgraph.inputs)),
            tuple(names[index] for index in sequence(subgraph.outputs)),
            _text(subgraph.name) or "main",
            _text(model.description),
        )
    except (*_UNREADABLE, KeyError) as error:
        raise TFLiteFileError(f"{name}: damaged: {error}") from error


_ARRAY_DTYPES = (
    "int2",
    "int4",
    "int8",
    "uint8",
    "int16",
    "int32",
    "int64",
    "float32",
    "float16",
    "bool",
)


def _read_quantization(parameters):
    if parameters is None or parameters.scale is None or len(parameters.scale) == 0:
        return None
    scale = np.asarray(parameters.scale, np.float32)
    zero_point = np.zeros(scale.shape, np.int64)
    if parameters.zeroPoint is not None and len(parameters.zeroPoint) == scale.size:
        zero_point = np.asarray(parameters.zeroPoint, np.int64)
    axis = int(parameters.quantizedDimension) if scale.size > 1 else None
    return integer_graph.Quantization(scale, zero_point, axis)


def _read_operator(model, operator, number, names, verbatim):
    op = operator_name(model, operator)
    # -1 stands for an optional input that is left out, such as a bias.
    inputs = tuple(names[index] for index in sequence(operator.inputs) if index >= 0)
    outputs = tuple(names[index] for index in sequence(operator.outputs))
    name = outputs[0] if outputs else f"{op}#{number}"
    attributes, (table, fields) = {}, OPTIONS.get(op, (None, {}))
    if verbatim:
        version = model.operatorCodes[operator.opcodeIndex].version
        return integer_graph.Node(op, name, inputs, outputs, {VERBATIM: (operator, version)})
    if fields and operator.builtinOptions is not None:
        if not isinstance(operator.builtinOptions, getattr(schema, f"{table}T")):
            held = type(operator.builtinOptions).__name__.removesuffix("T")
            raise TFLiteFileError(f"{op} {number} (makes {line(name)!r}): has {held}, not {table}")
        for attribute, field in fields.items():
            attributes[attribute] = _get_option(operator.builtinOptions, field, attribute)
    return integer_graph.Node(op, name, inputs, outputs, attributes)


def _get_option(options, field, attribute):
    if isinstance(field, tuple):
        return tuple(int(getattr(options, name)) for name in field)
    value = getattr(options, field)
    if attribute in ("padding", "activation"):
        names = PADDING_NAMES if attribute == "padding" else ACTIVATION_NAMES
        if value not in names:
            raise TFLiteFileError(
                f"unknown {attribute} {value}; known are {', '.join(names.values())}"
            )
        return None if names[value] == "NONE" else names[value]
    if attribute == "new_shape":
        return () if value is None else tuple(int(size) for size in value)
    return value


def read_manifest(content: bytes, name: str = "model") -> dict:
    """Returns the facts that `write` stored, {} for a file of another tool.

    Raises:
      TFLiteFileError: where the file or its facts are damaged.
    """
    model = parse(content, name)
    for entry in model.metadata or []:
        if _text(entry.name) == MANIFEST_NAME:
            try:
                if entry.buffer >= len(model.buffers):
                    raise ValueError(f"buffer {entry.buffer} is none of {len(model.buffers)}")
                data = model.buffers[entry.buffer].data
                facts = json.loads(b"" if data is None else np.asarray(data, np.uint8).tobytes())
                if not _finite(facts):  # a tool's row repeats them as JSON
                    raise ValueError("NaN or infinity")
            except UnicodeDecodeError as error:
                raise TFLiteFileError(f"{name}: damaged manifest: no JSON text") from error
            except (ValueError, RecursionError) as error:
                raise TFLiteFileError(f"{name}: damaged manifest: {error}") from error
            if not isinstance(facts, dict):
                raise TFLiteFileError(f"{name}: damaged manifest: not a JSON object")
            names = facts.get("class_names") or []
            if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
                raise TFLiteFileError(
                    f"{name}: damaged manifest: class_names are not a list of names"
                )
            return facts
    return {}


def _finite(facts) -> bool:
    """Returns whether all numbers of parsed JSON are finite: Python's parser takes NaN and 1e999."""
    if isinstance(facts, dict | list):
        return all(map(_finite, facts.values() if isinstance(facts, dict) else facts))
    return not isinstance(facts, float) or math.isfinite(facts)


def with_manifest(content: bytes, manifest: Mapping) -> bytes:
    """Returns a file of another tool with facts added, as `write` stores them."""
    model = parse(content)
    buffers = []
    for buffer in model.buffers:
        aligned = _AlignedBuffer()
        aligned.data = None if buffer.data is None else np.asarray(buffer.data, np.uint8)
        buffers.append(aligned)
    model.buffers, model.metadata = buffers, list(model.metadata or [])
    _add_metadata(model, MANIFEST_NAME, json.dumps(dict(manifest), sort_keys=True).encode())
    builder = flatbuffers.Builder(len(content) + 65536)
    builder.Finish(model.Pack(builder), file_identifier=FILE_IDENTIFIER)
    return bytes(builder.Output())


# --- files --------------------------------------------------------------------------------------


def load_bytes(path: str | os.PathLike) -> bytes:
    """Returns a `.tflite` file's bytes; raises FileNotFoundError or TFLiteFileError, with the path."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    content = path.read_bytes()
    parse(content, str(path))
    return content
