"""A `.tflite` file on an emulated arm64 core: its codes against this host's, and its instructions.

Everything here is emulated: a row's counts are instructions, not time, and never a device's latency.
"""

import dataclasses
import time

import numpy as np

from eval import coded_images
from lowbit import integer_graph, manifest, progress, results, runtimes, tflite_file
from lowbit.data import datasets, pipeline
from lowbit.data import preprocess as preprocessing
from lowbit.devices import arm_emulator, arm_root
from lowbit.kernels import delegate

_IMAGES_AT_A_TIME = 10  # of a process that takes 2 to 5 s to start and to load


@dataclasses.dataclass(frozen=True)
class Model:
    """A file that was read, with one input of images."""

    path: str
    content: bytes
    graph: integer_graph.IntegerGraph
    facts: dict

    @property
    def input(self) -> integer_graph.Tensor:
        """What it takes."""
        return self.graph.tensors[self.graph.inputs[0]]

    @property
    def output(self) -> integer_graph.Tensor:
        """What it gives first."""
        return self.graph.tensors[self.graph.outputs[0]]


def measure(
    *,
    model: str,
    dataset: str,
    cpu: str = "cortex-a76",
    split: str | None = None,
    limit: int = 20,
    preprocess: str | None = None,
    float_model: str | None = None,
    repeats: int = 3,
    operators: bool = False,
    output_dir: str = "results",
) -> dict:
    """Runs images on an emulated core and on this host; returns the result row.

    The first `limit` images run through both, in LiteRT with XNNPACK in one thread, and output codes
    that differ are counted.  Instructions are those of one image.  Where a code differs, or with
    `operators`, each node is run alone as well, on what the host computed before it, so that the
    one that differs is named.

    Args:
      model: a .tflite file with one input of images and an output.
      dataset: images: a name or a path.
      cpu: one of arm_root.CPUS.
      split: which of the images; None: as `datasets.default_split` has it.
      limit: images, the first ones.
      preprocess: the normalization; None: as saved with the model.
      float_model: the same network in float, for the ratio of instructions; counted on one image.
      repeats: how often instructions are counted, on the same image.
      operators: whether every node's row goes to arm_emulator_operators.csv.
      output_dir: where arm_emulator.csv gets its row.

    Raises:
      ValueError: for an argument out of range, or a file that cannot be run.
      OSError: where the emulated phone cannot be set up (arm_root.ArmRootError, DebianError).
    """
    start = time.monotonic()
    arm_root.check_cpu(cpu)
    if limit < 1 or repeats < 1:
        raise ValueError(f"--limit={limit} and --repeats={repeats} must be at least 1")
    opened = _open(model)
    other = _open(float_model) if float_model is not None else None
    if other is not None and other.input.shape[1:] != opened.input.shape[1:]:
        raise ValueError(
            f"{float_model} takes images of {other.input.shape[1:]}, {model} of "
            f"{opened.input.shape[1:]}: not the same network"
        )
    if other is not None and any(
        other.graph.tensors[name].dtype != "float32"
        for node in other.graph.nodes
        for name in node.outputs
    ):
        raise ValueError(f"{float_model} computes in integers; the ratio is of float to integers")
    text = preprocessing.first_known(model, preprocess, opened.facts.get("preprocess"))
    split = split or datasets.default_split(dataset)
    images = datasets.open_dataset(dataset, split)
    count = min(limit, len(images))
    root = arm_root.set_up()
    batches = pipeline.batches(
        images,
        input_size=opened.input.shape[1:3],
        channels=opened.input.shape[3],
        batch_size=_IMAGES_AT_A_TIME,
        preprocess=preprocessing.parse(text),
        indices=np.arange(count),
    )
    compared = {"codes": 0, "differing": 0, "worst": 0.0, "agreeing": 0}
    counts: tuple[dict[str, int], ...] = ()
    first = None
    with progress.bar(f"emulated {cpu}", count) as update:
        done = 0
        for x, _ in batches:
            first = x[:1] if first is None else first
            given = runtimes.graph_codes(opened.graph, x)
            emulated = arm_emulator.run(
                opened.content, [given], cpu, model, 0 if counts else repeats, root
            )
            counts = counts or emulated.counts
            _compare(emulated.outputs[0], _on_host(opened.content, given), compared)
            done += len(x)
            update(done)
    in_codes = opened.output.dtype != "float32"
    rows, differing_nodes = [], ""
    if operators or (in_codes and compared["differing"]):
        given = runtimes.graph_codes(opened.graph, first)
        try:
            rows = node_rows(opened.path, opened.content, given, cpu, root)
        except ValueError as error:  # an operation that cannot stand alone, such as a custom one
            differing_nodes = f"unknown: {error}"
    if rows:
        differing_nodes = "; ".join(
            f"{row['name']} ({row['op']}: {row['differing']} of {row['codes']})"
            for row in rows
            if row["differing"] and row["dtype"] != "float32"
        )
    if operators:
        identity = {"model": model, "emulated_cpu": cpu}
        path = f"{output_dir}/arm_emulator_operators.csv"
        results.write_rows(path, [*results.read_rows(path), *(identity | row for row in rows)])
    row = {
        "tool": "eval.latency",
        "device": "arm-emulator",
        "emulated_cpu": cpu,
        "model": model,
        "dataset": dataset,
        "images": count,
        "threads": 1,
        "output_dtype": opened.output.dtype,
        "output_codes": compared["codes"] if in_codes else None,
        "differing_from_host": compared["differing"] if in_codes else None,
        "worst_difference": int(compared["worst"]) if in_codes else compared["worst"],
        "top1_agreement": compared["agreeing"] / count,
        "outside_xnnpack": "; ".join(outside_xnnpack(opened.graph)),
        "differing_nodes": differing_nodes,
        **{f"emulated_instructions_{name}": n for name, n in counts[0].items()},
        "repeats": repeats,
        "emulated_counts_differ_by": _apart(counts),
    }
    if other is not None:
        given = runtimes.graph_codes(other.graph, first)
        in_float = arm_emulator.run(other.content, [given], cpu, other.path, repeats, root).counts
        row |= {
            "float_model": float_model,
            **{f"float_emulated_instructions_{name}": n for name, n in in_float[0].items()},
            "float_emulated_counts_differ_by": _apart(in_float),
            "emulated_instruction_ratio": round(in_float[0]["all"] / counts[0]["all"], 4),
        }
    row |= {
        "seconds": round(time.monotonic() - start, 3),
        "versions": manifest.versions() | {"emulated": root.versions},
    }
    results.append_row(f"{output_dir}/arm_emulator.csv", row)
    return row


