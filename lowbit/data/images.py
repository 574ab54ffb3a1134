"""Labelled images, each decoded when it is read: the type and its pure functions."""

import dataclasses
import io
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, UnidentifiedImageError

SPLITS = ("train", "validation", "all", "train_whole")


def _number(index: int) -> str:
    return f"image {index}"


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """n labelled images.  It holds file names, offsets or compressed bytes, never n decoded images.

    Raises ValueError where it is empty, and for a label outside 0..num_classes-1, naming the image.
    """

    name: str  # what --dataset said, with the split: "digits (train)"
    labels: np.ndarray  # int64 (n,)
    num_classes: int  # highest label of the source + 1 where the source does not list its classes
    class_names: tuple[str, ...] | None  # num_classes names, or None where only numbers are known
    read: Callable[[int], np.ndarray]  # image i as uint8 (height, width, 3), RGB; thread-safe
    where: Callable[[int], str] = _number  # how an error names image i: "a.zip:b.jpg"
    flip: bool = True  # a mirror image has the same label; False for digits and letters

    def __post_init__(self):
        if self.labels.dtype != np.int64 or self.labels.ndim != 1:
            raise ValueError(
                f"{self.name}: labels must be int64 of shape (n,), not {self.labels.dtype} of "
                f"{self.labels.shape}"
            )
        if not len(self.labels):
            raise ValueError(f"{self.name}: holds no images")
        wrong = (self.labels < 0) | (self.labels >= self.num_classes)
        if wrong.any():
            index = int(np.argmax(wrong))
            raise ValueError(
                f"{self.where(index)}: label {self.labels[index]} is not one of 0.."
                f"{self.num_classes - 1}"
            )

    def __len__(self) -> int:
        return len(self.labels)


