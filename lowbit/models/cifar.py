"""Networks for images of 32x32 pixels: ResNet-20, VGG-small, and a MobileNet-v1 of smaller strides.

resnet20         He et al., arXiv 1512.03385, section 4.2.  Where their shortcuts pad new channels
                 with zeros, here are 1x1 convolutions without batch norm: a kernel of ones and
                 zeros is that padding, so that weights trained with it fit, and it can be learned.
vgg_small        (2x128C3)-MP2-(2x256C3)-MP2-(2x512C3)-MP2-FC, which LQ-Nets (arXiv 1807.10029) made of
                 BNN's network (arXiv 1602.02830) and DSQ (arXiv 1908.05033) quantizes too.
mobilenet_cifar  MobileNet-v1 (arXiv 1704.04861) without the first two of its five strides.
                 keras.applications.MobileNet takes 32 pixels too, but leaves 2x2 of them to six of
                 its 13 blocks and one to the last two, where a 3x3 kernel sees mostly padding.

Each halves an image three times or less: 8 pixels are the least.
"""

import keras

BLOCKS = 3  # of each of ResNet-20's three stages
# filters and stride of MobileNet-v1's 13 blocks; ImageNet's has 2 in the second one also
MOBILENET_BLOCKS = (
    (64, 1),
    *((128, 1), (128, 1)),
    *((256, 2), (256, 1)),
    *((512, 2), (512, 1), (512, 1), (512, 1), (512, 1), (512, 1)),
    *((1024, 2), (1024, 1)),
)

L = keras.layers


def resnet20(
    input_shape: tuple[int, int, int], classes: int, name: str = "resnet20", filters: int = 16
) -> keras.Model:
    """Returns a ResNet-20 with random weights and logits out.

    Args:
      input_shape: (height, width, channels).
      classes: the number of logits.
      name: of the model.
      filters: of the first stage; the others have two and four times as many.
    """
    inputs = keras.Input(input_shape, name="image")
    x = _padded_conv(inputs, filters, 1, "conv1")
    x = L.ReLU(name="conv1_relu")(_norm(x, "bn1"))
    for stage in range(3):
        for block in range(BLOCKS):
            strides = 2 if stage > 0 and block == 0 else 1
            x = _residual_block(x, filters * 2**stage, strides, f"layer{stage + 1}_{block}")
    x = L.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, L.Dense(classes, name="predictions")(x), name=name)


def _residual_block(x, filters, strides, name):
    shortcut = x
    x = _padded_conv(x, filters, strides, f"{name}_conv1")
    x = L.ReLU(name=f"{name}_relu1")(_norm(x, f"{name}_bn1"))
    x = _norm(_padded_conv(x, filters, 1, f"{name}_conv2"), f"{name}_bn2")
    if strides > 1:
        # Two layers as in the networks that were trained so; together a strided convolution.
        shortcut = L.MaxPooling2D(1, strides=strides, name=f"{name}_subsample")(shortcut)
        shortcut = L.Conv2D(filters, 1, use_bias=False, name=f"{name}_shortcut")(shortcut)
    return L.ReLU(name=f"{name}_relu2")(L.Add(name=f"{name}_add")([shortcut, x]))


def _padded_conv(x, filters, strides, name):
    """3x3 with symmetric padding, also where strided: TensorFlow's SAME would lie a pixel elsewhere."""
    x = L.ZeroPadding2D(1, name=f"{name}_pad")(x)
    return L.Conv2D(filters, 3, strides=strides, use_bias=False, name=name)(x)


def _norm(x, name):
    return L.BatchNormalization(momentum=0.9, epsilon=1e-5, name=name)(x)


def vgg_small(
    input_shape: tuple[int, int, int], classes: int, name: str = "vgg_small", filters: int = 128
) -> keras.Model:
    """Returns a VGG-small with random weights and logits out.

    LQ-Nets' own has the pools before the batch norms, which then would not fold into convolutions.

    Args:
      input_shape: (height, width, channels).
      classes: the number of logits.
      name: of the model.
      filters: of the first stage; the others have two and four times as many.
    """
    inputs = keras.Input(input_shape, name="image")
    x = inputs
    for stage in range(1, 4):
        for conv in range(1, 3):
            layer = f"stage{stage}_conv{conv}"
            x = L.Conv2D(filters, 3, padding="same", use_bias=False, name=layer)(x)
            x = L.ReLU(name=f"{layer}_relu")(_norm(x, f"{layer}_bn"))
        x = L.MaxPooling2D(2, name=f"stage{stage}_pool")(x)
        filters *= 2
    outputs = L.Dense(classes, name="predictions")(L.Flatten(name="flatten")(x))
    return keras.Model(inputs, outputs, name=name)


def mobilenet_cifar(
    input_shape: tuple[int, int, int],
    classes: int,
    name: str = "mobilenet_cifar",
    alpha: float = 1.0,
    relu6: bool = True,
) -> keras.Model:
    """Returns a MobileNet-v1 that halves an image three times, with random weights and logits out.

    Layers and weights up to the pool are those of `keras.applications.MobileNet`, by name and shape.

    Args:
      input_shape: (height, width, channels).
      classes: the number of logits.
      name: of the model.
      alpha: width multiplier; numbers of filters are rounded down, as Keras does.
      relu6: whether activations end at 6; without it training finds their ranges (whitepaper
        section 5, Figure 16).
    """
    largest = 6.0 if relu6 else None

    def norm_relu(x, layer):
        return L.ReLU(largest, name=f"{layer}_relu")(
            L.BatchNormalization(name=f"{layer}_bn")(x)  # Keras' 0.99 and 1e-3
        )

    inputs = keras.Input(input_shape, name="image")
    x = L.Conv2D(int(32 * alpha), 3, padding="same", use_bias=False, name="conv1")(inputs)
    x = norm_relu(x, "conv1")
    for block, (filters, strides) in enumerate(MOBILENET_BLOCKS, 1):
        depthwise, pointwise = f"conv_dw_{block}", f"conv_pw_{block}"
        x = L.DepthwiseConv2D(3, strides=strides, padding="same", use_bias=False, name=depthwise)(x)
        x = norm_relu(x, depthwise)
        x = L.Conv2D(int(filters * alpha), 1, use_bias=False, name=pointwise)(x)
        x = norm_relu(x, pointwise)
    x = L.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, L.Dense(classes, name="predictions")(x), name=name)
