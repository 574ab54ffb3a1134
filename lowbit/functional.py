"""Reads a functional Keras 3 model as a flat list of layer calls; nested models are opened up.

Recorded `keras.ops` calls become calls of layers of the same meaning (`recorded`).
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras

from lowbit import recorded


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of one layer; values are numbers, each made by one call or a model input."""

    layer: keras.layers.Layer
    name: str  # unique in the model; `outer.inner` for a layer of a nested model
    inputs: tuple[int, ...]
    output: int
    keywords: dict[str, Any]  # arguments of the call that are not tensors
    rank: int = 4  # of the output, the batch axis counted
    separate: bool = False  # several tensors, each an argument of its own, not in one list


@dataclasses.dataclass(frozen=True)
class Trace:
    """A model as calls, in an order in which they can run."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    calls: tuple[Call, ...]
    shapes: dict[int, tuple[int | None, ...]]  # with the batch axis


class UnsupportedModelError(ValueError):
    """The model has something that integer kernels or this tool cannot express."""


def trace(model: keras.Model) -> Trace:
    """Returns the calls of a functional or Sequential model, nested ones flattened.

    Raises:
      UnsupportedModelError: for a subclassed model, a layer with several outputs, or an input that
        is not a tensor of the model.
    """
    calls: list[Call] = []
    shapes: dict[int, tuple] = {}
    names: dict[str, int] = {}
    counter = iter(range(10**9))

    def unique(name):
        # A layer called twice makes two operations: `conv` and `conv.1`.
        names[name] = names.get(name, -1) + 1
        return name if names[name] == 0 else f"{name}.{names[name]}"

    def expand(inner, arguments, prefix):
        functional = _functional(inner, prefix)
        values = {}
        for tensor, value in zip(functional._inputs, arguments, strict=True):
            values[id(tensor)] = value
        for operation, node_index in _ordered_nodes(functional):
            node = operation._inbound_nodes[node_index]
            if isinstance(operation, keras.layers.InputLayer):
                continue
            made = [(operation, node.arguments.keras_tensors)]
            if not isinstance(operation, keras.layers.Layer):
                made = _recorded(operation, node, prefix)
            if len(node.outputs) != len(made):
                raise UnsupportedModelError(
                    f"layer {prefix}{operation.name} has {len(node.outputs)} outputs; 1 is allowed"
                )
            for (layer, tensors), output in zip(made, node.outputs, strict=True):
                inputs = []
                for tensor in tensors:
                    if id(tensor) not in values:
                        raise UnsupportedModelError(
                            f"layer {prefix}{operation.name} takes a tensor from outside the model"
                        )
                    inputs.append(values[id(tensor)])
                if isinstance(operation, keras.Model):
                    (values[id(output)],) = expand(operation, inputs, f"{prefix}{operation.name}.")
                    continue
                value = next(counter)
                values[id(output)] = value
                shapes[value] = tuple(output.shape)
                keywords = {
                    key: argument
                    for key, argument in node.arguments.kwargs.items()
                    if layer is operation and not isinstance(argument, keras.KerasTensor)
                }
                name = unique(f"{prefix}{operation.name}")
                rank = len(output.shape)
                first = node.arguments.args[0] if node.arguments.args else None
                # A recorded operation has become a layer, which takes a list.
                separate = (
                    layer is operation and len(tensors) > 1 and isinstance(first, keras.KerasTensor)
                )
                calls.append(Call(layer, name, tuple(inputs), value, keywords, rank, separate))
        return [values[id(tensor)] for tensor in functional._outputs]

    top = _functional(model, "")
    inputs = []
    for tensor in top._inputs:
        value = next(counter)
        shapes[value] = tuple(tensor.shape)
        inputs.append(value)
    outputs = expand(model, inputs, "")
    return Trace(model.name, tuple(inputs), tuple(outputs), tuple(calls), shapes)


def _recorded(operation, node, prefix):
    """Returns (layer, tensors) for each output of a recorded keras.ops call."""
    kind = type(operation).__name__
    label = f"operation {prefix}{operation.name} (keras.ops, {kind})"
    if kind not in recorded.KNOWN:
        known = ", ".join(recorded.KNOWN)
        raise UnsupportedModelError(f"{label} has no quantized form; those that have: {known}")
    try:
        # The value that ops.pad pads with comes by keyword; no reader knows another such argument.
        others = [value for value in node.arguments.kwargs.values() if value not in (None, 0)]
        found = None if others else recorded.layers_of(operation, node.arguments.args)
    except (TypeError, ValueError) as error:
        raise UnsupportedModelError(f"{label} cannot be read: {error}") from error
    if found is None:
        raise UnsupportedModelError(
            f"{label} has arguments that no integer kernel takes; use a layer of this meaning"
        )
    return found


def run_calls(
    trace: Trace,
    values: dict,
    start: int = 0,
    replaced: Mapping[int, Callable] | None = None,
) -> Iterator[tuple[int, Any]]:
    """Yields (index, output) of each call from `start` on; at the end `values` holds the outputs.

    Args:
      values: what is computed already, by number; changed in place: what no later call reads is
        dropped, so that memory holds the live tensors alone.
      replaced: by id of a layer, function(index, arguments) that runs instead of it.
    """
    last = {value: index for index, call in enumerate(trace.calls) for value in call.inputs}
    last |= dict.fromkeys(trace.outputs, len(trace.calls))
    for index in range(start, len(trace.calls)):
        call = trace.calls[index]
        arguments = [values[value] for value in call.inputs]
        instead = (replaced or {}).get(id(call.layer))
        y = instead(index, arguments) if instead else run_call(call, arguments)
        values[call.output] = y
        for value in (*call.inputs, call.output):
            if last.get(value, -1) <= index:
                values.pop(value, None)
        yield index, y


def run_call(call: Call, arguments: list, **keywords):
    """Returns what the layer of a call computes from other tensors; in inference, unless said."""
    if call.separate:
        return call.layer(*arguments, **(call.keywords | keywords))
    many = len(arguments) > 1 or isinstance(call.layer, keras.layers.Concatenate)
    return call.layer(arguments if many else arguments[0], **(call.keywords | keywords))


def _functional(model, prefix):
    if isinstance(model, keras.Sequential):
        if not model.built:
            raise UnsupportedModelError(
                f"model {prefix}{model.name} is not built; give it an Input"
            )
        return model._functional
    if not hasattr(model, "_nodes_by_depth"):
        raise UnsupportedModelError(
            f"model {prefix}{model.name} ({type(model).__name__}) is subclassed; only functional "
            "and Sequential models can be quantized: rebuild it with keras.Model(inputs, outputs)"
        )
    return model


def _ordered_nodes(functional):
    """Yields (operation, node index) from the inputs on, as the model itself runs them."""
    for depth in sorted(functional._nodes_by_depth, reverse=True):
        for node in functional._nodes_by_depth[depth]:
            yield node.operation, node.operation._inbound_nodes.index(node)
