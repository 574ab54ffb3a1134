"""Batch normalization by a batch's own statistics: values and gradients against NumPy."""

import numpy as np
import pytest
import tensorflow as tf

from lowbit import batch_statistics


@pytest.mark.parametrize("shape", [(7, 3), (2, 5, 3), (4, 6, 5, 3), (2, 2, 3, 2, 3), (1, 1, 1, 3)])
@pytest.mark.parametrize("epsilon", [1e-3, 1e-5])
def test_values_and_gradients_are_numpys(shape, epsilon):
    random = np.random.default_rng(0)
    z = random.normal(0.7, 2, shape).astype(np.float32)
    gamma, beta = np.float32([0, -0.5, 1.5]), np.float32([0.25, 0, -3])
    upstream = random.normal(size=shape).astype(np.float32)
    variables = [tf.Variable(each) for each in (z, gamma, beta)]
    with tf.GradientTape() as tape:
        y, mean, variance = batch_statistics.normalize(*variables, epsilon)
        # The statistics' own gradient is none.
        total = tf.reduce_sum(y * upstream) + 100 * tf.reduce_sum(mean) + tf.reduce_sum(variance)
    gradients = tape.gradient(total, variables)

    axes = tuple(range(len(shape) - 1))
    exact, u = z.astype(np.float64), upstream.astype(np.float64)
    mean_b, variance_b = exact.mean(axis=axes), exact.var(axis=axes)
    deviation = np.sqrt(variance_b + epsilon)
    normal = (exact - mean_b) / deviation
    wanted = gamma / deviation
    wanted = wanted * (u - u.mean(axis=axes) - normal * (u * normal).mean(axis=axes))
    np.testing.assert_allclose(y, gamma * normal + beta, atol=2e-5)
    np.testing.assert_allclose(mean, mean_b, atol=1e-6)
    np.testing.assert_allclose(variance, variance_b, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(gradients[0], wanted, atol=1e-4)
    np.testing.assert_allclose(gradients[1], (u * normal).sum(axis=axes), atol=1e-4)
    np.testing.assert_allclose(gradients[2], u.sum(axis=axes), atol=1e-5)
