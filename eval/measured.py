"""The rows that the tools wrote: found in folders, chosen by model, the latest of each measurement."""

import ast
import dataclasses
import math
import os
import pathlib
import shlex
from collections.abc import Sequence

from lowbit import results


@dataclasses.dataclass(frozen=True)
class Source:
    """A CSV that a tool writes."""

    title: str
    command: str  # that writes it
    required: tuple[str, ...]  # columns without which it is another file
    # A later row with the same cells here replaces an earlier one; () keeps all rows.
    identity: tuple[str, ...] = ()
    emulated: bool = False  # emulated, simulated, estimated, compiled: no device's latency
    drawn: tuple[str, ...] = ()  # columns of finite numbers, or empty where not required


_PEERS = ("model", "top1", "test")
SOURCES = {
    "accuracy.csv": Source(
        "Accuracy",
        "python -m eval.accuracy --model=m.tflite --dataset=images.zip",
        ("model", "top1", "images"),
        ("model", "runtime", "kernels", "dataset", "split", "images", "crop", "reference"),
        drawn=("top1", "top1_standard_error", "size_bytes"),
    ),
    "latency.csv": Source(
        "Latency on the host",
        "python -m eval.latency --model=m.tflite",
        ("model", "device", "latency_ms"),
        ("model", "device", "cpu", "threads", "kernels", "ratio_of"),
        drawn=("latency_ms", "latency_ms_p10", "latency_ms_p90"),
    ),
    "phone.csv": Source(
        "On the phone",
        "python -m eval.latency --model=m.tflite --device=adb",
        ("model", "device", "latency_ms"),
        ("model", "phone", "soc", "runtime", "delegate", "cores", "threads", "xnnpack"),
        drawn=("latency_ms", "latency_ms_lowest", "latency_ms_highest"),
    ),
    "parity.csv": Source(
        "Parity",
        "python -m eval.parity --model=ptq.keras --dataset=images.zip",
        ("model", "images", "simulator_xnnpack_differing"),
        ("model", "dataset", "split", "images"),
    ),
    "layers_summary.csv": Source(
        "Layer by layer",
        "python -m eval.layers --model=ptq.keras --reference=float.keras --dataset=images.zip",
        ("model", "reference", "images"),
        ("model", "reference", "dataset", "split", "images"),
    ),
    "precisions.csv": Source(
        "Every precision",
        "python scripts/precisions.py",
        ("file", *_PEERS),
        ("model", "file", "test"),
        drawn=("top1", "size_bytes"),
    ),
    "ptq_peers.csv": Source(
        "Beside the peers",
        "python scripts/compare_peers.py",
        ("tool", *_PEERS),
        ("model", "tool", "test", "calibration"),
        drawn=("top1", "size_bytes"),
    ),
    "arm_emulator.csv": Source(
        "Arm CPU, emulated",
        "python -m eval.latency --model=m.tflite --device=arm-emulator",
        ("model", "device"),
        ("model", "emulated_cpu", "dataset", "images"),
        emulated=True,
    ),
    "hexagon_emulator.csv": Source(
        "Hexagon HTP, emulated",
        "python -m eval.latency --model=m.tflite --device=hexagon-emulator",
        ("model", "device"),
        ("model", "simulated_chip", "dataset", "images"),
        emulated=True,
    ),
    "snapdragon.csv": Source(
        "Compiled ahead of time for Snapdragons",
        "python -m export.snapdragon --model=m.tflite --soc=SM8650",
        ("model", "soc"),
        ("model", "soc"),
        emulated=True,
    ),
    "microcontroller.csv": Source(
        "Microcontrollers and NPUs, run here or estimated",
        "python -m eval.latency --model=m.tflite --device=ethos-u",
        ("model", "device"),
        ("model", "device", "accelerator", "system_config", "memory_mode", "dataset"),
        emulated=True,
    ),
}
LAYERS = "layers.csv"  # of the last row of layers_summary.csv in the same folder
LAYERS_REQUIRED = ("tensor", "output_sqnr_db")
LAYERS_DRAWN = ("output_sqnr_db", "channel_sqnr_db")  # infinite where nothing is lost


