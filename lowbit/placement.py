"""Placement: a float functional model becomes the same model with quantizers where kernels need them.

The model is read (`reading`), rewritten (`rewrites`, those of `STANDARD` in turn), and built as Keras
layers again: each operation that computes new values (convolution, add, mean, softmax, the input) is
followed by an ActivationQuantizer.

Operations that only move or select values (concatenation, pooling, padding, reshape) must keep
their input's scale: TFLite's kernels require it.  All values so tied share one quantizer.
"""

import dataclasses
import fnmatch
from collections.abc import Callable, Sequence

import keras

from lowbit import layers, network, quantizers, reading, rewrites
from lowbit import spec as spec_lib
from lowbit.functional import UnsupportedModelError
from lowbit.network import Network, setting

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
_FUNCTIONS = ("sigmoid", "tanh", "gelu", "elu")  # of single values, by a table of all codes


STANDARD = (
    rewrites.widen,
    rewrites.find_hard_sigmoids,
    rewrites.merge_rescaling,
    rewrites.fold_batch_norms,
    rewrites.merge_padding,
    rewrites.fuse_activations,
)


def place(
    model: keras.Model,
    scheme: spec_lib.Scheme | spec_lib.Bits,
    range_mode: str = "frozen",
    decay: float = 0.99,
    further: Sequence[Callable[[Network], Network]] = (),
    weight_range: str = "minmax",
    strict: bool = True,
) -> keras.Model:
    """Returns `model` with batch norms folded and quantizers placed; ranges are not set yet.

    Args:
      model: functional or Sequential, float32, channels last, every size but the batch's fixed.
      scheme: what weights and activations get: one scheme, or `spec.Bits` that differ by layer.
      range_mode: of the activation quantizers, one of quantizers.RANGE_MODES.
      decay: of their moving averages, for one batch.
      further: rewrites, run before the model is built: `rewrites.bake_batch_norms`, and those of PTQ.
      weight_range: one of layers.WEIGHT_RANGES; "stored" starts as the kernel's own.
      strict: refuse a layer without an integer form; else it stays in float, as layers.InFloat.

    Returns:
      A new functional model of layers that `.keras` files can hold; the weights are copies.

    Raises:
      UnsupportedModelError: names the layer, what it follows, and what to do.
      ValueError: for a pattern of `scheme` that no layer matches.
    """
    bits = spec_lib.as_bits(scheme)
    made = reading.read(model, strict)
    for change in (*STANDARD, *further):
        made = change(made)
    if bits.additions is not None and bits.additions.activations != bits.scheme.activations:
        made = rewrites.requantize(made)
    if any(each.activations is not None for each in bits.schemes()):
        made = rewrites.part_fixed(made)
    return build(made, bits, range_mode, decay, weight_range)


def float_layers(model: keras.Model) -> list[str]:
    """Returns the names of the layers of a placed model that stay in float for want of a kernel."""
    return [layer.name for layer in model.layers if isinstance(layer, layers.InFloat)]


# --- build --------------------------------------------------------------------------------------


def build(
    made: Network,
    bits: spec_lib.Bits,
    range_mode: str,
    decay: float,
    weight_range: str = "minmax",
) -> keras.Model:
    """Returns the Keras model of the operations, a quantizer after each that computes new values."""
    trace = made.trace
    groups = network.ties(made)
    slots = {value: (group, slot) for group in groups for slot, value in enumerate(group.sources)}
    schemes = layer_schemes(made, bits)
    specs = _activation_specs(made, bits, schemes)
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

    for operation in made.operations:
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
        if operation.kind in network.SOURCES:
            tensor = quantize(operation.output, tensor, operation.activation, operation.label)
        elif operation.kind in ("average_pool", "bilinear"):  # kernels round to the input's codes
            tied = built_quantizers[id(of_value[operation.output])]
            tensor = tied(tensor, slot=None, label=operation.label)
        tensors[operation.output] = tensor
    outputs = [tensors[value] for value in made.outputs]
    return layers.QuantizedModel(
        inputs if len(inputs) > 1 else inputs[0],
        outputs if len(outputs) > 1 else outputs[0],
        name=trace.name,
    )


def layer_schemes(made: Network, bits: spec_lib.Bits) -> dict[str, spec_lib.Scheme]:
    """Returns the scheme of each operation by its name, and of the model's input as "input".

    Raises:
      ValueError: for a pattern that matches none.
    """
    names = ["input", *(operation.name for operation in made.operations)]
    schemes = dict.fromkeys(names, bits.scheme)
    if bits.additions is not None:
        around = network.around_additions(made)
        for operation in made.operations:
            if operation.output in around:
                activations = bits.additions.activations
                schemes[operation.name] = dataclasses.replace(bits.scheme, activations=activations)
    if bits.ends is not None:
        weighted = [op for op in made.operations if op.kind in _QUANTIZED_LAYER]
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


def _activation_specs(made, bits, schemes) -> dict[int, spec_lib.QuantSpec | None]:
    """Returns what each value that a quantizer follows is quantized to."""
    specs = {value: schemes["input"].activations for value in made.trace.inputs}
    for operation in made.operations:
        specs[operation.output] = schemes[operation.name].activations
    if bits.ends is not None:
        weighted = [op for op in made.operations if op.kind in _QUANTIZED_LAYER]
        ends = [op.inputs[0] for op in (*weighted[:1], *weighted[-1:])]
        named = [("input", value) for value in made.trace.inputs]
        named += [(operation.name, operation.output) for operation in made.operations]
        overridden = {
            value
            for pattern, _ in bits.overrides
            for name, value in named
            if fnmatch.fnmatchcase(name, pattern)
        }
        for value in (*ends, *made.outputs):
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
