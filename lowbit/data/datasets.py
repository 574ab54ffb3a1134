"""`open_dataset`: what --dataset names, opened."""

import dataclasses
import glob
import os
import re

import numpy as np
from absl import logging

from lowbit.data import arrays, downloads, folders, images, tfrecords

Dataset = images.Dataset
check_labels = images.check_labels
renumbered = images.renumbered

ALLOWED = (
    f"'digits' (embedded), {', '.join(downloads.KERAS)} (downloaded), another name of "
    "tensorflow-datasets (pip install 'lowbit[datasets]'), or a path: a folder of class folders, a "
    "folder or .zip of images with labels.csv, an .npz, TFRecord files"
)


def open_dataset(name_or_path: str, split: str = "all") -> Dataset:
    """Returns the images that `name_or_path` means; nothing is decoded before it is read.

    Args:
        name_or_path: `digits`; a name of keras.datasets or tensorflow-datasets; or the path of a
            folder, a .zip, an .npz, a TFRecord file or a pattern for such ("imagenet/train-*").
            A path that is also a name is written "./digits".
        split: "train", "validation", "all" or "train_whole".  A source with splits of its own
            keeps them; any other gives 90% and 10% by content (`images.split_by_content`), or all
            of it as "train_whole".

    Raises ValueError or FileNotFoundError with one line that names what is wrong and where.
    """
    if split not in images.SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(images.SPLITS)}")
    name_or_path = os.fspath(name_or_path)
    if name_or_path == "digits":
        return arrays.open_digits(split)
    if name_or_path in downloads.KERAS:
        return downloads.open_keras(name_or_path, split)
    path = os.path.expanduser(name_or_path)
    if os.path.exists(path) or glob.glob(path):
        return _open_path(path, split)
    looks_like_name = re.fullmatch(r"[a-z][a-z0-9_]*([/:][\w.]+)*", name_or_path)
    if looks_like_name and downloads.is_in_tfds(name_or_path):
        return downloads.open_tfds(name_or_path, split)
    raise FileNotFoundError(
        f"data set {name_or_path!r}: no such file or folder, nor a name known here; give {ALLOWED}"
    )


def open_pictures(names_or_paths: str, split: str = "all") -> Dataset:
    """Returns images without their labels, from one source or several with commas between them.

    Args:
        names_or_paths: as in `open_dataset`, or folders and .zip files of images at any depth.
        split: as in `open_dataset`, of each.

    Raises as `open_dataset`.
    """
    joined = None
    for one in os.fspath(names_or_paths).split(","):
        one = one.strip()
        folder = os.path.expanduser(one)
        if os.path.isdir(folder) and not tfrecords.find_files(folder):
            found = folders.open_pictures(folder, split)
        elif folder.lower().endswith(".zip") and os.path.isfile(folder):
            found = folders.open_zip(folder, split, labels_needed=False)
        else:
            found = open_dataset(one, split)
        if joined is not None:
            found = images.join(joined, found, f"{joined.name}, {found.name}")
        joined = found
    return without_labels(joined)


def open_to_calibrate(names_or_paths: str) -> Dataset:
    """Returns images without labels to calibrate on: of a source with splits those for training.

    Args and errors as of `open_pictures`; a source that has nothing to train on gives what it has.
    """
    try:
        return open_pictures(names_or_paths, "train_whole")
    except ValueError:
        return open_pictures(names_or_paths)


def without_labels(dataset: Dataset) -> Dataset:
    """Returns the images as of one class without a name."""
    nothing = np.zeros(len(dataset), np.int64)
    return dataclasses.replace(dataset, labels=nothing, num_classes=1, class_names=None)


def available(count: int, dataset: Dataset, flag: str) -> int:
    """Returns how many images there are to take, at most `count`; says so where they are fewer."""
    if len(dataset) < count:
        logging.warning("%s is %d; %s has %d images", flag, count, dataset.name, len(dataset))
    return min(count, len(dataset))


# Data sets known by name whose images for measuring are a split of their own.
_MEASURED_ON_VALIDATION = (
    "digits",
    "mnist",
    "fashion_mnist",
    "cifar10",
    "cifar100",
    "imagenet2012",
)


def default_split(name_or_path: str) -> str:
    """Returns which images a tool measures on where no --split is given."""
    return "validation" if name_or_path in _MEASURED_ON_VALIDATION else "all"


def _open_path(path: str, split: str) -> Dataset:
    if path.lower().endswith(".zip"):
        return folders.open_zip(path, split)
    if path.lower().endswith(".npz"):
        return arrays.open_npz(path, split)
    records = tfrecords.find_files(path)
    if os.path.isdir(path) and not records:
        return folders.open_folder(path, split)
    named = [file for file in records if re.search(r"-of-\d{5}$|\.tfrecord", file)]
    if not named or named != records:
        raise ValueError(f"data set {path!r}: not a kind of file that is read; give {ALLOWED}")
    return tfrecords.open_slim(path, records, split)
