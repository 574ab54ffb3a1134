"""An integer graph on Qualcomm's Hexagon Tensor Processor (HTP), as its own libraries emulate it.

    run(graph, [codes]).outputs                     what the HTP's kernels compute, bit by bit
    simulated_cycles(graph, "qdq").cycles           what the libraries' performance model says

The graph goes as an ONNX file to onnxruntime-qnn, whose libQnnHtp.so for x86 compiles it as for a
phone and emulates the result.  All of it runs there: ONNX Runtime's fall-back to the CPU is off, and
a graph with an operator that the HTP does not take is refused.  The cycles are simulated, of the one
chip for which the library gives them; the seconds that emulation takes say nothing.

This is the HTP of Snapdragons from the 865's successor on (v68 and later), reached by QNN.  It is not
TFLite's Hexagon delegate for DSPs up to v66, whose libraries are not published.

In a process of its own, as a library that fails would take ours along.  Needs the packages of the
extra `[hexagon]`, at those versions; docs/hexagon.md tells their licence.
"""

import csv
import dataclasses
import io
import json
import os
import re
import tempfile
from collections.abc import Sequence

import numpy as np

from lowbit import integer_graph, runtimes
from lowbit.devices import pinned

# Codes and cycles are those of these versions.
VERSIONS = {"onnx": "1.23.2", "onnxruntime": "1.31.1", "onnxruntime-qnn": "2.7.0"}
# The chip for which the library gives cycles; all others of its list log "Performance Estimates
# unsupported".  Its HTP is of the generation of the Snapdragon 8 Gen 2 (SM8550).
CHIP = "SA8255"
ARCHITECTURE = "v73"
_PROVIDER_OPTIONS = {"soc_model": "52", "htp_arch": ARCHITECTURE[1:]}
_REFUSED = re.compile(r"Unsupported nodes in QNN EP: (.*)")
_FALL_BACK = "fallback to CPU EP has been explicitly disabled"
_NODE = re.compile(r"name: ([^,}]+?), type: (\w+)")
# What the profile calls them, and the fields of `Cycles`.
_EVENTS = {
    "Simulated (Accelerator exec cycles)": "cycles",
    "Simulated (Accelerator exec cycles (lower estimate))": "lower_cycles",
    "Simulated (Accelerator exec cycles (upper estimate))": "upper_cycles",
    "Simulated (Accelerator exec time us)": "simulated_us",
    "Simulated (Accelerator exec time us (lower estimate))": "lower_us",
    "Simulated (Accelerator exec time us (upper estimate))": "upper_us",
    "Missing Ops (Number of Ops with no Costs associated)": "without_cost",
}
# Reads the ONNX file and the inputs as .npz from stdin, and writes the outputs of all images, and
# what ran where, as .npz to stdout.  The libraries print there, too: they get stderr instead.
_RUN = """
import io, json, os, sys
results = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)
import numpy as np
import onnxruntime
import onnxruntime_qnn
given = np.load(io.BytesIO(sys.stdin.buffer.read()))
names = json.loads(sys.argv[1])
provider = {"backend_path": onnxruntime_qnn.get_qnn_htp_path(), **json.loads(sys.argv[2])}
if sys.argv[3]:
    provider |= {"profiling_level": "detailed", "profiling_file_path": sys.argv[3]}
onnxruntime.register_execution_provider_library("QNN", onnxruntime_qnn.get_library_path())
devices = [each for each in onnxruntime.get_ep_devices() if "QNN" in each.ep_name]
options = onnxruntime.SessionOptions()
options.log_severity_level = 3
options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
options.add_provider_for_devices(devices[:1], provider)
try:
    session = onnxruntime.InferenceSession(given["model"].tobytes(), options)
    assigned = session.get_provider_graph_assignment_info()
    inputs = {name: given[f"input{number}"] for number, name in enumerate(names)}
    images = [
        session.run(None, {name: array[image : image + 1] for name, array in inputs.items()})
        for image in range(len(next(iter(inputs.values()), ())))
    ]
except Exception as error:  # of many classes, one for each of ONNX Runtime's error codes
    sys.exit(str(error))
parts = [[part.ep_name, len(part.get_nodes())] for part in assigned]
made = io.BytesIO()
np.savez(made, parts=json.dumps(parts), *map(np.concatenate, zip(*images)))
results.write(made.getvalue())
results.close()
"""


class RefusedError(runtimes.RefusedError):
    """The HTP does not take the whole graph."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What the emulated HTP computed."""

    outputs: tuple[np.ndarray, ...]  # of the graph's outputs in order, (images, ...) each
    htp_nodes: int  # of the ONNX file, after ONNX Runtime's own rewrites; none run elsewhere
    htp_partitions: int  # 1: the whole network is one program of the HTP


@dataclasses.dataclass(frozen=True)
class Cycles:
    """What Qualcomm's performance model says of one inference on `CHIP`; simulated, never timed."""

    cycles: int
    lower_cycles: int
    upper_cycles: int
    simulated_us: int  # microseconds
    lower_us: int
    upper_us: int
    without_cost: int  # operators of the compiled program that the model counts as nothing


