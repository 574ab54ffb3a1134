"""Quantization-aware training: float model, ranges from calibration, fine-tuning, three accuracies.

    python -m qat.train --model=mobilenet_v2                       digits, embedded: no download
    python -m qat.train --model=float.keras --preprocess=tf --dataset=train.zip --val_dataset=val.zip

In --output_dir: float.keras, ptq.keras, qat.keras (each as soon as it is done), checkpoint.npz
while a stage runs, config.json, training.csv, training.png, TensorBoard events; with
--evaluate_every also validation.csv: the accuracy of what would be saved, every so many steps; with
--select_on selection.csv: by what the step that is saved was chosen. A run that was killed goes on
with --resume, to the same weights bit for bit.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import sys
import time

import keras
import numpy as np
from absl import logging

from lowbit import (
    calibration,
    cli,
    fakequant,
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
from qat import loop, losses, methods, selection, stability


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
    strict: bool = cli.field(
        False, "Refuse a layer without an integer form; else it stays in float, and is named."
    )
    override: str | None = cli.field(
        None, "Other bits by layer: PATTERN=SCHEME, with commas; the last that matches counts."
    )
    ends: str | None = cli.field(
        None, "Scheme of the first and the last layer with weights, and of what they read."
    )
    additions: str | None = cli.field(
        None, "Scheme whose activations additions read and write, such as w8a8."
    )
    start: str | None = cli.field(
        None,
        "A .keras file that ptq.quantize made of --model with the same bits, to start from; default: "
        "--model with ranges from --calibration_images.",
    )
    quantizer: str = cli.field(
        "ste",
        "How the gradient passes rounding, and which ranges it moves.",
        choices=methods.METHODS,
    )
    distill: bool = cli.field(
        False, "Learn from the float model's outputs; labels are not looked at, and need not be."
    )
    temperature: float = cli.field(1.0, "Of --distill.")
    distill_features: float = cli.field(
        0.0, "For --distill: weight of the distance between the last layer's inputs."
    )
    output_dir: str | None = cli.field(None, "Default: runs/MODEL_DATASET_SCHEME, numbered.")
    epochs: int = cli.field(4, "Passes over the training images with quantizers in place.")
    steps: int | None = cli.field(None, "Training steps, instead of --epochs.")
    batch_size: int = cli.field(32, "Images a step.")
    learning_rate: float = cli.field(1e-3, "At its start.")
    optimizer: str = cli.field("sgd", "Which.", choices=("sgd", "adam"))
    rate_unit: str = cli.field(
        "one",
        "Of --learning_rate: one, or a step of the quantizer that a variable goes through, with "
        "adam: at 0.005 a weight moves by at most about 0.005 codes at a time, in every layer.",
        choices=("one", "step"),
    )
    warmup_steps: int = cli.field(0, "Steps over which the rate grows; with the cosine schedule.")
    weight_decay: float = cli.field(0.0, "Of kernels, a step: as Keras' optimizers take it.")
    ema_decay: float | None = cli.field(
        None, "Keep a moving average of the weights with this decay, and save that."
    )
    schedule: str = cli.field("cosine", "Of the learning rate.", choices=("cosine", "constant"))
    momentum: float = cli.field(0.9, "Of SGD.")
    seed: int = cli.field(0, "Of weights, order and augmentation.")
    resume: bool = cli.field(False, "Go on with the run in --output_dir.")
    alpha: float | None = cli.field(None, "For a MobileNet of the zoo; default 1, digits 0.35.")
    input_size: int | None = cli.field(None, "For the zoo, in pixels; default 224, digits 48.")
    augment: bool | None = cli.field(
        None, "Random crops, shifts and mirror images as suits the data; default: all but digits."
    )
    float_epochs: int | None = cli.field(
        None, "Float training first; default: 12 where the model has no weights, else 0."
    )
    float_learning_rate: float = cli.field(0.05, "Of that training.")
    calibration_images: int = cli.field(100, "Training images that set the ranges at the start.")
    calibrator: str | None = cli.field(
        None,
        "Range estimator; default: minmax, for activations below 8 bits mse.",
        choices=ranges.CALIBRATORS,
    )
    range_mode: str | None = cli.field(
        None,
        "Activation ranges: moving averages, trained by the gradient, or as calibrated; default: "
        "moving, or trainable with pact, lsq and dsq.",
        choices=("moving", "trainable", "frozen"),
    )
    range_decay: float | None = cli.field(
        None, "Of moving ranges, a step; default: ten time constants before they freeze."
    )
    range_penalty: float = cli.field(0.0, "PACT's: coefficient of trainable ranges' squares.")
    quant_delay: int = cli.field(0, "Steps before activations are quantized.")
    batch_norm: str = cli.field(
        "correction",
        "Until it is frozen: long-term statistics in the weights and the batch's behind them "
        "(correction), or the batch's in the weights (none).",
        choices=layers.BATCH_NORM_MODES,
    )
    freeze_batch_norm_step: int | None = cli.field(
        None,
        "From here on batch norm uses its frozen averages; default: 0 for given weights, half "
        "of the run where the float model was trained here.",
    )
    freeze_range_step: int | None = cli.field(
        None, "From here on moving ranges stay; default: three quarters of the run."
    )
    oscillations: str = cli.field(
        "ignore",
        "Weights that jump between two codes: ignore them, count them, or freeze them.",
        choices=("ignore", "count", "freeze"),
    )
    dampening: float = cli.field(0.0, "Coefficient of a penalty that draws weights to their codes.")
    reestimate_batch_norm: int = cli.field(
        0, "Training images from which batch norms are set anew after training."
    )
    xla: bool = cli.field(
        False, "Compile the whole step; much slower with depthwise convolutions on a CPU."
    )
    checkpoint_every: int = cli.field(100, "Steps between checkpoints.")
    evaluate_every: int | None = cli.field(
        None, "Steps between measurements on the validation images; default: only at the end."
    )
    limit: int | None = cli.field(None, "Validation images, the first ones; default all.")
    select_on: str | None = cli.field(
        None,
        "Images by which the step that is saved is chosen, the start among them; they are neither "
        "trained on nor measured on, where the other flags name them too.",
    )
    select_images: int | None = cli.field(
        None,
        "Of --select_on, the last ones that calibration would draw, half of it at most; default "
        f"{selection.IMAGES}.",
    )

    def __post_init__(self):
        for name in ("epochs", "batch_size", "checkpoint_every", "calibration_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; at least 1 is needed")
        for name in ("steps", "limit", "evaluate_every", "select_images"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; at least 1 is needed")
        amounts = ("float_epochs", "weight_decay", "range_penalty", "dampening", "distill_features")
        for name in (*amounts, "reestimate_batch_norm", "warmup_steps"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must not be below 0")
        if self.temperature <= 0:
            raise ValueError(f"--temperature is {self.temperature}; it must be above 0")
        if self.rate_unit == "step" and self.optimizer != "adam":
            raise ValueError("--rate_unit=step needs --optimizer=adam")
        if self.warmup_steps and self.schedule != "cosine":
            raise ValueError("--warmup_steps needs --schedule=cosine")
        if self.distill_features and not self.distill:
            raise ValueError("--distill_features needs --distill")
        if self.select_images is not None and self.select_on is None:
            raise ValueError("--select_images needs --select_on")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"--ema_decay is {self.ema_decay}; allowed is above 0 and below 1")
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
    bits = spec.bits(config.scheme, config.override, config.ends, config.additions)
    started = _load_start(config)
    open_training = datasets.open_pictures if config.distill else datasets.open_dataset
    whole = config.val_dataset is not None
    training_images = open_training(config.dataset, "train_whole" if whole else "train")
    validation_images = _open_validation(config)

    choosing = None
    if config.select_on is not None:
        chosen_from = open_training(config.select_on, "train_whole")
        training_images, choosing = selection.split(
            *(training_images, validation_images, chosen_from),
            *(config.select_images or selection.IMAGES, config.seed),
        )

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
    if config.distill and not whole:
        validation_images = _labelled_as(float_model, names, validation_images)
    validation_images = datasets.renumbered(validation_images, names)
    if choosing is not None:
        choosing = datasets.renumbered(choosing, names)
    facts |= {"preprocess": text, "dataset": config.dataset, "versions": manifest.versions()}
    facts.setdefault("class_names", None if names is None else list(names))
    preprocess = preprocessing.parse(text)
    input_shape = models.image_input(float_model, config.model)
    classes = float_model.output_shape[-1]
    for images in (training_images, validation_images, choosing):
        if images is not None:
            datasets.check_labels(images, classes)
    if started is None:
        placement.place(float_model, bits, strict=config.strict)  # refuses layers and patterns
    _record_config(config, output_dir)  # only now: bad input has left no run behind
    stream = loop.Stream(
        training_images,
        input_shape,
        preprocess,
        config.batch_size,
        config.seed,
        # 20 epochs of enlarged digits reach 0.98 and more as they are, 0.96 when shifted about.
        config.dataset != "digits" if config.augment is None else config.augment,
    )
    if not float_path.exists():
        epochs = config.float_epochs
        epochs = (12 if trained_here else 0) if epochs is None else epochs
        if epochs:
            steps = math.ceil(epochs * len(training_images) / config.batch_size)
            _fit_batch_norm_momentum(float_model, steps)
            target = losses.labels(np.unique(training_images.labels), classes)
            settings = loop.Settings(
                config.float_learning_rate,
                schedule=config.schedule,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
                compiled=config.xla,
            )
            stage = "float training"
            loop.fit(
                *(float_model, stream, steps, settings, target, output_dir, stage),
                after_step=_follower(
                    *(config, output_dir, stage, steps, validation_images, preprocess),
                    lambda step: float_model,
                ),
            )
        manifest.save_model(float_model, float_path, facts)

    # --- ranges from calibration: the PTQ model ---
    facts |= {name: getattr(config, name) for name in ("scheme", *spec.BITS_FLAGS)}
    ptq_path = output_dir / "ptq.keras"
    if not ptq_path.exists() and started is not None:
        manifest.save_model(started[0], ptq_path, started[1])
    elif not ptq_path.exists():
        quantized = placement.place(float_model, bits, strict=config.strict)
        for name in placement.float_layers(quantized):
            print(f"layer {name} has no integer form and stays in float", file=sys.stderr)
        if calibration.observed_points(quantized):
            count = datasets.available(
                config.calibration_images, training_images, "--calibration_images"
            )
            with progress.bar("calibrating", count) as update:
                calibration.calibrate(
                    quantized,
                    stream.calibration(count),
                    ranges.estimator(_calibrator(config, bits)),
                    update,
                )
        manifest.save_model(quantized, ptq_path, facts)

    # --- fine-tune with quantizers in place ---
    qat_path = output_dir / "qat.keras"
    steps = config.steps or math.ceil(config.epochs * len(training_images) / config.batch_size)
    selected = None
    if not qat_path.exists():
        quantized, _ = manifest.load_model(ptq_path)
        quantized = methods.prepare(quantized, config.quantizer, config.range_mode)
        phases = _phases(config, steps, trained_here)
        _set_up_layers(quantized, config, phases)
        if config.distill:
            target = losses.distillation(float_model, config.temperature, config.distill_features)
        else:
            target = losses.labels(np.unique(training_images.labels), classes)
        settings = loop.Settings(
            config.learning_rate,
            config.optimizer,
            config.schedule,
            config.momentum,
            config.weight_decay,
            config.ema_decay,
            config.xla,
            config.warmup_steps,
            config.rate_unit,
        )
        watch = None
        if config.oscillations != "ignore":
            threshold = stability.THRESHOLD if config.oscillations == "freeze" else None
            watch = stability.Oscillations(quantized, threshold)
        saved = _as_saved(quantized, config, stream)
        if choosing is not None:
            measure = _distance(config, saved, float_model, choosing, preprocess)
            selected = selection.Selection(quantized, steps, measure, output_dir)
        take_averages = loop.fit(
            quantized,
            stream,
            steps,
            settings,
            target,
            output_dir,
            "QAT",
            phases,
            config.checkpoint_every,
            after_step=_watcher(
                *(quantized, watch, steps, output_dir / "alpha.csv"),
                _follower(
                    *(config, output_dir, "QAT", steps, validation_images, preprocess),
                    saved,
                ),
                selected,
            ),
            more_variables=watch.variables() if watch else (),
        )
        if watch:
            results.write_rows(
                output_dir / "oscillations.csv",
                [{"layer": name, "share": share} for name, share in watch.shares().items()],
            )
        if config.ema_decay is not None:
            last = _settled(quantized, config, stream, steps)
            manifest.save_model(last, output_dir / "qat_last_weights.keras", facts)
            take_averages()
        step = selected.restore() if selected else steps
        manifest.save_model(_settled(quantized, config, stream, step), qat_path, facts)

    # --- evaluate: three models, the same images ---
    rows, row = _evaluate(config, output_dir, validation_images, preprocess)
    print(results.table(rows, list(rows[0])), file=sys.stderr)
    plots.training_curve(
        output_dir / "training.csv",
        rows,
        output_dir / "training.png",
        results.read_rows(output_dir / "validation.csv"),
        results.read_rows(output_dir / "selection.csv"),
    )
    row = {
        "tool": "qat.train",
        "model": config.model,
        "scheme": config.scheme,
        **{name: getattr(config, name) for name in spec.BITS_FLAGS},
        "quantizer": config.quantizer,
        "distill": config.distill,
        "dataset": config.dataset,
        "val_dataset": config.val_dataset or f"{config.dataset} (validation split)",
        **row,
        "input_size": float_model.input_shape[1],
        "alpha": config.alpha or _small_alpha(config),
        "steps": steps,
        "selected_step": selection.best_step(output_dir),
        "training_seconds": loop.training_seconds(output_dir),
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


def _load_start(config):
    """Returns the model and the facts of --start, or None.

    Raises:
      ValueError: where it is no quantized model, or has other bits than the flags say.
    """
    if config.start is None:
        return None
    model, facts = manifest.load_model(config.start)
    if not quantizers.activation_quantizers(model):
        raise ValueError(f"--start={config.start} is not a model that ptq.quantize saved")
    for name in ("scheme", *spec.BITS_FLAGS):
        if facts.get(name) != getattr(config, name):
            raise ValueError(
                f"--start={config.start} was made with --{name}={facts.get(name)}, this run has "
                f"{getattr(config, name)}"
            )
    return model, facts


def _open_validation(config):
    name, split = (
        (config.val_dataset, "all") if config.val_dataset else (config.dataset, "validation")
    )
    try:
        return datasets.open_dataset(name, split)
    except (ValueError, FileNotFoundError):
        if not config.distill:
            raise
    return datasets.open_pictures(name, split)  # agreement and KL need no labels


def _labelled_as(model, names, images):
    """Returns the images, without their labels where those are not the network's own."""
    is_named = names is None or set(images.class_names or ()) <= set(names)
    same = is_named and images.num_classes == model.output_shape[-1]
    return images if same else datasets.without_labels(images)


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


