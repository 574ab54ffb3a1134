"""Placement: a float functional model becomes the same model with quantizers where kernels need them.

The rewrites, in order; each is one function from operations to operations:

  read               Keras layers to operations; `activation=`, SeparableConv2D and Dropout resolved
  widen              what follows a Conv1D to before the reshape that closes it
  find_hard_sigmoids relu6(x + 3) / 6, as models spell it out, to the one operation it is
  merge_rescaling    Rescaling and Normalization into the weights behind them, where the borders
                     stay exact; elsewhere they become a 1x1 depthwise convolution
  fold_batch_norms   into the convolution before it; alone it becomes a 1x1 depthwise convolution
  merge_padding      ZeroPadding2D into a VALID convolution, where SAME gives the same numbers
  fuse_activations   ReLU and ReLU6 into the quantizer of the operation before
  requantize         low-bit copies of what additions read and write, where those keep more bits
  part_fixed         a copy on another scale, where a concatenation or the like joins what a kernel
                     has fixed the scale of (a tanh) with something else
  build              a Keras model again: each operation that computes new values (convolution, add,
                     mean, softmax, the input) is followed by an ActivationQuantizer

Operations that only move or select values (concatenation, pooling, padding, reshape) must keep
their input's scale: TFLite's kernels require it.  All values so tied share one quantizer.
"""

import collections
import dataclasses
import fnmatch
import json
from collections.abc import Callable, Sequence

import keras
import numpy as np

from lowbit import fold, functional, layers, quantizers
from lowbit import spec as spec_lib
from lowbit.functional import UnsupportedModelError

# Computes new values, so that a quantizer follows / hands on its input's values and its scale.
SOURCES = (
    *("conv", "depthwise", "conv_transpose", "dense"),
    *("add", "subtract", "multiply", "mean", "requantize"),
    *("softmax", "sigmoid", "tanh", "gelu", "elu", "leaky_relu", "prelu", "rsqrt", "in_float"),
)
TIED = (
    *("average_pool", "max_pool", "global_max_pool", "concatenate", "maximum", "minimum"),
    *("pad", "crop", "slice", "reshape", "permute", "blocks", "upsample", "bilinear"),
    "activation",
)
FUSES_ACTIVATION = (
    *("conv", "depthwise", "conv_transpose", "dense", "add", "subtract", "multiply"),
)
# TFLite fixes the scale of what these compute: see `_fixed_range`.
FIXED = ("softmax", "sigmoid", "tanh", "hard_sigmoid")
_FUNCTIONS = ("sigmoid", "tanh", "gelu", "elu")  # of single values, by a table of all codes
# Layers that take a list of tensors.
_MANY = ("add", "subtract", "multiply", "concatenate", "maximum", "minimum")

_QUANTIZED_LAYER = {
    "conv": layers.QuantizedConv2D,
    "depthwise": layers.QuantizedDepthwiseConv2D,
    "conv_transpose": layers.QuantizedConv2DTranspose,
    "dense": layers.QuantizedDense,
}
# Kinds whose layer is made of the float one's configuration; the others keep the float one's class.
QUANTIZED = {"prelu": layers.QuantizedPReLU}
_TWO_INPUTS = {
    "add": layers.QuantizedAdd,
    "subtract": layers.QuantizedSubtract,
    "multiply": layers.QuantizedMultiply,
}


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of each channel, float32 (channels,): what a batch norm promises."""

    mean: np.ndarray
    deviation: np.ndarray


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of the network, between the float layer and the quantized one."""

    kind: str
    name: str
    inputs: tuple[int, ...]
    output: int
    layer: keras.layers.Layer | None  # whose configuration and weights it takes
    weights: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    batch_norm: dict | None = None  # epsilon and momentum, once folded
    batch_norm_layer: keras.layers.Layer | None = None
    activation: str | None = None  # fused; of kind "activation": the function itself
    label: str = ""  # name of the tensor that results
    # Of the output before its activation, (channels,) each, where a baked batch norm said them.
    statistics: Statistics | None = None
    config: dict = dataclasses.field(default_factory=dict)  # changes to the layer's own


@dataclasses.dataclass(frozen=True)
class Network:
    """A model between two rewrites."""

    trace: functional.Trace
    operations: tuple[Operation, ...]
    outputs: tuple[int, ...]

    def consumers(self) -> collections.Counter:
        """Returns how often each value is used, as a model output included."""
        used = [value for operation in self.operations for value in operation.inputs]
        return collections.Counter([*used, *self.outputs])

    def producers(self) -> dict[int, Operation]:
        return {operation.output: operation for operation in self.operations}


