"""Reading: the layers of a float model as operations, each by its reader in `READERS`.

`activation=`, SeparableConv2D, LayerNormalization and Dropout are resolved here; TFLite's integer
operations take two tensors, so that merges of more become chains.
"""

import dataclasses
import json

import keras
import numpy as np

from lowbit import functional, layers, quantizers
from lowbit.functional import UnsupportedModelError
from lowbit.network import Network, Operation, hard_sigmoid


def read(model: keras.Model, strict: bool = True) -> Network:
    """Returns the model's operations, with values that a dropped layer hands on replaced.

    A layer without an integer form is refused if `strict`, else an operation "in_float".
    """
    trace = functional.trace(model)
    fresh = iter(range(10**9, 2 * 10**9))  # numbers for values that no layer of the model made
    handed_on: dict[int, int] = {}
    operations: list[Operation] = []
    shapes = dict(trace.shapes)
    taken = {call.name for call in trace.calls}
    for call in trace.calls:
        inputs = tuple(handed_on.get(value, value) for value in call.inputs)
        kind = type(call.layer)
        read_one = READERS.get(kind)
        if read_one is None and kind.__module__.startswith("keras."):
            read_one = _READERS_BY_NAME.get(kind.__name__)
        if kind is quantizers.ActivationQuantizer or (read_one is None and strict):
            raise _unknown_layer(call, trace)
        _check_supported(call, trace)
        try:
            if read_one is None:
                raise _unknown_layer(call, trace)
            made = read_one(call, inputs, fresh)
        except UnsupportedModelError as error:
            if strict:
                raise
            made = [_in_float(call, inputs, str(error))]
        if not made:
            handed_on[call.output] = inputs[0]
        for operation in made:
            if operation.kind == "rescale":  # of its layer's output, or of an activation inside it
                whole = shapes[call.output]
                channels = operation.config.get("channels", whole[-1])
                shapes[operation.output] = (*whole[:-1], channels)
            operations.append(_named_apart(operation, call, taken))
    outputs = tuple(handed_on.get(value, value) for value in trace.outputs)
    return Network(dataclasses.replace(trace, shapes=shapes), tuple(operations), outputs)


def _in_float(call, inputs, reason):
    """Returns a layer as an operation that stays in float."""
    try:
        json.dumps(call.keywords)
        config = keras.saving.serialize_keras_object(call.layer)
        copy = keras.saving.deserialize_keras_object(config)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UnsupportedModelError(
            f"{reason}; nor can it stay in float: it cannot be copied ({error})"
        ) from error
    weights = dict(enumerate(call.layer.get_weights()))
    config = {"copy": copy, "separate": call.separate, "keywords": call.keywords}
    return Operation(
        "in_float",
        call.name,
        inputs,
        call.output,
        call.layer,
        weights,
        label=call.name,
        config=config,
    )


def _named_apart(operation, call, taken):
    """Returns the operation with another name and label than any layer's but its own has.

    The second sum of a layer `add` of three is `add_2`, which may be a layer of the model as well.
    """
    name = operation.name
    while name != call.name and name in taken:
        name = f"{name}_"
    taken.add(name)
    label = name if operation.label == operation.name else operation.label
    return dataclasses.replace(operation, name=name, label=label)


def _unknown_layer(call, trace):
    if isinstance(call.layer, quantizers.ActivationQuantizer):
        return UnsupportedModelError(
            f"model {trace.name} is quantized already (it has {call.name}); give the float model"
        )
    by_output = {other.output: other.name for other in trace.calls}
    before = ", ".join(by_output.get(value, "the model's input") for value in call.inputs)
    known = ", ".join(sorted(layer.__name__ for layer in READERS))
    return UnsupportedModelError(
        f"layer {call.name} ({type(call.layer).__name__}, after {before}) has no quantized form; "
        f"replace it by layers of these kinds, or take it out of the model: {known}"
    )


def _check_supported(call, trace):
    layer = call.layer
    if getattr(layer, "data_format", "channels_last") not in ("channels_last", None):
        raise UnsupportedModelError(
            f"layer {call.name} has data_format {layer.data_format!r}; TFLite kernels need "
            "'channels_last'"
        )
    if any(size is None for size in trace.shapes[call.output][1:]):
        raise UnsupportedModelError(
            f"layer {call.name} has output shape {trace.shapes[call.output]}; every size but the "
            "batch's must be known: give the model's Input a shape"
        )
    for weight in layer.weights:
        if not np.isfinite(keras.ops.convert_to_numpy(weight)).all():
            raise UnsupportedModelError(
                f"layer {call.name}: its {weight.name} holds NaN or infinity"
            )


