"""Models of diffusers that compute their own loss, and rows of noisy images for them to learn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from peft_reslora.experiments.image_schedules import Schedule
from peft_reslora.experiments.task import Batch, Example

_HELD_OUT = 2**31  # where the seeds of held-out noise begin; torch takes 32 bits of a seed


@dataclass
class Denoised(BaseOutput):
    """The prediction, and its mean squared error where the target is known."""

    loss: Tensor | None = None
    sample: Tensor | None = None


_UNet: Any = UNet2DConditionModel  # type checkers see placeholders where diffusers has its classes
_Transformer: Any = SD3Transformer2DModel


class _Denoising:
    """A model of diffusers with the same weights and names; given `labels`, its output has a loss for the Trainer."""

    config: Any
    accepts_loss_kwargs = False  # else transformers' Trainer would leave the division by accumulated batches to it

    def _with_loss(self, found: Any, labels: Tensor | None) -> Any:
        """Mean squared error of the predicted target (arXiv 2006.11239, Eq. 14); images `(rows, channels, h, w)`."""
        if labels is None:
            return found
        return Denoised(nn.functional.mse_loss(found.sample.float(), labels.float()), found.sample)

    def _cast(self, value: Tensor) -> Tensor:
        model: Any = self
        return value.to(next(model.parameters()).dtype)

    @property
    def name_or_path(self) -> str:
        """Where it was loaded from, under the name that transformers' models have for it."""
        return str(self.config.get("_name_or_path", ""))


class DenoisingUNet(_Denoising, _UNet):
    """The UNet of Stable Diffusion 1, 2 and XL; XL's takes `text_embeds` and `time_ids`, in one mapping."""

    def forward(
        self,
        sample: Tensor,
        timestep: Any,
        encoder_hidden_states: Tensor,
        *args: Any,
        labels: Tensor | None = None,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if text_embeds is not None:
            kwargs["added_cond_kwargs"] = {"text_embeds": self._cast(text_embeds), "time_ids": time_ids}
        found = super().forward(self._cast(sample), timestep, self._cast(encoder_hidden_states), *args, **kwargs)
        return self._with_loss(found, labels)


class DenoisingTransformer(_Denoising, _Transformer):
    """The transformer of Stable Diffusion 3, called as the UNets are."""

    def forward(
        self,
        sample: Tensor,
        timestep: Any,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        found = super().forward(
            hidden_states=self._cast(sample),
            encoder_hidden_states=self._cast(encoder_hidden_states),
            pooled_projections=self._cast(pooled_projections),
            timestep=timestep,
            **kwargs,
        )
        return self._with_loss(found, labels)


def noisy_row(
    schedule: Schedule, latents: Tensor, conditions: Mapping[str, Tensor], seed: int, level: int | None = None
) -> Example:
    """One image `(channels, h, w)` with noise, what the model is told of it, and what it is to predict.

    Noise, and without a `level` that too, follow from the seed.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(latents.shape, generator=generator)
    drawn = schedule.draw(generator) if level is None else torch.tensor([level])
    sample, timestep, target = (found[0] for found in schedule.noisy(latents[None], noise[None], drawn))
    return {"sample": sample, "timestep": timestep, **conditions, "labels": target}


class NoisyRows(Sequence[Example]):
    """Every image under `draws` noises: row i is image i mod n, and its noise follows from i.

    So the order of the rows, which a run's seed decides, decides everything: all methods see the same noise, and a run
    that goes on from a checkpoint too.
    """

    def __init__(self, schedule: Schedule, latents: Tensor, conditions: Mapping[str, Tensor], draws: int) -> None:
        self._schedule, self._latents, self._conditions, self._draws = schedule, latents, conditions, draws

    def __len__(self) -> int:
        return len(self._latents) * self._draws

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        image = index % len(self._latents)
        return noisy_row(self._schedule, self._latents[image], _of_row(self._conditions, image), index)


def _of_row(conditions: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    return {name: value[row] for name, value in conditions.items()}


def stacked(rows: Sequence[Example]) -> Batch:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def held_out_rows(
    schedule: Schedule, latents: Tensor, conditions: Mapping[str, Tensor], timesteps: int
) -> list[Example]:
    """Every image at the middles of so many equal parts of the schedule, under noise that is always the same."""
    middles = [int((part + 0.5) * schedule.levels / timesteps) for part in range(timesteps)]
    return [
        noisy_row(schedule, image, _of_row(conditions, i), _HELD_OUT + i * timesteps + part, middle)
        for i, image in enumerate(latents)
        for part, middle in enumerate(middles)
    ]
