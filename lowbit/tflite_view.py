"""What any tool's `.tflite` file holds, as plain data: tensors, operations, graphs, or the damage.

    graphs, damage = describe(tflite_file.parse(content), content)

Nothing is run and no rule is applied: indices and types are checked so far that readers cannot trip.
"""

import dataclasses
import math
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
    # A variable, sparse, or kept in another file: its bytes follow other rules.
    special: bool = False


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


def size_bytes(tensor: Tensor) -> int:
    """Returns how many bytes the tensor's shape and dtype take, packed; 0 for strings."""
    return -(-math.prod(tensor.shape) * BITS.get(tensor.dtype, 0) // 8)


def describe(model, content) -> tuple[list[Graph], list[str]]:
    """Returns the subgraphs, and a line for each damage that keeps one from being described.

    Args:
      model: the file's objects, of `tflite_file.parse`.
      content: the file's bytes.
    """
    graphs, found = [], _signature_damage(model)
    called = {0, *(signature.subgraphIndex for signature in model.signatureDefs or [])}
    for index, subgraph in enumerate(model.subgraphs):
        damage = tflite_file.damage(model, subgraph)
        found.extend(damage)
        if not damage:
            graphs.append(_graph(model, subgraph, content, index in called))
    return graphs, found


def _signature_damage(model) -> list[str]:
    found = []
    for signature in model.signatureDefs or []:
        text = f"signature '{tflite_file.line(signature.signatureKey)}'"
        if signature.subgraphIndex >= len(model.subgraphs):
            found.append(
                f"{text}: subgraph {signature.subgraphIndex} is none of {len(model.subgraphs)}"
            )
            continue
        known = len(model.subgraphs[signature.subgraphIndex].tensors)
        for entry in (*(signature.inputs or ()), *(signature.outputs or ())):
            if entry.tensorIndex >= known:
                found.append(f"{text}: tensor {entry.tensorIndex} is not among the {known} tensors")
    return found


def _graph(model, subgraph, content, called):
    tensors = tuple(
        _tensor(model, tensor, index, content) for index, tensor in enumerate(subgraph.tensors)
    )
    operations = []
    for number, operation in enumerate(tflite_file.sequence(subgraph.operators)):
        op = tflite_file.operator_name(model, operation)
        makes = tuple(tensors[index] for index in tflite_file.sequence(operation.outputs))
        operations.append(
            Operation(
                f"{op} {number} (makes {makes[0].label.removeprefix('tensor ')})"
                if makes
                else f"{op} {number}",
                op,
                model.operatorCodes[operation.opcodeIndex].version,
                tuple(
                    None if index == -1 else tensors[index]
                    for index in tflite_file.sequence(operation.inputs)
                ),
                makes,
                operation.builtinOptions,
            )
        )
    return Graph(
        tensors,
        tuple(operations),
        frozenset(tflite_file.sequence(subgraph.inputs) if called else ()),
        frozenset(tflite_file.sequence(subgraph.outputs) if called else ()),
    )


def _tensor(model, tensor, index, content):
    parameters = tensor.quantization or schema.QuantizationParametersT()
    shape = tuple(tflite_file.sequence(tensor.shape))
    signature = tuple(tflite_file.sequence(tensor.shapeSignature)) or shape
    buffer = model.buffers[tensor.buffer]
    data = buffer.data
    if data is None and buffer.offset > 1:
        # Files of more than 2 GB keep a buffer's bytes behind the flatbuffer.
        data = np.frombuffer(content, np.uint8)[buffer.offset : buffer.offset + buffer.size]
    return Tensor(
        tflite_file.label(tensor, index),
        index,
        tflite_file.DTYPE_NAMES[tensor.type],
        shape,
        signature,
        np.asarray(tflite_file.sequence(parameters.scale), np.float32),
        np.asarray(tflite_file.sequence(parameters.zeroPoint), np.int64),
        int(parameters.quantizedDimension),
        bool(parameters.detailsType),
        None if data is None or len(data) == 0 else np.asarray(data, np.uint8),
        bool(tensor.isVariable or tensor.sparsity or tensor.externalBuffer),
    )
