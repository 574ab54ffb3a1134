"""One HTML page of what was measured of a model: it opens offline and says how each figure came about.

    python -m eval.report --rows=runs/demo                    # all that lies in a folder of one run
    python -m eval.report --rows=results --model=mobilenet_v2 --output=report.html
    python -m eval.report --rows=results,runs/phone --model=runs/a.int8.tflite,runs/a.float.tflite

It takes the rows that the tools wrote (accuracy.csv, parity.csv, latency.csv, layers.csv, the devices'
and the rest), the latest of each measurement, and reads the `.tflite` files that they name, where they
are still there: operations and bytes.  Nothing is run; what no row tells is named as not measured.
Rows that were emulated, simulated or estimated stand in a part of their own.
"""

import dataclasses
import html
import os
import pathlib
import time
from collections.abc import Mapping, Sequence

import lowbit
from eval import charts, measured, page
from lowbit import census, cli, files, manifest, tflite_file


@dataclasses.dataclass(frozen=True)
class Config:
    """The command's flags."""

    rows: str = cli.field(
        "results", "Folders, or CSV files, with commas: where the tools put their rows."
    )
    model: str | None = cli.field(
        None,
        "Whose rows, with commas: paths; file names; or names such as mobilenet_v2, which take "
        "mobilenet_v2.*. Default: all models of the rows.",
    )
    output: str | None = cli.field(
        None, "An .html file; default: report.html in the first folder of --rows."
    )


@dataclasses.dataclass(frozen=True)
class Content:
    """What the page tells."""

    rows: dict[str, list[measured.Row]]  # by the name of the CSV
    layers: list[tuple[measured.Row, list[dict[str, str]]]]
    tflite: dict[str, bytes]  # by path
    colours: dict[str, int]  # of a model, the same in every chart
    numbers: dict[int, int]  # of the measurement, by id of its Row


def report(config: Config) -> dict:
    """Runs the command; returns its result row.

    Raises:
      ValueError, OSError: where there is no row, a CSV or a `.tflite` file is damaged, or the page
        cannot be written.
    """
    start = time.monotonic()
    places = cli.words(config.rows)
    if not places:
        raise ValueError("--rows names no folder")
    output = config.output
    if output is None:
        first = pathlib.Path(places[0])
        output = str((first if first.is_dir() else first.parent) / "report.html")
    manifest.check_output(output, ".html")
    content = gather(places, None if config.model is None else cli.words(config.model))
    text = render(content)
    files.save_bytes(text.encode(), output)
    return {
        "tool": "eval.report",
        "models": list(content.colours),
        "output": output,
        "rows": sum(map(len, content.rows.values())),
        "tflite_files": len(content.tflite),
        "not_measured": [source.title for source in _absent(content).values()],
        "size_bytes": len(text.encode()),
        "seconds": round(time.monotonic() - start, 3),
        "versions": {"lowbit": lowbit.__version__},
    }


def gather(places: Sequence[str], models: Sequence[str] | None) -> Content:
    """Returns the chosen rows, and the `.tflite` files that they name and that are there."""
    rows = measured.collect(places, models)
    every = [row for each in rows.values() for row in each]
    names = list(dict.fromkeys(row.cells["model"] for row in every))
    named = [each for each in models or () if each.endswith(".tflite") and os.path.dirname(each)]
    paths = dict.fromkeys(
        path for path in [*names, *named] if path.endswith(".tflite") and os.path.isfile(path)
    )
    return Content(
        rows,
        measured.layers_of(rows.get("layers_summary.csv", [])),
        {path: tflite_file.load_bytes(path) for path in paths},
        {name: index % charts.COLOURS for index, name in enumerate(names)},
        {id(row): number for number, row in enumerate(every, 1)},
    )


def render(content: Content) -> str:
    """Returns the page."""
    title = _title(list(dict.fromkeys(_short(name) for name in content.colours)))
    parts = [f"<h1>{html.escape(title)}</h1>"]
    parts.append(page.section("At a glance", [_glance(content)]))
    for part in (_accuracy, _latency, _phone, _parity, _layers, _files, _others, _emulated):
        parts += part(content)
    parts += [_how(content), _not_measured(content)]
    return page.whole(f"{title}: measured", parts)


