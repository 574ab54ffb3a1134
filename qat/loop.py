"""The training loop: batches, phases, checkpoints, the log."""

import contextlib
import csv
import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorboard.summary
from absl import logging
from keras import ops

from lowbit import checkpoint, files, layers, progress, quantizers, results
from lowbit.data import pipeline
from qat import losses, rates


class Stream:
    """The training images as batches; batch k depends on the seed and k alone.

    Args:
      images: a data set.
      shape: of one image: height, width, channels.
      preprocess: from `preprocess.parse`.
      batch_size: images a step.
      seed: of order and augmentation.
      augment: as pipeline.train_batches.
    """

    def __init__(self, images, shape, preprocess, batch_size, seed, augment):
        self.images, self.batch_size, self.seed, self.augment = images, batch_size, seed, augment
        self.options = {
            "input_size": shape[:2],
            "channels": shape[2],
            "preprocess": preprocess,
        }

    def training(self, first_step):
        return pipeline.train_batches(
            self.images,
            batch_size=self.batch_size,
            seed=self.seed,
            start_step=first_step,
            augment=self.augment,
            **self.options,
        )

    def calibration(self, count, batch_size=10):
        batches = pipeline.calibration_batches(
            self.images, count, seed=self.seed, batch_size=batch_size, **self.options
        )
        return (x for x, _ in batches)


@dataclasses.dataclass(frozen=True)
class Phases:
    """The steps at which the quantized model changes how it computes."""

    quant_delay: int
    freeze_batch_norm_step: int
    freeze_range_step: int
    range_decay: float


def enter_phase(model: keras.Model, step: int, phases: Phases) -> bool:
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


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the weights move."""

    learning_rate: float
    optimizer: str = "sgd"  # or adam
    schedule: str = "cosine"  # or constant
    momentum: float = 0.9  # of sgd
    weight_decay: float = 0.0  # of convolution and dense kernels
    ema_decay: float | None = None  # of a moving average of the weights, kept beside them
    compiled: bool = False  # the whole step as one XLA program
    warmup_steps: int = 0  # over which the rate grows to learning_rate
    rate_unit: str = "one"  # or step: of the quantizers, see `rates`; adam alone


def fit(
    model: keras.Model,
    stream: Stream,
    steps: int,
    settings: Settings,
    target: losses.Target,
    output_dir: pathlib.Path,
    stage: str,
    phases: Phases | None = None,
    checkpoint_every: int = 100,
    after_step: Callable | None = None,
    more_variables: Sequence = (),
) -> Callable[[], None]:
    """Trains the model in place for `steps` steps; goes on from the stage's checkpoint.

    Args:
      after_step: called behind each step with its number, the first one 1, and a function that gives
        the context in which the model has its weights' averages; None without `ema_decay`.
      more_variables: further ones that a checkpoint holds.

    Returns:
      A function that gives the model its weights' averages, where `ema_decay` is set.

    Raises:
      FloatingPointError: where the loss is not finite: names the step; the last checkpoint stays.
    """
    optimizer = _optimizer(settings, steps, model)
    trainee = target.trainee(model)
    compiled = settings.compiled or keras.config.backend() != "tensorflow"
    trainee.compile(optimizer, target.losses, jit_compile=compiled)
    optimizer.exclude_from_weight_decay(
        [variable for variable in trainee.trainable_variables if variable.name != "kernel"]
    )
    optimizer.build(trainee.trainable_variables)
    learnt = list(trainee.trainable_variables)
    variables = [*trainee.variables, *optimizer.variables, *more_variables]
    path = output_dir / "checkpoint.npz"
    first_step = checkpoint.load(path, stage, variables)
    if first_step:
        logging.info("%s goes on at step %d of %d", stage, first_step, steps)

    @contextlib.contextmanager
    def averages():
        before = [ops.convert_to_numpy(variable) for variable in learnt]
        optimizer.finalize_variable_values(learnt)
        try:
            yield
        finally:
            for variable, value in zip(learnt, before, strict=True):
                variable.assign(value)

    batches = stream.training(first_step)
    log = _Log(output_dir, stage, first_step)
    try:
        with progress.bar(stage, steps) as update:
            for step in range(first_step, steps):
                # A resumed run traces anew at its first step in any case.
                if phases is not None and enter_phase(model, step, phases) and step > first_step:
                    trainee.make_train_function(force=True)
                x, labels = next(batches)
                found = trainee.train_on_batch(x, target.wanted(x, labels))
                loss = float(found[0] if isinstance(found, list) else found)
                if not math.isfinite(loss):
                    raise FloatingPointError(
                        f"{stage}: loss is {loss} at step {step} of {steps}; lower --learning_rate "
                        f"({settings.learning_rate})"
                    )
                if after_step is not None:
                    after_step(step + 1, averages if settings.ema_decay is not None else None)
                log.add(step, loss, float(np.asarray(optimizer.learning_rate)))
                update(step + 1, f"loss {loss:.3f}")
                if (step + 1) % checkpoint_every == 0 and step + 1 < steps:
                    checkpoint.save(path, stage, step + 1, variables)
    finally:
        batches.close()
        log.close()
    path.unlink(missing_ok=True)
    return lambda: optimizer.finalize_variable_values(learnt)


def _optimizer(settings, steps, model):
    rate, warmup = settings.learning_rate, min(settings.warmup_steps, steps - 1)
    if settings.schedule == "cosine":
        begin = {"warmup_target": rate, "warmup_steps": warmup} if warmup else {}
        rate = keras.optimizers.schedules.CosineDecay(
            0.0 if warmup else rate, max(steps - warmup, 1), **begin
        )
    options = {"weight_decay": settings.weight_decay or None}
    if settings.ema_decay is not None:
        options |= {"use_ema": True, "ema_momentum": settings.ema_decay}
    if settings.optimizer == "sgd":
        return keras.optimizers.SGD(rate, settings.momentum, **options)
    factors = rates.in_steps(model) if settings.rate_unit == "step" else None
    return rates.Adam(rate, factors=factors, **options)


def training_seconds(output_dir: pathlib.Path) -> float:
    """Returns how long a run's stages trained, all its sessions together."""
    last = {row["stage"]: float(row["seconds"]) for row in results.read_rows(_csv(output_dir))}
    return sum(last.values())


