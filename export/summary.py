"""Summary: what a `.tflite` file of any tool holds and costs, operation by operation; or two of them.

    python -m export.summary --model=model.tflite
    python -m export.summary --model=model.tflite --compare=other.tflite

One line for each operation: shapes, dtypes, multiply-accumulates, bytes of its constants; then the
sums by kind of operation.  With --compare the sums of both files stand side by side, and the lines
are the operations in which they differ.  The file is read, never run.
"""

import dataclasses
import difflib
import sys
import time

import numpy as np

import lowbit
from lowbit import census, cli, results, tflite_file


@dataclasses.dataclass(frozen=True)
class Config:
    """The command's flags."""

    model: str = cli.field(cli.REQUIRED, "A .tflite file.")
    compare: str | None = cli.field(None, "Another one, to stand beside it.")
    csv: str | None = cli.field(None, "Keeps the lines of --model as this .csv file.")


def summarize(config: Config) -> dict:
    """Runs the command; returns its result row.

    Raises:
      FileNotFoundError, TFLiteFileError: where there is nothing to read.
    """
    start = time.monotonic()
    content = tflite_file.load_bytes(config.model)
    costs = census.operations(content, config.model)
    totals = census.totals(content, config.model) | {"size_bytes": len(content)}
    lines = [line(cost) for cost in costs]
    row = {"tool": "export.summary", "model": config.model, **totals}
    if config.compare is None:
        print(results.table(lines, list(lines[0])) if lines else "no operation", file=sys.stderr)
        sums = [{"op": op} | values for op, values in census.by_op(costs).items()]
        sums.append({"op": "all", "count": len(costs)} | _sums(costs))
        print("\n" + results.table(sums, list(sums[0])), file=sys.stderr)
    else:
        other = tflite_file.load_bytes(config.compare)
        others = census.operations(other, config.compare)
        other_totals = census.totals(other, config.compare) | {"size_bytes": len(other)}
        print(side_by_side(costs, others, totals, other_totals), file=sys.stderr)
        changed = differences(lines, [line(cost) for cost in others])
        print("\n" + ("\n".join(changed) or "the same operations"), file=sys.stderr)
        row |= {"compare": config.compare, "differing_lines": len(changed)}
        row |= {f"compare_{name}": value for name, value in other_totals.items()}
    if config.csv is not None:
        results.write_rows(config.csv, lines)
    peak = totals["peak_activation_bytes"]
    print(
        f"\n{totals['size_bytes']} bytes, {totals['macs'] / 1e6:.1f} million MACs, "
        f"activations of {peak} bytes at the peak",
        file=sys.stderr,
    )
    return row | {
        "seconds": round(time.monotonic() - start, 3),
        "versions": {"lowbit": lowbit.__version__, "numpy": np.__version__},
    }


def line(cost: census.Cost) -> dict:
    """Returns an operation's line of the table."""
    return {
        "number": cost.number,
        "op": cost.op,
        "input": _shape(cost.input_shape, cost.input_dtype),
        "output": _shape(cost.output_shape, cost.output_dtype),
        "weights": cost.weight_dtype or "-",
        "macs": cost.macs,
        "constant_bytes": cost.constant_bytes,
        "version": cost.version,
        "name": cost.name if len(cost.name) <= 40 else f"...{cost.name[-37:]}",
    }


def side_by_side(costs, others, totals, other_totals) -> str:
    """Returns a table of operations by kind, of both files, and their sums."""
    found = [census.by_op(each) for each in (costs, others)]
    lines = []
    for op in dict.fromkeys([*found[0], *found[1]]):
        one, two = (each.get(op, {"count": 0, "macs": 0, "constant_bytes": 0}) for each in found)
        entry = {"what": op}
        for key in ("count", "macs", "constant_bytes"):
            entry |= {key: one[key], f"{key}, other": two[key]}
        lines.append(entry)
    table = results.table(lines, list(lines[0])) if lines else ""
    sums = [
        {"what": name.replace("_", " "), "this": totals[name], "other": other_totals[name]}
        for name in totals
    ]
    made = [{"what": "outputs by dtype", "this": _dtypes(costs), "other": _dtypes(others)}]
    return f"{table}\n\n{results.table([*sums, *made], ['what', 'this', 'other'])}"


def differences(lines, others) -> list[str]:
    """Returns what one list of operations has and the other has not: "- ..." and "+ ..." lines."""
    texts = [
        [
            f"{each['op']} {each['input']} -> {each['output']}, weights {each['weights']}"
            for each in one
        ]
        for one in (lines, others)
    ]
    marked = difflib.ndiff(*texts)
    return [text for text in marked if text.startswith(("- ", "+ "))]


def _shape(shape, dtype):
    return f"{dtype} {'x'.join(map(str, shape)) or 'scalar'}" if dtype else "-"


def _sums(costs):
    return {
        key: sum(getattr(cost, key) for cost in costs)
        for key in ("macs", "constant_bytes", "output_bytes")
    }


def _dtypes(costs):
    return ", ".join(f"{count} {dtype}" for dtype, count in census.dtypes(costs).items())


def main() -> None:
    """Runs the command line."""
    cli.run(summarize, Config)


if __name__ == "__main__":
    main()
