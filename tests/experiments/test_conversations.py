"""Conversations: what the template writes is encoded, what the assistant says is learned, and its loss is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.oracle import relative_error
from helpers.tiny_runs import tiny_generation, write_sums
from helpers.tolerances import rounding

from peft_reslora.experiments import train
from peft_reslora.experiments.config_file import from_mapping, read_config
from peft_reslora.experiments.dry_run import describe_run
from peft_reslora.experiments.run import train_with
from peft_reslora.experiments.settings import TrainSettings, train_settings
from peft_reslora.experiments.task import Task
from peft_reslora.experiments.tasks import make_task
from peft_reslora_cli.config_files import find_config

TEMPLATE = (
    "{% for turn in messages %}<s>{{ turn.role }}: {{ turn.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
TULU = read_config(find_config("tulu-llama2-mora")).values["data"]["chat_template"]


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def chats(count: int = 24) -> list[dict[str, Any]]:
    """One question and answer, or two, the first ones with spaces around them."""
    rows = [
        turns(f" Tom has {i} ", f"{i} + 0\n", f"He gets {i} more", f"{i} + {i}")[: 2 + 2 * (i % 2)]
        for i in range(count)
    ]
    return [{"messages": row} for row in rows]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_sums(tmp_path_factory.mktemp("sums"))
    write_chats(folder, chats())
    return folder


def write_chats(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def settings(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("PEFT_RESLORA_CACHE", str(folder / "cache"))
    run = tiny_generation(folder, tmp_path / "run")
    run["data"] = {
        "folder": str(folder),
        "files": {"train": "chats.jsonl"},
        "messages": "messages",
        "chat_template": TEMPLATE,
        "validation_rows": 4,
        "test_rows": 6,
        "max_length": 128,
    }
    run["training"] |= {"max_steps": 3, "per_device_train_batch_size": 4}
    return run


def settings_of(settings: dict[str, Any], *overrides: str) -> TrainSettings:
    return train_settings(from_mapping(settings, overrides))


def as_written(row: list[dict[str, str]]) -> str:
    """By the template, up to where the assistant's last turn ends."""
    said = [f"<s>{turn['role']}: {turn['content'].strip()}</s>" for turn in row]
    return "\n".join(said)


def learned_text(task: Task, row: dict[str, Any]) -> str:
    return str(task.tokenizer.decode([label for label in row["labels"] if label != -100]))


def test_all_that_the_assistant_says_is_learned(settings: dict[str, Any]) -> None:
    task = make_task(settings_of(settings))
    source = task.data.splits["train"].rows
    assert {len(row["messages"]) for row in source} == {2, 4}
    for row, encoded in zip(source, task.train, strict=True):
        said = row["messages"]
        assert task.tokenizer.decode(encoded["input_ids"]) == as_written(said)
        answers = [turn["content"].strip() + "</s>" for turn in said if turn["role"] == "assistant"]
        assert learned_text(task, encoded) == "".join(answers)
        assert [a for a, b in zip(encoded["input_ids"], encoded["labels"], strict=True) if b != -100] == [
            label for label in encoded["labels"] if label != -100
        ]


def test_what_follows_the_last_answer_is_left_out(settings: dict[str, Any], folder: Path) -> None:
    rows = [{"messages": [*turns("one", "two"), {"role": "user", "content": "three"}]} for _ in range(24)]
    write_chats(folder, rows)
    try:
        task = make_task(settings_of(settings))
        assert {task.tokenizer.decode(row["input_ids"]) for row in task.train} == {as_written(turns("one", "two"))}
    finally:
        write_chats(folder, chats())


def test_tulus_turns_are_written_as_its_models_read_them(settings: dict[str, Any]) -> None:
    settings["data"]["chat_template"] = TULU
    task = make_task(settings_of(settings))
    index = next(i for i, row in enumerate(task.data.splits["train"].rows) if len(row["messages"]) == 4)
    said = [turn["content"].strip() for turn in task.data.splits["train"].rows[index]["messages"]]
    text = "<s><|user|>\n{}\n<|assistant|>\n{}</s>\n<|user|>\n{}\n<|assistant|>\n{}</s>".format(*said)
    assert task.tokenizer.decode(task.train[index]["input_ids"]) == text
    assert task.tokenizer.chat_template == TULU  # which is saved with the adapter


def test_metrics_are_means_over_all_tokens_of_the_assistant(settings: dict[str, Any]) -> None:
    task = make_task(settings_of(settings))
    model = task.fresh_model()
    losses, right = [], []
    with torch.no_grad():
        for row in task.data.splits["test"].rows:
            ids = task.tokenizer(as_written(row["messages"]), add_special_tokens=False)["input_ids"]
            logs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            text, learned = "", []
            for place, token in enumerate(ids):  # an answer stands between "assistant: " and its end
                learned.append("<s>assistant: " in text.rpartition("</s>")[2])
                text += task.tokenizer.decode([token])
                if learned[-1]:
                    losses.append(-logs[place - 1, token])
                    right.append(int(logs[place - 1].argmax()) == token)
    found = task.evaluate(model, "test")
    assert relative_error(torch.tensor(found["loss_per_token"]), torch.stack(losses).mean()) < rounding(model)
    assert found["token_accuracy"] == pytest.approx(100 * sum(right) / len(right))


