"""Runs a model over images: in Keras, in the LiteRT interpreter, or in the simulator.

Each function takes a stream of float32 batches and yields their outputs, real numbers float32
(n, classes), one batch behind another; no more than a few batches are held.  The integer runtimes
get the same input codes, from `affine.quantize_input`.
"""

import collections
import concurrent.futures
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import keras
import numpy as np

from lowbit import affine, integer_graph, kernels, lint

KERNELS = ("xnnpack", "reference")
TRIAL_SECONDS = 600
# Loads the file on stdin and runs it once on zeros; an exception's last line says what it refuses.
_TRIAL = """
import sys
import numpy as np
from ai_edge_litert import interpreter
resolver = getattr(interpreter.OpResolverType, sys.argv[1])
runner = interpreter.Interpreter(
    model_content=sys.stdin.buffer.read(), experimental_op_resolver_type=resolver
)
runner.allocate_tensors()
for detail in runner.get_input_details():
    runner.set_tensor(detail["index"], np.zeros(detail["shape"], detail["dtype"]))
runner.invoke()
for detail in runner.get_output_details():
    runner.get_tensor(detail["index"])
"""
_RESOLVERS = {
    "xnnpack": "AUTO",
    "reference": "BUILTIN_REF",
    "builtin": "BUILTIN_WITHOUT_DEFAULT_DELEGATES",
}


class RefusedError(ValueError):
    """An interpreter in a process of its own refuses a file, dies of it, or does not end."""


