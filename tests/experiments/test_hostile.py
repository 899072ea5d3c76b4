"""What went wrong once: lines of other settings that counted, runs that diverged, folders that were mixed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.tiny_runs import tiny_comparison, tiny_run, write_films
from rich.console import Console

from peft_reslora.experiments import comparison, train
from peft_reslora.experiments.budget import Budget
from peft_reslora.experiments.compare_settings import CompareSettings, compare_settings
from peft_reslora.experiments.comparison import Comparison, prepare, run_identity
from peft_reslora.experiments.config_file import from_mapping, read_config
from peft_reslora.experiments.data import read_file
from peft_reslora.experiments.lines import append_line, read_lines
from peft_reslora.experiments.report import findings, table_rows, terminal_table, write_report
from peft_reslora.experiments.settings import HubData, as_config, train_settings
from peft_reslora.experiments.summary import summarize


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_films(tmp_path_factory.mktemp("films"), rows=120)


def settings_of(films: Path, output: Path, *overrides: str) -> CompareSettings:
    return compare_settings(from_mapping(tiny_comparison(films, output), overrides))


def prepared(films: Path, output: Path, *overrides: str) -> Comparison:
    return prepare(settings_of(films, output, *overrides), (1, 1), lambda line: None)


def without_training(comparison_: Comparison, best: int = -11) -> Comparison:
    """Lines as if everything had run: the metric falls with the distance from the best rate."""
    lines = {
        "_cost": lambda name, k, seed: {"step_ratio": 1.5, "memory_ratio": 1.0, "pairs": 1},
        "_search": lambda name, k, seed: {"validation": 90.0 - abs(k - best), "losses": [1.0]},
        "_report": lambda name, k, seed: {
            "test": 80.0 + seed,
            "validation": 80.0,
            "merged": {},
            "losses": [1.0, 0.5],
            "steps": 2,
            "native_bytes": 1,
            "exported_bytes": 1,
            "forgetting": None,
        },
    }
    for name, make in lines.items():
        object.__setattr__(comparison_, name, make)
    for name in comparison_.settings.methods:
        comparison_.run_method(name)
    return comparison_


def test_which_file_is_which_split_and_renamed_columns_decide_the_identity(films: Path, tmp_path: Path) -> None:
    shutil.copy(films / "test.tsv", tmp_path / "test.tsv")
    shutil.copy(films / "train.tsv", tmp_path / "train.tsv")
    rows = (films / "test.tsv").read_text(encoding="utf-8").splitlines()
    (tmp_path / "other.tsv").write_text("\n".join(rows[:20]) + "\n", encoding="utf-8")
    keys = set()
    for validation, test in (("test", "other"), ("other", "test")):
        files = f"data.files={{train: train.tsv, validation: {validation}.tsv, test: {test}.tsv}}"
        keys.add(prepared(tmp_path, tmp_path / test, files)._key("report", "LoRA", -12, 0))
    assert len(keys) == 2
    one = prepared(films, tmp_path / "one")
    identities = []
    for rename in ({}, {"score": "label"}):
        data = dataclasses.replace(one.settings.data, folder=None, hub=HubData("films", rename=rename))
        settings = dataclasses.replace(one.settings, data=data)
        identities.append(run_identity(settings, "LoRA", one.budgets["LoRA"].tuner, one.task))
    assert identities[0] != identities[1]


@pytest.mark.slow
def test_a_cost_counts_for_its_reference_only(films: Path, tmp_path: Path) -> None:
    one, other = prepared(films, tmp_path), prepared(films, tmp_path, "reference=ResLoRA")
    assert one.budgets["LoRA"].tuner == other.budgets["LoRA"].tuner
    assert one._key("cost", "LoRA", 0, 0) != other._key("cost", "LoRA", 0, 0)
    assert one._key("report", "LoRA", -12, 0) == other._key("report", "LoRA", -12, 0)


@pytest.mark.quick(override=["seeds=[0, 1, 3]"])
@pytest.mark.parametrize(
    "override", ["seeds=[0, 1, 3]", "search_seed=101", "rates.highest=1e-1", "reference=ResLoRA"], ids=lambda o: o[:9]
)
def test_only_lines_of_the_present_settings_count(
    films: Path, tmp_path: Path, override: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "write_report", lambda *_: None)
    first = without_training(prepared(films, tmp_path))
    assert [len(summary.tests) for summary in first.report()] == [3, 3, 3]
    changed = prepared(films, tmp_path, override)
    for summary in changed.report():
        if override.startswith("seeds"):
            assert sorted(summary.tests) == [0, 1]
        elif override.startswith("reference"):
            assert summary.cost == {}
        else:
            assert not summary.tests
            assert len(summary.scores) == (0 if override.startswith("search") else 2)


@pytest.mark.slow
def test_runs_at_a_rate_that_the_search_no_longer_chooses_do_not_count(films: Path, tmp_path: Path) -> None:
    whole = without_training(prepared(films, tmp_path))
    for line in whole.lines():
        if line["kind"] == "report" and line["method"] == "LoRA":
            stray = {**line, "key": whole._key("report", "LoRA", -8, line["seed"]), "quarter": -8, "rate": 1e-2}
            append_line(whole.path, {**stray, "test": 1.0})
    lora = next(s for s in whole.report() if s.name == "LoRA")
    assert (lora.rate, lora.tests) == (1.778e-3, {0: 80.0, 1: 81.0, 2: 82.0})


def test_repeated_seeds_are_refused(films: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="all different"):
        settings_of(films, tmp_path, "seeds=[0, 1, 2, 2]")


@pytest.mark.quick(value=[None])
@pytest.mark.parametrize("value", [None, float("nan")])
def test_a_run_that_diverged_is_said_and_not_counted(films: Path, tmp_path: Path, value: Any) -> None:
    whole = without_training(prepared(films, tmp_path))
    lines = [
        {**line, "test": value, "losses": [1.0, value], "merged": {"exact": value}}
        if line["kind"] == "report" and (line["method"] == "DoRA" or (line["method"], line["seed"]) == ("ResLoRA", 1))
        else {**line, "validation": value}
        if line["kind"] == "search" and line["method"] == "DoRA"
        else line
        for line in whole.lines()
    ]
    summaries = summarize(list(whole.settings.methods), "LoRA", whole.budgets, lines)
    write_report(tmp_path, whole.settings, whole.task, summaries)
    assert [row[3] for row in table_rows(summaries)] == ["3", "2 (1 diverged)", "0 (3 diverged)"]
    said = "\n".join(findings(summaries, "LoRA"))
    assert "Diverged, and not counted: ResLoRA, seed 1." in said
    assert "Diverged, and not counted: DoRA, seeds 0, 1, 2." in said
    assert "nan" not in (tmp_path / "table.csv").read_text(encoding="utf-8")


def test_half_a_line_may_end_within_a_character_and_a_line_needs_a_key(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    append_line(path, {"key": "a", "method": "é"})
    with path.open("ab") as file:
        file.write('{"key": "b", "method": "é'.encode()[:-1])
    assert [line["key"] for line in read_lines(tmp_path)] == ["a"]
    append_line(path, {"key": "c"})
    assert [line["key"] for line in read_lines(tmp_path)] == ["a", "c"]
    for broken in (b'{"no": "key"}\n', b"[1]\n"):
        path.write_bytes(b'{"key": "a"}\n' + broken)
        with pytest.raises(ValueError, match=r"runs.jsonl, line 2 has no key"):
            read_lines(tmp_path)


def test_compare_refuses_several_processes(films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="compare runs in one process; start it without"):
        prepared(films, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_written_config_gives_the_same_settings(films: Path, tmp_path: Path) -> None:
    whole = prepared(films, tmp_path / "out")
    assert compare_settings(read_config(tmp_path / "out" / "config.yaml")) == whole.settings
    for base in (tiny_run(films, tmp_path)["base"], "minilm"):
        settings = train_settings(from_mapping(tiny_run(films, tmp_path, base=base)))
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(as_config(settings)), encoding="utf-8")
        assert train_settings(read_config(tmp_path / "run.yaml")) == settings


def test_an_override_within_the_base_keeps_its_name(films: Path, tmp_path: Path) -> None:
    settings = train_settings(from_mapping(tiny_run(films, tmp_path, base="minilm"), ["base.head=fit"]))
    assert (settings.base.name, settings.base.head) == ("minilm", "fit")


def test_a_folder_is_named_after_the_config_and_holds_one_comparison(films: Path, tmp_path: Path) -> None:
    values = tiny_comparison(films, tmp_path)
    del values["output_dir"]
    (tmp_path / "films.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    assert compare_settings(read_config(tmp_path / "films.yaml")).output_dir == "films"
    prepared(films, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for override in ("title=Other", "data.label=score", "data.hub.name=other"):
        with pytest.raises(ValueError, match=r"holds another comparison, 'Films' .*; give another output_dir"):
            prepared(films, tmp_path / "out", override)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    prepared(shutil.copytree(films, tmp_path / "elsewhere"), tmp_path / "out")  # the same data at another place
    written = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text(encoding="utf-8"))
    del written["data"]["images"]
    (tmp_path / "out" / "config.yaml").write_text(yaml.safe_dump(written), encoding="utf-8")
    prepared(films, tmp_path / "out")  # begun by a version that did not know one of the settings


def started(films: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a run that has ended, but for its metrics: as one that was killed near its end."""
    settings = tiny_run(films, output, **changes)
    train(settings, "training.max_steps=4", "export=false")
    (output / "metrics.json").unlink()
    return settings


