"""A layer taught by one file: through the conformance suite and the command line; bad files named."""

import json
import operator
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest

from eval import conformance
from lowbit import extension, manifest, network, placement, reading, spec

ROOT = pathlib.Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "unit_normalization.py"


def tool(name, *flags):
    """Runs a tool in a process of its own: what is installed stays so."""
    command = [sys.executable, "-m", name, f"--extensions={EXAMPLE}", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_conformance_suite_takes_an_extension_up(tmp_path):
    row = tool("eval.conformance", "--cases=unit normalization", f"--output_dir={tmp_path}")
    assert row["differing"] == 0 and row["codes"] > 50_000
    page = (tmp_path / "conformance.md").read_text()
    assert "| unit normalization | 0 of " in page
    assert page.count("refused") == 1 and "kTfLiteInt8 was not true" in page  # no 16-bit kernel


@pytest.mark.slow
def test_an_extension_from_the_float_model_to_the_parity_count(tmp_path):
    image = keras.Input((9, 8, 3))
    x = keras.layers.Conv2D(6, 3)(image)
    x = keras.layers.Conv2D(4, 1)(keras.layers.UnitNormalization(name="unit")(x))
    model = keras.Model(image, keras.layers.GlobalAveragePooling2D()(x))
    conformance.randomized(model, np.random.default_rng(0))
    manifest.save_model(model, tmp_path / "float.keras", {"preprocess": "tf"})
    images = conformance.smooth_images(np.random.default_rng(1), 12, 9, 8)
    np.savez(tmp_path / "set.npz", x=np.uint8(127.5 * images + 127.5), y=np.arange(12) % 4)
    paths = [f"--model={tmp_path}/float.keras", f"--output={tmp_path}/ptq.keras"]
    tool("ptq.quantize", *paths, f"--dataset={tmp_path}/set.npz", "--calibration_images=6")
    paths = [f"--model={tmp_path}/ptq.keras", f"--output={tmp_path}/model.tflite"]
    assert tool("export.tflite", *paths)["in_float"] == []
    flags = [f"--dataset={tmp_path}/set.npz", "--limit=4", f"--output_dir={tmp_path}"]
    row = tool("eval.parity", f"--model={tmp_path}/ptq.keras", *flags)
    assert row["simulator_xnnpack_differing"] == row["simulator_reference_differing"] == 0


BAD = {
    "missing.py": (None, FileNotFoundError, "missing.py is no .py file"),
    "raises.py": ("1 / 0", ValueError, "raises.py: ZeroDivisionError: division by zero"),
    "no_list.py": ("EXTENSIONS = 5", ValueError, "no_list.py: EXTENSIONS are 5, no tuple or list"),
    "leaves.py": ("raise SystemExit(3)", ValueError, "leaves.py: SystemExit: 3"),
    "wrong.py": ("EXTENSIONS = [3]", ValueError, "wrong.py: EXTENSIONS hold 3, no Extension"),
    "known.py": (
        "import keras\nfrom lowbit.extension import Extension\n"
        "EXTENSIONS = [Extension(keras.layers.Add, None, None, 'sum')]",
        ValueError,
        "extension of Add: the layer, or the kind 'sum', is known already",
    ),
    "operator.py": (
        "import keras\nfrom lowbit.extension import Extension, Operator\n"
        "EXTENSIONS = [Extension(keras.layers.RandomFlip, None, print, 'flip', "
        "operators=(Operator('FLIP', None),))]",
        ValueError,
        "operator FLIP is none of TFLite's built-in ones",
    ),
}


def test_a_layer_of_known_operations_needs_a_reader_alone(monkeypatch):
    monkeypatch.setattr(reading, "READERS", dict(reading.READERS))
    monkeypatch.setattr(extension, "INSTALLED", [])

    def read(call, inputs, fresh):
        middle, config = next(fresh), {"scale": 2.0, "offset": 0.0}
        name, layer = call.name, call.layer
        return [
            network.Operation("rescale", f"{name}_twice", inputs, middle, layer, config=config),
            network.Operation(
                "activation", name, (middle,), call.output, layer, activation="relu", label=name
            ),
        ]

    extension.install(extension.Extension(Twice, read))
    image = keras.Input((6, 6, 3))
    model = keras.Model(image, keras.layers.Conv2D(2, 1)(Twice()(keras.layers.Conv2D(4, 3)(image))))
    placed = placement.place(model, spec.scheme("w8a8"))
    graph_layers = [layer for layer in placed.layers if "Quantized" in type(layer).__name__]
    assert len(graph_layers) == 2  # the factor is in the first one's weights, the ReLU behind it
    with pytest.raises(ValueError, match="kind 'sum' and lower None go together"):
        extension.install(extension.Extension(keras.layers.RandomFlip, read, None, "sum"))


class Twice(keras.layers.Layer):
    """relu(2 * x)."""

    def call(self, x):
        return keras.ops.relu(2 * x)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_extension_is_named(name, tmp_path):
    content, error, message = BAD[name]
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(error, match=message):
        extension.load(str(tmp_path / name))
    assert extension.INSTALLED == []
    assert hasattr(operator, "add")  # not the file of this name
