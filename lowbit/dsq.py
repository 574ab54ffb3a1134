"""DSQ: differentiable soft quantization (Gong et al., arXiv 1908.05033): the hard forward of
`fakequant` with the gradient of a soft staircase, whose steepness alpha is learned.

The soft staircase Q_S (eq. 3-8): in interval i, of width Delta = (high - low) / intervals,

    Q_S(x) = low + Delta * (i + (phi + 1) / 2)              phi = s * tanh(k * (x - m_i))
    m_i = low + (i + 1/2) * Delta                           s = 1 / (1 - alpha)
    k = steepness / Delta                                   steepness = ln(2 / alpha - 1)

and low or high outside.  alpha -> 0 is the hard staircase.

Gradient (eq. 10-12).  In units of the step, with v = (x - low) / Delta and F(v) = i + (phi + 1) / 2,
Q_S = low + Delta * F(v), and k and m_i drop out of the paper's formulas:

    t      = tanh(steepness * (v - i - 1/2))
    F'     = s * steepness * (1 - t^2) / 2
    dF/dalpha = (t * s^2 - s * (1 - t^2) * (v - i - 1/2) * 2 / (alpha * (2 - alpha))) / 2

    dy/dx       = F'                            inside low <= x <= high, else 0
    dy/dalpha   = Delta * dF/dalpha             inside, else 0
    dy/dmaximum = (F - v * F') / intervals      inside, 1 above, 0 below
    dy/dminimum = 1 - F' - dy/dmaximum          inside, 0 above, 1 below

A symmetric range's bounds are tied to its larger side.  A fused activation function keeps the grid
of the range and clips it: zero, which is on a code, then stands still, and dy/dminimum is 0
(`lsq.range_gradients` has the rule for all cases).

Where the paper's Algorithm 1 has the hard sign in place of phi in eq. 11, 12, this file has phi, as
eq. 13: the gradients are those of one function.
"""

from keras import ops

from lowbit import fakequant, lsq
from lowbit import spec as spec_lib

# The paper's (0, 0.5).  Below 1e-4 the staircase is as hard as float32 can tell at its edges, where
# F' is 1 - t^2 with t near 1 - alpha.
ALPHA_RANGE = (1e-4, 0.5)
K_LIMIT = 1000.0  # section 4.1: the largest k


def fake_quantize(
    x,
    minimum,
    maximum,
    spec: spec_lib.QuantSpec,
    activation: str | None = None,
    alpha=0.2,
    compiled: bool = False,
):
    """Returns x quantized to the range and back, with gradients for x, the range and alpha.

    Args:
      x: float32, any shape; channels on its last axis where `spec.axis` is set.
      minimum, maximum: float32: scalars, or (channels,).
      spec: bits, symmetric, narrow_range, signed; `axis` None or the last axis.
      activation: None, "relu" or "relu6", applied before the quantization.
      alpha: float, or float32 scalar or (channels,); the paper starts at 0.2.  Used as
        `clip_alpha` says; at a limit only the gradient that leads back inside remains.
      compiled: as in `fakequant.fake_quantize`.

    Returns:
      float32, the shape of `x`: the bits of `fakequant.fake_quantize`, whatever alpha is.
    """

    def backward(upstream, parameters, low, high, x, minimum, maximum, alpha):
        scale = parameters[0]
        of_x, inside, slack, below, above, of_alpha = fakequant.as_one_loop(_backward, compiled)(
            upstream, x, scale, low, high, alpha
        )
        of_range = lsq.range_gradients(
            inside, slack, below, above, minimum, maximum, parameters, spec, activation
        )
        of_alpha = _kept_inside(of_alpha, alpha, scale)
        return of_x, *of_range, fakequant.sum_to(of_alpha, alpha)

    inputs = (x, minimum, maximum, alpha)
    return fakequant.with_gradients(backward, inputs, spec, activation, compiled)


