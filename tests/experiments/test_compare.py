"""`compare`: equal budgets, lines that survive interruption and shards, and a report that says what they allow."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.tiny_runs import tiny_comparison, tiny_run, write_films
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_reslora.experiments import compare, comparison
from peft_reslora.experiments.budget import Budget, count_parameters, match_budget, nearest_rank, with_rank
from peft_reslora.experiments.config_file import from_mapping
from peft_reslora.experiments.cost import relative_cost
from peft_reslora.experiments.figures import shown_range
from peft_reslora.experiments.lines import append_line, read_lines
from peft_reslora.experiments.report import HEADER, findings, table_rows
from peft_reslora.experiments.settings import train_settings
from peft_reslora.experiments.statistics import smoothed, window_of
from peft_reslora.experiments.summary import MethodSummary, summarize
from peft_reslora.experiments.tasks import make_task
from peft_reslora.experiments.training import with_head


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_films(tmp_path_factory.mktemp("films"), rows=120)


@pytest.fixture(scope="module")
def finished(films: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("finished") / "comparison"
    said: list[str] = []
    compare(tiny_comparison(films, folder), say=said.append)
    return folder, said


def without_times(folder: Path) -> list[dict[str, Any]]:
    lines = [{n: v for n, v in line.items() if n != "train_seconds"} for line in read_lines(folder)]
    return sorted((line for line in lines if line["kind"] != "cost"), key=lambda line: line["key"])


@pytest.mark.slow
def test_every_method_has_its_cost_its_search_and_its_seeds(finished: tuple[Path, list[str]]) -> None:
    folder, said = finished
    lines = read_lines(folder)
    for method in ("LoRA", "ResLoRA", "DoRA"):
        own = [line for line in lines if line["method"] == method]
        assert len([line for line in own if line["kind"] == "cost"]) == 1
        searched = {line["quarter"]: line["validation"] for line in own if line["kind"] == "search"}
        reported = [line for line in own if line["kind"] == "report"]
        assert sorted(line["seed"] for line in reported) == [0, 1, 2]
        best = max(searched.values())
        assert {line["quarter"] for line in reported} == {min(k for k, v in searched.items() if v == best)}
        assert all({"before_merge", "after_merge", "native_bytes", "test"} <= set(line) for line in reported)
    assert any("DoRA: rank" in line and "NOT EQUAL" in line for line in said)
    assert not any("ResLoRA: rank" in line and "NOT EQUAL" in line for line in said)


@pytest.mark.slow
def test_all_methods_see_the_same_rows_in_the_same_order(finished: tuple[Path, list[str]]) -> None:
    """So that they start at the same loss: the base's, with nothing added."""
    lines = [line for line in read_lines(finished[0]) if line["kind"] == "report"]
    for seed in (0, 1, 2):
        first = [line["losses"][0] for line in lines if line["seed"] == seed]
        assert len(first) == 3
        assert max(first) - min(first) < 1e-4
    assert len({line["losses"][0] for line in lines}) >= 3  # and another order for each seed


