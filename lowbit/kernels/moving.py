"""Operations that move, join or select codes: the same in all kernels."""

import numpy as np

from lowbit.kernels import delegate, windows


def concatenation(graph, node, inputs, kernel):
    """CONCATENATION: joins codes that share one scale; the same in all kernels."""
    if node.attributes.get("activation") is not None:
        raise ValueError(
            f"node {node.name!r}: CONCATENATION has no fused activation, "
            f"got {node.attributes['activation']!r}"
        )
    differing = delegate.differing_map(graph, node)
    if differing:
        raise ValueError(
            f"node {node.name!r}: {differing!r} has another scale or zero point than the output; "
            "CONCATENATION joins codes as they are"
        )
    return np.concatenate(inputs, axis=node.attributes["axis"])


def reshape(graph, node, inputs, kernel):
    """RESHAPE to (batch, ...): the rest of the shape is the output tensor's."""
    shape = graph.tensors[node.outputs[0]].shape
    batch = graph.tensors[node.inputs[0]].shape[0]
    return inputs[0].reshape(len(inputs[0]) * shape[0] // batch, *shape[1:])


def pad(graph, node, inputs, kernel):
    """PAD with the code of real 0, the zero point; the same in all kernels."""
    zero_point = graph.tensors[node.outputs[0]].zero_point
    if np.any(inputs[1][0]):  # a damaged 2**20 there would fill the memory of what follows
        raise ValueError(f"node {node.name!r}: PAD adds {inputs[1][0].tolist()} to the batch axis")
    sizes = np.add(inputs[0].shape, np.sum(inputs[1], axis=1, dtype=np.int64))
    windows.check_output(graph, node, sizes.tolist())
    return np.pad(inputs[0], np.asarray(inputs[1]), constant_values=zero_point)


def slice_codes(graph, node, inputs, kernel):
    """SLICE from begin, `size` codes on each axis but the batch's; the same in all kernels."""
    begin, size = (np.ravel(array).tolist() for array in inputs[1:])
    ends = [
        None if count == -1 else first + count for first, count in zip(begin, size, strict=True)
    ]
    return inputs[0][(slice(None), *map(slice, begin[1:], ends[1:]))]


def transpose(graph, node, inputs, kernel):
    """TRANSPOSE: axes in another order, the batch's first; the same in all kernels."""
    order = [int(axis) for axis in np.ravel(inputs[1])]
    if order[0] != 0:
        raise ValueError(f"node {node.name!r}: TRANSPOSE moves the batch axis: order {order}")
    return np.transpose(inputs[0], order)


def strided_slice(graph, node, inputs, kernel):
    """STRIDED_SLICE from begin to before end by positive strides; the batch stays whole."""
    begin, end, strides = (np.ravel(array).tolist() for array in inputs[1:])
    if min(strides) < 1 or any(value for key, value in node.attributes.items() if "mask" in key):
        raise ValueError(f"node {node.name!r}: STRIDED_SLICE has strides {strides} or a mask")
    return inputs[0][(slice(None), *map(slice, begin[1:], end[1:], strides[1:]))]


def depth_to_space(graph, node, inputs, kernel):
    """DEPTH_TO_SPACE: (n, h, w, b * b * c) to (n, h * b, w * b, c); the same in all kernels."""
    (x,), block = inputs, node.attributes["block_size"]
    count, height, width, channels = x.shape
    x = x.reshape(count, height, width, block, block, channels // block**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(count, height * block, width * block, -1)


def space_to_depth(graph, node, inputs, kernel):
    """SPACE_TO_DEPTH: (n, h * b, w * b, c) to (n, h, w, b * b * c); the same in all kernels."""
    (x,), block = inputs, node.attributes["block_size"]
    count, height, width, channels = x.shape
    x = x.reshape(count, height // block, block, width // block, block, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(count, height // block, width // block, -1)
