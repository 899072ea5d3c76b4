"""The figures of a comparison: losses with bands, metric against rate, and metric against cost."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peft_reslora.experiments.statistics import smoothed, window_of
from peft_reslora.experiments.summary import MethodSummary
from peft_reslora.shared.plots import PALETTE, new_figure, require_matplotlib, save_figure

_REFERENCE = PALETTE[-1]
_COLORS = (*PALETTE[:-1], "#b8a500")  # black is the reference's
_MARKERS = "osD^vPX*<>ph"
_COLUMNS = 3
_LETTERS_PER_INCH = 12  # of a title


def _style(index: int) -> dict[str, Any]:
    """Color and marker of the method at this place, another pair for each of the first 84."""
    return {"color": _COLORS[index % len(_COLORS)], "marker": _MARKERS[index % len(_MARKERS)]}


def plot_losses(summaries: Sequence[MethodSummary], reference: str, path: Path, title: str) -> None:
    """A panel a method: mean of its seeds' smoothed losses, band from lowest to highest, over the reference."""
    drawn = [s for s in summaries if s.curves]
    against = next((s for s in drawn if s.name == reference), None)
    others = [s for s in drawn if s.name != reference] or drawn
    figure, panels = _panels(len(others), "training step", "training loss")
    for summary, axes in zip(others, panels, strict=False):
        if against is not None and summary is not against:
            _draw_band(axes, against, _REFERENCE)
        _draw_band(axes, summary, _COLORS[0])
        axes.legend(frameon=False, fontsize=8)
    _limit_losses(panels, drawn)
    _set_title(figure, f"{title}: training loss at the best rate, mean and range of the seeds")
    _save(figure, path)


def _draw_band(axes: Any, summary: MethodSummary, color: str) -> None:
    steps = min(len(curve) for curve in summary.curves)
    curves = np.array([smoothed(curve[:steps], window_of(steps)) for curve in summary.curves])
    numbers = np.arange(1, steps + 1)
    axes.fill_between(numbers, curves.min(axis=0), curves.max(axis=0), color=color, alpha=0.2, linewidth=0)
    axes.plot(numbers, curves.mean(axis=0), color=color, linewidth=1.4, label=summary.name)


def _limit_losses(panels: Sequence[Any], drawn: Sequence[MethodSummary]) -> None:
    """The same range for all, without what a few steps at the start or a diverging run would stretch it by."""
    values = [loss for s in drawn for curve in s.curves for loss in smoothed(curve, window_of(len(curve)))]
    if values:
        low, high = np.quantile(values, [0.0, 0.99])
        for axes in panels:
            axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))


def plot_rates(summaries: Sequence[MethodSummary], reference: str, path: Path, title: str, metric: str) -> None:
    """A panel a method: the validation metric by learning rate, over the reference's; the chosen rate is marked."""
    drawn = [s for s in summaries if s.scores]
    against = next((s for s in drawn if s.name == reference), None)
    others = [s for s in drawn if s.name != reference] or drawn
    figure, panels = _panels(len(others), "learning rate", f"validation {metric}, %")
    for summary, axes in zip(others, panels, strict=False):
        if against is not None and summary is not against:
            _draw_rates(axes, against, _REFERENCE)
        _draw_rates(axes, summary, _COLORS[0])
        axes.set_xscale("log")
        axes.legend(frameon=False, fontsize=8)
    if scores := [score for s in drawn for score in s.scores.values() if score is not None]:
        chosen = [score for s in drawn for rate, score in s.scores.items() if rate == s.rate and score is not None]
        for axes in panels:
            axes.set_ylim(*shown_range(scores, chosen))
    _set_title(figure, f"{title}: one run a rate, without those that diverged; the ring is the one chosen")
    _save(figure, path)


def shown_range(scores: Sequence[float], chosen: Sequence[float] = ()) -> tuple[float, float]:
    """Of all scores, but for those of rates that ruin the model, which would hide what the others do; those of chosen
    rates are seen in any case."""
    low, median, high = np.quantile(scores, [0.1, 0.5, 0.9])
    shown = [*chosen, *(score for score in scores if abs(score - median) <= 3 * (high - low))]
    margin = 0.05 * (max(shown) - min(shown)) or 0.5
    return min(shown) - margin, max(shown) + margin


def _draw_rates(axes: Any, summary: MethodSummary, color: str) -> None:
    points = sorted((rate, score) for rate, score in summary.scores.items() if score is not None)
    rates, scores = [rate for rate, _ in points], [score for _, score in points]
    axes.plot(rates, scores, color=color, marker=".", linewidth=1.2, label=summary.name)
    chosen = [(rate, score) for rate, score in points if rate == summary.rate]
    axes.plot(*(zip(*chosen, strict=True) if chosen else ([], [])), "o", mfc="none", mec=color, markersize=10)


def plot_pareto(
    summaries: Sequence[MethodSummary], path: Path, title: str, metric: str, lower_is_better: bool = False
) -> None:
    """Test metric against step time and against memory, both relative to the reference."""
    figure, panels = new_figure(2, width=5.5, height=5.2)
    for axes, key, name in zip(panels, ("step_ratio", "memory_ratio"), ("step time", "peak memory"), strict=True):
        for index, s in enumerate(summaries):
            if s.test_mean is not None and s.cost:
                error = (s.test_deviation or 0.0) / math.sqrt(len(s.tests))
                axes.errorbar(
                    s.cost[key],
                    s.test_mean,
                    yerr=error,
                    **_style(index),
                    capsize=2,
                    elinewidth=0.8,
                    ls="",
                    label=s.name,
                )
        axes.set(xlabel=f"{name} / reference's")
    panels[0].set_ylabel(f"test {metric}, %, mean and its standard error")
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    better = "down" if lower_is_better else "up"
    _set_title(figure, f"{title}: metric against cost; {better} and left is better")
    _save(figure, path)


def _panels(count: int, xlabel: str, ylabel: str) -> tuple[Any, list[Any]]:
    """So many panels in rows of three, on the same axes."""
    require_matplotlib()
    from matplotlib.figure import Figure

    columns = min(max(count, 1), _COLUMNS)
    rows = max(1, math.ceil(count / columns))
    figure = Figure(figsize=(3.6 * columns, 2.6 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for axes in panels[count:]:
        axes.set_visible(False)
    for axes in panels[:count]:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[max(0, count - columns) : count]:
        axes.tick_params(labelbottom=True)  # also above a panel that is not there
    figure.supxlabel(xlabel, fontsize=9)
    figure.supylabel(ylabel, fontsize=9)
    return figure, panels[:count]


def _set_title(figure: Any, text: str) -> None:
    """In as many lines as the width of the figure asks for; with few methods it is narrow."""
    figure.suptitle(textwrap.fill(text, int(_LETTERS_PER_INCH * figure.get_figwidth())), fontsize=10)


def _save(figure: Any, path: Path) -> None:
    """Write a figure that is there whole or not at all."""
    temporary = path.with_name(f".{path.name}")
    save_figure(figure, temporary)
    temporary.replace(path)
