"""The activation quantizer: a Keras layer that holds one range, and the functions in `fakequant`.

Tensors that a TFLite kernel wants on one scale (concatenation, pooling) share one quantizer: the
same layer is called once for each of them.  Each call that observes values has a slot of its own,
and the range is the union of the slots.
"""

import dataclasses

import keras
import numpy as np
from keras import ops

from lowbit import affine, dsq, fakequant, lsq, pact, stochastic
from lowbit import spec as spec_lib

# fixed: given by the kernel (softmax).  frozen: as calibrated.  moving: average of the batches'
# smallest and largest value.  trainable: moved by the gradient.
RANGE_MODES = ("fixed", "frozen", "moving", "trainable")

# How the gradient passes rounding in training; every one computes the values of `fakequant`, but for
# "stochastic", which adds noise.  "ste" with a trainable range is PACT.
METHODS = {
    "ste": fakequant.fake_quantize,
    "lsq": lsq.fake_quantize,
    "dsq": dsq.fake_quantize,
    "stochastic": stochastic.fake_quantize,
}


def spec_config(spec: spec_lib.QuantSpec | None) -> dict | None:
    """Returns a spec as a dict that `.keras` files can hold."""
    return None if spec is None else dataclasses.asdict(spec)


def spec_from_config(config: dict | spec_lib.QuantSpec | None) -> spec_lib.QuantSpec | None:
    """Returns the spec of `spec_config`'s dict."""
    return spec_lib.QuantSpec(**config) if isinstance(config, dict) else config


