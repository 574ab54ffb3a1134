"""Lowering: a quantized Keras model becomes the frozen integer graph.

An operation that computes new values waits for the ActivationQuantizer behind it, which gives its
output's scale, zero point and fused activation; one that moves values keeps its input's.

Activations of fewer than 8 bits lie in int8 as well, where a kernel clamps them to their codes: RELU6
with a scale of 6 / steps does.  A range [0, c] behind a ReLU is measured in another unit for that,

    scale' = 6 / steps      unit = scale' / scale      weight scale' = weight scale * unit_out / unit_in

with the same codes and, but for the last bit, the same multipliers.
"""

import dataclasses
from collections.abc import Callable

import keras
import numpy as np

from lowbit import affine, functional, integer_graph, kernels, layers, quantizers
from lowbit.functional import UnsupportedModelError

# XNNPACK refuses a whole model with a multiplier s_in * s_w / s_out of 256 or more in any channel;
# below 2**-32 TFLite's 32-bit fixed point multiplier is zero.
MULTIPLIER_LIMIT = 256.0
SMALLEST_MULTIPLIER = 2.0**-32


@dataclasses.dataclass(frozen=True)
class _Pending:
    """An operation whose output's scale is not known yet; `finish` adds its node."""

    finish: Callable[[integer_graph.Tensor, str | None], None]
    unit: float | None = None  # of its output; None: any, its weights make up for it


class _Builder:
    """The tensors and nodes made so far."""

    def __init__(self):
        self.tensors: dict[str, integer_graph.Tensor] = {}
        self.nodes: list[integer_graph.Node] = []

    def add(self, tensor: integer_graph.Tensor) -> integer_graph.Tensor:
        if tensor.name in self.tensors:
            raise UnsupportedModelError(f"two tensors are named {tensor.name!r}; rename a layer")
        self.tensors[tensor.name] = tensor
        return tensor

    def constant(self, name, data, scale=None, axis=None) -> str:
        quantization = None
        if scale is not None:
            scale = np.atleast_1d(scale).astype(np.float32)
            zero_point = np.zeros(scale.shape, np.int64)
            quantization = integer_graph.Quantization(scale, zero_point, axis)
        tensor = integer_graph.Tensor(name, data.shape, str(data.dtype), quantization, data)
        return self.add(tensor).name

    def node(self, op, name, inputs, output, **attributes) -> None:
        node = integer_graph.Node(op, name, tuple(inputs), (output.name,), attributes)
        self.nodes.append(node)


def lower(model: keras.Model, description: str = "") -> integer_graph.IntegerGraph:
    """Returns the integer graph of a model that `placement` made and calibration gave ranges.

    Activations are int8 with batch size 1.

    Raises:
      UnsupportedModelError: names the layer and what keeps it from integer kernels.
    """
    trace = functional.trace(model)
    builder = _Builder()
    values: dict[int, integer_graph.Tensor | _Pending] = {}
    inputs: list[str] = []
    for value in trace.inputs:
        values[value] = _Pending(lambda made, activation: inputs.append(made.name))
    for call in trace.calls:
        arguments = [values[value] for value in call.inputs]
        shape = (1, *trace.shapes[call.output][1:])
        if isinstance(call.layer, quantizers.ActivationQuantizer):
            values[call.output] = _finish(builder, call, arguments[0], shape)
            continue
        lower_one = LOWERINGS.get(type(call.layer))
        if lower_one is None:
            raise UnsupportedModelError(
                f"layer {call.name} ({type(call.layer).__name__}) has no integer form: is this a "
                "model that ptq.quantize or qat.train saved?"
            )
        if any(isinstance(argument, _Pending) for argument in arguments):
            raise UnsupportedModelError(f"layer {call.name} takes a value that is not quantized")
        values[call.output] = lower_one(builder, call, arguments, shape)
    outputs = []
    for value in trace.outputs:
        if not isinstance(values[value], integer_graph.Tensor):
            raise UnsupportedModelError(f"output {len(outputs)} of {model.name} is not quantized")
        _in_network_units(values[value], f"output {len(outputs)} of {model.name}")
        outputs.append(values[value].name)
    return integer_graph.IntegerGraph(
        builder.tensors, tuple(builder.nodes), tuple(inputs), tuple(outputs), "main", description
    )


