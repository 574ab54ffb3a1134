"""Rewrites: each a function from a network to one that computes the same, nearer to the kernels.

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
"""

import dataclasses

import keras
import numpy as np

from lowbit import fold
from lowbit import network as kinds
from lowbit.functional import UnsupportedModelError
from lowbit.network import (
    FUSES_ACTIVATION,
    WEIGHTED,
    Network,
    Operation,
    Statistics,
    around_additions,
    hard_sigmoid,
    output_channels,
    setting,
    ties,
)


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
            replaced[last.name] = hard_sigmoid(
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
            and reader.kind in WEIGHTED
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
            and producer.kind in WEIGHTED
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
        fits = before is not None and before.kind in WEIGHTED
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
        if operation.kind in WEIGHTED and "bias" not in operation.weights:
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
    around = around_additions(network)
    fresh = iter(range(2 * 10**9, 3 * 10**9))
    shapes = dict(network.trace.shapes)
    copies: dict[int, int] = {}
    operations = []
    for operation in network.operations:
        if operation.kind in WEIGHTED and operation.inputs[0] in around:
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
    parted = {value for group in ties(network) for value in group.parted}
    copies: dict[int, int] = {}
    operations = []
    for operation in network.operations:
        if operation.kind in kinds.TIED:
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
