"""Which step of a run is saved: the one that did best on images that are not trained on, the start's
included.

    --distill    lowest mean KL(float || trained), in nats
    labels       lowest mean cross entropy, in nats

A start by PTQ is hard to beat: MobileNet-v1 0.25 with 4-bit weights went from a KL of 0.24 to 1.8 in
200 steps.  With a choice a run that does not help costs its time, and nothing else.
"""

import contextlib
import math
import os
import pathlib
from collections.abc import Callable

import keras
import numpy as np
from absl import logging

from lowbit import checkpoint, results
from lowbit.data import images, pipeline

IMAGES = 400  # that choose, where the user does not say how many
MEASUREMENTS = 10  # over a run, beside the start's


def split(
    training: images.Dataset,
    measured: images.Dataset,
    chosen_from: images.Dataset,
    count: int,
    seed: int,
) -> tuple[images.Dataset, images.Dataset]:
    """Returns the training images less those that choose, and those.

    Those that choose are the last `count` in the order in which calibration draws with this seed, so
    that what calibrated before has seen none of them as long as there are enough for both.  Of images
    that are trained on as well it is half at most, and none is one that is measured on.  An image is
    known by its file's path and its name or number in it.

    Raises:
      ValueError: where there is nothing to choose by, or nothing would be left to train on.
    """
    trained, reported, offered = (
        [os.path.realpath(each.where(index)) for index in range(len(each))]
        for each in (training, measured, chosen_from)
    )
    known = set(reported)
    drawn = pipeline.calibration_order(chosen_from, seed)
    order = [index for index in drawn if offered[index] not in known]
    if not order:
        raise ValueError(f"--select_on={chosen_from.name}: all of its images are measured on")
    most = len(order) // 2 if set(offered) & set(trained) else len(order)
    if count > most:
        logging.warning("--select_images is %d; %d of %s choose", count, most, chosen_from.name)
    order = order[len(order) - min(count, most) :]
    choosing = {offered[index] for index in order}
    left = [index for index, name in enumerate(trained) if name not in choosing]
    if not choosing or not left:
        raise ValueError(
            f"--select_on={chosen_from.name}: {len(offered)} images are too few to choose by and "
            "train on"
        )
    return (
        images.select(training, np.array(left), training.name),
        images.select(chosen_from, np.array(order), chosen_from.name),
    )


class Selection:
    """Keeps a model's variables as they were at the step that did best.

    selection.csv in `folder` has the figure of every measurement; selected.npz, the variables, goes
    when they are back in the model.

    Args:
      model: in training.
      steps: of the run.
      measure: gives the figure of what would be saved at a step, now; the lower the better.
      folder: of the run.
    """

    def __init__(
        self, model: keras.Model, steps: int, measure: Callable[[int], float], folder: pathlib.Path
    ):
        self.model, self.steps, self.measure = model, steps, measure
        self.table, self.kept = folder / "selection.csv", folder / "selected.npz"
        # Neither is there before the others, and a run killed behind `restore` begins anew.
        if not (self.table.exists() and self.kept.exists()):
            self.look(0)

    def look(self, step: int, averages: Callable | None = None) -> None:
        """Measures behind a step, where one is due; as `loop.fit` calls its `after_step`."""
        if step % max(math.ceil(self.steps / MEASUREMENTS), 1) and step != self.steps:
            return
        # A run that was killed comes by again.
        rows = [row for row in results.read_rows(self.table) if int(row["step"]) < step]
        with averages() if averages else contextlib.nullcontext():
            value = self.measure(step)
            # What is not a number is never less.
            if not rows or value < min(float(row["value"]) for row in rows):
                checkpoint.save(self.kept, "selected", step, self.model.variables)
        logging.info("step %d: %.5f on the images that choose", step, value)
        results.write_rows(self.table, [*rows, {"step": step, "value": value}])

    def restore(self) -> int:
        """Gives the model the variables of the best step; returns that step, and says which it is."""
        step = checkpoint.load(self.kept, "selected", self.model.variables)
        values = {int(row["step"]): float(row["value"]) for row in results.read_rows(self.table)}
        said = "step %d of %d is saved: %.5f on the images that choose, %.5f at the start"
        logging.info(said, step, self.steps, values[step], values[0])
        if step == 0:
            logging.warning(
                "no step was better than the start on the images that choose: the start is saved. "
                "A lower --learning_rate, or more images, may do better"
            )
        self.kept.unlink()
        return step


def best_step(folder: pathlib.Path) -> int | None:
    """Returns the step that a run chose, None where none was chosen."""
    rows = results.read_rows(folder / "selection.csv")
    return int(min(rows, key=lambda row: float(row["value"]))["step"]) if rows else None
