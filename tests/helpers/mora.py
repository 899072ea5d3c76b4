"""MoRA index by index, as the paper says it; and small models for its layers."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_reslora.mora import MoRAConfig

TYPES = ("sharing", "decoupling", "rotation")


def reference(x: torch.Tensor, M: torch.Tensor, out_features: int, mora_type: str) -> torch.Tensor:
    """One vector through MoRA, index by index, as the paper says it."""
    q, n = M.shape[0], len(x)
    groups = [torch.stack([x[(g * q + i) % n] for i in range(q)]) for g in range(math.ceil(n / q))]
    if mora_type == "sharing":
        result = M @ sum(groups)
    else:
        if mora_type == "rotation":
            groups = [_rotated(group, g) for g, group in enumerate(groups)]
        result = torch.cat([M @ group for group in groups])
    return torch.stack([result[o % len(result)] for o in range(out_features)])


def _rotated(group: torch.Tensor, position: int) -> torch.Tensor:
    half = len(group) // 2
    turned = [None] * len(group)
    for j in range(half):
        angle = position * 10000 ** (-2 * j / len(group))
        turned[j] = group[j] * math.cos(angle) - group[j + half] * math.sin(angle)
        turned[j + half] = group[j + half] * math.cos(angle) + group[j] * math.sin(angle)
    return torch.stack(turned)


def dense_reference(M: torch.Tensor, in_features: int, out_features: int, mora_type: str) -> torch.Tensor:
    """The delta weight, column by column from basis vectors."""
    basis = torch.eye(in_features, dtype=M.dtype)
    return torch.stack([reference(e, M, out_features, mora_type) for e in basis], dim=1)


def mora_config(mora_type: str = "sharing", r: int = 3, **kwargs: Any) -> MoRAConfig:
    """With random squares from the start."""
    kwargs.setdefault("target_modules", ["lin0", "lin1"])
    return MoRAConfig(r=r, mora_type=mora_type, init_weights=False, **kwargs)


class MLP(nn.Module):
    """Uneven shapes, a layer to leave alone, and one Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(33, 17)
        self.lin1 = Conv1D(20, 17)
        self.head = nn.Linear(20, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.lin1(torch.relu(self.lin0(x)))))


def mlp(dtype: torch.dtype = torch.float32) -> MLP:
    with torch.random.fork_rng():  # the same base each time, and other adapters
        torch.manual_seed(0)
        return MLP().to(dtype)


def inputs(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(4, 3, 33, generator=torch.Generator().manual_seed(1)).to(dtype)


def bitsandbytes_linear(bits: int) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    linear: Any = (
        bnb.nn.Linear4bit(64, 96, compute_dtype=torch.float32, quant_type="nf4")
        if bits == 4
        else bnb.nn.Linear8bitLt(64, 96, has_fp16_weights=False)
    )
    linear.load_state_dict(nn.Linear(64, 96).state_dict())
    model = nn.Sequential()
    model.lin0 = linear
    return model.to("cpu")


def torchao_linear() -> nn.Module:
    torchao = pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    model = nn.Sequential()
    model.lin0 = nn.Linear(64, 96)
    torchao.quantize_(model, Int8WeightOnlyConfig())
    model.hf_quantizer = SimpleNamespace(
        quantization_config=SimpleNamespace(get_apply_tensor_subclass=Int8WeightOnlyConfig)
    )
    return model
