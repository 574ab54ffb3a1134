"""The whitepaper's ten networks, their relatives and those of keras.applications, at full size.

    LOWBIT_DATA=folder python scripts/ten_networks.py [--only=resnet_v1_50] [--images=10]

Each is placed, calibrated, exported, checked, and compared with two interpreters.  Appends one row a
network to results/networks.csv.  Weights are those of LOWBIT_DATA/models where a
file fits, else random ones whose batch norms were set from the images; images are those of
LOWBIT_DATA/images, else noise.  Each network has a process of its own, so that its memory returns.
"""

import argparse
import os
import pathlib
import platform
import resource
import subprocess
import sys
import time

import keras
import numpy as np

from eval import parity
from lowbit import (
    calibration,
    layers,
    lint,
    lowering,
    manifest,
    models,
    placement,
    results,
    runtimes,
    spec,
    tflite_file,
)
from lowbit.data import datasets, pipeline
from lowbit.data import preprocess as preprocessing
from lowbit.models import batch_norms

# name of the row: (zoo name, alpha, input size, weights in LOWBIT_DATA/models); the ten first.
# keras.applications' own are named as there, with their preprocess instead of alpha.
NETWORKS = {
    "mobilenet_v1_1.0_224": ("mobilenet_v1", 1.0, 224, "mobilenet_v1_1.0_224.keras"),
    "mobilenet_v1_0.25_128": ("mobilenet_v1", 0.25, 128, "mobilenet_v1_0.25_224.keras"),
    "mobilenet_v2_1.0_224": ("mobilenet_v2", 1.0, 224, None),
    "mobilenet_v2_1.4_224": ("mobilenet_v2", 1.4, 224, None),
    "nasnet_mobile": ("nasnet_mobile", None, 224, None),
    "inception_v3": ("inception_v3", None, 299, None),
    "resnet_v1_50": ("resnet_v1_50", None, 224, None),
    "resnet_v1_152": ("resnet_v1_152", None, 224, None),
    "resnet_v2_50": ("resnet_v2_50", None, 224, None),
    "resnet_v2_152": ("resnet_v2_152", None, 224, None),
    "resnet_v1_18": ("resnet_v1_18", None, 224, None),
    "resnet_v1_34": ("resnet_v1_34", None, 224, None),
    "efficientnet_lite0": ("efficientnet_lite0", None, 224, "efficientnet_lite0_224.keras"),
    "efficientnet_lite1": ("efficientnet_lite1", None, 240, None),
    "efficientnet_lite2": ("efficientnet_lite2", None, 260, None),
    "efficientnet_lite3": ("efficientnet_lite3", None, 280, None),
    "efficientnet_lite4": ("efficientnet_lite4", None, 300, None),
    "MobileNetV3Small": ("MobileNetV3Small", "raw", 224, None),
    "MobileNetV3Large": ("MobileNetV3Large", "raw", 224, None),
    "EfficientNetB0": ("EfficientNetB0", "raw", 224, None),
    "EfficientNetV2B0": ("EfficientNetV2B0", "raw", 224, None),
    "DenseNet121": ("DenseNet121", "torch", 224, None),
    "Xception": ("Xception", "tf", 299, None),
    "NASNetMobile": ("NASNetMobile", "tf", 224, None),
    "InceptionV3": ("InceptionV3", "tf", 299, None),
    "ResNet50V2": ("ResNet50V2", "tf", 224, None),
    "ConvNeXtTiny": ("ConvNeXtTiny", "raw", 224, None),
}
APPLICATIONS = {
    name: preprocess
    for name, (_, preprocess, _, _) in NETWORKS.items()
    if callable(getattr(keras.applications, name, None))  # `inception_v3` there is a module
}
DISTINCT = 16  # codes at least in what is compared, so that "all equal" is not "all saturated"


