"""Images that lie in arrays: `.npz` files, and the digits that scikit-learn brings along."""

import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable

import numpy as np

from lowbit.data import images

LAYOUTS = (
    "x,y", "x,y,x_test,y_test", "x_train,y_train,x_test,y_test",
    "train_jpeg,train_end,train_label,test_jpeg,test_end,test_label,classes",
)  # fmt: skip


def open_npz(path: str, split: str) -> images.Dataset:
    """Returns the images of an .npz in one of LAYOUTS; the second half and `classes` may be absent.

    x is uint8 (n, height, width), (.., .., .., 1) or (.., .., .., 3); y holds n integers.
    `train_jpeg` is the JPEG files one after the other as uint8 (bytes,), `train_end` the offset
    past the end of each.  x_val and y_val may stand for x_test and y_test.

    Arrays of pixels are unpacked into an unnamed temporary file and mapped, so that memory holds
    the images in use and not the set; JPEGs stay compressed in memory.

    Raises ValueError naming the file, the array and what is wrong with it.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: not an .npz file, or a damaged one")
    try:
        with np.load(path, allow_pickle=False) as file:
            keys = set(file.files)
            small = {
                key: file[key]
                for key in keys
                if key == "classes" or key.split("_")[0] == "y" or key.endswith(("_end", "_label"))
            }
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a readable .npz ({error})") from None
    class_names = tuple(map(str, small["classes"].tolist())) if "classes" in small else None
    open_part = _open_jpegs if "train_jpeg" in keys else _open_pixels
    train, validation = _parts(path, keys)
    labels = [_labels(path, part, small) for part in (train, validation) if part]
    num_classes = len(class_names) if class_names else 1 + max(int(each.max()) for each in labels)

    def opener(part: dict[str, str]):
        if part:
            return lambda: open_part(
                path, part, small, _labels(path, part, small), num_classes, class_names
            )

    return images.pick_split(path, split, opener(train), opener(validation))


def _parts(path: str, keys: set[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the names of the arrays of (train, validation), {} for one that is absent.

    Raises ValueError where the file fits none of LAYOUTS.
    """
    parts = []
    for prefixes in (("", "_train"), ("_test", "_val")):
        found = [p for p in prefixes if {f"x{p}", f"y{p}"} <= keys]
        parts.append({"data": f"x{found[0]}", "label": f"y{found[0]}"} if found else {})
    if not any(parts):
        for i, prefix in enumerate(("train", "test")):
            part = {"data": f"{prefix}_jpeg", "end": f"{prefix}_end", "label": f"{prefix}_label"}
            parts[i] = part if set(part.values()) <= keys else {}
    if not any(parts):
        raise ValueError(
            f"{path}: has the arrays {', '.join(sorted(keys)) or '(none)'}; expected "
            f"{'; or '.join(LAYOUTS)}"
        )
    return parts[0], parts[1]


def _labels(path: str, part: dict[str, str], small: dict[str, np.ndarray]) -> np.ndarray:
    """Returns the labels of `part`, int64 (n,)."""
    key = part["label"]
    labels = small[key]
    if labels.ndim == 2 and labels.shape[1] == 1:  # as keras.datasets.cifar10 gives them
        labels = labels[:, 0]
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{path}: {key} must hold n integers, it is {labels.dtype} of shape {labels.shape}"
        )
    if not len(labels):
        raise ValueError(f"{path}: {key} is empty")
    return labels.astype(np.int64)


def _open_pixels(path, part, small, labels, num_classes, class_names):
    """Returns (data set, checksum) of an array of pixels."""
    del small  # only the JPEG layout has a third array

    def unpack(folder: str) -> str:
        with zipfile.ZipFile(path) as archive:
            return archive.extract(f"{part['data']}.npy", folder)

    try:
        pixels = _mapped(unpack)
    except (ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path}: array {part['data']} is unreadable ({error})") from None
    return from_pixels(f"{path}:{part['data']}", pixels, labels, num_classes, class_names)


def _mapped(write: Callable[[str], str]) -> np.ndarray:
    """Returns the .npy file that `write(folder)` leaves at the path that it returns, read-only.

    The file loses its name at once and its space when the array goes (POSIX keeps a mapped file).
    """
    with tempfile.TemporaryDirectory() as folder:
        return np.load(write(folder), mmap_mode="r", allow_pickle=False)


