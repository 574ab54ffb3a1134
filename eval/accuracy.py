"""Accuracy of a model on images, in Keras, in the LiteRT interpreter, or in the simulator.

    python -m eval.accuracy --model=model.tflite --dataset=images.zip
    python -m eval.accuracy --model=model.tflite --dataset=images.zip --reference=float.keras

With --reference the two models run on the same images: agreement of their first choices, mean KL
divergence from the reference's output, and the paired difference in accuracy with its error.
"""

import dataclasses
import os
import sys
import time

import numpy as np

from lowbit import cli, manifest, metrics, models, progress, results, runtimes, tflite_file
from lowbit.data import datasets, pipeline
from lowbit.data import preprocess as preprocessing


@dataclasses.dataclass(frozen=True)
class Config:
    """The command's flags."""

    model: str = cli.field(cli.REQUIRED, "A .keras or a .tflite file.")
    dataset: str = cli.field("digits", "Images: a name or a path.")
    split: str | None = cli.field(
        None,
        "Which of them; default: validation where the data set has splits (digits), else all.",
        choices=("train", "validation", "all"),
    )
    preprocess: str | None = cli.field(None, "As the model was trained; default: as saved with it.")
    limit: int | None = cli.field(None, "Images, the first ones; default all.")
    runtime: str | None = cli.field(
        None,
        "keras: a .keras file; litert, simulator: a .tflite file. Default: by the file's name.",
        choices=("keras", "litert", "simulator"),
    )
    kernels: str = cli.field("xnnpack", "Of litert and simulator.", choices=runtimes.KERNELS)
    reference: str | None = cli.field(None, "A second model to compare with, float for example.")
    reference_kernels: str | None = cli.field(
        None, "Kernels of a .tflite reference; default: as --kernels.", choices=runtimes.KERNELS
    )
    reference_preprocess: str | None = cli.field(None, "Its normalization; default: as saved.")
    batch_size: int = cli.field(16, "Images at a time.")
    output_dir: str = cli.field("results", "Where accuracy.csv gets its row.")


def evaluate(config: Config) -> dict:
    """Runs the command; returns its result row."""
    start = time.monotonic()
    runtime = config.runtime or ("litert" if runtimes.is_tflite(config.model) else "keras")
    if config.limit is not None and config.limit < 1:
        raise ValueError(f"--limit is {config.limit}; at least 1 image is needed")
    split = config.split or ("validation" if config.dataset in _NAMED_WITH_SPLITS else "all")
    dataset = datasets.open_dataset(config.dataset, split)
    count = min(config.limit or len(dataset), len(dataset))
    runner = load(config.model, runtime, config.kernels, config.preprocess)
    dataset = datasets.renumbered(dataset, runner.facts.get("class_names"))
    other = None
    if config.reference is not None:
        kind = "litert" if runtimes.is_tflite(config.reference) else "keras"
        other = load(
            config.reference,
            kind,
            config.reference_kernels or config.kernels,
            config.reference_preprocess or (config.preprocess if kind == "keras" else None),
            "--reference_preprocess",
        )
    os.makedirs(config.output_dir, exist_ok=True)
    outputs = outputs_of(runner, dataset, count, config.batch_size, "measuring")
    datasets.check_labels(dataset, outputs.shape[1])
    labels = dataset.labels[:count]
    ranks = metrics.ranks(outputs, labels)
    row = {
        "tool": "eval.accuracy",
        "model": config.model,
        "scheme": runner.facts.get("scheme", "float" if runtime == "keras" else None),
        "runtime": runtime,
        "kernels": None if runtime == "keras" else config.kernels,
        "dataset": config.dataset,
        "split": split,
        "images": count,
        "top1": float((ranks == 0).mean()),
        "top1_standard_error": metrics.standard_error(ranks == 0),
        "top5": float((ranks < 5).mean()),
        "tied_at_top": metrics.tied_at_top(outputs),
        "size_bytes": os.path.getsize(config.model),
    }
    if other is not None:
        theirs = outputs_of(other, dataset, count, config.batch_size, "reference")
        row |= compare(outputs, theirs, labels) | {"reference": config.reference}
    row |= {"seconds": round(time.monotonic() - start, 3), "versions": manifest.versions()}
    shown = ["top1", "top5", "tied_at_top", "agreement", "mean_kl", "top1_difference"]
    print(results.table([row], [name for name in shown if name in row]), file=sys.stderr)
    results.append_row(os.path.join(config.output_dir, "accuracy.csv"), row)
    return row


_NAMED_WITH_SPLITS = ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "imagenet2012")


@dataclasses.dataclass(frozen=True)
class Runner:
    """A model that is ready to run: run(batches of float32 images) yields outputs (n, classes)."""

    run: object
    input_shape: tuple[int, ...]  # (height, width, channels)
    preprocess: preprocessing.Preprocess
    facts: dict


def load(
    path: str, runtime: str, kernels: str, preprocess: str | None, flag: str = "--preprocess"
) -> Runner:
    """Returns a model's runner.

    Raises:
      ValueError: where the runtime does not fit the file, or the normalization is not known.
    """
    if runtimes.is_tflite(path) != (runtime != "keras"):
        wanted = ".keras" if runtime == "keras" else ".tflite"
        raise ValueError(f"--runtime={runtime} runs {wanted} files, not {path}")
    if runtime == "keras":
        model, facts = manifest.load_model(path)
        shape = models.image_input(model, path)

        def run(batches):
            return runtimes.run_keras(model, batches)

    else:
        content = tflite_file.load_bytes(path)
        graph = tflite_file.read(content, path)
        facts = tflite_file.read_manifest(content, path)
        shape = tuple(graph.tensors[graph.inputs[0]].shape[1:])

        def run(batches):
            if runtime == "litert":
                return runtimes.run_litert(content, batches, kernels)
            return runtimes.run_simulator(graph, batches, kernels)

    text = preprocess or facts.get("preprocess")
    if text is None:
        raise ValueError(f"{path} does not say how its images are normalized; give {flag}")
    if len(shape) != 3:
        raise ValueError(
            f"{path} takes input of shape {shape}; images are (height, width, channels)"
        )
    return Runner(run, shape, preprocessing.parse(text), facts)


def outputs_of(runner: Runner, dataset, count: int, batch_size: int, title: str) -> np.ndarray:
    """Returns the outputs for the first `count` images, float32 (count, classes)."""
    batches = pipeline.batches(
        dataset,
        input_size=runner.input_shape[:2],
        channels=runner.input_shape[2],
        batch_size=batch_size,
        preprocess=runner.preprocess,
        indices=np.arange(count),
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
