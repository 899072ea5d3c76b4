"""LoRA+ in transformers' Trainer and those that are made of it."""

from __future__ import annotations

from typing import Any

import torch
from peft.optimizers import create_loraplus_optimizer
from transformers import Trainer


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