def _csv(output_dir):
    return output_dir / "training.csv"


COLUMNS = ("stage", "step", "loss", "learning_rate", "seconds")


class _Log:
    """The run's numbers: training.csv, and TensorBoard events."""

    def __init__(self, output_dir, stage, first_step):
        path = _csv(output_dir)
        rows = results.read_rows(path)
        # What a killed run logged after its last checkpoint is computed again, but took its time.
        spent = [float(row["seconds"]) for row in rows if row["stage"] == stage]
        rows = [row for row in rows if row["stage"] != stage or int(row["step"]) < first_step]
        self.start = time.monotonic() - max(spent, default=0.0)
        # Whole or not at all: a run may be killed again before its first step is logged.
        if rows:
            results.write_rows(path, rows)
        else:
            files.save_bytes((",".join(COLUMNS) + "\n").encode(), path)
        self.file = open(path, "a", newline="")
        self.writer = csv.writer(self.file, lineterminator="\n")
        self.stage = stage
        self.events = tensorboard.summary.Writer(str(output_dir / "tensorboard"))

    def add(self, step, loss, rate):
        seconds = time.monotonic() - self.start
        self.writer.writerow([self.stage, step, f"{loss:.6g}", f"{rate:.6g}", f"{seconds:.1f}"])
        self.file.flush()  # to be watched, and kept where the run is killed
        self.events.add_scalar(f"{self.stage}/loss", loss, step=step)
        self.events.add_scalar(f"{self.stage}/learning_rate", rate, step=step)

    def close(self):
        self.file.close()
        self.events.close()
