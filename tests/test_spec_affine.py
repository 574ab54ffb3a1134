"""The arithmetic against Python integers, fractions, NumPy restatements and TensorFlow's own."""

import dataclasses
import fractions
import itertools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lowbit import affine, spec

WEIGHT_SPECS = {s.weights for s in spec.SCHEMES.values() if s.weights is not None}
ACTIVATION_SPECS = {s.activations for s in spec.SCHEMES.values() if s.activations is not None}
SPECS = sorted(WEIGHT_SPECS | ACTIVATION_SPECS, key=str)
EVERY_SPEC = [
    spec.QuantSpec(bits, symmetric, narrow, signed)
    for bits in range(2, 17)
    for symmetric, narrow, signed in itertools.product((False, True), repeat=3)
]
INT8 = spec.QuantSpec()
FINITE = st.floats(-(2.0**99), 2.0**99, width=32)


# --- the table of bounds ------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 17))
@pytest.mark.parametrize("symmetric", [False, True])
def test_bounds_are_the_table(bits, symmetric):
    n = 2**bits
    table = {
        (True, False): (-n // 2, n // 2 - 1),
        (True, True): (-(n // 2 - 1), n // 2 - 1),
        (False, False): (0, n - 1),
        (False, True): (0, n - 2),
    }
    for (signed, narrow), bounds in table.items():
        one = spec.QuantSpec(bits, symmetric=symmetric, narrow_range=narrow, signed=signed)
        assert affine.integer_bounds(one) == bounds


@pytest.mark.parametrize("bits", [-1, 0, 1, 17, 32])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(ValueError, match=rf"bits is {bits}; allowed are 2 to 16"):
        spec.QuantSpec(bits)


def test_unknown_scheme_lists_the_known():
    with pytest.raises(ValueError, match=r"'w9a9' is unknown; allowed are w8a8 .*dynamic"):
        spec.scheme("w9a9")


@pytest.mark.parametrize(
    "name, weights, activations",
    [
        ("w8a8", (-127, 127), (-128, 127)),
        ("w8a8_asymmetric", (-128, 127), (-128, 127)),
        ("w4a8", (-7, 7), (-128, 127)),
        ("w4a8_per_tensor_asymmetric", (-8, 7), (-128, 127)),
        ("w2a8", (-1, 1), (-128, 127)),
        ("w4a4", (-7, 7), (-8, 7)),
        ("w8a16", (-127, 127), (-32767, 32767)),
        ("w8", (-127, 127), None),
        ("a8", None, (-128, 127)),
    ],
)
def test_scheme_has_the_codes_of_the_int8_specification(name, weights, activations):
    scheme = spec.scheme(name)
    for tensor, bounds in ((scheme.weights, weights), (scheme.activations, activations)):
        assert (None if tensor is None else affine.integer_bounds(tensor)) == bounds


@pytest.mark.parametrize(
    "name, convolution, dense",
    [
        ("w8a8", -1, -1),
        ("w8a8_per_tensor", None, None),
        ("w8a8_dense_per_tensor", -1, None),
    ],
)
def test_weights_of_a_kind_of_layer(name, convolution, dense):
    scheme = spec.scheme(name)
    assert [scheme.weights_of(kind).axis for kind in ("conv", "depthwise", "dense")] == [
        convolution,
        convolution,
        dense,
    ]
    assert spec.scheme("a8").weights_of("conv") is None


# --- scale and zero point -----------------------------------------------------------------------


RANGES = {
    "both sides": (-1.3, 2.7),
    "one-sided": (0.0, 6.0),
    "positive": (2.1, 3.5),
    "negative": (-3.5, -2.1),
    "negative to zero": (-0.7, 0.0),
    "zero": (0.0, 0.0),
    "outlier": (-1e-3, 1e30),
    "negative outlier": (-1e30, 1e-3),
    "denormal": (-1e-40, 1e-40),
    "smallest normal": (0.0, 1.2e-38),
    "symmetric": (-1.0, 1.0),
    "constant": (0.25, 0.25),
}


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("one", EVERY_SPEC[::5] + SPECS, ids=str)
def test_every_code_survives_and_zero_is_exact(name, one):
    scale, zero_point = affine.scale_and_zero_point(*RANGES[name], one)
    lowest, highest = affine.integer_bounds(one)
    codes = np.arange(lowest, highest + 1)
    values = affine.dequantize(codes, scale, zero_point)
    if not one.symmetric or one.signed or zero_point:
        assert lowest <= zero_point <= highest
    assert np.isfinite(values).all() and np.isfinite(scale) and scale > 0
    np.testing.assert_array_equal(affine.quantize(values, scale, zero_point, one), codes)
    assert affine.quantize(np.float32(0), scale, zero_point, one) == zero_point
    assert affine.dequantize(zero_point, scale, zero_point) == 0


@pytest.mark.parametrize("one", [s for s in SPECS if not s.symmetric], ids=str)
def test_range_is_stretched_to_zero(one):
    for given, stretched in [((2.1, 3.5), (0, 3.5)), ((-3.5, -2.1), (-3.5, 0))]:
        assert affine.scale_and_zero_point(*given, one) == affine.scale_and_zero_point(
            *stretched, one
        )
    lowest, highest = affine.integer_bounds(one)
    assert affine.scale_and_zero_point(2.1, 3.5, one)[1] == lowest
    assert affine.scale_and_zero_point(-3.5, -2.1, one)[1] == highest


def test_zero_range_has_scale_one():
    for one in SPECS:
        assert affine.scale_and_zero_point(0, 0, one)[0] == 1
        assert affine.scale_and_zero_point(-1e-40, 1e-40, one)[0] == 1
    scale, _ = affine.scale_and_zero_point(np.zeros(3), np.zeros(3), INT8)
    np.testing.assert_array_equal(scale, np.ones(3, np.float32))


@pytest.mark.parametrize("bound", [np.nan, np.inf, -np.inf, 1e31, -1e31])
def test_range_that_is_not_finite_is_refused(bound):
    for low, high in [(bound, 1), (-1, bound), (np.array([0, bound]), np.array([1, 2]))]:
        with pytest.raises(ValueError, match="is not finite, or leaves"):
            affine.scale_and_zero_point(low, high, INT8)


def test_range_upside_down_is_refused():
    with pytest.raises(ValueError, match=r"minimum 2.0 is above its maximum 1.0"):
        affine.scale_and_zero_point(2, 1, INT8)


def test_dead_channel_has_scale_floor():
    maximum = np.array([1.0, 1e-12, 0.0, 2.0**-19], np.float32)
    for one in SPECS:
        scale, _ = affine.scale_and_zero_point(np.zeros(4), maximum, one)
        floor = np.ldexp(np.float64(scale[0]), -20)
        np.testing.assert_array_equal(scale[[1, 2]], np.float32([floor, floor]))
        assert scale[3] == scale[0] * 2.0**-19


@hypothesis.given(st.floats(2.0**-126, 2.0**100, width=32))
@hypothesis.settings(max_examples=300, deadline=None)
def test_rounded_scale_has_16_bits(value):
    rounded = float(affine.round_scale(np.float32(value)))
    mantissa = fractions.Fraction(rounded)
    while mantissa.denominator > 1:
        mantissa *= 2
    while mantissa % 2 == 0:
        mantissa /= 2
    assert mantissa < 2**16
    exact = fractions.Fraction(float(np.float32(value)))
    # Half a unit of the 16th bit: 2**-16 just above a power of two, 2**-17 just below the next.
    assert abs(fractions.Fraction(rounded) / exact - 1) <= fractions.Fraction(1, 2**16)
    assert affine.round_scale(np.float32(rounded)) == np.float32(rounded)


@hypothesis.given(FINITE, FINITE, st.sampled_from([s for s in SPECS if s.bits <= 8]))
@hypothesis.settings(max_examples=200, deadline=None)
def test_bounds_say_the_scale_exactly(one_bound, other_bound, one):
    low, high = min(one_bound, other_bound), max(one_bound, other_bound)
    scale, zero_point = affine.scale_and_zero_point(low, high, one)
    codes = np.array(affine.integer_bounds(one))
    bounds = affine.dequantize(codes, scale, zero_point)
    for bound, code in zip(bounds, codes, strict=True):  # exact: no rounding in float32
        exact = fractions.Fraction(float(scale)) * (int(code) - int(zero_point))
        assert fractions.Fraction(float(bound)) == exact
    again = affine.scale_and_zero_point(*bounds, one)
    assert again == (scale, zero_point)


@hypothesis.given(FINITE, FINITE, st.sampled_from(SPECS))
@hypothesis.settings(max_examples=200, deadline=None)
def test_value_in_range_is_within_half_a_code(one_bound, other_bound, one):
    low, high = min(one_bound, other_bound), max(one_bound, other_bound)
    scale, zero_point = affine.scale_and_zero_point(low, high, one)
    x = np.linspace(low, high, 33, dtype=np.float64).astype(np.float32)
    error = affine.fake_quantize(x, low, high, one) - x.astype(np.float64)
    # Half a code; at the ends another half for the nudged zero, and the scale's 16 bits: 2**-16 of
    # all the codes.
    reach = 0.5 if one.symmetric else 1.0
    slack = 2.0 ** (one.bits - 16) + 2.0 ** (one.bits - 22)
    assert np.abs(error).max() <= (reach + slack) * np.float64(scale)


# --- quantize -----------------------------------------------------------------------------------


def test_ties_go_to_even():
    x = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5], np.float32)
    expected = [-2, -2, 0, 0, 2, 2]
    np.testing.assert_array_equal(affine.quantize(x, 1, 0, INT8), expected)
    # The zero point is added after the rounding: an odd one leaves the same ties.
    np.testing.assert_array_equal(affine.quantize(x, 1, 3, INT8), np.array(expected) + 3)
    np.testing.assert_array_equal(affine.quantize(x / 8, 0.125, -7, INT8), np.array(expected) - 7)


def test_values_saturate():
    x = np.array([1.2, 3.5, -127.5, 129, -1300, 1e30, -1e30, np.inf, -np.inf, 1e38], np.float32)
    expected = [1, 4, -128, 127, -128, 127, -128, 127, -128, 127]
    np.testing.assert_array_equal(affine.quantize(x, 1, 0, INT8), expected)
    np.testing.assert_array_equal(affine.quantize(x[5:], 1e-9, 9, INT8), expected[5:])
    narrow = dataclasses.replace(INT8, narrow_range=True)
    assert affine.quantize(np.float32(-1300), 1, 0, narrow) == -127
    unsigned = dataclasses.replace(INT8, signed=False)
    np.testing.assert_array_equal(affine.quantize(x[:5], 1, 0, unsigned), [1, 4, 0, 129, 0])


@pytest.mark.parametrize("quantize", ["quantize", "quantize_stochastic"])
def test_nan_has_no_code(quantize, rng):
    arguments = (np.array([1, np.nan, 2, np.nan], np.float32), 1, 0, INT8)
    arguments += (rng,) if quantize == "quantize_stochastic" else ()
    with pytest.raises(ValueError, match="2 of 4 values to quantize are NaN"):
        getattr(affine, quantize)(*arguments)


PER_CHANNEL = [
    (shape, axis)
    for shape in [(5,), (3, 5), (2, 3, 4), (3, 3, 2, 4), (2, 3, 1, 2, 3)]
    for axis in range(-len(shape), len(shape))
]


@pytest.mark.parametrize("shape, axis", PER_CHANNEL)
@pytest.mark.parametrize("symmetric", [False, True])
def test_each_channel_is_quantized_by_itself(shape, axis, symmetric, rng):
    one = spec.QuantSpec(symmetric=symmetric, narrow_range=symmetric, axis=axis)
    x = rng.normal(0, 3, shape).astype(np.float32)
    low, high = affine.observed_range(x, axis)
    scale, zero_point = affine.scale_and_zero_point(low, high, one)
    codes = affine.quantize(x, scale, zero_point, one)
    back = affine.dequantize(codes, scale, zero_point, axis)
    assert scale.shape == zero_point.shape == (shape[axis],)
    for channel in range(shape[axis]):
        part = np.take(x, channel, axis).astype(np.float32)
        expected = np.clip(
            np.rint(part / scale[channel]) + zero_point[channel], *affine.integer_bounds(one)
        )
        np.testing.assert_array_equal(np.take(codes, channel, axis), expected)
        expected = (expected - zero_point[channel]).astype(np.float32) * scale[channel]
        np.testing.assert_array_equal(np.take(back, channel, axis), expected)
        low_part, high_part = min(part.min(), 0), max(part.max(), 0)
        width = max(-low_part, high_part) / 127 if symmetric else (high_part - low_part) / 255
        assert abs(scale[channel] / np.float64(width) - 1) <= 2.0**-16 + 2.0**-22
    np.testing.assert_array_equal(affine.fake_quantize(x, low, high, one), back)


def test_one_range_holds_the_whole_tensor(rng):
    x = rng.normal(size=(3, 4, 5)).astype(np.float32)
    assert affine.observed_range(x) == (x.min(), x.max())
    assert affine.observed_range(np.abs(x)) == (0, x.__abs__().max())  # zero is always in


@hypothesis.given(
    hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=6), elements=FINITE),
    st.sampled_from(SPECS),
)
@hypothesis.settings(max_examples=150, deadline=None)
def test_quantizing_twice_changes_nothing(x, one):
    low, high = affine.observed_range(x)
    once = affine.fake_quantize(x, low, high, one)
    np.testing.assert_array_equal(affine.fake_quantize(once, low, high, one), once)
    order = np.argsort(x, axis=None)
    assert (np.diff(once.reshape(-1)[order]) >= 0).all()  # monotone


