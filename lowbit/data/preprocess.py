"""What is done to pixels before the network sees them.

    normalized = (pixel / divisor - mean) / std

in float32 and in this order, on RGB pixels of 0..255 (BGR where `bgr` is set).  With the constants
of `NAMED` this equals `keras.applications`' `preprocess_input` bit for bit: there is nothing to
divide by, or nothing to subtract, where Keras leaves the step out.
"""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """The constants of the equation above, one mean and one std for each of the three channels.

    Raises ValueError where there are not three of each, one is not finite, or a std or the divisor
    is not positive.
    """

    name: str  # what --preprocess says, such as "torch" or "127,128"
    mean: tuple[float, float, float]  # in units of the divided pixel: 0.485 for "torch"
    std: tuple[float, float, float]  # in the same units: 0.229 for "torch"
    bgr: bool = False  # reverse the channels first; mean and std are then B, G, R
    divisor: float = 1.0  # 255 for "torch", whose mean and std are published for 0..1

    def __post_init__(self):
        if len(self.mean) != 3 or len(self.std) != 3:
            raise ValueError(
                f"preprocess {self.name!r}: needs 3 means and 3 stds, has {len(self.mean)} and "
                f"{len(self.std)}"
            )
        if not all(math.isfinite(value) for value in (*self.mean, *self.std, self.divisor)):
            raise ValueError(f"preprocess {self.name!r}: every number must be finite")
        if min(*self.std, self.divisor) <= 0:
            raise ValueError(f"preprocess {self.name!r}: a std must be greater than 0")


NAMED = {
    each.name: each
    for each in (
        Preprocess("tf", mean=(1.0,) * 3, std=(1.0,) * 3, divisor=127.5),
        Preprocess("torch", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), divisor=255.0),
        Preprocess("caffe", mean=(103.939, 116.779, 123.68), std=(1.0,) * 3, bgr=True),
        Preprocess("raw", mean=(0.0,) * 3, std=(1.0,) * 3),
    )
}


def first_known(source: str, *texts: str | None, flag: str = "--preprocess") -> str:
    """Returns the first text that is not None: what a flag says, then what a model says of itself.

    Raises ValueError, with the model's name `source` and the flag, where all are None.
    """
    for text in texts:
        if text is not None:
            return text
    raise ValueError(f"{source} does not say how its images are normalized; give {flag}")


def parse(text: str) -> Preprocess:
    """Returns what `text` names: a key of `NAMED`, "mean,std", or "m0,m1,m2,s0,s1,s2" (R, G, B).

    Raises ValueError, with what is allowed, for anything else.
    """
    allowed = f"{', '.join(NAMED)}, 'mean,std' such as '127,128', or 'm0,m1,m2,s0,s1,s2'"
    if not isinstance(text, str):  # of a file that another tool, or damage, wrote
        raise ValueError(f"preprocess {text!r} is not one of: {allowed}")
    if text.strip() in NAMED:
        return NAMED[text.strip()]
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"preprocess {text!r} is not one of: {allowed}") from None
    if len(numbers) == 2:
        numbers = (numbers[0],) * 3 + (numbers[1],) * 3
    if len(numbers) != 6:
        raise ValueError(f"preprocess {text!r} has {len(numbers)} numbers; allowed are {allowed}")
    return Preprocess(_numbers(numbers[:3], numbers[3:]), numbers[:3], numbers[3:])


def as_string(preprocess: Preprocess) -> str:
    """Returns the text for which `parse(text)` computes the same; `parse` of its results is exact.

    Raises ValueError where no text says it (reversed or divided by numbers of one's own).
    """
    if NAMED.get(preprocess.name) == preprocess:
        return preprocess.name
    if preprocess.bgr or preprocess.divisor != 1:
        raise ValueError(
            f"preprocess {preprocess.name!r}: --preprocess can say bgr or a divisor only by one of "
            f"the names {', '.join(NAMED)}"
        )
    return _numbers(preprocess.mean, preprocess.std)


def _numbers(mean: tuple, std: tuple) -> str:
    """Returns the shortest of the two numeric forms that `parse` reads back exactly."""
    numbers = (*mean, *std)
    if len(set(mean)) == len(set(std)) == 1:
        numbers = (mean[0], std[0])
    return ",".join(repr(float(number)).removesuffix(".0") for number in numbers)


def apply(pixels: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    """Returns the normalized pixels, float32, in a new array of the same shape.

    Args:
        pixels: RGB of 0..255, any real dtype, shape (..., 3), or (..., 1) for grey models.
        preprocess: the constants.

    Raises ValueError where one grey channel meets constants that differ between channels.
    """
    mean, std = _per_channel(preprocess, pixels.shape[-1])
    if preprocess.bgr:
        pixels = pixels[..., ::-1]
    normalized = pixels.astype(np.float32, order="C")
    # A step that changes nothing is left out: 'raw' is then one pass over memory and not four.
    if preprocess.divisor != 1:
        normalized /= np.float32(preprocess.divisor)
    if mean.any():
        normalized -= mean.astype(np.float32)
    if (std != 1).any():
        normalized /= std.astype(np.float32)
    return normalized


def affine(preprocess: Preprocess, channels: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Returns (scale, offset), float64 of shape (channels,): normalized = scale * pixel + offset.

    Where `preprocess.bgr` is set this holds after the channels are reversed: output channel c is
    made of pixel channel 2 - c.  The equation is exact in real numbers; `apply` rounds to float32
    after each of its steps.

    Raises ValueError as `apply` does.
    """
    mean, std = _per_channel(preprocess, channels)
    return 1 / (preprocess.divisor * std), -mean / std


def _per_channel(preprocess: Preprocess, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and std, float64 of shape (channels,)."""
    mean, std = np.array(preprocess.mean), np.array(preprocess.std)
    if channels == 3:
        return mean, std
    if channels != 1:
        raise ValueError(f"images have 1 or 3 channels, not {channels}")
    if np.ptp(mean) or np.ptp(std):
        raise ValueError(
            f"preprocess {preprocess.name!r} differs between red, green and blue, but the model "
            "takes 1 channel; use 'tf', 'raw' or 'mean,std'"
        )
    return mean[:1], std[:1]
