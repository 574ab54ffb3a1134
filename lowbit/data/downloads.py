"""Data sets by name: keras.datasets, and tensorflow-datasets for every other name."""

import contextlib
import functools
import importlib.util
import sys

import numpy as np

from lowbit.data import arrays, images, tfrecords

KERAS = {"mnist": 10, "fashion_mnist": 10, "cifar10": 10, "cifar100": 100}  # number of classes
# A mirrored digit or letter is another one, or none.
NO_FLIP = ("digits", "mnist", "qmnist", "emnist", "kmnist", "svhn_cropped", "omniglot")


def open_keras(name: str, split: str) -> images.Dataset:
    """Returns one of KERAS through keras.datasets, which downloads it once (12 to 170 MB).

    Keras' test split is "validation".  Keras decodes the whole set (at most 180 MB, while this
    function runs); it then lies on disk.

    Raises ValueError in one line where the download fails.
    """
    import keras  # 3 s with TensorFlow

    try:
        # Keras' progress bar goes to stdout, which is kept for a tool's result.
        with contextlib.redirect_stdout(sys.stderr):
            train, test = getattr(keras.datasets, name).load_data()
    except Exception as error:  # get_file raises Exception itself
        raise ValueError(
            f"data set {name!r}: the download failed ({_first_line(error)}); 'digits' needs none"
        ) from error

    def opener(part: str, x: np.ndarray, y: np.ndarray):
        return lambda: arrays.from_pixels(
            f"{name}:{part}",
            arrays.spill(x),
            y.reshape(-1).astype(np.int64),
            KERAS[name],
            flip=name not in NO_FLIP,
        )

    return images.pick_split(name, split, opener("train", *train), opener("test", *test))


def is_in_tfds(name: str) -> bool:
    """Returns whether tensorflow-datasets is installed and knows `name` ("mnist", "mnist/a:1.0.0").

    Takes seconds, for it is imported.
    """
    if importlib.util.find_spec("tensorflow_datasets") is None:
        return False
    import tensorflow_datasets as tfds

    try:
        tfds.builder_cls(_plain(name))
    except tfds.core.DatasetNotFoundError:
        return False
    return True


def _plain(name: str) -> str:
    """Returns `name` without configuration and version."""
    return name.split("/")[0].split(":")[0]


def open_tfds(name: str, split: str) -> images.Dataset:
    """Returns a data set of tensorflow-datasets that has the features `image` and `label`.

    It is prepared as TFRecord files (tensorflow-datasets does so once, under its own data folder),
    and these are read directly: its own reader streams in order and cannot give image i.  Its split
    "validation", or else "test", is our "validation".

    Call it where `is_in_tfds(name)`.  Raises ValueError in one line where tensorflow-datasets
    cannot download the set or does not know its configuration, or it has no image and label.
    """
    import tensorflow_datasets as tfds

    try:
        with contextlib.redirect_stdout(sys.stderr):
            builder = tfds.builder(name, file_format="tfrecord")
            builder.download_and_prepare()
    except Exception as error:  # AssertionError (manual download), ValueError, and more
        raise ValueError(f"data set {name!r}: tensorflow-datasets: {_first_line(error)}") from error
    features, splits = builder.info.features, builder.info.splits
    if not {"image", "label"} <= set(features):
        raise ValueError(
            f"data set {name!r}: needs the features image and label, has {', '.join(features)}"
        )

    def opener(*names: str):
        for part in names:
            if part in splits:
                return functools.partial(
                    tfrecords.open_files,
                    f"{name}:{part}",
                    [str(path) for path in splits[part].filepaths],
                    "image",
                    "label",
                    first_label=0,
                    class_names=tuple(features["label"].names),
                    flip=_plain(name) not in NO_FLIP,
                )

    return images.pick_split(name, split, opener("train"), opener("validation", "test"))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
