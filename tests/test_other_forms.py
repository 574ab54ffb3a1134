"""export.c_source compiled and export.graph_json read back: the same bytes, the same graph."""

import json
import shutil
import subprocess

import keras
import numpy as np
import pytest

from export import c_source, graph_json
from lowbit import calibration, lowering, placement, spec, tflite_file


@pytest.fixture(scope="module")
def content():
    keras.utils.set_random_seed(0)
    x = image = keras.Input((6, 6, 2))
    x = keras.layers.Conv2D(3, 3, padding="same", activation="relu6", name="conv")(x)
    x = keras.layers.MaxPooling2D(name="max")(x)
    model = keras.Model(image, keras.layers.Dense(4, name="logits")(keras.layers.Flatten()(x)))
    placed = placement.place(model, spec.scheme("w8a8"))
    images = np.random.default_rng(0).uniform(-1, 1, (4, 6, 6, 2)).astype(np.float32)
    calibration.calibrate(placed, [images])
    return tflite_file.write(lowering.lower(placed))


@pytest.mark.parametrize("language", ["c", "c++"])
def test_the_array_compiles_and_is_the_file(tmp_path, content, language):
    compiler = shutil.which("cc" if language == "c" else "c++")
    if compiler is None:
        pytest.skip(f"no {language} compiler here")
    (tmp_path / "a-net.tflite").write_bytes(content)
    config = c_source.Config(model=str(tmp_path / "a-net.tflite"), output=str(tmp_path / "a-net.c"))
    row = c_source.export(config)
    assert (row["name"], row["size_bytes"]) == ("a_net", len(content))
    (tmp_path / "main.c").write_text(
        '#include <stdio.h>\n#include "a-net.h"\n'
        "int main(void) { if ((unsigned long)a_net % 16) return 1;\n"
        "  return fwrite(a_net, 1, a_net_size_bytes, stdout) != sizeof a_net; }\n"
    )
    command = [compiler, "-x", language, "-Wall", "-Werror", "main.c", "a-net.c", "-o", "program"]
    subprocess.run(command, cwd=tmp_path, check=True)
    done = subprocess.run([tmp_path / "program"], capture_output=True, check=True)
    assert done.stdout == content


def test_the_json_has_every_code_and_scale(tmp_path, content):
    (tmp_path / "net.tflite").write_bytes(content)
    options = {"model": str(tmp_path / "net.tflite"), "output": str(tmp_path / "net.json")}
    row = graph_json.export(graph_json.Config(**options))
    found = json.loads((tmp_path / "net.json").read_text())
    graph = tflite_file.read(content)
    assert row["operations"] == len(graph.nodes) == len(found["nodes"])
    for stored, tensor in zip(found["tensors"], graph.tensors.values(), strict=True):
        assert (stored["name"], stored["dtype"]) == (tensor.name, tensor.dtype)
        if tensor.quantization is not None:
            scale = np.asarray(stored["scale"], np.float32)
            np.testing.assert_array_equal(scale, tensor.quantization.scale)
        if tensor.data is not None:
            np.testing.assert_array_equal(np.asarray(stored["data"]), tensor.data)
    conv = next(node for node in found["nodes"] if node["op"] == "CONV_2D")
    assert conv["attributes"]["strides"] == [1, 1] and conv["attributes"]["activation"] == "RELU6"
    whole = row["size_bytes"]
    row = graph_json.export(graph_json.Config(**options, without_data=True))
    assert row["size_bytes"] < whole
    assert not any(
        "data" in each for each in json.loads((tmp_path / "net.json").read_text())["tensors"]
    )


@pytest.mark.parametrize(
    ("tool", "options", "message"),
    [
        (c_source, {"output": "model.txt"}, "model.txt does not end in .c"),
        (c_source, {"output": "m.c", "name": "2 b"}, "'2 b' is no identifier"),
        (c_source, {"output": "2b.c"}, "'2b' is no identifier"),
        (graph_json, {"output": "model.txt"}, "model.txt"),
    ],
)
def test_bad_flags_are_named_and_leave_nothing(
    tmp_path, monkeypatch, content, tool, options, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.tflite").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        tool.export(tool.Config(model="net.tflite", **options))
    (tmp_path / "no.tflite").write_bytes(b"no model")
    with pytest.raises(tflite_file.TFLiteFileError, match="no.tflite"):
        tool.export(tool.Config(model="no.tflite"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.tflite", "no.tflite"]
