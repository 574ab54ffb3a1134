"""SOFTMAX in fixed point and by a table of exponentials."""

import numpy as np

from lowbit import fixed_point
from lowbit.kernels import c_library, requantization


def softmax(graph, node, inputs, kernel):
    """SOFTMAX over the last axis, to output scale 1/256 and zero point -128; int8."""
    source, output = requantization.ends(graph, node)
    beta = np.float32(node.attributes["beta"])
    below = inputs[0].astype(np.int64)
    below -= below.max(axis=-1, keepdims=True)
    if kernel in ("reference", "micro"):
        centred = _softmax_fixed_point(below, float(beta) * float(source.scale))
    else:
        centred = _softmax_table(below, source.scale * beta, output.scale)
    return requantization.finish(centred, node, output, kernel)


def _softmax_table(below, scale, output_scale):
    """Returns codes above the zero point, from a float32 table of 256 exponentials (built-in).

    The sum is accumulated in float32 in the order of the elements, as the kernel does on x86; a
    build for 64-bit ARM uses 16-bit tables instead and can differ by 1.

    Args:
      below: code - largest code, int64, in [-255, 0].
      scale: real value of one input code, times beta.
    """
    steps = np.arange(256, dtype=np.float32) * -scale
    table = c_library.float32("exp", steps)
    exponentials = table[-below]
    total = np.add.accumulate(exponentials, axis=-1)[..., -1:]
    return requantization.round_half_away(exponentials * (np.float32(1) / (total * output_scale)))


def _softmax_fixed_point(below, scale):
    """Returns codes above the zero point, by fixed-point arithmetic alone (reference).

    The kernel itself aborts where the exponentials sum to 512 or more: its last shift exceeds 31.

    Args:
      below: code - largest code, int64, in [-255, 0].
      scale: real value of one input code, times beta.
    """
    multiplier, shift = fixed_point.quantize_multiplier(min(scale * 2.0**26, 2.0**31 - 1))
    lowest = -int(np.floor(31 * 2.0 ** (26 - int(shift))))
    counted = below >= lowest  # further down the exponential is below 2^-44, and not evaluated
    scaled = fixed_point.multiply_by_quantized_multiplier(
        np.where(counted, below, 0), multiplier, shift
    )
    exponentials = np.where(counted, fixed_point.exp_on_negative_values(scaled), 0)
    total = fixed_point.rounding_divide_by_pot(exponentials, 12).sum(axis=-1, keepdims=True)
    reciprocal, unit_bits = fixed_point.reciprocal(total)
    product = fixed_point.saturating_rounding_doubling_high_mul(reciprocal, exponentials)
    return fixed_point.rounding_divide_by_pot(product, unit_bits + 31 - 8)