def test_long_conversations_are_cut_or_refused(settings: dict[str, Any]) -> None:
    whole = make_task(settings_of(settings)).train
    starts = [next(i for i, label in enumerate(row["labels"]) if label != -100) for row in whole]
    limit = min(starts) + 1  # one token of the answers that begin first, and nothing of the others
    kept = [row for row, start in zip(whole, starts, strict=True) if start < limit]
    assert len(kept) not in (0, len(whole))
    assert all(len(row["input_ids"]) > limit for row in kept)
    cut = make_task(settings_of(settings, f"data.max_length={limit}")).train
    assert cut == [{name: ids[:limit] for name, ids in row.items()} for row in kept]
    with pytest.raises(
        ValueError, match=rf"chats.jsonl, row \d+, column 'messages': \d+ tokens, more .*={limit}; raise"
    ):
        make_task(settings_of(settings, f"data.max_length={limit}", "data.too_long=refuse"))
    with pytest.raises(ValueError, match=r"no row has anything of the assistant within data.max_length=3 tokens"):
        make_task(settings_of(settings, "data.max_length=3"))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("hello", "is no list of role and content"),
        ([{"role": "user"}], "is no list of role and content"),
        ([{"role": "assistant", "content": 3}], "is no list of role and content"),
        ([{"role": "user", "content": "hello"}], "no turn has role='assistant'"),
    ],
)
def test_what_is_no_conversation_is_refused(settings: dict[str, Any], folder: Path, row: Any, said: str) -> None:
    write_chats(folder, [*chats(), {"messages": row}])
    try:
        with pytest.raises(ValueError, match=f"chats.jsonl, row 25, column 'messages': .*{said}"):
            make_task(settings_of(settings))
    finally:
        write_chats(folder, chats())


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('no such role') }}", r"row \d+, column 'messages': no such role"),
        (TEMPLATE.replace("<s>assistant: ", "<s>answer: "), "writes a turn that ends in another way"),
        ("{{ messages | length }} " + TEMPLATE.replace("messages %}", "messages[-2:] %}"), "in another way"),
        (TEMPLATE.replace("</s>", ""), "writes turns in another way when more follow"),
    ],
)
def test_templates_that_cannot_be_learned_from_are_refused(settings: dict[str, Any], template: str, said: str) -> None:
    settings["data"]["chat_template"] = template
    with pytest.raises(ValueError, match=said):
        make_task(settings_of(settings))


@pytest.mark.parametrize("override", ["data.chat_template=false", "task=choice", "task=classification"])
def test_conversations_need_a_template_and_are_for_generation(settings: dict[str, Any], override: str) -> None:
    with pytest.raises(
        ValueError, match=r"data\.(messages needs task=generation|chat_template is for task=generation)"
    ):
        settings_of(settings, override)


@pytest.mark.parametrize("packing", [[], ["training.packing=true", "training.per_device_train_batch_size=2"]])
def test_a_run_measures_both(settings: dict[str, Any], tmp_path: Path, packing: list[str]) -> None:
    metrics = train(settings, *packing)
    assert metrics["metric"] == "token_accuracy"
    assert metrics["before_merge"]["test"]["loss_per_token"] > 0
    assert set(metrics["after_merge"]["test"]["exact"]) == {"token_accuracy", "loss_per_token"}
    result = json.loads((tmp_path / "run" / "method_comparison.json").read_text(encoding="utf-8"))
    last = result["train_info"]["metrics"][-1]
    assert last["test accuracy"] == metrics["before_merge"]["test"]["token_accuracy"] / 100
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))
    assert saved["data"]["messages"] == "messages"


@pytest.mark.slow
def test_the_config_of_tulu_trains_a_small_model(settings: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    """With everything as it is shipped but base, sizes and data, which are those of a test."""
    small = yaml.safe_dump(settings["base"], default_flow_style=True, width=10**6).strip()
    data = "data.files={train: chats.jsonl}", f"data.folder={folder}", "data.validation_rows=4", "data.test_rows=6"
    sizes = "data.max_length=128", "training.max_steps=2", "training.gradient_accumulation_steps=1"
    overrides = [f"base={small}", *data, *sizes, "training.use_cpu=true", f"output_dir={tmp_path / 'run'}"]
    read = train_settings(read_config(find_config("tulu-llama2-mora"), overrides))
    assert "14 train, 4 validation, 6 test" in describe_run(read)
    assert train_with(read)["steps"] == 2
