"""What operations cost, and export.summary: counts by hand, and another tool's file beside ours."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from export import summary
from lowbit import calibration, census, lowering, placement, results, spec, tflite_file, tflite_view


@pytest.fixture(scope="module")
def network():
    keras.utils.set_random_seed(0)
    x = image = keras.Input((9, 8, 3), batch_size=1)
    x = keras.layers.Conv2D(6, 3, strides=2, padding="same", activation="relu", name="stem")(x)
    y = keras.layers.DepthwiseConv2D(3, padding="same", activation="relu", name="wide")(x)
    x = keras.layers.Add(name="add")([x, y])
    x = keras.layers.Conv2D(4, 1, name="narrow")(x)
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(image, keras.layers.Dense(5, name="logits")(x))


@pytest.fixture(scope="module")
def content(network):
    placed = placement.place(network, spec.scheme("w8a8"))
    images = np.random.default_rng(0).uniform(-1, 1, (4, 9, 8, 3)).astype(np.float32)
    calibration.calibrate(placed, [images[:1], images[1:2]])
    return tflite_file.write(lowering.lower(placed))


@pytest.fixture(scope="module")
def float_content(network):
    function = tf.function(lambda x: network(x), autograph=False)
    concrete = function.get_concrete_function(tf.TensorSpec((1, 9, 8, 3)))
    return tf.lite.TFLiteConverter.from_concrete_functions([concrete]).convert()


def tensor(shape):
    none = np.zeros(0, np.float32)
    return tflite_view.Tensor("", 0, "int8", shape, shape, none, none, 0, False, None)


def macs_of(content):
    return {
        (cost.op, cost.output_shape): cost.macs for cost in census.operations(content) if cost.macs
    }


def test_costs_are_those_counted_by_hand(content, float_content):
    wanted = {
        ("CONV_2D", (1, 5, 4, 6)): 5 * 4 * 6 * 27,
        ("DEPTHWISE_CONV_2D", (1, 5, 4, 6)): 5 * 4 * 6 * 9,
        ("CONV_2D", (1, 5, 4, 4)): 5 * 4 * 4 * 6,
        ("FULLY_CONNECTED", (1, 5)): 5 * 4,
    }
    assert macs_of(content) == macs_of(float_content) == wanted
    stem, wide, add, *_ = census.operations(content)
    assert (stem.op, stem.weight_dtype, stem.input_dtype) == ("CONV_2D", "int8", "int8")
    assert stem.constant_bytes == 6 * 27 + 6 * 4 and stem.output_bytes == 120
    assert (add.op, add.constant_bytes, add.weight_dtype) == ("ADD", 0, "")
    totals = census.totals(content)
    assert totals["macs"] == sum(wanted.values())
    # The image and the first output; then that, and its depthwise output and sum: 3 x 120.
    assert totals["peak_activation_bytes"] == max(9 * 8 * 3 + 120, 3 * 120)
    assert census.totals(float_content)["peak_activation_bytes"] == 4 * 3 * 120


@pytest.mark.parametrize(
    ("op", "shapes", "made", "macs"),
    [
        ("CONV_2D", [(1, 8, 8, 8), (6, 3, 3, 2)], (1, 8, 8, 6), 8 * 8 * 6 * 18),  # 4 groups
        ("TRANSPOSE_CONV", [(4,), (5, 2, 2, 3), (1, 4, 4, 3)], (1, 8, 8, 5), 48 * 4 * 5),
        ("CONV_3D", [(1, 4, 4, 4, 2), (3, 3, 3, 2, 7)], (1, 2, 2, 2, 7), 56 * 54),
        ("BATCH_MATMUL", [(2, 3, 4), (2, 4, 5)], (2, 3, 5), 30 * 4),
        ("FULLY_CONNECTED", [(2, 3, 4), (5, 4)], (2, 3, 5), 30 * 4),
        ("SOFTMAX", [(1, 5)], (1, 5), 0),
    ],
)
def test_multiply_accumulates_of_operations_we_do_not_write(op, shapes, made, macs):
    *inputs, output = (tensor(shape) for shape in (*shapes, made))
    operation = tflite_view.Operation(op, op, 1, tuple(inputs), (output,), None)
    assert census._macs(operation) == macs


def test_the_command_and_two_files_side_by_side(tmp_path, capsys, content, float_content):
    ours, theirs = tmp_path / "ours.tflite", tmp_path / "theirs.tflite"
    ours.write_bytes(content)
    theirs.write_bytes(float_content)
    row = summary.summarize(summary.Config(model=str(ours), csv=str(tmp_path / "ops.csv")))
    shown = capsys.readouterr().err
    assert "int8 1x9x8x3" in shown and "DEPTHWISE_CONV_2D" in shown
    assert row["macs"] == 4820 and row["size_bytes"] == len(content)
    kept = results.read_rows(tmp_path / "ops.csv")
    assert sum(int(line["macs"]) for line in kept) == row["macs"]

    row = summary.summarize(summary.Config(model=str(ours), compare=str(theirs)))
    shown = capsys.readouterr().err
    assert row["compare_macs"] == row["macs"] and row["compare_size_bytes"] == len(float_content)
    assert "- CONV_2D int8 1x9x8x3 -> int8 1x5x4x6, weights int8" in shown
    assert "+ CONV_2D float32 1x9x8x3 -> float32 1x5x4x6, weights float32" in shown
    same = summary.summarize(summary.Config(model=str(ours), compare=str(ours)))
    assert same["differing_lines"] == 0
    assert "the same operations" in capsys.readouterr().err


def test_damage_is_named(tmp_path, content):
    for length in (4, 100, len(content) // 2):
        path = tmp_path / "cut.tflite"
        path.write_bytes(content[:length])
        with pytest.raises(tflite_file.TFLiteFileError, match="cut.tflite"):
            summary.summarize(summary.Config(model=str(path)))
