"""The whitepaper's tables: what is printed, what is measured for it, and that no cell is lost."""

import dataclasses
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
from PIL import Image

from eval import networks, processes, published, whitepaper
from lowbit import manifest, results, spec
from lowbit.data import datasets, pipeline, preprocess

ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_the_printed_tables_are_whole():
    for number, table in published.TABLES.items():
        assert {len(figures) for figures in table.rows.values()} == {len(table.columns)}
        assert set(table.rows) <= set(networks.PAPER)
        for network in table.rows:
            # The float column is the same in every table, and is the last.
            assert table.columns[-1] == "float"
            assert table.rows[network][-1] == published.TABLES[1].figure(network, "float")
        # The paper's columns come first, in its order.
        assert tuple(whitepaper.COLUMNS[number])[: len(table.columns)] == table.columns
    assert [len(table.rows) for table in published.TABLES.values()] == [10, 9, 9, 9, 9, 5]
    # Copies in circulation repeat Resnet_v1_152's row for Resnet_v2_152; these are the paper's.
    assert published.TABLES[3].rows["Resnet_v2_152"] == (0.761, 0.76, 0.76, 0.76, 0.778)
    assert published.TABLES[2].figure("Mobilenet_V1_1_224", "asym_per_channel") == 0.704
    assert published.TABLES[3].figure("Mobilenet_V1_1_224", "asym_per_channel") == 0.703
    assert published.TABLES[2].figure("Mobilenet_V1_0.25_128", "float") is None
    assert published.TABLES[2].figure("Resnet_v1_50", "activation_only") is None
    assert published.TABLES[2].figure(None, "float") is None


@pytest.mark.parametrize(
    ("table", "weight_bits", "activation_bits"),
    [(2, 8, None), (3, 8, 8), (4, 8, 8), (5, 4, 8), (6, 8, 4)],
)
def test_a_columns_scheme_is_what_its_name_says(table, weight_bits, activation_bits):
    for name, column in whitepaper.COLUMNS[table].items():
        if column.scheme in (None, "float"):
            assert name == "float"
            continue
        assert (column.training is not None) == ("qat" in name)
        scheme = spec.scheme(column.scheme)
        if name == "activation_only":
            assert scheme.weights is None and scheme.activations.bits == 8
            continue
        bits = scheme.weights.bits, scheme.activations and scheme.activations.bits
        # Table 6 has columns of other bits too, whose names end in them.
        named = {"w4a8": (4, 8), "w4a4": (4, 4)}
        assert bits == named.get(name.rpartition("_")[2], (weight_bits, activation_bits))
        assert scheme.weights.symmetric == name.startswith("sym")
        assert scheme.per_channel == scheme.dense_per_channel == ("per_channel" in name)


def test_some_columns_are_measured_only_where_they_are_named():
    usual = set(whitepaper.columns_of(config(table=6)))
    named = {name for name in whitepaper.COLUMNS[6] if "_ends" in name}
    assert len(named) == 4 and usual == set(whitepaper.COLUMNS[6]) - named
    chosen = whitepaper.columns_of(config(table=6, columns="float,sym_per_channel_ends_qat"))
    assert list(chosen) == ["float", "sym_per_channel_ends_qat"]


def test_every_flag_has_a_help_text():
    for field in dataclasses.fields(whitepaper.Config):
        assert len(field.metadata["help"]) > 10, field.name


def config(**options):
    return whitepaper.Config(**({"table": 2, "dataset": "digits"} | options))


