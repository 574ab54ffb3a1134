"""Lowering: a quantized Keras model becomes the frozen integer graph.

An operation that computes new values waits for the ActivationQuantizer behind it, which gives its
output's scale, zero point and fused activation; one that moves values keeps its input's.

Activations of fewer than 8 bits lie in int8 as well, where a kernel clamps them to their codes: RELU6
with a scale of 6 / steps does.  A range [0, c] behind a ReLU is measured in another unit for that,

    scale' = 6 / steps      unit = scale' / scale      weight scale' = weight scale * unit_out / unit_in

with the same codes and, but for the last bit, the same multipliers.

An operation runs in float where its output or one of its inputs has no range (schemes w8, dynamic,
float16, float32, or an override that names one of these): quantized inputs are dequantized before it,
a quantized output is quantized behind it.  Its weights are float32, float16 behind a DEQUANTIZE,
integers behind a DEQUANTIZE, or integers that the kernel itself meets with quantized activations.
"""

import dataclasses
from collections.abc import Callable

import keras
import numpy as np

from lowbit import affine, foreign, functional, integer_graph, layers, quantizers
from lowbit.functional import UnsupportedModelError
from lowbit.kernels import delegate, resizing

# XNNPACK refuses a whole model with a multiplier s_in * s_w / s_out of 256 or more in any channel;
# below 2**-32 TFLite's 32-bit fixed point multiplier is zero.
MULTIPLIER_LIMIT = 256.0
SMALLEST_MULTIPLIER = 2.0**-32


@dataclasses.dataclass(frozen=True)
class Pending:
    """An operation whose output's scale is not known yet; `finish` adds its node."""

    finish: Callable[[integer_graph.Tensor, str | None], None]
    unit: float | None = None  # of its output; None: any, its weights make up for it


@dataclasses.dataclass(frozen=True)
class Storage:
    """How a file holds weights; which scheme a layer has decides what they are."""

    packed: bool = False  # codes of 2 and 4 bits in fewer than 8, where a kernel takes them
    dynamic: bool = False  # float activations meet integer weights; else these are dequantized
    float16: bool = False  # what is not quantized


