"""`keras.ops` calls that a functional model recorded, as layers of the same meaning.

`x + 3.0`, `ops.relu6(x)` and `x[:, 1:-1]` become operations of the graph that are no layers.  Each is
handed on as the layer that computes the same, so that one reader serves both.
"""

from collections.abc import Callable

import keras
import numpy as np

_L = keras.layers


def layer_of(operation, arguments: tuple) -> tuple[keras.layers.Layer, list] | None:
    """Returns (layer, the tensors that it takes) for a recorded call; None where none is known.

    Args:
      operation: a keras.Operation that is no layer.
      arguments: what it was called on: KerasTensors, lists of them, numbers, slices.
    """
    make = _LAYERS.get(type(operation).__name__)
    return None if make is None else make(operation, *arguments)


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


def _pooled(layer):
    def make(operation, x):
        axis = operation.axis
        axes = {a % len(x.shape) for a in np.ravel(axis if axis is not None else [])}
        if len(x.shape) != 4 or axes != {1, 2}:
            return None
        return layer(keepdims=operation.keepdims, name=operation.name), [x]

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
            "Elu": "elu",
        }.items()
    },
    "Gelu": _gelu,
    "Softmax": _softmax,
    "LeakyRelu": _leaky_relu,
    "Mean": _pooled(_L.GlobalAveragePooling2D),
    "Max": _pooled(_L.GlobalMaxPooling2D),
    "Concatenate": _concatenate,
    "Reshape": _reshaped,
    "ExpandDims": _reshaped,
    "Squeeze": _reshaped,
    "Transpose": _transpose,
    "Pad": _pad,
}
KNOWN = tuple(sorted(_LAYERS))
