"""PTQ beside its peers: the same float models, calibration images and test images.

    LOWBIT_DATA=folder python scripts/compare_peers.py

For each network: float Keras, our `.tflite` by each recipe at 8 bits and with 4-bit weights, the
TFLite converter's and litert_quantizer's, all in the interpreter.  Every tool gets the same images.
Rows go to results/ptq_peers.csv.
"""

import argparse
import functools
import os
import pathlib
import resource
import sys
import time

import numpy as np
import peers

from eval import accuracy
from lowbit import (
    calibration,
    lowering,
    manifest,
    metrics,
    ranges,
    results,
    runtimes,
    spec,
    tflite_file,
)
from lowbit.data import datasets, pipeline
from lowbit.data import preprocess as preprocessing
from ptq import recipes

MODELS = {
    "mobilenet_v1_1.0_224": "tf",
    "mobilenet_v2_1.0_224": "torch",
    "efficientnet_lite0_224": "127,128",
    "mobilenet_v1_0.25_224": "tf",
}


# scheme, recipe
OURS = {
    "lowbit": ("w8a8", "plain"),
    "lowbit fast": ("w8a8", "fast"),
    "lowbit accurate": ("w8a8", "accurate"),
    "lowbit w4a8 accurate": ("w4a8", "accurate"),
}
TOOLS = (*OURS, "converter", "litert_quantizer", "litert_quantizer w4a8")


def main():
    """Measures every model and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100, help="for calibration")
    parser.add_argument(
        "--seed", type=int, default=0, help="which images are drawn, in which order"
    )
    parser.add_argument("--limit", type=int, default=500, help="test images")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--output", default="results/ptq_peers.csv")
    arguments = parser.parse_args()
    folder = pathlib.Path(os.environ["LOWBIT_DATA"])
    calibration_set = datasets.open_dataset(folder / "images/imagenet_calibration_1000.zip")
    test_set = datasets.open_dataset(folder / "images/nips17_dev_500.zip")
    rows = []
    for name in arguments.models.split(","):
        made = compare(name, folder, calibration_set, test_set, arguments)
        for row in made:
            results.append_row(arguments.output, row)
        rows += made
    columns = ["model", "tool", "top1", "minus_float", "paired_error", "mean_kl", "seconds"]
    print(results.table(rows, columns))
    for tool in ("float", *arguments.tools.split(",")):
        top1 = [row["top1"] for row in rows if row["tool"] == tool]
        print(f"mean top-1, {tool}: {np.mean(top1):.4f}")


def quantize(model, images, scheme, recipe):
    """Returns the quantized Keras model of a recipe of ours; `images` are batches of one."""
    recipe = recipes.RECIPES[recipe]

    def batches():
        return (np.concatenate(images[i : i + 10]) for i in range(0, len(images), 10))

    quantized, twin = recipes.place(model, spec.scheme(scheme), recipe.corrections)
    if calibration.observed_points(quantized):
        calibration.calibrate(quantized, batches(), ranges.estimator(recipe.calibrator))
    if twin is not None:
        recipes.correct(quantized, twin, recipe.corrections, batches(), len(images))
    return quantized


def load(name, folder, calibration_set, count, seed=0):
    """Returns (float model, its preprocess, calibration batches of one image)."""
    model, _ = manifest.load_model(folder / f"models/{name}.keras")
    preprocess = preprocessing.parse(MODELS[name])
    options = {"input_size": model.input_shape[1:3], "preprocess": preprocess}
    drawn = pipeline.calibration_batches(calibration_set, count, seed=seed, batch_size=1, **options)
    return model, preprocess, [x for x, _ in drawn]


def compare(name, folder, calibration_set, test_set, arguments):
    """Returns one row for each tool."""
    model, preprocess, images = load(
        name, folder, calibration_set, arguments.images, arguments.seed
    )

    def ours(scheme, recipe):
        return tflite_file.write(lowering.lower(quantize(model, images, scheme, recipe)))

    makers = {tool: functools.partial(ours, *how) for tool, how in OURS.items()}
    makers |= {
        "converter": lambda: peers.converter_ptq(model, images),
        "litert_quantizer": lambda: peers.litert_quantizer_ptq(converted, images),
        "litert_quantizer w4a8": lambda: peers.litert_quantizer_ptq(converted, images, 4),
    }
    files = {}
    seconds = {}
    converted = peers.float_tflite(model)
    for tool in arguments.tools.split(","):
        start = time.perf_counter()
        files[tool] = makers[tool]()
        seconds[tool] = time.perf_counter() - start

    count = min(arguments.limit, len(test_set))
    labels = test_set.labels[:count]
    runners = {"float": lambda batches: runtimes.run_keras(model, batches)}
    for tool, content in files.items():
        runners[tool] = lambda batches, content=content: runtimes.run_litert(content, batches)
    outputs = {}
    for tool, run in runners.items():
        runner = accuracy.Runner(run, tuple(model.input_shape[1:]), preprocess, {})
        outputs[tool] = accuracy.outputs_of(runner, test_set, count, 16, f"{name} {tool}")
    rows = []
    for tool, values in outputs.items():
        compared = accuracy.compare(values, outputs["float"], labels)
        rows.append(
            {
                "model": name,
                "tool": tool,
                "top1": float((metrics.ranks(values, labels) == 0).mean()),
                "minus_float": compared["top1_difference"],
                "paired_error": compared["top1_paired_error"],
                "mean_kl": compared["mean_kl"],
                "agreement": compared["agreement"],
                "seconds": seconds.get(tool),
                "size_bytes": len(files[tool]) if tool in files else None,
                "calibration": f"{len(images)} of imagenet_calibration_1000, seed {arguments.seed}",
                "test": f"{count} of nips17_dev_500",
                "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                "versions": str(peers.versions()),
            }
        )
    print(results.table(rows, ["model", "tool", "top1", "mean_kl"]), file=sys.stderr)
    return rows


if __name__ == "__main__":
    main()
