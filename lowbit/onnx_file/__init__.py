"""`.onnx` files: writes an integer graph as an ONNX model, in one of three forms.

| form    | what it is                                    | codes of the XNNPACK kernels             |
|---------|-----------------------------------------------|------------------------------------------|
| qdq     | float operators between DequantizeLinear and  | most, where the runtime fuses them; what |
|         | QuantizeLinear, with the graph's scales       | compilers of NPUs take                   |
| exact   | codes in, codes out: whole numbers, correctly | all, in any runtime with IEEE float32,   |
|         | rounded float32, and tables                   | optimized or not; several times slower   |
| float16 | the operators of qdq on real numbers, with    | none: inputs and outputs are float16; to |
|         | dequantized weights                           | compare an NPU's fp16 with its int8      |

The exact form's arithmetic; x, a, b are codes less their zero points, w the codes of weights:

| operation                      | computed as                                                        |
|--------------------------------|--------------------------------------------------------------------|
| convolutions, FULLY_CONNECTED  | Conv, Gemm in float32 of whole numbers below 2^24 (larger sums in  |
|                                | parts, added in int32); rint(float32(sum) * float32(multiplier))   |
| ADD, SUB                       | floor((a * m_a +- b * m_b + 2^(shift - 1)) / 2^shift), int32       |
| MUL                            | rint((a * b) * float32(s_a * s_b / s_out))                         |
| MEAN                           | rint(float32(sum) * scale + offset)                                |
| AVERAGE_POOL_2D                | sums by a Conv of ones, divided, ties away from zero               |
| SOFTMAX                        | a table of exponentials, CumSum, one reciprocal                    |
| functions, changes of scale    | a table of 256 codes that the simulator fills                      |
| ADD, SUB, MUL beyond XNNPACK   | a table of 65536 pairs that the simulator fills                    |
| all that moves codes           | on the codes                                                       |

There a DequantizeLinear or QuantizeLinear has scale 1: it takes zero points off, or rounds, adds them
and saturates.  A Round between Conv and Mul, which changes nothing, keeps optimizers from multiplying
the scales into the weights.

What ONNX Runtime 1.31 on x86 makes of the form qdq, with uint8 inside and default optimizations:

| operation                                     | codes that are not the kernels', all by 1           |
|-----------------------------------------------|-----------------------------------------------------|
| convolutions, FULLY_CONNECTED, MUL, and all   | none                                                |
| that moves or selects codes                   |                                                     |
| ADD, SUB                                      | a few of the 65536 pairs, whose sums nearly tie;    |
|                                               | 0.6 % where scales in a simple ratio give true ties |
| MEAN, LOGISTIC, TANH, GELU, SOFTMAX           | single ones, near ties                              |
| LEAKY_RELU; QUANTIZE from codes to codes      | 5 %: XNNPACK's multipliers have 8 fractional bits   |
| AVERAGE_POOL_2D                               | half of the ties: up to 15 %, of 2 by 2             |

and, in a network, all that follows from these.  Three warnings:

  * On processors with AVX2 or AVX-512 but without VNNI it adds pairs of products in 16 bits, saturated:
    nearly all codes differ, by tens.  The session option session.x64quantprecision=1 prevents that.
  * With int8 inside it moves only some tensors to uint8, and computes layers between the two in float:
    slower, and with other codes, unless session.qdqisint8allowed=1 (and not the option above, too).
  * Without its extended optimizations it computes in float: in each layer about 1 code of 10^6 differs,
    and by the end of a network many do.

Tensors of four axes lie as (batch, channels, height, width), all others as in the graph.  The model's
inputs and outputs stay as in the graph, behind and before a Transpose, unless `layout` is "NCHW".
"""

import json
from collections.abc import Mapping

import onnx
from onnx import helper

from lowbit import integer_graph
from lowbit.onnx_file import common, exact, float16, qdq

FORMS = ("qdq", "exact", "float16")
ACTIVATIONS = ("uint8", "int8")
LAYOUTS = ("NHWC", "NCHW")
OPSET = 18
GELU_OPSET = 20  # the first that has Gelu
IR_VERSIONS = {18: 8, 20: 9}  # the lowest that allow the opset: older runtimes load the file
MANIFEST_NAME = "lowbit"  # of the metadata property that holds preprocess, scheme and versions


def write(
    graph: integer_graph.IntegerGraph,
    form: str = "qdq",
    manifest: Mapping | None = None,
    activations: str = "uint8",
    layout: str = "NHWC",
) -> bytes:
    """Returns the graph as the bytes of an `.onnx` file; the same graph gives the same bytes.

    Args:
      graph: batch size 1, activations int8 (uint8 and float32 at the ends), weights int8.
      form: one of `FORMS`.
      manifest: JSON-able facts about the model, stored as metadata.
      activations: one of `ACTIVATIONS`, inside a model of form qdq; codes of uint8 are 128 higher.
      layout: of the model's inputs and outputs of four axes.

    Raises:
      ValueError: names the node or tensor that the form has no word for.
    """
    for value, known in ((form, FORMS), (activations, ACTIVATIONS), (layout, LAYOUTS)):
        if value not in known:
            raise ValueError(f"{value!r} is not one of {known}")
    _check(graph)
    if form == "exact":
        writer = exact.Exact(graph, layout)
    else:
        writer = {"qdq": qdq.Qdq, "float16": float16.Float16}[form](graph, layout, activations)
    writer.add_graph()
    opset = GELU_OPSET if any(node.op_type == "Gelu" for node in writer.nodes) else OPSET
    model = helper.make_model(
        helper.make_graph(
            writer.nodes, graph.name, writer.inputs, writer.outputs, writer.initializers
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=IR_VERSIONS[opset],
        producer_name="lowbit",
        doc_string=graph.description,
    )
    facts = {} if manifest is None else {MANIFEST_NAME: json.dumps(dict(manifest), sort_keys=True)}
    helper.set_model_props(model, facts)
    return model.SerializeToString(deterministic=True)


def read_manifest(content: bytes) -> dict:
    """Returns the facts that `write` stored, {} for a file of another tool."""
    model = onnx.load_model_from_string(content)
    facts = {entry.key: entry.value for entry in model.metadata_props}
    return json.loads(facts.get(MANIFEST_NAME, "{}"))


def _check(graph):
    for node in graph.nodes:
        if node.op not in common.OPERATIONS:
            raise ValueError(
                f"node {node.name}: no ONNX form of {node.op}; known are {', '.join(common.OPERATIONS)}"
            )
        allowed = ["int8", "uint8"]
        allowed += ["float32"] if node.op in ("QUANTIZE", "DEQUANTIZE") else []
        for name in _data_inputs(graph, node) + node.outputs:
            if graph.tensors[name].dtype not in allowed:
                raise ValueError(
                    f"node {node.name} ({node.op}): tensor {name} is {graph.tensors[name].dtype}; "
                    "ONNX is written for 8-bit activations and weights held in int8"
                )


def _data_inputs(graph, node):
    """Returns the inputs that hold codes of the operation: neither bias nor shapes, axes, ..."""
    if node.op in ("ADD", "SUB", "MUL", "MAXIMUM", "MINIMUM", *common.WEIGHTED):
        return node.inputs[:2]
    return node.inputs if node.op == "CONCATENATION" else node.inputs[:1]