def spill(pixels: np.ndarray) -> np.ndarray:
    """Returns `pixels` as a read-only array on disk, so that memory need not hold it."""

    def write(folder: str) -> str:
        path = os.path.join(folder, "pixels.npy")
        np.save(path, pixels)
        return path

    return _mapped(write)


def from_pixels(
    name: str,
    pixels: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    class_names: tuple[str, ...] | None = None,
    flip: bool = True,
) -> tuple[images.Dataset, Callable[[int], int]]:
    """Returns (data set, checksum as in `images.split_by_content`) of an array of images.

    Args:
        name: of the array, for messages; image i is "<name>[i]".
        pixels: uint8 (n, height, width), (.., .., .., 1) or (.., .., .., 3).
        labels: int64 (n,).
        num_classes, class_names, flip: see `images.Dataset`.

    Raises ValueError for another dtype or shape.
    """
    grey = pixels.ndim == 3 or pixels.ndim == 4 and pixels.shape[3] == 1
    if pixels.dtype != np.uint8 or not (grey or pixels.ndim == 4 and pixels.shape[3] == 3):
        raise ValueError(
            f"{name}: must be uint8 (n, height, width[, 1 or 3]), it is {pixels.dtype} of "
            f"{pixels.shape}"
        )
    if len(pixels) != len(labels):
        raise ValueError(f"{name}: has {len(pixels)} images but {len(labels)} labels")
    dataset = images.Dataset(
        name,
        labels,
        num_classes,
        class_names,
        read=lambda i: images.repeat_grey(np.asarray(pixels[i])),
        where=lambda i: f"{name}[{i}]",
        flip=flip,
    )
    return dataset, lambda i: zlib.crc32(np.ascontiguousarray(pixels[i]))


def _open_jpegs(path, part, small, labels, num_classes, class_names):
    """Returns (data set, checksum) of the JPEG layout."""
    ends = small[part["end"]]
    try:
        with np.load(path, allow_pickle=False) as file:
            data = file[part["data"]]
    except (ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path}: array {part['data']} is unreadable ({error})") from None
    if data.dtype != np.uint8 or data.ndim != 1:
        raise ValueError(f"{path}: {part['data']} must be uint8 (bytes,), it is {data.dtype}")
    if ends.shape != labels.shape or not np.issubdtype(ends.dtype, np.integer):
        raise ValueError(
            f"{path}: {part['end']} must hold {len(labels)} integers, one for each label; it is "
            f"{ends.dtype} of shape {ends.shape}"
        )
    bounds = np.concatenate([[0], ends.astype(np.int64)])
    if (np.diff(bounds) < 0).any() or bounds[-1] != len(data):
        raise ValueError(
            f"{path}: {part['end']} must rise to {len(data)}, the bytes of {part['data']}; it "
            f"ends at {bounds[-1]}"
        )

    def jpeg(i: int) -> bytes:
        return data[bounds[i] : bounds[i + 1]].tobytes()

    def where(i: int) -> str:
        return f"{path}:{part['data']}[{i}]"

    dataset = images.Dataset(
        path,
        labels,
        num_classes,
        class_names,
        read=lambda i: images.decode(jpeg(i), where(i)),
        where=where,
    )
    return dataset, lambda i: zlib.crc32(jpeg(i))


def open_digits(split: str) -> images.Dataset:
    """Returns scikit-learn's 1,797 digits of 8x8 pixels, 0..16 scaled to 0..255: no download.

    Validation is, of each class, the fifth (rounded down) with the lowest CRC-32: 355 images; train
    is the other 1,442.  No two of the images are equal.
    """
    import sklearn.datasets  # 1 s, and nothing else here needs it

    digits = sklearn.datasets.load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int64)
    names = tuple(str(digit) for digit in range(10))
    dataset, checksum = from_pixels("digits", pixels, labels, 10, names, flip=False)
    if split == "all":
        return dataset
    checksums = np.array([checksum(i) for i in range(len(labels))])
    is_validation = np.zeros(len(labels), bool)
    for digit in range(10):
        members = np.flatnonzero(labels == digit)
        order = members[np.argsort(checksums[members])]
        is_validation[order[: len(members) // 5]] = True
    chosen = np.flatnonzero(is_validation == (split == "validation"))
    return images.select(dataset, chosen, f"digits ({split})")
