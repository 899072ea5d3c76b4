"""Nets of `nn.MultiheadAttention`, and what they compute with dense weights in place of adapters."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import torch
from helpers.oracle import randomize_adapters
from peft import PeftModel, get_peft_model
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from peft_reslora import ResLoRAConfig

SIZE, HEADS = 8, 2


class Block(nn.Module):
    """A block of a vision transformer, as torchvision and open_clip write it."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(SIZE), nn.LayerNorm(SIZE)
        self.attn = nn.MultiheadAttention(SIZE, HEADS, **{"batch_first": True, **options})
        self.mlp = nn.Sequential(nn.Linear(SIZE, 12), nn.GELU(), nn.Linear(12, SIZE))

    def forward(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
        h = self.norm1(x)
        x = x + self.attn(h, h, h, **{"need_weights": False, **options})[0]
        return x + self.mlp(self.norm2(x))


class Net(nn.Module):
    """Three blocks; `use_reentrant` checkpoints them."""

    use_reentrant: bool | None = None

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(**options) for _ in range(3))

    def forward(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
        for block in self.layers:
            if self.use_reentrant is None:
                x = block(x, **options)
            else:
                x = checkpoint(block, x, use_reentrant=self.use_reentrant, **options)
        return x


class OfTorch(nn.Module):
    """Takes the place of an attention of transformers."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(size, heads, batch_first=True)

    def forward(self, hidden_states: torch.Tensor, **others: Any) -> tuple[torch.Tensor, None]:
        return self.attention(hidden_states, hidden_states, hidden_states, need_weights=False)[0], None


def with_attention_of_torch(llama: Any) -> nn.Module:
    for layer in llama.model.layers:
        layer.self_attn = OfTorch(llama.config.hidden_size, llama.config.num_attention_heads)
    return llama


def encoder(**options: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(SIZE, HEADS, 12, **{"dropout": 0.0, "batch_first": True, **options})
    return nn.TransformerEncoder(layer, 3)


def prepared(base: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Random weights and biases everywhere: torch's copies of one encoder layer are all equal, and biases zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in base.parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.data = (drawn * 0.3 + (0.5 if parameter.ndim == 1 else 0.0)).to(dtype)
    return base


def adapted(base: nn.Module, targets: Any = ("attn", "self_attn"), **fields: Any) -> PeftModel:
    """A copy of the base with a random adapter."""
    names = {name.rpartition(".")[2] for name, _ in base.named_modules()}
    targets = targets if isinstance(targets, str) else [t for t in targets if t.rpartition(".")[2] in names]
    config = ResLoRAConfig(**{"r": 2, "lora_alpha": 3, "target_modules": targets, **fields})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(copy.deepcopy(base), config)
    return randomize_adapters(model)  # type: ignore[return-value]


def trained(model: nn.Module, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    """The factors by `<layer>.lora_A` and `<layer>.lora_B`, with the names that PEFT has for layers."""
    named = {name.removeprefix("base_model.model."): p for name, p in model.named_parameters()}
    ending = f".{adapter_name}.weight"
    return {name.removesuffix(ending): p for name, p in named.items() if name.endswith(ending) and "lora_" in name}


def leaves(model: nn.Module, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    return {name: p.detach().clone().requires_grad_() for name, p in trained(model, adapter_name).items()}


def dense_weights(
    base: nn.Module, factors: dict[str, torch.Tensor], pre_num: int = 1, scaling: float = 1.5
) -> dict[str, torch.Tensor]:
    """W_n + the sum of the s_k B_k A_k (Eq. 3), by the name of the parameter, of all weights that are adapted."""
    found = {}
    for name, W in base.named_parameters():
        layer = re.sub(r"\.in_proj_weight$|(\.out_proj)?\.weight$", r"\1", name).replace(
            ".out_proj", ".base_layer.out_proj"
        )
        if f"{layer}.lora_A" not in factors:
            continue
        number = int(re.search(r"\d+", layer).group())  # type: ignore[union-attr]
        first = 0 if pre_num == -1 else max(0, number - pre_num)
        chain = [re.sub(r"\d+", str(k), layer, count=1) for k in range(first, number + 1)]
        found[name] = W + sum(scaling * factors[f"{k}.lora_B"] @ factors[f"{k}.lora_A"] for k in chain)
    assert found
    return found


def expected(base: nn.Module, weights: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
    """What the plain base computes with these weights, without torch's fast path."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return functional_call(base, weights, args, kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
