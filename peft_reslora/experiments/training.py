"""One training run with transformers' Trainer: the same loop for every tuner and task."""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from peft_reslora.experiments.processes import summed
from peft_reslora.experiments.settings import SFT_KEYS
from peft_reslora.experiments.task import Task
from peft_reslora.experiments.trainers import LoraPlus, check_batch
from peft_reslora.experiments.tuners import adapt, allocates_ranks, callbacks_for, make_config

_DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 16,
    "logging_steps": 10,
    "save_strategy": "no",
    "dataloader_drop_last": True,
    "dataloader_pin_memory": False,
}
_OPTIMIZER = ("optimizer.pt", "optimizer.bin", "latest")  # the Trainer's own, FSDP's, and DeepSpeed's


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


def training_arguments(
    training: Mapping[str, Any], seed: int, folder: Path, report_to: str, length: int | None = None
) -> TrainingArguments:
    """TrainingArguments from the checked `training` section; TRL's SFTConfig, where it has arguments of that.

    Rows are packed to `length` tokens, if they are to be.
    """
    own: dict[str, Any] = {
        "output_dir": str(folder),
        "seed": seed,
        "data_seed": seed,
        "report_to": report_to,
        "label_names": ["labels"],
        "remove_unused_columns": False,
    }
    if SFT_KEYS.keys() & training.keys():
        from peft_reslora.experiments.sft import sft_arguments

        return sft_arguments({**_DEFAULTS, **training}, length, **own)
    return TrainingArguments(**{**_DEFAULTS, **training}, **own)


def planned_steps(training: Mapping[str, Any], rows: int, processes: int = 1) -> int:
    """How many optimizer steps are taken; all processes together take as many rows as one with larger batches."""
    given = {**_DEFAULTS, **training}
    if (steps := given.get("max_steps", -1)) > 0:
        return int(steps)
    batch = given["per_device_train_batch_size"] * processes
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
        ValueError: if the batches of all processes are larger than the training split, so that there would be no
            step; for what does not train in shards.
    """
    check_batch(len(task.train), "training rows", arguments)
    if resume is not None and (state := _state_of(resume)).global_step >= state.max_steps:
        # Trainer would take one more step.
        return Trained(_loaded(task, resume, arguments), _losses(state), 0.0, state.global_step)
    set_seed(arguments.seed)
    model = adapt(task.fresh_model(), make_config(with_head(method.tuner, task), steps))
    trainer = _make_trainer(task, model, method, arguments, [*callbacks_for(method.tuner, arguments.seed), *callbacks])
    if is_sharded(trainer):
        _check_shards(trainer, method)
    task_loss = _TaskLoss(model.get_base_model(), trainer)
    trainer.add_callback(task_loss)
    if quiet:
        trainer.remove_callback(PrinterCallback)
    try:
        result = trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    finally:
        task_loss.remove()
    if is_sharded(trainer):
        model = _whole(task, model, trainer)
    if task.hub_id is not None:  # only now: PEFT would ask the Hub at each checkpoint
        model.peft_config["default"].base_model_name_or_path = task.hub_id
    return Trained(model, _losses(trainer.state), float(result.metrics["train_runtime"]), trainer.state.global_step)


def _losses(state: TrainerState) -> list[tuple[float, float]]:
    return [(entry["step"], entry["task_loss"]) for entry in state.log_history if "task_loss" in entry]


def _state_of(checkpoint: Path) -> TrainerState:
    return TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def _loaded(task: Task, folder: Path, arguments: TrainingArguments) -> PeftModel:
    """An adapter that was saved while it trained, on a base of this process's own."""
    model: PeftModel = PeftModel.from_pretrained(task.fresh_model(), str(folder), is_trainable=True)
    if task.hub_id is not None:
        model.peft_config["default"].base_model_name_or_path = task.hub_id
    return model.to(arguments.device)


