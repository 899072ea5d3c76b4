"""Figures of the recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from peft_reslora.shared.plots import PALETTE, new_figure, save_figure


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Average each value with up to `window - 1` before it."""
    return [sum(part) / len(part) for part in (values[max(0, i + 1 - window) : i + 1] for i in range(len(values)))]


def plot_losses(losses: Mapping[str, Sequence[float]], path: Path, title: str, window: int) -> None:
    """Draw one training-loss curve per method into a PNG: every step faintly, the moving average on top."""
    figure, (axes,) = new_figure()
    for (name, values), color in zip(losses.items(), PALETTE, strict=False):
        steps = range(1, len(values) + 1)
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(steps, moving_average(values, window), color=color, linewidth=2, label=name)
    axes.set(title=title, xlabel="training step", ylabel=f"training loss (line: mean of the last {window} steps)")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.01)
    axes.legend(frameon=False)
    save_figure(figure, path)