_ACTIVATIONS = {
    keras.activations.linear: None,
    keras.activations.hard_sigmoid: "hard_sigmoid",
    keras.activations.hard_silu: "hard_silu",
    keras.activations.relu: "relu",
    keras.activations.relu6: "relu6",
    keras.activations.softmax: "softmax",
    keras.activations.sigmoid: "sigmoid",
    keras.activations.tanh: "tanh",
    keras.activations.gelu: "gelu",
    keras.activations.elu: "elu",
    keras.activations.silu: "silu",
    keras.activations.leaky_relu: "leaky_relu",
}


def _activation_name(function, layer_name) -> str | None:
    if function not in _ACTIVATIONS:
        name = getattr(function, "__name__", function)
        allowed = ", ".join(sorted(function.__name__ for function in _ACTIVATIONS))
        raise UnsupportedModelError(
            f"layer {layer_name} has activation {name!r}; allowed are {allowed}"
        )
    return _ACTIVATIONS[function]


def _activation_operations(activation, name, value, output, layer, label, fresh, **config):
    """Returns the operations of an activation function: one, or for silu two."""
    if activation in ("relu", "relu6"):
        return [
            Operation(
                "activation", name, (value,), output, layer, activation=activation, label=label
            )
        ]
    if activation in ("silu", "hard_silu"):  # x * sigmoid(x)
        function = activation.replace("silu", "sigmoid")
        gate, gate_name = next(fresh), f"{name}_{function}"
        return [
            *_activation_operations(function, gate_name, value, gate, layer, gate_name, fresh),
            Operation("multiply", name, (value, gate), output, layer, label=label),
        ]
    if activation == "hard_sigmoid":
        return [hard_sigmoid(name, value, output, layer, label)]
    if activation == "leaky_relu":
        config = {"negative_slope": 0.2} | config  # of the function's default
    return [Operation(activation, name, (value,), output, layer, label=label, config=config)]


def _with_activation(operation, layer, output, fresh):
    """Returns the operation, and after it the function of its `activation=` argument."""
    activation = _activation_name(layer.activation, operation.name)
    if activation is None:
        return [operation]
    value = next(fresh)
    name = f"{operation.name}_{activation}"
    # The last tensor is the layer's own output and bears its name; what is not fused has one before.
    fused = activation in ("relu", "relu6")
    label = operation.name if fused else f"{operation.name}_logits"
    return [
        dataclasses.replace(operation, output=value, label=label),
        *_activation_operations(activation, name, value, output, layer, operation.name, fresh),
    ]


def _read_weighted(kind, kernel="kernel"):
    def read_layer(call, inputs, fresh):
        layer = call.layer
        weights = {"kernel": keras.ops.convert_to_numpy(getattr(layer, kernel))}
        if layer.use_bias:
            weights["bias"] = keras.ops.convert_to_numpy(layer.bias)
        operation = Operation(kind, call.name, inputs, call.output, layer, weights, label=call.name)
        if kind == "conv" and layer.groups > 1 and weights["kernel"].shape[2] == 1:
            operation = _as_depthwise(operation)
        return _with_activation(operation, layer, call.output, fresh)

    return read_layer


def _as_depthwise(operation):
    """Returns a Conv2D with as many groups as input channels as the depthwise operation it is."""
    kernel, groups = operation.weights["kernel"], operation.layer.groups
    multiplier = kernel.shape[-1] // groups
    kernel = kernel.reshape(*kernel.shape[:2], groups, multiplier)
    return dataclasses.replace(
        operation,
        kind="depthwise",
        weights=operation.weights | {"kernel": kernel},
        config={"depth_multiplier": multiplier},
    )


def _read_transposed(call, inputs, fresh):
    if set(call.layer.dilation_rate) != {1}:
        raise UnsupportedModelError(
            f"layer {call.name} is a Conv2DTranspose with dilation_rate {call.layer.dilation_rate}; "
            "TFLite's takes none"
        )
    operation, *rest = _read_weighted("conv_transpose")(call, inputs, fresh)
    kernel = np.swapaxes(operation.weights["kernel"], -1, -2)  # (h, w, in, out)
    return [
        dataclasses.replace(operation, weights=operation.weights | {"kernel": kernel}),
        *rest,
    ]


