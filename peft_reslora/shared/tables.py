"""Tables in plain text."""

from __future__ import annotations

from collections.abc import Sequence


def format_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lay `rows` (the first is the header) out in columns; numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = "  ".join("-" * width for width in widths)
    lines = ["  ".join(_align(cell, width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], rule, *lines[1:]]


def _align(cell: str, width: int) -> str:
    return cell.rjust(width) if cell.replace(".", "").replace("-", "").isdigit() else cell.ljust(width)
