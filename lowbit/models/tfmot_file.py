"""Models that tensorflow-model-optimization (tfmot) trained, read without it and without Keras 2.

What `model.save("model.h5")`, or `.keras`, wrote of a model of `quantize_model` or `quantize_apply`:
the configuration is JSON in which a QuantizeLayer follows the input and a QuantizeWrapperV2 stands
around each layer; the variables of both lie beside the layer's own:

| variable                                     | what it is the range of                          |
|----------------------------------------------|--------------------------------------------------|
| kernel_min, kernel_max (depthwise_kernel_*)  | the weights, at the last training step           |
| post_activation_*                            | the output, behind the layer's `activation=`     |
| pre_activation_*                             | what a softmax, sigmoid or tanh there reads      |
| output_*                                     | the output                                       |
| NAME_min, NAME_max of the QuantizeLayer NAME | the model's input                                |

A `.keras` file of Keras 2 numbers its layers by class and its variables by position instead.
Everything else is refused by name: no code that a file holds or asks for is run.
"""

import collections
import dataclasses
import io
import json
import os
import pathlib
import re
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import h5py
import keras
import numpy as np

Range = tuple[float, float]  # (minimum, maximum)

_L = keras.layers
_CONVOLUTION = ("kernel_size", "strides", "padding", "dilation_rate", "use_bias")
_POOL = ("pool_size", "strides", "padding")


@dataclasses.dataclass(frozen=True)
class _Kind:
    """A layer that is read: its class in Keras 3, what is taken of its configuration, variables."""

    layer: type
    settings: tuple[str, ...] = ()
    variables: tuple[str, ...] = ()  # in the order in which Keras 2 and 3 keep them


_KINDS = {
    "Conv2D": _Kind(_L.Conv2D, ("filters", "groups", *_CONVOLUTION), ("kernel", "bias")),
    "DepthwiseConv2D": _Kind(
        _L.DepthwiseConv2D, ("depth_multiplier", *_CONVOLUTION), ("depthwise_kernel", "bias")
    ),
    "SeparableConv2D": _Kind(
        _L.SeparableConv2D,
        ("filters", "depth_multiplier", *_CONVOLUTION),
        ("depthwise_kernel", "pointwise_kernel", "bias"),
    ),
    "Dense": _Kind(_L.Dense, ("units", "use_bias"), ("kernel", "bias")),
    "BatchNormalization": _Kind(
        _L.BatchNormalization,
        ("axis", "momentum", "epsilon", "center", "scale"),
        ("gamma", "beta", "moving_mean", "moving_variance"),
    ),
    "ReLU": _Kind(_L.ReLU, ("max_value", "negative_slope", "threshold")),
    "Activation": _Kind(_L.Activation),
    "Softmax": _Kind(_L.Softmax, ("axis",)),
    "Add": _Kind(_L.Add),
    "Concatenate": _Kind(_L.Concatenate, ("axis",)),
    "AveragePooling2D": _Kind(_L.AveragePooling2D, _POOL),
    "MaxPooling2D": _Kind(_L.MaxPooling2D, _POOL),
    "GlobalAveragePooling2D": _Kind(_L.GlobalAveragePooling2D, ("keepdims",)),
    "GlobalMaxPooling2D": _Kind(_L.GlobalMaxPooling2D, ("keepdims",)),
    "ZeroPadding2D": _Kind(_L.ZeroPadding2D, ("padding",)),
    "Flatten": _Kind(_L.Flatten),
    "Reshape": _Kind(_L.Reshape, ("target_shape",)),
    "Dropout": _Kind(_L.Dropout, ("rate",)),
}
_MERGES = ("Add", "Concatenate")  # take a list, even of one tensor
_WRAPPERS = ("QuantizeWrapperV2", "QuantizeWrapper")
# tfmot's own, of 8 bits; a user's may mean any number of bits.
_QUANTIZE_CONFIGS = (
    *("Default8BitQuantizeConfig", "Default8BitConvQuantizeConfig", "NoOpQuantizeConfig"),
    *("Default8BitActivationQuantizeConfig", "Default8BitOutputQuantizeConfig"),
)
_INPUT_QUANTIZERS = ("AllValuesQuantizer", "MovingAverageQuantizer", "NoQuantizer")

