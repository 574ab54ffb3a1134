"""TF-slim checkpoints: what `models.load` makes of them computes what slim computed.

The reference is plain TensorFlow, written as slim writes its networks: functions over scopes that
make a variable where they first need it.  Its variables are saved under their names, loaded into
the Keras network, and both give the same logits.
"""

import numpy as np
import pytest
import tensorflow as tf

from lowbit import models
from lowbit.models import slim

CLASSES = 7  # of the networks; the checkpoints have a background class before them


class Scopes:
    """Variables by name, random as those of a trained network; made where they are first used."""

    def __init__(self, epsilon=1e-3, scale=True, activation=tf.nn.relu, seed=0):
        self.variables: dict[str, np.ndarray] = {}
        self.epsilon, self.scale, self.activation = epsilon, scale, activation
        self.random = np.random.default_rng(seed)

    def get(self, name, shape, low=None, high=None, deviation=0.3):
        if low is None:
            value = self.random.normal(0, deviation, shape)
        else:
            value = self.random.uniform(low, high, shape)
        return self.variables.setdefault(name, value.astype(np.float32))

    def norm(self, x, scope, activation=None):
        count = (x.shape[-1],)
        # Near those of what comes in, so that the images still tell at the logits.
        mean, variance = (moment.numpy() for moment in tf.nn.moments(x, (0, 1, 2)))
        mean += self.random.normal(0, 0.1, count).astype(np.float32)
        # More than theirs: rounding errors would grow from layer to layer.
        variance = (variance + 0.1) * self.random.uniform(1.5, 4, count).astype(np.float32)
        mean = self.variables.setdefault(f"{scope}/moving_mean", mean)
        variance = self.variables.setdefault(f"{scope}/moving_variance", variance)
        beta = self.get(f"{scope}/beta", count)
        gamma = self.get(f"{scope}/gamma", count, 0.5, 1.5) if self.scale else 1.0
        x = (x - mean) / tf.sqrt(variance + self.epsilon) * gamma + beta
        return activation(x) if activation else x

    def conv(self, x, filters, size, scope, stride=1, padding="SAME", norm=True, activation="own"):
        height, width = (size, size) if isinstance(size, int) else size
        shape = (height, width, x.shape[-1], filters)
        weights = self.get(
            f"{scope}/weights", shape, deviation=1.4 / np.sqrt(height * width * shape[2])
        )
        x = tf.nn.conv2d(x, weights, stride, padding)
        if not norm:
            return x + self.get(f"{scope}/biases", (filters,))
        return self.norm(
            x, f"{scope}/BatchNorm", self.activation if activation == "own" else activation
        )

    def depthwise(self, x, scope, stride):
        weights = self.get(f"{scope}/depthwise_weights", (3, 3, x.shape[-1], 1), deviation=0.5)
        x = tf.nn.depthwise_conv2d(x, weights, (1, stride, stride, 1), "SAME")
        return self.norm(x, f"{scope}/BatchNorm", self.activation)

    def logits(self, x, scope):
        x = tf.reduce_mean(x, (1, 2), keepdims=True)
        return tf.squeeze(self.conv(x, CLASSES + 1, 1, scope, norm=False), (1, 2))


def mobilenet_v1(scopes, x, alpha):
    x = scopes.conv(x, int(32 * alpha), 3, "MobilenetV1/Conv2d_0", 2)
    depths = (64, 128, 128, 256, 256, *(512,) * 6, 1024, 1024)
    for i, depth in enumerate(depths, 1):
        stride = 2 if i in (2, 4, 6, 12) else 1
        x = scopes.depthwise(x, f"MobilenetV1/Conv2d_{i}_depthwise", stride)
        x = scopes.conv(x, int(depth * alpha), 1, f"MobilenetV1/Conv2d_{i}_pointwise")
    return scopes.logits(x, "MobilenetV1/Logits/Conv2d_1c_1x1")


