"""Small mixtures of experts of transformers, and what an adapter of their parameters has to compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.func import functional_call
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from peft_reslora import ResLoRAConfig

_SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 60,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "attn_implementation": "eager",
    "experts_implementation": "eager",
}
TARGETS: dict[str, Any] = {
    "target_modules": ["q_proj", "v_proj"],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}


def mixtral() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**_SIZES))


def qwen3_moe() -> nn.Module:
    sizes = _SIZES | {"head_dim": 8, "num_experts": 5, "moe_intermediate_size": 12}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))


def gpt_oss() -> nn.Module:
    """Whose experts are transposed."""
    return GptOssForCausalLM(GptOssConfig(**_SIZES, head_dim=8, pad_token_id=0))


MIXTURES: dict[str, Callable[[], nn.Module]] = {"mixtral": mixtral, "qwen3_moe": qwen3_moe, "gpt_oss": gpt_oss}


def mixture(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The base model, with the same weights for the same name; gpt-oss's own start is empty."""
    torch.manual_seed(0)
    model = MIXTURES[name]().to(dtype)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def tokens() -> torch.Tensor:
    return torch.randint(1, 50, (3, 7), generator=torch.Generator().manual_seed(3))


def adapted_mixture(base: nn.Module, adapter_name: str = "default", **fields: Any) -> PeftModel:
    """With factors that are not zero."""
    config = ResLoRAConfig(**{"r": 2, "lora_alpha": 3, **TARGETS, **fields})
    return randomized(get_peft_model(base, config, adapter_name), adapter_name)


def randomized(model: PeftModel, adapter_name: str = "default", seed: int = 1) -> PeftModel:
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if f".{adapter_name}." in name:
            p.data = 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
    return model


def values_of(model: PeftModel, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    """The factors of an adapter, by `module.lora_A`, as leaves of their own."""
    own = {n: p for n, p in model.named_parameters() if f".{adapter_name}." in n}
    short = {n.removeprefix("base_model.model.").replace(f".{adapter_name}.weight", ""): p for n, p in own.items()}
    return {name: p.detach().double().clone().requires_grad_() for name, p in short.items()}


def merged_weights(
    base: nn.Module,
    values: Mapping[str, torch.Tensor],
    pre_num: int = 1,
    alphas: Mapping[str, float] | None = None,
    nesting: Mapping[str, str] | None = None,
) -> dict[str, torch.Tensor]:
    """By its name in the base, each adapted weight plus the sum of the dense updates of the layers that feed it.

    Args:
        alphas: of weights whose alpha is not 3.
        nesting: how PEFT calls the layer of each parameter, by the parameter's own name: the last one of a module is
            the outermost, `experts`, and the one before it is in it, `experts.base_layer`.
    """
    nesting = nesting or {"gate_up_proj": ".base_layer", "down_proj": ""}
    roles: dict[str, list[tuple[int, str, torch.Tensor]]] = {}
    weights = dict(base.named_parameters())
    for name, weight in weights.items():
        module, _, last = name.rpartition(".")
        layer = f"{module}{nesting[last]}" if last in nesting else module
        if f"{layer}.lora_A" not in values or last not in ("weight", *nesting):
            continue
        update = (alphas or {}).get(name, 3) * _dense(base.get_submodule(module), weight, layer, values)
        number = next(part for part in name.split(".") if part.isdigit())
        roles.setdefault(name.replace(number, "*", 1), []).append((int(number), name, update))
    merged = {}
    for chain in roles.values():
        chain.sort(key=lambda member: member[0])
        for n, (_, name, _) in enumerate(chain):
            first = 0 if pre_num == -1 else max(0, n - pre_num)
            merged[name] = weights[name].detach().double() + sum(update for _, _, update in chain[first : n + 1])
    return merged


def _dense(module: nn.Module, weight: torch.Tensor, layer: str, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """B A / r, expert by expert: the rows of A are those of one expert after the other, and B's columns alternate."""
    A, B = values[f"{layer}.lora_A"], values[f"{layer}.lora_B"]
    experts = len(weight) if weight.ndim == 3 else 1
    updates = torch.stack([B[:, e::experts] @ rows for e, rows in enumerate(A.chunk(experts))]) / (len(A) // experts)
    if weight.ndim == 2:
        return updates[0]
    return updates.transpose(1, 2) if getattr(module, "is_transposed", False) else updates


def expected_logits(base: nn.Module, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Of the plain model with these weights, in float64."""
    return functional_call(base, dict(weights), kwargs={"input_ids": tokens()}).logits
