"""PEFT configs from the `tuner` section, and what a tuner needs of the training loop."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn
from transformers import TrainerCallback

from peft_reslora.training import NestedRanks


def allocates_ranks(tuner: Mapping[str, Any]) -> bool:
    """Whether the method is AdaLoRA: PEFT's own, or ResLoRA with blocks of that kind."""
    own = tuner["peft_type"] == "RESLORA" and ("target_r" in tuner or bool(tuner.get("total_step")))
    return own or tuner["peft_type"] == "ADALORA"


def rank_field(tuner: Mapping[str, Any]) -> str:
    """The field that sets the number of trained parameters."""
    return "target_r" if allocates_ranks(tuner) else "r"


def make_config(tuner: Mapping[str, Any], steps: int | None = None) -> PeftConfig:
    """The PEFT config of a checked `tuner` section; AdaLoRA's `total_step` is the run's, if it has none."""
    fields = {name: value for name, value in tuner.items() if name != "peft_type"}
    if allocates_ranks(tuner):
        fields.setdefault("total_step", steps)
        if "target_r" in fields:
            fields.setdefault("init_r", math.ceil(1.5 * fields["target_r"]))  # as in its paper
    kinds = {member.value: kind for member, kind in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    config: PeftConfig = kinds[tuner["peft_type"]](**fields)
    return config


def tuners_with_rank() -> list[str]:
    """The `peft_type` of every tuner whose number of parameters a rank sets."""
    return sorted(
        member.value
        for member, kind in PEFT_TYPE_TO_CONFIG_MAPPING.items()
        if "r" in {f.name for f in dataclasses.fields(kind)}
    )


def adapt(model: nn.Module, config: PeftConfig) -> PeftModel:
    """Inject the adapter; whatever else trains (a new head) is in the config's `modules_to_save`."""
    return get_peft_model(model, config)


def trained_parameters(model: nn.Module, saved_whole: bool = False) -> int:
    """How many parameters the adapter trains; with `saved_whole` those of `modules_to_save` too."""
    return sum(
        p.numel()
        for n, p in model.named_parameters()
        # ranknum: AdaLoRA's record of a rank, which PEFT leaves requiring gradients on the meta device
        if p.requires_grad and "ranknum" not in n and (saved_whole or "modules_to_save" not in n)
    )


class AdaLoraSchedule(TrainerCallback):
    """Lets AdaLoRA move its budget after every step, which the Trainer does not."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.base_model.update_and_allocate(state.global_step + 1)


def callbacks_for(tuner: Mapping[str, Any], seed: int) -> list[TrainerCallback]:
    """What the method does between the steps of a training with this seed."""
    if allocates_ranks(tuner):
        return [AdaLoraSchedule()]
    return [NestedRanks(seed=seed)] if tuner.get("nested_ranks") else []
