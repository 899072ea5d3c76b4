"""One training run with transformers' Trainer: the same loop for every tuner and task."""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from peft_reslora.experiments.task import Task
from peft_reslora.experiments.tuners import adapt, callbacks_for, make_config

_DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 16,
    "logging_steps": 10,
    "save_strategy": "no",
    "dataloader_drop_last": True,
    "dataloader_pin_memory": False,
}
_COMPLETE = ("trainer_state.json", "optimizer.pt", "scheduler.pt")


@dataclass(frozen=True)
class Trained:
    """A trained model, its training losses (step, loss) without any tuner's penalty, and the wall time."""

    model: PeftModel
    losses: list[tuple[float, float]]
    seconds: float
    steps: int

    @property
    def diverged(self) -> bool:
        return bool(self.losses) and not math.isfinite(self.losses[-1][1])


@dataclass(frozen=True)
class Method:
    """A tuner's fields and the learning rate ratio of LoRA+ (None: one rate for all)."""

    tuner: Mapping[str, Any]
    loraplus_lr_ratio: float | None = None


def training_arguments(training: Mapping[str, Any], seed: int, folder: Path, report_to: str) -> TrainingArguments:
    """TrainingArguments from the checked `training` section."""
    return TrainingArguments(
        **{**_DEFAULTS, **training},
        output_dir=str(folder),
        seed=seed,
        data_seed=seed,
        report_to=report_to,
        label_names=["labels"],
        remove_unused_columns=False,
    )


def planned_steps(training: Mapping[str, Any], rows: int) -> int:
    """How many optimizer steps one process takes."""
    given = {**_DEFAULTS, **training}
    if (steps := given.get("max_steps", -1)) > 0:
        return int(steps)
    batch = given["per_device_train_batch_size"]
    batches = rows // batch if given["dataloader_drop_last"] else -(-rows // batch)
    per_epoch = max(1, -(-batches // given.get("gradient_accumulation_steps", 1)))
    return max(1, round(given.get("num_train_epochs", 3.0) * per_epoch))


def fit(
    task: Task,
    method: Method,
    arguments: TrainingArguments,
    steps: int,
    callbacks: tuple[TrainerCallback, ...] = (),
    resume: Path | None = None,
    quiet: bool = False,
) -> Trained:
    """Adapt a fresh copy of the base and train it; the seed decides initialization and order of the rows.

    Raises:
        ValueError: if a batch is larger than the training split, so that there would be no step.
    """
    _check_batch(task, arguments)
    set_seed(arguments.seed)
    model = adapt(task.fresh_model(), make_config(with_head(method.tuner, task), steps))
    trainer = _Trainer(
        model,
        arguments,
        train_dataset=task.train,
        data_collator=task.collate,
        callbacks=[*callbacks_for(method.tuner), *callbacks],
    )
    trainer.loraplus_lr_ratio = method.loraplus_lr_ratio
    task_loss = _TaskLoss(model.get_base_model())
    trainer.add_callback(task_loss)
    if quiet:
        trainer.remove_callback(PrinterCallback)
    try:
        result = trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    finally:
        task_loss.remove()
    if task.hub_id is not None:  # only now: PEFT would ask the Hub at each checkpoint
        model.peft_config["default"].base_model_name_or_path = task.hub_id
    losses = [(entry["step"], entry["task_loss"]) for entry in trainer.state.log_history if "task_loss" in entry]
    return Trained(model, losses, float(result.metrics["train_runtime"]), trainer.state.global_step)


def _check_batch(task: Task, arguments: TrainingArguments) -> None:
    rows, batch = len(task.train), arguments.per_device_train_batch_size
    if arguments.dataloader_drop_last and rows < batch:
        raise ValueError(
            f"{rows} training rows do not fill one batch of {batch}; lower training.per_device_train_batch_size or "
            "give more rows."
        )


def with_head(tuner: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """A new head is trained with the adapter: PEFT knows which it is by the task type. A fitted head stays."""
    return {"task_type": "SEQ_CLS", **tuner} if task.new_head else dict(tuner)


class _Trainer(Trainer):
    """The Trainer with the optimizer of LoRA+."""

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


class _TaskLoss(TrainerCallback):
    """Keeps each step's loss in the Trainer's state, which checkpoints hold, without what a tuner adds to it.

    AdaLoRA calls the base's `forward` itself, past all hooks, and adds its penalty to the loss in place; so the base
    gets a `forward` of its own for the time of the training.
    """

    def __init__(self, base: nn.Module) -> None:
        self._losses: list[torch.Tensor] = []
        self._base = base
        forward = base.forward

        @functools.wraps(forward)
        def kept(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            if base.training and (loss := getattr(output, "loss", None)) is not None:
                self._losses.append(loss.detach().clone())
            return output

        base.forward = kept

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._losses:
            state.log_history.append({"task_loss": float(torch.stack(self._losses).mean()), "step": state.global_step})
            self._losses.clear()

    def remove(self) -> None:
        del self._base.forward  # a copy of the model would call this one's


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that was written to its end; a process killed while writing leaves one that was not."""
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.split("-")[-1].isdecimal()]
    for path in sorted(found, key=lambda path: int(path.name.split("-")[-1]), reverse=True):
        if _is_complete(path):
            return path
    return None


def _is_complete(checkpoint: Path) -> bool:
    """Whether its last file, the Trainer's state, is there and whole."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        logging.getLogger(__name__).info("%s was not written to its end", checkpoint)
        return False
    return all((checkpoint / name).is_file() for name in _COMPLETE)