def test_stochastic_rounding_is_unbiased(rng):
    values = np.linspace(-1.9, 1.9, 39, dtype=np.float32)
    draws = 4000
    x = np.repeat(values[:, None], draws, axis=1)
    codes = affine.quantize_stochastic(x, 0.1, 5, INT8, rng)
    exact = values.astype(np.float64) / np.float64(np.float32(0.1)) + 5
    fraction = exact - np.floor(exact)
    sigma = np.sqrt(fraction * (1 - fraction) / draws)
    assert (np.abs(codes.mean(axis=1) - exact) <= 4 * sigma + 1e-6).all()
    assert (np.abs(codes - exact[:, None]) < 1 + 1e-6).all()
    assert len(np.unique(codes)) >= 39
    saturated = affine.quantize_stochastic(np.float32([1e30, -1e30]), 0.1, 5, INT8, rng)
    np.testing.assert_array_equal(saturated, [127, -128])


# --- inputs and biases --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16"])
def test_input_codes(dtype, rng):
    scale, zero_point = np.float32(0.0125), {"int8": -3, "uint8": 125, "int16": 0}[dtype]
    info = np.iinfo(dtype)
    x = rng.normal(0, info.max * 0.006, (7, 5, 5, 3)).astype(np.float32)
    codes = affine.quantize_input(x, scale, zero_point, dtype)
    expected = np.clip(np.rint(x / scale) + zero_point, info.min, info.max)
    assert codes.dtype == dtype and len(np.unique(codes)) >= 16
    np.testing.assert_array_equal(codes, expected)
    assert affine.quantize_input(np.float32([1e9]), scale, zero_point, dtype) == info.max


