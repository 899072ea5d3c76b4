"""YAML with strict keys: what is unknown or of another type is refused with its line and what is accepted."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from helpers.tiny_runs import tiny_comparison, tiny_run

from peft_reslora.experiments.compare_settings import compare_settings
from peft_reslora.experiments.config_file import from_mapping, read_config
from peft_reslora.experiments.settings import train_settings


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_run(tmp_path, tmp_path / "out"), sort_keys=False), encoding="utf-8")
    return path


def line_of(file: Path, text: str) -> int:
    lines = file.read_text(encoding="utf-8").splitlines()
    return next(number for number, line in enumerate(lines, start=1) if text in line)


def test_a_file_gives_typed_settings_with_defaults(file: Path) -> None:
    settings = train_settings(read_config(file, ["training.learning_rate=3e-4", "seed=5"]))
    assert settings.training["learning_rate"] == 3e-4  # a string in YAML 1.1
    assert (settings.seed, settings.base.fields["hidden_size"], settings.data.too_long) == (5, 16, "truncate")


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("max_steps", "max_stepz", r"unknown key 'training.max_stepz'. Did you mean 'max_steps'\?"),
        ("lora_alpha", "lora_alfa", r"unknown key 'tuner.lora_alfa'. Did you mean 'lora_alpha'\?"),
        ("hidden_size", "hiden_size", r"unknown key 'base.hiden_size'. Did you mean 'hidden_size'\?"),
        ("validation_rows", "validation_row", r"Did you mean 'validation_rows'\?"),
        ("calibration_rows", "calibrate_rows", r"Did you mean 'calibration_rows'\?"),
        ("max_steps: 10", "max_steps: many", r"training.max_steps='many' must be an integer"),
        ("r: 2", "r: two", r"tuner.r='two' must be an integer"),
        ("max_length: 16", "max_length: 0", r"data.max_length=0 must be a positive integer"),
        ("task: classification", "task: classify", r"task='classify' must be one of classification, regression"),
        ("peft_type: RESLORA", "peft_type: RESLARA", r"tuner.peft_type='RESLARA' must be one of"),
        ("config: bert", "config: brt", r"'brt' is no model type of transformers. Did you mean"),
        ("use_cpu: true", "use_cpu: 1", r"training.use_cpu=1 must be true or false"),
        ("use_cpu: true", "seed: 1", r"training.seed is not set here, write seed at the top level"),
    ],
)
def test_what_is_unknown_or_of_another_type_is_refused_with_its_line(
    file: Path, right: str, wrong: str, message: str
) -> None:
    file.write_text(file.read_text(encoding="utf-8").replace(right, wrong, 1), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"run.yaml, line {line_of(file, wrong)}: .*{message}"):
        train_settings(read_config(file))


def test_an_override_is_as_strict_and_is_named(file: Path) -> None:
    with pytest.raises(ValueError, match=r"override tuner.rr=3: unknown key 'tuner.rr'. Did you mean 'r'"):
        train_settings(read_config(file, ["tuner.rr=3"]))
    with pytest.raises(ValueError, match=r"'seed' is no override; write key=value"):
        read_config(file, ["seed"])
    with pytest.raises(ValueError, match=r"override no.such=1: unknown key 'no'"):
        train_settings(read_config(file, ["no.such=1"]))


def test_a_key_that_stands_twice_and_a_missing_one_are_refused(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    file.write_text(text + "task: regression\n", encoding="utf-8")
    with pytest.raises(ValueError, match="key 'task' stands twice"):
        read_config(file)
    file.write_text(text.replace("task: classification\n", ""), encoding="utf-8")
    with pytest.raises(ValueError, match="task is missing"):
        train_settings(read_config(file))


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "5"])
def test_what_is_no_mapping_is_refused_with_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"x\.yaml"):
        read_config(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reference=Lora", r"reference='Lora' is none of LoRA, ResLoRA, DoRA"),
        ("training.learning_rate=1e-3", r"the comparison sets it; see rates"),
        ("seeds=[0, 1]", r"seeds=\[0, 1\] must be at least three"),
        ("search_seed=2", r"without search_seed=2"),
        ("rates.lowest=1e-1", r"rates.lowest must be below rates.highest"),
        ("data.validation_rows=null", r"set validation_rows"),
        ("methods.LoRA.tuner.alpha=3", r"unknown key 'methods.LoRA.tuner.alpha'"),
        ("methods.LoRA.loraplus=3", r"Did you mean 'loraplus_lr_ratio'"),
    ],
)
def test_a_comparison_that_would_mean_nothing_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare_settings(from_mapping(tiny_comparison(tmp_path, tmp_path / "out"), [override]))


def test_common_fields_go_into_every_method(tmp_path: Path) -> None:
    settings = compare_settings(from_mapping(tiny_comparison(tmp_path, tmp_path / "out")))
    assert all(method.tuner["target_modules"] == ["query", "value"] for method in settings.methods.values())
