"""Quantizers in training: which gradient goes through rounding, and which ranges it moves.

A model in training differs from the one that is saved in its layers' settings alone, so it is built
anew from its configuration: `prepare` before training, `plain` after it.
"""

import dataclasses

import keras
import numpy as np
from keras import ops

from lowbit import affine, binary, layers, quantizers


@dataclasses.dataclass(frozen=True)
class Method:
    """What --quantizer says."""

    weights: str  # one of layers.WEIGHT_METHODS
    activations: str  # one of quantizers.METHODS
    learns_weight_ranges: bool
    range_mode: str  # of the activations, where --range_mode does not say
    learns_alpha: bool = True  # DSQ's, else 0.2 throughout


METHODS = {
    "ste": Method("ste", "ste", False, "moving"),
    "pact": Method("ste", "ste", False, "trainable"),
    "lsq": Method("lsq", "lsq", True, "trainable"),
    "dsq": Method("dsq", "dsq", True, "trainable"),
    # Two of the rows of DSQ's Table 4: without learnt limits, and with alpha as it starts.
    "dsq_alpha": Method("dsq", "dsq", False, "moving"),
    "dsq_fixed": Method("dsq", "dsq", False, "moving", learns_alpha=False),
    "stochastic": Method("stochastic", "stochastic", False, "moving"),
    "binary": Method("binary", "ste", False, "moving"),
    "ternary": Method("ternary", "ste", False, "moving"),
    "gains": Method("gains", "lsq", False, "trainable"),
}


def prepare(model: keras.Model, name: str, range_mode: str | None = None) -> keras.Model:
    """Returns the model in its training form, with the same weights and ranges.

    Args:
      model: as ptq.quantize saves it.
      name: a key of METHODS.
      range_mode: of the activations, one of quantizers.RANGE_MODES; None: the method's own.

    Raises:
      ValueError: for binary or ternary weights that are not 2 bits wide, one scale a channel.
    """
    method = METHODS[name]

    def change(layer):
        if isinstance(layer, quantizers.ActivationQuantizer):
            mode = range_mode or method.range_mode
            fixed = layer.mode == "fixed" or layer.spec is None
            return {"method": method.activations, "mode": layer.mode if fixed else mode}
        if not isinstance(layer, layers.WEIGHTED) or layer.weight_spec is None:
            return {}
        changes = {"weight_method": method.weights}
        if method.weights == "gains" and layer.weight_range == "minmax":
            changes["weight_range"] = "stored"
        if method.weights in binary.METHODS:
            if layer.weight_spec.bits > 2:  # overridden: a first or last layer at 8 bits, say
                return {}
            if not layer.weight_spec.symmetric or layer.weight_spec.axis is None:
                raise ValueError(
                    f"--quantizer={name}: layer {layer.name} has {layer.weight_spec}; needed are "
                    "symmetric 2-bit weights, one scale a channel (w2a8 and the like)"
                )
            changes["weight_range"] = "minmax"
        elif method.learns_weight_ranges:
            changes["weight_range"] = "trainable"
        return changes

    trained = layers.rebuilt(model, change)
    for before, after in zip(*map(layers.weighted_layers, (model, trained)), strict=True):
        if after.weight_range == "trainable" and before.weight_range == "minmax":
            _first_range(after)
        elif after.weight_range == "stored" and before.weight_range == "minmax":
            after.store_observed_range()
    for _, _, alpha in _alphas(trained):
        alpha.trainable = method.learns_alpha
    return trained


def alphas(model: keras.Model) -> list[dict]:
    """Returns what DSQ's alpha is in each layer; [] without DSQ.

    Rows of layer, part ("weights" or "activations"), alpha, and of activations read_by: the layers with
    weights that read the tensor, which is how DSQ's Table 2 names it.
    """
    readers: dict[str, list[str]] = {}
    for layer in layers.weighted_layers(model):
        quantizer = layer.input_quantizer()
        if quantizer is not None:
            readers.setdefault(quantizer.name, []).append(layer.name)
    return [
        {
            "layer": layer,
            "part": part,
            "alpha": float(ops.convert_to_numpy(alpha)),
            "read_by": " ".join(readers.get(f"{layer}_quantizer", [])) if part != "weights" else "",
        }
        for layer, part, alpha in _alphas(model)
    ]


