"""The model types of the installed transformers, each in a small size, and what their forwards may be given."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

PARAMETERS = 5_000_000  # of one model
_PER_LAYER = ("layer_types", "layers_block_type", "block_types", "mlp_layer_types", "attention_types")

# The first pattern that is found in a field's name gives its size; sizes that are smaller already stay.
_SIZES: list[tuple[str, int]] = [
    (r"conv|feat_extract|num_labels", 10**9),
    (r"vocab_size|num_embeddings", 99),
    (r"period|depths", 2),
    (r"window_size", 4),
    (r"offset|n_groups", 1),
    (r"kv_shared|nextn|mtp|num_dense|first_k_dense", 1),
    (r"experts_per_tok|top_?k", 2),
    (r"experts", 4),
    (r"(key_value|kv|value|key)_heads|query_groups|multi_query_group", 2),
    (r"heads|n_head", 4),
    (r"mamba_(d_head|head_dim)", 16),
    (r"head_dim|d_kv|head_size|rope_dim|kv_channels", 8),
    (r"rank", 8),
    (r"layers|^depth$|n_layer$|num_blocks", 4),
    (r"max_.*(position|length|len)|n_positions|seq_len|n_ctx|context_length", 64),
    (r"image_size|^img_size|input_size", 32),
    (r"patch_size", 8),
    (r"intermediate|ffn|d_ff|n_inner|mlp_dim|shared_size", 48),
    (r"state_size|d_state", 4),
    (r"hidden_size|d_model|n_embd|embed(ding)?_(dim|size)|hidden_dim|^dim$|projection_dim|width|lru_width", 32),
]
_DERIVED = ("per_layer_config", "transformers_version", "architectures")  # of the other fields
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def names() -> list[str]:
    """All model types."""
    return sorted(CONFIG_MAPPING_NAMES)


def shrink(values: dict[str, Any]) -> dict[str, Any]:
    """A config's fields with small sizes, whatever the model; two blocks of each kind where kinds alternate."""
    small = {key: _small(key, value) for key, value in values.items() if key not in _DERIVED}
    depth = next((len(small[key]) for key in _PER_LAYER if isinstance(small.get(key), list)), 4)
    if "kv_lora_rank" in small and "num_key_value_heads" in small:
        small["num_key_value_heads"] = small["num_attention_heads"]
    for key in ("num_hidden_layers", "num_layers"):
        if isinstance(before := values.get(key), int):
            small[key] = min(before, depth)
            for other, value in values.items():  # such as one width for each layer
                if isinstance(value, list) and len(value) == before and other not in _PER_LAYER:
                    small[other] = small[other][: small[key]]
    return small


def _small(key: str, value: Any) -> Any:
    if isinstance(value, dict):
        return shrink(value) if key.endswith("config") or "model_type" in value else value
    if key in _PER_LAYER and isinstance(value, list):
        return list(dict.fromkeys(value)) * 2
    if key.endswith(("token_id", "token_index")):
        return value if value is None or isinstance(value, list) else min(value, _TOKENS.get(key, 3))
    if isinstance(value, list | tuple) and re.search("intermediate|depths|heads", key):
        return [2 if "heads" in key else _small(key, member) for member in value]
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    size = next((size for pattern, size in _SIZES if re.search(pattern, key)), value)
    return min(value, size)


def build(model_type: str) -> nn.Module:
    """The shrunken model."""
    default = CONFIG_MAPPING[model_type]()
    config: PretrainedConfig = type(default).from_dict(shrink(default.to_dict()))
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModel.from_config(config).parameters())
    if size > PARAMETERS:
        raise ValueError(f"{size} parameters in the smallest model that could be made")
    torch.manual_seed(0)
    model = AutoModel.from_config(config, attn_implementation="eager")
    with suppress(Exception):  # models without experts
        model.set_experts_implementation("eager")
    return model


def inputs_of(model: nn.Module) -> list[dict[str, Any]]:
    """What the model's forward may take, to be tried in turn."""
    torch.manual_seed(1)
    config = model.config
    tokens = torch.randint(4, 90, (2, 8))
    image = getattr(config, "image_size", None) or getattr(getattr(config, "vision_config", None), "image_size", 32)
    height, width = image if isinstance(image, list | tuple) else (image, image)
    pixels = torch.randn(2, getattr(config, "num_channels", 3), height, width)
    mels = getattr(config, "num_mel_bins", None) or getattr(config, "feature_size", 80)
    sound = torch.randn(2, mels, 2 * getattr(config, "max_source_positions", 16))
    text = {"input_ids": tokens}
    known = [
        text,
        {**text, "decoder_input_ids": tokens[:, :5]},
        {"pixel_values": pixels},
        {**text, "pixel_values": pixels},
        {"input_features": sound, "decoder_input_ids": tokens[:, :5]},
        {"input_features": sound.transpose(1, 2)},
        {"input_values": torch.randn(2, 800)},
        {"input_values": torch.randn(2, 1, 64, 64)},
    ]
    return [inputs for inputs in known if model.main_input_name in inputs]
