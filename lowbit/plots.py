"""Pictures, drawn without a display."""

import contextlib
import csv
import math
import os
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np

from lowbit import files

matplotlib.use("Agg")
from matplotlib import pyplot, ticker  # noqa: E402  (the backend is chosen first)

_DARK, _LIGHT, _GREY = "#2a6f4e", "#d9a441", "#8a8a8a"
_CURVES = (_DARK, _LIGHT, "#4878a8", "#a03a3a", "#8a5fb0", "#3fa9a0")
_STYLES = ("-", "--", ":", "-.")  # by turn, where the colours begin anew
_BY_WEIGHTS = {"last": _LIGHT, "average": _DARK}  # validation curves


def training_curve(
    training_csv: str | os.PathLike,
    rows: Sequence[Mapping],
    path: str | os.PathLike,
    validation: Sequence[Mapping] = (),
    selection: Sequence[Mapping] = (),
) -> None:
    """Draws the loss of each stage, and the accuracies that the run ended with.

    Args:
      training_csv: columns stage, step, loss.
      rows: with "model", and "top1" or, of pictures without labels, "agreement".
      path: of the PNG.
      validation: rows of stage, step, weights, and "top1" or "agreement", measured in between.
      selection: rows of step and value, of the last stage: its loss on images that were left out.
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
    if selection:
        points = [(int(row["step"]), float(row["value"])) for row in selection]
        best = min(points, key=lambda point: point[1])
        line = {"color": _CURVES[3], "linestyle": "-", "marker": "o"}
        axes[-2].plot(*zip(*points, strict=True), **line, markersize=3, label="images left out")
        axes[-2].plot(*best, **line, markersize=8, markerfacecolor="none", label="saved")
        axes[-2].legend(frameon=False, fontsize=7, loc="upper right")
    measure = "top1" if "top1" in rows[0] else "agreement"
    names = [row["model"].replace("_", "\n") for row in rows]
    accuracy_bars(axes[-1], names, [row[measure] for row in rows])
    title = "top-1" if measure == "top1" else "agreement with float"
    for axis, stage in zip(axes, stages, strict=False):
        found = [row for row in validation if row["stage"] == stage and row[measure]]
        if not found:
            continue
        twin = axis.twinx()
        for weights in dict.fromkeys(row["weights"] for row in found):
            points = [
                (int(row["step"]), float(row[measure]))
                for row in found
                if row["weights"] == weights
            ]
            twin.plot(*zip(*points, strict=True), "o-", markersize=3, color=_BY_WEIGHTS[weights])
            twin.lines[-1].set_label(f"{title}, {weights} weights")
        twin.set_ylabel(title)
        twin.legend(frameon=False, fontsize=7, loc="lower right")
    axes[-1].set(title=title, xlabel="validation images", ylabel=title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def learning_curves(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    path: str | os.PathLike,
    measure: str = "top-1",
    over: str = "step",
) -> None:
    """Draws a panel for each title: curves by label, each of (x, value) points.

    Args:
      panels: {title: {label: points}}; empty curves are left out.
      path: of the PNG.
      measure: what the values are.
      over: what x is.
    """
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with _picture(path, rows, columns, (4.6 * columns, 3.2 * rows)) as axes:
        axes = np.atleast_1d(axes).ravel()
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        for axis, (title, curves) in zip(axes, panels.items(), strict=False):
            for index, (label, points) in enumerate(curves.items()):
                turn, place = divmod(index, len(_CURVES))
                if points:
                    style = {"color": _CURVES[place], "linestyle": _STYLES[turn % len(_STYLES)]}
                    style |= {"marker": "o", "markersize": 2.5, "linewidth": 1.2}
                    axis.plot(*zip(*points, strict=True), label=label, **style)
            axis.set_title(title, fontsize=8)
            axis.set(xlabel=over, ylabel=measure)
            axis.grid(axis="y", linewidth=0.3)
            axis.legend(frameon=False, fontsize=7)


def accuracy_bars(axis, names: Sequence[str], values: Sequence[float]) -> None:
    """Draws a bar for each accuracy with its number, the axis cut so that differences show."""
    bars = axis.bar(names, values, color="#4878a8")
    axis.bar_label(bars, fmt="%.3f")
    lower = max(0.0, min(values) - (1 - min(values)) - 0.02)
    # Room for the numbers above the bars.
    axis.set_ylim(lower, max(values) + 0.12 * (max(values) - lower))
    axis.set_ylabel("top-1")


# --- where it hurts (eval.layers) -----------------------------------------------------------------


@contextlib.contextmanager
def _picture(path, rows=1, columns=1, size=(8, 4)):
    """Yields a figure's axes; saves it, whole or not at all."""
    figure, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained")
    try:
        yield axes
        for axis in figure.axes:
            axis.spines[["top", "right"]].set_visible(False)
        with files.replacing(path) as temporary:
            figure.savefig(temporary, dpi=120)
    finally:
        pyplot.close(figure)


