"""The commands one behind another on real digits: each takes the file that the one before wrote."""

import dataclasses
import json
import pathlib
import shutil
import zipfile

import keras
import numpy as np
import pytest

from eval import accuracy, latency, parity
from export import tflite
from lowbit import layers, manifest, models, placement, quantizers, results, spec, tflite_file
from ptq import quantize


@pytest.fixture(scope="module")
def folder(digits_files, tmp_path_factory):
    """A float model that knows the digits a little, its PTQ model and its file, to write beside."""
    return pathlib.Path(shutil.copytree(digits_files, tmp_path_factory.mktemp("tools") / "files"))


def measure(folder, model, **options):
    return accuracy.evaluate(
        accuracy.Config(
            model=str(folder / model), dataset="digits", output_dir=str(folder), **options
        )
    )


def test_every_runtime_reaches_the_same_accuracy(folder):
    rows = [
        measure(folder, "m.tflite", runtime=runtime, kernels=kernels)
        for runtime in ("litert", "simulator")
        for kernels in ("xnnpack", "reference")
    ]
    rows.append(measure(folder, "ptq.keras"))
    whole = measure(folder, "float.keras", preprocess="tf")
    assert whole["top1"] > 0.9
    # Keras, the interpreter and the simulator compute the same codes: the figures are equal.
    columns = ("top1", "top5", "tied_at_top")
    assert [rows[0][name] for name in columns] == [rows[2][name] for name in columns]
    assert [rows[0][name] for name in columns] == [rows[4][name] for name in columns]
    assert [rows[1][name] for name in columns] == [rows[3][name] for name in columns]
    assert abs(rows[0]["top1"] - whole["top1"]) < 0.01
    for row in rows:
        json.dumps(row, allow_nan=False)
        assert row["images"] == 355
        assert row["top5"] >= row["top1"]


def test_a_reference_gives_agreement_and_the_paired_error(folder):
    row = measure(
        folder,
        "m.tflite",
        reference=str(folder / "float.keras"),
        reference_preprocess="tf",
        limit=100,
    )
    assert row["images"] == 100
    assert row["agreement"] > 0.95
    assert 0 < row["mean_kl"] < 0.1
    same = measure(folder, "m.tflite", reference=str(folder / "ptq.keras"))
    assert (same["agreement"], same["mean_kl"], same["top1_difference"]) == (1.0, 0.0, 0.0)


def test_outputs_that_were_kept_serve_as_the_reference(folder, tmp_path):
    kept = str(tmp_path / "float.npz")
    row = measure(folder, "float.keras", preprocess="tf", limit=60, save_outputs=kept)
    model, _ = manifest.load_model(folder / "float.keras")
    assert row["parameters"] == model.count_params()
    shared = ("agreement", "mean_kl", "reference_top1", "top1_difference", "top1_paired_error")
    for limit in (60, 40):
        stored, run = (
            measure(folder, "m.tflite", reference=name, reference_preprocess="tf", limit=limit)
            for name in (kept, str(folder / "float.keras"))
        )
        assert [stored[name] for name in shared] == [run[name] for name in shared]
    assert stored["reference"] == kept

    with np.load(kept) as content:
        arrays = dict(content)
    np.savez(tmp_path / "labels.npz", **arrays | {"labels": arrays["labels"][::-1]})
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "float.npz").read_bytes()[:-99])
    for name, change, message in (
        ("float.npz", {"limit": 61}, "holds 60 images, not 61"),
        ("float.npz", {"split": "train"}, "holds outputs for split validation, not train"),
        ("float.npz", {"crop": 0.5}, "holds outputs for crop 1.0, not 0.5"),
        ("float.npz", {"reference_preprocess": "raw"}, "outputs for preprocess tf, not raw"),
        ("labels.npz", {}, "holds other labels"),
        ("other.npz", {}, "is no file of --save_outputs"),
        ("cut.npz", {}, "is no file of --save_outputs"),
        ("absent.npz", {}, "absent.npz"),
    ):
        options = {"limit": 60, "reference": str(tmp_path / name)} | change
        with pytest.raises((ValueError, OSError), match=message):
            measure(folder, "m.tflite", **options)
    with pytest.raises(ValueError, match="--save_outputs .* must end in .npz"):
        measure(folder, "m.tflite", save_outputs=str(tmp_path / "x.csv"))


