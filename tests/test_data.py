"""Data: every source, every message, and what training and measuring rely on.

Images are made here.  Real ones are measured where LOWBIT_DATA names the folder that holds them.
"""

import contextlib
import csv
import gc
import importlib.machinery
import io
import itertools
import os
import pathlib
import struct
import subprocess
import sys
import threading
import time
import types
import zipfile

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies
from PIL import Image

from lowbit.data import augment, datasets, downloads, images, pipeline, preprocess

RAW = preprocess.parse("raw")


def noise(seed, height=9, width=7, channels=3):
    """Returns random uint8 pixels, (height, width, channels), or (height, width) for 0 channels."""
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def encoded(pixels, kind="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def labels_csv(rows, header=("file", "label", "license")):
    file = io.StringIO()
    csv.writer(file).writerows([header, *rows])
    return file.getvalue()


def labelled_folder(path, count=40, classes=4):
    """Writes `count` different images with labels.csv; returns their pixels."""
    pixels = [noise(i) for i in range(count)]
    for i, image in enumerate(pixels):
        write(path / f"{i:03}.png", encoded(image))
    write(path / "labels.csv", labels_csv([f"{i:03}.png", i % classes, "by"] for i in range(count)))
    return pixels


def zipped(folder, path, prefix=""):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, prefix + file.name)
    return path


def all_images(dataset):
    return [dataset.read(i) for i in range(len(dataset))]


def contents(dataset):
    return {image.tobytes() for image in all_images(dataset)}


def fake(count=50, classes=5, read=None, **fields):
    """Returns a data set of which every pixel of image i is i modulo 256."""
    return datasets.Dataset(
        "fake",
        np.arange(count, dtype=np.int64) % classes,
        classes,
        None,
        read or (lambda i: np.full((6, 8, 3), i % 256, np.uint8)),
        **fields,
    )


def raises(error, *words):
    """Expects `error` with one line that holds each of `words`."""

    @contextlib.contextmanager
    def context():
        with pytest.raises(error) as caught:
            yield
        message = str(caught.value)
        assert "\n" not in message
        for word in words:
            assert str(word) in message

    return context()


# Preprocess


