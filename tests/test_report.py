"""The report: real rows by the real tools, and a page whose every number is a row's."""

import html.parser
import math
import os
import pathlib
import shlex
import shutil

import pytest

from eval import accuracy, charts, latency, layers, measured, page, parity, report
from lowbit import census, results


class Page(html.parser.HTMLParser):
    """What a page holds: numbers, tables by heading, scripts, addresses; refuses unbalanced tags."""

    VOID = ("meta", "br", "img", "link", "input", "hr")

    def __init__(self, text):
        super().__init__()
        self.open, self.numbers, self.sections, self.text = [], [], {}, ""
        self.tags, self.attributes, self.scripts = [], [], []
        self.title = self.table = None
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.attributes += attrs.items()
        if tag not in self.VOID:
            self.open.append((tag, attrs, []))
        if tag == "table":
            self.table = []
            self.sections.setdefault(self.title, []).append(self.table)
        if tag == "tr":
            self.table.append([])

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_data(self, data):
        self.text += data
        for _, _, parts in self.open:
            parts.append(data)

    def handle_endtag(self, tag):
        opened, attrs, parts = self.open.pop()
        assert opened == tag, self.getpos()
        content = "".join(parts)
        if tag == "h2":
            self.title = content
        if tag == "script":
            self.scripts.append(content)
        if tag in ("td", "th"):
            self.table[-1].append(content.replace("\N{NON-BREAKING HYPHEN}", "-"))
        for name in ("value", "data-value"):
            if name in attrs and tag != "li":
                self.numbers.append((attrs[name], content))
                if tag == "data" and self.open[-1][0] in ("td", "a"):
                    self.open[-1][2][:] = [attrs[name]]  # cells hold the row's text
                    if self.open[-1][0] == "a":
                        self.open[-2][2][:] = [attrs[name]]

    def rows(self, title, number=0):
        """Returns a section's table as dicts by heading."""
        head, *body = self.sections[title][number]
        return [dict(zip(head, line, strict=True)) for line in body]


@pytest.fixture(scope="module")
def run(digits_files, tmp_path_factory):
    """A folder with the files of a small network and the rows that the tools wrote of them."""
    folder = tmp_path_factory.mktemp("report") / "run"
    shutil.copytree(digits_files, folder)
    shutil.copy(folder / "m.tflite", folder / "copy.tflite")
    rows = {"output_dir": str(folder)}
    images = {"dataset": "digits", "limit": 60}
    tflite, quantized, whole = (
        str(folder / name) for name in ("m.tflite", "ptq.keras", "float.keras")
    )
    accuracy.evaluate(accuracy.Config(model=whole, preprocess="tf", **images, **rows))
    for kernels in ("xnnpack", "reference", "xnnpack"):
        accuracy.evaluate(accuracy.Config(model=tflite, kernels=kernels, **images, **rows))
    parity.compare(parity.Config(model=quantized, dataset="digits", limit=4, op_images=2, **rows))
    layers.diagnose(layers.Config(model=quantized, reference=whole, dataset="digits", **rows))
    beside = str(folder / "copy.tflite")
    latency.measure(latency.Config(model=tflite, beside=beside, threads="1,2", runs=10, **rows))
    return folder


@pytest.fixture
def copied(run, tmp_path):
    """A copy of the rows, to be changed; its rows name the files of the first folder."""
    for path in run.glob("*.csv"):
        shutil.copy(path, tmp_path)
    return tmp_path


def made(folder, **options):
    row = report.report(report.Config(rows=str(folder), **options))
    text = pathlib.Path(row["output"]).read_text()
    assert row["size_bytes"] == pathlib.Path(row["output"]).stat().st_size
    return row, text, Page(text)


def test_one_flag_makes_a_page_whose_every_number_is_a_rows(run):
    row, text, found = made(run)
    assert row["output"] == str(run / "report.html")
    assert row["tflite_files"] == 2
    known = {str(number) for number in range(1, row["rows"] + 1)}
    for path in run.glob("*.csv"):
        known.update(cell for each in results.read_rows(path) for cell in each.values())
    for name in ("m.tflite", "copy.tflite"):
        content = (run / name).read_bytes()
        known.add(str(len(content)))
        known.update(map(str, census.totals(content).values()))
        for number, cost in enumerate(census.operations(content)):
            known.update(map(str, (number, cost.macs, cost.constant_bytes)))
        for sums in census.by_op(census.operations(content)).values():
            known.update(map(str, sums.values()))
    assert len(found.numbers) > 150
    for value, shown in found.numbers:
        assert value in known
        shown = shown.split()[0].replace(",", "")
        assert math.isclose(float(shown), float(value), rel_tol=6e-4), (value, shown)


