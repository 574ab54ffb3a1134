"""Why weight-only quantization makes a file small and not fast: size and latency, interleaved.

    LOWBIT_DATA=folder python scripts/weight_only.py

For each network four files in one run: float, weight-only int8 (litert_quantizer's recipe: int8 in
the file, float when it runs), dynamic range (int8 weights, float activations that the kernel
quantizes), and ours, int8 throughout.  Rows go to results/weight_only.csv.
"""

import argparse
import os
import pathlib
import statistics
import time

import compare_peers
import numpy as np
import peers

from lowbit import calibration, lowering, manifest, placement, results, runtimes, spec, tflite_file
from lowbit.data import datasets, pipeline
from lowbit.data import preprocess as preprocessing


def main():
    """Measures every model and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="mobilenet_v1_1.0_224,mobilenet_v2_1.0_224")
    parser.add_argument("--rounds", type=int, default=40, help="runs of each file, in turn")
    parser.add_argument("--output", default="results/weight_only.csv")
    arguments = parser.parse_args()
    folder = pathlib.Path(os.environ["LOWBIT_DATA"])
    images = datasets.open_dataset(folder / "images/imagenet_calibration_1000.zip")
    rows = []
    for name in arguments.models.split(","):
        rows += measure(name, folder, images, arguments.rounds)
    for row in rows:
        results.append_row(arguments.output, row)
    print(results.table(rows, ["model", "file", "size_bytes", "size_ratio", "time_ratio"]))


def measure(name, folder, images, rounds):
    """Returns a row for each file of one network."""
    model, _ = manifest.load_model(folder / f"models/{name}.keras")
    preprocess = preprocessing.parse(compare_peers.MODELS[name])
    options = {"input_size": model.input_shape[1:3], "preprocess": preprocess}
    batches = [
        x for x, _ in pipeline.calibration_batches(images, 20, seed=0, batch_size=10, **options)
    ]
    quantized = placement.place(model, spec.scheme("w8a8"))
    calibration.calibrate(quantized, batches)
    converted = peers.float_tflite(model)
    files = {
        "float": converted,
        "weight-only int8": peers.litert_quantizer_weights(converted, "weight_only_wi8_afp32"),
        "dynamic range int8": peers.litert_quantizer_weights(converted, "dynamic_wi8_afp32"),
        "int8 (lowbit)": tflite_file.write(lowering.lower(quantized)),
    }
    runners = {}
    for file, content in files.items():
        runner = runtimes.interpreter(content, "xnnpack")
        detail = runner.get_input_details()[0]
        runner.set_tensor(detail["index"], np.zeros(detail["shape"], detail["dtype"]))
        runners[file] = runner
    seconds = {file: [] for file in files}
    for _ in range(rounds):
        for file, runner in runners.items():
            start = time.perf_counter()
            runner.invoke()
            seconds[file].append(time.perf_counter() - start)
    # Each run beside the float run of its round: the machine's other work falls on both.
    return [
        {
            "model": name,
            "file": file,
            "size_bytes": len(content),
            "size_ratio": len(content) / len(converted),
            "median_ms": 1e3 * statistics.median(seconds[file]),
            "time_ratio": statistics.median(
                a / b for a, b in zip(seconds[file], seconds["float"], strict=True)
            ),
            "rounds": rounds,
            "threads": 1,
            "versions": str(peers.versions()),
        }
        for file, content in files.items()
    ]


if __name__ == "__main__":
    main()
