"""Where does it hurt?  A quantized model beside its float model, layer by layer, on images.

    python -m eval.layers --model=ptq.keras --reference=float.keras --dataset=images.zip
    python -m eval.layers --model=ptq.keras --reference=float.keras --dataset=images.zip --sensitivity

Into --output_dir go layers.csv (a row for each tensor that the file computes), layers_channels.csv (a
row for each output channel), layers_sensitivity.csv, layers_summary.csv (a row for each run) and
pictures, layers_*.png.

    weight_sqnr_db        of all weights as stored, against the float model's folded kernel
    channel_sqnr_db       the mean over live output channels of each channel's SQNR: what one large
                          channel does to the others hides in the figure above, and shows in this
    output_sqnr_db        of the tensor in the whole quantized model: errors of earlier layers included
    mean_shift            mean over channels of |E[y_q - y_f]| / std(y_f), before the activation
    *_alone_sqnr_db       --sensitivity: of the tensor where nothing but this layer's weights, or
                          nothing but this range's activations, are quantized
    *_kl, *_agreement     --sensitivity: the same at the network's output, against the float model

Cross-layer equalization scales channels.  Where a tensor's float form in the quantized model differs
from the float model's by factors (diagnosis.gains), column `rescaled` says so and the tensor is
compared after multiplication with them; means that bias absorption moved count as shift.  Column
float_form_kl of the summary is how far the quantized model without its quantizers is from the float
model, on the first batch: what corrections changed in the network itself, before any rounding.
"""

import dataclasses
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import keras
import numpy as np
from keras import ops

from lowbit import (
    affine,
    cli,
    diagnosis,
    fakequant,
    functional,
    layers,
    manifest,
    metrics,
    models,
    placement,
    plots,
    progress,
    quantizers,
    reading,
    results,
    rewrites,
    runtimes,
    spec,
)
from lowbit.data import datasets, pipeline
from lowbit.data import preprocess as preprocessing

WIDTHS = (32, 16, 8, 4)  # bits of an activation, in the memory columns


@dataclasses.dataclass(frozen=True)
class Config:
    """The command's flags."""

    model: str = cli.field(cli.REQUIRED, "A quantized .keras file.")
    reference: str = cli.field(cli.REQUIRED, "The float .keras file that it was made from.")
    dataset: str = cli.field(cli.REQUIRED, "Images: a name or a path.")
    split: str = cli.field("all", "Which of them.", choices=("train", "validation", "all"))
    preprocess: str | None = cli.field(None, "As the model was trained; default: as saved with it.")
    limit: int = cli.field(32, "Images, the first ones.")
    batch_size: int = cli.field(16, "Images at a time; memory grows with it, about 60 MB an image.")
    sensitivity: bool = cli.field(
        False, "Also quantize the weights of each layer alone, and each activation range alone."
    )
    layer: str | None = cli.field(
        None, "Whose kernel is drawn; default: the one with the lowest channel_sqnr_db."
    )
    output_dir: str = cli.field("results", "Where the tables and pictures go.")


