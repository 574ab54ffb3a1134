"""Check: names what is wrong with a `.tflite` file, of this tool or any other.

    python -m export.check --model=model.tflite [--target=tflite-micro]

Each fault is a line on stderr and makes the exit code 1; notes are lines on stderr too.  With a
target, an operation that it leaves to other kernels is a line "falls back: ..." and no fault; one
for which it refuses the whole file is a fault.  The file is read, never run: no interpreter sees it.
"""

import dataclasses
import json
import sys
import time

import numpy as np

import lowbit
from lowbit import cli, lint, targets, tflite_file

ANY_TARGET = "any"  # no target: what every runtime asks of a file


@dataclasses.dataclass(frozen=True)
class Config:
    """The command's flags."""

    model: str = cli.field(cli.REQUIRED, "A .tflite file.")
    io: str = cli.field(
        "any",
        "What inputs and outputs must be; any: also float32, behind QUANTIZE and DEQUANTIZE.",
        choices=lint.IO,
    )
    target: str = cli.field(
        ANY_TARGET,
        "What shall run the file: also names the operations that it would not take.",
        choices=(ANY_TARGET, *targets.TARGETS),
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
    unsupported = []
    if config.target != ANY_TARGET:
        unsupported = targets.findings(content, config.model, config.target)
    found += [f"{config.target}: {finding}" for finding in unsupported if finding.refused]
    # For LiteRT the findings name what leaves XNNPACK.
    for note in lint.notes(content, config.model, placement=config.target != "litert"):
        print(f"note: {note}", file=sys.stderr)
    for finding in unsupported:
        if not finding.refused:
            print(f"falls back: {config.target}: {finding}", file=sys.stderr)
    for fault in found:
        print(f"fault: {fault}", file=sys.stderr)
    row = {
        "tool": "export.check",
        "model": config.model,
        "io": config.io,
        "faults": len(found),
        "first_fault": found[0] if found else None,
        "target": config.target,
        "unsupported": len({finding.label for finding in unsupported}),  # operations
        "first_unsupported": str(unsupported[0]) if unsupported else None,
        "min_runtime": lint.minimum_runtime(content, config.model),
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
