"""What makes images of captions: a UNet, the encoder of its captions, a noise schedule, and an autoencoder if any."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiffusionPipeline
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerBase

from peft_reslora.experiments.denoising import DenoisingUNet
from peft_reslora.experiments.hub_base import reading_base
from peft_reslora.experiments.images import image_settings
from peft_reslora.experiments.settings import BaseSettings, DataSettings, ImageSettings

_BATCH = 16
_DRAWN = 2**30  # where the seeds of generated images begin, beyond those of training rows
_PIPELINES = ("StableDiffusionPipeline",)


@dataclass(frozen=True)
class ImageBase:
    """UNet, text encoder, DDPM schedule and autoencoder, all frozen; without `vae` the UNet works on pixels."""

    unet: Any
    text_encoder: Any
    tokenizer: PreTrainedTokenizerBase
    schedule: Any
    vae: Any = None


def load_pipeline(name: str, dtype: str) -> ImageBase:
    """The parts of a saved pipeline with one text encoder and a UNet: Stable Diffusion 1 and 2.

    Raises:
        ValueError: for a pipeline of another class.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with reading_base(name):
        _check_pipeline(name)
        base = load_parts(name, dtype, AutoencoderKL.from_pretrained(name, subfolder="vae").eval().to(device))
    base.text_encoder.to(device)
    return base


def _check_pipeline(name: str) -> None:
    kind = DiffusionPipeline.load_config(name).get("_class_name")
    if kind not in _PIPELINES:
        raise ValueError(f"base.name={name} is a {kind}; text_to_image trains the UNet of {', '.join(_PIPELINES)}.")


def load_parts(folder: str, dtype: str = "float32", vae: Any = None) -> ImageBase:
    """UNet, text encoder, tokenizer and schedule from the subfolders in which diffusers saves them."""
    unet = DenoisingUNet.from_pretrained(folder, subfolder="unet", torch_dtype=getattr(torch, dtype)).eval()
    text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, subfolder="tokenizer")
    return ImageBase(unet, text_encoder, tokenizer, DDPMScheduler.from_pretrained(folder, subfolder="scheduler"), vae)


def build_unet(settings: BaseSettings, data: DataSettings) -> Any:
    """The UNet of `base`'s sizes, on pixels, for the text encoder's width."""
    width = CLIPTextConfig(**settings.text_encoder).hidden_size
    shapes = {"sample_size": image_settings(data).size, "in_channels": 3, "out_channels": 3}
    return DenoisingUNet(**shapes, cross_attention_dim=width, **settings.fields)


def empty_unet(settings: BaseSettings, data: DataSettings) -> Any:
    """The UNet on the meta device; of a pipeline, only configs are read.

    Raises:
        ValueError: as `load_pipeline`.
    """
    with torch.device("meta"):
        if settings.name is None:
            return build_unet(settings, data)
        _check_pipeline(settings.name)
        return DenoisingUNet.from_config(DenoisingUNet.load_config(settings.name, subfolder="unet"))


def tokens_of(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], length: int) -> Tensor:
    """Ids, cut and padded to `length`: shape `(captions, length)`."""
    encoded = tokenizer(list(captions), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    ids: Tensor = encoded["input_ids"]
    return ids


def embedded(base: ImageBase, captions: Sequence[str], settings: DataSettings) -> Tensor:
    """What the UNet attends to: shape `(captions, max_length, width)`.

    Raises:
        ValueError: if `max_length` is more than the text encoder takes; where `too_long` is "refuse", for the first
            caption that is longer than it.
    """
    limit = int(base.text_encoder.config.max_position_embeddings)
    if settings.max_length > limit:
        raise ValueError(f"data.max_length={settings.max_length} is more than the {limit} tokens the model takes.")
    if settings.too_long == "refuse":
        for caption in captions:
            if (length := len(base.tokenizer(caption)["input_ids"])) > settings.max_length:
                raise ValueError(
                    f"{caption[:60]!r}: {length} tokens, more than data.max_length={settings.max_length}."
                )
    ids = tokens_of(base.tokenizer, captions, settings.max_length).to(_device(base.text_encoder))
    return torch.cat([base.text_encoder(input_ids=part).last_hidden_state.cpu() for part in ids.split(_BATCH)])


def encoded(base: ImageBase, images: Iterable[Tensor]) -> Tensor:
    """Images from -1 to 1, one after the other, as the UNet sees them: `(images, channels, height, width)`."""
    return torch.stack([_encoded(base.vae, image) for image in images])


def _encoded(vae: Any, image: Tensor) -> Tensor:
    if vae is None:
        return image
    latents: Tensor = vae.encode(image[None].to(_device(vae))).latent_dist.mode()[0]
    return (latents.cpu() - _shift(vae)) * vae.config.scaling_factor


def decoded(base: ImageBase, latents: Tensor) -> Tensor:
    """Images from -1 to 1: the inverse of `encoded`."""
    if base.vae is None:
        return latents.clamp(-1, 1)
    vae = base.vae
    scaled = latents / vae.config.scaling_factor + _shift(vae)
    return torch.cat([vae.decode(one[None].to(_device(vae))).sample.cpu() for one in scaled]).clamp(-1, 1)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _shift(vae: Any) -> float:
    return float(vae.config.shift_factor or 0.0)


@torch.no_grad()
def generated(model: nn.Module, base: ImageBase, texts: Tensor, empty: Tensor, settings: ImageSettings) -> Tensor:
    """An image for each caption, from noise that depends on its place only: shape `(captions, 3, size, size)`.

    DDIM without noise on the way (arXiv 2010.02502), guided away from the empty caption (arXiv 2207.12598, Eq. 6).

    Args:
        model: the base's UNet with or without an adapter.
        base: the other parts.
        texts: states of the captions, shape `(captions, tokens, width)`.
        empty: of the empty caption, shape `(1, tokens, width)`.
        settings: steps and the scale of the guidance.
    """
    was_training = model.training
    model.eval()
    found = [_generated(model, base, texts[i : i + _BATCH], empty, settings, i) for i in range(0, len(texts), _BATCH)]
    model.train(was_training)
    return torch.cat(found)


def _generated(
    model: nn.Module, base: ImageBase, texts: Tensor, empty: Tensor, settings: ImageSettings, first: int
) -> Tensor:
    device = _device(model)
    schedule: Any = DDIMScheduler.from_config(base.schedule.config)
    schedule.set_timesteps(settings.sampling_steps)
    config: Any = base.unet.config
    side = settings.size if base.vae is None else settings.size // 2 ** (len(base.vae.config.block_out_channels) - 1)
    shape = (int(config.in_channels), side, side)
    latents = torch.stack([torch.randn(shape, generator=_seeded(_DRAWN + first + i)) for i in range(len(texts))])
    both = torch.cat([empty.expand(len(texts), -1, -1), texts]).to(device)
    for timestep in schedule.timesteps:
        inputs = schedule.scale_model_input(torch.cat([latents, latents]), timestep).to(device)
        times = timestep.to(device).expand(len(inputs))
        found = model(sample=inputs, timestep=times, encoder_hidden_states=both).sample.float().cpu()
        without, wanted = found.chunk(2)
        latents = schedule.step(without + settings.guidance * (wanted - without), timestep, latents).prev_sample
    return decoded(base, latents)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
