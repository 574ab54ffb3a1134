"""Rounding with error feedback: the codes of a layer that keep its output, not its weights.

The squared error of y = w^T x when codes q replace w is a quadratic form of the inputs' covariance,

    E = (q - w)^T H (q - w)        H = covariance + damping * mean(diagonal) * identity

Rounding to nearest ignores that x's are correlated.  Two steps on each output channel lower E:

  feedback   round one weight after another, and let the weights that are still to come take up the
             error (GPTQ: Frantar et al. 2210.17323, eq. 2 and 3, by the Cholesky factor of H^-1)
  descent    w_j's best code with all others held, q_j <- round(q_j - (H (q - w))_j / H_jj), again and
             again; E never grows
"""

import dataclasses

import numpy as np

from lowbit import affine
from lowbit import spec as spec_lib

DAMPING = 0.01
# Rows that are rounded before the rest takes up their error in one matrix product.
BLOCK = 64


def damped(covariance: np.ndarray, damping: float = DAMPING) -> np.ndarray:
    """Returns H of (G, K, K): positive definite, dead inputs included."""
    return covariance + lift(covariance, damping)


def lift(covariance: np.ndarray, factor: float) -> np.ndarray:
    """Returns factor * mean(diagonal) * identity, (G, K, K), above zero for constant inputs too."""
    variance = np.maximum(np.einsum("gkk->gk", covariance).mean(axis=1), 0)
    # Products are float32: a group's covariance is known to 1e-7 of the largest one's.
    floor = 1e-6 * variance.max(initial=0.0) or 1.0
    return (factor * variance + floor)[:, None, None] * np.eye(covariance.shape[1])


def error(difference: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """Returns d^T H d for each output, (G, O), of differences (G, K, O)."""
    return np.einsum("gko,gko->go", difference, hessian @ difference)


def nearest(weights, scale, zero_point, spec):
    """Returns codes less zero point, float64, (G, K, O), for scale and zero point (G, O)."""
    lowest, highest = affine.integer_bounds(spec)
    zero_point = zero_point[:, None, :]
    return np.clip(np.rint(weights / scale[:, None, :]) + zero_point, lowest, highest) - zero_point


@dataclasses.dataclass(frozen=True)
class Feedback:
    """How the error of one input's weight spreads to the inputs that are rounded after it."""

    order: np.ndarray  # (G, K): the inputs with the most power first: theirs are the largest errors
    factor: np.ndarray  # (G, K, K), upper triangular U with H^-1 = U^T U, in that order


def feedback(hessian: np.ndarray) -> Feedback:
    """Returns the factor of H, float64 (G, K, K), positive definite: `damped`."""
    order = np.argsort(-np.einsum("gkk->gk", hessian), axis=1, kind="stable")
    hessian = np.take_along_axis(
        np.take_along_axis(hessian, order[:, :, None], axis=1), order[:, None, :], axis=2
    )
    return Feedback(order, np.linalg.cholesky(np.linalg.inv(hessian)).transpose(0, 2, 1))


def with_feedback(
    weights, feedback: Feedback, scale, zero_point, spec: spec_lib.QuantSpec
) -> np.ndarray:
    """Returns codes less zero point, float64 (G, K, O), rounded one input after another.

    Args:
      weights: float64 (G, K, O).
      feedback: of the inputs' covariance.
      scale, zero_point: (G, O).
      spec: the codes' bounds.
    """
    lowest, highest = affine.integer_bounds(spec)
    groups, taps, _ = weights.shape
    order, factor = feedback.order, feedback.factor
    left = np.take_along_axis(weights, order[:, :, None], axis=1)
    codes = np.empty_like(left)
    for start in range(0, taps, BLOCK):
        stop = min(start + BLOCK, taps)
        errors = np.empty((groups, stop - start, left.shape[2]))
        for j in range(start, stop):
            code = np.clip(np.rint(left[:, j] / scale) + zero_point, lowest, highest) - zero_point
            codes[:, j] = code
            errors[:, j - start] = (left[:, j] - code * scale) / factor[:, j, j][:, None]
            left[:, j + 1 : stop] -= (
                factor[:, j, j + 1 : stop][:, :, None] * errors[:, j - start][:, None, :]
            )
        left[:, stop:] -= factor[:, start:stop, stop:].transpose(0, 2, 1) @ errors
    result = np.empty_like(codes)
    np.put_along_axis(result, order[:, :, None], codes, axis=1)
    return result


def descend(codes, weights, hessian, scale, zero_point, spec, sweeps: int = 3) -> np.ndarray:
    """Returns codes whose error is no larger: each is set to its best value, the others held.

    Arguments as `with_feedback`, whose result `codes` is; hessian: float64 (G, K, K).
    """
    lowest, highest = affine.integer_bounds(spec)
    codes = codes.copy()
    slope = hessian @ (codes * scale[:, None, :] - weights)
    curvature = np.einsum("gkk->gk", hessian)
    for _ in range(sweeps):
        changed = False
        for start in range(0, codes.shape[1], BLOCK):
            stop = min(start + BLOCK, codes.shape[1])
            steps = np.zeros((codes.shape[0], stop - start, codes.shape[2]))
            for j in range(start, stop):
                best = codes[:, j] - slope[:, j] / (curvature[:, j, None] * scale)
                best = np.clip(np.rint(best) + zero_point, lowest, highest) - zero_point
                step = (best - codes[:, j]) * scale
                steps[:, j - start] = step
                codes[:, j] = best
                slope[:, start:stop] += hessian[:, start:stop, j][:, :, None] * step[:, None, :]
            if steps.any():
                changed = True
                slope[:, :start] += hessian[:, :start, start:stop] @ steps
                slope[:, stop:] += hessian[:, stop:, start:stop] @ steps
        if not changed:
            break
    return codes
