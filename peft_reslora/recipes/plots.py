"""Figures of the recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt

# Blue and vermillion of the Okabe-Ito palette: apart in print and for colour-blind readers.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Average each value with up to `window - 1` before it."""
    return [sum(part) / len(part) for part in (values[max(0, i + 1 - window) : i + 1] for i in range(len(values)))]


def plot_losses(losses: Mapping[str, Sequence[float]], path: Path, title: str, window: int) -> None:
    """Draw one training-loss curve per method into a PNG: every step faintly, the moving average on top."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for (name, values), colour in zip(losses.items(), _COLOURS, strict=False):
        steps = range(1, len(values) + 1)
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, moving_average(values, window), color=colour, linewidth=2, label=name)
    axes.set(title=title, xlabel="training step", ylabel=f"training loss (line: mean of the last {window} steps)")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.01)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
