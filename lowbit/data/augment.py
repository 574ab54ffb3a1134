"""Changes to training images that keep their label."""

import math
from collections.abc import Callable

import numpy as np

from lowbit.data import images


def random_crop(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Returns a part of `image`: half to all of its area, 3/4 to 4/3 as wide as the image's shape.

    The ratio is drawn uniformly in its logarithm (Szegedy et al. 2015, section 6, whose least area
    is 0.08: too little for fine-tuning, which starts from trained weights).  A crop that is longer
    than the image in one direction is cut there.
    """
    height, width = image.shape[:2]
    area = random.uniform(0.5, 1.0)
    stretch = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
    crop_height = min(height, max(1, round(height * math.sqrt(area / stretch))))
    crop_width = min(width, max(1, round(width * math.sqrt(area * stretch))))
    top = random.integers(height - crop_height + 1)
    left = random.integers(width - crop_width + 1)
    return image[top : top + crop_height, left : left + crop_width]


def random_shift(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Returns `image` moved by up to an eighth of its sides; what comes in is black.

    For 32 pixels this is the 4 of He et al. 2015, section 4.2; for digits of 8 pixels it is 1.
    """
    moved = np.zeros_like(image)
    height, width = image.shape[:2]
    down, right = (int(random.integers(-(side // 8), side // 8 + 1)) for side in (height, width))
    moved[max(0, down) : height + down, max(0, right) : width + right] = image[
        max(0, -down) : height - down, max(0, -right) : width - right
    ]
    return moved


def keep(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Returns `image`."""
    del random
    return image


# What `augment` may say: (geometry, whether half of the images are mirrored).
AUGMENTATIONS: dict[str, tuple[Callable, bool]] = {
    "none": (keep, False),
    "crop": (random_crop, False),
    "crop_flip": (random_crop, True),
    "shift": (random_shift, False),
    "shift_flip": (random_shift, True),
}


def choose(name: bool | str, dataset: images.Dataset) -> str:
    """Returns the key of AUGMENTATIONS that `name` means for this data set.

    True is "crop_flip", or "shift" where a mirrored image would be another class; False is "none".

    Raises ValueError for an unknown name, and for mirroring a data set that must not be.
    """
    if isinstance(name, bool):
        return ("crop_flip" if dataset.flip else "shift") if name else "none"
    if name not in AUGMENTATIONS:
        raise ValueError(f"augmentation {name!r} is not one of {', '.join(AUGMENTATIONS)}")
    if AUGMENTATIONS[name][1] and not dataset.flip:
        raise ValueError(
            f"augmentation {name!r}: images of {dataset.name} change their class when mirrored; "
            "use 'shift' or 'crop'"
        )
    return name


def augmented(image: np.ndarray, name: str, random: np.random.Generator) -> np.ndarray:
    """Returns uint8 (height', width', 3): `image` changed as `name`, a key of AUGMENTATIONS, says.

    Never changes `image` itself.
    """
    geometry, flip = AUGMENTATIONS[name]
    image = geometry(image, random)
    return image[:, ::-1] if flip and random.random() < 0.5 else image
