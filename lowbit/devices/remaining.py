"""What a compiler for an NPU has left of a `.tflite` file: the operators that still run on the CPU."""

from lowbit import tflite_file, tflite_view


def left(before: bytes, after: bytes, custom: str, name: str = "model") -> list[tuple[str, str]]:
    """Returns (name of its first output, label) of each operator that the compiler has left.

    Labels are those of the file before, "SOFTMAX 3 (makes 'probabilities')"; of a file whose tensors
    have no names of their own, those of the file after, which numbers its operators anew.

    Args:
      before: the file.
      after: what the compiler made of it.
      custom: the custom operator that stands for all that runs on the NPU, such as "ethos-u".
      name: for error messages.

    Raises:
      TFLiteFileError: where the bytes are no `.tflite` file.
    """
    known, found = operators(before, custom, name), operators(after, custom, name)
    names = [output for output, _ in known]
    if "" in names or len(set(names)) < len(names):
        return found
    on_cpu = {output for output, _ in found}
    return [(output, label) for output, label in known if output in on_cpu]


def operators(content: bytes, custom: str, name: str = "model") -> list[tuple[str, str]]:
    """Returns (name of its first output, label) of each of a file's operators, but the NPU's.

    Arguments and errors as of `left`; of a damaged file nothing.
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
