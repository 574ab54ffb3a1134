"""Damaged `.tflite` files by the thousand: where reader, checker or simulator gives no clear answer.

    python scripts/fuzz.py --files=10000 --seed=0 --output_dir=runs/fuzz

Every file is one of the seeds (small networks in each precision of eval.conformance, or --seeds) with
something changed (`mutations`).  It goes through STAGES in another process, with limits on time and
memory.  A stage may pass, or refuse the file with a ValueError whose message says what is wrong; all
else is a finding: its file is kept in OUTPUT_DIR/findings.  With --interpreter=N the first N files
that lint.verify passes also run in LiteRT, as the tools run anyone's file.
"""

import argparse
import collections
import functools
import json
import math
import pathlib
import re
import sys
import time
import warnings
import zlib

import mutations
import numpy as np
import worker

from export import summary
from lowbit import census, kernels, lint, progress, results, tflite_file

NAME = "m.tflite"  # of every file, in messages
# name: pieces of eval.layer_cases
NETWORKS = {
    "windows": (
        *("convolution, batch norm, relu6", "depthwise", "max pooling, same", "zero padding"),
        *("transposed, valid, window 3, strides 1", "average pooling", "resizing up", "cropping"),
        *("groups", "dense on an image"),
    ),
    "codes": (
        *("add, relu", "subtract", "squeeze and excite", "maximum", "concatenate", "permute"),
        *("silu", "leaky relu", "upsampling", "relu6 of a pool", "global max pooling, flat"),
        *("add, broadcast", "tanh"),
    ),
    "functions": ("relu of a pool", "gelu", "minimum", "softmax over channels"),
}
SHORTEST_MESSAGE = 15  # characters behind the file's name
# What Python and NumPy say without a word about the file; enough where a part of it is named too.
VAGUE = re.compile(
    r"out of (range|bounds)|has no attribute|subscriptable|iterable|unpack|unsupported operand"
    r"|argument|codec can't|NoneType|must be an? |^'[^']*'$"
)
NAMED = re.compile(r"(node|tensor|input|output|signature) ?['#(\d]|LiteRT|\b[A-Z][A-Z_\d]+ \d")
INPUT_ELEMENTS = 2**22  # of a graph's input; the fuzzer makes no larger one


# --- what each file goes through ----------------------------------------------------------------


def _summary(content):
    costs = census.operations(content, NAME)
    return str((census.by_op(costs), census.totals(content, NAME), [*map(summary.line, costs)]))


def _graph_json(content):
    from export import graph_json  # imports Keras, which a test's worker does without

    json.dumps(graph_json.as_dict(tflite_file.read(content, NAME)), allow_nan=False)


def _simulate(flavour, content):
    graph = tflite_file.read(content, NAME)
    random = np.random.default_rng(zlib.crc32(content))
    inputs = {name: _codes(graph.tensors[name], random) for name in graph.inputs}
    kernels.run(graph, inputs, flavour)


def _codes(tensor, random):
    shape = (2, *tensor.shape[1:])
    if min(shape) < 0 or len(shape) > 8 or math.prod(shape) > INPUT_ELEMENTS:
        raise ValueError(f"input '{tensor.name}' of shape {shape}: the fuzzer makes no such array")
    if tensor.dtype == "float32":
        return random.normal(size=shape).astype(np.float32)
    dtype = tensor.dtype if tensor.dtype in ("uint8", "int16", "int32", "int64") else "int8"
    limits = np.iinfo(dtype)
    return random.integers(limits.min, limits.max, shape, dtype, endpoint=True)


def _interpreter_is_guarded(content):
    from lowbit import runtimes

    try:
        lint.verify(content, NAME)
    except ValueError:
        runtimes.interpreter(content)
        raise AssertionError("the interpreter was given a file that is not verified") from None


# name: function of a file; lists that it returns are lines of text
STAGES = {
    "parse": lambda content: tflite_file.parse(content, NAME),
    "manifest": lambda content: tflite_file.read_manifest(content, NAME),
    "read": lambda content: tflite_file.read(content, NAME),
    "faults": lambda content: lint.faults(content, NAME),
    "notes": lambda content: lint.notes(content, NAME),
    "verify": lambda content: lint.verify(content, NAME),
    "summary": _summary,
    "graph_json": _graph_json,
    "xnnpack": functools.partial(_simulate, "xnnpack"),
    "reference": functools.partial(_simulate, "reference"),
    "guard": _interpreter_is_guarded,
}


def examine(content):
    """Returns {stage: outcome} of a file."""
    return {name: outcome(stage, content) for name, stage in STAGES.items()}


def run_interpreters(content):
    """Returns {"interpreter": outcome}: tried out in a process of its own, then run in this one."""
    from lowbit import runtimes

    def run(content):
        for flavour in runtimes.KERNELS:
            runtimes.try_out(content, NAME, flavour)
            graph = tflite_file.read(content, NAME)
            shape = graph.tensors[graph.inputs[0]].shape if graph.inputs else ()
            images = np.random.default_rng(0).normal(size=(2, *shape[1:])).astype(np.float32)
            list(runtimes.run_litert(content, [images], flavour, 1))

    return {"interpreter": outcome(run, content)}


