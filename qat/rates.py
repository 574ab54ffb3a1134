"""Learning rates in steps of the quantizers: how far a variable may move, in codes.

Under Adam a variable moves by about its rate at each step, whatever the size of its gradient.  A
weight changes its code after half a quantization step on average, and those steps differ by orders of
magnitude between layers (depthwise kernels with a batch norm folded in have the largest): one rate
for all leaves the codes of some layers as they are and shakes those of others.  So each variable's rate
is a factor times --learning_rate,

    kernel                 the scale that each output channel's codes would have of its own
    bias, beta             the scale of the activations behind the layer
    gain, gamma            1 / the largest code: what moves the largest weight by one step
    range                  the scale of its codes

With one scale a layer a channel's own may be a hundredth of it: at the layer's rate, 0.005 steps,
the small channels of MobileNet-v1 lose what they hold (KL to float from 0.018 to 0.118).

Adam's own formula is unchanged (Kingma and Ba 1412.6980, algorithm 1).
"""

import keras
import numpy as np
from keras import ops

from lowbit import affine, layers, quantizers


class Adam(keras.optimizers.Adam):
    """Adam, rates times a factor for each variable.

    Args (beyond Keras' own):
      factors: {variable.path: float or array that broadcasts with the variable}; default 1.
    """

    def __init__(self, *args, factors=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.factors = dict(factors or {})

    def build(self, variables):
        super().build(variables)
        self.in_order = [self.factors.get(variable.path, 1.0) for variable in variables]

    def update_step(self, gradient, variable, learning_rate):
        # With TensorFlow the variable is one of its own here, without a path.
        factor = self.in_order[self._get_variable_index(variable)]
        super().update_step(gradient, variable, learning_rate * ops.convert_to_tensor(factor))


def in_steps(model: keras.Model) -> dict[str, np.ndarray]:
    """Returns the factors of the formulas above for a placed model in its training form.

    Args:
      model: with ranges set; layers whose weights or activations stay float keep the factor 1.
    """
    factors = {}
    for layer in layers.weighted_layers(model):
        behind = layer.output_quantizer()
        if behind is not None and behind.spec is not None:
            found = np.float32(behind.scale_and_zero_point()[0])
            factors |= dict.fromkeys(_paths(layer, "bias", "beta"), found)
        if layer.weight_spec is None:
            continue
        kernel = ops.convert_to_numpy(layer.folded()[0])
        scale = np.float32(layer.numpy_scale(kernel)[0])
        highest = np.float32(affine.integer_bounds(layer.weight_spec)[1])
        own = np.abs(kernel).reshape(-1, layer.output_channels()).max(axis=0) / highest
        # A dead channel still moves, at a thousandth.
        own = np.clip(own, 1e-3 * scale, scale) if layer.weight_spec.axis is None else scale
        own = np.broadcast_to(own, (layer.output_channels(),))
        factors |= dict.fromkeys(_paths(layer, "gamma", "kernel_gain"), 1 / highest)
        unfolded = own
        if layer.batch_norm is not None:
            factor = np.abs(ops.convert_to_numpy(layer.fold_factor()))
            # A dead channel's weights need not move by what would bring their product to a step.
            unfolded = own / np.maximum(factor, max(1e-3 * factor.max(), 1e-30))
        shape = (-1,)
        if isinstance(layer, layers.QuantizedDepthwiseConv2D):
            shape = tuple(layer.kernel.shape[-2:])
        factors |= dict.fromkeys(_paths(layer, "kernel"), unfolded.reshape(shape))
        bound = unfolded if layer.weight_spec.axis is not None else scale
        factors |= dict.fromkeys(_paths(layer, "kernel_minimum", "kernel_maximum"), bound)
    for quantizer in quantizers.activation_quantizers(model):
        if quantizer.spec is not None:
            step = np.float32(quantizer.scale_and_zero_point()[0])
            factors |= dict.fromkeys(_paths(quantizer, "minimum", "maximum"), step)
    return factors


def _paths(layer, *names):
    return [variable.path for variable in layer.variables if variable.name in names]
