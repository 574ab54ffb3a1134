"""The training loop on real images: three models, resume after kills, errors that cost nothing."""

import csv
import dataclasses
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

from lowbit import (
    checkpoint,
    layers,
    lowering,
    manifest,
    metrics,
    quantizers,
    results,
    tflite_file,
)
from lowbit.data import datasets, images, pipeline, preprocess
from qat import loop, selection, train

ROOT = pathlib.Path(__file__).resolve().parent.parent


def small_network(path, softmax=False, dead=False):
    keras.utils.set_random_seed(0)
    x = image = keras.Input((16, 16, 3))
    for index, filters in enumerate((8, 12)):
        x = keras.layers.Conv2D(
            filters, 3, strides=2, padding="same", use_bias=False, name=f"conv{index}"
        )(x)
        x = keras.layers.BatchNormalization(momentum=0.9, name=f"bn{index}")(x)
        x = keras.layers.ReLU(6.0, name=f"relu{index}")(x)
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    x = keras.layers.Dense(10, name="logits")(x)
    if softmax:
        x = keras.layers.Softmax(name="softmax")(x)
    model = keras.Model(image, x)
    if dead:
        model.get_layer("bn0").gamma.assign([0, 1e-12, -0.5, 1, 1, 1, 1, 1])
    manifest.save_model(model, path, {"preprocess": "tf"})
    return str(path)


def config(tmp_path, **options):
    defaults = {
        "model": str(tmp_path / "float_model.keras"),
        "dataset": "digits",
        "output_dir": str(tmp_path / "run"),
        "steps": 12,
        "batch_size": 16,
        "limit": 64,
        "calibration_images": 20,
        "learning_rate": 0.01,
        "checkpoint_every": 4,
    }
    return train.Config(**(defaults | options))


@pytest.mark.parametrize(
    "range_mode",
    ["frozen", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("moving", "trainable"))],
)
def test_a_run_saves_three_models_and_says_what_they_reach(tmp_path, range_mode):
    small_network(tmp_path / "float_model.keras", softmax=range_mode == "moving", dead=True)
    options = {"freeze_batch_norm_step": 6, "quant_delay": 3, "range_mode": range_mode}
    row = train.train(config(tmp_path, **options))
    json.dumps(row, allow_nan=False)
    assert {"top1_float", "top1_ptq", "top1_qat", "images", "seconds", "versions"} <= set(row)
    run = tmp_path / "run"
    for name in ("float.keras", "ptq.keras", "qat.keras", "training.png", "results.csv"):
        assert (run / name).stat().st_size > 0
    assert list((run / "tensorboard").iterdir())
    assert not (run / "checkpoint.npz").exists()
    with open(run / "training.csv", newline="") as file:
        logged = list(csv.DictReader(file))
    assert [int(line["step"]) for line in logged] == list(range(12))
    seconds = [float(line["seconds"]) for line in logged]
    assert seconds == sorted(seconds) and row["training_seconds"] == seconds[-1] > 0

    model, facts = manifest.load_model(run / "qat.keras")
    assert facts["preprocess"] == "tf"
    assert facts["scheme"] == "w8a8"
    before, _ = manifest.load_model(run / "ptq.keras")
    moved = [
        name
        for name in ("conv0", "conv1", "logits")
        if not np.array_equal(model.get_layer(name).kernel, before.get_layer(name).kernel)
    ]
    assert moved == ["conv0", "conv1", "logits"]
    ranges = [
        [[float(bound) for bound in quantizer.range()] for quantizer in found]
        for found in map(quantizers.activation_quantizers, (model, before))
    ]
    assert (ranges[0] != ranges[1]) == (range_mode != "frozen")
    assert all(layer.batch_norm_frozen for layer in layers.weighted_layers(model))
    # Training-only modes became plain ranges, and the model exports.
    assert {q.mode for q in quantizers.activation_quantizers(model)} <= {"frozen", "fixed"}
    tflite_file.write(lowering.lower(model))


