"""Calibrator `auto`: of several ranges for a tensor, the one with the smallest error behind it.

    error(range) = sum over the layers that read x of
                   the median over images of |W (Q(x) - x)|^2 / |W x|^2

in the float network, over a few images; W is the layer's convolution with its folded float kernel.
An operation that is not a convolution (add, mean, concatenation) sees Q(x) - x itself, relative to
x.  What a range loses matters by what the next layer makes of it: `mse` weighs all channels alike,
the kernels do not.

The median, because a few images with outliers hold the energy: with the sums over all images, ranges
for 8-bit activations of MobileNet-v2 gave a KL of 0.044 to the float model on 50 other images, with
the mean of the images' quotients 0.024, with their median 0.016 (percentile 0.028, min-max 0.052).

A model output keeps the first range, which is min-max: squared error gains by clipping the largest
logits, and then they tie.
"""

from collections.abc import Iterator

import keras
import numpy as np
from keras import ops

from lowbit import affine, fakequant, layers, quantizers

IMAGES = 16  # of the calibration's, the first
_AT_A_TIME = 2  # every tensor of so many images is held at once: 54 MB for MobileNet-v2 at 224

# They hand on values, changed or chosen one by one, and their reader is what counts.
_HANDS_ON = (
    keras.layers.ZeroPadding2D,
    keras.layers.MaxPooling2D,
    keras.layers.Flatten,
    keras.layers.Reshape,
)


def choose(
    model: keras.Model,
    points: list[tuple[quantizers.ActivationQuantizer, keras.KerasTensor]],
    candidates: dict[quantizers.ActivationQuantizer, dict[str, tuple[float, float]]],
    images: np.ndarray,
) -> dict[quantizers.ActivationQuantizer, str]:
    """Returns the name of the best range for each quantizer; of equal ones the first.

    Args:
      model: from `placement.place`; it stays as it is.
      points: each tensor that is quantized, an output of its quantizer.
      candidates: for each quantizer the ranges (minimum, maximum) by name.
      images: normalized float32 (n, h, w, c).
    """
    readers = [list(_readers(model, tensor)) for _, tensor in points]
    kernels = {
        layer: layer.folded()[0] for found in readers for _, layer in found if layer is not None
    }
    outputs = {quantizers.quantizer_before(output) for output in model.outputs}
    distinct = {}
    for quantizer, by_name in candidates.items():
        kept = dict([next(iter(by_name.items()))]) if quantizer in outputs else by_name
        distinct[quantizer] = _distinct(kept, quantizer.spec)
    # For each point and reader: of each image, the errors of the candidates (images, candidates).
    errors = [[[] for _ in found] for found in readers]
    with layers.in_float(model):
        watcher = keras.Model(model.inputs, [tensor for _, tensor in points])
        for start in range(0, len(images), _AT_A_TIME):
            values = watcher.predict_on_batch(images[start : start + _AT_A_TIME])
            values = values if isinstance(values, list) else [values]
            for index, (quantizer, _) in enumerate(points):
                x = ops.convert_to_tensor(values[index])
                quantized = [
                    fakequant.fake_quantize(x, low, high, quantizer.spec)
                    for low, high in distinct[quantizer].values()
                ]
                for row, (path, layer) in enumerate(readers[index]):
                    y = _along(path, x)
                    linear = _of_layer(layer, kernels)
                    noise = [_energies(linear(_along(path, q) - y)) for q in quantized]
                    energy = np.maximum(_energies(linear(y)), 1e-30)
                    errors[index][row].append(np.stack(noise, axis=1) / energy[:, None])
    totals = {quantizer: 0.0 for quantizer in candidates}
    for (quantizer, _), rows in zip(points, errors, strict=True):
        for row in rows:
            totals[quantizer] += np.median(np.concatenate(row), axis=0)
    return {
        quantizer: list(distinct[quantizer])[int(np.argmin(total))]
        for quantizer, total in totals.items()
    }


def _distinct(by_name, spec):
    """Returns the candidates as float32 scalars, without those that give the codes of another."""
    seen, kept = set(), {}
    for name, bounds in by_name.items():
        low, high = (np.float32(bound) for bound in bounds)
        codes = tuple(float(part) for part in affine.scale_and_zero_point(low, high, spec))
        if codes not in seen:
            seen.add(codes)
            kept[name] = ops.convert_to_tensor(low), ops.convert_to_tensor(high)
    return kept


def _readers(model, tensor, path=()) -> Iterator[tuple[tuple[keras.layers.Layer, ...], object]]:
    """Yields (layers on the way, weighted layer or None) for what reads a tensor, None once."""
    known = {id(layer) for layer in model.layers}
    itself = any(tensor is output for output in model.outputs)
    for node in tensor._keras_history.operation._outbound_nodes:
        # Observers that are gone have left nodes of their own behind.
        if id(node.operation) not in known:
            continue
        if not any(other is tensor for other in node.arguments.keras_tensors):
            continue
        if isinstance(node.operation, layers.WEIGHTED):
            yield path, node.operation
        elif isinstance(node.operation, _HANDS_ON):
            yield from _readers(model, node.outputs[0], (*path, node.operation))
        else:
            itself = True
    if itself:
        yield path, None


def _along(path, x):
    for layer in path:
        x = layer(x)
    return x


def _of_layer(layer, kernels):
    if layer is None:
        return lambda x: x
    return lambda x: layer.linear(x, kernels[layer])


def _energies(x):
    """Returns each image's sum of squares, (n,)."""
    return ops.convert_to_numpy(ops.sum(ops.square(x), axis=tuple(range(1, len(x.shape)))))
