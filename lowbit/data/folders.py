"""Images that lie as files: class folders, and a folder or .zip with a labels.csv."""

import csv
import functools
import io
import os
import posixpath
import re
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable

import numpy as np

from lowbit.data import images

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
LABELS = "labels.csv"
VALIDATION_FOLDERS = ("val", "validation", "test")  # the first that is there


def open_folder(path: str, split: str) -> images.Dataset:
    """Returns a folder of images with labels.csv, or a folder of class folders.

    Class folders are numbered in the sorted order of their names ("10" before "2", as Keras and
    torchvision do); images are found at any depth in them.  Where the folder holds train/ and one
    of val/, validation/, test/, or nothing but such folders, these are the splits, and each holds
    the class folders; validation classes take their numbers from train/.

    Raises ValueError or FileNotFoundError naming the file or folder that is at fault.
    """
    if os.path.isfile(os.path.join(path, LABELS)):
        return _open_labelled_folder(path, split)
    folders = _subfolders(path)
    train = "train" if "train" in folders else None
    validation = next((each for each in VALIDATION_FOLDERS if each in folders), None)
    only_splits = set(folders) <= {"train", *VALIDATION_FOLDERS}
    if not (train and validation or folders and only_splits):
        return images.split_by_content(*_class_folders(path, None), split)
    classes = _subfolders(os.path.join(path, train)) if train else None

    def opener(folder: str | None):
        if folder is not None:
            return functools.partial(_class_folders, os.path.join(path, folder), classes)

    return images.pick_split(path, split, opener(train), opener(validation))


def _subfolders(path: str) -> list[str]:
    with os.scandir(path) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _image_files(folder: str) -> list[str]:
    """Returns the paths of the image files in `folder`, at any depth, sorted."""
    return sorted(
        os.path.join(parent, file)
        for parent, _, files in os.walk(folder)
        for file in files
        if _is_image(file)
    )


def _is_image(path: str) -> bool:
    return path.lower().endswith(SUFFIXES) and not posixpath.basename(path).startswith(".")


def _class_folders(path: str, classes: list[str] | None):
    """Returns (data set, checksum) of one folder of class folders, numbered as in `classes`."""
    found = _subfolders(path)
    classes = found if classes is None else classes
    unknown = sorted(set(found) - set(classes))
    if unknown:
        raise ValueError(
            f"{os.path.join(path, unknown[0])}: {unknown[0]!r} is not a known class; "
            f"the training folder has {len(classes)}: {_some(classes)}"
        )
    files, labels = [], []
    for name in found:
        members = _image_files(os.path.join(path, name))
        files += members
        labels += [classes.index(name)] * len(members)
    if not files:
        raise ValueError(
            f"{path}: holds no images: neither a {LABELS} nor class folders with files of "
            f"{' '.join(SUFFIXES)}"
        )
    return _from_files(path, files, np.array(labels, np.int64), tuple(classes))


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def _from_files(path: str, files: list[str], labels: np.ndarray, class_names: tuple | None):
    """Returns (data set, checksum) of image files; `labels` is int64 (len(files),)."""
    dataset = images.Dataset(
        path,
        labels,
        len(class_names) if class_names else int(labels.max()) + 1,
        class_names,
        read=lambda i: images.decode(_file_bytes(files[i]), files[i]),
        where=lambda i: files[i],
    )
    return dataset, lambda i: zlib.crc32(_file_bytes(files[i]))


