"""eval.label_image: a .keras and a .tflite file see the same in pictures; labels and errors."""

import keras
import numpy as np
import pytest
from PIL import Image

from eval import label_image
from lowbit import calibration, lowering, manifest, placement, spec, tflite_file

NAMES = ("red", "green", "blue")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A network that says which colour is strongest, as .keras and .tflite, and pictures."""
    path = tmp_path_factory.mktemp("label")
    image = keras.Input((8, 8, 3))
    x = keras.layers.GlobalAveragePooling2D()(image)
    model = keras.Model(image, keras.layers.Dense(3, name="logits")(x))
    model.get_layer("logits").set_weights([4 * np.eye(3, dtype=np.float32), np.zeros(3)])
    facts = {"preprocess": "tf", "class_names": list(NAMES)}
    manifest.save_model(model, path / "float.keras", facts)
    placed = placement.place(model, spec.scheme("w8a8"))
    random = np.random.default_rng(0)
    calibration.calibrate(placed, [random.uniform(-1, 1, (4, 1, 1, 3)).repeat(8, 1).repeat(8, 2)])
    content = tflite_file.write(lowering.lower(placed), facts | {"class_names": None})
    (path / "model.tflite").write_bytes(content)
    for index, name in enumerate(NAMES):
        pixels = np.full((10, 12, 3), 90, np.uint8)
        pixels[..., index] = 200
        Image.fromarray(pixels).save(path / f"{name}.png")
    (path / "labels.txt").write_text("\ufeffRed\nGreen\nBlue\n", encoding="utf-8")
    return path


def test_both_files_see_the_colours(folder, capsys):
    images = ",".join(str(folder / f"{name}.png") for name in NAMES[1:])
    row = label_image.label(label_image.Config(model=str(folder / "float.keras"), image=images))
    assert (row["name"], row["class"], row["images"]) == ("green", 1, 2)
    shown = capsys.readouterr().err
    assert shown.index("green.png") < shown.index("blue.png")
    # 110 / 127.5 more than the others, times 4, through a softmax
    wanted = 1 / (1 + 2 * np.exp(-4 * 110 / 127.5))
    assert row["probability"] == pytest.approx(wanted, abs=1e-4)
    for kernels in ("xnnpack", "reference"):
        options = {"model": str(folder / "model.tflite"), "image": str(folder / "blue.png")}
        options |= {"labels": str(folder / "labels.txt"), "kernels": kernels, "top": 2}
        row = label_image.label(label_image.Config(**options))
        assert (row["name"], row["class"]) == ("Blue", 2)
        assert row["probability"] == pytest.approx(wanted, abs=0.02)
        assert capsys.readouterr().err.count("0.") == 2
    row = label_image.label(label_image.Config(**options | {"labels": None}))
    assert row["name"] == "class 2"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": "absent.png"}, "--image absent.png: no such file"),
        ({"image": "labels.txt"}, "labels.txt"),
        ({"labels": "short.txt"}, "short.txt has 2 lines; the model has 3 classes"),
        ({"model": "mobilenet_v2"}, "needs --weights"),
        ({"top": 0}, "--top is 0"),
    ],
)
def test_bad_input_is_named(folder, monkeypatch, options, message):
    monkeypatch.chdir(folder)
    (folder / "short.txt").write_text("a\nb\n")
    with pytest.raises((ValueError, OSError), match=message):
        label_image.label(
            label_image.Config(**{"model": "float.keras", "image": "red.png"} | options)
        )


def test_probabilities_stay_and_logits_become_some():
    given = np.float32([0.25, 0.7421875, 0.0])  # codes of 1/256
    np.testing.assert_array_equal(label_image.probabilities(given), given)
    found = label_image.probabilities(np.float32([1000, 0, -1000]))
    np.testing.assert_allclose(found, [1, 0, 0], atol=1e-12)
    assert label_image.probabilities(np.float32([-1, 2, 0])).sum() == pytest.approx(1)