def _alphas(model):
    for layer in layers.weighted_layers(model):
        if layer.weight_method == "dsq":
            yield layer.name, "weights", layer.kernel_alpha
    for quantizer in quantizers.activation_quantizers(model):
        if quantizer.method == "dsq":
            yield quantizer.name.removesuffix("_quantizer"), "activations", quantizer.alpha


def _first_range(layer):
    """Sets the range that learning starts from: LSQ's 2 * mean |w| * sqrt(Q), at most the weights'.

    With 8 bits the formula gives more than the largest weight, with 2 bits that is far too much.
    """
    layer.store_observed_range()
    low, high = (
        ops.convert_to_numpy(bound) for bound in (layer.kernel_minimum, layer.kernel_maximum)
    )
    kernel = layer.kernel if len(low) > 1 else layer.folded()[0]
    sizes = np.abs(ops.convert_to_numpy(kernel)).reshape(-1, layer.output_channels())
    mean = sizes.mean(axis=0) if len(low) > 1 else sizes.mean(keepdims=True).reshape(1)
    lowest, highest = affine.integer_bounds(layer.weight_spec)
    usual = 2 * mean * np.sqrt((highest - lowest) / 2)
    if layer.weight_spec.symmetric:
        high = np.minimum(np.maximum(-low, high), usual)
        low = -high
    else:
        low, high = np.maximum(low, -usual), np.minimum(high, usual)
    layer.store_range(np.float32(low), np.float32(high))


def plain(model: keras.Model) -> keras.Model:
    """Returns a trained model as it is saved: frozen ranges, nothing that only training needs."""

    def change(layer):
        if isinstance(layer, quantizers.ActivationQuantizer):
            fixed = layer.mode == "fixed"
            return {"method": "ste", "mode": "fixed" if fixed else "frozen", "enabled": True}
        if not isinstance(layer, layers.WEIGHTED):
            return {}
        stored = layer.weight_range != "minmax" or layer.weight_method in binary.METHODS
        weight_range = "stored" if stored else "minmax"
        return {"weight_method": "ste", "weight_range": weight_range, "batch_norm_frozen": True}

    saved = layers.rebuilt(model, change)
    for quantizer in quantizers.activation_quantizers(saved):
        # Beyond zero a learnt bound counts as zero: quantizers hold it always.
        quantizer.minimum.assign(ops.minimum(quantizer.minimum, 0.0))
        quantizer.maximum.assign(ops.maximum(quantizer.maximum, 0.0))
    for before, after in zip(*map(layers.weighted_layers, (model, saved)), strict=True):
        if before.weight_method in binary.METHODS:
            kernel = ops.reshape(before.kernel, (-1, before.output_channels()))
            values, scale = binary.METHODS[before.weight_method](kernel, True)
            after.kernel.assign(ops.reshape(values, before.kernel.shape))
            after.store_range(-ops.convert_to_numpy(scale), ops.convert_to_numpy(scale))
        elif before.weight_method == "gains":
            gain = ops.convert_to_numpy(before.gains())
            after.kernel.assign(before.scale_channels(before.kernel, gain))
            bounds = (before.kernel_minimum, before.kernel_maximum)
            after.store_range(*(ops.convert_to_numpy(x) * gain[: x.shape[0]] for x in bounds))
        elif before.weight_range == "trainable" and before.weight_spec.symmetric:
            high = np.maximum(ops.convert_to_numpy(before.kernel_maximum), 0)
            after.store_range(-high, high)
    return saved