def layer_errors(rows: Sequence[Mapping], path: str | os.PathLike) -> None:
    """Draws each tensor's SQNR and mean shift, from the input (top) to the output.

    Args:
      rows: of eval.layers: "layer", "output_sqnr_db", and for layers with weights "channel_sqnr_db"
        and "mean_shift".
      path: of the PNG.
    """
    size = (10, 1.2 + 0.17 * len(rows))
    with _picture(path, 1, 2, size) as (left, right):
        for axis, columns, label in (
            (left, ("channel_sqnr_db", "output_sqnr_db"), "SQNR in dB (higher is better)"),
            (right, ("mean_shift",), "mean shift in standard deviations"),
        ):
            for column, color, title in zip(
                columns,
                (_LIGHT, _DARK) if len(columns) > 1 else (_DARK,),
                ("weights, mean of channels", "output, errors accumulated"),
                strict=False,
            ):
                places = [index for index, row in enumerate(rows) if _finite(row.get(column))]
                values = [rows[index][column] for index in places]
                style = "o" if len(columns) > 1 else "_"
                if style == "o":
                    axis.plot(values, places, "o-", markersize=3, linewidth=0.8, color=color)
                    axis.lines[-1].set_label(title)
                else:
                    axis.barh(places, values, color=color)
            axis.set(xlabel=label, ylim=(len(rows) - 0.5, -0.5))
            axis.grid(axis="x", linewidth=0.3)
        left.legend(frameon=False, fontsize=7, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
        left.set_yticks(range(len(rows)), [row["layer"] for row in rows], fontsize=6)
        right.set_yticks(range(len(rows)), [""] * len(rows))


def _finite(value):
    return value is not None and math.isfinite(value)


def sensitivity(rows: Sequence[Mapping], path: str | os.PathLike) -> None:
    """Draws the KL that each thing quantized alone costs, the largest on top.

    Args:
      rows: "quantized", "part" ("weights" or "activation"), "kl" in nats, "agreement".
      path: of the PNG.
    """
    with _picture(path, size=(8, 1.2 + 0.2 * len(rows))) as axis:
        for part, color in (("weights", _LIGHT), ("activation", _DARK)):
            places = [index for index, row in enumerate(rows) if row["part"] == part]
            values = [rows[index]["kl"] for index in places]
            bars = axis.barh(places, values, color=color, label=f"{part} alone")
            agreements = [f"{100 * rows[index]['agreement']:.0f}%" for index in places]
            axis.bar_label(bars, agreements, fontsize=6, padding=2)
        axis.set_yticks(range(len(rows)), [row["quantized"] for row in rows], fontsize=7)
        axis.set(
            ylim=(len(rows) - 0.5, -0.5),
            xlabel="mean KL from the float output, nats; beside the bars: same first choice",
        )
        axis.legend(frameon=False, fontsize=8, loc="lower right")


def sqnr_histograms(series: Mapping[str, np.ndarray], title: str, path: str | os.PathLike) -> None:
    """Draws how many kernels have which SQNR (whitepaper Figures 18 and 19).

    Args:
      series: by title, dB of each kernel, (channels,); infinite ones are left out.
      title: of the picture.
      path: of the PNG.
    """
    finite = {name: values[np.isfinite(values)] for name, values in series.items()}
    everything = np.concatenate(list(finite.values()))
    low, high = (
        (np.floor(everything.min()), np.ceil(everything.max())) if everything.size else (0, 1)
    )
    edges = np.linspace(low, max(high, low + 1), 33)
    with _picture(path, size=(7.5, 3.4)) as axis:
        looks = (
            {"color": _LIGHT, "alpha": 0.8},
            {"color": _DARK, "alpha": 0.8},
            {"color": "black", "histtype": "step", "linestyle": ":", "linewidth": 1.2},
        )
        for (name, values), look in zip(finite.items(), looks, strict=False):
            median = f"{np.median(values):.1f} dB" if values.size else "all exact"
            axis.hist(values, edges, label=f"{name} (median {median})", **look)
        count = max(len(values) for values in series.values())
        axis.set(xlabel="SQNR of a kernel in dB", ylabel=f"kernels, of {count}")
        axis.set_title(title, fontsize=9)
        axis.yaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        axis.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1.08))


