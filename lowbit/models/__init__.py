"""Networks: the zoo by name, or any functional `.keras` file.

__init__           the table of names; building, and the weights that --weights means
resnet             ResNet-18 and -34
efficientnet_lite  EfficientNet-Lite 0 to 4
cifar              ResNet-20, VGG-small and a MobileNet-v1 for images of 32x32 pixels
slim               TF-slim checkpoints, and ResNets of slim's topology
pretrained         weights that lie in an installed package
torch_file         tensors of a PyTorch file, without running what is pickled in it
tfmot_file         networks and ranges that tensorflow-model-optimization trained, without Keras 2
batch_norms        batch norms of random weights, set from images
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable

import keras

from lowbit import manifest
from lowbit.models import cifar, efficientnet_lite, pretrained, resnet, slim


@dataclasses.dataclass(frozen=True)
class Entry:
    """What the zoo knows of a network."""

    build: Callable[..., keras.Model]  # (input_shape, classes, name[, alpha]) -> logits out
    preprocess: str  # as the weights mean it that --weights=imagenet or =pretrained fetch
    input_size: int  # as published, pixels
    smallest_size: int = 32  # pixels: halved five times; 8: halved three times
    takes_alpha: bool = False
    # of keras.applications, with ImageNet weights to download
    application: Callable[..., keras.Model] | None = None


def _from_keras(application, preprocess, input_size, **options):
    def build(input_shape, classes, name, **alpha):
        return application(
            input_shape=input_shape,
            weights=None,
            classes=classes,
            classifier_activation=None,
            name=name,
            **alpha,
        )

    return Entry(build, preprocess, input_size, application=application, **options)


_A = keras.applications
ZOO = {
    "mobilenet_v1": _from_keras(_A.MobileNet, "tf", 224, takes_alpha=True),
    "mobilenet_v2": _from_keras(_A.MobileNetV2, "tf", 224, takes_alpha=True),
    "nasnet_mobile": _from_keras(_A.NASNetMobile, "tf", 224),
    "inception_v3": _from_keras(_A.InceptionV3, "tf", 299, smallest_size=75),
    "resnet_v1_18": Entry(functools.partial(resnet.build, "resnet_v1_18"), "torch", 224),
    "resnet_v1_34": Entry(functools.partial(resnet.build, "resnet_v1_34"), "torch", 224),
    "resnet_v1_50": _from_keras(_A.ResNet50, "caffe", 224),
    "resnet_v1_152": _from_keras(_A.ResNet152, "caffe", 224),
    "resnet_v2_50": _from_keras(_A.ResNet50V2, "tf", 224),
    "resnet_v2_152": _from_keras(_A.ResNet152V2, "tf", 224),
    **{
        name: Entry(functools.partial(efficientnet_lite.build, name), "127,128", size)
        for name, (_, _, size) in efficientnet_lite.VARIANTS.items()
    },
    "resnet20": Entry(cifar.resnet20, "torch", 32, 8),
    "vgg_small": Entry(cifar.vgg_small, "torch", 32, 8),
    "mobilenet_cifar": Entry(cifar.mobilenet_cifar, "tf", 32, 8, takes_alpha=True),
    "mobilenet_cifar_relu": Entry(
        functools.partial(cifar.mobilenet_cifar, relu6=False), "tf", 32, 8, takes_alpha=True
    ),
}
TAKES_ALPHA = tuple(name for name, entry in ZOO.items() if entry.takes_alpha)
NAMES = ", ".join(ZOO)  # for help texts
WEIGHTS = (
    "a .keras or .weights.h5 file; a TF-slim checkpoint (model.ckpt); 'imagenet' (Keras' download); "
    "'pretrained' (from an installed package) or a PyTorch .pth file, for EfficientNet-Lite"
)

# What a network gets on data sets of small images: digits are 8x8 pixels, enlarged.  At 48 pixels
# and a third of the width a MobileNet-v2 trains to 0.97 in two minutes on 2 cores.
SMALL = {"digits": (48, 0.35)}


def build(
    name: str, classes: int, input_size: int | None = None, alpha: float | None = None
) -> keras.Model:
    """Returns a zoo network with random weights and logits out.

    Args:
      name: a key of ZOO.
      classes: the number of logits.
      input_size: height and width in pixels; None: as published.
      alpha: width multiplier of the MobileNets; None: 1.

    Raises:
      ValueError: for an unknown name, an alpha where there is none, or too small a size.
    """
    shape, options = _options(name, input_size, alpha)
    return ZOO[name].build(input_shape=shape, classes=classes, name=name, **options)


def _options(name, input_size, alpha):
    """Returns the input shape, and the options of the network's builder."""
    if name not in ZOO:
        raise ValueError(f"model {name!r} is neither a zoo name ({NAMES}) nor a .keras file's path")
    entry = ZOO[name]
    size = entry.input_size if input_size is None else input_size
    options = {}
    if entry.takes_alpha:
        options["alpha"] = 1.0 if alpha is None else alpha
    elif alpha is not None:
        raise ValueError(f"--alpha is for {', '.join(TAKES_ALPHA)}; {name} has no width multiplier")
    if options.get("alpha", 1.0) <= 0:
        raise ValueError(f"--alpha {alpha} is not above 0")
    if size < entry.smallest_size:
        raise ValueError(
            f"--input_size {size} is below {entry.smallest_size} pixels, the least of {name}"
        )
    return (size, size, 3), options


