"""Saved models: a `.keras` file with the facts that the next tool needs, written whole or not at all.

The facts (preprocess, scheme, data set, versions) lie in the archive as `lowbit.json`, which Keras
ignores.
"""

import json
import os
import pathlib
import zipfile

import keras

import lowbit.layers  # noqa: F401  (registers the layers that a file may name)
from lowbit import files, results

MEMBER = "lowbit.json"
versions = results.versions


def save_model(model: keras.Model, path: str | os.PathLike, facts: dict) -> None:
    """Writes the model and its facts; an earlier file stays as it was where that fails.

    Raises:
      OSError: names the path that cannot be written.
      ValueError: where the path does not end in .keras.
    """
    path = check_output(path, ".keras")
    with files.replacing(path) as temporary:
        model.save(temporary)
        with zipfile.ZipFile(temporary, "a") as archive:
            archive.writestr(MEMBER, json.dumps(facts, sort_keys=True))


def check_output(path: str | os.PathLike, suffix: str, flag: str = "--output") -> pathlib.Path:
    """Returns the path; raises before any work is done where it cannot be written."""
    path = pathlib.Path(path)
    if path.suffix != suffix:
        raise ValueError(f"{flag} {path} must end in {suffix}")
    if path.is_dir():
        raise ValueError(f"{flag} {path} is a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path.parent} is not writable")
    return path


def load_model(path: str | os.PathLike) -> tuple[keras.Model, dict]:
    """Returns a `.keras` file's model and its facts ({} for a file of another tool).

    Raises:
      FileNotFoundError, ValueError: one line that names the file and what is wrong with it.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix != ".keras":
        raise ValueError(f"{path}: not a .keras file")
    try:
        facts = load_facts(path)
        model = keras.models.load_model(path, compile=False)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: damaged or cut short: {error}") from error
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ValueError(f"{path}: {_reason(error)}") from error
    if not isinstance(model, keras.Model):
        raise ValueError(f"{path}: holds a {type(model).__name__}, not a model")
    return model, facts


def _reason(error: Exception) -> str:
    text = str(error)
    if "Lambda" in text or "lambda" in text:
        return "holds a Lambda layer, whose Python code is not run; replace it by a Keras layer"
    if "Could not locate class" in text or "Could not locate function" in text:
        line = text.strip().splitlines()[0]
        return f"holds a custom layer; name the file that defines it by --extensions: {line}"
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def load_facts(path: str | os.PathLike) -> dict:
    """Returns the facts in a `.keras` file, {} where another tool wrote it."""
    with zipfile.ZipFile(path) as archive:
        if MEMBER not in archive.namelist():
            return {}
        return json.loads(archive.read(MEMBER))