def divisible(value):
    rounded = max(8, int(value + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * value else rounded


def mobilenet_v2(scopes, x, alpha):
    x = scopes.conv(x, divisible(32 * alpha), 3, "MobilenetV2/Conv", 2)
    block = 0
    stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1))
    for expansion, depth, count, first in (*stages, (6, 160, 3, 2), (6, 320, 1, 1)):
        for number in range(count):
            scope = "MobilenetV2/expanded_conv" + (f"_{block}" if block else "")
            depth_in, stride = x.shape[-1], first if number == 0 else 1
            y = x
            if expansion > 1:
                y = scopes.conv(y, depth_in * expansion, 1, f"{scope}/expand")
            y = scopes.depthwise(y, f"{scope}/depthwise", stride)
            y = scopes.conv(y, divisible(depth * alpha), 1, f"{scope}/project", activation=None)
            x = x + y if stride == 1 and y.shape[-1] == depth_in else y
            block += 1
    x = scopes.conv(x, max(1280, divisible(1280 * alpha)), 1, "MobilenetV2/Conv_1")
    return scopes.logits(x, "MobilenetV2/Logits/Conv2d_1c_1x1")


def conv_same(scopes, x, filters, size, stride, scope, **options):
    """slim's conv2d_same: padded alike on all sides."""
    if stride == 1:
        return scopes.conv(x, filters, size, scope, **options)
    x = tf.pad(x, [[0, 0], [size // 2] * 2, [size // 2] * 2, [0, 0]])
    return scopes.conv(x, filters, size, scope, stride, "VALID", **options)


def resnet(scopes, x, name, units, filters):
    version = name.split("_")[1]
    x = conv_same(scopes, x, filters, 7, 2, f"{name}/conv1", norm=version == "v1")
    x = tf.nn.max_pool2d(x, 3, 2, "SAME")
    for block, count in enumerate(units, 1):
        narrow = filters * 2 ** (block - 1)
        for unit in range(1, count + 1):
            stride = 2 if unit == count and block < 4 else 1
            scope = f"{name}/block{block}/unit_{unit}/bottleneck_{version}"
            before = x
            if version == "v2":
                before = scopes.norm(x, f"{scope}/preact", tf.nn.relu)
            plain = {"activation": None} if version == "v1" else {"norm": False}
            if x.shape[-1] == 4 * narrow:
                shortcut = x[:, ::stride, ::stride]
            else:
                shortcut = scopes.conv(before, 4 * narrow, 1, f"{scope}/shortcut", stride, **plain)
            y = scopes.conv(before, narrow, 1, f"{scope}/conv1")
            y = conv_same(scopes, y, narrow, 3, stride, f"{scope}/conv2")
            y = scopes.conv(y, 4 * narrow, 1, f"{scope}/conv3", **plain)
            x = tf.nn.relu(shortcut + y) if version == "v1" else shortcut + y
    if version == "v2":
        x = scopes.norm(x, f"{name}/postnorm", tf.nn.relu)
    return scopes.logits(x, f"{name}/logits")


def inception_v3(scopes, x):
    root = "InceptionV3"

    def conv(x, filters, size, scope, stride=1, padding="SAME"):
        return scopes.conv(x, filters, size, f"{root}/{scope}", stride, padding)

    def pooled(x, filters, cell):
        x = tf.nn.avg_pool2d(x, 3, 1, "SAME")
        return conv(x, filters, 1, f"{cell}/Branch_3/Conv2d_0b_1x1")

    x = conv(x, 32, 3, "Conv2d_1a_3x3", 2, "VALID")
    x = conv(x, 32, 3, "Conv2d_2a_3x3", 1, "VALID")
    x = conv(x, 64, 3, "Conv2d_2b_3x3")
    x = tf.nn.max_pool2d(x, 3, 2, "VALID")
    x = conv(x, 80, 1, "Conv2d_3b_1x1", 1, "VALID")
    x = conv(x, 192, 3, "Conv2d_4a_3x3", 1, "VALID")
    x = tf.nn.max_pool2d(x, 3, 2, "VALID")
    for letter, last in (("b", 32), ("c", 64), ("d", 64)):
        cell = f"Mixed_5{letter}"
        first, second = "Conv2d_0a_1x1", "Conv2d_0b_5x5"
        if letter == "c":
            first, second = "Conv2d_0b_1x1", "Conv_1_0c_5x5"
        b1 = conv(conv(x, 48, 1, f"{cell}/Branch_1/{first}"), 64, 5, f"{cell}/Branch_1/{second}")
        b2 = conv(x, 64, 1, f"{cell}/Branch_2/Conv2d_0a_1x1")
        b2 = conv(b2, 96, 3, f"{cell}/Branch_2/Conv2d_0b_3x3")
        b2 = conv(b2, 96, 3, f"{cell}/Branch_2/Conv2d_0c_3x3")
        b0 = conv(x, 64, 1, f"{cell}/Branch_0/Conv2d_0a_1x1")
        x = tf.concat([b0, b1, b2, pooled(x, last, cell)], 3)
    b0 = conv(x, 384, 3, "Mixed_6a/Branch_0/Conv2d_1a_1x1", 2, "VALID")
    b1 = conv(x, 64, 1, "Mixed_6a/Branch_1/Conv2d_0a_1x1")
    b1 = conv(b1, 96, 3, "Mixed_6a/Branch_1/Conv2d_0b_3x3")
    b1 = conv(b1, 96, 3, "Mixed_6a/Branch_1/Conv2d_1a_1x1", 2, "VALID")
    x = tf.concat([b0, b1, tf.nn.max_pool2d(x, 3, 2, "VALID")], 3)
    for letter, narrow in (("b", 128), ("c", 160), ("d", 160), ("e", 192)):
        cell = f"Mixed_6{letter}"
        b0 = conv(x, 192, 1, f"{cell}/Branch_0/Conv2d_0a_1x1")
        b1 = conv(x, narrow, 1, f"{cell}/Branch_1/Conv2d_0a_1x1")
        b1 = conv(b1, narrow, (1, 7), f"{cell}/Branch_1/Conv2d_0b_1x7")
        b1 = conv(b1, 192, (7, 1), f"{cell}/Branch_1/Conv2d_0c_7x1")
        b2 = conv(x, narrow, 1, f"{cell}/Branch_2/Conv2d_0a_1x1")
        b2 = conv(b2, narrow, (7, 1), f"{cell}/Branch_2/Conv2d_0b_7x1")
        b2 = conv(b2, narrow, (1, 7), f"{cell}/Branch_2/Conv2d_0c_1x7")
        b2 = conv(b2, narrow, (7, 1), f"{cell}/Branch_2/Conv2d_0d_7x1")
        b2 = conv(b2, 192, (1, 7), f"{cell}/Branch_2/Conv2d_0e_1x7")
        x = tf.concat([b0, b1, b2, pooled(x, 192, cell)], 3)
    b0 = conv(x, 192, 1, "Mixed_7a/Branch_0/Conv2d_0a_1x1")
    b0 = conv(b0, 320, 3, "Mixed_7a/Branch_0/Conv2d_1a_3x3", 2, "VALID")
    b1 = conv(x, 192, 1, "Mixed_7a/Branch_1/Conv2d_0a_1x1")
    b1 = conv(b1, 192, (1, 7), "Mixed_7a/Branch_1/Conv2d_0b_1x7")
    b1 = conv(b1, 192, (7, 1), "Mixed_7a/Branch_1/Conv2d_0c_7x1")
    b1 = conv(b1, 192, 3, "Mixed_7a/Branch_1/Conv2d_1a_3x3", 2, "VALID")
    x = tf.concat([b0, b1, tf.nn.max_pool2d(x, 3, 2, "VALID")], 3)
    for cell, second in (("Mixed_7b", "Conv2d_0b_3x1"), ("Mixed_7c", "Conv2d_0c_3x1")):
        b0 = conv(x, 320, 1, f"{cell}/Branch_0/Conv2d_0a_1x1")
        b1 = conv(x, 384, 1, f"{cell}/Branch_1/Conv2d_0a_1x1")
        b1 = [
            conv(b1, 384, (1, 3), f"{cell}/Branch_1/Conv2d_0b_1x3"),
            conv(b1, 384, (3, 1), f"{cell}/Branch_1/{second}"),
        ]
        b2 = conv(x, 448, 1, f"{cell}/Branch_2/Conv2d_0a_1x1")
        b2 = conv(b2, 384, 3, f"{cell}/Branch_2/Conv2d_0b_3x3")
        b2 = [
            conv(b2, 384, (1, 3), f"{cell}/Branch_2/Conv2d_0c_1x3"),
            conv(b2, 384, (3, 1), f"{cell}/Branch_2/Conv2d_0d_3x1"),
        ]
        x = tf.concat([b0, *b1, *b2, pooled(x, 192, cell)], 3)
    return scopes.logits(x, f"{root}/Logits/Conv2d_1c_1x1")


NORMAL = ("sep5", "sep3", "sep5", "sep3", "avg", "none", "avg", "avg", "sep3", "none")
REDUCTION = ("sep5", "sep7", "max", "sep7", "avg", "sep5", "none", "avg", "sep3", "max")


class NASNet:
    """NASNet-A mobile, cell by cell as slim's tables of operations and hidden states say."""

    def __init__(self, scopes):
        self.scopes = scopes

    def conv(self, x, filters, scope, norm):
        weights = self.scopes.get(
            f"{scope}/weights", (1, 1, x.shape[-1], filters), deviation=x.shape[-1] ** -0.5
        )
        x = tf.nn.conv2d(x, weights, 1, "SAME")
        return self.scopes.norm(x, norm) if norm else x

    def separable(self, x, filters, size, scope, stride):
        for number in (1, 2):
            name = f"{scope}/separable_{size}x{size}_{number}"
            depthwise = self.scopes.get(f"{name}/depthwise_weights", (size, size, x.shape[-1], 1))
            pointwise = self.scopes.get(
                f"{name}/pointwise_weights", (1, 1, x.shape[-1], filters), deviation=0.3
            )
            x = tf.nn.separable_conv2d(
                tf.nn.relu(x), depthwise, pointwise, (1, stride, stride, 1), "SAME"
            )
            x = self.scopes.norm(x, f"{scope}/bn_sep_{size}x{size}_{number}")
            stride = 1
        return x

    def operation(self, x, kind, filters, scope, stride):
        if kind.startswith("sep"):
            return self.separable(x, filters, int(kind[3:]), scope, stride)
        if kind == "none":
            return x
        pool = {"avg": tf.nn.avg_pool2d, "max": tf.nn.max_pool2d}[kind]
        return pool(x, 3, stride, "SAME")

    def cell(self, x, previous, filters, scope, operations, indices, used, stride):
        if previous is None:
            previous = x
        elif previous.shape[2] != x.shape[2]:
            previous = tf.nn.relu(previous)
            one = self.conv(previous[:, ::2, ::2], filters // 2, f"{scope}/path1_conv", None)
            shifted = tf.pad(previous, [[0, 0], [0, 1], [0, 1], [0, 0]])[:, 1:, 1:]
            two = self.conv(shifted[:, ::2, ::2], filters // 2, f"{scope}/path2_conv", None)
            previous = self.scopes.norm(tf.concat([one, two], 3), f"{scope}/final_path_bn")
        elif previous.shape[-1] != filters:
            previous = self.conv(
                tf.nn.relu(previous), filters, f"{scope}/prev_1x1", f"{scope}/prev_bn"
            )
        first = self.conv(tf.nn.relu(x), filters, f"{scope}/1x1", f"{scope}/beginning_bn")
        states = [first, previous]
        for i in range(5):
            sides = []
            for side, kind, index in zip(
                ("left", "right"), operations[2 * i :], indices[2 * i :], strict=False
            ):
                place = f"{scope}/comb_iter_{i}/{side}"
                step = stride if index < 2 else 1
                sides.append(self.operation(states[index], kind, filters, place, step))
            states.append(sides[0] + sides[1])
        return tf.concat([s for s, taken in zip(states, used, strict=True) if not taken], 3)

    def __call__(self, x):
        normal = (NORMAL, (0, 1, 1, 1, 0, 1, 1, 1, 0, 0), (1, 0, 0, 0, 0, 0, 0), 1)
        reduction = (REDUCTION, (0, 1, 0, 1, 0, 1, 3, 2, 2, 0), (1, 1, 1, 0, 0, 0, 0), 2)
        weights = self.scopes.get("conv0/weights", (3, 3, 3, 32))
        x = self.scopes.norm(tf.nn.conv2d(x, weights, 2, "VALID"), "conv0_bn")
        outputs = [None, x]
        for number, filters in enumerate((11, 22)):
            x = self.cell(x, outputs[-2], filters, f"cell_stem_{number}", *reduction)
            outputs.append(x)
        filters = 44
        for number in range(12):
            if number in (4, 8):
                filters *= 2
                scope = f"reduction_cell_{number // 4 - 1}"
                x = self.cell(x, outputs[-2], filters, scope, *reduction)
                outputs.append(x)
            x = self.cell(x, outputs[-2], filters, f"cell_{number}", *normal)
            outputs.append(x)
        x = tf.reduce_mean(tf.nn.relu(x), (1, 2))
        weights = self.scopes.get("final_layer/FC/weights", (x.shape[-1], CLASSES + 1))
        return x @ weights + self.scopes.get("final_layer/FC/biases", (CLASSES + 1,))


# --- saved and loaded ---------------------------------------------------------------------------


def save(variables, path):
    names = list(variables)
    tf.raw_ops.SaveV2(
        prefix=str(path),
        tensor_names=names,
        shape_and_slices=[""] * len(names),
        tensors=[variables[name] for name in names],
    )
    return str(path)


@pytest.fixture
def same(tmp_path, smooth_images):
    """Returns same(name, reference, scopes, size): loads what the reference made, compares logits."""

    def check(name, reference, scopes, size, alpha=None):
        x = smooth_images(2, size)
        expected = reference(scopes, x).numpy()[:, 1:]
        assert np.abs(expected[0] - expected[1]).max() > 0.05 * np.abs(expected).max() > 0.01
        path = save(scopes.variables | {"global_step": np.int64(5)}, tmp_path / "model.ckpt-5")
        network, facts = models.load(name, path, CLASSES, size, alpha)
        actual = network(x, training=False).numpy()
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
        return facts

    return check


def test_mobilenet_v1(same):
    scopes = Scopes(activation=tf.nn.relu6)
    facts = same("mobilenet_v1", lambda s, x: mobilenet_v1(s, x, 0.25), scopes, 64, 0.25)
    assert facts == {"preprocess": "tf"}


@pytest.mark.parametrize("alpha", [0.35, pytest.param(1.4, marks=pytest.mark.slow)])
def test_mobilenet_v2(same, alpha):
    scopes = Scopes(activation=tf.nn.relu6)
    same("mobilenet_v2", lambda s, x: mobilenet_v2(s, x, alpha), scopes, 64, alpha)


@pytest.mark.slow
@pytest.mark.parametrize(
    "version, preprocess", [("v1", "123.68,116.78,103.94,1,1,1"), ("v2", "tf")]
)
def test_resnet_50(same, version, preprocess):
    """64 pixels: all sizes but the last are even, where strides and padding show."""
    name = f"resnet_{version}_50"
    facts = same(name, lambda s, x: resnet(s, x, name, (3, 4, 6, 3), 64), Scopes(1e-5), 64)
    assert facts == {"preprocess": preprocess}


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("size", [61, 68])
def test_resnet_units(version, size, smooth_images):
    """The order of units and strides, at odd sizes and with blocks of one unit."""
    units, name = (1, 2, 3, 1), f"resnet_{version}_50"
    scopes, x = Scopes(1e-5), smooth_images(2, size)
    expected = resnet(scopes, x, name, units, 8).numpy()
    network = slim.resnet(version, units, (size, size, 3), CLASSES + 1, name, filters=8)
    for layer in network.layers:
        scope = slim.scopes(network, name).get(layer.name)
        for variable in layer.weights:
            array = scopes.variables[f"{scope}/{slim._variable_name(layer, variable.name)}"]
            variable.assign(array.reshape(variable.shape))
    np.testing.assert_allclose(network(x, training=False), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_inception_v3(same):
    same("inception_v3", inception_v3, Scopes(scale=False), 75)


@pytest.mark.slow
def test_nasnet_mobile(same):
    same("nasnet_mobile", lambda s, x: NASNet(s)(x), Scopes(), 64)


# --- what a checkpoint can hold -----------------------------------------------------------------

OPTIONS = {"input_size": 32, "alpha": 0.25}


@pytest.fixture(scope="module")
def stored():
    """Variables of a MobileNet-v1 with 0.25 of the width, and a background class."""
    scopes = Scopes(activation=tf.nn.relu6)
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    mobilenet_v1(scopes, images, 0.25)
    return scopes.variables


LOGITS = "MobilenetV1/Logits/Conv2d_1c_1x1"


def test_moving_averages_are_preferred_and_slots_passed_over(stored, tmp_path):
    key = "MobilenetV1/Conv2d_0/weights"
    others = {
        f"{key}/ExponentialMovingAverage": stored[key] + 1,
        f"{key}/RMSProp": stored[key] + 2,
        "MobilenetV1/AuxLogits/weights": stored[key],
    }
    path = save(stored | others, tmp_path / "model.ckpt")
    network, _ = models.load("mobilenet_v1", path, CLASSES, **OPTIONS)
    np.testing.assert_array_equal(network.get_layer("conv1").kernel, stored[key] + 1)
    norm = network.get_layer("conv_dw_3_bn")
    scope = "MobilenetV1/Conv2d_3_depthwise/BatchNorm"
    np.testing.assert_array_equal(norm.moving_mean, stored[f"{scope}/moving_mean"])


def test_the_background_class_is_dropped_or_kept(stored, tmp_path):
    path = save(stored, tmp_path / "model.ckpt")
    for classes, first in ((CLASSES, 1), (CLASSES + 1, 0)):
        network, _ = models.load("mobilenet_v1", f"{path}.index", classes, **OPTIONS)
        layer = network.get_layer("conv_preds")
        np.testing.assert_array_equal(layer.kernel, stored[f"{LOGITS}/weights"][..., first:])
        np.testing.assert_array_equal(layer.bias, stored[f"{LOGITS}/biases"][first:])


def test_version_1_files(stored, tmp_path):
    path = str(tmp_path / "old.ckpt")
    tf.raw_ops.Save(filename=path, tensor_names=list(stored), data=list(stored.values()))
    network, _ = models.load("mobilenet_v1", path, CLASSES, **OPTIONS)
    key = "MobilenetV1/Conv2d_13_pointwise/weights"
    np.testing.assert_array_equal(network.get_layer("conv_pw_13").kernel, stored[key])


@pytest.mark.parametrize(
    "change, options, message",
    [
        ({f"{LOGITS}/biases": None}, {}, f"no variable {LOGITS}/biases.*conv_preds"),
        (
            {"MobilenetV1/Conv2d_0/weights": np.zeros((3, 3, 3, 9), np.float32)},
            {},
            r"Conv2d_0/weights has shape \(3, 3, 3, 9\).*conv1 takes \(3, 3, 3, 8\)",
        ),
        ({}, {"alpha": 0.5}, "Conv2d_0/weights has shape.*another --alpha"),
        ({}, {"classes": 5}, rf"{LOGITS}/weights has shape \(1, 1, 256, 8\).*number of classes"),
        (
            {"MobilenetV1/Conv2d_14/biases": np.zeros(3, np.float32)},
            {},
            "Conv2d_14/biases belongs to no layer of mobilenet_v1",
        ),
        ({}, {"model": "mobilenet_v2"}, "no variable MobilenetV2/Conv/weights"),
        ({}, {"model": "resnet_v1_18", "alpha": None}, "TF-slim has no resnet_v1_18"),
        ({}, {"model": "efficientnet_lite0", "alpha": None}, "TF-slim has no efficientnet_lite0"),
    ],
)
def test_misfits_are_named(stored, tmp_path, change, options, message):
    variables = {key: value for key, value in (stored | change).items() if value is not None}
    path = save(variables, tmp_path / "model.ckpt")
    options = {"model": "mobilenet_v1", "classes": CLASSES, "weights": path} | OPTIONS | options
    with pytest.raises(ValueError, match=message) as caught:
        models.load(**options)
    assert len(str(caught.value)) < 300


def test_absent_and_damaged_files(stored, tmp_path):
    with pytest.raises(FileNotFoundError, match="neither .*none.ckpt nor .*none.ckpt.index"):
        models.load("mobilenet_v1", str(tmp_path / "none.ckpt"), CLASSES, **OPTIONS)
    path = save(stored, tmp_path / "model.ckpt")
    for file in tmp_path.iterdir():
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="damaged"):
        models.load("mobilenet_v1", path, CLASSES, **OPTIONS)
