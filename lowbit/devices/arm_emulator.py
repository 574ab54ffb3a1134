"""A `.tflite` file run by LiteRT and XNNPACK on an emulated arm64 core: outputs and instructions.

qemu translates each arm64 instruction to this host's; the outputs are those of the real core.  How
long it takes says nothing of the real core's time, and neither does a count of instructions alone:
caches, memory and how many instructions a core does at once are not emulated.
"""

import dataclasses
import io
import pathlib
import tempfile
from collections.abc import Sequence

import numpy as np

from lowbit import integer_graph, lint, runtimes, tflite_file
from lowbit.devices import arm_root

CLASSES = ("all", "simd_fp", "int8_dot", "int_multiply_add", "fp_fma", "memory", "branch")
# Emulated, float32: MobileNet-v1 of 224 pixels takes 3 s an image on a core of this host.
_SECONDS_AN_IMAGE = 60
# Takes two numbers: how often to count, and of how many files.  Reads the files and their inputs as
# .npz from stdin, writes all outputs to stdout as .npz.  Each file runs over its images, then in
# between two marks (icount.c) as often as asked; the first time is not counted: the dynamic linker
# still looks names up then.  No Python code runs in between, for its interpreter specializes itself
# on the way: with a loop in Python repeats differed by up to 2,000 instructions.
SCRIPT = """
import sys
import collections
import ctypes
import functools
import gc
import io
import operator
import numpy as np
from ai_edge_litert import interpreter

mark = functools.partial(ctypes.CDLL(None).close, -4242)
gc.disable()

given = np.load(io.BytesIO(sys.stdin.buffer.read()))
repeats = int(sys.argv[1])
made = {}
try:
    for number in range(int(sys.argv[2])):
        content = given[f"content{number}"].tobytes()
        runner = interpreter.Interpreter(model_content=content, num_threads=1)
        runner.allocate_tensors()
        inputs, outputs = runner.get_input_details(), runner.get_output_details()
        arrays = [given[f"input{number}_{index}"] for index in range(len(inputs))]
        images = []
        for image in range(len(arrays[0])):
            for details, array in zip(inputs, arrays):
                runner.set_tensor(details["index"], array[image : image + 1])
            runner.invoke()
            images.append([runner.get_tensor(details["index"]) for details in outputs])
        for index, arrays in enumerate(zip(*images)):
            made[f"output{number}_{index}"] = np.concatenate(arrays)
        invoke = runner._interpreter.Invoke
        rounds = (mark, invoke, mark) * (repeats + 1 if repeats else 0)
        collections.deque(map(operator.call, rounds), maxlen=0)
except (IndexError, KeyError, RuntimeError, ValueError) as error:
    sys.exit(str(error))
buffer = io.BytesIO()
np.savez(buffer, **made)
sys.stdout.buffer.write(buffer.getvalue())
"""


@dataclasses.dataclass(frozen=True)
class Run:
    """What an emulated core computed, and the instructions that it took."""

    outputs: tuple[np.ndarray, ...]  # of the file's outputs in order, (images, ...) each
    # Of one image, each repeat's, by CLASSES; the call from Python adds about 2,000 to "all".
    counts: tuple[dict[str, int], ...]


def run(
    content: bytes,
    inputs: Sequence[np.ndarray],
    cpu: str,
    name: str = "model",
    repeats: int = 3,
    root: arm_root.ArmRoot | None = None,
) -> Run:
    """Runs a file of anyone's over images, one after another, in one thread.

    Args:
      content: the file; it is verified first (`lint.verify`).
      inputs: of the file's inputs in order, (images, ...) each, as the file takes them.
      cpu: one of arm_root.CPUS.
      name: for error messages.
      repeats: how often the instructions of the last image are counted; 0: not at all.
      root: the emulated phone; None: the one in the cache, set up where it is not there.

    Raises:
      TFLiteFileError: for a damaged file.
      runtimes.RefusedError: where the interpreter refuses the file or the inputs, or dies of them.
      ValueError: for another CPU, or where there is no image.
      ArmRootError, DebianError: where the emulated phone cannot be set up.
    """
    (done,) = run_all([content], [inputs], cpu, name, repeats, root)
    return done


