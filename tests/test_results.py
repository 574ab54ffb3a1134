"""Rows in CSV files: damage is named, runs side by side lose none."""

import subprocess
import sys

import pytest

from lowbit import results


@pytest.mark.parametrize(
    "content, message",
    [
        (b"a,b\n1,2,3\n", "rows.csv: row 1 has more or fewer cells"),
        (b"a,b\n1\n", "rows.csv: row 1 has more or fewer cells"),
        (b"a,b\n\xff,1\n", "rows.csv is not a CSV file of text: .*utf-8"),
    ],
)
def test_a_damaged_file_is_named_and_left_as_it_is(tmp_path, content, message):
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        results.append_row(path, {"a": 1})
    assert path.read_bytes() == content


def test_a_long_cell_comes_back(tmp_path):
    path = tmp_path / "rows.csv"
    for number in range(2):
        results.append_row(path, {"a": "x" * 200_000, "b": number})
    assert [(len(row["a"]), row["b"]) for row in results.read_rows(path)] == [
        *((200_000, "0"), (200_000, "1"))
    ]


def test_runs_side_by_side_lose_no_row(tmp_path):
    script = (
        "import sys; from lowbit import results\n"
        "for i in range(40): results.append_row(sys.argv[1], {'process': sys.argv[2], 'i': i})"
    )
    path = tmp_path / "new" / "rows.csv"
    running = [
        subprocess.Popen([sys.executable, "-c", script, str(path), str(number)])
        for number in range(3)
    ]
    assert [process.wait() for process in running] == [0, 0, 0]
    found = {(row["process"], row["i"]) for row in results.read_rows(path)}
    assert found == {(str(process), str(i)) for process in range(3) for i in range(40)}