def place(
    model: keras.Model,
    scheme: spec_lib.Scheme | spec_lib.Bits,
    range_mode: str = "frozen",
    decay: float = 0.99,
    rewrites: Sequence[Callable[["Network"], "Network"]] = (),
    weight_range: str = "minmax",
    strict: bool = True,
) -> keras.Model:
    """Returns `model` with batch norms folded and quantizers placed; ranges are not set yet.

    Args:
      model: functional or Sequential, float32, channels last, every size but the batch's fixed.
      scheme: what weights and activations get: one scheme, or `spec.Bits` that differ by layer.
      range_mode: of the activation quantizers, one of quantizers.RANGE_MODES.
      decay: of their moving averages, for one batch.
      rewrites: further ones, run before the model is built: `bake_batch_norms`, and those of PTQ.
      weight_range: one of layers.WEIGHT_RANGES; "stored" starts as the kernel's own.
      strict: refuse a layer without an integer form; else it stays in float, as layers.InFloat.

    Returns:
      A new functional model of layers that `.keras` files can hold; the weights are copies.

    Raises:
      UnsupportedModelError: names the layer, what it follows, and what to do.
      ValueError: for a pattern of `scheme` that no layer matches.
    """
    bits = spec_lib.as_bits(scheme)
    network = read(model, strict)
    standard = (
        *(widen, find_hard_sigmoids, merge_rescaling, fold_batch_norms, merge_padding),
        fuse_activations,
    )
    for rewrite in (*standard, *rewrites):
        network = rewrite(network)
    if bits.additions is not None and bits.additions.activations != bits.scheme.activations:
        network = requantize(network)
    if any(scheme.activations is not None for scheme in bits.schemes()):
        network = part_fixed(network)
    return build(network, bits, range_mode, decay, weight_range)


# --- read ---------------------------------------------------------------------------------------


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
    config = {"copy": copy, "separate": call.separate, "keywords": call.keywords, "reason": reason}
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


def float_layers(model: keras.Model) -> list[str]:
    """Returns the names of the layers of a placed model that stay in float for want of a kernel."""
    return [layer.name for layer in model.layers if isinstance(layer, layers.InFloat)]


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
        return [_hard_sigmoid(name, value, output, layer, label)]
    if activation == "leaky_relu":
        config = {"negative_slope": 0.2} | config  # of the function's default
    return [Operation(activation, name, (value,), output, layer, label=label, config=config)]


def _hard_sigmoid(name, value, output, layer, label):
    """Returns clip(x / 6 + 1/2, 0, 1): an affine map whose clip is the range of its codes."""
    config = {"scale": 1 / 6, "offset": 0.5, "fixed": "hard_sigmoid"}
    return Operation("rescale", name, (value,), output, layer, label=label, config=config)


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
    centred = isinstance(layer, _L.LayerNormalization) and not getattr(layer, "rms_scaling", False)
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
    _L.Normalization: _read_kept("rescale"),
    _L.Dropout: _dropped,
    _L.SpatialDropout2D: _dropped,
    _L.GaussianNoise: _dropped,
    _L.GaussianDropout: _dropped,
    _L.ActivityRegularization: _dropped,
}
# Layers that keras.applications has of its own, by their names: the classes are not public.
_READERS_BY_NAME = {"LayerScale": _read_factor_a_channel, "StochasticDepth": _dropped}


# --- rewrites -----------------------------------------------------------------------------------


def widen(network: Network) -> Network:
    """Moves what follows a Conv1D in front of its closing reshape, and drops reshapes there and back.

    Batch norms, activations and rescalings are folded into the operation right before them.
    """
    operations, shapes = list(network.operations), dict(network.trace.shapes)
    changed = True
    while changed:
        changed = False
        state = dataclasses.replace(network, operations=tuple(operations))
        consumers, producers = state.consumers(), state.producers()
        for index, operation in enumerate(operations):
            closing = producers.get(operation.inputs[0])
            if closing is None or closing.config.get("way") != "closed":
                continue
            if operation.config.get("way") == "opened":
                (back,), gone = closing.inputs, operation.output
                operations = [
                    dataclasses.replace(
                        other,
                        inputs=tuple(back if value == gone else value for value in other.inputs),
                    )
                    for other in operations
                    if other is not operation
                    and not (other is closing and consumers[closing.output] == 1)
                ]
                changed = True
                break
            moves = operation.kind in ("batch_norm", "activation", "rescale")
            if moves and consumers[closing.output] == 1:
                place = operations.index(closing)
                operations[place] = dataclasses.replace(
                    operation, inputs=closing.inputs, output=closing.output
                )
                operations[index] = dataclasses.replace(
                    closing, inputs=(closing.output,), output=operation.output
                )
                count, *rest = shapes[closing.output]
                shapes[closing.output] = (count, 1, *rest)
                changed = True
                break
    trace = dataclasses.replace(network.trace, shapes=shapes)
    return dataclasses.replace(network, trace=trace, operations=tuple(operations))


