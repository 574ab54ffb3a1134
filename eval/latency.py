"""Latency of a `.tflite` file on this machine: warm-up, repeats, median and spread.

python -m eval.latency --model=model.tflite --threads=1
"""

import dataclasses
import os
import platform
import time

import numpy as np

from lowbit import cli, manifest, progress, results, runtimes, tflite_file


@dataclasses.dataclass(frozen=True)
class Config:
    """The command's flags."""

    model: str = cli.field(cli.REQUIRED, "A .tflite file.")
    device: str = cli.field("host", "Where it runs.", choices=("host",))
    threads: int = cli.field(1, "Of the interpreter.")
    warmup_runs: int = cli.field(10, "Not counted: caches and packed weights settle.")
    runs: int = cli.field(50, "Counted.")
    kernels: str = cli.field(
        "xnnpack", "reference: the slow portable kernels.", choices=runtimes.KERNELS
    )
    output_dir: str = cli.field("results", "Where latency.csv gets its row.")


def measure(config: Config) -> dict:
    """Runs the command; returns its result row."""
    if config.runs < 1 or config.threads < 1 or config.warmup_runs < 0:
        raise ValueError(
            f"--runs={config.runs} and --threads={config.threads} must be at least 1, "
            f"--warmup_runs={config.warmup_runs} at least 0"
        )
    content = tflite_file.load_bytes(config.model)
    runtimes.try_out(content, config.model, config.kernels)
    runner = runtimes.interpreter(content, config.kernels, config.threads)
    random = np.random.default_rng(0)
    for details in runner.get_input_details():
        shape, dtype = details["shape"], details["dtype"]
        if np.dtype(dtype).kind not in "fiu":
            raise ValueError(
                f"{config.model}: input {details['name']!r} is {np.dtype(dtype).name}; "
                "floats and integers are known"
            )
        if np.dtype(dtype).kind == "f":
            values = random.normal(size=shape).astype(dtype)
        else:
            info = np.iinfo(dtype)
            values = random.integers(info.min, info.max, shape, dtype=dtype, endpoint=True)
        runner.set_tensor(details["index"], values)
    latency_ms = []
    total = config.warmup_runs + config.runs
    with progress.bar("running", total) as update:
        for number in range(total):
            start = time.perf_counter()
            runner.invoke()
            latency_ms.append(1000 * (time.perf_counter() - start))
            update(number + 1)
    counted = np.array(latency_ms[config.warmup_runs :])
    row = {
        "tool": "eval.latency",
        "model": config.model,
        "device": config.device,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": config.threads,
        "kernels": config.kernels,
        "runs": config.runs,
        "latency_ms": round(float(np.median(counted)), 4),
        "latency_ms_p10": round(float(np.percentile(counted, 10)), 4),
        "latency_ms_p90": round(float(np.percentile(counted, 90)), 4),
        "latency_ms_min": round(float(counted.min()), 4),
        "size_bytes": len(content),
        "seconds": round(sum(latency_ms) / 1000, 3),
        "versions": manifest.versions(),
    }
    results.append_row(os.path.join(config.output_dir, "latency.csv"), row)
    return row


def cpu_name() -> str:
    """Returns the processor's name as Linux gives it, or the architecture."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def main() -> None:
    """Runs the command line."""
    cli.run(measure, Config)


if __name__ == "__main__":
    main()
