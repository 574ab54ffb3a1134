"""Qualcomm's HTP, emulated by its own libraries: whole networks, their codes, simulated cycles."""

import configparser
import importlib.metadata
import pathlib

import keras
import numpy as np
import pytest

from eval import on_hexagon_emulator
from lowbit import (
    boundary,
    calibration,
    integer_graph,
    kernels,
    lowering,
    manifest,
    onnx_file,
    placement,
    results,
    runtimes,
    spec,
    tflite_file,
)
from lowbit.data import preprocess
from lowbit.devices import hexagon

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("qualcomm")]


def network():
    image = keras.Input((16, 16, 3))
    x = keras.layers.Conv2D(16, 3, strides=2, padding="same", use_bias=False)(image)
    x = keras.layers.ReLU(6.0)(keras.layers.BatchNormalization()(x))
    y = keras.layers.DepthwiseConv2D(3, padding="same", activation="relu")(x)
    x = keras.layers.Add()([x, keras.layers.Conv2D(16, 1)(y)])
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, keras.layers.Dense(10)(x))


@pytest.fixture(scope="module")
def placed():
    """Returns a small network with quantizers."""
    keras.utils.set_random_seed(0)
    placed = placement.place(network(), spec.scheme("w8a8"))
    images = np.random.default_rng(0).normal(0, 0.4, (8, 16, 16, 3)).astype(np.float32)
    calibration.calibrate(placed, [images])
    return placed


@pytest.fixture(scope="module")
def graph(placed):
    return lowering.lower(placed, "a test")


@pytest.fixture(scope="module")
def codes(graph):
    images = np.random.default_rng(1).normal(0, 0.4, (6, 16, 16, 3)).astype(np.float32)
    return runtimes.graph_codes(graph, images)


@pytest.fixture(scope="module")
def ran(graph, codes):
    return hexagon.run(graph, [codes])


@pytest.fixture(scope="module")
def cycles(graph):
    return hexagon.simulated_cycles(graph)


def test_a_network_is_one_program_with_nearly_xnnpacks_codes(graph, codes, ran):
    (outputs,) = ran.outputs
    wanted = kernels.run(graph, {graph.inputs[0]: codes})[graph.outputs[0]]
    assert (outputs.shape, outputs.dtype) == (wanted.shape, np.dtype("int8"))
    assert ran.htp_partitions == 1 and ran.htp_nodes > len(graph.nodes)
    distance = np.abs(outputs.astype(int) - wanted)
    assert distance.max() <= 2 and (distance == 0).mean() > 0.8
    assert len(np.unique(outputs)) > 10  # not all of one code, which would agree by itself


def test_the_emulator_is_deterministic(graph, codes, ran, cycles):
    np.testing.assert_array_equal(hexagon.run(graph, [codes[:2]]).outputs[0], ran.outputs[0][:2])
    assert hexagon.simulated_cycles(graph) == cycles


def test_int8_takes_fewer_simulated_cycles_than_float16(graph, cycles):
    real = hexagon.simulated_cycles(graph, "float16")
    for found in (cycles, real):
        assert 0 < found.lower_cycles <= found.cycles <= found.upper_cycles
        assert 0 < found.lower_us <= found.simulated_us <= found.upper_us
    assert cycles.cycles < real.cycles


def test_the_network_in_float16_is_the_same_network(graph, codes):
    source, target = (graph.tensors[end] for end in (*graph.inputs, *graph.outputs))
    real = (codes - np.float32(source.zero_point)) * source.scale
    (outputs,) = hexagon.run(graph, [real.astype(np.float16)], "float16").outputs
    assert outputs.dtype == np.float16
    wanted = kernels.run(graph, {source.name: codes})[target.name]
    # Nothing bounds real numbers, so what a code cannot hold is cut off here.
    found = np.clip(outputs / np.float64(target.scale) + target.zero_point, -128, 127)
    steps = found - wanted
    assert np.abs(steps).max() < 3 and np.abs(steps).mean() < 0.7


