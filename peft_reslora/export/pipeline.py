"""Exports for diffusers: under which names a pipeline reads them, and one file for several of its models."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from peft_reslora.export.checkpoint import DIFFUSERS_FILE, LoraExport
from peft_reslora.export.report import pipeline_card
from peft_reslora.shared.files import CARD_FILE, replaced_folder

# Of transformers' models those that pipelines hold as text encoders, and with which names; of two in one pipeline, as
# in SDXL, the second is the one with a projection. For other models of theirs, diffusers (0.42.1) reads no LoRA.
_TEXT_ENCODERS = {"CLIPTextModel": "text_encoder", "CLIPTextModelWithProjection": "text_encoder_2"}


def diffusers_prefix(base_model: nn.Module) -> str | None:
    """What a diffusers pipeline puts before the names of such a model's layers; None for other models."""
    for kind in type(base_model).__mro__:
        if kind.__module__.split(".")[0] == "transformers" and kind.__name__ in _TEXT_ENCODERS:
            # transformers 5 has taken `text_model` out of the names; diffusers takes it away where the model lacks it.
            return _TEXT_ENCODERS[kind.__name__] + ("" if hasattr(base_model, "text_model") else ".text_model")
    names = {c.__name__ for c in type(base_model).__mro__ if c.__module__.split(".")[0] == "diffusers"}
    if "ModelMixin" not in names:
        return None
    return "unet" if any("UNet" in name for name in names) else "transformer"


def save_for_pipeline(save_directory: str | os.PathLike[str], components: Mapping[str, LoraExport]) -> None:
    """Write the exports of several models of one diffusers pipeline as one file, with a model card.

    `pipeline.load_lora_weights(save_directory)` reads it. Either the whole folder appears or nothing changes.

    Args:
        save_directory: a new or an empty folder.
        components: the exports by the pipeline's own names of the models: 'unet' or 'transformer', 'text_encoder',
            'text_encoder_2'.

    Raises:
        ValueError: if there is nothing to write, an export is of a model that no pipeline holds under that name, or
            the folder holds something.
    """
    folder, tensors = Path(save_directory), {}
    if not components:
        raise ValueError("There is nothing to write; give components={'unet': export_lora(pipeline.unet), ...}.")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds files, which would be replaced. Give a new or an empty folder.")
    for name, export in components.items():
        own = export.diffusers_prefix
        if own is None or _kind(own) != _kind(name):
            raise ValueError(
                f"components[{name!r}] is the export of a model that pipelines hold as {own or 'none of theirs'}. "
                "Give each export under the name of its model in the pipeline."
            )
        tensors.update(export.pipeline_tensors(".".join([name, *own.split(".")[1:]])))
    config, reports = export.config, {name: export.report for name, export in components.items()}
    with replaced_folder(folder, (DIFFUSERS_FILE, CARD_FILE)) as new:
        save_file(tensors, new / DIFFUSERS_FILE, metadata={"format": "pt"})
        (new / CARD_FILE).write_text(pipeline_card(config, reports), encoding="utf-8")


def _kind(name: str) -> str:
    """Of 'text_encoder_2.text_model' the 'text_encoder'."""
    return re.sub(r"_\d+$", "", name.split(".")[0])