def _read_conv_1d(call, inputs, fresh):
    """Reads a Conv1D over (n, t, c) as a Conv2D of height 1 between two reshapes."""
    layer, wide, made = call.layer, next(fresh), next(fresh)
    if layer.padding not in ("same", "valid"):
        raise UnsupportedModelError(
            f"layer {call.name} is a Conv1D with padding {layer.padding!r}; allowed are 'same', 'valid'"
        )
    kernel = keras.ops.convert_to_numpy(layer.kernel)[None]
    weights = {"kernel": kernel}
    if layer.use_bias:
        weights["bias"] = keras.ops.convert_to_numpy(layer.bias)
    config = {"kernel_size": (1, *layer.kernel_size), "strides": (1, *layer.strides)}
    config["dilation_rate"] = (1, *layer.dilation_rate)
    channels = kernel.shape[2] * layer.groups
    convolution = Operation(
        "conv", call.name, (wide,), made, layer, weights, label=call.name, config=config
    )

    def reshape(way, source, target, shape):
        name = f"{call.name}_{way}"
        kept = keras.layers.Reshape(shape)
        return Operation("reshape", name, (source,), target, kept, label=name, config={"way": way})

    return [
        reshape("opened", *inputs, wide, (1, -1, channels)),
        *_with_activation(convolution, layer, made, fresh),
        reshape("closed", made, call.output, (-1, layer.filters)),
    ]


def _read_separable(call, inputs, fresh):
    layer, middle = call.layer, next(fresh)
    geometry = {key: getattr(layer, key) for key in ("strides", "padding", "dilation_rate")}
    name = f"{call.name}_depthwise"
    depthwise = Operation(
        "depthwise",
        name,
        inputs,
        middle,
        layer,
        {"kernel": keras.ops.convert_to_numpy(layer.depthwise_kernel)},
        label=name,
        config=geometry
        | {"kernel_size": layer.kernel_size, "depth_multiplier": layer.depth_multiplier},
    )
    weights = {"kernel": keras.ops.convert_to_numpy(layer.pointwise_kernel)}
    if layer.use_bias:
        weights["bias"] = keras.ops.convert_to_numpy(layer.bias)
    pointwise = Operation(
        "conv",
        call.name,
        (middle,),
        call.output,
        layer,
        weights,
        label=call.name,
        config={"filters": layer.filters, "kernel_size": (1, 1)},
    )
    return [depthwise, *_with_activation(pointwise, layer, call.output, fresh)]


def _read_batch_norm(call, inputs, fresh):
    layer = call.layer
    if layer.axis not in (-1, call.rank - 1):
        raise UnsupportedModelError(
            f"layer {call.name} is a BatchNormalization over axis {layer.axis} of a {call.rank}-D "
            "tensor; allowed is the last axis alone"
        )
    count = layer.moving_mean.shape[0]
    weights = {
        "gamma": layer.gamma if layer.scale else np.ones(count, np.float32),
        "beta": layer.beta if layer.center else np.zeros(count, np.float32),
        "moving_mean": layer.moving_mean,
        "moving_variance": layer.moving_variance,
    }
    weights = {key: keras.ops.convert_to_numpy(value) for key, value in weights.items()}
    return [
        Operation("batch_norm", call.name, inputs, call.output, layer, weights, label=call.name)
    ]


def _read_relu(call, inputs, fresh):
    layer = call.layer
    maximum = None if layer.max_value is None else float(layer.max_value)
    slope = float(layer.negative_slope)
    if layer.threshold or maximum not in (None, 6.0) or (slope and maximum is not None):
        raise UnsupportedModelError(
            f"layer {call.name} is ReLU(max_value={layer.max_value}, negative_slope="
            f"{layer.negative_slope}, threshold={layer.threshold}); allowed are max_value None or 6 "
            "without slope, a slope without max_value, and no threshold"
        )
    if slope:
        return _read_function("leaky_relu", call, inputs, fresh, negative_slope=slope)
    return _read_function("relu" if maximum is None else "relu6", call, inputs, fresh)


def _read_leaky_relu(call, inputs, fresh):
    slope = float(call.layer.negative_slope)
    return _read_function("leaky_relu", call, inputs, fresh, negative_slope=slope)


def _read_activation(call, inputs, fresh):
    activation = _activation_name(call.layer.activation, call.name)
    return [] if activation is None else _read_function(activation, call, inputs, fresh)


def _read_elu(call, inputs, fresh):
    if call.layer.alpha != 1:
        raise UnsupportedModelError(
            f"layer {call.name} is an ELU with alpha {call.layer.alpha}; TFLite's has alpha 1"
        )
    return _read_function("elu", call, inputs, fresh)


