"""`.tflite` files: writes an integer graph as a flatbuffer and reads one back.

The same graph gives the same bytes.  Operator versions are those that TFLite's own converter would
set, so that a runtime too old for an operation refuses the file instead of misreading it.
"""

import json
import os
import pathlib
import struct
from collections.abc import Mapping

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from lowbit import integer_graph

MANIFEST_NAME = (
    "lowbit"  # of the metadata entry that holds preprocess, scheme and versions, as JSON
)
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
    "LOGISTIC": (None, {}),
    "TANH": (None, {}),
    "GELU": ("GeluOptions", {"approximate": "approximate"}),
    "LEAKY_RELU": ("LeakyReluOptions", {"alpha": "alpha"}),
    "RELU": (None, {}),
    "RELU6": (None, {}),
    "QUANTIZE": ("QuantizeOptions", {}),
    "DEQUANTIZE": ("DequantizeOptions", {}),
}


def operator_version(node: integer_graph.Node, tensors: Mapping[str, integer_graph.Tensor]) -> int:
    """Returns the version that the node's dtypes and attributes need (TFLite's op_version.cc)."""
    dtype = tensors[node.inputs[0]].dtype
    if dtype == "float32" or node.op == "RESHAPE":
        return 1
    if node.op in ("CONV_2D", "DEPTHWISE_CONV_2D"):
        return 3
    if node.op == "FULLY_CONNECTED":
        return 5 if node.attributes.get("keep_num_dims") else 4
    if node.op == "MUL":
        first, second = (tensors[name].scale for name in node.inputs[:2])
        return 3 if first * second / tensors[node.outputs[0]].scale >= 1 else 2
    return 2


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
        buffer.data = np.ascontiguousarray(tensor.data, np.dtype(tensor.dtype)).reshape(-1)
        result.buffer = len(model.buffers)
        model.buffers.append(buffer)
    return result


def _write_operator(node, graph, indices, codes, model):
    if node.op not in OPTIONS:
        raise ValueError(
            f"node {node.name}: no writer for {node.op}; known are {', '.join(OPTIONS)}"
        )
    key = (node.op, operator_version(node, graph.tensors))
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
    table, fields = OPTIONS[node.op]
    if table is not None:
        options = getattr(schema, f"{table}T")()
        for attribute, field in fields.items():
            _set_option(options, field, attribute, node.attributes[attribute])
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


def parse(content: bytes, name: str = "model") -> schema.ModelT:
    """Returns the flatbuffer's objects; `name` is for error messages.

    Raises:
      TFLiteFileError: where the bytes are no `.tflite` file or are cut short.
    """
    if len(content) < 8 or content[4:8] != FILE_IDENTIFIER:
        raise TFLiteFileError(f"{name}: not a .tflite file (bytes 4 to 8 are not 'TFL3')")
    try:
        model = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(content, 0))
        complete = bool(model.subgraphs) and all(
            0 <= tensor.buffer < len(model.buffers)
            for subgraph in model.subgraphs
            for tensor in subgraph.tensors
        )
    except _UNREADABLE as error:
        raise TFLiteFileError(f"{name}: damaged or cut short at {len(content)} bytes") from error
    if not complete:
        raise TFLiteFileError(f"{name}: damaged: no subgraph, or a tensor without a buffer")
    return model


def buffer_array(model: schema.ModelT, tensor: schema.TensorT) -> np.ndarray | None:
    """Returns a constant tensor's values, shaped; None for an activation.

    Raises:
      TFLiteFileError: where the buffer's length is not the shape's.
    """
    data = model.buffers[tensor.buffer].data
    if data is None or len(data) == 0:
        return None
    dtype, shape = np.dtype(DTYPE_NAMES[tensor.type]), _shape(tensor)
    content = np.asarray(data, np.uint8)
    if content.size != np.prod(shape, dtype=np.int64) * dtype.itemsize:
        raise TFLiteFileError(
            f"tensor {_text(tensor.name)}: {content.size} bytes do not fill {dtype} {shape}"
        )
    return content.view(dtype).reshape(shape)


def _text(name: bytes | str | None) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else (name or "")


def _shape(tensor) -> tuple[int, ...]:
    return () if tensor.shape is None else tuple(int(size) for size in tensor.shape)


def operator_name(model: schema.ModelT, operator: schema.OperatorT) -> str:
    """Returns the builtin operator's name, also from files that set only the deprecated field."""
    code = model.operatorCodes[operator.opcodeIndex]
    number = max(code.builtinCode, code.deprecatedBuiltinCode)
    return OPERATOR_NAMES.get(number, f"operator {number}")


def read(content: bytes, name: str = "model") -> integer_graph.IntegerGraph:
    """Returns the first subgraph of a `.tflite` file as an integer graph.

    Tensors without a name, or with another's, get "#index" appended.

    Raises:
      TFLiteFileError: for damaged bytes.
    """
    model = parse(content, name)
    subgraph = model.subgraphs[0]
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
            _read_operator(model, operator, names) for operator in subgraph.operators or []
        )
        return integer_graph.IntegerGraph(
            tensors,
            nodes,
            tuple(names[index] for index in subgraph.inputs),
            tuple(names[index] for index in subgraph.outputs),
            _text(subgraph.name) or "main",
            _text(model.description),
        )
    except TFLiteFileError:
        raise
    except (*_UNREADABLE, KeyError) as error:
        raise TFLiteFileError(f"{name}: damaged: {error}") from error


_ARRAY_DTYPES = ("int8", "uint8", "int16", "int32", "int64", "float32", "float16", "bool")


def _read_quantization(parameters):
    if parameters is None or parameters.scale is None or len(parameters.scale) == 0:
        return None
    scale = np.asarray(parameters.scale, np.float32)
    zero_point = np.zeros(scale.shape, np.int64)
    if parameters.zeroPoint is not None and len(parameters.zeroPoint) == scale.size:
        zero_point = np.asarray(parameters.zeroPoint, np.int64)
    axis = int(parameters.quantizedDimension) if scale.size > 1 else None
    return integer_graph.Quantization(scale, zero_point, axis)


def _read_operator(model, operator, names):
    op = operator_name(model, operator)
    attributes = {}
    for attribute, field in OPTIONS.get(op, (None, {}))[1].items():
        if operator.builtinOptions is not None:
            attributes[attribute] = _get_option(operator.builtinOptions, field, attribute)
    # -1 stands for an optional input that is left out, such as a bias.
    inputs = tuple(names[index] for index in operator.inputs if index >= 0)
    outputs = tuple(names[index] for index in operator.outputs)
    return integer_graph.Node(op, outputs[0], inputs, outputs, attributes)


def _get_option(options, field, attribute):
    if isinstance(field, tuple):
        return tuple(int(getattr(options, name)) for name in field)
    value = getattr(options, field)
    if attribute == "padding":
        return PADDING_NAMES[value]
    if attribute == "activation":
        name = ACTIVATION_NAMES[value]
        return None if name == "NONE" else name
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
                data = model.buffers[entry.buffer].data
                facts = json.loads(np.asarray(data, np.uint8).tobytes())
            except (IndexError, TypeError, ValueError) as error:
                raise TFLiteFileError(f"{name}: damaged manifest: {error}") from error
            if not isinstance(facts, dict):
                raise TFLiteFileError(f"{name}: damaged manifest: not a JSON object")
            return facts
    return {}


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
