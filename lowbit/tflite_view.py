"""What any tool's `.tflite` file holds, as plain data: tensors, operations, graphs, or the damage.

    graphs, damage = describe(tflite_file.parse(content), content)

Nothing is run and no rule is applied: indices and types are checked so far that readers cannot trip.
"""

import dataclasses
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from lowbit import tflite_file

# Bits of a value in a buffer; values of less than 8 bits are packed. Strings have no fixed size.
BITS = {
    **{"int2": 2, "int4": 4, "uint4": 4, "int8": 8, "uint8": 8, "bool": 8},
    **{"int16": 16, "uint16": 16, "float16": 16, "bfloat16": 16},
    **{"float8_e4m3fn": 8, "float8_e5m2": 8},
    **{"int32": 32, "uint32": 32, "float32": 32},
    **{"int64": 64, "uint64": 64, "float64": 64, "complex64": 64, "complex128": 128},
}


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor as the file describes it."""

    label: str  # "tensor 'conv/kernel'"
    index: int
    dtype: str
    shape: tuple[int, ...]
    signature: tuple[int, ...]  # the shape with -1 for a dynamic size
    scale: np.ndarray  # float32 (0,), (1,) or (channels,)
    zero_point: np.ndarray  # int64
    axis: int
    blockwise: bool  # quantized in a way that these rules do not describe
    data: np.ndarray | None  # uint8, the buffer's bytes; None: an activation


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """An operation with its tensors."""

    label: str  # "CONV_2D 3 (makes 'conv')"
    op: str
    version: int
    inputs: tuple[Tensor | None, ...]  # None: an optional input that is left out
    outputs: tuple[Tensor, ...]
    options: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """A subgraph; operations are in the file's order, in which they run."""

    tensors: tuple[Tensor, ...]
    operations: tuple[Operation, ...]
    inputs: frozenset[int]  # tensor indices; empty for a subgraph that no caller sees
    outputs: frozenset[int]


def describe(model, content) -> tuple[list[Graph], list[str]]:
    """Returns the subgraphs, and a line for each damage that keeps one from being described.

    Args:
      model: the file's objects, of `tflite_file.parse`.
      content: the file's bytes.
    """
    called = {0, *(signature.subgraphIndex for signature in model.signatureDefs or [])}
    graphs, found = [], []
    for index, subgraph in enumerate(model.subgraphs):
        damage = _damage(model, subgraph)
        found.extend(damage)
        if not damage:
            graphs.append(_graph(model, subgraph, content, index in called))
    return graphs, found


def _damage(model, subgraph) -> list[str]:
    tensors, operations = subgraph.tensors, _sequence(subgraph.operators)
    found = [
        f"{_label(tensor, index)}: unknown type {tensor.type}"
        for index, tensor in enumerate(tensors)
        if tensor.type not in tflite_file.DTYPE_NAMES
    ]
    known = range(len(tensors))
    for number, operation in enumerate(operations):
        if operation.opcodeIndex >= len(model.operatorCodes or []):
            found.append(f"operation {number}: unknown operator code {operation.opcodeIndex}")
            continue
        label = f"{tflite_file.operator_name(model, operation)} {number}"
        reads = [index for index in _sequence(operation.inputs) if index != -1]
        makes = _sequence(operation.outputs)
        for index in (*reads, *makes):
            if index not in known:
                found.append(f"{label}: tensor {index} is not among the {len(tensors)} tensors")
        if not makes:
            found.append(f"{label}: has no output")
    for index in (*_sequence(subgraph.inputs), *_sequence(subgraph.outputs)):
        if index not in known:
            found.append(f"the graph's input or output {index} is not among its tensors")
    return found


def _graph(model, subgraph, content, called):
    tensors = tuple(
        _tensor(model, tensor, index, content) for index, tensor in enumerate(subgraph.tensors)
    )
    operations = []
    for number, operation in enumerate(_sequence(subgraph.operators)):
        op = tflite_file.operator_name(model, operation)
        makes = tuple(tensors[index] for index in _sequence(operation.outputs))
        operations.append(
            Operation(
                f"{op} {number} (makes {makes[0].label.removeprefix('tensor ')})",
                op,
                model.operatorCodes[operation.opcodeIndex].version,
                tuple(
                    None if index == -1 else tensors[index] for index in _sequence(operation.inputs)
                ),
                makes,
                operation.builtinOptions,
            )
        )
    return Graph(
        tensors,
        tuple(operations),
        frozenset(_sequence(subgraph.inputs) if called else ()),
        frozenset(_sequence(subgraph.outputs) if called else ()),
    )


def _tensor(model, tensor, index, content):
    parameters = tensor.quantization or schema.QuantizationParametersT()
    shape = tuple(_sequence(tensor.shape))
    signature = tuple(_sequence(tensor.shapeSignature)) or shape
    buffer = model.buffers[tensor.buffer]
    data = buffer.data
    if data is None and buffer.offset > 1:
        # Files of more than 2 GB keep a buffer's bytes behind the flatbuffer.
        data = np.frombuffer(content[buffer.offset : buffer.offset + buffer.size], np.uint8)
    return Tensor(
        _label(tensor, index),
        index,
        tflite_file.DTYPE_NAMES[tensor.type],
        shape,
        signature,
        np.asarray(_sequence(parameters.scale), np.float32),
        np.asarray(_sequence(parameters.zeroPoint), np.int64),
        int(parameters.quantizedDimension),
        bool(parameters.detailsType),
        None if data is None or len(data) == 0 else np.asarray(data, np.uint8),
    )


def _sequence(values) -> list:
    """Returns a flatbuffer vector (None, an array or a list of objects) as a list."""
    return [] if values is None else values.tolist() if hasattr(values, "tolist") else list(values)


def _label(tensor, index) -> str:
    """Returns a name of one line: converters join dozens of names, damage leaves control codes."""
    name = tensor.name or b""
    text = name.decode("utf-8", "replace") if isinstance(name, bytes) else name
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    text = text if len(text) <= 120 else f"{text[:117]}..."
    return f"tensor '{text}'" if text else f"tensor #{index}"
