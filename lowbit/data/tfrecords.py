"""TFRecord files of `tf.train.Example`, without TensorFlow, read at random.

A TFRecord file is a row of

    uint64 length | uint32 CRC of it | `length` bytes | uint32 CRC of them       (little-endian)

and an Example is the protocol buffer { 1: Features { 1, repeated: entry { 1: key, 2: Feature } } },
a Feature being { 1: BytesList | 2: FloatList | 3: Int64List }, each of them { 1, repeated: value }.

One pass over a file finds where the bytes of each image lie, and its label; it touches the pages
that hold these few fields and skips the image (0.1 ms for each: 5 s for ImageNet's 50,000).  The
CRCs (CRC-32C, slow in Python) are not checked; lengths are.
"""

import functools
import glob
import mmap
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np

from lowbit.data import images

SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})")


def find_files(path: str) -> list[str]:
    """Returns the TFRecord files that `path` (a folder, a file or a pattern) means, sorted.

    In a folder these are the files `*-00000-of-01024` and `*.tfrecord*`.

    Raises FileNotFoundError where a shard of a folder is missing: a broken download would
    otherwise pass for a smaller data set.
    """
    if not os.path.isdir(path):
        return [path] if os.path.isfile(path) else sorted(filter(os.path.isfile, glob.glob(path)))
    files = sorted(
        os.path.join(path, name)
        for name in os.listdir(path)
        if SHARD.fullmatch(name) or ".tfrecord" in name
    )
    shards: dict[tuple[str, str], set[str]] = {}
    for file in files:
        match = SHARD.fullmatch(os.path.basename(file))
        if match:
            shards.setdefault((match["split"], match["count"]), set()).add(match["number"])
    for (split, count), numbers in shards.items():
        if len(numbers) != int(count):
            raise FileNotFoundError(
                f"{path}: has {len(numbers)} of the {int(count)} files {split}-?????-of-{count}"
            )
    return files


def open_slim(path: str, files: list[str], split: str) -> images.Dataset:
    """Returns ImageNet as TF-slim writes it: `image/encoded`, and `image/class/label` from 1.

    Files named `train*` and `val*` or `test*` are the splits.  TF-slim's label 0 is "background";
    our labels are its labels - 1, so that 1,000 classes are 0..999.

    Raises ValueError naming the file and record that is at fault.
    """

    def opener(chosen: list[str]):
        if chosen:
            return functools.partial(
                open_files, path, chosen, "image/encoded", "image/class/label", first_label=1
            )

    validation = [f for f in files if os.path.basename(f).startswith(("val", "test"))]
    train = [f for f in files if f not in set(validation)]
    return images.pick_split(path, split, opener(train), opener(validation))


def open_files(
    name: str,
    files: list[str],
    image_key: str,
    label_key: str,
    first_label: int,
    class_names: tuple[str, ...] | None = None,
    flip: bool = True,
) -> tuple[images.Dataset, Callable[[int], int]]:
    """Returns (data set, checksum of the encoded image) of the records in `files`.

    Args:
        name, class_names, flip: see `images.Dataset`.
        files: TFRecord files, not compressed.
        image_key: the feature with the encoded image, one string of bytes.
        label_key: the feature with the label, one integer.
        first_label: the label in the files that stands for class 0.

    Raises ValueError naming the file and record that is at fault.
    """
    spans, labels = [], []  # per image: file, record, start, end
    for number, file in enumerate(files):
        for record, (start, end, label) in enumerate(_index(file, image_key, label_key)):
            if label < first_label:
                raise ValueError(
                    f"{file}:record {record}: label {label}, but the first class is {first_label}"
                )
            spans.append((number, record, start, end))
            labels.append(label - first_label)
    if not spans:
        raise ValueError(f"{name}: holds no images")
    spans = np.array(spans, np.int64)

    def where(i: int) -> str:
        return f"{files[spans[i, 0]]}:record {spans[i, 1]}"

    def encoded(i: int) -> bytes:
        number, _, start, end = spans[i].tolist()
        with open(files[number], "rb") as file:
            file.seek(start)
            return file.read(end - start)

    dataset = images.Dataset(
        name,
        np.array(labels, np.int64),
        len(class_names) if class_names else max(labels) + 1,
        class_names,
        read=lambda i: images.decode(encoded(i), where(i)),
        where=where,
        flip=flip,
    )
    return dataset, lambda i: zlib.crc32(encoded(i))


def _index(path: str, image_key: str, label_key: str) -> Iterator[tuple[int, int, int]]:
    """Yields (start and end of the image's bytes in the file, label in the file) of each record."""
    if not os.path.getsize(path):
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        position, record = 0, 0
        while position < len(data):
            header = data[position : position + 8]
            start = position + 12
            end = start + struct.unpack("<Q", header)[0] if len(header) == 8 else len(data)
            position = end + 4
            if position > len(data):
                raise ValueError(
                    f"{path}:record {record}: not a TFRecord file, or cut short (compressed files "
                    "are not read)"
                )
            features: dict[str, tuple[int, int]] = {}
            try:
                features.update(_features(data, start, end))
                image = next(_values(data, features[image_key], field=1))
                label = next(_values(data, features[label_key], field=3))
                label = label if isinstance(label, int) else _varint(data, label[0])[0]
            except (KeyError, StopIteration, IndexError, TypeError, ValueError):
                raise ValueError(
                    f"{path}:record {record}: needs an Example with bytes {image_key!r} and "
                    f"integer {label_key!r}; it has {', '.join(sorted(features)) or 'none'}"
                ) from None
            yield image[0], image[1], label - (label >> 63 << 64)  # two's complement
            record += 1


def _features(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yields (key, span of its Feature) of the Example at data[start:end]."""
    for _, example in _fields(data, start, end):
        for _, entry in _fields(data, *example):
            fields = dict(_fields(data, *entry))
            yield data[slice(*fields[1])].decode(), fields[2]


def _values(data: mmap.mmap, feature: tuple[int, int], field: int) -> Iterator:
    """Yields the values of a Feature's list `field`: spans of bytes, integers, or a packed span."""
    for number, span in _fields(data, *feature):
        if number == field:
            for _, value in _fields(data, *span):
                yield value


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int | tuple[int, int]]]:
    """Yields (number, value) of each field of the message data[start:end].

    The value is an integer for a varint, and a span (start, end) for bytes.
    """
    while start < end:
        tag, start = _varint(data, start)
        value, start = _varint(data, start)
        if tag & 7 == 2:
            value = (start, start + value)
            start = value[1]
        elif tag & 7 != 0:
            raise ValueError(f"wire type {tag & 7} does not occur in an Example")
        yield tag >> 3, value
    if start != end:
        raise ValueError("a field reaches past the end of its message")


def _varint(data: mmap.mmap, start: int) -> tuple[int, int]:
    """Returns (value, position past it) of the varint at `start`."""
    value = shift = 0
    while True:
        byte = data[start]
        start += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, start
