"""Parity, counted in integer codes: Keras = integer graph, simulator = interpreter, op by op.

    python -m eval.parity --model=ptq.keras --dataset=images.zip --limit=100

Three comparisons on the same images, each quantized once:

  simulator against the interpreter, both flavours    differing output codes, 0 is the contract
  XNNPACK against BUILTIN_REF on the same file        what two correct runtimes differ by
  quantized Keras model against the integer graph     each operation alone, on the graph's inputs
"""

import dataclasses
import sys
import time

import keras
import numpy as np

from lowbit import (
    affine,
    cli,
    functional,
    integer_graph,
    kernels,
    lowering,
    manifest,
    micro,
    placement,
    progress,
    quantizers,
    results,
    runtimes,
    tflite_file,
)
from lowbit.data import datasets, pipeline
from lowbit.data import preprocess as preprocessing
from lowbit.kernels import delegate


@dataclasses.dataclass(frozen=True)
class Config:
    """The command's flags."""

    model: str = cli.field(cli.REQUIRED, "A quantized .keras file, or any int8 .tflite file.")
    dataset: str = cli.field(cli.REQUIRED, "Images: a name or a path.")
    split: str = cli.field("all", "Which of them.", choices=("train", "validation", "all"))
    preprocess: str | None = cli.field(None, "As the model was trained; default: as saved with it.")
    limit: int = cli.field(100, "Images, the first ones.")
    op_images: int = cli.field(4, "Images on which each Keras operation is compared.")
    output_dir: str = cli.field("results", "Where parity.csv gets its row.")


def compare(config: Config) -> dict:
    """Runs the command; returns its result row."""
    start = time.monotonic()
    keras_model = None
    if runtimes.is_tflite(config.model):
        content = tflite_file.load_bytes(config.model)
        facts = tflite_file.read_manifest(content, config.model)
        runtimes.try_out(content, config.model)
    else:
        keras_model, facts = manifest.load_model(config.model)
        in_float = placement.float_layers(keras_model)
        if in_float:
            raise ValueError(
                f"{config.model}: {', '.join(in_float)} compute in float for want of an integer form; "
                "parity counts the codes of integer models"
            )
        lowered = lowering.lower(keras_model)
        content = tflite_file.write(lowered)
    graph = tflite_file.read(content, config.model)
    if min(config.limit, config.op_images) < 1:
        raise ValueError(
            f"--limit={config.limit} and --op_images={config.op_images} must be at least 1"
        )
    for name in (*graph.inputs, *graph.outputs):
        if graph.tensors[name].dtype not in ("int8", "uint8", "int16"):
            raise ValueError(
                f"{config.model}: {name} is {graph.tensors[name].dtype}; parity counts codes: "
                "export with --io=int8"
            )
    # BUILTIN_REF has no ELU, no DEPTH_TO_SPACE and no packed depthwise weights.
    refused = _refusal(graph, content, config.model, "reference")
    if refused is not None:
        print(f"compared with XNNPACK alone: {refused}", file=sys.stderr)
    flavours = runtimes.KERNELS if refused is None else ("xnnpack",)
    if len(graph.inputs) != 1 or len(graph.outputs) != 1:
        raise ValueError(
            f"{config.model} has {len(graph.inputs)} inputs and {len(graph.outputs)} outputs; one "
            "of each is needed"
        )
    text = preprocessing.first_known(config.model, config.preprocess, facts.get("preprocess"))
    dataset = datasets.open_dataset(config.dataset, config.split)
    count = min(config.limit, len(dataset))
    shape = graph.tensors[graph.inputs[0]].shape
    if len(shape) != 4:
        raise ValueError(
            f"{config.model} takes input of shape {shape[1:]}; images are (height, width, channels)"
        )
    batches = pipeline.batches(
        dataset,
        input_size=shape[1:3],
        channels=shape[3],
        batch_size=4,
        preprocess=preprocessing.parse(text),
        indices=np.arange(count),
    )
    compared = flavours if refused else (*flavours, "between")
    differing = dict.fromkeys(compared, 0)
    worst = dict.fromkeys(differing, 0)
    agree = total = 0
    codes_seen: set[int] = set()
    runners = {name: runtimes.interpreter(content, name) for name in flavours}
    operations: list[dict] = []
    with progress.bar("comparing", count) as update:
        for x, _ in batches:
            outputs = {}
            for name, runner in runners.items():
                codes = _input_codes(graph, x)
                outputs[name] = runtimes.invoke_each(runner, codes)
                simulated = kernels.run(graph, {graph.inputs[0]: codes}, name)[graph.outputs[0]]
                _count(name, simulated, outputs[name], differing, worst)
            if "between" in compared:
                _count("between", outputs["xnnpack"], outputs["reference"], differing, worst)
                flat = [outputs[name].reshape(len(x), -1) for name in flavours]
                agree += int((flat[0].argmax(axis=1) == flat[1].argmax(axis=1)).sum())
            codes_seen.update(np.unique(outputs["xnnpack"]).tolist())
            if keras_model is not None and total < config.op_images:
                operations = _merged(operations, compare_operations(keras_model, lowered, x))
            total += len(x)
            update(total)
    if operations:
        print(results.table(operations, list(operations[0])), file=sys.stderr)
    fallen = [
        f"{node.name} ({node.op}: {reason})"
        for node in graph.nodes
        for kernel, reason in [delegate.placement_of(graph, node)]
        if kernel != "xnnpack"
    ]
    if fallen:
        print("not run by XNNPACK: " + "; ".join(fallen), file=sys.stderr)
    row = {
        "tool": "eval.parity",
        "model": config.model,
        "dataset": config.dataset,
        "split": config.split,
        "preprocess": text,
        "images": total,
        "distinct_codes": len(codes_seen),
        "simulator_xnnpack_differing": differing["xnnpack"],
        "simulator_reference_differing": differing.get("reference"),
        "simulator_worst_lsb": max(worst[name] for name in flavours),
        "xnnpack_reference_differing": differing.get("between"),
        "xnnpack_reference_worst_lsb": worst.get("between"),
        "xnnpack_reference_top1_agreement": agree / total if "between" in compared else None,
        "reference_refused": refused,
        "output_codes": total * int(np.prod(graph.tensors[graph.outputs[0]].shape)),
        "keras_op_worst_lsb": max((op["worst_lsb"] for op in operations), default=None),
        "keras_op_differing": sum(op["differing"] for op in operations) if operations else None,
        "keras_op_codes": sum(op["codes"] for op in operations) if operations else None,
        "outside_xnnpack": "; ".join(fallen),
        "seconds": round(time.monotonic() - start, 3),
        "versions": manifest.versions(),
    }
    results.append_row(f"{config.output_dir}/parity.csv", row)
    return row


