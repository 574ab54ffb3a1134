"""The quantized Keras model and the integer graph compute the same codes in each operation."""

import keras
import numpy as np
import pytest

from eval import parity
from lowbit import (
    affine,
    calibration,
    fixed_point,
    functional,
    kernels,
    layers,
    lowering,
    placement,
    quantizers,
    ranges,
    spec,
)

L = keras.layers
# Largest difference, in codes, that an operation may have: its kernel rounds otherwise than float.
# Weighted operations do the kernel's own arithmetic, so that nothing else than these can differ.
ALLOWED = {
    "CONV_2D": 0,
    "DEPTHWISE_CONV_2D": 0,
    "FULLY_CONNECTED": 0,
    "ADD": 1,  # both inputs are rescaled in 21 bits before they are added
    "MEAN": 1,  # one multiplication by scale / n
    "AVERAGE_POOL_2D": 1,  # ties go away from zero
    "SOFTMAX": 1,  # table of exponentials
}
SHARE = 0.02  # of the codes of an operation that may differ at all


def numpy(tensor):
    return keras.ops.convert_to_numpy(tensor)


def functional_model(function, shape=(8, 8, 4)):
    inputs = keras.Input(shape)
    return keras.Model(inputs, function(inputs))


@pytest.fixture
def quantized(randomize, smooth_images):
    """Returns quantized(float model, scheme) -> (quantized model, images it was calibrated on)."""

    def quantize(model, scheme="w8a8", estimator="minmax", count=24):
        found = placement.place(randomize(model), spec.SCHEMES[scheme])
        _, height, width, channels = model.input_shape
        images = smooth_images(count, height, width, channels)
        batches = np.split(images, 2)  # of one size: one trace of the float network
        assert calibration.calibrate(found, batches, ranges.estimator(estimator)) == count
        return found, images

    return quantize


def labelled_outputs(model):
    """Returns {label: Keras tensor} of what each quantizer call gives."""
    return {
        node.arguments.kwargs["label"]: node.outputs[0]
        for quantizer in quantizers.activation_quantizers(model)
        for node in quantizer._inbound_nodes
    }


def codes_of(values, tensor):
    """Returns the codes of a tensor's real values, which must lie on them."""
    place = values.astype(np.float64) / np.float64(tensor.scale) + tensor.zero_point
    codes = np.rint(place)
    assert np.abs(place - codes).max() < 1e-3
    assert codes.min() >= -128 and codes.max() <= 127
    return codes.astype(np.int8)


def compare(model, images, graph):
    """Returns {operation: (codes, different ones, largest difference)} node by node.

    Each node computes from the codes that Keras gave its inputs, so that differences do not add up.
    """
    tensors = labelled_outputs(model)
    values = keras.Model(model.inputs, tensors).predict(images, verbose=0)
    keras_codes = {name: codes_of(value, graph.tensors[name]) for name, value in values.items()}
    known = {name: tensor.data for name, tensor in graph.tensors.items() if tensor.data is not None}
    (source,) = graph.inputs
    known[source] = affine.quantize_input(
        images, graph.tensors[source].scale, graph.tensors[source].zero_point, "int8"
    )
    np.testing.assert_array_equal(keras_codes[source], known[source])
    found = {}
    for node in graph.nodes:
        inputs = [known[name] for name in node.inputs]
        (result,) = kernels.run_node(graph, node, inputs, "xnnpack")
        (name,) = node.outputs
        known[name] = result
        if name in keras_codes:
            difference = np.abs(result.astype(int) - keras_codes[name])
            assert len(np.unique(result)) >= 16 or node.op == "SOFTMAX", node
            count, wrong, largest = found.get(node.op, (0, 0, 0))
            found[node.op] = (
                count + difference.size,
                wrong + (difference > 0).sum(),
                max(largest, difference.max()),
            )
            known[name] = keras_codes[name]
    return found


def conv_bn(filters, size=3, activation="relu6", **options):
    def apply(x):
        x = L.BatchNormalization()(L.Conv2D(filters, size, use_bias=False, **options)(x))
        return x if activation is None else L.Activation(activation)(x)

    return apply


def depthwise_bn(activation="relu6", **options):
    def apply(x):
        return L.Activation(activation)(L.BatchNormalization()(L.DepthwiseConv2D(3, **options)(x)))

    return apply


