"""Generation: answers are computed, the small base is pretrained once, and prompts are completed as one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.tiny_runs import tiny_generation, write_sums

from peft_reslora.experiments import pretraining, train
from peft_reslora.experiments.arithmetic import infix, plain_numbers, same_number, unmask, value_of
from peft_reslora.experiments.config_file import from_mapping, read_config
from peft_reslora.experiments.generation import complete, same_characters, text_loss
from peft_reslora.experiments.settings import TextSource, train_settings
from peft_reslora.experiments.tasks import make_task
from peft_reslora_cli.config_files import find_config


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("( 76.0 - 25.0 )", 51),
        ("( ( 2 + 3 ) * -4 )", -20),
        ("7 / 0", 0),  # no equation with a value, so its last number counts
        ("so it is 5*3=<<5*3=15>>15.\n#### 1,024", 1024),
        ("about 12.5 apples", 12.5),
        ("9**9**9", 9),  # no operator of ours: nothing is computed
        ("none", None),
        ("", None),
        ("(" * 300, None),
    ],
)
def test_the_value_of_an_answer(text: str, value: float | None) -> None:
    assert value_of(text) == value


def test_numbers_are_the_same_to_a_thousandth() -> None:
    assert same_number("10 / 3", 3.3333)
    assert not same_number("10 / 3", 3.4)
    assert not same_number("", 0.0)


def test_masked_problems_are_filled_in() -> None:
    assert unmask("number0 and number1 of N_00", ["3.0", "4.0"]) == "3.0 and 4.0 of 3.0"
    assert infix("/ - 96.0 42.0 6.0") == "( ( 96.0 - 42.0 ) / 6.0 )"
    assert infix("+ 1 * 2 3") == "( 1 + ( 2 * 3 ) )"
    assert plain_numbers("76.0 - 0.5 + 3.05") == "76 - 0.5 + 3.05"
    with pytest.raises(ValueError, match="no equation in prefix notation"):
        infix("+ 1")
    row = {"Question": "number0 + number1 ?", "Numbers": "1.0 2.0", "Equation": "+ number0 number1"}
    source = TextSource("{Question}\n{Equation}", masked_numbers=True)
    assert pretraining.source_text(source, row) == "1 + 2 ?\n( 1 + 2 )"


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sums(tmp_path_factory.mktemp("sums"))


@pytest.fixture
def settings(sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("PEFT_RESLORA_CACHE", str(sums / "cache"))
    return tiny_generation(sums, tmp_path / "run")


def test_a_run_measures_exact_match_and_what_the_base_forgot(settings: dict[str, Any]) -> None:
    metrics = train(settings, "training.max_steps=2", "export=false")
    assert set(metrics["before_merge"]) == {"validation", "test"}
    assert 0 <= metrics["before_merge"]["test"]["exact_match"] <= 100
    assert metrics["forgetting"] > 0


def test_the_base_is_trained_once_and_again_when_its_text_changes(
    settings: dict[str, Any], sums: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []
    original = pretraining._train
    monkeypatch.setattr(pretraining, "_train", lambda *a: trained.append(1) or original(*a))
    monkeypatch.setenv("PEFT_RESLORA_CACHE", str(sums / "another"))
    first, again = (make_task(train_settings(from_mapping(settings))).base.state_dict() for _ in range(2))
    assert len(trained) == 1
    assert all(torch.equal(first[name], again[name]) for name in first)
    settings["base"]["pretrain"]["sources"][0]["text"] = "{body} {question}"
    make_task(train_settings(from_mapping(settings)))
    assert len(trained) == 2


def test_prompts_in_a_padded_batch_are_completed_as_alone(settings: dict[str, Any]) -> None:
    task = make_task(train_settings(from_mapping(settings)))
    prompts = ["Tom has 3. He gets 4 more\n", "Tom\n", "Tom has 3. He gets 4 more. He gets 4 more\n"]
    together = complete(task.base, task.tokenizer, prompts, 6)
    assert together == [complete(task.base, task.tokenizer, [prompt], 6)[0] for prompt in prompts]


def test_only_the_completion_is_trained_on(settings: dict[str, Any]) -> None:
    task = make_task(train_settings(from_mapping(settings)))
    (batch,) = task.batches(4, 4)
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        trained = task.tokenizer.decode(ids[labels != -100])
        assert trained.endswith("</s>")
        assert "+" in trained
        assert "Tom" not in trained


def test_forgetting_is_the_mean_loss_per_token(settings: dict[str, Any]) -> None:
    task = make_task(train_settings(from_mapping(settings)))
    texts = ["Tom has 3", "He gets 4 more, and then 5"]
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([task.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            log_probabilities = task.base(input_ids=ids).logits.double().log_softmax(-1)[0, :-1]
        total -= float(log_probabilities.gather(1, ids[0, 1:, None]).sum())
        count += ids.shape[1] - 1
    assert text_loss(task.base, task.tokenizer, texts, 64) == pytest.approx(total / count, rel=1e-5)


def test_rows_that_do_not_fit_are_refused_and_answers_without_a_number(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"sums.jsonl, row \d+, column 'equation': \d+ tokens with the prompt"):
        make_task(train_settings(from_mapping(settings, ["data.max_length=8"])))
    with pytest.raises(ValueError, match=r"sums.jsonl, row \d+, column 'question'.*holds no number|no such column"):
        make_task(train_settings(from_mapping(settings, ["data.answer=nothing"])))


def test_what_is_longer_than_the_model_is_refused_before_training(settings: dict[str, Any]) -> None:
    settings["base"]["max_position_embeddings"] = 48
    make_task(train_settings(from_mapping(settings)))
    with pytest.raises(ValueError, match=r"data.max_length=49 is more than the 48 tokens the model takes"):
        make_task(train_settings(from_mapping(settings, ["data.max_length=49"])))
    with pytest.raises(ValueError, match=r"sums.jsonl, row \d+, column 'body': \d+ tokens and data.new_tokens=40"):
        make_task(train_settings(from_mapping(settings, ["data.new_tokens=40"])))


def test_a_base_in_four_bits_trains_and_exports(settings: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    settings["base"] |= {"hidden_size": 64, "intermediate_size": 64}  # of blocks of 64 weights
    whole = make_task(train_settings(from_mapping(settings)))
    for part in (whole.base, whole.tokenizer):
        part.save_pretrained(tmp_path / "base")
    settings["base"] = {"name": str(tmp_path / "base"), "load_in_4bit": True}
    metrics = train(settings, "training.max_steps=2", "training.gradient_checkpointing=true")
    assert metrics["losses"][0] > metrics["losses"][1]
    task = make_task(train_settings(from_mapping(settings)))
    assert task.base.is_loaded_in_4bit
    assert task.fresh_model().is_loaded_in_4bit
    assert metrics["export"] == {"exact": True, "worst_relative_error": metrics["export"]["worst_relative_error"]}
    assert metrics["after_merge"] == {}  # bitsandbytes repacks what is evaluated on a CPU
    settings["task"] = "classification"
    with pytest.raises(ValueError, match=r"base.load_in_4bit is for task=generation and a base with a name"):
        train_settings(from_mapping(settings))


def test_random_pairs_are_scored_by_their_characters(settings: dict[str, Any]) -> None:
    settings["data"] = {
        "uuid_pairs": 16,
        "text": ["key"],
        "label": "value",
        "match": "characters",
        "max_length": 80,
        "new_tokens": 32,
    }
    task = make_task(train_settings(from_mapping(settings)))
    rows = task.data.splits["train"].rows
    assert len({row["key"] for row in rows} | {row["value"] for row in rows}) == 32
    assert all(len(value) == 32 and int(value, 16) >= 0 for row in rows for value in row.values())
    assert task.metric == "characters"
    assert 0 <= task.evaluate(task.base, "test")["characters"] < 50
    assert same_characters("abxd", "abcdefgh") == 3 / 8


@pytest.mark.slow
def test_the_config_of_mathqa_counts_right_letters(
    sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With everything as it is shipped but base, sizes and data, and completions that are known: one of four wrong."""
    monkeypatch.setenv("PEFT_RESLORA_CACHE", str(sums / "cache"))
    for split in ("train", "validation", "test"):
        rows = [
            {
                "Problem": f"what is {i} + 1 ?",
                "options": f"a ) {i} , b ) {i + 1}",
                "correct": "ab"[i % 2],
                "category": "x",
            }
            for i in range(16)
        ]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    small = tiny_generation(sums, tmp_path)["base"]
    base = f"base={yaml.safe_dump(small, default_flow_style=True, width=10**6).strip()}"
    settings = train_settings(read_config(find_config("mathqa-llama2-reslora"), [base, f"data.folder={tmp_path}"]))
    task = make_task(settings)
    assert task.data.sizes() == {"train": 16, "validation": 16, "test": 16}
    texts = [task.tokenizer.decode(row["input_ids"]) for row in task.train]
    assert "<s>what is 3 + 1 ?. a ) 3 , b ) 4\nb</s>" in texts
    wanted = [row["correct"] for row in task.data.splits["test"].rows]
    found = ["c" if i % 4 == 0 else letter for i, letter in enumerate(wanted)]
    monkeypatch.setattr("peft_reslora.experiments.generation.complete", lambda *_: found)
    assert task.evaluate(task.base, "test") == {"characters": 75.0}