def _refusal(graph, content, name, kernels_name):
    """Returns why an interpreter does not run a file, None where it does."""
    try:
        runtimes.try_out(content, name, kernels_name)
    except runtimes.RefusedError as error:
        placed = ((node, delegate.placement_of(graph, node, kernels_name)) for node in graph.nodes)
        known = [
            f"{node.name}: {reason}" for node, (kernel, reason) in placed if kernel == "refused"
        ]
        return "; ".join(known) or str(error)
    return None


def _input_codes(graph, x):
    tensor = graph.tensors[graph.inputs[0]]
    return runtimes.input_codes(x, tensor.dtype, tensor.scale, tensor.zero_point)


def _count(name, ours, theirs, differing, worst):
    difference = np.abs(ours.astype(np.int64) - theirs)
    differing[name] += int((difference > 0).sum())
    worst[name] = max(worst[name], int(difference.max()))


def compare_nodes(
    graph: integer_graph.IntegerGraph, codes: np.ndarray, kernels_name: str
) -> list[dict]:
    """Returns for each node how the simulator's codes differ from an interpreter's, on equal inputs.

    Every node is given what the interpreter computed before it, so that no difference is handed on
    and the one node that differs is named.  Where no node differs, no run from end to end does.

    Args:
      graph: int8 or int16 activations.
      codes: of the graph's one input, (n, ...).
      kernels_name: "xnnpack", "reference", or "micro": TensorFlow Lite Micro's.

    Returns:
      One row a node: name, op, the kernel that runs it, codes compared, differing, worst_lsb, and
      distinct, the number of different codes that the interpreter computed.
    """
    computed = [node.outputs[0] for node in graph.nodes]
    # As outputs of the graph all tensors can be read; kernels may keep their memory to themselves.
    probed = dataclasses.replace(graph, outputs=tuple(computed))
    content = tflite_file.write(probed)
    rows = [_row_of(graph, node, kernels_name) for node in graph.nodes]
    seen = [np.zeros(2**16, bool) for _ in rows]
    for image, values in zip(codes[:, None], _outputs(content, codes, kernels_name), strict=True):
        known = {graph.inputs[0]: image} | dict(zip(computed, values, strict=True))
        for node, row, found in zip(graph.nodes, rows, seen, strict=True):
            inputs = [
                known[name] if name in known else graph.tensors[name].data for name in node.inputs
            ]
            (ours,) = kernels.run_node(graph, node, inputs, kernels_name)
            theirs = known[node.outputs[0]]
            difference = np.abs(ours.astype(np.int64) - theirs)
            row["codes"] += difference.size
            row["differing"] += int((difference > 0).sum())
            row["worst_lsb"] = max(row["worst_lsb"], int(difference.max()))
            found[theirs.astype(np.int64) & 0xFFFF] = True
    for row, found in zip(rows, seen, strict=True):
        row["distinct"] = int(found.sum())
    return rows


