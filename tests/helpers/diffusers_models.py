"""The model classes of the installed diffusers, each in a small size, and what their forwards may be given.

Sizes and inputs are guessed from the names of arguments. To make that possible, all widths are the same, of tokens and
of what they are conditioned on; where names do not tell, `_CASES` does.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from diffusers import models
from diffusers.models.modeling_utils import LegacyModelMixin, ModelMixin
from helpers.convolutions import CONVOLUTIONS
from torch import nn

WIDTH = 32  # two heads of 16
TEXT = 5  # tokens of a prompt
CONVOLVED = ", convolutions too"
PARAMETERS = 5_000_000  # of one model

# The first pattern that is found in an argument's name gives its size; sizes that are smaller already stay.
_SIZES: list[tuple[str, int]] = [
    (r"^ch$", WIDTH),
    (r"^((audio_|cond_)?(in|out)|latent|io|input|output|base|z)_?(channels?|dims?)$|(in|out)_(visual|audio)_dim", 4),
    (r"conditioning_channels|rate|hop|compression|sampling_|(up|down)sample|scal", 10**9),
    (r"freq_dim|max_pos|theta|bins|padding|mult", 10**9),
    (r"groups$", 4),
    (r"vocab|num_embeds|codebook|num_vq|num_embeddings|classes", 64),
    (r"heads?$", 2),
    (r"head_dim|dim_head|d_kv|rotary_dim", 16),
    (r"experts|per_block|refiner|(enc|dec|res)_blocks", 2),
    (r"layers|depth$|blocks?$", 3),
    (r"sample|input_size|image_size|max_size|resolution", 8),
    (r"length|max_seq|_len$|pos_embed", 64),
    (r"dim|channels|hidden|width|intermediate|d_model|d_ff|size$", WIDTH),
]
_ROTARY = {1: (16,), 2: (8, 8), 3: (8, 4, 4), 4: (4, 4, 4, 4)}  # how a head's dimensions are shared out

_TOKENS = torch.arange(2 * TEXT).reshape(2, TEXT)
_GRID = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))  # of 16 patches
_ALL = torch.ones(2, TEXT, dtype=torch.bool)
_VIDEO = (2, 4, 2, 8, 8)

# Arguments of the constructor and of the forward that names alone do not tell. Of the latter, a tuple is the shape of
# random numbers, also within a list.
_CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "AceStepTransformer1DModel": ({"in_channels": 12}, {"hidden_states": (2, 16, 4), "context_latents": (2, 16, 8)}),
    "AnimaTextConditioner": ({}, {"source_hidden_states": (2, TEXT, WIDTH), "target_input_ids": _TOKENS}),
    "AnyFlowFARTransformer3DModel": (
        {},
        {
            "hidden_states": (2, 2, 4, 8, 8),
            "timestep": torch.ones(2, 2),
            "r_timestep": torch.zeros(2, 2),
            "chunk_partition": [1, 1],
        },
    ),
    "AnyFlowTransformer3DModel": (
        {},
        {"hidden_states": (2, 2, 4, 8, 8), "timestep": torch.ones(2, 2), "r_timestep": torch.zeros(2, 2)},
    ),
    "AutoencoderDC": (
        {
            "encoder_block_out_channels": (16, 16, 16, 32, 32, 32),
            "decoder_block_out_channels": (16, 16, 16, 32, 32, 32),
        },
        {},
    ),
    "AutoencoderKLHunyuanImageRefiner": ({"block_out_channels": (16, 16, 16, 32, 32)}, {}),
    "AutoencoderKLHunyuanVideo15": ({"block_out_channels": (16, 16, 16, 32, 32)}, {}),
    # Of less, the inner maps have one pixel, and their norms divide by the variance of a single number.
    "AutoencoderKLKVAE": ({}, {"sample": (1, 3, 32, 32)}),
    "AutoencoderKLMochi": (
        {"encoder_block_out_channels": (32, 32, 32, 32), "decoder_block_out_channels": (32, 32, 32, 32)},
        {},
    ),
    "AutoencoderKLTemporalDecoder": ({"block_out_channels": (32,)}, {"num_frames": 1}),
    "AutoencoderTiny": (
        {"encoder_block_out_channels": (16, 16, 16, 16), "decoder_block_out_channels": (16, 16, 16, 16)},
        {},
    ),
    "AutoencoderKLHunyuanImage": (
        {
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 4,
            "block_out_channels": (32, 32, 32, 32),
            "layers_per_block": 2,
            "spatial_compression_ratio": 8,
            "sample_size": 32,
        },
        {},
    ),
    "BriaFibo2Transformer2DModel": (
        {
            "injection_layer_ids": (0, 1, 2),
            "min_num_gist_tokens": 4,
            "max_num_gist_tokens": 8,
            "gist_step": 4,
            "gist_min_text_len": 4,
            "gist_max_text_len": 64,
        },
        {},
    ),
    "BriaFiboTransformer2DModel": (
        {},
        {"hidden_states": (2, 16, 4), "text_encoder_layers": [(2, TEXT, WIDTH)] * 6, "pooled_projections": None},
    ),
    "CogVideoXTransformer3DModel": ({"max_text_seq_length": TEXT}, {"hidden_states": (2, 4, 4, 8, 8)}),
    "ConsisIDTransformer3DModel": ({"max_text_seq_length": TEXT}, {"hidden_states": (2, 4, 4, 8, 8)}),
    "ConsistencyDecoderVAE": ({}, {"sample": (1, 3, 32, 32)}),
    "ControlNetUnionModel": (
        {
            "addition_time_embed_dim": 16,
            "projection_class_embeddings_input_dim": 96,
            "num_trans_channel": 16,
            "num_proj_channel": 16,
        },
        {
            "controlnet_cond": [(2, 3, 64, 64)],
            "control_type": torch.eye(6)[:1].expand(2, 6),
            "control_type_idx": [0],
        },
    ),
    "CosmosTransformer3DModel": ({"concat_padding_mask": False, "extra_pos_embed_type": None}, {}),
    "DreamLiteTransformer2DModel": (
        {"in_channels": 32, "norm_num_groups": 4, "num_layers": 3},
        {"hidden_states": (2, 32, 4, 4)},
    ),
    "EasyAnimateTransformer3DModel": (
        {"in_channels": 4, "out_channels": 4, "patch_size": 2},
        {"hidden_states": _VIDEO, "encoder_hidden_states": (2, TEXT, WIDTH)},
    ),
    "ErnieImageTransformer2DModel": ({}, {"text_lens": torch.tensor([TEXT, TEXT])}),
    "FluxControlNetModel": ({}, {"controlnet_cond": (2, 16, 4)}),
    "GlmImageTransformer2DModel": (
        {},
        {
            "prior_token_id": torch.arange(32).reshape(2, 16),
            "prior_token_drop": torch.zeros(2, 16, dtype=torch.bool),
        },
    ),
    "HiDreamImageTransformer2DModel": (
        {
            "patch_size": 2,
            "caption_channels": [WIDTH, WIDTH],
            "axes_dims_rope": (8, 4, 4),
            "llama_layers": [0, 1, 2, 3, 4, 5],
            "max_resolution": (8, 8),
        },
        {"encoder_hidden_states_llama3": (6, 2, TEXT, WIDTH), "img_ids": None},
    ),
    "HunyuanDiT2DModel": (
        {"num_layers": 4, "in_channels": 4, "patch_size": 2, "text_len": TEXT, "text_len_t5": TEXT},
        {"hidden_states": (2, 4, 8, 8), "image_meta_size": (2, 6), "style": torch.zeros(2, dtype=torch.long)},
    ),
    "HunyuanDiT2DControlNetModel": (
        {"transformer_num_layers": 6, "in_channels": 4, "patch_size": 2, "text_len": TEXT, "text_len_t5": TEXT},
        {
            "hidden_states": (2, 4, 8, 8),
            "controlnet_cond": (2, 4, 8, 8),
            "image_meta_size": (2, 6),
            "style": torch.zeros(2, dtype=torch.long),
        },
    ),
    "HunyuanVideo15Transformer3DModel": (
        {},
        {
            "encoder_hidden_states_2": (2, TEXT, WIDTH),
            "encoder_attention_mask_2": _ALL,
            "image_embeds": (2, 3, WIDTH),
        },
    ),
    "HunyuanVideoFramepackTransformer3DModel": (
        {"has_clean_x_embedder": True, "has_image_proj": True},
        {
            "hidden_states": _VIDEO,
            "image_embeds": (2, 3, WIDTH),
            "indices_latents": torch.arange(2),
            "latents_clean": (2, 4, 1, 8, 8),
            "indices_latents_clean": torch.arange(1),
            "latents_history_2x": _VIDEO,
            "indices_latents_history_2x": torch.arange(2),
            "latents_history_4x": (2, 4, 4, 8, 8),
            "indices_latents_history_4x": torch.arange(4),
        },
    ),
    "I2VGenXLUNet": (
        {},
        {
            "sample": _VIDEO,
            "fps": torch.tensor([8, 8]),
            "image_latents": _VIDEO,
            "image_embeddings": (2, WIDTH),
            "encoder_hidden_states": (2, TEXT, WIDTH),
        },
    ),
    "Ideogram4Transformer2DModel": (
        {"mrope_section": (4, 2, 2)},
        {
            "hidden_states": (2, TEXT + 16, 4),
            "encoder_hidden_states": (2, TEXT + 16, WIDTH),
            "position_ids": torch.cat([torch.zeros(TEXT, 3), _GRID]).expand(2, -1, -1),
            "segment_ids": torch.zeros(2, TEXT + 16, dtype=torch.long),
            "indicator": torch.tensor([3] * TEXT + [2] * 16).expand(2, -1),
        },
    ),
    "JoyImageEditPlusTransformer3DModel": (
        {},
        {"hidden_states": (2, 4, 4, 1, 2, 2), "shape_list": [[(1, 2, 2)], [(1, 2, 2)]]},
    ),
    "Kandinsky5Transformer3DModel": (
        {},
        {
            "hidden_states": (2, 2, 8, 8, 4),
            "visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(4)],
            "text_rope_pos": torch.arange(TEXT),
        },
    ),
    "Kandinsky6Transformer3DModel": ({}, {"hidden_states": (2, 2, 8, 8, 9)}),
    "Kandinsky6SRTransformer3DModel": ({}, {"hidden_states": (2, 2, 8, 8, 9)}),
    "Krea2Transformer2DModel": (
        {},
        {
            "hidden_states": (2, 16, 4),
            "encoder_hidden_states": (2, TEXT, 3, WIDTH),
            "position_ids": torch.cat([torch.zeros(TEXT, 3), _GRID]),
        },
    ),
    "LTX2VideoTransformer3DModel": (
        {},
        {
            "hidden_states": (2, 16, 4),
            "audio_hidden_states": (2, 4, 4),
            "encoder_hidden_states": (2, TEXT, WIDTH),
            "audio_encoder_hidden_states": (2, TEXT, WIDTH),
            "num_frames": 1,
            "height": 4,
            "width": 4,
            "audio_num_frames": 4,
        },
    ),
    "LTXVideoTransformer3DModel": ({}, {"hidden_states": (2, 16, 4), "num_frames": 1, "height": 4, "width": 4}),
    "LatteTransformer3DModel": (
        {
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 2,
            "cross_attention_dim": WIDTH,
            "caption_channels": WIDTH,
            "norm_type": "ada_norm_single",
            "num_layers": 3,
            "video_length": 2,
        },
        {"hidden_states": _VIDEO, "encoder_attention_mask": None},
    ),
    "LuminaNextDiT2DModel": (
        {"multiple_of": 16, "ffn_dim_multiplier": 1.0, "num_kv_heads": 2},
        {
            "image_rotary_emb": torch.polar(torch.ones(8, 8, 8), torch.arange(512.0).reshape(8, 8, 8)),
            "cross_attention_kwargs": {},
        },
    ),
    "MiniMaxMusic3ConditionEncoder": ({}, {"hidden_states": (2, 3 * WIDTH, 16)}),
    "MiniMaxMusic3RVQDepthDecoder": ({}, {"inputs_embeds": (2, 4, WIDTH)}),
    "MiniMaxMusic3Transformer1DModel": ({}, {"hidden_states": (2, 4, 16), "encoder_hidden_states": (2, 16, WIDTH)}),
    "OmniGenTransformer2DModel": (
        {
            "pad_token_id": 0,
            "vocab_size": 99,
            "rope_scaling": {"type": "su", "long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
        },
        {
            "input_ids": _TOKENS + 4,
            "input_img_latents": [],
            "input_image_sizes": {},
            "attention_mask": torch.ones(2, TEXT + 17, TEXT + 17),
            "position_ids": torch.arange(TEXT + 17).expand(2, -1),
        },
    ),
    "PRXTransformer2DModel": ({"axes_dim": (8, 8)}, {}),
    "PriorTransformer": (
        {"num_embeddings": TEXT},
        {"hidden_states": (2, WIDTH), "proj_embedding": (2, WIDTH), "encoder_hidden_states": (2, TEXT, WIDTH)},
    ),
    "QwenImageControlNetModel": ({}, {"controlnet_cond": (2, 16, 4)}),
    "QwenImage21Transformer2DModel": (
        {},
        {"hidden_states": (2, 16, 4), "img_mask": torch.tensor([False] * TEXT + [True] * 4).expand(2, -1)},
    ),
    "SD3ControlNetModel": ({}, {"controlnet_cond": (2, 4, 8, 8)}),
    "SanaControlNetModel": ({}, {"controlnet_cond": (2, 4, 8, 8)}),
    "SanaWMTransformer3DModel": ({}, {"hidden_states": _VIDEO, "mask": torch.ones(2, TEXT)}),
    "SparseControlNetModel": (
        {},
        {
            "sample": _VIDEO,
            "encoder_hidden_states": (4, TEXT, WIDTH),
            "controlnet_cond": _VIDEO,
            "conditioning_mask": torch.ones(2, 1, 2, 8, 8),
        },
    ),
    "StableAudio3DiTModel": ({}, {"hidden_states": (2, 4, 16), "global_hidden_states": (2, WIDTH)}),
    "StableAudioDiTModel": ({}, {"hidden_states": (2, 4, 16), "global_hidden_states": (2, 1, WIDTH)}),
    "StableCascadeUNet": ({}, {"clip_text_pooled": (2, 1, WIDTH)}),
    "T5FilmDecoder": (
        {"targets_length": 8},
        {
            "encodings_and_masks": [(torch.ones(2, TEXT, WIDTH, dtype=torch.float64), torch.ones(2, TEXT))],
            "decoder_input_tokens": (2, 8, 4),
            "decoder_noise_time": torch.tensor([0.3, 0.7]),
        },
    ),
    "Transformer2DModel": (
        {"in_channels": 32, "norm_num_groups": 4, "cross_attention_dim": WIDTH, "num_layers": 3},
        {"hidden_states": (2, 32, 4, 4), "encoder_hidden_states": (2, TEXT, WIDTH)},
    ),
    "TransformerTemporalModel": (
        {"in_channels": 32, "norm_num_groups": 4, "num_layers": 3},
        {"hidden_states": (4, 32, 4, 4), "num_frames": 2},
    ),
    "UNet1DModel": (
        {"block_out_channels": (32, 32, 64), "extra_in_channels": 16, "time_embedding_dim": 16},
        {"sample": (2, 2, 64)},
    ),
    "UNetMotionModel": ({}, {"sample": _VIDEO, "encoder_hidden_states": (4, TEXT, WIDTH)}),
    "UNetSpatioTemporalConditionModel": (
        {
            "block_out_channels": (32, 32, 64, 64),
            "addition_time_embed_dim": 32,
            "projection_class_embeddings_input_dim": 96,
        },
        {"sample": (2, 2, 4, 8, 8), "added_time_ids": torch.ones(2, 3)},
    ),
    "UVit2DModel": (
        {"micro_cond_embed_dim": 5 * WIDTH, "in_channels": WIDTH, "block_out_channels": WIDTH},
        {
            "input_ids": torch.arange(128).reshape(2, 8, 8) % 60,
            "pooled_text_emb": (2, WIDTH),
            "micro_conds": torch.ones(2, 5),
        },
    ),
    "WanAnimateTransformer3DModel": ({"in_channels": 12, "latent_channels": 4}, {}),
    "WanVACETransformer3DModel": (
        {"vace_layers": [0, 1, 2], "vace_in_channels": 4},
        {"hidden_states": _VIDEO, "control_hidden_states": _VIDEO},
    ),
}

_REASONS = {
    "MotionAdapter": "holds weights for UNetMotionModel, which is swept",
    "ControlNetXSAdapter": "runs within UNetControlNetXSModel, which is swept",
    "ZImageControlNetModel": "takes its embedders from a ZImageTransformer2DModel, which is swept",
    "CosmosControlNetModel": "needs torchvision",
    "Cosmos3OmniTransformer": "takes tokens of several kinds, packed",
    "MiniMaxH3Transformer3DModel": "takes tokens of several kinds, packed",
    "WanAnimate2Transformer3DModel": "takes a cache of keys and values",
    "RFD4ProteinaTransformer": "takes features of proteins",
    "RFD4ProteinaAutoencoder": "takes features of proteins",
    "AutoencoderKLAllegro": "encodes in tiles of full size only",
}


@lru_cache(maxsize=1)
def model_classes() -> dict[str, type[ModelMixin]]:
    """All model classes of diffusers by name, whether or not the package exports them."""
    for module in pkgutil.walk_packages(models.__path__, "diffusers.models."):
        importlib.import_module(module.name)
    found: dict[str, type[ModelMixin]] = {}
    waiting: list[type[ModelMixin]] = [ModelMixin]
    while waiting:
        for kind in waiting.pop().__subclasses__():
            waiting.append(kind)
            if kind.__module__.startswith("diffusers.models.") and kind is not LegacyModelMixin:
                found[kind.__name__] = kind
    return dict(sorted(found.items()))


def names() -> list[str]:
    """The classes, and UNets for images a second time, to adapt their convolutions as well."""
    return [*model_classes(), *(name + CONVOLVED for name in ("UNet2DConditionModel", "UNet2DModel"))]


def build(name: str) -> nn.Module:
    """The class in a small size.

    Raises:
        ValueError: if it is none that runs by itself, or too large.
    """
    name = name.removesuffix(CONVOLVED)
    kind = model_classes()[name]
    parameters = inspect.signature(kind.__init__).parameters
    if "controlnets" in parameters or "adapters" in parameters:
        raise ValueError("holds several models of another class")
    if name in _REASONS:
        raise ValueError(_REASONS[name])
    sizes = {key: _small(key, parameter.default) for key, parameter in parameters.items()}
    sizes = {key: value for key, value in sizes.items() if value is not inspect.Parameter.empty}
    if "block_out_channels" in sizes and "attention_head_dim" in sizes:
        sizes["attention_head_dim"] = 8  # of which each block's width is a multiple
    sizes |= _CASES.get(name, ({}, {}))[0]
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind(**sizes).parameters())
    if size > PARAMETERS:
        raise ValueError(f"{size} parameters in the smallest model that could be made")
    torch.manual_seed(0)
    model = kind(**sizes)
    for module in model.modules():
        if isinstance(module, nn.Linear):  # some are handed float32 whatever the model's dtype is, and some by name
            module.register_forward_pre_hook(_in_dtype_of_weight, with_kwargs=True)
    return model


def _in_dtype_of_weight(module: nn.Linear, args: Any, kwargs: dict[str, torch.Tensor]) -> Any:
    return tuple(x.to(module.weight.dtype) for x in (*args, *kwargs.values())), {}


def _small(key: str, value: Any) -> Any:
    whole = isinstance(value, list | tuple) and bool(value) and all(type(member) is int for member in value)
    if whole and re.search(r"axes_dim|rope_dim|rope_axes_dim", key):
        return _ROTARY[len(value)]
    if whole and "channels" in key:  # of the blocks of a UNet: they grow, and the last ones are as large, as in SD's
        return type(value)(min(16 + 8 * n, WIDTH) for n in range(len(value)))
    if whole and re.search("heads|layers|depth|mult", key):
        return type(value)(min(member, 2) for member in value)
    if type(value) is not int:
        return value
    return min(value, next((size for pattern, size in _SIZES if re.search(pattern, key)), value))


def inputs_of(model: nn.Module) -> Iterator[dict[str, Any]]:
    """What the model's forward may take, to be tried in turn."""
    own = _CASES.get(type(model).__name__, ({}, {}))[1]
    first, *others = inspect.signature(model.forward).parameters.values()
    known = _known(model.config)
    channels = ("in_channels", "latent_channels", "input_channels", "in_visual_dim")
    sizes = [model.config[key] for key in channels if isinstance(model.config.get(key), int)]
    C = sizes[0] if sizes else 4
    images = [(2, C, 8, 8), (2, C, 2, 8, 8), (2, 2, C, 8, 8), (2, 16, C), (2, C, 16)]
    large = [(1, C, 32, 32), (1, C, 5, 32, 32), (1, C, 9, 64, 64), (1, C, 640)]
    mains = [own[first.name]] if first.name in own else images + large
    for optional in (False, True):  # whether what may be left out is given as well
        wanted = [p for p in others if optional or p.default is inspect.Parameter.empty or p.name in own]
        named = ((p.name, next((value for key, value in known if re.search(key, p.name)), None)) for p in wanted)
        rest = {key: value for key, value in named if value is not None} | own
        for main in mains:
            torch.manual_seed(1)
            values = {first.name: main, **{key: value for key, value in rest.items() if key != first.name}}
            yield {key: _random(value) for key, value in values.items()}