@pytest.mark.slow
def test_measuring_in_between_changes_nothing_and_ends_with_what_is_saved(tmp_path):
    """The quantized network's curve and, with a moving average of the weights, both of theirs."""
    small_network(tmp_path / "float_model.keras")
    # Frozen ranges: each phase would be traced anew.
    options = {"ema_decay": 0.8, "range_mode": "frozen", "float_epochs": 1, "batch_size": 64}
    trained = {}
    for every in (None, 8):
        folder = tmp_path / f"run_{every}"
        more = {"evaluate_every": every, "output_dir": str(folder)}
        row = train.train(config(tmp_path, **options, **more))
        trained[every] = manifest.load_model(folder / "qat.keras")[0].get_weights()
        assert (folder / "validation.csv").exists() == (every is not None)
    for a, b in zip(*trained.values(), strict=True):
        np.testing.assert_array_equal(a.view(np.int32), b.view(np.int32))
    rows = results.read_rows(folder / "validation.csv")
    found = [(line["step"], line["weights"]) for line in rows if line["stage"] == "QAT"]
    assert found == [(step, each) for step in ("8", "12") for each in ("last", "average")]
    whole = [int(line["step"]) for line in rows if line["stage"] == "float training"]
    assert whole == [*range(8, whole[-1], 8), whole[-1]] and whole[-1] > 16
    for line, name in zip(rows[-2:], ("qat_last_weights", "qat"), strict=True):
        for column in ("top1", "kl", "agreement"):
            assert float(line[column]) == pytest.approx(row[f"{column}_{name}"], abs=1e-9)
    assert rows[-2]["kl"] != rows[-1]["kl"]


