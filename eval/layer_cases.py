"""Small pieces of networks, one for each layer and way to write it: what conformance is checked on.

Each makes something of an image x (n, h, w, c) of any size and number of channels.
"""

import keras
import numpy as np

L, ops = keras.layers, keras.ops


def conv(x, filters=None, size=1, **options):
    """Returns a convolution of x, of as many channels where `filters` is None."""
    return L.Conv2D(filters or x.shape[-1], size, padding="same", **options)(x)


def excite(x):
    """Squeeze and excite: a product with one factor for each channel."""
    pooled = L.GlobalAveragePooling2D(keepdims=True)(x)
    return L.Multiply()([x, conv(pooled, x.shape[-1], activation="relu6")])


def flat_excite(x):
    pooled = L.GlobalAveragePooling2D()(x)
    return L.Multiply()([L.Dense(x.shape[-1], activation="relu6")(pooled), x])


def over_time(x):
    """Two convolutions over rows of pixels, batch norms and activations between, and their mean."""
    y = L.Reshape((x.shape[1] * x.shape[2], x.shape[3]))(x)
    for options in ({"strides": 2}, {"dilation_rate": 2}):
        y = L.Conv1D(x.shape[3], 3, use_bias=False, **options)(y)
        y = L.ReLU()(L.BatchNormalization()(y))
    return L.Multiply()([x, L.GlobalAveragePooling1D()(y)])


def turned(x):
    """A reshape to the sizes that a transpose has."""
    return ops.reshape(x, (-1, x.shape[2], x.shape[1], x.shape[3]))


