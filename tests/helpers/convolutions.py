"""Small nets of convolutions of every kind, and adapters on them."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_reslora import ResLoRAConfig

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@dataclass(frozen=True)
class Case:
    """How the convolutions of a net are made."""

    dimensions: int = 2
    kernel: Any = 3
    options: tuple[tuple[str, Any], ...] = (("padding", 1),)

    def convolution(self, channels: int, out: int) -> nn.Module:
        return CONVOLUTIONS[self.dimensions](channels, out, self.kernel, **dict(self.options))


CASES = {
    "1d": Case(1),
    "2d": Case(2),
    "2d, uneven kernel": Case(2, (3, 1), (("padding", (1, 0)),)),
    "3d": Case(3),
    "groups": Case(2, 3, (("padding", 1), ("groups", 2))),
    "dilation": Case(2, 3, (("padding", 2), ("dilation", 2))),
    "padded in a circle": Case(2, 3, (("padding", 1), ("padding_mode", "circular"))),
    "padded by a word, no bias": Case(1, 5, (("padding", "same"), ("bias", False))),
    "groups of 1d, reflected": Case(1, 3, (("padding", 1), ("groups", 2), ("padding_mode", "reflect"))),
    "pointwise": Case(2, 1, ()),
}


class Block(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.up, self.down = case.convolution(6, 8), case.convolution(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.down(torch.tanh(self.up(x))))


class Net(nn.Module):
    """As a ResNet: blocks of one shape, and a step down, whose convolution is in no chain."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(case) for _ in range(3))
        self.step = CONVOLUTIONS[case.dimensions](6, 5, 3, stride=2)
        self.reentrant: bool | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
        return self.step(x)


def net(case: str) -> Net:
    torch.manual_seed(0)
    return Net(CASES[case])


def images(case: str, batch: int = 2) -> torch.Tensor:
    sizes = (7, 6, 5)[: CASES[case].dimensions]
    return torch.randn(batch, 6, *sizes, generator=torch.Generator().manual_seed(1))


def randomized(model: nn.Module, seed: int = 2) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if ".lora_" in name:
            p.data.copy_(torch.randn(p.shape, generator=generator) / p[0].numel() ** 0.5)
    return model


def adapted(base: nn.Module, shortcut: str, pre_num: int = 1, **fields: Any) -> PeftModel:
    fields = {"r": 4, "lora_alpha": 6, "target_modules": ["up", "down", "step"], **fields}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* linked to no other")
        model = get_peft_model(
            copy.deepcopy(base),
            ResLoRAConfig(shortcut=shortcut, pre_num=pre_num, **fields),  # type: ignore[arg-type]
        )
    return randomized(model).eval()