@pytest.mark.parametrize("distill", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_what_is_saved_is_the_step_that_did_best_on_images_left_out(tmp_path, distill):
    """One rate of use, and one that destroys the network."""
    model = small_network(tmp_path / "float_model.keras")
    shared = {"model": model, "distill": distill, "select_on": "digits", "select_images": 40}
    ends = {}
    for rate in (1e-3, 30.0):
        folder = tmp_path / f"run_{rate}"
        options = {"learning_rate": rate, "output_dir": str(folder), "range_mode": "frozen"}
        row = train.train(config(tmp_path, **shared, **options))
        assert row["top1_qat"] >= 0  # digits have labels, though --distill trains without
        table = results.read_rows(folder / "selection.csv")
        assert [line["step"] for line in table] == ["0", "2", "4", "6", "8", "10", "12"]
        values = [float(line["value"]) for line in table]
        assert row["selected_step"] == 2 * int(np.argmin(values))
        assert not (folder / "selected.npz").exists()
        parts = [datasets.open_dataset("digits", part) for part in ("train", "validation")]
        _, choosing = selection.split(*parts, parts[0], 40, 0)
        outputs = [
            train._outputs(
                manifest.load_model(folder / f"{name}.keras")[0],
                *(config(tmp_path, **shared), choosing, preprocess.parse("tf"), 40),
            )
            for name in ("float", "ptq", "qat")
        ]
        if distill:
            found = [metrics.kl_divergence(outputs[0], each).mean() for each in outputs[1:]]
        else:
            found = [
                -metrics.log_probabilities(each)[np.arange(40), choosing.labels].mean()
                for each in outputs[1:]
            ]
        np.testing.assert_allclose(found, [values[0], min(values)], rtol=1e-6)
        ends[rate] = row["selected_step"]
    # The network is untrained: labels have much to teach it, and nothing is nearer to it than PTQ.
    assert ends[30.0] == 0 if distill else ends[1e-3] > 0


def test_what_is_measured_has_the_batch_norms_that_are_saved(tmp_path):
    """--reestimate_batch_norm at each measurement; a start that is chosen stays as it was."""
    small_network(tmp_path / "float_model.keras")
    options = {"reestimate_batch_norm": 32, "range_mode": "frozen", "evaluate_every": 12}
    choosing = {"select_on": "digits", "select_images": 40, "distill": True, "learning_rate": 30.0}
    for name, more in {"last": {}, "start": choosing}.items():
        row = train.train(config(tmp_path, output_dir=str(tmp_path / name), **options, **more))
        *_, measured = results.read_rows(tmp_path / name / "validation.csv")
        if name == "last":
            assert row["kl_qat"] == pytest.approx(float(measured["kl"]), abs=1e-9)
            assert row["kl_qat"] > 2 * row["kl_ptq"]
        else:
            assert row["selected_step"] == 0
            assert row["kl_qat"] == row["kl_ptq"] < float(measured["kl"])


def test_images_that_choose_are_not_trained_on_nor_measured_on(tmp_path):
    """Digits have splits of their own; of one array of images by content, they share names."""
    whole = datasets.open_dataset("digits", "train_whole")
    other = datasets.open_dataset("digits", "validation")
    n = len(whole)
    twice = images.join(whole, whole, "twice")
    training, choosing = selection.split(twice, other, whole, 100, seed=3)
    assert len(choosing) == 100 and len(training) == 2 * (n - 100)
    calibrates = pipeline.calibration_order(whole, 3)[: n - 100]
    seen = {whole.where(int(index)) for index in calibrates}
    assert {training.where(i) for i in range(len(training))} == seen
    assert not seen & {choosing.where(i) for i in range(100)}
    # Half at most of what is trained on as well; all of what is not.
    training, choosing = selection.split(whole, other, whole, n, seed=3)
    assert (len(training), len(choosing)) == (n - n // 2, n // 2)
    measured, apart = (images.select(other, np.arange(100) + 100 * k, "part") for k in (0, 1))
    training, choosing = selection.split(whole, measured, apart, 10_000, seed=3)
    assert (len(training), len(choosing)) == (n, 100)
    # Of those that are measured on, none.
    _, choosing = selection.split(whole, measured, other, 10_000, seed=3)
    assert len(choosing) == len(other) - 100
    assert not {choosing.where(i) for i in range(len(choosing))} & {
        *map(measured.where, range(100))
    }
    with pytest.raises(ValueError, match="--select_on=digits.*: all of its images are measured on"):
        selection.split(whole, other, other, 1, seed=3)
    one = images.select(whole, np.array([5]), "one")
    with pytest.raises(ValueError, match="--select_on=one: 1 images are too few to choose by and"):
        selection.split(one, other, one, 1, seed=3)


def test_labels_that_are_not_the_networks_are_not_measured(tmp_path):
    """Where --distill asks for none; of ten digits, numbered alike or not."""
    digits = datasets.open_dataset("digits", "validation")
    model = keras.models.load_model(small_network(tmp_path / "float_model.keras"))
    other = keras.Model(model.input, keras.layers.Dense(12)(model.output))
    names = digits.class_names
    assert train._labelled_as(model, names, digits).num_classes == 10
    assert train._labelled_as(model, None, digits).num_classes == 10
    for network, known in ((other, names), (model, [f"class {i}" for i in range(10)])):
        assert train._labelled_as(network, known, digits).num_classes == 1


@pytest.mark.slow
def test_a_run_that_chooses_goes_on_where_it_was_killed(tmp_path):
    """After a kill between two measurements, behind the last one, and before the model is saved."""
    small_network(tmp_path / "float_model.keras")
    options = {"select_on": "digits", "select_images": 40, "range_mode": "frozen", "steps": 20}
    options |= {"distill": True, "checkpoint_every": 4}
    whole = train.train(config(tmp_path, **options))
    wanted = manifest.load_model(tmp_path / "run" / "qat.keras")[0].get_weights()
    for killed_behind in (7, 20):
        folder = tmp_path / f"killed_{killed_behind}"
        look = selection.Selection.look

        def stop(self, step, averages=None, at=killed_behind, look=look):
            look(self, step, averages)
            if step == at:
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(selection.Selection, "look", stop)
            with pytest.raises(KeyboardInterrupt):
                train.train(config(tmp_path, **options, output_dir=str(folder)))
        row = train.train(config(tmp_path, **options, output_dir=str(folder), resume=True))
        assert row["selected_step"] == whole["selected_step"]
        assert (folder / "selection.csv").read_text() == (
            tmp_path / "run" / "selection.csv"
        ).read_text()
        found = manifest.load_model(folder / "qat.keras")[0].get_weights()
        for one, two in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(one, two)
    # As a kill between `restore` and the saving leaves it.
    (folder / "qat.keras").unlink()
    row = train.train(config(tmp_path, **options, output_dir=str(folder), resume=True))
    assert row["selected_step"] == whole["selected_step"]
    found = manifest.load_model(folder / "qat.keras")[0].get_weights()
    for one, two in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.slow
def test_pictures_without_labels_and_a_start_from_ptq(tmp_path):
    model = small_network(tmp_path / "float_model.keras")
    pictures = tmp_path / "pictures" / "some" / "folder"
    pictures.mkdir(parents=True)
    random = np.random.default_rng(0)
    for index in range(24):
        pixels = random.integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(pictures / f"{index}.png")
    dataset = f"{tmp_path / 'pictures'},{tmp_path / 'pictures'}"  # two sources, one after the other
    options = {
        "dataset": dataset,
        "distill": True,
        "quantizer": "lsq",
        "oscillations": "freeze",
        "ema_decay": 0.5,
        "learning_rate": 1e-4,
        "distill_features": 0.1,
        "ends": "w8a8",
        "scheme": "w4a8",
    }
    row = train.train(config(tmp_path, **options))
    assert row["top1"] is None  # nobody knows
    assert 0 <= row["agreement_qat"] <= 1 and row["kl_qat"] >= 0 and row["kl_float"] == 0
    run = tmp_path / "run"
    assert (run / "qat_last_weights.keras").exists()
    shares = results.read_rows(run / "oscillations.csv")
    assert [line["layer"] for line in shares] == ["conv0", "conv1", "logits"]
    quantized, _ = manifest.load_model(run / "qat.keras")
    bits = [layer.weight_spec.bits for layer in layers.weighted_layers(quantized)]
    assert bits == [8, 4, 8]
    tflite_file.write(lowering.lower(quantized))

    # The PTQ model of that run as the start of another.
    start = str(run / "ptq.keras")
    other = {"model": model, "output_dir": str(tmp_path / "second"), "start": start, "steps": 2}
    other["val_dataset"] = str(tmp_path / "pictures")
    assert train.train(config(tmp_path, **(options | other)))["images"] == 24
    ptq, again = (
        manifest.load_model(folder / "ptq.keras")[0] for folder in (run, tmp_path / "second")
    )
    for one, two in zip(ptq.weights, again.weights, strict=True):
        np.testing.assert_array_equal(one, two)
    third = other | {"output_dir": str(tmp_path / "third"), "scheme": "w8a8"}
    with pytest.raises(ValueError, match="made with --scheme=w4a8, this run has w8a8"):
        train.train(config(tmp_path, **(options | third)))
    assert not (tmp_path / "third").exists()
    with pytest.raises(ValueError, match="float_model.keras is not a model that ptq.quantize"):
        train.train(config(tmp_path, **(options | third | {"start": model})))


@pytest.mark.slow
def test_float_training_comes_first_where_there_are_no_weights(tmp_path):
    options = {"model": "mobilenet_v2", "alpha": 0.35, "input_size": 32, "float_epochs": 1}
    row = train.train(config(tmp_path, steps=1, batch_size=400, limit=16, **options))
    assert row["alpha"] == 0.35
    assert row["input_size"] == 32
    assert row["images"] == 16


def test_phases_follow_from_the_step():
    moved = dataclasses.replace(train.Config(), quant_delay=2, freeze_batch_norm_step=5)
    phases = train._phases(moved, 20, trained_here=True)
    assert (phases.quant_delay, phases.freeze_batch_norm_step) == (2, 5)
    assert phases.freeze_range_step == 15
    assert train._phases(train.Config(), 20, trained_here=True).freeze_batch_norm_step == 10
    assert train._phases(train.Config(), 20, trained_here=False).freeze_batch_norm_step == 0
    # Ten time constants fit before the ranges freeze, whatever the length of the run.
    for steps in (200, 2_000, 200_000):
        found = train._phases(train.Config(), steps, trained_here=False)
        assert found.range_decay**found.freeze_range_step < 0.001


def test_a_decay_too_slow_for_the_run_is_said(caplog):
    slow = dataclasses.replace(train.Config(), range_decay=0.999)
    with caplog.at_level("WARNING"):
        train._phases(slow, 100, trained_here=False)
    assert "forgets only" in caplog.text


def test_nan_stops_the_run_with_its_step_and_keeps_what_was_saved(tmp_path):
    small_network(tmp_path / "float_model.keras")
    with pytest.raises(FloatingPointError, match="at step .* of 12; lower --learning_rate"):
        train.train(config(tmp_path, learning_rate=1e30))
    assert (tmp_path / "run" / "ptq.keras").exists()
    assert not (tmp_path / "run" / "qat.keras").exists()


def test_an_earlier_run_is_not_overwritten_and_resume_wants_its_flags(tmp_path):
    (tmp_path / "run").mkdir()
    small_network(tmp_path / "float_model.keras")
    with pytest.raises(ValueError, match="no run to --resume"):
        train.train(config(tmp_path, resume=True))
    train._record_config(config(tmp_path), tmp_path / "run")
    with pytest.raises(ValueError, match="holds a run; --resume it"):
        train.train(config(tmp_path))
    with pytest.raises(ValueError, match="--seed is 3, but .* was started with 0"):
        train.train(config(tmp_path, seed=3, resume=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "no_such_net"}, "neither a zoo name"),
        ({"model": "missing.keras"}, "no such file"),
        ({"dataset": "no_such_folder/x"}, "no such file or folder"),
        ({"preprocess": "nonsense"}, "is not one of"),
        ({"weights": "w.h5"}, "for zoo names"),
        ({"override": "nothing=w4a8"}, "no layer's name matches 'nothing'"),
    ],
)
def test_bad_input_is_one_clear_error(tmp_path, options, message):
    small_network(tmp_path / "float_model.keras")
    with pytest.raises((ValueError, OSError), match=message):
        train.train(config(tmp_path, **options))
    assert not (tmp_path / "run").exists()


