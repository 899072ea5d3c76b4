"""Metrics of predictions, in percent; higher is better in all of them."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def accuracy(predicted: Array, wanted: Array) -> float:
    """Share of equal entries; arrays of shape `(rows,)`."""
    return 100 * float(np.mean(predicted == wanted))


def matthews(predicted: Array, wanted: Array) -> float:
    """Matthews correlation of two classes, 0 where it is not defined; as CoLA is measured in GLUE."""
    counts = [np.sum((predicted == p) & (wanted == w)) for p, w in ((1, 1), (0, 0), (1, 0), (0, 1))]
    tp, tn, fp, fn = (float(count) for count in counts)
    scale = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return 100 * (tp * tn - fp * fn) / scale if scale else 0.0


def pearson(predicted: Array, wanted: Array) -> float:
    """Pearson's correlation, 0 where one side is constant."""
    if np.ptp(predicted) == 0 or np.ptp(wanted) == 0:
        return 0.0
    return 100 * float(np.corrcoef(predicted, wanted)[0, 1])


def spearman(predicted: Array, wanted: Array) -> float:
    """Pearson's correlation of the ranks; equal values share their mean rank."""
    return pearson(_ranks(predicted), _ranks(wanted))


def _ranks(values: Array) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse], dtype=np.float64)


def classification_metrics(logits: Array, wanted: Array) -> dict[str, float]:
    """Of logits `(rows, classes)`: accuracy, and of two classes Matthews correlation."""
    predicted = logits.argmax(axis=1).astype(np.float64)
    found = {"accuracy": accuracy(predicted, wanted)}
    return found | ({"matthews": matthews(predicted, wanted)} if logits.shape[1] == 2 else {})


def regression_metrics(predicted: Array, wanted: Array) -> dict[str, float]:
    return {"pearson": pearson(predicted, wanted), "spearman": spearman(predicted, wanted)}
