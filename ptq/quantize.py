"""Post-training quantization: places quantizers, calibrates them on images, saves `.keras`.

python -m ptq.quantize --model=float.keras --preprocess=tf --dataset=images.zip --output=ptq.keras

`--recipe=accurate` also corrects the weights, layer by layer, on unlabelled images: what 4-bit
weights need, and 8-bit ones profit from.
"""

import dataclasses
import resource
import sys
import time

from lowbit import (
    affine,
    calibration,
    cli,
    functional,
    layers,
    lowering,
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
from ptq import recipes


@dataclasses.dataclass(frozen=True)
class Config:
    """The command's flags."""

    model: str = cli.field(
        cli.REQUIRED, f"Float model: the path of a .keras file, or a zoo name: {models.NAMES}."
    )
    dataset: str = cli.field(
        cli.REQUIRED,
        "Calibration images: a name or a path; of a source with splits of its own those for training.",
    )
    output: str = cli.field("ptq.keras", "Where the quantized model goes.")
    weights: str | None = cli.field(None, f"For a zoo name: {models.WEIGHTS}.")
    alpha: float | None = cli.field(None, "For a zoo name: width multiplier, such as 0.35.")
    input_size: int | None = cli.field(None, "For a zoo name: height and width in pixels.")
    preprocess: str | None = cli.field(
        None, "tf, torch, caffe, raw, or mean,std; the model's own where it is saved with it."
    )
    scheme: str = cli.field("w8a8", f"Bits and granularity: {spec.ALLOWED}.")
    override: str | None = cli.field(
        None, "Other bits by layer: PATTERN=SCHEME, with commas; the last that matches counts."
    )
    ends: str | None = cli.field(
        None, "Scheme of the first and the last layer with weights, and of what they read."
    )
    additions: str | None = cli.field(
        None, "Scheme whose activations additions read and write, such as w8a8."
    )
    recipe: str = cli.field(
        "plain",
        "plain: ranges alone; fast: the best range for each tensor, and biases; accurate: every layer "
        "fitted to the float one, minutes.",
        choices=recipes.RECIPES,
    )
    corrections: str | None = cli.field(
        None, f"Instead of the recipe's, by name, with commas: {', '.join(recipes.CORRECTIONS)}."
    )
    calibration_images: int = cli.field(100, "Images to calibrate and correct on, labels unused.")
    calibrator: str | None = cli.field(
        None,
        "Range estimator; default: the recipe's (plain: minmax).",
        choices=ranges.CALIBRATORS,
    )
    strict: bool = cli.field(
        False, "Refuse a layer without an integer form; else it stays in float, and is named."
    )
    batch_size: int = cli.field(10, "Images that run through the network at a time.")
    seed: int = cli.field(0, "Which images are drawn.")


def quantize(config: Config) -> dict:
    """Runs the command; returns its result row."""
    start = time.monotonic()
    manifest.check_output(config.output, ".keras")
    bits = spec.bits(config.scheme, config.override, config.ends, config.additions)
    recipe = _recipe(config)
    for flag in ("batch_size", "calibration_images"):
        if getattr(config, flag) < 1:
            raise ValueError(f"--{flag} is {getattr(config, flag)}; at least 1 image is needed")
    if config.model in models.ZOO and config.weights is None:
        raise ValueError(f"--model={config.model} needs --weights: random weights have no ranges")
    dataset = datasets.open_to_calibrate(config.dataset)
    model, facts = models.load(
        config.model, config.weights, input_size=config.input_size, alpha=config.alpha
    )
    input_shape = models.image_input(model, config.model)
    text = preprocessing.first_known(config.model, config.preprocess, facts.get("preprocess"))
    preprocess = preprocessing.parse(text)
    quantized, reference = recipes.place(model, bits, recipe.corrections, config.strict)
    for name in placement.float_layers(quantized):
        print(f"layer {name} has no integer form and stays in float", file=sys.stderr)
    count = datasets.available(config.calibration_images, dataset, "--calibration_images")

    def images():
        batches = pipeline.calibration_batches(
            dataset,
            count,
            seed=config.seed,
            input_size=input_shape[:2],
            channels=input_shape[2],
            batch_size=config.batch_size,
            preprocess=preprocess,
        )
        return (x for x, _ in batches)

    if calibration.observed_points(quantized):
        with progress.bar("calibrating", count) as update:
            estimator = ranges.estimator(recipe.calibrator)
            calibration.calibrate(quantized, images(), estimator, update)
    elif reference is None:
        count = 0  # weights alone need no data (whitepaper section 3.1)
    if reference is not None:
        with progress.bar("correcting layers", len(layers.weighted_layers(quantized))) as update:
            recipes.correct(quantized, reference, recipe.corrections, images(), count, update)
    rows = describe(quantized)
    print(results.table(rows, list(rows[0])), file=sys.stderr)
    # A layer that an override leaves in float (a8) is exported so.
    reasons = (
        spec.why_simulated_only(scheme)
        for number, scheme in enumerate(bits.schemes())
        if number == 0 or scheme.weights is not None
    )
    simulated = next((reason for reason in reasons if reason is not None), None)
    if simulated is None:
        try:  # what the scheme allows, a layer may not: no kernel takes a 16-bit ELU
            lowering.lower(quantized)
        except functional.UnsupportedModelError as error:
            simulated = str(error)
    if simulated is not None:
        print(f"{config.scheme} can be simulated, not exported: {simulated}", file=sys.stderr)
    facts = facts | {
        "preprocess": text,
        "scheme": config.scheme,
        **{name: getattr(config, name) for name in spec.BITS_FLAGS},
        "calibration": f"{count} images of {dataset.name}, {recipe.calibrator}",
        "corrections": list(recipe.corrections),
        "versions": manifest.versions(),
    }
    manifest.save_model(quantized, config.output, facts)
    return {
        "tool": "ptq.quantize",
        "model": config.model,
        "scheme": config.scheme,
        **{name: getattr(config, name) for name in spec.BITS_FLAGS},
        "recipe": config.recipe if config.corrections is None else None,
        "corrections": ",".join(recipe.corrections),
        "dataset": config.dataset,
        "images": count,
        "calibrator": recipe.calibrator,
        "exportable": simulated is None,
        "output": config.output,
        "seconds": round(time.monotonic() - start, 3),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "versions": manifest.versions(),
    }


def _recipe(config: Config) -> recipes.Recipe:
    """Returns the recipe with what the flags change."""
    recipe = recipes.RECIPES[config.recipe]
    changes = {}
    if config.corrections is not None:
        names = [name.strip() for name in config.corrections.split(",") if name.strip()]
        try:
            changes["corrections"] = recipes.check(names)
        except ValueError as error:
            raise ValueError(f"--corrections: {error}") from error
    if config.calibrator is not None:
        changes["calibrator"] = config.calibrator
    return dataclasses.replace(recipe, **changes)


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