@pytest.mark.parametrize("mode", ["tf", "torch", "caffe"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_preprocess_equals_keras_applications_bit_for_bit(mode, dtype):
    from keras.src.applications import imagenet_utils

    every = np.stack(np.meshgrid(*[np.arange(256)] * 2), -1).reshape(256, 256, 2)
    pixels = np.concatenate([every, every[..., :1] ^ 85], -1)[np.newaxis].astype(dtype)
    before = pixels.copy()
    ours = preprocess.apply(pixels, preprocess.parse(mode))
    theirs = imagenet_utils.preprocess_input(pixels.copy(), data_format="channels_last", mode=mode)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(pixels, before)


def test_preprocess_numbers():
    pixels = noise(0)[np.newaxis]
    one = pixels.astype(np.float32)
    np.testing.assert_array_equal(preprocess.apply(pixels, RAW), one)
    np.testing.assert_array_equal(
        preprocess.apply(pixels, preprocess.parse("127,128")), (one - 127) / 128
    )
    np.testing.assert_array_equal(
        preprocess.apply(pixels, preprocess.parse("1,2,3,4,5,6")),
        (one - np.float32([1, 2, 3])) / np.float32([4, 5, 6]),
    )


@pytest.mark.parametrize(
    "text", ["tf", "torch", "caffe", "raw", "127,128", "1,2,3,4,5,6", "0.1,1e-3"]
)
def test_preprocess_text_and_affine_say_the_same_as_apply(text):
    parsed = preprocess.parse(text)
    assert preprocess.parse(preprocess.as_string(parsed)) == parsed
    pixels = noise(1)
    scale, offset = preprocess.affine(parsed, 3)
    reversed_ = pixels[..., ::-1] if parsed.bgr else pixels
    np.testing.assert_allclose(
        preprocess.apply(pixels, parsed), scale * reversed_ + offset, rtol=1e-5, atol=1e-5
    )


@hypothesis.given(
    strategies.lists(strategies.floats(-1e6, 1e6), min_size=3, max_size=3),
    strategies.lists(strategies.floats(1e-6, 1e6), min_size=3, max_size=3),
)
def test_preprocess_numbers_round_trip(mean, std):
    made = preprocess.Preprocess("mine", tuple(mean), tuple(std))
    again = preprocess.parse(preprocess.as_string(made))
    assert (again.mean, again.std) == (made.mean, made.std)
    assert preprocess.parse(again.name) == again


def test_the_first_preprocess_that_is_known():
    assert preprocess.first_known("m.keras", None, "tf", "torch") == "tf"
    with pytest.raises(ValueError, match="m.keras does not say .* give --mine"):
        preprocess.first_known("m.keras", None, None, flag="--mine")


def test_preprocess_of_one_channel():
    scale, offset = preprocess.affine(preprocess.parse("tf"), 1)
    assert scale.tolist() == [1 / 127.5] and offset.tolist() == [-1]
    assert preprocess.apply(noise(0, channels=1), preprocess.parse("tf")).shape == (9, 7, 1)
    with raises(ValueError, "'torch'", "1 channel"):
        preprocess.affine(preprocess.parse("torch"), 1)
    with raises(ValueError, "1 or 3 channels, not 4"):
        preprocess.affine(RAW, 4)


@pytest.mark.parametrize(
    "text, word",
    [
        ("imagenet", "tf, torch, caffe, raw"),
        ("", "tf, torch"),
        ("127", "has 1 numbers"),
        ("1,2,3", "has 3 numbers"),
        ("127,0", "greater than 0"),
        ("127,-1", "greater than 0"),
        ("nan,1", "finite"),
        ("1,inf", "finite"),
    ],
)
def test_preprocess_refuses(text, word):
    with raises(ValueError, repr(text) if "," not in text else "preprocess", word):
        preprocess.parse(text)


def test_preprocess_without_a_text_is_refused():
    with raises(ValueError, "needs 3 means and 3 stds, has 1 and 3"):
        preprocess.Preprocess("mine", (1.0,), (1.0,) * 3)
    with raises(ValueError, "mine", "bgr"):
        preprocess.as_string(preprocess.Preprocess("mine", (1.0,) * 3, (1.0,) * 3, bgr=True))


# Decoding


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF"])
def test_decode_is_pillow(kind):
    data = encoded(noise(2), kind)
    image = images.decode(data, "x")
    assert image.dtype == np.uint8 and image.shape == (9, 7, 3)
    with Image.open(io.BytesIO(data)) as opened:
        np.testing.assert_array_equal(image, np.asarray(opened.convert("RGB")))


def test_decode_other_modes():
    grey, colour = noise(3, channels=0), noise(4)
    repeated = np.repeat(grey[..., np.newaxis], 3, -1)
    np.testing.assert_array_equal(images.decode(encoded(grey), "x"), repeated)
    wide = grey.astype(np.uint16) * 256 + 77
    for kind in ("PNG", "TIFF"):
        np.testing.assert_array_equal(images.decode(encoded(wide, kind), "x"), repeated)
    with_alpha = np.concatenate([colour, noise(5, channels=1)], -1)
    np.testing.assert_array_equal(images.decode(encoded(with_alpha), "x"), colour)
    grey_alpha = np.stack([grey, noise(6, channels=0)], -1)
    np.testing.assert_array_equal(images.decode(encoded(grey_alpha), "x"), repeated)
    file = io.BytesIO()
    palette = Image.fromarray(colour).quantize(16)
    palette.save(file, "PNG", transparency=bytes(range(16)))
    np.testing.assert_array_equal(
        images.decode(file.getvalue(), "x"), np.asarray(palette.convert("RGB"))
    )
    file = io.BytesIO()
    Image.fromarray(colour).convert("CMYK").save(file, "JPEG")
    assert images.decode(file.getvalue(), "x").shape == (9, 7, 3)


def test_unreadable_images_are_named():
    with raises(ValueError, "a/b.jpg: not an image (5 bytes"):
        images.decode(b"hello", "a/b.jpg")
    with raises(ValueError, "a/b.jpg: not an image (0 bytes"):
        images.decode(b"", "a/b.jpg")
    with raises(ValueError, "a/b.jpg: unreadable image", "truncated"):
        images.decode(encoded(noise(0, 64, 64), "JPEG")[:-200], "a/b.jpg")
    with raises(ValueError, "a.tif: unreadable image", "floats"):
        images.decode(encoded(np.ones((3, 3), np.float32), "TIFF"), "a.tif")


# Names


def test_digits():
    train, validation, every = (datasets.open_dataset("digits", s) for s in images.SPLITS[:3])
    assert (len(train), len(validation), len(every)) == (1442, 355, 1797)
    assert contents(train).isdisjoint(contents(validation))
    assert contents(train) | contents(validation) == contents(every)
    assert np.bincount(validation.labels).tolist() == [35, 36, 35, 36, 36, 36, 36, 35, 34, 36]
    assert not every.flip and every.num_classes == 10 and every.class_names[3] == "3"
    image = every.read(0)
    assert image.shape == (8, 8, 3) and image.dtype == np.uint8
    assert max(every.read(i).max() for i in range(20)) == 255


def fake_keras(monkeypatch, name, load_data):
    import keras

    monkeypatch.setattr(getattr(keras.datasets, name), "load_data", load_data)


def test_keras_data_sets(monkeypatch, capsys):
    colour = np.stack([noise(i) for i in range(6)])

    def load_data():
        print("downloading")
        labels = np.arange(6, dtype=np.uint8)[:, np.newaxis]
        return (colour, labels), (255 - colour[:2], labels[:2])

    fake_keras(monkeypatch, "cifar10", load_data)
    train, validation, every = (datasets.open_dataset("cifar10", s) for s in images.SPLITS[:3])
    assert (len(train), len(validation), len(every)) == (6, 2, 8)
    np.testing.assert_array_equal(np.stack(all_images(train)), colour)
    np.testing.assert_array_equal(np.stack(all_images(every)[6:]), 255 - colour[:2])
    assert every.labels.tolist() == [0, 1, 2, 3, 4, 5, 0, 1] and every.num_classes == 10
    assert train.flip and every.where(7) == "cifar10:test[1]"
    assert "downloading" not in capsys.readouterr().out

    fake_keras(monkeypatch, "mnist", lambda: ((colour[..., 0], np.arange(6)),) * 2)
    mnist = datasets.open_dataset("mnist", "train")
    assert mnist.read(1).shape == (9, 7, 3) and not mnist.flip


def test_a_failed_download_is_one_line(monkeypatch):
    def load_data():
        raise Exception("URL fetch failure on https://x.org: None -- no route\nand more")

    fake_keras(monkeypatch, "cifar100", load_data)
    with raises(ValueError, "'cifar100'", "the download failed (URL fetch failure", "no route"):
        datasets.open_dataset("cifar100", "train")


def example(image, label, /, **more):
    """Returns a serialized tf.train.Example in TF-slim's layout."""
    import tensorflow as tf

    def bytes_feature(value):
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))

    features = {
        "image/encoded": bytes_feature(image),
        "image/class/text": bytes_feature(b"tench"),
        "image/object/bbox/xmin": tf.train.Feature(float_list=tf.train.FloatList(value=[0.5, 1])),
        "image/object/bbox/label": tf.train.Feature(int64_list=tf.train.Int64List()),
    }
    if label is not None:
        features["image/class/label"] = tf.train.Feature(
            int64_list=tf.train.Int64List(value=[label])
        )
    for key, value in more.items():
        is_bytes = isinstance(value, bytes)
        features[key] = (
            bytes_feature(value)
            if is_bytes
            else tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))
        )
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()


def write_records(path, examples):
    import tensorflow as tf

    path.parent.mkdir(parents=True, exist_ok=True)
    with tf.io.TFRecordWriter(str(path)) as writer:
        for each in examples:
            writer.write(each)
    return path


