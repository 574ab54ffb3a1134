"""The whitepaper's table 7: its latencies on a Pixel 2 beside those of a device here.

    python -m eval.whitepaper --table=7 --device=adb --calibration=images.zip \\
        --networks=networks.toml --device_flags='--serial=X --benchmark_binary=benchmark_model'

Each network is quantized and exported twice, in float and in integers, and eval.latency measures both
in turn; with --device_flags='--delegate=hexagon ...' the integer file alone.  Its rows go to
OUTPUT_DIR/whitepaper_latency.csv, the table to OUTPUT_DIR/whitepaper_table_7.md.  --device=arm-emulator
counts instructions, which are no time: they stand in columns of their own.
"""

import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence

from eval import networks, processes, published
from lowbit import files, results

DEVICES = ("host", "adb", "arm-emulator")
# What tells one measurement of a network from another.
_IDENTITY = (
    *("network", "device", "device_flags", "phone", "soc"),
    *("cores", "threads", "xnnpack", "delegate"),
)
# The paper's setting on a phone, where --device_flags say no other.
_ON_A_PHONE = ("--cores=big", "--threads=1", "--xnnpack=on")
# Of eval.latency's row: what the table's row carries.
_FACTS = (
    *("phone", "soc", "runtime", "android", "cpu", "emulated_cpu", "emulated", "delegate"),
    *("celsius_at_start", "celsius_highest", "governor", "steady", "images", "differing_from_host"),
)


def tabulate(config) -> dict:
    """Measures the networks of eval.whitepaper's flags on a device; returns the result row.

    Raises:
      ValueError: for bad flags at once, and at the end where networks failed.
    """
    start = time.monotonic()
    if config.calibration is None:
        raise ValueError("--calibration is needed: images to quantize with")
    if config.device == "arm-emulator" and config.dataset is None:
        raise ValueError("--device=arm-emulator compares codes: --dataset names the images")
    os.makedirs(config.output_dir, exist_ok=True)
    os.makedirs(config.work_dir, exist_ok=True)
    path = os.path.join(config.output_dir, "whitepaper_latency.csv")
    chosen = networks.chosen(config)
    failed = []
    for number, network in enumerate(chosen, 1):
        print(f"network {number} of {len(chosen)}: {network.row}", file=sys.stderr)
        try:
            made = measure(config, network)
        except processes.StepFailedError as error:
            failed.append(f"{network.row}: {error}")
            print(f"  failed: {error}", file=sys.stderr)
            continue
        results.write_rows(path, _with(results.read_rows(path), made))
    rows = results.read_rows(path)
    if rows:
        print(results.table(*overview(rows)), file=sys.stderr)
        page_path = os.path.join(config.output_dir, "whitepaper_table_7.md")
        files.save_bytes(page(rows).encode(), page_path)
    if failed:
        raise ValueError(f"{len(failed)} of {len(chosen)} networks failed: {'; '.join(failed)}")
    return {
        "tool": "eval.whitepaper",
        "table": 7,
        "device": config.device,
        "networks": len(chosen),
        "rows": len(rows),
        "output": page_path,
        "seconds": round(time.monotonic() - start, 3),
        "versions": results.versions(),
    }


def measure(config, network: networks.Network) -> list[dict]:
    """Returns the rows of a network, one for each cluster and number of threads.

    Raises:
      processes.StepFailedError: where a step fails.
    """
    log = os.path.join(config.work_dir, "log.txt")
    commands = commands_of(config, network)
    for quantize, convert in (commands[:2], commands[2:4]):
        if not os.path.exists(convert[-1].partition("=")[2]):
            processes.run(quantize, config.root, log)
            processes.run(convert, config.root, log)
    row, seconds, _ = processes.run(commands[-1], config.root, log)
    common = {
        "network": network.row,
        "paper": network.paper or "",
        "device": config.device,
        "device_flags": config.device_flags or "",
        **{name: row[name] for name in _FACTS if row.get(name) is not None},
        "seconds": round(seconds, 1),
        "commands": processes.joined(commands),
        "versions": row["versions"],
    }
    if config.device == "arm-emulator":
        return [common | {"threads": 1} | _instructions(row)]
    integer = row["model"]
    every = row.get("all") or [row]
    return [
        common
        | {name: one[name] for name in ("cores", "threads", "xnnpack") if name in one}
        | _latencies(every, integer, one)
        for one in every
        if one["model"] == integer
    ]


