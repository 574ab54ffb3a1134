"""What each operation of a `.tflite` file costs: multiply-accumulates, bytes of constants and outputs.

    rows = operations(content)      # one Cost for each operation of the main graph, in order

A multiply-accumulate (MAC) is one product that is added up; other work counts none:

    CONV_2D, CONV_3D      output elements * elements of one output channel's kernel
    DEPTHWISE_CONV_2D     output elements * kernel height * width
    TRANSPOSE_CONV        input elements * kernel height * width * output channels
    FULLY_CONNECTED       output elements * input depth
    BATCH_MATMUL          output elements * summed depth
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from lowbit import tflite_file, tflite_view


@dataclasses.dataclass(frozen=True)
class Cost:
    """An operation of a file."""

    number: int  # in the file's order
    op: str
    version: int
    name: str  # of its first output; "" and () and "" below where it has none
    input_shape: tuple[int, ...]  # of its first input that is no constant; () without one
    input_dtype: str
    weight_dtype: str  # of its largest constant; "" without one
    output_shape: tuple[int, ...]
    output_dtype: str
    macs: int
    constant_bytes: int  # of all its constant inputs, as stored; shared ones count each time
    output_bytes: int  # of its outputs in memory


def operations(content: bytes, name: str = "model") -> list[Cost]:
    """Returns the cost of each operation of the first subgraph.

    Args:
      content: the file's bytes.
      name: for error messages.

    Raises:
      TFLiteFileError: where the bytes are no `.tflite` file, or a damaged one: names the damage.
    """
    graph = _main(content, name)
    return [_cost(number, each) for number, each in enumerate(graph.operations)]


def totals(content: bytes, name: str = "model") -> dict[str, int]:
    """Returns operations, macs, constant_bytes (shared constants once), and peak_activation_bytes.

    The peak is the largest sum of tensors that are alive at one operation, in the file's order and
    without in-place tricks: an arena can be no smaller but for those.

    Raises as `operations`.
    """
    graph = _main(content, name)
    constants = [tensor for tensor in graph.tensors if tensor.data is not None]
    return {
        "operations": len(graph.operations),
        "macs": sum(map(_macs, graph.operations)),
        "constant_bytes": sum(tensor.data.size for tensor in constants),
        "peak_activation_bytes": _peak(graph),
    }


def by_op(costs: Sequence[Cost]) -> dict[str, dict[str, int]]:
    """Returns {op: {"count", "macs", "constant_bytes", "output_bytes"}}, most MACs first."""
    found: dict[str, dict[str, int]] = {}
    for cost in costs:
        total = found.setdefault(
            cost.op, {"count": 0, "macs": 0, "constant_bytes": 0, "output_bytes": 0}
        )
        total["count"] += 1
        for key in ("macs", "constant_bytes", "output_bytes"):
            total[key] += getattr(cost, key)
    return dict(sorted(found.items(), key=lambda item: (-item[1]["macs"], item[0])))


def dtypes(costs: Sequence[Cost]) -> Mapping[str, int]:
    """Returns how many operations make each output dtype."""
    found: dict[str, int] = {}
    for cost in costs:
        found[cost.output_dtype] = found.get(cost.output_dtype, 0) + 1
    return found


def _main(content, name):
    graphs, damage = tflite_view.describe(tflite_file.parse(content, name), content)
    if damage:
        raise tflite_file.TFLiteFileError(f"{name}: {damage[0]}")
    return graphs[0]


def _cost(number, operation):
    constants = [each for each in operation.inputs if each is not None and each.data is not None]
    activations = [each for each in operation.inputs if each is not None and each.data is None]
    largest = max(constants, key=lambda each: each.data.size, default=None)
    output = next(iter(operation.outputs), None)
    return Cost(
        number,
        operation.op,
        operation.version,
        "" if output is None else output.label.removeprefix("tensor ").strip("'"),
        activations[0].shape if activations else (),
        activations[0].dtype if activations else "",
        "" if largest is None else largest.dtype,
        () if output is None else output.shape,
        "" if output is None else output.dtype,
        _macs(operation),
        sum(each.data.size for each in constants),
        sum(map(tflite_view.size_bytes, operation.outputs)),
    )


def _macs(operation):
    shapes = [() if each is None else each.shape for each in operation.inputs]
    made = math.prod(operation.outputs[0].shape) if operation.outputs else 0
    if operation.op in ("CONV_2D", "CONV_3D", "FULLY_CONNECTED") and len(shapes) > 1 and shapes[1]:
        # A 3D kernel ends in (in, out), the others begin with out.
        channels = shapes[1][-1] if operation.op == "CONV_3D" else shapes[1][0]
        return made * math.prod(shapes[1]) // max(channels, 1)
    if operation.op == "DEPTHWISE_CONV_2D" and len(shapes) > 1 and len(shapes[1]) == 4:
        return made * shapes[1][1] * shapes[1][2]
    if operation.op == "TRANSPOSE_CONV" and len(shapes) > 2 and len(shapes[1]) == 4:
        return math.prod(shapes[2]) * math.prod(shapes[1][:3])
    if operation.op == "BATCH_MATMUL" and shapes and shapes[0]:
        transposed = getattr(operation.options, "adjX", False)
        return made * shapes[0][-2 if transposed and len(shapes[0]) > 1 else -1]
    return 0


def _peak(graph):
    last: dict[int, int] = {}
    for number, operation in enumerate(graph.operations):
        for tensor in (*operation.inputs, *operation.outputs):
            if tensor is not None:
                last[tensor.index] = number
    end = len(graph.operations)
    last |= dict.fromkeys(graph.outputs, end)
    alive = {
        index: tflite_view.size_bytes(graph.tensors[index])
        for index in graph.inputs
        if graph.tensors[index].data is None
    }
    peak = sum(alive.values())
    for number, operation in enumerate(graph.operations):
        alive |= {tensor.index: tflite_view.size_bytes(tensor) for tensor in operation.outputs}
        peak = max(peak, sum(alive.values()))
        alive = {index: size for index, size in alive.items() if last.get(index, -1) > number}
    return peak
