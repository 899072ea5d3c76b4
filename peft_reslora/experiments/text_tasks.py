"""Understanding: classification and regression of texts or pairs of texts, as in GLUE."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from peft_reslora.experiments.data import Data, Split, class_labels, load_data, numbers
from peft_reslora.experiments.hub_base import reading_base
from peft_reslora.experiments.metrics import classification_metrics, regression_metrics
from peft_reslora.experiments.settings import BaseSettings, DataSettings, TrainSettings
from peft_reslora.experiments.task import Batch, Example, Task, outputs
from peft_reslora.experiments.tokenizers import train_bpe
from peft_reslora.recipes.minilm import HUB_ID, find_weights, fit_linear_head

_EVALUATION_BATCH = 64
_RIDGE = 1.0


def text_task(settings: TrainSettings) -> Task:
    """Read the data, load the base with its tokenizer, and encode all splits.

    Raises:
        ValueError: for bad data, with file, row and column, before anything is loaded.
    """
    data = load_data(settings.data, [*settings.data.text, settings.data.label])
    targets, names = text_targets(settings, data)
    base, tokenizer = load_text_base(settings.base, settings.data, data, names)
    encoded = {
        name: encode_split(split, targets[name], tokenizer, settings.data, length_limit(base, tokenizer))
        for name, split in data.splits.items()
    }
    collate = padding_collator(tokenizer)
    if settings.base.head == "fit":
        fit_head(base, in_batches(encoded["train"][: settings.base.head_rows], collate))
    batches = {name: in_batches(rows, collate) for name, rows in encoded.items()}
    metric, new_head = metric_name(settings, len(names)), settings.base.head == "train"
    evaluate = _evaluation(batches, classes=len(names))
    hub_id = HUB_ID if settings.base.name == "minilm" else None
    return Task(
        settings.task, metric, base, data, encoded["train"], collate, evaluate, None, tokenizer, new_head, hub_id
    )


def _evaluation(batches: Mapping[str, Sequence[Batch]], classes: int) -> Callable[[nn.Module, str], dict[str, float]]:
    """Metrics of a model on a split; of regression, which has no classes, the correlations."""
    wanted = {
        name: torch.cat([batch["labels"] for batch in parts]).double().numpy() for name, parts in batches.items()
    }

    def evaluate(model: nn.Module, split: str) -> dict[str, float]:
        logits = outputs(model, batches[split]).double().numpy()
        if classes:
            return classification_metrics(logits, wanted[split])
        return regression_metrics(logits[:, 0], wanted[split])

    return evaluate


def metric_name(settings: TrainSettings, classes: int) -> str:
    """GLUE's: Pearson for regression, Matthews for CoLA, accuracy else."""
    if settings.task == "regression":
        return "pearson"
    hub = settings.data.hub
    return "matthews" if classes == 2 and hub is not None and hub.config == "cola" else "accuracy"


def text_targets(settings: TrainSettings, data: Data) -> tuple[dict[str, Sequence[float]], list[str]]:
    """The labels of all splits, and the names of the classes; of regression none."""
    column = settings.data.label
    if settings.task == "regression":
        return {name: numbers(split, column) for name, split in data.splits.items()}, []
    classes = class_labels(data.splits, column)
    return {n: [classes[str(row[column])] for row in s.rows] for n, s in data.splits.items()}, list(classes)


def load_text_base(
    settings: BaseSettings, data_settings: DataSettings, data: Data, names: Sequence[str]
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The base with a head for these classes, and its tokenizer; one built in code gets a BPE of the training text."""
    labels: dict[str, Any] = {"num_labels": len(names) or 1}
    labels |= {"id2label": dict(enumerate(names))} if names else {"problem_type": "regression"}
    torch.manual_seed(0)  # a fresh head, and a model built in code, are the same in all runs
    if settings.config:
        texts = (str(row[column]) for row in data.splits["train"].rows for column in data_settings.text)
        tokenizer = train_bpe(texts, settings.vocabulary)
        return built_in_code(settings, labels, tokenizer), tokenizer
    weights = find_weights() if settings.name == "minilm" else str(settings.name)
    with reading_base(str(weights)):
        tokenizer = AutoTokenizer.from_pretrained(weights)
        model = AutoModelForSequenceClassification.from_pretrained(weights, dtype=settings.dtype, **labels)
    if tokenizer.pad_token is None:  # of many language models
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def built_in_code(settings: BaseSettings, labels: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """A model with random weights from `base.config` and its fields; the vocabulary is the tokenizer's."""
    fields = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **settings.fields}
    config = AutoConfig.for_model(str(settings.config), **fields, **labels)
    return AutoModelForSequenceClassification.from_config(config)


