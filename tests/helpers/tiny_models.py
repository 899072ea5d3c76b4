"""Small models of every architecture family, built in memory, with inputs to run them on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)


class Block(nn.Module):
    """Two linear layers with a way around them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


@dataclass(frozen=True)
class TinyModel:
    """How to build a model and inputs for it, and which of its layers to adapt."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    targets: list[str]

    def make(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return self.build().eval()

    def batches(self, count: int) -> list[dict[str, Any]]:
        return [self.inputs() for _ in range(count)]


def _tokens(length: int = 7, vocabulary: int = 53) -> torch.Tensor:
    return torch.randint(1, vocabulary, (2, length))


def llama() -> nn.Module:
    config = LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=53,
        max_position_embeddings=32,
        pad_token_id=0,
        tie_word_embeddings=False,
        initializer_range=0.2,  # activations of order one, so that float32 rounding stays below the tolerances
    )
    return LlamaForCausalLM(config)


NARROW_IDS = torch.tensor([[5, 3, 9, 1, 2], [4, 4, 1, 7, 6]])


def narrow_llama(layers: int = 3, **fields: Any) -> LlamaForCausalLM:
    """A smaller one, always with the same weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=layers,
        num_attention_heads=2,
        vocab_size=17,
        max_position_embeddings=16,
        initializer_range=0.3,
        **fields,
    )
    return LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    config = GPT2Config(n_embd=24, n_layer=3, n_head=2, vocab_size=53, n_positions=32, initializer_range=0.2)
    config.bos_token_id, config.eos_token_id = 1, 2
    config.attn_pdrop = config.resid_pdrop = config.embd_pdrop = 0.0
    return GPT2LMHeadModel(config)


def bert() -> nn.Module:
    config = BertConfig(
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=4,
        num_attention_heads=2,
        vocab_size=53,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
    )
    return BertForSequenceClassification(config)


def t5() -> nn.Module:
    config = T5Config(
        d_model=24,
        d_kv=6,
        d_ff=36,
        num_layers=3,
        num_heads=4,
        vocab_size=53,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def vit() -> nn.Module:
    config = ViTConfig(
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
    )
    return ViTForImageClassification(config)


def unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def _unet_inputs() -> dict[str, Any]:
    return {
        "sample": torch.randn(2, 3, 8, 8),
        "timestep": torch.tensor([3, 5]),
        "encoder_hidden_states": torch.randn(2, 5, 12),
    }


TINY_MODELS: dict[str, TinyModel] = {
    "llama": TinyModel(
        llama,
        lambda: {"input_ids": _tokens()},
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    ),
    "gpt2": TinyModel(gpt2, lambda: {"input_ids": _tokens()}, ["c_attn", "c_proj", "c_fc"]),
    "bert": TinyModel(bert, lambda: {"input_ids": _tokens()}, ["query", "key", "value", "dense"]),
    "t5": TinyModel(
        t5, lambda: {"input_ids": _tokens(6), "decoder_input_ids": _tokens(5)}, ["q", "k", "v", "o", "wi", "wo"]
    ),
    "vit": TinyModel(vit, lambda: {"pixel_values": torch.randn(2, 3, 8, 8)}, ["q_proj", "k_proj", "v_proj", "fc1"]),
    "unet": TinyModel(unet, _unet_inputs, ["to_q", "to_k", "to_v", "to_out.0"]),
}
LLAMA_INPUTS = {"input_ids": torch.randint(1, 53, (2, 7), generator=torch.Generator().manual_seed(0))}


def output_of(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """The main output of any of the models."""
    output = model(**inputs)
    return output.sample if hasattr(output, "sample") else output.logits
