"""Draws docs/ptq.png, the README's picture, from results/ptq_peers.csv."""

import csv

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (the backend is chosen first)

TOOLS = {
    "float": "#b8b8b8",
    "lowbit": "#2a6f4e",
    "converter": "#d9a441",
    "litert_quantizer": "#b4553a",
}


def main():
    """Groups of four bars: float, and three int8 files, for each network."""
    with open("results/ptq_peers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axis = pyplot.subplots(figsize=(9, 3.4), layout="constrained")
    for offset, (tool, color) in enumerate(TOOLS.items()):
        values = [
            float(next(r["top1"] for r in rows if (r["model"], r["tool"]) == (model, tool)))
            for model in models
        ]
        places = [index + (offset - 1.5) * 0.2 for index in range(len(models))]
        bars = axis.bar(places, values, width=0.19, color=color, label=tool)
        axis.bar_label(bars, fmt="%.3f", fontsize=7, padding=1)
    axis.set_xticks(range(len(models)), [model.removesuffix("_224") for model in models])
    axis.set_ylim(0.4, 1.0)
    axis.set_ylabel("top-1, nips17_dev_500")
    axis.set_title("8-bit post-training quantization, 100 calibration images, .tflite with XNNPACK")
    axis.legend(ncols=4, loc="upper center", frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig("docs/ptq.png", dpi=130)


if __name__ == "__main__":
    main()
