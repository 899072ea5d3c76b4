"""Annealing: train the shortcut away, so that the finished adapter is exactly a LoRA of rank r.

From a chosen moment on the layer computes

    h_n = W_n x_n + s_n B_n ((1 - t) (A_n x_n + shortcut) + t (A_n + E_n) x_n),

with E_n `(r, in_features)` what the adapter's merge estimator makes of the shortcut at that moment, frozen from then
on. t grows from 0 to 1 while training goes on, and the factors make up for what the estimate misses. At t = 1 no
shortcut is left: A_n + E_n and B_n are the factors of a LoRA. E_n and t are part of the adapter's checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import TrainerCallback

from peft_reslora.reslora.merging.calibrate import Batch, calibrate_merge, ready_chains
from peft_reslora.reslora.merging.estimators import shortcut_estimate
from peft_reslora.shared.precision import full_precision
from peft_reslora.shared.tensors import restore


@full_precision()
def anneal_shortcuts(
    model: nn.Module, share: float, adapter_name: str = "default", batches: Iterable[Batch] | None = None
) -> None:
    """Let the estimates take the given share of the shortcuts' place; for training loops other than the Trainer's.

    Call it before a step with a share that grows from 0 to 1. The first call with a share above 0 freezes the
    estimates: those of the adapter's `merge_estimator`, for 'least_squares' after a calibration on `batches`.

    Args:
        model: holds the adapter, active and not merged.
        share: t in [0, 1]; once it is 1 the adapter merges exactly.
        adapter_name: an adapter with shortcut 'input' or 'middle'.
        batches: calibration data, as for `calibrate_merge`; used once.

    Raises:
        ValueError: for a share outside [0, 1], a 'block' adapter, or an estimator without its data.
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share={share!r} must be between 0 (the shortcut alone) and 1 (no shortcut left).")
    chains = ready_chains(model, adapter_name)
    if chains[0].config.shortcut == "block":
        raise ValueError(
            f"Adapter {adapter_name!r} has shortcut='block', which merges exactly: there is nothing to anneal."
        )
    linked = [layer for chain in chains for layer in chain.layers[1:]]
    if all(adapter_name in layer.lora_annealed for layer in linked):
        for layer in linked:
            layer.lora_annealed[adapter_name].fill_(share)
    elif share > 0.0:
        if batches is not None:
            calibrate_merge(model, batches, adapter_name)
        estimates = []
        for merge in [chain.merge() for chain in chains]:
            estimates += [
                shortcut_estimate(merge.blocks, n, merge.config, merge.coefficients[n])
                for n in range(1, len(merge.blocks))
            ]
        for layer, estimate in zip(linked, estimates, strict=True):
            layer.anneal(adapter_name, estimate, share)
        for layer in (chain.layers[0] for chain in chains):  # no calibration is left that it could make stale
            restore(layer.lora_calibrated, adapter_name, None)


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
