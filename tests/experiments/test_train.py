"""`train`: what a run leaves behind, that it resumes with the same numbers, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.tiny_runs import Killed, read_metrics, stop_at, tiny_run, write_films
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from peft_reslora import experiments
from peft_reslora.experiments import run, train, training
from peft_reslora.experiments.config_file import from_mapping
from peft_reslora.experiments.dry_run import describe_run
from peft_reslora.experiments.run import train_with
from peft_reslora.experiments.settings import train_settings
from peft_reslora.experiments.tasks import make_task
from peft_reslora.experiments.trainers import LoraPlus
from peft_reslora.experiments.tuners import callbacks_for
from peft_reslora.training import NestedRanks


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_films(tmp_path_factory.mktemp("films"))


@pytest.fixture(scope="module")
def finished(films: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "run"
    train(tiny_run(films, output))
    return output


def test_a_run_leaves_adapter_export_card_and_numbers(films: Path, finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        *("README.md", "adapter", "base", "lora"),
        *("config.yaml", "method_comparison.json", "metrics.json", "run.json"),
    }
    metrics = read_metrics(finished)
    assert len(metrics["losses"]) == metrics["steps"] == 10
    assert set(metrics["after_merge"]["test"]) == {"input_norm", "least_squares"}
    run = json.loads((finished / "run.json").read_text(encoding="utf-8"))
    assert {"versions", "git", "machine", "data_sha256"} <= set(run)
    resolved = yaml.safe_load((finished / "config.yaml").read_text(encoding="utf-8"))
    assert resolved["data"]["too_long"] == "truncate"  # a default
    assert "| test | accuracy |" in (finished / "README.md").read_text(encoding="utf-8")


def test_the_saved_adapter_and_its_export_do_as_well_as_was_measured(films: Path, finished: Path) -> None:
    task = make_task(train_settings(from_mapping(tiny_run(films, finished))))
    metrics = read_metrics(finished)
    for folder, expected in (("adapter", metrics["before_merge"]), ("lora", None)):
        base = AutoModelForSequenceClassification.from_pretrained(finished / "base")
        accuracy = task.evaluate(PeftModel.from_pretrained(base, finished / folder), "test")["accuracy"]
        wanted = expected["test"] if expected else metrics["after_merge"]["test"]["least_squares"]
        assert accuracy == wanted["accuracy"]


# LoHa draws a random number in every forward, so that the base's dropout would be another.
NO_DROPOUT = ("base.hidden_dropout_prob=0.0", "base.attention_probs_dropout_prob=0.0")


def test_a_run_that_was_killed_gives_the_same_numbers(
    films: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, norms that ResLoRA records, and a last checkpoint that was not written to its end."""
    settings = tiny_run(films, tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(stop_at(7, patch)):
        train(settings)
    last = tmp_path / "run" / "checkpoints" / "checkpoint-6"
    state = (last / "trainer_state.json").read_text(encoding="utf-8")
    (last / "trainer_state.json").write_text(state[: len(state) // 2], encoding="utf-8")
    train(settings)
    assert read_metrics(tmp_path / "run") == read_metrics(finished)


@pytest.mark.slow
def test_kill_9_at_any_moment_gives_the_same_numbers(films: Path, finished: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tiny_run(films, tmp_path / "run")), encoding="utf-8")
    command = [sys.executable, "-m", "peft_reslora_cli", "train", str(file)]
    for file in ("checkpoints/checkpoint-2", "checkpoints/checkpoint-9", "checkpoints/checkpoint-10", "base", "lora"):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (tmp_path / "run" / file).exists():
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True, capture_output=True)
    assert read_metrics(tmp_path / "run") == read_metrics(finished)


MOMENTS = ["before_anything", "measure", "merged_metrics", "save_adapter", "_export", "run_card"]


@pytest.mark.quick(moment=["merged_metrics", "save_adapter"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_was_killed_after_its_training_gives_the_same_numbers(
    films: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """While it measured, merged, or wrote, of which a half is left."""
    settings = tiny_run(films, tmp_path / "run")
    with monkeypatch.context() as patch:
        if moment == "before_anything":
            patch.setattr(run, "fit", killed)
        else:
            patch.setattr(run, moment, half_saved if moment == "save_adapter" else killed)
        with pytest.raises(Killed):
            train(settings)
    assert not (tmp_path / "run" / "metrics.json").exists()
    train(settings)
    assert read_metrics(tmp_path / "run") == read_metrics(finished)


def killed(*_: Any, **__: Any) -> None:
    raise Killed


def half_saved(trained: Any, folder: Path) -> None:
    trained.model.save_pretrained(str(folder))
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    raise Killed


def test_logs_for_tensorboard_stay_and_what_is_not_installed_is_named(
    films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        for option, package in (("report_to=trackio", "trackio"), ("report_to=wandb", "wandb")):
            with pytest.raises(ValueError, match=f"{option} needs the package {package}.*: pip install {package}"):
                train(tiny_run(films, tmp_path / "run"), option)
        with pytest.raises(ImportError, match=r"need datasets, .*yaml, which are.*pip install 'peft_reslora\[experim"):
            experiments._check_packages()
    assert not (tmp_path / "run").exists()
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = ("report_to=tensorboard", "training.logging_steps=1", "training.max_steps=3", "export=false")
    train(tiny_run(films, tmp_path / "run"), *options)
    events = EventAccumulator(str(tmp_path / "run" / "logs")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]


def test_a_folder_with_another_run_or_other_files_is_left_alone(films: Path, finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds a run with other settings"):
        train(tiny_run(films, finished), "seed=1")
    with pytest.raises(ValueError, match=r"holds this run, finished"):
        train(tiny_run(films, finished))
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match=r"holds other files"):
        train(tiny_run(films, tmp_path))


def test_bad_data_is_refused_before_the_folder_is_made(films: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train.tsv, row \d+, column 'nolabel': no such column"):
        train(tiny_run(films, tmp_path / "run"), "data.label=nolabel")
    with pytest.raises(ValueError, match=r"max_length=4000 is more than the 512 tokens"):
        train(tiny_run(films, tmp_path / "run"), "data.max_length=4000")
    with pytest.raises(ValueError, match=r"column 'sentence': \d+ tokens, more than data.max_length=3"):
        train(tiny_run(films, tmp_path / "run"), "data.max_length=3", "data.too_long=refuse")
    assert not (tmp_path / "run").exists()


def test_regression_with_a_new_head_trains_and_saves_it(films: Path, tmp_path: Path) -> None:
    settings = tiny_run(films, tmp_path / "run", task="regression", seed=3)
    metrics = train(settings, "data.label=score", "base.head=train", "export=false", "merge=true")
    assert set(metrics["before_merge"]["test"]) == {"pearson", "spearman"}
    names = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "merged"), tmp_path / "run" / "adapter"
    ).state_dict()
    assert any("modules_to_save" in name for name in names)


@pytest.mark.parametrize(
    "tuner",
    [
        {"peft_type": "ADALORA", "target_r": 2, "init_r": 3, "tinit": 2, "tfinal": 2, "deltaT": 1},
        {"peft_type": "RESLORA", "target_r": 2, "init_r": 3, "total_step": 8, "tinit": 2, "tfinal": 2},
        {"peft_type": "RESLORA", "target_r": 2, "tinit": 2, "tfinal": 2, "deltaT": 1},
        {"peft_type": "RESLORA", "r": 2, "nested_ranks": True},
        {"peft_type": "MORA", "r": 2},
        {"peft_type": "LOHA", "r": 2},
    ],
    ids=lambda tuner: tuner["peft_type"],
)
def test_any_peft_config_trains_by_its_type(films: Path, tmp_path: Path, tuner: dict[str, Any]) -> None:
    settings = tiny_run(films, tmp_path / "run", tuner={**tuner, "target_modules": ["query", "value"]})
    metrics = train(settings, *NO_DROPOUT)
    assert set(metrics["after_merge"]["test"]) == {"exact"}
    assert metrics["losses"][0] == pytest.approx(train_first_loss(films, tmp_path), abs=1e-5)


def train_first_loss(films: Path, tmp_path: Path) -> float:
    """The loss of the first step of another tuner: that of the base, with nothing added to it."""
    tuner = {"peft_type": "LORA", "r": 2, "target_modules": ["query", "value"]}
    settings = tiny_run(films, tmp_path / "lora", tuner=tuner)
    return train(settings, "training.max_steps=1", "export=false", *NO_DROPOUT)["losses"][0]


def test_lora_plus_trains_b_at_the_multiplied_rate(films: Path, tmp_path: Path) -> None:
    settings = train_settings(from_mapping(tiny_run(films, tmp_path), ["tuner.lora_dropout=0.0"]))
    task = make_task(settings)
    arguments = training.training_arguments(settings.training, 0, tmp_path, "none")
    trainer = LoraPlus(training.adapt(task.fresh_model(), training.make_config(settings.tuner)), arguments)
    trainer.loraplus_lr_ratio = 16.0
    rates = {
        id(parameter): group["lr"]
        for group in trainer.create_optimizer().param_groups
        for parameter in group["params"]
    }
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == (16e-2 if "lora_B" in name else 1e-2), name


def test_dry_run_says_what_would_be_trained_and_makes_nothing(films: Path, tmp_path: Path) -> None:
    text = describe_run(train_settings(from_mapping(tiny_run(films, tmp_path / "run"))))
    for part in ("BertForSequenceClassification", "120 train, 40 validation, 40 test", "steps: 10 of 8", "memory:"):
        assert part in text
    assert "bert.encoder.layer.*.attention.self.query" in text
    assert not (tmp_path / "run").exists()


def test_threads_are_those_of_the_settings(films: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        train_with(
            train_settings(from_mapping(tiny_run(films, tmp_path / "run"), ["threads=1", "training.max_steps=1"]))
        )
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_fewer_rows_than_a_batch_are_refused(films: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"5 training rows do not fill one batch of 8"):
        train(tiny_run(films, tmp_path / "run"), "data.train_rows=5")


@pytest.mark.slow
def test_an_annealed_run_merges_exactly_and_goes_on_after_a_kill(
    films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the shortcuts began to give way, so that the checkpoint holds their estimates."""
    whole = train(tiny_run(films, tmp_path / "whole"), "annealed=true")
    assert set(whole["after_merge"]["test"]) == {"annealed"}
    assert whole["after_merge"]["test"]["annealed"] == whole["before_merge"]["test"]
    assert whole["export"]["exact"]
    with monkeypatch.context() as patch:
        stop_at(9, patch)
        with pytest.raises(Killed):
            train(tiny_run(films, tmp_path / "killed"), "annealed=true")
    assert (tmp_path / "killed" / "checkpoints" / "checkpoint-8").is_dir()
    train(tiny_run(films, tmp_path / "killed"), "annealed=true")
    assert read_metrics(tmp_path / "killed") == read_metrics(tmp_path / "whole")


def test_only_shortcuts_whose_merge_is_an_estimate_are_annealed(films: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"override annealed=true: .* not RESLORA with shortcut='block'"):
        train(tiny_run(films, tmp_path / "run"), "annealed=true", "tuner.shortcut=block")
    lora = {"peft_type": "LORA", "r": 2, "target_modules": ["query"]}
    with pytest.raises(ValueError, match=r"override annealed=true: .* not LORA"):
        train(tiny_run(films, tmp_path / "run", tuner=lora), "annealed=true")
    assert not (tmp_path / "run").exists()


def test_nested_ranks_are_drawn_with_the_seed_of_the_run() -> None:
    (callback,) = callbacks_for({"peft_type": "RESLORA", "r": 4, "nested_ranks": True}, seed=7)
    assert isinstance(callback, NestedRanks)
    assert callback.seed == 7
    assert callbacks_for({"peft_type": "RESLORA", "r": 4}, seed=7) == []