class _Builder:
    """The tensors and nodes made so far."""

    def __init__(self, storage):
        self.storage = storage
        self.tensors: dict[str, integer_graph.Tensor] = {}
        self.nodes: list[integer_graph.Node] = []

    def add(self, tensor: integer_graph.Tensor) -> integer_graph.Tensor:
        if tensor.name in self.tensors:
            raise UnsupportedModelError(f"two tensors are named {tensor.name!r}; rename a layer")
        self.tensors[tensor.name] = tensor
        return tensor

    def constant(self, name, data, scale=None, axis=None, dtype=None) -> str:
        quantization = None
        if scale is not None:
            scale = np.atleast_1d(scale).astype(np.float32)
            zero_point = np.zeros(scale.shape, np.int64)
            quantization = integer_graph.Quantization(scale, zero_point, axis)
        dtype = dtype or str(data.dtype)
        tensor = integer_graph.Tensor(name, data.shape, dtype, quantization, data)
        return self.add(tensor).name

    def node(self, op, name, inputs, output, **attributes) -> None:
        """Adds an operation; in float, with conversions around it, where not all is quantized."""
        if "float32" in (output.dtype, *(self.tensors[each].dtype for each in inputs)):
            inputs = [self._as_float(self.tensors[each]).name for each in inputs]
            if output.quantization is not None:
                real = self.add(_float_tensor(f"{output.name}_unquantized", output.shape))
                self._append(op, name, inputs, real, attributes)
                self._append("QUANTIZE", f"{name}_quantize", [real.name], output, {})
                return
        self._append(op, name, inputs, output, attributes)

    def splice(self, fragment, name, sources, output) -> None:
        """Adds the nodes of a float graph between activations; its names get `name/` in front."""
        real = output
        if output.quantization is not None:
            real = self.add(_float_tensor(f"{output.name}_unquantized", output.shape))
        names = {key: f"{name}/{key}" for key in fragment.tensors}
        names |= zip(fragment.inputs, (self._as_float(t).name for t in sources), strict=True)
        (last,) = fragment.outputs
        if not fragment.nodes:  # the layer hands its input on
            real = self.tensors[names[last]]
        names[last] = real.name
        for key, tensor in fragment.tensors.items():
            if names[key] not in self.tensors:
                self.add(dataclasses.replace(tensor, name=names[key]))
        for node in fragment.nodes:
            inputs, outputs = (
                tuple(names[key] for key in keys) for keys in (node.inputs, node.outputs)
            )
            renamed = dataclasses.replace(node, name=outputs[0], inputs=inputs, outputs=outputs)
            self.nodes.append(renamed)
        if output.quantization is not None:
            self._append("QUANTIZE", f"{name}_quantize", [real.name], output, {})

    def convert(self, op, name, source, output) -> None:
        """Adds a QUANTIZE or DEQUANTIZE."""
        self._append(op, name, [source.name], output, {})

    def _append(self, op, name, inputs, output, attributes):
        node = integer_graph.Node(op, name, tuple(inputs), (output.name,), attributes)
        self.nodes.append(node)

    def _as_float(self, tensor):
        """Returns an activation dequantized, once for all who read it; anything else as it is."""
        if tensor.data is not None or tensor.quantization is None:
            return tensor
        _in_network_units(tensor, "a float operation")
        name = f"{tensor.name}_real"
        if name not in self.tensors:
            self.dequantized(tensor.name)
        return self.tensors[name]

    def dequantized(self, name) -> str:
        """Returns the name of a tensor as float32, behind a DEQUANTIZE."""
        output = self.add(_float_tensor(f"{name}_real", self.tensors[name].shape))
        self._append("DEQUANTIZE", f"{name}_dequantize", [name], output, {})
        return output.name


def lower(
    model: keras.Model, description: str = "", storage: Storage | None = None
) -> integer_graph.IntegerGraph:
    """Returns the integer graph of a model that `placement` made and calibration gave ranges.

    Activations are int8, int16 or float32, each as its quantizer says, with batch size 1.

    Args:
      storage: how weights are held; None: codes in int8, floats in float32.

    Raises:
      UnsupportedModelError: names the layer and what keeps it from integer kernels.
    """
    trace = functional.trace(model)
    builder = _Builder(storage or Storage())
    values: dict[int, integer_graph.Tensor | Pending] = {}
    inputs: list[str] = []
    for value in trace.inputs:
        values[value] = Pending(lambda made, activation: inputs.append(made.name))
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
        if any(isinstance(argument, Pending) for argument in arguments):
            raise UnsupportedModelError(f"layer {call.name} takes a value that is not quantized")
        values[call.output] = lower_one(builder, call, arguments, shape)
    outputs = []
    for value in trace.outputs:
        if not isinstance(values[value], integer_graph.Tensor):
            raise UnsupportedModelError(f"output {len(outputs)} of {model.name} is not quantized")
        _in_network_units(values[value], f"output {len(outputs)} of {model.name}")
        outputs.append(values[value].name)
    graph = integer_graph.IntegerGraph(
        builder.tensors, tuple(builder.nodes), tuple(inputs), tuple(outputs), "main", description
    )
    for node in graph.nodes:
        if "int16" in (graph.tensors[name].dtype for name in (*node.inputs, *node.outputs)):
            kernel, reason = delegate.placement_of(graph, node)
            if kernel == "refused":
                raise UnsupportedModelError(f"layer {node.name}: {reason}")
    return graph


def _activation_tensor(name, shape, dtype, scale, zero_point, unit=1.0):
    quantization = integer_graph.Quantization(
        np.asarray([scale], np.float32), np.asarray([zero_point], np.int64)
    )
    return integer_graph.Tensor(name, tuple(shape), dtype, quantization, unit=unit)


