"""Functions of int16 codes: SOFTMAX, LOGISTIC, TANH and GELU by tables of 256 or 512 steps.

Between its steps a table is linear.  The built-in LOGISTIC and TANH run 16-bit fixed-point
arithmetic (gemmlowp) instead where the input's scale is one of a few powers of two.
"""

import functools
import math

import numpy as np

from lowbit import fixed_point
from lowbit.kernels import c_library, requantization

LOWEST, HIGHEST = -(2**15), 2**15 - 1


def _sigmoid_table():
    """Returns sigmoid(i / 24) with 16 fractional bits, i in [0, 255], int64.

    Each sample is raised by half of what the chord to the next one lacks in the middle.
    """

    def sigmoid(i):
        return 2.0**16 / (1 + np.exp(-i / 24.0))

    i = np.arange(256)
    chord = (sigmoid(i) + sigmoid(i + 1)) / 2
    table = np.rint(sigmoid(i) + (sigmoid(i + 0.5) - chord) / 2).astype(np.int64)
    table[255] = 2**16 - 1
    return table


SIGMOID_TABLE = _sigmoid_table()


def _near_power_of_two(scale):
    """Returns the exponent if log2(scale) lies within 0.001 of a whole number, else None."""
    exact = float(np.log2(np.float64(scale)))
    nearest = math.floor(exact + 0.5)
    return nearest if abs(exact - nearest) < 1e-3 else None


def _table_input(scale, powers):
    """Returns (multiplier, right shift) that turn codes into steps of 1 / (3 * 4096).

    Args:
      powers: exponents of two of the scale, for which the multiplier is exact.
    """
    power = _near_power_of_two(scale)
    if power in powers:
        return 3 << (power + 12), 0
    multiplier, shift = float(scale) * 4096.0 * 3.0, 0
    while multiplier <= 32767.0 / 2.0 and shift <= 30:
        shift, multiplier = shift + 1, multiplier * 2.0
    return int(multiplier), shift


def logistic(graph, node, inputs, kernel):
    """LOGISTIC to scale 2^-15: table of sigmoid(i / 24), linear between.

    The built-in kernel at input scale 2^-12 runs 16-bit fixed-point arithmetic instead.
    """
    scale = graph.tensors[node.inputs[0]].scale
    codes = inputs[0].astype(np.int64)
    if kernel == "builtin" and _near_power_of_two(scale) == -12:
        return _logistic_16(codes).astype(np.int16)
    multiplier, shift = _table_input(scale, (-12,))
    x = fixed_point.wrap32(codes * multiplier + (1 << shift >> 1)) >> shift
    magnitude = np.abs(x)
    index = np.minimum(magnitude >> 9, 254)
    low, high = SIGMOID_TABLE[index], SIGMOID_TABLE[index + 1]
    value = (low << 9) + (magnitude & 0x1FF) * (high - low)
    value = np.where(magnitude >> 9 >= 255, 0x7FFF << 10, value)
    value = np.where(x >= 0, value + (1 << 9), (1 << 25) - value + (1 << 9) - 1)
    return (value >> 10).astype(np.int16)


def tanh(graph, node, inputs, kernel):
    """TANH to scale 2^-15: 2 * sigmoid(2 * x) - 1 by the table of LOGISTIC.

    The built-in kernel at input scales 2^-12 and 2^-11 runs 16-bit fixed-point arithmetic instead.
    """
    scale = graph.tensors[node.inputs[0]].scale
    codes = inputs[0].astype(np.int64)
    power = _near_power_of_two(scale)
    if kernel == "builtin" and power in (-12, -11):
        return _tanh_16(np.clip(codes << (power + 12), LOWEST, HIGHEST)).astype(np.int16)
    multiplier, shift = _table_input(scale, (-12, -11))
    x = fixed_point.wrap32(codes * multiplier + (1 << shift >> 1)) >> shift
    magnitude = np.abs(x)
    index = np.minimum(magnitude >> 8, 254)
    low, high = SIGMOID_TABLE[index], SIGMOID_TABLE[index + 1]
    value = (low << 8) + (magnitude & 0xFF) * (high - low)
    value = np.where(magnitude >> 8 >= 255, 0xFFFF << 8, value)
    value = np.where(x >= 0, value - (1 << 23) + (1 << 7), -value + (1 << 23) + (1 << 7) - 1)
    return (value >> 8).astype(np.int16)


