"""What low bit widths do to training: weights that jump between two codes, and statistics they spoil.

Oscillation (Nagel et al. 2203.11086, section 2).  Under the straight-through gradient a weight near a
tie is pushed over it and back, step after step.  A weight oscillates at step t where its code changes
in the direction opposite to its last change; its frequency is a moving average,

    f <- m * o + (1 - m) * f               o = 1 where it oscillates at this step, else 0

Freezing (section 4.3): where f passes a threshold the weight's code is set to its average over time,
rounded, and stays.  Dampening (section 4.2) is a penalty that draws weights to their codes; it is
computed where the weights are quantized (`layers`).

Batch norm's moving averages were taken while weights jumped, so after training they are taken anew
(section 3.2): a plain average over batches of training images.
"""

from collections.abc import Iterable

import keras
import numpy as np
from keras import ops

from lowbit import affine, layers

MOMENTUM = 0.01  # m above: the average looks 100 steps back
THRESHOLD = 0.02  # of f; the paper's schedules end between 0.01 and 0.04


class Oscillations:
    """Follows the codes of a model's weights from step to step, and freezes those that oscillate.

    Args:
      model: in its training form.
      threshold: of f, from which a weight is frozen; None only follows.
    """

    def __init__(self, model: keras.Model, threshold: float | None = None):
        self.threshold = threshold
        self.layers = [
            layer for layer in layers.weighted_layers(model) if layer.weight_spec is not None
        ]
        self.states = [_State(_codes(layer)[0]) for layer in self.layers]

    def variables(self) -> list:
        """Returns what a checkpoint must hold for a resumed run to go on alike."""
        return [_Field(state, name) for state in self.states for name in vars(state)]

    def update(self) -> None:
        """Looks at the weights after a step; sets the frozen ones back to their codes."""
        for layer, state in zip(self.layers, self.states, strict=True):
            codes, scale, zero_point = _codes(layer)
            if self.threshold is not None and state.frozen.any():
                codes = np.where(state.frozen, state.held, codes)
            frozen = state.follow(codes, self.threshold)
            if frozen.any():
                values = np.float32((state.held - zero_point) * scale)
                kernel = ops.convert_to_numpy(layer.kernel)
                unfolded = _unfold(layer, values).reshape(kernel.shape)
                layer.kernel.assign(np.where(frozen.reshape(kernel.shape), unfolded, kernel))

    def shares(self) -> dict[str, float]:
        """Returns the share of each layer's weights that oscillate (f above 0.005) or are frozen."""
        return {
            layer.name: float(((state.frequency > 0.005) | state.frozen).mean())
            for layer, state in zip(self.layers, self.states, strict=True)
        }


class _State:
    """Of one layer's weights, arrays of its flat kernel's shape (K, channels)."""

    def __init__(self, codes):
        self.codes = codes
        self.direction = np.zeros(codes.shape, np.int8)  # of the last change; 0: none yet
        self.frequency = np.zeros(codes.shape, np.float32)
        self.average = codes.astype(np.float32)
        self.frozen = np.zeros(codes.shape, bool)
        self.held = codes.copy()

    def follow(self, codes, threshold):
        """Takes the codes of a step; returns which weights are frozen."""
        change = np.sign(codes - self.codes).astype(np.int8)
        oscillates = change * self.direction == -1
        self.frequency += MOMENTUM * (oscillates - self.frequency)
        self.average += MOMENTUM * (codes - self.average)
        self.direction = np.where(change != 0, change, self.direction)
        self.codes = codes
        if threshold is not None:
            new = (self.frequency > threshold) & ~self.frozen
            self.held = np.where(new, np.rint(self.average), self.held).astype(self.held.dtype)
            self.frozen |= new
        return self.frozen


class _Field:
    """One array of a state, with what `checkpoint` asks of a variable."""

    def __init__(self, state, name):
        self.state, self.name = state, name

    @property
    def shape(self):
        return getattr(self.state, self.name).shape

    def assign(self, array):
        setattr(self.state, self.name, array)

    def __array__(self, dtype=None, copy=None):
        return np.array(getattr(self.state, self.name), dtype)


def _codes(layer):
    """Returns a layer's codes, int32 (K, channels), with scale and zero point."""
    kernel = ops.convert_to_numpy(layer.folded()[0])
    scale, zero_point = layer.numpy_scale(kernel)
    lowest, highest = affine.integer_bounds(layer.weight_spec)
    flat = kernel.reshape(-1, layer.output_channels())
    codes = np.clip(np.rint(flat / scale) + zero_point, lowest, highest)
    return codes.astype(np.int32), scale, zero_point


def _unfold(layer, values):
    """Returns the kernel whose folded form is `values`, (K, channels)."""
    if layer.batch_norm is None:
        return values
    ones = np.ones(layer.kernel.shape, np.float32)
    factor = layer.fold_factor()
    scaled = ops.convert_to_numpy(layer.scale_channels(ops.convert_to_tensor(ones), factor))
    scaled = scaled.reshape(values.shape)
    return np.where(scaled == 0, 0, values / np.where(scaled == 0, 1, scaled)).astype(np.float32)


def reestimate_batch_norms(model: keras.Model, batches: Iterable[np.ndarray]) -> int:
    """Sets the moving averages of folded batch norms to plain averages over batches of images.

    Args:
      model: in its training form; only moving means and variances change.
      batches: normalized float32 images.

    Returns:
      The number of batches; 0 where the model has no batch norm of its own any more.
    """
    found = [layer for layer in layers.weighted_layers(model) if layer.batch_norm is not None]
    if not found:
        return 0
    before = [(dict(layer.batch_norm), layer.batch_norm_frozen) for layer in found]
    count = 0
    try:
        for batch in batches:
            for layer in found:
                layer.batch_norm = layer.batch_norm | {"momentum": count / (count + 1)}
                layer.batch_norm_frozen = False
            model(batch, training=True)
            count += 1
    finally:
        for layer, (batch_norm, frozen) in zip(found, before, strict=True):
            layer.batch_norm, layer.batch_norm_frozen = batch_norm, frozen
    return count
