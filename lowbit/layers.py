"""Convolutions and dense with quantized weights and batch norm folded in; sums, products, means.

With quantizers off each layer equals its float twin followed by BatchNormalization.

    factor = gamma / sqrt(moving_variance + epsilon)             long-term statistics
    y = conv(x, Q(kernel * factor)) + beta + (bias - moving_mean) * factor          whitepaper eq. 28-31

is what inference computes, and training after the freeze.  Before it, batch statistics act on the
output while the weights keep the long-term factor, so that they do not jitter from batch to batch
(whitepaper section 3.2.2).  One convolution serves both:

    z = conv(x, Q(kernel * factor) / factor)                     eq. 24, unscaled
    mean_B, variance_B = moments(z)
    y = gamma * (z - mean_B) / sqrt(variance_B + epsilon) + beta                eq. 25-27

The paper takes the statistics from a second convolution with float weights; these come from the
quantized ones (docs/numerics.md).  A channel whose factor is too small to divide by (gamma zero or
nearly) is convolved with its float kernel scaled by 1 / sqrt(moving_variance + epsilon), and its
output multiplied by gamma afterwards: its statistics stay right and gamma can grow again.
"""

import contextlib
from collections.abc import Callable

import keras
import numpy as np
from keras import ops

from lowbit import affine, batch_statistics, binary, fakequant, quantizers
from lowbit.kernels import resizing

# Below these a channel's statistics cannot be read off its quantized output: |gamma|, and the codes
# that its largest weight has.  With 8-bit per-tensor weights a channel rounds to zero as soon as its
# gamma is 1/127 of the largest; at gamma 5e-3 beside 1.5 its variance came out 0.57 instead of 0.73.
GAMMA_FLOOR = 1e-3
STATISTICS_CODES = 16

# minmax: of the kernel, each time.  stored: as PTQ set it.  trainable: moved by the gradient.
WEIGHT_RANGES = ("minmax", "stored", "trainable")
# The gradient's way through rounding in training, beyond quantizers.METHODS.  "gains" keeps the codes:
# Q(w) * gain, a gain for each scale, is smooth, and no weight jumps between two codes.
WEIGHT_METHODS = (*quantizers.METHODS, "binary", "ternary", "gains")

# How training folds batch norm before it is frozen: see `_call_with_batch_statistics` and
# `_call_without_correction`.
BATCH_NORM_MODES = ("correction", "none")


