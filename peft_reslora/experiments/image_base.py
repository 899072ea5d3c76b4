"""What makes images of captions: a model, what it is told of captions, a noise schedule, and an autoencoder if any."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

from peft_reslora.experiments.denoising import DenoisingTransformer, DenoisingUNet
from peft_reslora.experiments.hub_base import reading_base
from peft_reslora.experiments.image_captions import (
    Captions,
    ClipCaptions,
    ClipsAndT5Captions,
    Conditions,
    TextEncoder,
    TwoClipsCaptions,
)
from peft_reslora.experiments.image_schedules import Diffusion, Flow, Schedule
from peft_reslora.experiments.images import image_settings
from peft_reslora.experiments.settings import BaseSettings, DataSettings, ImageSettings

_BATCH = 16
_DRAWN = 2**30  # where the seeds of generated images begin, beyond those of training rows


@dataclass(frozen=True)
class ImageBase:
    """A denoising model and what it needs, all frozen; without `vae` it works on pixels."""

    model: Any
    captions: Captions
    schedule: Schedule
    vae: Any = None


@dataclass(frozen=True)
class _Pipeline:
    """The parts of which a pipeline of diffusers consists.

    Args:
        part: its name of the model that is trained, which is the folder too.
        model: the class of that.
        schedule: the objective it was trained with.
        text_models: the classes of its text encoders, in their order.
        captions: what the model takes of them.
    """

    part: str
    model: Any
    schedule: type[Diffusion] | type[Flow]
    text_models: tuple[Any, ...]
    captions: type[Captions]


_PIPELINES = {
    "StableDiffusionPipeline": _Pipeline("unet", DenoisingUNet, Diffusion, (CLIPTextModel,), ClipCaptions),
    "StableDiffusionXLPipeline": _Pipeline(
        "unet", DenoisingUNet, Diffusion, (CLIPTextModel, CLIPTextModelWithProjection), TwoClipsCaptions
    ),
    "StableDiffusion3Pipeline": _Pipeline(
        "transformer",
        DenoisingTransformer,
        Flow,
        (CLIPTextModelWithProjection, CLIPTextModelWithProjection, T5EncoderModel),
        ClipsAndT5Captions,
    ),
}


def load_pipeline(name: str, dtype: str) -> ImageBase:
    """The parts of a saved pipeline: Stable Diffusion 1, 2, XL and 3.

    The autoencoder and CLIP compute in float32, in which XL's autoencoder does not overflow; T5, which is larger than
    most models that are trained here, in `dtype`.

    Raises:
        ValueError: for a pipeline of another class.
    """
    with reading_base(name):
        kind, config = _pipeline_of(name)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        vae = AutoencoderKL.from_pretrained(name, subfolder="vae").eval().to(device)
        encoders = [
            _text_encoder(name, model, f"_{number}" if number > 1 else "", dtype)
            for number, model in enumerate(kind.text_models, start=1)
        ]
        for encoder in encoders:
            encoder.model.to(device)
        model = kind.model.from_pretrained(name, subfolder=kind.part, torch_dtype=getattr(torch, dtype)).eval()
        return ImageBase(model, kind.captions(encoders, config), kind.schedule.load(name, latent=True), vae)


def _pipeline_of(name: str) -> tuple[_Pipeline, Mapping[str, Any]]:
    config = DiffusionPipeline.load_config(name)
    if (found := config.get("_class_name")) not in _PIPELINES:
        known = ", ".join(f"the {kind.part} of {pipeline}" for pipeline, kind in _PIPELINES.items())
        raise ValueError(f"base.name={name} is a {found}; text_to_image trains {known}.")
    return _PIPELINES[found], config


def _text_encoder(folder: str, model: Any, suffix: str, dtype: str = "float32") -> TextEncoder:
    kept = {"dtype": dtype} if model is T5EncoderModel else {}
    encoder = model.from_pretrained(folder, subfolder=f"text_encoder{suffix}", **kept).eval()
    return TextEncoder(encoder, AutoTokenizer.from_pretrained(folder, subfolder=f"tokenizer{suffix}"))


def load_parts(folder: str) -> ImageBase:
    """A UNet on pixels that was trained here, with its text encoder, from the subfolders of diffusers' pipelines."""
    unet = DenoisingUNet.from_pretrained(folder, subfolder="unet").eval()
    return ImageBase(unet, ClipCaptions([_text_encoder(folder, CLIPTextModel, "")]), Diffusion.load(folder))


