"""Quantization-aware training: float model, ranges from calibration, fine-tuning, three accuracies.

    python -m qat.train --model=mobilenet_v2                       digits, embedded: no download
    python -m qat.train --model=float.keras --preprocess=tf --dataset=train.zip --val_dataset=val.zip

In --output_dir: float.keras, ptq.keras, qat.keras (each as soon as it is done), checkpoint.npz while
a stage runs, config.json, training.csv, training.png, TensorBoard events.  A run that was killed goes
on with --resume, to the same weights bit for bit.
"""

import csv
import dataclasses
import json
import math
import pathlib
import sys
import time

import keras
import numpy as np
import tensorboard.summary
from absl import logging

from lowbit import (
    calibration,
    checkpoint,
    cli,
    files,
    layers,
    manifest,
    metrics,
    models,
    placement,
    plots,
    progress,
    quantizers,
    ranges,
    results,
    runtimes,
    spec,
)
from lowbit.data import datasets, pipeline
from lowbit.data import preprocess as preprocessing


@dataclasses.dataclass(frozen=True)
class Config:
    """The command's flags, and the record of a run."""

    model: str = cli.field(
        "mobilenet_v2", f"The path of a float .keras file, or a zoo name: {models.NAMES}."
    )
    weights: str | None = cli.field(
        None, f"For a zoo name: {models.WEIGHTS}; none: trained here first."
    )
    dataset: str = cli.field("digits", f"Training images: {datasets.ALLOWED}.")
    val_dataset: str | None = cli.field(
        None, "Images to measure on; default: the data set's own split, or a tenth of it."
    )
    preprocess: str | None = cli.field(
        None, "tf, torch, caffe, raw, or mean,std; default: the model's own."
    )
    scheme: str = cli.field("w8a8", f"Bits and granularity: {spec.ALLOWED}.")
    output_dir: str | None = cli.field(None, "Default: runs/MODEL_DATASET_SCHEME, numbered.")
    epochs: int = cli.field(4, "Passes over the training images with quantizers in place.")
    steps: int | None = cli.field(None, "Training steps, instead of --epochs.")
    batch_size: int = cli.field(32, "Images a step.")
    learning_rate: float = cli.field(1e-3, "Of SGD with momentum, at its start.")
    schedule: str = cli.field("cosine", "Of the learning rate.", choices=("cosine", "constant"))
    momentum: float = cli.field(0.9, "Of SGD.")
    seed: int = cli.field(0, "Of weights, order and augmentation.")
    resume: bool = cli.field(False, "Go on with the run in --output_dir.")
    alpha: float | None = cli.field(None, "For a MobileNet of the zoo; default 1, digits 0.35.")
    input_size: int | None = cli.field(None, "For the zoo, in pixels; default 224, digits 48.")
    augment: bool | None = cli.field(
        None, "Random crops, shifts and mirror images as suits the data; default: all but digits."
    )
    float_epochs: int = cli.field(12, "Float training, where the model has no weights.")
    float_learning_rate: float = cli.field(0.05, "Of that training.")
    calibration_images: int = cli.field(100, "Training images that set the ranges at the start.")
    calibrator: str = cli.field("minmax", "Range estimator.", choices=ranges.CALIBRATORS)
    range_mode: str = cli.field(
        "moving",
        "Activation ranges: moving averages, trained by the gradient, or as calibrated.",
        choices=("moving", "trainable", "frozen"),
    )
    range_decay: float | None = cli.field(
        None, "Of moving ranges, a step; default: ten time constants before they freeze."
    )
    quant_delay: int = cli.field(0, "Steps before activations are quantized.")
    freeze_batch_norm_step: int | None = cli.field(
        None,
        "From here on batch norm uses its frozen averages; default: 0 for given weights, half "
        "of the run where the float model was trained here.",
    )
    freeze_range_step: int | None = cli.field(
        None, "From here on moving ranges stay; default: three quarters of the run."
    )
    checkpoint_every: int = cli.field(100, "Steps between checkpoints.")
    limit: int | None = cli.field(None, "Validation images, the first ones; default all.")

    def __post_init__(self):
        counts = ("epochs", "float_epochs", "batch_size", "checkpoint_every", "calibration_images")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; at least 1 is needed")
        for name in ("steps", "limit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; at least 1 is needed")
        if self.learning_rate <= 0 or self.float_learning_rate <= 0:
            raise ValueError(f"--learning_rate is {self.learning_rate}; it must be above 0")
        if self.range_decay is not None and not 0 <= self.range_decay < 1:
            raise ValueError(f"--range_decay is {self.range_decay}; allowed is 0 to below 1")


