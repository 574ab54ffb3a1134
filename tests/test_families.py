"""A scaled-down member of each family: placed, calibrated, exported, checked; 0 codes differ."""

import functools

import keras
import numpy as np
import pytest
from keras.src.applications import inception_v3 as keras_inception
from keras.src.applications import nasnet as keras_nasnet
from keras.src.applications import resnet as keras_resnet

from eval import parity
from lowbit import (
    calibration,
    kernels,
    lint,
    lowering,
    models,
    placement,
    runtimes,
    spec,
    tflite_file,
)
from lowbit.models import batch_norms, cifar, efficientnet_lite, resnet, slim

L = keras.layers
CLASSES = 40
DISTINCT = 16  # codes of every compared tensor


def keras_resnet_of(version):
    """Keras' own ResNet with fewer, narrower blocks."""
    stacks = {
        "v1": keras_resnet.stack_residual_blocks_v1,
        "v2": keras_resnet.stack_residual_blocks_v2,
    }

    def stack(x):
        x = stacks[version](x, 8, 2, **({"stride1": 1} if version == "v1" else {}), name="conv2")
        return stacks[version](x, 16, 2, name="conv3")

    return keras_resnet.ResNet(
        stack,
        preact=version == "v2",
        use_bias=True,
        weights=None,
        input_shape=(48, 48, 3),
        classes=CLASSES,
        classifier_activation=None,
    )


def small_nasnet():
    """Keras' own NASNet with one normal cell between reductions: 7 cells of 16."""
    return keras_nasnet.NASNet(
        input_shape=(64, 64, 3),
        penultimate_filters=192,
        num_blocks=1,
        stem_block_filters=16,
        skip_reduction=False,
        filter_multiplier=2,
        weights=None,
        classes=CLASSES,
        classifier_activation=None,
        name="nasnet",
    )


def small_inception():
    """Cells of each kind of Keras' Inception-v3, narrower: the full one has 24 million weights."""
    conv = keras_inception.conv2d_bn
    inputs = keras.Input((48, 48, 3))
    x = conv(inputs, 8, 3, 3, strides=(2, 2), padding="valid")
    x = L.MaxPooling2D(3, strides=2)(conv(x, 16, 3, 3))
    pooled = L.AveragePooling2D(3, strides=1, padding="same")(x)
    branches = [conv(x, 8, 1, 1), conv(conv(x, 6, 1, 1), 8, 5, 5), conv(pooled, 4, 1, 1)]
    x = L.concatenate(branches)
    x = L.concatenate(
        [
            conv(x, 16, 3, 3, strides=(2, 2), padding="valid"),
            conv(conv(conv(x, 8, 1, 7), 8, 7, 1), 8, 3, 3, strides=(2, 2), padding="valid"),
            L.MaxPooling2D(3, strides=2)(x),
        ]
    )
    narrow = conv(x, 8, 1, 1)
    split = L.concatenate([conv(narrow, 8, 1, 3), conv(narrow, 8, 3, 1)])
    pooled = L.AveragePooling2D(3, strides=1, padding="same")(x)
    x = L.concatenate([conv(x, 8, 1, 1), split, conv(pooled, 8, 1, 1)])
    outputs = L.Dense(CLASSES)(L.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, outputs, name="inception")


FAMILIES = {
    "inception_v3": small_inception,
    "mobilenet_v1": lambda: models.build("mobilenet_v1", CLASSES, 48, 0.25),
    "mobilenet_v2": lambda: models.build("mobilenet_v2", CLASSES, 48, 0.35),
    "nasnet": small_nasnet,
    "resnet_v1": lambda: keras_resnet_of("v1"),
    "resnet_v2": lambda: keras_resnet_of("v2"),
    "slim_resnet_v1": lambda: slim.resnet("v1", (1, 2), (48, 48, 3), CLASSES, "net", filters=8),
    "slim_resnet_v2": lambda: slim.resnet("v2", (1, 2), (48, 48, 3), CLASSES, "net", filters=8),
    "resnet_v1_18": lambda: resnet.build("resnet_v1_18", (48, 48, 3), CLASSES, filters=8),
    "efficientnet_lite": lambda: efficientnet_lite.build(
        "efficientnet_lite0", (48, 48, 3), CLASSES
    ),
    "resnet20": lambda: cifar.resnet20((16, 16, 3), CLASSES, filters=8),
    "vgg_small": lambda: cifar.vgg_small((16, 16, 3), CLASSES, filters=16),
    # ReLU6 has mobilenet_v1 above.
    "mobilenet_cifar": lambda: cifar.mobilenet_cifar((16, 16, 3), CLASSES, alpha=0.25, relu6=False),
}


@functools.cache
def random_network(family):
    """Returns (float network, images): random weights, batch norms set from the images."""
    random = np.random.default_rng(7)
    keras.utils.set_random_seed(7)
    model = FAMILIES[family]()
    images = smooth(random, 12, model.input_shape[1])
    batch_norms.randomize(model, random)
    batch_norms.calibrate_batch_norms(model, images)
    return model, images


def smooth(random, count, size):
    """Returns float32 images in [-1, 1]: noise at a quarter of the size, enlarged."""
    coarse = random.uniform(-1, 1, (count, size // 4, size // 4, 3)).astype(np.float32)
    return np.asarray(keras.ops.image.resize(coarse, (size, size)))


def quantized(family):
    model, images = random_network(family)
    placed = placement.place(model, spec.scheme("w8a8"))
    calibration.calibrate(placed, np.split(images, 2))
    return placed, images


SLOW = ("nasnet", "efficientnet_lite", "mobilenet_v1")  # 20, 9 and 5 s; others have their layers


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=pytest.mark.slow) if family in SLOW else family
        for family in FAMILIES
    ],
)
def test_a_family_is_exported_whole_and_its_codes_are_the_kernels(family):
    placed, images = quantized(family)
    graph = lowering.lower(placed)
    assert not any(isinstance(layer, L.BatchNormalization) for layer in placed.layers)
    content = tflite_file.write(graph)
    assert lint.faults(content, io="int8") == []
    (name,) = graph.inputs
    tensor = graph.tensors[name]
    codes = runtimes.input_codes(images[:4], "int8", tensor.scale, tensor.zero_point)
    for flavour in runtimes.KERNELS:
        rows = parity.compare_nodes(tflite_file.read(content), codes, flavour)
        assert [row for row in rows if row["differing"]] == []
        assert min(row["distinct"] for row in rows) >= DISTINCT
        # And from end to end, in the file as it ships.
        runner = runtimes.interpreter(content, flavour)
        shipped = np.concatenate([runtimes.invoke(runner, row[None]) for row in codes[:2]])
        simulated = kernels.run(graph, {name: codes[:2]}, flavour)[graph.outputs[0]]
        np.testing.assert_array_equal(simulated, shipped)