def _title(names):
    """Returns what all names begin with, up to the end of a word; else the names."""
    shared = os.path.commonprefix(names) if len(names) > 1 else ""
    while shared and any(name[len(shared) :][:1].isalnum() for name in names):
        shared = shared[:-1]
    shared = shared.rstrip("._- ")
    if len(shared) > 2:
        return shared
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _short(model):
    return pathlib.PurePath(model).name


def _label(cells, *names):
    """Returns "file, 1 thread, ...": what tells a row from the others."""
    words = [_short(cells["model"])]
    for name in names:
        value = cells.get(name, "")
        if name == "threads" and value:
            value += " thread" if value == "1" else " threads"
        if value:
            words.append(value)
    return ", ".join(words)


def _cells(content, row):
    shown = {name: _told(text) for name, text in row.cells.items()}
    return shown | {"#": str(content.numbers[id(row)]), "file": _short(row.cells["model"])}


def _table(content, rows, columns, wrapped=()):
    return page.table([_cells(content, row) for row in rows], {"#": "#"} | columns, wrapped)


def _of(content, name, emulated=False):
    return [row for row in content.rows.get(name, []) if row.emulated == emulated]


# --- the parts ------------------------------------------------------------------------------------


def _glance(content):
    """Returns a line for each model: the first figure of each kind that was measured."""
    found: dict[str, dict[str, str]] = {}
    for path, each in content.tflite.items():
        found.setdefault(path, {"size_bytes": str(len(each))})
    wanted: Mapping[str, tuple[str, ...]] = {
        "accuracy.csv": ("top1", "agreement", "size_bytes"),
        "latency.csv": ("latency_ms", "threads", "size_bytes"),
        "parity.csv": ("simulator_xnnpack_differing", "keras_op_differing"),
    }
    for name, columns in wanted.items():
        for row in _of(content, name):
            line = found.setdefault(row.cells["model"], {})
            if columns[0] in line:
                continue
            line |= {key: row.cells[key] for key in columns if row.cells.get(key)} | line
    lines = [line | {"file": _short(name)} for name, line in found.items()]
    columns = {
        "file": "file",
        "size_bytes": "bytes",
        "top1": "top-1",
        "agreement": "agreement with reference",
        "latency_ms": "latency, ms (host)",
        "threads": "threads",
        "simulator_xnnpack_differing": "codes differing, simulator/interpreter",
        "keras_op_differing": "codes differing, Keras/file",
    }
    shown = [line for line in lines if len(line) > 1]
    if not shown:
        return page.paragraph("No accuracy, latency or parity was measured; see below.")
    return page.table(shown, columns)


def _accuracy(content):
    rows = _of(content, "accuracy.csv")
    if not rows:
        return []
    parts = []
    for key, same in _groups(rows, ("dataset", "split", "images", "crop")).items():
        drawn = [row for row in same if row.cells.get("size_bytes")]
        if len({row.cells["model"] for row in drawn}) < 2:
            continue
        points = [
            (
                _label(row.cells, "runtime", "kernels"),
                row.cells["size_bytes"],
                row.cells["top1"],
                row.cells.get("top1_standard_error", ""),
                content.colours[row.cells["model"]],
            )
            for row in drawn
        ]
        caption = f"Top-1 on {key[2]} images of {_short(key[0])}; whiskers: one standard error."
        parts.append(page.figure(charts.scatter(points, "size of the file, MB", "top-1"), caption))
    columns = {
        "file": "file",
        "runtime": "runtime",
        "kernels": "kernels",
        "dataset": "images of",
        "images": "images",
        "top1": "top-1",
        "top1_standard_error": "standard error",
        "top5": "top-5",
        "size_bytes": "bytes",
        "reference": "reference",
        "agreement": "agreement",
        "mean_kl": "mean KL",
        "top1_difference": "top-1 difference",
        "top1_paired_error": "paired error",
        "tied_at_top": "ties at the top",
        "arena_bytes": "arena bytes",
    }
    parts.append(_table(content, rows, columns))
    return [page.section("Accuracy and size", parts)]


def _groups(rows, names):
    found: dict[tuple, list[measured.Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.cells.get(name, "") for name in names), []).append(row)
    return found


_LATENCY = {
    "file": "file",
    "threads": "threads",
    "kernels": "kernels",
    "latency_ms": "median, ms",
    "latency_ms_p10": "p10, ms",
    "latency_ms_p90": "p90, ms",
    "latency_ms_min": "least, ms",
    "runs": "runs",
    "rounds": "rounds",
    "time_ratio": "ratio",
    "time_ratio_low": "from",
    "time_ratio_high": "to",
    "ratio_of": "of the time of",
    "size_bytes": "bytes",
    "cpu": "processor",
    "cores": "cores",
}


