"""Accuracy of a model on images, in Keras, in the LiteRT interpreter, or in the simulator.

    python -m eval.accuracy --model=model.tflite --dataset=images.zip
    python -m eval.accuracy --model=model.tflite --dataset=images.zip --reference=float.keras

With --reference the two models run on the same images: agreement of their first choices, mean KL
divergence from the reference's output, and the paired difference in accuracy with its error.  The
reference may be the outputs that an earlier run kept, so that many models share one float run:

    python -m eval.accuracy --model=float.keras --dataset=images.zip --save_outputs=float.npz
    python -m eval.accuracy --model=model.tflite --dataset=images.zip --reference=float.npz
"""

import dataclasses
import json
import os
import sys
import time
import zipfile

import numpy as np

from lowbit import (
    cli,
    files,
    manifest,
    metrics,
    micro,
    models,
    progress,
    results,
    runtimes,
    tflite_file,
)
from lowbit.data import datasets, pipeline
from lowbit.data import preprocess as preprocessing


@dataclasses.dataclass(frozen=True)
class Config:
    """The command's flags."""

    model: str = cli.field(cli.REQUIRED, "A .keras or a .tflite file, or a zoo name.")
    weights: str | None = cli.field(
        None, "For a zoo name: a .keras or .weights.h5 file, or 'imagenet'."
    )
    alpha: float | None = cli.field(None, "For a zoo name: width multiplier, such as 0.35.")
    input_size: int | None = cli.field(None, "For a zoo name: height and width in pixels.")
    dataset: str = cli.field("digits", "Images: a name or a path.")
    split: str | None = cli.field(
        None,
        "Which of them; default: validation where the data set has splits (digits), else all.",
        choices=("train", "validation", "all"),
    )
    preprocess: str | None = cli.field(None, "As the model was trained; default: as saved with it.")
    limit: int | None = cli.field(None, "Images, the first ones; default all.")
    crop: float = cli.field(
        1.0, "Central part of each side that is seen; 0.875 is usual for ImageNet's photographs."
    )
    runtime: str | None = cli.field(
        None,
        "keras: a .keras file; litert, simulator, micro (TensorFlow Lite Micro): a .tflite file. "
        "Default: by the file's name.",
        choices=("keras", "litert", "simulator", "micro"),
    )
    kernels: str = cli.field("xnnpack", "Of litert and simulator.", choices=runtimes.KERNELS)
    reference: str | None = cli.field(
        None, "A second model to compare with, float for example, or an .npz of --save_outputs."
    )
    reference_kernels: str | None = cli.field(
        None, "Kernels of a .tflite reference; default: as --kernels.", choices=runtimes.KERNELS
    )
    reference_preprocess: str | None = cli.field(None, "Its normalization; default: as saved.")
    save_outputs: str | None = cli.field(
        None, "Keeps the outputs as this .npz file, for --reference of later runs."
    )
    batch_size: int = cli.field(16, "Images at a time.")
    output_dir: str = cli.field("results", "Where accuracy.csv gets its row.")