def run_all(
    contents: Sequence[bytes],
    inputs: Sequence[Sequence[np.ndarray]],
    cpu: str,
    name: str = "model",
    repeats: int = 3,
    root: arm_root.ArmRoot | None = None,
) -> list[Run]:
    """Runs several files in one process, which takes 1.5 s to start; as `run` does each."""
    arm_root.check_cpu(cpu)
    if repeats < 0:
        raise ValueError(f"{name}: {repeats} repeats; at least 0 are needed")
    given = pack(contents, inputs, name)
    images = sum(len(arrays[0]) + repeats for arrays in inputs)
    root = root or arm_root.set_up()
    with tempfile.TemporaryDirectory() as folder:
        told = pathlib.Path(folder) / "counts.txt" if repeats else None
        done = runtimes.in_child(
            SCRIPT,
            (str(repeats), str(len(contents))),
            given,
            f"{name}: LiteRT on an emulated {cpu}",
            python=root.python(cpu, told),
            environment={},
            seconds=runtimes.TRIAL_SECONDS + _SECONDS_AN_IMAGE * images,
        )
        counts = told.read_text() if told else ""
    return unpack(done.stdout, counts, [_output_count(each, name) for each in contents], repeats)


def pack(contents: Sequence[bytes], inputs: Sequence[Sequence[np.ndarray]], name: str) -> bytes:
    """Returns what SCRIPT reads from stdin: files, each verified, and the inputs of each.

    Raises as `run` does for a damaged file, and where there is no image.
    """
    given: dict[str, np.ndarray] = {}
    for number, (content, arrays) in enumerate(zip(contents, inputs, strict=True)):
        lint.verify(content, name)
        if not arrays or not len(arrays[0]):
            raise ValueError(f"{name}: an input without images; at least 1 is needed")
        given[f"content{number}"] = np.frombuffer(content, np.uint8)
        given |= {f"input{number}_{index}": array for index, array in enumerate(arrays)}
    packed = io.BytesIO()
    np.savez(packed, **given)
    return packed.getvalue()


def unpack(stdout: bytes, counts: str, outputs: Sequence[int], repeats: int) -> list[Run]:
    """Returns what SCRIPT wrote.

    Args:
      stdout: its own.
      counts: the plugin's file; empty where nothing was counted.
      outputs: how many each file has.
      repeats: SCRIPT's first argument.
    """
    counted = _counts(counts, repeats, len(outputs))
    with np.load(io.BytesIO(stdout)) as made:
        arrays = [
            tuple(made[f"output{number}_{index}"] for index in range(size))
            for number, size in enumerate(outputs)
        ]
    return [Run(*pair) for pair in zip(arrays, counted, strict=True)]


def _output_count(content, name):
    return len(tflite_file.parse(content, name).subgraphs[0].outputs)


def _counts(text, repeats, files):
    """Returns the counts of each file's repeats from the plugin's lines.

    Each invocation is between two marks: every second line is of one.
    """
    marks = [line.split()[1:] for line in text.splitlines() if line.startswith("mark ")]
    found = [
        {name: int(count) for name, _, count in (word.partition("=") for word in words)}
        for words in marks[1::2]
    ]
    each = repeats + 1 if repeats else 0  # the first of each file is not counted
    return [tuple(found[number * each : (number + 1) * each][1:]) for number in range(files)]


def alone(graph: integer_graph.IntegerGraph, node: integer_graph.Node) -> bytes:
    """Returns a file of one node of a graph."""
    names = dict.fromkeys((*node.inputs, *node.outputs))
    tensors = {name: graph.tensors[name] for name in names if name}
    given = tuple(
        name for name in dict.fromkeys(node.inputs) if name and graph.tensors[name].data is None
    )
    return tflite_file.write(integer_graph.IntegerGraph(tensors, (node,), given, node.outputs))