def fake_tfds(monkeypatch, splits, features=None):
    """Puts a module in the place of tensorflow_datasets whose one data set has these splits."""
    module = types.ModuleType("tensorflow_datasets")
    module.__spec__ = importlib.machinery.ModuleSpec("tensorflow_datasets", None)
    label = types.SimpleNamespace(names=["cat", "dog", "emu"])
    info = types.SimpleNamespace(
        features=features or {"image": None, "label": label}, splits=splits
    )

    def builder(name, file_format):
        assert file_format == "tfrecord"
        if name != "pets":
            raise ValueError(f"no configuration {name.removeprefix('pets/')}\nfor pets")
        return types.SimpleNamespace(info=info, download_and_prepare=lambda: print("preparing"))

    class DatasetNotFoundError(ValueError):
        pass

    def builder_cls(name):
        if name != "pets":
            raise DatasetNotFoundError(name)

    module.builder, module.builder_cls = builder, builder_cls
    module.core = types.SimpleNamespace(DatasetNotFoundError=DatasetNotFoundError)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", module)


def test_tensorflow_datasets(monkeypatch, tmp_path, capsys):
    pixels = [noise(i) for i in range(5)]
    splits = {}
    for name, chosen in (("train", [0, 1, 2]), ("test", [3, 4])):
        path = write_records(
            tmp_path / f"pets-{name}.tfrecord-00000-of-00001",
            [example(b"", 9, image=encoded(pixels[i]), label=i % 3) for i in chosen],
        )
        splits[name] = types.SimpleNamespace(filepaths=[path])
    fake_tfds(monkeypatch, splits)
    every = datasets.open_dataset("pets", "all")
    np.testing.assert_array_equal(np.stack(all_images(every)), np.stack(pixels))
    assert every.labels.tolist() == [0, 1, 2, 0, 1] and every.class_names == ("cat", "dog", "emu")
    assert datasets.open_dataset("pets", "validation").labels.tolist() == [0, 1]
    assert not capsys.readouterr().out
    with raises(FileNotFoundError, "'dogs'", "nor a name known here", "'digits'"):
        datasets.open_dataset("dogs", "all")
    with raises(ValueError, "'pets/big'", "tensorflow-datasets: no configuration big"):
        datasets.open_dataset("pets/big", "all")
    fake_tfds(monkeypatch, splits, features={"text": None})
    with raises(ValueError, "'pets'", "image and label, has text"):
        datasets.open_dataset("pets", "all")