def _make_trainer(
    task: Task,
    model: PeftModel,
    method: Method,
    arguments: TrainingArguments,
    callbacks: Sequence[TrainerCallback],
) -> Trainer:
    """The Trainer, or TRL's for supervised fine-tuning where the arguments are for that."""
    trainer: LoraPlus
    if type(arguments) is not TrainingArguments:
        from peft_reslora.experiments.sft import sft_trainer

        sft: Any = arguments
        trainer = sft_trainer(task, model, method.tuner, sft, callbacks)
    else:
        trainer = LoraPlus(
            model, arguments, train_dataset=task.train, data_collator=task.collate, callbacks=[*callbacks]
        )
    trainer.loraplus_lr_ratio = method.loraplus_lr_ratio
    if task.name != "generation":
        # Else Trainer takes the loss of every model with **kwargs for a sum over the rows of all batches and
        # processes, divided by their number; but what these models return is a mean over the rows of one.
        trainer.model_accepts_loss_kwargs = False
    return trainer


def is_sharded(trainer: Trainer) -> bool:
    """Whether FSDP or DeepSpeed trains, which may leave each process with a part of the factors."""
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


def _check_shards(trainer: Trainer, method: Method) -> None:
    """Refuse what would end in an adapter that is not whole.

    Raises:
        ValueError: for AdaLoRA, whose ranks are allocated by whole factors; for checkpoints in shards.
    """
    if allocates_ranks(method.tuner):
        raise ValueError(
            f"tuner.peft_type={method.tuner['peft_type']} allocates ranks, and under FSDP and DeepSpeed no process "
            "has whole factors to choose from; train it in one process or with configs/accelerate/ddp.yaml."
        )
    plugin: Any = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if trainer.is_fsdp_enabled and "FULL" not in str(plugin.state_dict_type):
        raise ValueError(
            "fsdp_state_dict_type: SHARDED_STATE_DICT leaves no adapter that can be measured; set FULL_STATE_DICT in "
            "accelerate's config, as configs/accelerate/fsdp2.yaml does."
        )


def _whole(task: Task, trained: PeftModel, trainer: Trainer) -> PeftModel:
    """The trained adapter on a base of this process's own, as Trainer gathers and saves it from all processes."""
    folder = Path(str(trainer.args.output_dir)) / "gathered"
    trainer.save_model(str(folder))
    unset_hf_deepspeed_config()  # or transformers would wait for the other processes wherever it loads a tensor
    if trainer.args.process_index != 0:
        return trained
    return _loaded(task, folder, trainer.args)


def with_head(tuner: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """A new head is trained with the adapter: PEFT knows which it is by the task type. A fitted head stays."""
    return {"task_type": "SEQ_CLS", **tuner} if task.new_head else dict(tuner)


class _TaskLoss(TrainerCallback):
    """Keeps each step's loss in the Trainer's state, which checkpoints hold, without what a tuner adds to it.

    AdaLoRA calls the base's `forward` itself, past all hooks, and adds its penalty to the loss in place; so the base
    gets a `forward` of its own for the time of the training.
    """

    def __init__(self, base: nn.Module, trainer: Trainer) -> None:
        self._losses: list[torch.Tensor] = []
        self._trainer = trainer
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
            state.log_history.append({"task_loss": float(self._step_loss(args)), "step": state.global_step})
            self._losses.clear()

    def _step_loss(self, args: TrainingArguments) -> torch.Tensor:
        """The loss of all rows of a step: the batches' parts of it, or the mean of their means."""
        loss = torch.stack(self._losses).sum()
        divisor = 1 if self._trainer.model_accepts_loss_kwargs else len(self._losses)
        if not (self._trainer.model_accepts_loss_kwargs and args.average_tokens_across_devices):
            divisor *= args.world_size
        return summed(loss) / divisor

    def remove(self) -> None:
        del self._base.forward  # a copy of the model would call this one's


def last_complete_checkpoint(folder: Path, processes: int = 1) -> Path | None:
    """The last checkpoint that was written to its end; a process killed while writing leaves one that was not."""
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.split("-")[-1].isdecimal()]
    for path in sorted(found, key=lambda path: int(path.name.split("-")[-1]), reverse=True):
        if _is_complete(path, processes):
            return path
    return None


def _is_complete(checkpoint: Path, processes: int) -> bool:
    """Whether the main process's last file, the Trainer's state, is there and whole, and what others write."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        logging.getLogger(__name__).info("%s was not written to its end", checkpoint)
        return False
    random = [f"rng_state_{i}.pth" for i in range(processes)] if processes > 1 else ["rng_state.pth"]
    optimizer = any((checkpoint / name).is_file() for name in _OPTIMIZER)
    return optimizer and all((checkpoint / name).is_file() for name in random)
