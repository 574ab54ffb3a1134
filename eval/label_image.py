"""Label image: what a model sees in a picture, the most probable classes first.

    python -m eval.label_image --model=model.tflite --image=cat.jpg --labels=labels.txt
    python -m eval.label_image --model=other.tflite --image=a.jpg,b.png --preprocess=tf

The model may be a .tflite file of any tool, a .keras file or a zoo name with --weights.  Probabilities
are the softmax of the outputs, or the outputs themselves where they are probabilities already.
"""

import dataclasses
import os
import sys
import time

import numpy as np

from eval import accuracy
from lowbit import cli, manifest, models, results, runtimes
from lowbit.data import folders


@dataclasses.dataclass(frozen=True)
class Config:
    """The command's flags."""

    model: str = cli.field(cli.REQUIRED, "A .tflite or a .keras file, or a zoo name.")
    image: str = cli.field(cli.REQUIRED, "Picture files, with commas.")
    labels: str | None = cli.field(
        None, "A text file with a class name a line; default: as saved with the model, or numbers."
    )
    weights: str | None = cli.field(None, "For a zoo name: a file, or 'imagenet'.")
    preprocess: str | None = cli.field(None, "As the model was trained; default: as saved with it.")
    kernels: str = cli.field("xnnpack", "Of a .tflite file.", choices=runtimes.KERNELS)
    crop: float = cli.field(1.0, "Central part of each side that is seen.")
    top: int = cli.field(5, "Classes that are shown.")

    def __post_init__(self):
        if self.top < 1:
            raise ValueError(f"--top is {self.top}; at least 1 is needed")


def label(config: Config) -> dict:
    """Runs the command; returns its result row, with the first picture's first class.

    Raises:
      FileNotFoundError, ValueError: for a picture, a model or labels that cannot be used.
    """
    start = time.monotonic()
    paths = [path.strip() for path in config.image.split(",")]
    for path in paths:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"--image {path}: no such file")
    if config.model in models.ZOO and config.weights is None:
        raise ValueError(f"--model={config.model} needs --weights: random weights know nothing")
    runtime = "litert" if runtimes.is_tflite(config.model) else "keras"
    zoo = {"weights": config.weights}
    runner = accuracy.load(config.model, runtime, config.kernels, config.preprocess, zoo=zoo)
    pictures, _ = folders.picture_files(config.image, paths)
    outputs = accuracy.outputs_of(runner, pictures, len(paths), 1, "looking", crop=config.crop)
    count = outputs.shape[1]
    names = read_labels(config.labels, count) or runner.facts.get("class_names")
    names = names if names is not None else [f"class {index}" for index in range(count)]
    if len(names) != count:
        raise ValueError(f"{config.model}: {len(names)} class names for {count} outputs")
    firsts = []
    for path, values in zip(paths, outputs, strict=True):
        shares = probabilities(values)
        # Of equal outputs the first class counts, as with an argmax.
        order = np.argsort(-values, kind="stable")[: config.top]
        lines = [
            {"class": int(i), "name": names[i], "probability": float(shares[i])} for i in order
        ]
        print(f"{path}\n{results.table(lines, list(lines[0]))}", file=sys.stderr)
        firsts.append(lines[0])
    return {
        "tool": "eval.label_image",
        "model": config.model,
        "image": config.image,
        "images": len(paths),
        **firsts[0],
        "seconds": round(time.monotonic() - start, 3),
        "versions": manifest.versions(),
    }


def read_labels(path: str | None, count: int) -> list[str] | None:
    """Returns the class names of a text file, a line each; None without a file.

    Raises:
      ValueError: where they are not as many as the model's classes.
    """
    if path is None:
        return None
    with open(path, encoding="utf-8-sig") as file:
        names = file.read().rstrip("\n").split("\n")
    if len(names) != count:
        raise ValueError(f"--labels {path} has {len(names)} lines; the model has {count} classes")
    return [name.strip() for name in names]


def probabilities(outputs: np.ndarray) -> np.ndarray:
    """Returns the softmax of (classes,) outputs, or themselves where they are probabilities."""
    if (outputs >= 0).all() and abs(outputs.sum() - 1) < 0.05:  # integers: 1/256 a class
        return outputs
    powers = np.exp(outputs.astype(np.float64) - outputs.max())
    return powers / powers.sum()


def main() -> None:
    """Runs the command line."""
    cli.run(label, Config)


if __name__ == "__main__":
    main()