def _file_bytes(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def open_pictures(path: str, split: str) -> images.Dataset:
    """Returns all image files of a folder, at any depth, without classes: every label is 0.

    Raises ValueError where there is none.
    """
    found = _image_files(path)
    if not found:
        raise ValueError(f"{path}: holds no images: no files of {' '.join(SUFFIXES)}")
    return images.split_by_content(*picture_files(path, found), split)


def picture_files(name: str, files: list[str]):
    """Returns (data set, checksum) of image files without classes: every label is 0."""
    return _from_files(name, files, np.zeros(len(files), np.int64), None)


def _open_labelled_folder(path: str, split: str) -> images.Dataset:
    table = os.path.join(path, LABELS)
    files, labels, class_names = _read_labels(
        _file_bytes(table), table, lambda file: os.path.isfile(os.path.join(path, file)), path
    )
    files = [os.path.join(path, file) for file in files]
    return images.split_by_content(*_from_files(path, files, labels, class_names), split)


def open_zip(path: str, split: str, labels_needed: bool = True) -> images.Dataset:
    """Returns a .zip of images with labels.csv; file names in it are relative to labels.csv.

    Without labels.csv, where labels are not needed, all its image files, and every label is 0.
    Members are read and decoded when asked for.  The checksum that decides the split is the CRC-32
    that the .zip stores of each member, so that nothing is read to split.

    Raises ValueError or FileNotFoundError naming the file, a member as `<zip>:<member>`.
    """
    try:
        # Closed when the data set is dropped: ZipFile closes itself.
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path}: not a .zip file, or a damaged one ({error})") from None
    # One handle and one position: reading is serialized (0.1 ms), decoding (2 ms) is not.
    lock = threading.Lock()

    def member_bytes(member: str) -> bytes:
        try:
            with lock:
                return archive.read(member)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError) as error:
            raise ValueError(f"{path}:{member}: damaged in the .zip ({error})") from error

    members = set(archive.namelist())
    tables = [name for name in members if posixpath.basename(name) == LABELS]
    if tables:
        table = min(tables, key=lambda name: (name.count("/"), name))
        folder = posixpath.dirname(table)
        files, labels, class_names = _read_labels(
            member_bytes(table),
            f"{path}:{table}",
            lambda file: posixpath.join(folder, file) in members,
            path,
        )
        files = [posixpath.join(folder, file) for file in files]
    elif labels_needed:
        raise FileNotFoundError(f"{path}: holds no {LABELS} (first columns file,label)")
    else:
        files = sorted(filter(_is_image, members))
        if not files:
            raise ValueError(f"{path}: holds no images: no files of {' '.join(SUFFIXES)}")
        labels, class_names = np.zeros(len(files), np.int64), None
    dataset = images.Dataset(
        path,
        labels,
        len(class_names) if class_names else int(labels.max()) + 1,
        class_names,
        read=lambda i: images.decode(member_bytes(files[i]), f"{path}:{files[i]}"),
        where=lambda i: f"{path}:{files[i]}",
    )
    return images.split_by_content(dataset, lambda i: archive.getinfo(files[i]).CRC, split)


def _read_labels(
    data: bytes, table: str, exists: Callable[[str], bool], source: str
) -> tuple[list[str], np.ndarray, tuple[str, ...] | None]:
    """Returns (file of each row, label of each row as int64, class names or None) of a labels.csv.

    Labels are all integers, or all names; names are numbered in sorted order.

    Args:
        data: the content of labels.csv.
        table: its path, for messages.
        exists: whether the source has a file of that name.
        source: the folder or .zip, for messages.

    Raises ValueError or FileNotFoundError naming `table`, the line and the value.
    """
    try:
        reader = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{table}: not a CSV file in UTF-8 ({error})") from None
    if not rows or rows[0][1][:2] != ["file", "label"]:
        first = ",".join(rows[0][1]) if rows else ""
        raise ValueError(f"{table}: must begin with a line 'file,label', not {first[:40]!r}")
    rows = rows[1:]
    if not rows:
        raise ValueError(f"{table}: lists no images")
    for line, row in rows:
        if len(row) < 2 or not all(row[:2]):
            raise ValueError(f"{table} line {line}: needs a file and a label, has {row!r}")
        if not exists(row[0]):
            raise FileNotFoundError(f"{table} line {line}: no file {row[0]!r} in {source}")
    names = [row[1] for _, row in rows]
    is_integer = [re.fullmatch(r"[+-]?[0-9]{1,9}", name) is not None for name in names]
    if not any(is_integer):
        class_names, labels = np.unique(names, return_inverse=True)
        return [row[0] for _, row in rows], labels.astype(np.int64), tuple(class_names.tolist())
    for (line, row), integer in zip(rows, is_integer, strict=True):
        if not integer:
            raise ValueError(
                f"{table} line {line}: label {row[1]!r} of {row[0]!r} is not an integer, "
                "as other labels here are"
            )
        if int(row[1]) < 0:
            raise ValueError(f"{table} line {line}: negative label {row[1]} of {row[0]!r}")
    return [row[0] for _, row in rows], np.array(names, np.int64), None
