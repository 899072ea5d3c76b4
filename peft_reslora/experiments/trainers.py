"""What transformers' Trainer, and those that are made of it, lack here: LoRA+, and a refusal to train no step."""

from __future__ import annotations

from typing import Any

import torch
from peft.optimizers import create_loraplus_optimizer
from transformers import Trainer, TrainingArguments


class LoraPlus(Trainer):
    """A Trainer with the optimizer of LoRA+ (arXiv 2402.12354), if it has a ratio of learning rates."""

    loraplus_lr_ratio: float | None = None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.loraplus_lr_ratio is None or self.optimizer is not None:
            return super().create_optimizer(model)
        adapted: Any = self.model
        kind, kwargs = self.get_optimizer_cls_and_kwargs(self.args, adapted)
        lr = kwargs.pop("lr")
        self.optimizer = create_loraplus_optimizer(
            adapted, kind, lr=lr, loraplus_lr_ratio=self.loraplus_lr_ratio, **kwargs
        )
        return self.optimizer


def check_batch(rows: int, kind: str, arguments: TrainingArguments) -> None:
    """Refuse rows that are too few for a step.

    Raises:
        ValueError: if the batches of all processes are more, and what fills no batch is dropped.
    """
    batch, processes = arguments.per_device_train_batch_size, arguments.world_size
    if arguments.dataloader_drop_last and rows < batch * processes:
        of_each = f" in each of {processes} processes" if processes > 1 else ""
        raise ValueError(
            f"{rows} {kind} do not fill one batch of {batch}{of_each}; lower training.per_device_train_batch_size or "
            "give more rows."
        )