def test_unknown_names_list_what_is_allowed(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    monkeypatch.setattr(downloads.importlib.util, "find_spec", lambda name: None)
    for name in ("imagenet2012", str(tmp_path / "absent"), "no/such/file.zip", "", "train-*"):
        with raises(
            FileNotFoundError,
            repr(name),
            "'digits'",
            *downloads.KERAS,
            "lowbit[datasets]",
            "labels.csv",
            ".npz",
            "TFRecord",
        ):
            datasets.open_dataset(name, "all")
    with raises(ValueError, "'test'", "train, validation, all"):
        datasets.open_dataset("digits", "test")
    with raises(ValueError, "notes.txt", "not a kind of file", "labels.csv"):
        datasets.open_dataset(write(tmp_path / "notes.txt", "x"), "all")


# Folders and .zip files


def test_class_folders(tmp_path):
    for i in range(30):
        name = ("ant", "bee", "cow")[i % 3]
        write(tmp_path / name / "deeper" / f"{i}.PNG", encoded(noise(i)))
    write(tmp_path / "ant" / "notes.txt", "no image")
    write(tmp_path / "bee" / ".hidden.png", "no image")
    every = datasets.open_dataset(tmp_path, "all")
    assert len(every) == 30 and every.class_names == ("ant", "bee", "cow")
    for i in range(30):
        number = int(pathlib.Path(every.where(i)).stem)
        assert every.labels[i] == number % 3
        np.testing.assert_array_equal(every.read(i), noise(number))
    train, validation = (datasets.open_dataset(tmp_path, s) for s in ("train", "validation"))
    assert len(train) + len(validation) == 30 and contents(train).isdisjoint(contents(validation))


@pytest.mark.parametrize("validation_name", ["val", "validation", "test"])
def test_class_folders_with_splits(tmp_path, validation_name):
    for i, name in enumerate(["ant", "bee", "cow"]):
        write(tmp_path / "train" / name / "0.png", encoded(noise(i)))
    write(tmp_path / validation_name / "cow" / "0.png", encoded(noise(9)))
    write(tmp_path / "extra" / "readme.md", "a folder of no interest")
    train, validation, every = (datasets.open_dataset(tmp_path, s) for s in images.SPLITS[:3])
    assert train.labels.tolist() == [0, 1, 2]
    assert validation.labels.tolist() == [2] and validation.num_classes == 3
    np.testing.assert_array_equal(validation.read(0), noise(9))
    assert every.labels.tolist() == [0, 1, 2, 2]
    np.testing.assert_array_equal(every.read(3), noise(9))

    write(tmp_path / validation_name / "yak" / "0.png", encoded(noise(9)))
    with raises(ValueError, f"{validation_name}/yak", "not a known class", "ant, bee, cow"):
        datasets.open_dataset(tmp_path, "validation")


def test_a_lone_split_folder(tmp_path):
    for i in range(20):
        write(tmp_path / "train" / f"c{i % 2}" / f"{i}.png", encoded(noise(i)))
    assert datasets.open_dataset(tmp_path, "all").num_classes == 2
    assert 0 < len(datasets.open_dataset(tmp_path, "validation")) < 10
    (tmp_path / "train").rename(tmp_path / "val")
    assert len(datasets.open_dataset(tmp_path, "validation")) == 20
    with raises(ValueError, "validation split only"):
        datasets.open_dataset(tmp_path, "train")


@pytest.mark.parametrize("kind", ["folder", "zip", "zip with a folder"])
def test_labels_csv(tmp_path, kind):
    folder = tmp_path / "set"
    pixels = labelled_folder(folder)
    path, between = folder, f"{folder}/"
    if kind != "folder":
        prefix = "inner/" if "with" in kind else ""
        path = zipped(folder, tmp_path / "set.zip", prefix)
        between = f"{path}:{prefix}"
    every = datasets.open_dataset(path, "all")
    np.testing.assert_array_equal(np.stack(all_images(every)), np.stack(pixels))
    np.testing.assert_array_equal(every.labels, np.arange(40) % 4)
    assert every.num_classes == 4 and every.class_names is None
    assert every.where(2) == f"{between}002.png"
    # The same images lie on the same side, however they are stored.
    train, validation = (datasets.open_dataset(path, s) for s in ("train", "validation"))
    direct = datasets.open_dataset(folder, "validation")
    np.testing.assert_array_equal(np.stack(all_images(validation)), np.stack(all_images(direct)))
    assert contents(train) | contents(validation) == contents(every)
    assert contents(train).isdisjoint(contents(validation))
    assert 1 <= len(validation) <= 10


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_pictures_need_no_labels(tmp_path, kind):
    folder = tmp_path / "set"
    pixels = labelled_folder(folder)
    (folder / "labels.csv").unlink()
    write(folder / "notes.txt", "no picture")
    write(folder / "._000.png", "what macOS leaves")
    path = folder if kind == "folder" else zipped(folder, tmp_path / "set.zip", "inner/")
    every = datasets.open_pictures(path)
    np.testing.assert_array_equal(np.stack(all_images(every)), np.stack(pixels))
    assert every.num_classes == 1 and not every.labels.any()
    train, validation = (datasets.open_pictures(path, s) for s in ("train", "validation"))
    assert contents(train) | contents(validation) == contents(every)
    assert contents(train).isdisjoint(contents(validation))
    twice = datasets.open_pictures(f"{path}, {path}")
    assert len(twice) == 80
    if kind == "zip":
        with raises(FileNotFoundError, path, "holds no labels.csv"):
            datasets.open_dataset(path)
        with zipfile.ZipFile(tmp_path / "none.zip", "w") as archive:
            archive.writestr("a.txt", "no picture")
        with raises(ValueError, "none.zip", "holds no images"):
            datasets.open_pictures(tmp_path / "none.zip")


def test_fewer_images_than_asked_for_are_said(caplog):
    with caplog.at_level("WARNING"):
        assert datasets.available(50, fake(50), "--calibration_images") == 50
        assert not caplog.text
        assert datasets.available(60, fake(50), "--calibration_images") == 50
    assert "--calibration_images is 60; fake has 50 images" in caplog.text


def test_labels_csv_with_names_and_byte_order_mark(tmp_path):
    write(tmp_path / "sub" / "a.png", encoded(noise(0)))
    write(tmp_path / "b.png", encoded(noise(1)))
    rows = [["sub/a.png", "zebra"], ["b.png", "a, quoted"], [], ["b.png", "zebra"]]
    write(tmp_path / "labels.csv", b"\xef\xbb\xbf" + labels_csv(rows).encode())
    every = datasets.open_dataset(tmp_path, "all")
    assert every.class_names == ("a, quoted", "zebra") and every.labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize("as_zip", [False, True])
@pytest.mark.parametrize(
    "table, error, words",
    [
        (labels_csv([]), ValueError, ["lists no images"]),
        ("", ValueError, ["must begin with a line 'file,label'"]),
        ("a.png,1\n", ValueError, ["must begin", "'a.png,1'"]),
        (labels_csv([["b.png", 1]]), FileNotFoundError, ["line 2", "no file 'b.png'"]),
        (labels_csv([["a.png", 1], ["a.png", "x"]]), ValueError, ["line 3", "'x'", "integer"]),
        (labels_csv([["a.png", 1], ["a.png", "1.5"]]), ValueError, ["line 3", "'1.5'"]),
        (labels_csv([["a.png", -1]]), ValueError, ["line 2", "negative label -1"]),
        (labels_csv([["a.png"]]), ValueError, ["line 2", "needs a file and a label"]),
        (labels_csv([["a.png", ""]]), ValueError, ["line 2", "needs a file and a label"]),
        (b"file,label\n\xff\xfe,1\n", ValueError, ["not a CSV file in UTF-8"]),
        (b'file,label\n"a.png,1\n', ValueError, ["not a CSV file"]),
    ],
)
def test_bad_labels_csv(tmp_path, as_zip, table, error, words):
    folder = tmp_path / "set"
    write(folder / "a.png", encoded(noise(0)))
    write(folder / "labels.csv", table)
    path = zipped(folder, tmp_path / "set.zip") if as_zip else folder
    with raises(error, "set.zip:labels.csv" if as_zip else folder / "labels.csv", *words):
        datasets.open_dataset(path, "all")


def test_empty_and_damaged_sources(tmp_path):
    with raises(ValueError, "holds no images", "class folders"):
        datasets.open_dataset(tmp_path, "all")
    (tmp_path / "cat").mkdir()
    with raises(ValueError, "holds no images"):
        datasets.open_dataset(tmp_path, "train")

    with raises(ValueError, "bad.zip: not a .zip file"):
        datasets.open_dataset(write(tmp_path / "bad.zip", "PK no"), "all")
    labelled_folder(tmp_path / "set", 2)
    good = zipped(tmp_path / "set", tmp_path / "good.zip")
    with raises(ValueError, "cut.zip: not a .zip file"):
        datasets.open_dataset(write(tmp_path / "cut.zip", good.read_bytes()[:300]), "all")
    (tmp_path / "set" / "labels.csv").unlink()
    with raises(FileNotFoundError, "holds no labels.csv"):
        datasets.open_dataset(zipped(tmp_path / "set", tmp_path / "bare.zip"), "all")

    data = bytearray(good.read_bytes())
    place = data.index(b"000.png") + 40
    data[place : place + 8] = bytes(8)
    damaged = datasets.open_dataset(write(tmp_path / "damaged.zip", bytes(data)), "all")
    with raises(ValueError, "damaged.zip:000.png: damaged"):
        damaged.read(0)
    assert damaged.read(1).shape == (9, 7, 3)


@pytest.mark.parametrize("as_zip", [False, True])
def test_an_unreadable_image_is_named(tmp_path, as_zip):
    folder = tmp_path / "set"
    labelled_folder(folder, 3)
    write(folder / "001.png", "no image")
    path = zipped(folder, tmp_path / "set.zip") if as_zip else folder
    dataset = datasets.open_dataset(path, "all")
    name = "set.zip:001.png" if as_zip else folder / "001.png"
    with raises(ValueError, name, "not an image"):
        dataset.read(1)


def test_a_zip_is_read_by_many_threads(tmp_path):
    pixels = labelled_folder(tmp_path / "set")
    dataset = datasets.open_dataset(zipped(tmp_path / "set", tmp_path / "set.zip"), "all")
    order = np.random.default_rng(0).integers(0, 40, 400)
    read = pipeline.batches(
        dataset, input_size=(9, 7), batch_size=400, preprocess=RAW, indices=order, threads=8,
        pixels=True,
    )  # fmt: skip
    x, _ = next(read)
    read.close()
    np.testing.assert_array_equal(x, np.stack(pixels)[order])


# Splits by content


def test_copies_never_straddle_the_split(tmp_path):
    for i in range(60):
        write(tmp_path / f"c{i % 7}" / f"{i}.png", encoded(noise(i % 20)))
    train, validation = (datasets.open_dataset(tmp_path, s) for s in ("train", "validation"))
    assert len(train) + len(validation) == 60
    assert contents(train).isdisjoint(contents(validation))


def test_an_image_stays_on_its_side_when_the_source_grows():
    few, many = fake(500), fake(1000)
    chosen = [
        images.split_by_content(d, lambda i: i * 2654435761, "validation") for d in (few, many)
    ]
    sides = [{d.where(i) for i in range(len(d))} for d in chosen]
    assert sides[0] <= sides[1]
    assert 80 <= len(chosen[1]) <= 120


def test_no_side_is_empty_unless_there_is_one_content():
    for checksums in ([0, 10, 20], [1, 11, 21]):  # all of them in validation; none of them
        for split in ("train", "validation"):
            assert len(images.split_by_content(fake(3), checksums.__getitem__, split))
    assert len(images.split_by_content(fake(3), lambda i: 0, "train")) == 3
    with raises(ValueError, "fake", "validation split is empty"):
        images.split_by_content(fake(3), lambda i: 0, "validation")


# .npz


def pixels_and_labels(count, seed=0, shape=(9, 7, 3)):
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (count, *shape), np.uint8), np.arange(count) % 3


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("shape", [(9, 7, 3), (9, 7, 1), (9, 7)])
def test_npz_of_pixels(tmp_path, save, shape):
    x, y = pixels_and_labels(40, shape=shape)
    path = tmp_path / "set.npz"
    save(path, x=x, y=y.astype(np.uint8))
    train, validation, every = (datasets.open_dataset(path, s) for s in images.SPLITS[:3])
    expected = np.broadcast_to(x.reshape(40, 9, 7, -1), (40, 9, 7, 3))
    np.testing.assert_array_equal(np.stack(all_images(every)), expected)
    np.testing.assert_array_equal(every.labels, y)
    assert len(train) + len(validation) == 40 and contents(train).isdisjoint(contents(validation))


