"""What other programs make of a LoRA: a short statement of how each of them reads the files.

Each reader below was written from the source that it names, and computes the update that the program would apply to
each module, or raises `Refused`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from helpers.exports import read_folder
from helpers.tolerances import rounding
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Config = Mapping[str, Any]
Tensors = Mapping[str, Tensor]
Updates = dict[str, Tensor]  # (out_features, in_features) by module
PREFIX = "base_model.model."


class Refused(Exception):
    """The program stops with an error."""


def pairs(tensors: Tensors) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) by module, for programs that take no other name than PEFT's for linear layers."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
        if match is None:
            raise Refused(f"unexpected tensor {key}")
        found.setdefault(match[1], {})[match[2]] = tensor.float()
    return {name: (pair["A"], pair["B"]) for name, pair in found.items()}


# vllm-project/vllm: vllm/lora/peft_helper.py, vllm/config/lora.py, vllm/lora/utils.py (0.33)
VLLM_MAX_RANK = 512
VLLM_REFUSED_INITS = ("pissa", "olora", "corda", "loftq", "eva")


def vllm(config: Config, tensors: Tensors) -> Updates:
    if missing := {"r", "lora_alpha", "target_modules"} - config.keys():
        raise Refused(f"missing {missing}")
    if config.get("use_dora") or config.get("bias", "none") != "none" or config.get("modules_to_save"):
        raise Refused("a feature that vLLM does not have")
    if config.get("lora_bias") or config.get("layer_replication") or config.get("alora_invocation_tokens"):
        raise Refused("a feature that vLLM does not have")
    if str(config.get("init_lora_weights")).startswith(VLLM_REFUSED_INITS):
        raise Refused("an initialization that changes the base model")
    if config["r"] > VLLM_MAX_RANK:
        raise Refused("a rank that no server can be started for")
    root = math.sqrt if config.get("use_rslora") else float
    updates = {}
    for name, (A, B) in pairs(tensors).items():
        rank = pattern(config.get("rank_pattern"), name, config["r"])
        alpha = pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
        updates[name] = alpha / root(rank) * B @ A
    return updates


def pattern(patterns: Config | None, name: str, otherwise: float) -> float:
    return next((v for k, v in (patterns or {}).items() if re.match(rf"(.*\.)?({k})$", name)), otherwise)


# The same before it knew patterns (2025-10): one scale for all; base weights beside the factors are refused.
def vllm_before_patterns(config: Config, tensors: Tensors) -> Updates:
    return vllm({**config, "rank_pattern": {}, "alpha_pattern": {}}, tensors)


# sgl-project/sglang: python/sglang/srt/lora/{lora_config,lora,mem_pool,lora_manager,utils}.py (0.5.23)
def sglang(config: Config, tensors: Tensors) -> Updates:
    if config["peft_type"] != "LORA" or config.get("use_dora"):
        raise Refused("no plain LoRA")
    if isinstance(config["target_modules"], str) and config["target_modules"] not in ("all", "all-linear"):
        raise Refused("target_modules is a regular expression")
    factors = pairs(tensors)
    for name, (A, _) in factors.items():
        if A.shape[0] != config["r"]:
            raise Refused(f"{name} has rank {A.shape[0]} instead of {config['r']}")
        if name.endswith("q_proj") and f"{name.removesuffix('q_proj')}v_proj" not in factors:
            raise Refused("KeyError: v_proj")
    return {name: config["lora_alpha"] / config["r"] * B @ A for name, (A, B) in factors.items()}


# huggingface/text-generation-inference: server/text_generation_server/adapters/lora.py, with the `pad_rank` of
# punica-sgmv; predibase/lorax: server/lorax_server/adapters/lora.py is its origin and knows no rsLoRA. One device.
def tgi(config: Config, tensors: Tensors, knows_rslora: bool = True) -> Updates:
    root = math.sqrt if config.get("use_rslora") and knows_rslora else float
    types: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for name, pair in pairs(tensors).items():
        types.setdefault(re.sub(r"\.\d+\.", ".*.", name), {})[name] = pair
    blocks = 1 + max((int(index) for name in pairs(tensors) for index in re.findall(r"\.(\d+)\.", name)), default=0)
    r = config["r"]
    updates = {}
    for module_type, members in types.items():
        if "*" in module_type and len(members) < blocks:
            continue  # dropped in all layers, without a word
        padded = {8 if A.shape[0] <= 8 else -(-A.shape[0] // 16) * 16 for A, _ in members.values()}
        if len(padded) > 1:
            raise Refused(f"{module_type} has unequal ranks, which do not stack")
        updates.update({name: config["lora_alpha"] / root(r) * B @ A for name, (A, B) in members.items()})
        (r,) = padded  # written back into the config that the next type reads
    return updates


def lorax(config: Config, tensors: Tensors) -> Updates:
    return tgi(config, tensors, knows_rslora=False)


# ggml-org/llama.cpp: convert_lora_to_gguf.py, src/llama-adapter.h (`get_scale`)
def llama_cpp(config: Config, tensors: Tensors) -> Updates:
    kept = {
        key: tensor
        for key, tensor in tensors.items()
        if ".base_layer.weight" not in key and "_layernorm" not in key and ".norm" not in key
    }
    return {name: float(config["lora_alpha"]) / B.shape[-1] * B @ A for name, (A, B) in pairs(kept).items()}


# ollama/ollama: convert/{convert,convert_llama_adapter}.go, the import of a folder
def ollama(config: Config, tensors: Tensors) -> Updates:
    if not isinstance(config["lora_alpha"], int):
        raise Refused("json: cannot unmarshal number into Go struct field of type uint32")
    turned = {}
    for name, (A, B) in pairs(tensors).items():
        A, B = A.T if A.shape[0] > A.shape[1] else A, B.T if B.shape[0] < B.shape[1] else B
        if A.shape[0] != B.shape[1]:
            raise Refused(f"the factors of {name} do not fit")
        turned[name] = config["lora_alpha"] / B.shape[1] * B @ A
    return turned


# huggingface/diffusers: src/diffusers/utils/peft_utils.py (`get_peft_kwargs`): the config is not read, alpha := rank
def diffusers(config: Config, tensors: Tensors) -> Updates:
    return {name: B @ A for name, (A, B) in pairs(tensors).items()}


CONSUMERS: dict[str, Callable[[Config, Tensors], Updates]] = {
    "vllm": vllm,
    "vllm_before_patterns": vllm_before_patterns,
    "sglang": sglang,
    "tgi": tgi,
    "lorax": lorax,
    "llama_cpp": llama_cpp,
    "ollama": ollama,
    "diffusers": diffusers,
}

# huggingface/peft: src/peft/config.py and src/peft/tuners/lora/config.py at the tags v0.10.0 and v0.13.2; both give
# what is in the file to the constructor, so that another field is a TypeError.
PEFT_0_10_FIELDS = {
    *("peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "r"),
    *("target_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save"),
    *("init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
    *("megatron_config", "megatron_core", "loftq_config", "use_dora", "layer_replication"),
}
PEFT_0_13_FIELDS = PEFT_0_10_FIELDS | {"runtime_config"}


@torch.no_grad()
def updates_of(model: nn.Module) -> Updates:
    """What the adapter of a model adds to each module, from the layers themselves."""
    updates = {}
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, BaseTunerLayer):
            delta = layer.get_delta_weight("default").float()
            updates[name] = delta.T if isinstance(layer.get_base_layer(), Conv1D) else delta
    return updates


def verdict(consumer: str, folder: Path, expected: Updates) -> str:
    """'right', or what is wrong; a module that is not expected has to get zeros."""
    try:
        updates = CONSUMERS[consumer](*read_folder(folder)[:2])
    except Refused as error:
        return f"refused: {error}"
    if missing := expected.keys() - updates.keys():
        return f"dropped: {', '.join(sorted(missing))}"
    for name, update in updates.items():
        wanted = expected.get(name, torch.zeros_like(update))
        if float((update - wanted).norm()) > rounding(64) * float(wanted.norm()):
            return f"silently wrong: {name}"
    return "right"
