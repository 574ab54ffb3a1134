"""Weights of one bit and of two states and zero, each output channel with a scale of its own.

    binary   a * sign(w), sign(0) = 1                       a = mean |w|           XNOR-Net 1603.05279
    ternary  a * sign(w) where |w| > t, else 0              a = mean |w| of those  TWN 1605.04711
             t = 0.7 * mean |w|

Gradient: straight through; for the binary only where |w| <= limit, so that a weight whose sign is
settled stops growing.  None passes through a: it would pull every weight of a channel at once.

a is rounded as `affine` rounds a scale, so the values are the codes -1, 0, 1 of SPEC times the
scale of the range [-a, a], to the last bit: who stores that range exports these weights.
"""

from keras import ops

from lowbit import fakequant
from lowbit import spec as spec_lib

# The codes that hold the values: 2 bits without the fourth code.
SPEC = spec_lib.QuantSpec(bits=2, symmetric=True, narrow_range=True)

THRESHOLD = 0.7  # of mean |w|: TWN eq. 6, optimal between uniform (0.67) and normal (0.75) weights


def binarize(kernel, per_channel: bool = True, limit: float = 1.0):
    """Returns (values, a): the a * sign(w) nearest to the weights (XNOR-Net section 3.1).

    Args:
      kernel: float32, output channels on the last axis.
      per_channel: False shares one scale.
      limit: weights beyond it get no gradient.

    Returns:
      values: float32, the kernel's shape.
      a: float32 (channels,), or a scalar; without a gradient.  A kernel of zeros gives zeros, a = 0.
    """
    kernel = ops.convert_to_tensor(kernel, "float32")
    fixed = ops.stop_gradient(kernel)
    a = _as_scale(_mean(ops.abs(fixed), ops.ones_like(fixed), per_channel))
    return _straight_through(kernel, ops.where(fixed >= 0, a, -a), limit), a


def ternarize(kernel, per_channel: bool = True):
    """Returns (values, a): each weight as -a, 0 or a (TWN section 2.2); as `binarize`."""
    kernel = ops.convert_to_tensor(kernel, "float32")
    fixed = ops.stop_gradient(kernel)
    size = ops.abs(fixed)
    large = size > THRESHOLD * _mean(size, ops.ones_like(size), per_channel)
    a = _as_scale(_mean(size, ops.cast(large, "float32"), per_channel))
    values = ops.where(large, ops.sign(fixed) * a, 0.0)
    return _straight_through(kernel, values, float("inf")), a


METHODS = {"binary": binarize, "ternary": ternarize}


def _mean(size, weight, per_channel):
    axis = tuple(range(len(size.shape) - 1)) if per_channel else None
    # Where no weight counts every size is 0, and so is the mean.
    count = ops.maximum(ops.sum(weight, axis=axis), 1.0)
    return ops.sum(size * weight, axis=axis) / count


def _as_scale(mean):
    scale, _ = fakequant.scale_and_zero_point(-mean, mean, SPEC)
    return ops.where(ops.max(mean) > 0, scale, 0.0)


def _straight_through(kernel, values, limit):
    @ops.custom_gradient
    def kernel_as_values(kernel, values):
        def gradient(*arguments, upstream=None):
            upstream = fakequant.upstream_of(arguments, upstream)
            return fakequant.pass_inside(upstream, kernel, -limit, limit), ops.zeros_like(values)

        return values, gradient

    return kernel_as_values(kernel, values)