def _float_tensor(name, shape):
    return integer_graph.Tensor(name, tuple(shape), "float32")


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
    label = call.keywords.get("label") or call.layer.name
    if spec is None:
        tensor = builder.add(_float_tensor(label, shape))
        argument.finish(tensor, call.keywords.get("activation"))
        return tensor
    if spec.bits not in (*range(2, 9), 16):
        raise UnsupportedModelError(
            f"quantizer {call.layer.name} leaves {spec.bits}-bit activations; kernels take 8 and 16 "
            "bits and, behind a ReLU, fewer than 8"
        )
    scale, zero_point = call.layer.scale_and_zero_point()
    activation, unit = call.keywords.get("activation"), argument.unit
    if spec.bits < 8:
        activation, unit = _clamp(label, spec, scale, int(zero_point), activation, unit)
    unit = 1.0 if unit is None else unit
    dtype = "int16" if spec.bits == 16 else "int8"
    tensor = _activation_tensor(
        label, shape, dtype, np.float64(scale) * unit, int(zero_point), unit
    )
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
            if None in (tensor.quantization, output.quantization) or layer.weight_spec is None:
                constants = _float_constants(builder, call, op)
            else:
                constants = _integer_constants(builder, call, op, tensor, output)
            inputs = [tensor.name, *constants]
            if op == "TRANSPOSE_CONV":
                size = builder.constant(f"{call.name}/shape", np.array(output.shape, np.int32))
                inputs = [size, constants[0], tensor.name, constants[1]]
            attributes = {"activation": _ACTIVATION_NAMES[activation]}
            if op == "FULLY_CONNECTED":
                attributes["keep_num_dims"] = len(output.shape) > 2
            else:
                attributes["strides"] = tuple(layer.strides)
                attributes["padding"] = layer.padding.upper()
            if op in ("CONV_2D", "DEPTHWISE_CONV_2D"):
                attributes["dilations"] = tuple(layer.dilation_rate)
            if op == "DEPTHWISE_CONV_2D":
                attributes["depth_multiplier"] = layer.depth_multiplier
            if activation == "unit" and output.quantization is None:
                clipped = output
                output = builder.add(_float_tensor(f"{output.name}_unclipped", output.shape))
                builder.node(op, call.name, inputs, output, **attributes)
                builder.node("RELU_0_TO_1", f"{call.name}_clip", [output.name], clipped)
                return
            builder.node(op, call.name, inputs, output, **attributes)

        return Pending(finish)

    return lower_layer


def _integer_constants(builder, call, op, tensor, output):
    """Adds the integer weights and bias between two quantized tensors; returns their names."""
    layer = call.layer
    weights, weight_scale, bias, bias_scale = integer_weights(
        layer, tensor.network_scale, output.network_scale
    )
    if (tensor.unit, output.unit) != (1.0, 1.0):
        weight_scale = np.float32(weight_scale * (output.unit / tensor.unit))
        bias_scale = tensor.scale * weight_scale
    dtype = _weight_dtype(builder.storage, layer, op, tensor.dtype)
    bias_axis = 0 if bias_scale.size > 1 else None
    return (
        _weight_constant(builder, call, op, weights, weight_scale, dtype),
        builder.constant(f"{call.name}/bias", bias, bias_scale, bias_axis),
    )


