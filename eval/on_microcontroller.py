"""A `.tflite` file on microcontrollers: in TensorFlow Lite Micro, and compiled for Arm's Ethos-U.

| device       | what is measured                                                                   |
|--------------|------------------------------------------------------------------------------------|
| tflite-micro | run on this machine by its interpreter and reference kernels: the arena's bytes, and |
|              | output codes that differ from the simulator's flavour `micro` and from BUILTIN_REF |
| ethos-u      | estimated by Arm's compiler Vela: cycles, time at the NPU's clock, memory, and the |
|              | operators that are left to the CPU, whose time is not in the estimate              |

Nothing here is the latency of a device.
"""

import os
import sys
import time

import numpy as np

from eval import coded_images
from lowbit import integer_graph, kernels, manifest, metrics, micro, results, runtimes, tflite_file
from lowbit.devices import ethos_u

DEVICES = ("tflite-micro", "ethos-u")


def measure(
    model: str,
    device: str,
    *,
    accelerator: str = "ethos-u55-128",
    dataset: str | None = None,
    images: int = 10,
    preprocess: str | None = None,
    output_dir: str = "results",
) -> dict:
    """Appends the rows of a file to microcontroller.csv; returns the last one.

    Args:
      model: a `.tflite` file; for tflite-micro one of int8 activations.
      device: one of `DEVICES`.
      accelerator: for ethos-u: names of `ethos_u.ACCELERATORS`, with commas, a row for each.
      dataset: for tflite-micro: images, a name or a path; None: random codes.
      images: for tflite-micro: how many of them.
      preprocess: for tflite-micro: the images' normalization; None: as saved with the file.
      output_dir: where microcontroller.csv lies.

    Raises:
      ValueError: for a file that the device refuses, a package that is missing, or bad arguments.
      OSError: where a file cannot be read or written.
    """
    if device not in DEVICES:
        raise ValueError(f"device {device!r} is not one of {', '.join(DEVICES)}")
    content = tflite_file.load_bytes(model)
    common = {"tool": "eval.latency", "model": model, "device": device, "size_bytes": len(content)}
    if device == "tflite-micro":
        rows = [common | _micro_row(content, model, dataset, images, preprocess)]
    else:
        rows = [
            common | _ethos_u_row(content, model, each)
            for each in accelerator.replace(" ", "").split(",")
        ]
    columns = [name for name in _SHOWN if name in rows[0]]
    print(results.table(rows, columns), file=sys.stderr)
    for row in rows:
        results.append_row(os.path.join(output_dir, "microcontroller.csv"), row)
    return rows[-1]


_SHOWN = (
    "device",
    "accelerator",
    "estimated_ms",
    "estimated_cycles",
    "sram_bytes",
    "npu_operators",
    "cpu_operators",
    "arena_bytes",
    "output_codes",
    "micro_simulator_differing",
    "micro_reference_differing",
)


def _ethos_u_row(content, model, accelerator):
    start = time.monotonic()
    found = ethos_u.estimate(content, accelerator, model)
    return {
        "accelerator": accelerator,
        "system_config": found.system_config,
        "memory_mode": found.memory_mode,
        "clock_hz": found.clock_hz,
        "estimated_cycles": found.cycles,
        "estimated_ms": round(found.estimated_ms, 4),
        "macs": found.macs,
        "sram_bytes": found.sram_bytes,
        "dram_bytes": found.dram_bytes,
        "flash_bytes": found.flash_bytes,
        "npu_operators": found.npu_operators,
        "cpu_operators": len(found.cpu_operators),
        "cpu_operator_names": "; ".join(found.cpu_operators),
        "seconds": round(time.monotonic() - start, 3),
        "versions": manifest.versions() | {"ethos-u-vela": ethos_u.VERSION},
    }


def _micro_row(content, model, dataset, images, preprocess):
    start = time.monotonic()
    micro.check_installed()
    graph = tflite_file.read(content, model)
    top1 = {}
    if dataset is None:
        coded_images.check(graph, model)
        codes = _random_codes(graph, images)
        labels = None
    else:
        facts = tflite_file.read_manifest(content, model)
        codes, labels = coded_images.load(graph, model, dataset, images, preprocess, facts)
    runtimes.try_out(content, model, "reference")
    reference = runtimes.interpreter(content, "reference")
    builtin = runtimes.invoke_each(reference, codes)
    done = micro.run(content, [codes], model)
    (found,) = done.outputs
    simulated = kernels.run(graph, {graph.inputs[0]: codes}, "micro")[graph.outputs[0]]
    ours = metrics.difference_counts(found, simulated)
    theirs = metrics.difference_counts(found, builtin)
    if labels is not None:
        for name, outputs in (("top1", found), ("reference_top1", builtin)):
            ranks = metrics.ranks(outputs.reshape(len(outputs), -1), labels)
            top1[name] = float((ranks == 0).mean())
    return {
        "dataset": dataset or "random codes",
        "images": len(codes),
        "arena_bytes": done.arena_bytes,
        "output_codes": found.size,
        "micro_simulator_differing": int(ours[1:].sum()),
        "micro_simulator_worst_lsb": len(ours) - 1,
        "micro_reference_differing": int(theirs[1:].sum()),
        "micro_reference_worst_lsb": len(theirs) - 1,
        **top1,
        "seconds": round(time.monotonic() - start, 3),
        "versions": manifest.versions() | {"tflite-micro": micro.version()},
    }


def _random_codes(graph: integer_graph.IntegerGraph, images: int) -> np.ndarray:
    if images < 1:
        raise ValueError(f"{images} images; at least 1 is needed")
    tensor = graph.tensors[graph.inputs[0]]
    limits = np.iinfo(tensor.dtype)
    random = np.random.default_rng(0)
    return random.integers(limits.min, limits.max + 1, (images, *tensor.shape[1:]), tensor.dtype)
