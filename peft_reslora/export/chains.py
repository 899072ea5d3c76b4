"""Exports of ResLoRA: what a file holds of the updates of one adapter's chains."""

from __future__ import annotations

import dataclasses
from typing import Any

from peft_reslora.export.factors import Factors
from peft_reslora.export.fitting import Fit, FittedUpdate, relative_error
from peft_reslora.export.forms import LINEAR, Form
from peft_reslora.reslora.merging.plan import ChainMerge


class ChainFit:
    """Fits the updates of an adapter; where it has nested ranks and one is asked for, takes the adapter of that rank.

    That is no fit to the whole update: the first `fit.rank` directions of each block, with the scaling of that rank.
    """

    def __init__(self, fit: Fit, config: Any) -> None:
        self._fit = fit
        self._rank = fit.nested_rank if getattr(config, "nested_ranks", False) else None
        self._parts: dict[int, tuple[ChainMerge, ChainMerge]] = {}  # by the id of the first

    def update(self, whole: Factors, merge: ChainMerge, position: int, form: Form = LINEAR) -> FittedUpdate:
        """One layer's.

        Args:
            whole: the factors of its update.
            merge: how its chain merges, and `position` the layer's place in it.
            form: in which the file holds the factors.

        Raises:
            ValueError: as `Fit.update`.
        """
        exactness = merge.exactness[position]
        if self._rank is None:
            return self._fit.update(whole, exactness, form)
        fit = dataclasses.replace(self._fit, rank=None)
        if id(merge) not in self._parts:
            self._parts[id(merge)] = merge, merge.truncated(self._rank)
        _, part = self._parts[id(merge)]
        if part is merge:  # no block has more directions
            return fit.update(whole, exactness, form)
        update = fit.update(Factors.of(*part.factors(position)), exactness, form)
        error = relative_error(whole, update.factors)
        return dataclasses.replace(
            update, rank_before=whole.rank, energy_kept=None, relative_error=error, first=self._rank
        )