def diagnose(config: Config) -> dict:
    """Runs the command; returns its result row."""
    start = time.monotonic()
    if min(config.limit, config.batch_size) < 1:
        raise ValueError(
            f"--limit={config.limit} and --batch_size={config.batch_size} must be at least 1"
        )
    for path in (config.model, config.reference):
        if runtimes.is_tflite(path):
            raise ValueError(f"{path}: layers are compared in Keras; give the .keras file")
    model, facts = manifest.load_model(config.model)
    reference, reference_facts = manifest.load_model(config.reference)
    shape = models.image_input(model, config.model)
    text = preprocessing.first_known(
        config.model,
        config.preprocess,
        facts.get("preprocess"),
        reference_facts.get("preprocess"),
    )
    pair = pair_up(model, reference, config.model, config.reference)
    names = [layer.name for layer in layers.weighted_layers(model)]
    if not names:
        raise ValueError(f"{config.model} has no quantized layer with weights")
    if config.layer is not None and config.layer not in names:
        raise ValueError(f"--layer={config.layer} is not one of {', '.join(names)}")
    dataset = datasets.open_dataset(config.dataset, config.split)
    dataset = datasets.renumbered(dataset, facts.get("class_names"))
    count = min(config.limit, len(dataset))
    os.makedirs(config.output_dir, exist_ok=True)

    def images() -> Iterator[np.ndarray]:
        batches = pipeline.batches(
            dataset,
            input_size=shape[:2],
            channels=shape[2],
            batch_size=config.batch_size,
            preprocess=preprocessing.parse(text),
            indices=np.arange(count),
        )
        return (x for x, _ in batches)

    alone = {}
    with fakequant.without_retracing_warnings():
        gains, float_form_kl = compare_float_forms(pair, next(images()))
        with progress.bar("comparing", count) as update:
            whole = compare_activations(pair, gains, images(), update)
        if config.sensitivity:
            batches = -(-count // config.batch_size)
            with progress.bar("each layer alone", batches * len(switches(pair))) as update:
                alone = quantize_alone(pair, gains, images(), update)
    rows, channel_rows = describe(pair, gains, whole, alone)
    results.write_rows(os.path.join(config.output_dir, "layers.csv"), rows)
    results.write_rows(os.path.join(config.output_dir, "layers_channels.csv"), channel_rows)
    weighted = [row for row in rows if "weight_sqnr_db" in row]
    worst = min(weighted, key=lambda row: row["channel_sqnr_db"], default=None)
    chosen = config.layer or (worst["layer"] if worst else names[0])
    ranked = sensitivity_rows(pair, alone)
    if ranked:
        results.write_rows(os.path.join(config.output_dir, "layers_sensitivity.csv"), ranked)
    _print_tables(rows, ranked)
    draw(pair, reference, rows, ranked, chosen, config.output_dir)

    labels = dataset.labels[:count]
    fits = bool((labels < whole.outputs.shape[1]).all())
    choice = whole.reference_outputs.argmax(axis=1)
    row = {
        "tool": "eval.layers",
        "model": config.model,
        "reference": config.reference,
        "scheme": facts.get("scheme"),
        "dataset": config.dataset,
        "split": config.split,
        "images": count,
        "agreement": float((whole.outputs.argmax(axis=1) == choice).mean()),
        "mean_kl": float(metrics.kl_divergence(whole.reference_outputs, whole.outputs).mean()),
        "float_form_kl": float_form_kl,
        "tied_at_top": metrics.tied_at_top(whole.outputs) / count,
        "ties_decided_against_label": (
            metrics.ties_decided_against(whole.outputs, labels) / count if fits else None
        ),
        "ties_decided_against_reference": metrics.ties_decided_against(whole.outputs, choice)
        / count,
        "lowest_weight_sqnr_layer": worst["layer"] if worst else None,
        "lowest_output_sqnr_tensor": min(rows, key=lambda row: row["output_sqnr_db"])["tensor"],
        "most_sensitive_weights": _first(ranked, "weights"),
        "most_sensitive_activation": _first(ranked, "activation"),
        "peak_activation_elements": max(row["live_elements"] for row in rows),
        "seconds": round(time.monotonic() - start, 3),
        "versions": results.versions(),
    }
    shown = ["agreement", "mean_kl", "float_form_kl", "tied_at_top", "ties_decided_against_label"]
    print(results.table([row], [*shown, "ties_decided_against_reference"]), file=sys.stderr)
    results.append_row(os.path.join(config.output_dir, "layers_summary.csv"), row)
    return row


def _first(ranked, part):
    return next((row["quantized"] for row in ranked if row["part"] == part), None)


# --- two models side by side --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Pair:
    """A quantized model and its float model, placed alike: the same calls and value numbers."""

    model: keras.Model
    reference: keras.Model  # placed; only ever run in float
    ours: functional.Trace
    theirs: functional.Trace


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor as the file computes it: an operation, its activation and its quantizer in one."""

    name: str
    operation: int | None  # the call that computes it; None: it is a model input
    end: int  # the call whose output it is


def pair_up(
    model: keras.Model, reference: keras.Model, model_name: str, reference_name: str
) -> Pair:
    """Places the float model and puts the two side by side.

    Raises:
      ValueError: where `model` is not quantized, or the two are not the same network; names where
        they part.
    """
    if not quantizers.activation_quantizers(model):
        raise ValueError(f"{model_name} is not a model that ptq.quantize or qat.train saved")
    placed = placement.place(reference, spec.scheme("w8a8"), strict=False)
    ours, theirs = functional.trace(model), functional.trace(placed)
    for one, other in itertools.zip_longest(ours.calls, theirs.calls):
        if one is None or other is None or (one.name, one.inputs) != (other.name, other.inputs):
            here, there = (call.name if call else "its end" for call in (one, other))
            raise ValueError(
                f"{model_name} was not made from {reference_name}: where the one has {here} the "
                f"other has {there}"
            )
        if ours.shapes[one.output] != theirs.shapes[other.output]:
            raise ValueError(
                f"{model_name} was not made from {reference_name}: {one.name} gives "
                f"{ours.shapes[one.output][1:]} in the one, {theirs.shapes[other.output][1:]} in "
                "the other"
            )
    return Pair(model, placed, ours, theirs)


def tensors(trace: functional.Trace) -> list[Tensor]:
    """Returns the tensors of a placed model in order; a reshape makes no new one."""
    quantizer_of = {
        call.inputs[0]: index
        for index, call in enumerate(trace.calls)
        if isinstance(call.layer, quantizers.ActivationQuantizer)
    }
    found = []
    for value in trace.inputs:
        end = quantizer_of[value]
        found.append(Tensor(trace.calls[end].keywords["label"], None, end))
    for index, call in enumerate(trace.calls):
        if isinstance(call.layer, quantizers.ActivationQuantizer | _RESHAPES):
            continue
        end = quantizer_of.get(call.output, index)
        label = trace.calls[end].keywords.get("label") or call.name
        found.append(Tensor(label, index, end))
    return found


_RESHAPES = keras.layers.Reshape | keras.layers.Flatten


def compare_float_forms(pair: Pair, x: np.ndarray) -> tuple[dict[int, np.ndarray], float]:
    """Runs the two models in float on one batch: what differs there is not quantization.

    Returns:
      diagnosis.gains of each value that equalization rescaled, by its number;
      the mean KL of the outputs in nats: corrections that change the network itself (ReLU for ReLU6)
      show in it.
    """
    found, kept = {}, ({}, {})
    with layers.in_float(pair.model), layers.in_float(pair.reference):
        for (index, ours), (_, theirs) in _both(pair, x, kept):
            gain = diagnosis.gains(_array(theirs), _array(ours))
            if (gain != 1).any():
                found[pair.ours.calls[index].output] = gain
    ours, theirs = (
        _array(values[trace.outputs[0]]).reshape(len(x), -1)
        for values, trace in zip(kept, (pair.ours, pair.theirs), strict=True)
    )
    return found, float(metrics.kl_divergence(theirs, ours).mean())


def _both(pair, x, kept):
    """Yields what both models compute, call by call; `kept`: two dicts, for the outputs."""
    streams = []
    for trace, values in zip((pair.ours, pair.theirs), kept, strict=True):
        values[trace.inputs[0]] = ops.convert_to_tensor(x)
        streams.append(functional.run_calls(trace, values))
    return zip(*streams, strict=True)


def _array(y) -> np.ndarray:
    return ops.convert_to_numpy(y)


@dataclasses.dataclass(frozen=True)
class Whole:
    """The whole quantized model beside the float model; sums by index of the call."""

    sums: dict[int, diagnosis.ChannelSums]
    outputs: np.ndarray  # float32 (n, classes)
    reference_outputs: np.ndarray


def compare_activations(
    pair: Pair,
    gains: Mapping[int, np.ndarray],
    batches: Iterable[np.ndarray],
    update: Callable[[int], None] = lambda images: None,
) -> Whole:
    """Runs both models over the images, one call after another, and adds up what differs."""
    wanted = {tensor.end for tensor in tensors(pair.ours)} | {
        index
        for index, call in enumerate(pair.ours.calls)
        if isinstance(call.layer, layers.WEIGHTED)
    }
    sums: dict[int, diagnosis.ChannelSums] = {}
    outputs, images = ([], []), 0
    with layers.in_float(pair.reference):
        for x in batches:
            kept = ({}, {})
            for (index, ours), (_, theirs) in _both(pair, x, kept):
                if index in wanted:
                    gain = gains.get(pair.ours.calls[index].output, np.float32(1))
                    _add(sums, index, diagnosis.compare(_array(theirs), _array(ours) * gain))
            for trace, values, parts in zip((pair.ours, pair.theirs), kept, outputs, strict=True):
                parts.append(_array(values[trace.outputs[0]]).reshape(len(x), -1))
            images += len(x)
            update(images)
    return Whole(sums, *(np.concatenate(parts) for parts in outputs))


def _add(sums, key, more):
    sums[key] = sums[key] + more if key in sums else more


# --- each layer alone ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Alone:
    """What happens where one thing alone is quantized."""

    sums: diagnosis.ChannelSums  # of the tensor itself
    kl: float  # mean over the images, nats, of the network's output from the float one
    agreement: float  # share of the images with the same first choice


def switches(pair: Pair) -> list[int]:
    """Returns the calls that can be quantized alone: the first of each layer with weights, and of
    each activation quantizer; those that the scheme leaves in float are left out."""
    seen, found = set(), []
    for index, call in enumerate(pair.ours.calls):
        weights = isinstance(call.layer, layers.WEIGHTED) and call.layer.weight_spec is not None
        values = isinstance(call.layer, quantizers.ActivationQuantizer) and call.layer.spec
        if (weights or values) and call.layer not in seen:
            seen.add(call.layer)
            found.append(index)
    return found


def quantize_alone(
    pair: Pair,
    gains: Mapping[int, np.ndarray],
    batches: Iterable[np.ndarray],
    update: Callable[[int], None] = lambda done: None,
) -> dict[int, Alone]:
    """Returns Alone for each of `switches`, by index of the call.

    The float network runs call by call; at each switch the quantized call takes the float one's
    place, and the rest of the float network runs behind it: half a network each time, and nothing
    is compiled anew.  A layer that is called again is quantized there too.
    """
    points = set(switches(pair))
    sums: dict[int, diagnosis.ChannelSums] = {}
    outputs: dict[int, list] = {index: [] for index in points}
    baseline, done = [], 0
    for x in batches:
        with layers.in_float(pair.reference):
            values = {pair.theirs.inputs[0]: ops.convert_to_tensor(x)}
            before = dict(values)
            for index, y in functional.run_calls(pair.theirs, values):
                if index in points:
                    instead = _quantized_call(pair, gains, index)
                    replaced = {id(pair.theirs.calls[index].layer): instead}
                    rest = dict(before)
                    stream = functional.run_calls(pair.theirs, rest, index, replaced)
                    _, quantized = next(stream)
                    _add(sums, index, diagnosis.compare(_array(y), _array(quantized)))
                    for _ in stream:
                        pass
                    outputs[index].append(_logits(pair, rest, x))
                    done += 1
                    update(done)
                before = dict(values)
            baseline.append(_logits(pair, values, x))
    reference = np.concatenate(baseline)
    choice = reference.argmax(axis=1)
    alone = {}
    for index, parts in outputs.items():
        logits = np.concatenate(parts)
        alone[index] = Alone(
            sums[index],
            float(metrics.kl_divergence(reference, logits).mean()),
            float((logits.argmax(axis=1) == choice).mean()),
        )
    return alone


def _logits(pair, values, x):
    return _array(values[pair.theirs.outputs[0]]).reshape(len(x), -1)


def _quantized_call(pair, gains, index):
    """Returns function(index, arguments): the quantized layer's call on the float model's values."""
    layer = pair.ours.calls[index].layer
    stored = kernel_as_stored(layer) if isinstance(layer, layers.WEIGHTED) else None

    def instead(index, arguments):
        call = pair.ours.calls[index]
        x = arguments[0]
        if call.inputs[0] in gains:
            x = x / gains[call.inputs[0]]
        if stored is not None:
            y = layer.linear(x, stored.quantized) + stored.bias
        else:
            y = layer(x, **call.keywords)
        return y * gains[call.output] if call.output in gains else y

    return instead


# --- weights ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class StoredKernel:
    """A layer's weights, float32 NumPy, in the layer's own shape."""

    kernel: np.ndarray  # folded, before it is quantized
    quantized: np.ndarray  # quantized as the file stores it, and back
    bias: np.ndarray  # (channels,), folded


def kernel_as_stored(layer: keras.layers.Layer) -> StoredKernel:
    """Returns the weights that lowering writes: the bias' grid can make their scale larger."""
    kernel, bias = layer.folded()
    if layer.weight_spec is None:
        return StoredKernel(_array(kernel), _array(kernel), _array(bias))
    before = layer.input_quantizer()
    input_scale = None
    if before is not None and before.spec is not None:
        input_scale = before.scale_and_zero_point()[0]
    quantized = layer.quantize_kernel(kernel, *layer.kernel_scale(kernel, bias, input_scale))
    return StoredKernel(_array(kernel), _array(quantized), _array(bias))


def _in_reference_units(kernel, call, gains):
    """Returns a kernel with what equalization did to it undone: w * gain_out / gain_in."""
    inwards, outwards = (gains.get(value) for value in (call.inputs[0], call.output))
    if inwards is not None:
        kernel = kernel / inwards[:, None]
    if outwards is not None:
        kernel = call.layer.scale_channels(kernel, outwards)
    return np.asarray(kernel)


def kernels_of(model: keras.Model, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns a float model's kernel before and after folding, flat: (taps, output channels).

    Raises:
      ValueError: where no convolution or dense layer has that name; names those there are.
    """
    network = rewrites.fold_batch_norms(rewrites.merge_rescaling(reading.read(model, strict=False)))
    baked = rewrites.bake_batch_norms(network)
    names = []
    for before, after in zip(network.operations, baked.operations, strict=True):
        if "kernel" not in before.weights:
            continue
        names.append(before.name)
        if before.name == name:
            shape = before.weights["kernel"].shape
            channels = shape[-1] * (shape[-2] if before.kind == "depthwise" else 1)
            return tuple(one.weights["kernel"].reshape(-1, channels) for one in (before, after))
    raise ValueError(f"{model.name} has no layer {name!r} with weights; it has {', '.join(names)}")


def sqnr_histogram(model: keras.Model, name: str, bits: int = 8) -> dict[str, np.ndarray]:
    """Returns the SQNR in dB of each kernel of a layer, float64 (channels,), by granularity.

    Whitepaper Figures 18 and 19: one range for the layer's folded weights (asymmetric) against one
    for each output channel (symmetric), and the former before batch norm is folded in.
    """
    before, after = kernels_of(model, name)
    per_layer = spec.QuantSpec(bits)
    per_channel = spec.QuantSpec(bits, symmetric=True, narrow_range=True, axis=1)
    cases = {
        "asymmetric per layer": (after, per_layer),
        "symmetric per channel": (after, per_channel),
        "asymmetric per layer, batch norm not folded": (before, per_layer),
    }
    return {
        title: diagnosis.kernel_sqnr_db(
            kernel,
            affine.fake_quantize(kernel, *affine.observed_range(kernel, quant.axis), quant),
        )
        for title, (kernel, quant) in cases.items()
    }


# --- rows ---------------------------------------------------------------------------------------


def describe(
    pair: Pair, gains: Mapping[int, np.ndarray], whole: Whole, alone: Mapping[int, Alone]
) -> tuple[list[dict], list[dict]]:
    """Returns the rows of layers.csv, a tensor each, and of layers_channels.csv, a channel each."""
    rows, channel_rows = [], []
    live = live_elements(pair.ours)
    of_layer = {id(pair.ours.calls[index].layer): values for index, values in alone.items()}
    for tensor in tensors(pair.ours):
        end = pair.ours.calls[tensor.end]
        call = None if tensor.operation is None else pair.ours.calls[tensor.operation]
        sums = whole.sums[tensor.end]
        output_sqnr = sums.sqnr_db()
        row = {
            "tensor": tensor.name,
            "layer": call.name if call else tensor.name,
            "kind": type(call.layer).__name__.removeprefix("Quantized") if call else "Input",
            "channels": len(output_sqnr),
            "rescaled": end.output in gains,
            "output_sqnr_db": sums.total_sqnr_db(),
            "lowest_output_channel_sqnr_db": float(output_sqnr.min()),
        }
        columns = {"output_sqnr_db": output_sqnr}
        if call and isinstance(call.layer, layers.WEIGHTED):
            more, columns = _describe_weights(pair, gains, whole, tensor)
            row |= more
            columns["output_sqnr_db"] = output_sqnr
        for name, values in (
            ("weights", of_layer.get(id(call.layer)) if call else None),
            ("activation", of_layer.get(id(end.layer)) if end is not call else None),
        ):
            if values is not None:
                row |= {
                    f"{name}_alone_sqnr_db": values.sums.total_sqnr_db(),
                    f"{name}_kl": values.kl,
                    f"{name}_agreement": values.agreement,
                }
        elements = _elements(pair.ours, end.output)
        row |= {"elements": elements, "live_elements": live[tensor.end]}
        for bits in WIDTHS:
            row[f"bytes_{bits}_bit"] = diagnosis.packed_bytes(elements, bits)
        for bits in WIDTHS:
            row[f"live_bytes_{bits}_bit"] = diagnosis.packed_bytes(live[tensor.end], bits)
        rows.append(row)
        for channel in range(len(output_sqnr)):
            cells = {name: float(values[channel]) for name, values in columns.items()}
            channel_rows.append({"layer": row["layer"], "channel": channel} | cells)
    return rows, channel_rows


def _describe_weights(pair, gains, whole, tensor):
    """Returns the columns of a layer's row, and those of its channels' rows, of weights and bias."""
    call, twin = (trace.calls[tensor.operation] for trace in (pair.ours, pair.theirs))
    channels = call.layer.output_channels()
    stored, reference = kernel_as_stored(call.layer), _array(twin.layer.folded()[0])
    kernel, quantized = (x.reshape(-1, channels) for x in (stored.kernel, stored.quantized))
    aligned = _in_reference_units(stored.quantized, call, gains).reshape(-1, channels)
    reference = reference.reshape(-1, channels)
    sqnr = diagnosis.kernel_sqnr_db(reference, aligned)
    # Where the activation clips everything (MobileNet-v2 has such channels, 25 deviations off) no
    # shift before it matters.
    varies = np.isfinite(whole.sums[tensor.end].mean_shift())
    shift = np.where(varies, whole.sums[tensor.operation].mean_shift(), np.nan)
    uneven = diagnosis.outliers(kernel, quantized)
    alive = np.where(diagnosis.is_dead(kernel), np.inf, sqnr)
    quant = call.layer.weight_spec
    row = {"mean_shift": float(np.nanmean(np.abs(shift))) if np.isfinite(shift).any() else 0.0}
    if quant is not None:
        row |= {
            "weight_bits": quant.bits,
            "weight_sqnr_db": affine.sqnr_db(reference, aligned),
            "channel_sqnr_db": diagnosis.mean_of_finite(alive),
            "lowest_channel_sqnr_db": float(alive.min()),
            "lowest_channel": int(alive.argmin()),
        }
    row |= dataclasses.asdict(uneven)
    low, high = affine.observed_range(kernel, 1)
    columns = {
        "weight_sqnr_db": sqnr,
        "mean_shift": shift,
        "weight_minimum": low,
        "weight_maximum": high,
    }
    return row, columns


def _elements(trace, value):
    return int(np.prod(trace.shapes[value][1:]))


def live_elements(trace: functional.Trace) -> dict[int, int]:
    """Returns the activations held while each tensor is computed, for one image, by Tensor.end.

    Weights, and what kernels need for themselves, are not counted.
    """
    buffer = {}  # of each value: activations, quantizers and reshapes work in place
    for call in trace.calls:
        if isinstance(call.layer, quantizers.ActivationQuantizer | _RESHAPES):
            buffer[call.output] = buffer.get(call.inputs[0], call.inputs[0])
    steps, ends, sizes = [], [], {value: _elements(trace, value) for value in trace.inputs}
    for tensor in tensors(trace):
        if tensor.operation is None:
            steps.append(((), trace.calls[tensor.end].inputs[0]))
        else:
            call = trace.calls[tensor.operation]
            steps.append((tuple(buffer.get(v, v) for v in call.inputs), call.output))
            sizes[call.output] = _elements(trace, call.output)
        ends.append(tensor.end)
    outputs = [buffer.get(value, value) for value in trace.outputs]
    return dict(zip(ends, diagnosis.live_elements(steps, sizes, outputs), strict=True))


# --- tables and pictures ------------------------------------------------------------------------


def _print_tables(rows, ranked):
    def show(title, rows, columns):
        if rows:
            print(f"\n{title}", file=sys.stderr)
            print(results.table([_rounded(row) for row in rows], columns), file=sys.stderr)

    weighted = [row for row in rows if "range_ratio" in row]
    show(
        "SQNR in dB, and mean shift in standard deviations",
        rows,
        [
            "layer",
            "weight_sqnr_db",
            "channel_sqnr_db",
            "lowest_channel_sqnr_db",
            "output_sqnr_db",
            "mean_shift",
        ],
    )
    show(
        "outliers after folding: the 10 layers with the most uneven channels",
        sorted(weighted, key=lambda row: -row["range_ratio"])[:10],
        ["layer", "channels", "range_ratio", "dead_channels", "lost_channels", "kurtosis"],
    )
    show(
        "one thing alone quantized: the 20 that move the output most",
        ranked[:20],
        ["quantized", "part", "kl", "agreement", "sqnr_db"],
    )
    print(file=sys.stderr)


def _rounded(row):
    """Returns the row with decibels and ratios of 1 decimal, small numbers of 3 digits."""
    shown = {}
    for name, value in row.items():
        if isinstance(value, float):
            value = f"{value:.1f}" if name.endswith("_db") else f"{value:.3g}"
        shown[name] = value
    return shown


def sensitivity_rows(pair: Pair, alone: Mapping[int, Alone]) -> list[dict]:
    """Returns what was quantized alone, the largest KL first: a layer's weights, or a range."""
    rows = []
    for index, values in alone.items():
        layer = pair.ours.calls[index].layer
        rows.append(
            {
                "quantized": layer.name.removesuffix("_quantizer"),
                "part": "weights" if isinstance(layer, layers.WEIGHTED) else "activation",
                "kl": values.kl,
                "agreement": values.agreement,
                "sqnr_db": values.sums.total_sqnr_db(),
            }
        )
    return sorted(rows, key=lambda row: -row["kl"])


def draw(
    pair: Pair,
    reference: keras.Model,
    rows: list[dict],
    ranked: list[dict],
    layer: str,
    folder: str,
) -> None:
    """Draws the pictures of a run into a folder: layers_*.png."""

    def path(name):
        return os.path.join(folder, f"layers_{name}.png")

    plots.layer_errors(rows, path("sqnr"))
    plots.activation_memory(rows, WIDTHS, path("memory"))
    if ranked:
        plots.sensitivity(ranked[:30], path("sensitivity"))
    largest = {}
    for one in layers.weighted_layers(pair.model):
        flat = _array(one.folded()[0]).reshape(-1, one.output_channels())
        largest[one.name] = np.abs(flat).max(axis=0)
        if one.name == layer:
            chosen, bits = flat, one.weight_spec.bits if one.weight_spec else 8
    plots.channel_ranges(largest, layer, chosen, path("ranges"))
    plots.sqnr_histograms(
        sqnr_histogram(reference, layer, bits), f"{layer}, {bits} bits", path("histogram")
    )
    plots.weight_histograms(*kernels_of(reference, layer), layer, path("folding"))


# Whitepaper Figures 18-20: Keras' name of the layer, and the paper's.
FIGURES = {
    18: ("conv_dw_1", "Conv2d_1_depthwise"),
    19: ("conv_pw_9", "Conv2d_9_pointwise"),
    20: ("conv_dw_2", "Conv2d_2_depthwise"),
}


def draw_figure(number: int, model: keras.Model, path: str | os.PathLike) -> None:
    """Draws the whitepaper's Figure 18, 19 or 20 of a float MobileNet-v1.

    Args:
      number: 18, 19: SQNR of each kernel of a depthwise and of a pointwise layer, MobileNet-v1 0.25
        in the paper; 20: weights before and after folding, MobileNet-v1 1.0.
      model: float, with Keras' layer names.
      path: of the PNG.
    """
    if number not in FIGURES:
        raise ValueError(f"figure {number} is not one of {', '.join(map(str, FIGURES))}")
    name, published_name = FIGURES[number]
    title = f"{model.name} {name} (whitepaper Figure {number}: {published_name})"
    if number == 20:
        plots.weight_histograms(*kernels_of(model, name), title, path)
    else:
        plots.sqnr_histograms(sqnr_histogram(model, name), title, path)


def main() -> None:
    """Runs the command line."""
    cli.run(diagnose, Config)


if __name__ == "__main__":
    main()
