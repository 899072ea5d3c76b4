"""Adapters with random factors, of each tuner by one word: a shortcut of ResLoRA, or 'mora'."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from helpers.oracle import randomize_adapters
from helpers.tiny_models import TINY_MODELS
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_reslora import MoRAConfig, ResLoRAConfig

TUNERS = ["input", "block", "middle", "mora"]
every_tuner = pytest.mark.parametrize("tuner", TUNERS)
both_tuners = pytest.mark.parametrize("tuner", ["block", "mora"])
# Shortcuts, and how many earlier layers feed them; -1 stands for all.
VARIANTS = [("input", 1), ("block", 1), ("block", 2), ("block", -1), ("middle", 1), ("middle", 2), ("middle", -1)]
ONE_OR_ALL = [(shortcut, pre_num) for shortcut, pre_num in VARIANTS if pre_num != 2]
ESTIMATED = [(shortcut, pre_num) for shortcut, pre_num in VARIANTS if shortcut != "block"]  # by their merges


def config_of(tuner: str, **fields: Any) -> ResLoRAConfig | MoRAConfig:
    return MoRAConfig(**fields) if tuner == "mora" else ResLoRAConfig(shortcut=tuner, **fields)  # type: ignore[arg-type]


def adapted(base: nn.Module, config: PeftConfig, adapter_name: str = "default") -> PeftModel:
    """The base model with an adapter of random factors, in evaluation mode."""
    return randomize_adapters(get_peft_model(base, config, adapter_name)).eval()


def base_and_adapted(name: str, tuner: str, pre_num: int = 1, **fields: Any) -> tuple[nn.Module, PeftModel]:
    """A tiny base model by its name, and a copy of it with an adapter on all its linear layers."""
    base = TINY_MODELS[name].make()
    fields = {"r": 3, "target_modules": TINY_MODELS[name].targets, **fields}
    if tuner != "mora":
        fields = {"lora_alpha": 5, "pre_num": pre_num, **fields}
    return base, adapted(copy.deepcopy(base), config_of(tuner, **fields))


def tuner_layers(model: nn.Module) -> dict[str, Any]:
    """The layers with adapters by their names in the base model."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    return {name.removeprefix("base_model.model."): layer for name, layer in found.items()}
