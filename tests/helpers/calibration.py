"""Data for merges that are estimated, and what a merge costs on it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def batches_of(count: int = 4, size: int = 4, length: int = 9, pad: int = 0) -> list[dict[str, torch.Tensor]]:
    """Batches of random tokens whose sequences end in 0 to 3 tokens of padding with id `pad`."""
    generator = torch.Generator().manual_seed(5)
    batches = []
    for _ in range(count):
        ids = torch.randint(1, 53, (size, length), generator=generator)
        mask = torch.arange(length) < length - torch.arange(size)[:, None] % 4
        batches.append({"input_ids": ids.where(mask, pad), "attention_mask": mask.long()})
    return batches


def record_norms(model: nn.Module, batches: Iterable[dict[str, Any]]) -> None:
    """Forwards in training mode, which record the norms that `input_norm` merges by."""
    model.train()
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    model.eval()


@torch.no_grad()
def log_probabilities(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    kept = [model(**batch).logits[batch["attention_mask"].bool()] for batch in batches]
    return torch.cat(kept).double().log_softmax(-1)


def divergence(model: nn.Module, expected: torch.Tensor, batches: list[dict[str, torch.Tensor]]) -> float:
    return float(F.kl_div(log_probabilities(model, batches), expected, log_target=True, reduction="batchmean"))
