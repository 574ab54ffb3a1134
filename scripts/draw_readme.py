"""Draws docs/ptq.png and docs/ablation.png from the rows in results/."""

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (the backend is chosen first)

from lowbit import results  # noqa: E402

# Bars of the two panels: name, colour.
EIGHT_BITS = {
    "float": "#b8b8b8",
    "lowbit accurate": "#2a6f4e",
    "lowbit fast": "#7db593",
    "converter": "#d9a441",
    "litert_quantizer": "#b4553a",
}
FOUR_BITS = {
    "float": "#b8b8b8",
    "lowbit w4a8 accurate": "#2a6f4e",
    "litert_quantizer w4a8": "#b4553a",
}


def main():
    """Draws both pictures."""
    draw_peers(results.read_rows("results/ptq_peers.csv"), "docs/ptq.png")
    draw_ablation(results.read_rows("results/ablation.csv"), "docs/ablation.png")


def draw_peers(rows, path):
    """Draws a panel for 8-bit and one for 4-bit weights, each network a group of bars."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    top1 = {(row["model"], row["tool"]): float(row["top1"]) for row in rows}
    figure, axes = pyplot.subplots(
        2, 1, figsize=(9, 5.6), layout="constrained", height_ratios=(1, 1)
    )
    titles = ("8-bit weights and activations", "4-bit weights, 8-bit activations")
    for axis, bars_of, title in zip(axes, (EIGHT_BITS, FOUR_BITS), titles, strict=True):
        width = 0.84 / len(bars_of)
        for offset, (tool, color) in enumerate(bars_of.items()):
            places = [i + (offset - (len(bars_of) - 1) / 2) * width for i in range(len(models))]
            values = [top1[model, tool] for model in models]
            bars = axis.bar(places, values, width=width * 0.95, color=color, label=tool)
            axis.bar_label(bars, fmt="%.3f", fontsize=7, padding=1)
        axis.set_xticks(range(len(models)), [model.removesuffix("_224") for model in models])
        axis.set_ylabel("top-1, nips17_dev_500")
        axis.set_title(f"{title}: PTQ, 100 calibration images, .tflite", fontsize=10)
        axis.legend(ncols=len(bars_of), loc="upper center", frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylim(0.4, 1.05)
    axes[1].set_ylim(0, 1.15)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def draw_ablation(rows, path):
    """Draws the top-1 of 4-bit weights by corrections, a panel for each network."""
    rows = [row for row in rows if row["scheme"] == "w4a8"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    names = list(dict.fromkeys(row["corrections"] for row in rows))[::-1]
    figure, axes = pyplot.subplots(
        1, len(models), figsize=(3 + 2.1 * len(models), 4.6), layout="constrained", sharey=True
    )
    for axis, model in zip(axes, models, strict=True):
        found = {row["corrections"]: row for row in rows if row["model"] == model}
        floats = [float(row["top1"]) - float(row["minus_float"]) for row in found.values()]
        values = [float(found[name]["top1"]) if name in found else 0.0 for name in names]
        colors = ["#2a6f4e" if name.startswith("accurate") else "#4878a8" for name in names]
        bars = axis.barh(range(len(names)), values, color=colors)
        labels = [f"{float(found[n]['top1']):.2f}" if n in found else "not measured" for n in names]
        axis.bar_label(bars, labels, fontsize=7, padding=2)
        axis.axvline(floats[0], color="#888888", linewidth=1, linestyle="--")
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_xlim(0, 1.08)
        axis.set_title(model.removesuffix("_224"), fontsize=9)
        axis.set_xlabel("top-1 (dashed: float)", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
