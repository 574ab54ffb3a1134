"""Latency of `.tflite` files in this process: rounds, in each of which every file has its turn.

A turn is one uncounted run, which brings the file's weights back into the caches, and a few counted
ones.  The turns of a round come in an order that differs from round to round (`turn_orders`), so that
a machine that slows down, and whoever ran before, hit all files alike; files are compared within a
round.
"""

import dataclasses
import os
import platform
import sys
import time
from collections.abc import Sequence

import numpy as np

from lowbit import cli, manifest, progress, results, runtimes, tflite_file

TURN_RUNS = 5  # counted; more would put the files of a round further apart in time
_SHORT = ("model", "threads", "latency_ms", "latency_ms_p10", "latency_ms_p90", "size_bytes")
RESAMPLES = 2000  # of the rounds, for the interval of a ratio: its ends then wander by about 1/50


@dataclasses.dataclass(frozen=True)
class Entrant:
    """A file in an interpreter of so many threads, its input set."""

    path: str
    threads: int
    size_bytes: int
    runner: object


def measure(
    model: str,
    *,
    threads: str = "1",
    beside: str | None = None,
    warmup_runs: int = 10,
    runs: int = 50,
    kernels: str = "xnnpack",
    output_dir: str = "results",
) -> dict:
    """Times files in turn, appends a row for each file and number of threads to latency.csv.

    Args:
      model: path of a `.tflite` file.
      threads: of the interpreter; several, with commas, are measured beside one another.
      beside: paths, with commas, of other files of the same network.
      warmup_runs: of each file, before the first round.
      runs: counted, of each file and number of threads.
      kernels: "xnnpack" or "reference".
      output_dir: folder of latency.csv.

    Returns:
      The row of `model` at the first number of threads.  With `beside` or several numbers of threads
      it has "ratios": {path: {threads: {"time_ratio", "low", "high"}}}, times over those of `model`
      at as many threads, medians over rounds with their 95 % intervals; and "all": a median for each.

    Raises:
      ValueError, OSError: for a file that is absent, damaged or refused, or is not alike to `model`
        in its inputs; for numbers out of range.
    """
    counts = thread_counts(threads)
    if runs < 1 or warmup_runs < 0:
        raise ValueError(
            f"--runs={runs} must be at least 1, --warmup_runs={warmup_runs} at least 0"
        )
    paths = [model, *cli.words(beside)]
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(f"{path} is named twice; a file is timed once in each round")
    contents = {path: tflite_file.load_bytes(path) for path in paths}
    for path, content in contents.items():
        runtimes.try_out(content, path, kernels)
    entrants = [
        ready(content, path, kernels, count)
        for path, content in contents.items()
        for count in counts
    ]
    _check_alike(entrants)
    start = time.monotonic()
    rounds = timed(entrants, warmup_runs, runs)
    seconds = round(time.monotonic() - start, 3)
    versions = manifest.versions()
    cpu = cpu_name()
    medians = [[float(np.median(turn)) for turn in turns] for turns in rounds]
    rows = []
    for entrant, turns, times in zip(entrants, rounds, medians, strict=True):
        latency_ms = np.concatenate(turns)
        row = {
            "tool": "eval.latency",
            "model": entrant.path,
            "device": "host",
            "cpu": cpu,
            "cores": os.cpu_count(),
            "threads": entrant.threads,
            "kernels": kernels,
            "runs": runs,
            "latency_ms": round(float(np.median(latency_ms)), 4),
            "latency_ms_p10": round(float(np.percentile(latency_ms, 10)), 4),
            "latency_ms_p90": round(float(np.percentile(latency_ms, 90)), 4),
            "latency_ms_min": round(float(latency_ms.min()), 4),
            "size_bytes": entrant.size_bytes,
            "seconds": seconds,
            "versions": versions,
            "rounds": len(turns),
            "beside": ",".join(paths[1:]),
        }
        if entrant.path != model:
            base = next(
                medians[index]
                for index, other in enumerate(entrants)
                if (other.path, other.threads) == (model, entrant.threads)
            )
            row |= {"ratio_of": model, **paired_ratio(times, base)}
        rows.append(row)
    for row in rows:
        results.append_row(os.path.join(output_dir, "latency.csv"), row)
    if len(rows) == 1:
        return rows[0]
    print(
        results.table(rows, [*_SHORT, "time_ratio", "time_ratio_low", "time_ratio_high"]),
        file=sys.stderr,
    )
    ratios: dict = {}
    for row in rows:
        if "time_ratio" in row:
            found = {
                name: row[name] for name in ("time_ratio", "time_ratio_low", "time_ratio_high")
            }
            ratios.setdefault(row["model"], {})[str(row["threads"])] = found
    return rows[0] | {
        "ratios": ratios,
        "all": [{name: row[name] for name in _SHORT} for row in rows],
    }