def _open(path):
    """Returns a file that an interpreter on this host takes, of one input of images."""
    if not runtimes.is_tflite(path):
        raise ValueError(f"{path}: the emulated phone runs .tflite files")
    content = tflite_file.load_bytes(path)
    graph = tflite_file.read(content, path)
    if len(graph.inputs) != 1 or not graph.outputs:
        raise ValueError(
            f"{path} has {len(graph.inputs)} inputs and {len(graph.outputs)} outputs; 1 input and an "
            "output are needed"
        )
    coded_images.check_images(graph, path)
    runtimes.try_out(content, path)
    return Model(path, content, graph, tflite_file.read_manifest(content, path))


def _on_host(content, inputs):
    """Returns the first output for each image, in LiteRT with XNNPACK in one thread."""
    runner = runtimes.interpreter(content)
    return runtimes.invoke_each(runner, inputs)


def _compare(ours, theirs, compared):
    """Adds how two arrays of outputs differ to `compared`."""
    difference = np.abs(ours.astype(np.float64) - theirs)
    compared["codes"] += difference.size
    compared["differing"] += int((difference > 0).sum())
    compared["worst"] = max(compared["worst"], float(difference.max()))
    same = [each.reshape(len(each), -1).argmax(axis=1) for each in (ours, theirs)]
    compared["agreeing"] += int((same[0] == same[1]).sum())


def _apart(counts):
    """Returns by how many instructions the repeats differ."""
    each = [count["all"] for count in counts]
    return max(each) - min(each)


def outside_xnnpack(graph: integer_graph.IntegerGraph) -> list[str]:
    """Returns the nodes on codes that XNNPACK leaves to LiteRT, each with its operation and why."""
    found = []
    for node in graph.nodes:
        dtypes = {graph.tensors[name].dtype for name in (node.inputs[0], node.outputs[0])}
        if dtypes <= {"int8", "uint8", "int16"}:
            kernel, reason = delegate.placement_of(graph, node)
            if kernel != "xnnpack":
                found.append(f"{node.name} ({node.op}: {reason})")
    return found


def node_rows(
    path: str,
    content: bytes,
    codes: np.ndarray,
    cpu: str,
    root: arm_root.ArmRoot | None = None,
) -> list[dict]:
    """Returns a row for each node, run alone on what this host computed before it.

    A node alone takes about 5,000 instructions more than within the network, for its invocation;
    and XNNPACK joins no nodes, as it does a PAD with the convolution behind it.

    Args:
      path: of the file, for error messages.
      content: the file, with one input.
      codes: one image, as the file takes it.
      cpu: one of arm_root.CPUS.
      root: as for `arm_emulator.run`.

    Returns:
      name, op, the first output's shape and dtype, codes compared, differing, worst_difference, and
      emulated_instructions by class.

    Raises:
      ValueError: where a node cannot be written to a file of its own.
    """
    graph = tflite_file.read(content, path, verbatim=True)
    computed = tuple(name for node in graph.nodes for name in node.outputs)
    # As outputs of the graph all tensors can be read; kernels may keep their memory to themselves.
    probed = tflite_file.write(dataclasses.replace(graph, outputs=computed))
    runner = runtimes.interpreter(probed)
    runtimes.invoke(runner, codes)
    values = [runner.get_tensor(details["index"]) for details in runner.get_output_details()]
    known = {graph.inputs[0]: codes} | dict(zip(computed, values, strict=True))
    files, inputs = [], []
    for node in graph.nodes:
        files.append(arm_emulator.alone(graph, node))
        free = dict.fromkeys(name for name in node.inputs if name in known)
        inputs.append([known[name] for name in free])
    rows = []
    done = arm_emulator.run_all(files, inputs, cpu, path, 1, root)
    for node, emulated in zip(graph.nodes, done, strict=True):
        theirs = [known[name] for name in node.outputs]
        difference = np.concatenate(
            [
                np.abs(ours.astype(np.float64) - host).ravel()
                for ours, host in zip(emulated.outputs, theirs, strict=True)
            ]
        )
        rows.append(
            {
                "name": node.name,
                "op": node.op,
                "shape": "x".join(map(str, theirs[0].shape)),
                "dtype": str(theirs[0].dtype),
                "codes": difference.size,
                "differing": int((difference > 0).sum()),
                "worst_difference": float(difference.max()),
                **{f"emulated_instructions_{name}": n for name, n in emulated.counts[0].items()},
            }
        )
    return rows