def decode(data: bytes, name: str) -> np.ndarray:
    """Returns the image file `data` as uint8 (height, width, 3), RGB, exactly as Pillow decodes it.

    Grey is repeated to three channels, alpha is dropped (not blended), 16-bit samples keep their
    high byte (as libpng and TensorFlow's decoder do).  EXIF orientation is not applied.

    Raises ValueError naming `name` where Pillow cannot read it.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _rgb(image)
    except UnidentifiedImageError:
        raise ValueError(f"{name}: not an image ({len(data)} bytes of no known format)") from None
    except Exception as error:  # Pillow's readers raise a dozen types on damaged files
        raise ValueError(f"{name}: unreadable image ({error})") from error


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode == "F":
        raise ValueError("its pixels are floats, of unknown range")
    if image.mode.startswith("I"):
        high_byte = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
        return repeat_grey(high_byte.astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        # Straight to RGB, Pillow warns of the transparency that we are about to drop.
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB"))


def repeat_grey(image: np.ndarray) -> np.ndarray:
    """Returns uint8 (height, width, 3) of (height, width), (height, width, 1) or (.., .., 3)."""
    if image.ndim == 2:
        image = image[..., np.newaxis]
    return image if image.shape[-1] == 3 else np.repeat(image, 3, axis=-1)


def select(dataset: Dataset, indices: np.ndarray, name: str) -> Dataset:
    """Returns the images `indices` (integers, shape (m,)) of `dataset`, in that order."""
    return dataclasses.replace(
        dataset,
        name=name,
        labels=dataset.labels[indices],
        read=lambda i: dataset.read(int(indices[i])),
        where=lambda i: dataset.where(int(indices[i])),
    )


def join(first: Dataset, second: Dataset, name: str) -> Dataset:
    """Returns the images of `first` and then those of `second`."""
    n = len(first)
    return dataclasses.replace(
        first,
        name=name,
        labels=np.concatenate([first.labels, second.labels]),
        num_classes=max(first.num_classes, second.num_classes),
        read=lambda i: first.read(i) if i < n else second.read(i - n),
        where=lambda i: first.where(i) if i < n else second.where(i - n),
    )


def split_by_content(dataset: Dataset, checksum: Callable[[int], int], split: str) -> Dataset:
    """Returns 90% ("train") or 10% ("validation") of a source that has no splits, or "all" of it.

    An image belongs to validation if the CRC-32 of its content divides by 10.  So copies of an
    image never lie on both sides, and an image stays on its side when the source grows, or moves
    from a folder to a .zip.  A small source of which one side would be empty gives that side the
    one content with the lowest CRC.

    Args:
        dataset: all images.
        checksum: CRC-32 of the content of image i; only called where a split is asked for.
        split: one of SPLITS.

    Raises ValueError where the side is empty, that is, all images have the same content.
    """
    if split in ("all", "train_whole"):
        return dataset
    checksums = np.array([checksum(i) for i in range(len(dataset))], np.int64)
    distinct = np.unique(checksums)
    is_validation = distinct % 10 == 0
    if len(distinct) == 1 or is_validation.all():
        is_validation[:] = False
    if len(distinct) > 1 and not is_validation.any():
        is_validation[0] = True
    chosen = np.isin(checksums, distinct[is_validation]) == (split == "validation")
    if not chosen.any():
        raise ValueError(
            f"{dataset.name}: the {split} split is empty, for its images are all the same; name "
            "another data set for it"
        )
    return select(dataset, np.flatnonzero(chosen), f"{dataset.name} ({split})")


def pick_split(
    name: str,
    split: str,
    train: Callable[[], tuple[Dataset, Callable[[int], int]]] | None,
    validation: Callable[[], tuple[Dataset, Callable[[int], int]]] | None,
) -> Dataset:
    """Returns the split of a source that may have one or two splits of its own.

    With both, they are the splits and "all" is one after the other.  With `validation` alone there
    is no "train": a set made for measuring is never trained on by accident.  With `train` alone it
    is split by content.

    Args:
        name: of the source, for messages.
        split: one of SPLITS.
        train, validation: each opens a split and returns (data set, checksum as in
            `split_by_content`); only what is asked for is opened.

    Raises ValueError where the source has no such split.
    """
    if train is None and validation is None:
        raise ValueError(f"{name}: holds no images")
    if split == "train_whole" and validation is not None:
        split = "train"
    if validation is None:
        dataset, checksum = train()
        return split_by_content(dataclasses.replace(dataset, name=name), checksum, split)
    if train is None:
        if split == "train":
            raise ValueError(f"{name}: holds a validation split only, nothing to train on")
        dataset = validation()[0]
    elif split == "all":
        return join(train()[0], validation()[0], name)
    else:
        dataset = (train if split == "train" else validation)()[0]
    return dataclasses.replace(dataset, name=f"{name} ({split})")


def renumbered(dataset: Dataset, class_names: Sequence[str] | None) -> Dataset:
    """Returns the data set with labels numbered as in `class_names`, by the classes' names.

    A folder that lacks a class numbers the others differently; names tell.  Where either side has
    no names the labels stay.

    Raises ValueError naming a class that is not in `class_names`.
    """
    if class_names is None or dataset.class_names is None:
        return dataset
    if tuple(class_names) == tuple(dataset.class_names):
        return dataset
    unknown = [name for name in dataset.class_names if name not in class_names]
    if unknown:
        raise ValueError(
            f"{dataset.name}: class {unknown[0]!r} is none of the {len(class_names)} classes that "
            f"the model was trained on ({', '.join(class_names[:5])}, ...)"
        )
    numbers = np.array([list(class_names).index(name) for name in dataset.class_names], np.int64)
    return dataclasses.replace(
        dataset,
        labels=numbers[dataset.labels],
        num_classes=len(class_names),
        class_names=tuple(class_names),
    )


def check_labels(dataset: Dataset, num_classes: int) -> None:
    """Raises ValueError naming the first image whose label a model of `num_classes` cannot give."""
    wrong = dataset.labels >= num_classes
    if wrong.any():
        index = int(np.argmax(wrong))
        raise ValueError(
            f"{dataset.where(index)}: label {dataset.labels[index]}, but the model has "
            f"{num_classes} classes (0..{num_classes - 1})"
        )