def _bars(content, rows, names, low, high):
    """Returns bars of latency, labelled by the columns `names`, whiskers from `low` to `high`."""
    entries = [
        (
            _label(row.cells, *names),
            row.cells["latency_ms"],
            row.cells.get(low, ""),
            row.cells.get(high, ""),
            content.colours[row.cells["model"]],
        )
        for row in rows
    ]
    return charts.bars(entries, "ms")


def _latency(content):
    rows = _of(content, "latency.csv")
    if not rows:
        return []
    parts = []
    for (cpu, threads), same in _groups(rows, ("cpu", "threads")).items():
        count = f"{threads} thread" if threads == "1" else f"{threads} threads"
        caption = (
            f"{cpu or 'Unknown processor'}, {count}: medians; whiskers from the 10th to the 90th "
            "percentile, cut off at twice the longest median."
        )
        bars = _bars(content, same, ["kernels"], "latency_ms_p10", "latency_ms_p90")
        parts.append(page.figure(bars, caption))
    if any(row.cells.get("time_ratio") for row in rows):
        parts.append(
            page.paragraph(
                "Ratios are of times in the same round of one run, with 95 % intervals of their "
                "median: above 1 the file is slower than the one it is compared with.",
                soft=True,
            )
        )
    parts.append(_table(content, rows, _LATENCY))
    return [page.section("Latency on the host", parts)]


def _phone(content):
    rows = _of(content, "phone.csv")
    if not rows:
        return []
    parts = []
    for (phone, soc), same in _groups(rows, ("phone", "soc")).items():
        caption = (
            f"{phone or 'A phone'}, {soc or 'unknown chip'}: the median of the rounds' averages; "
            "whiskers from the lowest to the highest of them, cut off at twice the longest median."
        )
        names = ["delegate", "cores", "threads"]
        bars = _bars(content, same, names, "latency_ms_lowest", "latency_ms_highest")
        parts.append(page.figure(bars, caption))
    return [page.section("On the phone", [*parts, _everything(content, rows)])]


# Of the tables of whole rows: told elsewhere, by "#".
_ELSEWHERE = ("tool", "model", "versions", "seconds", "command")


def _everything(content, rows):
    """Returns a table of all that the rows hold: lines are rows where there are many, else columns."""
    names = dict.fromkeys(name for row in rows for name in row.cells if name not in _ELSEWHERE)
    filled = [name for name in names if any(row.cells.get(name) for row in rows)]
    if len(rows) > 8:
        columns = {"file": "file"} | {name: name.replace("_", " ") for name in filled}
        return _table(content, rows, columns)
    lines = [
        {"what": name.replace("_", " ")}
        | {str(number): _told(row.cells.get(name, "")) for number, row in enumerate(rows)}
        for name in filled
    ]
    columns = {"what": ""} | {
        str(number): f"{_short(row.cells['model'])} (#{content.numbers[id(row)]})"
        for number, row in enumerate(rows)
    }
    return page.table(lines, columns, facts=True)


def _told(text):
    """Returns a cell as it is read: of a path the name, of a dict its items."""
    is_path = "/" in text and " " not in text
    return _short(text) if is_path else measured.flat(text)


def _parity(content):
    rows = _of(content, "parity.csv")
    if not rows:
        return []
    columns = {
        "file": "file",
        "images": "images",
        "output_codes": "output codes",
        "simulator_xnnpack_differing": "simulator against XNNPACK",
        "simulator_reference_differing": "simulator against reference",
        "simulator_worst_lsb": "worst, LSB",
        "keras_op_codes": "codes of all operations",
        "keras_op_differing": "Keras against the file",
        "xnnpack_reference_differing": "XNNPACK against reference",
        "xnnpack_reference_worst_lsb": "worst of these, LSB",
        "outside_xnnpack": "outside XNNPACK",
    }
    text = (
        "Integer codes that differ. Between simulator and interpreter, and between Keras and the "
        "file, 0 is the contract; XNNPACK and the reference kernels are two correct runtimes that "
        "round differently."
    )
    return [page.section("Parity", [page.paragraph(text), _table(content, rows, columns)])]


