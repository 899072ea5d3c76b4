"""Every config that comes with the package: it parses, has its header, and those built in code dry-run."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_reslora.experiments.compare_settings import as_train_settings, compare_settings
from peft_reslora.experiments.config_file import read_config
from peft_reslora.experiments.dry_run import describe_run
from peft_reslora.experiments.settings import train_settings
from peft_reslora_cli.config_files import find_config, list_configs

TRAIN, COMPARE = list_configs("train"), list_configs("compare")


def test_there_are_configs() -> None:
    assert len(TRAIN) > 10
    assert {
        "compare/sst2",
        "compare/cola",
        "compare/rte",
        "compare/stsb",
        "compare/svamp",
        "compare/uuid",
        "compare/emoji",
    } <= set(COMPARE)


@pytest.mark.parametrize("name", TRAIN)
def test_a_training_config_parses(name: str) -> None:
    settings = train_settings(read_config(find_config(name)))
    assert settings.output_dir == name.rpartition("/")[2]


@pytest.mark.parametrize("name", COMPARE)
def test_a_comparison_parses_and_has_the_methods(name: str) -> None:
    settings = compare_settings(read_config(find_config(name)))
    number = {"Seventeen": 17, "Nineteen": 19}[find_config(name).read_text(encoding="utf-8")[2:].split(" ")[0]]
    assert len(settings.methods) == number
    assert len(settings.seeds) >= 5
    as_train_settings(settings)


@pytest.mark.parametrize("name", [*TRAIN, *COMPARE])
def test_a_header_says_what_it_costs_and_how_to_run_it(name: str) -> None:
    lines = find_config(name).read_text(encoding="utf-8").splitlines()
    header = [line[1:] for line in lines if line.startswith("#")][:4]
    assert "Memory: " in header[1]
    assert "Time: " in header[1]
    verb, called = header[2].split()[-2:]
    assert verb == name.partition("/")[0]
    assert find_config(called) == find_config(name)
    override = next(word for word in header[3].replace("'", "").split() if "=" in word)
    section = override.split("=")[0].split(".")[0]
    assert f"\n{section}:" in find_config(name).read_text(encoding="utf-8")


TEXTS = {name: find_config(name).read_text(encoding="utf-8") for name in TRAIN}
BUILT = [name for name, text in TEXTS.items() if "\n  config:" in text and "\n  hub:" in text]


@pytest.mark.parametrize("name", BUILT)
def test_a_base_that_is_built_in_code_dry_runs(name: str) -> None:
    text = describe_run(train_settings(read_config(find_config(name))))
    assert "trained parameters" in text
    assert "of the Hub, not read in a dry run" in text


def test_a_config_is_found_by_its_path_too() -> None:
    path = find_config(TRAIN[0])
    assert find_config(Path(path)) == path