def test_parity_counts_no_differing_code(folder):
    row = parity.compare(
        parity.Config(
            model=str(folder / "ptq.keras"),
            dataset="digits",
            limit=16,
            output_dir=str(folder),
        )
    )
    assert row["distinct_codes"] >= 16
    assert row["simulator_xnnpack_differing"] == row["simulator_reference_differing"] == 0
    assert row["keras_op_worst_lsb"] == 0
    assert "AVERAGE_POOL_2D" in row["outside_xnnpack"]


@pytest.mark.parametrize("scheme, activation", [("w8a8", "elu"), ("w8a16", "relu")])
def test_parity_without_the_reference_kernels_and_with_16_bits(tmp_path, scheme, activation):
    image = keras.Input((16, 16, 3))
    x = keras.layers.Conv2D(8, 3, strides=2, name="conv")(image)
    x = keras.layers.Activation(activation, name="act")(x)
    x = keras.layers.GlobalAveragePooling2D(name="pool")(keras.layers.Conv2D(20, 3, name="last")(x))
    manifest.save_model(keras.Model(image, x), tmp_path / "float.keras", {})
    model = str(tmp_path / "ptq.keras")
    quantize.quantize(
        quantize.Config(
            model=str(tmp_path / "float.keras"),
            dataset="digits",
            preprocess="tf",
            scheme=scheme,
            output=model,
        )
    )
    file = str(tmp_path / "m.tflite")
    tflite.export(tflite.Config(model=model, output=file))
    for path in (model, file):
        row = parity.compare(
            parity.Config(model=path, dataset="digits", limit=4, output_dir=str(tmp_path))
        )
        assert row["simulator_xnnpack_differing"] == 0 and row["distinct_codes"] >= 16
        if activation == "elu":
            assert "ELU" in row["reference_refused"]
            assert row["simulator_reference_differing"] is None
            assert row["xnnpack_reference_top1_agreement"] is None
        else:
            assert row["reference_refused"] is None
            assert row["simulator_reference_differing"] == 0


@pytest.mark.parametrize("io", ["uint8", "float32"])
def test_other_inputs_and_outputs_are_as_accurate(folder, io):
    path = str(folder / f"{io}.tflite")
    tflite.export(tflite.Config(model=str(folder / "ptq.keras"), output=path, io=io))
    row = measure(folder, path)
    assert row["top1"] == pytest.approx(measure(folder, "m.tflite")["top1"], abs=0.01)
    assert tflite_file.read_manifest((folder / path).read_bytes())["io"] == io


@pytest.mark.filterwarnings("ignore:Statistics for quantized inputs")
def test_the_mlir_route_gives_the_same_accuracy_and_keeps_the_facts(folder):
    path = str(folder / "mlir.tflite")
    tflite.export(tflite.Config(model=str(folder / "ptq.keras"), output=path, route="mlir"))
    assert measure(folder, path)["top1"] == measure(folder, "m.tflite")["top1"]


def test_latency_is_measured(folder):
    row = latency.measure(
        latency.Config(
            model=str(folder / "m.tflite"), runs=5, warmup_runs=1, output_dir=str(folder)
        )
    )
    assert 0 < row["latency_ms_min"] <= row["latency_ms"] <= row["latency_ms_p90"] * 1.001
    assert row["cpu"]


def test_rows_gather_in_one_file_and_new_columns_go_right(tmp_path):
    path = tmp_path / "rows.csv"
    results.append_row(path, {"a": 1, "b": {"c": 2}})
    results.append_row(path, {"a": 2, "d": 3.5})
    assert path.read_text() == 'a,b,d\n1,"{""c"": 2}",\n2,,3.5\n'


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runtime": "keras"}, "runs .keras files"),
        ({"limit": 0}, "at least 1 image"),
        ({"model": "absent.tflite"}, "no such file"),
        ({"dataset": "absent/folder"}, "no such file or folder"),
        ({"preprocess": "x"}, "is not one of"),
        ({"model": "mobilenet_v1"}, "needs --weights"),
        ({"alpha": 0.5}, "are for zoo names, not"),
        ({"model": "lenet"}, "neither a zoo name"),
    ],
)
def test_bad_flags_of_accuracy(folder, change, message):
    options = {"model": str(folder / "m.tflite"), "output_dir": str(folder)} | change
    with pytest.raises((ValueError, OSError), match=message):
        accuracy.evaluate(accuracy.Config(**options))