def train(config: Config) -> dict:
    """Runs the command; returns its result row."""
    start = time.monotonic()

    # --- set-up ---
    output_dir = _output_dir(config)
    keras.utils.set_random_seed(config.seed)
    if config.val_dataset is None:
        training_images = datasets.open_dataset(config.dataset, "train")
        validation_images = datasets.open_dataset(config.dataset, "validation")
    else:
        training_images = datasets.open_dataset(config.dataset, "train_whole")
        validation_images = datasets.open_dataset(config.val_dataset, "all")

    # --- float model ---
    float_path = output_dir / "float.keras"
    trained_here = config.model in models.ZOO and config.weights is None
    if float_path.exists():
        float_model, facts = manifest.load_model(float_path)
    else:
        float_model, facts = _load_float(config, training_images)
    text = preprocessing.first_known(config.model, config.preprocess, facts.get("preprocess"))
    names = training_images.class_names or facts.get("class_names")
    training_images = datasets.renumbered(training_images, facts.get("class_names"))
    validation_images = datasets.renumbered(validation_images, names)
    facts |= {"preprocess": text, "dataset": config.dataset, "versions": manifest.versions()}
    facts.setdefault("class_names", None if names is None else list(names))
    preprocess = preprocessing.parse(text)
    input_shape = models.image_input(float_model, config.model)
    classes = float_model.output_shape[-1]
    for images in (training_images, validation_images):
        datasets.check_labels(images, classes)
    _record_config(config, output_dir)  # only now: bad input has left no run behind
    stream = _Stream(config, training_images, input_shape, preprocess)
    if not float_path.exists():
        if trained_here:
            steps = math.ceil(config.float_epochs * len(training_images) / config.batch_size)
            _fit_batch_norm_momentum(float_model, steps)
            rate = config.float_learning_rate
            fit(float_model, stream, steps, rate, config, output_dir, "float training")
        manifest.save_model(float_model, float_path, facts)

    # --- ranges from calibration: the PTQ model ---
    scheme = spec.scheme(config.scheme)
    facts |= {"scheme": config.scheme}
    ptq_path = output_dir / "ptq.keras"
    if not ptq_path.exists():
        quantized = placement.place(float_model, scheme)
        if scheme.activations is not None:
            count = min(config.calibration_images, len(training_images))
            with progress.bar("calibrating", count) as update:
                calibration.calibrate(
                    quantized,
                    stream.calibration(count),
                    ranges.estimator(config.calibrator),
                    update,
                )
        manifest.save_model(quantized, ptq_path, facts)

    # --- fine-tune with quantizers in place ---
    qat_path = output_dir / "qat.keras"
    steps = config.steps or math.ceil(config.epochs * len(training_images) / config.batch_size)
    if not qat_path.exists():
        quantized, _ = manifest.load_model(ptq_path)
        phases = _phases(config, steps, trained_here)
        for quantizer in quantizers.activation_quantizers(quantized):
            quantizer.set_mode(config.range_mode)
            quantizer.decay = phases.range_decay
        fit(quantized, stream, steps, config.learning_rate, config, output_dir, "QAT", phases)
        _settle(quantized, config, stream)
        manifest.save_model(quantized, qat_path, facts)

    # --- evaluate: three models, the same images ---
    rows, row = _evaluate(config, output_dir, validation_images, preprocess)
    print(results.table(rows, list(rows[0])), file=sys.stderr)
    plots.training_curve(output_dir / "training.csv", rows, output_dir / "training.png")
    row = {
        "tool": "qat.train",
        "model": config.model,
        "scheme": config.scheme,
        "dataset": config.dataset,
        "val_dataset": config.val_dataset or f"{config.dataset} (validation split)",
        **row,
        "input_size": float_model.input_shape[1],
        "alpha": config.alpha or _small_alpha(config),
        "steps": steps,
        "output_dir": str(output_dir),
        "size_bytes": qat_path.stat().st_size,
        "seconds": round(time.monotonic() - start, 3),
        "versions": manifest.versions(),
    }
    results.append_row(output_dir / "results.csv", row)
    return row


