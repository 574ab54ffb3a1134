"""TF-slim checkpoints: `--weights=model.ckpt`, the whitepaper's own starting points.

A checkpoint holds variables by name, such as

    MobilenetV1/Conv2d_1_depthwise/depthwise_weights
    resnet_v1_50/block1/unit_2/bottleneck_v1/conv3/BatchNorm/gamma

`scopes` says which scope belongs to which Keras layer.  Three of slim's topologies are not
keras.applications': slim's ResNets have their strides at the end of a block and pad their first
pool as SAME does, and its NASNet pads no pool with zeros.  `build` makes those as slim has them, so
that the weights mean the same.

Where a moving average of a variable was stored with it, that is taken.  Slim's 1001 classes begin
with one for the background, which is dropped where the network has 1000.
"""

import os
import pathlib
import re
from collections.abc import Iterator

import keras
import numpy as np

# What slim did to the pixels, where it is not what Keras does: the ResNet-v1s' took the mean
# colour off, as RGB; the ResNet-v2s' and all others' scaled to [-1, 1].
PREPROCESS = dict.fromkeys(("resnet_v1_50", "resnet_v1_152"), "123.68,116.78,103.94,1,1,1")

# Units in the four blocks; the stride of 2 lies in the last unit of the first three.
RESNET_UNITS = {"50": (3, 4, 6, 3), "152": (3, 8, 36, 3)}

AVERAGE = "ExponentialMovingAverage"
_BATCH_NORM = ("gamma", "beta", "moving_mean", "moving_variance")
_MODEL_VARIABLES = (*_BATCH_NORM, "weights", "depthwise_weights", "pointwise_weights", "biases")

L = keras.layers


def is_checkpoint(path: str) -> bool:
    """Returns whether --weights means a checkpoint: its name, or the prefix of its files."""
    return ".ckpt" in pathlib.Path(path).name or pathlib.Path(f"{path}.index").is_file()


# --- networks of slim's topology ----------------------------------------------------------------


def build(network: keras.Model, name: str) -> keras.Model:
    """Returns a network of slim's topology; it may be the one given, of keras.applications'.

    Args:
      network: of the zoo, with the wanted input size and classes.
      name: its zoo name.
    """
    if name == "nasnet_mobile":
        return _with_same_pools(network)
    version, _, depth = name.removeprefix("resnet_").rpartition("_")
    if name.startswith("resnet_") and depth in RESNET_UNITS:
        classes = network.output_shape[-1]
        return resnet(version, RESNET_UNITS[depth], network.input_shape[1:], classes, name)
    return network


def resnet(
    version: str,
    units: tuple[int, ...],
    input_shape: tuple[int, int, int],
    classes: int,
    name: str,
    filters: int = 64,
) -> keras.Model:
    """Returns a ResNet as slim builds it, with random weights and logits out.

    Args:
      version: "v1" (batch norm after each convolution), or "v2" (before).
      units: bottlenecks in each block.
      input_shape: (height, width, channels).
      classes: the number of logits.
      name: of the model.
      filters: of the first convolution.
    """
    inputs = keras.Input(input_shape, name="image")
    x = L.ZeroPadding2D(3, name="conv1_pad")(inputs)
    x = L.Conv2D(filters, 7, strides=2, use_bias=version == "v2", name="conv1")(x)
    if version == "v1":
        x = _norm_relu(x, "conv1_bn")
    x = L.MaxPooling2D(3, strides=2, padding="same", name="pool1")(x)
    unit = {"v1": _unit_v1, "v2": _unit_v2}[version]
    for block, count in enumerate(units, 1):
        for number in range(1, count + 1):
            strides = 2 if number == count and block < len(units) else 1
            x = unit(x, f"block{block}_unit{number}", filters * 2 ** (block - 1), strides)
    if version == "v2":
        x = _norm_relu(x, "postnorm")
    x = L.GlobalAveragePooling2D(name="pool5")(x)
    return keras.Model(inputs, L.Dense(classes, name="logits")(x), name=name)


def _unit_v1(x, name, filters, strides):
    if x.shape[-1] == 4 * filters:
        shortcut = _subsample(x, name, strides)
    else:
        shortcut = _conv(x, 4 * filters, 1, strides, f"{name}_shortcut")
        shortcut = _norm(shortcut, f"{name}_shortcut_bn")
    x = _norm_relu(_conv(x, filters, 1, 1, f"{name}_conv1"), f"{name}_conv1_bn")
    x = _norm_relu(_conv(x, filters, 3, strides, f"{name}_conv2"), f"{name}_conv2_bn")
    x = _norm(_conv(x, 4 * filters, 1, 1, f"{name}_conv3"), f"{name}_conv3_bn")
    return L.ReLU(name=f"{name}_relu")(L.Add(name=f"{name}_add")([shortcut, x]))


