"""Batch-norm folding (NumPy): batch norm after a convolution becomes part of it.

w' = w * gamma / sqrt(variance + epsilon)                           whitepaper eq. 20
b' = beta + (b - mean) * gamma / sqrt(variance + epsilon)           whitepaper eq. 21
"""

import numpy as np


def batch_norm_factor(gamma: np.ndarray, variance: np.ndarray, epsilon: float) -> np.ndarray:
    """Returns gamma / sqrt(variance + epsilon), float32 (channels,)."""
    variance = np.asarray(variance, np.float32)
    return np.asarray(gamma, np.float32) / np.sqrt(variance + np.float32(epsilon))


def fold_batch_norm(
    kernel: np.ndarray,
    bias: np.ndarray,
    gamma: np.ndarray,
    beta: np.ndarray,
    mean: np.ndarray,
    variance: np.ndarray,
    epsilon: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the kernel and the bias of the one operation that equals the two.

    Args:
      kernel: convolution (h, w, in, out), dense (in, out), or depthwise (h, w, in, multiplier).
      bias, gamma, beta, mean, variance: (channels,), channels = out or in * multiplier.
      epsilon: that of the batch norm layer.

    Returns:
      kernel (its shape) and bias (channels,), float32.

    Raises:
      ValueError: where the vectors do not have the kernel's number of output channels.
    """
    factor = batch_norm_factor(gamma, variance, epsilon)
    kernel = np.asarray(kernel, np.float32)
    if factor.size == kernel.shape[-1]:
        shape = (-1,)
    elif kernel.ndim == 4 and factor.size == kernel.shape[-2] * kernel.shape[-1]:
        shape = kernel.shape[-2:]
    else:
        raise ValueError(f"{factor.size} batch-norm channels do not fit a kernel {kernel.shape}")
    return kernel * factor.reshape(shape), np.asarray(beta, np.float32) + (
        np.asarray(bias, np.float32) - np.asarray(mean, np.float32)
    ) * factor
