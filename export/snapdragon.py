"""Ahead of time for a Snapdragon's NPU: a `.tflite` file whose operators are one program for Hexagon.

    python -m export.snapdragon --model=model.tflite --soc=SM8650 --output=model_sm8650.tflite

LiteRT on a phone of that SoC runs the file by its dispatch library for Qualcomm; on any other it does
not run.  What the NPU does not take stays on the CPU, and is named; with --strict that is an error.
Only an integer file makes an integer program: of a float file the NPU computes all in fp16, which the
share of delegated operators does not show, so the row says which of the two it was.

It needs gcc and the packages of the extra `[hexagon]`; docs/hexagon.md tells the licence of Qualcomm's
libraries.
"""

import dataclasses
import os
import sys
import time

from lowbit import cli, files, manifest, tflite_file
from lowbit.devices import snapdragon


@dataclasses.dataclass(frozen=True)
class Config:
    """The command's flags."""

    model: str = cli.field(cli.REQUIRED, "A .tflite file.")
    soc: str = cli.field(
        cli.REQUIRED, f"The chip it is compiled for: {', '.join(snapdragon.SOCS)}."
    )
    output: str = cli.field("model_snapdragon.tflite", "Where the compiled file goes.")
    strict: bool = cli.field(False, "Fails where an operator is left to the CPU.")


def export(config: Config) -> dict:
    """Runs the command; returns its result row.

    Raises:
      ValueError: for an unknown SoC, a package or compiler that is missing, a file that the NPU's
        compiler refuses, or with --strict one that it does not take whole.
      TFLiteFileError: where --model is no `.tflite` file.
    """
    start = time.monotonic()
    snapdragon.check_soc(config.soc)
    manifest.check_output(config.output, ".tflite")
    content = tflite_file.load_bytes(config.model)
    if os.path.exists(config.output) and os.path.samefile(config.model, config.output):
        raise ValueError(
            f"--output={config.output} is --model: the compiled file runs on the {config.soc} alone"
        )
    compiled = snapdragon.compile_for(content, config.soc, config.model)
    if compiled.left:
        text = (
            f"{config.model}: {len(compiled.left)} of {compiled.operators} operators are left to "
            f"the CPU, between {compiled.partitions} programs of the NPU: {'; '.join(compiled.left)}"
        )
        if config.strict:
            raise ValueError(f"{text} (--strict)")
        print(f"WARNING: {text}", file=sys.stderr)
    if not compiled.integer:
        print(
            f"WARNING: {config.model} is no integer file: what it holds in float the NPU computes "
            "in fp16",
            file=sys.stderr,
        )
    files.save_bytes(compiled.content, config.output)
    return {
        "tool": "export.snapdragon",
        "model": config.model,
        "soc": config.soc,
        "soc_name": snapdragon.SOCS[config.soc],
        "output": config.output,
        "integer": compiled.integer,
        "operators": compiled.operators,
        "delegated": compiled.delegated,
        "delegated_share": round(compiled.delegated / compiled.operators, 4),
        "partitions": compiled.partitions,
        "left_to_cpu": "; ".join(compiled.left),
        "model_bytes": len(content),
        "size_bytes": len(compiled.content),
        "seconds": round(time.monotonic() - start, 3),
        "versions": manifest.versions() | snapdragon.VERSIONS,
    }


def main() -> None:
    """Runs the command line."""
    cli.run(export, Config)


if __name__ == "__main__":
    main()