@pytest.mark.parametrize("names", [("", "_test"), ("_train", "_test"), ("_train", "_val")])
def test_npz_with_splits(tmp_path, names):
    path = tmp_path / "set.npz"
    (x, y), (x_test, y_test) = pixels_and_labels(7), pixels_and_labels(2, seed=1)
    arrays = {f"x{names[0]}": x, f"y{names[0]}": y, f"x{names[1]}": x_test, f"y{names[1]}": y_test}
    np.savez(path, classes=["a", "b", "c"], **arrays)
    validation = datasets.open_dataset(path, "validation")
    np.testing.assert_array_equal(np.stack(all_images(validation)), x_test)
    assert validation.class_names == ("a", "b", "c")
    assert len(datasets.open_dataset(path, "train")) == 7
    assert len(datasets.open_dataset(path, "all")) == 9


def jpeg_arrays(count):
    files = [encoded(noise(i), "JPEG") for i in range(count)]
    return {
        "train_jpeg": np.frombuffer(b"".join(files), np.uint8),
        "train_end": np.cumsum([len(file) for file in files]),
        "train_label": np.arange(count, dtype=np.uint8) % 2,
        "classes": np.array(["cat", "dog"]),
    }


def test_npz_of_jpegs(tmp_path):
    path = tmp_path / "set.npz"
    train = jpeg_arrays(5)
    test = {key.replace("train", "test"): value for key, value in jpeg_arrays(2).items()}
    np.savez(path, **train | test)
    every = datasets.open_dataset(path, "all")
    assert len(every) == 7 and every.class_names == ("cat", "dog")
    for i in range(7):
        expected = images.decode(encoded(noise(i % 5), "JPEG"), "x")
        np.testing.assert_array_equal(every.read(i), expected)
    assert every.where(6).endswith("set.npz:test_jpeg[1]")
    np.savez(path, **train)
    assert len(datasets.open_dataset(path, "train")) + len(
        datasets.open_dataset(path, "validation")
    ) == 5  # fmt: skip


@pytest.mark.parametrize(
    "change, words",
    [
        ({"y": np.arange(4) - 1}, ["x[0]", "label -1"]),
        ({"y": np.arange(4) / 2}, ["y must hold n integers", "float64"]),
        ({"y": np.eye(4, dtype=int)}, ["y must hold n integers", "(4, 4)"]),
        ({"y": np.arange(3)}, ["has 4 images but 3 labels"]),
        ({"y": np.zeros(0, int)}, ["y is empty"]),
        ({"x": np.zeros((4, 8, 8, 3), np.float32)}, ["uint8", "float32"]),
        ({"x": np.zeros((4, 8, 8, 2), np.uint8)}, ["uint8", "(4, 8, 8, 2)"]),
        ({"x": np.array([None] * 4)}, ["array x is unreadable"]),
        ({"classes": ["a", "b"]}, ["x[2]", "label 2 is not one of 0..1"]),
    ],
)
def test_bad_npz(tmp_path, change, words):
    arrays = {"x": np.zeros((4, 8, 8, 3), np.uint8), "y": np.arange(4)}
    np.savez(tmp_path / "set.npz", **arrays | change)
    with raises(ValueError, "set.npz", *words):
        datasets.open_dataset(tmp_path / "set.npz", "all")


def test_bad_npz_files(tmp_path):
    path = tmp_path / "set.npz"
    with raises(ValueError, "set.npz: not an .npz file"):
        datasets.open_dataset(write(path, "hello"), "all")
    np.savez(path, images=[1])
    with raises(ValueError, "has the arrays images", "x,y;", "train_jpeg"):
        datasets.open_dataset(path, "all")
    arrays = jpeg_arrays(3)
    np.savez(path, **arrays | {"train_end": arrays["train_end"] - 1})
    with raises(ValueError, "train_end must rise to"):
        datasets.open_dataset(path, "all")
    np.savez(path, **arrays | {"train_end": arrays["train_end"][:2]})
    with raises(ValueError, "train_end must hold 3 integers"):
        datasets.open_dataset(path, "all")


