"""Windows that convolutions and pooling slide over an image (batch, height, width, channels)."""

import numpy as np

# Padding grows an image to at most so many pixels, or so many times its own: a damaged filter or
# dilation must not fill the memory.
SMALL_IMAGE, PADDED = 2**16, 16


def same_padding(size, window, stride):
    """Returns (before, after) of SAME padding; an odd element goes after (TensorFlow)."""
    total = max((-(-size // stride) - 1) * stride + window - size, 0)
    return total // 2, total - total // 2


def padding(node, shape, window):
    """Returns ((top, bottom), (left, right)) of an image (batch, height, width, channels).

    Args:
      window: (height, width) that the filter spans, dilation included.

    Raises:
      ValueError: for sizes that no window of an image has.
    """
    kind, strides = node.attributes["padding"], node.attributes["strides"]
    if min(*window, *strides) < 1:
        raise ValueError(
            f"node {node.name!r}: a window of {tuple(window)} with strides {tuple(strides)}; at "
            "least 1 is needed"
        )
    if kind not in ("SAME", "VALID"):
        raise ValueError(f"node {node.name!r}: padding must be SAME or VALID, got {kind!r}")
    around = ((0, 0), (0, 0))
    if kind == "SAME":
        around = tuple(
            same_padding(*sizes) for sizes in zip(shape[1:3], window, strides, strict=True)
        )
    height, width = (size + sum(each) for size, each in zip(shape[1:3], around, strict=True))
    if (
        height < window[0]
        or width < window[1]
        or height * width > max(SMALL_IMAGE, PADDED * shape[1] * shape[2])
    ):
        raise ValueError(
            f"node {node.name!r}: a window of {tuple(window)}, padding {kind}, does not fit an "
            f"image of {tuple(shape[1:3])}"
        )
    return around


def pad_image(image, padding, value=0):
    if padding == ((0, 0), (0, 0)):
        return image
    return np.pad(image, ((0, 0), *padding, (0, 0)), constant_values=value)


def tap(image, row, column, strides, out_shape):
    """Returns the view (batch, rows, columns, channels) that one filter tap sees."""
    row_stop = row + strides[0] * (out_shape[0] - 1) + 1
    column_stop = column + strides[1] * (out_shape[1] - 1) + 1
    return image[:, row : row_stop : strides[0], column : column_stop : strides[1]]


def output_size(image, span, strides):
    return tuple((image.shape[1 + i] - span[i]) // strides[i] + 1 for i in range(2))


def check_output(graph, node, shape):
    """Raises ValueError where a node makes another shape, but for the batch, than its tensor has."""
    stated = graph.tensors[node.outputs[0]].shape
    if tuple(shape[1:]) != tuple(stated[1:]):
        raise ValueError(f"node {node.name!r}: makes {tuple(shape)}, its tensor is {tuple(stated)}")