# Which side of its function tfmot puts a quantizer on.
_QUANTIZED_BEFORE = ("softmax", "sigmoid", "tanh")
_QUANTIZED_BEHIND = ("linear", "relu")
_OUTPUT_OF_ACTIVATIONS = ("relu", "relu6")  # of the layer Activation
_ACTIVATIONS = ("linear", "relu", "relu6", "softmax", "sigmoid", "tanh")
_NO_ACTIVATION = "NoOpActivation"  # linear, and not quantized

# Where tfmot's moving averages begin, and the input's: a range that is still there was never trained.
_FIRST_RANGES = ((-6.0, 6.0), (0.0, 0.0))
_DAMAGE = (
    *(OSError, KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError),
    *(EOFError, OverflowError, MemoryError, RecursionError, zipfile.BadZipFile),
)


class TfmotFileError(ValueError):
    """The file holds no model of tfmot that can be read."""


@dataclasses.dataclass(frozen=True)
class TfmotModel:
    """A trained model, taken apart."""

    network: keras.Model  # in float: the layers inside tfmot's wrappers, under their own names
    input_range: Range | None
    ranges: Mapping[str, Range]  # of outputs, by layer
    ranges_before: Mapping[str, Range]  # of what the function of a layer's `activation=` reads
    # By layer, float32, symmetric, a number for each index of the kernel's last axis.
    kernel_ranges: Mapping[str, tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A layer of the file; of a wrapper, the layer inside it."""

    key: str  # name of the layer as others refer to it: the wrapper's
    name: str
    kind: str
    config: Mapping[str, Any]
    inputs: tuple[str, ...]  # keys
    quantize_config: tuple[str, Mapping] | None  # class and configuration; None: not wrapped


# --- what the file's numbers mean ---------------------------------------------------------------


def nudged(low: float, high: float) -> Range:
    """Returns the range [low, high] moved so that zero is one of its 256 codes, as TensorFlow does.

    zero = clip(floor(-low / scale + 0.5), 0, 255)   scale = (high - low) / 255, float32
    """
    low, high = np.float32(low), np.float32(high)
    scale = (high - low) / np.float32(255)
    if scale <= 0:
        return float(low), float(high)
    zero = np.clip(np.floor(-low / scale + np.float32(0.5)), 0, 255).astype(np.float32)
    return float(-zero * scale), float((np.float32(255) - zero) * scale)


def on_grid(kernel: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Returns a kernel's values as tfmot's training computes with them: codes of -127 to 127.

    Args:
      kernel: float32.
      low, high: float32, symmetric, a number for each index of the kernel's last axis.
    """
    scale = (high - low) / np.float32(254)
    scale = np.where(scale > 0, scale, np.float32(1))
    steps = (np.clip(kernel, low, high) - low) * (np.float32(1) / scale)
    codes = np.floor(steps + np.float32(0.5)) - np.float32(127)
    return (codes * scale).astype(np.float32)


# --- read ---------------------------------------------------------------------------------------


def read(path: str | os.PathLike) -> TfmotModel:
    """Returns the float network of a tfmot model, and its ranges.

    Args:
      path: of an `.h5` or `.keras` file of Keras 2, with the model's configuration in it.

    Raises:
      FileNotFoundError: where there is no such file.
      TfmotFileError: one line that names the path, and the layer that cannot be read or the damage.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        raise TfmotFileError(f"{path}: a folder; save the model by model.save('model.h5')")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        if path.suffix == ".keras":
            return _read_keras(path)
        with h5py.File(path, "r") as file:
            return _read_h5(file, path.stat().st_size)
    except TfmotFileError as error:
        raise TfmotFileError(f"{path}: {error}") from error
    except _DAMAGE as error:
        text = " ".join(str(error).split())[:200] or type(error).__name__
        raise TfmotFileError(f"{path}: damaged, or no model of Keras 2: {text}") from error


def _read_h5(file, size_bytes):
    if "model_config" not in file.attrs:
        raise TfmotFileError(
            "holds no model configuration, only weights perhaps; save the model by "
            "model.save('model.h5')"
        )
    config = json.loads(file.attrs["model_config"])
    layers, output = _layers(config)

    def variables(layer):
        if layer.key not in file["model_weights"]:
            return {}
        found = {}

        def add(name, item):
            if isinstance(item, h5py.Dataset):
                found[name.rpartition("/")[2].removesuffix(":0")] = _array(item, size_bytes)

        file["model_weights"][layer.key].visititems(add)
        return found

    return _model(config, layers, output, {layer.key: variables(layer) for layer in layers})


def _read_keras(path):
    with zipfile.ZipFile(path) as archive:
        config = json.loads(archive.read("config.json"))
        weights = archive.read("model.weights.h5")
    layers, output = _layers(config)
    with h5py.File(io.BytesIO(weights), "r") as file:
        counts = collections.Counter()
        variables: dict[str, dict] = {}
        for layer in layers:
            if layer.kind == "InputLayer":  # a Sequential model has no group for it
                variables[layer.key] = {}
                continue
            kind = layer.kind if layer.quantize_config is None else _WRAPPERS[0]
            group = _snake_case(kind)
            counts[group] += 1
            group += "" if counts[group] == 1 else f"_{counts[group] - 1}"
            variables[layer.key] = _by_position(layer, file["layers"][group], len(weights))
    return _model(config, layers, output, variables)


def _array(dataset, size_bytes):
    # Keras stores variables as they are: one that is larger than its file is damage.
    if dataset.nbytes > size_bytes:
        raise TfmotFileError(f"{dataset.name} has shape {dataset.shape}, more than the file holds")
    return np.asarray(dataset[()])


def _snake_case(name):
    """Returns the name of a layer's group in a `.keras` file of Keras 2: quantize_wrapper_v2."""
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


def _by_position(layer, group, size_bytes):
    """Returns the variables of a layer of a `.keras` file by the names that an `.h5` gives them."""

    def arrays(group):
        return [_array(group["vars"][str(i)], size_bytes) for i in range(len(group["vars"]))]

    found = arrays(group)
    if layer.kind == "QuantizeLayer":
        bounds = [f"{layer.name}_{end}" for end in _ENDS] if len(found) == 3 else []
        return dict(zip([*bounds, "optimizer_step"], found, strict=True))
    if layer.kind not in _KINDS:
        return {}
    own = [
        name
        for name in _KINDS[layer.kind].variables
        if layer.config.get(_SWITCHES.get(name, ""), True)
    ]
    if layer.quantize_config is None:
        return dict(zip(own, found, strict=True))
    # Trainable ones, the quantized ones again, the step, and the ranges.  The layer inside keeps
    # what is not quantized: its kernel became a tensor.
    kernels = [name for name in own if name in layer.quantize_config[1].get("weight_attrs", ())]
    names = [*kernels, "optimizer_step", *(f"{name}_{end}" for name in kernels for end in _ENDS)]
    names += [f"{place}_{end}" for place in _quantized_places(layer) for end in _ENDS]
    trainable = [name for name in own if not name.startswith("moving_")]
    extra = len(found) - len(names)
    # None before where the layer was not trained; the step is an integer, which shows a lack.
    if extra not in (0, len(trainable)) or found[extra + len(kernels)].dtype.kind != "i":
        raise TfmotFileError(
            f"layer {layer.name} has {len(found)} variables, not {names} at the end"
        )
    named = dict(zip(names, found[extra:], strict=True))
    kept = [name for name in own if name not in kernels]
    return named | dict(zip(kept, arrays(group["layer"]), strict=True))


_SWITCHES = {"bias": "use_bias", "gamma": "scale", "beta": "center"}
_ENDS = ("min", "max")


def _quantized_places(layer):
    """Returns where tfmot's wrapper keeps ranges of activations, in its order."""
    name, config = layer.quantize_config
    places = []
    if config.get("activation_attrs"):
        activation = _activation(layer)
        places += ["pre_activation"] * (activation in _QUANTIZED_BEFORE)
        places += ["post_activation"] * (activation in _QUANTIZED_BEHIND)
    quantizes = config.get("quantize_output", False)
    if name == "Default8BitActivationQuantizeConfig":
        quantizes = quantizes and _activation(layer) in _OUTPUT_OF_ACTIVATIONS
    return [*places, "output"] if quantizes else places


# --- the configuration --------------------------------------------------------------------------


def _layers(config) -> tuple[list[_Layer], str]:
    """Returns the layers, and the key of the one whose output is the model's."""
    kind, inner = config["class_name"], config["config"]
    if kind not in ("Functional", "Model", "Sequential"):
        raise TfmotFileError(f"is a {kind}; allowed are Functional and Sequential models")
    layers = []
    for number, entry in enumerate(inner["layers"]):
        before = (layers[-1].key,) if number else ()
        inputs = before if kind == "Sequential" else _inputs(entry)
        layers.append(_layer(entry, inputs))
    if not any(layer.quantize_config for layer in layers):
        raise TfmotFileError(
            f"none of its {len(layers)} layers has a quantizer of tfmot; give the model that "
            "quantize_model or quantize_apply returned"
        )
    if kind == "Sequential":
        return layers, layers[-1].key
    nodes = inner["output_layers"]
    nodes = [nodes] if nodes and isinstance(nodes[0], str) else nodes
    if len(nodes) != 1:
        raise TfmotFileError(f"has {len(nodes)} outputs; 1 is allowed")
    return layers, nodes[0][0]


def _inputs(entry):
    nodes, name = entry["inbound_nodes"], entry["config"]["name"]
    if len(nodes) > 1:
        raise TfmotFileError(f"layer {name} is called {len(nodes)} times; once is allowed")
    if nodes and isinstance(nodes[0], dict):
        raise TfmotFileError("is a model of Keras 3; tfmot trains models of Keras 2 (tf_keras)")
    inputs = []
    for source, _, _, *keywords in nodes[0] if nodes else []:
        if any(value not in (None, False) for value in dict(*keywords).values()):
            raise TfmotFileError(f"layer {name} is called with {keywords[0]}; none are allowed")
        inputs.append(source)
    return tuple(inputs)


def _layer(entry, inputs):
    kind, config = _class_name(entry), entry["config"]
    key = config.get("name") or entry["name"]
    if kind not in _WRAPPERS:
        return _Layer(key, key, kind, config, inputs, None)
    inner, quantize = config["layer"], config["quantize_config"]
    name = inner["config"]["name"]
    if _class_name(quantize) not in _QUANTIZE_CONFIGS:
        raise TfmotFileError(
            f"layer {name} has quantize config {_class_name(quantize)}; allowed are tfmot's "
            f"{', '.join(_QUANTIZE_CONFIGS)}"
        )
    settings = _class_name(quantize), quantize.get("config", {})
    return _Layer(key, name, _class_name(inner), inner["config"], inputs, settings)


def _class_name(entry) -> str:
    return entry["class_name"].rpartition(">")[2]  # `package>Name` where it is registered


def _activation(layer) -> str | None:
    """Returns the name of the function in `activation=`, _NO_ACTIVATION, or None without one.

    Raises:
      TfmotFileError: for a function that tfmot does not quantize.
    """
    found = layer.config.get("activation", "linear")
    while isinstance(found, dict):
        if _class_name(found) == _NO_ACTIVATION:
            return _NO_ACTIVATION
        inside = found["config"]
        found = inside["activation"] if isinstance(inside, dict) else inside
    found = "linear" if found is None else found
    if found not in _ACTIVATIONS:
        raise TfmotFileError(
            f"layer {layer.name} has activation {found!r}; allowed are {', '.join(_ACTIVATIONS)}"
        )
    return found


# --- the model ----------------------------------------------------------------------------------


def _model(config, layers: Sequence[_Layer], output, variables) -> TfmotModel:
    tensors: dict[str, keras.KerasTensor] = {}
    inputs, waiting = [], list(layers)
    input_range = None
    while waiting:
        later = []
        for layer in waiting:
            if any(key not in tensors for key in layer.inputs):
                later.append(layer)
            elif layer.kind == "InputLayer":
                tensors[layer.key] = _input(layer)
                inputs.append(tensors[layer.key])
            elif layer.kind == "QuantizeLayer":
                input_range = _input_range(layer, variables[layer.key])
                tensors[layer.key] = tensors[layer.inputs[0]]
            else:
                tensors[layer.key] = _call(layer, tensors, variables[layer.key])
        if len(later) == len(waiting):
            raise TfmotFileError(f"layer {later[0].name} reads a layer that is not in the file")
        waiting = later
    if len(inputs) != 1:
        raise TfmotFileError(f"has {len(inputs)} inputs; 1 is allowed")
    network = keras.Model(inputs[0], tensors[output], name=config["config"]["name"])
    ranges, before = {}, {}
    for layer in layers:
        for place, found in (
            ("post_activation", ranges),
            ("output", ranges),
            ("pre_activation", before),
        ):
            bounds = _range(layer, place, variables[layer.key])
            if bounds is not None and layer.quantize_config is not None:
                found[layer.name] = bounds
    kernels = {
        layer.name: bounds
        for layer in layers
        if (bounds := _kernel_range(layer, variables[layer.key])) is not None
    }
    return TfmotModel(network, input_range, ranges, before, kernels)


def _input(layer):
    shape = layer.config.get("batch_input_shape", layer.config.get("batch_shape"))
    return keras.Input(tuple(shape[1:]), dtype="float32", name=layer.name)


def _input_range(layer, variables):
    quantizer = layer.config.get("quantizer") or {"class_name": "NoQuantizer"}
    kind, config = _class_name(quantizer), quantizer.get("config", {})
    if kind not in _INPUT_QUANTIZERS or config.get("num_bits", 8) != 8:
        raise TfmotFileError(
            f"layer {layer.name} has quantizer {kind} of {config.get('num_bits', 8)} bits; allowed "
            f"are {', '.join(_INPUT_QUANTIZERS)} of 8 bits"
        )
    return _range(layer, layer.name, variables)


def _call(layer, tensors, variables):
    """Returns the output of a layer of Keras 3 with the file's weights."""
    kind = _KINDS.get(layer.kind)
    if kind is None:
        raise TfmotFileError(
            f"layer {layer.name} is a {layer.kind}; allowed are {', '.join(sorted(_KINDS))}"
        )
    if layer.config.get("data_format", "channels_last") != "channels_last":
        raise TfmotFileError(
            f"layer {layer.name} has data_format {layer.config['data_format']!r}; allowed is "
            "'channels_last'"
        )
    settings = {key: layer.config[key] for key in kind.settings if key in layer.config}
    if isinstance(settings.get("axis"), list) and len(settings["axis"]) == 1:
        (settings["axis"],) = settings["axis"]  # batch normalization's, in Keras 2
    activation = _activation(layer)
    if "activation" in layer.config:
        settings["activation"] = "linear" if activation == _NO_ACTIVATION else activation
    arguments = [tensors[key] for key in layer.inputs]
    try:
        made = kind.layer(name=layer.name, **settings)
        output = made(arguments if layer.kind in _MERGES else arguments[0])
    except (TypeError, ValueError) as error:
        line = str(error).strip().splitlines()[0]
        raise TfmotFileError(f"layer {layer.name} ({layer.kind}): {line}") from error
    for weight in made.weights:
        name = weight.name
        if (layer.kind, name) == ("DepthwiseConv2D", "kernel"):
            name = "depthwise_kernel"
        shape = None if name not in variables else variables[name].shape
        if name in kind.variables and shape != tuple(weight.shape):
            raise TfmotFileError(
                f"layer {layer.name}: its {name} has shape {shape}, needed is {tuple(weight.shape)}"
            )
        if name in kind.variables:
            weight.assign(variables[name])
    return output


def _range(layer, place, variables) -> Range | None:
    """Returns the range of an activation, None where the file has none."""
    ends = [variables.get(f"{place}_{end}") for end in _ENDS]
    if any(end is None for end in ends):
        return None
    low, high = (float(end) for end in ends)
    _check_range(layer, place, low, high)
    if (low, high) in _FIRST_RANGES:
        raise TfmotFileError(
            f"layer {layer.name}: the range of its {place} is [{low:g}, {high:g}], where tfmot "
            "begins: train the model before"
        )
    return low, high


def _kernel_range(layer, variables):
    """Returns a kernel's range along its last axis: one number for all becomes as many."""
    kernel = next((name for name in ("kernel", "depthwise_kernel") if name in variables), None)
    ends = [variables.get(f"{kernel}_{end}") for end in _ENDS]
    if any(end is None for end in ends):
        return None
    channels = variables[kernel].shape[-1]
    low, high = (np.broadcast_to(np.asarray(end, np.float32), (channels,)) for end in ends)
    _check_range(layer, kernel, low, high)
    if (low != -high).any():
        raise TfmotFileError(
            f"layer {layer.name}: the range of its {kernel} is [{low}, {high}]; only symmetric "
            "weights are read"
        )
    return low, high


def _check_range(layer, place, low, high):
    if not (np.isfinite(low).all() and np.isfinite(high).all() and np.less_equal(low, high).all()):
        raise TfmotFileError(
            f"layer {layer.name}: the range of its {place} is [{low}, {high}]; needed are finite "
            "bounds, the lower first"
        )
