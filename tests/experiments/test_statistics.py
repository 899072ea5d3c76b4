"""Statistics of a comparison against computations that are written out."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from peft_reslora.experiments.metrics import accuracy, matthews, pearson, spearman
from peft_reslora.experiments.rates import best_quarter, nearest_quarter, next_quarters, rate_of
from peft_reslora.experiments.statistics import (
    bootstrap_interval,
    bootstrap_means,
    expanded_tail,
    paired_difference,
    quarter_losses,
    smoothed,
    steps_to_reach,
)

CLOSE = 1e-12


def test_bootstrap_means_of_few_values_are_all_there_are() -> None:
    values = [0.5, -1.0, 2.0]
    expected = sorted(sum(choice) / 3 for choice in itertools.product(values, repeat=3))
    assert np.allclose(bootstrap_means(values), expected, rtol=0, atol=CLOSE)


def test_the_interval_cuts_the_expanded_tails() -> None:
    """For 5 values: Student's quantile 2.776 with 4 degrees of freedom, widened by sqrt(5 / 4)."""
    tail = 0.5 * math.erfc(math.sqrt(5 / 4) * 2.7764451052 / math.sqrt(2))
    assert abs(expanded_tail(5) - tail) < 1e-9
    values = [0.1, 0.4, -0.2, 0.3, 0.9]
    means = np.sort([np.mean(choice) for choice in itertools.product(values, repeat=5)])
    expected = np.quantile(means, [tail, 1 - tail])
    assert np.allclose(bootstrap_interval(values), expected, rtol=0, atol=1e-9)


def test_the_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    draws = np.random.default_rng(1).normal(size=(300, 8))
    covered = [low <= 0 <= high for low, high in (bootstrap_interval(list(row)) for row in draws[:60])]
    assert np.mean(covered) > 0.85


def test_one_value_has_no_interval() -> None:
    assert bootstrap_interval([1.0]) == (-math.inf, math.inf)


@pytest.mark.parametrize(
    ("values", "reference", "verdict"),
    [
        ([2.0, 3.1, 4.2, 5.0, 6.1], [1.0, 2.0, 3.0, 4.0, 5.0], "better"),
        ([0.0, 1.1, 1.9, 3.0, 4.1], [1.0, 2.0, 3.0, 4.0, 5.0], "worse"),
        ([0.0, 3.0, 1.0, 5.0, 6.0], [1.0, 2.0, 3.0, 4.0, 5.0], "no difference seen"),
        ([2.0, 3.1, 4.2], [1.0, 2.0, 3.0], "too few seeds"),
    ],
    ids=["better", "worse", "both signs", "too few seeds"],
)
def test_words_are_used_as_the_interval_allows(values, reference, verdict) -> None:
    difference = paired_difference(values, reference)
    assert difference.verdict == verdict
    assert abs(difference.mean - np.mean(np.subtract(values, reference))) < CLOSE


def test_unpaired_values_are_refused() -> None:
    with pytest.raises(ValueError, match="2 and 1 values cannot be paired"):
        paired_difference([1.0, 2.0], [1.0])


def test_losses_are_read_off_the_smoothed_curve() -> None:
    losses = [float(value) for value in np.random.default_rng(0).random(40)]
    window = 4
    expected = [np.mean(losses[max(0, i + 1 - window) : i + 1]) for i in range(40)]
    assert np.allclose(smoothed(losses, window), expected, rtol=0, atol=CLOSE)
    assert np.allclose(quarter_losses(losses), [expected[i] for i in (9, 19, 29, 39)], rtol=0, atol=CLOSE)


def test_steps_to_reach_counts_from_one_and_needs_a_whole_window() -> None:
    falling = [10.0 - step for step in range(10)]  # a window of one step
    assert steps_to_reach(falling, 7.0) == 4
    assert steps_to_reach(falling, 0.5) is None
    dip = [0.0] + [5.0] * 19  # a window of two: the first value alone is no mean of two
    assert steps_to_reach(dip, 2.5) == 2


def test_rates_are_quarters_of_a_decade() -> None:
    assert [rate_of(k) for k in (-12, -11, -10, -9, -8)] == [1e-3, 1.778e-3, 3.162e-3, 5.623e-3, 1e-2]
    assert [nearest_quarter(rate_of(k)) for k in range(-24, 1)] == list(range(-24, 1))
    with pytest.raises(ValueError, match="must be between 1e-06 and 1"):
        nearest_quarter(0.0)


@pytest.mark.parametrize("peak", [-22, -17, -16, -12, -9, -8, -5, -1])
def test_the_search_ends_at_the_peak_with_both_neighbors_run(peak: int) -> None:
    """Of a metric with one peak, wherever it lies, also far outside the first grid."""
    scores: dict[int, float] = {}
    rounds = 0
    while quarters := next_quarters(scores, -16, -8):
        assert not set(quarters) & set(scores)
        scores |= {k: -abs(k - peak) for k in quarters}
        rounds += 1
    assert rounds < 12
    assert best_quarter(scores) == peak
    assert {peak - 1, peak + 1} <= set(scores)


def test_the_search_stops_at_the_limits_and_passes_over_what_diverged() -> None:
    scores: dict[int, float] = {}
    while quarters := next_quarters(scores, -4, -2):
        scores |= dict.fromkeys(quarters, 0.0) | {k: float(k) for k in quarters}
    assert best_quarter(scores) == max(scores) == 0
    assert best_quarter({-8: math.nan, -10: 1.0, -12: 1.0}) == -12  # of equal ones the lowest


def test_metrics_agree_with_their_definitions() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2, 50).astype(float), rng.integers(0, 2, 50).astype(float)
    assert abs(accuracy(a, b) - 100 * sum(x == y for x, y in zip(a, b, strict=True)) / 50) < CLOSE
    assert abs(matthews(a, b) - 100 * np.corrcoef(a, b)[0, 1]) < 1e-9  # of two classes it is Pearson's
    assert matthews(np.ones(4), b[:4]) == 0.0
    x, y = rng.random(50), rng.integers(0, 5, 50).astype(float)
    cov = np.mean((x - x.mean()) * (y - y.mean())) / (x.std() * y.std())
    assert abs(pearson(x, y) - 100 * cov) < 1e-9
    assert abs(spearman(x, y) - 100 * _spearman(x, y)) < 1e-9


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    ranks = [[1 + sum(o < v for o in side) + (sum(o == v for o in side) - 1) / 2 for v in side] for side in (x, y)]
    return float(np.corrcoef(*ranks)[0, 1])