def length_limit(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens the model takes."""
    positions = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    return min(int(positions), int(tokenizer.model_max_length))


def encode_split(
    split: Split,
    targets: Sequence[float],
    tokenizer: PreTrainedTokenizerBase,
    settings: DataSettings,
    limit: int,
) -> list[Example]:
    """Token ids without padding, cut at `max_length`.

    Raises:
        ValueError: if `max_length` is more than the model takes; or where `too_long` is "refuse", for the first text
            that is longer than `max_length`: file, row and column.
    """
    if settings.max_length > limit:
        raise ValueError(f"data.max_length={settings.max_length} is more than the {limit} tokens the model takes.")
    rows = []
    for index, (row, target) in enumerate(zip(split.rows, targets, strict=True)):
        texts = [str(row[column]) for column in settings.text]
        encoded = tokenizer(*texts, truncation=settings.too_long == "truncate", max_length=settings.max_length)
        if len(encoded["input_ids"]) > settings.max_length:
            raise ValueError(
                f"{split.place(index, settings.text[0])}: {len(encoded['input_ids'])} tokens, more than "
                f"data.max_length={settings.max_length}; raise it, or set data.too_long=truncate."
            )
        rows.append({"input_ids": encoded["input_ids"], "labels": target})
    return rows


def padding_collator(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Pads the rows of a batch to its longest; labels stay integers or floats as they came."""

    def collate(rows: list[Example]) -> Batch:
        batch = tokenizer.pad({"input_ids": [row["input_ids"] for row in rows]}, return_tensors="pt")
        labels = torch.tensor([row["labels"] for row in rows])
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}

    return collate


def in_batches(rows: Sequence[Example], collate: Any) -> list[Batch]:
    """All rows in batches of about the same length, which saves most of the padding."""
    by_length = sorted(rows, key=lambda row: len(row["input_ids"]))
    return [collate(by_length[i : i + _EVALUATION_BATCH]) for i in range(0, len(rows), _EVALUATION_BATCH)]


def fit_head(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Fit the linear head to the frozen model's features, so that an adapter without a head is complete.

    Raises:
        ValueError: if the head is not one linear layer on one vector per text.
    """
    head = getattr(model, "classifier", None)
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"base.head=fit needs a model whose classifier is linear, not {type(model).__name__}; train it."
        )
    features, targets = _features(model, head, batches)
    fitted = (
        fit_ridge(features, targets)
        if head.out_features == 1
        else fit_linear_head(features, targets, head.out_features)
    )
    head.load_state_dict(fitted.state_dict())


def _features(model: nn.Module, head: nn.Module, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    try:
        outputs(model, batches)
    finally:
        handle.remove()
    return torch.cat(seen), torch.cat([batch["labels"] for batch in batches])


def fit_ridge(features: Tensor, targets: Tensor) -> nn.Linear:
    """Ridge regression with an unpenalized intercept, in float64; features `(rows, features)`, targets `(rows,)`."""
    x, y = features.double(), targets.double()
    mean, centered = x.mean(0), x - x.mean(0)
    gram = centered.T @ centered + _RIDGE * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(gram, centered.T @ (y - y.mean()))
    head = nn.Linear(x.shape[1], 1)
    with torch.no_grad():
        head.weight.copy_(weight[None])
        head.bias.copy_(y.mean() - mean @ weight)
    return head
