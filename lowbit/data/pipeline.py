"""Batches of images: in order, endless for training, and a few for calibration.

Images are read, resized and normalized by a pool of threads (Pillow and NumPy let go of the
interpreter lock), a bounded number of images ahead of the consumer, so that memory does not grow
with the data set.  Threads end when the iterator is exhausted, closed or dropped.
"""

import collections
import concurrent.futures
import itertools
import os
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from PIL import Image

from lowbit.data import augment as augmentations
from lowbit.data import images
from lowbit.data import preprocess as preprocessing

# What a seed is used for.  It leads the key, so that no two uses share random numbers.
_ORDER, _IMAGE, _CALIBRATION = range(3)


def batches(
    dataset: images.Dataset,
    *,
    input_size: tuple[int, int],
    batch_size: int,
    preprocess: preprocessing.Preprocess,
    channels: int = 3,
    indices: np.ndarray | None = None,
    threads: int | None = None,
    prefetch: int | None = None,
    pixels: bool = False,
    crop: float = 1.0,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Returns an iterator of (x, labels) in order; the last batch may be smaller.

    x is float32 (batch, height, width, channels), or uint8 and not normalized where `pixels` is
    set; labels are int64 (batch,).  Images are resized with Pillow's bilinear filter, their sides'
    ratio not kept; one channel is Pillow's luminance (ITU-R 601-2), taken before resizing.

    Args:
        dataset: the images.
        input_size: height and width of x.
        batch_size: images in a batch; may exceed the data set.
        preprocess: applied unless `pixels` is set.
        channels: 3, or 1 for grey models.
        indices: which images, in which order, integers (m,); all of them where None.
        threads: that decode; as many as the machine has cores where None.
        prefetch: images read ahead beyond one for each thread; 2 * batch_size where None.
        pixels: see above.
        crop: the part of height and of width that is kept, in (0, 1], centred as
            `tf.image.central_crop` does; TF-slim measures ImageNet with 0.875.

    Raises ValueError for arguments out of range at once, and while iterating, where an image is
    unreadable, the error of `dataset.read`, which names the file.
    """
    indices = np.arange(len(dataset)) if indices is None else np.asarray(indices)
    if indices.size and not (0 <= indices.min() and indices.max() < len(dataset)):
        raise ValueError(
            f"{dataset.name}: indices from {indices.min()} to {indices.max()} of "
            f"{len(dataset)} images"
        )
    if not 0 < crop <= 1:
        raise ValueError(f"crop is {crop}; it is the part that is kept, above 0 and at most 1")
    finish = _finisher(input_size, channels, None if pixels else preprocess)

    def load(index: int) -> tuple[np.ndarray, np.int64]:
        return finish(_central(dataset.read(index), crop)), dataset.labels[index]

    return _batched(load, (int(i) for i in indices), batch_size, threads, prefetch)


def calibration_batches(
    dataset: images.Dataset, n_images: int, *, seed: int = 0, **options
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Returns `batches` of `n_images` images drawn without replacement; `options` are those.

    For one seed, more images are the same ones and then others.  A data set with fewer images gives
    all of them.

    Raises ValueError where n_images is less than 1, and as `batches` does.
    """
    if n_images < 1:
        raise ValueError(f"calibration needs at least 1 image, not {n_images}")
    order = calibration_order(dataset, seed)
    return batches(dataset, indices=order[:n_images], **options)


def calibration_order(dataset: images.Dataset, seed: int) -> np.ndarray:
    """Returns the images' numbers, integers (n,), in the order in which calibration draws them."""
    return _random(_CALIBRATION, seed).permutation(len(dataset))


def train_batches(
    dataset: images.Dataset,
    *,
    input_size: tuple[int, int],
    batch_size: int,
    preprocess: preprocessing.Preprocess,
    seed: int,
    start_step: int = 0,
    augment: bool | str = True,
    channels: int = 3,
    threads: int | None = None,
    prefetch: int | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Returns an endless iterator of (x, labels), as `batches` gives them, from step `start_step`.

    Batch k depends on (seed, k) only, whatever `start_step` and `threads` are.  Sample s, the
    (s mod batch_size)-th of batch s // batch_size, is image permutation(seed, epoch)[s mod n] with
    epoch = s // n, augmented by random numbers of (seed, s).  So every epoch holds each image
    once; a batch may reach from one epoch into the next, and a data set smaller than a batch is
    simply gone through more than once in a batch.

    Args:
        augment: True for what suits the data set, False, or a key of `augment.AUGMENTATIONS`.
        (others): see `batches`.

    Raises ValueError as `batches` does, and for a negative seed or step.
    """
    if seed < 0 or start_step < 0:
        raise ValueError(f"seed {seed} and start_step {start_step} must not be negative")
    augmentation = augmentations.choose(augment, dataset)
    finish = _finisher(input_size, channels, preprocess)

    def load(sample: tuple[int, int]) -> tuple[np.ndarray, np.int64]:
        number, index = sample
        image = augmentations.augmented(
            dataset.read(index), augmentation, _random(_IMAGE, seed, number)
        )
        return finish(image), dataset.labels[index]

    samples = _samples(len(dataset), seed, start_step * batch_size)
    return _batched(load, samples, batch_size, threads, prefetch)


def _random(use: int, seed: int, number: int = 0) -> np.random.Generator:
    """Returns the random numbers of (use, seed, number), whatever was drawn before."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((use, seed, number))))


def _samples(n: int, seed: int, first: int) -> Iterator[tuple[int, int]]:
    """Yields (sample number, image) without end, from sample `first` of a set of n images."""
    for epoch in itertools.count(first // n):
        order = _random(_ORDER, seed, epoch).permutation(n)
        for number in range(max(first, epoch * n), (epoch + 1) * n):
            yield number, int(order[number - epoch * n])


def _central(image: np.ndarray, part: float) -> np.ndarray:
    """Returns the middle of an image (height, width, 3): `part` of each side."""
    top, left = (int((side - side * part) / 2) for side in image.shape[:2])
    return image[top : image.shape[0] - top, left : image.shape[1] - left]


def _finisher(
    input_size: tuple[int, int], channels: int, preprocess: preprocessing.Preprocess | None
) -> Callable[[np.ndarray], np.ndarray]:
    """Returns the function from uint8 (any height, any width, 3) to one image of a batch."""
    height, width = input_size
    if min(height, width) < 1 or channels not in (1, 3):
        raise ValueError(
            f"images of {height}x{width} pixels and {channels} channels: need at least 1x1 pixels, "
            "and 1 or 3 channels"
        )
    if preprocess is not None:
        preprocessing.affine(preprocess, channels)  # refuses constants that do not fit `channels`

    def finish(image: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(np.ascontiguousarray(image))
        if channels == 1:
            picture = picture.convert("L")
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
        pixels = np.asarray(picture).reshape(height, width, channels)
        return pixels if preprocess is None else preprocessing.apply(pixels, preprocess)

    return finish


def _batched(
    load: Callable, samples: Iterable, batch_size: int, threads: int | None, prefetch: int | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Returns an iterator of stacked batches of `load(sample)` = (image, label)."""
    threads = (os.cpu_count() or 1) if threads is None else threads
    prefetch = 2 * batch_size if prefetch is None else prefetch
    if min(batch_size, threads) < 1 or prefetch < 0:
        raise ValueError(
            f"batch_size {batch_size} and threads {threads} must be at least 1, and prefetch "
            f"{prefetch} at least 0"
        )

    def generate():
        loaded = _ordered_map(load, samples, threads, threads + prefetch)
        try:
            while batch := list(itertools.islice(loaded, batch_size)):
                x, labels = zip(*batch, strict=True)
                yield np.stack(x), np.array(labels, np.int64)
        finally:
            loaded.close()

    return generate()


def _ordered_map(function: Callable, items: Iterable, threads: int, in_flight: int) -> Iterator:
    """Yields function(item) of each item in order, computed by `threads` threads.

    At most `in_flight` items are begun and not yet yielded.  An error in `function` is raised here.
    Closing the generator waits for the items that are being computed and drops the others.
    """
    items = iter(items)
    executor = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="lowbit-data")
    try:
        futures = collections.deque(
            executor.submit(function, item) for item in itertools.islice(items, in_flight)
        )
        while futures:
            result = futures.popleft().result()
            for item in itertools.islice(items, 1):
                futures.append(executor.submit(function, item))
            yield result
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