def inverted_residual(x):
    y = conv_bn(12, 1)(x)
    y = depthwise_bn(padding="same")(y)
    return L.Add()([x, conv_bn(4, 1, None)(y)])


WEIGHTED_ONLY = {
    "batch norm": lambda x: conv_bn(6, padding="same", strides=2)(conv_bn(6, dilation_rate=2)(x)),
    "bias": lambda x: L.Conv2D(6, 5, padding="same")(L.Conv2D(6, 3, activation="relu")(x)),
    "depthwise": lambda x: depthwise_bn()(depthwise_bn("relu", padding="same", strides=2)(x)),
    "separable": lambda x: L.SeparableConv2D(6, 3, strides=2, depth_multiplier=2)(
        L.ReLU()(L.BatchNormalization()(x))
    ),
    "dense": lambda x: L.Dense(20)(L.Dense(32, activation="relu")(L.Flatten()(x))),
    "dense 4-D": lambda x: L.Dense(20)(L.Conv2D(6, 3)(x)),
    "moved": lambda x: L.Conv2D(6, 3)(
        L.ZeroPadding2D(2)(L.MaxPooling2D(3, 2, padding="same")(L.Conv2D(4, 1)(x)))
    ),
    "joined": lambda x: joined(x, L.Conv2D(4, 1)(x)),
    "deep": lambda x: L.Dense(20)(
        L.Flatten()(conv_bn(6)(depthwise_bn(depth_multiplier=2)(conv_bn(8)(x))))
    ),
}


def joined(x, y):
    """A tensor with two consumers, its ReLU that cannot be fused, and another branch."""
    other = L.Conv2D(3, 3, padding="same", activation="relu")(x)
    return L.Conv2D(6, 1)(L.Concatenate()([y, L.ReLU()(y), other]))


OTHERS = {
    "residual": lambda x: L.ReLU()(L.Add()([x, L.Conv2D(4, 3, padding="same")(x)])),
    "inverted residual": inverted_residual,
    "mean": lambda x: L.Softmax()(L.Dense(20)(L.GlobalAveragePooling2D()(conv_bn(24)(x)))),
    "mean keepdims": lambda x: L.Conv2D(20, 1)(L.GlobalAveragePooling2D(keepdims=True)(x)),
    "average pool": lambda x: L.AveragePooling2D(3, 2, padding="same")(
        L.AveragePooling2D(2)(conv_bn(5)(x))
    ),
}


# Every network with the default scheme, and one of every kind of weights with the other two.
TABLE = [(name, "w8a8") for name in WEIGHTED_ONLY]
TABLE += [("deep", "w8a8_per_tensor"), ("deep", "w4a8")]


@pytest.mark.parametrize("name, scheme", TABLE)
def test_keras_gives_the_kernels_codes(name, scheme, quantized):
    model, images = quantized(functional_model(WEIGHTED_ONLY[name]), scheme)
    graph = lowering.lower(model)
    assert_weights_are_the_folded_ones(model, graph, highest=7 if scheme == "w4a8" else 127)
    (source,), (target,) = graph.inputs, graph.outputs
    given, wanted = graph.tensors[source], graph.tensors[target]
    codes = affine.quantize_input(images, given.scale, given.zero_point, "int8")
    found = kernels.run(graph, {source: codes}, "xnnpack")[target]
    expected = codes_of(model.predict(images, verbose=0), wanted)
    assert found.shape == (len(images), *wanted.shape[1:]) and len(np.unique(found)) >= 16
    np.testing.assert_array_equal(found, expected)


def assert_weights_are_the_folded_ones(model, graph, highest):
    """Restates scale, codes and bias codes of every weighted node from the folded float kernel."""
    weighted = {layer.name: layer for layer in layers.weighted_layers(model)}
    nodes = [node for node in graph.nodes if node.name in weighted]
    assert len(nodes) == len(weighted) > 0
    for node in nodes:
        kernel, bias = (numpy(array) for array in weighted[node.name].folded())
        if node.op == "DEPTHWISE_CONV_2D":  # from (h, w, in, multiplier)
            wanted = kernel.reshape(1, *kernel.shape[:2], -1)
        else:
            wanted = np.moveaxis(kernel, -1, 0)
        weights, biases = (graph.tensors[name] for name in node.inputs[1:])
        axis, scale = weights.quantization.axis, weights.quantization.scale
        shape = [1] * wanted.ndim
        others = None
        if axis is not None:
            shape[axis] = -1
            others = tuple(other for other in range(wanted.ndim) if other != axis)
        largest = np.abs(wanted).max(axis=others)
        np.testing.assert_allclose(np.squeeze(scale), largest / highest, rtol=2.0**-15)
        codes = np.clip(np.rint(wanted / scale.reshape(shape)), -highest, highest)
        np.testing.assert_array_equal(weights.data, codes)
        real = np.float64(graph.tensors[node.inputs[0]].scale) * scale.astype(np.float64)
        np.testing.assert_array_equal(biases.data, np.rint(bias.astype(np.float64) / real))