class _QuantizedWeights:
    """What the three layers share; goes before a Keras layer that has `kernel` and `bias`.

    Args (beyond the Keras layer's own):
      weight_spec: how the folded kernel is quantized; None: float.  Its axis None is one scale for
        the tensor, otherwise one for each output channel.
      batch_norm: None, or {"epsilon", "momentum"} of the folded batch normalization.
      batch_norm_frozen: True uses the moving statistics in training too, and leaves them be.
      weights_enabled: False computes with float weights.
      weight_range: "minmax" takes the range from the folded kernel each time; "stored" and
        "trainable" from the variables kernel_minimum and kernel_maximum, (channels,) or (1,): a
        clipped range, the range whose codes the kernel holds already, or a learnt one.  With a
        range for each channel they are those of the kernel before batch norm's factor.
      weight_method: one of WEIGHT_METHODS; what inference computes does not depend on it, so
        "binary" and "ternary" kernels become codes times scale before they are used.
      batch_norm_mode: one of BATCH_NORM_MODES.
      dampening: coefficient of a penalty in training, sum of (Q(w) - clip(w, low, high))^2, which
        draws weights away from the ties between codes (Nagel et al. 2203.11086, section 4.2).
    """

    def __init__(
        self,
        *args,
        weight_spec=None,
        batch_norm=None,
        batch_norm_frozen=False,
        weights_enabled=True,
        weight_range="minmax",
        weight_method="ste",
        dampening=0.0,
        batch_norm_mode="correction",
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        if weight_method not in WEIGHT_METHODS:
            raise ValueError(
                f"{self.name}: weight method {weight_method!r} is not one of {WEIGHT_METHODS}"
            )
        if weight_range not in WEIGHT_RANGES:
            raise ValueError(
                f"{self.name}: weight range {weight_range!r} is not one of {WEIGHT_RANGES}"
            )
        if self.activation is not keras.activations.linear:
            raise ValueError(
                f"{self.name}: the activation belongs to the quantizer that follows the layer"
            )
        self.weight_spec = quantizers.spec_from_config(weight_spec)
        self.batch_norm = batch_norm
        self.batch_norm_frozen = batch_norm_frozen
        self.weights_enabled = weights_enabled
        self.weight_range = weight_range
        self.weight_method = weight_method
        self.dampening = dampening
        if batch_norm_mode not in BATCH_NORM_MODES:
            raise ValueError(
                f"{self.name}: batch norm mode {batch_norm_mode!r} is not one of {BATCH_NORM_MODES}"
            )
        self.batch_norm_mode = batch_norm_mode
        # The quantizers before and behind, as functions that return them, set by a QuantizedModel.
        # Keras would take an attribute that is itself a layer for a sublayer.
        self.input_quantizer = self.output_quantizer = _no_quantizer

    def build(self, input_shape):
        super().build(input_shape)
        if self.weight_range != "minmax":
            shape = (self.output_channels(),) if self._per_channel() else (1,)
            learnt = self.weight_range == "trainable"
            self.kernel_minimum, self.kernel_maximum = (
                self.add_weight(name=name, shape=shape, initializer="zeros", trainable=trainable)
                # Symmetric codes follow one side alone; the other is its mirror image.
                for name, trainable in (
                    ("kernel_minimum", learnt and not self.weight_spec.symmetric),
                    ("kernel_maximum", learnt),
                )
            )
        if self.weight_method == "dsq":
            self.kernel_alpha = self.add_weight(
                name="kernel_alpha", shape=(), initializer=quantizers.initial_alpha()
            )
        if self.weight_method == "stochastic":
            self.seeds = keras.random.SeedGenerator()
        if self.weight_method == "gains":
            shape = (self.output_channels(),) if self._per_channel() else (1,)
            self.kernel_gain = self.add_weight(name="kernel_gain", shape=shape, initializer="ones")
            self.kernel.trainable = False
        if self.batch_norm is None:
            return
        channels = (self.output_channels(),)
        self.gamma = self.add_weight(name="gamma", shape=channels, initializer="ones")
        # A gain is what gamma would learn; gamma alone would move codes that share one range.
        self.gamma.trainable = self.weight_method != "gains"
        self.beta = self.add_weight(name="beta", shape=channels, initializer="zeros")
        self.moving_mean = self.add_weight(
            name="moving_mean", shape=channels, initializer="zeros", trainable=False
        )
        self.moving_variance = self.add_weight(
            name="moving_variance", shape=channels, initializer="ones", trainable=False
        )

    def store_range(self, minimum, maximum) -> None:
        """Sets the stored range: float32 (channels,), or (1,) for per-tensor weights."""
        if self.weight_range == "minmax":
            raise ValueError(f"{self.name} has weight_range 'minmax': it stores no range")
        self.kernel_minimum.assign(minimum)
        self.kernel_maximum.assign(maximum)

    def store_observed_range(self) -> None:
        """Sets the stored range to the smallest and largest weight."""
        # Per channel the range is the unfolded kernel's, per tensor the folded one's.
        kernel = self.kernel if self._per_channel() else self.folded()[0]
        flat = ops.convert_to_numpy(kernel).reshape(-1, self.output_channels())
        low, high = affine.observed_range(flat, 1 if self._per_channel() else None)
        self.store_range(np.atleast_1d(low), np.atleast_1d(high))

    def _per_channel(self) -> bool:
        return self.weight_spec is not None and self.weight_spec.axis is not None

    def stored_bounds(self):
        """Returns the stored range of the folded kernel: float32 scalars, or (channels,)."""
        low, high = self.kernel_minimum, self.kernel_maximum
        if self.weight_range == "trainable" and self.weight_spec.symmetric:
            low = -high
        if not self._per_channel():
            return low[0], high[0]
        if self.batch_norm is not None:
            factor = ops.stop_gradient(self.fold_factor())
            low, high = low * factor, high * factor
            low, high = ops.minimum(low, high), ops.maximum(low, high)
        return ops.convert_to_tensor(low), ops.convert_to_tensor(high)

    def output_channels(self) -> int:
        return self.kernel.shape[-1]

    def scale_channels(self, kernel, factor):
        """Returns the kernel with output channel c multiplied by factor[c]."""
        return kernel * factor

    def _deviation(self):
        """Returns sqrt(moving_variance + epsilon), (channels,)."""
        deviation = ops.sqrt(self.moving_variance + self.batch_norm["epsilon"])
        # The maximum changes nothing; it keeps TensorFlow's graph optimizer from turning a quotient
        # by a square root into a product with rsqrt, one bit off what NumPy and the file hold.
        return ops.maximum(deviation, 1e-30)

    def fold_factor(self):
        """Returns what batch norm multiplies the kernel's channels with, (channels,)."""
        return self.gamma / self._deviation()

    def kernel_scale(self, kernel, bias=None, input_scale=None):
        """Returns float32 (scale, zero_point) for a folded kernel: scalars, or (channels,).

        From the stored range, or the kernel's smallest and largest value; where the input's scale
        is given, at least so large that the bias fits its int32 grid
        (`affine.minimum_weight_scale`).
        """
        low, high = (ops.stop_gradient(bound) for bound in self._bounds(kernel))
        scale, zero_point = fakequant.scale_and_zero_point(low, high, self.weight_spec)
        if input_scale is not None and self.weight_spec.symmetric:
            limit = input_scale * float(affine.bias_limit(self.input_bits()))
            floor = fakequant.round_scale(ops.abs(ops.stop_gradient(bias)) / limit)
            scale = ops.maximum(scale, floor if self._per_channel() else ops.max(floor))
        return scale, zero_point

    def input_bits(self) -> int:
        """Returns the bits of the activations that the weights multiply, 8 where nothing says."""
        quantizer = self.input_quantizer()
        return 8 if quantizer is None or quantizer.spec is None else quantizer.spec.bits

    def numpy_scale(self, kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns what `kernel_scale` gives for a NumPy kernel, each (channels,) or (1,), exactly."""
        if self.weight_range == "minmax":
            flat = kernel.reshape(-1, self.output_channels())
            low, high = affine.observed_range(flat, 1 if self._per_channel() else None)
        else:
            low, high = (ops.convert_to_numpy(bound) for bound in self.stored_bounds())
        return affine.scale_and_zero_point(
            np.atleast_1d(low), np.atleast_1d(high), self.weight_spec
        )

    def quantize_kernel(self, kernel, scale, zero_point):
        """Returns the folded kernel quantized with `kernel_scale`'s result, and back."""
        flat = ops.reshape(kernel, (-1, self.output_channels()))
        quantized = fakequant.fake_quantize_weights(flat, scale, zero_point, self.weight_spec)
        return ops.reshape(quantized, kernel.shape)

    def gains(self):
        """Returns the learnt factor of each channel, (channels,), positive."""
        gain = ops.maximum(self.kernel_gain, 1e-3)
        return gain if self._per_channel() else ops.broadcast_to(gain, (self.output_channels(),))

    def _bounds(self, kernel):
        """Returns the range of a folded kernel, with its gradient where it has one."""
        if self.weight_range != "minmax":
            return self.stored_bounds()
        axis = 0 if self._per_channel() else None
        flat = ops.reshape(ops.stop_gradient(kernel), (-1, self.output_channels()))
        return ops.min(flat, axis=axis), ops.max(flat, axis=axis)

    def quantize_in_training(self, kernel, scale, zero_point):
        """Returns `quantize_kernel`'s values with the gradient of the weight method."""
        if self.dampening:
            quantized = ops.stop_gradient(self.quantize_kernel(kernel, scale, zero_point))
            lowest, highest = affine.integer_bounds(self.weight_spec)
            low, high = (lowest - zero_point) * scale, (highest - zero_point) * scale
            flat = ops.reshape(kernel, (-1, self.output_channels()))
            off = ops.reshape(quantized, flat.shape) - ops.clip(flat, low, high)
            self.add_loss(self.dampening * ops.sum(ops.square(off)))
        if self.weight_method == "ste":
            return self.quantize_kernel(kernel, scale, zero_point)
        if self.weight_method == "gains":
            codes = ops.stop_gradient(self.quantize_kernel(kernel, scale, zero_point))
            return self.scale_channels(codes, self.gains())
        flat = ops.reshape(kernel, (-1, self.output_channels()))
        if self.weight_method in binary.METHODS:
            values, _ = binary.METHODS[self.weight_method](flat, self._per_channel())
            return ops.reshape(values, kernel.shape)
        low, high = self._bounds(kernel)
        if self.weight_spec.symmetric:
            # Where the bias' grid asks for a larger scale than the range's, that one counts.
            highest = float(affine.integer_bounds(self.weight_spec)[1])
            widened = scale * highest
            widened = ops.where(widened > 1.001 * ops.maximum(-low, high), widened, 0.0)
            low, high = ops.where(widened > 0, -widened, low), ops.where(widened > 0, widened, high)
        settings = quantizers.training_settings(self.weight_method, flat, self, weights=True)
        quantized = quantizers.METHODS[self.weight_method](
            flat, low, high, self.weight_spec, **settings
        )
        return ops.reshape(quantized, kernel.shape)

    def folded(self):
        """Returns the float kernel and bias (channels,) with batch norm's moving statistics in."""
        bias = self.bias if self.use_bias else ops.zeros((self.output_channels(),))
        if self.batch_norm is None:
            return ops.convert_to_tensor(self.kernel), ops.convert_to_tensor(bias)
        factor = self.fold_factor()
        kernel = self.scale_channels(self.kernel, factor)
        return kernel, self.beta + (bias - self.moving_mean) * factor

    def call(self, x, training=None):
        if training and self.batch_norm is not None and not self.batch_norm_frozen:
            if self.batch_norm_mode == "none":
                return self._call_without_correction(x)
            return self._call_with_batch_statistics(x)
        kernel, bias = self.folded()
        has_bias = self.use_bias or self.batch_norm is not None
        if self.weight_spec is None or not self.weights_enabled:
            y = self.linear(x, kernel)
            return y + bias if has_bias else y
        input_scale = _scale_of(self.input_quantizer())
        scale, zero_point = self.kernel_scale(kernel, bias, input_scale)
        # Accumulators of 16-bit activations leave what float32 holds exactly.
        exact = input_scale is not None and self.input_bits() <= 8
        if exact and self.weight_spec.symmetric and not training:
            output_scale = _scale_of(self.output_quantizer())
            if output_scale is not None:
                return self._call_in_integers(x, kernel, bias, input_scale, scale, output_scale)
        quantize = self.quantize_in_training if training else self.quantize_kernel
        y = self.linear(x, quantize(kernel, scale, zero_point))
        if not has_bias:
            return y
        if input_scale is not None:
            # The int32 grid of the bias: without it 0.2% of the codes would differ from the
            # kernel's by one, with it one in a million.  Its gradient passes straight through.
            step = ops.stop_gradient(input_scale) * scale
            bias = bias + ops.stop_gradient(ops.round(bias / step) * step - bias)
        return y + bias

    def _call_in_integers(self, x, kernel, bias, input_scale, scale, output_scale):
        """Inference between two quantizers: the XNNPACK kernel's own arithmetic, code for code.

            accumulator = conv(x / s_in, kernel codes) + bias codes      exact below 2**24
            y = rint(accumulator * (s_in * s_w / s_out)) * s_out         float32, as the kernel

        In floats one code in a million falls on the other side of a tie, and a deep network makes
        of three such codes a difference in 90% of its logits (MobileNet-v2, measured).
        """
        flat = ops.reshape(kernel, (-1, self.output_channels()))
        lowest, highest = affine.integer_bounds(self.weight_spec)
        codes = ops.clip(ops.round(flat / scale), lowest, highest)
        # float64, as affine.quantize_bias: codes reach 2**22.
        bias_scale = ops.cast(input_scale, "float64") * ops.cast(scale, "float64")
        bias_codes = ops.round(ops.cast(bias, "float64") / bias_scale)
        accumulator = self.linear(x / input_scale, ops.reshape(codes, kernel.shape))
        accumulator = accumulator + ops.cast(bias_codes, "float32")
        return ops.round(accumulator * (input_scale * scale / output_scale)) * output_scale

    def _call_with_batch_statistics(self, x):
        epsilon, momentum = self.batch_norm["epsilon"], self.batch_norm["momentum"]
        deviation = self._deviation()
        alive = ops.abs(self.gamma) >= GAMMA_FLOOR
        quantizes = self.weight_spec is not None and self.weights_enabled
        if quantizes:
            # As inference folds them; the range is theirs, dead channels near zero included.
            inference = self.scale_channels(self.kernel, ops.stop_gradient(self.gamma) / deviation)
            scale, zero_point = self.kernel_scale(inference)
            flat = ops.reshape(ops.stop_gradient(inference), (-1, self.output_channels()))
            codes = ops.max(ops.abs(flat), axis=0) / scale
            highest = affine.integer_bounds(self.weight_spec)[1]
            alive = ops.logical_and(alive, codes >= min(STATISTICS_CODES, 0.9 * highest))
        # stop_gradient: gamma's gradient comes through the output below; through the weights it
        # would cancel, since the batch statistics undo any factor.
        factor = ops.stop_gradient(ops.where(alive, self.gamma, 1.0) / deviation)
        kernel = self.scale_channels(self.kernel, factor)
        if quantizes:
            quantized = self.quantize_in_training(inference, scale, zero_point)
            mask = self.scale_channels(ops.ones_like(kernel), ops.cast(alive, "float32"))
            kernel = ops.where(mask > 0, quantized, kernel)
        z = self.linear(x, self.scale_channels(kernel, 1.0 / factor))
        y, mean, variance = batch_statistics.normalize(z, self.gamma, self.beta, epsilon)
        bias = self.bias if self.use_bias else 0.0
        self._average(self.moving_mean, mean + bias, momentum)
        self._average(self.moving_variance, variance, momentum)
        return y

    def _call_without_correction(self, x):
        """Training with the batch's statistics in the weights (whitepaper Figure 8): they jitter.

        y = conv(x, Q(kernel * gamma / sigma_B)) + beta + (bias - mean_B) * gamma / sigma_B
        """
        epsilon, momentum = self.batch_norm["epsilon"], self.batch_norm["momentum"]
        z = self.linear(x, self.kernel)
        bias = self.bias if self.use_bias else 0.0
        mean, variance = ops.moments(z, axes=tuple(range(len(z.shape) - 1)))
        self._average(self.moving_mean, mean + bias, momentum)
        self._average(self.moving_variance, variance, momentum)
        factor = self.gamma / ops.sqrt(variance + epsilon)
        kernel = self.scale_channels(self.kernel, factor)
        if self.weight_spec is not None and self.weights_enabled:
            kernel = self.quantize_in_training(kernel, *self.kernel_scale(kernel))
        return self.linear(x, kernel) + (self.beta - mean * factor)

    @staticmethod
    def _average(variable, value, momentum):
        variable.assign(variable * momentum + ops.stop_gradient(value) * (1.0 - momentum))

    def save_own_variables(self, store):
        # Keras' convolutions save kernel and bias alone.
        for variable in self.variables:
            store[variable.name] = variable

    def load_own_variables(self, store):
        for variable in self.variables:
            variable.assign(store[variable.name])

    def get_config(self):
        return super().get_config() | {
            "weight_spec": quantizers.spec_config(self.weight_spec),
            "batch_norm": self.batch_norm,
            "batch_norm_frozen": self.batch_norm_frozen,
            "weights_enabled": self.weights_enabled,
            "weight_range": self.weight_range,
            "weight_method": self.weight_method,
            "dampening": self.dampening,
            "batch_norm_mode": self.batch_norm_mode,
        }


@keras.saving.register_keras_serializable("lowbit")
class QuantizedConv2D(_QuantizedWeights, keras.layers.Conv2D):
    """Conv2D over x (n, h, w, in) with kernel (h, w, in / groups, out); see the top of this file."""

    def linear(self, x, kernel):
        return self.convolution_op(x, kernel)


@keras.saving.register_keras_serializable("lowbit")
class QuantizedDepthwiseConv2D(_QuantizedWeights, keras.layers.DepthwiseConv2D):
    """DepthwiseConv2D over x (n, h, w, in) with kernel (h, w, in, multiplier); see the top."""

    def output_channels(self) -> int:
        return self.kernel.shape[-2] * self.kernel.shape[-1]

    def scale_channels(self, kernel, factor):
        return kernel * ops.reshape(factor, kernel.shape[-2:])

    def linear(self, x, kernel):
        return ops.depthwise_conv(
            x,
            kernel,
            strides=self.strides,
            padding=self.padding,
            dilation_rate=self.dilation_rate,
            data_format=self.data_format,
        )


class _OutputLast(keras.layers.Conv2DTranspose):
    """Conv2DTranspose with kernel (h, w, in, out), where Keras' is (h, w, out, in)."""

    def build(self, input_shape):
        shape = (*self.kernel_size, input_shape[-1], self.filters)
        self.kernel = self.add_weight(
            name="kernel", shape=shape, initializer=self.kernel_initializer
        )
        self.bias = None
        if self.use_bias:
            self.bias = self.add_weight(name="bias", shape=(self.filters,), initializer="zeros")


@keras.saving.register_keras_serializable("lowbit")
class QuantizedConv2DTranspose(_QuantizedWeights, _OutputLast):
    """Conv2DTranspose over x (n, h, w, in) with kernel (h, w, in, out); see the top of this file."""

    def linear(self, x, kernel):
        return ops.conv_transpose(
            x,
            ops.swapaxes(kernel, -1, -2),
            strides=list(self.strides),
            padding=self.padding,
            output_padding=self.output_padding,
            data_format=self.data_format,
        )


@keras.saving.register_keras_serializable("lowbit")
class QuantizedDense(_QuantizedWeights, keras.layers.Dense):
    """Dense over x (..., in) with kernel (in, out); see the top of this file."""

    def linear(self, x, kernel):
        return ops.matmul(x, kernel)


class _TwoInputs:
    """What additions, subtractions and products share; goes before the Keras layer."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.input_quantizers = self.output_quantizer = _no_quantizer

    def call(self, inputs, training=None):
        found = self.input_quantizers()
        if training or found is None or len(inputs) != 2:
            return super().call(inputs)
        scales = [_scale_of(quantizer) for quantizer in found]
        output_scale = _scale_of(self.output_quantizer())
        if output_scale is None or None in scales:
            return super().call(inputs)
        codes = [x / scale for x, scale in zip(inputs, scales, strict=True)]
        # Keras gives the input of fewer axes new ones behind the batch's.
        rank = max(len(x.shape) for x in codes)
        codes = [ops.reshape(x, (-1, *(1,) * (rank - len(x.shape)), *x.shape[1:])) for x in codes]
        return self.in_integers(codes, scales, output_scale)


class _Sum(_TwoInputs):
    """a + b or a - b; in inference between quantizers with XNNPACK's integers, else in floats.

    r_i = s_i / s_out,  m_i = rint(r_i * 2^n),  n such that the larger m has 21 bits
    y = floor((a_code * m_a +- b_code * m_b) / 2^n + 1/2) * s_out      codes less zero points
    """

    signs = (1, 1)

    def in_integers(self, codes, scales, output_scale):
        ratios = [scale / output_scale for scale in scales]
        # 2^(21 - e), where e is frexp's exponent of the larger ratio, made on the floats' bits.
        bits = ops.view(ops.maximum(*ratios), "int32")
        exponent = ops.right_shift(bits, 23) - 126
        power = ops.view(ops.left_shift(21 - exponent + 127, 23), "float32")
        power = ops.cast(power, "float64")
        total = 0.5 * power
        for x, ratio, sign in zip(codes, ratios, self.signs, strict=True):
            multiplier = sign * ops.round(ops.cast(ratio, "float64") * power)
            total = total + ops.cast(x, "float64") * multiplier
        return ops.cast(ops.floor(total / power), "float32") * output_scale


@keras.saving.register_keras_serializable("lowbit")
class QuantizedAdd(_Sum, keras.layers.Add):
    """a + b: see `_Sum`."""


@keras.saving.register_keras_serializable("lowbit")
class QuantizedSubtract(_Sum, keras.layers.Subtract):
    """a - b: see `_Sum`."""

    signs = (1, -1)


@keras.saving.register_keras_serializable("lowbit")
class QuantizedMultiply(_TwoInputs, keras.layers.Multiply):
    """a * b; in inference between quantizers with XNNPACK's float32 multiplier, else in floats.

    y = rint(a_code * b_code * (s_a * s_b / s_out)) * s_out      codes less zero points
    """

    def in_integers(self, codes, scales, output_scale):
        multiplier = scales[0] * scales[1] / output_scale
        return ops.round(codes[0] * codes[1] * multiplier) * output_scale


@keras.saving.register_keras_serializable("lowbit")
class QuantizedMean(keras.layers.GlobalAveragePooling2D):
    """Mean over height and width; in inference between quantizers with XNNPACK's float32 steps.

    m = (s_in / s_out) * (1 / n)
    y = (rint(sum of codes * m + (z_out - n * z_in * m)) - z_out) * s_out

    Args:
      axes: instead of height and width, of x (n, ...); not the batch's.
    """

    def __init__(self, axes=(1, 2), **kwargs):
        super().__init__(**kwargs)
        self.axes = tuple(axes)
        self.input_spec = None  # of 4 axes, in Keras' own
        self.input_quantizer = self.output_quantizer = _no_quantizer

    def call(self, x, training=None):
        before, after = self.input_quantizer(), self.output_quantizer()
        if training or None in (_scale_of(before), _scale_of(after)):
            return ops.mean(x, axis=self.axes, keepdims=self.keepdims)
        (scale, zero_point), (output_scale, output_zero_point) = (
            fakequant.scale_and_zero_point(*quantizer.range(), quantizer.spec)
            for quantizer in (before, after)
        )
        count = float(np.prod([x.shape[axis] for axis in self.axes]))
        codes = x / scale + zero_point
        total = ops.sum(codes, axis=self.axes, keepdims=self.keepdims)
        multiplier = scale / output_scale * float(np.float32(1) / np.float32(count))
        offset = output_zero_point - count * zero_point * multiplier
        return (ops.round(total * multiplier + offset) - output_zero_point) * output_scale

    def compute_output_shape(self, input_shape):
        gone = {axis % len(input_shape) for axis in self.axes}
        kept = [1 if axis in gone else size for axis, size in enumerate(input_shape)]
        return tuple(size for axis, size in enumerate(kept) if self.keepdims or axis not in gone)

    def get_config(self):
        return super().get_config() | {"axes": self.axes}


@keras.saving.register_keras_serializable("lowbit")
class QuantizedRsqrt(keras.layers.Layer):
    """1 / sqrt(x) of x >= 0; of 0, which the kernel makes its largest code, 1e15."""

    def call(self, x):
        # In float64, as QuantizedFunction: the kernel's fixed point is as exact.
        return ops.cast(ops.rsqrt(ops.maximum(ops.cast(x, "float64"), 1e-30)), "float32")


@keras.saving.register_keras_serializable("lowbit")
class QuantizedPReLU(keras.layers.PReLU):
    """x, or alpha * x below zero; in inference between quantizers with alpha in int8, on one scale.

    s = max |alpha| / 127        y = x, or x * rint(alpha / s) * s
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.input_quantizer = self.output_quantizer = _no_quantizer

    def call(self, x, training=None):
        alpha = self.alpha
        ends = (self.input_quantizer(), self.output_quantizer())
        if not training and None not in map(_scale_of, ends):
            codes, scale = self.alpha_codes()
            alpha = codes * scale
        return ops.where(x >= 0, x, x * alpha)

    def alpha_codes(self):
        """Returns (codes of alpha as floats, their float32 scale)."""
        # 1e-7: where alpha is 0 throughout, any scale will do that a multiplier can hold.
        scale = ops.maximum(ops.max(ops.abs(self.alpha)) / 127.0, 1e-7)
        return ops.round(self.alpha / scale), scale


@keras.saving.register_keras_serializable("lowbit")
class Slice(keras.layers.Layer):
    """x[:, begin:end:step, ...]: part of each axis but the batch's.

    Args:
      begin, end, step: a whole number for each axis of x (n, ...) but the batch's; begin < end at
        most the axis' size, step at least 1.
      dropped: axes of size 1 that are left out afterwards, the batch's being 0.
    """

    def __init__(self, begin, end, step, dropped=(), **kwargs):
        super().__init__(**kwargs)
        self.begin, self.end, self.step, self.dropped = map(tuple, (begin, end, step, dropped))

    def call(self, x):
        parts = map(slice, self.begin, self.end, self.step)
        y = x[(slice(None), *parts)]
        return ops.squeeze(y, axis=self.dropped) if self.dropped else y

    def kept_shape(self):
        """Returns the sizes of the axes but the batch's, before any is dropped."""
        return tuple(
            -(-(last - first) // step)
            for first, last, step in zip(self.begin, self.end, self.step, strict=True)
        )

    def compute_output_shape(self, input_shape):
        shape = (input_shape[0], *self.kept_shape())
        return tuple(size for axis, size in enumerate(shape) if axis not in self.dropped)

    def get_config(self):
        names = ("begin", "end", "step", "dropped")
        return super().get_config() | {name: getattr(self, name) for name in names}


@keras.saving.register_keras_serializable("lowbit")
class BlocksToChannels(keras.layers.Layer):
    """Images (n, h * b, w * b, c) to (n, h, w, b * b * c); or, `from_channels`, back.

    Args:
      block: b.
      from_channels: the other way: the pixel shuffle of super-resolution.
    """

    def __init__(self, block, from_channels=False, **kwargs):
        super().__init__(**kwargs)
        self.block, self.from_channels = int(block), bool(from_channels)

    def call(self, x):
        change = ops.depth_to_space if self.from_channels else ops.space_to_depth
        return change(x, self.block, data_format="channels_last")

    def get_config(self):
        return super().get_config() | {"block": self.block, "from_channels": self.from_channels}


@keras.saving.register_keras_serializable("lowbit")
class QuantizedFunction(keras.layers.Activation):
    """A function of single values; in inference in float64, as the kernels' tables are made of it.

    In float32 one of the 256 values in a hundred layers would fall on the other side of a rounding.
    """

    def call(self, x, training=None):
        if training:
            return super().call(x)
        return ops.cast(self.activation(ops.cast(x, "float64")), "float32")


@keras.saving.register_keras_serializable("lowbit")
class QuantizedLeakyReLU(keras.layers.LeakyReLU):
    """x, or slope * x below zero; in inference between quantizers with XNNPACK's integers.

    m = rint(256 * s_in / s_out), below zero rint(256 * s_in * slope / s_out)
    y = floor((code * m + 128) / 256) * s_out      code less its zero point
    """

    def __init__(self, negative_slope=0.3, **kwargs):
        super().__init__(negative_slope, **kwargs)
        self.input_quantizer = self.output_quantizer = _no_quantizer

    def call(self, x, training=None):
        scale, output_scale = (
            _scale_of(quantizer()) for quantizer in (self.input_quantizer, self.output_quantizer)
        )
        if training or scale is None or output_scale is None:
            return super().call(x)
        codes, ratio = x / scale, scale / output_scale
        slope = float(np.float32(self.negative_slope))
        above, below = ops.round(256.0 * ratio), ops.round(256.0 * ratio * slope)
        scaled = codes * ops.where(codes >= 0, above, below)
        return ops.floor((scaled + 128.0) / 256.0) * output_scale


@keras.saving.register_keras_serializable("lowbit")
class QuantizedRequantize(keras.layers.Layer):
    """x on another scale; in inference from 8 bits to 8 with XNNPACK's integers.

    m = rint(256 * s_in / s_out)
    y = floor((code * m + 128) / 256) * s_out      code less its zero point
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.input_quantizer = self.output_quantizer = _no_quantizer

    def call(self, x, training=None):
        before, after = self.input_quantizer(), self.output_quantizer()
        scale, output_scale = _scale_of(before), _scale_of(after)
        if training or None in (scale, output_scale) or {before.spec.bits, after.spec.bits} != {8}:
            return ops.copy(x)
        multiplier = ops.round(256.0 * (scale / output_scale))
        return ops.floor((ops.round(x / scale) * multiplier + 128.0) / 256.0) * output_scale


@keras.saving.register_keras_serializable("lowbit")
class QuantizedBilinear(keras.layers.Layer):
    """Images (n, h, w, c) resized bilinearly, pixels' centres at 1/2, as Keras and TensorFlow do.

    In inference behind a quantizer with XNNPACK's integers: weights of 11 bits, see
    `kernels.resizing.resize_bilinear`.

    Args:
      size: (height, width) of the output.
    """

    def __init__(self, size, **kwargs):
        super().__init__(**kwargs)
        self.size = tuple(size)
        self.input_quantizer = self.output_quantizer = _no_quantizer

    def call(self, x, training=None):
        quantizer = self.input_quantizer()
        if training or _scale_of(quantizer) is None or quantizer.spec.bits > 8:
            return ops.image.resize(x, self.size, "bilinear")
        scale, zero_point = fakequant.scale_and_zero_point(*quantizer.range(), quantizer.spec)
        codes = ops.cast(ops.round(x / scale + zero_point), "int32")
        for axis, wanted in zip((1, 2), self.size, strict=True):
            first, second, weight = resizing.places_in_float(x.shape[axis], wanted)
            weight = weight.astype(np.int32).reshape([-1 if i == axis else 1 for i in range(4)])
            low, high = (ops.take(codes, index, axis=axis) for index in (first, second))
            codes = low * 2048 + (high - low) * weight
        codes = ops.right_shift(codes + 2**21, 22)
        return (ops.cast(codes, "float32") - zero_point) * scale

    def compute_output_shape(self, input_shape):
        return (input_shape[0], *self.size, input_shape[-1])

    def get_config(self):
        return super().get_config() | {"size": self.size}


@keras.saving.register_keras_serializable("lowbit")
class InFloat(keras.layers.Layer):
    """A layer that no integer kernel computes: it stays in float, between quantizers.

    Args:
      layer: a Keras layer with one output.
      separate: whether it takes its tensors as arguments of their own, not as a list.
      keywords: further arguments of its call.
    """

    def __init__(self, layer, separate=False, keywords=None, **kwargs):
        super().__init__(**kwargs)
        self.layer, self.separate, self.keywords = layer, bool(separate), dict(keywords or {})

    def build(self, input_shape):
        if not self.layer.built and not self.separate:
            self.layer.build(input_shape)

    def call(self, inputs, training=None):
        # Keras hands `training` on to a layer whose call takes it.
        arguments = inputs if self.separate else [inputs]
        return self.layer(*arguments, **self.keywords)

    def get_config(self):
        layer = keras.saving.serialize_keras_object(self.layer)
        return super().get_config() | {
            "layer": layer,
            "separate": self.separate,
            "keywords": self.keywords,
        }

    @classmethod
    def from_config(cls, config):
        layer = keras.saving.deserialize_keras_object(config["layer"])
        return cls(**config | {"layer": layer})


ARITHMETIC = (QuantizedAdd, QuantizedSubtract, QuantizedMultiply)
_WITH_QUANTIZERS = (
    *(_TwoInputs, QuantizedMean, QuantizedLeakyReLU, QuantizedBilinear, QuantizedRequantize),
    QuantizedPReLU,
)
WEIGHTED = (QuantizedConv2D, QuantizedDepthwiseConv2D, QuantizedConv2DTranspose, QuantizedDense)


@keras.saving.register_keras_serializable("lowbit")
class QuantizedModel(keras.Model):
    """A functional model whose layers know the scales of their inputs and their output.

    A layer that is called on tensors of different scales has none, and computes in floats.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for layer in weighted_layers(self):
            nodes = layer._inbound_nodes
            before = {
                quantizers.quantizer_before(node.arguments.keras_tensors[0]) for node in nodes
            }
            after = {quantizers.quantizer_after(node.outputs[0]) for node in nodes}
            layer.input_quantizer = _one_of(before)
            layer.output_quantizer = _one_of(after)
        for layer in self.layers:
            if isinstance(layer, _WITH_QUANTIZERS) and len(layer._inbound_nodes) == 1:
                (node,) = layer._inbound_nodes
                before = [quantizers.quantizer_before(t) for t in node.arguments.keras_tensors]
                layer.output_quantizer = _one_of({quantizers.quantizer_after(node.outputs[0])})
                if isinstance(layer, _TwoInputs):
                    layer.input_quantizers = _all_of(before)
                else:
                    layer.input_quantizer = _one_of(set(before))


def _no_quantizer():
    return None


def _one_of(found: set):
    """Returns a function that returns the one quantizer found, or None."""
    quantizer = found.pop() if len(found) == 1 else None
    return lambda: quantizer


def _all_of(found: list):
    """Returns a function that returns the quantizers found."""
    return lambda: found


def _scale_of(quantizer):
    """Returns the float32 scale of a quantizer that is switched on, else None."""
    if quantizer is None or quantizer.spec is None or not quantizer.enabled:
        return None
    return ops.stop_gradient(fakequant.scale_and_zero_point(*quantizer.range(), quantizer.spec)[0])


def weighted_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """Returns the model's quantized layers with weights, each once, in the order of the model."""
    return [layer for layer in model.layers if isinstance(layer, WEIGHTED)]


def rebuilt(model: keras.Model, change: Callable[[keras.layers.Layer], dict]) -> keras.Model:
    """Returns a model of the same layers with other settings, and the same values of variables.

    Args:
      model: functional.
      change: from a layer to the entries of its configuration that become others.
    """
    config = model.get_config()
    changes = {layer.name: change(layer) for layer in model.layers}
    for entry in config["layers"]:
        entry["config"] |= changes[entry["config"]["name"]]
    made = type(model).from_config(config)
    for layer in model.layers:
        if isinstance(layer, InFloat):  # sublayers' variables share their names
            made.get_layer(layer.name).set_weights(layer.get_weights())
            continue
        values = {variable.name: variable for variable in layer.variables}
        for variable in made.get_layer(layer.name).variables:
            if variable.name in values and variable.shape == values[variable.name].shape:
                variable.assign(values[variable.name])
    return made


@contextlib.contextmanager
def in_float(model: keras.Model):
    """Within it the model computes in float: weights and activations are not quantized."""
    switches = [(layer, "enabled") for layer in quantizers.activation_quantizers(model)]
    switches += [(layer, "weights_enabled") for layer in weighted_layers(model)]
    before = [getattr(layer, switch) for layer, switch in switches]
    try:
        for layer, switch in switches:
            setattr(layer, switch, False)
        yield model
    finally:
        for (layer, switch), value in zip(switches, before, strict=True):
            setattr(layer, switch, value)
