"""Each correction of post-training quantization alone, and together, per network.

    LOWBIT_DATA=folder python scripts/ablation.py --scheme=w4a8

All rows of a network share the float model, the calibration images and, where the float network is
not rewritten, the activation ranges (`--calibrator`).  Files run in the interpreter with XNNPACK on
nips17_dev_500; rows go to results/ablation.csv.  What is there already is not measured again.
"""

import argparse
import gc
import os
import pathlib
import resource
import sys
import time

import compare_peers
import numpy as np

from eval import accuracy
from lowbit import (
    calibration,
    lowering,
    manifest,
    metrics,
    quantizers,
    ranges,
    results,
    runtimes,
    spec,
    tflite_file,
)
from lowbit.data import datasets, pipeline
from lowbit.data import preprocess as preprocessing
from ptq import recipes

ACCURATE = recipes.RECIPES["accurate"].corrections
WITHOUT = {f"accurate without {name}": tuple(n for n in ACCURATE if n != name) for name in ACCURATE}
ROWS = {
    "none": (),
    **{name: (name,) for name in recipes.CORRECTIONS if name != "absorption"},
    "equalization, absorption": ("equalization", "absorption"),
    "accurate": ACCURATE,
    **WITHOUT,
    "accurate, adaround instead": tuple(
        "adaround" if name == "error_feedback" else name for name in ACCURATE
    ),
    "accurate and equalization": ("equalization", *ACCURATE),
}


def main():
    """Measures the rows that are missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(compare_peers.MODELS))
    parser.add_argument("--scheme", default="w4a8")
    parser.add_argument("--rows", default=";".join(ROWS), help="names, with semicolons")
    parser.add_argument("--images", type=int, default=60, help="for calibration and corrections")
    parser.add_argument("--calibrator", default="auto")
    parser.add_argument("--limit", type=int, default=500, help="test images")
    parser.add_argument("--output", default="results/ablation.csv")
    arguments = parser.parse_args()
    for name in arguments.rows.split(";"):
        if name not in ROWS:
            parser.error(f"row {name!r} is unknown; allowed are {'; '.join(ROWS)}")
    folder = pathlib.Path(os.environ["LOWBIT_DATA"])
    calibration_set = datasets.open_dataset(folder / "images/imagenet_calibration_1000.zip")
    test_set = datasets.open_dataset(folder / "images/nips17_dev_500.zip")
    for name in arguments.models.split(","):
        measure(name, folder, calibration_set, test_set, arguments)
    print(
        results.table(
            results.read_rows(arguments.output),
            ["model", "scheme", "corrections", "top1", "minus_float", "mean_kl", "seconds"],
        )
    )


def measure(name, folder, calibration_set, test_set, arguments):
    """Measures the missing rows of one network."""
    have = set()
    if os.path.exists(arguments.output):
        have = {
            (row["model"], row["scheme"], row["corrections"], row["images"], row["calibrator"])
            for row in results.read_rows(arguments.output)
        }
    settings = str(arguments.images), arguments.calibrator
    wanted = [
        row
        for row in arguments.rows.split(";")
        if (name, arguments.scheme, row, *settings) not in have
    ]
    if not wanted:
        return
    model, _ = manifest.load_model(folder / f"models/{name}.keras")
    preprocess = preprocessing.parse(compare_peers.MODELS[name])
    options = {"input_size": model.input_shape[1:3], "preprocess": preprocess, "batch_size": 20}

    def images():
        batches = pipeline.calibration_batches(calibration_set, arguments.images, seed=0, **options)
        return (x for x, _ in batches)

    count = min(arguments.limit, len(test_set))
    labels = test_set.labels[:count]

    def outputs(run, title):
        runner = accuracy.Runner(run, tuple(model.input_shape[1:]), preprocess, {})
        return accuracy.outputs_of(runner, test_set, count, 16, title)

    reference = outputs(lambda batches: runtimes.run_keras(model, batches), f"{name} float")
    shared = None
    for row in wanted:
        start = time.perf_counter()
        corrections = recipes.check(ROWS[row])
        quantized, twin = recipes.place(model, spec.scheme(arguments.scheme), corrections)
        rewritten = any(name in recipes.REWRITES[:2] for name in corrections)
        own = quantizers.activation_quantizers(quantized)
        if rewritten or shared is None:
            calibration.calibrate(quantized, images(), ranges.estimator(arguments.calibrator))
            if not rewritten:
                shared = [(q.minimum.numpy(), q.maximum.numpy()) for q in own]
        else:
            for quantizer, (low, high) in zip(own, shared, strict=True):
                quantizer.minimum.assign(low)
                quantizer.maximum.assign(high)
        if twin is not None:
            recipes.correct(quantized, twin, corrections, images(), arguments.images)
        content = tflite_file.write(lowering.lower(quantized))
        seconds = time.perf_counter() - start
        values = outputs(
            lambda batches, content=content: runtimes.run_litert(content, batches),
            f"{name} {row}",
        )
        compared = accuracy.compare(values, reference, labels)
        measured = {
            "model": name,
            "scheme": arguments.scheme,
            "corrections": row,
            "top1": float((metrics.ranks(values, labels) == 0).mean()),
            "minus_float": compared["top1_difference"],
            "paired_error": compared["top1_paired_error"],
            "mean_kl": compared["mean_kl"],
            "agreement": compared["agreement"],
            "seconds": seconds,
            "images": arguments.images,
            "calibrator": arguments.calibrator,
            "test": f"{count} of nips17_dev_500",
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "versions": str(manifest.versions()),
        }
        results.append_row(arguments.output, measured)
        print(
            results.table([measured], ["model", "corrections", "top1", "mean_kl", "seconds"]),
            file=sys.stderr,
        )
        del quantized, twin
        gc.collect()


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    main()