@pytest.mark.parametrize("name", OTHERS)
def test_each_operation_is_within_its_rounding(name, quantized, record_property):
    # A range that cuts values off: saturation too must be the kernel's.
    model, images = quantized(functional_model(OTHERS[name]), estimator="percentile")
    for op, (count, wrong, largest) in compare(model, images, lowering.lower(model)).items():
        record_property(op, f"{wrong} of {count} codes differ, by {largest} at most")
        print(f"{op}: {wrong} of {count} codes differ, by {largest} at most")
        assert largest <= ALLOWED[op], op
        if op != "AVERAGE_POOL_2D":  # every fourth mean of 4 codes is a tie
            assert wrong <= SHARE * count, op


# --- what the graph holds -----------------------------------------------------------------------


def test_graph_is_the_model_in_tflites_layout(quantized):
    def network(x):
        x = L.Conv2D(6, (3, 5), strides=2, padding="same", activation="relu6", name="conv")(x)
        x = L.DepthwiseConv2D(3, depth_multiplier=2, dilation_rate=1, name="depthwise")(x)
        x = L.ReLU(name="relu")(x)
        x = L.GlobalAveragePooling2D(name="pool")(L.ZeroPadding2D(((0, 1), (2, 3)), name="pad")(x))
        return L.Dense(10, name="dense")(x)

    model, _ = quantized(functional_model(network, (9, 12, 4)))
    graph = lowering.lower(model, "a test")
    assert graph.description == "a test"
    assert [node.op for node in graph.nodes] == [
        "CONV_2D", "DEPTHWISE_CONV_2D", "PAD", "MEAN", "FULLY_CONNECTED",
    ]  # fmt: skip
    assert (graph.inputs, graph.outputs) == (("input",), ("dense",))
    shapes = {name: tensor.shape for name, tensor in graph.tensors.items()}
    assert shapes == {
        "input": (1, 9, 12, 4),
        "conv/kernel": (6, 3, 5, 4),
        "conv/bias": (6,),
        "conv": (1, 5, 6, 6),
        "depthwise/kernel": (1, 3, 3, 12),
        "depthwise/bias": (12,),
        "relu": (1, 3, 4, 12),
        "pad": (1, 4, 9, 12),
        "pad/paddings": (4, 2),
        "pool": (1, 12),
        "pool/axes": (2,),
        "dense/kernel": (10, 12),
        "dense/bias": (10,),
        "dense": (1, 10),
    }
    conv, depthwise, pad, mean, dense = graph.nodes
    assert conv.attributes == {
        "activation": "RELU6", "strides": (2, 2), "dilations": (1, 1), "padding": "SAME",
    }  # fmt: skip
    assert depthwise.attributes == {
        "activation": "RELU", "strides": (1, 1), "dilations": (1, 1), "padding": "VALID",
        "depth_multiplier": 2,
    }  # fmt: skip
    assert dense.attributes == {"activation": None, "keep_num_dims": False}
    assert mean.attributes == {"keep_dims": False}
    paddings = graph.tensors[pad.inputs[1]].data
    np.testing.assert_array_equal(paddings, [(0, 0), (0, 1), (2, 3), (0, 0)])
    for node, axis in ((conv, 0), (depthwise, 3), (dense, 0)):
        weights, bias = (graph.tensors[name] for name in node.inputs[1:])
        assert (weights.dtype, bias.dtype) == ("int8", "int32")
        assert (weights.quantization.axis, bias.quantization.axis) == (axis, 0)
        assert np.abs(weights.data.astype(int)).max() == 127
        expected = graph.tensors[node.inputs[0]].scale * weights.quantization.scale
        np.testing.assert_array_equal(bias.quantization.scale, expected)
        assert not weights.quantization.zero_point.any()
    moved, before = graph.tensors["pad"], graph.tensors["relu"]
    assert (moved.scale, moved.zero_point) == (before.scale, before.zero_point)


