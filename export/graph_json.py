"""Graph JSON: a `.tflite` file's integer graph as text that any tool reads.

    python -m export.graph_json --model=model.tflite --output=model.json
    python -m export.graph_json --model=model.tflite --output=model.json --without_data

Tensors with shape, dtype, scales and zero points, constants with their codes, nodes in order with
their attributes: `lowbit.integer_graph`'s types, field by field.  float32 scales are written so that
they come back bit for bit.
"""

import dataclasses
import json
import time

import numpy as np

import lowbit
from lowbit import cli, files, integer_graph, manifest, tflite_file


@dataclasses.dataclass(frozen=True)
class Config:
    """The command's flags."""

    model: str = cli.field(cli.REQUIRED, "A .tflite file.")
    output: str = cli.field("model.json", "Where the text goes.")
    without_data: bool = cli.field(False, "Leaves the constants' codes out.")


def export(config: Config) -> dict:
    """Runs the command; returns its result row.

    Raises:
      TFLiteFileError: where the file is none, or holds what the integer graph has no word for.
      ValueError: names the number for which JSON has no word.
    """
    start = time.monotonic()
    manifest.check_output(config.output, ".json")
    graph = tflite_file.read(tflite_file.load_bytes(config.model), config.model)
    try:
        text = json.dumps(as_dict(graph, not config.without_data), allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{config.model}: {error}") from error
    files.save_bytes(text.encode(), config.output)
    return {
        "tool": "export.graph_json",
        "model": config.model,
        "output": config.output,
        "tensors": len(graph.tensors),
        "operations": len(graph.nodes),
        "size_bytes": len(text),
        "seconds": round(time.monotonic() - start, 3),
        "versions": {"lowbit": lowbit.__version__, "numpy": np.__version__},
    }


def as_dict(graph: integer_graph.IntegerGraph, with_data: bool = True) -> dict:
    """Returns a graph as lists, dicts, numbers and text alone."""
    return {
        "name": graph.name,
        "description": graph.description,
        "inputs": list(graph.inputs),
        "outputs": list(graph.outputs),
        "tensors": [_tensor(tensor, with_data) for tensor in graph.tensors.values()],
        "nodes": [
            {
                "op": node.op,
                "name": node.name,
                "inputs": list(node.inputs),
                "outputs": list(node.outputs),
                "attributes": {
                    key: _plain(_finite(value, f"{key} of {node.op} {node.name!r}"))
                    for key, value in node.attributes.items()
                },
            }
            for node in graph.nodes
        ],
    }


def _tensor(tensor, with_data):
    found = {"name": tensor.name, "shape": list(tensor.shape), "dtype": tensor.dtype}
    if tensor.quantization is not None:
        # A float32 is a float64 exactly, and JSON's text of that comes back as the same number.
        scale = _finite(tensor.quantization.scale, f"scale of tensor {tensor.name!r}")
        found["scale"] = [float(each) for each in scale]
        found["zero_point"] = [int(each) for each in tensor.quantization.zero_point]
        found["axis"] = tensor.quantization.axis
    if tensor.data is not None:
        found["constant"] = True
        if with_data:
            found["data"] = np.asarray(_finite(tensor.data, f"tensor {tensor.name!r}")).tolist()
    return found


def _finite(values, what):
    if not isinstance(values, str | None) and not np.isfinite(values).all():
        raise ValueError(f"{what}: NaN or infinity, for which JSON has no word")
    return values


def _plain(value):
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return value.item() if isinstance(value, np.generic) else value


def main() -> None:
    """Runs the command line."""
    cli.run(export, Config)


if __name__ == "__main__":
    main()