def main():
    """Runs one network, or all, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help=f"one of {', '.join(NETWORKS)}")
    parser.add_argument("--images", type=int, default=10, help="compared in integer codes")
    parser.add_argument("--output_dir", default="results")
    arguments = parser.parse_args()
    if arguments.only is None:
        for name in NETWORKS:
            command = [sys.executable, __file__, f"--only={name}", f"--images={arguments.images}"]
            subprocess.run([*command, f"--output_dir={arguments.output_dir}"], check=True)
        return
    row = measure(arguments.only, arguments.images)
    results.append_row(pathlib.Path(arguments.output_dir) / "networks.csv", row)
    print(results.table([row], [key for key in row if key not in ("versions", "machine")]))


def measure(name: str, count: int) -> dict:
    """Returns the row of one network: faults, and codes that differ on `count` images."""
    start = time.monotonic()
    zoo_name, alpha, size, _ = NETWORKS[name]
    images, source = some_images(zoo_name, count, size)
    model, weights = network(name, images)
    parameters = model.count_params()
    exporting = time.monotonic()
    placed = placement.place(model, spec.scheme("w8a8"))
    calibration.calibrate(placed, np.array_split(images, max(1, count // 5)))
    graph = lowering.lower(placed)
    batch_norms_left = sum(
        isinstance(layer, keras.layers.BatchNormalization) for layer in placed.layers
    )
    weighted = len(layers.weighted_layers(placed))
    del model, placed
    keras.backend.clear_session()
    content = tflite_file.write(graph)
    export_seconds = round(time.monotonic() - exporting, 1)
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    codes = runtimes.input_codes(images, "int8", *_input(graph))
    row = {
        "model": name,
        "weights": weights,
        "parameters": parameters,
        "size_bytes": len(content),
        "operations": len(graph.nodes),
        "weighted": weighted,
        "batch_norms_left": batch_norms_left,
        "faults": len(lint.faults(content, io="int8")),
        "images": count,
        "source": source,
    }
    rows = {flavour: parity.compare_nodes(graph, codes, flavour) for flavour in runtimes.KERNELS}
    for flavour, nodes in rows.items():
        row[f"{flavour}_differing"] = sum(node["differing"] for node in nodes)
        runner = runtimes.interpreter(content, flavour)
        outputs = runtimes.invoke_each(runner, codes)
        row[f"{flavour}_output_distinct"] = len(np.unique(outputs))
    nodes = rows["xnnpack"]
    row |= {
        "codes": sum(node["codes"] for node in nodes),
        "least_distinct": min(node["distinct"] for node in nodes),
        "below_16_distinct": sum(node["distinct"] < DISTINCT for node in nodes),
        "outside_xnnpack": sum(node["kernel"] != "xnnpack" for node in nodes),
        "differing_nodes": _named(rows),
        "export_seconds": export_seconds,  # placed, calibrated, lowered and written
        "peak_mib": peak_mib,  # until then, the float network's batch norms included
        "seconds": round(time.monotonic() - start, 1),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": manifest.versions(),
    }
    return row


def _named(rows):
    """Returns the nodes that differ, with their operation and kernel, as text."""
    return "; ".join(
        f"{flavour} {node['name']} ({node['op']}, {node['kernel']}): {node['differing']} of "
        f"{node['codes']}, at most {node['worst_lsb']}"
        for flavour, nodes in rows.items()
        for node in nodes
        if node["differing"]
    )


def _input(graph):
    tensor = graph.tensors[graph.inputs[0]]
    return tensor.scale, tensor.zero_point


def some_images(zoo_name: str, count: int, size: int) -> tuple[np.ndarray, str]:
    """Returns float32 (count, size, size, 3), as the network takes them, and whose they are."""
    name = models.ZOO[zoo_name].preprocess if zoo_name in models.ZOO else APPLICATIONS[zoo_name]
    preprocess = preprocessing.parse(name)
    path = pathlib.Path(os.environ.get("LOWBIT_DATA", "")) / "images" / "nips17_dev_500.zip"
    if not path.is_file():
        noise = np.random.default_rng(0).integers(0, 256, (count, size, size, 3)).astype(np.uint8)
        return np.stack([preprocessing.apply(image, preprocess) for image in noise]), "noise"
    dataset = datasets.open_dataset(path)
    batches = pipeline.batches(
        dataset,
        input_size=(size, size),
        batch_size=count,
        preprocess=preprocess,
        indices=np.arange(count),
    )
    return next(iter(batches))[0], path.name


def network(name: str, images: np.ndarray) -> tuple[keras.Model, str]:
    """Returns the float network, and what its weights are."""
    zoo_name, alpha, size, file = NETWORKS[name]
    options = {"input_size": size, "alpha": alpha}
    path = pathlib.Path(os.environ.get("LOWBIT_DATA", "")) / "models" / (file or "none")
    if path.is_file():
        return models.load(zoo_name, str(path), **options)[0], path.name
    keras.utils.set_random_seed(0)
    if zoo_name in APPLICATIONS:
        # Without softmax: of 1,000 classes that random weights find equal, BUILTIN_REF's aborts.
        options = {"input_shape": (size, size, 3), "classifier_activation": None}
        model = getattr(keras.applications, zoo_name)(weights=None, **options)
    else:
        model = models.build(zoo_name, 1000, **options)
    batch_norms.randomize(model, np.random.default_rng(0))
    batch_norms.calibrate_batch_norms(model, images)
    return model, "random"


if __name__ == "__main__":
    main()