def _read_prelu(call, inputs, fresh):
    weights = {"alpha": keras.ops.convert_to_numpy(call.layer.alpha)}
    return [
        Operation("prelu", call.name, inputs, call.output, call.layer, weights, label=call.name)
    ]


def _read_layer_normalization(call, inputs, fresh):
    """Reads (x - mean) / sqrt(variance + epsilon) * gamma + beta over the channels.

    As integer kernels can: a mean, a difference, a square, its mean, epsilon (a rescaling by 1),
    RSQRT, a product, and for gamma and beta a rescaling, which a dense layer behind takes in.
    RMSNormalization takes no mean away.
    """
    layer = call.layer
    axes = {int(axis) % call.rank for axis in np.ravel(layer.axis)}
    if axes != {call.rank - 1}:
        raise UnsupportedModelError(
            f"layer {call.name} normalizes over axes {sorted(axes)}; allowed is the last axis alone"
        )
    if getattr(layer, "rms_scaling", False):
        raise UnsupportedModelError(
            f"layer {call.name} has rms_scaling, which divides by the centred variance and centres "
            "nothing; use RMSNormalization"
        )
    centred = isinstance(layer, _L.LayerNormalization)
    operations = []

    def add(kind, suffix, sources, **config):
        operations.append(
            Operation(
                kind,
                f"{call.name}_{suffix}",
                sources,
                next(fresh),
                layer,
                label=f"{call.name}_{suffix}",
                config=config,
            )
        )
        return operations[-1].output

    over = {"axes": (call.rank - 1,), "keepdims": True}
    (x,) = inputs
    if centred:
        x = add("subtract", "centred", (x, add("mean", "mean", (x,), **over)))
    variance = add("mean", "variance", (add("multiply", "squares", (x, x)),), **over)
    above = add(
        "rescale", "epsilon", (variance,), scale=1.0, offset=float(layer.epsilon), channels=1
    )
    inverse = add("rsqrt", "rsqrt", (above,))
    add("multiply", "normal", (x, inverse))
    scale, offset = (
        np.full(1, value) if weight is None else keras.ops.convert_to_numpy(weight)
        for weight, value in (
            (getattr(layer, "gamma", getattr(layer, "scale", None)), 1.0),
            (getattr(layer, "beta", None), 0.0),
        )
    )
    config = {"scale": scale, "offset": offset}
    return [
        *operations,
        Operation(
            "rescale",
            call.name,
            (operations[-1].output,),
            call.output,
            layer,
            label=call.name,
            config=config,
        ),
    ]


def _read_factor_a_channel(call, inputs, fresh):
    config = {"scale": keras.ops.convert_to_numpy(call.layer.gamma), "offset": 0.0}
    return [
        Operation(
            "rescale", call.name, inputs, call.output, call.layer, label=call.name, config=config
        )
    ]


def _read_softmax(call, inputs, fresh):
    if call.layer.axis not in (-1, call.rank - 1):
        raise UnsupportedModelError(
            f"layer {call.name} is a Softmax over axis {call.layer.axis}; only the last is allowed"
        )
    return _read_function("softmax", call, inputs, fresh)


def _read_function(activation, call, inputs, fresh, **config):
    return _activation_operations(
        activation, call.name, inputs[0], call.output, call.layer, call.name, fresh, **config
    )


def _read_kept(kind):
    """Returns a reader for a layer that stays as it is."""

    def read_layer(call, inputs, fresh):
        return [Operation(kind, call.name, inputs, call.output, call.layer, label=call.name)]

    return read_layer


def _read_mean_over_time(call, inputs, fresh):
    (operation,) = _read_kept("mean")(call, inputs, fresh)
    return [dataclasses.replace(operation, config={"axes": (1,)})]


def _read_merged(kind):
    """Several inputs are merged one after another: TFLite's integer operations take two."""

    def read_layer(call, inputs, fresh):
        operations, total = [], inputs[0]
        for number, value in enumerate(inputs[1:], 2):
            last = number == len(inputs)
            output = call.output if last else next(fresh)
            name = call.name if last else f"{call.name}_{number}"
            pair = (total, value)
            operations.append(Operation(kind, name, pair, output, call.layer, label=name))
            total = output
        return operations

    return read_layer