@dataclasses.dataclass(frozen=True)
class Row:
    """A row as a tool wrote it."""

    source: str  # a key of SOURCES
    path: str  # of the CSV
    cells: dict[str, str]  # as text; "" where the column has no value in this row

    @property
    def emulated(self) -> bool:
        """Whether the row says of itself, or its file says, that no device was measured."""
        return SOURCES[self.source].emulated or any(
            word in value.lower() or (word in name.lower() and _yes(value))
            for name, value in self.cells.items()
            if name not in _NAMES
            for word in ("emulat", "simulated", "estimated")
        )


# Cells that hold names of the user's.
_NAMES = ("model", "versions", "beside", "ratio_of", "dataset", "reference", "command", "file")


def _yes(value):
    return value.lower() not in ("", "0", "no", "none", "false")


def csv_paths(places: Sequence[str]) -> list[pathlib.Path]:
    """Returns the known CSV files in folders, or named themselves.

    Raises:
      FileNotFoundError: names a place that does not exist.
      ValueError: where a file has no known name, or a folder holds none.
    """
    found = []
    for place in map(pathlib.Path, places):
        if place.is_dir():
            inside = [place / name for name in SOURCES if (place / name).is_file()]
            if not inside:
                raise ValueError(f"{place} holds none of {', '.join(SOURCES)}")
            found += inside
        elif not place.exists():
            raise FileNotFoundError(f"{place}: no such file or folder")
        elif place.name not in SOURCES:
            raise ValueError(f"{place} is not named one of {', '.join(SOURCES)}")
        else:
            found.append(place)
    return list(dict.fromkeys(found))


def read(
    path: pathlib.Path, required: Sequence[str], drawn: Sequence[str], finite: bool = True
) -> list[dict[str, str]]:
    """Returns a CSV's rows as text.

    Args:
      path: of the file.
      required: columns that it must have.
      drawn: columns of numbers; those not required may be absent or empty.
      finite: whether infinity and NaN are refused in them.

    Raises:
      ValueError: where it is no CSV, lacks a required column, a line has too few or many cells, or a
        cell is no number.
    """
    rows = results.read_rows(path)
    for number, row in enumerate(rows, 1):
        missing = [name for name in required if name not in row]
        if missing:
            raise ValueError(
                f"{path} has no column {', '.join(missing)}; it has "
                f"{', '.join(str(name) for name in row if name is not None)[:200]}"
            )
        for name in drawn:
            text = row.get(name, "")
            if (text or name in required) and not _is_drawable(text, finite):
                raise ValueError(f"{path}: row {number}: {name} is {text!r}, not a number")
    return rows


def _is_drawable(text, finite):
    try:
        return math.isfinite(float(text)) or not finite
    except ValueError:
        return False


def collect(places: Sequence[str], models: Sequence[str] | None) -> dict[str, list[Row]]:
    """Returns the chosen rows of each source, the latest of each measurement, in file order.

    Args:
      places: folders or CSV files.
      models: what `is_chosen` takes; None: every model.

    Raises:
      ValueError, OSError: as `csv_paths` and `read`; where no row is of `models`.
    """
    found: dict[str, list[Row]] = {}
    seen: dict[str, None] = {}
    for path in csv_paths(places):
        for cells in read(path, SOURCES[path.name].required, SOURCES[path.name].drawn):
            seen[cells["model"]] = None
            if models is None or any(is_chosen(cells["model"], each) for each in models):
                found.setdefault(path.name, []).append(Row(path.name, str(path), cells))
    if not found:
        names = sorted(seen)
        listed = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        wanted = "" if models is None else f" of {', '.join(models)}"
        raise ValueError(f"{', '.join(places)}: no row{wanted}; models there: {listed or 'none'}")
    return {
        name: _latest(rows, SOURCES[name].identity)
        for name, rows in sorted(found.items(), key=lambda item: list(SOURCES).index(item[0]))
    }


