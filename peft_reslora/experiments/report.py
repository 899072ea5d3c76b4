"""Table, CSV and REPORT.md of a comparison."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_reslora.experiments.compare_settings import CompareSettings
from peft_reslora.experiments.figures import plot_losses, plot_pareto, plot_rates
from peft_reslora.experiments.run import write_whole
from peft_reslora.experiments.statistics import FEWEST_SEEDS, window_of
from peft_reslora.experiments.summary import MethodSummary
from peft_reslora.experiments.task import Task
from peft_reslora.experiments.tuners import allocates_ranks
from peft_reslora.shared.text import printable, prose

_MISSING = "-"
_TOO_FEW = "too few seeds"  # of the verdicts

HEADER = (
    "method",
    "parameters",
    "rate",
    "seeds",
    "test",
    "difference",
    "95 % interval",
    "verdict",
    "merged",
    "annealed",
    "loss 25 %",
    "50 %",
    "75 %",
    "100 %",
    "steps to reference's loss",
    "step time",
    "memory",
    "native KB",
    "exported KB",
    "forgetting",
    "similarity",
)
_FIRST_LOSS = HEADER.index("loss 25 %")
_RARE = ("annealed", "forgetting", "similarity")  # left out of the tables where no method has it


def table_rows(summaries: Sequence[MethodSummary]) -> list[tuple[str, ...]]:
    """The cells of every method, without the header."""
    places = _places(summaries)
    return [_row(summary, places) for summary in summaries]


def _places(summaries: Sequence[MethodSummary]) -> int:
    """Decimals of the test metric: two at least, and two digits of the width that the intervals have."""
    widths = [s.difference.high - s.difference.low for s in summaries if s.difference is not None]
    width = statistics.median(widths) if widths else 0.0
    return max(2, 1 - math.floor(math.log10(width))) if width > 0 else 2


def _row(s: MethodSummary, places: int) -> tuple[str, ...]:
    unequal = "" if s.budget.equal else f" ({100 * (s.budget.ratio - 1):+.0f} %)"
    d = s.difference
    quarters = [f"{loss:.3f}" for loss in s.quarters] or [_MISSING] * 4
    return (
        s.name,
        f"{s.budget.parameters:,}{unequal}",
        _MISSING if s.rate is None else f"{s.rate:.1e}",
        str(len(s.tests)) + (f" ({len(s.diverged)} diverged)" if s.diverged else ""),
        _mean_and_deviation(s.tests, places),
        _MISSING if d is None else _number(d.mean, f"+.{places}f"),
        _MISSING if d is None else " to ".join(_number(bound, f"+.{places}f") for bound in (d.low, d.high)),
        "reference" if s.is_reference else _MISSING if d is None else d.verdict,
        ", ".join(f"{value:.{places}f} ({name})" for name, value in s.merged.items()) or _MISSING,
        _mean_and_deviation(s.annealed, places),
        *quarters,
        _shown(s.steps_to_reference) if s.tests else _MISSING,
        _ratio(s.cost.get("step_ratio"), s.cost.get("step_ratio_quartiles")),
        _ratio(s.cost.get("memory_ratio")),
        _kilobytes(s.native_bytes),
        _kilobytes(s.exported_bytes),
        _MISSING if s.forgetting is None else _number(s.forgetting, ".3f"),
        _MISSING if s.similarity is None else _number(s.similarity, ".2f"),
    )


def _number(value: float, form: str) -> str:
    """As formatted; what rounds to zero has no sign."""
    shown = format(value, form)
    return shown.lstrip("+-") if float(shown) == 0 else shown


def _mean_and_deviation(values: Mapping[int, float], places: int) -> str:
    if not values:
        return _MISSING
    spread = f" ± {statistics.stdev(values.values()):.{places}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values.values()):.{places}f}{spread}"


def _shown(steps: int | None) -> str:
    return "not reached" if steps is None else str(steps)


def _ratio(value: float | None, quartiles: Sequence[float] | None = None) -> str:
    if value is None:
        return _MISSING
    return f"{value:.2f}" + (f" ({quartiles[0]:.2f}-{quartiles[1]:.2f})" if quartiles else "")


def _kilobytes(size: int | None) -> str:
    return _MISSING if size is None else f"{size / 1024:.0f}"


def write_report(folder: Path, settings: CompareSettings, task: Task, summaries: Sequence[MethodSummary]) -> None:
    """Write `table.csv`, `REPORT.md` and the three figures."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([HEADER, *table_rows(summaries)])
    write_whole(folder / "table.csv", text.getvalue())
    plot_losses(summaries, settings.reference, folder / "losses.png", settings.title)
    plot_rates(summaries, settings.reference, folder / "rates.png", settings.title, task.metric)
    plot_pareto(summaries, folder / "pareto.png", settings.title, task.metric, task.lower_is_better)
    write_whole(folder / "REPORT.md", report_text(settings, task, summaries))


def report_text(settings: CompareSettings, task: Task, summaries: Sequence[MethodSummary]) -> str:
    """REPORT.md: first what can be said, then the table, the protocol and the figures."""
    lines = [f"# {prose(settings.title)}", "", *findings(summaries, settings.reference), "", *_tables(summaries), ""]
    return "\n".join([*lines, *_notes(settings, task, summaries), "", *_figures(), ""])


