"""A `.tflite` file run by TensorFlow Lite Micro's interpreter, on its reference kernels.

In a process of its own: its assertions abort, and would take ours along.  Needs the package
tflite_micro, of the extra `[micro]`.
"""

import dataclasses
import importlib.metadata
import importlib.util
import io
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from lowbit import integer_graph, lint, runtimes, tflite_file

# Of which only what is used becomes memory; MobileNet-v2 of 224 pixels takes 1.7 MB.
ARENA_BYTES = 2**29
_ARENA = re.compile(r"Arena allocation total (\d+) bytes")
# Reads the file and the inputs as .npz from stdin, writes each output of each image to stdout; the
# allocations and what is wrong go to stderr.
_RUN = """
import sys
import io
import numpy as np
from tflite_micro import runtime
given = np.load(io.BytesIO(sys.stdin.buffer.read()))
inputs = [given[f"input{number}"] for number in range(len(given.files) - 1)]
try:
    runner = runtime.Interpreter.from_bytes(given["content"].tobytes(), arena_size=int(sys.argv[1]))
    images = []
    for image in range(len(inputs[0])):
        for number, array in enumerate(inputs):
            runner.set_input(array[image : image + 1], number)
        runner.invoke()
        images.append([runner.get_output(number) for number in range(int(sys.argv[2]))])
    runner.print_allocations()
except (IndexError, RuntimeError, ValueError) as error:
    sys.exit(str(error))
made = io.BytesIO()
np.savez(made, *map(np.concatenate, zip(*images)))
sys.stdout.buffer.write(made.getvalue())
"""


@dataclasses.dataclass(frozen=True)
class Run:
    """What an interpreter computed, and the memory that it took."""

    outputs: tuple[np.ndarray, ...]  # of the file's outputs in order, (images, ...) each
    arena_bytes: int  # tensors at their peak, and what kernels keep; weights stay in the file


def check_installed() -> None:
    """Raises ValueError where the package tflite_micro is missing."""
    if importlib.util.find_spec("tflite_micro") is None:
        raise ValueError(
            "the package tflite_micro is missing: pip install 'lowbit[micro]', or tflite-micro itself"
        )


def version() -> str:
    """Returns the installed version of the package."""
    return importlib.metadata.version("tflite-micro")


def run(content: bytes, inputs: Sequence[np.ndarray], name: str = "model") -> Run:
    """Runs a file of anyone's over images, one after another.

    Args:
      content: the file; it is verified first (`lint.verify`).
      inputs: of the file's inputs in order, (images, ...) each, as the file takes them.
      name: for error messages.

    Raises:
      TFLiteFileError: for a damaged file.
      runtimes.RefusedError: where the interpreter refuses the file or the inputs, or dies of them.
      ValueError: where the package is missing, or there is no image.
    """
    check_installed()
    lint.verify(content, name)
    if not inputs or not len(inputs[0]):
        raise ValueError(f"{name}: an input without images; at least 1 is needed")
    given = io.BytesIO()
    arrays = {f"input{number}": array for number, array in enumerate(inputs)}
    np.savez(given, content=np.frombuffer(content, np.uint8), **arrays)
    outputs = len(tflite_file.parse(content, name).subgraphs[0].outputs)
    arguments = (str(ARENA_BYTES), str(outputs))
    done = runtimes.in_child(_RUN, arguments, given.getvalue(), f"{name}: TensorFlow Lite Micro", 4)
    with np.load(io.BytesIO(done.stdout)) as made:
        arrays = tuple(made[f"arr_{number}"] for number in range(outputs))
    (arena_bytes,) = _ARENA.findall(done.stderr.decode("utf-8", "replace"))
    return Run(arrays, int(arena_bytes))


def run_batches(
    content: bytes, graph: integer_graph.IntegerGraph, batches: Iterable[np.ndarray], name: str
) -> Iterator[np.ndarray]:
    """Yields the dequantized outputs of batches of float32 images, as `runtimes.run_litert` does.

    Args:
      content: the file, which has 1 input.
      graph: as it was read.
      name: for error messages.
    """
    for batch in batches:
        codes = runtimes.graph_codes(graph, batch)
        yield runtimes.graph_outputs(graph, run(content, [codes], name).outputs[0])