def test_a_run_does_not_go_on_with_other_data(films: Path, tmp_path: Path) -> None:
    data = shutil.copytree(films, tmp_path / "data")
    settings = started(data, tmp_path / "run")
    text = (data / "test.tsv").read_text(encoding="utf-8").splitlines()
    (data / "test.tsv").write_text("\n".join(text[:-1]) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"holds a run on other data: test changed .* give another output_dir"):
        train(settings, "training.max_steps=4", "export=false")


def test_adalora_does_not_go_on(films: Path, tmp_path: Path) -> None:
    tuner = {"peft_type": "ADALORA", "target_r": 2, "target_modules": ["query"], "tinit": 1, "tfinal": 1}
    settings = started(films, tmp_path / "run", tuner=tuner)
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    for name in ("trainer_state.json", "optimizer.pt", "rng_state.pth"):
        (checkpoint / name).write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"run of AdaLoRA that was stopped. .* in a new folder"):
        train(settings, "training.max_steps=4", "export=false")


@pytest.mark.parametrize("name", ["group_by_length=true", "train_sampling_strategy=group_by_length"])
def test_rows_grouped_by_length_are_refused(films: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"gives the rows another order after a resume and for each tuner"):
        train_settings(from_mapping(tiny_run(films, tmp_path), [f"training.{name}"]))


