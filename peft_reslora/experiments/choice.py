"""Choice: of several endings of a text, the one with the least loss per token is the answer, as in HellaSwag."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_reslora.experiments.data import Row, Split, load_data
from peft_reslora.experiments.generation import (
    completion_collator,
    encode_pairs,
    load_generation_base,
    text_loss,
)
from peft_reslora.experiments.metrics import accuracy
from peft_reslora.experiments.settings import TrainSettings
from peft_reslora.experiments.task import Batch, Example, Task

_ENDING = "an ending"  # the column that rows get
_BATCH = 32


def choice_task(settings: TrainSettings) -> Task:
    """Read the data and load or pretrain the base; the right endings are trained on, all are scored.

    Raises:
        ValueError: for bad data, with file, row and column; without `data.endings`.
    """
    column = settings.data.endings
    if column is None:
        raise ValueError("data.endings must name the column that holds the list of endings; data.label is its index.")
    data = load_data(settings.data, [*settings.data.text, column, settings.data.label])
    labels = {name: right_ones(split, column, settings.data.label) for name, split in data.splits.items()}
    base, tokenizer, held_out = load_generation_base(settings.base)
    as_pairs = dataclasses.replace(settings.data, label=_ENDING)
    train = encode_pairs(only_right(data.splits["train"], column, labels["train"]), tokenizer, as_pairs)
    scored = {
        name: encode_pairs(one_by_one(split, column), tokenizer, as_pairs)
        for name, split in data.splits.items()
        if name != "train"
    }
    collate = completion_collator(int(tokenizer.pad_token_id))

    def evaluate(model: nn.Module, split: str) -> dict[str, float]:
        losses = losses_per_token(model, [collate(rows) for rows in _batches(scored[split])])
        sizes = [len(row[column]) for row in data.splits[split].rows]
        chosen = torch.tensor([int(part.argmin()) for part in losses.split(sizes)])
        return {"accuracy": accuracy(chosen.double().numpy(), torch.tensor(labels[split]).double().numpy())}

    def forgetting(model: nn.Module) -> float:
        return text_loss(model, tokenizer, held_out, settings.data.max_length)

    return Task(
        settings.task, "accuracy", base, data, train, collate, evaluate, forgetting if held_out else None, tokenizer
    )


def right_ones(split: Split, endings: str, label: str) -> list[int]:
    """The index of the right ending in each row.

    Raises:
        ValueError: for the first row without two endings or more, all of them text, or whose label is none of their
            indices: file, row and column.
    """
    found = []
    for index, row in enumerate(split.rows):
        texts = row[endings]
        if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(text, str) and text for text in texts):
            raise ValueError(f"{split.place(index, endings)}: {str(texts)[:40]!r} is no list of two endings or more.")
        if str(row[label]) not in map(str, range(len(texts))):
            raise ValueError(f"{split.place(index, label)}: {row[label]!r} is none of 0 to {len(texts) - 1}.")
        found.append(int(row[label]))
    return found


def only_right(split: Split, endings: str, right: Sequence[int]) -> Split:
    rows = [{**row, _ENDING: row[endings][n]} for row, n in zip(split.rows, right, strict=True)]
    return Split(split.source, rows, split.numbers)


def one_by_one(split: Split, endings: str) -> Split:
    """A row for each ending, all endings of a row in their order."""
    pairs: list[tuple[int, Row]] = [
        (number, {**row, _ENDING: text})
        for row, number in zip(split.rows, split.numbers, strict=True)
        for text in row[endings]
    ]
    return Split(split.source, [row for _, row in pairs], [number for number, _ in pairs])


def _batches(rows: Sequence[Example]) -> list[list[Example]]:
    return [list(rows[i : i + _BATCH]) for i in range(0, len(rows), _BATCH)]


def losses_per_token(model: Any, batches: Sequence[Batch]) -> Tensor:
    """The mean cross-entropy of each row over the tokens of its completion, its end included, on the CPU."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    losses = []
    with torch.no_grad():
        for batch in batches:
            ids, mask, labels = (batch[name].to(device) for name in ("input_ids", "attention_mask", "labels"))
            logits, wanted = model(input_ids=ids, attention_mask=mask).logits[:, :-1], labels[:, 1:]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            each = F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")  # 0 where it is ignored
            losses.append((each.sum(1) / (wanted != -100).sum(1)).cpu())
    model.train(was_training)
    return torch.cat(losses)
