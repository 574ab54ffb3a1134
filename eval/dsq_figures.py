"""DSQ's Figures 5 to 7 (Gong et al., arXiv 1908.05033) from the folders of runs of qat.train.

    python -m eval.dsq_figures --runs=runs/dsq/resnet20_w3a3_dsq_84044836,runs/other

In --output_dir: dsq_figure_5.png, the weights of three layers in units of their step, before the first
run's training and after; dsq_figure_6.png, every run's loss by step; dsq_figure_7.png, alpha over time
in the runs with DSQ.  The published curves are known as pictures only: these stand for themselves.
"""

import collections
import dataclasses
import json
import os
import pathlib
import time

import numpy as np
from keras import ops

from eval import dsq, networks
from lowbit import cli, layers, manifest, plots, results

WINDOWS = 60  # points of a curve of losses, each the mean of a window


@dataclasses.dataclass(frozen=True)
class Config:
    """The command's flags."""

    runs: str = cli.field(cli.REQUIRED, "Comma list of qat.train's folders.")
    layers: str | None = cli.field(
        None,
        "Comma list of three layers of the first run; default: the first, middle and last of "
        "those with its fewest bits.",
    )
    output_dir: str = cli.field("results", "Where the pictures go.")


def draw(config: Config) -> dict:
    """Runs the command; returns its result row.

    Raises:
      ValueError: for a folder that holds no finished run, and an unknown layer.
    """
    start = time.monotonic()
    folders = [pathlib.Path(text) for text in networks.split(config.runs, "--runs")]
    labels = _labels(folders)
    results.check_folder(config.output_dir)
    path = os.path.join(config.output_dir, "dsq_figure_{}.png").format
    weights = weights_in_steps(folders[0], config.layers)
    plots.step_histograms(weights, f"{labels[folders[0]]}: weights, in steps", path(5))
    losses = {label: losses_of(folder) for folder, label in labels.items()}
    plots.learning_curves({"loss": losses}, path(6), "loss, mean of a window")
    pictures = [path(5), path(6)]
    alphas = {
        f"{label}: {part}": curves
        for folder, label in labels.items()
        for part, curves in alphas_of(folder, list(weights)).items()
    }
    if alphas:
        plots.learning_curves(alphas, path(7), "alpha")
        pictures.append(path(7))
    return {
        "tool": "eval.dsq_figures",
        "runs": config.runs,
        "layers": ",".join(weights),
        "outputs": ",".join(pictures),
        "seconds": round(time.monotonic() - start, 3),
        "versions": results.versions(),
    }


def _labels(folders):
    """Returns {folder: label}, no two the same: the folder sets equal runs apart."""
    labels = {folder: _label(folder) for folder in folders}
    count = collections.Counter(labels.values())
    return {
        folder: label if count[label] == 1 else f"{label}, {folder}"
        for folder, label in labels.items()
    }


def _label(folder):
    """Returns the quantizer, scheme and rate of a run."""
    if not (folder / "qat.keras").exists() or not (folder / "config.json").exists():
        raise ValueError(f"--runs: {folder} holds no finished run of qat.train")
    record = json.loads((folder / "config.json").read_text())
    return f"{record['quantizer']}, {record['scheme']}, rate {record['learning_rate']:g}"


def weights_in_steps(
    folder: pathlib.Path, chosen: str | None
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns {layer: (before, after)}: folded weights divided by their scale, float32 (n,).

    Args:
      folder: of a run.
      chosen: as Config.layers.
    """
    before, after = (
        {
            layer.name: layer
            for layer in layers.weighted_layers(manifest.load_model(folder / name)[0])
            if layer.weight_spec is not None
        }
        for name in ("ptq.keras", "qat.keras")
    )
    if chosen is None:
        fewest = min(layer.weight_spec.bits for layer in after.values())
        names = [name for name, layer in after.items() if layer.weight_spec.bits == fewest]
        names = list(dict.fromkeys((names[0], names[len(names) // 2], names[-1])))
    else:
        names = networks.split(chosen, "--layers")
    for name in names:
        if name not in after:
            raise ValueError(f"--layers: {name!r} is none of {', '.join(after)}")
    return {name: (_in_steps(before[name]), _in_steps(after[name])) for name in names}


def _in_steps(layer):
    kernel = ops.convert_to_numpy(layer.folded()[0])
    scale, _ = layer.numpy_scale(kernel)
    return (kernel.reshape(-1, layer.output_channels()) / scale).ravel()


def losses_of(folder: pathlib.Path) -> list[tuple[float, float]]:
    """Returns (step, loss) of a run's QAT stage, means of at most WINDOWS windows."""
    rows = [row for row in results.read_rows(folder / "training.csv") if row["stage"] == "QAT"]
    windows = np.array_split(np.arange(len(rows)), min(WINDOWS, len(rows)))
    values = np.array([(float(row["step"]), float(row["loss"])) for row in rows])
    return [tuple(values[window].mean(axis=0)) for window in windows]


def alphas_of(
    folder: pathlib.Path, names: list[str]
) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Returns {part: {layer: [(step, alpha)]}} of a run with DSQ, {} of another.

    Of activations those that the layers of `names` read.
    """
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in results.read_rows(folder / "alpha.csv"):
        for name in dsq.layers_of(row):
            if name in names:
                curve = found.setdefault(row["part"], {}).setdefault(name, [])
                curve.append((float(row["step"]), float(row["alpha"])))
    return found


def main() -> None:
    """Runs the command line."""
    cli.run(draw, Config)


if __name__ == "__main__":
    main()