def test_a_recipe_adds_columns_once():
    columns = whitepaper.columns_of(config(table=3, recipe="fast"))
    added = [name for name in columns if name.endswith("_fast")]
    assert sorted(added) == [
        "activation_only_fast",
        "asym_per_channel_fast",
        "asym_per_layer_fast",
        "sym_per_channel_fast",
        "sym_per_layer_fast",
    ]
    assert columns["asym_per_layer_fast"].options == ("--recipe=fast",)
    chosen = whitepaper.columns_of(config(columns="float,asym_per_layer"))
    assert list(chosen) == ["float", "asym_per_layer"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"table": None}, "one of --table and --figure"),
        ({"figure": 3}, "one of --table and --figure"),
        ({"table": 8}, "--table=8 is not one of 1, 2, 3, 4, 5, 6, 7"),
        ({"table": None, "figure": 4}, "--figure=4 is not one of 3, 10, 11, 18, 19, 20"),
        ({"dataset": None}, "--dataset is needed"),
        ({"limit": 0}, "--limit=0: at least 1 image"),
        ({"crop": 1.5}, "--crop=1.5: the part"),
        ({"columns": "float,psym"}, "'psym' is none of the columns: asym_per_layer"),
        ({"columns": ","}, "empty name"),
        ({"table": 6, "columns": "sym_per_channel_qat"}, "these need --training"),
        ({"table": 3}, "asym_per_layer calibrates: give --calibration"),
        ({"root": "absent"}, "--root absent: no such folder"),
        ({"dataset": "absent.zip"}, "no such file or folder"),
        ({"models": "a.keras"}, "network a: a.keras: no such file"),
        ({"models": "x/Resnet_v1_50,a b"}, "a row's name is made of"),
        (
            {"models": "mobilenet_v2,Mobilenet_V2_1_224"},
            "two networks are named Mobilenet_V2_1_224",
        ),
        ({"networks": "absent.toml"}, "absent.toml"),
    ],
)
def test_bad_flags_are_named_at_once(tmp_path, options, message):
    with pytest.raises((ValueError, OSError), match=message):
        whitepaper.tabulate(config(output_dir=str(tmp_path), work_dir=str(tmp_path), **options))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[[network", "n.toml: "),
        ("[network]\nrow = 'a'", "needs entries"),
        ("[[network]]\nrow = 'a'", "network 1 needs row and model"),
        ("[[network]]\nrow = 'a'\nmodel = 'b'\nsize = 3", "network 1: 'size' is none of"),
        ("[[network]]\nrow = 'a'\nmodel = 'b'\nalpha = '1'", "alpha = '1' has a wrong type"),
        ("[[network]]\nrow = 'a/b'\nmodel = 'b'", "a row's name"),
        ("[[network]]\nrow = 'a'\nmodel = 'b'\npaper = 'LeNet'", "paper = 'LeNet' is not one of"),
    ],
)
def test_bad_networks_files_are_named(tmp_path, content, message):
    path = tmp_path / "n.toml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        networks.read_networks(str(path))


def test_networks_are_found():
    default = networks.chosen(config())
    assert [network.row for network in default] == list(networks.PAPER)
    assert {network.weights for network in default} == {"imagenet"}
    (chosen,) = networks.chosen(config(models="mobilenet_v2", weights="a.weights.h5"))
    assert (chosen.row, chosen.model, chosen.weights, chosen.alpha) == (
        *("Mobilenet_V2_1_224", "mobilenet_v2", "a.weights.h5", None),
    )
    listed = networks.read_networks(str(ROOT / "scripts/networks.toml"))
    papers = {network.row: network.paper for network in listed}
    assert papers == {
        "mobilenet_v1_1.0_224": "Mobilenet_V1_1_224",
        "mobilenet_v1_0.25_224": None,  # the paper's is measured at 128 pixels
        "mobilenet_v2_1.0_224": "Mobilenet_V2_1_224",
        "efficientnet_lite0_224": None,
    }


