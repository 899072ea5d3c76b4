"""Tiny models whose blocks are not all of one kind, and the chains that a reader expects of their attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from helpers.tiny_models import TinyModel
from torch import nn
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

_SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 37,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,  # activations of order one, so that float32 rounding stays below the tolerances
}
_LINEAR_HEADS = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4}
_LINEAR_AND_FULL = ["linear_attention", "full_attention"] * 2


@dataclass(frozen=True)
class HybridModel(TinyModel):
    """A tiny model, and the chain of one role: names without their common prefix and suffix, from `expected`."""

    expected: tuple[tuple[str, ...], ...]

    def make(self, seed: int = 0) -> nn.Module:
        model = super().make(seed)
        model.set_experts_implementation("eager")  # the others take no float64
        for name, parameter in model.named_parameters():
            if "attn_gate" in name or "mlp_gate" in name:  # Mllama's gates start at zero, and let nothing through
                nn.init.constant_(parameter, 0.7)
        return model


def _expected(pattern: str, *chains: tuple[int, ...]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(pattern.format(n) for n in chain) for chain in chains)


def _every_second(pattern: str) -> tuple[tuple[str, ...], ...]:
    return _expected(pattern, (1, 3))


def _tokens() -> dict[str, Any]:
    return {"input_ids": torch.randint(3, 37, (2, 7))}


def _with_states() -> dict[str, Any]:
    return {**_tokens(), "cross_attention_states": torch.randn(2, 3, 16)}


def _queries() -> dict[str, Any]:
    return {"query_embeds": torch.randn(2, 5, 16), "encoder_hidden_states": torch.randn(2, 3, 12)}


def _qwen3_next() -> nn.Module:
    experts = {"num_experts": 2, "num_experts_per_tok": 1}
    experts |= {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    sizes = {**_SIZES, **_LINEAR_HEADS, **experts, "head_dim": 8, "num_hidden_layers": 4}
    return hf.Qwen3NextForCausalLM(hf.Qwen3NextConfig(**sizes, layer_types=_LINEAR_AND_FULL))


def _qwen3_5() -> nn.Module:
    sizes = {**_SIZES, **_LINEAR_HEADS, "head_dim": 8, "num_hidden_layers": 4}
    return hf.Qwen3_5ForCausalLM(hf.Qwen3_5TextConfig(**sizes, layer_types=_LINEAR_AND_FULL))


def _lfm2() -> nn.Module:
    config = hf.Lfm2Config(**_SIZES, num_hidden_layers=4, layer_types=["conv", "full_attention"] * 2)
    return hf.Lfm2ForCausalLM(config)


def _granite_hybrid() -> nn.Module:
    sizes = {**_SIZES, **_MAMBA, "num_hidden_layers": 4, "shared_intermediate_size": 24}
    sizes |= {"num_local_experts": 0, "num_experts_per_tok": 0}
    config = hf.GraniteMoeHybridConfig(**sizes, layer_types=["mamba", "attention"] * 2)
    return hf.GraniteMoeHybridForCausalLM(config)


def _nemotron_h() -> nn.Module:
    sizes = {**_SIZES, "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 4}
    blocks = ["mamba", "attention", "mlp"] * 2
    config = hf.NemotronHConfig(**sizes, head_dim=4, chunk_size=8, layers_block_type=blocks)
    return hf.NemotronHForCausalLM(config)


def _jamba() -> nn.Module:
    experts = {"expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1}
    sizes = {**_SIZES, **experts, "num_hidden_layers": 4, "mamba_d_state": 4, "mamba_dt_rank": 2}
    return hf.JambaForCausalLM(hf.JambaConfig(**sizes, attn_layer_period=2, attn_layer_offset=1))


def _bamba() -> nn.Module:
    return hf.BambaForCausalLM(hf.BambaConfig(**_SIZES, **_MAMBA, num_hidden_layers=4, attn_layer_indices=[1, 3]))


def _minimax() -> nn.Module:
    sizes = {**_SIZES, "num_hidden_layers": 4, "head_dim": 4, "num_local_experts": 2, "num_experts_per_tok": 1}
    return hf.MiniMaxForCausalLM(hf.MiniMaxConfig(**sizes, layer_types=_LINEAR_AND_FULL, block_size=4))


def _recurrent_gemma() -> nn.Module:
    sizes = {**_SIZES, "num_hidden_layers": 4, "lru_width": 16, "attention_window_size": 8}
    return hf.RecurrentGemmaForCausalLM(hf.RecurrentGemmaConfig(**sizes, block_types=["recurrent", "attention"]))


def _mllama() -> nn.Module:
    return hf.MllamaForCausalLM(MllamaTextConfig(**_SIZES, num_hidden_layers=4, cross_attention_layers=[1, 3]))


def _qformer() -> nn.Module:
    sizes = {key: value for key, value in _SIZES.items() if key != "num_key_value_heads"}
    config = hf.Blip2QFormerConfig(**sizes, num_hidden_layers=4, cross_attention_frequency=2, encoder_hidden_size=12)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return hf.Blip2QFormerModel(config)


_SHARING = {
    "num_hidden_layers": 8,
    "head_dim": 4,
    "num_kv_shared_layers": 4,
    "vocab_size_per_layer_input": 37,
    "hidden_size_per_layer_input": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 4,
    "sliding_window": 8,
}


def _gemma4() -> nn.Module:
    return hf.Gemma4ForCausalLM(hf.Gemma4TextConfig(**_SIZES, **_SHARING, global_head_dim=8))


def _gemma3n() -> nn.Module:
    sizes = {**_SIZES, **_SHARING, "intermediate_size": [24] * 8, "activation_sparsity_pattern": [0.0] * 8}
    return hf.Gemma3nForCausalLM(hf.Gemma3nTextConfig(**sizes, laurel_rank=4))


def _model(
    build: Callable[[], nn.Module],
    targets: list[str],
    expected: tuple[tuple[str, ...], ...],
    inputs: Callable[[], dict[str, Any]] = _tokens,
) -> HybridModel:
    return HybridModel(build, inputs, targets, expected)


_Q = "model.layers.{}.self_attn.q_proj"

HYBRID_MODELS: dict[str, HybridModel] = {
    "qwen3_5": _model(_qwen3_5, ["q_proj", "o_proj"], _every_second(_Q)),
    "qwen3_next": _model(_qwen3_next, ["q_proj", "k_proj"], _every_second(_Q)),
    "lfm2": _model(_lfm2, ["q_proj", "v_proj"], _every_second(_Q)),
    "granite_hybrid": _model(_granite_hybrid, ["q_proj", "o_proj"], _every_second(_Q)),
    "nemotron_h": _model(
        _nemotron_h, ["q_proj", "up_proj", "down_proj"], _expected("model.layers.{}.mixer.q_proj", (1, 4))
    ),
    "jamba": _model(_jamba, ["q_proj", "in_proj"], _every_second(_Q)),
    "bamba": _model(_bamba, ["q_proj", "v_proj"], _every_second(_Q)),
    "minimax": _model(_minimax, ["q_proj", "v_proj"], _every_second(_Q)),
    "recurrent_gemma": _model(
        _recurrent_gemma, ["q_proj", "linear_x"], _every_second("model.layers.{}.temporal_block.q_proj")
    ),
    "mllama": _model(
        _mllama, ["q_proj", "v_proj"], _every_second("model.layers.{}.cross_attn.q_proj"), inputs=_with_states
    ),
    "blip_2_qformer": _model(
        _qformer,
        ["query", "value"],
        _expected("encoder.layer.{}.crossattention.attention.query", (0, 2)),
        inputs=_queries,
    ),
    # Every second layer is of another shape, and from the fifth on keys and values are those of earlier layers.
    "gemma4": _model(_gemma4, ["q_proj", "k_proj", "up_proj"], _expected(_Q, (0, 2), (1, 3), (4, 6), (5, 7))),
    "gemma3n": _model(_gemma3n, ["q_proj", "k_proj", "up_proj"], _expected(_Q, (0, 1, 2, 3), (4, 5, 6, 7))),
}


def hybrid_output(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    output = model(**inputs)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state