def _float_constants(builder, call, op):
    """Adds weights and bias of an operation in float; returns their names."""
    layer, storage = call.layer, builder.storage
    kernel, bias = (keras.ops.convert_to_numpy(array) for array in layer.folded())
    _check_finite(layer, kernel, bias)
    if layer.weight_spec is not None:
        _check_weight_spec(layer)
        scale, zero_point = layer.numpy_scale(kernel)
        codes = _weight_codes(layer, kernel, scale, zero_point)
        dtype = _weight_dtype(storage, layer, op, "float32")
        weights = _weight_constant(builder, call, op, codes, scale, dtype)
        if not storage.dynamic:
            weights = builder.dequantized(weights)
        return weights, builder.constant(f"{call.name}/bias", bias.astype(np.float32))
    constants = {"kernel": _in_tflite_layout(layer, kernel), "bias": bias}
    if not storage.float16:
        return [
            builder.constant(f"{call.name}/{key}", value.astype(np.float32))
            for key, value in constants.items()
        ]
    for key, value in constants.items():
        largest = float(np.abs(value).max(initial=0))
        if largest > float(np.finfo(np.float16).max):
            raise UnsupportedModelError(
                f"layer {layer.name}: its {key} holds {largest:.4g}, float16 ends at 65504"
            )
    return [
        builder.dequantized(builder.constant(f"{call.name}/{key}", value.astype(np.float16)))
        for key, value in constants.items()
    ]


def _weight_constant(builder, call, op, codes, scale, dtype):
    axis = None
    if scale.size > 1:
        axis = 3 if op == "DEPTHWISE_CONV_2D" else 0
    return builder.constant(f"{call.name}/kernel", codes, scale, axis, dtype)


def _weight_dtype(storage, layer, op, input_dtype):
    """Returns the dtype that holds the codes of a layer's weights.

    Raises:
      UnsupportedModelError: where the kernel for packed codes is wrong.
    """
    bits = layer.weight_spec.bits
    if not storage.packed or bits > 4 or op == "TRANSPOSE_CONV":  # whose kernels take int8 alone
        return "int8"
    if op == "DEPTHWISE_CONV_2D" and input_dtype == "int16":
        raise UnsupportedModelError(
            f"layer {layer.name}: the depthwise kernel computes wrongly with packed 4-bit weights and "
            "16-bit activations; use --weight_storage=int8, which holds the same codes"
        )
    # The kernels' rows of 2-bit weights are whole bytes.
    if bits == 2 and op == "FULLY_CONNECTED" and layer.kernel.shape[0] % 4 == 0:
        return "int2"
    return "int4"


# The codes of a quantizer behind "unit" end at 1: saturation clips there.
_ACTIVATION_NAMES = {None: None, "relu": "RELU", "relu6": "RELU6", "unit": "RELU"}


