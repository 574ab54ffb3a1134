"""ResNet-18 and ResNet-34 (He et al., arXiv 1512.03385), with torchvision's padding and strides.

keras.applications has none.  Two 3x3 convolutions a block, the stride in the first; padding is
symmetric, as torchvision's weights mean it: TensorFlow's SAME would lie one pixel elsewhere.
"""

import keras

# blocks of the four stages
BLOCKS = {"resnet_v1_18": (2, 2, 2, 2), "resnet_v1_34": (3, 4, 6, 3)}
FILTERS = 64  # of the first stage; each stage doubles them

L = keras.layers


def build(
    variant: str,
    input_shape: tuple[int, int, int],
    classes: int,
    name: str | None = None,
    filters: int = FILTERS,
) -> keras.Model:
    """Returns a ResNet of basic blocks with random weights and logits out.

    Args:
      variant: a key of BLOCKS.
      input_shape: (height, width, channels).
      classes: the number of logits.
      name: of the model; default: the variant.
      filters: of the first stage.
    """
    inputs = keras.Input(input_shape, name="image")
    x = _conv_bn(inputs, "conv1", filters, 7, strides=2)
    x = L.ReLU(name="conv1_relu")(x)
    # Padded with zeros, which are no larger than what a ReLU gives: as with minus infinity.
    x = L.MaxPooling2D(3, strides=2, name="pool1")(L.ZeroPadding2D(1, name="pool1_pad")(x))
    for stage, repeats in enumerate(BLOCKS[variant]):
        for repeat in range(repeats):
            strides = 2 if stage > 0 and repeat == 0 else 1
            x = _block(x, f"stage{stage + 1}_block{repeat + 1}", filters * 2**stage, strides)
    x = L.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, L.Dense(classes, name="predictions")(x), name=name or variant)


def _block(x, name, filters, strides):
    shortcut = x
    if strides != 1 or x.shape[-1] != filters:
        shortcut = _conv_bn(x, f"{name}_shortcut", filters, 1, strides)
    x = L.ReLU(name=f"{name}_relu1")(_conv_bn(x, f"{name}_conv1", filters, 3, strides))
    x = _conv_bn(x, f"{name}_conv2", filters, 3)
    return L.ReLU(name=f"{name}_relu")(L.Add(name=f"{name}_add")([shortcut, x]))


def _conv_bn(x, name, filters, kernel, strides=1):
    padding = "valid" if kernel == 1 else "same"
    if strides > 1 and kernel > 1:
        x = L.ZeroPadding2D(kernel // 2, name=f"{name}_pad")(x)
        padding = "valid"
    x = L.Conv2D(filters, kernel, strides=strides, padding=padding, use_bias=False, name=name)(x)
    return L.BatchNormalization(momentum=0.9, epsilon=1e-5, name=f"{name}_bn")(x)