def thread_counts(text: str) -> list[int]:
    """Returns the numbers of --threads; raises ValueError where one is below 1 or named twice."""
    try:
        counts = [int(word) for word in str(text).split(",")]
    except ValueError as error:
        raise ValueError(f"--threads={text} is not a number or several with commas") from error
    if min(counts) < 1 or len(set(counts)) < len(counts):
        raise ValueError(f"--threads={text} must be at least 1, each number once")
    return counts


def ready(content: bytes, path: str, kernels: str = "xnnpack", threads: int = 1) -> Entrant:
    """Returns a file in an interpreter, its inputs set to noise that is the same in every run.

    Raises:
      ValueError: where the interpreter refuses the file, or an input is neither float nor integer.
    """
    runner = runtimes.interpreter(content, kernels, threads)
    random = np.random.default_rng(0)
    for details in runner.get_input_details():
        shape, dtype = details["shape"], details["dtype"]
        if np.dtype(dtype).kind not in "fiu":
            raise ValueError(
                f"{path}: input {details['name']!r} is {np.dtype(dtype).name}; "
                "floats and integers are known"
            )
        if np.dtype(dtype).kind == "f":
            values = random.normal(size=shape).astype(dtype)
        else:
            info = np.iinfo(dtype)
            values = random.integers(info.min, info.max, shape, dtype=dtype, endpoint=True)
        runner.set_tensor(details["index"], values)
    return Entrant(path, threads, len(content), runner)


def _check_alike(entrants):
    def shapes(entrant):
        return sorted(tuple(map(int, each["shape"])) for each in entrant.runner.get_input_details())

    for entrant in entrants:
        if shapes(entrant) != shapes(entrants[0]):
            raise ValueError(
                f"{entrant.path} takes inputs of shape {shapes(entrant)}, {entrants[0].path} of "
                f"{shapes(entrants[0])}: files of one network are compared"
            )


def timed(
    entrants: Sequence[Entrant], warmup_runs: int = 10, runs: int = 50
) -> list[list[np.ndarray]]:
    """Returns for each entrant the milliseconds of its counted runs, an array for each round.

    Args:
      entrants: what takes turns.
      warmup_runs: of each, before the first round.
      runs: counted, of each; TURN_RUNS of them in a round.
    """
    for entrant in entrants:
        for _ in range(warmup_runs):
            entrant.runner.invoke()
    turns = [min(TURN_RUNS, runs - done) for done in range(0, runs, TURN_RUNS)]
    orders = turn_orders(len(entrants))
    found: list[list[np.ndarray]] = [[] for _ in entrants]
    with progress.bar("running", len(turns)) as update:
        for number, count in enumerate(turns):
            for index in orders[number % len(orders)]:
                found[index].append(_turn(entrants[index].runner, count))
            update(number + 1)
    return found


def _turn(runner, count):
    runner.invoke()
    times = []
    for _ in range(count):
        start = time.perf_counter()
        runner.invoke()
        times.append(1000 * (time.perf_counter() - start))
    return np.array(times)


def turn_orders(count: int) -> list[list[int]]:
    """Returns 2 * count orders of range(count), for as many rounds.

    In all of them together everyone has each place twice and comes directly behind each other one
    twice (a Williams square and its mirror image): neither a drift within rounds nor what the one
    before left in the caches favours anyone.
    """
    zigzag = [index // 2 if index % 2 == 0 else count - 1 - index // 2 for index in range(count)]
    square = [[(place + shift) % count for place in zigzag] for shift in range(count)]
    return [*square, *(order[::-1] for order in square)]


def paired_ratio(times_ms: Sequence[float], base_ms: Sequence[float]) -> dict[str, float]:
    """Returns the median over rounds of times / base, and the 95 % bootstrap interval of it.

    Args:
      times_ms: of each round, in milliseconds.
      base_ms: of the same rounds.

    Returns:
      "time_ratio", "time_ratio_low", "time_ratio_high"; of one round all three are equal.
    """
    ratios = np.asarray(times_ms) / np.asarray(base_ms)
    drawn = np.random.default_rng(0).integers(len(ratios), size=(RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(ratios[drawn], axis=1), (2.5, 97.5))
    return {
        "time_ratio": round(float(np.median(ratios)), 4),
        "time_ratio_low": round(float(low), 4),
        "time_ratio_high": round(float(high), 4),
    }


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