def integer_weights(
    layer: keras.layers.Layer, input_scale: np.float32, output_scale: np.float32
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns what a weighted layer between two quantized tensors computes with, in TFLite's layout.

    Returns:
      weights int8: (out, h, w, in), (1, h, w, in * multiplier) or (out, in);
      their scale float32, (out,) or (1,);
      bias int32 (int64 beside 16-bit activations) (out,) and its scale, input_scale * weight scale.

    Raises:
      UnsupportedModelError: for weights that no kernel takes, or a multiplier of 256 and more.
    """
    _check_weight_spec(layer)
    kernel, bias = (keras.ops.convert_to_numpy(array) for array in layer.folded())
    _check_finite(layer, kernel, bias)
    scale, zero_point = layer.numpy_scale(kernel)
    # A dead channel's scale grows until its bias and its multiplier fit in 32 bits.
    input_bits = layer.input_bits()
    floor = affine.minimum_weight_scale(bias, input_scale, input_bits)
    smallest = affine.round_scale(np.float32(2 * SMALLEST_MULTIPLIER * output_scale / input_scale))
    floor = np.maximum(floor, smallest)
    scale = np.maximum(scale, floor if scale.size > 1 else floor.max())
    multiplier = float(input_scale) * scale.astype(np.float64) / float(output_scale)
    if multiplier.max() >= MULTIPLIER_LIMIT:
        channel = int(multiplier.argmax())
        raise UnsupportedModelError(
            f"layer {layer.name}, channel {channel}: requantization multiplier "
            f"{multiplier[channel]:.4g} is not below {MULTIPLIER_LIMIT:g} (scales: input "
            f"{input_scale:.4g}, weights {scale[channel]:.4g}, output {output_scale:.4g}); its "
            "output range is far too narrow for its weights: calibrate on more images"
        )
    codes = _weight_codes(layer, kernel, scale, zero_point)
    bias_dtype = "int64" if input_bits > 8 else "int32"
    bias_codes, bias_scale = affine.quantize_bias(bias, input_scale, scale, bias_dtype)
    return codes, scale, bias_codes, bias_scale


def _check_weight_spec(layer):
    spec = layer.weight_spec
    if spec is None or not spec.symmetric or spec.bits > 8:
        raise UnsupportedModelError(
            f"layer {layer.name} has weights {spec}; export takes symmetric ones of up to 8 bits, "
            "this scheme can be simulated only"
        )


def _check_finite(layer, kernel, bias):
    if not (np.isfinite(kernel).all() and np.isfinite(bias).all()):
        raise UnsupportedModelError(f"layer {layer.name}: weights or bias hold NaN or infinity")


def _weight_codes(layer, kernel, scale, zero_point):
    """Returns a folded kernel's codes, int8, in TFLite's layout."""
    spec = dataclasses.replace(
        layer.weight_spec, axis=None if layer.weight_spec.axis is None else 1
    )
    flat = kernel.reshape(-1, layer.output_channels())
    codes = affine.quantize(flat, scale, zero_point, spec).astype(np.int8)
    return _in_tflite_layout(layer, codes.reshape(kernel.shape))


def _in_tflite_layout(layer, kernel):
    if isinstance(layer, layers.QuantizedDepthwiseConv2D):
        return kernel.reshape(1, *kernel.shape[:2], -1)
    return np.ascontiguousarray(np.moveaxis(kernel, -1, 0))


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

        return Pending(finish, unit)

    return lower_layer


def _lower_mean(builder, call, arguments, shape):
    del shape

    def finish(output, activation):
        del activation
        axes = builder.constant(f"{call.name}/axes", np.array(call.layer.axes, np.int32))
        inputs = [arguments[0].name, axes]
        builder.node("MEAN", call.name, inputs, output, keep_dims=bool(call.layer.keepdims))

    return Pending(finish, arguments[0].unit)


def _lower_function(node_of):
    """Returns the lowering of a function of one tensor.

    Args:
      node_of: layer to (operation, attributes).
    """

    def lower_layer(builder, call, arguments, shape):
        del shape
        (source,) = arguments
        _in_network_units(source, f"layer {call.name}")
        op, attributes = node_of(call.layer)

        def finish(output, activation):
            del activation
            builder.node(op, call.name, [source.name], output, **attributes)

        return Pending(finish)

    return lower_layer


_FUNCTION_NAMES = {
    "sigmoid": ("LOGISTIC", {}),
    "tanh": ("TANH", {}),
    "gelu": ("GELU", {"approximate": False}),
    "elu": ("ELU", {}),
}


def _lower_rsqrt(builder, call, arguments, shape):
    (source,) = arguments
    if source.dtype == "int8" and source.zero_point > np.iinfo(np.int8).min:
        raise UnsupportedModelError(
            f"layer {call.name} is a reciprocal root of what may be negative: zero point "
            f"{source.zero_point} of {source.name}"
        )
    return _lower_function(lambda layer: ("RSQRT", {}))(builder, call, arguments, shape)


def _lower_prelu(builder, call, arguments, shape):
    del shape
    (source,) = arguments
    _in_network_units(source, f"layer {call.name}")

    def finish(output, activation):
        del activation
        if None in (source.quantization, output.quantization):
            alpha = keras.ops.convert_to_numpy(call.layer.alpha)
            name = builder.constant(f"{call.name}/alpha", alpha.astype(np.float32))
        else:
            codes, scale = map(keras.ops.convert_to_numpy, call.layer.alpha_codes())
            name = builder.constant(f"{call.name}/alpha", codes.astype(np.int8), scale)
        builder.node("PRELU", call.name, [source.name, name], output)

    return Pending(finish)


def _lower_in_float(builder, call, arguments, shape):
    del shape
    for source in arguments:
        _in_network_units(source, f"layer {call.name}")

    def finish(output, activation):
        del activation
        fragment = foreign.converted(call.layer, [tensor.shape for tensor in arguments])
        builder.splice(fragment, call.name, arguments, output)

    return Pending(finish)


def _lower_requantize(builder, call, arguments, shape):
    """A copy on another scale; of fewer bits `_finish` refuses it."""
    del shape
    (source,) = arguments
    _in_network_units(source, f"layer {call.name}")

    def finish(output, activation):
        del activation
        if source.quantization is None and output.quantization is None:
            _reshape(builder, call.name, source, output)  # float32 has operations, but no scale
            return
        op = "DEQUANTIZE" if output.quantization is None else "QUANTIZE"
        builder.convert(op, call.name, source, output)

    return Pending(finish)


# --- operations that keep their input's scale ---------------------------------------------------


def _moved(builder, call, source, shape):
    """Returns the output tensor of an operation that hands on its input's codes or some of them."""
    return builder.add(_like(source, call.name, shape))


def _like(source, name, shape):
    """Returns an activation of another name and shape with the codes' meaning of `source`."""
    return dataclasses.replace(source, name=name, shape=tuple(shape))


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
    pooled = builder.add(_like(source, name, (1, 1, 1, channels)))
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
        if (resizing.nearest(before, shape[axis]) != repeated).any():
            raise UnsupportedModelError(
                f"layer {call.name} enlarges {before} pixels to {shape[axis]}: the kernel's float32 "
                "picks others than Keras; choose another size"
            )
    return _resized(builder, call, arguments, shape, "RESIZE_NEAREST_NEIGHBOR", False)


def _lower_bilinear(builder, call, arguments, shape):
    return _resized(builder, call, arguments, shape, "RESIZE_BILINEAR", True)


def _resized(builder, call, arguments, shape, op, half_pixel_centers):
    output = _moved(builder, call, arguments[0], shape)
    size = builder.constant(f"{call.name}/size", np.array(shape[1:3], np.int32))
    options = {"align_corners": False, "half_pixel_centers": half_pixel_centers}
    builder.node(op, call.name, [arguments[0].name, size], output, **options)
    return output


def _check_one_map(call, arguments):
    scales = {
        None
        if tensor.quantization is None
        else (float(tensor.scale), tensor.zero_point, tensor.unit)
        for tensor in arguments
    }
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


def _lower_slice(builder, call, arguments, shape):
    layer, (source,) = call.layer, arguments
    whole = (1, *layer.kept_shape())
    name = call.name if not layer.dropped else f"{call.name}_sliced"
    output = builder.add(_like(source, name, whole))
    begin, end, step = (
        np.array([first, *values], np.int32)
        for first, values in ((0, layer.begin), (1, layer.end), (1, layer.step))
    )
    op, attributes = "SLICE", {}
    parts = {"begin": begin, "size": np.array(whole, np.int32)}
    if (step != 1).any():
        op, parts = "STRIDED_SLICE", {"begin": begin, "end": end, "strides": step}
        attributes = dict.fromkeys(_STRIDED_SLICE_MASKS, 0)
    names = [builder.constant(f"{name}/{key}", value) for key, value in parts.items()]
    builder.node(op, name, [source.name, *names], output, **attributes)
    return _lower_reshape(builder, call, [output], shape) if layer.dropped else output


_STRIDED_SLICE_MASKS = tuple(
    f"{key}_mask" for key in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")
)


def _lower_blocks(builder, call, arguments, shape):
    (source,), block = arguments, call.layer.block
    if source.dtype != "int16":
        output = _moved(builder, call, source, shape)
        op = "DEPTH_TO_SPACE" if call.layer.from_channels else "SPACE_TO_DEPTH"
        builder.node(op, call.name, [source.name], output, block_size=block)
        return output
    # Those kernels take no 16-bit codes.
    rows, columns, channels = source.shape[1:]
    if call.layer.from_channels:
        split = (1, rows, columns, block, block, channels // block**2)
    else:
        split = (1, rows // block, block, columns // block, block, channels)
    order = (0, 1, 3, 2, 4, 5)
    opened, turned = (
        builder.add(_like(source, f"{call.name}_{step}", sizes))
        for step, sizes in (("opened", split), ("turned", [split[axis] for axis in order]))
    )
    _reshape(builder, opened.name, source, opened)
    orders = builder.constant(f"{turned.name}/order", np.array(order, np.int32))
    builder.node("TRANSPOSE", turned.name, [opened.name, orders], turned)
    return _lower_reshape(builder, call, [turned], shape)


def _lower_reshape(builder, call, arguments, shape):
    output = _moved(builder, call, arguments[0], shape)
    _reshape(builder, call.name, arguments[0], output)
    return output


def _reshape(builder, name, source, output):
    shape = builder.constant(f"{name}/shape", np.array(output.shape, np.int32))
    builder.node("RESHAPE", name, [source.name, shape], output, new_shape=tuple(output.shape))


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
    *(layers.QuantizedPReLU, layers.QuantizedRsqrt, layers.InFloat),
)
LOWERINGS = {
    layers.QuantizedConv2D: _lower_weighted("CONV_2D"),
    layers.QuantizedDepthwiseConv2D: _lower_weighted("DEPTHWISE_CONV_2D"),
    layers.QuantizedConv2DTranspose: _lower_weighted("TRANSPOSE_CONV"),
    layers.QuantizedDense: _lower_weighted("FULLY_CONNECTED"),
    layers.QuantizedAdd: _lower_arithmetic("ADD"),
    layers.QuantizedSubtract: _lower_arithmetic("SUB"),
    layers.QuantizedMultiply: _lower_arithmetic("MUL"),
    layers.QuantizedMean: _lower_mean,
    _L.Softmax: _lower_function(lambda layer: ("SOFTMAX", {"beta": 1.0})),
    layers.QuantizedFunction: _lower_function(
        lambda layer: _FUNCTION_NAMES[layer.activation.__name__]
    ),
    layers.QuantizedLeakyReLU: _lower_function(
        lambda layer: ("LEAKY_RELU", {"alpha": float(np.float32(layer.negative_slope))})
    ),
    layers.QuantizedPReLU: _lower_prelu,
    layers.QuantizedRsqrt: _lower_rsqrt,
    layers.InFloat: _lower_in_float,
    layers.Slice: _lower_slice,
    layers.BlocksToChannels: _lower_blocks,
    _L.AveragePooling2D: _lower_pool("AVERAGE_POOL_2D"),
    _L.MaxPooling2D: _lower_pool("MAX_POOL_2D"),
    _L.GlobalMaxPooling2D: _lower_global_max_pool,
    _L.Maximum: _lower_selected("MAXIMUM"),
    _L.Minimum: _lower_selected("MINIMUM"),
    _L.Permute: _lower_permute,
    _L.UpSampling2D: _lower_upsample,
    layers.QuantizedBilinear: _lower_bilinear,
    _L.Concatenate: _lower_concatenate,
    _L.ZeroPadding2D: _lower_pad,
    _L.Cropping2D: _lower_crop,
    _L.Flatten: _lower_reshape,
    _L.Reshape: _lower_reshape,
    _L.ReLU: _lower_relu,
    layers.QuantizedRequantize: _lower_requantize,
}
