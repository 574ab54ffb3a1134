"""Pictures, drawn without a display."""

import csv
import os
from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot, ticker  # noqa: E402  (the backend is chosen first)


def training_curve(
    training_csv: str | os.PathLike, rows: Sequence[Mapping], path: str | os.PathLike
) -> None:
    """Draws the loss of each stage, and the accuracies that the run ended with.

    Args:
      training_csv: columns stage, step, loss.
      rows: with "model" and "top1".
      path: of the PNG.
    """
    stages: dict[str, list[tuple[int, float]]] = {}
    with open(training_csv, newline="") as file:
        for row in csv.DictReader(file):
            stages.setdefault(row["stage"], []).append((int(row["step"]), float(row["loss"])))
    figure, axes = pyplot.subplots(
        1, len(stages) + 1, figsize=(4 * (len(stages) + 1), 3), layout="constrained"
    )
    for axis, (stage, points) in zip(axes, stages.items(), strict=False):
        steps, losses = zip(*points, strict=True)
        axis.plot(steps, losses, linewidth=0.8)
        axis.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        axis.set(title=stage, xlabel="step", ylabel="loss", ylim=(0, None))
    accuracy_bars(axes[-1], [row["model"] for row in rows], [row["top1"] for row in rows])
    axes[-1].set(title="top-1 on validation images")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def accuracy_bars(axis, names: Sequence[str], values: Sequence[float]) -> None:
    """Draws a bar for each accuracy with its number, the axis cut so that differences show."""
    bars = axis.bar(names, values, color="#4878a8")
    axis.bar_label(bars, fmt="%.3f")
    lower = max(0.0, min(values) - (1 - min(values)) - 0.02)
    # Room for the numbers above the bars.
    axis.set_ylim(lower, max(values) + 0.12 * (max(values) - lower))
    axis.set_ylabel("top-1")
