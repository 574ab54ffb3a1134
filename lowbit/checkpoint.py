"""Checkpoints: all variables of a run in one file, written whole, read back bit for bit."""

import io
import os
import pathlib
import zipfile
from collections.abc import Sequence

import keras
import numpy as np

from lowbit import files


def save(
    path: str | os.PathLike, stage: str, step: int, variables: Sequence[keras.Variable]
) -> None:
    """Writes the variables, in their order, with the stage and the step that comes next."""
    arrays = {f"v{index}": np.asarray(variable) for index, variable in enumerate(variables)}
    content = io.BytesIO()
    np.savez(content, stage=np.array(stage), step=np.array(step), **arrays)
    files.save_bytes(content.getvalue(), path)


def load(path: str | os.PathLike, stage: str, variables: Sequence[keras.Variable]) -> int:
    """Sets the variables from the stage's checkpoint; returns its step, 0 where there is none.

    Raises:
      ValueError: where the file is damaged, or holds other variables.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return 0
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as content:
            if str(content["stage"]) != stage:
                return 0
            arrays = [content[f"v{index}"] for index in range(len(content.files) - 2)]
            step = int(content["step"])
    except (zipfile.BadZipFile, KeyError, OSError, ValueError) as error:
        raise ValueError(f"{path}: damaged checkpoint: {error}") from error
    shapes = [tuple(variable.shape) for variable in variables]
    if [array.shape for array in arrays] != shapes:
        raise ValueError(
            f"{path}: holds {len(arrays)} variables of other shapes than this run's {len(shapes)}"
        )
    for variable, array in zip(variables, arrays, strict=True):
        variable.assign(array)
    return step
