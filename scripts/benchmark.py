"""Speed and memory, as ratios measured in one process: prints a table, appends results/benchmark.csv.

    python scripts/benchmark.py [--model float.keras --preprocess torch --dataset images.zip]
                                [--skip_peers] [--repeats 15]

Steps are interleaved (float, QAT, float, QAT ...), so that a machine that slows down slows all; the
figures are medians.  Without --model the networks have random weights: time does not depend on them.
tfmot's steps beside ours need `pip install -e '.[tfmot]'`: its own float network is tf_keras', and
its ratio is to that one.
"""

import argparse
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import keras
import numpy as np

from lowbit import calibration, lowering, manifest, mlir, placement, results, spec, tflite_file
from lowbit import layers as quantized_layers
from lowbit.data import datasets, pipeline
from lowbit.data import preprocess as preprocessing
from qat import methods

STEP_SIZE, STEP_BATCH = 96, 8


def main():
    """Measures, prints, appends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a float .keras file; default MobileNet-v2, random weights")
    parser.add_argument("--preprocess", default="tf")
    parser.add_argument("--dataset", default="digits", help="calibration images")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--skip_peers", action="store_true")
    parser.add_argument("--only", help="one of step, export, ptq, memory, backends")
    parser.add_argument("--output_dir", default="results")
    arguments = parser.parse_args()
    parts = {"step": steps, "export": export, "ptq": ptq, "memory": memory, "backends": backends}
    rows = []
    for name, part in parts.items():
        if arguments.only in (None, name):
            rows += part(arguments)
    machine = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    for row in rows:
        row |= machine | {"versions": str(manifest.versions())}
        results.append_row(pathlib.Path(arguments.output_dir) / "benchmark.csv", row)
    print(results.table(rows, ["what", "seconds", "ratio", "of", "limit"]))


def row(what, seconds, ratio=None, of=None, limit=None):
    return {"what": what, "seconds": seconds, "ratio": ratio, "of": of, "limit": limit}


# --- training steps ------------------------------------------------------------------------------


def steps(arguments):
    """A step of MobileNet-v2 (96 pixels, batch 8): QAT against float training, ours and tfmot's."""
    random = np.random.default_rng(0)
    x = random.uniform(-1, 1, (STEP_BATCH, STEP_SIZE, STEP_SIZE, 3)).astype(np.float32)
    labels = random.integers(0, 1000, STEP_BATCH)
    shape = (STEP_SIZE, STEP_SIZE, 3)

    def network():
        keras.utils.set_random_seed(0)
        return keras.applications.MobileNetV2(shape, weights=None, classifier_activation=None)

    def quantized(frozen, mode, quantizer="ste"):
        model = placement.place(network(), spec.scheme("w8a8"), mode)
        calibration.calibrate(model, [x])
        model = methods.prepare(model, quantizer, mode)
        for layer in quantized_layers.weighted_layers(model):
            layer.batch_norm_frozen = frozen
        return model

    ours, theirs = "float step", "float step of tf_keras"
    trainees = {
        ours: (network(), ours, None),
        "QAT step, frozen batch norm, moving ranges": (quantized(True, "moving"), ours, 1.15),
        "QAT step, frozen batch norm, frozen ranges": (quantized(True, "frozen"), ours, 1.15),
        "QAT step, batch norm correction, moving ranges": (quantized(False, "moving"), ours, 1.6),
        "QAT step, frozen batch norm, LSQ": (quantized(True, "trainable", "lsq"), ours, None),
        "QAT step, frozen batch norm, DSQ": (quantized(True, "trainable", "dsq"), ours, None),
    }
    for model, _, _ in trainees.values():
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(1e-4, 0.9), loss, jit_compile=False)
    if not arguments.skip_peers:
        import peers

        for name, model in zip(
            (theirs, "tfmot QAT step"), peers.tfmot_trainees(shape), strict=True
        ):
            trainees[name] = (model, theirs, None)
    seconds = {name: [] for name in trainees}
    for model, _, _ in trainees.values():
        for _ in range(3):
            model.train_on_batch(x, labels)
    for _ in range(arguments.repeats):
        for name, (model, _, _) in trainees.items():
            seconds[name].append(timed(lambda model=model: model.train_on_batch(x, labels))[0])
    return [
        row(
            name,
            statistics.median(seconds[name]),
            statistics.median(a / b for a, b in zip(seconds[name], seconds[of], strict=True)),
            of,
            limit,
        )
        for name, (_, of, limit) in trainees.items()
    ]


