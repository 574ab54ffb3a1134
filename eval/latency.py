"""Latency of a `.tflite` file: warm-up, repeats, median and spread.

    python -m eval.latency --model=model.tflite --threads=1
    python -m eval.latency --model=int8.tflite --beside=float.tflite,other.tflite --threads=1,2

With --beside the files, all of the same network, have their turns in every round of one run, so that
other work on the machine falls on all of them; the ratios are medians over the rounds.
"""

import dataclasses

from eval import on_host
from lowbit import cli, runtimes


@dataclasses.dataclass(frozen=True)
class Config:
    """The command's flags."""

    model: str = cli.field(cli.REQUIRED, "A .tflite file.")
    device: str = cli.field("host", "Where it runs.", choices=("host",))
    threads: str = cli.field("1", "Of the interpreter; several with commas are measured in turn.")
    beside: str | None = cli.field(
        None, "Other files of the same network, with commas, measured in turn with --model."
    )
    warmup_runs: int = cli.field(10, "Not counted: caches and packed weights settle.")
    runs: int = cli.field(50, "Counted.")
    kernels: str = cli.field(
        "xnnpack", "reference: the slow portable kernels.", choices=runtimes.KERNELS
    )
    output_dir: str = cli.field("results", "Where latency.csv gets its rows.")


def measure(config: Config) -> dict:
    """Runs the command; returns its result row."""
    return on_host.measure(
        config.model,
        threads=config.threads,
        beside=config.beside,
        warmup_runs=config.warmup_runs,
        runs=config.runs,
        kernels=config.kernels,
        output_dir=config.output_dir,
    )


def main() -> None:
    """Runs the command line."""
    cli.run(measure, Config)


if __name__ == "__main__":
    main()
