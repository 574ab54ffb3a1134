"""A network on Qualcomm's Hexagon Tensor Processor as Qualcomm's libraries emulate it (no phone).

The int8 graph runs whole on the emulated HTP, on the codes that the host's XNNPACK gets, too: top-1 of
both, and by how much their output codes differ.  The cycles, of the graph in int8 and of the same
network in float16, are what the libraries' performance model says of one chip: simulated, not timed.
"""

import os
import sys
import time

import numpy as np

from eval import coded_images
from lowbit import lowering, manifest, metrics, placement, progress, results, runtimes, tflite_file
from lowbit.devices import hexagon

# Images of one process, which may take 600 s: 10 of ResNet-152 at 224 pixels would take minutes.
_CHUNK = 10


def measure(
    model: str,
    dataset: str,
    *,
    images: int = 100,
    preprocess: str | None = None,
    output_dir: str = "results",
) -> dict:
    """Appends the row of a network to hexagon_emulator.csv, and returns it.

    Args:
      model: a `.tflite` file of int8, or a quantized `.keras` file.
      dataset: images, a name or a path.
      images: how many of them, the first ones.
      preprocess: the images' normalization; None: as saved with the model.
      output_dir: where hexagon_emulator.csv lies.

    Raises:
      hexagon.RefusedError: where the network does not run whole on the HTP; names the operators.
      ValueError: for a package that is missing or another version, or a model that is not of int8.
      OSError: where a file cannot be read or written.
    """
    start = time.monotonic()
    hexagon.check_installed()
    content, facts = _content(model)
    graph = tflite_file.read(content, model)
    codes, labels = coded_images.load(graph, model, dataset, images, preprocess, facts)
    runtimes.try_out(content, model)
    cycles = {form: hexagon.simulated_cycles(graph, form, model) for form in ("qdq", "float16")}
    host = runtimes.interpreter(content)
    wanted = runtimes.invoke_each(host, codes)
    found = []
    with progress.bar("emulating", len(codes)) as update:
        for first in range(0, len(codes), _CHUNK):
            run = hexagon.run(graph, [codes[first : first + _CHUNK]], name=model)
            found.append(run.outputs[0])
            update(min(first + _CHUNK, len(codes)))
    outputs = np.concatenate(found)
    counts = metrics.difference_counts(outputs, wanted)
    vectors = [each.reshape(len(each), -1) for each in (outputs, wanted)]
    correct = [metrics.ranks(each, labels) == 0 for each in vectors]
    difference, error = metrics.paired_difference(*correct)
    row = {
        "tool": "eval.latency",
        "model": model,
        "device": "hexagon-emulator",
        "dataset": dataset,
        "images": len(codes),
        "emulated_top1": float(correct[0].mean()),
        "host_top1": float(correct[1].mean()),
        "top1_difference": difference,
        "top1_paired_error": error,
        "agreement": float((vectors[0].argmax(axis=1) == vectors[1].argmax(axis=1)).mean()),
        "output_codes": outputs.size,
        "same_share": round(float(counts[0] / outputs.size), 6),
        "within_1_share": round(float(counts[:2].sum() / outputs.size), 6),
        "largest_difference": len(counts) - 1,
        "difference_counts": {str(distance): int(count) for distance, count in enumerate(counts)},
        "htp_nodes": run.htp_nodes,
        "htp_partitions": run.htp_partitions,
        "cpu_nodes": 0,  # refused otherwise
        "simulated_chip": f"{hexagon.CHIP} (HTP {hexagon.ARCHITECTURE})",
        **_cycles("int8", cycles["qdq"]),
        **_cycles("float16", cycles["float16"]),
        "simulated_float16_to_int8": round(cycles["float16"].cycles / cycles["qdq"].cycles, 3),
        "size_bytes": len(content),
        "seconds": round(time.monotonic() - start, 3),
        "versions": manifest.versions() | hexagon.VERSIONS,
    }
    shown = ("emulated_top1", "host_top1", "same_share", "within_1_share", "largest_difference")
    shown += ("simulated_int8_cycles", "simulated_float16_cycles", "simulated_float16_to_int8")
    print(results.table([row], list(shown)), file=sys.stderr)
    results.append_row(os.path.join(output_dir, "hexagon_emulator.csv"), row)
    return row


def _cycles(kind, found):
    return {
        f"simulated_{kind}_cycles": found.cycles,
        f"simulated_{kind}_cycles_lower": found.lower_cycles,
        f"simulated_{kind}_cycles_upper": found.upper_cycles,
        f"simulated_{kind}_us": found.simulated_us,
        f"simulated_{kind}_without_cost": found.without_cost,
    }


def _content(model):
    """Returns (the bytes of a `.tflite` file, its facts), of a `.keras` file what it exports to."""
    if runtimes.is_tflite(model):
        content = tflite_file.load_bytes(model)
        return content, tflite_file.read_manifest(content, model)
    keras_model, facts = manifest.load_model(model)
    in_float = placement.float_layers(keras_model)
    if in_float:
        raise ValueError(
            f"{model}: {', '.join(in_float)} compute in float; the graph of an integer network is "
            "needed"
        )
    return tflite_file.write(lowering.lower(keras_model)), facts
