"""Networks: the zoo by name, or any functional `.keras` file."""

import os
import pathlib

import keras

from lowbit import manifest

# name: (builder in keras.applications, its preprocess, the sizes it is published at)
ZOO = {
    "mobilenet_v1": (keras.applications.MobileNet, "tf", 224),
    "mobilenet_v2": (keras.applications.MobileNetV2, "tf", 224),
    "inception_v3": (keras.applications.InceptionV3, "tf", 299),
    "resnet_v1_50": (keras.applications.ResNet50, "caffe", 224),
    "resnet_v1_152": (keras.applications.ResNet152, "caffe", 224),
    "resnet_v2_50": (keras.applications.ResNet50V2, "tf", 224),
    "resnet_v2_152": (keras.applications.ResNet152V2, "tf", 224),
}
TAKES_ALPHA = ("mobilenet_v1", "mobilenet_v2")

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
      ValueError: for an unknown name, or an alpha where there is none.
    """
    if name not in ZOO:
        raise ValueError(
            f"model {name!r} is neither a zoo name ({', '.join(ZOO)}) nor the path of a .keras file"
        )
    builder, _, published_size = ZOO[name]
    size = input_size or published_size
    options = {}
    if name in TAKES_ALPHA:
        options["alpha"] = 1.0 if alpha is None else alpha
    elif alpha is not None:
        raise ValueError(f"--alpha is for {', '.join(TAKES_ALPHA)}; {name} has no width multiplier")
    if size < 32:
        raise ValueError(f"--input_size {size} is below 32 pixels, which {name} halves five times")
    return builder(
        input_shape=(size, size, 3),
        weights=None,
        classes=classes,
        classifier_activation=None,
        name=name,
        **options,
    )


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
      weights: None, a `.keras` or `.weights.h5` file, or "imagenet" (Keras' own download).
      classes, input_size, alpha: for a zoo name; see `build`.
    """
    if model not in ZOO:
        if os.sep not in model and not model.endswith(".keras"):
            build(model, classes)  # raises: an unknown zoo name
        if weights is not None or alpha is not None or input_size is not None:
            raise ValueError(f"--weights, --alpha and --input_size are for zoo names, not {model}")
        return manifest.load_model(model)
    network = build(model, classes, input_size, alpha)
    facts = {"preprocess": ZOO[model][1]}
    if weights == "imagenet":
        network = _load_imagenet(model, network, classes)
    elif weights is not None and weights.endswith(".keras"):
        saved, saved_facts = manifest.load_model(weights)
        facts |= saved_facts
        _copy_weights(saved, network, weights)
    elif weights is not None:
        if not pathlib.Path(weights).is_file():
            raise FileNotFoundError(f"--weights {weights}: no such file")
        try:
            network.load_weights(weights)
        except (ValueError, OSError) as error:
            line = str(error).strip().splitlines()[0]
            raise ValueError(f"--weights {weights} does not fit {model}: {line}") from error
    return network, facts


def _load_imagenet(model, network, classes):
    if classes != 1000:
        raise ValueError(f"--weights=imagenet has 1000 classes, the data set {classes}")
    builder, _, _ = ZOO[model]
    shape, options = network.input_shape[1:], {}
    if model in TAKES_ALPHA:
        alpha = network.get_layer("conv1" if model == "mobilenet_v1" else "Conv1").filters / 32
        options["alpha"] = alpha
    try:
        pretrained = builder(
            input_shape=shape, weights="imagenet", classifier_activation=None, **options
        )
    except Exception as error:  # Keras' downloader raises bare Exception
        line = str(error).strip().splitlines()[0]
        raise ValueError(f"--weights=imagenet could not be had: {line}") from error
    network.set_weights(pretrained.get_weights())
    return network


def _copy_weights(saved, network, path):
    theirs, ours = saved.get_weights(), network.get_weights()
    if [array.shape for array in theirs] != [array.shape for array in ours]:
        raise ValueError(
            f"--weights {path}: its {len(theirs)} arrays do not have the shapes of {network.name}'s "
            f"{len(ours)} (other --alpha, or another number of classes?)"
        )
    network.set_weights(theirs)
