"""eval.dsq: flags, the commands of a row, and whole small runs on both layouts of images."""

import json
import os
import pathlib
import re

import pytest

from eval import dsq, dsq_figures, dsq_published
from lowbit import models, results, spec
from qat import methods


def config(**options):
    return dsq.Config(**({"table": 4} | options))


def test_every_row_is_a_run_that_the_tools_know():
    for table, rows in dsq.MEASURED.items():
        for (network, _, bits), (scheme, quantizer) in rows.items():
            assert network in models.ZOO and quantizer in methods.METHODS
            assert spec.scheme(scheme).weights.bits == bits[0]
            assert spec.scheme(scheme).activations.bits == bits[1]
        assert table == 2 or table in dsq_published.TABLES
    # Under one schedule, so that methods can be compared.
    found = {quantizer for scheme, quantizer in dsq.MEASURED[4].values() if scheme == "w3a3"}
    assert found == {"ste", "pact", "lsq", "dsq"}


def test_commands_name_all_that_decides_them():
    run = ("w2a2", "dsq")
    first, train = dsq.commands_of(config(), "resnet20", run)
    assert first[0] == train[0] == "qat.train"
    assert train[1] == f"--model={first[-1].partition('=')[2]}/float.keras"
    assert {"--scheme=w2a2", "--quantizer=dsq", "--ends=w8a8", "--additions=w8a8"} <= set(train)
    other_first, other = dsq.commands_of(config(learning_rate=0.1), "resnet20", run)
    assert other_first == first and other[-1] != train[-1]
    assert dsq.commands_of(config(float_epochs=3), "resnet20", run)[1][1] != train[1]
    distilled = dsq.commands_of(config(distill=True), "resnet20", run)
    assert distilled[0] == first and set(distilled[1]) - set(train) >= {"--distill"}
    better = dsq.commands_of(config(recipe="accurate", select_images=20), "resnet20", run)
    assert better[0] == first and better[1][0] == "ptq.quantize"
    (start,) = (word for word in better[2] if word.startswith("--start="))
    assert better[1][-1].partition("=")[2] == start.partition("=")[2]
    assert {"--select_on=cifar10", "--select_images=20", "--rate_unit=step"} <= set(better[2])
    own = {"ptq.quantize", "--recipe=accurate", "--calibration_images=1000", better[1][-1]}
    assert set(better[1]) - set(better[2]) == own
    eight = dsq.commands_of(config(), "resnet20", ("w8a8", "ste"))
    assert [command[0] for command in eight[2:]] == ["export.tflite", "export.check", "eval.parity"]
    assert not any(word.startswith("--ends") for word in eight[1])


def test_rows_are_chosen_by_all_flags_together():
    chosen = dsq._chosen(config(methods="LSQ;uniform", schemes="w4a4, w8a8"))
    rows = [("uniform", (4, 4)), ("LSQ", (4, 4)), ("uniform", (8, 8))]
    assert [row[1:] for row in chosen] == rows
    assert dsq._chosen(config(table=3)) == {}


def test_figures_need_finished_runs(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} holds no finished run of qat.train"):
        dsq_figures.draw(dsq_figures.Config(runs=str(tmp_path), output_dir=str(tmp_path)))


def test_alphas_are_read_in_the_runs_folder_and_missed(tmp_path):
    """A folder with a space; and one that is gone, whose page would be empty."""
    chosen = config(table=2, work_dir=str(tmp_path / "my runs"))
    ((row, run),) = dsq.MEASURED[2].items()
    option = dsq.commands_of(chosen, row[0], run)[-1][-1]
    found = {row: {"status": "ok"}}
    with pytest.raises(ValueError, match="alpha.csv: the run's folder is gone"):
        dsq._alphas(chosen, found)
    learnt = {"step": 3, "layer": "layer3_2_conv2", "part": "weights", "alpha": 0.25, "read_by": ""}
    results.write_rows(os.path.join(option.partition("=")[2], "alpha.csv"), [learnt])
    assert any("| 0.0975 | 0.2500 | 0.3277 | - |" in line for line in dsq._alphas(chosen, found))
    failed = config(table=2, work_dir=str(tmp_path / "none"))
    assert "| 0.0975 | - |" in "".join(dsq._alphas(failed, {row: {"status": "failed: killed"}}))


def test_runs_of_one_schedule_keep_a_curve_each(tmp_path):
    folders = [tmp_path / name for name in ("early", "late", "other")]
    for folder, rate in zip(folders, (0.02, 0.02, 0.01), strict=True):
        folder.mkdir()
        (folder / "qat.keras").touch()
        record = {"quantizer": "lsq", "scheme": "w4a4", "learning_rate": rate}
        (folder / "config.json").write_text(json.dumps(record))
    assert list(dsq_figures._labels(folders).values()) == [
        f"lsq, w4a4, rate 0.02, {folders[0]}",
        f"lsq, w4a4, rate 0.02, {folders[1]}",
        "lsq, w4a4, rate 0.01",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"table": 1}, "--table=1 is not one of 2, 3"),
        ({"epochs": 0}, "--epochs is 0"),
        ({"methods": "PACKED"}, "'PACKED' is none of table 4's: uniform; DSQ"),
        ({"schemes": "w5a5"}, "'w5a5' is none of table 4's: w2a2; w3a3; w4a4; w8a8"),
        ({"schemes": "w2a2", "methods": "PACT"}, "table 4 has no row of all that was chosen"),
        ({"networks": "lenet"}, "'lenet' is none of table 4's: resnet20"),
        ({"root": "absent"}, "--root absent: no such folder"),
    ],
)
def test_bad_flags_are_named_at_once(tmp_path, options, message):
    with pytest.raises((ValueError, OSError), match=message):
        dsq.tabulate(config(output_dir=str(tmp_path), work_dir=str(tmp_path), **options))
    assert not list(tmp_path.iterdir())


