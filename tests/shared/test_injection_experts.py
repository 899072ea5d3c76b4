"""Mixtures of experts: experts and routers that cannot be adapted are refused or left out, with their share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.adapters import both_tuners, config_of, tuner_layers
from helpers.oracle import randomize_adapters, relative_error
from helpers.refusals import refuse
from peft import get_peft_model
from torch import nn
from transformers import (
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from peft_reslora import ResLoRAConfig, describe_chains

MOE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 50,
    "num_local_experts": 3,
}


def mixtral() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**MOE))


def qwen3_moe() -> nn.Module:
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**MOE, num_experts=3, moe_intermediate_size=12))


def llama4() -> nn.Module:
    return Llama4ForCausalLM(Llama4TextConfig(**MOE, intermediate_size_mlp=24, head_dim=8, pad_token_id=0))


def phimoe() -> nn.Module:
    return PhimoeForCausalLM(PhimoeConfig(**MOE))


def switch() -> nn.Module:
    sparse = {"num_sparse_encoder_layers": 3, "num_sparse_decoder_layers": 3}
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_decoder_layers": 3, "num_heads": 2}
    return SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(**sizes, **sparse, num_experts=2, vocab_size=50, decoder_start_token_id=0)
    )


@both_tuners
@pytest.mark.parametrize(
    ("build", "router"),
    [(llama4, "model.layers.*.feed_forward.router (Llama4Router"), (phimoe, "model.layers.*.mlp.router (PhimoeTopK")],
)
def test_routers_are_left_out_of_all_linear_and_refused_when_named(tuner, build, router):
    model = build()
    refuse(
        model,
        r"router \(\w+, 2 layers\), whose forward",
        lambda: get_peft_model(model, config_of(tuner, target_modules=["router"])),
    )
    with pytest.warns(UserWarning, match="leaves out") as found:
        adapted = get_peft_model(model, config_of(tuner, r=2, target_modules="all-linear")).train()
    assert any(router in str(w.message) for w in found)
    adapted(input_ids=torch.arange(6).view(2, 3)).logits.square().sum().backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


NAMED_EXPERTS: list[tuple[Callable[[], nn.Module], Any]] = [
    (mixtral, ["q_proj", "w1", "w2", "w3"]),
    (mixtral, ["w2"]),
    (mixtral, r".*\.(q_proj|w1|w2|w3)"),
    (mixtral, ["q_proj", "gate_up_proj"]),
    (qwen3_moe, ["q_proj", "gate_proj", "up_proj", "down_proj"]),
    (qwen3_moe, ["q_proj", "experts.down_proj"]),
    (llama4, ["q_proj", "down_proj"]),
]


@both_tuners
@pytest.mark.parametrize(("build", "targets"), NAMED_EXPERTS)
def test_experts_that_are_named_are_refused(tuner, build, targets):
    model = build()
    message = r"asks for the experts in model\.layers\.\*\.\w+\.experts \(2 modules, \d+% .*exclude_modules"
    refuse(model, message, lambda: get_peft_model(model, config_of(tuner, r=2, target_modules=targets)))


@both_tuners
@pytest.mark.parametrize("build", [mixtral, qwen3_moe, llama4])
def test_all_linear_says_which_experts_it_leaves_out(tuner, build):
    model = build()
    share = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    share /= sum(p.numel() for p in model.parameters())
    message = rf"the experts in model\.layers\.\*\.\w+\.experts \(2 modules, {share:.0%} of"
    with pytest.warns(UserWarning, match=message):
        get_peft_model(model, config_of(tuner, r=2, target_modules="all-linear"))


@both_tuners
@pytest.mark.parametrize(
    ("build", "fields"),
    [
        (mixtral, {"target_modules": ["q_proj", "o_proj"]}),
        (qwen3_moe, {"target_modules": r".*self_attn\.(q|v)_proj"}),
        (mixtral, {"target_modules": None}),
        (qwen3_moe, {"target_modules": ["q_proj", "gate_proj"], "exclude_modules": r".*\.experts\..*"}),
    ],
)
def test_where_attention_alone_is_asked_for_nothing_is_said(tuner, build, fields, recwarn):
    model = get_peft_model(build(), config_of(tuner, r=2, **fields))
    assert all(".self_attn." in name for name in tuner_layers(model))
    assert not [w for w in recwarn if "the experts in" in str(w.message)]


@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_routed_experts_are_refused_where_tokens_have_to_align(shortcut):
    model = switch()
    config = ResLoRAConfig(r=2, target_modules="all-linear", shortcut=shortcut)
    message = rf"shortcut='{shortcut}' .* tokens are routed .*\.experts\.expert_0\.w[io]\).*shortcut='block'"
    refuse(model, message, lambda: get_peft_model(model, config))
    with pytest.raises(ValueError, match="tokens are routed"):
        describe_chains(model, config)
    config.exclude_modules = r".*\bexperts?\b.*"
    assert not any("experts" in name for name in list(tuner_layers(get_peft_model(model, config))))


class Mixture(nn.Module):
    """A block in which each token goes to one of two experts."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8, dtype=torch.float64) for _ in range(2))
        self.shared_experts = nn.Linear(8, 8, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = x + self.shared_experts(x)
        for number, expert in enumerate(self.experts):
            chosen = (x[..., 0] > 0) == bool(number)
            result = result.index_put((chosen,), result[chosen] + expert(x[chosen]))
        return result


def test_routed_experts_work_with_block_and_one_sample_does_not_see_another():
    torch.manual_seed(0)
    base = nn.Sequential(Mixture(), Mixture(), Mixture())
    config = ResLoRAConfig(r=2, target_modules="all-linear", shortcut="block")
    model = randomize_adapters(get_peft_model(copy.deepcopy(base), config).double()).eval()
    x = torch.randn(4, 5, 8, dtype=torch.float64)
    together, alone = model(x), torch.cat([model(x[i : i + 1]) for i in range(4)])
    assert relative_error(together, alone) < 1e-10
    for shortcut in ("input", "middle"):
        other = copy.deepcopy(base)
        refused = ResLoRAConfig(r=2, target_modules="all-linear", shortcut=shortcut)
        refuse(other, r"such as that of 0\.experts\.0\)", lambda: get_peft_model(other, refused))  # noqa: B023
        shared = ResLoRAConfig(r=2, target_modules=["shared_experts"], shortcut=shortcut)
        assert len(tuner_layers(get_peft_model(other, shared))) == 3
