"""LSQ: learned step size quantization (Esser et al., arXiv 1902.08153), the step kept as a range.

Forward: `fakequant`.  What learns is the range, so that a trained model is exported as any other;
the step is the scale s that `affine.scale_and_zero_point` makes of it, N = highest - lowest code:

    asymmetric   s = (maximum - minimum) / N                symmetric   s = larger side / highest

Gradient (the paper's eq. 3 and 5; low, high as in `fakequant`, error = rint(x / s) - x / s):

    dL/dx       = dL/dy where low <= x <= high, else 0
    inside      = sum of dL/dy * error where low <= x <= high
    below       = sum of dL/dy where x < low;   above = sum of dL/dy where x > high

    asymmetric   dL/dmaximum = above + inside / N
                 dL/dminimum = below - inside / N
    symmetric    dL/ds       = inside + above * highest + below * lowest
                 the larger side's gradient is +-dL/ds / highest, the other one's 0

A fused activation function takes `below` away (and with it dL/dminimum of an asymmetric range: the
low end stays at zero), and `above` where its clamp, not the range, is what clips.

Gradient scale (section 2.2).  The paper multiplies dL/ds by 1 / sqrt(count * Q), count the number of
values that share s and Q the largest code.  A range that takes the same place must move s as SGD
on s would:  maximum = Q * s  has  dL/dmaximum = dL/ds / Q,  and its change is to be Q * change of s,

    multiplier = Q^2 / sqrt(count * Q)                      Q = N (asymmetric) or highest (symmetric)
"""

from keras import ops

from lowbit import affine, fakequant
from lowbit import spec as spec_lib


def fake_quantize(
    x,
    minimum,
    maximum,
    spec: spec_lib.QuantSpec,
    activation: str | None = None,
    gradient_scale: bool = True,
    count: int | None = None,
    compiled: bool = False,
):
    """Returns x quantized to the range and back, with gradients for x, minimum and maximum.

    Args:
      x: float32, any shape; channels on its last axis where `spec.axis` is set.
      minimum, maximum: float32: scalars, or (channels,).
      spec: bits, symmetric, narrow_range, signed; `axis` None or the last axis.
      activation: None, "relu" or "relu6", applied before the quantization.
      gradient_scale: True multiplies the range's gradients as written at the top of this file.
      count: number of values that share a range, for the gradient's scale; None: those of x (of one
        channel).  The paper counts weights, and of activations the features: one example's values.
      compiled: as in `fakequant.fake_quantize`.

    Returns:
      float32, the shape of `x`: the bits of `fakequant.fake_quantize`.
    """

    def backward(upstream, parameters, low, high, x, minimum, maximum):
        scale = parameters[0]
        of_x, inside, below, above = fakequant.as_one_loop(_backward, compiled)(
            upstream, x, scale, low, high
        )
        of_range = range_gradients(
            inside, 0.0, below, above, minimum, maximum, parameters, spec, activation
        )
        if gradient_scale:
            multiplier = _multiplier(x, scale, spec, count)
            of_range = [bound * multiplier for bound in of_range]
        return of_x, *of_range

    return fakequant.with_gradients(backward, (x, minimum, maximum), spec, activation, compiled)


def _backward(upstream, x, scale, low, high):
    code = x / scale
    of_x = fakequant.pass_inside(upstream, x, low, high)
    # An infinite x has the error NaN, which is only ever multiplied outside.
    is_inside = ops.logical_and(x >= low, x <= high)
    inside = ops.where(is_inside, upstream * (ops.round(code) - code), 0.0)
    below, above = ops.where(x < low, upstream, 0.0), ops.where(x > high, upstream, 0.0)
    return of_x, *(fakequant.sum_to(values, scale) for values in (inside, below, above))


def range_gradients(
    inside,
    slack,
    below,
    above,
    minimum,
    maximum,
    parameters,
    spec: spec_lib.QuantSpec,
    activation: str | None,
):
    """Returns dL/dminimum and dL/dmaximum from sums over x; each argument float32, a range's shape.

    For any staircase y = s * F(x / s) with codes F, zero on a code, that the range clips.  Its step
    moves by a bound as N says, and an asymmetric range's zero point with it (zero is fixed under an
    activation function, and where the spec is symmetric):

        dy/ds = F - F' * x / s        asymmetric also: dy/dminimum + dy/dmaximum = 1 - F'

    With F = rint and F' taken for 1 that is LSQ, slack 0; `dsq` has a smooth F.

    Args:
      inside: sum of dL/dy * (F - F' * x / s) inside the range.
      slack: sum of dL/dy * (1 - F') inside the range.
      below, above: sums of dL/dy outside the range.
      parameters: `fakequant.quantization`'s result.
    """
    _, zero_point, _, code_high = parameters
    lowest, highest = (float(bound) for bound in affine.integer_bounds(spec))
    if activation is not None:
        below = ops.zeros_like(below)
        above = ops.where(code_high >= highest, above, 0.0)
    if spec.symmetric:
        of_side = (inside + above * highest + below * lowest) / highest
        maximum_is_larger = maximum >= -minimum
        return (
            ops.where(maximum_is_larger, 0.0, -of_side),
            ops.where(maximum_is_larger, of_side, 0.0),
        )
    if activation is not None:
        return ops.zeros_like(minimum), above + inside / (highest - lowest)
    stretched = (inside - (lowest - zero_point) * slack) / (highest - lowest)
    return below + slack - stretched, above + stretched


def _multiplier(x, scale, spec, count):
    lowest, highest = affine.integer_bounds(spec)
    largest = float(highest if spec.symmetric else highest - lowest)
    if count is None:
        # Divided as floats: the batch may be unknown until the graph runs.
        count = ops.cast(ops.size(x), "float32") / ops.cast(ops.size(scale), "float32")
    return largest**2 / ops.sqrt(ops.cast(count, "float32") * largest)