@pytest.mark.parametrize("peft_type", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_a_tuner_without_a_merge_is_saved_and_measured(films: Path, tmp_path: Path, peft_type: str) -> None:
    tuner = {"peft_type": peft_type, "num_virtual_tokens": 2, "task_type": "SEQ_CLS"}
    metrics = train(tiny_run(films, tmp_path / "run", tuner=tuner), "training.max_steps=1", "merge=true")
    assert metrics["after_merge"] == {}
    assert "refused" in metrics["export"]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_tuner_without_a_rank_is_refused_by_name(films: Path, tmp_path: Path) -> None:
    values = tiny_comparison(films, tmp_path / "out")
    values["methods"]["Scales"] = {"tuner": {"peft_type": "IA3", "feedforward_modules": []}}
    settings = compare_settings(from_mapping(values))
    with pytest.raises(ValueError, match=r"methods.Scales: IA3 has no rank.*match_parameters=false.*LORA"):
        prepare(settings, (1, 1), lambda line: None)
    assert not (tmp_path / "out").exists()
    unmatched = dataclasses.replace(settings, match_parameters=False)
    assert prepare(unmatched, (1, 1), lambda line: None).budgets["Scales"].parameters > 0


def test_a_training_that_diverged_warns_and_leaves_json(films: Path, tmp_path: Path) -> None:
    settings = tiny_run(films, tmp_path / "run")
    with pytest.warns(UserWarning, match="The training diverged"):
        metrics = train(settings, "training.max_steps=3", "training.learning_rate=1e30", "training.max_grad_norm=0")
    assert metrics["after_merge"] == {}
    text = (tmp_path / "run" / "metrics.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail)["losses"][-1] is None


def test_names_are_shown_as_they_are() -> None:
    budget = Budget({"peft_type": "LORA"}, 8, 100, 1.0)
    console = Console(record=True, width=200)
    summaries = summarize(["[red]A[/red]"], "[red]A[/red]", {"[red]A[/red]": budget}, [])
    console.print(terminal_table(summaries, "[bold]B[/]"))
    text = console.export_text()
    assert "[red]A[/red]" in text
    assert "[bold]B[/]" in text


def test_jsonl_ends_a_row_at_a_line_end_only(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"a": "x\u2028y"}\n{"a": "z"}\n', encoding="utf-8")
    assert read_file(tmp_path / "d.jsonl") == [{"a": "x\u2028y"}, {"a": "z"}]


def test_a_validation_split_of_the_hub_counts(films: Path, tmp_path: Path) -> None:
    values = tiny_comparison(films, tmp_path)
    values["data"] = {"hub": {"name": "films", "validation": "validation"}, "text": ["sentence"], "label": "label"}
    assert compare_settings(from_mapping(values)).data.validation_rows is None
    values["data"]["hub"] = {"name": "films"}
    values["data"]["files"] = {"train": "a.tsv", "validation": "b.tsv"}  # which the Hub goes before
    with pytest.raises(ValueError, match="set validation_rows"):
        compare_settings(from_mapping(values))


def test_tuners_without_rank_or_merge_are_compared_unmatched(
    films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = tiny_comparison(films, tmp_path / "out")
    values["methods"] = {"LoRA": values["methods"]["LoRA"]}
    values["methods"]["Prompt"] = {"tuner": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}}
    del values["tuner"]
    values["methods"]["LoRA"]["tuner"]["target_modules"] = ["query"]
    values["methods"]["Prompt"]["tuner"]["task_type"] = "SEQ_CLS"
    values["methods"]["Scales"] = {
        "tuner": {"peft_type": "IA3", "target_modules": ["query"], "feedforward_modules": []}
    }
    whole = prepare(
        compare_settings(from_mapping(values, ["match_parameters=false", "training.max_steps=1"])),
        (1, 1),
        lambda line: None,
    )
    for name in ("Prompt", "Scales"):
        assert whole._cost(name, 0, 0)["step_ratio"] > 0
        line = whole._report(name, -12, 0)
        assert line["test"] >= 0
        assert bool(line["merged"]) == (name == "Scales")
        assert line["native_bytes"] > 0