@keras.saving.register_keras_serializable("lowbit")
class ActivationQuantizer(keras.layers.Layer):
    """y = fake_quantize(activation(x)) with one range for the whole tensor.

    Forward and gradient: `fakequant`.  In mode "moving" a training call also updates its slot,

        r <- decay * r + (1 - decay) * (smallest or largest value of activation(x) in the batch)

    Args:
      spec: what the codes are; None leaves the activation in float.
      slots: number of calls that observe values.
      mode: one of RANGE_MODES.
      decay: of the moving average, a batch.
      initial_range: (minimum, maximum) before calibration; the range itself in mode "fixed".
      method: one of METHODS, for training; inference is the same with all.
      range_penalty: coefficient of PACT's penalty in training, on a trainable range's squared bounds.
      enabled: False passes float values through (calibration; the delay before activations are
        quantized in training).

    `minimum` and `maximum` are float32 (slots,); with method "dsq" there is `alpha`, a scalar.
    """

    def __init__(
        self,
        spec=None,
        slots=1,
        mode="frozen",
        decay=0.99,
        initial_range=(0.0, 0.0),
        method="ste",
        range_penalty=0.0,
        enabled=True,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if mode not in RANGE_MODES:
            raise ValueError(f"{self.name}: range mode {mode!r} is not one of {RANGE_MODES}")
        self.spec = spec_from_config(spec)
        self.slots = slots
        self.mode = mode
        self.decay = decay
        if method not in METHODS:
            raise ValueError(f"{self.name}: method {method!r} is not one of {tuple(METHODS)}")
        self.initial_range = tuple(initial_range)
        self.method = method
        self.range_penalty = range_penalty
        self.enabled = enabled
        # XLA on CPU makes depthwise convolutions 12 times slower (MobileNet-v2, 96 pixels): Keras'
        # jit_compile="auto" must not turn it on for the whole step.
        self.supports_jit = keras.config.backend() != "tensorflow"

    def build(self, input_shape=None):
        low, high = (keras.initializers.Constant(bound) for bound in self.initial_range)
        self.minimum = self.add_weight(name="minimum", shape=(self.slots,), initializer=low)
        self.maximum = self.add_weight(name="maximum", shape=(self.slots,), initializer=high)
        if self.method == "dsq":
            self.alpha = self.add_weight(name="alpha", shape=(), initializer=initial_alpha())
        if self.method == "stochastic":
            self.seeds = keras.random.SeedGenerator()
        self.set_mode(self.mode)
        self.built = True

    def set_mode(self, mode: str) -> None:
        """Changes how the range moves; a fixed range stays fixed."""
        if mode not in RANGE_MODES:
            raise ValueError(f"{self.name}: range mode {mode!r} is not one of {RANGE_MODES}")
        self.mode = mode if self.mode != "fixed" else "fixed"
        self.minimum.trainable = self.maximum.trainable = self.mode == "trainable"

    def range(self):
        """Returns the union of the slots: float32 scalars (minimum, maximum)."""
        return ops.min(self.minimum), ops.max(self.maximum)

    def scale_and_zero_point(self):
        """Returns NumPy (scale float32, zero_point int64) of the present range."""
        low, high = (ops.convert_to_numpy(bound) for bound in self.range())
        return affine.scale_and_zero_point(low, high, self.spec)

    def call(self, x, slot=0, activation=None, label=None, training=None):
        """Returns float32 of x's shape.

        Args:
          x: float32, any shape.
          slot: which slot observes this call; None: x is average pooling's result of values
            that this range quantized before, and is rounded as that kernel does.
          activation: one of fakequant.ACTIVATIONS.
          label: the tensor's name in the integer graph; it does not change the result.
        """
        if not self.enabled or self.spec is None:
            y = fakequant.apply_activation(x, activation)
            if training and self.mode == "trainable":
                # A gradient of zero: Keras warns of trainable variables that have none.
                y = y + 0.0 * (ops.sum(self.minimum) + ops.sum(self.maximum))
            return y
        if slot is None:
            return fakequant.fake_quantize_average(x, *self.range(), self.spec)
        if training and self.mode == "moving":
            self._observe(x, slot, activation)
        if not training:
            return fakequant.fake_quantize(x, *self.range(), self.spec, activation)
        if self.range_penalty and self.mode == "trainable":
            self.add_loss(pact.range_penalty(self.range(), self.range_penalty))
        quantize = METHODS[self.method]
        if self.method == "ste" and self.mode == "trainable":
            quantize = pact.fake_quantize
        settings = training_settings(self.method, x, self)
        return quantize(x, *self.range(), self.spec, activation, compiled=True, **settings)

    def _observe(self, x, slot, activation):
        # The activation functions are monotone: two numbers need them, not the whole tensor.
        low = fakequant.apply_activation(ops.min(ops.stop_gradient(x)), activation)
        high = fakequant.apply_activation(ops.max(ops.stop_gradient(x)), activation)
        here = ops.one_hot(slot, self.slots) * (1 - self.decay)
        self.minimum.assign(self.minimum + here * (low - self.minimum))
        self.maximum.assign(self.maximum + here * (high - self.maximum))

    def compute_output_shape(self, input_shape, **kwargs):
        return input_shape

    def get_config(self):
        return super().get_config() | {
            "spec": spec_config(self.spec),
            "slots": self.slots,
            "mode": self.mode,
            "decay": self.decay,
            "initial_range": list(self.initial_range),
            "method": self.method,
            "range_penalty": self.range_penalty,
            "enabled": self.enabled,
        }


def initial_alpha():
    """Returns the initializer of DSQ's alpha: 0.2, as the paper's."""
    return keras.initializers.Constant(0.2)


def training_settings(method: str, x, layer, weights: bool = False) -> dict:
    """Returns what a method's function takes beyond x, the range, the spec and the activation.

    Args:
      x: what is quantized; its first axis is the batch, unless it is `weights`.
      layer: holds the method's variables.
    """
    if method == "lsq" and not weights:
        return {"count": int(np.prod(x.shape[1:]))}  # the paper's: features, not images
    if method == "dsq":
        return {"alpha": layer.kernel_alpha if weights else layer.alpha}
    if method == "stochastic":
        return {"noise": stochastic.noise(ops.shape(x), layer.seeds)}
    return {}


def activation_quantizers(model: keras.Model) -> list[ActivationQuantizer]:
    """Returns the model's activation quantizers, each once, in the order of the model."""
    return [layer for layer in model.layers if isinstance(layer, ActivationQuantizer)]


def quantizer_before(tensor: keras.KerasTensor) -> ActivationQuantizer | None:
    """Returns the quantizer whose scale a tensor has."""
    while True:
        operation, node_index, _ = tensor._keras_history
        if isinstance(operation, ActivationQuantizer):
            return operation
        inputs = operation._inbound_nodes[node_index].arguments.keras_tensors
        if not inputs:
            return None
        tensor = inputs[0]


def quantizer_after(tensor: keras.KerasTensor) -> ActivationQuantizer | None:
    """Returns the quantizer that reads a weighted layer's output."""
    operation = tensor._keras_history.operation
    for node in operation._outbound_nodes:
        reads = any(other is tensor for other in node.arguments.keras_tensors)
        if reads and isinstance(node.operation, ActivationQuantizer):
            return node.operation
    return None