@pytest.mark.slow
def test_a_comparison_that_was_interrupted_goes_on(
    films: Path, finished: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends in the middle of a line, and then makes no run twice."""
    settings = tiny_comparison(films, tmp_path / "again")
    (tmp_path / "again").mkdir()
    done = (finished[0] / "runs.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "again" / "runs.jsonl").write_bytes(b"".join(done[:-2]) + done[-2][:30])
    runs = []
    original = comparison.fit
    monkeypatch.setattr(comparison, "write_report", lambda *_: None)
    monkeypatch.setattr(comparison, "fit", lambda *a, **k: runs.append(1) or original(*a, **k))
    compare(settings)
    assert len(runs) == 2
    assert without_times(tmp_path / "again") == without_times(finished[0])


@pytest.mark.slow
def test_shards_joined_in_one_folder_are_the_whole(
    films: Path, finished: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "write_report", lambda *_: None)
    for part in (1, 2):
        compare(tiny_comparison(films, tmp_path / str(part)), shard=(part, 2))
    for file in (tmp_path / "2").glob("runs*.jsonl"):
        shutil.copy(file, tmp_path / "1")
    assert without_times(tmp_path / "1") == without_times(finished[0])


@pytest.mark.slow
def test_lines_of_other_settings_are_left_alone_and_not_counted(
    films: Path, finished: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "write_report", lambda *_: None)
    shutil.copytree(finished[0], tmp_path / "copy")
    settings = tiny_comparison(films, tmp_path / "copy")
    settings["methods"] = {"LoRA": settings["methods"]["LoRA"]}
    (summary,) = compare(settings, "training.max_steps=2")
    assert summary.steps == 2
    assert len(read_lines(tmp_path / "copy")) > len(read_lines(finished[0]))


@pytest.mark.slow
def test_the_report_has_table_figures_and_says_what_is_missing(finished: tuple[Path, list[str]]) -> None:
    folder, _ = finished
    text = (folder / "REPORT.md").read_text(encoding="utf-8")
    assert "Fewer than 5 seeds" in text
    assert "Not within 2 % of the reference's parameters: DoRA" in text
    for name in ("losses.png", "rates.png", "pareto.png"):
        assert f"({name})" in text
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    with (folder / "table.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert tuple(rows[0]) == HEADER
    assert [row[0] for row in rows[1:]] == ["LoRA", "ResLoRA", "DoRA"]
    assert json.loads((folder / "runs.json").read_text(encoding="utf-8"))["data_sha256"]


@pytest.mark.slow
def test_an_annealed_method_keeps_its_search_and_gets_a_column(
    films: Path, finished: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report says the metric before the merge, after it, and after annealing; the latter merges exactly."""
    shutil.copytree(finished[0], tmp_path / "copy")
    settings = tiny_comparison(films, tmp_path / "copy")
    settings["methods"]["ResLoRA"]["annealed"] = True
    runs = []
    original = comparison.fit
    monkeypatch.setattr(comparison, "fit", lambda *a, **k: runs.append(1) or original(*a, **k))
    _, summary, _ = compare(settings)
    assert len(runs) == 2 * 3  # the reported ones, with and without
    lines = [line for line in read_lines(tmp_path / "copy") if "annealed" in line]
    assert [line["annealed"] for line in lines] == [line["annealed_before_merge"] for line in lines]
    assert summary.annealed == {line["seed"]: line["annealed"] for line in lines}
    assert "| merged | annealed |" in (tmp_path / "copy" / "REPORT.md").read_text(encoding="utf-8")
    assert "annealed" not in (finished[0] / "REPORT.md").read_text(encoding="utf-8")


def test_annealing_what_merges_exactly_is_refused(films: Path, tmp_path: Path) -> None:
    settings = tiny_comparison(films, tmp_path / "none")
    settings["methods"]["LoRA"]["annealed"] = True
    with pytest.raises(ValueError, match=r"methods.LoRA.annealed=true needs RESLORA .* not LORA"):
        compare(settings)


def line(method: str, seed: int, test: float, losses: list[float], quarter: int = -12) -> dict[str, Any]:
    return {
        "kind": "report",
        "method": method,
        "seed": seed,
        "quarter": quarter,
        "rate": 1e-3,
        "test": test,
        "merged": {"exact": test - 1},
        "losses": losses,
        "steps": len(losses),
    }


def summaries(gain: float, seeds: int) -> list[MethodSummary]:
    falling = [2.0 - 0.01 * step for step in range(100)]
    lines = [line("LoRA", seed, 80 + seed % 2, falling) for seed in range(seeds)]
    lines += [line("Other", s, 80 + s % 2 + gain + s / 10, [x - 0.5 for x in falling]) for s in range(seeds)]
    tuner = {"peft_type": "LORA"}
    return summarize(["LoRA", "Other"], "LoRA", {n: Budget(tuner, 8, 100, 1.0) for n in ("LoRA", "Other")}, lines)


@pytest.mark.parametrize(
    ("gain", "seeds", "said"),
    [
        (2.0, 5, "Better than LoRA: Other."),
        (-2.0, 5, "Worse than LoRA: Other."),
        (-0.2, 5, "No difference seen from LoRA: Other."),
        (2.0, 3, "Fewer than 5 seeds, from which nothing follows: Other."),
    ],
)
def test_findings_use_the_words_that_the_interval_allows(gain: float, seeds: int, said: str) -> None:
    found = findings(summaries(gain, seeds), "LoRA")
    assert f"- {said}" in found
    assert ("- No method was better than LoRA." in found) == (gain < 0)


def test_steps_to_the_references_loss_are_counted_on_the_smoothed_curve() -> None:
    lora, other = summaries(1.0, 3)
    falling = [2.0 - 0.01 * step for step in range(100)]
    target = smoothed(falling, window_of(100))[-1]
    expected = next(i + 1 for i in range(9, 100) if sum(falling[i - 9 : i + 1]) / 10 - 0.5 <= target)
    assert (lora.steps_to_reference, other.steps_to_reference) == (100, expected)
    assert [row[0] for row in table_rows([lora, other])] == ["LoRA", "Other"]


def test_what_rounds_to_zero_has_no_sign() -> None:
    difference = dataclasses.replace(summaries(1.0, 3)[1].difference, mean=0.0, low=-0.004, high=0.004)
    other = dataclasses.replace(summaries(1.0, 3)[1], difference=difference, similarity=-0.001)
    wide = dataclasses.replace(other, difference=dataclasses.replace(difference, low=-0.5, high=1.0))
    cells = table_rows([other, wide, wide])[0]
    assert "0.00 to 0.00" in cells
    assert not any("-0.00" in cell or "+0.00" in cell for cell in cells)
    signed = dataclasses.replace(other, difference=dataclasses.replace(difference, mean=0.006, low=-1.0, high=1.012))
    assert {"+0.01", "-1.00 to +1.01"} <= set(table_rows([signed])[0])


def test_a_ruined_run_does_not_hide_the_others_in_the_figure_of_rates() -> None:
    scores = [6.1 + 0.01 * n for n in range(40)]
    low, high = shown_range([*scores, 105.0])
    assert 6.0 < low < 6.1
    assert 6.5 < high < 7
    assert shown_range([54.0, 54.0, *range(70, 83)])[0] < 54
    assert shown_range([1.0]) == (0.5, 1.5)
    assert shown_range([7.0, 8.0] * 9 + [78.0], chosen=[78.0])[1] > 78


@pytest.mark.parametrize(("width", "interval"), [(20.0, "-10.00 to +10.00"), (0.02, "-0.010 to +0.010")])
def test_the_metric_has_as_many_decimals_as_its_intervals_need(width: float, interval: str) -> None:
    method = summaries(1.0, 3)[1]
    difference = dataclasses.replace(method.difference, mean=0.0, low=-width / 2, high=width / 2)
    assert interval in table_rows([dataclasses.replace(method, difference=difference)])[0]


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = {"model_type": "custom"}
        self.square, self.wide = nn.Linear(96, 96), nn.Linear(96, 384)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wide(self.square(x))


TARGETS = {"target_modules": ["square", "wide"]}


@pytest.mark.parametrize(
    ("tuner", "expected"),
    [
        ({"peft_type": "LORA", "r": 3}, lambda r: r * (96 + 96 + 96 + 384)),
        ({"peft_type": "LOHA", "r": 3}, lambda r: 2 * r * (96 + 96 + 96 + 384)),
        ({"peft_type": "ADALORA", "target_r": 3}, lambda r: r * (96 + 96 + 96 + 384) + 2 * r),
        (
            {"peft_type": "ADALORA", "target_r": 3, "tinit": 60, "tfinal": 90},  # more steps than the count's own
            lambda r: r * (96 + 96 + 96 + 384) + 2 * r,
        ),
        (
            {"peft_type": "RESLORA", "shortcut": "block", "target_r": 3, "tinit": 60, "tfinal": 90},
            lambda r: r * (96 + 96 + 96 + 384) + 2 * r,
        ),
        ({"peft_type": "MORA", "r": 3}, lambda r: round((192 * r) ** 0.5) ** 2 + round((480 * r) ** 0.5) ** 2),
    ],
    ids=lambda value: value.get("peft_type") if isinstance(value, dict) else "",
)
def test_parameters_are_counted_and_the_nearest_rank_is_taken(tuner: dict[str, Any], expected: Any) -> None:
    tuner = {**tuner, **TARGETS, **({"mora_type": "sharing"} if tuner["peft_type"] == "MORA" else {})}
    assert count_parameters(Layers(), tuner) == expected(3)
    wanted = count_parameters(Layers(), {"peft_type": "LORA", "r": 8, **TARGETS})
    budget = match_budget(Layers(), tuner, wanted)
    assert budget.parameters == expected(budget.rank)
    assert all(abs(expected(r) - wanted) >= abs(budget.parameters - wanted) for r in range(1, 40))
    assert budget.equal


def test_counting_leaves_the_base_as_it_was() -> None:
    base = Layers()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    match_budget(base, {"peft_type": "LORA", "r": 3, **TARGETS}, 1000)
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())
    get_peft_model(base, LoraConfig(**TARGETS))  # and it still can be adapted