def test_symmetric_pixels_are_ties_unless_stretched():
    pixels = np.arange(256, dtype=np.float32)
    x = pixels / np.float32(127.5) - np.float32(1)
    # Scale 1 / 127.5, as other tools write it: every pixel is half way between two codes.
    place = x.astype(np.float64) * 127.5
    assert np.abs(place - np.floor(place) - 0.5).max() < 1e-5
    tied = affine.quantize_input(x, np.float32(1 / 127.5), 0, "int8")
    assert len(np.unique(tied)) == 215
    stretch = np.float32(255 / 254)
    scale, zero_point = affine.scale_and_zero_point(-stretch, stretch, INT8)
    stretched = affine.quantize_input(x, scale, zero_point, "int8")
    assert zero_point in (0, -1) and len(np.unique(stretched)) >= 254
    assert (np.diff(stretched.astype(int)) <= 1).all()


def test_bias_codes_are_exact(rng):
    bias = rng.normal(0, 2, 64).astype(np.float32)
    input_scale = np.float32(0.0235)
    weight_scale = affine.round_scale(rng.uniform(1e-5, 1e-2, 64).astype(np.float32))
    codes, scale = affine.quantize_bias(bias, input_scale, weight_scale)
    for c in range(64):
        exact = fractions.Fraction(float(input_scale)) * fractions.Fraction(float(weight_scale[c]))
        assert codes[c] == round(fractions.Fraction(float(bias[c])) / exact)
        assert scale[c] == np.float32(float(exact))
    assert codes.dtype == np.int32 and len(np.unique(codes)) >= 16
    per_tensor, one_scale = affine.quantize_bias(bias, input_scale, weight_scale[:1])
    assert one_scale.shape == (1,)
    exact = fractions.Fraction(float(input_scale)) * fractions.Fraction(float(weight_scale[0]))
    assert per_tensor.tolist() == [round(fractions.Fraction(float(b)) / exact) for b in bias]