def findings(summaries: Sequence[MethodSummary], reference: str) -> list[str]:
    """A sentence for each verdict, and what has not run."""
    lines = []
    for verdict in ("better", "worse", "no difference seen"):
        names = [s.name for s in summaries if s.difference is not None and s.difference.verdict == verdict]
        said = f"{verdict} than {reference}" if verdict != "no difference seen" else f"{verdict} from {reference}"
        if names:
            lines.append(f"- {prose(said[0].upper() + said[1:])}: {prose(', '.join(names))}.")
        elif verdict == "better" and any(s.difference and s.difference.verdict != _TOO_FEW for s in summaries):
            lines.append(f"- No method was better than {prose(reference)}.")
    for s in summaries:
        if s.diverged:
            seeds = f"seed{'s' if len(s.diverged) > 1 else ''} {', '.join(map(str, s.diverged))}"
            lines.append(f"- Diverged, and not counted: {prose(s.name)}, {seeds}.")
    missing = [s.name for s in summaries if not s.tests and not s.diverged]
    if missing:
        lines.append(f"- Not finished: {prose(', '.join(missing))}.")
    few = [s.name for s in summaries if s.difference is not None and s.difference.verdict == _TOO_FEW]
    if few:
        lines.append(f"- Fewer than {FEWEST_SEEDS} seeds, from which nothing follows: {prose(', '.join(few))}.")
    return lines


def _tables(summaries: Sequence[MethodSummary]) -> list[str]:
    """Two tables of the same methods, since one would be too wide to read: results, then training and cost."""
    rows = [HEADER, *table_rows(summaries)]
    empty = {n for n, name in enumerate(HEADER) if name in _RARE and all(row[n] == _MISSING for row in rows[1:])}
    results = [0, *range(2, _FIRST_LOSS)]
    costs = [0, 1, *range(_FIRST_LOSS, len(HEADER))]
    first, second = ([n for n in columns if n not in empty] for columns in (results, costs))
    return [*_markdown(rows, first), "", *_markdown(rows, second)]


def _markdown(rows: Sequence[Sequence[str]], columns: Sequence[int]) -> list[str]:
    lines = ["| " + " | ".join(prose(row[column]) for column in columns) + " |" for row in rows]
    return [lines[0], "|" + " --- |" * len(columns), *lines[1:]]


def _notes(settings: CompareSettings, task: Task, summaries: Sequence[MethodSummary]) -> list[str]:
    steps = next((s.steps for s in summaries if s.steps), None)
    sizes = ", ".join(f"{size:,} {name}" for name, size in task.data.sizes().items())
    direction = ", lower is better" if task.lower_is_better else ""
    pairs = next((s.cost["pairs"] for s in summaries if s.cost), 0)
    lines = [
        f"- Task: {prose(settings.task)}; metric: {prose(task.metric)} in %{direction}; rows: {sizes}. "
        f"{steps or 'Unknown'} steps of {settings.training.get('per_device_train_batch_size', 16)} rows, the same in "
        "the same order for all methods at one seed.",
        f"- Learning rates: half a decade apart, then a quarter around the best, chosen on the validation split with "
        f"seed {settings.search_seed}, which is not among those reported: {', '.join(map(str, settings.seeds))}.",
        "- test: mean and standard deviation over the seeds, before the merge. difference: to the reference, paired "
        "by seed; the interval is an expanded percentile bootstrap of the mean over seeds, so that it holds for other "
        "seeds on these data, not for other data. Simulated with five seeds, 7 to 12 % of methods that are as good "
        "as the reference are called better or worse.",
        f"- Losses are means of the last {window_of(steps or 1)} steps. Steps to the reference's loss: median over "
        "the seeds of the first step at which that mean is as low as the reference's at its end; the reference's own "
        "number says what noise does to it.",
        f"- Step time and memory: ratios to the reference; {pairs} pairs of steps in turns, medians with quartiles. "
        "Memory: peak of what a step has alive beside weights and optimizer.",
    ]
    if any(s.annealed for s in summaries):
        lines.append(
            "- annealed: test after the merge of another training at the same rate and seeds, in whose last third the "
            "shortcuts give way to their estimates, so that the merge is exact. Its rate was searched without that."
        )
    if task.generated is not None:
        lines.append(
            "- similarity: of generated images to the real ones of the test split, in %, higher is more alike. "
            "forgetting: the drift, how far images for unrelated captions have moved from the base's, in %."
        )
    unequal = [s.name for s in summaries if not s.budget.equal]
    if unequal:
        lines.append(f"- Not within 2 % of the reference's parameters: {prose(', '.join(unequal))}.")
    if any(allocates_ranks(s.budget.tuner) for s in summaries):
        lines.append("- AdaLoRA's parameters are those left after pruning; it starts with half as many again.")
    limited = [s.name for s in summaries if s.at_limit]
    if limited:
        lines.append(f"- The best rate is the last there is: {prose(', '.join(limited))}.")
    return lines


def _figures() -> list[str]:
    return [
        "![training loss by step, one curve a method](losses.png)",
        "",
        "![validation metric by learning rate](rates.png)",
        "",
        "![test metric against step time and memory](pareto.png)",
    ]


_TERMINAL = ("method", "rate", "test", "difference", "95 % interval", "verdict", "100 %", "step time")


def terminal_table(summaries: Sequence[MethodSummary], title: str) -> Any:
    """What a terminal shows: a table of rich, with the columns that fit; all of them are in the files."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(printable(title)), box=None, pad_edge=False)
    for name in _TERMINAL:
        words = name in ("method", "verdict")
        table.add_column(name.replace("100 %", "loss"), justify="left" if words else "right", no_wrap=name == "method")
    for row in table_rows(summaries):
        cells = dict(zip(HEADER, row, strict=True))
        cells["step time"] = cells["step time"].partition(" (")[0]
        table.add_row(*(escape(printable(cells[name])) for name in _TERMINAL))
    return table