# --- set-up --------------------------------------------------------------------------------------


def _output_dir(config):
    if config.output_dir is not None:
        folder = pathlib.Path(config.output_dir)
        if (folder / "config.json").exists() and not config.resume:
            raise ValueError(f"{folder} holds a run; --resume it, or give another --output_dir")
        if config.resume and not (folder / "config.json").exists():
            raise ValueError(f"{folder} holds no run to --resume")
    else:
        stem = f"{pathlib.Path(config.model).stem}_{pathlib.Path(config.dataset).stem}"
        base = pathlib.Path("runs") / f"{stem}_{config.scheme}"
        numbered = [base, *(base.with_name(f"{base.name}_{n}") for n in range(2, 10_000))]
        free = next(i for i, folder in enumerate(numbered) if not folder.exists())
        if config.resume and free == 0:
            raise ValueError(f"there is no run {base} to --resume")
        folder = numbered[free - 1] if config.resume else numbered[free]
    return folder


def _record_config(config, output_dir):
    """Writes config.json, or compares a resumed run's flags with those that it was started with."""
    path = output_dir / "config.json"
    record = dataclasses.asdict(config) | {"resume": False, "output_dir": None}
    if config.resume:
        earlier = json.loads(path.read_text())
        for name, value in record.items():
            if earlier.get(name) != value:
                raise ValueError(
                    f"--{name} is {value}, but {output_dir} was started with {earlier.get(name)}"
                )
        return
    output_dir.mkdir(parents=True, exist_ok=True)
    files.save_bytes(json.dumps(record, indent=1).encode(), path)


def _small_alpha(config):
    if config.model not in models.TAKES_ALPHA:
        return None
    return models.SMALL.get(config.dataset, (None, 1.0))[1]


def _load_float(config, training_images):
    alpha, input_size = config.alpha, config.input_size
    if config.model in models.ZOO:
        alpha = alpha or _small_alpha(config)
        input_size = input_size or models.SMALL.get(config.dataset, (None,))[0]
    return models.load(config.model, config.weights, training_images.num_classes, input_size, alpha)


def _fit_batch_norm_momentum(model, steps):
    """Keras' MobileNets average over 1,000 steps: a shorter run would be measured with the start's."""
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = min(layer.momentum, max(0.5, 1 - 20 / steps))


class _Stream:
    """The training images as batches; batch k depends on the seed and k alone."""

    def __init__(self, config, images, shape, preprocess):
        self.config, self.images = config, images
        self.options = {
            "input_size": shape[:2],
            "channels": shape[2],
            "preprocess": preprocess,
        }

    def training(self, first_step):
        return pipeline.train_batches(
            self.images,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            start_step=first_step,
            # 20 epochs of enlarged digits reach 0.98 and more as they are, 0.96 when shifted about.
            augment=self.config.dataset != "digits"
            if self.config.augment is None
            else self.config.augment,
            **self.options,
        )

    def calibration(self, count):
        batches = pipeline.calibration_batches(
            self.images, count, seed=self.config.seed, batch_size=10, **self.options
        )
        return (x for x, _ in batches)


# --- training ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Phases:
    """The steps at which the quantized model changes how it computes."""

    quant_delay: int
    freeze_batch_norm_step: int
    freeze_range_step: int
    range_decay: float