def _multiply_16(a, b):
    """Returns a * b / 2^15 of int16 values, to nearest, ties upwards, saturated."""
    return np.minimum((a * b + (1 << 14)) >> 15, HIGHEST)


def _saturated_16(x):
    return np.clip(x, LOWEST, HIGHEST)


def _constant_16(int32_constant):
    return int(fixed_point.rounding_divide_by_pot(int32_constant, 16))


def _exp_16(a, integer_bits):
    """Returns exp(a) with 15 fractional bits for int16 a <= 0 with 15 - integer_bits of them."""
    fraction = 15 - integer_bits
    quarter = 1 << (fraction - 2)
    remainder = (a & (quarter - 1)) - quarter
    constant, third = _constant_16(1895147668), _constant_16(715827883)
    x = (remainder << integer_bits) + (1 << 12)
    x2 = _multiply_16(x, x)
    x3, x4 = _multiply_16(x2, x), _multiply_16(x2, x2)
    tail = _multiply_16(fixed_point.rounding_divide_by_pot(x4, 2) + x3, third) + x2
    tail = fixed_point.rounding_divide_by_pot(tail, 1)
    result = _saturated_16(constant + _multiply_16(constant, x + tail))
    taken_off = remainder - a
    for exponent in range(-2, integer_bits):
        factor = _constant_16(math.floor(math.exp(-(2.0**exponent)) * 2.0**31 + 0.5))
        lowered = _multiply_16(result, factor)
        result = np.where(taken_off & (1 << (fraction + exponent)), lowered, result)
    return np.where(a == 0, HIGHEST, result)


def _two_over_one_plus_16(a):
    """Returns 2 / (1 + a) with 13 fractional bits for a in [0, 1) with 15: three Newton steps."""
    half_denominator = (a + HIGHEST + 1) >> 1
    x = _constant_16(1515870810) + _multiply_16(half_denominator, _constant_16(-1010580540))
    for _ in range(3):
        step = (1 << 13) - _multiply_16(half_denominator, x)
        x = x + _saturated_16(_multiply_16(x, step) << 2)
    return x


def _logistic_16(a):
    """Returns 1 / (1 + exp(-a)) with 15 fractional bits of int16 a with 12."""
    positive = _saturated_16(_two_over_one_plus_16(_exp_16(-np.abs(a), 3)) << 1)
    result = np.where(a > 0, positive, HIGHEST - positive)
    return np.where(a == 0, 1 << 14, result)


def _tanh_16(a):
    """Returns tanh(a) with 15 fractional bits of int16 a with 12."""
    magnitude = _saturated_16((_two_over_one_plus_16(_exp_16(-np.abs(a), 4)) - (1 << 13)) << 2)
    return np.where(a == 0, 0, np.sign(a) * magnitude)


def interpolation_table(function, lowest, highest, output_scale_inverse):
    """Returns 513 int16 samples of a function over [lowest, highest], for linear interpolation.

    Each sample is corrected by half the error that the chord has in the middle.  The arithmetic is
    that of the bounds' dtype, float32 or float64.
    """
    dtype = np.asarray(lowest).dtype.type
    away = requantization.round_half_away
    step = (highest - lowest) / dtype(512)
    i = np.arange(513).astype(dtype)
    value = away(function(lowest + i[:512] * step) * output_scale_inverse)
    middle = function(lowest + i[:512] * step + step / dtype(2)) * output_scale_inverse
    following = function(lowest + i[1:] * step) * output_scale_inverse
    bias = away((away((following + value) / dtype(2)) - away(middle)) / dtype(2))
    last = away(function(np.array([highest], dtype)) * output_scale_inverse)
    return np.clip(np.concatenate([value - bias, last]), LOWEST, HIGHEST).astype(np.int64)