def image_input(model: keras.Model, path: str) -> tuple[int, int, int]:
    """Returns (height, width, channels) of a model that takes images and gives one output.

    Raises:
      ValueError: for several inputs or outputs, another rank, or sizes that are not fixed.
    """
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        raise ValueError(
            f"{path} has {len(model.inputs)} inputs and {len(model.outputs)} outputs; one of each "
            "is needed"
        )
    shape, output = tuple(model.inputs[0].shape[1:]), model.outputs[0].shape
    if len(shape) != 3 or None in shape or shape[2] not in (1, 3):
        raise ValueError(
            f"{path} takes input of shape {shape}; needed are images of fixed (height, width, "
            "channels), channels 1 or 3 last"
        )
    if len(output) != 2:
        raise ValueError(f"{path} gives output of shape {output}; needed is (batch, classes)")
    return shape


def load(
    model: str,
    weights: str | None = None,
    classes: int = 1000,
    input_size: int | None = None,
    alpha: float | None = None,
) -> tuple[keras.Model, dict]:
    """Returns the network that --model and --weights mean, and the facts saved with it.

    Args:
      model: a zoo name, or the path of a `.keras` file.
      weights: None, or as `WEIGHTS` says.
      classes, input_size, alpha: for a zoo name; see `build`.

    Raises:
      ValueError, FileNotFoundError: names the flag or file and what is wrong with it.
    """
    if model not in ZOO:
        if os.sep not in model and not model.endswith(".keras"):
            build(model, classes)  # raises: an unknown zoo name
        if weights is not None or alpha is not None or input_size is not None:
            raise ValueError(f"--weights, --alpha and --input_size are for zoo names, not {model}")
        return manifest.load_model(model)
    facts = {"preprocess": ZOO[model].preprocess}
    if weights is not None and slim.is_checkpoint(weights):
        network = slim.build(build(model, classes, input_size, alpha), model)
        slim.load_weights(network, model, weights)
        facts["preprocess"] = slim.PREPROCESS.get(model, facts["preprocess"])
        return network, facts
    network = build(model, classes, input_size, alpha)
    if weights == "imagenet":
        _load_imagenet(network, model, classes, input_size, alpha)
    elif weights == "pretrained":
        pretrained.load_weights(network, model)
    elif weights is not None and weights.endswith(".keras"):
        saved, saved_facts = manifest.load_model(weights)
        facts |= saved_facts
        _copy_weights(saved, network, weights)
    elif weights is not None and weights.endswith(".pth"):
        pretrained.check_name(model, weights)
        pretrained.load_checkpoint(network, weights)
    elif weights is not None:
        _load_h5(network, model, weights)
    return network, facts


def _load_imagenet(network, model, classes, input_size, alpha):
    application = ZOO[model].application
    if application is None:
        known = ", ".join(name for name, entry in ZOO.items() if entry.application)
        raise ValueError(f"--weights=imagenet: Keras has none for {model}, only for {known}")
    if classes != 1000:
        raise ValueError(f"--weights=imagenet has 1000 classes, the data set {classes}")
    shape, options = _options(model, input_size, alpha)
    try:
        downloaded = application(
            # Keras keeps MobileNet weights for several sizes, the others' for one.
            input_shape=shape if ZOO[model].takes_alpha else None,
            weights="imagenet",
            classifier_activation=None,
            **options,
        )
    except Exception as error:  # Keras' downloader raises bare Exception
        line = str(error).strip().splitlines()[0]
        raise ValueError(f"--weights=imagenet could not be had: {line}") from error
    network.set_weights(downloaded.get_weights())


def _load_h5(network, model, weights):
    if not pathlib.Path(weights).is_file():
        raise FileNotFoundError(f"--weights {weights}: no such file; allowed: {WEIGHTS}")
    try:
        network.load_weights(weights)
    except (ValueError, OSError) as error:
        line = str(error).strip().splitlines()[0]
        raise ValueError(f"--weights {weights} does not fit {model}: {line}") from error


def _copy_weights(saved, network, path):
    theirs, ours = saved.get_weights(), network.get_weights()
    if [array.shape for array in theirs] != [array.shape for array in ours]:
        raise ValueError(
            f"--weights {path}: its {len(theirs)} arrays do not have the shapes of {network.name}'s "
            f"{len(ours)} (other --alpha, or another number of classes?)"
        )
    network.set_weights(theirs)