def test_paths_under_the_root_are_written_so(tmp_path):
    (tmp_path / "train-00000-of-00001").touch()
    root = str(tmp_path)
    assert networks.located("train-*", root) == "$ROOT/train-*"
    assert networks.real("--dataset=$ROOT/train-*", root) == f"--dataset={root}/train-*"
    assert networks.located("digits", root) == "digits"
    assert networks.located("train-*", None) == "train-*"
    command = processes.shown(["eval.accuracy", "--dataset=$ROOT/train-*", "--limit=3"])
    assert command == 'python -m eval.accuracy "--dataset=$ROOT/train-*" --limit=3'
    echoed = subprocess.run(
        ["sh", "-c", f"ROOT={root}; echo {command}"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert echoed.stdout == f"python -m eval.accuracy --dataset={root}/train-* --limit=3\n"


def test_the_tool_itself_holds_no_tensorflow():
    code = (
        "import sys; from eval import whitepaper; "
        "print([m for m in ('tensorflow', 'keras', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"


# Whole runs, on ImageNet's layout: TFRecords as TF-slim writes them


@pytest.fixture
def folder(tmp_path, randomize, monkeypatch):
    """A folder of two tiny networks, 12 images as TFRecords, and networks.toml; entered."""
    import tensorflow as tf

    keras.utils.set_random_seed(0)
    for number, name in enumerate(("one", "two"), 1):
        x = image = keras.Input((16, 16, 3))
        for index in range(number):
            x = keras.layers.Conv2D(8, 3, strides=2, padding="same", name=f"conv{index}")(x)
            x = keras.layers.BatchNormalization(name=f"bn{index}")(x)
            x = keras.layers.ReLU(6.0, name=f"relu{index}")(x)
        x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
        model = randomize(keras.Model(image, keras.layers.Dense(3, name="logits")(x)))
        model.save(tmp_path / f"{name}.keras")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("validation", 12)):
        with tf.io.TFRecordWriter(str(tmp_path / f"{split}-00000-of-00001")) as writer:
            for number in range(count):
                pixels = rng.integers(0, 256, (5, 5, 3), np.uint8)
                file = io.BytesIO()
                Image.fromarray(pixels).resize((20, 16)).save(file, "JPEG")
                features = {
                    "image/encoded": tf.train.Feature(
                        bytes_list=tf.train.BytesList(value=[file.getvalue()])
                    ),
                    "image/class/label": tf.train.Feature(
                        int64_list=tf.train.Int64List(value=[number % 3 + 1])
                    ),
                }
                example = tf.train.Example(features=tf.train.Features(feature=features))
                writer.write(example.SerializeToString())
    (tmp_path / "networks.toml").write_text(
        '[[network]]\nrow = "one"\nmodel = "one.keras"\npreprocess = "tf"\n'
        'paper = "Mobilenet_V1_1_224"\n'
        '[[network]]\nrow = "two"\nmodel = "two.keras"\npreprocess = "127,128"\n'
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def flags(folder, **options):
    return {
        "root": str(folder),
        "networks": "networks.toml",
        "dataset": "validation-*",
        "calibration": "train-*",
        "work_dir": "work",
    } | options


def float_top1(folder, name, text):
    """Returns a network's top-1, measured without the tools."""
    model, _ = manifest.load_model(folder / f"{name}.keras")
    dataset = datasets.open_dataset(str(folder / "validation-*"), "all")
    ((x, labels),) = pipeline.batches(
        dataset, input_size=(16, 16), channels=3, batch_size=12, preprocess=preprocess.parse(text)
    )
    return float((np.asarray(model(x)).argmax(axis=1) == labels).mean())


def test_a_page_has_what_other_runs_measured_on_the_same_images():
    chosen = config(table=5, columns="float", models="mobilenet_v1")
    (cell,) = whitepaper.cells(chosen, 5, whitepaper.columns_of(chosen), networks.chosen(chosen))

    def row(network, column, **changes):
        place = {"table": "5", "network": network, "column": column, "status": "ok", "paper": ""}
        return {**cell.identity, **place, "top1": "0.5", **changes}

    accurate = "sym_per_channel_accurate"
    network = cell.network.row
    stored = [
        row("other", accurate, calibration_images="100", top1="0.1"),
        row(network, accurate, crop="0.875"),
        row("failed", "float", status="failed: no memory"),
        row(network, "float", top1="0.7", paper=network),
        row("other", accurate, calibration_images="800", top1="0.2"),
        row("other", "float", table="4"),
        row(network, "float", input_size="128", top1="0.9"),
        row(network, accurate, preprocess="caffe"),
    ]
    found = whitepaper.shown(stored, [cell])
    assert [(each["network"], each["column"], each["top1"]) for each in found] == [
        ("other", accurate, "0.2"),
        (network, "float", "0.7"),
    ]
    lines, titles = whitepaper.overview(5, found)
    assert titles[-4:] == ["float, paper", "float", accurate, "images"]
    assert [(line["float, paper"], line["float"], line[accurate]) for line in lines] == [
        ("-", "-", "0.200"),
        ("0.709", "0.700", "-"),
    ]


@pytest.mark.slow  # six processes with TensorFlow: 44 s of processor time
def test_each_cell_is_measured_once(folder, capsys):
    # One cell fails: the other networks' are measured, and the page is written.
    (folder / "two.keras").write_bytes((folder / "two.keras").read_bytes()[:-100])
    options = flags(folder, table=3, columns="sym_per_channel,float")
    with pytest.raises(
        ValueError, match="2 of 4 cells failed, the first: two, float: failed: eval.accuracy: "
    ):
        whitepaper.tabulate(whitepaper.Config(**options | {"models": "two,one"}))
    broken, skipped, whole, quantized = results.read_rows("results/whitepaper.csv")
    assert broken["status"].startswith("failed: eval.accuracy: $ROOT/two.keras: damaged")
    assert skipped["status"].startswith("failed: float: eval.accuracy: $ROOT/two.keras: damaged")
    page = pathlib.Path("results/whitepaper_table_3.md").read_text()
    assert "| two | - | - | failed | - | - | - | failed | 12 of validation-* |" in page
    assert "cell 4 of 4" in capsys.readouterr().err

    assert (whole["column"], quantized["column"]) == ("float", "sym_per_channel")
    assert (whole["published"], quantized["published"]) == ("0.709", "0.591")
    assert (whole["runtime"], quantized["runtime"]) == ("keras", "litert")
    assert float(whole["top1"]) == float_top1(folder, "one", "tf")
    assert float(quantized["top1_difference"]) == pytest.approx(
        float(quantized["top1"]) - float(whole["top1"])
    )
    assert 0 < float(quantized["mean_kl"]) < 0.1
    assert float(quantized["agreement"]) >= 0.75
    assert int(quantized["peak_mib"]) > 100
    assert quantized["calibration_images"] == "12"  # as many as there are
    assert quantized["commands"].count("python -m ") == 4
    top1 = f"{float(quantized['top1']):.3f}"
    assert f"| one | 0.001 | 0.591 | {top1} | 0.703 | 0.708 | 0.709 |" in page
    assert str(folder) not in pathlib.Path("results/whitepaper.csv").read_text() + page
    # The quantized models are gone, the float outputs kept.
    assert {path.suffix for path in pathlib.Path("work").iterdir()} == {".npz", ".csv", ".txt"}

    # A second run, and another table with the same measurement: nothing is measured.
    options |= {"models": "one"}
    row = whitepaper.tabulate(whitepaper.Config(**options))
    assert (row["cells"], row["measured"], row["images"]) == (2, 0, 12)
    # The page is of all that is measured, not of what a run chose.
    whitepaper.tabulate(whitepaper.Config(**options | {"columns": "float"}))
    page = pathlib.Path("results/whitepaper_table_3.md").read_text()
    assert f"| 0.591 | {top1} |" in page and "| two |" not in page
    other = flags(folder, table=1, models="one")
    assert whitepaper.tabulate(whitepaper.Config(**other))["measured"] == 0
    copied = results.read_rows("results/whitepaper.csv")[4:]
    assert [(r["table"], r["column"], r["published"]) for r in copied] == [
        ("1", "params_millions", "4.25"),
        ("1", "float", "0.709"),
    ]
    assert {r["top1"] for r in copied} == {whole["top1"]}
    # 8 filters of 3x3x3 and biases, 4 vectors of the batch norm, 8x3 weights and biases
    assert {r["parameters"] for r in copied} == {str(8 * 27 + 8 + 4 * 8 + 8 * 3 + 3)}

    drawn = whitepaper.tabulate(
        whitepaper.Config(**flags(folder, table=None, figure=3, models="one"))
    )
    assert drawn["bars"] == 2
    assert "not measured: one, activation_only" in capsys.readouterr().err
    with Image.open(drawn["output"]) as picture:
        assert picture.width > 500

    # A row that is gone is measured again; other images are another measurement.
    results.write_rows("results/whitepaper.csv", [quantized])
    assert whitepaper.tabulate(whitepaper.Config(**options))["measured"] == 1
    stored = results.read_rows("results/whitepaper.csv")
    assert stored[0] == quantized
    assert [(r["column"], r["top1"]) for r in stored[1:]] == [("float", whole["top1"])]
    fewer = whitepaper.Config(**flags(folder, table=None, figure=3, models="one", limit=5))
    with pytest.raises(ValueError, match="has no row for this figure: run --table=3"):
        whitepaper.tabulate(fewer)


@pytest.mark.slow
def test_two_tables_of_two_networks_survive_an_interrupt(folder):
    paper = {2: published.TABLES[2].columns, 3: published.TABLES[3].columns}
    for table, columns in paper.items():
        arguments = [
            f"--{name}={value}"
            for name, value in flags(folder, table=table, columns=",".join(columns)).items()
        ]
        # A shell's background job ignores ^C, and what it starts does too: not here.
        command = [
            "env",
            "--default-signal=INT",
            sys.executable,
            "-m",
            "eval.whitepaper",
            *arguments,
        ]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        stored = pathlib.Path("results/whitepaper.csv")
        if table == 2:
            process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
            while len(results.read_rows(stored)) < 2:
                assert process.poll() is None
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate()
            assert process.returncode == 1
            assert errors.endswith("error: interrupted\n")
            first = results.read_rows(stored)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        row = json.loads(done.stdout)
        assert row["cells"] == 2 * len(columns)
        known = len(first) if table == 2 else 2  # table 3: the float cells of table 2
        assert row["measured"] == row["cells"] - known
    rows = results.read_rows(stored)
    assert rows[: len(first)] == first
    assert [row["status"] for row in rows] == ["ok"] * 18
    for network, text in (("one", "tf"), ("two", "127,128")):
        top1 = {
            row["top1"] for row in rows if row["network"] == network and row["scheme"] == "float"
        }
        assert top1 == {str(float_top1(folder, network, text))}
    for row in rows:
        assert row["images"] == "12"
        if row["scheme"] != "float":
            assert float(row["mean_kl"]) < 0.1


@pytest.mark.slow
def test_a_column_that_trains_leaves_its_model_and_goes_on_where_it_was(folder):
    columns = "sym_per_channel_accurate,sym_per_channel_qat"
    options = flags(folder, table=5, columns=columns, models="two", training="train-*,train-*")
    row = whitepaper.tabulate(whitepaper.Config(**options))
    assert (row["cells"], row["measured"]) == (2, 2)
    quantized, trained = results.read_rows("results/whitepaper.csv")
    assert (trained["column"], trained["published"]) == ("sym_per_channel_qat", "")
    assert trained["training"] == "$ROOT/train-*,$ROOT/train-*"
    assert int(trained["steps"]) >= 1 and float(trained["training_seconds"]) > 0
    assert (trained["faults"], trained["parity_images"]) == ("0", "12")
    assert (trained["xnnpack_differing"], trained["reference_differing"]) == ("0", "0")
    assert int(trained["keras_op_worst_lsb"]) <= 1
    assert quantized["faults"] == ""
    (run,) = (path for path in pathlib.Path("work").iterdir() if path.is_dir())
    assert {"qat.keras", "training.csv", "float.keras"} <= {path.name for path in run.iterdir()}
    assert not list(pathlib.Path("work").glob("*.tflite"))

    # As a kill in training leaves it: a start, a run begun, no result.
    (run / "qat.keras").unlink()
    results.write_rows("results/whitepaper.csv", [quantized])
    assert whitepaper.tabulate(whitepaper.Config(**options))["measured"] == 1
    again = results.read_rows("results/whitepaper.csv")[1]
    same = ("top1", "mean_kl", "steps", "commands", "size_bytes")
    assert {name: again[name] for name in same} == {name: trained[name] for name in same}
    log = pathlib.Path("work/log.txt").read_text()
    assert log.count("qat.train --model=") == 2 and log.count(" --resume\n") == 1
    assert log.count("$ python -m ptq.quantize") == 2  # once for each column
