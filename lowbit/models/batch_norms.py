"""Batch norms of a network with random weights, set from images.

A deep network with fresh weights and statistics (mean 0, variance 1) shrinks or blows up its
activations until every integer code is the same, and a comparison of codes says nothing.
"""

import keras
import numpy as np

from lowbit import functional


def randomize(model: keras.Model, random: np.random.Generator) -> None:
    """Gives the batch norms scales in [0.5, 1.5] and offsets of deviation 0.3, as training would."""
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            shape = layer.moving_mean.shape
            if layer.scale:
                layer.gamma.assign(random.uniform(0.5, 1.5, shape))
            if layer.center:
                layer.beta.assign(random.normal(0, 0.3, shape))


def calibrate_batch_norms(model: keras.Model, images: np.ndarray) -> int:
    """Sets every batch norm's moving mean and variance to those of its input on the images.

    One pass, layer by layer: each batch norm sees what the ones before it, set already, let through.

    Args:
      model: float and functional; changed in place.
      images: normalized, float32 (n, h, w, c); all of them are held at each layer.

    Returns:
      The number of batch norms.

    Raises:
      ValueError: where there is no image, or what a batch norm takes is not finite: names the layer.
    """
    if len(images) == 0:
        raise ValueError(f"model {model.name}: no image to set its batch norms from")
    trace = functional.trace(model)
    values = dict(zip(trace.inputs, [keras.ops.convert_to_tensor(images)], strict=True))

    def set_and_run(index, arguments):
        call = trace.calls[index]
        _set_statistics(call, arguments[0])
        return functional.run_call(call, arguments, training=False)

    layers = {
        id(call.layer): set_and_run
        for call in trace.calls
        if isinstance(call.layer, keras.layers.BatchNormalization)
    }
    for _ in functional.run_calls(trace, values, replaced=layers):
        pass
    return len(layers)


def _set_statistics(call, x):
    axis = call.layer.axis % len(x.shape)
    others = [index for index in range(len(x.shape)) if index != axis]
    mean, variance = keras.ops.moments(x, others)
    if not bool(keras.ops.all(keras.ops.isfinite(mean) & keras.ops.isfinite(variance))):
        raise ValueError(f"layer {call.name}: its input on the images is not finite")
    call.layer.moving_mean.assign(mean)
    call.layer.moving_variance.assign(variance)