def find_hard_sigmoids(network: Network) -> Network:
    """Makes x + 3, ReLU6 and a sixth of it, each read by the next alone, one operation."""
    consumers, producers = network.consumers(), network.producers()
    replaced: dict[str, Operation | None] = {}
    for last in network.operations:
        middle = producers.get(last.inputs[0])
        first = None if middle is None else producers.get(middle.inputs[0])
        if (
            first is not None
            and (first.kind, middle.kind, last.kind) == ("rescale", "activation", "rescale")
            and middle.activation == "relu6"
            and consumers[first.output] == consumers[middle.output] == 1
            and _is_affine(first, 1.0, 3.0)
            and _is_affine(last, 1 / 6, 0.0)
        ):
            replaced |= {first.name: None, middle.name: None}
            replaced[last.name] = _hard_sigmoid(
                last.name, first.inputs[0], last.output, last.layer, last.label
            )
    operations = (replaced.get(operation.name, operation) for operation in network.operations)
    return dataclasses.replace(
        network, operations=tuple(operation for operation in operations if operation is not None)
    )


def _is_affine(operation, scale, offset) -> bool:
    found = _scale_and_offset(operation, 1) if _is_scalar(operation) else (np.nan, np.nan)
    return bool(np.allclose(np.ravel(found), (scale, offset), rtol=1e-6, atol=0))


def _is_scalar(operation) -> bool:
    layer = operation.layer
    return (
        isinstance(layer, keras.layers.Rescaling)
        and np.size(layer.scale) * np.size(layer.offset) == 1
    )


def merge_rescaling(network: Network) -> Network:
    """Merges y = scale * x + offset into the weighted operation that reads it.

    kernel' = kernel * scale,  bias' = bias + sum of kernel * offset

    With an offset and zero padding the borders would differ: padded with x = 0 instead of y = 0.
    There, and where other operations read y, it becomes a 1x1 depthwise convolution of its own.
    """
    consumers, producers = network.consumers(), network.producers()
    readers = {value: other for other in network.operations for value in other.inputs}
    replaced: dict[str, Operation | None] = {}
    before: dict[str, list[Operation]] = {}
    fresh, shapes = iter(range(3 * 10**9, 4 * 10**9)), dict(network.trace.shapes)
    for operation in network.operations:
        if operation.kind != "rescale":
            continue
        operation = replaced.get(operation.name, operation)
        channels = shapes[operation.output][-1]
        scale, offset = _scale_and_offset(operation, channels)
        reader = readers.get(operation.output)
        padded = reader is not None and setting(reader, "padding") == "same"
        grouped = reader is not None and reader.kind == "conv" and setting(reader, "groups") != 1
        # A transposed convolution's borders read fewer taps, whatever its padding.
        padded = padded or (reader is not None and reader.kind == "conv_transpose")
        producer = producers.get(operation.inputs[0])
        if (
            reader is not None
            and consumers[operation.output] == 1
            and reader.kind in _QUANTIZED_LAYER
            and not (offset.any() and padded)
            and not grouped
            and "fixed" not in operation.config
            and not _is_shared(network, reader)
        ):
            reader = replaced.get(reader.name, reader)
            replaced[operation.name] = None
            replaced[reader.name] = _scaled_reader(reader, scale, offset, operation.inputs)
        elif (
            producer is not None
            and producer.kind in _QUANTIZED_LAYER
            and consumers[producer.output] == 1
            and "fixed" not in operation.config
            and not _is_shared(network, producer)
        ):
            producer = replaced.get(producer.name, producer)
            replaced[producer.name] = None
            replaced[operation.name] = _scaled_producer(producer, scale, offset, operation.output)
        else:
            made = _rescaling_as_depthwise(network, operation, scale, offset, fresh, shapes)
            (*around, replaced[operation.name]) = made
            before[operation.name] = around
    operations = []
    for operation in network.operations:
        operations += before.get(operation.name, [])
        operations.append(replaced.get(operation.name, operation))
    trace = dataclasses.replace(network.trace, shapes=shapes)
    return dataclasses.replace(
        network,
        trace=trace,
        operations=tuple(operation for operation in operations if operation is not None),
    )


def _scale_and_offset(operation, channels):
    """Returns float32 (channels,) scale and offset of a Rescaling or Normalization, or their like."""
    layer = operation.layer
    if "scale" in operation.config:
        scale, offset = operation.config["scale"], operation.config["offset"]
    elif isinstance(layer, keras.layers.Rescaling):
        scale, offset = layer.scale, layer.offset
    elif layer.invert:
        scale = np.maximum(np.sqrt(layer.variance), keras.config.epsilon())
        offset = layer.mean
    else:
        scale = 1 / np.maximum(np.sqrt(layer.variance), keras.config.epsilon())
        offset = -np.asarray(layer.mean) * scale
    flat = (np.asarray(value, np.float32).reshape(-1) for value in (scale, offset))
    return tuple(np.broadcast_to(value, (channels,)) for value in flat)


