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
