"""What a model of images is told of a caption, by the text encoders of its pipeline: one class for each pipeline."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from peft_reslora.experiments.images import image_settings
from peft_reslora.experiments.settings import DataSettings

Conditions = dict[str, Tensor]
"""By the names under which the model takes them; one row for each caption."""

_BATCH = 16


@dataclass(frozen=True)
class TextEncoder:
    """A frozen text encoder of transformers with its tokenizer."""

    model: Any
    tokenizer: PreTrainedTokenizerBase

    @property
    def limit(self) -> int | None:
        """How many tokens it takes, if that is limited: CLIP's positions are, T5's are not."""
        return getattr(self.model.config, "max_position_embeddings", None)

    def last(self, captions: Sequence[str], length: int) -> Tensor:
        """States of the last layer, shape `(captions, length, width)`."""
        return torch.cat([found.last_hidden_state.cpu() for found in self._run(captions, length)])

    def penultimate(self, captions: Sequence[str], length: int) -> tuple[Tensor, Tensor | None]:
        """States of the last layer but one, and what a projection makes of the whole caption, where there is one."""
        states, pooled = [], []
        for found in self._run(captions, length, output_hidden_states=True):
            states.append(found.hidden_states[-2].cpu())
            pooled += [found.text_embeds.cpu()] if "text_embeds" in found else []
        return torch.cat(states), torch.cat(pooled) if pooled else None

    def _run(self, captions: Sequence[str], length: int, **kwargs: Any) -> Iterator[Any]:
        """Outputs for one batch after the other: those of all layers, for all captions of a data set, fit no GPU."""
        ids = tokens_of(self.tokenizer, captions, min(length, self.limit or length))
        device = next(self.model.parameters()).device
        for part in ids.split(_BATCH):
            yield self.model(input_ids=part.to(device), **kwargs)


def tokens_of(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], length: int) -> Tensor:
    """Ids, cut and padded to `length`: shape `(captions, length)`."""
    encoded = tokenizer(list(captions), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    ids: Tensor = encoded["input_ids"]
    return ids


class Captions(ABC):
    """The text encoders of a pipeline, and what its model takes of them.

    Args:
        encoders: in the pipeline's order; the last one takes the longest captions.
        pipeline: the pipeline's own settings, as it saves them.
    """

    def __init__(self, encoders: Sequence[TextEncoder], pipeline: Mapping[str, Any] | None = None) -> None:
        self.encoders, self.pipeline = tuple(encoders), pipeline or {}

    def __call__(self, captions: Sequence[str], settings: DataSettings) -> Conditions:
        """The conditions for captions, cut and padded to `data.max_length` tokens.

        Raises:
            ValueError: if `max_length` is more than the text encoder takes; where `too_long` is "refuse", for the
                first caption that is longer than it.
        """
        _check_lengths(self.encoders[-1], captions, settings)
        return self.conditions(captions, settings)

    @abstractmethod
    def conditions(self, captions: Sequence[str], settings: DataSettings) -> Conditions:
        """As the pipeline makes them; without checks."""

    def unconditional(self, settings: DataSettings) -> Conditions:
        """One row: what the guidance of images leads away from."""
        return self([""], settings)


def _check_lengths(encoder: TextEncoder, captions: Sequence[str], settings: DataSettings) -> None:
    limit = encoder.limit
    if limit is not None and settings.max_length > limit:
        raise ValueError(f"data.max_length={settings.max_length} is more than the {limit} tokens the model takes.")
    if settings.too_long == "refuse":
        for caption in captions:
            if (length := len(encoder.tokenizer(caption)["input_ids"])) > settings.max_length:
                raise ValueError(
                    f"{caption[:60]!r}: {length} tokens, more than data.max_length={settings.max_length}."
                )


class ClipCaptions(Captions):
    """Stable Diffusion 1 and 2: one CLIP."""

    def conditions(self, captions: Sequence[str], settings: DataSettings) -> Conditions:
        return {"encoder_hidden_states": self.encoders[0].last(captions, settings.max_length)}


class TwoClipsCaptions(Captions):
    """Stable Diffusion XL (arXiv 2307.01952): two CLIPs, the whole caption, and sizes that the model is told.

    Images are cut around their center and resized, and said to be uncut and of that size, as they are to be drawn.
    """

    def conditions(self, captions: Sequence[str], settings: DataSettings) -> Conditions:
        states, pooled = _two_clips(self.encoders, captions, settings.max_length)
        side = image_settings(settings).size
        sizes = torch.tensor([side, side, 0, 0, side, side], dtype=torch.float32)  # original, crop, target
        return {
            "encoder_hidden_states": states,
            "text_embeds": pooled[-1],
            "time_ids": sizes.expand(len(captions), -1),
        }

    def unconditional(self, settings: DataSettings) -> Conditions:
        found = super().unconditional(settings)
        if self.pipeline.get("force_zeros_for_empty_prompt", True):
            found |= {name: torch.zeros_like(found[name]) for name in ("encoder_hidden_states", "text_embeds")}
        return found


class ClipsAndT5Captions(Captions):
    """Stable Diffusion 3 (arXiv 2403.03206): two CLIPs, at most 77 tokens, and behind them T5's `max_length`."""

    def conditions(self, captions: Sequence[str], settings: DataSettings) -> Conditions:
        states, pooled = _two_clips(self.encoders[:2], captions, settings.max_length)
        longer = self.encoders[2].last(captions, settings.max_length)
        wide = F.pad(states, (0, longer.shape[-1] - states.shape[-1]))
        return {
            "encoder_hidden_states": torch.cat([wide, longer], dim=1),
            "pooled_projections": torch.cat(pooled, dim=1),
        }


def _two_clips(encoders: Sequence[TextEncoder], captions: Sequence[str], length: int) -> tuple[Tensor, list[Tensor]]:
    """Their states side by side, and the projections of whole captions."""
    found = [encoder.penultimate(captions, length) for encoder in encoders]
    return torch.cat([states for states, _ in found], dim=-1), [pooled for _, pooled in found if pooled is not None]