def test_bias_beyond_int32_is_refused():
    bias = np.float32([0.5, 3.0, -0.25])
    with pytest.raises(ValueError, match=r"bias 3.0 of channel 1 needs code 3e\+10 .*int32 holds"):
        affine.quantize_bias(bias, np.float32(1), np.float32([0.01, 1e-10, 0.01]))
    edge = np.float64(2**31 - 1)
    codes, _ = affine.quantize_bias(np.array([edge, -edge - 1]), np.float32(1), np.float32([1]))
    np.testing.assert_array_equal(codes, [2**31 - 1, -(2**31)])
    for beyond in (edge + 1, -edge - 2):
        with pytest.raises(ValueError, match="int32 holds"):
            affine.quantize_bias(np.array([beyond]), np.float32(1), np.float32([1]))


@hypothesis.given(
    hnp.arrays(np.float32, 8, elements=st.floats(-1e6, 1e6, width=32)),
    st.floats(2.0**-20, 2.0**10, width=32),
)
@hypothesis.settings(max_examples=100, deadline=None)
def test_smallest_weight_scale_keeps_the_bias_below_its_limit(bias, input_scale):
    bias = np.where(np.abs(bias) < 1e-20, 0, bias).astype(np.float32)
    scale = affine.minimum_weight_scale(bias, np.float32(input_scale))
    codes, _ = affine.quantize_bias(bias[bias != 0], input_scale, scale[bias != 0])
    # The scale may round down by 2**-16: 2**22 * 2**-16 = 64 codes, and two roundings of float32.
    assert (np.abs(codes.astype(np.int64)) <= 2**22 + 66).all()
    assert (np.abs(codes.astype(np.int64)) >= 2**22 - 66).all()
    assert (scale[bias == 0] == 0).all()


