"""Data-free corrections before quantization: rewrites of a network whose batch norms are baked in.

Equalization (Nagel et al. 1906.04721, eq. 7 to 11).  ReLU commutes with a positive factor, so
channel i between two layers can be scaled at will, and the function stays the same:

    w1_i / s_i,  b1_i / s_i,  w2_i * s_i          s_i = sqrt(range(w1_i) / range(w2_i))

With this s both have the range sqrt(range(w1_i) * range(w2_i)), so no channel is drowned by the
largest one: what per-tensor weights need.  ReLU6 does not commute and becomes ReLU, but only where
the batch norm before it says that next to nothing lies above 6.  The paper replaces all of them: it
measured MobileNet-v2, where nothing does; MobileNet-v1 0.25 loses every image that way.

Absorption (section 4.1.3).  A channel whose mean lies 3 deviations above zero is never cut by ReLU,
so c_i = max(0, mean_i - 3 deviation_i) moves into the next layer's bias: b1 - c, b2 + w2^T c.  That
shortens the activations' range.

Analytic bias correction (section 4.2).  Rounding moves a layer's output by (q - w)^T E[x], and E[x]
follows from the batch norm before: with z ~ N(mean, deviation) and ReLU behind it,

    E[relu(z)] = deviation * pdf(mean / deviation) + mean * cdf(mean / deviation)
    E[relu6(z)] = E[relu(z)] - E[relu(z - 6)]
"""

import dataclasses
import math

import numpy as np

from lowbit import affine, placement
from lowbit import network as network_lib
from lowbit import spec as spec_lib

# Operations that give s * x for s * x' where they give x for x', channel by channel.
_HOMOGENEOUS = ("mean", "average_pool", "max_pool", "pad")
# A chain of three layers is settled to 1e-3 after a dozen rounds.
ROUNDS = 40
SETTLED = 1e-4
# A channel scaled by more says that a range is all but zero; its weights are lost either way.
SCALE_LIMIT = 1e4
DEVIATIONS = 3.0
# Share of a tensor's sum that ReLU6 may cut off and still become ReLU.  MobileNet-v2: 0 everywhere;
# MobileNet-v1 0.25: 0.23 at the stem, above 1e-3 in 21 of 27 tensors.
CUT_LIMIT = 1e-3


def equalize(network: network_lib.Network) -> network_lib.Network:
    """Returns the network with each pair of layers equalized, channel by channel.

    The pairs are a weighted layer and the one weighted layer that reads its output, with ReLU,
    ReLU6 or nothing between them (and pooling, padding or a mean over height and width).
    """
    operations = {operation.name: operation for operation in network.operations}
    pairs = [(a, b) for a, b in _pairs(network) if _commutes(operations[a])]
    for first, _ in pairs:
        if operations[first].activation == "relu6":
            operations[first] = dataclasses.replace(operations[first], activation="relu")
    for _ in range(ROUNDS):
        largest_change = 0.0
        for first, second in pairs:
            scale = _scale(operations[first], operations[second])
            largest_change = max(largest_change, float(np.abs(np.log(scale)).max()))
            operations[first] = _with_outputs_scaled(operations[first], 1 / scale)
            operations[second] = _with_inputs_scaled(operations[second], scale)
        if largest_change < SETTLED:
            break
    return _with(network, operations)


def absorb(network: network_lib.Network) -> network_lib.Network:
    """Returns the network with high biases moved into the next layer, where no padding is read.

    A padded position is 0 before and after, so there c would not be made up for at the borders.
    """
    operations = {operation.name: operation for operation in network.operations}
    for first, second in _pairs(network):
        one, two = operations[first], operations[second]
        direct = two.inputs[0] == one.output
        padded = (
            two.kind in ("conv", "depthwise")
            and network_lib.setting(two, "padding") != "valid"
            and any(size > 1 for size in two.weights["kernel"].shape[:2])
        )
        if one.statistics is None or one.activation != "relu" or not direct or padded:
            continue
        above = one.statistics.mean - DEVIATIONS * one.statistics.deviation
        amount = np.maximum(above, 0).astype(np.float32)
        operations[first] = dataclasses.replace(
            one,
            weights=one.weights | {"bias": one.weights["bias"] - amount},
            statistics=dataclasses.replace(one.statistics, mean=one.statistics.mean - amount),
        )
        moved = _response(two, amount)
        operations[second] = dataclasses.replace(
            two, weights=two.weights | {"bias": two.weights["bias"] + moved}
        )
    return _with(network, operations)


def correct_biases(
    network: network_lib.Network, scheme: spec_lib.Scheme | spec_lib.Bits
) -> network_lib.Network:
    """Returns the network with the mean shift of rounding its weights taken off its biases.

    A layer whose input's mean no batch norm tells (the first one) stays as it is.
    """
    schemes = placement.layer_schemes(network, spec_lib.as_bits(scheme))
    operations = []
    means: dict[int, np.ndarray] = {}
    for operation in network.operations:
        known = [means.get(value) for value in operation.inputs]
        if operation.kind in _WEIGHTED:
            weight_spec = schemes[operation.name].weights_of(operation.kind)
            # A convolution in groups reads each weight's channel elsewhere: it stays as it is.
            whole = known[0] is not None and _inputs(operation) == len(known[0])
            if whole and weight_spec is not None:
                kernel = operation.weights["kernel"]
                quantized = _quantized(operation, weight_spec)
                shift = _response(
                    dataclasses.replace(operation, weights={"kernel": quantized - kernel}), known[0]
                )
                operation = dataclasses.replace(
                    operation,
                    weights=operation.weights | {"bias": operation.weights["bias"] - shift},
                )
            if operation.statistics is not None:
                means[operation.output] = activation_mean(
                    operation.statistics.mean, operation.statistics.deviation, operation.activation
                )
        elif operation.kind == "add" and operation.activation is None:
            if all(mean is not None for mean in known):
                means[operation.output] = np.sum(known, axis=0)
        elif (
            operation.kind in ("mean", "average_pool", "pad", "requantize") and known[0] is not None
        ):
            means[operation.output] = known[0]
        elif operation.kind == "concatenate" and all(mean is not None for mean in known):
            rank = len(network.trace.shapes[operation.output])
            if operation.layer.axis in (-1, rank - 1):
                means[operation.output] = np.concatenate(known)
        operations.append(operation)
    return dataclasses.replace(network, operations=tuple(operations))


