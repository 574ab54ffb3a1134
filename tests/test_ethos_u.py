"""Vela's estimates for Ethos-U, and the rows of microcontrollers: the real compiler, real files."""

import importlib.metadata
import importlib.util

import flatbuffers
import keras
import numpy as np
import pytest

from eval import on_microcontroller
from lowbit import (
    boundary,
    calibration,
    census,
    lowering,
    micro,
    placement,
    results,
    runtimes,
    spec,
    tflite_file,
)
from lowbit.devices import ethos_u

pytest.importorskip("ethosu")  # setup.cfg asks for it on x86 alone


def network():
    image = keras.Input((32, 32, 3))
    x = keras.layers.Conv2D(8, 3, strides=2, padding="same", activation="relu")(image)
    y = keras.layers.DepthwiseConv2D(3, padding="same", activation="relu")(x)
    x = keras.layers.Add()([x, keras.layers.Conv2D(8, 1)(y)])
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, keras.layers.Softmax()(keras.layers.Dense(10)(x)))


@pytest.fixture(scope="module")
def graph():
    """Returns a small network as an integer graph."""
    keras.utils.set_random_seed(0)
    placed = placement.place(network(), spec.scheme("w8a8"))
    images = np.random.default_rng(0).normal(0, 0.4, (8, 32, 32, 3)).astype(np.float32)
    calibration.calibrate(placed, [images])
    return lowering.lower(placed, "a test")


@pytest.fixture(scope="module")
def content(graph):
    return tflite_file.write(graph, {"preprocess": "tf"})


@pytest.mark.parametrize("accelerator", ethos_u.ACCELERATORS)
def test_an_integer_file_runs_whole_on_the_npu(content, accelerator):
    found = ethos_u.estimate(content, accelerator)
    nodes = census.totals(content)
    assert found.cpu_operators == ()
    assert found.npu_operators == found.operators == nodes["operations"] == 7
    assert found.cycles > 0
    assert found.estimated_ms == pytest.approx(1e3 * found.cycles / found.clock_hz)
    # Vela counts the multiplications of a softmax and of a mean, too.
    assert nodes["macs"] < found.macs < 1.2 * nodes["macs"]
    assert 16 * 16 * 8 <= found.sram_bytes < 2**20
    # Weights lie in flash beside a Cortex-M, in DRAM beside a Cortex-A.
    weights, other = found.flash_bytes, found.dram_bytes
    if "u55" not in accelerator:
        weights, other = other, weights
    assert weights > 800 and other == 0


def test_more_multipliers_take_fewer_cycles(content):
    small, large = (ethos_u.estimate(content, f"ethos-u55-{macs}") for macs in (128, 256))
    assert large.cycles < small.cycles


def test_what_is_left_to_the_cpu_is_named(graph):
    content = tflite_file.write(boundary.with_float_io(graph))
    found = ethos_u.estimate(content, "ethos-u55-128")
    assert (found.operators, found.npu_operators) == (9, 7)
    first, last = found.cpu_operators
    assert first.startswith("QUANTIZE 0 (makes '") and "Float32" in first
    assert last.startswith("DEQUANTIZE 8 (makes '")


def test_what_is_left_is_told_of_tensors_without_names_too(graph):
    model = tflite_file.parse(tflite_file.write(boundary.with_float_io(graph)))
    for tensor in model.subgraphs[0].tensors:
        tensor.name = b""
    found = ethos_u.estimate(packed(model), "ethos-u55-128")
    assert (found.operators, found.npu_operators) == (9, 7)
    assert [label.partition(" ")[0] for label in found.cpu_operators] == ["QUANTIZE", "DEQUANTIZE"]


def packed(model):
    builder = flatbuffers.Builder()
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def test_a_float_file_is_no_fast_file():
    placed = placement.place(network(), spec.scheme("float32"))
    content = tflite_file.write(lowering.lower(placed))
    with pytest.raises(ethos_u.NothingOnNpuError, match=r"f.tflite: Vela leaves all \d+ .*Float32"):
        ethos_u.estimate(content, "ethos-u55-128", "f.tflite")