def outcome(stage, content):
    """Returns "passed", "refused: ..." with the message, or "finding: ..."."""
    try:
        with warnings.catch_warnings(action="error"):
            found = stage(content)
    except ValueError as error:
        # One of 1 MB that needs more than the limit would fill a smaller machine's memory.
        if "MemoryError" in str(error) or not is_specific(str(error)):
            return f"finding: {type(error).__name__} that says too little: {str(error)!r}"
        return f"refused: {error}"
    except Exception as error:
        return f"finding: {type(error).__name__}: {error}"
    for line in found if isinstance(found, list) else []:
        if not line.isprintable() or not is_specific(line):
            return f"finding: a line that says too little, or is none: {line!r}"
    return "passed"


def is_specific(message):
    """Returns whether a message says what is wrong with the file."""
    text = message.removeprefix(f"{NAME}: ").removeprefix("damaged: ").strip()
    return len(text) >= SHORTEST_MESSAGE and bool(NAMED.search(text) or not VAGUE.search(text))


def prepare():
    """Imports what the stages do, before time and memory are limited."""
    from export import graph_json  # noqa: F401
    from lowbit import runtimes

    runtimes.TRIAL_SECONDS = 5  # two of them fit the limit of a file


# --- seeds and search ---------------------------------------------------------------------------


def build_seeds():
    """Returns {name: file}: each network of NETWORKS in each precision."""
    from eval import conformance
    from lowbit import calibration, lowering, placement, spec

    seeds = {}
    for network, pieces in NETWORKS.items():
        model, _ = conformance.build(conformance.Plan(pieces, (10, 9), 3, 0))
        images = conformance.smooth_images(np.random.default_rng(0), 4, 10, 9)
        for precision, (scheme, storage) in conformance.PRECISIONS.items():
            placed = placement.place(model, spec.scheme(scheme))
            if calibration.observed_points(placed):
                calibration.calibrate(placed, [images])
            graph = lowering.lower(placed, "", storage)
            seeds[f"{network}, {precision}"] = tflite_file.write(graph, {"scheme": scheme})
    return seeds


def search(seeds, arguments, ask):
    """Returns (Counter of "stage outcome", rows of findings), of --files mutated files.

    Args:
      seeds: {name: file}, all of them sound.  File number n is made by the generator of (--seed, n).
      arguments: the command's.
      ask: function(function, content), as `worker.Worker.ask`.
    """
    counts, findings = collections.Counter(), []
    folder, names = pathlib.Path(arguments.output_dir) / "findings", sorted(seeds)
    folder.mkdir(parents=True, exist_ok=True)
    for earlier in folder.glob("*.tflite"):
        earlier.unlink()
    with progress.bar("files", arguments.files) as update:
        for number in range(arguments.files):
            random = np.random.default_rng([arguments.seed, number])
            name = mutations.any_of(random, names)
            content, made = mutations.mutate(seeds[name], random)
            found, start = {}, time.monotonic()
            try:
                found |= ask(examine, content)
                slowest_ms = round(1e3 * (time.monotonic() - start))
                counts["slowest_ms"] = max(counts["slowest_ms"], slowest_ms)
                if found["verify"] == "passed" and counts["interpreted"] < arguments.interpreter:
                    counts["interpreted"] += 1
                    found |= ask(run_interpreters, content)
            except worker.WorkerEndedError as error:
                found["process"] = f"finding: {error}"
            counts.update(f"{stage} {text.partition(':')[0]}" for stage, text in found.items())
            texts = [f"{stage}: {text}" for stage, text in found.items() if "finding:" in text[:8]]
            if texts:
                file = f"{len(findings):04}.tflite"
                (folder / file).write_bytes(content)
                row = {"file": file, "number": number, "seed": name, "mutations": made}
                findings.append(row | {"finding": "; ".join(texts)})
                print(*findings[-1].values(), sep=" | ", file=sys.stderr)
            update(number + 1, f"{len(findings)} findings")
    return counts, findings


def main():
    """Prints how often each stage passed and refused; exit code 1 where there is a finding."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", default="runs/fuzz")
    parser.add_argument("--seeds", help="a folder of .tflite files, instead of our own")
    parser.add_argument("--interpreter", type=int, default=0, help="files that also run in LiteRT")
    parser.add_argument("--seconds", type=float, default=20, help="limit for each file")
    parser.add_argument("--memory_mib", type=int, default=1024, help="limit beyond the imports")
    arguments = parser.parse_args()
    start = time.monotonic()
    if arguments.seeds:
        paths = sorted(pathlib.Path(arguments.seeds).glob("*.tflite"))
        seeds = {path.name: tflite_file.load_bytes(path) for path in paths}
    else:
        seeds = build_seeds()
    if not seeds:
        sys.exit(f"--seeds={arguments.seeds}: holds no .tflite file")
    process = worker.Worker(arguments.seconds, arguments.memory_mib * 2**20, prepare)
    try:
        counts, findings = search(seeds, arguments, process.ask)
    finally:
        process.stop()
    table = [
        {"stage": stage} | {each: counts[f"{stage} {each}"] for each in ("passed", "refused")}
        for stage in (*STAGES, "interpreter")
    ]
    print(results.table(table, list(table[0])), file=sys.stderr)
    row = {"files": arguments.files, "seeds": len(seeds), "findings": len(findings)}
    row |= {f"{line['stage']}_passed": line["passed"] for line in table}
    row |= {"interpreted": counts["interpreted"], "slowest_seconds": counts["slowest_ms"] / 1e3}
    row |= {"seed": arguments.seed, "seconds": round(time.monotonic() - start, 1)}
    results.write_rows(f"{arguments.output_dir}/findings.csv", findings)
    results.append_row(f"{arguments.output_dir}/fuzz.csv", row | {"versions": results.versions()})
    print(json.dumps(row))
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    main()