def _phases(config, steps, trained_here):
    freeze_batch_norm = config.freeze_batch_norm_step
    if freeze_batch_norm is None:
        freeze_batch_norm = steps // 2 if trained_here else 0
    freeze_range = config.freeze_range_step
    if freeze_range is None:
        freeze_range = max(steps * 3 // 4, 1)
    observing = max(min(freeze_range, steps) - config.quant_delay, 1)
    decay = config.range_decay
    if decay is None:
        decay = min(max(0.9, 1 - 10 / observing), 0.999)
    elif config.range_mode == "moving" and decay**observing > 0.05:
        logging.warning(
            "--range_decay %g forgets only %.0f%% of the calibrated ranges in %d steps; below %.4f "
            "they would follow the training",
            decay,
            100 * (1 - decay**observing),
            observing,
            0.05 ** (1 / observing),
        )
    return Phases(config.quant_delay, freeze_batch_norm, freeze_range, decay)


def _enter_phase(model, step, phases) -> bool:
    """Sets the model's switches for a step; returns whether one moved (the step is traced anew)."""
    moved = False
    for quantizer in quantizers.activation_quantizers(model):
        enabled = step >= phases.quant_delay
        frozen = quantizer.mode == "moving" and step >= phases.freeze_range_step
        moved |= quantizer.enabled != enabled or frozen
        quantizer.enabled = enabled
        if frozen:
            quantizer.set_mode("frozen")
    for layer in layers.weighted_layers(model):
        frozen = layer.batch_norm is not None and step >= phases.freeze_batch_norm_step
        moved |= layer.batch_norm_frozen != frozen
        layer.batch_norm_frozen = frozen
    return moved


def fit(
    model: keras.Model,
    stream: _Stream,
    steps: int,
    learning_rate: float,
    config: Config,
    output_dir: pathlib.Path,
    stage: str,
    phases: Phases | None = None,
) -> None:
    """Trains the model in place for `steps` steps of SGD; goes on from the stage's checkpoint.

    Raises:
      FloatingPointError: where the loss is not finite: names the step; the last checkpoint stays.
    """
    rate = learning_rate
    if config.schedule == "cosine":
        rate = keras.optimizers.schedules.CosineDecay(learning_rate, steps)
    optimizer = keras.optimizers.SGD(rate, config.momentum)
    trainee = _logits_model(model)
    trainee.compile(
        optimizer,
        _cross_entropy(np.unique(stream.images.labels), trainee.output_shape[-1]),
        jit_compile=keras.config.backend() != "tensorflow",
    )
    optimizer.build(trainee.trainable_variables)
    variables = [*trainee.variables, *optimizer.variables]
    path = output_dir / "checkpoint.npz"
    first_step = checkpoint.load(path, stage, variables)
    if first_step:
        logging.info("%s goes on at step %d of %d", stage, first_step, steps)
    batches = stream.training(first_step)
    log = _Log(output_dir, stage, first_step)
    try:
        with progress.bar(stage, steps) as update:
            for step in range(first_step, steps):
                # A resumed run traces anew at its first step in any case.
                if phases is not None and _enter_phase(model, step, phases) and step > first_step:
                    trainee.make_train_function(force=True)
                x, labels = next(batches)
                loss = float(trainee.train_on_batch(x, labels))
                if not math.isfinite(loss):
                    raise FloatingPointError(
                        f"{stage}: loss is {loss} at step {step} of {steps}; lower --learning_rate "
                        f"({learning_rate})"
                    )
                log.add(step, loss, float(np.asarray(optimizer.learning_rate)))
                update(step + 1, f"loss {loss:.3f}")
                if (step + 1) % config.checkpoint_every == 0 and step + 1 < steps:
                    checkpoint.save(path, stage, step + 1, variables)
    finally:
        batches.close()
        log.close()
    path.unlink(missing_ok=True)


def _cross_entropy(present: np.ndarray, classes: int):
    """Returns the cross entropy over the classes that the training images have.

    Images of 10 of ImageNet's 1,000 classes would teach a network that the other 990 never occur:
    200 steps at a rate of 1e-5 took MobileNet-v2 from 0.84 to 0.71 on images of all classes.
    """
    absent = np.full(classes, -1e9, np.float32)
    absent[present] = 0
    if len(present) < classes:
        logging.info("the training images have %d of %d classes", len(present), classes)

    def loss(labels, logits):
        return keras.losses.sparse_categorical_crossentropy(
            labels, logits + absent, from_logits=True
        )

    return loss


def _logits_model(model):
    """Returns the model up to its logits: a last softmax belongs to the loss."""
    tensor = model.outputs[0]
    operation = tensor._keras_history.operation
    if isinstance(operation, quantizers.ActivationQuantizer):
        node = operation._inbound_nodes[tensor._keras_history.node_index]
        tensor = node.arguments.keras_tensors[0]
        operation = tensor._keras_history.operation
    if isinstance(operation, keras.layers.Softmax):
        return type(model)(model.inputs, operation.input)
    if isinstance(operation, keras.layers.Activation | keras.layers.Dense) and (
        operation.activation is keras.activations.softmax
    ):
        raise ValueError(
            f"layer {operation.name} computes the softmax itself; for float training end the model "
            "in logits, or in a Softmax layer"
        )
    return model


class _Log:
    """The run's numbers: training.csv, and TensorBoard events."""

    def __init__(self, output_dir, stage, first_step):
        path = output_dir / "training.csv"
        rows = []
        if path.exists():
            with open(path, newline="") as file:
                rows = [row for row in csv.reader(file)][1:]
        # What a killed run logged after its last checkpoint is computed again.
        rows = [row for row in rows if row[0] != stage or int(row[1]) < first_step]
        self.file = open(path, "w", newline="")
        self.writer = csv.writer(self.file)
        self.writer.writerow(["stage", "step", "loss", "learning_rate"])
        self.writer.writerows(rows)
        self.stage = stage
        self.events = tensorboard.summary.Writer(str(output_dir / "tensorboard"))

    def add(self, step, loss, rate):
        self.writer.writerow([self.stage, step, f"{loss:.6g}", f"{rate:.6g}"])
        self.events.add_scalar(f"{self.stage}/loss", loss, step=step)
        self.events.add_scalar(f"{self.stage}/learning_rate", rate, step=step)

    def close(self):
        self.file.close()
        self.events.close()


def _settle(model, config, stream):
    """Freezes what training moved, and says which moving ranges did not follow the network."""
    for layer in layers.weighted_layers(model):
        layer.batch_norm_frozen = True
    for quantizer in quantizers.activation_quantizers(model):
        quantizer.enabled = True
        quantizer.set_mode("frozen")
    calibration.widen_for_kernels(model)
    if spec.scheme(config.scheme).activations is None:
        return
    estimator = ranges.ESTIMATORS["moving_average"]
    observed, _ = calibration.observe(model, stream.calibration(32), estimator)
    for quantizer, bounds in observed.items():
        low, high = (float(bound) for bound in quantizer.range())
        width = float(bounds[:, 1].max() - bounds[:, 0].min())
        if width > 0 and not 0.5 <= (high - low) / width <= 4:
            logging.warning(
                "%s: its range [%.4g, %.4g] is %.2f times what the trained network computes; more "
                "steps, or a smaller --range_decay, would let it follow",
                quantizer.name,
                low,
                high,
                (high - low) / width,
            )


# --- evaluation ----------------------------------------------------------------------------------


def _evaluate(config, output_dir, images, preprocess):
    """Returns a table of float, PTQ and QAT on the same images, and the row's columns."""
    count = min(config.limit or len(images), len(images))
    outputs, labels = {}, images.labels[:count]
    for name in ("float", "ptq", "qat"):
        model, _ = manifest.load_model(output_dir / f"{name}.keras")
        batches = pipeline.batches(
            images,
            input_size=model.input_shape[1:3],
            channels=model.input_shape[3],
            batch_size=config.batch_size,
            preprocess=preprocess,
            indices=np.arange(count),
        )
        with progress.bar(f"measuring {name}", count) as update:
            done, parts = 0, []
            for part in runtimes.run_keras(model, (x for x, _ in batches)):
                parts.append(part)
                done += len(part)
                update(done)
        outputs[name] = np.concatenate(parts)
    rows, row = [], {"images": count}
    correct = {name: metrics.ranks(values, labels) == 0 for name, values in outputs.items()}
    for name, values in outputs.items():
        difference, error = metrics.paired_difference(correct[name], correct["float"])
        kl = float(metrics.kl_divergence(outputs["float"], values).mean())
        rows.append(
            {
                "model": name,
                "top1": float(correct[name].mean()),
                "minus float": difference,
                "paired error": error,
                "mean KL to float": kl,
            }
        )
        row[f"top1_{name}"] = float(correct[name].mean())
    row |= {"top1": row["top1_qat"], "kl_qat": rows[-1]["mean KL to float"]}
    return rows, row


def main() -> None:
    """Runs the command line."""
    cli.run(train, Config)


if __name__ == "__main__":
    main()
