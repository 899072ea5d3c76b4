"""A UNet of diffusers that computes its own loss, and rows of noisy images for it to learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from peft_reslora.experiments.task import Batch, Example

_HELD_OUT = 2**31  # where the seeds of held-out noise begin; torch takes 32 bits of a seed


@dataclass
class Denoised(BaseOutput):
    """The prediction, and its mean squared error where the target is known."""

    loss: Tensor | None = None
    sample: Tensor | None = None


_UNet: Any = UNet2DConditionModel  # type checkers see a placeholder where diffusers has its class


class DenoisingUNet(_UNet):
    """diffusers' UNet with the same weights and names; given `labels`, its output has a loss, as the Trainer needs."""

    accepts_loss_kwargs = False  # else transformers' Trainer would leave the division by accumulated batches to it

    def forward(
        self,
        sample: Tensor,
        timestep: Any,
        encoder_hidden_states: Tensor,
        *args: Any,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Mean squared error of the predicted target (arXiv 2006.11239, Eq. 14); images `(rows, channels, h, w)`."""
        dtype = self.conv_in.weight.dtype
        found = super().forward(sample.to(dtype), timestep, encoder_hidden_states.to(dtype), *args, **kwargs)
        if labels is None:
            return found
        return Denoised(nn.functional.mse_loss(found.sample.float(), labels.float()), found.sample)

    @property
    def name_or_path(self) -> str:
        """Where it was loaded from, under the name that transformers' models have for it."""
        return str(self.config.get("_name_or_path", ""))


def noisy_row(schedule: Any, latents: Tensor, text: Tensor, seed: int, timestep: int | None = None) -> Example:
    """One image `(channels, h, w)` with noise, its caption's states `(tokens, width)`, and what is to be predicted.

    Noise, and without a `timestep` that too, follow from the seed.

    Raises:
        ValueError: for a schedule whose models predict something else than noise or velocity.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(latents.shape, generator=generator)
    steps = int(schedule.config.num_train_timesteps)
    drawn = torch.randint(steps, (1,), generator=generator) if timestep is None else torch.tensor([timestep])
    noisy = schedule.add_noise(latents[None], noise[None], drawn)[0]
    kind = schedule.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise ValueError(f"the base's scheduler has prediction_type={kind!r}; epsilon and v_prediction are known.")
    target = noise if kind == "epsilon" else schedule.get_velocity(latents[None], noise[None], drawn)[0]
    return {"sample": noisy, "timestep": drawn[0], "encoder_hidden_states": text, "labels": target}


class NoisyRows(Sequence[Example]):
    """Every image under `draws` noises: row i is image i mod n, and its noise follows from i.

    So the order of the rows, which a run's seed decides, decides everything: all methods see the same noise, and a run
    that goes on from a checkpoint too.
    """

    def __init__(self, schedule: Any, latents: Tensor, texts: Tensor, draws: int) -> None:
        self._schedule, self._latents, self._texts, self._draws = schedule, latents, texts, draws

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
        return noisy_row(self._schedule, self._latents[image], self._texts[image], index)


def stacked(rows: Sequence[Example]) -> Batch:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def held_out_rows(schedule: Any, latents: Tensor, texts: Tensor, timesteps: int) -> list[Example]:
    """Every image at the middles of so many equal parts of the schedule, under noise that is always the same."""
    steps = int(schedule.config.num_train_timesteps)
    middles = [int((part + 0.5) * steps / timesteps) for part in range(timesteps)]
    return [
        noisy_row(schedule, image, text, _HELD_OUT + i * timesteps + part, middle)
        for i, (image, text) in enumerate(zip(latents, texts, strict=True))
        for part, middle in enumerate(middles)
    ]
