"""Post-training quantization: places quantizers, calibrates them on images, saves `.keras`.

python -m ptq.quantize --model=float.keras --preprocess=tf --dataset=images.zip --output=ptq.keras
"""

import dataclasses
import sys
import time

from lowbit import (
    affine,
    calibration,
    cli,
    layers,
    manifest,
    models,
    placement,
    progress,
    quantizers,
    ranges,
    results,
    spec,
)
from lowbit.data import datasets, pipeline
from lowbit.data import preprocess as preprocessing


@dataclasses.dataclass(frozen=True)
class Config:
    """The command's flags."""

    model: str = cli.field(cli.REQUIRED, "Float model: a zoo name or the path of a .keras file.")
    dataset: str = cli.field(cli.REQUIRED, "Calibration images: a name or a path.")
    output: str = cli.field("ptq.keras", "Where the quantized model goes.")
    weights: str | None = cli.field(
        None, "For a zoo name: a .keras or .weights.h5 file, or 'imagenet'."
    )
    alpha: float | None = cli.field(None, "For a zoo name: width multiplier, such as 0.35.")
    input_size: int | None = cli.field(None, "For a zoo name: height and width in pixels.")
    preprocess: str | None = cli.field(
        None, "tf, torch, caffe, raw, or mean,std; the model's own where it is saved with it."
    )
    scheme: str = cli.field("w8a8", f"Bits and granularity: {spec.ALLOWED}.")
    calibration_images: int = cli.field(100, "Images to calibrate on.")
    calibrator: str = cli.field("minmax", "Range estimator.", choices=ranges.ESTIMATORS)
    batch_size: int = cli.field(10, "Images that run through the network at a time.")
    seed: int = cli.field(0, "Which images are drawn.")


def quantize(config: Config) -> dict:
    """Runs the command; returns its result row."""
    start = time.monotonic()
    manifest.check_output(config.output, ".keras")
    if config.model in models.ZOO and config.weights is None:
        raise ValueError(f"--model={config.model} needs --weights: random weights have no ranges")
    dataset = datasets.open_dataset(config.dataset, "all")
    model, facts = models.load(
        config.model, config.weights, input_size=config.input_size, alpha=config.alpha
    )
    input_shape = models.image_input(model, config.model)
    text = config.preprocess or facts.get("preprocess")
    if text is None:
        raise ValueError(
            f"{config.model} does not say how its images are normalized; give --preprocess"
        )
    preprocess = preprocessing.parse(text)
    quantized = placement.place(model, spec.scheme(config.scheme))
    count = min(config.calibration_images, len(dataset))
    if spec.scheme(config.scheme).activations is None:
        count = 0  # weights alone need no data (whitepaper section 3.1)
    else:
        batches = pipeline.calibration_batches(
            dataset,
            count,
            seed=config.seed,
            input_size=input_shape[:2],
            channels=input_shape[2],
            batch_size=config.batch_size,
            preprocess=preprocess,
        )
        with progress.bar("calibrating", count) as update:
            calibration.calibrate(
                quantized, (x for x, _ in batches), ranges.estimator(config.calibrator), update
            )
    rows = describe(quantized)
    print(results.table(rows, list(rows[0])), file=sys.stderr)
    facts = facts | {
        "preprocess": text,
        "scheme": config.scheme,
        "calibration": f"{count} images of {dataset.name}, {config.calibrator}",
        "versions": manifest.versions(),
    }
    manifest.save_model(quantized, config.output, facts)
    return {
        "tool": "ptq.quantize",
        "model": config.model,
        "scheme": config.scheme,
        "dataset": config.dataset,
        "images": count,
        "calibrator": config.calibrator,
        "output": config.output,
        "seconds": round(time.monotonic() - start, 3),
        "versions": manifest.versions(),
    }


def describe(model) -> list[dict]:
    """Returns a row for each quantized layer: how its weights and its output are quantized."""
    rows = []
    for layer in model.layers:
        if isinstance(layer, layers.WEIGHTED):
            weights = layer.weight_spec
            if weights is None:
                text, sqnr = "float", None
            else:
                kernel, _ = layer.folded()
                scale = layer.kernel_scale(kernel)
                sqnr = affine.sqnr_db(kernel, layer.quantize_kernel(kernel, *scale))
                kind = "per tensor" if weights.axis is None else "per channel"
                text = f"{weights.bits} bit {kind}"
            rows.append(
                {"layer": layer.name, "weights": text, "weight_sqnr_db": sqnr, "activation": "-"}
            )
        elif isinstance(layer, quantizers.ActivationQuantizer):
            low, high = (float(bound) for bound in layer.range())
            bits = "float" if layer.spec is None else f"{layer.spec.bits} bit"
            rows.append(
                {
                    "layer": layer.name.removesuffix("_quantizer"),
                    "weights": "-",
                    "weight_sqnr_db": None,
                    "activation": f"{bits} [{low:.4g}, {high:.4g}]",
                }
            )
    return rows


def main() -> None:
    """Runs the command line."""
    cli.run(quantize, Config)


if __name__ == "__main__":
    main()