def _scaled_reader(reader, scale, offset, inputs):
    kernel = reader.weights["kernel"]
    shape = (-1, 1)  # every kernel has its input channels on axis -2
    weights = reader.weights | {"kernel": kernel * scale.reshape(shape)}
    if offset.any():
        added = kernel * offset.reshape(shape)
        if reader.kind == "depthwise":
            added = added.sum(axis=(0, 1)).reshape(-1)
        else:
            added = added.reshape(-1, kernel.shape[-1]).sum(axis=0)
        weights["bias"] = weights.get("bias", 0) + added
    return dataclasses.replace(reader, inputs=inputs, weights=weights)


def _scaled_producer(producer, scale, offset, output):
    """Returns a weighted operation that computes scale * y + offset instead of y."""
    kernel = producer.weights["kernel"]
    shape = kernel.shape[-2:] if producer.kind == "depthwise" else (-1,)
    bias = producer.weights.get("bias", np.zeros_like(scale)) * scale + offset
    weights = {"kernel": kernel * scale.reshape(shape), "bias": bias}
    return dataclasses.replace(producer, output=output, weights=producer.weights | weights)


def _is_shared(network, operation) -> bool:
    """Returns whether another operation takes its weights from the same layer."""
    same = [
        other
        for other in network.operations
        if other.layer is operation.layer and other.kind == operation.kind
    ]
    return len(same) > 1


def _rescaling_as_depthwise(network, operation, scale, offset, fresh, shapes):
    """Returns the operations of the map as a depthwise convolution, the last with its output.

    A tensor of other than 4 axes is reshaped to (n, everything, 1, channels) and back.
    """
    shape = shapes[operation.output]
    depthwise = dataclasses.replace(
        operation,
        kind="depthwise",
        weights={"kernel": scale.reshape(1, 1, -1, 1).copy(), "bias": offset.copy()},
        activation="unit" if "fixed" in operation.config else None,
        config=_POINTWISE_DEPTHWISE
        | {key: value for key, value in operation.config.items() if key == "fixed"},
    )
    if len(shape) == 4:
        return [depthwise]
    spatial = (int(np.prod(shape[1:-1])), 1, shape[-1])
    wide, made = next(fresh), next(fresh)
    shapes |= {wide: (shape[0], *spatial), made: (shape[0], *spatial)}
    name = operation.name
    opened, closed = (
        Operation("reshape", f"{name}_{way}", (source,), target, layer, label=f"{name}_{way}")
        for way, source, target, layer in (
            ("opened", operation.inputs[0], wide, keras.layers.Reshape(spatial)),
            ("closed", made, operation.output, keras.layers.Reshape(shape[1:])),
        )
    )
    return [opened, dataclasses.replace(depthwise, inputs=(wide,), output=made), closed]


_POINTWISE_DEPTHWISE = {
    "kernel_size": (1, 1),
    "strides": (1, 1),
    "padding": "valid",
    "dilation_rate": (1, 1),
    "depth_multiplier": 1,
    "trainable": False,  # it stands for a fixed per-channel map, as the float model's layer did
}


def fold_batch_norms(network: Network) -> Network:
    """Folds each batch norm into the weighted operation before it, or makes it a 1x1 depthwise."""
    consumers, producers = network.consumers(), network.producers()
    folded: dict[int, Operation] = {}  # by the weighted operation's old output
    operations = []
    for operation in network.operations:
        if operation.kind != "batch_norm":
            operations.append(operation)
            continue
        before = producers.get(operation.inputs[0])
        settings = {
            "epsilon": float(operation.layer.epsilon),
            "momentum": float(operation.layer.momentum),
        }
        fits = before is not None and before.kind in _QUANTIZED_LAYER
        if fits and consumers[before.output] == 1 and before.output not in folded:
            merged = dataclasses.replace(
                before,
                output=operation.output,
                weights=before.weights | operation.weights,
                batch_norm=settings,
                batch_norm_layer=operation.layer,
                label=operation.name if before.label != before.name else before.label,
            )
            folded[before.output] = merged
            operations[operations.index(before)] = merged
        else:
            operations.append(_batch_norm_as_depthwise(network, operation, settings))
    return dataclasses.replace(network, operations=tuple(operations))