def interpolate(codes, table):
    """Returns the table's values at int16 codes: 9 bits pick, 7 interpolate, ties upwards."""
    index = 256 + (codes >> 7)
    base, slope = table[index], table[index + 1] - table[index]
    return base + ((slope * (codes & 0x7F) + 64) >> 7)


def gelu(graph, node, inputs, kernel):
    """GELU: table of 512 steps over all input codes, linear between, all in float32; same in both.

    x / 2 * erfc(-x / sqrt(2)), or with tanh where it is approximate.
    """
    function = _gelu_approximate if node.attributes["approximate"] else _gelu_exact
    return _interpolated(graph, node, inputs, function)


def rsqrt(graph, node, inputs, kernel):
    """RSQRT: 1 / sqrt(x) by a table of 512 steps, linear between; of 0 the largest code."""
    source, output = requantization.ends(graph, node)
    requantization.check_not_negative(node, inputs[0], source)
    largest = np.float32(HIGHEST) * output.scale

    def function(x):
        positive = x > 0
        return np.where(positive, np.float32(1) / np.sqrt(np.where(positive, x, 1)), largest)

    return _interpolated(graph, node, inputs, function)


def _interpolated(graph, node, inputs, function):
    """Returns a float32 function of every code, by a table of 512 steps over all of them."""
    source, output = requantization.ends(graph, node)
    inverse = np.float32(65536) / (
        output.scale * np.float32(HIGHEST) - output.scale * np.float32(LOWEST)
    )
    table = interpolation_table(
        function, source.scale * np.float32(LOWEST), source.scale * np.float32(HIGHEST), inverse
    )
    return interpolate(inputs[0].astype(np.int64), table).astype(np.int16)


def _gelu_exact(x):
    return np.float32(0.5) * x * c_library.float32("erfc", x * np.float32(-math.sqrt(0.5)))


def _gelu_approximate(x):
    inner = x + np.float32(0.044715) * x * x * x
    inner = np.float32(math.sqrt(2 / math.pi)) * inner
    return np.float32(0.5) * x * (np.float32(1) + c_library.float32("tanh", inner))


@functools.cache
def _softmax_tables():
    inverse = 65536.0 / (2.0 / 65535 * HIGHEST - 2.0 / 65535 * LOWEST)
    exponential = 10.0 / 65535
    unit = 1.0 / 65535
    return (
        interpolation_table(
            np.exp, np.float64(exponential * (LOWEST - HIGHEST)), np.float64(0), inverse
        ),
        interpolation_table(
            lambda x: 1.0 / (1.0 + x), np.float64(0), np.float64(unit * (HIGHEST - LOWEST)), inverse
        ),
    )


def softmax(graph, node, inputs, kernel):
    """SOFTMAX over the last axis, to scale 2^-15: tables of exp and 1 / (1 + x); same in both."""
    source = graph.tensors[node.inputs[0]]
    beta = np.float32(node.attributes["beta"])
    real = float(source.scale * beta) / (10.0 / 65535.0)
    below = inputs[0].astype(np.int64)
    below -= below.max(axis=-1, keepdims=True)
    scaled = fixed_point.multiply_wrapping(below, *fixed_point.quantize_multiplier(real))
    exponential_table, reciprocal_table = _softmax_tables()
    exponentials = interpolate(
        np.clip(fixed_point.wrap32(scaled + HIGHEST), LOWEST, HIGHEST), exponential_table
    )
    total = exponentials.sum(axis=-1, keepdims=True)
    leading = 32 - np.frexp(total.astype(np.float64))[1].astype(np.int64)
    normal = ((total << (leading - 1)) + (1 << 13)) >> 14
    place = np.clip(normal - ((1 << 15) + (1 << 16)), LOWEST, HIGHEST)
    reciprocal = interpolate(place, reciprocal_table)
    right = 31 - leading
    codes = (exponentials * reciprocal + (np.int64(1) << (right - 1))) >> right
    return np.clip(codes, 0, HIGHEST).astype(np.int16)