def _layers(content):
    if not content.rows.get("layers_summary.csv"):
        return []
    parts = []
    for row, layers in content.layers:
        series = [
            ("weights, mean of channels", [each.get("channel_sqnr_db", "") for each in layers], 1),
            ("output, errors accumulated", [each["output_sqnr_db"] for each in layers], 0),
        ]
        names = [each.get("layer") or each["tensor"] for each in layers]
        caption = (
            f"{_short(row.cells['model'])} beside {_short(row.cells['reference'])} on "
            f"{row.cells['images']} images: signal to quantization noise, from the input (top) to "
            "the output; higher is better."
        )
        parts.append(page.figure(charts.profile(names, series, "SQNR in dB"), caption))
        columns = {
            "tensor": "tensor",
            "op": "operation",
            "weight_sqnr_db": "weights, dB",
            "channel_sqnr_db": "weights by channel, dB",
            "output_sqnr_db": "output, dB",
            "mean_shift": "mean shift, std",
            "weights_kl": "KL, these weights alone",
            "activation_kl": "KL, this range alone",
        }
        parts.append(page.folded("Every tensor in numbers", page.table(layers, columns)))
    columns = {
        "file": "file",
        "reference": "reference",
        "images": "images",
        "agreement": "agreement",
        "mean_kl": "mean KL",
        "float_form_kl": "KL without rounding",
        "lowest_weight_sqnr_layer": "lowest SQNR of weights",
        "lowest_output_sqnr_tensor": "lowest SQNR of outputs",
        "most_sensitive_weights": "most sensitive weights",
        "most_sensitive_activation": "most sensitive range",
    }
    parts.append(_table(content, content.rows["layers_summary.csv"], columns))
    return [page.section("Layer by layer", parts)]


def _files(content):
    """Returns what the `.tflite` files hold, the first one opened."""
    if not content.tflite:
        return []
    costs = {path: census.operations(each, path) for path, each in content.tflite.items()}
    lines = [
        {"file": _short(path), "size_bytes": str(len(each))}
        | {key: str(value) for key, value in census.totals(each, path).items()}
        for path, each in content.tflite.items()
    ]
    heads = {
        "file": "file",
        "size_bytes": "bytes",
        "constant_bytes": "bytes of constants",
        "operations": "operations",
        "macs": "multiply-accumulates",
        "peak_activation_bytes": "bytes of activations at the peak",
    }
    parts = [page.table(lines, heads)]
    for path, each in content.tflite.items():
        stale = [
            f"#{content.numbers[id(row)]}"
            for rows in content.rows.values()
            for row in rows
            if row.cells["model"] == path
            and row.cells.get("size_bytes", "").isdigit()
            and int(row.cells["size_bytes"]) != len(each)
        ]
        if stale:
            parts.append(
                page.paragraph(
                    f"{_short(path)} has changed since: it has {len(each)} bytes, not those of "
                    f"{', '.join(stale)}."
                )
            )
    for number, path in enumerate(costs):
        parts.append(
            page.folded(_short(path), _operations(content, path, costs[path]), opened=number == 0)
        )
    return [page.section("What the files hold", parts)]


def _operations(content, path, costs):
    kinds = [
        {"op": op} | {key: str(value) for key, value in sums.items()}
        for op, sums in census.by_op(costs).items()
    ]
    parts = []
    colour = content.colours.get(path, 0)
    entries = [
        (kind["op"], kind["constant_bytes"], "", "", colour)
        for kind in sorted(kinds, key=lambda kind: -int(kind["constant_bytes"]))
        if int(kind["constant_bytes"]) > 0
    ]
    if entries:
        chart = charts.bars(entries, "bytes", 16)
        parts.append(page.figure(chart, "Constants by kind of operation."))
    heads = {"op": "operation", "count": "count", "macs": "MACs"}
    heads |= {"constant_bytes": "constants, bytes", "output_bytes": "outputs, bytes"}
    parts.append(page.table(kinds, heads))
    lines = [
        {
            "number": str(cost.number),
            "op": cost.op,
            "input": _shape(cost.input_shape, cost.input_dtype),
            "output": _shape(cost.output_shape, cost.output_dtype),
            "weights": cost.weight_dtype,
            "macs": str(cost.macs),
            "constant_bytes": str(cost.constant_bytes),
            "name": cost.name,
        }
        for cost in costs
    ]
    heads = {"number": "no.", "op": "operation", "input": "input", "output": "output"}
    heads |= {"weights": "weights", "macs": "MACs", "constant_bytes": "constants, bytes"}
    lines_table = page.table(lines, heads | {"name": "first output"})
    parts.append(page.folded(f"All {len(lines)} operations", lines_table))
    return "".join(parts)


