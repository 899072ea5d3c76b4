"""AdaLoRA's ranks, allocated while transformers' Trainer trains: nothing in Trainer or PEFT calls for it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers import TrainerCallback

from peft_reslora.reslora.linking import chains_of
from peft_reslora.reslora.rank_allocation import trained_adapters, update_and_allocate


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

        if _forget_misfits(kwargs["optimizer"]):
            warnings.warn(
                "The checkpoint was saved after ranks were allocated, and its optimizer state is that of all "
                "directions: that of the factors which have lost some begins anew.",
                stacklevel=2,
            )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        update_and_allocate(kwargs["model"], state.global_step + 1)


def _forget_misfits(optimizer: Any) -> bool:
    """Drop the state of parameters that have another shape than it; whether there were any."""
    misfits = [
        parameter
        for parameter, state in optimizer.state.items()
        if any(isinstance(v, torch.Tensor) and v.dim() > 0 and v.shape != parameter.shape for v in state.values())
    ]
    for parameter in misfits:
        del optimizer.state[parameter]
    return bool(misfits)
