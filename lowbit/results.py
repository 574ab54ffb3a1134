"""Result rows: each measured row is appended to a CSV file and explains itself."""

import csv
import fcntl
import importlib.metadata
import io
import json
import os
import pathlib
from collections.abc import Mapping, Sequence

import lowbit
from lowbit import files

_LONGEST_CELL = 2**24  # a list of operators; Python's own limit is 131,072


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
    """Appends a row to a CSV; new columns go to the right, older rows leave them empty.

    Runs side by side wait for each other.  Raises ValueError where the file is damaged.
    """
    folder = pathlib.Path(path).parent
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        write_rows(path, [*read_rows(path), row])
    finally:
        os.close(handle)


def read_rows(path: str | os.PathLike) -> list[dict[str, str]]:
    """Returns the rows of a CSV as text, none where there is no file.

    Raises ValueError where it is no CSV, or a line has more or fewer cells than the first.
    """
    if not os.path.exists(path):
        return []
    csv.field_size_limit(_LONGEST_CELL)
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a CSV file of text: {error}") from error
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise ValueError(f"{path}: row {number} has more or fewer cells than the first line")
    return rows


def check_folder(path: str | os.PathLike) -> None:
    """Makes a folder for rows; raises OSError where they cannot be written there.

    Called before what takes long.
    """
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise type(error)(f"--output_dir={path} is no folder that can be made: {error}") from error
    if not os.access(path, os.W_OK):
        raise PermissionError(f"--output_dir={path} is not writable")


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