def _batch_norm_as_depthwise(network, operation, settings):
    shape = network.trace.shapes[operation.output]
    axis = operation.layer.axis
    if len(shape) != 4 or axis not in (-1, 3):
        raise UnsupportedModelError(
            f"layer {operation.name} is a BatchNormalization over axis {axis} of a {len(shape)}-D "
            "tensor that follows no convolution or dense layer; put it right behind one, so that "
            "it can be folded"
        )
    return dataclasses.replace(
        operation,
        kind="depthwise",
        weights=operation.weights | {"kernel": np.ones((1, 1, shape[-1], 1), np.float32)},
        batch_norm=settings,
        batch_norm_layer=operation.layer,
        config={key: value for key, value in _POINTWISE_DEPTHWISE.items() if key != "trainable"},
    )


def bake_batch_norms(network: Network) -> Network:
    """Folds the batch norms into kernel and bias for good, and keeps what they say of the outputs.

    Whitepaper eq. 20 and 21 (`fold.fold_batch_norm`).  Corrections change the folded weights, and
    a channel whose gamma is near zero could not be unfolded again.  Each layer has a bias then.
    """
    operations = []
    for operation in network.operations:
        if operation.kind in _QUANTIZED_LAYER and "bias" not in operation.weights:
            zeros = np.zeros(output_channels(operation), np.float32)
            operation = dataclasses.replace(operation, weights=operation.weights | {"bias": zeros})
        if operation.batch_norm is not None:
            weights = operation.weights
            beta, gamma = weights["beta"], weights["gamma"]
            kernel, bias = fold.fold_batch_norm(
                weights["kernel"],
                weights["bias"],
                gamma,
                beta,
                weights["moving_mean"],
                weights["moving_variance"],
                operation.batch_norm["epsilon"],
            )
            operation = dataclasses.replace(
                operation,
                weights={"kernel": kernel, "bias": bias},
                batch_norm=None,
                batch_norm_layer=None,
                statistics=Statistics(beta, np.abs(gamma)),
            )
        operations.append(operation)
    return dataclasses.replace(network, operations=tuple(operations))


def output_channels(operation: Operation) -> int:
    """Returns how many output channels a weighted operation has."""
    shape = operation.weights["kernel"].shape
    return shape[-2] * shape[-1] if operation.kind == "depthwise" else shape[-1]


def merge_padding(network: Network) -> Network:
    """Merges a ZeroPadding2D into a VALID convolution where padding SAME gives the same numbers."""
    consumers, producers = network.consumers(), network.producers()
    merged_away, operations = set(), []
    for operation in network.operations:
        pad = producers.get(operation.inputs[0])
        if (
            operation.kind in ("conv", "depthwise")
            and pad is not None
            and pad.kind == "pad"
            and consumers[pad.output] == 1
            and setting(operation, "padding") == "valid"
            and _same_padding(operation, network.trace.shapes[pad.inputs[0]][1:3])
            == tuple(tuple(pair) for pair in pad.layer.padding)
        ):
            merged_away.add(pad.name)
            operation = dataclasses.replace(
                operation, inputs=pad.inputs, config=operation.config | {"padding": "same"}
            )
        operations.append(operation)
    kept = tuple(operation for operation in operations if operation.name not in merged_away)
    return dataclasses.replace(network, operations=kept)


def setting(operation: Operation, key: str):
    """Returns an argument of the operation's layer, such as "strides", as rewrites left it."""
    return operation.config.get(key, getattr(operation.layer, key, None))


