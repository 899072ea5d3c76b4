"""The same number of trained parameters for every method: the rank that comes nearest to the reference's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from peft_reslora.experiments.tuners import adapt, allocates_ranks, make_config, rank_field, trained_parameters

TOLERANCE = 0.02
_MOST = 512
_ALPHAS = ("lora_alpha", "alpha")


@dataclass(frozen=True)
class Budget:
    """A method's tuner at the rank chosen for it, its parameters, and their ratio to the reference's."""

    tuner: dict[str, Any]
    rank: int
    parameters: int
    ratio: float

    @property
    def equal(self) -> bool:
        return abs(self.ratio - 1) <= TOLERANCE


def count_parameters(base: nn.Module, tuner: Mapping[str, Any]) -> int:
    """Trained parameters without a new head; of AdaLoRA those that are left after pruning, as its paper counts."""
    counted = dict(tuner)
    part = 1
    if allocates_ranks(counted):
        part = 2
        counted.update(init_r=part * counted["target_r"])  # all of its parameters are proportional to the rank
        counted.update(total_step=100, tinit=0, tfinal=0)  # not a schedule for more steps than this count's
    return trained_parameters(adapt(copy.deepcopy(without_storage(base)), make_config(counted))) // part


def without_storage(base: nn.Module) -> nn.Module:
    """A copy on the meta device; the model itself, if it is there."""
    there = all(parameter.device.type == "meta" for parameter in base.parameters())
    return base if there else copy.deepcopy(base).to("meta")


def with_rank(tuner: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """The tuner at another rank, with alpha / rank as it was."""
    name = rank_field(tuner)
    changed = {**tuner, name: rank}
    for alpha in _ALPHAS:
        if alpha in tuner and name in tuner:
            changed[alpha] = max(1, round(tuner[alpha] * rank / tuner[name]))
    return changed


def nearest_rank(count: Callable[[int], int], wanted: int, most: int = _MOST) -> int:
    """The rank from 1 to `most` whose count is nearest to `wanted`; the count must not fall as the rank grows."""
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if count(middle) < wanted else (low, middle)
    below = max(1, low - 1)
    return min((below, low), key=lambda rank: (abs(count(rank) - wanted), rank))


def match_budget(base: nn.Module, tuner: Mapping[str, Any], wanted: int) -> Budget:
    """Choose the rank; where even the nearest is further than 2 % away, the budget says so."""
    counts: dict[int, int] = {}
    base = without_storage(base)

    def count(rank: int) -> int:
        if rank not in counts:
            counts[rank] = count_parameters(base, with_rank(tuner, rank))
        return counts[rank]

    rank = nearest_rank(count, wanted)
    return Budget(with_rank(tuner, rank), rank, count(rank), count(rank) / wanted)