def test_weights_alone_need_no_calibration(folder):
    output = str(folder / "w8.keras")
    row = quantize.quantize(
        quantize.Config(
            model=str(folder / "float.keras"),
            dataset="digits",
            preprocess="tf",
            scheme="w8",
            output=output,
        )
    )
    assert row["images"] == 0
    assert measure(folder, "w8.keras")["top1"] > 0.9
    row = tflite.export(tflite.Config(model=output, output=str(folder / "w8.tflite")))
    assert (row["io"], row["scheme"]) == ("float32", "w8")
    assert measure(folder, "w8.tflite")["top1"] > 0.9


def test_bad_models_cost_nothing(folder, tmp_path):
    output = tmp_path / "m.tflite"
    output.write_bytes(b"an earlier file")
    cut = tmp_path / "cut.keras"
    cut.write_bytes((folder / "ptq.keras").read_bytes()[:-200])
    foreign = tmp_path / "foreign.keras"
    with zipfile.ZipFile(foreign, "w") as archive:
        archive.writestr("config.json", json.dumps({"class_name": "Alien", "config": {}}))
        archive.writestr("metadata.json", "{}")
    inputs = keras.Input((8, 8, 3))
    lambdas = keras.Model(inputs, keras.layers.Lambda(lambda x: x * 2)(inputs))
    lambdas.save(tmp_path / "lambda.keras")
    float_model = folder / "float.keras"
    for path, message in (
        (cut, "damaged or cut short"),
        (foreign, "foreign.keras"),
        (tmp_path / "lambda.keras", "Lambda"),
        (float_model, "is this a model that ptq.quantize or qat.train saved"),
        (tmp_path / "absent.keras", "no such file"),
    ):
        with pytest.raises((ValueError, OSError), match=message) as caught:
            tflite.export(tflite.Config(model=str(path), output=str(output)))
        assert len(str(caught.value)) < 500
    assert output.read_bytes() == b"an earlier file"
    assert sorted(item.name for item in tmp_path.iterdir()) == sorted(
        ["m.tflite", "cut.keras", "foreign.keras", "lambda.keras"]
    )


def test_nan_weights_name_their_layer(folder):
    model, _ = manifest.load_model(folder / "float.keras")
    kernel = model.get_layer("conv1").kernel
    kernel.assign(np.full(kernel.shape, np.nan))
    with pytest.raises(ValueError, match="layer conv1: its kernel holds NaN"):
        placement.place(model, spec.scheme("w8a8"))


def test_zoo_networks_are_placed():
    for name, size in (("mobilenet_v1", 32), ("resnet_v2_50", 32)):
        network = models.build(name, 10, size)
        placed = placement.place(network, spec.scheme("w8a8"))
        assert len(layers.weighted_layers(placed)) >= 28
        with layers.in_float(placed):
            batch = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
            expected = np.asarray(network(batch, training=False))
            np.testing.assert_allclose(
                np.asarray(placed(batch, training=False)), expected, rtol=1e-3, atol=1e-4
            )
        assert quantizers.activation_quantizers(placed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "nothing"}, "neither a zoo name"),
        ({"name": "resnet_v1_50", "alpha": 0.5}, "no width multiplier"),
        ({"name": "mobilenet_v2", "input_size": 16}, "below 32 pixels"),
    ],
)
def test_bad_networks_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        models.build(**({"classes": 10} | options))


def test_weights_are_read_from_a_file_and_misfits_named(tmp_path):
    network = models.build("mobilenet_v1", 5, 32, 0.25)
    manifest.save_model(network, tmp_path / "w.keras", {"preprocess": "127,128"})
    network.save_weights(tmp_path / "w.weights.h5")
    for name in ("w.keras", "w.weights.h5"):
        loaded, facts = models.load("mobilenet_v1", str(tmp_path / name), 5, 32, 0.25)
        for a, b in zip(loaded.get_weights(), network.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)
    assert facts["preprocess"] == "tf"
    with pytest.raises(ValueError, match="do not have the shapes"):
        models.load("mobilenet_v1", str(tmp_path / "w.keras"), 6, 32, 0.25)
    with pytest.raises(FileNotFoundError, match="no such file"):
        models.load("mobilenet_v1", str(tmp_path / "absent.weights.h5"), 5, 32, 0.25)
    with pytest.raises(ValueError, match="--weights=imagenet has 1000 classes"):
        models.load("mobilenet_v1", "imagenet", 5, 32, 0.25)


def test_every_config_field_has_a_help_text():
    from export import check
    from qat import train

    for config in (
        accuracy.Config,
        latency.Config,
        parity.Config,
        tflite.Config,
        check.Config,
        quantize.Config,
        train.Config,
    ):
        for field in dataclasses.fields(config):
            assert len(field.metadata["help"]) > 3, (config, field.name)