# name: (what is made of x (n, h, w, c), operations that it becomes)
CASES = {
    "convolution": (lambda x: L.Conv2D(6, 3, padding="same")(x), ["CONV_2D"]),
    "convolution, valid, strides 2, relu": (
        lambda x: L.Conv2D(7, 3, strides=2, activation="relu")(x),
        ["CONV_2D"],
    ),
    "convolution, dilated": (
        lambda x: L.Conv2D(6, 3, dilation_rate=2, padding="same")(x),
        ["CONV_2D"],
    ),
    "convolution, batch norm, relu6": (
        lambda x: L.ReLU(6.0)(L.BatchNormalization()(L.Conv2D(8, 3, use_bias=False)(x))),
        ["CONV_2D"],
    ),
    "depthwise": (
        lambda x: L.DepthwiseConv2D(3, padding="same", activation="relu6")(x),
        ["DEPTHWISE_CONV_2D"],
    ),
    "depthwise, multiplier 2, strides 2": (
        lambda x: L.DepthwiseConv2D(3, 2, depth_multiplier=2)(x),
        ["DEPTHWISE_CONV_2D"],
    ),
    "separable": (
        lambda x: L.SeparableConv2D(6, 3, padding="same")(x),
        ["DEPTHWISE_CONV_2D", "CONV_2D"],
    ),
    "dense on an image": (lambda x: L.Dense(6)(x), ["FULLY_CONNECTED"]),
    "batch norm alone": (lambda x: L.BatchNormalization()(L.ReLU()(x)), ["DEPTHWISE_CONV_2D"]),
    "add": (lambda x: L.Add()([conv(x), x]), ["ADD"]),
    "add, relu": (lambda x: L.ReLU()(L.Add()([conv(x), x])), ["ADD"]),
    "add of three": (lambda x: L.Add()([conv(x), x, conv(x)]), ["ADD", "ADD"]),
    "concatenate": (lambda x: L.Concatenate()([conv(x, 3), x]), ["CONCATENATION"]),
    "max pooling": (lambda x: L.MaxPooling2D(2)(x), ["MAX_POOL_2D"]),
    "max pooling, same": (lambda x: L.MaxPooling2D(3, 2, padding="same")(x), ["MAX_POOL_2D"]),
    "average pooling": (lambda x: L.AveragePooling2D(2, padding="same")(x), ["AVERAGE_POOL_2D"]),
    "global average pooling": (
        lambda x: L.Multiply()([x, L.GlobalAveragePooling2D(keepdims=True)(x)]),
        ["MEAN", "MUL"],
    ),
    "zero padding": (lambda x: L.ZeroPadding2D(((1, 0), (0, 2)))(x), ["PAD"]),
    "cropping": (lambda x: L.Cropping2D(((0, 1), (1, 0)))(x), ["SLICE"]),
    "rescaling": (lambda x: L.Rescaling(0.7, 0.2)(L.MaxPooling2D(2)(x)), ["DEPTHWISE_CONV_2D"]),
    "softmax over channels": (lambda x: L.Softmax()(x), ["SOFTMAX"]),
    "relu of a pool": (lambda x: L.ReLU()(L.MaxPooling2D(1)(x)), ["RELU"]),
    "relu6 of a pool": (lambda x: L.ReLU(6.0)(L.MaxPooling2D(1)(x)), ["RELU6"]),
    "a layer called twice": (
        lambda x: (lambda layer: L.Add()([layer(x), layer(L.ReLU()(x))]))(
            L.Conv2D(x.shape[-1], 3, padding="same")
        ),
        ["CONV_2D", "CONV_2D", "ADD"],
    ),
    "subtract": (lambda x: L.Subtract()([conv(x), x]), ["SUB"]),
    "subtract, relu": (
        lambda x: L.ReLU()(L.Subtract()([x, conv(x)])),
        ["SUB"],
    ),
    "multiply": (lambda x: L.Multiply()([conv(x), x]), ["MUL"]),
    "square": (lambda x: L.Multiply()([x, x]), ["MUL"]),
    "multiply three": (lambda x: L.Multiply()([conv(x), x, conv(x)]), ["MUL", "MUL"]),
    "multiply, relu6": (lambda x: L.ReLU(6.0)(L.Multiply()([x, conv(x)])), ["MUL"]),
    "squeeze and excite": (excite, ["MUL"]),
    "squeeze and excite, flat": (flat_excite, ["MUL"]),
    "add, broadcast": (
        lambda x: L.Add()([x, L.GlobalAveragePooling2D(keepdims=True)(x)]),
        ["ADD"],
    ),
    "maximum": (lambda x: L.Maximum()([conv(x), x]), ["MAXIMUM"]),
    "minimum": (lambda x: L.Minimum()([conv(x), x]), ["MINIMUM"]),
    "minimum of three": (
        lambda x: L.Minimum()([conv(x), x, conv(x)]),
        ["MINIMUM", "MINIMUM"],
    ),
    "global max pooling": (
        lambda x: L.GlobalMaxPooling2D(keepdims=True)(x),
        ["MAX_POOL_2D"],
    ),
    "global max pooling, flat": (
        lambda x: L.Reshape((1, 1, x.shape[-1]))(L.GlobalMaxPooling2D()(x)),
        ["MAX_POOL_2D", "RESHAPE", "RESHAPE"],
    ),
    "upsampling": (lambda x: L.UpSampling2D(2)(x), ["RESIZE_NEAREST_NEIGHBOR"]),
    "upsampling 3 by 1": (
        lambda x: L.UpSampling2D((3, 1))(x),
        ["RESIZE_NEAREST_NEIGHBOR"],
    ),
    "upsampling, bilinear": (
        lambda x: L.UpSampling2D((2, 3), interpolation="bilinear")(x),
        ["RESIZE_BILINEAR"],
    ),
    "resizing up": (lambda x: L.Resizing(16, 11)(x), ["RESIZE_BILINEAR"]),
    "resizing down": (lambda x: L.Resizing(4, 5)(x), ["RESIZE_BILINEAR"]),
    "sigmoid": (lambda x: L.Activation("sigmoid")(x), ["LOGISTIC"]),
    "tanh": (lambda x: conv(x, activation="tanh"), ["TANH"]),
    "silu": (lambda x: conv(x, activation="silu"), ["LOGISTIC", "MUL"]),
    "gelu": (lambda x: L.Activation("gelu")(x), ["GELU"]),
    "leaky relu": (lambda x: L.LeakyReLU(0.1)(x), ["LEAKY_RELU"]),
    "relu with a slope": (lambda x: L.ReLU(negative_slope=0.3)(x), ["LEAKY_RELU"]),
    "activation leaky_relu": (lambda x: conv(x, activation="leaky_relu"), ["LEAKY_RELU"]),
    "swish": (
        lambda x: L.Multiply()([x, L.Activation("sigmoid")(x)]),
        ["LOGISTIC", "MUL"],
    ),
    "groups": (
        lambda x: L.Conv2D(8, 3, groups=2, activation="relu")(conv(x, 6)),
        ["CONV_2D", "CONV_2D"],
    ),
    "groups, batch norm": (
        lambda x: L.BatchNormalization()(L.Conv2D(6, 1, groups=3, use_bias=False)(conv(x, 6))),
        ["CONV_2D", "CONV_2D"],
    ),
    "a group for each channel": (
        lambda x: L.Conv2D(2 * x.shape[-1], 3, 2, "same", groups=x.shape[-1])(x),
        ["DEPTHWISE_CONV_2D"],
    ),
    **{
        f"transposed, {padding}, window {window}, strides {strides}": (
            lambda x, options=(window, strides, padding): L.Conv2DTranspose(6, *options)(x),
            ["TRANSPOSE_CONV"],
        )
        for padding in ("same", "valid")
        for window, strides in ((3, 1), (2, 2), (4, 2), (3, (2, 1)), (1, 2), (5, 3))
    },
    "transposed, output padding": (
        lambda x: L.Conv2DTranspose(4, 3, 2, "same", output_padding=1)(x),
        ["TRANSPOSE_CONV"],
    ),
    "transposed, batch norm and relu6": (
        lambda x: L.ReLU(6.0)(
            L.BatchNormalization()(L.Conv2DTranspose(9, 3, 2, use_bias=False)(x))
        ),
        ["TRANSPOSE_CONV"],
    ),
    "hard sigmoid": (lambda x: L.Activation("hard_sigmoid")(x), ["DEPTHWISE_CONV_2D"]),
    "hard swish": (lambda x: conv(x, activation="hard_silu"), ["DEPTHWISE_CONV_2D", "MUL"]),
    "hard swish of a depthwise layer": (
        lambda x: L.DepthwiseConv2D(3, activation="hard_silu")(x),
        ["DEPTHWISE_CONV_2D", "DEPTHWISE_CONV_2D", "MUL"],
    ),
    "hard sigmoid, flat": (
        lambda x: L.Multiply()(
            [x, L.Dense(x.shape[-1], activation="hard_sigmoid")(L.GlobalAveragePooling2D()(x))]
        ),
        ["RESHAPE", "DEPTHWISE_CONV_2D", "RESHAPE", "MUL"],
    ),
    "hard swish in ops": (lambda x: x * (ops.relu6(x + 3.0) / 6.0), ["DEPTHWISE_CONV_2D", "MUL"]),
    "hard swish with a layer": (
        lambda x: L.Multiply()([x, L.ReLU(6.0)(x + 3.0) * (1 / 6)]),
        ["DEPTHWISE_CONV_2D", "MUL"],
    ),
    "relu6 of a shift that is read twice": (
        lambda x: (lambda y: L.Add()([y, ops.relu6(y) * (1 / 6)]))(x + 3.0),
        ["RELU6", "DEPTHWISE_CONV_2D", "ADD"],
    ),
    "ops: sums": (lambda x: (x + conv(x)) - 0.5 * (1.0 - x), ["SUB"]),
    "ops: products": (lambda x: ops.square(x) * conv(x) + x**2, ["MUL", "MUL", "MUL", "ADD"]),
    "ops: a factor a channel": (
        lambda x: L.MaxPooling2D(2)(
            L.MaxPooling2D(1)(x) * np.linspace(0.5, 2, x.shape[-1], dtype=np.float32)
        ),
        ["MAX_POOL_2D", "DEPTHWISE_CONV_2D", "MAX_POOL_2D"],
    ),
    "ops: functions": (
        lambda x: ops.tanh(x) - ops.sigmoid(conv(x)) * ops.gelu(x, approximate=False),
        ["SUB"],
    ),
    "ops: softmax": (lambda x: ops.softmax(x), ["SOFTMAX"]),
    "ops: leaky relu": (lambda x: ops.leaky_relu(ops.relu(-x) + x, 0.1), ["LEAKY_RELU"]),
    "ops: pools": (
        lambda x: (
            x * ops.mean(x, axis=(1, 2), keepdims=True) + ops.max(x, axis=[1, 2], keepdims=True)
        ),
        ["MUL", "MAX_POOL_2D", "ADD"],
    ),
    "ops: movers": (
        lambda x: ops.pad(
            ops.concatenate(
                [
                    ops.transpose(x, (0, 2, 1, 3)),
                    ops.reshape(x, (-1, x.shape[2], x.shape[1], x.shape[3])),
                ],
                -1,
            ),
            ((0, 0), (1, 2), (1, 1), (0, 0)),
        ),
        ["TRANSPOSE", "RESHAPE", "CONCATENATION", "PAD"],
    ),
    "ops: axes of 1": (
        lambda x: ops.squeeze(ops.expand_dims(x, 1), 1),
        ["RESHAPE", "RESHAPE"],
    ),
    "ops: clip": (lambda x: ops.clip(L.MaxPooling2D(1)(x) + 0.1, 0, 6), ["DEPTHWISE_CONV_2D"]),
    "elu": (lambda x: L.ELU()(x), ["ELU"]),
    "activation elu": (lambda x: conv(x, activation="elu"), ["ELU"]),
    "prelu": (lambda x: L.PReLU(shared_axes=(1, 2))(x), ["PRELU"]),
    "prelu, a slope a pixel": (lambda x: L.PReLU()(x), ["PRELU"]),
    "layer normalization": (
        lambda x: L.MaxPooling2D(1)(L.LayerNormalization()(x)),
        ["MEAN", "SUB", "MUL", "MEAN", "DEPTHWISE_CONV_2D", "RSQRT", "MUL", "DEPTHWISE_CONV_2D"],
    ),
    "layer normalization before dense": (
        lambda x: L.Dense(6)(L.LayerNormalization(epsilon=1e-6)(x)),
        ["MEAN", "SUB", "MUL", "MEAN", "DEPTHWISE_CONV_2D", "RSQRT", "MUL", "FULLY_CONNECTED"],
    ),
    "rms normalization": (
        lambda x: L.RMSNormalization()(x),
        ["MUL", "MEAN", "DEPTHWISE_CONV_2D", "RSQRT", "MUL"],
    ),
    "a factor a channel behind a convolution": (
        lambda x: L.Add()([x, conv(x) * np.linspace(0.5, 2, x.shape[-1], dtype=np.float32)]),
        ["CONV_2D", "ADD"],
    ),
    "functions of fixed scales joined": (
        lambda x: L.Concatenate()([L.Activation("sigmoid")(x), conv(x, activation="tanh"), x]),
        ["TANH", "LOGISTIC", "QUANTIZE", "QUANTIZE", "CONCATENATION"],
    ),
    "a hard sigmoid joined": (
        lambda x: L.Concatenate()([L.Activation("hard_sigmoid")(x), x]),
        ["DEPTHWISE_CONV_2D", "QUANTIZE", "CONCATENATION"],
    ),
    "two fixed scales joined, one moved": (
        lambda x: L.Maximum()([ops.tanh(x), L.Permute((1, 2, 3))(ops.sigmoid(conv(x)))]),
        ["LOGISTIC", "TANH", "QUANTIZE", "QUANTIZE", "MAXIMUM"],
    ),
    "convolution over time": (
        lambda x: L.Reshape((x.shape[1], x.shape[2], 5))(
            L.Conv1D(5, 3, padding="same", activation="relu6")(
                L.Reshape((x.shape[1] * x.shape[2], x.shape[3]))(x)
            )
        ),
        ["CONV_2D"],
    ),
    "convolutions over time, batch norm": (over_time, ["CONV_2D", "CONV_2D", "MEAN"]),
    "ops: slices": (
        lambda x: L.Concatenate()([x[:, 1:-1, :-2, ::2], x[:, 2:, 2:, 1:2]]),
        ["STRIDED_SLICE", "SLICE", "CONCATENATION"],
    ),
    "ops: a row": (
        lambda x: x * ops.expand_dims(x[:, 1], 1),
        ["SLICE", "RESHAPE", "RESHAPE", "MUL"],
    ),
    "ops: split": (
        lambda x: (lambda parts: parts[1] * parts[0])(ops.split(conv(x, 8), 2, axis=-1)),
        ["SLICE", "SLICE", "MUL"],
    ),
    "ops: split in three": (
        lambda x: L.Concatenate()(ops.split(conv(x, 7), [2, 3], axis=-1)[::-1]),
        ["SLICE", "SLICE", "SLICE", "CONCATENATION"],
    ),
    "ops: depth to space": (lambda x: ops.depth_to_space(conv(x, 8), 2), ["DEPTH_TO_SPACE"]),
    "ops: space to depth": (
        lambda x: ops.space_to_depth(L.Resizing(8, 6)(x), 2),
        ["SPACE_TO_DEPTH"],
    ),
    "pixel shuffle of reshapes": (
        lambda x: (
            lambda y: ops.reshape(
                ops.transpose(
                    ops.reshape(y, (-1, y.shape[1], y.shape[2], 2, 2, 2)), (0, 1, 3, 2, 4, 5)
                ),
                (-1, 2 * y.shape[1], 2 * y.shape[2], 2),
            )
        )(conv(x, 8)),
        ["RESHAPE", "TRANSPOSE", "RESHAPE"],
    ),
    "ops: mean over channels": (
        lambda x: x - ops.mean(x, axis=-1, keepdims=True),
        ["MEAN", "SUB"],
    ),
    "average": (lambda x: L.Average()([conv(x), x]), ["ADD"]),
    "permute": (lambda x: L.Permute((2, 1, 3))(x), ["TRANSPOSE"]),
    "permute to channels first": (lambda x: L.Permute((3, 1, 2))(x), ["TRANSPOSE"]),
}