# --- training ------------------------------------------------------------------------------------


def _range_mode(config):
    return config.range_mode or methods.METHODS[config.quantizer].range_mode


def _calibrator(config, bits):
    if config.calibrator is not None:
        return config.calibrator
    narrow = bits.scheme.activations is not None and bits.scheme.activations.bits < 8
    return "mse" if narrow else "minmax"


def _set_up_layers(model, config, phases):
    """Gives the layers of a model in its training form what the flags say."""
    for quantizer in quantizers.activation_quantizers(model):
        quantizer.decay = phases.range_decay
        quantizer.range_penalty = config.range_penalty
    for layer in layers.weighted_layers(model):
        layer.batch_norm_mode = config.batch_norm
        layer.dampening = config.dampening


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
    elif _range_mode(config) == "moving" and decay**observing > 0.05:
        logging.warning(
            "--range_decay %g forgets only %.0f%% of the calibrated ranges in %d steps; below %.4f "
            "they would follow the training",
            decay,
            100 * (1 - decay**observing),
            observing,
            0.05 ** (1 / observing),
        )
    return loop.Phases(config.quant_delay, freeze_batch_norm, freeze_range, decay)


def _watcher(model, watch, steps, alpha_path, follow, selected):
    """Returns what is called behind each step: oscillations, DSQ's alphas, validation, the choice."""

    def look(step, averages):
        if watch:
            watch.update()
        if follow:
            follow(step, averages)
        if selected:
            selected.look(step, averages)
        if step % max(steps // 50, 1) == 0 or step == steps:
            _log_rows(alpha_path, [{"step": step} | row for row in methods.alphas(model)])

    return look


def _follower(config, output_dir, stage, steps, images, preprocess, saved):
    """Returns what measures a model on the validation images in between, or None.

    `saved(step)` is the model as it would be saved; the rest is as `loop.fit` calls its `after_step`.
    """
    if config.evaluate_every is None:
        return None
    path = output_dir / "validation.csv"
    count = min(config.limit or len(images), len(images))
    float_outputs = None

    def follow(step, averages):
        nonlocal float_outputs
        if step % config.evaluate_every and step != steps:
            return
        if stage == "QAT" and float_outputs is None:
            model, _ = manifest.load_model(output_dir / "float.keras")
            float_outputs = _outputs(model, config, images, preprocess, count)
        found = []
        for weights in ("last", "average") if averages else ("last",):
            with averages() if weights == "average" else contextlib.nullcontext():
                outputs = _outputs(saved(step), config, images, preprocess, count)
            line = dict.fromkeys(("top1", "kl", "agreement"))
            if images.num_classes > 1:
                line["top1"] = float((metrics.ranks(outputs, images.labels[:count]) == 0).mean())
            if float_outputs is not None:
                line |= _against_float(outputs, float_outputs)
            found.append({"stage": stage, "step": step, "weights": weights} | line)
            said = {"step": step, "weights": weights} | {
                k: f"{v:.4f}" for k, v in line.items() if v
            }
            logging.info("%s: %s", stage, ", ".join(f"{key} {said[key]}" for key in said))
        _log_rows(path, found)

    return follow


def _as_saved(trained, config, stream):
    """Returns what gives a model in training as it would be saved at a step.

    It is one model with new weights each time: 11 of MobileNet-v2, traced one by one, held 560 MiB.
    """
    kept = None

    def saved(step):
        nonlocal kept
        fresh = _plain(trained, config, stream, step)
        if kept is None:
            kept = fresh
        else:
            kept.set_weights(fresh.get_weights())
        return kept

    return saved


def _plain(trained, config, stream, step):
    """Returns the model that is saved of a step, the start being the one before the first."""
    model = methods.plain(trained)
    if config.reestimate_batch_norm and step:
        batches = stream.calibration(config.reestimate_batch_norm, config.batch_size)
        stability.reestimate_batch_norms(model, batches)
    calibration.widen_for_kernels(model)
    return model


def _distance(config, saved, float_model, images, preprocess):
    """Returns what measures `saved(step)` by `selection`'s formula."""
    count, wanted = len(images), None

    def distance(step):
        nonlocal wanted
        outputs = _outputs(saved(step), config, images, preprocess, count)
        if not config.distill:
            rows = np.arange(count)
            return float(-metrics.log_probabilities(outputs)[rows, images.labels].mean())
        if wanted is None:
            wanted = _outputs(float_model, config, images, preprocess, count)
        return _against_float(outputs, wanted)["kl"]

    return distance


def _log_rows(path, rows):
    """Adds a step's rows, if any; a run that was killed comes by again, and later ones go."""
    if not rows:
        return
    stage, step = rows[0].get("stage"), rows[0]["step"]
    kept = [
        row
        for row in results.read_rows(path)
        if row.get("stage") != stage or int(row["step"]) < step
    ]
    results.write_rows(path, [*kept, *rows])


def _settled(trained, config, stream, step):
    """Returns the model as it is saved, and says which ranges did not follow the network."""
    model = _plain(trained, config, stream, step)
    if not calibration.observed_points(model):
        return model
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
    return model


# --- evaluation ----------------------------------------------------------------------------------


def _outputs(model, config, images, preprocess, count, update=lambda done: None):
    """Returns a model's outputs for the first `count` images, float32 (count, classes)."""
    batches = pipeline.batches(
        images,
        input_size=model.input_shape[1:3],
        channels=model.input_shape[3],
        batch_size=config.batch_size,
        preprocess=preprocess,
        indices=np.arange(count),
    )
    done, parts = 0, []
    with fakequant.without_retracing_warnings():  # a handful of models, each traced once
        for part in runtimes.run_keras(model, (x for x, _ in batches)):
            parts.append(part)
            done += len(part)
            update(done)
    return np.concatenate(parts)


def _against_float(outputs, float_outputs):
    """Returns the mean KL to the float network, in nats, and how often both choose the same class."""
    same = outputs.argmax(axis=1) == float_outputs.argmax(axis=1)
    kl = float(metrics.kl_divergence(float_outputs, outputs).mean())
    return {"kl": kl, "agreement": float(same.mean())}


def _evaluate(config, output_dir, images, preprocess):
    """Returns a table of float, PTQ and QAT on the same images, and the row's columns."""
    count = min(config.limit or len(images), len(images))
    outputs, labels = {}, images.labels[:count]
    names = ["float", "ptq", "qat"]
    if config.ema_decay is not None:
        names.append("qat_last_weights")
    for name in names:
        model, _ = manifest.load_model(output_dir / f"{name}.keras")
        with progress.bar(f"measuring {name}", count) as update:
            outputs[name] = _outputs(model, config, images, preprocess, count, update)
    rows, row = [], {"images": count}
    labelled = images.num_classes > 1  # pictures have no labels: agreement and KL say enough
    for name, values in outputs.items():
        found = _against_float(values, outputs["float"])
        row |= {f"{key}_{name}": value for key, value in found.items()}
        measured = {"mean KL to float": found["kl"], "agreement": found["agreement"]}
        if labelled:
            correct = [metrics.ranks(outputs[one], labels) == 0 for one in (name, "float")]
            difference, error = metrics.paired_difference(*correct)
            measured = {
                "top1": float(correct[0].mean()),
                "minus float": difference,
                "paired error": error,
            } | measured
            row[f"top1_{name}"] = measured["top1"]
        rows.append({"model": name} | measured)
    row["top1"] = row.get("top1_qat")
    return rows, row


def main() -> None:
    """Runs the command line."""
    cli.run(train, Config)


if __name__ == "__main__":
    main()