def _unit_v2(x, name, filters, strides):
    before = _norm_relu(x, f"{name}_preact")
    if x.shape[-1] == 4 * filters:
        shortcut = _subsample(x, name, strides)
    else:
        shortcut = _conv(before, 4 * filters, 1, strides, f"{name}_shortcut", use_bias=True)
    x = _norm_relu(_conv(before, filters, 1, 1, f"{name}_conv1"), f"{name}_conv1_bn")
    x = _norm_relu(_conv(x, filters, 3, strides, f"{name}_conv2"), f"{name}_conv2_bn")
    x = _conv(x, 4 * filters, 1, 1, f"{name}_conv3", use_bias=True)
    return L.Add(name=f"{name}_add")([shortcut, x])


def _subsample(x, name, strides):
    return x if strides == 1 else L.MaxPooling2D(1, strides=strides, name=f"{name}_subsample")(x)


def _conv(x, filters, kernel, strides, name, use_bias=False):
    """A convolution padded alike on all sides, whatever the stride: slim's conv2d_same."""
    padding = "same"
    if kernel > 1 and strides > 1:
        x = L.ZeroPadding2D(kernel // 2, name=f"{name}_pad")(x)
        padding = "valid"
    return L.Conv2D(
        filters, kernel, strides=strides, padding=padding, use_bias=use_bias, name=name
    )(x)


def _norm(x, name):
    return L.BatchNormalization(momentum=0.997, epsilon=1e-5, name=name)(x)


def _norm_relu(x, name):
    return L.ReLU(name=f"{name}_relu")(_norm(x, name))


def _with_same_pools(network):
    """Returns Keras' NASNet with SAME pools, where it pads with zeros and pools VALID.

    The windows lie where they lay; but zeros no longer beat negative values, or count in a mean.
    """

    def clone(layer):
        config = layer.get_config()
        if layer.name.startswith("reduction_pad_1_"):
            return L.Activation("linear", name=layer.name)
        if layer.name.startswith(("reduction_left2_", "reduction_left3_", "reduction_right5_")):
            config["padding"] = "same"
        return type(layer).from_config(config)

    return keras.models.clone_model(network, clone_function=clone)


# --- layers and scopes --------------------------------------------------------------------------


def scopes(network: keras.Model, name: str) -> dict[str, str]:
    """Returns the scope of each layer with variables, by the layer's name.

    Args:
      network: what `build` returned.
      name: its zoo name.

    Raises:
      ValueError: where slim has no such network.
    """
    family = next((key for key in _SCOPES if name.startswith(key)), None)
    if family is None or name in ("resnet_v1_18", "resnet_v1_34"):
        raise ValueError(f"TF-slim has no {name}; its checkpoints are read for {_KNOWN}")
    return dict(_SCOPES[family](network, name))


_KNOWN = "mobilenet_v1, mobilenet_v2, nasnet_mobile, inception_v3, resnet_v1_50 and _152, _v2_ too"


def _with_norm(layer: str, norm: str, scope: str) -> Iterator[tuple[str, str]]:
    yield layer, scope
    yield norm, f"{scope}/BatchNorm"


def _mobilenet_v1(network, name):
    yield from _with_norm("conv1", "conv1_bn", "MobilenetV1/Conv2d_0")
    for i in range(1, 14):
        for ours, theirs in (("dw", "depthwise"), ("pw", "pointwise")):
            layer = f"conv_{ours}_{i}"
            yield from _with_norm(layer, f"{layer}_bn", f"MobilenetV1/Conv2d_{i}_{theirs}")
    yield "conv_preds", "MobilenetV1/Logits/Conv2d_1c_1x1"


def _mobilenet_v2(network, name):
    yield from _with_norm("Conv1", "bn_Conv1", "MobilenetV2/Conv")
    for i in range(17):
        ours, theirs = ("block", "expanded_conv") if i else ("expanded_conv",) * 2
        ours, theirs = (f"{ours}_{i}", f"{theirs}_{i}") if i else (ours, theirs)
        for part in ("expand", "depthwise", "project")[0 if i else 1 :]:
            layer = f"{ours}_{part}"
            yield from _with_norm(layer, f"{layer}_BN", f"MobilenetV2/{theirs}/{part}")
    yield from _with_norm("Conv_1", "Conv_1_bn", "MobilenetV2/Conv_1")
    yield "predictions", "MobilenetV2/Logits/Conv2d_1c_1x1"


def _resnet(network, name):
    version = name.split("_")[1]
    for layer in network.layers:
        unit = re.fullmatch(r"block(\d)_unit(\d+)_(\w+)", layer.name)
        part = unit[3] if unit else layer.name
        scope = f"{name}/block{unit[1]}/unit_{unit[2]}/bottleneck_{version}" if unit else name
        if layer.weights:
            yield layer.name, f"{scope}/{part.replace('_bn', '/BatchNorm')}"


_INCEPTION_STEM = ("1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3")
# Convolutions of each cell in the order in which Keras makes them: "branch/name".
_INCEPTION_A = ("0/0a_1x1", "1/0a_1x1", "1/0b_5x5", "2/0a_1x1", "2/0b_3x3", "2/0c_3x3", "3/0b_1x1")
_INCEPTION_C = (
    *("0/0a_1x1", "1/0a_1x1", "1/0b_1x7", "1/0c_7x1", "2/0a_1x1"),
    *("2/0b_7x1", "2/0c_1x7", "2/0d_7x1", "2/0e_1x7", "3/0b_1x1"),
)
_INCEPTION_CELLS = {
    "5b": _INCEPTION_A,
    # Slim's own slip: one cell's names differ.
    "5c": ("0/0a_1x1", "1/0b_1x1", "1/Conv_1_0c_5x5", *_INCEPTION_A[3:]),
    "5d": _INCEPTION_A,
    "6a": ("0/1a_1x1", "1/0a_1x1", "1/0b_3x3", "1/1a_1x1"),
    **dict.fromkeys(("6b", "6c", "6d", "6e"), _INCEPTION_C),
    "7a": ("0/0a_1x1", "0/1a_3x3", "1/0a_1x1", "1/0b_1x7", "1/0c_7x1", "1/1a_3x3"),
    "7b": (
        *("0/0a_1x1", "1/0a_1x1", "1/0b_1x3", "1/0b_3x1", "2/0a_1x1", "2/0b_3x3"),
        *("2/0c_1x3", "2/0d_3x1", "3/0b_1x1"),
    ),
    "7c": (
        *("0/0a_1x1", "1/0a_1x1", "1/0b_1x3", "1/0c_3x1", "2/0a_1x1", "2/0b_3x3"),
        *("2/0c_1x3", "2/0d_3x1", "3/0b_1x1"),
    ),
}


def _inception_v3(network, name):
    names = [f"Conv2d_{part}" for part in _INCEPTION_STEM]
    for cell, parts in _INCEPTION_CELLS.items():
        for branch, part in (text.split("/") for text in parts):
            part = part if part.startswith("Conv") else f"Conv2d_{part}"
            names.append(f"Mixed_{cell}/Branch_{branch}/{part}")
    # Keras numbers its nameless layers as it makes them: conv2d, conv2d_1, ...
    convolutions = [layer for layer in network.layers if isinstance(layer, L.Conv2D)]
    norms = [layer for layer in network.layers if isinstance(layer, L.BatchNormalization)]
    groups = (sorted(group, key=_number) for group in (convolutions, norms))
    for convolution, norm, scope in zip(*groups, names, strict=True):
        yield from _with_norm(convolution.name, norm.name, f"InceptionV3/{scope}")
    yield "predictions", "InceptionV3/Logits/Conv2d_1c_1x1"


def _number(layer):
    return int(f"0{layer.name.rpartition('_')[2]}") if layer.name[-1].isdigit() else 0


def _nasnet_mobile(network, name):
    names = {layer.name for layer in network.layers if layer.weights}
    for layer in names:
        cell = layer.removeprefix("adjust_bn_")
        if cell != layer:
            # One name in Keras for two in slim: behind a projection, or behind a reduction.
            projected = f"adjust_conv_projection_{cell}" in names
            yield layer, f"{_NASNET_CELLS[cell]}/{'prev_bn' if projected else 'final_path_bn'}"
        else:
            yield layer, _nasnet_scope(layer)


_NASNET_WHOLE = {"stem_conv1": "conv0", "stem_bn1": "conv0_bn", "predictions": "final_layer/FC"}
_NASNET_PARTS = {
    "normal_conv_1": "1x1",
    "normal_bn_1": "beginning_bn",
    "reduction_conv_1": "1x1",
    "reduction_bn_1": "beginning_bn",
    "adjust_conv_projection": "prev_1x1",
    "adjust_conv_1": "path1_conv",
    "adjust_conv_2": "path2_conv",
}
# Kernel size of the separable convolutions of a cell, and their combination and side in slim:
# Keras' names count in an order of their own.
_NASNET_SEPARABLE = {
    "normal_left1": (5, "0/left"),
    "normal_right1": (3, "0/right"),
    "normal_left2": (5, "1/left"),
    "normal_right2": (3, "1/right"),
    "normal_left5": (3, "4/left"),
    "reduction_left1": (5, "0/left"),
    "reduction_right1": (7, "0/right"),
    "reduction_right2": (7, "1/right"),
    "reduction_right3": (5, "2/right"),
    "reduction_left4": (3, "4/left"),
}
_NASNET_CELLS = {
    "stem_1": "cell_stem_0",
    "stem_2": "cell_stem_1",
    "reduce_4": "reduction_cell_0",
    "reduce_8": "reduction_cell_1",
    # Keras leaves out a number after each reduction but the first has none: 0-3, 5-8, 9-12.
    **{str(i): f"cell_{i if i < 4 else i - 1}" for i in range(13) if i != 4},
}


def _nasnet_scope(layer):
    """`separable_conv_1_bn_normal_left1_0` -> `cell_0/comb_iter_0/left/bn_sep_5x5_1`."""
    if layer in _NASNET_WHOLE:
        return _NASNET_WHOLE[layer]
    part, cell = re.fullmatch(r"(\w+?)_((?:stem|reduce)_\d+|\d+)", layer).groups()
    scope = _NASNET_CELLS[cell]
    if part in _NASNET_PARTS:
        return f"{scope}/{_NASNET_PARTS[part]}"
    number, norm, place = re.fullmatch(r"separable_conv_(\d)_(bn_)?(\w+)", part).groups()
    size, side = _NASNET_SEPARABLE[place]
    kind = "bn_sep" if norm else "separable"
    return f"{scope}/comb_iter_{side}/{kind}_{size}x{size}_{number}"


_SCOPES = {
    "mobilenet_v1": _mobilenet_v1,
    "mobilenet_v2": _mobilenet_v2,
    "inception_v3": _inception_v3,
    "resnet_v1": _resnet,
    "resnet_v2": _resnet,
    "nasnet_mobile": _nasnet_mobile,
}


# --- weights ------------------------------------------------------------------------------------


def load_weights(network: keras.Model, name: str, path: str) -> None:
    """Sets the network's weights from a checkpoint; it stays as it was where that fails.

    Args:
      network: what `build` returned.
      name: its zoo name.
      path: the checkpoint's prefix, one of its files, or a version-1 file.

    Raises:
      FileNotFoundError: where there is no such checkpoint.
      ValueError: names the variable that is missing, left over, or has another shape.
    """
    wanted = scopes(network, name)
    reader, prefix = _open(path)
    shapes = reader.get_variable_to_shape_map()
    used, values = set(), []
    for layer in network.layers:
        for variable in layer.weights:
            if variable.name == "seed_generator_state":
                continue
            key = f"{wanted[layer.name]}/{_variable_name(layer, variable.name)}"
            if key not in shapes:
                raise ValueError(
                    f"{prefix}: has no variable {key}, which {name}'s {layer.name} needs"
                )
            used.add(key)
            averaged = f"{key}/{AVERAGE}"
            array = reader.get_tensor(averaged if averaged in shapes else key)
            shape = tuple(variable.shape)
            fitted = _fitted(array, shape, layer.name in _LOGITS)
            if fitted is None:
                raise ValueError(
                    f"{prefix}: {key} has shape {array.shape}, {name}'s {layer.name} takes {shape} "
                    "(another --alpha, or number of classes?)"
                )
            values.append((variable, fitted))
    for key in sorted(set(shapes) - used):
        if key.rpartition("/")[2] in _MODEL_VARIABLES and "aux" not in key.lower():
            raise ValueError(f"{prefix}: {key} belongs to no layer of {name}")
    for variable, array in values:
        variable.assign(array)


_LOGITS = ("predictions", "logits", "conv_preds")


def _variable_name(layer, variable):
    if isinstance(layer, L.BatchNormalization):
        return variable
    if isinstance(layer, L.DepthwiseConv2D) and variable == "kernel":
        return "depthwise_weights"
    return {
        "kernel": "weights",
        "bias": "biases",
        "depthwise_kernel": "depthwise_weights",
        "pointwise_kernel": "pointwise_weights",
    }[variable]


def _fitted(array, shape, is_logits) -> np.ndarray | None:
    """Returns the array as the variable takes it, without the background class, or None."""
    if is_logits:
        if array.shape[-1] == shape[-1] + 1:
            array = array[..., 1:]
        # A 1x1 convolution stands for a dense layer.
        if array.ndim == 4 and len(shape) == 2 and array.shape[:2] == (1, 1):
            array = array[0, 0]
    return array if array.shape == shape else None


def _open(path):
    import tensorflow as tf

    prefix = re.sub(r"\.(index|meta|data-\d+-of-\d+)$", "", path)
    if not (os.path.isfile(prefix) or os.path.isfile(f"{prefix}.index")):
        raise FileNotFoundError(f"--weights {path}: neither {prefix} nor {prefix}.index is a file")
    try:
        return tf.train.load_checkpoint(prefix), prefix
    except (tf.errors.OpError, ValueError, RuntimeError) as error:
        line = str(error).strip().splitlines()[0]
        raise ValueError(f"--weights {path}: damaged, or no TF checkpoint: {line}") from error
