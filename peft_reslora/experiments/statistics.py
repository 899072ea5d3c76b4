"""What may be said of a difference between two methods, and how losses are read off a curve."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Verdict = Literal["better", "worse", "no difference seen", "too few seeds"]

FEWEST_SEEDS = 5
"""Fewer paired differences say nothing: three of one sign come by chance in one case of four."""

_RESAMPLES = 20_000
_MOST_EXACT = 6  # 6 ** 6 resamples are all there are, up to there


@dataclass(frozen=True)
class Difference:
    """Mean of the paired differences, its interval, and the word that the interval allows."""

    mean: float
    low: float
    high: float
    seeds: int
    verdict: Verdict


def bootstrap_means(values: Sequence[float]) -> NDArray[np.float64]:
    """Sorted means of resamples of `values`: all of them where there are few, else random ones with a fixed seed."""
    array = np.asarray(values, dtype=np.float64)
    n = len(array)
    if n <= _MOST_EXACT:
        choices = np.array(list(itertools.product(range(n), repeat=n)))
    else:
        choices = np.random.default_rng(0).integers(n, size=(_RESAMPLES, n))
    return np.sort(array[choices].mean(axis=1))


def expanded_tail(n: int, confidence: float = 0.95) -> float:
    """The share of bootstrap means to cut off on each side, for so few values as `n`.

    The plain percentile interval is too narrow by sqrt((n - 1) / n) and by the normal quantile in place of Student's;
    this widens it for both (Hesterberg, What Teachers Should Know about the Bootstrap, arXiv 1411.5279, section 5.3).
    """
    from scipy import stats

    quantile = stats.t.ppf((1 + confidence) / 2, n - 1)
    return float(stats.norm.cdf(-math.sqrt(n / (n - 1)) * quantile))


def bootstrap_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Expanded percentile interval of the mean; of one value it is infinite."""
    if len(values) < 2:
        return -math.inf, math.inf
    means = bootstrap_means(values)
    tail = expanded_tail(len(values), confidence)
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def paired_difference(
    values: Sequence[float], reference: Sequence[float], confidence: float = 0.95, lower_is_better: bool = False
) -> Difference:
    """Differences of runs that share a seed, values minus reference; higher is better, unless `lower_is_better`.

    Raises:
        ValueError: if there are no values, or not as many on both sides.
    """
    if len(values) != len(reference) or not values:
        raise ValueError(f"{len(values)} and {len(reference)} values cannot be paired by seed.")
    differences = [a - b for a, b in zip(values, reference, strict=True)]
    low, high = bootstrap_interval(differences, confidence)
    verdict: Verdict = "no difference seen"
    if len(differences) < FEWEST_SEEDS:
        verdict = "too few seeds"
    elif low > 0 or high < 0:
        verdict = "better" if (low > 0) != lower_is_better else "worse"
    return Difference(float(np.mean(differences)), low, high, len(differences), verdict)


def smoothed(losses: Sequence[float], window: int) -> NDArray[np.float64]:
    """Mean of each loss with up to `window - 1` before it."""
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(losses, dtype=np.float64))])
    ends = np.arange(1, len(losses) + 1)
    starts = np.maximum(0, ends - window)
    return np.asarray((sums[ends] - sums[starts]) / (ends - starts), dtype=np.float64)


def window_of(steps: int) -> int:
    """Over how many steps losses are averaged: a tenth of the run."""
    return max(1, steps // 10)


def quarter_losses(losses: Sequence[float]) -> list[float]:
    """Smoothed loss after 25, 50, 75 and 100 % of the steps."""
    means = smoothed(losses, window_of(len(losses)))
    return [float(means[max(1, quarter * len(losses) // 4) - 1]) for quarter in (1, 2, 3, 4)]


def steps_to_reach(losses: Sequence[float], target: float) -> int | None:
    """The first step whose smoothed loss is at most `target`, over whole windows only; None if there is none."""
    window = window_of(len(losses))
    reached = np.flatnonzero(smoothed(losses, window)[window - 1 :] <= target)
    return int(reached[0]) + window if len(reached) else None
