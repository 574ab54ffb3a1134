"""What a compiler for an NPU has left of a `.tflite` file: the operators that still run on the CPU."""

from lowbit import tflite_file, tflite_view


def operators(content: bytes, custom: str, name: str = "model") -> list[tuple[str, str]]:
    """Returns (name of its first output, label) of each of a file's operators, but the NPU's.

    Args:
      content: the file, compiled or not; of a damaged one nothing.
      custom: the custom operator that stands for all that runs on the NPU, such as "ethos-u".
      name: for error messages.

    Raises:
      TFLiteFileError: where the bytes are no `.tflite` file.
    """
    model = tflite_file.parse(content, name)
    graphs, damage = tflite_view.describe(model, content)
    found = []
    for subgraph, graph in zip(model.subgraphs, () if damage else graphs, strict=not damage):
        for operator, operation in zip(subgraph.operators, graph.operations, strict=True):
            if model.operatorCodes[operator.opcodeIndex].customCode != custom.encode():
                made = tflite_file.sequence(operator.outputs)
                output = tflite_file.line(subgraph.tensors[made[0]].name) if made else ""
                found.append((output, operation.label))
    return found
