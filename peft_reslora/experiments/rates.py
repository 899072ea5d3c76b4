"""Which learning rates to try: half a decade apart, then a quarter around the best, never with the best at an edge.

A rate is an integer k, the number of quarter decades: 10 ** (k / 4). The protocol is that of arXiv 2602.04998, the
same grid for all methods and four rates a decade, run where it matters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

LOWEST, HIGHEST = -24, 0  # 1e-6 and 1: where extending ends


def rate_of(k: int) -> float:
    """10 ** (k / 4) to four digits."""
    return float(f"{10 ** (k / 4):.4g}")


def nearest_quarter(rate: float) -> int:
    """The k whose rate is nearest on a logarithmic scale.

    Raises:
        ValueError: if the rate is not between 1e-6 and 1.
    """
    if not rate > 0 or not LOWEST <= (k := round(4 * math.log10(rate))) <= HIGHEST:
        raise ValueError(f"learning rate {rate} must be between {rate_of(LOWEST):g} and {rate_of(HIGHEST):g}.")
    return k


def best_quarter(scores: Mapping[int, float]) -> int:
    """The rate with the highest score; of equal ones the lowest rate. A run that diverged has the score nan."""
    return max(sorted(scores), key=lambda k: -math.inf if math.isnan(scores[k]) else scores[k])


def next_quarters(scores: Mapping[int, float], lowest: int, highest: int) -> list[int]:
    """The rates to run next, given the scores of those that ran; none when the best has worse neighbors.

    First half decades from `lowest` to `highest`; while the best lies at the edge, half a decade further; then the
    quarters on both sides of the best.
    """
    if first := [k for k in range(lowest, highest + 1, 2) if k not in scores]:
        return first
    best = best_quarter(scores)
    if best == max(scores) and best < HIGHEST:
        return [min(best + 2, HIGHEST)]
    if best == min(scores) and best > LOWEST:
        return [max(best - 2, LOWEST)]
    return [k for k in (best - 1, best + 1) if k not in scores and LOWEST <= k <= HIGHEST]