def test_tables_hold_the_columns_of_their_rows(run):
    _, _, found = made(run)
    rows = results.read_rows(run / "accuracy.csv")
    # The second of two equal measurements takes the place of the first.
    expected = [rows[0], rows[2], rows[3]]
    shown = found.rows("Accuracy and size")
    names = {"top-1": "top1", "top-5": "top5", "bytes": "size_bytes", "kernels": "kernels"}
    assert [{head: each[head] for head in names} for each in shown] == [
        {head: each[column] for head, column in names.items()} for each in expected
    ]
    rows = results.read_rows(run / "latency.csv")
    names = {"threads": "threads", "median, ms": "latency_ms", "p90, ms": "latency_ms_p90"}
    names |= {"ratio": "time_ratio", "from": "time_ratio_low", "of the time of": "ratio_of"}
    shown = found.rows("Latency on the host")
    assert [[each[head] for head in names] for each in shown] == [
        [each[column].rpartition("/")[2] for column in names.values()] for each in rows
    ]
    tensors = results.read_rows(run / "layers.csv")
    shown = found.rows("Layer by layer")
    assert [each["output, dB"] for each in shown] == [each["output_sqnr_db"] for each in tensors]
    costs = census.operations((run / "m.tflite").read_bytes())
    shown = found.rows("What the files hold", 2)
    assert [(each["operation"], each["MACs"]) for each in shown] == [
        (cost.op, str(cost.macs)) for cost in costs
    ]


def test_the_page_needs_nothing_but_itself(run):
    _, text, found = made(run)
    assert found.scripts == [page.SCRIPT]
    assert not {"link", "img", "iframe", "object", "embed", "base", "form"} & set(found.tags)
    for name, value in found.attributes:
        if name in ("href", "src", "action", "xlink:href", "data"):
            assert value.startswith("#")
        assert not name.startswith("on")
    assert "@import" not in text
    assert "url(" not in text
    assert "://" not in text
    links = {value for name, value in found.attributes if name == "href"}
    targets = {f"#{value}" for name, value in found.attributes if name == "id"}
    assert links
    assert links <= targets


@pytest.mark.parametrize(
    "name",
    [
        "<script>alert(1)</script>.tflite",
        '"><img src=x onerror=alert(1)>.tflite',
        "'-alert(1)-'.tflite",
        "a&lt;b&amp;.tflite",
        "</title></style></table>.tflite",
    ],
)
def test_a_name_in_a_row_is_text(copied, name):
    for path in ("accuracy.csv", "latency.csv"):
        rows = results.read_rows(copied / path)
        renamed = [row | {"model": name, "dataset": name, "cpu": name} for row in rows]
        results.write_rows(copied / path, renamed)
    rows = results.read_rows(copied / "layers.csv")
    results.write_rows(copied / "layers.csv", [row | {"layer": name} for row in rows])
    results.append_row(
        copied / "phone.csv", {"model": name, "device": name, "latency_ms": 1, name: name}
    )
    _, text, found = made(copied)
    assert found.scripts == [page.SCRIPT]
    assert "img" not in found.tags
    assert name in found.text
    assert not any(key.startswith("on") for key, _ in found.attributes)
    assert "script-src 'sha256-" in text


def test_emulated_rows_stand_apart_and_are_labelled(copied):
    common = {"tool": "eval.latency", "model": "m.tflite"}
    emulated = common | {
        "device": "arm-emulator",
        "cpu": "cortex-a53",
        "emulated_instructions": 777,
    }
    results.append_row(copied / "arm_emulator.csv", emulated)
    common |= {"device": "adb", "delegate": "cpu", "cores": "big", "threads": 1}
    for soc, latency_ms, is_emulated in (("Tensor", 5.25, False), ("none", 99.75, True)):
        row = common | {"soc": soc, "latency_ms": latency_ms, "emulated": is_emulated}
        results.append_row(copied / "phone.csv", row | {"versions": {"a": "1", "b": {"c": "2"}}})
    _, _, found = made(copied)
    apart = next(title for title in found.sections if title.startswith("Without the device"))
    assert "no device latency" in apart
    phone = {cell for line in found.sections["On the phone"][0] for cell in line}
    labelled = {cell for table in found.sections[apart] for line in table for cell in line}
    assert "5.25" in phone
    assert not {"99.75", "777"} & phone
    assert {"99.75", "777"} <= labelled
    assert "5.25" not in labelled
    # No bar is drawn of what no device took.
    drawn = [value for value, shown in found.numbers if shown.endswith(" ms")]
    assert "5.25" in drawn
    assert "99.75" not in drawn
    assert "a 1, b c 2" in found.text
    assert "--device=adb --delegate=cpu --cores=big --threads=1" in found.text


