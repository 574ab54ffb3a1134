"""Export: a quantized `.keras` model becomes a `.tflite` file, fully integer where its scheme is.

    python -m export.tflite --model=ptq.keras --output=model.tflite

The scheme that ptq.quantize or qat.train was given decides the precision:

| scheme                   | weights in the file      | kernels compute in                           |
|--------------------------|--------------------------|----------------------------------------------|
| w8a8, w4a8, ...          | int8; int4, int2 packed  | integers                                     |
| w8a16, w4a16, ...        | int8; int4 packed        | integers, activations int16, bias int64      |
| w8, w4, ...              | int8; int4, int2 packed  | float32, weights dequantized before          |
| dynamic                  | int8                     | integers, activations quantized by the image |
| float16                  | float16                  | float32                                      |
| float32                  | float32                  | float32                                      |
"""

import dataclasses
import sys
import time

from lowbit import (
    boundary,
    cli,
    files,
    lint,
    lowering,
    manifest,
    mlir,
    placement,
    spec,
    tflite_file,
)
from lowbit.data import preprocess as preprocessing


@dataclasses.dataclass(frozen=True)
class Config:
    """The command's flags."""

    model: str = cli.field(cli.REQUIRED, "A .keras file of ptq.quantize or qat.train.")
    output: str = cli.field("model.tflite", "Where the file goes.")
    io: str | None = cli.field(
        None,
        "Input and output: int8 or int16 codes, float32 (adds QUANTIZE and DEQUANTIZE to an "
        "integer model), or uint8 (raw 0-255 pixels, normalized inside an int8 model); default: "
        "what the scheme's activations are.",
        choices=("int8", "int16", "uint8", "float32"),
    )
    weight_storage: str = cli.field(
        "int8",
        "Of weights of 2 to 4 bits: packed takes half the bytes or fewer, but runs on kernels "
        "that unpack it and can be several times slower; int8 holds the same codes for XNNPACK.",
        choices=("int8", "packed"),
    )
    strict: bool = cli.field(
        False, "Refuse a model with a layer that stays in float for want of an integer kernel."
    )
    route: str = cli.field(
        "direct",
        "direct: our flatbuffer writer; mlir: TensorFlow's converter on a fake-quant twin.",
        choices=("direct", "mlir"),
    )


def export(config: Config) -> dict:
    """Runs the command; returns its result row."""
    start = time.monotonic()
    manifest.check_output(config.output, ".tflite")
    model, facts = manifest.load_model(config.model)
    scheme = spec.scheme(facts.get("scheme") or "w8a8")
    if scheme.weights is None and scheme.activations is not None:
        reason = spec.why_simulated_only(scheme)
        raise ValueError(f"{config.model}: {scheme.name} can be simulated only: {reason}")
    in_float = placement.float_layers(model)
    if in_float and config.strict:
        raise ValueError(
            f"{config.model}: {len(in_float)} layers have no integer form and would run in float: "
            f"{', '.join(in_float)}"
        )
    storage = lowering.Storage(
        packed=config.weight_storage == "packed",
        dynamic=scheme.dynamic,
        float16=scheme.float_bits == 16,
    )
    graph = lowering.lower(model, f"lowbit {facts.get('scheme', '')}".strip(), storage)
    preprocess = facts.get("preprocess")
    own = graph.tensors[graph.inputs[0]].dtype
    io = config.io or own
    if io == "uint8":
        if preprocess is None:
            raise ValueError(f"{config.model} does not say how its images are normalized")
        graph = boundary.with_pixel_io(graph, preprocessing.parse(preprocess))
        preprocess = "raw"
    elif io == "float32":
        graph = boundary.with_float_io(graph)
    elif io != own:
        raise ValueError(f"--io={io}: the activations of {config.model} are {own}")
    stored = facts | {
        "preprocess": preprocess,
        "io": io,
        "route": config.route,
        "weight_storage": config.weight_storage,
    }
    if config.route == "mlir":
        if in_float:
            raise ValueError(f"--route=mlir takes no layers in float: {', '.join(in_float)}")
        if own != "int8" or config.weight_storage == "packed":
            raise ValueError(
                f"--route=mlir writes int8 activations and weights alone, not {scheme.name} with "
                f"--weight_storage={config.weight_storage}"
            )
        content = tflite_file.with_manifest(mlir.convert(graph), stored)
    else:
        content = tflite_file.write(graph, stored)
        _verify(graph, content)
    if in_float:
        print(f"in float, for want of an integer form: {', '.join(in_float)}", file=sys.stderr)
    faults = lint.faults(content, config.output, io, floats=True if in_float else None)
    if faults:
        raise ValueError(f"the file would have {len(faults)} faults, the first: {faults[0]}")
    files.save_bytes(content, config.output)
    return {
        "tool": "export.tflite",
        "model": config.model,
        "scheme": facts.get("scheme"),
        "io": io,
        "route": config.route,
        "weight_storage": config.weight_storage,
        "output": config.output,
        "operations": len(graph.nodes),
        "in_float": in_float,
        "size_bytes": len(content),
        "seconds": round(time.monotonic() - start, 3),
        "versions": manifest.versions(),
    }


def _verify(graph, content):
    """Re-opens what was written and compares it with what was meant."""
    read = tflite_file.read(content)
    if [node.op for node in read.nodes] != [node.op for node in graph.nodes]:
        raise AssertionError("the file's operations are not the graph's")
    for name, tensor in graph.tensors.items():
        other = read.tensors[name]
        same = other.shape == tensor.shape and other.dtype == tensor.dtype
        if tensor.data is not None:
            same = same and other.data is not None and (other.data == tensor.data).all()
        if tensor.quantization is not None:
            same = same and (other.quantization.scale == tensor.quantization.scale).all()
            same = same and (other.quantization.zero_point == tensor.quantization.zero_point).all()
        if not same:
            raise AssertionError(f"tensor {name} did not survive writing")


def main() -> None:
    """Runs the command line."""
    cli.run(export, Config)


if __name__ == "__main__":
    main()