def _outputs(content, codes, kernels_name):
    """Yields for each image what an interpreter computes for the file's outputs, in order."""
    if kernels_name == "micro":
        outputs = micro.run(content, [codes]).outputs
        yield from zip(*(array[:, None] for array in outputs), strict=True)
        return
    runner = runtimes.interpreter(content, kernels_name)
    indices = [detail["index"] for detail in runner.get_output_details()]
    for image in codes[:, None]:
        runtimes.invoke(runner, image)
        yield [runner.get_tensor(index) for index in indices]


def _row_of(graph, node, kernels_name):
    kernel = delegate.placement_of(graph, node)[0] if kernels_name == "xnnpack" else kernels_name
    row = {"name": node.name, "op": node.op, "kernel": kernel}
    return row | dict.fromkeys(("codes", "differing", "worst_lsb", "distinct"), 0)


def compare_operations(model, graph: integer_graph.IntegerGraph, x: np.ndarray) -> list[dict]:
    """Returns for each operation how its Keras codes differ from the simulator's, on equal inputs.

    Every Keras layer is given what the integer graph computed before it, dequantized, so that no
    difference is handed on.

    Args:
      model: the quantized Keras model that `graph` was lowered from.
      x: float32 images (n, h, w, c).
    """
    trace = functional.trace(model)
    inputs = {graph.inputs[0]: _input_codes(graph, x)}
    computed = [node.outputs[0] for node in graph.nodes]
    codes = inputs | kernels.run(graph, inputs, "xnnpack", outputs=computed)
    ops = {node.outputs[0]: node.op for node in graph.nodes}

    def real(name):
        tensor = graph.tensors[name]
        return affine.dequantize(codes[name], tensor.network_scale, tensor.zero_point)

    # A value is the name of a tensor of the graph, or what a layer computed before its quantizer.
    values: dict[int, str | np.ndarray | None] = dict.fromkeys(trace.inputs)
    rows = []
    for call in trace.calls:
        arguments = [values[value] for value in call.inputs]
        if isinstance(call.layer, quantizers.ActivationQuantizer):
            if not isinstance(arguments[0], np.ndarray):  # the input, or rounded before
                values[call.output] = arguments[0] or call.keywords["label"]
                continue
            y = np.asarray(call.layer(arguments[0], **call.keywords))
            name = call.keywords["label"]
        else:
            inputs = [real(argument) for argument in arguments]
            y = np.asarray(call.layer(inputs if len(inputs) > 1 else inputs[0]))
            if isinstance(call.layer, (*lowering.COMPUTES, keras.layers.AveragePooling2D)):
                values[call.output] = y
                continue
            name = call.name
        values[call.output] = name
        tensor = graph.tensors[name]
        ours = np.rint(y / tensor.network_scale) + tensor.zero_point
        limits = np.iinfo(tensor.dtype)
        ours = np.clip(ours, limits.min, limits.max).astype(np.int64)
        difference = np.abs(ours - codes[name])
        rows.append(
            {
                "operation": name,
                "op": ops[name],
                "codes": int(difference.size),
                "differing": int((difference > 0).sum()),
                "worst_lsb": int(difference.max()),
            }
        )
    return rows


def _merged(rows, more):
    """Returns the rows of two batches added up."""
    if not rows:
        return more
    return [
        old
        | {
            "codes": old["codes"] + new["codes"],
            "differing": old["differing"] + new["differing"],
            "worst_lsb": max(old["worst_lsb"], new["worst_lsb"]),
        }
        for old, new in zip(rows, more, strict=True)
    ]


def main() -> None:
    """Runs the command line."""
    cli.run(compare, Config)


if __name__ == "__main__":
    main()
