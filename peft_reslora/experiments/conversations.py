"""Conversations: every turn of the assistant is learned, and what it says next is predicted in held-out ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jinja2 import TemplateError
from torch import nn
from transformers import PreTrainedTokenizerBase

from peft_reslora.experiments.data import Data, Split, load_data
from peft_reslora.experiments.generation import (
    IGNORED,
    completion_collator,
    load_generation_base,
    set_template,
    text_loss,
    turn_ids,
)
from peft_reslora.experiments.provenance import fingerprint
from peft_reslora.experiments.settings import DataSettings, TrainSettings
from peft_reslora.experiments.task import Batch, Example, Task

METRIC, LOSS = "token_accuracy", "loss_per_token"
_BATCH = 16
_SEEN = 100  # conversations that the checksum covers: a template that writes something else, does so in each


def conversation_task(settings: TrainSettings) -> Task:
    """Read and check the data, load or pretrain the base, and encode all splits by the template.

    Raises:
        ValueError: for bad data, with file, row and column; for a `max_length` that the model does not take.
    """
    column = str(settings.data.messages)
    data = load_data(settings.data, [column])
    for split in data.splits.values():
        check_turns(split, column)
    base, tokenizer, held_out = load_generation_base(settings.base)
    set_template(tokenizer, settings.data)
    _check_length(base, settings.data)
    encoded = {name: encode_conversations(split, tokenizer, settings) for name, split in data.splits.items()}
    train = encoded["train"]
    if settings.training.get("packing"):
        from peft_reslora.experiments.sft import check_packing

        check_packing(base, train)
    collate = completion_collator(int(tokenizer.pad_token_id))

    def evaluate(model: nn.Module, split: str) -> dict[str, float]:
        rows = encoded[split]
        return token_scores(model, [collate(rows[i : i + _BATCH]) for i in range(0, len(rows), _BATCH)])

    def forgetting(model: nn.Module) -> float:
        return text_loss(model, tokenizer, held_out, settings.data.max_length)

    return Task(
        settings.task,
        METRIC,
        base,
        _with_checksum(data, train),
        train,
        collate,
        evaluate,
        forgetting if held_out else None,
        tokenizer,
    )


def token_scores(model: Any, batches: Sequence[Batch]) -> dict[str, float]:
    """Of all tokens with a label, how many percent the model holds for the likeliest, and their mean cross-entropy."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    right, loss, count = 0, 0.0, 0
    with torch.no_grad():
        for batch in batches:
            ids, mask, labels = (batch[name].to(device) for name in ("input_ids", "attention_mask", "labels"))
            logits, wanted = model(input_ids=ids, attention_mask=mask).logits[:, :-1], labels[:, 1:]
            counted = wanted != IGNORED
            logits, wanted = logits[counted].to(torch.promote_types(logits.dtype, torch.float32)), wanted[counted]
            right += int((logits.argmax(-1) == wanted).sum())
            loss += float(F.cross_entropy(logits, wanted, reduction="sum"))
            count += len(wanted)
    model.train(was_training)
    return {METRIC: 100 * right / count, LOSS: loss / count}


def _with_checksum(data: Data, train: Sequence[Example]) -> Data:
    """A template may write the day's date: such a run does not go on tomorrow."""
    seen = fingerprint([row["input_ids"] for row in train[:_SEEN]])
    return dataclasses.replace(data, checksums={**data.checksums, "chats": seen})


def _check_length(base: Any, settings: DataSettings) -> None:
    limit = getattr(base.config, "max_position_embeddings", None)
    if limit is not None and settings.max_length > limit:
        raise ValueError(f"data.max_length={settings.max_length} is more than the {limit} tokens the model takes.")


def check_turns(split: Split, column: str) -> None:
    """Refuse what is no conversation.

    Raises:
        ValueError: for the first row that is no list of turns with `role` and `content`, both text, or in which the
            assistant says nothing: file, row and column.
    """
    for index, row in enumerate(split.rows):
        turns = row[column]
        if not isinstance(turns, list) or not all(
            isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
            for turn in turns
        ):
            raise ValueError(f"{split.place(index, column)}: {str(turns)[:40]!r} is no list of role and content.")
        if not any(turn["role"] == "assistant" for turn in turns):
            raise ValueError(f"{split.place(index, column)}: no turn has role='assistant'.")


def encode_conversations(split: Split, tokenizer: PreTrainedTokenizerBase, settings: TrainSettings) -> list[Example]:
    """Ids and labels of each conversation, cut at `max_length`; those of which nothing to learn is left are left out.

    Raises:
        ValueError: where `too_long` is "refuse", for the first longer one; for one that the template refuses, or
            writes in another way when more turns follow; if nothing is left: file, row and column.
    """
    column, limit = str(settings.data.messages), settings.data.max_length
    rows = []
    for index, row in enumerate(split.rows):
        turns = [{"role": turn["role"], "content": turn["content"].strip()} for turn in row[column]]
        try:
            ids, labels = conversation_ids(tokenizer, settings.data, turns)
        except (ValueError, TemplateError) as error:
            raise ValueError(f"{split.place(index, column)}: {error}") from error
        if len(ids) > limit and settings.data.too_long == "refuse":
            raise ValueError(
                f"{split.place(index, column)}: {len(ids)} tokens, more than data.max_length={limit}; raise it, or "
                "set data.too_long=truncate."
            )
        encoded = {"input_ids": ids[:limit], "labels": labels[:limit]}
        if _learned(encoded):
            if not settings.training.get("completion_only_loss", True):
                encoded["labels"] = encoded["input_ids"]
            rows.append(encoded)
    if not rows:
        raise ValueError(
            f"{split.source}, column {column!r}: no row has anything of the assistant within data.max_length={limit} "
            "tokens."
        )
    return rows


def _learned(row: Example) -> int:
    """How many labels count; the first token is never predicted."""
    return sum(label != IGNORED for label in row["labels"][1:])


def conversation_ids(
    tokenizer: PreTrainedTokenizerBase, settings: DataSettings, turns: Sequence[dict[str, str]]
) -> tuple[list[int], list[int]]:
    """Ids up to the end of the assistant's last turn, and labels, which count all that the assistant says.

    Raises:
        ValueError: if the template writes a conversation in another way than its beginning.
    """
    ids: list[int] = []
    labels: list[int] = []
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before, completion = turn_ids(tokenizer, settings, turns[: index + 1])
        if before[: len(ids)] != ids:
            raise ValueError(
                f"data.chat_template: the template of {tokenizer.name_or_path} writes turns in another way when more "
                "follow; give a template (data.chat_template) that does not, or keep one turn of the assistant."
            )
        labels += [IGNORED] * (len(before) - len(ids)) + completion
        ids = before + completion
    return ids, labels