def test_float_ends_cost_cycles(graph, codes, ran, cycles):
    real = boundary.with_float_io(graph)
    source, target = (graph.tensors[end] for end in (*graph.inputs, *graph.outputs))
    images = (codes - np.float32(source.zero_point)) * source.scale
    found = hexagon.run(real, [images.astype(np.float32)])
    assert found.htp_partitions == 1 and found.outputs[0].dtype == np.float32
    steps = np.rint(found.outputs[0] / target.scale) + target.zero_point - ran.outputs[0]
    assert np.abs(steps).max() <= 1
    assert hexagon.simulated_cycles(real).cycles > cycles.cycles


def test_a_file_of_pixels_is_run_as_it_is(graph):
    graph = boundary.with_pixel_io(graph, preprocess.parse("tf"))
    pixels = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    (outputs,) = hexagon.run(graph, [pixels]).outputs
    wanted = kernels.run(graph, {graph.inputs[0]: pixels})[graph.outputs[0]]
    assert outputs.dtype == wanted.dtype == np.uint8
    distance = np.abs(outputs.astype(int) - wanted)
    assert distance.max() <= 2 and (distance == 0).mean() > 0.7


# --- single operations --------------------------------------------------------------------------


def tensor(name, scale, zero_point, data=None):
    quantization = integer_graph.Quantization(np.float32([scale]), np.array([zero_point]))
    shape = (1, 6, 5, 3) if data is None else data.shape
    return integer_graph.Tensor(name, shape, "int8", quantization, data)


def pair(op, activation, scale, constant=False):
    """Returns a graph of one operation on x and on y, or on x and three constants."""
    x, out = tensor("x", 0.031, -11), tensor("out", scale, -20)
    y = tensor("y", 0.044, 25, np.int8([-100, 3, 90]) if constant else None)
    node = integer_graph.Node(op, "node", ("x", "y"), ("out",), {"activation": activation})
    inputs = ("x",) if constant else ("x", "y")
    return integer_graph.IntegerGraph({"x": x, "y": y, "out": out}, (node,), inputs, ("out",))


@pytest.mark.parametrize(
    "graph",
    [
        # The compiler drops a Clip with an upper bound that no code reaches, the lower one too.
        pair("ADD", "RELU", 0.06),
        pair("MUL", "RELU6", 0.02),
        pair("ADD", "RELU6", 0.06),
        # int8 constants beside uint8 codes came out 1 off in half of the codes.
        pair("ADD", None, 0.06, constant=True),
    ],
    ids=["ADD RELU", "MUL RELU6", "ADD RELU6", "ADD constant"],
)
def test_an_operation_has_xnnpacks_codes(graph):
    random = np.random.default_rng(0)
    inputs = [random.integers(-128, 128, (4, 6, 5, 3), np.int8) for _ in graph.inputs]
    (found,) = hexagon.run(graph, inputs).outputs
    wanted = kernels.run(graph, dict(zip(graph.inputs, inputs, strict=True)))["out"]
    distance = np.abs(found.astype(int) - wanted)
    assert distance.max() <= 1 and (distance > 0).mean() < 0.02


def test_what_the_htp_does_not_take_is_named():
    codes = np.zeros((1, 6, 5, 3), np.int8)
    message = "m: the emulated HTP does not take Clip out_codes: nothing may run on the CPU"
    with pytest.raises(hexagon.RefusedError, match=message):
        hexagon.run(pair("ADD", "RELU", 0.06), [codes, codes], "exact", "m")


def test_a_graph_without_an_onnx_form_is_named(codes):
    graph = pair("ADD", None, 0.06)
    node = integer_graph.Node("ELU", "node", ("x",), ("out",), {})
    tensors = {name: graph.tensors[name] for name in ("x", "out")}
    graph = integer_graph.IntegerGraph(tensors, (node,), ("x",), ("out",))
    with pytest.raises(ValueError, match="no ONNX form of ELU"):
        hexagon.run(graph, [np.zeros((1, 6, 5, 3), np.int8)])


def test_an_input_without_images_is_an_error(graph):
    with pytest.raises(ValueError, match="m: an input without images"):
        hexagon.run(graph, [np.zeros((0, 16, 16, 3), np.int8)], name="m")


def test_versions_are_checked_before_anything_runs(graph, monkeypatch):
    monkeypatch.setattr(onnx_file, "write", None)
    monkeypatch.setitem(hexagon.VERSIONS, "onnxruntime-qnn", "3.0.0")
    message = (
        r"onnxruntime-qnn is 2.7.0, but .* are those of 3.0.0: pip install 'lowbit\[hexagon\]'"
    )
    with pytest.raises(ValueError, match=message):
        hexagon.simulated_cycles(graph)

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    message = r"package onnx is missing: pip install 'lowbit\[hexagon\]', or onnx==1.23.2"
    with pytest.raises(ValueError, match=message):
        hexagon.simulated_cycles(graph)


