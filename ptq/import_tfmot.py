"""Takes a model that tfmot trained, with the ranges it trained, into our form: saves `.keras`.

python -m ptq.import_tfmot --model=qat.h5 --preprocess=tf --output=quantized.keras

The file is what tf_keras' `model.save` wrote of a model of `tfmot.quantization.keras`; neither is
needed here.  Nothing is calibrated or trained: a tensor that tfmot gave no range is refused by name.

A range is taken from the file for each tensor that a quantizer of ours follows, its zero where
TensorFlow's fake-quant puts it.  Tensors on one scale (pooling, concatenation) take the range behind
the concatenation that reads them, which is where tfmot quantizes them; the others their own.
"""

import dataclasses
import sys
import time
from collections.abc import Mapping

import keras
import numpy as np

from lowbit import (
    calibration,
    cli,
    functional,
    layers,
    lowering,
    manifest,
    models,
    placement,
    quantizers,
    results,
    spec,
)
from lowbit.data import preprocess as preprocessing
from lowbit.models import tfmot_file
from ptq import quantize

SCHEME = "w8a8"
WEIGHT_RANGES = ("kernel", "file")


@dataclasses.dataclass(frozen=True)
class Config:
    """The command's flags."""

    model: str = cli.field(
        cli.REQUIRED, "An .h5 or .keras file that tf_keras saved of a model trained by tfmot."
    )
    output: str = cli.field("quantized.keras", "Where the quantized model goes.")
    preprocess: str | None = cli.field(
        None,
        "tf, torch, caffe, raw, or mean,std; the file does not say it, later tools ask for it.",
    )
    weight_ranges: str = cli.field(
        "kernel",
        "kernel: each output channel's own, also in depthwise and dense layers; file: tfmot's, one "
        "for a whole depthwise or dense kernel: the codes of its training and of its converter.",
        choices=WEIGHT_RANGES,
    )


def import_model(config: Config) -> dict:
    """Runs the command; returns its result row."""
    start = time.monotonic()
    manifest.check_output(config.output, ".keras")
    if config.preprocess is not None:
        preprocessing.parse(config.preprocess)
    trained = tfmot_file.read(config.model)
    models.image_input(trained.network, config.model)
    try:
        quantized, unused = build(trained, config.weight_ranges)
    except ValueError as error:
        raise ValueError(f"{config.model}: {error}") from error
    for name in unused:
        text = "it is fused, or on another tensor's scale"
        print(f"the range of {name} is not needed: {text}", file=sys.stderr)
    widened = calibration.widen_for_kernels(quantized)
    for name in widened:
        print(f"{name} is wider than in the file: its multiplier was 256 or more", file=sys.stderr)
    rows = quantize.describe(quantized)
    print(results.table(rows, list(rows[0])), file=sys.stderr)
    facts = {
        "preprocess": config.preprocess,
        "scheme": SCHEME,
        **dict.fromkeys(spec.BITS_FLAGS),
        "calibration": "ranges that tfmot trained",
        "weight_ranges": config.weight_ranges,
        "corrections": [],
        "versions": manifest.versions(),
    }
    manifest.save_model(quantized, config.output, facts)
    return {
        "tool": "ptq.import_tfmot",
        "model": config.model,
        "scheme": SCHEME,
        "weight_ranges": config.weight_ranges,
        "layers": len(trained.network.layers),
        "ranges": len(trained.ranges) + len(trained.ranges_before),
        "unused_ranges": unused,
        "widened": widened,
        "output": config.output,
        "seconds": round(time.monotonic() - start, 3),
        "versions": manifest.versions(),
    }


