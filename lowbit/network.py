"""The network between a float model and its quantized form: operations on numbered values.

Reading makes it of Keras layers, rewrites change it, and placement makes Keras layers of it again.
"""

import collections
import dataclasses

import keras
import numpy as np

from lowbit import functional

# With weights of their own.
WEIGHTED = ("conv", "depthwise", "conv_transpose", "dense")
# Computes new values, so that a quantizer follows / hands on its input's values and its scale.
SOURCES = (
    *WEIGHTED,
    *("add", "subtract", "multiply", "mean", "requantize"),
    *("softmax", "sigmoid", "tanh", "gelu", "elu", "leaky_relu", "prelu", "rsqrt", "in_float"),
)
TIED = (
    *("average_pool", "max_pool", "global_max_pool", "concatenate", "maximum", "minimum"),
    *("pad", "crop", "slice", "reshape", "permute", "blocks", "upsample", "bilinear"),
    "activation",
)
FUSES_ACTIVATION = (*WEIGHTED, "add", "subtract", "multiply")
# TFLite fixes the scale of what these compute: see placement's `_fixed_range`.
FIXED = ("softmax", "sigmoid", "tanh", "hard_sigmoid")


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of each channel, float32 (channels,): what a batch norm promises."""

    mean: np.ndarray
    deviation: np.ndarray


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of the network, between the float layer and the quantized one."""

    kind: str
    name: str
    inputs: tuple[int, ...]
    output: int
    layer: keras.layers.Layer | None  # whose configuration and weights it takes
    weights: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    batch_norm: dict | None = None  # epsilon and momentum, once folded
    batch_norm_layer: keras.layers.Layer | None = None
    activation: str | None = None  # fused; of kind "activation": the function itself
    label: str = ""  # name of the tensor that results
    # Of the output before its activation, (channels,) each, where a baked batch norm said them.
    statistics: Statistics | None = None
    config: dict = dataclasses.field(default_factory=dict)  # changes to the layer's own


@dataclasses.dataclass(frozen=True)
class Network:
    """A model between two rewrites."""

    trace: functional.Trace
    operations: tuple[Operation, ...]
    outputs: tuple[int, ...]

    def consumers(self) -> collections.Counter:
        """Returns how often each value is used, as a model output included."""
        used = [value for operation in self.operations for value in operation.inputs]
        return collections.Counter([*used, *self.outputs])

    def producers(self) -> dict[int, Operation]:
        return {operation.output: operation for operation in self.operations}


def output_channels(operation: Operation) -> int:
    """Returns how many output channels a weighted operation has."""
    shape = operation.weights["kernel"].shape
    return shape[-2] * shape[-1] if operation.kind == "depthwise" else shape[-1]


def setting(operation: Operation, key: str):
    """Returns an argument of the operation's layer, such as "strides", as rewrites left it."""
    return operation.config.get(key, getattr(operation.layer, key, None))


def around_additions(network: Network) -> set[int]:
    """Returns the values that additions read or write."""
    return {
        value
        for operation in network.operations
        if operation.kind in ("add", "subtract")
        for value in (*operation.inputs, operation.output)
    }


@dataclasses.dataclass(frozen=True)
class Group:
    """Values on one scale; `sources` are those that compute new numbers."""

    name: str
    values: tuple[int, ...]
    sources: tuple[int, ...]
    fixed: str | None  # of FIXED, where a kernel sets the scale
    parted: tuple[int, ...]  # sources of a fixed scale that cannot be the group's


def ties(network: Network) -> list[Group]:
    """Returns the values that operations of kind TIED put on one scale."""
    parent: dict[int, int] = {}

    def find(value):
        parent.setdefault(value, value)
        while parent[value] != value:
            value = parent[value]
        return value

    names = {value: "input" for value in network.trace.inputs}
    kinds = {value: "input" for value in network.trace.inputs}
    fixed_kinds = dict(kinds)
    for operation in network.operations:
        names[operation.output] = operation.label
        kinds[operation.output] = operation.kind
        fixed_kinds[operation.output] = operation.config.get("fixed", operation.kind)
        if operation.kind in TIED:
            for value in operation.inputs:
                parent[find(value)] = find(operation.output)
    members: dict[int, list[int]] = {}
    for value in names:
        members.setdefault(find(value), []).append(value)
    groups = []
    for values in members.values():
        sources = tuple(value for value in values if kinds[value] in (*SOURCES, "input"))
        fixed = [value for value in sources if fixed_kinds[value] in FIXED]
        wanted = {fixed_kinds[value] for value in sources}
        name = names[sources[0]] if len(sources) == 1 else names[values[-1]]
        if not fixed or len(wanted) == 1:
            kind = fixed_kinds[fixed[0]] if fixed else None
            groups.append(Group(name, tuple(values), sources, kind, ()))
        else:
            groups.append(Group(name, tuple(values), sources, None, tuple(fixed)))
    return groups


def hard_sigmoid(name, value, output, layer, label):
    """Returns clip(x / 6 + 1/2, 0, 1): an affine map whose clip is the range of its codes."""
    config = {"scale": 1 / 6, "offset": 0.5, "fixed": "hard_sigmoid"}
    return Operation("rescale", name, (value,), output, layer, label=label, config=config)