def _activation_tensor(name, shape, scale, zero_point, unit=1.0):
    quantization = integer_graph.Quantization(
        np.asarray([scale], np.float32), np.asarray([zero_point], np.int64)
    )
    return integer_graph.Tensor(name, tuple(shape), "int8", quantization, unit=unit)


def _in_network_units(tensor, reader):
    """Refuses a tensor in other units than the network's where `reader` has no weights to scale."""
    if tensor.unit != 1:
        raise UnsupportedModelError(
            f"{reader} reads {tensor.name}, whose few bits need a unit of their own: give that layer 8 "
            f"bits (--override={tensor.name}=w8a8); as it is it can be simulated only"
        )


def _finish(builder, call, argument, shape):
    if call.keywords.get("slot", 0) is None or isinstance(argument, integer_graph.Tensor):
        return argument  # quantized before, by the same range
    spec = call.layer.spec
    if spec is None or spec.bits > 8:
        raise UnsupportedModelError(
            f"quantizer {call.layer.name} leaves "
            f"{'float' if spec is None else f'{spec.bits}-bit'} activations; export takes those of 8 "
            "bits (schemes w8a8, w4a8 and the like) and, behind a ReLU, fewer; this scheme can be "
            "simulated only"
        )
    scale, zero_point = call.layer.scale_and_zero_point()
    label = call.keywords.get("label") or call.layer.name
    activation, unit = call.keywords.get("activation"), argument.unit
    if spec.bits < 8:
        activation, unit = _clamp(label, spec, scale, int(zero_point), activation, unit)
    unit = 1.0 if unit is None else unit
    tensor = _activation_tensor(label, shape, np.float64(scale) * unit, int(zero_point), unit)
    builder.add(tensor)
    argument.finish(tensor, activation)
    return tensor


def _clamp(label, spec, scale, zero_point, activation, unit):
    """Returns the activation function whose clamp leaves the codes of `spec`, and the unit it needs.

    Raises:
      UnsupportedModelError: where there is none.
    """
    lowest, highest = affine.integer_bounds(spec)
    if activation is None:
        raise UnsupportedModelError(
            f"layer {label} leaves {spec.bits}-bit activations with no ReLU behind it; int8 kernels "
            f"would use all their 8 bits: give it those (--override={label}=w8a8, or --ends and "
            "--additions), as it is it can be simulated only"
        )
    if activation == "relu6" and unit in (None, 1.0) and zero_point + np.rint(6 / scale) <= highest:
        return activation, 1.0
    if unit is not None:  # of an addition: what it reads decides
        raise UnsupportedModelError(
            f"layer {label} leaves {spec.bits}-bit activations, but has no weights that could scale "
            "them to a clamp at 6; give it 8 bits (--additions=w8a8), as it is it can be simulated only"
        )
    clamped = affine.round_scale(np.float32(6 / (highest - zero_point)))
    return "relu6", float(np.float64(clamped) / np.float64(scale))


# --- operations that compute new values ---------------------------------------------------------


def _lower_weighted(op):
    """Returns the lowering of a layer with a kernel: int8 weights, int32 bias."""

    def lower_layer(builder, call, arguments, shape):
        del shape
        (tensor,) = arguments

        def finish(output, activation):
            layer = call.layer
            weights, weight_scale, bias, bias_scale = integer_weights(
                layer, tensor.network_scale, output.network_scale
            )
            if (tensor.unit, output.unit) != (1.0, 1.0):
                weight_scale = np.float32(weight_scale * (output.unit / tensor.unit))
                bias_scale = tensor.scale * weight_scale
            axis = None
            if weight_scale.size > 1:
                axis = 3 if op == "DEPTHWISE_CONV_2D" else 0
            inputs = [
                tensor.name,
                builder.constant(f"{call.name}/kernel", weights, weight_scale, axis),
                builder.constant(
                    f"{call.name}/bias", bias, bias_scale, 0 if bias_scale.size > 1 else None
                ),
            ]
            attributes = {"activation": _ACTIVATION_NAMES[activation]}
            if op == "FULLY_CONNECTED":
                attributes["keep_num_dims"] = len(output.shape) > 2
            else:
                attributes["strides"] = tuple(layer.strides)
                attributes["dilations"] = tuple(layer.dilation_rate)
                attributes["padding"] = layer.padding.upper()
            if op == "DEPTHWISE_CONV_2D":
                attributes["depth_multiplier"] = layer.depth_multiplier
            builder.node(op, call.name, inputs, output, **attributes)

        return _Pending(finish)

    return lower_layer