def is_chosen(model: str, wanted: str) -> bool:
    """Returns whether a row's model is the one that is wanted.

    A name with a folder wants that path; a bare file name, files of that name in any folder; a name
    without an ending, such as mobilenet_v2, also mobilenet_v2.tflite, mobilenet_v2.int8.tflite and
    the like.
    """
    if os.path.dirname(wanted):
        return os.path.realpath(model) == os.path.realpath(wanted)
    name = pathlib.PurePath(model).name
    if wanted.endswith((".tflite", ".keras")):
        return name == wanted
    return name == wanted or name.startswith(f"{wanted}.")


def _latest(rows, identity):
    if not identity:
        return rows
    latest: dict[tuple, Row] = {}
    for row in rows:
        key = tuple(row.cells.get(name, "") for name in identity)
        latest.pop(key, None)  # so that the later one also stands later
        latest[key] = row
    return list(latest.values())


def layers_of(summaries: Sequence[Row]) -> list[tuple[Row, list[dict[str, str]]]]:
    """Returns the layers.csv that belong to rows of layers_summary.csv, each with its row.

    eval.layers writes layers.csv anew in each run: it is of the last row of the summary beside it.
    """
    found = []
    for row in summaries:
        path = pathlib.Path(row.path).with_name(LAYERS)
        last = results.read_rows(row.path)[-1]
        if path.is_file() and last == row.cells:
            found.append((row, read(path, LAYERS_REQUIRED, LAYERS_DRAWN, finite=False)))
    return found


# The flags of a command by the columns of its row; an empty cell leaves the flag out.
_IMAGES = {"dataset": "dataset", "images": "limit"}
_COMMANDS = {
    "eval.accuracy": _IMAGES
    | {name: name for name in ("split", "preprocess", "runtime", "kernels", "crop", "reference")},
    "eval.parity": _IMAGES | {"split": "split", "preprocess": "preprocess"},
    "eval.layers": {"reference": "reference", "split": "split"} | _IMAGES,
}
NO_IMAGES = "random codes"  # in place of a data set
LATENCY_FLAGS: dict[str, dict[str, str]] = {  # of eval.latency, by device
    "host": {name: name for name in ("threads", "beside", "kernels", "runs")},
    "adb": {name: name for name in ("delegate", "cores", "threads")},
    "arm-emulator": {"emulated_cpu": "cpu", "float_model": "float_model"} | _IMAGES,
    "hexagon-emulator": _IMAGES,
    "ethos-u": {"accelerator": "accelerator"},
    "tflite-micro": _IMAGES,
}


def command(row: Row) -> str:
    """Returns the command that measures the row anew: column "command", or from its settings."""
    cells = row.cells
    if cells.get("command"):
        return cells["command"]
    tool, device = cells.get("tool", ""), cells.get("device", "")
    if tool == "eval.latency" and device in LATENCY_FLAGS:
        flags = {"device": "device"} | LATENCY_FLAGS[device]
    elif tool in _COMMANDS:
        flags = _COMMANDS[tool]
    else:
        return SOURCES[row.source].command
    words = [f"python -m {tool}", f"--model={cells.get('ratio_of') or cells['model']}"]
    words += [
        f"--{flag}={cells[column]}"
        for column, flag in flags.items()
        if cells.get(column) not in (None, "", NO_IMAGES)
    ]
    return " ".join(map(_quoted, words))


def _quoted(word):
    return word if word.startswith("python -m ") else shlex.quote(word)


def versions(row: Row) -> str:
    """Returns a row's versions as "name version, ...", "" where it has none."""
    return flat(row.cells.get("versions", "")).replace(": ", " ")


def flat(text: str) -> str:
    """Returns a cell that holds a dict as "name: value, ...", any other as it is."""
    if not text.startswith("{"):
        return text
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    if not isinstance(found, dict):
        return text
    pairs = []
    for name, value in found.items():
        inner = value if isinstance(value, dict) else {"": value}
        pairs += [f"{name} {key}: {each}".replace(" :", ":") for key, each in inner.items()]
    return ", ".join(pairs)