def test_dead_channel_keeps_its_bias(quantized):
    model, images = quantized(functional_model(L.Conv2D(6, 3, name="conv")))
    conv = model.get_layer("conv")
    kernel, bias = numpy(conv.kernel), numpy(conv.bias)
    kernel[..., 2], bias[2] = 0, 3.0
    kernel[..., 4], bias[4] = kernel[..., 4] * 1e-9, -2.0
    conv.kernel.assign(kernel)
    conv.bias.assign(bias)
    calibration.calibrate(model, [images])
    graph = lowering.lower(model)
    found = compare(model, images, graph)
    assert found["CONV_2D"][1] == 0
    assert np.abs(graph.tensors["conv/bias"].data.astype(np.int64)).max() <= 2**22 + 66
    assert not graph.tensors["conv/kernel"].data[2].any()
    output = graph.tensors[graph.outputs[0]]
    codes = kernels.run(
        graph, {"input": affine.quantize_input(images, graph.tensors["input"].scale, 0, "int8")}
    )[output.name]
    for channel, value in ((2, 3.0), (4, -2.0)):
        real = (codes[..., channel].astype(int) - output.zero_point) * np.float64(output.scale)
        assert np.abs(real - value).max() <= 0.51 * output.scale
    multipliers = (
        np.float64(graph.tensors["input"].scale)
        * graph.tensors["conv/kernel"].quantization.scale
        / output.scale
    )
    for multiplier in multipliers:
        mantissa, _ = fixed_point.quantize_multiplier(float(multiplier))
        assert mantissa >= 2**30


def test_gamma_zero_keeps_its_beta(quantized, randomize):
    model, images = quantized(functional_model(conv_bn(6, activation=None)))
    (conv,) = layers.weighted_layers(model)
    conv.gamma.assign(np.where(np.arange(6) == 3, 0, numpy(conv.gamma)))
    conv.beta.assign(np.where(np.arange(6) == 3, 1.5, numpy(conv.beta)))
    calibration.calibrate(model, [images])
    assert compare(model, images, lowering.lower(model))["CONV_2D"][1] == 0


# --- activations of fewer than 8 bits ----------------------------------------------------------


@pytest.mark.parametrize("scheme", ["w4a4", "w8a4", "w8a5", "w8a7_per_tensor"])
@pytest.mark.parametrize("activation", ["relu", "relu6"])
@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0], ids="range times {}".format)
def test_few_bits_behind_a_relu_run_in_int8(scheme, activation, factor, randomize, smooth_images):
    """RELU6 clamps int8 to the codes of 4 bits; the weights around make up for its 6."""

    def network(x):
        x = conv_bn(6, activation=activation, padding="same")(x)
        y = depthwise_bn(activation=activation, padding="same")(x)
        y = L.MaxPooling2D(2)(L.Concatenate()([L.ZeroPadding2D(1)(y), L.ZeroPadding2D(1)(y)]))
        y = conv_bn(12, 1, activation=activation)(y)
        return L.Dense(5, name="logits")(L.Flatten()(y))

    bits = spec.bits(scheme, ends="w8a8", overrides="logits=w8a8")
    model = placement.place(randomize(functional_model(network)), bits)
    images = smooth_images(24, channels=4, height=8, width=8)
    calibration.calibrate(model, np.split(images, 2))
    for quantizer in quantizers.activation_quantizers(model):
        if quantizer.spec.bits < 8:
            quantizer.maximum.assign(quantizer.maximum * factor)
    graph = lowering.lower(model)
    few = [
        node.arguments.kwargs["label"]
        for quantizer in quantizers.activation_quantizers(model)
        for node in quantizer._inbound_nodes
        if quantizer.spec.bits < 8
    ]
    units = {graph.tensors[name].unit for name in few}
    # A range that reaches beyond ReLU6's clamp needs no other unit.
    assert len(units) > 1 or (activation == "relu6" and units == {1.0})
    codes = affine.quantize_input(
        images, graph.tensors["input"].scale, graph.tensors["input"].zero_point, "int8"
    )
    for flavour in ("xnnpack", "reference"):
        for row in parity.compare_nodes(graph, codes, flavour):
            assert row["differing"] == 0, row
    computed = kernels.run(graph, {"input": codes}, "xnnpack", outputs=few)
    steps = 2 ** spec.scheme(scheme).activations.bits
    for name in few:
        assert 0.2 * steps < len(np.unique(computed[name])) <= steps, name
    for row in parity.compare_operations(model, graph, images):
        assert row["worst_lsb"] <= 1 and row["differing"] <= SHARE * row["codes"], row


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheme, message",
    [
        ("w8a4", r"layer input leaves 4-bit activations with no ReLU behind it; .*=w8a8"),
        ("w8a8_asymmetric", r"layer conv has weights .*symmetric=False.*export takes symmetric"),
        ("w8a8_per_tensor_asymmetric", r"layer conv has weights .*symmetric=False"),
    ],
)
def test_schemes_without_kernels_are_refused(scheme, message):
    model = placement.place(functional_model(L.Conv2D(6, 3, name="conv")), spec.SCHEMES[scheme])
    with pytest.raises(functional.UnsupportedModelError, match=message):
        lowering.lower(model)