def test_a_file_that_kills_the_compiler_is_an_error():
    placed = placement.place(network(), spec.scheme("w4a8"))
    calibration.calibrate(placed, [np.ones((1, 32, 32, 3), np.float32)])
    content = tflite_file.write(lowering.lower(placed, storage=lowering.Storage(packed=True)))
    with pytest.raises(runtimes.RefusedError, match="p.tflite: Vela .* dies of it: SIGFPE"):
        ethos_u.estimate(content, "ethos-u55-128", "p.tflite")


def test_bad_input_never_reaches_the_compiler(content, monkeypatch):
    monkeypatch.setattr(runtimes, "in_child", None)
    with pytest.raises(ValueError, match="'ethos-u55' is not one of ethos-u55-128, ethos-u55-256"):
        ethos_u.estimate(content, "ethos-u55")
    with pytest.raises(tflite_file.TFLiteFileError, match="cut.tflite"):
        ethos_u.estimate(content[:1000], "ethos-u55-128", "cut.tflite")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.0.0")
    with pytest.raises(ValueError, match="ethos-u-vela is 4.0.0, but estimates are those of 5.2.0"):
        ethos_u.estimate(content, "ethos-u55-128")

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ValueError, match=r"ethos-u-vela is missing: pip install 'lowbit\[npu\]'"):
        ethos_u.estimate(content, "ethos-u55-128")


# --- rows ---------------------------------------------------------------------------------------


@pytest.fixture
def path(content, tmp_path):
    path = tmp_path / "model.tflite"
    path.write_bytes(content)
    return str(path)


def test_a_row_for_each_accelerator(path, tmp_path):
    row = on_microcontroller.measure(
        path,
        "ethos-u",
        accelerator="ethos-u55-128,ethos-u85-256",
        output_dir=str(tmp_path),
    )
    rows = results.read_rows(tmp_path / "microcontroller.csv")
    assert [each["accelerator"] for each in rows] == ["ethos-u55-128", "ethos-u85-256"]
    assert row["accelerator"] == "ethos-u85-256" and row["device"] == "ethos-u"
    assert int(rows[1]["estimated_cycles"]) == row["estimated_cycles"]
    assert row["versions"]["ethos-u-vela"] == "5.2.0"
    assert not any("latency" in name for name in row)


def test_a_row_of_tensorflow_lite_micro(graph, content, path, tmp_path):
    pytest.importorskip("tflite_micro")
    row = on_microcontroller.measure(path, "tflite-micro", images=3, output_dir=str(tmp_path))
    codes = np.random.default_rng(0).integers(-128, 128, (3, 32, 32, 3), np.int8)
    (found,) = micro.run(content, [codes]).outputs
    runner = runtimes.interpreter(content, "reference")
    wanted = np.concatenate([runtimes.invoke(runner, image[None]) for image in codes])
    assert (row["images"], row["output_codes"]) == (3, 30)
    assert row["micro_simulator_differing"] == 0
    assert row["micro_reference_differing"] == (found != wanted).sum()
    assert 2 * 16 * 16 * 8 <= row["arena_bytes"] < 2**20
    (kept,) = results.read_rows(tmp_path / "microcontroller.csv")
    assert int(kept["arena_bytes"]) == row["arena_bytes"] and kept["dataset"] == "random codes"


def test_a_row_on_images(path, tmp_path):
    pytest.importorskip("tflite_micro")
    row = on_microcontroller.measure(
        path, "tflite-micro", dataset="digits", images=5, output_dir=str(tmp_path)
    )
    assert (row["images"], row["dataset"]) == (5, "digits")
    assert 0 <= row["top1"] <= 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"device": "pixel"}, "device 'pixel' is not one of tflite-micro, ethos-u"),
        ({"device": "tflite-micro", "images": 0}, "0 images; at least 1 is needed"),
    ],
)
def test_bad_arguments_leave_no_row(path, tmp_path, options, message):
    pytest.importorskip("tflite_micro")
    with pytest.raises(ValueError, match=message):
        on_microcontroller.measure(path, **options, output_dir=str(tmp_path))
    assert not (tmp_path / "microcontroller.csv").exists()


def test_a_file_with_float_ends_is_told(graph, tmp_path):
    pytest.importorskip("tflite_micro")
    path = tmp_path / "float_io.tflite"
    path.write_bytes(tflite_file.write(boundary.with_float_io(graph)))
    with pytest.raises(ValueError, match="float_io.tflite: .* is float32; .* --io=int8"):
        on_microcontroller.measure(str(path), "tflite-micro", output_dir=str(tmp_path))
