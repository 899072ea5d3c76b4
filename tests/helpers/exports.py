"""Base models, adapters of every method, and folders, as the tests of exports have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from helpers.tiny_models import Block
from peft import AdaLoraConfig, LoHaConfig, LoKrConfig, LoraConfig
from safetensors import safe_open
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from peft_reslora import MoRAConfig, ResLoRAConfig


class Net(nn.Module):
    """Three blocks of uneven shapes, and modules of other kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 20)
        self.blocks = nn.ModuleList(Block(20, 37) for _ in range(3))
        self.conv = nn.Conv1d(20, 20, 1)
        self.head = nn.Linear(20, 7)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x + self.conv(x.transpose(1, 2)).transpose(1, 2))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def llama(**fields: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 56, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=11, num_hidden_layers=3, **sizes, **fields)).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(vocab_size=11, tie_word_embeddings=False, **sizes)).eval()


def bert() -> BertModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2, "num_hidden_layers": 2}
    return BertModel(BertConfig(vocab_size=11, max_position_embeddings=16, **sizes), add_pooling_layer=False).eval()


IDS = torch.arange(10).reshape(2, 5)


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out = model(IDS)
    return out if isinstance(out, torch.Tensor) else out[0]


def read_folder(folder: Path) -> tuple[dict, dict[str, torch.Tensor], dict[str, str]]:
    """Config, tensors and header of a folder, without PEFT."""
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        header = file.metadata()
    return json.loads((folder / "adapter_config.json").read_text()), tensors, header


UP_DOWN = ["up", "down"]
CAUSAL = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
# How each is made: a base model, and a config.
METHODS = {
    "lora": (net, LoraConfig(r=3, lora_alpha=5, target_modules=UP_DOWN)),
    "lora-rslora": (net, LoraConfig(r=3, lora_alpha=5, target_modules=UP_DOWN, use_rslora=True)),
    "lora-patterns": (
        net,
        LoraConfig(r=3, target_modules=UP_DOWN, rank_pattern={"up": 5}, alpha_pattern={"blocks.1.down": 9}),
    ),
    "lora-regex": (net, LoraConfig(r=3, target_modules=r"blocks\.\d\.(up|down)|head")),
    "lora-head": (net, LoraConfig(r=3, target_modules=["head"])),
    "lora-llama": (llama, LoraConfig(r=3, **CAUSAL)),
    "lora-all-linear": (llama, LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM")),
    "lora-gpt2": (gpt2, LoraConfig(r=3, target_modules=["c_attn", "c_fc", "c_proj"], task_type="CAUSAL_LM")),
    "lora-gpt2-mixed": (gpt2, LoraConfig(r=3, target_modules=["c_attn", "lm_head"], task_type="CAUSAL_LM")),
    "lora-bert": (bert, LoraConfig(r=3, target_modules=["attention.output.dense", "query"])),
    "adalora": (net, AdaLoraConfig(init_r=4, lora_alpha=6, target_modules=UP_DOWN, total_step=10)),
    "adalora-gpt2": (gpt2, AdaLoraConfig(init_r=4, target_modules=["c_attn", "c_fc"], total_step=10)),
    "loha": (net, LoHaConfig(r=3, alpha=5, target_modules=UP_DOWN)),
    "loha-wide": (net, LoHaConfig(r=6, target_modules=UP_DOWN)),  # 36 directions, the matrices have 20
    "loha-llama": (llama, LoHaConfig(r=3, **CAUSAL)),
    "lokr": (net, LoKrConfig(r=1, alpha=3, target_modules=UP_DOWN)),
    "lokr-both": (llama, LoKrConfig(r=1, target_modules=["q_proj", "down_proj"], decompose_both=True)),
    "lokr-full": (net, LoKrConfig(r=20, target_modules=UP_DOWN)),
    "lokr-factor": (llama, LoKrConfig(r=2, alpha=3, decompose_factor=2, **CAUSAL)),
    "reslora-block": (llama, ResLoRAConfig(r=2, shortcut="block", pre_num=-1, **CAUSAL)),
    "reslora-rslora": (llama, ResLoRAConfig(r=2, lora_alpha=5, use_rslora=True, **CAUSAL)),
    "reslora-gpt2": (gpt2, ResLoRAConfig(r=2, target_modules=["c_attn", "c_fc"], task_type="CAUSAL_LM")),
    "mora": (net, MoRAConfig(r=2, mora_type="sharing", target_modules=UP_DOWN)),
    "mora-wide": (net, MoRAConfig(r=15, mora_type="sharing", target_modules=UP_DOWN)),  # a square of side 29
    "mora-llama": (llama, MoRAConfig(r=1, mora_type="sharing", **CAUSAL)),
    "mora-auto": (llama, MoRAConfig(r=32, **CAUSAL)),
    "mora-gpt2": (
        gpt2,
        MoRAConfig(r=1, mora_type="sharing", target_modules=["c_attn", "c_fc"], task_type="CAUSAL_LM"),
    ),
}