def commands_of(config, network: networks.Network) -> list[list[str]]:
    """Returns the commands that make a network's two files, and the one that measures them.

    A file is named by a digest of all that decides it; one that is there is not made again.
    """
    commands, made = [], {}
    for scheme in ("float32", "w8a8"):
        quantize = _quantize(config, network, scheme)
        decides = [*quantize, *_contents(config, quantize), str(results.versions())]
        stem = processes.folder(config.work_dir, f"{network.row}_{scheme}", decides)
        made[scheme] = f"{stem}.tflite"
        commands += [
            [*quantize, f"--output={stem}.keras"],
            ["export.tflite", f"--model={stem}.keras", f"--output={stem}.tflite"],
        ]
    flags = shlex.split(config.device_flags or "")
    latency = ["eval.latency", f"--device={config.device}", f"--model={made['w8a8']}"]
    if config.device == "arm-emulator":
        dataset = networks.located(config.dataset, config.root)
        latency += [f"--float_model={made['float32']}", f"--dataset={dataset}"]
        latency.append(f"--limit={config.limit or 1}")
    elif not any(flag.startswith("--delegate=") for flag in flags):
        latency.append(f"--beside={made['float32']}")
    if config.device == "adb":
        named = {flag.partition("=")[0] for flag in flags}
        flags = [*(flag for flag in _ON_A_PHONE if flag.partition("=")[0] not in named), *flags]
    return [*commands, [*latency, *flags, f"--output_dir={config.work_dir}"]]


def _contents(config, command):
    """Returns size and time of the files that a command names, which change under their names."""
    paths = [networks.real(word.partition("=")[2], config.root) for word in command]
    files_there = [path for path in paths if os.path.isfile(path)]
    return [f"{os.path.getsize(path)} {os.stat(path).st_mtime_ns}" for path in files_there]


def _quantize(config, network, scheme):
    names = ("model", "weights", "alpha", "input_size", "preprocess")
    values = ((name, getattr(network, name)) for name in names)
    calibration = networks.located(config.calibration, config.root)
    return [
        "ptq.quantize",
        *(f"--{name}={value}" for name, value in values if value is not None),
        f"--scheme={scheme}",
        f"--dataset={calibration}",
        f"--calibration_images={config.calibration_images}",
    ]


def _latencies(every, integer, one):
    """Returns the integer file's latency and, where it was measured, the float file's."""
    same = [
        other["latency_ms"]
        for other in every
        if other["model"] != integer
        and all(other.get(name) == one.get(name) for name in ("cores", "threads", "xnnpack"))
    ]
    row = {"int8_ms": one["latency_ms"]}
    if same:
        row |= {"float_ms": same[0], "float_by_int8": round(same[0] / one["latency_ms"], 3)}
    return row


def _instructions(row):
    return {
        "int8_instructions": row["emulated_instructions_all"],
        "float_instructions": row["float_emulated_instructions_all"],
        "float_by_int8": row["emulated_instruction_ratio"],
    }


def _with(rows: Sequence[Mapping], made: Sequence[Mapping]) -> list[Mapping]:
    """Returns rows, of which measured again replace those of the same identity."""

    def identity(row):
        return [str(row.get(name) or "") for name in _IDENTITY]

    again = [identity(row) for row in made]
    return [*(row for row in rows if identity(row) not in again), *made]


def overview(rows: Sequence[Mapping[str, str]]) -> tuple[list[dict[str, str]], list[str]]:
    """Returns (rows, column names): published beside measured, a line for each measurement."""
    paper = published.LATENCY_MS
    lines = []
    for row in rows:
        figures = [paper.figure(row.get("paper") or None, name) for name in paper.columns]
        is_emulated = row["device"] == "arm-emulator" or str(row.get("emulated")) == "True"
        device = "emulated" if is_emulated else row["device"]
        names = ("cpu", "phone", "soc", "emulated_cpu", "delegate", "cores")
        where = (row.get(name) for name in names)
        lines.append(
            {
                "network": row["network"],
                **{
                    f"{name}, paper": "-" if figure is None else f"{figure:g}"
                    for name, figure in zip(paper.columns, figures, strict=True)
                },
                "float / fixed, paper": f"{figures[0] / figures[1]:.2f}" if figures[0] else "-",
                "device": " ".join([device, *(text for text in where if text)]),
                "threads": str(row["threads"]),
                "float, ms": row.get("float_ms") or "-",
                "int8, ms": row.get("int8_ms") or "-",
                "float, instructions": row.get("float_instructions") or "-",
                "int8, instructions": row.get("int8_instructions") or "-",
                "float / int8": row.get("float_by_int8") or "-",
                "°C": row.get("celsius_highest") or "-",
                "runtime": row.get("runtime") or "LiteRT",
            }
        )
    empty = {"-"}
    columns = [name for name in lines[0] if {line[name] for line in lines} != empty]
    return lines, columns


def page(rows: Sequence[Mapping[str, str]]) -> str:
    """Returns the table as a page of Markdown: figures, commands."""
    lines, columns = overview(rows)
    commands = processes.each_once(rows)
    return "\n".join(
        [
            f"# Table 7: {published.LATENCY_MS.caption}",
            "",
            "Generated by `python -m eval.whitepaper --table=7`. *paper*: Krishnamoorthi, arXiv "
            "1806.08342, milliseconds on a Pixel 2, one large core, HVX through NN-API. The other "
            "figures are measured on the device that stands in their row; compare ratios, not "
            "milliseconds. *emulated*: an emulated core, whose instructions are no time and whose "
            "milliseconds are no device's.",
            "",
            *results.markdown(lines, columns),
            "",
            *processes.heading(rows),
            *(f"    {command}" for command in commands),
            "",
        ]
    )