def test_weights_alone_need_no_calibration(smooth_images):
    model = placement.place(functional_model(L.Conv2D(6, 3)), spec.SCHEMES["w8"])
    with pytest.raises(ValueError, match="has no activation quantizer to calibrate"):
        calibration.calibrate(model, [smooth_images(4, channels=4)])


def test_float_model_is_refused():
    with pytest.raises(functional.UnsupportedModelError, match=r"layer conv \(Conv2D\) has no int"):
        lowering.lower(functional_model(L.Conv2D(6, 3, name="conv")))


def test_three_tensors_are_added_one_after_another(quantized):
    """TFLite's integer ADD takes two."""

    def network(x):
        total = L.Add(name="three")([x, L.Conv2D(4, 1)(x), L.Conv2D(4, 1)(x)])
        return L.ReLU(name="relu")(total)

    float_model = functional_model(network)
    model, images = quantized(float_model)
    graph = lowering.lower(model)
    adds = [node for node in graph.nodes if node.op == "ADD"]
    assert [node.name for node in adds] == ["three_2", "three"]
    assert [node.attributes["activation"] for node in adds] == [None, "RELU"]
    assert adds[1].inputs[0] == adds[0].outputs[0]
    assert compare(model, images, graph)["ADD"][2] <= ALLOWED["ADD"]
    with layers.in_float(model):
        expected = float_model(images, training=False)
        np.testing.assert_allclose(model(images, training=False), expected, atol=1e-5)


def test_cropping_selects_codes(quantized):
    def network(x):
        x = L.Conv2D(6, 1, name="conv")(x)
        return L.Conv2D(5, 3)(L.Cropping2D(((1, 0), (2, 1)), name="crop")(x))

    model, images = quantized(functional_model(network, (9, 10, 4)))
    graph = lowering.lower(model)
    (node,) = [node for node in graph.nodes if node.op == "SLICE"]
    begin, size = (graph.tensors[name].data.tolist() for name in node.inputs[1:])
    assert (node.name, begin, size) == ("crop", [0, 1, 2, 0], [1, 8, 7, 6])
    source, cropped = graph.tensors[node.inputs[0]], graph.tensors["crop"]
    assert (source.scale, source.zero_point) == (cropped.scale, cropped.zero_point)
    assert compare(model, images, graph)["CONV_2D"][2] == 0


def test_multiplier_of_256_is_refused_and_widening_repairs_it(quantized):
    model, images = quantized(functional_model(L.Conv2D(6, 3, name="conv")))
    output = quantizers.activation_quantizers(model)[-1]
    conv = model.get_layer("conv")
    scales = np.abs(numpy(conv.kernel)).max(axis=(0, 1, 2)) / 127
    worst = int(scales.argmax())
    input_scale = quantizers.activation_quantizers(model)[0].scale_and_zero_point()[0]
    reach = 255 * float(input_scale * scales[worst]) / 300  # multiplier 300
    output.minimum.assign([-reach / 2])
    output.maximum.assign([reach / 2])
    with pytest.raises(
        functional.UnsupportedModelError,
        match=rf"layer conv, channel {worst}: requantization multiplier (30\d|29\d)(\.\d)? is not",
    ):
        lowering.lower(model)
    assert calibration.widen_for_kernels(model) == [output.name]
    graph = lowering.lower(model)
    weights = graph.tensors["conv/kernel"].quantization.scale
    multiplier = float(input_scale) * weights.max() / graph.tensors[graph.outputs[0]].scale
    assert 254 < multiplier < 256
    assert calibration.widen_for_kernels(model) == []