def timed(function):
    """Returns the seconds that function() took, and its result."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


# --- backends ------------------------------------------------------------------------------------

CIFAR_IMAGES, BACKEND_BATCH, BACKEND_STEPS = 50_000, 128, 24


def backends(arguments):
    """An epoch of ResNet-20 on CIFAR-10, w8a8, from the steps of a short run of qat.train."""
    seconds = {}
    for backend in ("tensorflow", "jax"):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "qat.train", "--model=resnet20", "--scheme=w8a8"]
            command += [f"--dataset={arguments.dataset}", "--float_epochs=0", "--limit=64"]
            command += [f"--batch_size={BACKEND_BATCH}", f"--steps={BACKEND_STEPS}"]
            command += ["--freeze_batch_norm_step=0", f"--output_dir={folder}/run"]
            environment = os.environ | {"KERAS_BACKEND": backend}
            subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
            times = [
                float(row["seconds"]) for row in results.read_rows(f"{folder}/run/training.csv")
            ]
        first = BACKEND_STEPS // 3  # the first steps compile
        step = (times[-1] - times[first]) / (BACKEND_STEPS - 1 - first)
        seconds[backend] = step * CIFAR_IMAGES / BACKEND_BATCH
    return [
        row(
            f"epoch of ResNet-20, w8a8, {backend}",
            value,
            value / seconds["tensorflow"],
            "TensorFlow",
        )
        for backend, value in seconds.items()
    ]


# --- export --------------------------------------------------------------------------------------


def float_model(arguments):
    if arguments.model:
        return manifest.load_model(arguments.model)[0]
    keras.utils.set_random_seed(0)
    return keras.applications.MobileNetV2(weights=None, classifier_activation=None)


def calibration_batches(arguments, model, count, batch_size=10):
    batches = pipeline.calibration_batches(
        datasets.open_dataset(arguments.dataset),
        count,
        input_size=model.input_shape[1:3],
        batch_size=batch_size,
        preprocess=preprocessing.parse(arguments.preprocess),
    )
    return (x for x, _ in batches)


def export(arguments):
    """From a loaded quantized model to the bytes of the file, by both routes."""
    model = placement.place(float_model(arguments), spec.scheme("w8a8"))
    calibration.calibrate(model, calibration_batches(arguments, model, 10))
    direct = []
    for _ in range(3):
        seconds, graph = timed(lambda: lowering.lower(model))
        more, content = timed(lambda graph=graph: tflite_file.write(graph))
        direct.append(seconds + more)
    slow, converted = timed(lambda: mlir.convert(graph))
    print(f"direct {len(content)} bytes, MLIR {len(converted)} bytes", file=sys.stderr)
    fast = statistics.median(direct)
    return [
        row("export MobileNet-v2-224, direct", fast, fast / slow, "MLIR", "1 s"),
        row("export MobileNet-v2-224, MLIR from the same graph", slow, 1.0, "MLIR"),
    ]


# --- post-training quantization ------------------------------------------------------------------


def ptq(arguments):
    """Calibration and quantization on the same decoded images, ours and litert_quantizer's."""
    model = float_model(arguments)
    images = list(calibration_batches(arguments, model, arguments.images, batch_size=1))
    batches = [np.concatenate(images[i : i + 10]) for i in range(0, len(images), 10)]

    def ours():
        placed = placement.place(model, spec.scheme("w8a8"))
        calibration.calibrate(placed, batches)
        return tflite_file.write(lowering.lower(placed))

    seconds, _ = timed(ours)
    rows = [row(f"PTQ, {len(images)} images, to the bytes of the file", seconds)]
    if not arguments.skip_peers:
        import peers

        converted = peers.float_tflite(model)
        theirs, _ = timed(lambda: peers.litert_quantizer_ptq(converted, images))
        rows[0] |= {"ratio": seconds / theirs, "of": "litert_quantizer", "limit": 1.0}
        rows.append(row("PTQ by litert_quantizer, calibrate and quantize alone", theirs))
    return rows


# --- memory --------------------------------------------------------------------------------------


def memory(arguments):
    """Peak memory of calibration on 20 and on five times as many images, each in its own process."""
    peaks = {}
    for count in (20, 100):
        command = [sys.executable, __file__, "--only=memory", "--dataset", arguments.dataset]
        if arguments.only == "memory" and os.environ.get("LOWBIT_MEMORY_IMAGES"):
            return _calibrate_once(arguments, int(os.environ["LOWBIT_MEMORY_IMAGES"]))
        if arguments.model:
            command += ["--model", arguments.model, "--preprocess", arguments.preprocess]
        environment = os.environ | {"LOWBIT_MEMORY_IMAGES": str(count)}
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, check=True, text=True
        )
        peaks[count] = float(done.stdout.split()[-1])
    return [
        {
            "what": f"calibration, peak memory of {count} images, MiB",
            "seconds": None,
            "ratio": peak / peaks[20],
            "of": f"20 images ({peaks[20]:.0f} MiB)",
            "limit": 1.1 if count == 100 else None,
        }
        for count, peak in peaks.items()
    ]


def _calibrate_once(arguments, count):
    model = placement.place(float_model(arguments), spec.scheme("w8a8"))
    calibration.calibrate(model, calibration_batches(arguments, model, count))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    sys.exit(0)


if __name__ == "__main__":
    main()
