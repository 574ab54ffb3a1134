"""Calibration: runs the float network on images, streaming, and sets each quantizer's range."""

import collections
import contextlib
from collections.abc import Callable, Iterable, Sequence

import keras
import numpy as np
from absl import logging
from keras import ops

from lowbit import auto_ranges, histogram, layers, quantizers, ranges

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
      estimator: from ranges.estimator.
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
    states = [estimator.init() for _ in points]
    images, first_images = 0, []
    with layers.in_float(model):
        # A new model: what it traces is the float network, and goes with it.
        observer = keras.Model(
            model.inputs,
            _Summaries(estimator.needs_histogram)([tensor for _, _, tensor in points]),
        )
        for batch in batches:
            summaries = observer.predict_on_batch(batch)
            for index, (quantizer, _, _) in enumerate(points):
                with _named(quantizer):
                    states[index] = estimator.update(states[index], _summary(summaries, index))
            if images < auto_ranges.IMAGES and isinstance(estimator, ranges.Auto):
                first_images.append(batch[: auto_ranges.IMAGES - images])
            images += len(batch)
            progress(images)
    found = []
    for (quantizer, _, _), state in zip(points, states, strict=True):
        with _named(quantizer):
            found.append(estimator.result(state, quantizer.spec))
    if isinstance(estimator, ranges.Auto):
        found = _chosen(model, points, found, np.concatenate(first_images))
    observed = {quantizer: np.zeros((quantizer.slots, 2), np.float32) for quantizer, _, _ in points}
    for (quantizer, slot, _), bounds in zip(points, found, strict=True):
        observed[quantizer][slot] = bounds
    return observed, images


def _chosen(model, points, found, images):
    """Returns each point's range by the estimator that `auto_ranges` picks for its quantizer."""
    candidates = {}
    for (quantizer, _, _), by_name in zip(points, found, strict=True):
        union = candidates.setdefault(quantizer, dict(by_name))
        for name, (low, high) in by_name.items():
            union[name] = min(low, union[name][0]), max(high, union[name][1])
    tensors = [(quantizer, tensor) for quantizer, _, tensor in points]
    picks = auto_ranges.choose(model, tensors, candidates, images)
    counts = collections.Counter(picks.values())
    logging.info("auto: %s", ", ".join(f"{n} by {name}" for name, n in counts.most_common()))
    return [
        by_name[picks[quantizer]] for (quantizer, _, _), by_name in zip(points, found, strict=True)
    ]


@contextlib.contextmanager
def _named(quantizer):
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{quantizer.name}: {error}") from error


class _Summaries(keras.layers.Layer):
    """What `ranges.Summary` holds, of every tensor, counted where the values are.

    Counted here, 10 images of MobileNet-v2 take 0.65 s (0.2 s without counts); copied out and
    counted by NumPy they took 1.75 s and 0.5 GB more.

    Returns extremes float32 (n, tensors, 2), and int32 counts (tensors, BINS) and zeros (tensors,).
    """

    def __init__(self, histograms, **kwargs):
        super().__init__(**kwargs)
        self.histograms = histograms

    def call(self, tensors):
        flat = [ops.reshape(tensor, (-1, int(np.prod(tensor.shape[1:])))) for tensor in tensors]
        extremes = [_extremes(x) for x in flat]
        found = {"extremes": ops.stack(extremes, axis=1)}
        if self.histograms:
            counted = [_counts(x, pair) for x, pair in zip(flat, extremes, strict=True)]
            found["counts"], found["zeros"] = (
                ops.stack(parts) for parts in zip(*counted, strict=True)
            )
        return found


def _extremes(x):
    """Returns each image's smallest and largest value, (n, 2)."""
    return ops.stack([ops.min(x, axis=1), ops.max(x, axis=1)], axis=1)


def _counts(x, extremes):
    """Returns what `histogram.of` would count: int32 (BINS,), and how many of them are zero."""
    half = histogram.BINS // 2
    # The exponent of the largest |x|, and 2**(log2(half) - exponent), made on the floats' bits.
    bits = ops.view(ops.max(ops.abs(extremes)), "int32")
    exponent = ops.maximum(ops.right_shift(bits, 23) - 126, histogram.SMALLEST_EXPONENT)
    bins_per_unit = ops.view(ops.left_shift(127 + int(np.log2(half)) - exponent, 23), "float32")
    x = ops.reshape(x, (-1,))
    index = ops.cast(ops.floor(x * bins_per_unit), "int32") + half
    # NaN's is negative, which the bins' sum refuses; the extremes tell of it.  Above the bins it
    # leaves out.
    counts = _sum_in_bins(ops.maximum(index, 0))
    return counts, ops.sum(ops.cast(ops.equal(x, 0.0), "int32"))


if keras.config.backend() == "tensorflow":
    import tensorflow as tf

    def _sum_in_bins(index):
        return tf.math.bincount(index, minlength=histogram.BINS, maxlength=histogram.BINS)

    # Traced once and called: inlined, their 25 operations for each of 65 tensors took 2.5 s more.
    _matrix = tf.TensorSpec((None, None), "float32")
    _as_one = {"autograph": False, "experimental_attributes": {"_noinline": True}}
    _extremes = tf.function(_extremes, [_matrix], **_as_one)
    _counts = tf.function(_counts, [_matrix, _matrix], **_as_one)
else:

    def _sum_in_bins(index):  # half as fast in TensorFlow, but JAX compiles no bincount
        return ops.segment_sum(ops.ones_like(index), index, num_segments=histogram.BINS)


def _summary(summaries, index):
    extremes = np.asarray(summaries["extremes"])[:, index]
    if "counts" not in summaries:
        return ranges.Summary(extremes, None)
    counted = histogram.from_counts(
        summaries["counts"][index], summaries["zeros"][index], extremes.min(), extremes.max()
    )
    return ranges.Summary(extremes, counted)


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