def check_installed() -> None:
    """Raises ValueError where a package is missing, or is another version."""
    pinned.check(VERSIONS, "hexagon", "codes and cycles of the emulated HTP are those of")


def run(
    graph: integer_graph.IntegerGraph,
    inputs: Sequence[np.ndarray],
    form: str = "qdq",
    name: str = "model",
) -> Run:
    """Runs a graph over images on the emulated HTP, one after another.

    Args:
      graph: batch size 1, int8; what `onnx_file.write` takes.
      inputs: of the graph's inputs in order, (images, ...) each: codes, or float16 for that form.
      form: of `onnx_file`: "qdq", or "float16".  Of "exact" the HTP takes some operations, in float16.
      name: for error messages.

    Raises:
      RefusedError: names the operators that the HTP does not take.
      ValueError: where a package is missing or another version, or the graph has no ONNX form.
    """
    if not inputs or not len(inputs[0]):
        raise ValueError(f"{name}: an input without images; at least 1 is needed")
    outputs, parts = _in_emulator(graph, inputs, form, name)
    ends = (graph.tensors[output] for output in graph.outputs)
    outputs = tuple(
        _flipped(codes) if (tensor.dtype, codes.dtype) == ("int8", np.uint8) else codes
        for tensor, codes in zip(ends, outputs, strict=True)
    )
    return Run(outputs, sum(nodes for _, nodes in parts), len(parts))


def simulated_cycles(
    graph: integer_graph.IntegerGraph, form: str = "qdq", name: str = "model"
) -> Cycles:
    """Returns the simulated cycles of one inference; the same in every call.  Raises as `run`."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        profile = os.path.join(folder, "profile.csv")
        _in_emulator(graph, [], form, name, profile)
        with open(profile, newline="") as file:
            for event in csv.DictReader(file):
                if event["Event Identifier"] in _EVENTS:
                    found[_EVENTS[event["Event Identifier"]]] = int(event["Time"])
    missing = set(_EVENTS.values()) - set(found)
    if missing:
        raise ValueError(f"{name}: the HTP's profile lacks {', '.join(sorted(missing))}")
    return Cycles(**found)


def _in_emulator(graph, inputs, form, name, profile=""):
    """Returns (outputs, [(where, nodes)]); the library appends to `profile`, a file's path."""
    check_installed()
    from lowbit import onnx_file

    content = onnx_file.write(_unsigned(graph), form)
    given = io.BytesIO()
    arrays = {
        f"input{number}": _flipped(array) if array.dtype == np.int8 else array
        for number, array in enumerate(inputs)
    }
    np.savez(given, model=np.frombuffer(content, np.uint8), **arrays)
    names = graph.inputs[: len(inputs)]
    arguments = (json.dumps(names), json.dumps(_PROVIDER_OPTIONS), profile)
    subject = f"{name}: the emulated HTP"
    try:
        # Above the exception's text stand the lines that name the operators.
        done = runtimes.in_child(_RUN, arguments, given.getvalue(), subject, 12)
    except runtimes.RefusedError as error:
        raise RefusedError(_explained(error, subject)) from error
    with np.load(io.BytesIO(done.stdout)) as made:
        parts = json.loads(str(made["parts"]))
        return [made[f"arr_{number}"] for number in range(len(made.files) - 1)], parts


def _unsigned(graph):
    """Returns the graph with codes of uint8, 128 higher, at its ends: what the HTP computes with.

    Converting int8 there takes MobileNet-v1 from 179,161 simulated cycles to 234,140.
    """
    tensors = dict(graph.tensors)
    for name in (*graph.inputs, *graph.outputs):
        tensor = tensors[name]
        if tensor.dtype == "int8":
            moved = dataclasses.replace(
                tensor.quantization, zero_point=tensor.quantization.zero_point + 128
            )
            tensors[name] = dataclasses.replace(tensor, dtype="uint8", quantization=moved)
    return dataclasses.replace(graph, tensors=tensors)


def _flipped(codes):
    """Returns codes of int8 as those of uint8 for the same numbers, or back."""
    other = {"int8": "uint8", "uint8": "int8"}[codes.dtype.name]
    return (codes.view(np.uint8) ^ np.uint8(128)).view(other)


def _explained(error, subject):
    """Returns a message that names the operators, where the libraries have named them."""
    text = str(error)
    if _FALL_BACK not in text:
        return text
    # An attempt that succeeds after ONNX Runtime has moved transposes names nodes, too.
    lines = _REFUSED.findall(text)
    nodes = list(dict.fromkeys(_NODE.findall(lines[-1]))) if lines else []
    shown = ", ".join(f"{op} {name}" for name, op in nodes[:5])
    more = f" and {len(nodes) - 5} more" if len(nodes) > 5 else ""
    return (
        f"{subject} does not take {shown or 'an operator that it does not name'}{more}: nothing may "
        "run on the CPU"
    )
