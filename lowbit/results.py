"""Result rows: each measured row is appended to a CSV file and explains itself."""

import csv
import importlib.metadata
import io
import json
import os
import pathlib
from collections.abc import Mapping, Sequence

import lowbit
from lowbit import files


def versions() -> dict[str, str]:
    """Returns the versions of what a result depends on."""
    names = ("keras", "tensorflow", "ai-edge-litert", "numpy")
    found = {"lowbit": lowbit.__version__}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def append_row(path: str | os.PathLike, row: Mapping) -> None:
    """Appends a row to a CSV; new columns go to the right, older rows leave them empty."""
    write_rows(path, [*read_rows(path), row])


def read_rows(path: str | os.PathLike) -> list[dict[str, str]]:
    """Returns the rows of a CSV as text, none where there is no file."""
    if not os.path.exists(path):
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: str | os.PathLike, rows: Sequence[Mapping]) -> None:
    """Writes rows as a CSV, whole or not at all; its columns are in the order of first use."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    columns = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {key: json.dumps(cell) if isinstance(cell, dict) else cell for key, cell in row.items()}
        )
    files.save_bytes(text.getvalue().encode(), path)


def table(rows: list[Mapping], columns: list[str]) -> str:
    """Returns rows as aligned text, floats with 4 places, absent cells as '-'."""

    def text(value):
        return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)

    cells = [columns, *[[text(row.get(name)) for name in columns] for row in rows]]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def markdown(rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> list[str]:
    """Returns rows of text as the lines of a Markdown table."""
    return [
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(row[name] for name in columns) + " |" for row in rows),
    ]