def test_a_report_has_the_papers_rows_and_below_them_ours():
    row = ("resnet20", "LSQ", (2, 2))
    measured = {
        "status": "ok",
        "float_top1": "0.9",
        "ptq_top1": "0.25",
        "top1": "0.885",
        "training_seconds": "1800",
    }
    *paper, ours = dsq.report(4, {row: measured})
    assert [line["paper"] for line in paper] == ["86.63", "86.95", "87.25", "88.44"]
    assert [line["measured"] for line in paper] == ["-"] * 4
    assert (ours["paper"], ours["measured"], ours["minus float"]) == ("-", "88.50", "-1.50")
    assert (ours["before training"], ours["hours"]) == ("25.00", "0.50")


@pytest.mark.slow
def test_table_4_on_a_small_cifar(tmp_path, monkeypatch, small_cifar):
    monkeypatch.chdir(tmp_path)
    small_cifar("cifar.npz", train=40, test=20)
    options = {
        "dataset": "cifar.npz",
        "root": str(tmp_path),
        "batch_size": 8,
        "float_epochs": 1,
        "steps": 3,
    }
    row = dsq.tabulate(config(methods=f"{dsq.WHOLE_DSQ};PACT", **options))
    # DSQ in 2 bits, PACT in 3
    assert (row["rows"], row["measured"]) == (2, 2)
    # The page keeps what another run measured under this schedule.
    page = pathlib.Path("results/dsq_table_4.md")
    whole = page.read_text()
    row = dsq.tabulate(config(methods="PACT", **options))
    assert (row["rows"], row["measured"]) == (1, 0)
    assert page.read_text() == whole
    more = {"recipe": "fast", "select_images": 10, "distill": True, "output_dir": "from_ptq"}
    row = dsq.tabulate(config(methods="LSQ", schemes="w4a4", **options, **more))
    assert (row["rows"], row["measured"]) == (1, 1)
    stored = results.read_rows("results/dsq.csv")
    assert {line["status"] for line in stored} == {"ok"}
    assert {line["images"] for line in stored} == {"20"}
    assert len({line["float_top1"] for line in stored}) == 1
    assert str(tmp_path) not in pathlib.Path("results/dsq.csv").read_text()
    assert len([name for name in os.listdir("runs/dsq") if "float" in name]) == 1
    # The figures, of what the runs left.
    runs = sorted(str(path.parent) for path in pathlib.Path("runs/dsq").glob("*w*a*/qat.keras"))
    runs.sort(key=lambda run: "_dsq_" not in run)
    drawn = dsq_figures.draw(dsq_figures.Config(runs=",".join(runs), output_dir="figures"))
    assert drawn["layers"] == "layer1_0_conv1,layer2_1_conv2,layer3_2_conv2"
    for number in (5, 6, 7):
        assert (tmp_path / "figures" / f"dsq_figure_{number}.png").stat().st_size > 10_000
    before, after = dsq_figures.weights_in_steps(pathlib.Path(runs[0]), None)["layer1_0_conv1"]
    assert before.shape == after.shape == (3 * 3 * 16 * 16,) and (before != after).any()
    assert [step for step, _ in dsq_figures.losses_of(pathlib.Path(runs[0]))] == [0, 1, 2]
    alphas = dsq_figures.alphas_of(pathlib.Path(runs[0]), ["layer1_0_conv1"])
    assert set(alphas) == {"weights", "activations"}
    assert [step for step, _ in alphas["weights"]["layer1_0_conv1"]] == [1, 2, 3]
    with pytest.raises(ValueError, match="--layers: 'conv9' is none of conv1, layer1_0_conv1"):
        dsq_figures.draw(dsq_figures.Config(runs=runs[0], layers="conv9", output_dir="figures"))
    # Table 2 is read off the run of table 4, which is not run again.
    row = dsq.tabulate(config(**options | {"table": 2}))
    assert (row["rows"], row["measured"]) == (1, 0)
    page = pathlib.Path("results/dsq_table_2.md").read_text()
    line = next(line for line in page.splitlines() if line.startswith("| layer3_2_conv2 |"))
    assert re.fullmatch(r"\| layer3_2_conv2 \| 0.0975 \| 0\.\d+ \| 0.3277 \| 0\.\d+ \|", line)


@pytest.mark.slow
def test_table_7_on_imagenets_layout(tmp_path, monkeypatch, jpegs):
    import tensorflow as tf

    monkeypatch.chdir(tmp_path)
    for split in ("train", "validation"):
        with tf.io.TFRecordWriter(f"{split}-00000-of-00001") as writer:
            for number, content in enumerate(jpegs(8, 40)):
                features = {
                    "image/encoded": tf.train.Feature(
                        bytes_list=tf.train.BytesList(value=[content])
                    ),
                    "image/class/label": tf.train.Feature(
                        int64_list=tf.train.Int64List(value=[number + 1])
                    ),
                }
                example = tf.train.Example(features=tf.train.Features(feature=features))
                writer.write(example.SerializeToString())
    options = {"dataset": "train-*", "val_dataset": "validation-*", "batch_size": 4}
    options |= {"table": 7, "networks": "mobilenet_v2", "methods": "DSQ", "input_size": 64}
    row = dsq.tabulate(config(**options, float_epochs=1, steps=1, root=str(tmp_path)))
    assert (row["rows"], row["measured"]) == (1, 1)
    page = pathlib.Path("results/dsq_table_7.md").read_text()
    assert "| mobilenet_v2 | DSQ | 4/4 | 64.80 |" in page
