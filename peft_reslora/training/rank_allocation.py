"""AdaLoRA's ranks, allocated while transformers' Trainer trains: nothing in Trainer or PEFT calls for it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from transformers import TrainerCallback

from peft_reslora.reslora.linking import chains_of
from peft_reslora.reslora.rank_allocation import factors_of, trained_adapters, update_and_allocate


class RankAllocationCallback(TrainerCallback):
    """Allocates the ranks of adapters whose ResLoRAConfig has `total_step`.

    Trainer(model, ..., callbacks=[RankAllocationCallback()])

    The first optimizer step is step 1, so that the ranks are final once total_step - tfinal steps have been done. They
    are allocated by the importances of the run: one that is resumed starts them anew.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Warns if the run is too short for the schedule, or resumes with a state of pruned directions."""
        model = kwargs["model"]
        for adapter_name in trained_adapters(model):
            config = chains_of(model, adapter_name)[0].config
            if config.total_step is not None and state.max_steps < config.total_step - config.tfinal:
                warnings.warn(
                    f"The run has {state.max_steps} steps, and the ranks of adapter {adapter_name!r} are final after "
                    f"{config.total_step - config.tfinal} (total_step={config.total_step}, tfinal={config.tfinal}): "
                    "its budget will not come down to target_r, and all directions are saved. Set total_step to "
                    f"{state.max_steps}.",
                    stacklevel=2,
                )
            if _forget_misfits(kwargs["optimizer"], factors_of(model, adapter_name)):
                warnings.warn(
                    f"The checkpoint was saved after the ranks of adapter {adapter_name!r} were allocated, and its "
                    "optimizer state is that of all directions: that of factors which have lost some begins anew.",
                    stacklevel=2,
                )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        update_and_allocate(kwargs["model"], state.global_step + 1)


def _forget_misfits(optimizer: Any, parameters: Iterable[torch.Tensor]) -> bool:
    """Drop the state of those parameters that have another shape than it; whether there were any."""
    misfits = [
        parameter
        for parameter in parameters
        if any(
            isinstance(value, torch.Tensor) and value.dim() == parameter.dim() and value.shape != parameter.shape
            for value in optimizer.state.get(parameter, {}).values()
        )
    ]
    for parameter in misfits:
        del optimizer.state[parameter]
    return bool(misfits)
