"""What is measured, against restatements that sort, loop and count."""

import numpy as np
import pytest

from lowbit import metrics


def softmax(logits):
    exponential = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponential / exponential.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("dtype", ["float32", "int8", "uint8"])
def test_rank_is_the_place_in_a_stable_sort(dtype, rng):
    outputs = rng.integers(0, 12, (400, 40)).astype(dtype)  # every row has ties
    labels = rng.integers(0, 40, 400)
    descending = np.argsort(-outputs.astype(np.float64), axis=1, kind="stable")
    expected = [list(row).index(label) for row, label in zip(descending, labels, strict=True)]
    found = metrics.ranks(outputs, labels)
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(found)) >= 16 and found.dtype == np.int64
    top_1, top_5 = (found < 1).mean(), (found < 5).mean()
    assert top_1 == np.mean(outputs.argmax(axis=1) == labels)
    assert top_5 == (descending[:, :5] == labels[:, None]).any(axis=1).mean()


def test_all_equal_outputs_rank_by_index():
    outputs = np.full((6, 6), 3, np.int8)
    for dtype in ("int64", "uint8"):
        found = metrics.ranks(outputs, np.arange(6, dtype=dtype))
        np.testing.assert_array_equal(found, np.arange(6))


def test_ties_at_the_top_are_counted(rng):
    outputs = rng.integers(-128, 128, (500, 50)).astype(np.int8)
    expected = sum(list(row).count(row.max()) > 1 for row in outputs)
    assert metrics.tied_at_top(outputs) == expected > 20
    assert metrics.tied_at_top(np.array([[1, 2, 2], [3, 2, 2]])) == 1


def test_logits_become_log_softmax(rng):
    logits = rng.normal(0, 5, (50, 10)).astype(np.float32)
    expected = np.log(softmax(logits.astype(np.float64)))
    np.testing.assert_allclose(metrics.log_probabilities(logits), expected, rtol=1e-12, atol=1e-12)
    shifted = metrics.log_probabilities(logits.astype(np.float64) + 1e4)
    np.testing.assert_allclose(shifted, expected, atol=1e-9)
    assert np.isfinite(metrics.log_probabilities(logits * np.float32(1e4))).all()


def test_probabilities_are_recognized_and_floored(rng):
    probabilities = softmax(rng.normal(0, 3, (50, 10)))
    codes = np.round(probabilities * 256) / 256  # what an int8 softmax gives: sums are off by 1%
    assert (codes == 0).any() and (codes.sum(axis=1) != 1).any()
    found = metrics.log_probabilities(codes.astype(np.float32))
    floored = np.maximum(codes, 1 / 512)
    expected = np.log(floored / floored.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(np.exp(found).sum(axis=1), 1)


@pytest.mark.parametrize("spoil", ["negative", "sum"])
def test_one_row_that_is_no_distribution_makes_them_logits(spoil, rng):
    outputs = softmax(rng.normal(0, 1, (20, 10)))
    if spoil == "negative":
        outputs[7, :2] += [-1, 1]
    else:
        outputs[7] *= 1.1
    expected = np.log(softmax(outputs))
    np.testing.assert_allclose(metrics.log_probabilities(outputs), expected, rtol=1e-12)


def test_kl_divergence_is_its_sum(rng):
    reference, outputs = rng.normal(0, 3, (2, 60, 10))
    p, q = softmax(reference), softmax(outputs)
    expected = [sum(p[i, c] * np.log(p[i, c] / q[i, c]) for c in range(10)) for i in range(60)]
    np.testing.assert_allclose(metrics.kl_divergence(reference, outputs), expected, rtol=1e-9)
    assert (metrics.kl_divergence(reference, outputs) > 0).all()
    np.testing.assert_array_equal(metrics.kl_divergence(reference, reference), np.zeros(60))
    # Logits against probabilities of the same network.
    big = np.clip(p, 1e-2, None)
    big /= big.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(metrics.kl_divergence(np.log(big), big), 0, atol=1e-12)


def test_standard_error_is_the_binomial(rng):
    correct = rng.random(1000) < 0.7
    p = correct.mean()
    assert metrics.standard_error(correct) == pytest.approx(np.sqrt(p * (1 - p) / 1000), rel=1e-12)


def test_paired_difference(rng):
    reference = rng.random(2000) < 0.7
    correct = np.where(rng.random(2000) < 0.05, ~reference, reference)
    lost, won = (reference & ~correct).mean(), (correct & ~reference).mean()
    difference, error = metrics.paired_difference(correct, reference)
    assert difference == pytest.approx(won - lost, abs=1e-12)
    # McNemar's variance: won + lost - (won - lost)**2, over n
    assert error == pytest.approx(np.sqrt((won + lost - (won - lost) ** 2) / 2000), rel=1e-9)
    assert error < 0.5 * np.hypot(*(metrics.standard_error(each) for each in (correct, reference)))
    assert metrics.paired_difference(correct, correct) == (0, 0)


def test_difference_counts_are_a_histogram_of_distances(rng):
    codes, reference = rng.integers(-128, 128, (2, 300), np.int8)
    counts = metrics.difference_counts(codes, reference)
    distances = [abs(int(a) - int(b)) for a, b in zip(codes, reference, strict=True)]
    assert len(counts) == max(distances) + 1 > 200  # beyond what int8 holds
    assert [distances.count(each) for each in range(len(counts))] == counts.tolist()
    assert metrics.difference_counts(codes, codes).tolist() == [300]
