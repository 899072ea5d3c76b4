"""Supervised fine-tuning by TRL: its packing, its collator, and its trainer, which never holds all tokens' logits.

Rows come encoded, so that what is packed is what is trained without packing: each row is whole in one pack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from peft_reslora.experiments.settings import SFT_KEYS
from peft_reslora.experiments.task import Batch, Example, Task
from peft_reslora.experiments.trainers import LoraPlus, check_batch
from peft_reslora.experiments.tuners import allocates_ranks

# What TrainingArguments has, where SFTConfig has something else: the same file trains the same with and without TRL.
_PLAIN: dict[str, Any] = {"learning_rate": 5e-5, "bf16": False, "gradient_checkpointing": False}


def sft_arguments(training: Mapping[str, Any], length: int | None, **own: Any) -> SFTConfig:
    """SFTConfig for rows that are encoded, and for packs of at most `length` tokens, if there are to be any."""
    given = {name: value for name, value in training.items() if name not in SFT_KEYS}
    return SFTConfig(
        **{**_PLAIN, **given, **own},
        padding_free=bool(training.get("packing")),
        max_length=length,
        dataset_kwargs={"skip_prepare_dataset": True},
    )


class SftTrainer(LoraPlus, SFTTrainer):
    """TRL's trainer, where the loss that the model returns is a batch's part in that of a step, as in Trainer."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        counted = {**inputs, "num_items_in_batch": num_items_in_batch}
        return super().compute_loss(model, counted, return_outputs, num_items_in_batch)


def sft_trainer(
    task: Task,
    model: PeftModel,
    tuner: Mapping[str, Any],
    arguments: SFTConfig,
    callbacks: Sequence[TrainerCallback],
) -> SftTrainer:
    """TRL's trainer on the rows of a task.

    Raises:
        ValueError: for AdaLoRA, whose penalty stands in the loss that the model returns, which TRL leaves alone; if
            the packs do not fill a batch.
    """
    if allocates_ranks(tuner):
        raise ValueError(
            f"tuner.peft_type={tuner['peft_type']} adds a penalty to the model's loss, which TRL's trainer does not "
            f"take; leave {' and '.join(SFT_KEYS)} out of training."
        )
    rows = Dataset.from_list(list(task.train))
    if arguments.padding_free and arguments.max_length:
        rows = pack_dataset(rows, arguments.max_length, "bfd")
        check_batch(len(rows), "packs of rows", arguments)
        arguments.max_length = None  # what TRL would not enforce here
    return SftTrainer(model, arguments, train_dataset=rows, processing_class=task.tokenizer, callbacks=[*callbacks])


def check_packing(base: nn.Module, rows: Sequence[Example]) -> None:
    """Refuse to pack for a model whose rows of one pack would see each other.

    What stands before a row in its pack is replaced by other tokens: the row's logits may not change in a single bit.

    Raises:
        ValueError: naming the model and its attention.
    """
    first, second = ([*row["input_ids"][:8]] for row in (rows[0], rows[-1]))
    other = [token - 1 if token else 1 for token in first]
    seen = [_last_logits(base, [start, second]) for start in (first, other)]
    if not torch.equal(*seen):
        attention = getattr(base.config, "_attn_implementation", None)
        raise ValueError(
            f"training.packing=true: in {type(base).__name__} with {attention} attention, rows of one pack see each "
            "other; train it without packing."
        )


def _last_logits(base: nn.Module, parts: Sequence[list[int]]) -> torch.Tensor:
    """Logits of the last of several rows in one pack; without a cache, with which masks leave packs aside."""
    ids = [token for part in parts for token in part]
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    batch: Batch = collate([{"input_ids": ids, "labels": ids, "seq_lengths": [len(part) for part in parts]}])
    del batch["labels"]
    with torch.no_grad():
        logits: torch.Tensor = base(**batch, use_cache=False).logits
    return logits[0, -len(parts[-1]) :]