def build_unet(settings: BaseSettings, data: DataSettings) -> Any:
    """The UNet of `base`'s sizes, on pixels, for the text encoder's width."""
    width = CLIPTextConfig(**settings.text_encoder).hidden_size
    shapes = {"sample_size": image_settings(data).size, "in_channels": 3, "out_channels": 3}
    return DenoisingUNet(**shapes, cross_attention_dim=width, **settings.fields)


def empty_model(settings: BaseSettings, data: DataSettings) -> Any:
    """The model on the meta device; of a pipeline, only configs are read.

    Raises:
        ValueError: as `load_pipeline`.
    """
    with torch.device("meta"):
        if settings.name is None:
            return build_unet(settings, data)
        kind, _ = _pipeline_of(settings.name)
        return kind.model.from_config(kind.model.load_config(settings.name, subfolder=kind.part))


def encoded(base: ImageBase, images: Iterable[Tensor]) -> Tensor:
    """Images from -1 to 1, one after the other, as the model sees them: `(images, channels, height, width)`."""
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
def generated(
    model: nn.Module, base: ImageBase, captions: Conditions, empty: Conditions, settings: ImageSettings
) -> Tensor:
    """An image for each caption, from noise that depends on its place only: shape `(captions, 3, size, size)`.

    By the schedule's sampler, without noise on the way, guided away from the empty caption (arXiv 2207.12598, Eq. 6).

    Args:
        model: the base's model with or without an adapter.
        base: the other parts.
        captions: conditions of the captions, a row for each.
        empty: those without a caption, one row.
        settings: steps and the scale of the guidance.
    """
    was_training = model.training
    model.eval()
    count = len(next(iter(captions.values())))
    parts = [({name: v[i : i + _BATCH] for name, v in captions.items()}, i) for i in range(0, count, _BATCH)]
    found = [_generated(model, base, part, empty, settings, first) for part, first in parts]
    model.train(was_training)
    return torch.cat(found)


def _generated(
    model: nn.Module, base: ImageBase, captions: Conditions, empty: Conditions, settings: ImageSettings, first: int
) -> Tensor:
    device = _device(model)
    sampler = base.schedule.sampler(settings.sampling_steps)
    both = {n: torch.cat([empty[n].expand_as(value), value]).to(device) for n, value in captions.items()}
    latents = starting_noise(base, settings, range(first, first + len(next(iter(captions.values())))))
    for timestep in sampler.timesteps:
        inputs = torch.cat([latents, latents]).to(device)
        times = timestep.to(device).expand(len(inputs))
        found = model(sample=inputs, timestep=times, **both).sample.cpu()
        without, wanted = found.to(torch.promote_types(found.dtype, torch.float32)).chunk(2)
        latents = sampler.step(without + settings.guidance * (wanted - without), timestep, latents).prev_sample
    return decoded(base, latents)


def starting_noise(base: ImageBase, settings: ImageSettings, places: Iterable[int]) -> Tensor:
    """From which the images at these places are drawn: `(places, channels, height, width)`."""
    side = settings.size if base.vae is None else settings.size // 2 ** (len(base.vae.config.block_out_channels) - 1)
    shape = (int(base.model.config.in_channels), side, side)
    return torch.stack([torch.randn(shape, generator=_seeded(_DRAWN + place)) for place in places])


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
