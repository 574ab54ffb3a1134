"""Host latency: whose turn it is, what is compared with what, and rows of files beside one another."""

import collections
import itertools
import json
import pathlib

import keras
import numpy as np
import pytest

from eval import latency, on_host
from lowbit import lowering, manifest, placement, results, spec, tflite_file


@pytest.fixture(scope="module")
def files(digits_files, tmp_path_factory):
    """Paths of one network's int8 file, a copy of it, and its float file."""
    folder = tmp_path_factory.mktemp("latency")
    content = (digits_files / "m.tflite").read_bytes()
    model, _ = manifest.load_model(digits_files / "float.keras")
    whole = lowering.lower(placement.place(model, spec.scheme("float32")))
    contents = {"int8": content, "copy": content, "float": tflite_file.write(whole)}
    paths = {}
    for name, each in contents.items():
        paths[name] = str(folder / f"{name}.tflite")
        pathlib.Path(paths[name]).write_bytes(each)
    return paths


@pytest.mark.parametrize("count", range(1, 9))
def test_everyone_has_each_place_and_each_neighbour_equally_often(count):
    orders = on_host.turn_orders(count)
    assert len(orders) == 2 * count
    places = collections.Counter(
        (entrant, place) for order in orders for place, entrant in enumerate(order)
    )
    assert all(places[each] == 2 for each in itertools.product(range(count), repeat=2))
    behind = collections.Counter(pair for order in orders for pair in itertools.pairwise(order))
    assert len(behind) == count * (count - 1)
    assert set(behind.values()) <= {2}


class Recorder:
    """Stands for an interpreter: writes down that it ran."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def invoke(self):
        self.log.append(self.name)


def test_a_round_gives_each_a_turn_of_one_uncounted_run_and_the_counted_ones():
    log = []
    entrants = [on_host.Entrant(name, 1, 0, Recorder(name, log)) for name in "abc"]
    times = on_host.timed(entrants, warmup_runs=2, runs=12)
    assert log[:6] == list("aabbcc")
    assert [len(turn) for turn in times[0]] == [5, 5, 2]
    expected = [
        entrants[index].path
        for number, counted in enumerate((5, 5, 2))
        for index in on_host.turn_orders(3)[number]
        for _ in range(1 + counted)
    ]
    assert log[6:] == expected


def test_a_slow_machine_cancels_out_of_the_paired_ratio(rng):
    base = np.full(40, 2.0)
    slow = np.where(np.arange(40) % 3 == 0, 7.0, 1.0)  # other work, on all files of a round
    found = on_host.paired_ratio(1.25 * base * slow, base * slow)
    assert found == {"time_ratio": 1.25, "time_ratio_low": 1.25, "time_ratio_high": 1.25}
    noisy = 1.25 * base * rng.lognormal(0, 0.1, 40)
    found = on_host.paired_ratio(noisy, base)
    assert found["time_ratio_low"] < found["time_ratio"] < found["time_ratio_high"]
    assert found["time_ratio"] == round(float(np.median(noisy / base)), 4)


def test_the_interval_of_a_median_holds_it_19_times_in_20(rng):
    inside = 0
    for _ in range(200):
        found = on_host.paired_ratio(rng.lognormal(0.2, 0.3, 30), np.ones(30))
        inside += found["time_ratio_low"] <= np.exp(0.2) <= found["time_ratio_high"]
    assert 180 <= inside <= 199


def test_files_beside_one_another_give_a_row_each_and_ratios(files, tmp_path):
    row = latency.measure(
        latency.Config(
            model=files["int8"],
            beside=f"{files['copy']},{files['float']}",
            threads="1,2",
            runs=60,
            warmup_runs=1,
            output_dir=str(tmp_path),
        )
    )
    json.dumps(row, allow_nan=False)
    assert (row["model"], row["threads"], row["rounds"]) == (files["int8"], 1, 12)
    assert set(row["ratios"]) == {files["copy"], files["float"]}
    for ratios in row["ratios"].values():
        assert list(ratios) == ["1", "2"]
    # The same file against itself: a median of 12 rounds, on a machine that does other work too.
    assert 0.5 < row["ratios"][files["copy"]]["1"]["time_ratio"] < 2
    rows = results.read_rows(tmp_path / "latency.csv")
    assert [(each["model"], each["threads"]) for each in rows] == [
        (files[name], threads) for name in ("int8", "copy", "float") for threads in "12"
    ]
    for each in rows:
        own = each["model"] == files["int8"]
        assert each["ratio_of"] == ("" if own else files["int8"])
        if not own:
            ratio = row["ratios"][each["model"]][each["threads"]]
            assert {name: float(each[name]) for name in ratio} == ratio
        assert int(each["size_bytes"]) == pathlib.Path(each["model"]).stat().st_size
        values = [float(each[f"latency_ms{end}"]) for end in ("_min", "_p10", "", "_p90")]
        assert values == sorted(values)
        assert values[0] > 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"threads": "0"}, "--threads=0 must be at least 1"),
        ({"threads": "1,1"}, "each number once"),
        ({"threads": "one"}, "--threads=one is not a number"),
        ({"runs": 0}, "--runs=0"),
        ({"beside": "absent.tflite"}, "absent.tflite"),
        ({"beside": "int8"}, "named twice"),
        ({"beside": "damaged"}, "damaged.tflite"),
        ({"beside": "wider"}, "wider.tflite takes inputs of shape .* files of one network"),
    ],
)
def test_what_cannot_be_timed_is_named_and_leaves_no_row(files, tmp_path, options, message):
    whole = pathlib.Path(files["float"]).read_bytes()
    (tmp_path / "damaged.tflite").write_bytes(whole[:-200])
    image = keras.Input((20, 20, 3))
    wider = keras.Model(image, keras.layers.Conv2D(2, 3, name="conv")(image))
    graph = lowering.lower(placement.place(wider, spec.scheme("float32")))
    (tmp_path / "wider.tflite").write_bytes(tflite_file.write(graph))
    known = files | {name: str(tmp_path / f"{name}.tflite") for name in ("damaged", "wider")}
    if "beside" in options:
        options = {"beside": known.get(options["beside"], options["beside"])}
    with pytest.raises((ValueError, OSError), match=message):
        on_host.measure(files["int8"], output_dir=str(tmp_path / "rows"), **options)
    assert not (tmp_path / "rows").exists()


def test_flags_of_another_device_are_refused(digits_files, tmp_path):
    model = str(digits_files / "m.tflite")
    for flags, message in (
        ({"delegate": "gpu"}, "--delegate is of --device=adb, not of host"),
        (
            {"device": "ethos-u", "threads": "2"},
            "--threads is of --device=host, adb, not of ethos-u",
        ),
        ({"dataset": "digits"}, "--dataset is of --device=arm-emulator, hexagon-emulator, tflite-"),
    ):
        with pytest.raises(ValueError, match=message):
            latency.measure(latency.Config(model=model, output_dir=str(tmp_path / "rows"), **flags))
    assert not (tmp_path / "rows").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="--output_dir=.*file is no folder that can be made"):
        latency.measure(latency.Config(model=model, output_dir=str(tmp_path / "file")))