def _known(config: Any) -> list[tuple[str, Any]]:
    """The first pattern that is found in an argument's name gives its value."""
    axes = next((len(config[key]) for key in ("axes_dims_rope", "axes_dim_rope") if config.get(key)), 3)
    return [
        (r"controlnet_cond$", (2, 3, 64, 64)),
        (r"ref_fixed|block|_cond$", None),
        (r"timestep|^t$|ratio$", torch.tensor([3.0, 7.0])),
        (r"^guidance$", torch.tensor([1.0, 2.0]) if config.get("guidance_embeds") else None),
        (r"pooled", (2, WIDTH)),
        (r"(encoder_attention|encoder|encoder_hidden_states)_mask|text_embedding_mask", _ALL),
        (r"^img_ids$", torch.cat([torch.zeros(16, axes - 3), _GRID], 1)),
        (r"^txt_ids$", torch.zeros(TEXT, axes)),
        (r"encoder_hidden_states|cap_feats|text_bth", (2, TEXT, WIDTH)),
        (r"original_size|target_size|crop_coords", torch.full((2, 2), 16.0)),
        (r"conditioning_scale", 1.0),
        (r"img_shapes", [[(1, 4, 4)]] * 2),
        (r"class_labels", torch.tensor([1, 2])),
        (r"sample_posterior", False),
    ]


def _random(value: Any) -> Any:
    """Random numbers in place of each shape, in float64."""
    if isinstance(value, tuple) and value and all(type(size) is int for size in value):
        return torch.randn(value, dtype=torch.float64)
    if isinstance(value, list) and all(type(member) is tuple for member in value):
        return [_random(member) for member in value]
    return value.double() if isinstance(value, torch.Tensor) and value.dtype == torch.float32 else value


def targets_of(name: str, model: nn.Module) -> Any:
    """All linear layers; of autoencoders, or if the name says so, also convolutions in one group padded with zeros."""
    if not (name.endswith(CONVOLVED) or ".autoencoders." in type(model).__module__):
        return "all-linear"
    adapted = [nn.Linear, *CONVOLUTIONS.values()]
    layers = {name: module for name, module in model.named_modules() if type(module) in adapted}
    return [
        name
        for name, layer in layers.items()
        if isinstance(layer, nn.Linear) or (layer.groups == 1 and layer.padding_mode == "zeros")
    ]
