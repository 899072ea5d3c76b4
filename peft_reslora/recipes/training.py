"""LoRA and ResLoRA trained side by side with transformers' Trainer, alike in everything but the shortcut."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import ProgressCallback, Trainer, TrainingArguments, set_seed

from peft_reslora import ResLoRAConfig
from peft_reslora.recipes.minilm import load_base, predict
from peft_reslora.reslora.config import Shortcut

RANK = 8
# All linear layers of the encoder's blocks. The pooler's `dense` stands alone: it has no layer to be linked to.
TARGET_MODULES = ["query", "key", "value", "intermediate.dense", "output.dense"]
BATCH_SIZE = 16
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Task:
    """The data as the model takes it, and where the base lies."""

    base: Path
    train: list[dict[str, Tensor]]
    test: dict[str, Tensor]
    test_targets: Tensor

    def accuracy(self, logits: Tensor) -> float:
        """Percentage of the test texts that `logits` put in the right package."""
        return 100 * (logits.argmax(dim=-1) == self.test_targets).double().mean().item()


@dataclass(frozen=True)
class Run:
    """A trained model and what training it was like."""

    method: str
    model: PeftModel
    logits: Tensor
    losses: list[float]
    seconds_per_step: float


def train_both(task: Task, shortcut: Shortcut, steps: int, seed: int, say: Callable[[str], None]) -> list[Run]:
    """Train LoRA and ResLoRA, alike in everything but the shortcut."""
    fields: dict[str, Any] = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": TARGET_MODULES}
    configs = {"LoRA": LoraConfig(**fields), f"ResLoRA ({shortcut})": ResLoRAConfig(shortcut=shortcut, **fields)}
    runs = []
    for method, config in configs.items():
        say(f"Training {method} for {steps} steps")
        runs.append(_train(method, config, task, steps, seed))
    return runs


def _train(method: str, config: LoraConfig, task: Task, steps: int, seed: int) -> Run:
    set_seed(seed)
    model = get_peft_model(load_base(task.base)[0], config)
    bar = _LossBar()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(model, _training_arguments(scratch, steps, seed), train_dataset=task.train)
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(bar)
        trainer.train()
    logits = predict(model, task.test)
    return Run(method, model, logits, bar.losses, min(bar.seconds))


def _training_arguments(scratch: str, steps: int, seed: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=scratch,
        max_steps=steps,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        warmup_steps=steps // 20,
        seed=seed,
        data_seed=seed,
        logging_steps=1,
        label_names=["labels"],
        save_strategy="no",
        report_to="none",
        disable_tqdm=False,
        # One kind of device, so that the numbers are comparable with the fresh process's and from run to run.
        use_cpu=True,
        dataloader_pin_memory=False,
        dataloader_drop_last=True,
    )


class _LossBar(ProgressCallback):
    """The Trainer's progress bar with the loss in it instead of a line of text per step; keeps losses and times."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._begin)
        super().on_step_end(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:  # and not the summary at the end
            self.losses.append(logs["loss"])
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)  # type: ignore[attr-defined]


def tabulate(runs: Sequence[Run], task: Task, window: int) -> list[tuple[str, ...]]:
    """Lay the runs out as the rows of a table, header first; a loss is the mean of the `window` steps up to there."""
    quarters = [f"loss {percent} %" for percent in (25, 50, 75, 100)]
    rows: list[tuple[str, ...]] = [("method", "trainable", "steps", *quarters, "test acc. %", "s/step")]
    for run in runs:
        ends = [max(1, quarter * len(run.losses) // 4) for quarter in (1, 2, 3, 4)]
        losses = [statistics.fmean(run.losses[max(0, end - window) : end]) for end in ends]
        rows.append(
            (
                run.method,
                str(run.model.get_nb_trainable_parameters()[0]),
                str(len(run.losses)),
                *(f"{loss:.3f}" for loss in losses),
                f"{task.accuracy(run.logits):.1f}",
                f"{run.seconds_per_step:.3f}",
            )
        )
    return rows
