"""What is measured on a model's outputs (NumPy).  Ties go to the lowest class index, and are counted.

Outputs of an int8 model tie often: 3% of the images tie at the top on ImageNet's 1,000 classes.
"""

import math

import numpy as np

# int8 softmax outputs reach zero; half a step of 1/256 stands for what lies below the grid.
PROBABILITY_FLOOR = 1 / 512


def ranks(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns the place of each true class, 0 the best, ties to the lowest index; int64 (n,).

    Args:
      outputs: (n, classes) logits, probabilities or codes.
      labels: int (n,).
    """
    true = np.take_along_axis(outputs, labels[:, None].astype(np.int64), axis=1)
    above = (outputs > true).sum(axis=1)
    earlier = np.arange(outputs.shape[1])[None, :] < labels[:, None]
    return above + ((outputs == true) & earlier).sum(axis=1)


def tied_at_top(outputs: np.ndarray) -> int:
    """Returns for how many rows of (n, classes) two classes share the largest output."""
    return int(((outputs == outputs.max(axis=1, keepdims=True)).sum(axis=1) > 1).sum())


def ties_decided_against(outputs: np.ndarray, labels: np.ndarray) -> int:
    """Returns for how many rows of (n, classes) class labels[i] ties at the top and loses.

    The lowest index wins a tie; without it another of the tied classes could have been chosen.
    """
    best = outputs.max(axis=1)
    true = np.take_along_axis(outputs, labels[:, None].astype(np.int64), axis=1)[:, 0]
    return int(((true == best) & (outputs.argmax(axis=1) != labels)).sum())


def log_probabilities(outputs: np.ndarray) -> np.ndarray:
    """Returns log softmax of logits, or the log of outputs that are probabilities already.

    Rows that are nowhere negative and sum to 1 within 2% are taken for probabilities, and are
    floored at 1/512.  float64, the shape of `outputs` (n, classes).
    """
    outputs = outputs.astype(np.float64)
    if (outputs >= 0).all() and (np.abs(outputs.sum(axis=1) - 1) < 0.02).all():
        floored = np.maximum(outputs, PROBABILITY_FLOOR)
        return np.log(floored / floored.sum(axis=1, keepdims=True))
    shifted = outputs - outputs.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def kl_divergence(reference: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """Returns sum p log(p / q) of each image in nats, p the reference's; float64 (n,)."""
    log_p, log_q = log_probabilities(reference), log_probabilities(outputs)
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=1)


def standard_error(correct: np.ndarray) -> float:
    """Returns the standard error of a mean of n zeros and ones."""
    return float(np.std(correct) / math.sqrt(len(correct)))


def paired_difference(correct: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Returns the difference of two accuracies on the same images, and its standard error."""
    difference = correct.astype(np.float64) - reference.astype(np.float64)
    return float(difference.mean()), float(np.std(difference) / math.sqrt(len(difference)))


def difference_counts(codes: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Returns counts, int64: counts[d] codes are d away from the reference's, up to the largest d."""
    distance = np.abs(codes.astype(np.int64) - reference.astype(np.int64))
    return np.bincount(distance.reshape(-1))
