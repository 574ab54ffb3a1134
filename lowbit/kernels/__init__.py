"""The integer graph run in NumPy, giving the codes that a TFLite interpreter computes.

Three flavours, because "bit exact" needs a backend's name:

  reference   the interpreter with its reference kernels: fixed-point requantization
  xnnpack     the default interpreter: XNNPACK where its delegate takes the node, else the optimized
              built-in kernel; `delegate.placement_of` says which and why
  micro       TensorFlow Lite Micro with its reference kernels, 8-bit activations alone

| op                | reference and built-in                  | XNNPACK                            |
|-------------------|-----------------------------------------|------------------------------------|
| convolutions      | fixed point, see `weighted`             | rint(float32(accumulator) * scale) |
| FULLY_CONNECTED   | fixed point, see `weighted`             | the same                           |
| ADD, SUB          | both inputs * 2^20, three multipliers   | two 21-bit multipliers, one shift  |
| MUL               | fixed point, two roundings              | rint(float32(product) * scale)     |
| MEAN              | fixed point with 1/n in the multiplier  | rint(float32(sum) * scale / n)     |
| AVERAGE_POOL_2D   | sum / n, ties away from zero            | not delegated                      |
| RELU, RELU6       | fixed point, then clamp                 | not delegated                      |
| SOFTMAX           | reference: fixed-point exponential;     | not delegated                      |
|                   | built-in: float32 table of exponentials |                                    |
| LOGISTIC, TANH    | float32 table                           | float32 table, rounded otherwise   |
| LEAKY_RELU        | fixed point, two roundings              | 8 fractional bits                  |
| PRELU, RSQRT      | fixed point, two roundings              | not delegated                      |
| ELU               | none                                    | float32 table                      |
| GELU              | float32 table                           | not delegated                      |
| QUANTIZE, int8    | fixed point                             | 8 fractional bits (int8 to int8)   |
| QUANTIZE, float32 | divide, ties away from zero             | times 1/scale, ties to even        |
| RESIZE_BILINEAR   | weights of 10 bits, ties away from zero | weights of 11 bits, ties upwards   |
| the others        | move or select codes                    | the same                           |

micro is reference, but for: FULLY_CONNECTED, in fixed point as convolutions are; LOGISTIC and TANH,
in fixed point throughout; the multipliers of MUL, RELU and LEAKY_RELU, from float64 quotients of the
scales; RELU6, which only clamps; ELU, a float32 table of exp(x) - 1.

int16 activations run on reference and built-in kernels alone, with arithmetic of their own (`int16`);
so do convolutions with packed 4-bit weights, with that of int8.

All of these give the codes of an interpreter on x86 exactly, except the built-in ADD and MUL of
extreme scale ratios (see there).  On ARM these can differ by 1 near ties: XNNPACK's MUL, and its
convolutions and FULLY_CONNECTED with one scale for all channels, which are fixed point there
("rndnu"); MEAN where the compiler fuses multiply and add; SOFTMAX, which uses 16-bit tables.

Arrays have a free leading batch dimension, whatever batch the graph's shapes state; every image is
computed as a batch of 1 would be.  Accumulators are exact: products run in float32 where the
weights prove |accumulator| < 2^24, else in float64.  They are not wrapped to int32, as no kernel
defines that overflow.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from lowbit import integer_graph
from lowbit.kernels import (
    delegate,
    elementwise,
    functions,
    int16,
    moving,
    pooling,
    resizing,
    softmax,
    weighted,
)

FLAVOURS = ("xnnpack", "reference", "micro")
# What NumPy and Python raise where a damaged file's node does not fit its tensors.
_UNFIT = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, MemoryError)


def run(
    graph: integer_graph.IntegerGraph,
    inputs: Mapping[str, np.ndarray],
    kernels: str = "xnnpack",
    outputs: Sequence[str] | None = None,
) -> dict[str, np.ndarray]:
    """Returns the named tensors' codes; a tensor is freed when no later node reads it.

    Args:
      graph: nodes in running order.
      inputs: array of every graph input, (batch, ...), of the input tensor's dtype.
      kernels: one of `FLAVOURS`.
      outputs: tensors to return, also intermediate ones; the graph's outputs if None.

    Raises:
      ValueError: an input is missing, or has another dtype or shape than its tensor; an output is
        never computed; a node's operation is unknown or refused by the interpreter.
    """
    wanted = tuple(graph.outputs if outputs is None else outputs)
    _check_inputs(graph, inputs)
    last_use = {name: i for i, node in enumerate(graph.nodes) for name in node.inputs}
    values = dict(inputs)
    for i, node in enumerate(graph.nodes):
        arrays = [_value(graph, node, name, values) for name in node.inputs]
        values.update(zip(node.outputs, run_node(graph, node, arrays, kernels), strict=True))
        for name in {*node.inputs, *node.outputs}:
            if last_use.get(name, -1) <= i and name not in wanted:
                values.pop(name, None)
    missing = [name for name in wanted if name not in values]
    if missing:
        raise ValueError(f"no node of graph {graph.name!r} computes {missing}")
    return {name: values[name] for name in wanted}


def run_node(
    graph: integer_graph.IntegerGraph,
    node: integer_graph.Node,
    inputs: Sequence[np.ndarray],
    kernels: str,
) -> list[np.ndarray]:
    """Returns the node's outputs as its kernel computes them; `inputs` include the constants.

    Raises:
      ValueError: the operation is unknown, the default interpreter refuses the model for it, or
        its inputs, attributes and tensors do not fit each other; names the node.
    """
    if kernels not in FLAVOURS:
        raise ValueError(f"kernels must be one of {FLAVOURS}, got {kernels!r}")
    if node.op not in KERNELS:
        raise ValueError(
            f"node {node.name!r}: no kernel for {node.op!r}; there is one for {sorted(KERNELS)}"
        )
    try:
        if len(node.outputs) != 1:
            raise ValueError(f"has {len(node.outputs)} outputs; its kernel computes 1")
        _check_scales(graph, node)
        with np.errstate(divide="raise", over="raise", invalid="raise"):
            kernel, reason = delegate.placement_of(graph, node, kernels)
            if kernel == "refused":
                raise ValueError(reason)
            return [_kernel_of(graph, node)(graph, node, list(inputs), kernel)]
    except _UNFIT as error:
        text, name = str(error), f"node {node.name!r}"
        if isinstance(error, ValueError) and name in text:
            raise
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{name} ({node.op}): cannot be computed: {kind}{text}") from error


def _check_scales(graph, node):
    for name in (*node.inputs, *node.outputs):
        tensor = graph.tensors[name]
        scale = np.ones(1) if tensor.quantization is None else tensor.quantization.scale
        # A channel of weights that are all 0 may have scale 0.
        right = np.isfinite(scale) & ((scale > 0) | ((scale == 0) & (tensor.data is not None)))
        if not right.all():
            raise ValueError(f"tensor {name!r}: scale {scale[~right][0]} is not finite and above 0")


def _kernel_of(graph, node):
    """Returns the function of the node's operation and dtypes; raises ValueError in float."""
    dtypes = [graph.tensors[name].dtype for name in (*node.inputs, *node.outputs)]
    if "float32" in dtypes and node.op not in ("QUANTIZE", "DEQUANTIZE"):
        raise ValueError(
            f"node {node.name!r} ({node.op}) computes in float32; the simulator has integer kernels"
        )
    return (int16.KERNELS if "int16" in dtypes else KERNELS).get(node.op, KERNELS[node.op])