def evaluate(config: Config) -> dict:
    """Runs the command; returns its result row."""
    start = time.monotonic()
    runtime = config.runtime or ("litert" if runtimes.is_tflite(config.model) else "keras")
    if config.limit is not None and config.limit < 1:
        raise ValueError(f"--limit is {config.limit}; at least 1 image is needed")
    if config.save_outputs is not None:
        manifest.check_output(config.save_outputs, ".npz", "--save_outputs")
    split = config.split or datasets.default_split(config.dataset)
    dataset = datasets.open_dataset(config.dataset, split)
    count = min(config.limit or len(dataset), len(dataset))
    zoo = {"weights": config.weights, "alpha": config.alpha, "input_size": config.input_size}
    if config.model in models.ZOO and config.weights is None:
        raise ValueError(f"--model={config.model} needs --weights: random weights know nothing")
    runner = load(config.model, runtime, config.kernels, config.preprocess, zoo=zoo)
    dataset = datasets.renumbered(dataset, runner.facts.get("class_names"))
    labels = dataset.labels[:count]
    other = stored = None
    if config.reference is not None and config.reference.endswith(".npz"):
        stored = stored_outputs(
            config.reference,
            config.dataset,
            split,
            config.crop,
            labels,
            config.reference_preprocess,
        )
    elif config.reference is not None:
        kind = "litert" if runtimes.is_tflite(config.reference) else "keras"
        other = load(
            config.reference,
            kind,
            config.reference_kernels or config.kernels,
            config.reference_preprocess or (config.preprocess if kind == "keras" else None),
            "--reference_preprocess",
        )
    os.makedirs(config.output_dir, exist_ok=True)
    outputs = outputs_of(runner, dataset, count, config.batch_size, "measuring", config.crop)
    datasets.check_labels(dataset, outputs.shape[1])
    ranks = metrics.ranks(outputs, labels)
    row = {
        "tool": "eval.accuracy",
        "model": config.model,
        "scheme": runner.facts.get("scheme", "float" if runtime == "keras" else None),
        "runtime": runtime,
        "kernels": config.kernels if runtime in ("litert", "simulator") else None,
        "dataset": config.dataset,
        "split": split,
        "images": count,
        "crop": config.crop,
        "preprocess": runner.preprocess.name,
        "top1": float((ranks == 0).mean()),
        "top1_standard_error": metrics.standard_error(ranks == 0),
        "top5": float((ranks < 5).mean()),
        "tied_at_top": metrics.tied_at_top(outputs),
        "size_bytes": os.path.getsize(config.model) if os.path.isfile(config.model) else None,
        "parameters": runner.parameters,
    }
    if runner.arena_bytes is not None:
        row |= {"arena_bytes": runner.arena_bytes, "micro_version": micro.version()}
    if other is not None:
        stored = outputs_of(other, dataset, count, config.batch_size, "reference", config.crop)
    if stored is not None:
        row |= compare(outputs, stored, labels) | {"reference": config.reference}
    if config.save_outputs is not None:
        identity = {
            "model": config.model,
            **{name: value for name, value in zoo.items() if value is not None},
            "dataset": config.dataset,
            "split": split,
            "crop": config.crop,
            "preprocess": runner.preprocess.name,
            "runtime": runtime,
            "versions": manifest.versions(),
        }
        save_outputs(config.save_outputs, outputs, labels, identity)
    row |= {"seconds": round(time.monotonic() - start, 3), "versions": manifest.versions()}
    shown = ["top1", "top5", "tied_at_top", "agreement", "mean_kl", "top1_difference"]
    print(results.table([row], [name for name in shown if name in row]), file=sys.stderr)
    results.append_row(os.path.join(config.output_dir, "accuracy.csv"), row)
    return row


@dataclasses.dataclass(frozen=True)
class Runner:
    """A model that is ready to run: run(batches of float32 images) yields outputs (n, classes)."""

    run: object
    input_shape: tuple[int, ...]  # (height, width, channels)
    preprocess: preprocessing.Preprocess
    facts: dict
    parameters: int | None = None  # of a Keras model, moving statistics included
    arena_bytes: int | None = None  # of memory, in TensorFlow Lite Micro


def load(
    path: str,
    runtime: str,
    kernels: str,
    preprocess: str | None,
    flag: str = "--preprocess",
    zoo: dict | None = None,
) -> Runner:
    """Returns a model's runner.

    Args:
      path: of the file, or a zoo name.
      runtime: "keras", "litert", "simulator" or "micro".
      kernels: of LiteRT and the simulator.
      preprocess: the normalization; None: as saved with the model.
      flag: that the message names where the normalization is not known.
      zoo: weights, alpha and input_size for a zoo name, as `models.load` takes them.

    Raises:
      ValueError: where the runtime does not fit the file, or the normalization is not known.
    """
    if runtimes.is_tflite(path) != (runtime != "keras"):
        wanted = ".keras" if runtime == "keras" else ".tflite"
        raise ValueError(f"--runtime={runtime} runs {wanted} files, not {path}")
    parameters = arena_bytes = None
    if runtime != "keras" and any(value is not None for value in (zoo or {}).values()):
        raise ValueError(f"--weights, --alpha and --input_size are for zoo names, not {path}")
    if runtime == "keras":
        model, facts = models.load(path, **(zoo or {}))
        parameters = model.count_params()
        shape = models.image_input(model, path)

        def run(batches):
            return runtimes.run_keras(model, batches)

    else:
        content = tflite_file.load_bytes(path)
        graph = tflite_file.read(content, path)
        facts = tflite_file.read_manifest(content, path)
        if len(graph.inputs) != 1 or not graph.outputs:
            raise ValueError(
                f"{path} has {len(graph.inputs)} inputs and {len(graph.outputs)} outputs; 1 input "
                "and an output are needed"
            )
        if runtime == "litert":
            runtimes.try_out(content, path, kernels)
        source = graph.tensors[graph.inputs[0]]
        shape = tuple(source.shape[1:])
        if runtime == "micro":
            zeros = np.zeros(source.shape, source.dtype)
            arena_bytes = micro.run(content, [zeros], path).arena_bytes

        def run(batches):
            if runtime == "litert":
                return runtimes.run_litert(content, batches, kernels)
            if runtime == "micro":
                return micro.run_batches(content, graph, batches, path)
            return runtimes.run_simulator(graph, batches, kernels)

    text = preprocessing.first_known(path, preprocess, facts.get("preprocess"), flag=flag)
    if len(shape) != 3:
        raise ValueError(
            f"{path} takes input of shape {shape}; images are (height, width, channels)"
        )
    return Runner(run, shape, preprocessing.parse(text), facts, parameters, arena_bytes)


