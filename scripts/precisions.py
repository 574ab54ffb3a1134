"""Every precision that export writes, beside the peers': bytes, accuracy and latency in one table.

    LOWBIT_DATA=folder python scripts/precisions.py

For each network a file of each precision, ours and the peers', from the same float model and the same
calibration images: top-1 on the test images in the default interpreter, and latency in one thread, the
files in turn, each beside the float file of its round (eval/on_host.py).  Rows: results/precisions.csv.
"""

import argparse
import os
import pathlib
import statistics
import sys

import compare_peers
import numpy as np
import peers

from eval import accuracy, on_host
from lowbit import lint, lowering, metrics, progress, results, runtimes, tflite_file
from lowbit.data import datasets

# name: (scheme, recipe, how weights are held)
OURS = {
    "float32": ("float32", "plain", lowering.Storage()),
    "float16": ("float16", "plain", lowering.Storage(float16=True)),
    "w8": ("w8", "plain", lowering.Storage()),
    "dynamic": ("dynamic", "plain", lowering.Storage(dynamic=True)),
    "w8a16": ("w8a16", "plain", lowering.Storage()),
    "w8a8": ("w8a8", "fast", lowering.Storage()),
    "w4a8, in int8": ("w4a8", "accurate", lowering.Storage()),
    "w4a8, packed": ("w4a8", "accurate", lowering.Storage(packed=True)),
}
FLOAT = "float32 (converter)"
PEERS = {
    "int8 (converter)": lambda model, converted, images: peers.converter_ptq(model, images),
    "weight-only int8 (litert_quantizer)": lambda model, converted, images: (
        peers.litert_quantizer_weights(converted, "weight_only_wi8_afp32")
    ),
    "dynamic int8 (litert_quantizer)": lambda model, converted, images: (
        peers.litert_quantizer_weights(converted, "dynamic_wi8_afp32")
    ),
}


def main():
    """Measures every model and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(compare_peers.MODELS))
    parser.add_argument("--images", type=int, default=100, help="for calibration")
    parser.add_argument("--limit", type=int, default=500, help="test images")
    parser.add_argument(
        "--rounds", type=int, default=15, help="turns of each file, one behind another"
    )
    parser.add_argument("--output", default="results/precisions.csv")
    arguments = parser.parse_args()
    folder = pathlib.Path(os.environ["LOWBIT_DATA"])
    images = datasets.open_dataset(folder / "images/imagenet_calibration_1000.zip")
    test_set = datasets.open_dataset(folder / "images/nips17_dev_500.zip")
    rows = []
    for name in arguments.models.split(","):
        made = measure(name, folder, images, test_set, arguments)
        for row in made:
            results.append_row(arguments.output, row)
        rows += made
    columns = ["model", "file", "size_bytes", "size_ratio", "top1", "paired_error", "mean_kl"]
    print(results.table(rows, [*columns, "time_ratio", "faults"]))


def measure(name, folder, calibration_set, test_set, arguments):
    """Returns a row for each file of one network."""
    model, preprocess, images = compare_peers.load(name, folder, calibration_set, arguments.images)
    converted = peers.float_tflite(model)
    files = {FLOAT: converted}
    quantized: dict = {}
    with progress.bar(f"{name}: writing", len(OURS)) as update:
        for number, (file, (scheme, recipe, storage)) in enumerate(OURS.items(), 1):
            if (scheme, recipe) not in quantized:
                made = compare_peers.quantize(model, images, scheme, recipe)
                quantized = {(scheme, recipe): made}
            graph = lowering.lower(quantized[scheme, recipe], "", storage)
            files[file] = tflite_file.write(graph, {"scheme": scheme})
            update(number, file)
    files |= {file: make(model, converted, images) for file, make in PEERS.items()}

    count = min(arguments.limit, len(test_set))
    labels = test_set.labels[:count]
    outputs = {}
    for file, content in files.items():
        runner = accuracy.Runner(
            lambda batches, content=content: runtimes.run_litert(content, batches),
            tuple(model.input_shape[1:]),
            preprocess,
            {},
        )
        outputs[file] = accuracy.outputs_of(runner, test_set, count, 16, f"{name} {file}")
    # A round is a turn of each file, of as many runs as on_host says.
    entrants = [on_host.ready(content, file) for file, content in files.items()]
    timed = on_host.timed(entrants, runs=arguments.rounds * on_host.TURN_RUNS)
    medians_ms = {
        file: [float(np.median(turn)) for turn in turns]
        for file, turns in zip(files, timed, strict=True)
    }
    rows = []
    for file, content in files.items():
        compared = accuracy.compare(outputs[file], outputs[FLOAT], labels)
        rows.append(
            {
                "model": name,
                "file": file,
                "size_bytes": len(content),
                "size_ratio": len(content) / len(converted),
                "top1": float((metrics.ranks(outputs[file], labels) == 0).mean()),
                "minus_float": compared["top1_difference"],
                "paired_error": compared["top1_paired_error"],
                "mean_kl": compared["mean_kl"],
                "faults": len(lint.faults(content, file)) if file in OURS else None,
                "median_ms": statistics.median(medians_ms[file]),
                **on_host.paired_ratio(medians_ms[file], medians_ms[FLOAT]),
                "rounds": arguments.rounds,
                "threads": 1,
                "calibration": f"{len(images)} of imagenet_calibration_1000",
                "test": f"{count} of nips17_dev_500",
                "versions": str(peers.versions()),
            }
        )
    print(results.table(rows, ["model", "file", "top1", "time_ratio"]), file=sys.stderr)
    return rows


if __name__ == "__main__":
    main()
