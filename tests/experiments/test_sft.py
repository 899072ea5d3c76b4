"""Generation by TRL: packed rows do not see each other, losses are those without packing, chats end their turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers.adapters import adapted
from helpers.gradients import assert_gradients_close
from helpers.tiny_models import narrow_llama
from helpers.tiny_runs import stop_at, tiny_generation, write_sums
from helpers.tolerances import MODEL64, rounding
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from peft_reslora import MoRAConfig, ResLoRAConfig
from peft_reslora.experiments import train
from peft_reslora.experiments.config_file import from_mapping
from peft_reslora.experiments.generation import completion_collator
from peft_reslora.experiments.settings import train_settings
from peft_reslora.experiments.sft import check_packing
from peft_reslora.experiments.tasks import make_task

ROWS = [
    {"input_ids": [1, 5, 3, 9], "labels": [-100, -100, 3, 9]},
    {"input_ids": [1, 4, 4, 7, 6, 2], "labels": [-100, -100, -100, 7, 6, 2]},
    {"input_ids": [1, 8, 2], "labels": [-100, 8, 2]},
    {"input_ids": [1, 11, 12, 13, 2], "labels": [-100, -100, 12, 13, 2]},
]
TUNERS = {
    "input": ResLoRAConfig(r=2, target_modules="all-linear", shortcut="input"),
    "block": ResLoRAConfig(r=2, target_modules="all-linear", shortcut="block"),
    "middle": ResLoRAConfig(r=2, target_modules="all-linear", shortcut="middle", pre_num=-1),
    "mora": MoRAConfig(r=2, target_modules="all-linear"),
}
TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ': ' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant: ' }}{% endif %}"
)


def losses_and_gradients(model: Any, batch: dict[str, Any]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The loss of each trained token, in order of their size, and the gradients of their sum."""
    model.zero_grad()
    labels = batch["labels"]
    given = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**given, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
    losses.sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return sorted(losses[labels[:, 1:] != -100].tolist()), found


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tuner", TUNERS)
def test_packed_tokens_have_the_losses_and_gradients_of_unpacked_ones(tuner: str, attention: str) -> None:
    """Two packs in one batch; shortcuts pass values on from token to the same token only."""
    model = adapted(narrow_llama(attn_implementation=attention), TUNERS[tuner])
    packs = pack_dataset(Dataset.from_list(ROWS), 10, "bfd")
    assert sorted(map(sorted, packs["seq_lengths"])) == [[3, 5], [4, 6]]
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    apart, gradients = losses_and_gradients(model, completion_collator(0)(ROWS))
    together, packed_gradients = losses_and_gradients(model, collate(list(packs)))
    bound = MODEL64 if attention == "sdpa" else rounding(100)  # eager attention computes its softmax in float32
    assert together == pytest.approx(apart, rel=bound)
    assert_gradients_close(packed_gradients, gradients, bound=bound)


def test_a_model_whose_packed_rows_see_each_other_is_refused() -> None:
    model = narrow_llama()
    check_packing(model, ROWS)

    class NoPositions:
        """A model that leaves the positions aside, as one without masks for packs does."""

        config = model.config

        def __call__(self, input_ids: torch.Tensor, **_: Any) -> Any:
            return model(input_ids=input_ids)

    with pytest.raises(ValueError, match=r"packing=true: in NoPositions with sdpa attention, rows of one pack see"):
        check_packing(NoPositions(), ROWS)


