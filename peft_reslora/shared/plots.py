"""Figures: one palette and one look for all of them. matplotlib is an extra, imported when something is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of Okabe and Ito: apart in print and for color-blind readers.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


def require_matplotlib() -> None:
    """Refuse to go on without what draws, before there is something to draw.

    Raises:
        ImportError: if matplotlib is missing; it names the extra that brings it.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("Drawing needs matplotlib: pip install 'peft_reslora[demo]'") from error


def new_figure(panels: int = 1, width: float = 8.0, height: float = 4.5, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels side by side on one y axis, whose lines take the colors of the palette in turn.

    Args:
        panels: how many.
        width: of each panel, in inches.
        height: of each row, in inches.
        rows: of so many panels, each row on a y axis of its own; the panels come row by row.

    Raises:
        ImportError: as `require_matplotlib`.
    """
    require_matplotlib()
    from matplotlib.figure import Figure  # without pyplot, which would look for a display and keep the figure

    figure = Figure(figsize=(width * panels, height * rows), layout="constrained")
    grid = list(figure.subplots(rows, panels, sharey="row", squeeze=False).flat)
    for axes in grid:
        axes.set_prop_cycle(color=PALETTE)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a PNG, whatever the path ends with."""
    figure.savefig(path, dpi=150, format="png")