def _shape(shape, dtype):
    return f"{dtype} {'x'.join(map(str, shape)) or 'scalar'}" if dtype else ""


def _others(content):
    """Returns the tables of scripts/precisions.py and scripts/compare_peers.py."""
    parts = []
    columns = {
        "file": "file",
        "tool": "tool",
        "size_bytes": "bytes",
        "top1": "top-1",
        "minus_float": "minus float",
        "paired_error": "paired error",
        "mean_kl": "mean KL",
        "median_ms": "median, ms",
        "time_ratio": "time, of float's",
        "test": "images",
        "calibration": "calibration",
    }
    for name, own in (("precisions.csv", "file"), ("ptq_peers.csv", "tool")):
        rows = _of(content, name)
        if not rows:
            continue
        drawn = [row for row in rows if row.cells.get("size_bytes")]
        points = [
            (
                f"{row.cells['model']}, {row.cells[own]}",
                row.cells["size_bytes"],
                row.cells["top1"],
                "",
                index % charts.COLOURS,
            )
            for index, row in enumerate(drawn)
        ]
        caption = "Of each model and file; the images are named in the table."
        plots = []
        if points:
            plots = [page.figure(charts.scatter(points, "size of the file, MB", "top-1"), caption)]
        lines = [row.cells | {"#": str(content.numbers[id(row)])} for row in rows]
        listed = page.table(lines, {"#": "#", "model": "model"} | columns)
        parts.append(page.section(measured.SOURCES[name].title, [*plots, listed]))
    return parts


def _emulated(content):
    """Returns the part of rows that are no device's latency."""
    parts = []
    for name in content.rows:
        rows = _of(content, name, emulated=True)
        if rows:
            title = measured.SOURCES[name].title
            if not measured.SOURCES[name].emulated:
                title += ", emulated"
            parts += [page.heading(title), _everything(content, rows)]
    return [page.section("Without the device", parts, emulated=True)] if parts else []


def _how(content):
    letters: dict[str, str] = {}
    same: dict[tuple, list[measured.Row]] = {}
    for rows in content.rows.values():
        for row in rows:
            key = (measured.command(row), row.path, measured.versions(row), row.emulated)
            same.setdefault(key, []).append(row)
    lines = []
    for (command, path, versions, emulated), rows in same.items():
        numbers = ", ".join(
            f'<b id="m{number}">{number}</b>'
            for number in (content.numbers[id(row)] for row in rows)
        )
        badge = ' <span class="badge">emulated or estimated</span>' if emulated else ""
        origin = f"in {path}"
        if versions:
            turn, place = divmod(len(letters), 26)
            letter = chr(ord("A") + place) + (str(turn + 1) if turn else "")
            letter = letters.setdefault(versions, letter)
            origin += f", versions {letter}"
        lines.append(f"{numbers}: {page.command(command)}{badge} {page.soft(origin)}")
    text = (
        "The numbers are those of column # in the tables; the commands are put together from the "
        "rows' own columns."
    )
    known = [f"Versions {letter}: {html.escape(text)}" for text, letter in letters.items()]
    return page.section(
        "How it was measured", [page.paragraph(text, soft=True), page.listing(lines + known)]
    )


def _not_measured(content):
    missing = [
        f"{html.escape(source.title)}: {page.command(source.command)}"
        for name, source in _absent(content).items()
    ]
    if not content.tflite:
        missing.append("What the files hold: no .tflite file that the rows name is there any more")
    for row in content.rows.get("layers_summary.csv", []):
        if all(row is not each for each, _ in content.layers):
            missing.append(
                f"The layers of #{content.numbers[id(row)]}: a later run of eval.layers has "
                "replaced layers.csv"
            )
    if not missing:
        return ""
    text = page.paragraph("No row of these was found where --rows points:", soft=True)
    return page.section("Not measured", [text, page.listing(missing)])


def _absent(content):
    """Returns the sources without a row, of those that a tool of eval's writes."""
    return {
        name: source
        for name, source in measured.SOURCES.items()
        if name not in content.rows and source.command.startswith("python -m eval.")
    }


def main() -> None:
    """Runs the command line."""
    cli.run(report, Config)


if __name__ == "__main__":
    main()
