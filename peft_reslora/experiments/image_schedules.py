"""How noise is added, what a model learns to predict, and how images are sampled: one class for each objective."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

_PREDICTIONS = ("epsilon", "v_prediction")


class Schedule(Protocol):
    """Levels of noise, numbered from 0 to `levels` - 1, by a scheduler of diffusers."""

    levels: int
    scheduler: Any

    def draw(self, generator: torch.Generator) -> Tensor:
        """The level of a training row: shape `(1,)`."""
        ...

    def noisy(self, clean: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy images, the timesteps that the model is told, and what it is to predict.

        Args:
            clean: latents or images, shape `(rows, channels, height, width)`.
            noise: of the same shape.
            level: shape `(rows,)`.
        """
        ...

    def sampler(self, steps: int) -> Any:
        """A scheduler of diffusers without noise of its own, which leads from noise to images in so many steps."""
        ...


class Diffusion:
    """A DDPM (arXiv 2006.11239): the model predicts the noise, or the velocity (arXiv 2202.00512).

    Levels are drawn evenly; sampled by DDIM (arXiv 2010.02502).

    Raises:
        ValueError: for a scheduler whose models predict something else.
    """

    def __init__(self, scheduler: Any) -> None:
        kind = scheduler.config.prediction_type
        if kind not in _PREDICTIONS:
            raise ValueError(f"the base's scheduler has prediction_type={kind!r}; epsilon and v_prediction are known.")
        self.scheduler = scheduler
        self.levels = int(scheduler.config.num_train_timesteps)

    @classmethod
    def load(cls, folder: str, latent: bool = False) -> Diffusion:
        """From a saved pipeline; latents are not clipped to the range of pixels, whatever the file leaves out."""
        unclipped = {"clip_sample": False} if latent else {}
        return cls(DDPMScheduler.from_pretrained(folder, subfolder="scheduler", **unclipped))

    def draw(self, generator: torch.Generator) -> Tensor:
        return torch.randint(self.levels, (1,), generator=generator)

    def noisy(self, clean: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x_t = sqrt(a) x + sqrt(1 - a) e (Eq. 4); the target is e, or sqrt(a) e - sqrt(1 - a) x."""
        sample = self.scheduler.add_noise(clean, noise, level)
        velocity = self.scheduler.config.prediction_type == "v_prediction"
        return sample, level, self.scheduler.get_velocity(clean, noise, level) if velocity else noise

    def sampler(self, steps: int) -> Any:
        sampler: Any = DDIMScheduler.from_config(self.scheduler.config)
        sampler.set_timesteps(steps)
        return sampler


class Flow:
    """Rectified flow as in Stable Diffusion 3 (arXiv 2403.03206): the model predicts the way from image to noise.

    Levels are those of the scheduler, shifted towards more noise (Eq. 23), drawn by the logit-normal density with mean
    0 and deviation 1 (section 3.1), which stands in place of a weight of the loss; sampled by Euler's method.

    Raises:
        ValueError: for a scheduler whose shift depends on the size of the image.
    """

    def __init__(self, scheduler: Any) -> None:
        if scheduler.config.use_dynamic_shifting:
            raise ValueError("the base's scheduler has use_dynamic_shifting=true; a fixed shift is known.")
        self.scheduler = scheduler
        self.levels = int(scheduler.config.num_train_timesteps)

    @classmethod
    def load(cls, folder: str, latent: bool = True) -> Flow:
        """From a saved pipeline."""
        return cls(FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler"))

    def draw(self, generator: torch.Generator) -> Tensor:
        return (torch.randn(1, generator=generator).sigmoid() * self.levels).long().clamp(max=self.levels - 1)

    def noisy(self, clean: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z_t = (1 - t) x + t e (Eq. 13); the target is e - x, the derivative by t."""
        time = self.scheduler.sigmas[level][:, None, None, None]
        return (1 - time) * clean + time * noise, self.scheduler.timesteps[level], noise - clean

    def sampler(self, steps: int) -> Any:
        sampler: Any = FlowMatchEulerDiscreteScheduler.from_config(self.scheduler.config)
        sampler.set_timesteps(steps)
        return sampler