# --- sqnr ---------------------------------------------------------------------------------------


def test_sqnr():
    x = np.array([3.0, 4.0])
    assert affine.sqnr_db(x, x + [0.5, 0]) == pytest.approx(20.0)  # 25 / 0.25
    assert affine.sqnr_db(x, x) == np.inf
    assert affine.sqnr_db(np.zeros(2), x) == -np.inf
    assert affine.sqnr_db(x, np.zeros(2)) == pytest.approx(0)


def test_sqnr_grows_6_db_a_bit(rng):
    x = rng.uniform(-1, 1, 100_000).astype(np.float32)
    found = [
        affine.sqnr_db(x, affine.fake_quantize(x, -1, 1, spec.QuantSpec(bits)))
        for bits in range(3, 13)
    ]
    # signal 1/3, noise scale**2 / 12, scale = 2 / (2**bits - 1): 20 log10(2**bits - 1)
    expected = [20 * np.log10(2**bits - 1) for bits in range(3, 13)]
    np.testing.assert_allclose(found, expected, atol=0.1)


# --- second oracles -----------------------------------------------------------------------------


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("bounds", [(-1.3, 2.7), (0.0, 6.0), (-0.7, 0.0), (-100.0, 3.0)], ids=str)
def test_agrees_with_tensorflow(bounds, bits, narrow, rng):
    tf = pytest.importorskip("tensorflow")
    one = spec.QuantSpec(bits, narrow_range=narrow, signed=False)
    scale, zero_point = affine.scale_and_zero_point(*bounds, one)
    codes = np.array(affine.integer_bounds(one))
    low, high = affine.dequantize(codes, scale, zero_point)  # nudged: both agree on the scale
    x = rng.uniform(low - 0.1 * (high - low), high + 0.1 * (high - low), 5000).astype(np.float32)
    theirs = tf.quantization.fake_quant_with_min_max_vars(x, low, high, bits, narrow).numpy()
    ours = affine.fake_quantize(x, low, high, one)
    place = np.clip(x, low, high).astype(np.float64) / scale
    tie = np.abs(place - np.floor(place) - 0.5) < 1e-4 * 2 ** max(0, bits - 8)
    assert tie.mean() < 0.06
    ulp = np.spacing(np.abs([low, high]).max()) * 1.001
    assert np.abs(ours - theirs)[~tie].max() <= ulp
    their_codes = np.rint(theirs.astype(np.float64) / scale) + zero_point
    our_codes = affine.quantize(x, scale, zero_point, one)
    np.testing.assert_array_equal(our_codes[~tie], their_codes[~tie])
    assert len(np.unique(their_codes)) >= min(2**bits - narrow, 16)


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_agrees_with_tensorflows_quantize(dtype, rng):
    tf = pytest.importorskip("tensorflow")
    one = spec.QuantSpec(signed=dtype == "int8")
    scale, zero_point = affine.scale_and_zero_point(-1.5, 2.5, one)
    low, high = affine.dequantize(np.array(affine.integer_bounds(one)), scale, zero_point)
    x = rng.uniform(-2, 3, 4000).astype(np.float32)
    kind = {"int8": tf.qint8, "uint8": tf.quint8}[dtype]
    # SCALED has no zero point, MIN_COMBINED another formula: MIN_FIRST is the affine map.
    theirs = tf.quantization.quantize(x, low, high, kind, mode="MIN_FIRST").output
    theirs = tf.cast(tf.bitcast(theirs, dtype), "int32").numpy()
    place = np.clip(x, low, high).astype(np.float64) / scale
    tie = np.abs(place - np.floor(place) - 0.5) < 1e-4
    ours = affine.quantize(x, scale, zero_point, one)
    np.testing.assert_array_equal(ours[~tie], theirs[~tie])
    assert len(np.unique(ours)) == 256
