"""Annealing during training: transformers' Trainer takes the shortcuts away step by step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import TrainerCallback

from peft_reslora.reslora.merging.anneal import anneal_shortcuts
from peft_reslora.reslora.merging.observe import Batch


class ShortcutAnnealing(TrainerCallback):
    """Anneals an adapter's shortcuts while transformers' Trainer trains it.

    Trainer(model, ..., callbacks=[ShortcutAnnealing(start=2 / 3)])

    Args:
        start: the fraction of training after which the share begins to grow, linearly in the steps.
        end: the fraction at which it is 1. The steps after it train the adapter that will be merged.
        adapter_name: an adapter with shortcut 'input' or 'middle'.
        batches: calibration data for merge_estimator 'least_squares', which is chosen if they are given.

    Raises:
        ValueError: unless 0 <= start < end <= 1.
    """

    def __init__(
        self,
        start: float = 2 / 3,
        end: float = 0.9,
        adapter_name: str = "default",
        batches: Iterable[Batch] | None = None,
    ) -> None:
        if not 0.0 <= start < end <= 1.0:
            raise ValueError(f"start={start!r} and end={end!r} must be fractions of training, 0 <= start < end <= 1.")
        self.start = start
        self.end = end
        self.adapter_name = adapter_name
        self.batches = batches

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        share = annealed_share((state.global_step + 1) / state.max_steps, self.start, self.end)
        if share > 0.0:
            anneal_shortcuts(kwargs["model"], share, self.adapter_name, self.batches)


def annealed_share(progress: float, start: float, end: float) -> float:
    """t, which grows linearly from 0 to 1 while the fraction of training done grows from `start` to `end`."""
    return min(1.0, max(0.0, (progress - start) / (end - start)))
