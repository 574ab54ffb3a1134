"""AdaRound: learns for each weight whether it is rounded up or down (Nagel et al. 2004.10568).

With codes q = scale * clip(floor(w / scale) + h(V), lowest, highest) and the rectified sigmoid
(eq. 23)

    h(V) = clip(sigmoid(V) * 1.2 - 0.1, 0, 1)

Adam minimizes, over V, each output's error divided by that of rounding to nearest, and a term that
drives h to 0 or 1 (eq. 24) as beta falls from 20 to 2:

    sum over outputs of (q - w)^T H (q - w) / nearest + strength / K * sum of (1 - |2 h(V) - 1|^beta)

H is the covariance of the layer's inputs: the paper's local quadratic problem (eq. 13), which needs
the images' moments only.  Gradients, zero where h or the codes are clipped:

    dL/dq = 2 H (q - w) / nearest       dq/dV = scale * 1.2 * sigmoid'(V)
    dreg/dV = -2 beta |2h - 1|^(beta - 1) sign(2h - 1) * 1.2 * sigmoid'(V)
"""

import numpy as np

from lowbit import affine
from lowbit import spec as spec_lib
from ptq import error_feedback

STEPS = 300
WARM_UP = 0.2  # of the steps, without the second term
RATE = 0.1
STRENGTH = 10.0
STRETCH = 0.1  # sigmoid from -0.1 to 1.1, so that h reaches 0 and 1
BETAS = (20.0, 2.0)


def rounded(weights, hessian, scale, zero_point, spec: spec_lib.QuantSpec) -> np.ndarray:
    """Returns codes less zero point, float64 (G, K, O); arguments as `error_feedback.with_feedback`."""
    lowest, highest = affine.integer_bounds(spec)
    low, high = (np.float32(bound - zero_point)[:, None, :] for bound in (lowest, highest))
    scaled = np.float32(weights / scale[:, None, :])
    floor = np.floor(scaled)
    nearest = error_feedback.nearest(weights, scale, zero_point, spec)
    cost = error_feedback.error(nearest * scale[:, None, :] - weights, hessian)
    # In units of codes, so that one matrix serves; an output with no error at all has no gradient.
    factor = np.float32(scale**2 / np.maximum(cost, 1e-30))[:, None, :]
    matrix = np.float32(hessian)
    fraction = np.clip((scaled - floor + STRETCH) / (1 + 2 * STRETCH), 1e-3, 1 - 1e-3)
    variable = np.log(fraction / (1 - fraction))  # h(V) is the fraction: nothing is rounded yet
    first, second = np.zeros_like(variable), np.zeros_like(variable)
    start = int(WARM_UP * STEPS)
    for step in range(STEPS):
        sigmoid = 1 / (1 + np.exp(-variable))
        h = np.clip(sigmoid * (1 + 2 * STRETCH) - STRETCH, 0, 1)
        slope = sigmoid * (1 - sigmoid) * (1 + 2 * STRETCH)
        free = (h > 0) & (h < 1)
        codes = floor + h
        inside = (codes >= low) & (codes <= high)
        gradient = 2 * (matrix @ (np.clip(codes, low, high) - scaled)) * factor * inside
        if step >= start:
            progress = (step - start) / (STEPS - start)
            beta = BETAS[1] + 0.5 * (BETAS[0] - BETAS[1]) * (1 + np.cos(np.pi * progress))
            distance = 2 * h - 1
            push = 2 * beta * np.abs(distance) ** (beta - 1) * np.sign(distance)
            gradient -= STRENGTH / weights.shape[1] * push
        gradient *= slope * free
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        corrected = first / (1 - 0.9 ** (step + 1))
        variable -= RATE * corrected / (np.sqrt(second / (1 - 0.999 ** (step + 1))) + 1e-12)
    sigmoid = 1 / (1 + np.exp(-variable))
    h = np.clip(sigmoid * (1 + 2 * STRETCH) - STRETCH, 0, 1)
    return np.float64(np.clip(floor + (h >= 0.5), low, high))
