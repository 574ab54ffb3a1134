"""Result rows: each measured row is appended to a CSV file and explains itself."""

import csv
import io
import json
import os
import pathlib
from collections.abc import Mapping

from lowbit import files


def append_row(path: str | os.PathLike, row: Mapping) -> None:
    """Appends a row to a CSV; new columns go to the right, older rows leave them empty.

    The file is written whole under a temporary name and renamed.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows, columns = [], []
    if path.exists():
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            columns, rows = list(reader.fieldnames or []), list(reader)
    columns += [name for name in row if name not in columns]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    row = {
        key: json.dumps(value) if isinstance(value, dict) else value for key, value in row.items()
    }
    writer.writerows([*rows, row])
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
