"""ONNX: a fully integer `.tflite` file as an `.onnx` file, for ONNX Runtime and compilers of NPUs.

    python -m export.onnx --model=model.tflite --output=model.onnx
    python -m export.onnx --model=model.tflite --output=model.onnx --form=exact --check=20

| --form | holds                                                       | the .tflite's codes       |
|--------|-------------------------------------------------------------|---------------------------|
| qdq    | float operators between QuantizeLinear and DequantizeLinear | most: see lowbit.onnx_file|
| exact  | operators on codes and on whole numbers                     | all; several times slower |

Inputs and outputs have the file's names, types and meaning.  It needs the package onnx, and --check
onnxruntime.
"""

import dataclasses
import time

import numpy as np

import lowbit
from lowbit import cli, files, kernels, manifest, tflite_file


@dataclasses.dataclass(frozen=True)
class Config:
    """The command's flags."""

    model: str = cli.field(cli.REQUIRED, "A .tflite file of int8 activations and weights.")
    output: str = cli.field("model.onnx", "Where the file goes.")
    form: str = cli.field(
        "qdq",
        "qdq: float operators between QuantizeLinear and DequantizeLinear, which compilers and "
        "runtimes fuse; exact: XNNPACK's arithmetic in plain operators.",
        choices=("qdq", "exact"),
    )
    activations: str = cli.field(
        "uint8",
        "Inside a model of form qdq: uint8 is what ONNX Runtime computes with on x86, int8 on ARM.",
        choices=("uint8", "int8"),
    )
    layout: str = cli.field(
        "NHWC", "Of images at the inputs and outputs.", choices=("NHWC", "NCHW")
    )
    check: int = cli.field(
        0,
        "So many random inputs are run in ONNX Runtime and in the simulator of XNNPACK; the row says "
        "how many output codes differ.",
    )


def export(config: Config) -> dict:
    """Runs the command; returns its result row.

    Raises:
      ValueError: where a package is missing, or the model holds what the form has no word for.
      TFLiteFileError: where --model is no .tflite file.
    """
    start = time.monotonic()
    manifest.check_output(config.output, ".onnx")
    onnx = _package("onnx")
    from lowbit import onnx_file

    content = tflite_file.load_bytes(config.model)
    graph = tflite_file.read(content, config.model)
    facts = tflite_file.read_manifest(content, config.model)
    made = onnx_file.write(
        graph,
        config.form,
        facts | {"form": config.form, "layout": config.layout},
        config.activations,
        config.layout,
    )
    model = onnx.load_model_from_string(made)
    onnx.checker.check_model(model, full_check=True)
    versions = {"lowbit": lowbit.__version__, "numpy": np.__version__, "onnx": onnx.__version__}
    checked = {}
    if config.check:
        runtime = _package("onnxruntime")
        versions["onnxruntime"] = runtime.__version__
        checked = _compare(runtime, made, graph, config)
    files.save_bytes(made, config.output)
    return {
        "tool": "export.onnx",
        "model": config.model,
        "form": config.form,
        "activations": config.activations if config.form == "qdq" else None,
        "layout": config.layout,
        "output": config.output,
        "operations": len(graph.nodes),
        "onnx_nodes": len(model.graph.node),
        "opset": model.opset_import[0].version,
        "size_bytes": len(made),
        **checked,
        "seconds": round(time.monotonic() - start, 3),
        "versions": versions,
    }


def _package(name):
    try:
        return __import__(name)
    except ImportError as error:
        raise ValueError(
            f"the package {name} is missing: pip install 'lowbit[onnx]', or {name} itself"
        ) from error


def _compare(runtime, content, graph, config):
    """Returns how many output values of random inputs differ from the simulator's."""
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    total = differing = 0
    largest = 0.0
    for _ in range(config.check):
        inputs = {name: _random(rng, graph.tensors[name]) for name in graph.inputs}
        wanted = kernels.run(graph, inputs, "xnnpack")
        outside = {name: _laid_out(codes, config.layout) for name, codes in inputs.items()}
        found = dict(zip(graph.outputs, session.run(list(graph.outputs), outside), strict=True))
        for name, codes in wanted.items():
            distance = np.abs(
                found[name].astype(np.float64) - _laid_out(codes, config.layout).astype(np.float64)
            )
            total, differing = total + distance.size, differing + int((distance > 0).sum())
            largest = max(largest, float(distance.max()))
    return {"outputs_compared": total, "outputs_differing": differing, "largest": largest}


def _random(rng, tensor):
    if tensor.dtype == "float32":
        return rng.uniform(-1, 1, tensor.shape).astype(np.float32)
    limits = np.iinfo(tensor.dtype)
    return rng.integers(limits.min, limits.max + 1, tensor.shape).astype(tensor.dtype)


def _laid_out(codes, layout):
    return np.moveaxis(codes, 3, 1) if codes.ndim == 4 and layout == "NCHW" else codes


def main() -> None:
    """Runs the command line."""
    cli.run(export, Config)


if __name__ == "__main__":
    main()