@pytest.fixture
def settings(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    sums = write_sums(tmp_path_factory.getbasetemp() / "sums")
    monkeypatch.setenv("PEFT_RESLORA_CACHE", str(sums / "cache"))
    return tiny_generation(sums, tmp_path / "run")


def losses_of(settings: dict[str, Any], output: Path, *overrides: str) -> list[float]:
    losses: list[float] = train(settings, f"output_dir={output}", "export=false", *overrides)["losses"]
    return losses


@pytest.mark.slow
def test_trl_trains_as_the_trainer_does(settings: dict[str, Any], tmp_path: Path) -> None:
    """With two batches a step, of which each counts by its tokens."""
    twice = (
        "training.max_steps=3",
        "training.gradient_accumulation_steps=2",
        "training.per_device_train_batch_size=4",
    )
    plain = losses_of(settings, tmp_path / "plain", *twice)
    by_trl = losses_of(settings, tmp_path / "trl", *twice, "training.completion_only_loss=true")
    once = losses_of(settings, tmp_path / "once", "training.max_steps=3", "training.per_device_train_batch_size=8")
    assert by_trl == pytest.approx(plain, abs=1e-5)
    assert once == pytest.approx(plain, abs=1e-5)


@pytest.mark.slow
def test_packed_rows_train_and_go_on_where_they_were(settings: dict[str, Any], tmp_path: Path) -> None:
    options = ("training.packing=true", "training.per_device_train_batch_size=2", "training.max_steps=4")
    whole = losses_of(settings, tmp_path / "whole", *options)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(stop_at(3, patch)):
        losses_of(settings, tmp_path / "resumed", *options)
    assert losses_of(settings, tmp_path / "resumed", *options) == whole


def test_packs_that_fill_no_batch_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"\d+ packs of rows do not fill one batch of 80; lower"):
        train(settings, "training.packing=true", "training.per_device_train_batch_size=80")


def test_the_prompt_counts_if_it_is_to(settings: dict[str, Any]) -> None:
    task = make_task(train_settings(from_mapping(settings, ["training.completion_only_loss=false"])))
    assert all(row["labels"] == row["input_ids"] for row in task.train)


def test_a_chat_is_trained_up_to_the_end_of_its_turn(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"data.chat_template: the tokenizer .* has no chat template"):
        make_task(train_settings(from_mapping(settings, ["data.chat_template=true"])))
    give_template(monkeypatch, TEMPLATE)
    task = make_task(train_settings(from_mapping(settings, ["data.chat_template=true"])))
    for row in task.train[:4]:
        text = task.tokenizer.decode(row["input_ids"])
        assert text.startswith("<s>user: Tom has")
        assert text.endswith("</s>")  # without the line end that the template writes after it
        trained = [token for token in row["labels"] if token != -100]
        assert task.tokenizer.decode(trained).count("+") == 1
        assert "assistant" not in task.tokenizer.decode(trained)
    options = ("data.chat_template=true", "training.packing=true", "training.max_steps=1", "export=false")
    metrics = train(settings, *options, "training.per_device_train_batch_size=2")
    assert 0 <= metrics["before_merge"]["test"]["exact_match"] <= 100
    (tmp_path / "run" / "metrics.json").unlink()
    give_template(monkeypatch, "another day" + TEMPLATE)
    with pytest.raises(ValueError, match=r"holds a run on other data: chats changed"):
        train(settings, *options, "training.per_device_train_batch_size=2")


def give_template(monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    from peft_reslora.experiments import generation

    original = generation.load_generation_base

    def load(base: Any) -> Any:
        model, tokenizer, held_out = original(base)
        tokenizer.chat_template = template
        return model, tokenizer, held_out

    monkeypatch.setattr(generation, "load_generation_base", load)


def test_a_template_that_ends_a_turn_in_another_way_is_refused(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    give_template(monkeypatch, TEMPLATE.replace("'<s>assistant: '", "'<s>answer: '"))
    with pytest.raises(ValueError, match=r"writes a turn that ends in another way.*chat_template_kwargs"):
        make_task(train_settings(from_mapping(settings, ["data.chat_template=true"])))


def test_options_of_trl_are_for_generation_and_not_for_adalora(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"unknown key 'training.pakking'. Did you mean 'packing'"):
        train_settings(from_mapping(settings, ["training.pakking=true"]))
    with pytest.raises(ValueError, match=r"training.packing='yes please' must be true or false"):
        train_settings(from_mapping(settings, ["training.packing=yes please"]))
    with pytest.raises(ValueError, match=r"unknown key 'training.packing'"):
        train_settings(from_mapping(settings, ["training.packing=true", "task=classification"]))
    with pytest.raises(ValueError, match=r"data.chat_template is for task=generation"):
        train_settings(from_mapping(settings, ["data.chat_template=true", "task=classification"]))
    settings["tuner"] = {"peft_type": "ADALORA", "target_r": 2, "tinit": 1, "tfinal": 1, "target_modules": ["q_proj"]}
    with pytest.raises(ValueError, match=r"ADALORA adds a penalty .* leave packing and completion_only_loss out"):
        train(settings, "training.completion_only_loss=true")