def test_what_is_absent_is_left_out_and_named(copied):
    for name in ("latency.csv", "layers_summary.csv", "parity.csv"):
        (copied / name).unlink()
    row, _, found = made(copied)
    assert {"Latency on the host", "Layer by layer", "Parity"} <= set(row["not_measured"])
    assert "Latency on the host: python -m eval.latency --model=m.tflite" in found.text
    assert set(found.sections) == {"At a glance", "Accuracy and size", "What the files hold"}


def test_layers_of_another_run_are_not_drawn(copied):
    rows = results.read_rows(copied / "layers_summary.csv")
    results.append_row(copied / "layers_summary.csv", rows[0] | {"model": "other.keras"})
    _, _, found = made(copied, model="ptq.keras,m.tflite")
    assert len(found.sections["Layer by layer"]) == 1
    assert "has replaced layers.csv" in found.text


def test_a_file_that_has_changed_since_is_named(copied, run):
    changed = copied / "changed.tflite"
    changed.write_bytes((run / "m.tflite").read_bytes())
    rows = results.read_rows(copied / "latency.csv")
    for row in rows[:1]:
        stale = row | {"model": str(changed), "size_bytes": "12345", "cpu": "another"}
        results.append_row(copied / "latency.csv", stale)
    _, _, found = made(copied, model=str(changed))
    assert "changed.tflite has changed since" in found.text


@pytest.mark.parametrize(
    "wanted, model, chosen",
    [
        ("a.tflite", "runs/x/a.tflite", True),
        ("a.tflite", "runs/x/b.tflite", False),
        ("runs/y/a.tflite", "runs/x/a.tflite", False),
        ("runs/x/../x/a.tflite", "runs/x/a.tflite", True),
        ("mobilenet_v1", "files/mobilenet_v1.int8.tflite", True),
        ("mobilenet_v1", "files/mobilenet_v1_025.int8.tflite", False),
        ("mobilenet_v1_1.0_224", "mobilenet_v1_1.0_224", True),
    ],
)
def test_whose_rows_are_taken(wanted, model, chosen):
    assert measured.is_chosen(model, wanted) is chosen