def weight_histograms(
    before: np.ndarray, after: np.ndarray, title: str, path: str | os.PathLike
) -> None:
    """Draws a kernel's weights before and after batch norm is folded in (whitepaper Figure 20).

    Args:
      before, after: float (taps, channels).
      title: of the picture.
      path: of the PNG.
    """
    with _picture(path, 1, 2, (8, 3.2)) as axes:
        for axis, kernel, color, when in zip(
            axes, (before, after), (_GREY, _DARK), ("before folding", "folded"), strict=True
        ):
            axis.hist(kernel.ravel(), 100, color=color)
            axis.set_yscale("log")
            spread = np.abs(kernel).max() / max(kernel.std(), 1e-30)
            axis.set(xlabel=f"weight {when}", ylabel=f"weights, of {kernel.size}")
            axis.set_title(f"largest: {spread:.1f} standard deviations", fontsize=8)
        axes[0].figure.suptitle(title, fontsize=9)


def step_histograms(
    weights: Mapping[str, tuple[np.ndarray, np.ndarray]], title: str, path: str | os.PathLike
) -> None:
    """Draws where weights lie between their codes, before training and after (DSQ's Figure 5).

    Args:
      weights: by layer, (before, after), float (n,), in units of their step.
      title: of the picture.
      path: of the PNG.
    """
    columns = len(weights)
    with _picture(path, 1, columns, (3.6 * columns, 3.2)) as axes:
        axes = np.atleast_1d(axes)
        for axis, (name, pair) in zip(axes, weights.items(), strict=True):
            edge = np.ceil(max(np.abs(each).max() for each in pair))
            bins = np.arange(-edge, edge + 0.05, 0.1)
            for values, color, when in zip(pair, (_GREY, _DARK), ("before", "after"), strict=True):
                axis.hist(values, bins, density=True, histtype="step", color=color, label=when)
            axis.set(title=name, xlabel="weight / step", ylabel="density")
            axis.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
            axis.grid(axis="x", linewidth=0.4)
            axis.legend(frameon=False, fontsize=7)
        axes[0].figure.suptitle(title, fontsize=9)


