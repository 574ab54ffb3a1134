"""EfficientNet-Lite 0 to 4: EfficientNet with ReLU6, without squeeze-and-excite, for integer kernels.

Tan and Le, arXiv 1905.11946, and the Lite variants that the TPU repository published: stem and head
keep their width, and the first and last stage their one block, whatever the scaling.
"""

import math

import keras

# kernel size, blocks, stride, expansion, filters, of the seven stages of Lite0
STAGES = (
    (3, 1, 1, 1, 16),
    (3, 2, 2, 6, 24),
    (5, 2, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (5, 3, 1, 6, 112),
    (5, 4, 2, 6, 192),
    (3, 1, 1, 6, 320),
)
# width and depth multiplier, input size in pixels
VARIANTS = {
    "efficientnet_lite0": (1.0, 1.0, 224),
    "efficientnet_lite1": (1.0, 1.1, 240),
    "efficientnet_lite2": (1.1, 1.2, 260),
    "efficientnet_lite3": (1.2, 1.4, 280),
    "efficientnet_lite4": (1.4, 1.8, 300),
}
STEM_FILTERS, HEAD_FILTERS = 32, 1280
DROPOUT = {"efficientnet_lite3": 0.3, "efficientnet_lite4": 0.3}  # the others 0.2

L = keras.layers


def build(
    variant: str, input_shape: tuple[int, int, int], classes: int, name: str | None = None
) -> keras.Model:
    """Returns an EfficientNet-Lite with random weights and logits out.

    Args:
      variant: a key of VARIANTS.
      input_shape: (height, width, channels).
      classes: the number of logits.
      name: of the model; default: the variant.
    """
    width, depth, _ = VARIANTS[variant]
    inputs = keras.Input(input_shape, name="image")
    x = _conv_bn(inputs, "stem", STEM_FILTERS, 3, strides=2)
    block = 0
    for stage, (kernel, repeats, strides, expansion, filters) in enumerate(STAGES):
        if stage not in (0, len(STAGES) - 1):
            repeats = math.ceil(depth * repeats)
        for repeat in range(repeats):
            x = _block(
                x,
                f"b{block}",
                kernel,
                strides if repeat == 0 else 1,
                expansion,
                round_filters(filters, width),
            )
            block += 1
    x = _conv_bn(x, "head", HEAD_FILTERS, 1)
    x = L.GlobalAveragePooling2D(name="pool")(x)
    x = L.Dropout(DROPOUT.get(variant, 0.2), name="dropout")(x)
    outputs = L.Dense(classes, name="predictions")(x)
    return keras.Model(inputs, outputs, name=name or variant)


def round_filters(filters: int, width: float) -> int:
    """Returns width * filters, to the nearest multiple of 8 that is not below 90 % of it."""
    scaled = filters * width
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded


def _block(x, name, kernel, strides, expansion, filters):
    """Inverted bottleneck: expand, depthwise, project, and the input added where it fits."""
    block_input = x
    if expansion != 1:
        x = _conv_bn(x, f"{name}_expand", x.shape[-1] * expansion, 1)
    x = L.DepthwiseConv2D(
        kernel, strides=strides, padding="same", use_bias=False, name=f"{name}_dw"
    )(x)
    x = _batch_norm(x, f"{name}_dw")
    x = L.ReLU(6.0, name=f"{name}_dw_relu")(x)
    x = L.Conv2D(filters, 1, padding="same", use_bias=False, name=f"{name}_proj")(x)
    x = _batch_norm(x, f"{name}_proj")
    if strides == 1 and block_input.shape[-1] == filters:
        x = L.Add(name=f"{name}_add")([block_input, x])
    return x


def _conv_bn(x, name, filters, kernel, strides=1):
    x = L.Conv2D(filters, kernel, strides=strides, padding="same", use_bias=False, name=name)(x)
    return L.ReLU(6.0, name=f"{name}_relu")(_batch_norm(x, name))


def _batch_norm(x, name):
    return L.BatchNormalization(momentum=0.99, epsilon=1e-3, name=f"{name}_bn")(x)
