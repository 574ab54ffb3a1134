"""Folders that are built once for many runs, whole or not at all."""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator

STAMP = "lowbit-built.json"


def cache_folder() -> pathlib.Path:
    """Returns the folder of what is set up once: $LOWBIT_CACHE, or lowbit in the user's cache."""
    if chosen := os.environ.get("LOWBIT_CACHE"):
        return pathlib.Path(chosen).expanduser().absolute()
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(caches).expanduser().absolute() / "lowbit"


def build_once(
    folder: str | os.PathLike, request: dict, make: Callable[[pathlib.Path], dict]
) -> dict:
    """Returns what is known of a folder, which is built where it is not there already.

    It is there when all of it is, and not before.  One that was built of another request is replaced,
    as is what a killed call has left; where building fails, an earlier one stays.

    Args:
      folder: its path.
      request: all that decides what is in it, JSON-able.
      make: fills an empty folder, returns what is worth knowing of it, JSON-able; a path inside
        that folder does not last.

    Raises:
      ValueError: where the folder holds what was not built here.
    """
    folder = pathlib.Path(folder).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        stamp = _stamp(folder)
        if stamp is not None and stamp["request"] == request:
            return stamp["facts"]
        if stamp is None and folder.exists() and any(folder.iterdir()):
            raise ValueError(
                f"{folder} is not empty, and {STAMP} is not in it: not ours to replace"
            )
        temporary = folder.with_name(f".{folder.name}.building")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            facts = make(temporary)
            stamp = {"request": request, "facts": facts}
            (temporary / STAMP).write_text(json.dumps(stamp, indent=1) + "\n")
            if folder.exists():
                shutil.rmtree(folder)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return facts


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
    """Holds a lock beside a folder, so that two processes do not build it at once."""
    with open(folder.with_name(f".{folder.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _stamp(folder):
    """Returns what the stamp of a finished folder says, else None."""
    try:
        stamp = json.loads((folder / STAMP).read_text())
    except (OSError, ValueError):
        return None
    return stamp if {"request", "facts"} <= set(stamp) else None