# TFRecords


def slim(path, pixels, first=1):
    return write_records(
        path, [example(encoded(image, "JPEG"), i % 3 + first) for i, image in enumerate(pixels)]
    )


def test_tfrecords_in_the_layout_of_slim(tmp_path):
    pixels = [noise(i, 20, 30) for i in range(12)]
    slim(tmp_path / "train-00000-of-00002", pixels[:3])
    slim(tmp_path / "train-00001-of-00002", pixels[3:9])
    slim(tmp_path / "validation-00000-of-00001", pixels[9:])
    train, validation, every = (datasets.open_dataset(tmp_path, s) for s in images.SPLITS[:3])
    assert train.labels.tolist() == [0, 1, 2] * 3 and train.num_classes == 3
    assert validation.labels.tolist() == [0, 1, 2]
    for i in np.random.default_rng(0).permutation(12):  # at random
        expected = images.decode(encoded(pixels[i], "JPEG"), "x")
        np.testing.assert_array_equal(every.read(int(i)), expected)
    assert every.where(4) == f"{tmp_path}/train-00001-of-00002:record 1"
    part = datasets.open_dataset(str(tmp_path / "validation-*"), "validation")
    np.testing.assert_array_equal(part.read(0), validation.read(0))
    with raises(ValueError, "validation split only"):
        datasets.open_dataset(str(tmp_path / "validation-*"), "train")

    (tmp_path / "train-00001-of-00002").unlink()
    with raises(FileNotFoundError, "has 1 of the 2 files train-?????-of-00002"):
        datasets.open_dataset(tmp_path, "train")


def test_tfrecords_without_splits(tmp_path):
    path = slim(tmp_path / "birds.tfrecord", [noise(i % 15, 20, 30) for i in range(30)])
    train, validation = (datasets.open_dataset(path, s) for s in ("train", "validation"))
    assert len(train) + len(validation) == 30
    assert contents(train).isdisjoint(contents(validation))
    assert len(datasets.open_dataset(tmp_path, "all")) == 30


def test_bad_tfrecords(tmp_path):
    image = encoded(noise(0))
    path = tmp_path / "x.tfrecord"
    write_records(path, [example(image, 1), example(image, 0)])
    with raises(ValueError, "x.tfrecord:record 1: label 0, but the first class is 1"):
        datasets.open_dataset(path, "all")
    write_records(path, [example(image, -5)])
    with raises(ValueError, "x.tfrecord:record 0: label -5"):
        datasets.open_dataset(path, "all")
    write_records(path, [example(image, 1), example(image, None)])
    with raises(
        ValueError, "x.tfrecord:record 1", "'image/class/label'", "it has image/class/text"
    ):
        datasets.open_dataset(path, "all")
    write_records(path, [b"\x0a\x7fno"])
    with raises(ValueError, "x.tfrecord:record 0", "it has none"):
        datasets.open_dataset(path, "all")
    write_records(path, [example(image, 1)])
    for content in (path.read_bytes()[:-1], b"short", struct.pack("<Q", 1 << 62) + bytes(90)):
        with raises(ValueError, "cut.tfrecord:record 0: not a TFRecord file, or cut short"):
            datasets.open_dataset(write(tmp_path / "cut.tfrecord", content), "all")
    with raises(ValueError, "empty.tfrecord: holds no images"):
        datasets.open_dataset(write(tmp_path / "empty.tfrecord", b""), "all")
    write_records(path, [example(b"no image", 1)])
    with raises(ValueError, "x.tfrecord:record 0: not an image"):
        datasets.open_dataset(path, "all").read(0)


# The type


def test_dataset_checks_its_labels():
    def make(labels, classes=3):
        return datasets.Dataset(
            "set", np.array(labels), classes, None, noise, lambda i: f"f{i}.png"
        )

    assert len(make([0, 2])) == 2
    with raises(ValueError, "f1.png: label -1"):
        make([0, -1])
    with raises(ValueError, "f1.png: label 3 is not one of 0..2"):
        make([0, 3])
    with raises(ValueError, "set: holds no images"):
        make(np.zeros(0, np.int64))
    with raises(ValueError, "set: labels must be int64"):
        make([0.5])
    datasets.check_labels(make([0, 2]), 3)
    with raises(ValueError, "f1.png: label 2, but the model has 2 classes (0..1)"):
        datasets.check_labels(make([0, 2]), 2)


def test_data_is_light_to_import():
    code = (
        "import sys; from lowbit.data import pipeline, datasets, preprocess;"
        "print([m for m in ('tensorflow', 'keras', 'sklearn') if m in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        cwd=pathlib.Path(__file__).parents[1],
    )  # fmt: skip
    assert run.stdout.strip() == "[]"


# Batches


@pytest.mark.parametrize("channels", [1, 3])
def test_batches_are_pillows_resize_in_order(channels):
    dataset = fake(10, read=lambda i: noise(i, 20 + i, 30))
    options = dict(input_size=(12, 16), batch_size=4, preprocess=preprocess.parse("tf"))
    read = list(pipeline.batches(dataset, channels=channels, threads=3, **options))
    assert [len(labels) for _, labels in read] == [4, 4, 2]
    x = np.concatenate([x for x, _ in read])
    labels = np.concatenate([labels for _, labels in read])
    assert x.dtype == np.float32 and x.shape == (10, 12, 16, channels) and labels.dtype == np.int64
    np.testing.assert_array_equal(labels, dataset.labels)
    for i in range(10):
        picture = Image.fromarray(noise(i, 20 + i, 30))
        picture = picture.convert("L") if channels == 1 else picture
        resized = np.asarray(picture.resize((16, 12), Image.BILINEAR)).reshape(12, 16, channels)
        np.testing.assert_array_equal(x[i], preprocess.apply(resized, preprocess.parse("tf")))


