"""Ahead-of-time compilation for Snapdragons: the real compiler, and its program run in the emulator."""

import dataclasses
import io
import json
import pathlib
import shutil

import keras
import numpy as np
import pytest
from flatbuffers import flexbuffers

from export import snapdragon as tool
from lowbit import (
    calibration,
    kernels,
    lowering,
    placement,
    runtimes,
    spec,
    tflite_file,
)
from lowbit.devices import snapdragon

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("qualcomm")]


def network():
    image = keras.Input((16, 16, 3))
    x = keras.layers.Conv2D(16, 3, strides=2, padding="same", activation="relu")(image)
    y = keras.layers.DepthwiseConv2D(3, padding="same", activation="relu")(x)
    x = keras.layers.Add()([x, keras.layers.Conv2D(16, 1)(y)])
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, keras.layers.Dense(10)(x))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(0, 0.4, (8, 16, 16, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def graphs(images):
    """Returns {scheme: integer graph} of a small network."""

    def graph(scheme, **storage):
        keras.utils.set_random_seed(0)
        placed = placement.place(network(), spec.scheme(scheme))
        if calibration.observed_points(placed):
            calibration.calibrate(placed, [images])
        return lowering.lower(placed, "a test", lowering.Storage(**storage))

    return {
        "w8a8": graph("w8a8"),
        "w4a8 packed": graph("w4a8", packed=True),
        "w8": graph("w8"),
        "float32": graph("float32"),
    }


@pytest.fixture
def path(graphs, tmp_path):
    """Returns a function that writes one of the graphs to a file."""

    def write(scheme):
        path = tmp_path / f"{scheme}.tflite"
        path.write_bytes(tflite_file.write(graphs[scheme]))
        return str(path)

    return write


def test_the_known_chips_are_those_of_the_plugin():
    from ai_edge_litert.aot.vendors.qualcomm import target

    assert set(snapdragon.SOCS) == {each.value for each in target.SocModel} - {"ALL"}


@pytest.mark.parametrize("soc", ["SM8550", "SM8650"])
def test_an_integer_file_becomes_one_program(graphs, soc):
    content = tflite_file.write(graphs["w8a8"])
    compiled = snapdragon.compile_for(content, soc)
    assert (compiled.operators, compiled.delegated, compiled.partitions) == (6, 6, 1)
    assert compiled.left == () and compiled.integer
    model = tflite_file.parse(compiled.content)
    (operator,) = model.subgraphs[0].operators
    assert model.operatorCodes[operator.opcodeIndex].customCode == b"DISPATCH_OP"
    assert compiled.content != content


def test_chips_get_programs_of_their_own(graphs):
    content = tflite_file.write(graphs["w8a8"])
    first, second = (snapdragon.compile_for(content, soc).content for soc in ("SM8550", "SM8650"))
    assert first != second


def test_a_float_file_is_delegated_too_and_told_apart(graphs):
    compiled = snapdragon.compile_for(tflite_file.write(graphs["float32"]), "SM8650")
    assert compiled.delegated == compiled.operators and not compiled.integer


# Runs the program of stdin's .npz in ONNX Runtime, as a node that holds a context of QNN.
_RUN = """
import io, os, sys
results = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)
import numpy as np
import onnx
import onnxruntime
import onnxruntime_qnn
from onnx import helper
given = np.load(io.BytesIO(sys.stdin.buffer.read()))
codes, source, target = given["codes"], sys.argv[1], sys.argv[2]
int8 = onnx.TensorProto.INT8
node = helper.make_node(
    "EPContext", [source], [target], name="qnn_partition_0", domain="com.microsoft", main_context=1,
    embed_mode=1, ep_cache_context=given["program"].tobytes(), source="QNN",
    partition_name="qnn_partition_0", max_size=0,
)
graph = helper.make_graph(
    [node], "compiled", [helper.make_tensor_value_info(source, int8, [1, *codes.shape[1:]])],
    [helper.make_tensor_value_info(target, int8, [1, 10])],
)
opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
onnxruntime.register_execution_provider_library("QNN", onnxruntime_qnn.get_library_path())
devices = [each for each in onnxruntime.get_ep_devices() if "QNN" in each.ep_name]
options = onnxruntime.SessionOptions()
options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
options.add_provider_for_devices(devices[:1], {"backend_path": onnxruntime_qnn.get_qnn_htp_path()})
session = onnxruntime.InferenceSession(model.SerializeToString(), options)
found = [session.run(None, {source: image[None]})[0] for image in codes]
made = io.BytesIO()
np.save(made, np.concatenate(found))
results.write(made.getvalue())
results.close()
"""


def test_the_program_in_the_file_computes_the_network(graphs, images):
    graph = graphs["w8a8"]
    compiled = snapdragon.compile_for(tflite_file.write(graph), "SM8550").content
    model = tflite_file.parse(compiled)
    subgraph = model.subgraphs[0]
    (operator,) = subgraph.operators
    options = flexbuffers.Loads(bytes(operator.customOptions))
    start, size = options["bytecode_offset"], options["bytecode_size"]
    program = np.frombuffer(compiled, np.uint8)[start : start + size]
    codes = runtimes.graph_codes(graph, images)
    given = io.BytesIO()
    np.savez(given, program=program, codes=codes)
    ends = [subgraph.tensors[each[0]].name.decode() for each in (operator.inputs, operator.outputs)]
    done = runtimes.in_child(_RUN, ends, given.getvalue(), "the program", 20)
    found = np.load(io.BytesIO(done.stdout))
    wanted = kernels.run(graph, {graph.inputs[0]: codes})[graph.outputs[0]]
    distance = np.abs(found.astype(int) - wanted)
    assert found.shape == wanted.shape
    assert distance.max() <= 3 and (distance <= 1).mean() > 0.9
    assert len(np.unique(found)) > 20


# --- the tool -----------------------------------------------------------------------------------


def test_the_row_and_the_file(path, tmp_path):
    output = tmp_path / "out.tflite"
    row = tool.export(tool.Config(path("w8a8"), "SM8650", str(output)))
    assert (row["delegated"], row["operators"], row["delegated_share"]) == (6, 6, 1.0)
    assert row["integer"] and row["left_to_cpu"] == "" and row["soc_name"] == "Snapdragon 8 Gen 3"
    assert row["size_bytes"] == output.stat().st_size
    assert row["versions"]["onnxruntime-qnn"] == "2.7.0"
    json.dumps(row)


def test_what_is_left_to_the_cpu_is_told_or_refused(path, tmp_path, capsys):
    output = tmp_path / "out.tflite"
    config = tool.Config(path("w4a8 packed"), "SM8650", str(output))
    row = tool.export(config)
    assert 0 < row["delegated"] < row["operators"] == 6
    left = row["left_to_cpu"].split("; ")
    assert len(left) == row["operators"] - row["delegated"]
    assert left[0].startswith("CONV_2D 0 (makes '")
    said = capsys.readouterr().err
    assert f"{len(left)} of 6 operators are left to the CPU" in said and left[-1] in said
    output.unlink()
    with pytest.raises(ValueError, match=r"operators are left to the CPU.*CONV_2D 0 .*--strict"):
        tool.export(dataclasses.replace(config, strict=True))
    assert not output.exists()


def test_a_float_file_is_no_integer_program(path, tmp_path, capsys):
    row = tool.export(tool.Config(path("float32"), "SM8650", str(tmp_path / "out.tflite")))
    assert row["delegated_share"] == 1.0 and not row["integer"]
    assert "is no integer file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "soc, output, message",
    [
        ("SM9999", "out.tflite", r"'SM9999' is not one of .*SM8650 \(Snapdragon 8 Gen 3\)"),
        ("SM8650", "out.bin", "must end in .tflite"),
    ],
)
def test_bad_flags_stop_before_the_compiler(path, tmp_path, monkeypatch, soc, output, message):
    monkeypatch.setattr(snapdragon, "compile_for", None)
    with pytest.raises(ValueError, match=message):
        tool.export(tool.Config(path("w8a8"), soc, str(tmp_path / output)))


def test_the_file_itself_is_not_overwritten(path):
    model = path("w8a8")
    before = pathlib.Path(model).read_bytes()
    with pytest.raises(ValueError, match="is --model: the compiled file runs on the SM8650 alone"):
        tool.export(tool.Config(model, "SM8650", model))
    assert pathlib.Path(model).read_bytes() == before


def test_without_gcc_the_message_says_why(path, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"gcc is missing: .*libQnnLpai.so.*apt-get install gcc"):
        tool.export(tool.Config(path("w8a8"), "SM8650", str(tmp_path / "out.tflite")))
    assert not (tmp_path / "out.tflite").exists()


def test_a_version_that_is_not_the_pinned_one_is_named(graphs, monkeypatch):
    monkeypatch.setitem(snapdragon.VERSIONS, "ai-edge-litert", "9.9")
    with pytest.raises(ValueError, match=r"ai-edge-litert is 2.3.0, but .* 9.9: pip install"):
        snapdragon.compile_for(tflite_file.write(graphs["w8a8"]), "SM8650")


def test_a_damaged_file_never_reaches_the_compiler(graphs, monkeypatch):
    monkeypatch.setattr(snapdragon, "_compile", None)
    with pytest.raises(tflite_file.TFLiteFileError, match="cut.tflite"):
        snapdragon.compile_for(tflite_file.write(graphs["w8a8"])[:700], "SM8650", "cut.tflite")


def test_what_the_compiler_refuses_is_told(graphs):
    """Weight-only files dequantize weights by channel, which the compiler does not know."""
    content = tflite_file.write(graphs["w8"])
    message = "w.tflite: the compiler for SM8650 refuses it: .*per-channel"
    with pytest.raises(runtimes.RefusedError, match=message):
        snapdragon.compile_for(content, "SM8650", "w.tflite")