def test_a_run_killed_before_its_first_step_keeps_its_log(tmp_path):
    rows = [
        {"stage": stage, "step": str(step), "loss": "1", "learning_rate": "0.1", "seconds": "2.0"}
        for stage, step in (("float training", 0), ("QAT", 0), ("QAT", 1))
    ]
    results.write_rows(tmp_path / "training.csv", rows)
    killed = loop._Log(tmp_path, "QAT", 1)
    assert results.read_rows(tmp_path / "training.csv") == rows[:2]
    killed.add(1, 0.5, 0.1)
    # What is there counts while the next one goes on.
    again = loop._Log(tmp_path, "QAT", 2)
    assert [line["loss"] for line in results.read_rows(tmp_path / "training.csv")] == [
        *("1", "1", "0.5")
    ]
    for log in (killed, again):
        log.close()
    (tmp_path / "training.csv").unlink()
    loop._Log(tmp_path, "QAT", 0).close()
    header = (tmp_path / "training.csv").read_text()
    assert header == "stage,step,loss,learning_rate,seconds\n"


@pytest.mark.parametrize("field", ["epochs", "batch_size", "learning_rate", "range_decay"])
def test_impossible_settings_are_refused(field):
    with pytest.raises(ValueError, match=field):
        train.Config(**{field: -1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate_unit": "step"}, "--rate_unit=step needs --optimizer=adam"),
        ({"warmup_steps": 3, "schedule": "constant"}, "--warmup_steps needs --schedule=cosine"),
        ({"warmup_steps": -3}, "--warmup_steps is -3"),
        ({"select_images": 10}, "--select_images needs --select_on"),
        ({"select_images": 0, "select_on": "digits"}, "--select_images is 0"),
    ],
)
def test_flags_that_need_others_say_so(options, message):
    with pytest.raises(ValueError, match=message):
        train.Config(**options)


