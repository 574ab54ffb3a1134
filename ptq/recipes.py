"""Recipes: which corrections a network gets, in which order.

First the rewrites of the float network (`equalization`), then calibration, then the corrections
of one layer after another (`corrections`).  A recipe is a tuple of names; `--corrections` takes the
same names one by one.
"""

import dataclasses
from collections.abc import Callable, Iterable

import keras
import numpy as np

from lowbit import calibration, placement, rewrites, walk
from lowbit import spec as spec_lib
from ptq import corrections, equalization

# In the order in which they are applied, whatever the order in which they are named.
CORRECTIONS = {
    "equalization": "channels scaled between layers; ReLU6 becomes ReLU (no data)",
    "absorption": "high biases moved into the next layer (no data)",
    "bias_analytic": "the mean shift of rounding, from batch norms, off the biases (no data)",
    "clipping": "weight ranges by the error at the layer's output",
    "regression": "weights fitted to the float outputs on the quantized inputs",
    "adaround": "rounding up or down learnt for each weight",
    "error_feedback": "rounding whose error later weights take up (GPTQ), then descent",
    "bias_empirical": "the mean shift of rounding, measured, off the biases",
}
REWRITES = ("equalization", "absorption", "bias_analytic")
ROUNDINGS = ("adaround", "error_feedback")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Corrections, and the calibrator that goes with them."""

    corrections: tuple[str, ...]
    calibrator: str


RECIPES = {
    "plain": Recipe((), "minmax"),
    "fast": Recipe(("bias_empirical",), "auto"),
    "accurate": Recipe(("clipping", "regression", "error_feedback", "bias_empirical"), "auto"),
}


def check(names: Iterable[str]) -> tuple[str, ...]:
    """Returns corrections in their order.

    Raises:
      ValueError: for an unknown name, or two ways to round.
    """
    names = list(names)
    for name in names:
        if name not in CORRECTIONS:
            allowed = ", ".join(CORRECTIONS)
            raise ValueError(f"correction {name!r} is unknown; allowed are {allowed}")
    if all(name in names for name in ROUNDINGS):
        raise ValueError(f"{' and '.join(ROUNDINGS)} are two ways to round; give one of them")
    measured = [name for name in names if name not in REWRITES]
    if "bias_analytic" in names and measured:
        raise ValueError(
            f"bias_analytic foresees rounding to nearest; with {measured[0]} take bias_empirical"
        )
    return tuple(name for name in CORRECTIONS if name in names)


def place(
    model: keras.Model,
    bits: spec_lib.Scheme | spec_lib.Bits,
    names: tuple[str, ...],
    strict: bool = True,
) -> tuple[keras.Model, keras.Model | None]:
    """Returns the placed model with its rewrites, and its float twin where a walk will need one.

    Without corrections the batch norms stay parameters of the layers, for training to go on.
    """
    if not names:
        return placement.place(model, bits, strict=strict), None
    functions = {
        "equalization": equalization.equalize,
        "absorption": equalization.absorb,
        "bias_analytic": lambda network: equalization.correct_biases(network, bits),
    }
    further = [rewrites.bake_batch_norms]
    further += [functions[name] for name in REWRITES if name in names]
    quantized = placement.place(model, bits, further=further, weight_range="stored", strict=strict)
    if all(name in REWRITES for name in names):
        return quantized, None
    return quantized, placement.place(model, bits, further=further, strict=strict)


def correct(
    quantized: keras.Model,
    reference: keras.Model,
    names: tuple[str, ...],
    batches: Iterable[np.ndarray],
    images: int,
    progress: Callable[[int], None] = lambda layers: None,
) -> None:
    """Corrects the layers of a calibrated model, from the input on, in place.

    Args:
      quantized, reference: from `place`.
      names: from `check`.
      batches, images: as `walk.walk`.
      progress: called with the number of layers done.
    """
    settings = corrections.Settings(
        rounding=next((name for name in ROUNDINGS if name in names), "nearest"),
        regression="regression" in names,
        clipping="clipping" in names,
        bias="bias_empirical" in names,
    )
    for step in walk.walk(quantized, reference, batches, images):
        corrections.correct(step, settings)
        progress(step.index + 1)
    calibration.widen_for_kernels(quantized)