def test_the_pins_are_those_of_setup_cfg():
    setup = configparser.ConfigParser()
    setup.read(pathlib.Path(__file__).parent.parent / "setup.cfg")
    lines = setup["options.extras_require"]["hexagon"].strip().splitlines()
    wanted = {line.partition(";")[0].replace(" ", "") for line in lines}
    assert wanted == {f"{name}=={pin}" for name, pin in hexagon.VERSIONS.items()}


# --- the row ------------------------------------------------------------------------------------


def test_a_row_of_a_file(graph, tmp_path, cycles):
    path = tmp_path / "model.tflite"
    path.write_bytes(tflite_file.write(graph, {"preprocess": "tf"}))
    row = on_hexagon_emulator.measure(str(path), "digits", images=23, output_dir=str(tmp_path))
    assert (row["device"], row["images"], row["output_codes"]) == ("hexagon-emulator", 23, 230)
    assert (row["htp_partitions"], row["cpu_nodes"]) == (1, 0)
    counts = row["difference_counts"]
    assert sum(counts.values()) == 230 and counts["0"] / 230 == pytest.approx(row["same_share"])
    assert len(counts) == row["largest_difference"] + 1
    assert row["simulated_int8_cycles"] == cycles.cycles
    ratio = row["simulated_float16_cycles"] / row["simulated_int8_cycles"]
    assert row["simulated_float16_to_int8"] == pytest.approx(ratio, abs=1e-3)
    assert row["versions"].items() >= hexagon.VERSIONS.items()
    (kept,) = results.read_rows(tmp_path / "hexagon_emulator.csv")
    assert int(kept["simulated_int8_cycles"]) == row["simulated_int8_cycles"]
    assert not any("latency" in name for name in row)


def test_a_keras_file_is_measured_as_what_it_exports_to(placed, tmp_path):
    path = tmp_path / "ptq.keras"
    manifest.save_model(placed, path, {"preprocess": "tf"})
    row = on_hexagon_emulator.measure(str(path), "digits", images=3, output_dir=str(tmp_path))
    tflite = tmp_path / "ptq.tflite"
    tflite.write_bytes(tflite_file.write(lowering.lower(placed), {"preprocess": "tf"}))
    other = on_hexagon_emulator.measure(str(tflite), "digits", images=3, output_dir=str(tmp_path))
    same = ("emulated_top1", "host_top1", "difference_counts", "simulated_int8_cycles")
    assert [row[name] for name in same] == [other[name] for name in same]


def test_the_host_is_the_default_interpreter(graph, tmp_path, monkeypatch):
    """An emulator that gives the host's codes differs nowhere, one that is 2 off by 2 everywhere."""
    content = tflite_file.write(graph, {"preprocess": "tf"})
    path = tmp_path / "model.tflite"
    path.write_bytes(content)
    host = runtimes.interpreter(content)
    for offset in (0, 2):

        def moved(graph, inputs, form="qdq", name="", offset=offset):
            del graph, form, name
            found = np.concatenate([runtimes.invoke(host, image[None]) for image in inputs[0]])
            return hexagon.Run((np.where(found < 100, found + offset, found - offset),), 1, 1)

        monkeypatch.setattr(hexagon, "run", moved)
        row = on_hexagon_emulator.measure(str(path), "digits", images=4, output_dir=str(tmp_path))
        expected = {str(distance): 0 for distance in range(offset)} | {str(offset): 40}
        assert row["difference_counts"] == expected


def test_a_file_of_floats_is_told(tmp_path):
    placed = placement.place(network(), spec.scheme("float32"))
    path = tmp_path / "float.tflite"
    path.write_bytes(tflite_file.write(lowering.lower(placed), {"preprocess": "tf"}))
    with pytest.raises(
        ValueError, match="float.tflite: .* is float32; devices are compared by cod"
    ):
        on_hexagon_emulator.measure(str(path), "digits", output_dir=str(tmp_path))
    assert not (tmp_path / "hexagon_emulator.csv").exists()
