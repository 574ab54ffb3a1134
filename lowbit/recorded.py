"""`keras.ops` calls that a functional model recorded, as layers of the same meaning.

`x + 3.0`, `ops.relu6(x)` and `x[:, 1:-1]` become operations of the graph that are no layers.  Each is
handed on as the layer that computes the same, so that one reader serves both.
"""

from collections.abc import Callable

import keras
import numpy as np

from lowbit import layers

_L = keras.layers


def layers_of(operation, arguments: tuple) -> list[tuple[keras.layers.Layer, list]] | None:
    """Returns (layer, the tensors that it takes) for each output of a recorded call; or None.

    Args:
      operation: a keras.Operation that is no layer.
      arguments: what it was called on: KerasTensors, lists of them, numbers, slices.
    """
    make = _LAYERS.get(type(operation).__name__)
    found = None if make is None else make(operation, *arguments)
    return [found] if isinstance(found, tuple) else found


def _is_tensor(value) -> bool:
    return isinstance(value, keras.KerasTensor)


def _affine(operation, x, scale, offset):
    """Returns y = scale * x + offset; both scalars, or one value for each channel."""
    scale, offset = (np.asarray(value, np.float32) for value in (scale, offset))
    for value in (scale, offset):
        if value.size not in (1, x.shape[-1]) or value.size != np.prod(value.shape[-1:], dtype=int):
            return None
    return _L.Rescaling(
        scale.reshape(-1).tolist() if scale.size > 1 else float(scale.reshape(())),
        offset.reshape(-1).tolist() if offset.size > 1 else float(offset.reshape(())),
        name=operation.name,
    ), [x]


def _sum(operation, a, b):
    if _is_tensor(a) and _is_tensor(b):
        return _L.Add(name=operation.name), [a, b]
    x, constant = (a, b) if _is_tensor(a) else (b, a)
    return _affine(operation, x, 1.0, constant)


def _difference(operation, a, b):
    if _is_tensor(a) and _is_tensor(b):
        return _L.Subtract(name=operation.name), [a, b]
    if _is_tensor(a):
        return _affine(operation, a, 1.0, -np.asarray(b, np.float32))
    return _affine(operation, b, -1.0, a)


def _product(operation, a, b):
    if _is_tensor(a) and _is_tensor(b):
        return _L.Multiply(name=operation.name), [a, b]
    x, constant = (a, b) if _is_tensor(a) else (b, a)
    return _affine(operation, x, constant, 0.0)


def _quotient(operation, a, b):
    if not _is_tensor(a) or _is_tensor(b):
        return None  # no integer kernel divides tensors rightly
    return _affine(operation, a, 1 / np.asarray(b, np.float64), 0.0)


def _negative(operation, x):
    return _affine(operation, x, -1.0, 0.0)


def _square(operation, x):
    return _L.Multiply(name=operation.name), [x, x]


def _power(operation, x, exponent):
    return _square(operation, x) if np.ndim(exponent) == 0 and exponent == 2 else None


def _selected(layer, keeps_positive):
    """Returns the reader of a maximum or minimum; with the number 0 a maximum is a ReLU."""

    def make(operation, a, b):
        if _is_tensor(a) and _is_tensor(b):
            return layer(name=operation.name), [a, b]
        x, constant = (a, b) if _is_tensor(a) else (b, a)
        if keeps_positive and np.ndim(constant) == 0 and constant == 0:
            return _L.ReLU(name=operation.name), [x]
        return None

    return make


def _clip(operation, x):
    if (operation.x_min, operation.x_max) != (0, 6):
        return None
    return _L.ReLU(6.0, name=operation.name), [x]


def _activation(function):
    return lambda operation, x: (_L.Activation(function, name=operation.name), [x])


def _gelu(operation, x):
    # Keras' default in ops is the approximation by tanh, in layers the exact one.
    function = _gelu_approximate if operation.approximate else keras.activations.gelu
    return _L.Activation(function, name=operation.name), [x]


@keras.saving.register_keras_serializable("lowbit", name="gelu_approximate")
def _gelu_approximate(x):
    return keras.activations.gelu(x, approximate=True)


def _softmax(operation, x):
    return _L.Softmax(operation.axis, name=operation.name), [x]


def _leaky_relu(operation, x):
    return _L.LeakyReLU(operation.negative_slope, name=operation.name), [x]


def _axes(operation, x) -> tuple[int, ...]:
    axis = operation.axis
    return tuple(sorted({int(a) % len(x.shape) for a in np.ravel([] if axis is None else axis)}))