def _same_padding(operation, sizes):
    """Returns ((top, bottom), (left, right)) that SAME adds: TensorFlow's rule."""
    padding = []
    for size, kernel, stride, dilation in zip(
        sizes,
        setting(operation, "kernel_size"),
        setting(operation, "strides"),
        setting(operation, "dilation_rate"),
        strict=True,
    ):
        reach = (kernel - 1) * dilation + 1
        total = max((-(-size // stride) - 1) * stride + reach - size, 0)
        padding.append((total // 2, total - total // 2))
    return tuple(padding)


def fuse_activations(network: Network) -> Network:
    """Moves ReLU and ReLU6 into the operation before them, where nothing else reads its output."""
    consumers, producers = network.consumers(), network.producers()
    operations = []
    for operation in network.operations:
        before = producers.get(operation.inputs[0])
        if (
            operation.kind == "activation"
            and before is not None
            and before.kind in FUSES_ACTIVATION
            and before.activation is None
            and consumers[before.output] == 1
        ):
            fused = dataclasses.replace(
                before,
                output=operation.output,
                activation=operation.activation,
                label=operation.label,
            )
            operations[operations.index(before)] = fused
        else:
            operations.append(operation)
    return dataclasses.replace(network, operations=tuple(operations))


def requantize(network: Network) -> Network:
    """Gives layers with weights a copy of what additions read or write, to be quantized anew."""
    around = _around_additions(network)
    fresh = iter(range(2 * 10**9, 3 * 10**9))
    shapes = dict(network.trace.shapes)
    copies: dict[int, int] = {}
    operations = []
    for operation in network.operations:
        if operation.kind in _QUANTIZED_LAYER and operation.inputs[0] in around:
            value = operation.inputs[0]
            if value not in copies:
                copies[value] = next(fresh)
                shapes[copies[value]] = shapes.get(value)
                name = f"{operation.name}_input"
                operations.append(
                    Operation("requantize", name, (value,), copies[value], None, label=name)
                )
            operation = dataclasses.replace(operation, inputs=(copies[value],))
        operations.append(operation)
    trace = dataclasses.replace(network.trace, shapes=shapes)
    return dataclasses.replace(network, trace=trace, operations=tuple(operations))


def part_fixed(network: Network) -> Network:
    """Gives operations that join values a copy of those whose scale is fixed, where others join in."""
    fresh = iter(range(4 * 10**9, 5 * 10**9))
    shapes = dict(network.trace.shapes)
    parted = {value for group in _ties(network) for value in group.parted}
    copies: dict[int, int] = {}
    operations = []
    for operation in network.operations:
        if operation.kind in TIED:
            inputs = tuple(copies.get(value, value) for value in operation.inputs)
            operation = dataclasses.replace(operation, inputs=inputs)
        operations.append(operation)
        if operation.output in parted:
            copies[operation.output] = next(fresh)
            shapes[copies[operation.output]] = shapes.get(operation.output)
            name = f"{operation.name}_copy"
            operations.append(
                Operation(
                    "requantize",
                    name,
                    (operation.output,),
                    copies[operation.output],
                    None,
                    label=name,
                )
            )
    trace = dataclasses.replace(network.trace, shapes=shapes)
    return dataclasses.replace(network, trace=trace, operations=tuple(operations))


def _around_additions(network) -> set[int]:
    """Returns the values that additions read or write."""
    return {
        value
        for operation in network.operations
        if operation.kind in ("add", "subtract")
        for value in (*operation.inputs, operation.output)
    }


# --- build --------------------------------------------------------------------------------------


def build(
    network: Network,
    bits: spec_lib.Bits,
    range_mode: str,
    decay: float,
    weight_range: str = "minmax",
) -> keras.Model:
    """Returns the Keras model of the operations, a quantizer after each that computes new values."""
    trace = network.trace
    groups = _ties(network)
    slots = {value: (group, slot) for group in groups for slot, value in enumerate(group.sources)}
    schemes = layer_schemes(network, bits)
    specs = _activation_specs(network, bits, schemes)
    built_quantizers = {
        id(group): _build_quantizer(group, specs, range_mode, decay) for group in groups
    }
    of_value = {value: group for group in groups for value in group.values}
    built_layers: dict[tuple, keras.layers.Layer] = {}
    tensors: dict[int, keras.KerasTensor] = {}

    def quantize(value, tensor, activation, label):
        group, slot = slots[value]
        keywords = {"slot": slot, "label": label}
        if activation is not None:
            keywords["activation"] = activation
        return built_quantizers[id(group)](tensor, **keywords)

    inputs = []
    for value in trace.inputs:
        name = f"input_{len(inputs)}" if len(trace.inputs) > 1 else "input"
        tensor = keras.Input(trace.shapes[value][1:], dtype="float32", name=name)
        inputs.append(tensor)
        tensors[value] = quantize(value, tensor, None, name)

    for operation in network.operations:
        arguments = [tensors[value] for value in operation.inputs]
        scheme = schemes[operation.name]
        if operation.kind == "bilinear":
            size = trace.shapes[operation.output][1:3]
            layer = layers.QuantizedBilinear(size, name=operation.name)
        else:
            layer = _build_layer(operation, scheme, weight_range, built_layers)
        many = operation.kind in _MANY or len(arguments) > 1
        tensor = layer(arguments if many else arguments[0])
        if operation.kind == "in_float":
            layer.layer.set_weights([operation.weights[i] for i in range(len(operation.weights))])
        if operation.kind in SOURCES:
            tensor = quantize(operation.output, tensor, operation.activation, operation.label)
        elif operation.kind in ("average_pool", "bilinear"):  # kernels round to the input's codes
            tied = built_quantizers[id(of_value[operation.output])]
            tensor = tied(tensor, slot=None, label=operation.label)
        tensors[operation.output] = tensor
    outputs = [tensors[value] for value in network.outputs]
    return layers.QuantizedModel(
        inputs if len(inputs) > 1 else inputs[0],
        outputs if len(outputs) > 1 else outputs[0],
        name=trace.name,
    )


@dataclasses.dataclass(frozen=True)
class _Group:
    """Values on one scale; `sources` are those that compute new numbers."""

    name: str
    values: tuple[int, ...]
    sources: tuple[int, ...]
    fixed: str | None  # of FIXED, where a kernel sets the scale
    parted: tuple[int, ...]  # sources of a fixed scale that cannot be the group's


def _ties(network) -> list[_Group]:
    """Returns the values that operations of kind TIED put on one scale."""
    parent: dict[int, int] = {}

    def find(value):
        parent.setdefault(value, value)
        while parent[value] != value:
            value = parent[value]
        return value

    names = {value: "input" for value in network.trace.inputs}
    kinds = {value: "input" for value in network.trace.inputs}
    fixed_kinds = dict(kinds)
    for operation in network.operations:
        names[operation.output] = operation.label
        kinds[operation.output] = operation.kind
        fixed_kinds[operation.output] = operation.config.get("fixed", operation.kind)
        if operation.kind in TIED:
            for value in operation.inputs:
                parent[find(value)] = find(operation.output)
    members: dict[int, list[int]] = {}
    for value in names:
        members.setdefault(find(value), []).append(value)
    groups = []
    for values in members.values():
        sources = tuple(value for value in values if kinds[value] in (*SOURCES, "input"))
        fixed = [value for value in sources if fixed_kinds[value] in FIXED]
        wanted = {fixed_kinds[value] for value in sources}
        name = names[sources[0]] if len(sources) == 1 else names[values[-1]]
        if not fixed or len(wanted) == 1:
            kind = fixed_kinds[fixed[0]] if fixed else None
            groups.append(_Group(name, tuple(values), sources, kind, ()))
        else:
            groups.append(_Group(name, tuple(values), sources, None, tuple(fixed)))
    return groups


def layer_schemes(network: Network, bits: spec_lib.Bits) -> dict[str, spec_lib.Scheme]:
    """Returns the scheme of each operation by its name, and of the model's input as "input".

    Raises:
      ValueError: for a pattern that matches none.
    """
    names = ["input", *(operation.name for operation in network.operations)]
    schemes = dict.fromkeys(names, bits.scheme)
    if bits.additions is not None:
        around = _around_additions(network)
        for operation in network.operations:
            if operation.output in around:
                activations = bits.additions.activations
                schemes[operation.name] = dataclasses.replace(bits.scheme, activations=activations)
    if bits.ends is not None:
        weighted = [op for op in network.operations if op.kind in _QUANTIZED_LAYER]
        for operation in weighted[:1]:
            activations = schemes[operation.name].activations
            schemes[operation.name] = dataclasses.replace(bits.ends, activations=activations)
        for operation in weighted[-1:]:
            schemes[operation.name] = bits.ends
    for pattern, scheme in bits.overrides:
        matched = fnmatch.filter(names, pattern)
        if not matched:
            raise ValueError(
                f"no layer's name matches {pattern!r}; the layers are {', '.join(names)}"
            )
        schemes |= dict.fromkeys(matched, scheme)
    return schemes


def _activation_specs(network, bits, schemes) -> dict[int, spec_lib.QuantSpec | None]:
    """Returns what each value that a quantizer follows is quantized to."""
    specs = {value: schemes["input"].activations for value in network.trace.inputs}
    for operation in network.operations:
        specs[operation.output] = schemes[operation.name].activations
    if bits.ends is not None:
        weighted = [op for op in network.operations if op.kind in _QUANTIZED_LAYER]
        ends = [op.inputs[0] for op in (*weighted[:1], *weighted[-1:])]
        named = [("input", value) for value in network.trace.inputs]
        named += [(operation.name, operation.output) for operation in network.operations]
        overridden = {
            value
            for pattern, _ in bits.overrides
            for name, value in named
            if fnmatch.fnmatchcase(name, pattern)
        }
        for value in (*ends, *network.outputs):
            if value not in overridden:
                specs[value] = bits.ends.activations
    return specs


def _widest(specs):
    """Returns the spec with the most bits; None (float) is wider than any."""
    return max(specs, key=lambda spec: float("inf") if spec is None else spec.bits)


def _build_quantizer(group, specs, range_mode, decay):
    # A scale that several tensors share must do for the one with the most bits.
    spec = _widest([specs[value] for value in group.values])
    initial_range = (0.0, 0.0)
    if group.fixed:
        range_mode = "fixed"
        if spec is not None:
            initial_range = _fixed_range(group.fixed, spec)
    return quantizers.ActivationQuantizer(
        spec=quantizers.spec_config(spec),
        slots=len(group.sources),
        mode=range_mode,
        decay=decay,
        initial_range=initial_range,
        name=f"{group.name}_quantizer",
    )


def _fixed_range(kind, spec):
    """Returns the range that TFLite's kernels assume, as wide as the function's values.

    Softmax and sigmoid: scale 1/256 and zero point -128 at 8 bits, 1/32768 and 0 at 16.
    Tanh: 1/128 and 0, 1/32768 and 0.
    Hard sigmoid: its clip at 0 and 1 is that of the codes.
    """
    if kind == "hard_sigmoid":
        return 0.0, 1.0
    if kind == "tanh":
        half = 2 ** (spec.bits - 1)
        high = (half - 1) / half
        return (-high if spec.symmetric else -1.0), high
    levels = 2 ** (spec.bits - spec.symmetric)
    return 0.0, (levels - 1) / levels


def _build_layer(operation, scheme, weight_range, built):
    if operation.kind not in _QUANTIZED_LAYER:
        if operation.kind == "requantize":
            return layers.QuantizedRequantize(name=operation.name)
        if operation.kind == "activation":
            maximum = 6.0 if operation.activation == "relu6" else None
            return keras.layers.ReLU(maximum, name=operation.name)
        if operation.kind == "softmax":
            return keras.layers.Softmax(name=operation.name)
        if operation.kind == "mean":
            axes = operation.config.get("axes", getattr(operation.layer, "axes", (1, 2)))
            return layers.QuantizedMean(
                axes, keepdims=setting(operation, "keepdims"), name=operation.name, dtype="float32"
            )
        if operation.kind == "in_float":
            config = {key: operation.config[key] for key in ("separate", "keywords")}
            return layers.InFloat(operation.config["copy"], **config, name=operation.name)
        if operation.kind == "rsqrt":
            return layers.QuantizedRsqrt(name=operation.name)
        if operation.kind in _FUNCTIONS:
            return layers.QuantizedFunction(operation.kind, name=operation.name)
        if operation.kind == "leaky_relu":
            return layers.QuantizedLeakyReLU(
                operation.config["negative_slope"], name=operation.name
            )
        # float32: mixed precision would leave float16 in these layers.
        if operation.kind in _TWO_INPUTS:
            return _TWO_INPUTS[operation.kind](name=operation.name, dtype="float32")
        config = operation.layer.get_config() | {"name": operation.name, "dtype": "float32"}
        layer = QUANTIZED.get(operation.kind, type(operation.layer)).from_config(config)
        if operation.weights:
            layer.build((None, *operation.weights["alpha"].shape))
            layer.alpha.assign(operation.weights["alpha"])
        return layer
    key = (id(operation.layer), operation.kind)
    if operation.config.get("trainable") is False:
        key = (operation.name,)  # a fixed map, whatever layer it came with
    if key in built:
        layer, batch_norm_layer = built[key]
        if batch_norm_layer is not operation.batch_norm_layer:
            raise UnsupportedModelError(
                f"layer {operation.layer.name} is called twice, followed by different batch norms "
                f"({operation.name}); give each call a layer of its own"
            )
        return layer
    layer = _build_weighted(operation, scheme, weight_range)
    built[key] = (layer, operation.batch_norm_layer)
    return layer


def _build_weighted(operation, scheme, weight_range):
    spec = scheme.weights_of(operation.kind)
    config = {
        "name": operation.name,
        "trainable": operation.config.get("trainable", True),
        "use_bias": "bias" in operation.weights,
        "weight_spec": quantizers.spec_config(spec),
        "batch_norm": operation.batch_norm,
        "weight_range": weight_range if spec is not None else "minmax",
    }
    wanted = {
        "conv": ("filters", "kernel_size", "strides", "padding", "dilation_rate", "groups"),
        "depthwise": ("kernel_size", "strides", "padding", "dilation_rate", "depth_multiplier"),
        "conv_transpose": ("filters", "kernel_size", "strides", "padding", "output_padding"),
        "dense": ("units",),
    }[operation.kind]
    separable = isinstance(operation.layer, keras.layers.SeparableConv2D)
    for key in wanted:
        if key in operation.config:
            config[key] = operation.config[key]
        elif not separable:  # the pointwise half keeps the defaults: strides 1, no dilation
            config[key] = getattr(operation.layer, key)
    layer = _QUANTIZED_LAYER[operation.kind](**config)
    kernel = operation.weights["kernel"]
    # Built from the kernel alone: 1 pixel for each tap is enough for any padding.
    spatial = kernel.shape[:2] if operation.kind != "dense" else ()
    reach = tuple((size - 1) * 32 + 1 for size in spatial)
    inputs = kernel.shape[2] * config.get("groups", 1) if spatial else kernel.shape[0]
    layer.build((None, *reach, inputs))
    for key, value in operation.weights.items():
        getattr(layer, key).assign(value)
    if layer.weight_range != "minmax":
        layer.store_observed_range()
    return layer
