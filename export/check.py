"""Check: names what is wrong with a `.tflite` file, of this tool or any other.

    python -m export.check --model=model.tflite

Each fault is a line on stderr and makes the exit code 1; notes are lines on stderr too.  The file
is read, never run: no interpreter sees it.
"""

import dataclasses
import json
import sys
import time

import numpy as np

import lowbit
from lowbit import cli, lint, tflite_file


@dataclasses.dataclass(frozen=True)
class Config:
    """The command's flags."""

    model: str = cli.field(cli.REQUIRED, "A .tflite file.")
    io: str = cli.field(
        "any",
        "What inputs and outputs must be; any: also float32, behind QUANTIZE and DEQUANTIZE.",
        choices=lint.IO,
    )


class FaultsFound(ValueError):
    """The file has faults; they have been printed, and so has the row."""


def check(config: Config) -> dict:
    """Runs the command; returns its result row.

    Raises:
      FaultsFound: after each fault was printed on stderr and the row on stdout.
      FileNotFoundError, TFLiteFileError: where there is nothing to check.
    """
    start = time.monotonic()
    content = tflite_file.load_bytes(config.model)
    found = lint.faults(content, config.model, config.io)
    for note in lint.notes(content, config.model):
        print(f"note: {note}", file=sys.stderr)
    for fault in found:
        print(f"fault: {fault}", file=sys.stderr)
    row = {
        "tool": "export.check",
        "model": config.model,
        "io": config.io,
        "faults": len(found),
        "first_fault": found[0] if found else None,
        "scheme": (lint.manifest(content) or {}).get("scheme"),
        "size_bytes": len(content),
        "seconds": round(time.monotonic() - start, 3),
        # manifest.versions() would import Keras: 9 s, for a check that takes 0.3 s without.
        "versions": {"lowbit": lowbit.__version__, "numpy": np.__version__},
    }
    if found:
        sys.stderr.flush()
        print(json.dumps(row, allow_nan=False), flush=True)
        noun = "fault" if len(found) == 1 else "faults"
        raise FaultsFound(f"{config.model}: {len(found)} {noun}, the first: {found[0]}")
    return row


def main() -> None:
    """Runs the command line."""
    cli.run(check, Config)


if __name__ == "__main__":
    main()