def test_only_rows_of_the_chosen_models_are_shown(run, tmp_path):
    _, _, found = made(run, model="copy.tflite", output=str(tmp_path / "one.html"))
    assert {each["file"] for each in found.rows("Latency on the host")} == {"copy.tflite"}
    assert "Accuracy and size" not in found.sections
    with pytest.raises(ValueError, match=r"no row of absent\.tflite; models there: .*m\.tflite"):
        made(run, model="absent.tflite")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("accuracy.csv", b"\x89PNG\r\n\x1a\n\x00\xff", "accuracy.csv is not a CSV file of text"),
        (
            "accuracy.csv",
            b"a,b\n1,2\n",
            "accuracy.csv has no column model, top1, images; it has a, b",
        ),
        (
            "latency.csv",
            b"model,device,latency_ms\nm,host\n",
            "latency.csv: row 1 has more or fewer",
        ),
        ("latency.csv", b"model,device,latency_ms\nm,host,1,2\n", "latency.csv: row 1 has more"),
        ("latency.csv", b"model,device,latency_ms\nm,host,fast\n", "latency_ms is 'fast'"),
        ("accuracy.csv", b"model,top1,images\nm,nan,5\n", "top1 is 'nan'"),
        ("other.csv", b"a\n1\n", "holds none of accuracy.csv"),
    ],
)
def test_a_bad_csv_is_named_and_no_page_is_left(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        made(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_places_and_outputs_that_cannot_be_are_named(run, tmp_path):
    for options, message in (
        ({"rows": str(tmp_path / "absent")}, "absent: no such file or folder"),
        ({"rows": str(run / "float.keras")}, "float.keras is not named one of"),
        ({"rows": ","}, "--rows names no folder"),
        ({"rows": str(run), "output": str(tmp_path / "page.txt")}, "must end in .html"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            report.report(report.Config(**options))
    assert list(tmp_path.iterdir()) == []


def test_the_commands_measure_the_rows_anew(run, tmp_path):
    """Commands are put together from columns: run again they give the same figures."""
    tools = {
        "eval.accuracy": (accuracy.Config, accuracy.evaluate),
        "eval.parity": (parity.Config, parity.compare),
        "eval.layers": (layers.Config, layers.diagnose),
        "eval.latency": (latency.Config, latency.measure),
    }
    seen = set()
    for each in measured.collect([str(run)], None).values():
        for row in each:
            words = shlex.split(measured.command(row))
            assert words[:2] == ["python", "-m"]
            config, function = tools[words[2]]
            flags = dict(word.removeprefix("--").split("=", 1) for word in words[3:])
            known = {name: field.type for name, field in config.__dataclass_fields__.items()}
            values = {
                name: int(value) if "int" in str(known[name]) else value
                for name, value in flags.items()
            }
            if "crop" in values:
                values["crop"] = float(values["crop"])
            again = function(config(**values, output_dir=str(tmp_path)))
            seen.add(words[2])
            for name, value in again.items():
                if name in row.cells and name not in ("seconds", "versions", "model"):
                    if not name.startswith(("latency", "time_ratio", "threads", "ratio_of")):
                        assert str("" if value is None else value) == row.cells[name], name
    assert seen == set(tools)


def test_the_commands_of_devices_have_flags_that_are_there():
    assert set(latency.DEVICES) <= set(measured.LATENCY_FLAGS)
    fields = set(latency.Config.__dataclass_fields__)
    for device in latency.DEVICES:
        assert set(measured.LATENCY_FLAGS[device].values()) <= fields, device


@pytest.mark.parametrize("low, high", [(0, 1), (0, 16.5), (0.76, 0.9), (-3, 47), (5, 5), (0, 0)])
def test_ticks_are_round_and_span_the_values(low, high):
    found = charts.ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert 1 <= len(found) <= 8
    steps = {round(b - a, 9) for a, b in zip(found, found[1:], strict=False)}
    assert len(steps) <= 1


def test_numbers_are_shown_with_four_digits_and_whole_ones_whole():
    shown = {"4000752": "4,000,752", "0.85": "0.85", "3.2057": "3.206", "0.0000123": "1.230e-05"}
    shown |= {"0": "0", "-0.02": "-0.02", "123456.7": "123,457", "text": "text", "1e3": "1000"}
    assert {text: charts.rounded(text) for text in shown} == shown


def test_a_bar_is_as_long_as_its_number():
    text = charts.bars([("a", "2", "1.5", "2.5", 0), ("b", "4", "3", "90", 1)], "ms")
    widths = [
        float(value.rstrip("%"))
        for name, value in Page(text).attributes
        if name == "width" and value != "100%"
    ]
    assert widths[1] == pytest.approx(2 * widths[0], rel=1e-3)
    assert max(float(v.rstrip("%")) for n, v in Page(text).attributes if n == "x2") <= 76
    assert os.linesep not in text


def test_numbers_of_points_cover_no_point_and_no_number():
    """As many files of nearly one size as PTQ's peers make: 12 numbers that can all be read."""
    sizes = [13995820, 13970032, 7006592, 3785376, 3779152, 4072544, 4000320, 4000320, 2265456]
    tops = [0.876, 0.876, 0.876, 0.86, 0.866, 0.858, 0.866, 0.842, 0.84]
    points = [
        (f"f{i}", str(x), str(y), "", 0) for i, (x, y) in enumerate(zip(sizes, tops, strict=True))
    ]
    found = Page(charts.scatter(points, "MB", "top-1"))
    assert [shown for shown in found.numbers if shown[0] in map(str, sizes)]
    spots = [
        (100 * size / max(sizes), 1000 * (0.88 - top))
        for size, top in zip(sizes, tops, strict=True)
    ]
    taken = []
    for spot in spots:
        charts._free_place(spot, spots, taken)
    for percent in (3.3, 10.4):
        middles = [(percent * x + right, y + down) for (x, y), (right, down) in taken]
        for index, (x, y) in enumerate(middles):
            for a, b in middles[:index]:
                assert abs(x - a) >= 10 or abs(y - b) >= 9