def activation_mean(mean: np.ndarray, deviation: np.ndarray, activation: str | None) -> np.ndarray:
    """Returns E[activation(z)] for z ~ N(mean, deviation), float64 (channels,)."""
    mean, deviation = np.float64(mean), np.maximum(np.float64(deviation), 1e-12)
    if activation is None:
        return mean

    def relu(mean):
        t = mean / deviation
        density = np.exp(-0.5 * t * t) / math.sqrt(2 * math.pi)
        below = 0.5 * (1 + np.vectorize(math.erf, otypes=[float])(t / math.sqrt(2)))
        return deviation * density + mean * below

    return relu(mean) - relu(mean - 6) if activation == "relu6" else relu(mean)


_WEIGHTED = ("conv", "depthwise", "dense")


def _pairs(network) -> list[tuple[str, str]]:
    """Returns the names of the layers that equalization may scale against each other."""
    consumers = network.consumers()
    readers = {value: operation for operation in network.operations for value in operation.inputs}
    # A Keras layer that is called twice has one kernel for both calls: it must stay.
    calls: dict[int, int] = {}
    for operation in network.operations:
        calls[id(operation.layer)] = calls.get(id(operation.layer), 0) + 1
    pairs = []
    for operation in network.operations:
        if operation.kind not in _WEIGHTED or operation.activation not in (None, "relu", "relu6"):
            continue
        value = operation.output
        reader = readers.get(value)
        while reader is not None and consumers[value] == 1 and reader.kind in _HOMOGENEOUS:
            value = reader.output
            reader = readers.get(value)
        if (
            reader is not None
            and consumers[value] == 1
            and reader.kind in _WEIGHTED
            and calls[id(operation.layer)] == calls[id(reader.layer)] == 1
            and _inputs(reader) == len(operation.weights["bias"])
        ):
            pairs.append((operation.name, reader.name))
    return pairs


def _commutes(operation):
    """Returns whether the activation behind a layer hands on positive factors, or all but does."""
    if operation.activation != "relu6":
        return True
    if operation.statistics is None:
        return False
    mean, deviation = operation.statistics.mean, operation.statistics.deviation
    cut = activation_mean(mean - 6, deviation, "relu").sum()
    return cut <= CUT_LIMIT * activation_mean(mean, deviation, "relu").sum()


def _inputs(operation):
    return operation.weights["kernel"].shape[-2]


def _scale(first, second):
    """Returns s, float32 (channels,)."""
    one, two = _output_ranges(first), _input_ranges(second)
    usable = (one > 0) & (two > 0)
    scale = np.sqrt(np.where(usable, one, 1.0) / np.where(usable, two, 1.0))
    return np.clip(scale, 1 / SCALE_LIMIT, SCALE_LIMIT).astype(np.float32)


def _output_ranges(operation):
    kernel = operation.weights["kernel"]
    if operation.kind == "depthwise":
        return np.abs(kernel).max(axis=(0, 1)).reshape(-1)
    return np.abs(kernel.reshape(-1, kernel.shape[-1])).max(axis=0)


def _input_ranges(operation):
    kernel = np.abs(operation.weights["kernel"])
    return np.moveaxis(kernel, -2, 0).reshape(kernel.shape[-2], -1).max(axis=1)


def _with_outputs_scaled(operation, factor):
    kernel = operation.weights["kernel"]
    shape = kernel.shape[-2:] if operation.kind == "depthwise" else (-1,)
    statistics = operation.statistics
    if statistics is not None:
        statistics = network_lib.Statistics(statistics.mean * factor, statistics.deviation * factor)
    weights = {"kernel": kernel * factor.reshape(shape), "bias": operation.weights["bias"] * factor}
    return dataclasses.replace(operation, weights=weights, statistics=statistics)


def _with_inputs_scaled(operation, factor):
    kernel = operation.weights["kernel"] * factor[:, None]
    return dataclasses.replace(operation, weights=operation.weights | {"kernel": kernel})


def _response(operation, x):
    """Returns the layer's output for an input that is x, (channels,), at every position; no bias."""
    kernel = np.float64(operation.weights["kernel"])
    if operation.kind == "depthwise":
        return np.float32((kernel.sum(axis=(0, 1)) * x[:, None]).reshape(-1))
    taps = kernel.reshape(-1, *kernel.shape[-2:]).sum(axis=0)
    return np.float32(x @ taps)


def _quantized(operation, spec):
    kernel = operation.weights["kernel"]
    flat = kernel.reshape(-1, network_lib.output_channels(operation))
    low, high = affine.observed_range(flat, spec.axis)
    return affine.fake_quantize(flat, low, high, spec).reshape(kernel.shape)


def _with(network, operations):
    return dataclasses.replace(
        network, operations=tuple(operations[operation.name] for operation in network.operations)
    )
