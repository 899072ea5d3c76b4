"""Encoders of a few blocks, each of which may run in a checkpoint or otherwise than it usually would.

Everything is in float64, and made to be compared with the same model without checkpointing, run in the plainest order.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.adapters import ONE_OR_ALL, adapted
from helpers.gradients import assert_gradients_close, gradients
from helpers.tiny_models import Block
from helpers.tolerances import FLOAT64
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_reslora import ResLoRAConfig

TAKING = [("input", 1), ("middle", 1), ("middle", -1)]  # those that take what another layer saw

every_variant = pytest.mark.parametrize(("shortcut", "pre_num"), ONE_OR_ALL)
every_taking = pytest.mark.parametrize(("shortcut", "pre_num"), TAKING)
both_modes = pytest.mark.parametrize("use_reentrant", [True, False])

Around = Callable[..., torch.Tensor]

# Nothing here computes in less than float64.
assert_same = functools.partial(assert_gradients_close, bound=FLOAT64)


def plain(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def by_torch(use_reentrant: bool) -> Around:
    return lambda function, *args: checkpoint(function, *args, use_reentrant=use_reentrant)


class Encoder(nn.Module):
    """Blocks, each run through `around`."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(5, 7) for _ in range(depth))
        self.around: Around = plain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = self.around(layer, x)
        return x


def adapted_encoder(model: nn.Module, shortcut: str, pre_num: int, **fields: Any) -> nn.Module:
    config = ResLoRAConfig(r=2, target_modules=["up", "down"], shortcut=shortcut, pre_num=pre_num, **fields)
    return adapted(model.double(), config).double().train()


def encoder(shortcut: str, pre_num: int, **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    return adapted_encoder(Encoder(), shortcut, pre_num, **fields)


def checkpointed(model: nn.Module, around: Around) -> nn.Module:
    """A copy of the model whose blocks are run through `around`."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if hasattr(module, "around"):
            module.around = around
    return twin


def data(*shape: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (3, 5)), generator=generator, dtype=torch.float64).requires_grad_()


def backwards(model: nn.Module, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    for x in inputs:
        model(x).square().sum().backward()
    return gradients(model)