def _check_inputs(graph, inputs):
    for name in graph.inputs:
        if name not in inputs:
            raise ValueError(f"input {name!r} is missing; given: {sorted(inputs)}")
        tensor, array = graph.tensors[name], inputs[name]
        if array.dtype.name != tensor.dtype or array.shape[1:] != tuple(tensor.shape[1:]):
            raise ValueError(
                f"input {name!r} must be {tensor.dtype} of shape (batch, "
                f"{', '.join(map(str, tensor.shape[1:]))}), got {array.dtype.name} {array.shape}"
            )


def _value(graph, node, name, values):
    if name in values:
        return values[name]
    tensor = graph.tensors.get(name)
    if tensor is None or tensor.data is None:
        raise ValueError(f"node {node.name!r} reads {name!r}, which nothing has computed")
    return tensor.data


KERNELS = {
    "ADD": elementwise.add,
    "AVERAGE_POOL_2D": pooling.average_pool_2d,
    "CONCATENATION": moving.concatenation,
    "CONV_2D": weighted.conv_2d,
    "DEPTHWISE_CONV_2D": weighted.depthwise_conv_2d,
    "DEPTH_TO_SPACE": moving.depth_to_space,
    "DEQUANTIZE": elementwise.dequantize,
    "ELU": functions.elu,
    "FULLY_CONNECTED": weighted.fully_connected,
    "GELU": functions.gelu,
    "LEAKY_RELU": functions.leaky_relu,
    "LOGISTIC": functions.logistic,
    "MAXIMUM": elementwise.maximum,
    "MAX_POOL_2D": pooling.max_pool_2d,
    "MEAN": pooling.mean,
    "MINIMUM": elementwise.minimum,
    "MUL": elementwise.multiply,
    "PAD": moving.pad,
    "PRELU": functions.prelu,
    "QUANTIZE": elementwise.quantize,
    "RELU": elementwise.relu,
    "RELU6": elementwise.relu,
    "RELU_0_TO_1": elementwise.relu,
    "RESHAPE": moving.reshape,
    "RESIZE_BILINEAR": resizing.resize_bilinear,
    "RESIZE_NEAREST_NEIGHBOR": resizing.resize_nearest_neighbor,
    "RSQRT": functions.rsqrt,
    "SLICE": moving.slice_codes,
    "SOFTMAX": softmax.softmax,
    "SPACE_TO_DEPTH": moving.space_to_depth,
    "STRIDED_SLICE": moving.strided_slice,
    "SUB": elementwise.subtract,
    "TANH": functions.tanh,
    "TRANSPOSE": moving.transpose,
    "TRANSPOSE_CONV": weighted.transpose_conv,
}