def outputs_of(
    runner: Runner, dataset, count: int, batch_size: int, title: str, crop: float = 1.0
) -> np.ndarray:
    """Returns the outputs for the first `count` images, float32 (count, classes)."""
    batches = pipeline.batches(
        dataset,
        input_size=runner.input_shape[:2],
        channels=runner.input_shape[2],
        batch_size=batch_size,
        preprocess=runner.preprocess,
        indices=np.arange(count),
        crop=crop,
    )
    parts, done = [], 0
    with progress.bar(title, count) as update:
        for part in runner.run(x for x, _ in batches):
            parts.append(part)
            done += len(part)
            update(done)
    outputs = np.concatenate(parts)
    if not np.isfinite(outputs).all():
        raise ValueError("the model's outputs hold NaN or infinity")
    return outputs


def save_outputs(path: str, outputs: np.ndarray, labels: np.ndarray, identity: dict) -> None:
    """Writes a model's outputs, whole or not at all.

    Args:
      path: of the .npz.
      outputs: float32 (n, classes), 200 MB for ImageNet's 50,000 images.
      labels: int64 (n,), the images' true classes: they tell another set of images from this one.
      identity: model, dataset, split, preprocess and what else is worth knowing.
    """
    with files.replacing(path) as temporary:
        np.savez(temporary, outputs=outputs, labels=labels, identity=json.dumps(identity))


def stored_outputs(
    path: str,
    dataset: str,
    split: str,
    crop: float,
    labels: np.ndarray,
    preprocess: str | None = None,
) -> np.ndarray:
    """Returns the outputs that `save_outputs` wrote for the same images, float32 (n, classes).

    Args:
      path: of the .npz; it may hold more images, of which the first n are taken.
      dataset, split, crop, labels: of the images that are wanted, labels int64 (n,).
      preprocess: the normalization that is wanted; None: any.

    Raises:
      ValueError: names the fact in which the stored outputs differ.
    """
    try:
        with open(path, "rb") as file, np.load(file) as stored:
            outputs, theirs = stored["outputs"], stored["labels"]
            identity = json.loads(str(stored["identity"]))
    except (zipfile.BadZipFile, EOFError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--reference {path} is no file of --save_outputs: {error}") from error
    wanted = {"dataset": dataset, "split": split, "crop": crop}
    if preprocess is not None:
        wanted["preprocess"] = preprocess
    for name, value in wanted.items():
        if identity.get(name) != value:
            raise ValueError(
                f"--reference {path} holds outputs for {name} {identity.get(name)}, not {value}"
            )
    if len(theirs) < len(labels):
        raise ValueError(f"--reference {path} holds {len(theirs)} images, not {len(labels)}")
    if (theirs[: len(labels)] != labels).any():
        raise ValueError(f"--reference {path} holds other labels: {dataset} has changed since")
    return outputs[: len(labels)]


def compare(outputs: np.ndarray, reference: np.ndarray, labels: np.ndarray) -> dict:
    """Returns agreement, mean KL to the reference, and the paired difference in top-1."""
    if outputs.shape != reference.shape:
        raise ValueError(f"the reference has {reference.shape[1]} classes, not {outputs.shape[1]}")
    correct, reference_correct = (
        metrics.ranks(values, labels) == 0 for values in (outputs, reference)
    )
    difference, error = metrics.paired_difference(correct, reference_correct)
    return {
        "agreement": float((outputs.argmax(axis=1) == reference.argmax(axis=1)).mean()),
        "mean_kl": float(metrics.kl_divergence(reference, outputs).mean()),
        "reference_top1": float(reference_correct.mean()),
        "top1_difference": difference,
        "top1_paired_error": error,
    }


def main() -> None:
    """Runs the command line."""
    cli.run(evaluate, Config)


if __name__ == "__main__":
    main()
