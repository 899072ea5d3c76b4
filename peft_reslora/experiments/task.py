"""What every task hands to training and comparing: a base, batches, and a way to measure."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from peft_reslora.experiments.data import Data

Example = dict[str, Any]
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """One task, ready to train on.

    Args:
        name: of the kind of task.
        metric: the key of `evaluate` that decides; higher is better, unless `lower_is_better`.
        base: the frozen model; `fresh_model` copies it.
        data: the rows as they were read.
        train: the encoded training rows.
        collate: makes a batch of encoded rows.
        evaluate: metrics of a model on a split.
        forgetting: loss on held-out text of another kind, if the task has it.
        tokenizer: saved beside the model, if there is one.
        hub_id: what saved adapters call the base, where it was loaded from a copy on this machine.
        new_head: whether a head without training stands on the base, which trains with the adapter.
        lower_is_better: of the metric that decides.
        generated: metrics of what the model generates, which are dear: on the runs that are reported only.
        watch: makes a callback that draws to a path, under a title, what the model generates as it learns.
    """

    name: str
    metric: str
    base: nn.Module
    data: Data
    train: Sequence[Example]
    collate: Callable[[list[Example]], Batch]
    evaluate: Callable[[nn.Module, str], dict[str, float]]
    forgetting: Callable[[nn.Module], float] | None = None
    tokenizer: Any = None
    new_head: bool = False
    hub_id: str | None = None
    lower_is_better: bool = False
    generated: Callable[[nn.Module], dict[str, float]] | None = None
    watch: Callable[[Path, str], TrainerCallback] | None = None

    def fresh_model(self) -> nn.Module:
        return copy.deepcopy(self.base)

    def batches(self, rows: int, size: int = 16) -> list[Batch]:
        """The first training rows in batches, for calibration and measurements."""
        chosen = list(self.train[:rows])
        return [self.collate(chosen[i : i + size]) for i in range(0, len(chosen), size)]


def outputs(model: nn.Module, batches: Sequence[Batch], name: str = "logits") -> Tensor:
    """One output of a model over batches, on the CPU, in evaluation mode and without gradients."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    with torch.no_grad():
        parts = [
            getattr(model(**{k: v.to(device) for k, v in batch.items() if k != "labels"}), name).cpu()
            for batch in batches
        ]
    model.train(was_training)
    return torch.cat(parts)