def _read_normalization(call, inputs, fresh):
    axes = {
        int(axis) % call.rank
        for axis in np.ravel([] if call.layer.axis is None else call.layer.axis)
    }
    if axes - {call.rank - 1}:
        raise UnsupportedModelError(
            f"layer {call.name} is a Normalization over axes {sorted(axes)}; allowed is the last alone"
        )
    return _read_kept("rescale")(call, inputs, fresh)


def _read_average(call, inputs, fresh):
    """Reads a mean of tensors as their sum times a factor, which what reads it takes in."""
    total = next(fresh)
    sums = _read_merged("add")(call, inputs, fresh)
    name = f"{call.name}_sum"
    sums[-1] = dataclasses.replace(sums[-1], name=name, label=name, output=total)
    config = {"scale": 1 / len(inputs), "offset": 0.0}
    return [
        *sums,
        Operation(
            "rescale", call.name, (total,), call.output, call.layer, label=call.name, config=config
        ),
    ]


def _read_upsampling(call, inputs, fresh):
    layer = call.layer
    kinds = {"nearest": "upsample", "bilinear": "bilinear"}
    if layer.interpolation not in kinds:
        raise UnsupportedModelError(
            f"layer {call.name} is an UpSampling2D with interpolation {layer.interpolation!r}; "
            f"allowed are {', '.join(kinds)}"
        )
    return _read_kept(kinds[layer.interpolation])(call, inputs, fresh)


def _read_resizing(call, inputs, fresh):
    layer = call.layer
    plain = not (layer.crop_to_aspect_ratio or layer.pad_to_aspect_ratio)
    if layer.interpolation != "bilinear" or not plain or layer.antialias:
        raise UnsupportedModelError(
            f"layer {call.name} is a Resizing with interpolation {layer.interpolation!r}, antialias "
            f"{layer.antialias}; bilinear to the whole new size, without antialias, is allowed"
        )
    return _read_kept("bilinear")(call, inputs, fresh)


def _dropped(call, inputs, fresh):
    return []


_L = keras.layers
READERS = {
    _L.Conv2D: _read_weighted("conv"),
    _L.DepthwiseConv2D: _read_weighted("depthwise"),
    _L.Conv2DTranspose: _read_transposed,
    _L.SeparableConv2D: _read_separable,
    _L.Conv1D: _read_conv_1d,
    _L.Dense: _read_weighted("dense"),
    _L.BatchNormalization: _read_batch_norm,
    _L.ReLU: _read_relu,
    _L.LeakyReLU: _read_leaky_relu,
    _L.ELU: _read_elu,
    _L.PReLU: _read_prelu,
    _L.LayerNormalization: _read_layer_normalization,
    _L.RMSNormalization: _read_layer_normalization,
    _L.Activation: _read_activation,
    _L.Softmax: _read_softmax,
    _L.Add: _read_merged("add"),
    _L.Average: _read_average,
    _L.Subtract: _read_merged("subtract"),
    _L.Multiply: _read_merged("multiply"),
    _L.Maximum: _read_merged("maximum"),
    _L.Minimum: _read_merged("minimum"),
    _L.Concatenate: _read_kept("concatenate"),
    _L.ZeroPadding2D: _read_kept("pad"),
    _L.Cropping2D: _read_kept("crop"),
    _L.AveragePooling2D: _read_kept("average_pool"),
    _L.MaxPooling2D: _read_kept("max_pool"),
    _L.GlobalAveragePooling2D: _read_kept("mean"),
    _L.GlobalAveragePooling1D: _read_mean_over_time,
    layers.QuantizedMean: _read_kept("mean"),
    _L.GlobalMaxPooling2D: _read_kept("global_max_pool"),
    _L.UpSampling2D: _read_upsampling,
    _L.Resizing: _read_resizing,
    _L.Permute: _read_kept("permute"),
    layers.Slice: _read_kept("slice"),
    layers.BlocksToChannels: _read_kept("blocks"),
    _L.Flatten: _read_kept("reshape"),
    _L.Reshape: _read_kept("reshape"),
    _L.Rescaling: _read_kept("rescale"),
    _L.Normalization: _read_normalization,
    _L.Identity: _dropped,
    _L.Dropout: _dropped,
    _L.SpatialDropout2D: _dropped,
    _L.GaussianNoise: _dropped,
    _L.GaussianDropout: _dropped,
    _L.ActivityRegularization: _dropped,
}
# Layers that keras.applications has of its own, by their names: the classes are not public.
_READERS_BY_NAME = {"LayerScale": _read_factor_a_channel, "StochasticDepth": _dropped}
