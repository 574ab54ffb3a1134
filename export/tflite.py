"""Export: a quantized `.keras` model becomes a fully integer `.tflite` file.

python -m export.tflite --model=ptq.keras --output=model.tflite
"""

import dataclasses
import time

from lowbit import boundary, cli, files, lint, lowering, manifest, mlir, tflite_file
from lowbit.data import preprocess as preprocessing


@dataclasses.dataclass(frozen=True)
class Config:
    """The command's flags."""

    model: str = cli.field(cli.REQUIRED, "A .keras file of ptq.quantize or qat.train.")
    output: str = cli.field("model.tflite", "Where the file goes.")
    io: str = cli.field(
        "int8",
        "Input and output: int8 codes, float32 (adds QUANTIZE and DEQUANTIZE), or uint8 (raw "
        "0-255 pixels, normalized inside the file).",
        choices=("int8", "uint8", "float32"),
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
    graph = lowering.lower(model, description=f"lowbit {facts.get('scheme', '')}".strip())
    preprocess = facts.get("preprocess")
    if config.io == "uint8":
        if preprocess is None:
            raise ValueError(f"{config.model} does not say how its images are normalized")
        graph = boundary.with_pixel_io(graph, preprocessing.parse(preprocess))
        preprocess = "raw"
    elif config.io == "float32":
        graph = boundary.with_float_io(graph)
    stored = facts | {"preprocess": preprocess, "io": config.io, "route": config.route}
    if config.route == "mlir":
        content = tflite_file.with_manifest(mlir.convert(graph), stored)
    else:
        content = tflite_file.write(graph, stored)
        _verify(graph, content)
    faults = lint.faults(content, config.output, config.io)
    if faults:
        raise ValueError(f"the file would have {len(faults)} faults, the first: {faults[0]}")
    files.save_bytes(content, config.output)
    return {
        "tool": "export.tflite",
        "model": config.model,
        "scheme": facts.get("scheme"),
        "io": config.io,
        "route": config.route,
        "output": config.output,
        "operations": len(graph.nodes),
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
