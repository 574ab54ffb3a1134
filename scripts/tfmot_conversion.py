"""Models of tfmot, read and exported by us, beside the file that tfmot's own conversion makes.

    python scripts/tfmot_conversion.py [--networks=mobile,tiny] [--images=200] [--folder=runs/tfmot]

Each network of scripts/tfmot_training.py is trained in a process of its own (extra `[tfmot]`; an
environment beside this one is named by --python), read by both settings of ptq.import_tfmot and
exported; then codes of weights, biases and outputs are compared in the LiteRT interpreter.  A row
for each goes to results/tfmot.csv.
"""

import argparse
import pathlib
import re
import subprocess
import sys

import numpy as np
import tfmot_training

from lowbit import affine, integer_graph, lint, lowering, results, runtimes, tflite_file
from lowbit.models import tfmot_file
from ptq import import_tfmot

WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")


def main():
    """Trains where that is not done yet, compares, prints, appends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", default="mobile,tiny")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--folder", default="runs/tfmot")
    parser.add_argument("--python", default=sys.executable, help="that of the extra [tfmot]")
    parser.add_argument("--output", default="results/tfmot.csv")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.networks.split(","):
        path = pathlib.Path(arguments.folder) / name
        if not path.with_suffix(".tflite").is_file():
            command = [arguments.python, tfmot_training.__file__, f"--network={name}"]
            subprocess.run([*command, f"--output={path}"], check=True)
        theirs = path.with_suffix(".tflite").read_bytes()
        for weight_ranges in import_tfmot.WEIGHT_RANGES:
            ours = exported(path.with_suffix(".h5"), weight_ranges)
            row = {"network": name, "weight_ranges": weight_ranges}
            row |= compare_constants(ours, theirs)
            row |= compare_outputs(ours, theirs, tfmot_training.NETWORKS[name][1], arguments.images)
            row |= {"versions": str(results.versions())}
            results.append_row(arguments.output, row)
            rows.append(row)
    for column in rows[0]:
        print(f"{column}: {'; '.join(str(row[column]) for row in rows)}")


def exported(path, weight_ranges: str) -> bytes:
    """Returns the `.tflite` of a tfmot model."""
    model, _ = import_tfmot.build(tfmot_file.read(path), weight_ranges)
    return tflite_file.write(lowering.lower(model), {"scheme": import_tfmot.SCHEME})


def compare_constants(ours: bytes, theirs: bytes) -> dict:
    """Returns how many codes of weights differ, by how much those of biases, and each file's faults."""
    graphs = tflite_file.read(ours), tflite_file.read(theirs)
    layers, others = (weighted(graph) for graph in graphs)
    differing, largest = {}, 0
    for name, (kernel, bias) in layers.items():
        other_kernel, other_bias = others[name]
        differing[name] = int((kernel.data != other_kernel.data).sum())
        difference = bias.data.astype(np.int64) - other_bias.data
        largest = max(largest, int(np.abs(difference).max()))
    sizes = {name: len(content) for name, content in (("ours", ours), ("tfmot", theirs))}
    return {
        "layers": len(layers),
        "weights": sum(kernel.data.size for kernel, _ in layers.values()),
        "weight_codes_differ": sum(differing.values()),
        "differ_by_layer": " ".join(f"{name}:{count}" for name, count in differing.items()),
        "bias_codes_differ_by": largest,
        **{f"bytes_{name}": size for name, size in sizes.items()},
        "quantize_ours": count(graphs[0], "QUANTIZE"),
        "quantize_tfmot": count(graphs[1], "QUANTIZE"),
        "faults_ours": len(lint.faults(ours)),
        "faults_tfmot": len(lint.faults(theirs)),
        "float_tensors_ours": floats(graphs[0]),
        "float_tensors_tfmot": floats(graphs[1]),
    }


def weighted(graph: integer_graph.IntegerGraph) -> dict:
    """Returns (kernel, bias) of each layer with weights, by the layer's name.

    The converter names a kernel after what made it: `tiny/quant_stem/Conv2D;...`.
    """
    found = {}
    for node in graph.nodes:
        if node.op in WEIGHTED:
            _, kernel, bias = (graph.tensors[name] for name in node.inputs)
            theirs = re.search("quant_([^/;]+)/", kernel.name)
            name = kernel.name.removesuffix("/kernel") if theirs is None else theirs[1]
            found[name] = kernel, bias
    return found


def count(graph, op) -> int:
    return sum(node.op == op for node in graph.nodes)


def floats(graph) -> int:
    return sum(tensor.dtype in lint.FLOATS for tensor in graph.tensors.values())


def compare_outputs(ours: bytes, theirs: bytes, size: int, images: int) -> dict:
    """Returns how many output codes differ on test images, and top-1 of both files."""
    x, labels = (
        array[tfmot_training.TRAINING_IMAGES :][:images] for array in tfmot_training.digits(size)
    )
    codes = [output_codes(content, x) for content in (ours, theirs)]
    difference = np.abs(codes[0].astype(int) - codes[1])
    top1 = [float((code.argmax(axis=1) == labels).mean()) for code in codes]
    return {
        "images": len(x),
        "output_codes": difference.size,
        "output_codes_differ": int((difference > 0).sum()),
        "output_codes_differ_by": int(difference.max()),
        "top1_ours": top1[0],
        "top1_tfmot": top1[1],
        "images_with_another_class": int((codes[0].argmax(1) != codes[1].argmax(1)).sum()),
    }


def output_codes(content: bytes, images: np.ndarray) -> np.ndarray:
    """Returns the output codes of an int8 file, (n, classes)."""
    runner = runtimes.interpreter(content)
    scale, zero_point = runner.get_input_details()[0]["quantization"]
    codes = affine.quantize_input(images, scale, zero_point, "int8")
    return runtimes.invoke_each(runner, codes)


if __name__ == "__main__":
    main()
