"""Text to image: a model learns the images of one family, and is measured on others of it that it has not seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from peft_reslora.experiments.data import Data, Split
from peft_reslora.experiments.denoising import NoisyRows, held_out_rows, stacked
from peft_reslora.experiments.image_base import ImageBase, encoded, generated, load_pipeline
from peft_reslora.experiments.image_grid import GridCallback
from peft_reslora.experiments.image_metrics import FixedEncoder, drift, similarity
from peft_reslora.experiments.image_pretraining import pretrained_images
from peft_reslora.experiments.images import caption_of, image_settings, load_image_data, other_families, pixels
from peft_reslora.experiments.settings import BaseSettings, DataSettings, TrainSettings
from peft_reslora.experiments.task import Batch, Task, outputs

METRIC = "denoising_loss"
_EVALUATION_BATCH = 64
_REFERENCE = 256  # training images whose mean the encoder takes off


@torch.no_grad()
def image_task(settings: TrainSettings) -> Task:
    """Read and decode the data, load or pretrain the base, and encode images and captions; nothing else of it trains.

    Raises:
        ValueError: for bad data, with file, row and column, before anything is loaded.
    """
    images = image_settings(settings.data)
    data = load_image_data(settings.data)
    base = load_image_base(settings.base, settings.data)
    told = {name: base.captions(captions, settings.data) for name, captions in _captions(data, settings).items()}
    latents = {name: encoded(base, pixels(split, settings.data)) for name, split in data.splits.items()}
    train = NoisyRows(base.schedule, latents["train"], told["train"], images.draws)
    held_out = {
        name: _batches(held_out_rows(base.schedule, latents[name], told[name], images.timesteps))
        for name in data.splits
        if name != "train"
    }
    drawing = Drawing(base, data, settings.data)
    return Task(
        settings.task,
        METRIC,
        base.model,
        data,
        train,
        stacked,
        _evaluation(held_out),
        drawing.drift if drawing.unrelated else None,
        hub_id=settings.base.name,
        lower_is_better=True,
        generated=drawing.similarity if "test" in data.splits else None,
        watch=drawing.watch,
    )


def load_image_base(settings: BaseSettings, data: DataSettings) -> ImageBase:
    """A pipeline by its name, or a UNet that is trained here first."""
    if settings.pretrain is not None:
        with torch.enable_grad():
            return pretrained_images(settings, settings.pretrain, data)
    return load_pipeline(str(settings.name), settings.dtype)


def _captions(data: Data, settings: TrainSettings) -> dict[str, list[str]]:
    return {n: [caption_of(settings.data, row) for row in split.rows] for n, split in data.splits.items()}


def _batches(rows: Sequence[dict[str, Tensor]]) -> list[Batch]:
    return [stacked(rows[i : i + _EVALUATION_BATCH]) for i in range(0, len(rows), _EVALUATION_BATCH)]


def _evaluation(batches: Mapping[str, Sequence[Batch]]) -> Callable[[nn.Module, str], dict[str, float]]:
    """Mean squared error of what is predicted, in percent of the noise's variance, which is 1."""
    wanted = {name: torch.cat([batch["labels"] for batch in parts]) for name, parts in batches.items()}

    def evaluate(model: nn.Module, split: str) -> dict[str, float]:
        predicted = outputs(model, batches[split], "sample")
        return {METRIC: 100 * float((predicted.double() - wanted[split].double()).square().mean())}

    return evaluate


class Drawing:
    """What is measured and shown of generated images; the same noise for every model."""

    def __init__(self, base: ImageBase, data: Data, settings: DataSettings) -> None:
        images = image_settings(settings)
        self._base, self._settings, self._images = base, settings, images
        self._split = data.splits.get("test", data.splits["train"])
        self._encoder = FixedEncoder(torch.stack(list(pixels(_first(data.splits["train"], _REFERENCE), settings))))
        self.unrelated = unrelated_captions(settings)
        self._of_base: Tensor | None = None  # the same for all models

    def similarity(self, model: nn.Module) -> dict[str, float]:
        """Of images generated for captions of the test split to the real ones."""
        captions, real = self._real(self._images.samples)
        return {"similarity": similarity(self._encoder(self._generate(model, captions)), self._encoder(real))}

    def drift(self, model: Any) -> float:
        """Distance of images for unrelated captions to those without the adapter, from the same noise."""
        if self._of_base is None:
            with model.disable_adapter():
                self._of_base = self._encoder(self._generate(model, self.unrelated))
        return drift(self._encoder(self._generate(model, self.unrelated)), self._of_base)

    def watch(self, path: Path, title: str) -> TrainerCallback:
        """Draws a grid of images at several steps of a run to `path`."""
        captions, real = self._real(self._images.shown)
        return GridCallback(lambda model: self._generate(model, captions), real, captions, path, title)

    def _real(self, count: int) -> tuple[list[str], Tensor]:
        """The first captions and images of the test split; where there is none, of the training split."""
        split = _first(self._split, count)
        captions = [caption_of(self._settings, row) for row in split.rows]
        return captions, torch.stack(list(pixels(split, self._settings)))

    @torch.no_grad()
    def _generate(self, model: nn.Module, captions: Sequence[str]) -> Tensor:
        told, empty = self._base.captions(captions, self._settings), self._base.captions.unconditional(self._settings)
        return generated(model, self._base, told, empty, self._images)


def _first(split: Split, count: int) -> Split:
    return Split(split.source, split.rows[:count], split.numbers[:count])


def unrelated_captions(settings: DataSettings) -> list[str]:
    """Captions of what the adapter is not for: those of the settings, else of other families."""
    images = image_settings(settings)
    if images.unrelated or images.family is None:
        return images.unrelated
    return [caption_of(settings, row) for row in other_families(settings).rows[: images.samples]]
