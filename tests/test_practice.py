"""eval.practice: the runs differ in what they are about, and a small one ends in rows and curves."""

import os
import pathlib

import pytest
from PIL import Image

from eval import practice
from lowbit import models, results
from qat import train


def config(**options):
    return practice.Config(**options)


def flags(command):
    """Returns {flag: value}, as qat.train reads them."""
    return dict(word.removeprefix("--").split("=", 1) for word in command[1:])


def test_every_experiment_compares_runs_that_there_are():
    names = [run for each in practice.EXPERIMENTS.values() for run, _ in each.curves.values()]
    assert set(names) == set(practice.RUNS)
    fields = train.Config.__dataclass_fields__
    for name, run in practice.RUNS.items():
        assert run.network in models.TAKES_ALPHA
        for command in practice.commands_of(config(), run, 50_000):
            assert set(flags(command)) <= set(fields), name
    for experiment in practice.EXPERIMENTS.values():
        assert len(experiment.curves) >= 2
        assert {run for run, weights in experiment.curves.values() if weights == "average"} <= {
            name for name, run in practice.RUNS.items() if "--ema_decay=0.99" in run.flags
        }


def test_runs_share_a_schedule_and_differ_in_what_they_are_about():
    found = {
        name: flags(practice.commands_of(config(), run, 50_000)[-1])
        for name, run in practice.RUNS.items()
    }
    base = found["base"]
    # 2 epochs of 50,000 in batches of 64, frozen at half of them; 12 points of a curve
    assert (base["steps"], base["freeze_batch_norm_step"]) == ("1563", "781")
    assert base["evaluate_every"] == "131" and base["scheme"] == "w4a8"
    apart = {"output_dir", "ema_decay"}
    differs = {
        name: {key for key in base.keys() | other.keys() if base.get(key) != other.get(key)} - apart
        for name, other in found.items()
    }
    assert differs["stochastic"] == {"quantizer"} and differs["delay"] == {"quant_delay"}
    assert differs["no_correction"] == {"batch_norm", "freeze_batch_norm_step"}
    assert differs["correction"] == {"freeze_batch_norm_step"}
    assert differs["frozen"] == {"batch_norm", "freeze_batch_norm_step"}
    assert differs["relu"] == {"model"}
    assert differs["width_0.25_w8a8"] == {"model", "scheme"}
    assert not differs["width_0.5_w4a8"]
    # From scratch as many steps as float training and fine-tuning take together: 6 + 2 epochs.
    assert (found["scratch"]["steps"], found["scratch"]["float_epochs"]) == ("6251", "0")
    # One float network serves every run of its width.
    firsts = {practice.commands_of(config(), run, 50_000)[0][-1] for run in practice.RUNS.values()}
    assert len(firsts) == 1 + 1 + 1 + 2  # scratch, base, relu, two more widths


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experiments": "scratch,warmth"}, "'warmth' is none of the experiments: scratch"),
        ({"epochs": 0}, "--epochs is 0"),
        ({"scheme": "w9a8"}, "w9a8"),
        ({"root": "absent"}, "--root absent: no such folder"),
        ({"dataset": "absent.npz"}, "absent.npz"),
    ],
)
def test_bad_flags_are_named_at_once(tmp_path, options, message):
    folders = {"output_dir": str(tmp_path / "a"), "work_dir": str(tmp_path / "b")}
    with pytest.raises((ValueError, OSError), match=message):
        practice.measure(config(**folders | options))
    assert not list(tmp_path.iterdir())


def test_the_page_names_every_run_and_the_pictures_are_drawn(tmp_path):
    found, curves = {}, []
    for place, name in enumerate(practice.RUNS):
        found[name] = {"status": "ok", "steps": "20", "commands": f"train {name}"}
        found[name] |= {"float_top1": "0.9", "ptq_top1": "0.5", "average_top1": "0.81"}
        found[name]["top1"] = str(0.7 + place / 100)
        curves += [
            {"run": name, "step": step, "weights": weights, "top1": 0.5 + place / 100 + step / 100}
            for step in (10, 20)
            for weights in ("last", "average")
        ]
    found["delay"] |= {"status": "failed: no memory", "top1": ""}
    page = practice.page(config(), practice.EXPERIMENTS, found)
    assert "| average | 90.00 | 50.00 | 81.00 | 20 | base |" in page
    assert "| after a quarter | nan | nan | nan | 20 | delay |" in page
    assert all(experiment.title in page for experiment in practice.EXPERIMENTS.values())
    practice._draw(config(output_dir=str(tmp_path)), practice.EXPERIMENTS, found, curves)
    for name, panels in (("practice.png", (2, 3)), ("practice_width.png", (1, 1))):
        with Image.open(tmp_path / name) as picture:
            assert picture.height == pytest.approx(120 * 3.2 * panels[0])
            assert picture.width == pytest.approx(120 * 4.6 * panels[1])


@pytest.mark.slow
def test_two_experiments_on_a_small_cifar(tmp_path, monkeypatch, small_cifar):
    monkeypatch.chdir(tmp_path)
    small_cifar("cifar.npz", train=32, test=20)
    options = {
        "dataset": "cifar.npz",
        "root": str(tmp_path),
        "experiments": "scratch,ema",
        "alpha": 0.25,
        "batch_size": 8,
        "float_epochs": 1,
        "epochs": 1,
        "points": 2,
    }
    row = practice.measure(config(**options))
    assert (row["runs"], row["measured"]) == (2, 2)
    base, scratch = results.read_rows("results/practice.csv")
    assert (base["status"], scratch["status"]) == ("ok", "ok")
    assert (base["steps"], scratch["steps"], base["images"]) == ("4", "8", "20")
    assert base["average_top1"] and not scratch["average_top1"]
    curves = results.read_rows("results/practice_curves.csv")
    points = [(line["run"], line["step"], line["weights"]) for line in curves]
    assert points == [
        *(("base", step, each) for step in ("2", "4") for each in ("last", "average")),
        *(("scratch", step, "last") for step in ("4", "8")),
    ]
    assert float(curves[3]["top1"]) == float(base["average_top1"])
    page = pathlib.Path("results/practice.md").read_text()
    assert "| average |" in page and str(tmp_path) not in page
    assert os.path.getsize("results/practice.png") > 1000
    assert practice.measure(config(**options))["measured"] == 0