def run_keras(model: keras.Model, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yields the outputs of a Keras model with one output."""
    size = None
    for batch in batches:
        size = size or len(batch)
        # A last batch that is smaller would be traced anew: it is filled up instead.
        padding = [(0, size - len(batch))] + [(0, 0)] * (batch.ndim - 1)
        filled = np.pad(batch, padding) if len(batch) < size else batch
        yield _matrix(np.asarray(model.predict_on_batch(filled))[: len(batch)])


def run_litert(
    content: bytes,
    batches: Iterable[np.ndarray],
    kernels: str = "xnnpack",
    threads: int | None = None,
) -> Iterator[np.ndarray]:
    """Yields the dequantized outputs of a `.tflite` file; one interpreter for each core.

    Args:
      content: the file.
      kernels: "xnnpack": the default interpreter; "reference": BUILTIN_REF.
      threads: interpreters side by side, each on one core; None: all cores.

    Raises:
      ValueError: where the interpreter refuses the file, or it has no output or not one input.
    """
    threads = threads or os.cpu_count() or 1
    lint.verify(content)
    pool: list = [_load(content, kernels) for _ in range(threads)]
    ends = len(pool[0].get_input_details()), len(pool[0].get_output_details())
    if ends[0] != 1 or ends[1] == 0:
        raise ValueError(
            f"the model has {ends[0]} inputs and {ends[1]} outputs; 1 input and an output are needed"
        )

    def run_batch(batch):
        runner = pool.pop()
        try:
            details = runner.get_input_details()[0]
            codes = input_codes(batch, details["dtype"], *details["quantization"])
            return invoke_each(runner, codes)
        finally:
            pool.append(runner)

    output = pool[0].get_output_details()[0]
    for codes in _in_order(run_batch, batches, threads):
        yield _matrix(_real(codes, *output["quantization"]))


def try_out(content: bytes, name: str, kernels: str = "xnnpack") -> None:
    """Raises where a file of anyone's cannot be handed to an interpreter in this process.

    It is verified (`lint.verify`), then loaded and run once, on zeros, in a process of its own:
    kernels abort or crash on files of which every index is right, and would take this process
    along.

    Raises:
      TFLiteFileError: for a damaged file.
      ValueError: where the interpreter refuses the file or dies of it.
    """
    lint.verify(content, name)
    in_child(_TRIAL, [_RESOLVERS[kernels]], content, f"{name}: LiteRT ({kernels} kernels)")


def in_child(
    script: str,
    arguments: Sequence[str],
    given: bytes,
    subject: str,
    lines: int = 1,
    *,
    python: Sequence[str] = (sys.executable,),
    environment: Mapping[str, str] | None = None,
    seconds: float = TRIAL_SECONDS,
) -> subprocess.CompletedProcess:
    """Runs a Python script in a process of its own, which an interpreter may abort.

    Args:
      script: its text.
      arguments: its sys.argv, from 1 on.
      given: its stdin.
      subject: who runs what, for error messages.
      lines: of stderr, the last ones: why it failed.
      python: the command that starts it, of another machine's emulator for example.
      environment: its own; None: this process'.
      seconds: that it may take.

    Raises:
      RefusedError: where the process fails, is killed, or takes longer.
    """
    try:
        done = subprocess.run(
            [*python, "-c", script, *arguments],
            input=given,
            env=environment,
            capture_output=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise RefusedError(f"{subject} does not end within {seconds:g} s") from error
    said = [line for line in done.stderr.decode("utf-8", "replace").splitlines() if line.strip()]
    said = "; ".join(said[-lines:])
    if done.returncode < 0:
        cause = signal.Signals(-done.returncode).name
        raise RefusedError(f"{subject} dies of it: {cause}{f': {said}' if said else ''}")
    if done.returncode:
        raise RefusedError(f"{subject} refuses the model: {said}")
    return done


def interpreter(content: bytes, kernels: str = "xnnpack", threads: int = 1, **options):
    """Returns an interpreter with tensors allocated; raises ValueError where it refuses the file.

    The file is verified first (`lint.verify`); one of anyone's goes through `try_out` before.
    """
    lint.verify(content)
    return _load(content, kernels, threads, **options)


def _load(content, kernels, threads=1, **options):
    from ai_edge_litert import interpreter as litert

    if kernels not in _RESOLVERS:
        raise ValueError(f"kernels {kernels!r} is not one of {', '.join(_RESOLVERS)}")
    try:
        runner = litert.Interpreter(
            model_content=content,
            num_threads=threads,
            experimental_op_resolver_type=getattr(litert.OpResolverType, _RESOLVERS[kernels]),
            **options,
        )
        runner.allocate_tensors()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"LiteRT refuses the model ({kernels} kernels): {error}") from error
    return runner


def invoke(runner, codes: np.ndarray) -> np.ndarray:
    """Returns the output codes for input codes of batch size 1."""
    runner.set_tensor(runner.get_input_details()[0]["index"], codes)
    try:
        runner.invoke()
    except RuntimeError as error:
        raise ValueError(f"LiteRT cannot run the model: {error}") from error
    return runner.get_tensor(runner.get_output_details()[0]["index"])


def invoke_each(runner, codes: np.ndarray) -> np.ndarray:
    """Returns the output codes of images (n, ...), one after another."""
    return np.concatenate([invoke(runner, image[None]) for image in codes])


def run_simulator(
    graph: integer_graph.IntegerGraph, batches: Iterable[np.ndarray], kernels_name: str = "xnnpack"
) -> Iterator[np.ndarray]:
    """Yields the dequantized outputs of the NumPy simulator, kernels "xnnpack" or "reference"."""

    def run_batch(batch):
        return simulate(graph, batch, kernels_name)

    for codes in _in_order(run_batch, batches, os.cpu_count() or 1):
        yield graph_outputs(graph, codes)


def simulate(graph: integer_graph.IntegerGraph, batch: np.ndarray, kernels_name: str) -> np.ndarray:
    """Returns the first output's codes for float32 images (n, h, w, c)."""
    codes = graph_codes(graph, batch)
    return kernels.run(graph, {graph.inputs[0]: codes}, kernels_name)[graph.outputs[0]]


def graph_codes(graph: integer_graph.IntegerGraph, batch: np.ndarray) -> np.ndarray:
    """Returns what a graph's one input takes of float32 images (n, h, w, c)."""
    (name,) = graph.inputs
    tensor = graph.tensors[name]
    quantization = (tensor.scale, tensor.zero_point) if tensor.quantization else (0.0, 0)
    return input_codes(batch, np.dtype(tensor.dtype), *quantization)


def graph_outputs(graph: integer_graph.IntegerGraph, codes: np.ndarray) -> np.ndarray:
    """Returns the first output's codes as real numbers, float32 (n, classes)."""
    output = graph.tensors[graph.outputs[0]]
    scale = (float(output.scale), output.zero_point) if output.quantization else (0.0, 0)
    return _matrix(_real(codes, *scale))


def input_codes(batch: np.ndarray, dtype, scale: float, zero_point: int) -> np.ndarray:
    """Returns what a model input of this dtype takes: codes, or float32 as it is."""
    if np.dtype(dtype) == np.float32:
        return batch.astype(np.float32)
    return affine.quantize_input(batch, scale, zero_point, np.dtype(dtype).name)


def _real(codes, scale, zero_point):
    if codes.dtype == np.float32:
        return codes
    return affine.dequantize(codes, np.float32(scale), np.int64(zero_point))


def _matrix(outputs):
    return outputs.reshape(len(outputs), -1)


def _in_order(run_batch: Callable, batches: Iterable, threads: int) -> Iterator:
    """Yields run_batch(batch) in order, `threads` of them at a time."""
    with concurrent.futures.ThreadPoolExecutor(threads) as executor:
        waiting: collections.deque = collections.deque()
        for batch in batches:
            waiting.append(executor.submit(run_batch, batch))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def is_tflite(path: str) -> bool:
    """Returns whether --model names a `.tflite` file."""
    return path.endswith(".tflite")
