"""Choice: the ending with the least loss per token, against each ending scored alone."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.oracle import relative_error
from helpers.tiny_runs import tiny_run
from helpers.tolerances import MODEL64
from torch import Tensor

from peft_reslora.experiments import train
from peft_reslora.experiments.choice import losses_per_token
from peft_reslora.experiments.config_file import from_mapping
from peft_reslora.experiments.settings import train_settings
from peft_reslora.experiments.tasks import make_task

WORDS = ["red", "green", "blue", "a very long color"]


@pytest.fixture(scope="module")
def colors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("colors")
    draw = random.Random(0)
    rows = []
    for _ in range(120):  # more than pretraining holds out
        endings = draw.sample(WORDS, k=draw.choice([3, 4]))
        label = draw.randrange(len(endings))
        rows.append({"ctx": f"It is {endings[label]}. Its color is", "endings": endings, "label": label})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "colors.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def settings(colors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("PEFT_RESLORA_CACHE", str(colors / "cache"))
    base = {
        "config": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocabulary": 300,
        "pretrain": {
            "folder": str(colors),
            "sources": [{"text": "{ctx} {endings}", "file": "colors.jsonl"}],
            "steps": 2,
            "length": 32,
        },
    }
    data = {
        "folder": str(colors),
        "files": {"train": "colors.jsonl"},
        "text": ["ctx"],
        "endings": "endings",
        "validation_rows": 10,
        "test_rows": 10,
        "max_length": 96,
    }
    tuner = {"peft_type": "RESLORA", "r": 2, "target_modules": ["q_proj", "v_proj"]}
    return tiny_run(colors, tmp_path / "run", task="choice", base=base, data=data, tuner=tuner)


class ByHand:
    """What a causal language model gives for one row: the loss of each next token that counts, one after another."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval()

    @torch.no_grad()
    def loss(self, ids: list[int], labels: list[int]) -> float:
        scores: Tensor = self.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        counted = [-float(scores[n - 1, ids[n]]) for n in range(1, len(ids)) if labels[n] != -100]
        return sum(counted) / len(counted)


def test_rows_in_a_padded_batch_lose_what_each_loses_alone(settings: dict[str, Any]) -> None:
    task = make_task(train_settings(from_mapping(settings)))
    model = task.fresh_model().double()  # type: ignore[operator]
    rows = list(task.train[:6])
    assert len({len(row["input_ids"]) for row in rows}) > 1
    expected = [ByHand(model).loss(row["input_ids"], row["labels"]) for row in rows]
    found = losses_per_token(model, [task.collate(rows[:4]), task.collate(rows[4:])])
    assert relative_error(found, torch.tensor(expected).double()) < MODEL64


def test_a_run_learns_to_choose_the_ending_that_the_text_names(settings: dict[str, Any]) -> None:
    metrics = train(settings, "training.max_steps=4", "export=false")
    assert set(metrics["before_merge"]["test"]) == {"accuracy"}
    assert 0 <= metrics["before_merge"]["test"]["accuracy"] <= 100
    assert metrics["forgetting"] > 0


def test_the_chosen_ending_is_the_one_with_the_least_loss(settings: dict[str, Any]) -> None:
    """With a model that has every token but those of one ending at the same small probability."""
    task = make_task(train_settings(from_mapping(settings)))
    split = task.data.splits["test"]
    ids = task.tokenizer("red", add_special_tokens=False)["input_ids"]

    class OneWord(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = torch.nn.Parameter(torch.zeros(len(task.tokenizer)))
            self.bias.data[ids] = 20.0

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            logits = self.bias.expand(*input_ids.shape, -1)
            return type("Output", (), {"logits": logits})

    by_hand = []
    bias = OneWord().bias.detach().double().log_softmax(-1)
    for row in split.rows:
        losses = []
        for text in row["endings"]:
            tokens = [*task.tokenizer(text, add_special_tokens=False)["input_ids"], task.tokenizer.eos_token_id]
            losses.append(-float(bias[tokens].mean()))
        by_hand.append(losses.index(min(losses)) == row["label"])
    assert task.evaluate(OneWord(), "test")["accuracy"] == pytest.approx(100 * sum(by_hand) / len(by_hand))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"endings": ["one"]}, "column 'endings': .* is no list of two endings or more"),
        ({"endings": "text"}, "column 'endings': 'text' is no list"),
        ({"label": 7}, "column 'label': 7 is none of 0 to 1"),
    ],
)
def test_damaged_rows_are_refused(settings: dict[str, Any], tmp_path: Path, row: dict[str, Any], said: str) -> None:
    whole = {"ctx": "It is", "endings": ["a", "b"], "label": 0, **row}
    (tmp_path / "rows.jsonl").write_text(json.dumps(whole) + "\n", encoding="utf-8")
    settings["data"] |= {"folder": str(tmp_path), "files": {"train": "rows.jsonl"}}
    with pytest.raises(ValueError, match=rf"rows.jsonl, row 1, {said}"):
        train(settings, "data.validation_rows=null", "data.test_rows=null")


def test_the_column_of_the_endings_must_be_named(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"data\.endings must name the column"):
        train(settings, "data.endings=null")
