"""Pipelines of diffusers with a few thousand random weights, and all the parts of the real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from peft_reslora.experiments.tokenizers import train_bpe

_WIDTH, _POOLED = 16, 12
_CAPTIONS = ["red tile", "blue square"]


def save_pipeline(folder: Path, kind: str = "StableDiffusionPipeline", **scheduler: Any) -> Path:
    """A pipeline of this class in a folder; its scheduler has the fields that are given."""
    torch.manual_seed(0)
    parts = {
        "StableDiffusionPipeline": _stable_diffusion,
        "StableDiffusionXLPipeline": _stable_diffusion_xl,
        "StableDiffusion3Pipeline": _stable_diffusion_3,
    }[kind](scheduler)
    getattr(diffusers, kind)(**parts).save_pretrained(folder)
    return folder


def _stable_diffusion(scheduler: dict[str, Any]) -> dict[str, Any]:
    return {
        "unet": _unet(cross_attention_dim=_WIDTH),
        "vae": _vae(),
        **_encoder("", CLIPTextModel),
        "scheduler": diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1, **_betas(), **scheduler),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def _stable_diffusion_xl(scheduler: dict[str, Any]) -> dict[str, Any]:
    unet = _unet(
        cross_attention_dim=2 * _WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=2,
        projection_class_embeddings_input_dim=_POOLED + 6 * 2,
    )
    return {
        "unet": unet,
        "vae": _vae(),
        **_encoder("", CLIPTextModel),
        **_encoder("_2", CLIPTextModelWithProjection),
        "scheduler": diffusers.EulerDiscreteScheduler(
            steps_offset=1, timestep_spacing="leading", **_betas(), **scheduler
        ),
    }


def _stable_diffusion_3(scheduler: dict[str, Any]) -> dict[str, Any]:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=4,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=40,
        caption_projection_dim=16,
        pooled_projection_dim=2 * _POOLED,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    tokenizer = train_bpe(_CAPTIONS, 300)
    sizes = {"d_model": 40, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    return {
        "transformer": transformer,
        "vae": _vae(shift_factor=0.1),
        **_encoder("", CLIPTextModelWithProjection),
        **_encoder("_2", CLIPTextModelWithProjection),
        "text_encoder_3": T5EncoderModel(T5Config(vocab_size=len(tokenizer), **sizes)),
        "tokenizer_3": tokenizer,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
    }


def _betas() -> dict[str, Any]:
    return {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def _unet(**more: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=2,
        **more,
    )


def _vae(**more: Any) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        **more,
    )


def _encoder(suffix: str, kind: Any) -> dict[str, Any]:
    """A CLIP of two layers, and its tokenizer."""
    tokenizer = train_bpe(_CAPTIONS, 300)
    tokenizer.model_max_length = 77
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=77,
        hidden_size=_WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=_POOLED,
        **special,
    )
    return {f"text_encoder{suffix}": kind(config), f"tokenizer{suffix}": tokenizer}