@pytest.mark.parametrize("part", [1.0, 0.875, 0.5, 0.01])
def test_batches_are_cropped_as_tensorflow_crops(part):
    import tensorflow as tf

    shapes = [(20, 30), (17, 33), (299, 299), (1, 1)]
    dataset = fake(4, read=lambda i: noise(i, *shapes[i]))
    options = dict(input_size=(12, 16), batch_size=4, preprocess=RAW, crop=part)
    ((x, _),) = pipeline.batches(dataset, **options)
    for i, shape in enumerate(shapes):
        cropped = tf.image.central_crop(noise(i, *shape), part).numpy()
        resized = Image.fromarray(cropped).resize((16, 12), Image.BILINEAR)
        np.testing.assert_array_equal(x[i], np.asarray(resized, np.float32))


def test_batches_of_chosen_images_and_of_pixels():
    options = dict(input_size=(6, 8), preprocess=RAW)
    read = pipeline.batches(
        fake(), batch_size=100, indices=np.array([7, 3, 7]), pixels=True, **options
    )
    ((x, labels),) = read
    assert (
        x.dtype == np.uint8 and x[:, 0, 0, 0].tolist() == [7, 3, 7] and labels.tolist() == [2, 3, 2]
    )
    assert not list(pipeline.batches(fake(), batch_size=3, indices=np.array([], int), **options))
    with raises(ValueError, "fake: indices from 0 to 50 of 50 images"):
        pipeline.batches(fake(), batch_size=3, indices=np.arange(51), **options)


@pytest.mark.parametrize(
    "change",
    [
        {"input_size": (0, 8)},
        {"batch_size": 0},
        {"threads": -1},
        {"prefetch": -1},
        {"channels": 2},
        {"crop": 0.0},
        {"crop": 1.01},
        {"crop": float("nan")},
    ],
)
def test_batches_refuse_at_once(change):
    with pytest.raises(ValueError, match="at least|channels|at most 1"):
        pipeline.batches(fake(), **dict(input_size=(6, 8), batch_size=4, preprocess=RAW) | change)
    with raises(ValueError, "'torch'", "1 channel"):
        pipeline.batches(
            fake(), input_size=(6, 8), batch_size=4, channels=1,
            preprocess=preprocess.parse("torch"),
        )  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
def test_reading_ahead_is_bounded(training):
    lock, begun, most = threading.Lock(), itertools.count(1), 0
    consumed = 0

    def read(i):
        nonlocal most
        with lock:
            most = max(most, next(begun) - consumed)
        return np.zeros((4, 4, 3), np.uint8)

    dataset = fake(5000, read=read)
    options = dict(input_size=(4, 4), batch_size=5, preprocess=RAW, threads=3, prefetch=7)
    if training:
        stream = pipeline.train_batches(dataset, seed=0, **options)
    else:
        stream = pipeline.batches(dataset, **options)
    for _, labels in itertools.islice(stream, 60):
        time.sleep(0.001)  # the pool would run away here
        consumed += len(labels)
    stream.close()
    # 3 at work, 7 ahead, and the batch of 5 that is being put together.
    assert 3 < most <= 3 + 7 + 5


def data_threads():
    return [t for t in threading.enumerate() if t.name.startswith("lowbit-data")]


def test_threads_end_with_the_iterator():
    options = dict(input_size=(6, 8), batch_size=4, preprocess=RAW, threads=2)
    stream = pipeline.train_batches(fake(), seed=0, **options)
    assert not data_threads()
    next(stream)
    assert data_threads()
    stream.close()
    assert not data_threads()
    stream = pipeline.batches(fake(), **options)
    next(stream)
    del stream
    gc.collect()
    assert not data_threads()
    list(pipeline.batches(fake(), **options))
    assert not data_threads()


def test_an_error_while_reading_reaches_the_consumer(tmp_path):
    labelled_folder(tmp_path, 20)
    write(tmp_path / "013.png", "no image")
    dataset = datasets.open_dataset(tmp_path, "all")
    options = dict(input_size=(6, 8), batch_size=4, preprocess=RAW)
    stream = pipeline.batches(dataset, **options)
    for _ in range(3):
        next(stream)
    with raises(ValueError, tmp_path / "013.png", "not an image"):
        next(stream)
    with raises(ValueError, tmp_path / "013.png"):
        list(itertools.islice(pipeline.train_batches(dataset, seed=0, **options), 5))
    assert not data_threads()


def test_calibration_batches():
    options = dict(input_size=(6, 8), batch_size=4, preprocess=RAW)

    def chosen(count, **more):
        read = pipeline.calibration_batches(fake(), count, **options, **more)
        return np.concatenate([x[:, 0, 0, 0] for x, _ in read]).astype(int).tolist()

    assert len(set(chosen(10))) == 10
    assert chosen(10) == chosen(10) == chosen(20)[:10]
    assert chosen(10) != chosen(10, seed=1)
    assert sorted(chosen(1000)) == list(range(50))
    with raises(ValueError, "at least 1 image, not 0"):
        chosen(0)


# Training batches

TRAIN = dict(input_size=(6, 8), batch_size=8, preprocess=preprocess.parse("tf"))


def steps(dataset, first, count, **more):
    stream = pipeline.train_batches(dataset, **TRAIN | {"seed": 3, "start_step": first} | more)
    with contextlib.closing(stream):
        return list(itertools.islice(stream, count))


def noisy():
    return fake(45, read=lambda i: noise(i, 12, 14))


@pytest.mark.parametrize("start", [1, 5, 6, 17])
def test_a_resumed_run_gets_the_same_batches(start):
    whole = steps(noisy(), 0, 20, threads=4)
    for (x, labels), (x_again, labels_again) in zip(
        whole[start:], steps(noisy(), start, 20 - start, threads=1, prefetch=0), strict=True
    ):
        np.testing.assert_array_equal(x, x_again)
        np.testing.assert_array_equal(labels, labels_again)
    assert (steps(noisy(), 0, 1, seed=4)[0][0] != whole[0][0]).any()


