"""Each feature of a float model, placed: the same numbers in float, and the quantizers it needs."""

import itertools

import keras
import numpy as np
import pytest

from lowbit import functional as functional_lib
from lowbit import layers, placement, quantizers, spec
from lowbit.functional import UnsupportedModelError

L = keras.layers
W8A8 = spec.SCHEMES["w8a8"]


def numpy(tensor):
    return keras.ops.convert_to_numpy(tensor)


def kinds(model):
    """Returns the class names of the layers in order, quantizers and the input left out."""
    skipped = (quantizers.ActivationQuantizer, L.InputLayer)
    return [type(layer).__name__ for layer in model.layers if not isinstance(layer, skipped)]


def names(model):
    return [quantizer.name for quantizer in quantizers.activation_quantizers(model)]


def activations_of(model):
    """Returns {label: fused activation} of every call of a quantizer."""
    nodes = [
        node
        for quantizer in quantizers.activation_quantizers(model)
        for node in quantizer._inbound_nodes
    ]
    return {
        node.arguments.kwargs["label"]: node.arguments.kwargs.get("activation") for node in nodes
    }


@pytest.fixture
def placed(randomize, rng):
    """Returns a function that places a model and demands that its float form is unchanged."""

    def place_and_compare(model, scheme=W8A8):
        randomize(model)
        found = placement.place(model, scheme)
        shapes = [(2, *tensor.shape[1:]) for tensor in model.inputs]
        x = [rng.normal(0.3, 1, shape).astype(np.float32) for shape in shapes]
        x = x if len(x) > 1 else x[0]
        expected = model(x, training=False)
        with layers.in_float(found):
            result = found(x, training=False)
        several = isinstance(expected, (list, tuple))
        for ours, theirs in zip(
            result if several else [result], expected if several else [expected], strict=True
        ):
            theirs = numpy(theirs)
            assert np.isfinite(theirs).all() and theirs.std() > 1e-3
            np.testing.assert_allclose(numpy(ours), theirs, rtol=1e-5, atol=1e-5)
        return found

    return place_and_compare


def functional(function, shape=(8, 8, 4), **options):
    inputs = keras.Input(shape, **options)
    return keras.Model(inputs, function(inputs))


# --- convolution, batch norm, activation --------------------------------------------------------


