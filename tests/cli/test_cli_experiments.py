"""The commands `train`, `compare` and `configs`, as they are typed."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from helpers.tiny_runs import tiny_comparison, tiny_run, write_films

from peft_reslora_cli import main


@pytest.fixture
def files(tmp_path: Path) -> Path:
    films = write_films(tmp_path / "films", rows=80)
    for name, settings in (
        ("run", tiny_run(films, tmp_path / "out")),
        ("comparison", tiny_comparison(films, tmp_path / "all")),
    ):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return tmp_path


def test_a_dry_run_prints_and_makes_nothing(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(files / "run.yaml"), "training.max_steps=7", "--dry-run"]) == 0
    assert "steps: 7 of 8 rows" in capsys.readouterr().out
    assert not (files / "out").exists()


def test_an_experiment_that_pefts_loop_cannot_run_is_refused_in_one_line(files: Path) -> None:
    folder = files / "experiments" / "reslora" / "films"
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(files / "run.yaml"), "--experiment", str(folder)])
    assert "PEFT's method_comparison cannot run these settings: it needs task=generation" in str(stopped.value.code)
    assert not folder.exists()


def test_an_experiment_is_written_and_nothing_is_trained(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = files / "experiments" / "reslora" / "films"
    schedule = ["training.lr_scheduler_type=constant", "training.optim=adamw_torch"]
    base = ["task=generation", "base={name: some/model}"]
    assert main(["train", str(files / "run.yaml"), *base, *schedule, "--experiment", str(folder)]) == 0
    assert f"the experiment is in {folder}" in capsys.readouterr().out
    assert (folder / "adapter_config.json").is_file()
    assert not (files / "out").exists()


def test_train_says_what_came_out(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(files / "run.yaml"), "training.max_steps=2"]) == 0
    out = capsys.readouterr().out
    assert "test: accuracy" in out
    assert f"everything is in {files / 'out'}" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "sst2-minilm-reslorra"], "did you mean"),
        (["train", "{run}", "tuner.rr=2"], "override tuner.rr=2: unknown key 'tuner.rr'"),
        (["compare", "{comparison}", "tuner.rr=2"], "override tuner.rr=2: unknown key 'methods.LoRA.tuner.rr'"),
    ],
)
def test_what_is_refused_is_one_line(
    files: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {name: str(files / f"{name}.yaml") for name in ("run", "comparison")}
    with pytest.raises(SystemExit) as stopped:
        main([argument.format(**paths) for argument in arguments])
    assert said in str(stopped.value.code)
    assert "\n" not in str(stopped.value.code)


def test_compare_runs_a_part_and_shows_a_table(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(files / "comparison.yaml"), "training.max_steps=1", "--shard", "1/3"]) == 0
    out = capsys.readouterr().out
    assert "report LoRA" in out
    assert "report DoRA" not in out
    assert (files / "all" / "REPORT.md").is_file()


def test_a_shard_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["compare", "sst2", "--shard", "5/4"])
    assert "'5/4' is no part such as 1/4" in capsys.readouterr().err


def test_configs_are_listed_with_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", "compare"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("compare/sst2") and "Nineteen tuners on SST-2" in line for line in lines)


def test_overrides_may_stand_on_both_sides_of_an_option(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """argparse alone would not recognize those after it."""
    run = str(files / "run.yaml")
    assert main(["train", run, "seed=3", "--dry-run", "training.max_steps=7", "tuner.r=3"]) == 0
    assert "steps: 7 of 8 rows" in capsys.readouterr().out
    for rest in (["--dry-runn", "seed=3"], ["seed=3", "--", "-x"]):
        with pytest.raises(SystemExit, match="2"):
            main(["train", run, "--dry-run", *rest])


def test_words_that_a_command_does_not_take_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["quickstart", "training.max_steps=7"])
    assert "unrecognized arguments: training.max_steps=7" in capsys.readouterr().err