@pytest.mark.parametrize("count", [45, 3])
def test_every_epoch_holds_each_image_once(count):
    read = steps(fake(count), 0, 18, augment=False, preprocess=RAW)
    order = np.concatenate([x[:, 0, 0, 0] for x, _ in read]).astype(int)
    epochs = order[: len(order) // count * count].reshape(-1, count)
    assert len(epochs) >= 3
    for epoch in epochs:
        assert sorted(epoch) == list(range(count))
    assert len({tuple(epoch) for epoch in epochs}) > 1
    labels = np.concatenate([labels for _, labels in read])
    np.testing.assert_array_equal(labels, order % 5)


def test_augmentation_differs_between_epochs_and_can_be_off():
    one = fake(1, read=lambda i: noise(0, 30, 40))
    ((x, _),) = steps(one, 0, 1)
    assert len({image.tobytes() for image in x}) == 8
    ((x, _),) = steps(one, 0, 1, augment=False)
    assert len({image.tobytes() for image in x}) == 1


def test_random_crop_stays_in_its_bounds():
    image = noise(0, 60, 80)
    random = np.random.default_rng(0)
    shapes = np.array([augment.random_crop(image, random).shape[:2] for _ in range(500)])
    area, ratio = shapes.prod(1) / image[..., 0].size, shapes[:, 1] / shapes[:, 0] / (80 / 60)
    # Rounding to pixels moves a side by half a pixel, and cutting takes area away.
    assert 0.45 < area.min() and area.max() <= 1
    assert 0.7 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.4
    assert augment.random_crop(noise(0, 1, 1), random).shape == (1, 1, 3)


def test_random_shift_moves_and_fills_with_black():
    image = np.full((8, 16, 3), 9, np.uint8)
    image[4, 8] = 200
    random = np.random.default_rng(0)
    found = set()
    for _ in range(200):
        moved = augment.random_shift(image, random)
        (row,), (column,) = np.nonzero(moved[..., 0] == 200)
        down, right = row - 4, column - 8
        assert abs(down) <= 1 and abs(right) <= 2
        assert (moved == 0).all(-1).sum() == 128 - (8 - abs(down)) * (16 - abs(right))
        found.add((down, right))
    assert len(found) == 3 * 5
    assert image[4, 8, 0] == 200


def test_what_must_not_be_mirrored_is_not():
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, 2] = 255  # left of the middle by 1.5 pixels, and a shift moves it by 1
    letters = fake(40, read=lambda i: image, flip=False)
    options = TRAIN | {"input_size": (8, 8), "preprocess": RAW}
    for x, _ in steps(letters, 0, 10, **options):
        assert (x[..., 0].sum(1).argmax(1) <= 3).all()
    mirrored = [x for x, _ in steps(fake(40, read=lambda i: image), 0, 10, **options)]
    left = np.concatenate(mirrored)[..., 0].sum(1).argmax(1) <= 3
    assert 0.25 < left.mean() < 0.75
    assert augment.choose(True, letters) == "shift"
    with raises(ValueError, "'crop_flip'", "fake", "when mirrored"):
        pipeline.train_batches(letters, seed=0, augment="crop_flip", **TRAIN)
    with raises(ValueError, "'zoom'", "crop_flip"):
        pipeline.train_batches(letters, seed=0, augment="zoom", **TRAIN)
    with raises(ValueError, "must not be negative"):
        pipeline.train_batches(letters, seed=-1, **TRAIN)


# Real images


def real(name):
    folder = os.environ.get("LOWBIT_DATA")
    path = pathlib.Path(folder or "", "images", name)
    if not folder or not path.exists():
        pytest.skip(f"{name} is absent (LOWBIT_DATA)")
    return path


@pytest.mark.parametrize(
    "name, counts, classes, shape",
    [
        ("nips17_dev_500.zip", (439, 61), 996, (299, 299, 3)),
        ("imagenet_calibration_1000.zip", (893, 107), 1000, None),
        ("imagenette_train_5000.zip", (4497, 503), 702, None),
        ("cifar10_jpeg.npz", (50000, 10000), 10, (32, 32, 3)),
    ],
)
def test_real_images(name, counts, classes, shape):
    path = real(name)
    train, validation, every = (datasets.open_dataset(path, s) for s in images.SPLITS[:3])
    assert (len(train), len(validation)) == counts and len(every) == sum(counts)
    assert every.num_classes == classes
    datasets.check_labels(every, 10 if name.startswith("cifar") else 1000)
    image = every.read(len(every) - 1)
    assert image.dtype == np.uint8 and image.shape == (shape or image.shape)
    read = pipeline.calibration_batches(
        every, 48, input_size=(224, 224), batch_size=16, preprocess=preprocess.parse("tf")
    )
    x = np.concatenate([x for x, _ in read])
    assert x.shape == (48, 224, 224, 3) and abs(x).max() == 1 and abs(x.mean()) < 0.3


# ------------------------------------------------------------------------------------------------
# Two data sets of one task


def test_calibration_never_draws_what_a_source_sets_apart_for_measuring():
    whole, own = datasets.open_dataset("digits", "all"), datasets.open_to_calibrate("digits")
    assert len(own) == len(datasets.open_dataset("digits", "train")) < len(whole)
    assert own.num_classes == 1


@pytest.mark.parametrize("name", ["digits", "folder"])
def test_train_whole_is_the_own_training_split_or_everything(tmp_path, name):
    if name == "folder":
        for index in range(12):
            picture = np.full((4, 4, 3), index, np.uint8)
            (tmp_path / "a").mkdir(exist_ok=True)
            Image.fromarray(picture).save(tmp_path / "a" / f"{index}.png")
        assert len(datasets.open_dataset(tmp_path, "train")) < 12
        assert len(datasets.open_dataset(tmp_path, "train_whole")) == 12
    else:
        whole, train = (datasets.open_dataset(name, s) for s in ("train_whole", "train"))
        np.testing.assert_array_equal(whole.labels, train.labels)


def test_labels_follow_the_classes_names_not_their_number():
    def named(*names):
        return images.Dataset(
            "set", np.arange(len(names)), len(names), names, lambda i: np.zeros((1, 1, 3), np.uint8)
        )

    fewer = datasets.renumbered(named("b", "c"), ["a", "b", "c"])
    assert fewer.labels.tolist() == [1, 2]
    assert fewer.num_classes == 3
    same = named("a", "b")
    assert datasets.renumbered(same, ("a", "b")) is same
    assert datasets.renumbered(same, None) is same
    with pytest.raises(ValueError, match="class 'x' is none of the 2 classes"):
        datasets.renumbered(named("a", "x"), ["a", "b"])