def _mean(operation, x):
    axes = _axes(operation, x)
    if not axes or 0 in axes:
        return None
    return layers.QuantizedMean(axes, keepdims=operation.keepdims, name=operation.name), [x]


def _largest(operation, x):
    if len(x.shape) != 4 or _axes(operation, x) != (1, 2):
        return None
    return _L.GlobalMaxPooling2D(keepdims=operation.keepdims, name=operation.name), [x]


def _item(operation, x, key):
    """Returns x[key]: slices, numbers and an ellipsis; the batch stays whole."""
    key = tuple(key) if isinstance(key, tuple | list) else (key,)  # a list, from a saved file
    rank = len(x.shape)
    if Ellipsis in key:
        at = key.index(Ellipsis)
        key = (*key[:at], *(slice(None),) * (rank - len(key) + 1), *key[at + 1 :])
    key = (*key, *(slice(None),) * (rank - len(key)))
    if key[0] != slice(None) or None in x.shape[1:] or len(key) != rank:
        return None
    dropped = tuple(axis for axis, part in enumerate(key) if isinstance(part, int))
    parts = []
    for part, size in zip(key[1:], x.shape[1:], strict=True):
        if isinstance(part, int):
            part = slice(part % size, part % size + 1)
        if not isinstance(part, slice):
            return None
        begin, end, step = part.indices(size)
        if step < 1 or begin >= end:
            return None
        parts.append((begin, end, step))
    return layers.Slice(*zip(*parts, strict=True), dropped, name=operation.name), [x]


def _split(operation, x):
    """Returns a Slice for each part."""
    axis = operation.axis % len(x.shape)
    sections = operation.indices_or_sections
    if isinstance(sections, int):
        sections = [x.shape[axis] * part // sections for part in range(1, sections)]
    limits = (0, *(int(limit) for limit in sections), x.shape[axis])
    whole = (slice(None),) * axis
    parts = [
        _item(operation, x, (*whole, slice(*pair)))
        for pair in zip(limits, limits[1:], strict=False)
    ]
    return None if axis == 0 or None in parts else parts


def _blocks(from_channels):
    def make(operation, x):
        if operation.data_format != "channels_last":
            return None
        return layers.BlocksToChannels(operation.block_size, from_channels, name=operation.name), [
            x
        ]

    return make


def _concatenate(operation, tensors):
    return _L.Concatenate(operation.axis, name=operation.name), list(tensors)


def _reshaped(operation, x):
    """Returns a Reshape to the output's shape; every axis but the batch's must be known."""
    shape = operation.output.shape
    if shape[0] is not None or None in shape[1:]:
        return None
    return _L.Reshape(shape[1:], name=operation.name), [x]


def _transpose(operation, x):
    axes = operation.axes
    if axes is None or axes[0] != 0:
        return None
    return _L.Permute(tuple(axes[1:]), name=operation.name), [x]


def _pad(operation, x):
    widths = tuple(map(tuple, operation.pad_width))
    if operation.mode != "constant" or len(widths) != 4 or (widths[0], widths[3]) != ((0, 0),) * 2:
        return None
    return _L.ZeroPadding2D(widths[1:3], name=operation.name), [x]


_LAYERS: dict[str, Callable] = {
    "Add": _sum,
    "Subtract": _difference,
    "Multiply": _product,
    "TrueDivide": _quotient,
    "Divide": _quotient,
    "Negative": _negative,
    "Square": _square,
    "Power": _power,
    "Maximum": _selected(_L.Maximum, True),
    "Minimum": _selected(_L.Minimum, False),
    "Clip": _clip,
    "Relu": lambda operation, x: (_L.ReLU(name=operation.name), [x]),
    "Relu6": lambda operation, x: (_L.ReLU(6.0, name=operation.name), [x]),
    **{
        name: _activation(function)
        for name, function in {
            "Sigmoid": "sigmoid",
            "Tanh": "tanh",
            "Silu": "silu",
            "HardSigmoid": "hard_sigmoid",
            "HardSilu": "hard_silu",
        }.items()
    },
    "Elu": lambda operation, x: (_L.ELU(operation.alpha, name=operation.name), [x]),
    "Gelu": _gelu,
    "Softmax": _softmax,
    "LeakyRelu": _leaky_relu,
    "Mean": _mean,
    "Max": _largest,
    "GetItem": _item,
    "Split": _split,
    "DepthToSpace": _blocks(True),
    "SpaceToDepth": _blocks(False),
    "Concatenate": _concatenate,
    "Reshape": _reshaped,
    "ExpandDims": _reshaped,
    "Squeeze": _reshaped,
    "Transpose": _transpose,
    "Pad": _pad,
}
KNOWN = tuple(sorted(_LAYERS))
