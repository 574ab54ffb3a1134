"""Trains a network with tfmot on the digits of scikit-learn, saves it, and converts it as tfmot does.

    python scripts/tfmot_training.py --network=mobile --output=runs/tfmot/mobile

writes OUTPUT.h5, OUTPUT.keras and OUTPUT.tflite (int8, by TensorFlow's converter).  It needs the extra
`[tfmot]` and a process of its own: tfmot's Keras 2 and Keras 3 cannot share TensorFlow's `tf.keras`.
`tests/data/` has what `--network=tiny` made.
"""

import argparse
import os
import pathlib
import zipfile

import numpy as np

TRAINING_IMAGES = 1500  # of 1,797; the rest is for tests
BATCH_SIZE = 32


def digits(size: int):
    """Returns (images float32 in [0, 1] (n, size, size, 1), labels), pixels repeated to the size."""
    from sklearn import datasets

    loaded = datasets.load_digits()
    images = (loaded.images / 16).astype(np.float32)
    for axis in (1, 2):
        images = images.repeat(size // 8, axis)
    return images[..., None], loaded.target


def tiny(layers, x):
    """Every kind of range that tfmot keeps, in 4 channels of 8x8 pixels."""

    def normalized(x, name, activation):
        x = layers.BatchNormalization(name=f"{name}_bn")(x)
        return x if activation is None else activation(x)

    x = layers.ZeroPadding2D(((0, 1), (0, 1)), name="stem_pad")(x)
    x = layers.Conv2D(4, 3, 2, use_bias=False, name="stem")(x)
    first = x = normalized(x, "stem", layers.ReLU(6.0, name="stem_relu"))
    x = layers.DepthwiseConv2D(3, padding="same", use_bias=False, name="dw")(x)
    x = normalized(x, "dw", layers.Activation("relu", name="dw_relu"))
    x = layers.Conv2D(4, 1, use_bias=False, name="project")(x)
    x = normalized(x, "project", None)
    x = layers.Add(name="add")([x, first])
    branch = layers.Conv2D(4, 3, padding="same", activation="relu", name="branch")(x)
    x = layers.Concatenate(name="join")([branch, x])
    x = layers.MaxPooling2D(name="pool")(x)
    x = layers.Flatten(name="flat")(x)
    return layers.Dense(10, activation="softmax", name="classes")(x)


def mobile(layers, x):
    """A MobileNet-v2 of three blocks for 32x32 pixels, logits out."""

    def convolution(x, name, layer, activate=True):
        x = layer(x)
        x = layers.BatchNormalization(name=f"{name}_bn")(x)
        return layers.ReLU(6.0, name=f"{name}_relu")(x) if activate else x

    def conv(x, name, filters, size=1, stride=1, activate=True):
        layer = layers.Conv2D(filters, size, stride, padding="same", use_bias=False, name=name)
        return convolution(x, name, layer, activate)

    x = conv(x, "stem", 16, 3, 2)
    for number, (filters, stride) in enumerate(((16, 1), (24, 2), (24, 1)), 1):
        before, name = x, f"block{number}"
        x = conv(x, f"{name}_expand", 4 * x.shape[-1])
        layer = layers.DepthwiseConv2D(
            3, stride, padding="same", use_bias=False, name=f"{name}_depthwise"
        )
        x = convolution(x, f"{name}_depthwise", layer)
        x = conv(x, f"{name}_project", filters, activate=False)
        if before.shape == x.shape:
            x = layers.Add(name=f"{name}_add")([x, before])
    x = conv(x, "head", 64)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return layers.Dense(10, name="logits")(x)


# name: (function, pixels, epochs in float, epochs with tfmot's quantizers)
NETWORKS = {"tiny": (tiny, 8, 5, 20), "mobile": (mobile, 32, 15, 30)}


def main():
    """Trains, saves, converts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=NETWORKS, default="mobile")
    parser.add_argument("--output", required=True, help="path without its suffix")
    arguments = parser.parse_args()
    os.environ["TF_USE_LEGACY_KERAS"] = "1"  # before TensorFlow is imported
    import tensorflow as tf
    import tensorflow_model_optimization as tfmot
    import tf_keras

    build, size, float_epochs, epochs = NETWORKS[arguments.network]
    images, labels = digits(size)
    tf_keras.utils.set_random_seed(0)
    inputs = tf_keras.Input(images.shape[1:], name="pixels")
    model = tf_keras.Model(inputs, build(tf_keras.layers, inputs), name=arguments.network)
    loss = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=arguments.network == "mobile")

    def fit(model, epochs, rate):
        model.compile(tf_keras.optimizers.Adam(rate), loss, ["accuracy"])
        training = images[:TRAINING_IMAGES], labels[:TRAINING_IMAGES]
        model.fit(*training, BATCH_SIZE, epochs, verbose=0)
        accuracy = model.evaluate(
            images[TRAINING_IMAGES:], labels[TRAINING_IMAGES:], BATCH_SIZE, verbose=0
        )[1]
        print(f"{model.name}: top-1 {accuracy:.4f}", flush=True)

    fit(model, float_epochs, 1e-3)
    quantized = tfmot.quantization.keras.quantize_model(model)
    fit(quantized, epochs, 1e-4)

    path = pathlib.Path(arguments.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    quantized.save(path.with_suffix(".h5"), include_optimizer=False)
    _save_keras(quantized, path.with_suffix(".keras"))
    converter = tf.lite.TFLiteConverter.from_keras_model(quantized)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.inference_input_type = converter.inference_output_type = tf.int8
    path.with_suffix(".tflite").write_bytes(converter.convert())


def _save_keras(model, path):
    """Saves `.keras` and packs it anew: its HDF5 file is zeros for the most part."""
    model.compile()  # else the optimizer's slots, twice the weights, lie in it too
    model.save(path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


if __name__ == "__main__":
    main()