def _backward(upstream, x, scale, low, high, alpha):
    is_inside = ops.logical_and(x >= low, x <= high)
    # Zero is on a code, so codes count from there as well as from low; the difference to the next
    # one is exact.  An outside x is replaced, because infinities would become NaN.
    code = ops.where(is_inside, x, 0.0) / scale
    soft, slope, of_alpha = _staircase(code, clip_alpha(alpha, scale))
    # F - F' * code, where the large parts of both cancel.
    error = (soft - code) + code * (1.0 - slope)
    sums = [
        fakequant.sum_to(ops.where(mask, values, 0.0), scale)
        for mask, values in (
            (is_inside, upstream * error),
            (is_inside, upstream * (1.0 - slope)),
            (x < low, upstream),
            (x > high, upstream),
        )
    ]
    of_x = ops.where(is_inside, upstream * slope, 0.0)
    of_alpha = ops.where(is_inside, upstream * scale * of_alpha, 0.0)
    # One value a channel where either has one: each channel limits a shared alpha by its own step.
    return of_x, *sums, fakequant.sum_to(of_alpha, scale + alpha)


def _staircase(v, alpha):
    """Returns F(v), F'(v) and dF/dalpha: the formulas at the top of this file."""
    s, steepness = 1.0 / (1.0 - alpha), ops.log(2.0 / alpha - 1.0)
    interval = ops.floor(v)
    from_middle = v - interval - 0.5
    t = ops.tanh(steepness * from_middle)
    sech2 = 1.0 - t * t
    of_steepness = s * sech2 * from_middle  # dphi/dsteepness
    of_alpha = t * s * s - of_steepness * 2.0 / (alpha * (2.0 - alpha))
    return interval + (s * t + 1.0) / 2.0, s * steepness * sech2 / 2.0, of_alpha / 2.0


def _kept_inside(of_alpha, alpha, scale):
    lower, upper = _alpha_limits(scale)
    # A descent step is -gradient: at the lower end a positive one would lead further out.
    of_alpha = ops.where(alpha <= lower, ops.minimum(of_alpha, 0.0), of_alpha)
    return ops.where(alpha >= upper, ops.maximum(of_alpha, 0.0), of_alpha)


def clip_alpha(alpha, step):
    """Returns alpha limited to ALPHA_RANGE and, from below, to where k reaches K_LIMIT.

    A step under 1.1e-3 has k above the limit even at alpha 0.5; 0.5 it is then, because the
    gradient knows k * step alone, which is at its smallest there.
    """
    lower, upper = _alpha_limits(step)
    return ops.minimum(ops.maximum(alpha, lower), upper)


def _alpha_limits(step):
    smallest, largest = ALPHA_RANGE
    # k = K_LIMIT in eq. 8; exp(80) is within float32 and its alpha far below the smallest.
    at_k_limit = 2.0 / (ops.exp(ops.minimum(K_LIMIT * step, 80.0)) + 1.0)
    return ops.minimum(ops.maximum(at_k_limit, smallest), largest), largest


def soft_quantize(x, low, high, intervals: int, alpha):
    """Returns Q_S(x), the soft staircase (eq. 5), in plain differentiable operations.

    What `fake_quantize` computes the gradient of; for plots and tests.

    Args:
      x: float32, any shape.
      low, high: float32 that broadcast against x; low = high gives that value everywhere.
      intervals: the number of codes less one.
      alpha: in (0, 1), not limited any further; broadcasts against x.
    """
    x, low, high, alpha = (ops.convert_to_tensor(each, "float32") for each in (x, low, high, alpha))
    step = (high - low) / intervals
    is_inside = ops.logical_and(x >= low, x <= high)
    v = (ops.where(is_inside, x, low) - low) / ops.where(step > 0, step, 1.0)
    soft, _, _ = _staircase(v, alpha)
    return ops.where(x < low, low, ops.where(x > high, high, low + step * soft))