def test_checkpoints_come_back_bit_for_bit_and_damage_is_named(tmp_path):
    values = [np.float32([1e-40, np.pi]), np.float32(3).reshape(()), np.arange(4)]
    variables = [keras.Variable(value, dtype=value.dtype.name) for value in values]
    path = tmp_path / "checkpoint.npz"
    checkpoint.save(path, "QAT", 7, variables)
    for variable in variables:
        variable.assign(np.zeros(variable.shape))
    assert checkpoint.load(path, "float training", variables) == 0
    assert checkpoint.load(path, "QAT", variables) == 7
    for variable, value in zip(variables, values, strict=True):
        np.testing.assert_array_equal(np.asarray(variable), value)
    with pytest.raises(ValueError, match="holds 3 variables"):
        checkpoint.load(path, "QAT", variables[:2])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged checkpoint"):
        checkpoint.load(path, "QAT", variables)


@pytest.mark.slow
def test_three_kills_and_resumes_end_in_the_uninterrupted_runs_weights(tmp_path):
    small_network(tmp_path / "float_model.keras")
    command = [
        sys.executable,
        "-m",
        "qat.train",
        f"--model={tmp_path / 'float_model.keras'}",
        "--steps=400",
        "--batch_size=16",
        "--freeze_batch_norm_step=150",
        "--checkpoint_every=5",
        "--limit=32",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def start(folder, *more):
        arguments = [*command, f"--output_dir={tmp_path / folder}", *more]
        return subprocess.Popen(
            arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
        )

    assert start("whole").wait() == 0
    random = np.random.default_rng()
    reached = 0
    for attempt in range(3):
        process = start("killed", *(["--resume"] if attempt else []))
        target = int(random.integers(reached + 5, 120 * (attempt + 1)))
        path = tmp_path / "killed" / "checkpoint.npz"
        while process.poll() is None:
            if path.exists():
                with np.load(path) as content:
                    reached = int(content["step"])
                if reached >= target:
                    time.sleep(float(random.uniform(0, 0.05)))
                    break
            time.sleep(0.01)
        assert process.poll() is None, "the run ended before it was killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        print(f"killed behind the checkpoint of step {reached}")
    assert start("killed", "--resume").wait() == 0
    whole, killed = (
        manifest.load_model(tmp_path / folder / "qat.keras")[0].get_weights()
        for folder in ("whole", "killed")
    )
    for a, b in zip(whole, killed, strict=True):
        np.testing.assert_array_equal(a.view(np.int32), b.view(np.int32))
