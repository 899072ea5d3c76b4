"""A small UNet and its text encoder, trained from scratch on images with captions; kept by their content."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerBase

from peft_reslora.experiments.image_base import ImageBase, build_unet, load_parts
from peft_reslora.experiments.image_captions import ClipCaptions, TextEncoder, tokens_of
from peft_reslora.experiments.image_schedules import Diffusion, Schedule
from peft_reslora.experiments.images import all_pixels, as_array, caption_of, other_families
from peft_reslora.experiments.pretraining import cache_folder
from peft_reslora.experiments.provenance import fingerprint
from peft_reslora.experiments.settings import BaseSettings, DataSettings, PretrainSettings
from peft_reslora.experiments.tokenizers import train_bpe
from peft_reslora.shared.files import replaced_folder

_FOLDERS = ("unet", "text_encoder", "tokenizer", "scheduler")
_WITHOUT_CAPTION = 0.1  # share of the rows, for guidance (arXiv 2207.12598)
_LONGEST_TEXT = 77


def pretrained_images(settings: BaseSettings, pretrain: PretrainSettings, data: DataSettings) -> ImageBase:
    """The base, from the cache if the same was trained before on the same images and captions."""
    split = other_families(data)
    images, captions = all_pixels(split, data), [caption_of(data, row) for row in split.rows]
    what = {name: getattr(pretrain, name) for name in ("steps", "rate", "batch")}
    seen = [as_array(image).tobytes().hex() for image in images]
    sizes = [settings.fields, settings.text_encoder, settings.vocabulary, data.max_length]
    folder = cache_folder() / fingerprint(["images", seen, captions, what, *sizes])
    if not (folder / "scheduler").is_dir():
        tokenizer = train_bpe(captions, settings.vocabulary)
        parts = _untrained(settings, data, tokenizer)
        _train(parts, pretrain, images, tokens_of(tokenizer, [*captions, ""], data.max_length))
        with replaced_folder(folder, _FOLDERS) as new:
            saved: list[Any] = [parts.model, _text_encoder(parts), tokenizer, parts.schedule.scheduler]
            for name, part in zip(_FOLDERS, saved, strict=True):
                part.save_pretrained(str(new / name))
    return load_parts(str(folder))


def _untrained(settings: BaseSettings, data: DataSettings, tokenizer: PreTrainedTokenizerBase) -> ImageBase:
    torch.manual_seed(0)
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    sizes = {"max_position_embeddings": _LONGEST_TEXT, **special, **settings.text_encoder}
    text_encoder = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **sizes))
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")  # for small images (arXiv 2102.09672)
    captions = ClipCaptions([TextEncoder(text_encoder, tokenizer)])
    return ImageBase(build_unet(settings, data), captions, Diffusion(scheduler))


def _text_encoder(base: ImageBase) -> Any:
    return base.captions.encoders[0].model


def _train(base: ImageBase, pretrain: PretrainSettings, images: Tensor, tokens: Tensor) -> None:
    """AdamW with warmup and a linear decay, UNet and text encoder together; the last row of `tokens` is empty."""
    models = nn.ModuleList([base.model, _text_encoder(base)]).train()
    optimizer = torch.optim.AdamW(models.parameters(), lr=pretrain.rate, weight_decay=0.01)
    batches = _batches(base.schedule, images, pretrain.batch)
    for step in tqdm(range(pretrain.steps), desc="pretraining", unit="step"):
        share = min((step + 1) / max(1, pretrain.steps // 20), (pretrain.steps - step) / pretrain.steps)
        for group in optimizer.param_groups:
            group["lr"] = pretrain.rate * share
        batch, rows = next(batches)
        states = _text_encoder(base)(input_ids=tokens[rows]).last_hidden_state
        base.model(**batch, encoder_hidden_states=states).loss.backward()
        torch.nn.utils.clip_grad_norm_(models.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    models.eval()


def _batches(schedule: Schedule, images: Tensor, size: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Noisy images in random order, half of them mirrored, and the rows of their captions."""
    generator = torch.Generator().manual_seed(0)
    while True:
        for rows in torch.randperm(len(images), generator=generator).split(size):
            mirrored, nameless = torch.rand(2, len(rows), generator=generator) < torch.tensor(
                [[0.5], [_WITHOUT_CAPTION]]
            )
            clean = torch.where(mirrored[:, None, None, None], images[rows].flip(-1), images[rows])
            noise = torch.randn(clean.shape, generator=generator)
            levels = torch.randint(schedule.levels, (len(rows),), generator=generator)
            sample, timestep, target = schedule.noisy(clean, noise, levels)
            yield {"sample": sample, "timestep": timestep, "labels": target}, rows.masked_fill(nameless, -1)