def channel_ranges(
    largest: Mapping[str, np.ndarray], name: str, kernel: np.ndarray, path: str | os.PathLike
) -> None:
    """Draws the range of every channel of one layer, and how uneven the channels of all layers are.

    Args:
      largest: by layer, the largest |weight| of each output channel, (channels,).
      name, kernel: the one layer and its folded kernel, float (taps, channels).
      path: of the PNG.
    """
    with _picture(path, 2, 1, (max(8, 0.16 * len(largest) + 2), 7)) as (top, bottom):
        low, high = kernel.min(axis=0), kernel.max(axis=0)
        order = np.argsort(high - low)
        places = np.arange(len(order))
        top.vlines(places, low[order], high[order], color=_DARK, linewidth=max(0.4, 250 / len(low)))
        top.axhline(0, color="black", linewidth=0.4)
        top.set(xlabel="output channel, by its range", ylabel="folded weight: lowest to highest")
        top.set_title(f"{name}: {len(low)} channels", fontsize=9)
        ratios = []
        for values in largest.values():
            median = np.median(values)
            ratios.append(np.maximum(values / (median if median > 0 else 1), 2.0**-20))
        bottom.boxplot(
            ratios,
            whis=(0, 100),
            widths=0.7,
            medianprops={"color": _LIGHT},
            boxprops={"color": _DARK},
            whiskerprops={"color": _DARK, "linewidth": 0.7},
            capprops={"color": _DARK},
        )
        bottom.set_yscale("log")
        bottom.set_xticks(range(1, len(largest) + 1), list(largest), rotation=90, fontsize=6)
        bottom.set_ylabel("largest |weight| of a channel / median")
        bottom.set_title("all layers: quartiles, lowest and highest channel", fontsize=9)


def activation_memory(rows: Sequence[Mapping], widths: Sequence[int], path) -> None:
    """Draws the bytes of activations held while each tensor is computed, at each width, one image.

    Args:
      rows: "tensor", "live_elements", and "live_bytes_8_bit" and the like.
      widths: bits of an activation.
      path: of the PNG.
    """
    with _picture(path, size=(max(8, 0.14 * len(rows) + 2), 4.2)) as axis:
        places = range(len(rows))
        for width, shade in zip(widths, np.linspace(0.25, 1, len(widths)), strict=True):
            values = [row[f"live_bytes_{width}_bit"] / 2**20 for row in rows]
            axis.fill_between(
                places,
                values,
                step="mid",
                color=_DARK,
                alpha=shade,
                label=f"{width} bits: peak {max(values):.3g} MiB",
            )
        axis.set_xticks(places, [row["layer"] for row in rows], rotation=90, fontsize=6)
        axis.set(ylabel="live activations, MiB", xlim=(-0.5, len(rows) - 0.5), ylim=(0, None))
        axis.legend(frameon=False, fontsize=8)


def grouped_bars(
    groups: Mapping[str, Mapping[str, float]],
    names: Sequence[str],
    path: str | os.PathLike,
    title: str,
    label: str,
) -> None:
    """Draws a lying bar with its number for each value, those of a group together, from 0 to 1.

    Args:
      groups: group: name: value in [0, 1]; a name that a group lacks leaves a gap.
      names: in the order of the bars, at most 6.
      path: of the PNG.
      title: of the picture.
      label: of the values.
    """
    # Okabe and Ito's colours, told apart by colour-blind readers; grey for the reference.
    colours = ("#999999", "#56b4e9", "#0072b2", "#009e73", "#e69f00", "#d55e00")
    # Bars 0.16 inches high, so that their numbers do not touch.
    height = 0.16 * len(groups) * (len(names) + 1) + 1.3
    with _picture(path, size=(8, height)) as axis:
        thickness = 1 / (len(names) + 1)
        for place, (name, colour) in enumerate(zip(names, colours, strict=False)):
            offset = (place - (len(names) - 1) / 2) * thickness
            values = {
                number + offset: group[name]
                for number, group in enumerate(groups.values())
                if name in group
            }
            bars = axis.barh(
                list(values), list(values.values()), thickness, color=colour, label=name
            )
            axis.bar_label(bars, fmt="%.3f", padding=2, fontsize=8)
        axis.set_yticks(range(len(groups)), list(groups))
        # The first group at the top; room for the numbers behind the bars.
        axis.set(title=title, xlabel=label, xlim=(0, 1.08), ylim=(len(groups) - 0.5, -0.5))
        axis.set_xticks([fifth / 5 for fifth in range(6)])
        axis.figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