def build(
    trained: tfmot_file.TfmotModel, weight_ranges: str = "kernel"
) -> tuple[keras.Model, list[str]]:
    """Returns the quantized model, and the layers whose range in the file it does not need.

    Args:
      trained: from tfmot_file.read; with "file" its weights move onto tfmot's grid.
      weight_ranges: one of WEIGHT_RANGES.

    Raises:
      UnsupportedModelError: names the layer that has no integer form.
      ValueError: names the tensors that tfmot gave no range.
    """
    if weight_ranges == "file":
        _move_onto_grid(trained)
    how = "stored" if weight_ranges == "file" else "minmax"
    quantized = placement.place(trained.network, spec.scheme(SCHEME), weight_range=how)
    if weight_ranges == "file":
        _store_kernel_ranges(quantized, trained.kernel_ranges)
    named = _by_label(trained, quantized)
    chosen, missing = _chosen(functional.trace(quantized), named)
    if missing:
        raise ValueError(
            f"tfmot quantized all but {', '.join(missing)}: the file has no range for them and none "
            "follows from the others'; let tfmot quantize these layers too, or give the float model "
            "to ptq.quantize"
        )
    used = set()
    for quantizer, labels in chosen.items():
        bounds = [named[label] for label in labels]
        low, high = tfmot_file.nudged(
            min(low for low, _ in bounds), max(high for _, high in bounds)
        )
        quantizer.minimum.assign(np.full(quantizer.slots, low, np.float32))
        quantizer.maximum.assign(np.full(quantizer.slots, high, np.float32))
        used.update(labels)
    return quantized, sorted(set(named) - used)


def _by_label(trained, quantized) -> dict[str, tfmot_file.Range]:
    """Returns the file's ranges by the labels of the quantizers' calls."""
    named = dict(trained.ranges)
    named |= {f"{name}_logits": bounds for name, bounds in trained.ranges_before.items()}
    if trained.input_range is not None:
        named["input"] = trained.input_range
    # A batch norm that was folded is gone: what it made bears the name of the layer before it.
    kept = {layer.name for layer in quantized.layers}
    names = {}
    for call in functional.trace(trained.network).calls:
        folded = isinstance(call.layer, keras.layers.BatchNormalization) and call.name not in kept
        if folded and call.name in named:
            named.setdefault(names[call.inputs[0]], named.pop(call.name))
        names[call.output] = call.name
    return named


def _move_onto_grid(trained):
    for name, (low, high) in trained.kernel_ranges.items():
        layer = trained.network.get_layer(name)
        kernel = keras.ops.convert_to_numpy(layer.kernel)
        layer.kernel.assign(tfmot_file.on_grid(kernel, low, high))


def _store_kernel_ranges(quantized, kernel_ranges):
    for layer in layers.weighted_layers(quantized):
        if layer.name in kernel_ranges:
            # Depthwise kernels have a range for each multiplier: the same for all input channels.
            repeats = layer.output_channels() // len(kernel_ranges[layer.name][0])
            layer.store_range(*(np.tile(end, repeats) for end in kernel_ranges[layer.name]))


def _chosen(
    trace: functional.Trace, named: Mapping[str, tfmot_file.Range]
) -> tuple[dict[quantizers.ActivationQuantizer, set[str]], list[str]]:
    """Returns the tensors whose ranges each quantizer takes, and those that have none.

    Args:
      named: the ranges by tensor, as the quantizers' calls label them.
    """
    joined: dict[int, set[str]] = {}  # what reads a value with others, and has a range
    behind: dict[int, set[str]] = {}  # the same, with operations without a range between
    for call in reversed(trace.calls):
        if _computes(call):
            continue
        joins = len(call.inputs) > 1 and call.name in named
        for value in call.inputs:
            if joins:
                joined.setdefault(value, set()).add(call.name)
            elif call.name not in named:
                further = joined.get(call.output, set()) | behind.get(call.output, set())
                behind.setdefault(value, set()).update(further)
    chosen: dict[quantizers.ActivationQuantizer, set[str]] = {}
    missing = []
    for call in trace.calls:
        quantizer, label = call.layer, call.keywords.get("label")
        if not _observes(call) or quantizer.mode == "fixed":
            continue
        own = {label} if label in named else set()
        labels = joined.get(call.output) or own or behind.get(call.output)
        if not labels:
            missing.append(label)
            continue
        chosen.setdefault(quantizer, set()).update(labels)
    return chosen, missing


def _observes(call) -> bool:
    is_quantizer = isinstance(call.layer, quantizers.ActivationQuantizer)
    return is_quantizer and call.keywords.get("slot", 0) is not None


def _computes(call) -> bool:
    return _observes(call) or isinstance(call.layer, lowering.COMPUTES)


def main() -> None:
    """Runs the command line."""
    cli.run(import_model, Config)


if __name__ == "__main__":
    main()