SPELLINGS = {
    "relu layer": ("relu", lambda x: L.ReLU()(L.BatchNormalization()(L.Conv2D(4, 3)(x)))),
    "relu6 layer": ("relu6", lambda x: L.ReLU(6.0)(L.BatchNormalization()(L.Conv2D(4, 3)(x)))),
    "relu6 int": ("relu6", lambda x: L.ReLU(6)(L.BatchNormalization()(L.Conv2D(4, 3)(x)))),
    "activation relu": (
        "relu",
        lambda x: L.Activation("relu")(L.BatchNormalization()(L.Conv2D(4, 3)(x))),
    ),
    "activation relu6": (
        "relu6",
        lambda x: L.Activation("relu6")(L.BatchNormalization()(L.Conv2D(4, 3)(x))),
    ),
    "function relu6": (
        "relu6",
        lambda x: L.Activation(keras.activations.relu6)(L.BatchNormalization()(L.Conv2D(4, 3)(x))),
    ),
    "argument relu": ("relu", lambda x: L.Conv2D(4, 3, activation="relu")(x)),
    "argument relu6": ("relu6", lambda x: L.Conv2D(4, 3, activation=keras.activations.relu6)(x)),
    "linear": (None, lambda x: L.Activation("linear")(L.BatchNormalization()(L.Conv2D(4, 3)(x)))),
    "no batch norm": (None, lambda x: L.Conv2D(4, 3)(x)),
    "no bias": (None, lambda x: L.Conv2D(4, 3, use_bias=False)(x)),
    "no scale, no center": (
        None,
        lambda x: L.BatchNormalization(scale=False, center=False)(L.Conv2D(4, 3)(x)),
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_activation_is_fused_in_every_spelling(spelling, placed):
    activation, function = SPELLINGS[spelling]
    model = placed(functional(function))
    assert kinds(model) == ["QuantizedConv2D"]
    assert len(names(model)) == 2 and names(model)[0] == "input_quantizer"
    labels = activations_of(model)
    assert labels.pop("input") is None
    assert list(labels.values()) == [activation]


@pytest.mark.parametrize(
    "geometry", [("same", 1, 1), ("valid", 2, 1), ("same", 2, 1), ("same", 1, 2)]
)
@pytest.mark.parametrize(
    "make, expected",
    [
        (lambda **g: L.Conv2D(4, 3, **g), ["QuantizedConv2D"]),
        (lambda **g: L.DepthwiseConv2D(3, **g), ["QuantizedDepthwiseConv2D"]),
        (lambda **g: L.DepthwiseConv2D(3, depth_multiplier=2, **g), ["QuantizedDepthwiseConv2D"]),
        (lambda **g: L.SeparableConv2D(6, 3, **g), ["QuantizedDepthwiseConv2D", "QuantizedConv2D"]),
        (
            lambda **g: L.SeparableConv2D(6, 3, depth_multiplier=2, activation="relu", **g),
            ["QuantizedDepthwiseConv2D", "QuantizedConv2D"],
        ),
    ],
    ids=["conv", "depthwise", "depthwise2", "separable", "separable2"],
)
def test_geometry_and_multiplier_survive(make, expected, geometry, placed):
    padding, strides, dilation = geometry
    layer = make(padding=padding, strides=strides, dilation_rate=dilation)
    model = placed(functional(lambda x: L.ReLU()(L.BatchNormalization()(layer(x)))))
    if layer.activation is keras.activations.relu:  # batch norm behind it cannot be folded
        expected = [*expected, "QuantizedDepthwiseConv2D"]
    assert kinds(model) == expected
    assert len(names(model)) == 1 + len(kinds(model))


def test_weights_get_the_schemes_specification(placed):
    def network(x):
        x = L.DepthwiseConv2D(3)(L.Conv2D(4, 3)(x))
        return L.Dense(5)(L.Flatten()(x))

    for name, conv_axis, dense_axis in [
        ("w8a8", -1, -1),
        ("w8a8_per_tensor", None, None),
        ("w8a8_dense_per_tensor", -1, None),
        ("w8", -1, -1),
    ]:
        model = placed(functional(network), spec.SCHEMES[name])
        found = [layer.weight_spec.axis for layer in layers.weighted_layers(model)]
        assert found == [conv_axis, conv_axis, dense_axis]
        specs = {quantizer.spec for quantizer in quantizers.activation_quantizers(model)}
        assert specs == {spec.SCHEMES[name].activations}
    model = placed(functional(network), spec.SCHEMES["a8"])
    assert [layer.weight_spec for layer in layers.weighted_layers(model)] == [None] * 3


def test_dense_and_softmax(placed):
    def network(x):
        x = L.Dense(16, activation="relu")(L.Flatten()(x))
        x = L.BatchNormalization()(L.Dense(12)(L.Dropout(0.5)(x)))
        return L.Dense(10, activation="softmax", name="head")(x)

    model = placed(functional(network))
    assert kinds(model) == ["Flatten", *["QuantizedDense"] * 3, "Softmax"]
    last = quantizers.activation_quantizers(model)[-1]
    assert last.mode == "fixed"
    scale, zero_point = last.scale_and_zero_point()
    assert (scale, zero_point) == (np.float32(1 / 256), -128)
    model = placed(functional(network), spec.SCHEMES["w8a16"])
    scale, zero_point = quantizers.activation_quantizers(model)[-1].scale_and_zero_point()
    assert (scale, zero_point) == (np.float32(1 / 32768), 0)


@pytest.mark.parametrize("make", [lambda: L.Softmax(), lambda: L.Activation("softmax")])
def test_softmax_layer_is_fixed(make, placed):
    model = placed(functional(lambda x: make()(L.Dense(5)(L.Flatten()(x)))))
    modes = [quantizer.mode for quantizer in quantizers.activation_quantizers(model)]
    assert modes == ["frozen", "frozen", "fixed"]


# --- structure ----------------------------------------------------------------------------------


def block(name, shape=(8, 8, 4)):
    inputs = keras.Input(shape)
    x = L.Conv2D(4, 3, padding="same", use_bias=False, name="conv")(inputs)
    return keras.Model(inputs, L.ReLU()(L.BatchNormalization(name="norm")(x)), name=name)


def test_nested_models_are_opened(placed):
    inner = block("inner")
    middle_inputs = keras.Input((8, 8, 4))
    middle = keras.Model(middle_inputs, inner(L.Conv2D(4, 1)(middle_inputs)), name="middle")
    model = placed(functional(lambda x: L.GlobalAveragePooling2D()(middle(x))))
    assert [layer.name for layer in layers.weighted_layers(model)][1] == "middle.inner.conv"
    assert len(layers.weighted_layers(model)) == 2


def test_nested_model_used_twice_shares_its_weights(placed):
    inner = block("inner")
    model = placed(functional(lambda x: L.Add()([inner(inner(x)), x])))
    (layer,) = layers.weighted_layers(model)
    assert len(layer._inbound_nodes) == 2
    # Two tensors, two ranges; one kernel.
    assert len(names(model)) == 4 and len(set(names(model))) == 4
    # Called between different scales: it computes in floats.
    assert layer.input_quantizer() is None and layer.output_quantizer() is None


def test_layer_used_twice_before_different_batch_norms_is_refused():
    conv = L.Conv2D(4, 3, padding="same", name="twice")
    model = functional(
        lambda x: L.BatchNormalization(name="b")(conv(L.BatchNormalization(name="a")(conv(x))))
    )
    with pytest.raises(UnsupportedModelError, match="layer twice is called twice"):
        placement.place(model, W8A8)


def test_sequential(placed):
    inner = keras.Sequential([keras.Input((8, 8, 4)), L.Conv2D(4, 3), L.BatchNormalization()])
    model = keras.Sequential([keras.Input((8, 8, 4)), inner, L.ReLU(), L.Flatten(), L.Dense(3)])
    found = placed(model)
    assert kinds(found) == ["QuantizedConv2D", "Flatten", "QuantizedDense"]
    assert "relu" in activations_of(found).values()


def test_residual_addition_fuses_its_relu(placed):
    def network(x):
        y = L.BatchNormalization()(L.Conv2D(4, 3, padding="same")(x))
        return L.ReLU(name="after")(L.Add()([x, y]))

    model = placed(functional(network))
    assert kinds(model) == ["QuantizedConv2D", "QuantizedAdd"]
    assert activations_of(model)["after"] == "relu" and len(names(model)) == 3


def test_concatenated_branches_share_one_quantizer(placed):
    def network(x):
        a = L.Conv2D(3, 1, activation="relu", name="a")(x)
        b = L.Conv2D(5, 3, padding="same", name="b")(x)
        joined = L.Concatenate(name="join")([a, b])
        other = L.Conv2D(2, 1, name="other")(a)  # reads a as well
        return L.Concatenate(name="last")([L.Conv2D(2, 1, name="c")(joined), other])

    model = placed(functional(network))
    assert sorted(names(model)) == ["input_quantizer", "join_quantizer", "last_quantizer"]
    shared = model.get_layer("join_quantizer")
    assert shared.slots == 2 and len(shared._inbound_nodes) == 2
    slots = {n.arguments.kwargs["label"]: n.arguments.kwargs["slot"] for n in shared._inbound_nodes}
    assert sorted(slots) == ["a", "b"] and sorted(slots.values()) == [0, 1]


def test_relu_whose_input_is_read_twice_is_not_fused(placed):
    def network(x):
        y = L.Conv2D(4, 3, padding="same", name="conv")(x)
        return L.Add(name="sum")([y, L.ReLU(name="relu")(y)])

    model = placed(functional(network))
    assert kinds(model) == ["QuantizedConv2D", "ReLU", "QuantizedAdd"]
    assert set(activations_of(model).values()) == {None}


def test_relu_of_a_model_output_is_not_fused(placed):
    inputs = keras.Input((8, 8, 4))
    y = L.Conv2D(4, 3)(inputs)
    model = placed(keras.Model(inputs, [y, L.ReLU()(y)]))
    assert "ReLU" in kinds(model)


def test_two_inputs_and_two_outputs(placed):
    a, b = keras.Input((8, 8, 2), name="left"), keras.Input((8, 8, 3), name="right")
    x = L.Concatenate()([a, b])
    y = L.Conv2D(4, 3)(x)
    model = placed(keras.Model([a, b], [L.GlobalAveragePooling2D()(y), L.Flatten()(y)]))
    shared = quantizers.activation_quantizers(model)[0]
    assert shared.slots == 2 and len(shared._inbound_nodes) == 2
    assert len(model.outputs) == 2


# --- padding and pooling ------------------------------------------------------------------------


def same_padding(size, kernel, stride):
    """TensorFlow's: ceil(size / stride) outputs, the odd pixel at the end."""
    total = max((int(np.ceil(size / stride)) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


PADDINGS = [
    *itertools.product(("conv", "depthwise"), (3,), (7, 8), (1, 2), ((1, 1), (0, 1))),
    *itertools.product(("conv",), (5,), (7, 8), (1, 2), ((2, 2), (1, 2))),
    ("conv", 3, 8, 2, (1, 0)),
]


@pytest.mark.parametrize("kind, kernel, size, stride, pad", PADDINGS)
def test_padding_is_merged_where_same_gives_the_numbers(kind, kernel, size, stride, pad, placed):
    def network(x):
        x = L.ZeroPadding2D((pad, pad))(x)
        if kind == "conv":
            return L.Conv2D(4, kernel, strides=stride)(x)
        return L.DepthwiseConv2D(kernel, strides=stride)(x)

    model = placed(functional(network, (size, size, 4)))
    merged = pad == same_padding(size, kernel, stride)
    assert ("ZeroPadding2D" in kinds(model)) != merged
    (layer,) = layers.weighted_layers(model)
    assert layer.padding == ("same" if merged else "valid")
    assert len(names(model)) == 2  # padding keeps its input's scale


def test_padding_that_others_read_stays(placed):
    def network(x):
        padded = L.ZeroPadding2D(1)(x)
        return L.Add()([L.Conv2D(4, 3)(padded), L.Conv2D(4, 3)(padded)])

    assert kinds(placed(functional(network))).count("ZeroPadding2D") == 1


def test_padding_differs_by_axis(placed):
    def network(x):
        return L.Conv2D(4, (3, 1), strides=(2, 1))(L.ZeroPadding2D(((0, 1), (0, 0)))(x))

    assert kinds(placed(functional(network, (8, 9, 4)))) == ["QuantizedConv2D"]


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("size, strides", [(2, 2), (3, 1), (3, 2)])
@pytest.mark.parametrize("layer", [L.AveragePooling2D, L.MaxPooling2D])
def test_pooling_keeps_the_scale(layer, size, strides, padding, placed):
    def network(x):
        x = layer(size, strides, padding=padding)(L.Conv2D(4, 3)(x))
        return L.Conv2D(3, 1)(x)

    model = placed(functional(network, (9, 9, 4)))
    found = quantizers.activation_quantizers(model)
    assert len(found) == 3
    # Average pooling rounds to its input's codes: the same quantizer once more, observing nothing.
    calls = [node.arguments.kwargs.get("slot") for node in found[1]._inbound_nodes]
    assert calls == ([0, None] if layer is L.AveragePooling2D else [0])


@pytest.mark.parametrize("keepdims", [False, True])
def test_global_pooling_has_its_own_quantizer(keepdims, placed):
    model = placed(
        functional(lambda x: L.GlobalAveragePooling2D(keepdims=keepdims)(L.Conv2D(20, 3)(x)))
    )
    assert len(names(model)) == 3
    assert model.output_shape == ((None, 1, 1, 20) if keepdims else (None, 20))


def test_reshapes_keep_the_scale_and_dropout_goes(placed):
    def network(x):
        x = L.SpatialDropout2D(0.2)(L.Dropout(0.1)(L.Conv2D(4, 3)(x)))
        x = L.Reshape((9, 4, 4))(L.GaussianNoise(0.1)(x))
        return L.Dense(3)(L.Dropout(0.5)(L.Flatten()(L.Reshape((-1, 4))(x))))

    model = placed(functional(network))
    assert kinds(model) == ["QuantizedConv2D", "Reshape", "Reshape", "Flatten", "QuantizedDense"]
    assert len(names(model)) == 3


# --- rescaling ----------------------------------------------------------------------------------


def normalization(channels):
    rng = np.random.default_rng(3)
    return L.Normalization(mean=rng.normal(size=channels), variance=rng.uniform(0.5, 2, channels))


RESCALINGS = {
    "scale": lambda: L.Rescaling(1 / 127.5),
    "scale and offset": lambda: L.Rescaling(1 / 127.5, offset=-1),
    "per channel": lambda: L.Rescaling([0.5, 1.0, 2.0, 3.0], offset=[-1.0, 0.5, 0.0, 1.0]),
    "normalization": lambda: normalization(4),
    "normalization of all": lambda: L.Normalization(mean=0.4, variance=2.0, axis=None),
    "inverted": lambda: L.Normalization(mean=0.4, variance=2.0, axis=None, invert=True),
}
READERS = {
    "conv": lambda padding: L.Conv2D(5, 3, padding=padding),
    "depthwise": lambda padding: L.DepthwiseConv2D(3, padding=padding, depth_multiplier=2),
}


@pytest.mark.parametrize("rescaling", RESCALINGS)
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("reader", READERS)
def test_rescaling_is_merged_where_borders_stay_exact(rescaling, padding, reader, placed):
    model = placed(
        functional(lambda x: L.ReLU()(READERS[reader](padding)(RESCALINGS[rescaling]()(x))))
    )
    merged = padding == "valid" or rescaling == "scale"
    assert len(layers.weighted_layers(model)) == (1 if merged else 2)
    if not merged:
        assert kinds(model)[0] == "QuantizedDepthwiseConv2D"
        assert layers.weighted_layers(model)[0].kernel.shape == (1, 1, 4, 1)
        assert not layers.weighted_layers(model)[0].trainable_variables


def test_rescaling_before_dense_and_batch_norm(placed):
    def network(x):
        return L.BatchNormalization()(L.Dense(6)(L.Rescaling(0.5, offset=-0.25)(x)))

    assert kinds(placed(functional(network, (7,)))) == ["QuantizedDense"]


def test_two_rescalings_in_a_row(placed):
    def network(x):
        return L.Conv2D(3, 3)(normalization(4)(L.Rescaling(0.5, offset=-0.25)(x)))

    placed(functional(network))


def test_rescaling_of_a_padded_input_keeps_the_border(placed):
    # The pixels are padded after the rescaling, by a layer of its own.
    def network(x):
        return L.Conv2D(3, 3)(L.ZeroPadding2D(1)(L.Rescaling(0.5, offset=-0.25)(x)))

    placed(functional(network))


def test_rescaling_read_twice_becomes_a_layer(placed):
    def network(x):
        x = L.Rescaling(0.5, offset=-0.25)(x)
        return L.Add()([L.Conv2D(3, 3)(x), L.Conv2D(3, 3)(x)])

    model = placed(functional(network))
    assert kinds(model).count("QuantizedDepthwiseConv2D") == 1


def test_a_shared_layer_behind_a_rescaling_keeps_its_weights(placed):
    def network(x):
        layer = L.Conv2D(3, 3)
        return L.Add()([layer(L.Rescaling(0.5, offset=-0.25)(x)), layer(x)])

    assert kinds(placed(functional(network))).count("QuantizedDepthwiseConv2D") == 1


@pytest.mark.parametrize(
    "layer",
    [
        L.Conv2D(6, 3),
        L.DepthwiseConv2D(3, depth_multiplier=2),
        L.Conv2DTranspose(6, 3, use_bias=False),
        L.Dense(6),
    ],
    ids=lambda layer: layer.name,
)
def test_rescaling_behind_a_layer_with_weights_merges_into_it(placed, layer):
    def network(x):
        y = type(layer).from_config(layer.get_config())(x)
        count = y.shape[-1]
        factors = L.Rescaling(
            np.linspace(0.5, 2, count).tolist(), np.linspace(-1, 1, count).tolist()
        )
        return L.ReLU()(factors(y))

    assert len(kinds(placed(functional(network)))) == 1


def test_rescaling_behind_a_tensor_read_twice_becomes_a_layer(placed):
    def network(x):
        y = L.Conv2D(3, 3)(x)
        return L.Add()([y, L.Rescaling(0.5)(y)])

    assert kinds(placed(functional(network))).count("QuantizedDepthwiseConv2D") == 1


# --- normalizations, parts, joined functions ----------------------------------------------------

OTHERS = {
    "layer normalization": lambda x: L.LayerNormalization(epsilon=1e-2)(L.Conv2D(6, 3)(x)),
    "without gamma and beta": lambda x: L.LayerNormalization(center=False, scale=False)(x),
    "rms normalization": lambda x: L.RMSNormalization()(L.Conv2D(6, 3)(x)),
    "prelu": lambda x: L.PReLU(shared_axes=(1, 2), alpha_initializer="ones")(x),
    "elu": lambda x: L.ELU()(x),
    "average": lambda x: L.Average()([x, L.Conv2D(4, 1)(x), L.ReLU()(x)]),
    "slices": lambda x: x[:, 1:-1, ::2, 1:] * L.Conv2D(3, 1)(x)[:, :-2, 1::2, :3],
    "split": lambda x: keras.ops.split(x, 2, axis=-1)[1],
    "mean over channels": lambda x: x - keras.ops.mean(x, axis=-1, keepdims=True),
    "depth to space": lambda x: keras.ops.depth_to_space(L.Conv2D(8, 1)(x), 2),
    "joined": lambda x: L.Concatenate()([keras.ops.tanh(x), keras.ops.sigmoid(x), x]),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_layer_computes_what_the_float_one_does(placed, case):
    placed(functional(OTHERS[case]))


def test_slices_of_a_saved_model(placed, tmp_path):
    model = functional(lambda x: x[:, 1:-1, ..., ::2] * keras.ops.pad(x[:, 3:, :, :2], PADDING))
    path = tmp_path / "float.keras"
    model.save(path)
    placed(keras.models.load_model(path))


PADDING = ((0, 0), (1, 0), (0, 0), (0, 0))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: keras.ops.pad(x, PADDING, constant_values=3.0),
        lambda x: x[:, ::-1],
        lambda x: keras.ops.split(x, 1, axis=0)[0],
    ],
)
def test_arguments_of_recorded_operations_that_no_kernel_knows_are_refused(function):
    with pytest.raises(UnsupportedModelError, match="has arguments that no integer kernel takes"):
        placement.place(functional(function), W8A8)


def test_a_float_schemes_prelu_is_the_float_one(placed):
    placed(functional(lambda x: L.PReLU(alpha_initializer="he_normal")(x)), spec.scheme("float32"))


def test_calls_one_by_one_give_what_the_model_gives(rng):
    def network(x):
        first, second = keras.ops.split(x + L.Conv2D(4, 1)(x), 2, axis=-1)
        rows = L.Reshape((64, 2))(L.Concatenate()([first]) * second)
        return L.MultiHeadAttention(2, 3)(rows, rows)

    model = functional(network)
    trace = functional_lib.trace(model)
    x = rng.normal(size=(2, 8, 8, 4)).astype(np.float32)
    values = {trace.inputs[0]: x}
    for _ in functional_lib.run_calls(trace, values):
        pass
    np.testing.assert_allclose(numpy(values[trace.outputs[0]]), numpy(model(x)), atol=1e-6)


def test_layer_normalization_over_other_axes_is_refused():
    layer = L.LayerNormalization(axis=1, name="tilted")
    with pytest.raises(UnsupportedModelError, match=r"tilted normalizes over axes \[1\]"):
        placement.place(functional(layer), W8A8)


# --- batch norm alone ---------------------------------------------------------------------------


def test_batch_norm_before_the_convolution_becomes_a_depthwise(placed):
    def network(x):
        y = L.ReLU(name="relu")(L.BatchNormalization()(x))
        y = L.Conv2D(4, 3, padding="same")(y)
        return L.Add()([x, y])

    model = placed(functional(network))
    assert kinds(model) == ["QuantizedDepthwiseConv2D", "QuantizedConv2D", "QuantizedAdd"]
    assert activations_of(model)["relu"] == "relu"


def test_batch_norm_of_a_tensor_read_twice_is_not_folded(placed):
    def network(x):
        y = L.Conv2D(4, 3)(x)
        return L.Add()([y, L.BatchNormalization()(y)])

    assert kinds(placed(functional(network))) == [
        "QuantizedConv2D", "QuantizedDepthwiseConv2D", "QuantizedAdd",
    ]  # fmt: skip


def test_batch_norm_twice_in_a_row(placed):
    model = placed(
        functional(lambda x: L.BatchNormalization()(L.BatchNormalization()(L.Conv2D(4, 3)(x))))
    )
    assert kinds(model) == ["QuantizedConv2D", "QuantizedDepthwiseConv2D"]


# --- the arrangement can be trained and saved ---------------------------------------------------


def test_placing_copies_the_weights(randomize):
    model = randomize(functional(lambda x: L.BatchNormalization()(L.Conv2D(4, 3)(x))))
    before = [numpy(variable) for variable in model.variables]
    found = placement.place(model, W8A8, range_mode="trainable", decay=0.5)
    for variable in found.variables:
        variable.assign(variable * 0 + 3.0)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(numpy(variable), value)
    modes = {(q.mode, q.decay) for q in quantizers.activation_quantizers(found)}
    assert modes == {("trainable", 0.5)}


# --- what is refused ----------------------------------------------------------------------------


class Subclassed(keras.Model):
    """A model without a graph."""

    def __init__(self):
        super().__init__(name="opaque")
        self.dense = L.Dense(2)

    def call(self, x):
        return self.dense(x)


@keras.saving.register_keras_serializable("lowbit_tests")
class TwoOutputs(L.Layer):
    """A layer with two outputs."""

    def call(self, x):
        return x, x


def lambda_model():
    secret = L.Lambda(lambda y: y * 2, name="secret")
    return functional(lambda x: secret(L.Conv2D(4, 3, name="c")(x)))


def nan_model():
    model = functional(lambda x: L.Conv2D(4, 3, name="broken")(x))
    model.get_layer("broken").kernel.assign(np.full((3, 3, 4, 4), np.nan, np.float32))
    return model


REFUSED = {
    "lambda": (lambda_model, r"layer secret \(Lambda, after c\) has no .*Conv2D"),
    "lstm": (
        lambda: functional(lambda x: L.LSTM(3, name="memory")(x), (5, 4)),
        r"layer memory \(LSTM, after the model's input\) has no quantized form; .*Dense",
    ),
    "subclassed": (Subclassed, r"model opaque \(Subclassed\) is subclassed; only functional"),
    "nested subclassed": (
        lambda: functional(lambda x: Subclassed()(x)),
        r"model (opaque\.)?opaque \(Subclassed\) is subclassed; only functional",
    ),
    "dynamic shape": (
        lambda: functional(lambda x: L.Conv2D(4, 3, name="loose")(x), (None, None, 3)),
        r"layer loose has output shape \(None, None, None, 4\); every size but the batch's",
    ),
    "channels first": (
        lambda: functional(
            lambda x: L.ZeroPadding2D(1, data_format="channels_first", name="first")(x)
        ),
        r"layer first has data_format 'channels_first'; TFLite kernels need 'channels_last'",
    ),
    "selu": (
        lambda: functional(lambda x: L.Conv2D(4, 3, activation="selu", name="soft")(x)),
        r"layer soft has activation 'selu'; allowed are elu, gelu, hard_sigmoid, hard_silu, leaky_relu",
    ),
    "selu layer": (
        lambda: functional(lambda x: L.Activation("selu", name="soft")(x)),
        r"layer soft has activation 'selu'; allowed are elu, gelu, hard_sigmoid, hard_silu, leaky_relu",
    ),
    "relu 3": (
        lambda: functional(lambda x: L.ReLU(max_value=3, name="three")(x)),
        r"layer three is ReLU\(max_value=3(.0)?, .*allowed are max_value None or 6",
    ),
    "leaky": (
        lambda: functional(lambda x: L.ReLU(6, negative_slope=0.1, name="leaky")(x)),
        r"layer leaky is ReLU\(.*negative_slope=0.1, .*allowed are max_value None or 6",
    ),
    "nan": (nan_model, r"layer broken: its kernel holds NaN or infinity"),
    "two outputs": (
        lambda: functional(lambda x: TwoOutputs(name="double")(x)[0]),
        r"layer double has 2 outputs; 1 is allowed",
    ),
    "unknown operation": (
        lambda: functional(lambda x: keras.ops.exp(L.Conv2D(4, 1)(x))),
        r"operation exp.* \(keras.ops, Exp\) has no quantized form; those that have: Add, Clip",
    ),
    "softmax axis": (
        lambda: functional(lambda x: L.Softmax(axis=1, name="tilted")(x)),
        r"layer tilted is a Softmax over axis 1; only the last is allowed",
    ),
    "batch norm axis": (
        lambda: functional(lambda x: L.BatchNormalization(axis=1, name="across")(x)),
        r"layer across is a BatchNormalization over axis 1",
    ),
    "not built": (
        lambda: keras.Sequential([L.Dense(3)], name="bare"),
        r"model bare is not built; give it an Input",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusal_names_the_layer_and_what_is_allowed(case):
    make, message = REFUSED[case]
    with pytest.raises(UnsupportedModelError, match=message):
        placement.place(make(), W8A8)