def test_alpha_keeps_its_ratio_to_the_rank() -> None:
    assert with_rank({"peft_type": "LORA", "r": 8, "lora_alpha": 16}, 4)["lora_alpha"] == 8
    assert with_rank({"peft_type": "LOHA", "r": 4, "alpha": 8}, 2) == {"peft_type": "LOHA", "r": 2, "alpha": 4}


def test_the_nearest_rank_is_found_by_halving() -> None:
    for wanted in (1, 5, 64, 77, 78, 100, 5000):
        expected = min(range(1, 65), key=lambda r: (abs(10 * r - wanted), r))
        assert nearest_rank(lambda r: 10 * r, wanted, most=64) == expected


def test_a_line_that_was_not_finished_is_cut_off_and_a_broken_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    append_line(path, {"key": "a"})
    with path.open("ab") as file:
        file.write(b'{"key": "b", "val')
    assert [line["key"] for line in read_lines(tmp_path)] == ["a"]
    append_line(path, {"key": "c"})
    assert [line["key"] for line in read_lines(tmp_path)] == ["a", "c"]
    with pytest.raises(ValueError, match="Out of range float"):
        append_line(path, {"key": "d", "value": float("nan")})
    path.write_text('{"key": "a"}\nno json\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"runs.jsonl, line 2 is no JSON"):
        read_lines(tmp_path)


def test_the_python_of_the_docs_runs(films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a run.yaml and a comparison.yaml of the reader's own."""
    text = (Path(__file__).parents[2] / "docs" / "experiments.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    settings = tiny_comparison(films, tmp_path / "films")
    settings["methods"] = {"LoRA": settings["methods"]["LoRA"]}
    for name, values in (("run", tiny_run(films, tmp_path / "run")), ("comparison", settings)):
        Path(f"{name}.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    monkeypatch.setattr(comparison, "write_report", lambda *_: None)
    names: dict[str, Any] = {}
    exec(block, names)
    assert [summary.name for summary in names["summaries"]] == ["LoRA"]
    assert names["metrics"]["steps"] == 10


def test_the_cost_is_measured_with_the_schedule_of_the_whole_run(films: Path, tmp_path: Path) -> None:
    """Of AdaLoRA's steps, some before and after those that prune, the measured ones are a few."""
    task = make_task(train_settings(from_mapping(tiny_run(films, tmp_path))))
    targets = {"target_modules": ["query", "value"]}
    reference = with_head({"peft_type": "LORA", "r": 2, **targets}, task)
    pruned = with_head({"peft_type": "ADALORA", "target_r": 2, "tinit": 60, "tfinal": 90, **targets}, task)
    assert relative_cost(task, pruned, reference, pairs=2, batch_size=8, run_steps=160)["step_ratio"] > 0
    with pytest.raises(ValueError, match="budgeting phase"):
        relative_cost(task, pruned, reference, pairs=2, batch_size=8, run_steps=100)