_ACTIVATION_NAMES = {None: None, "relu": "RELU", "relu6": "RELU6"}


def integer_weights(
    layer: keras.layers.Layer, input_scale: np.float32, output_scale: np.float32
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns what a weighted layer computes with, in TFLite's layout.

    Returns:
      weights int8: (out, h, w, in), (1, h, w, in * multiplier) or (out, in);
      their scale float32, (out,) or (1,);
      bias int32 (out,) and its scale, input_scale * weight scale.

    Raises:
      UnsupportedModelError: for weights that no kernel takes, or a multiplier of 256 and more.
    """
    spec = layer.weight_spec
    if spec is None or not spec.symmetric or spec.bits > 8:
        raise UnsupportedModelError(
            f"layer {layer.name} has weights {spec}; export takes symmetric ones of up to 8 bits, "
            "this scheme can be simulated only"
        )
    kernel, bias = (keras.ops.convert_to_numpy(array) for array in layer.folded())
    if not (np.isfinite(kernel).all() and np.isfinite(bias).all()):
        raise UnsupportedModelError(f"layer {layer.name}: weights or bias hold NaN or infinity")
    flat = kernel.reshape(-1, layer.output_channels())
    per_channel = spec.axis is not None
    flat_spec = dataclasses.replace(spec, axis=1 if per_channel else None)
    scale, zero_point = layer.numpy_scale(kernel)
    # A dead channel's scale grows until its bias and its multiplier fit in 32 bits.
    floor = affine.minimum_weight_scale(bias, input_scale)
    smallest = affine.round_scale(np.float32(2 * SMALLEST_MULTIPLIER * output_scale / input_scale))
    floor = np.maximum(floor, smallest)
    scale = np.maximum(scale, floor if per_channel else floor.max())
    multiplier = float(input_scale) * scale.astype(np.float64) / float(output_scale)
    if multiplier.max() >= MULTIPLIER_LIMIT:
        channel = int(multiplier.argmax())
        raise UnsupportedModelError(
            f"layer {layer.name}, channel {channel}: requantization multiplier "
            f"{multiplier[channel]:.4g} is not below {MULTIPLIER_LIMIT:g} (scales: input "
            f"{input_scale:.4g}, weights {scale[channel]:.4g}, output {output_scale:.4g}); its "
            "output range is far too narrow for its weights: calibrate on more images"
        )
    codes = affine.quantize(flat, scale, zero_point, flat_spec).astype(np.int8)
    codes = codes.reshape(kernel.shape)
    if isinstance(layer, layers.QuantizedDepthwiseConv2D):
        codes = codes.reshape(1, *kernel.shape[:2], -1)
    else:
        codes = np.ascontiguousarray(np.moveaxis(codes, -1, 0))
    bias_codes, bias_scale = affine.quantize_bias(bias, input_scale, scale)
    return codes, scale, bias_codes, bias_scale


def _lower_arithmetic(op):
    """Returns the lowering of a sum, difference or product of two tensors."""

    def lower_layer(builder, call, arguments, shape):
        del shape
        if len(arguments) != 2:
            raise UnsupportedModelError(
                f"layer {call.name} takes {len(arguments)} tensors; TFLite's integer {op} takes 2"
            )
        unit, other = (tensor.unit for tensor in arguments)
        if unit != other or op == "MUL":
            foreign = max(arguments, key=lambda tensor: tensor.unit != 1)
            _in_network_units(foreign, f"layer {call.name}")

        def finish(output, activation):
            names = [tensor.name for tensor in arguments]
            builder.node(op, call.name, names, output, activation=_ACTIVATION_NAMES[activation])

        return _Pending(finish, unit)

    return lower_layer


def _lower_mean(builder, call, arguments, shape):
    del shape

    def finish(output, activation):
        del activation
        axes = builder.constant(f"{call.name}/axes", np.array([1, 2], np.int32))
        inputs = [arguments[0].name, axes]
        builder.node("MEAN", call.name, inputs, output, keep_dims=bool(call.layer.keepdims))

    return _Pending(finish, arguments[0].unit)


def _lower_softmax(builder, call, arguments, shape):
    del shape
    _in_network_units(arguments[0], f"layer {call.name}")

    def finish(output, activation):
        del activation
        builder.node("SOFTMAX", call.name, [arguments[0].name], output, beta=1.0)

    return _Pending(finish)


def _lower_function(builder, call, arguments, shape):
    del shape
    _in_network_units(arguments[0], f"layer {call.name}")

    def finish(output, activation):
        del activation
        op, attributes = _FUNCTION_NAMES[call.layer.activation.__name__]
        builder.node(op, call.name, [arguments[0].name], output, **attributes)

    return _Pending(finish)


_FUNCTION_NAMES = {
    "sigmoid": ("LOGISTIC", {}),
    "tanh": ("TANH", {}),
    "gelu": ("GELU", {"approximate": False}),
}


def _lower_leaky_relu(builder, call, arguments, shape):
    del shape
    _in_network_units(arguments[0], f"layer {call.name}")

    def finish(output, activation):
        del activation
        alpha = float(np.float32(call.layer.negative_slope))
        builder.node("LEAKY_RELU", call.name, [arguments[0].name], output, alpha=alpha)

    return _Pending(finish)


def _lower_requantize(builder, call, arguments, shape):
    """A copy in fewer bits: `_finish` refuses those; in 8 bits nothing makes one."""
    del builder, arguments, shape

    def finish(output, activation):
        raise UnsupportedModelError(
            f"layer {call.name} quantizes a tensor a second time; that can be simulated only"
        )

    return _Pending(finish)


# --- operations that keep their input's scale ---------------------------------------------------


def _moved(builder, call, source, shape):
    """Returns the output tensor of an operation that hands on its input's codes or some of them."""
    return builder.add(
        _activation_tensor(call.name, shape, source.scale, source.zero_point, source.unit)
    )


def _lower_pool(op):
    def lower_layer(builder, call, arguments, shape):
        layer = call.layer
        output = _moved(builder, call, arguments[0], shape)
        builder.node(
            op,
            call.name,
            [arguments[0].name],
            output,
            filter=tuple(layer.pool_size),
            strides=tuple(layer.strides),
            padding=layer.padding.upper(),
            activation=None,
        )
        return output

    return lower_layer


def _lower_global_max_pool(builder, call, arguments, shape):
    (source,) = arguments
    _, height, width, channels = source.shape
    keeps = len(shape) == 4
    name = call.name if keeps else f"{call.name}_pooled"
    pooled = builder.add(
        _activation_tensor(name, (1, 1, 1, channels), source.scale, source.zero_point, source.unit)
    )
    builder.node(
        "MAX_POOL_2D",
        name,
        [source.name],
        pooled,
        filter=(height, width),
        strides=(1, 1),
        padding="VALID",
        activation=None,
    )
    return pooled if keeps else _lower_reshape(builder, call, [pooled], shape)


def _lower_selected(op):
    """Returns the lowering of a maximum or minimum of two tensors on one scale."""

    def lower_layer(builder, call, arguments, shape):
        _check_one_map(call, arguments)
        output = _moved(builder, call, arguments[0], shape)
        builder.node(op, call.name, [tensor.name for tensor in arguments], output)
        return output

    return lower_layer


def _lower_permute(builder, call, arguments, shape):
    output = _moved(builder, call, arguments[0], shape)
    order = np.array([0, *call.layer.dims], np.int32)
    inputs = [arguments[0].name, builder.constant(f"{call.name}/order", order)]
    builder.node("TRANSPOSE", call.name, inputs, output)
    return output


def _lower_upsample(builder, call, arguments, shape):
    for axis, factor in zip((1, 2), call.layer.size, strict=True):
        before = arguments[0].shape[axis]
        repeated = np.arange(before).repeat(factor)
        if (kernels.nearest(before, shape[axis]) != repeated).any():
            raise UnsupportedModelError(
                f"layer {call.name} enlarges {before} pixels to {shape[axis]}: the kernel's float32 "
                "picks others than Keras; choose another size"
            )
    output = _moved(builder, call, arguments[0], shape)
    size = builder.constant(f"{call.name}/size", np.array(shape[1:3], np.int32))
    inputs = [arguments[0].name, size]
    options = {"align_corners": False, "half_pixel_centers": False}
    builder.node("RESIZE_NEAREST_NEIGHBOR", call.name, inputs, output, **options)
    return output


def _check_one_map(call, arguments):
    scales = {(float(tensor.scale), tensor.zero_point, tensor.unit) for tensor in arguments}
    if len(scales) != 1:
        raise UnsupportedModelError(
            f"layer {call.name} joins tensors of different scale, zero point and unit {sorted(scales)}"
        )


def _lower_concatenate(builder, call, arguments, shape):
    _check_one_map(call, arguments)
    output = _moved(builder, call, arguments[0], shape)
    names = [tensor.name for tensor in arguments]
    axis = call.layer.axis % len(shape)
    builder.node("CONCATENATION", call.name, names, output, axis=axis, activation=None)
    return output


def _lower_pad(builder, call, arguments, shape):
    output = _moved(builder, call, arguments[0], shape)
    paddings = np.array([(0, 0), *call.layer.padding, (0, 0)], np.int32)
    inputs = [arguments[0].name, builder.constant(f"{call.name}/paddings", paddings)]
    builder.node("PAD", call.name, inputs, output)
    return output


def _lower_crop(builder, call, arguments, shape):
    output = _moved(builder, call, arguments[0], shape)
    (top, _), (left, _) = call.layer.cropping
    inputs = [
        arguments[0].name,
        builder.constant(f"{call.name}/begin", np.array([0, top, left, 0], np.int32)),
        builder.constant(f"{call.name}/size", np.array(shape, np.int32)),
    ]
    builder.node("SLICE", call.name, inputs, output)
    return output


def _lower_reshape(builder, call, arguments, shape):
    output = _moved(builder, call, arguments[0], shape)
    inputs = [arguments[0].name, builder.constant(f"{call.name}/shape", np.array(shape, np.int32))]
    builder.node("RESHAPE", call.name, inputs, output, new_shape=tuple(shape))
    return output


def _lower_relu(builder, call, arguments, shape):
    output = _moved(builder, call, arguments[0], shape)
    op = "RELU" if call.layer.max_value is None else "RELU6"
    if op == "RELU6":
        _in_network_units(arguments[0], f"layer {call.name}")
    builder.node(op, call.name, [arguments[0].name], output)
    return output


_L = keras.layers
# Layers that wait for a quantizer; the others keep their input's scale.
COMPUTES = (
    *(*layers.WEIGHTED, *layers.ARITHMETIC, layers.QuantizedMean),
    *(_L.Softmax, layers.QuantizedFunction, layers.QuantizedLeakyReLU),
)
LOWERINGS = {
    layers.QuantizedConv2D: _lower_weighted("CONV_2D"),
    layers.QuantizedDepthwiseConv2D: _lower_weighted("DEPTHWISE_CONV_2D"),
    layers.QuantizedDense: _lower_weighted("FULLY_CONNECTED"),
    layers.QuantizedAdd: _lower_arithmetic("ADD"),
    layers.QuantizedSubtract: _lower_arithmetic("SUB"),
    layers.QuantizedMultiply: _lower_arithmetic("MUL"),
    layers.QuantizedMean: _lower_mean,
    _L.Softmax: _lower_softmax,
    layers.QuantizedFunction: _lower_function,
    layers.QuantizedLeakyReLU: _lower_leaky_relu,
    _L.AveragePooling2D: _lower_pool("AVERAGE_POOL_2D"),
    _L.MaxPooling2D: _lower_pool("MAX_POOL_2D"),
    _L.GlobalMaxPooling2D: _lower_global_max_pool,
    _L.Maximum: _lower_selected("MAXIMUM"),
    _L.Minimum: _lower_selected("MINIMUM"),
    _L.Permute: _lower_permute,
    _L.UpSampling2D: _lower_upsample,
    _L.Concatenate: _lower_concatenate,
    _L.ZeroPadding2D: _lower_pad,
    _L.Cropping2D: _lower_crop,
    _L.Flatten: _lower_reshape,
    _L.Reshape: _lower_reshape,
    _L.ReLU: _lower_relu,
    _L.Identity: _lower_requantize,
}
