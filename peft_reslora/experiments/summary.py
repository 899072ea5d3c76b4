"""What the lines of a comparison say about each method: pure functions of the lines."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft_reslora.experiments.budget import Budget
from peft_reslora.experiments.lines import Line
from peft_reslora.experiments.rates import HIGHEST, LOWEST
from peft_reslora.experiments.statistics import (
    Difference,
    paired_difference,
    quarter_losses,
    smoothed,
    steps_to_reach,
    window_of,
)


@dataclass(frozen=True)
class MethodSummary:
    """A method at its best rate. What was not run yet is None or empty.

    Args:
        scores: validation metric by learning rate, of the search.
        rate: of the reported runs.
        at_limit: whether even the lowest or highest rate there is was the best.
        tests: test metric before the merge, by seed, of the runs that did not diverge.
        diverged: seeds of the runs that did.
        merged: test metric after the merge, by estimator, the mean over seeds.
        annealed: test metric after the merge of the annealed training, by seed; empty if it was not asked for.
        difference: paired by seed with the reference, before the merge.
        quarters: smoothed training loss after 25, 50, 75, 100 % of the steps, means over seeds.
        steps_to_reference: median of the steps to the reference's final loss of the same seed; None if most seeds
            do not get there.
        similarity: of generated images to real ones, the mean over seeds.
        curves: losses of every reported run.
    """

    name: str
    is_reference: bool
    budget: Budget
    scores: dict[float, float | None]
    rate: float | None
    at_limit: bool
    tests: dict[int, float]
    diverged: list[int]
    merged: dict[str, float]
    annealed: dict[int, float]
    difference: Difference | None
    quarters: list[float]
    steps_to_reference: int | None
    steps: int | None
    cost: dict[str, Any]
    native_bytes: int | None
    exported_bytes: int | None
    forgetting: float | None
    similarity: float | None
    curves: list[list[float]]

    @property
    def test_mean(self) -> float | None:
        return statistics.fmean(self.tests.values()) if self.tests else None

    @property
    def test_deviation(self) -> float | None:
        return statistics.stdev(self.tests.values()) if len(self.tests) > 1 else None


def summarize(
    names: Sequence[str],
    reference: str,
    budgets: Mapping[str, Budget],
    lines: Sequence[Line],
    lower_is_better: bool = False,
) -> list[MethodSummary]:
    """A summary for each method, in the order of `names`; of lines of one comparison only."""
    by_method = {name: [line for line in lines if line["method"] == name] for name in names}
    reference_runs = _reports(by_method[reference])
    return [
        _summary(name, budgets[name], by_method[name], reference_runs, name == reference, lower_is_better)
        for name in names
    ]


def _reports(lines: Sequence[Line]) -> dict[int, Line]:
    """The reported runs that did not diverge, by seed."""
    return {line["seed"]: line for line in lines if line["kind"] == "report" and is_number(line["test"])}


def is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _summary(
    name: str,
    budget: Budget,
    lines: Sequence[Line],
    reference: Mapping[int, Line],
    is_reference: bool,
    lower_is_better: bool,
) -> MethodSummary:
    runs = _reports(lines)
    reported = [line for line in lines if line["kind"] == "report"]
    any_run = next(iter(reported), {})
    curves = [run["losses"] for run in runs.values() if all(map(is_number, run["losses"]))]
    quarters = [quarter_losses(curve) for curve in curves]
    return MethodSummary(
        name=name,
        is_reference=is_reference,
        budget=budget,
        scores={
            line["rate"]: line["validation"] if is_number(line["validation"]) else None
            for line in lines
            if line["kind"] == "search"
        },
        rate=any_run.get("rate"),
        at_limit=any_run.get("quarter") in (LOWEST, HIGHEST),
        tests={seed: run["test"] for seed, run in runs.items()},
        diverged=[line["seed"] for line in reported if not is_number(line["test"])],
        merged=_merged(list(runs.values())),
        annealed={seed: run["annealed"] for seed, run in runs.items() if is_number(run.get("annealed"))},
        difference=None if is_reference else _difference(runs, reference, lower_is_better),
        quarters=[statistics.fmean(column) for column in zip(*quarters, strict=True)],
        steps_to_reference=_steps(runs, reference),
        steps=any_run.get("steps"),
        cost=next((line for line in lines if line["kind"] == "cost"), {}),
        native_bytes=next((run["native_bytes"] for run in runs.values() if "native_bytes" in run), None),
        exported_bytes=next((run["exported_bytes"] for run in runs.values() if "exported_bytes" in run), None),
        forgetting=_mean([run["forgetting"] for run in runs.values() if is_number(run.get("forgetting"))]),
        similarity=_mean([value for run in runs.values() if is_number(value := _similarity(run))]),
        curves=curves,
    )


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _similarity(run: Line) -> Any:
    """None where nothing was generated, or no number came out."""
    return (run.get("generated") or {}).get("similarity")


def _merged(runs: Sequence[Line]) -> dict[str, float]:
    estimators = dict.fromkeys(name for run in runs for name in run["merged"] if is_number(run["merged"][name]))
    return {
        name: statistics.fmean(run["merged"][name] for run in runs if is_number(run["merged"].get(name)))
        for name in estimators
    }


def _difference(runs: Mapping[int, Line], reference: Mapping[int, Line], lower_is_better: bool) -> Difference | None:
    seeds = sorted(set(runs) & set(reference))
    if not seeds:
        return None
    own, others = ([run[seed]["test"] for seed in seeds] for run in (runs, reference))
    return paired_difference(own, others, lower_is_better=lower_is_better)


def _steps(runs: Mapping[int, Line], reference: Mapping[int, Line]) -> int | None:
    """Median over the seeds; None if it is among those that do not get there."""
    reached = []
    for seed in sorted(set(runs) & set(reference)):
        own, other = runs[seed]["losses"], reference[seed]["losses"]
        if not all(map(is_number, [*own, *other])):
            return None
        target = float(smoothed(other, window_of(len(other)))[-1])
        steps = steps_to_reach(own, target)
        reached.append(float("inf") if steps is None else steps)
    middle = statistics.median(reached) if reached else float("inf")
    return None if middle == float("inf") else int(middle)