# --- calibration --------------------------------------------------------------------------------


def test_calibrated_ranges_are_those_of_the_float_model(randomize, smooth_images):
    def network(x):
        a = L.Conv2D(4, 3, padding="same", activation="relu", name="a")(x)
        b = L.Conv2D(4, 1, name="b")(x)
        return L.Softmax(name="p")(L.Dense(5, name="dense")(L.Flatten()(L.Concatenate()([a, b]))))

    float_model = randomize(functional_model(network))
    images = smooth_images(20, channels=4)
    taps = keras.Model(
        float_model.inputs, [float_model.get_layer(name).output for name in ("a", "b", "dense")]
    )
    a, b, dense = taps.predict(images, verbose=0)
    model = placement.place(float_model, spec.SCHEMES["w8a8"])
    seen = []
    batches = (images[start : start + 10] for start in (0, 10))  # an iterator, read once
    assert calibration.calibrate(model, batches, progress=seen.append) == 20
    assert seen == [10, 20]
    by_slots = {q.slots: q for q in quantizers.activation_quantizers(model) if q.slots == 2}
    joined = by_slots[2]
    np.testing.assert_allclose(numpy(joined.minimum), [a.min(), b.min()], rtol=1e-5)
    np.testing.assert_allclose(numpy(joined.maximum), [a.max(), b.max()], rtol=1e-5)
    last, softmax = quantizers.activation_quantizers(model)[-2:]
    bounds = [float(numpy(bound)) for bound in last.range()]
    np.testing.assert_allclose(bounds, [dense.min(), dense.max()], rtol=1e-5)
    assert softmax.mode == "fixed" and softmax.scale_and_zero_point()[0] == 2.0**-8


def test_input_symmetric_about_zero_is_stretched(quantized, smooth_images):
    model, images = quantized(functional_model(L.Conv2D(6, 3)))
    images[0, 0, 0, 0], images[0, 0, 0, 1] = -1, 1
    calibration.calibrate(model, [images])
    (source,) = calibration.input_quantizers(model)
    low, high = (float(numpy(bound)) for bound in source.range())
    assert high == -low == pytest.approx(255 / 254)
    assert source.scale_and_zero_point()[0] == pytest.approx(2 / 254, rel=2.0**-16)


@pytest.mark.parametrize("estimator", ranges.ESTIMATORS)
def test_calibration_refuses_what_is_not_finite(estimator, smooth_images):
    model = placement.place(functional_model(L.Conv2D(6, 3)), spec.SCHEMES["w8a8"])
    images = smooth_images(6, channels=4)
    images[4, 2, 2, 1] = np.nan  # in the third batch
    with pytest.raises(ValueError, match="input_quantizer: activations run from .*: not finite"):
        calibration.calibrate(model, np.split(images, 3), ranges.estimator(estimator))


def test_calibration_refuses_no_images():
    model = placement.place(functional_model(L.Conv2D(6, 3)), spec.SCHEMES["w8a8"])
    with pytest.raises(ValueError, match="input_quantizer: no activation was observed"):
        calibration.calibrate(model, [])


def test_saved_model_lowers_to_the_same_graph(tmp_path, quantized):
    model, _ = quantized(functional_model(WEIGHTED_ONLY["deep"]))
    model.save(tmp_path / "model.keras")
    graph = lowering.lower(model)
    again = lowering.lower(keras.saving.load_model(tmp_path / "model.keras"))
    assert again.nodes == graph.nodes and list(again.tensors) == list(graph.tensors)
    for name, tensor in graph.tensors.items():
        other = again.tensors[name]
        if tensor.quantization is not None:
            for field in ("scale", "zero_point", "axis"):
                expected = getattr(tensor.quantization, field)
                np.testing.assert_array_equal(getattr(other.quantization, field), expected)
        np.testing.assert_array_equal(other.data, tensor.data)
