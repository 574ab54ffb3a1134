"""Calibration: runs the float network on images, streaming, and sets each quantizer's range."""

import contextlib
from collections.abc import Callable, Iterable, Sequence

import keras
import numpy as np
from keras import ops

from lowbit import layers, quantizers, ranges

# An input range symmetric about zero puts zero half way between two of 256 codes, and with
# x / 127.5 - 1 every pixel is then within a hair of a tie: which code it gets is an accident of
# rounding.  254 steps instead of 255 put zero on a code and every pixel clear of the ties.
SYMMETRIC_INPUT_STRETCH = 255 / 254


def calibrate(
    model: keras.Model,
    batches: Iterable[np.ndarray],
    estimator=ranges.ESTIMATORS["minmax"],
    progress: Callable[[int], None] = lambda images: None,
) -> int:
    """Sets the ranges of the model's quantizers from what its float form computes on the images.

    Args:
      model: from `placement.place`; changed in place.
      batches: of normalized float32 images (n, h, w, c); each is dropped before the next is read.
      estimator: one of ranges.ESTIMATORS.
      progress: called with the number of images done after each batch.

    Returns:
      The number of images.

    Raises:
      ValueError: where there is no image, or an activation is not finite: names the quantizer.
    """
    observed, images = observe(model, batches, estimator, progress)
    for quantizer, bounds in observed.items():
        quantizer.minimum.assign(bounds[:, 0])
        quantizer.maximum.assign(bounds[:, 1])
    _stretch_symmetric_inputs(model)
    widen_for_kernels(model)
    return images


def observe(
    model: keras.Model,
    batches: Iterable[np.ndarray],
    estimator=ranges.ESTIMATORS["minmax"],
    progress: Callable[[int], None] = lambda images: None,
) -> tuple[dict[quantizers.ActivationQuantizer, np.ndarray], int]:
    """Returns each quantizer's observed ranges, float32 (slots, 2), and the number of images.

    Arguments and errors as `calibrate`; the model stays as it is.
    """
    points = observed_points(model)
    if not points:
        raise ValueError(f"model {model.name} has no activation quantizer to calibrate")
    needs_values = isinstance(estimator, ranges.Percentile)
    states = [estimator.init() for _ in points]
    with layers.in_float(model):
        outputs = [tensor for _, _, tensor in points]
        # A new model: what it traces is the float network, and goes with it.
        observer = keras.Model(
            model.inputs, outputs if needs_values else _Extremes(name="extremes")(outputs)
        )
        images = 0
        for batch in batches:
            values = observer.predict_on_batch(batch)
            values = values if needs_values else np.moveaxis(values, 1, 0)
            values = values if isinstance(values, list | np.ndarray) else [values]
            for index, (quantizer, _, _) in enumerate(points):
                with _named(quantizer):
                    states[index] = estimator.update(states[index], values[index])
            images += len(batch)
            progress(images)
    observed = {quantizer: np.zeros((quantizer.slots, 2), np.float32) for quantizer, _, _ in points}
    for (quantizer, slot, _), state in zip(points, states, strict=True):
        with _named(quantizer):
            observed[quantizer][slot] = estimator.result(state)
    return observed, images


@contextlib.contextmanager
def _named(quantizer):
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{quantizer.name}: {error}") from error


class _Extremes(keras.layers.Layer):
    """(n, points, 2): each image's smallest and largest value, all that two estimators need."""

    def call(self, tensors):
        flat = [ops.reshape(tensor, (-1, int(np.prod(tensor.shape[1:])))) for tensor in tensors]
        pairs = [ops.stack([ops.min(x, axis=1), ops.max(x, axis=1)], axis=1) for x in flat]
        return ops.stack(pairs, axis=1)


def observed_points(
    model: keras.Model,
) -> Sequence[tuple[quantizers.ActivationQuantizer, int, keras.KerasTensor]]:
    """Returns (quantizer, slot, its output) for each call that observes values."""
    points = []
    for quantizer in quantizers.activation_quantizers(model):
        if quantizer.mode == "fixed" or quantizer.spec is None:
            continue
        for node in quantizer._inbound_nodes:
            slot = node.arguments.kwargs.get("slot", 0)
            if slot is not None:
                points.append((quantizer, slot, node.outputs[0]))
    return points


def _stretch_symmetric_inputs(model):
    for quantizer in input_quantizers(model):
        low, high = (float(ops.convert_to_numpy(bound)) for bound in quantizer.range())
        if abs(low + high) < 1e-3 * (high - low) / 255:
            quantizer.minimum.assign(quantizer.minimum * SYMMETRIC_INPUT_STRETCH)
            quantizer.maximum.assign(quantizer.maximum * SYMMETRIC_INPUT_STRETCH)


def input_quantizers(model: keras.Model) -> list[quantizers.ActivationQuantizer]:
    """Returns the quantizers that read a model input."""
    inputs = {id(tensor) for tensor in model.inputs}
    return [
        quantizer
        for quantizer in quantizers.activation_quantizers(model)
        if any(
            id(tensor) in inputs
            for node in quantizer._inbound_nodes
            for tensor in node.arguments.keras_tensors
        )
    ]


def widen_for_kernels(model: keras.Model) -> list[str]:
    """Widens output ranges whose multiplier s_in * s_w / s_out would be 256 or more.

    XNNPACK refuses such a model whole.  One step of the accumulator is then more than the whole
    output range: nothing but saturated codes is lost.

    Returns:
      The names of the quantizers that were widened.
    """
    widened = []
    for layer in layers.weighted_layers(model):
        spec = layer.weight_spec
        if spec is None:
            continue
        weight_scale = layer.numpy_scale(ops.convert_to_numpy(layer.folded()[0]))[0].max()
        for node in layer._inbound_nodes:
            before = quantizers.quantizer_before(node.arguments.keras_tensors[0])
            after = quantizers.quantizer_after(node.outputs[0])
            if before is None or after is None or None in (before.spec, after.spec):
                continue
            accumulator_scale = before.scale_and_zero_point()[0] * weight_scale
            smallest = float(accumulator_scale) / 255.0
            output_scale = float(after.scale_and_zero_point()[0])
            if output_scale < smallest:
                after.minimum.assign(after.minimum * (smallest / output_scale))
                after.maximum.assign(after.maximum * (smallest / output_scale))
                widened.append(after.name)
    return widened
