"""Annealing: train the shortcut away, so that the finished adapter is exactly a LoRA of rank r.

From a chosen moment on the layer computes

    h_n = W_n x_n + s_n B_n ((1 - t) (A_n x_n + shortcut) + t (A_n + C_n) x_n),

with C_n `(r, in_features)` what the adapter's merge estimator makes of the shortcut at that moment, frozen from then
on. t grows from 0 to 1 while training goes on, and the factors make up for what the estimate misses. At t = 1 no
shortcut is left: A_n + C_n and B_n are the factors of a LoRA. C_n and t are part of the adapter's checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from peft_reslora.reslora.merging.calibrate import calibrate_merge, ready_chains
from peft_reslora.reslora.merging.observe import Batch
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
        merges = [chain.merge() for chain in chains]
        estimates = [merge.estimate(n) for merge in merges for n in range(1, len(merge.blocks))]
        for layer, estimate in zip(linked, estimates, strict=True):
            layer.anneal(adapter_name, estimate, share)
        for layer in (chain.layers[0] for chain in chains):  # no calibration is left that it could make stale
            restore(layer.lora_calibrated, adapter_name, None)
