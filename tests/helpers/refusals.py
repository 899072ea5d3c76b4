"""Refusals that leave no trace."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that an injection might change, by identity."""
    state: dict[str, Any] = {
        "modules": {name: (id(module), type(module), module.training) for name, module in model.named_modules()},
        "parameters": {name: (id(p), p.requires_grad, p._version) for name, p in model.named_parameters()},
        "buffers": {name: id(buffer) for name, buffer in model.named_buffers()},
        "configs": {name: id(config) for name, config in getattr(model, "peft_config", {}).items()},
        "active": [module.active_adapters for module in model.modules() if isinstance(module, BaseTunerLayer)],
    }
    if hasattr(model, "config"):
        state["config"] = model.config.to_dict() if hasattr(model.config, "to_dict") else dict(model.config)
    return state


def refuse(model: nn.Module, message: str, act: Callable[[], Any], kind: type[Exception] = ValueError) -> None:
    """`act` has to raise, and to leave the model as it was."""
    before = state_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(kind, match=message):
            act()
    assert state_of(model) == before
