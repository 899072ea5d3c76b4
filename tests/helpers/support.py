"""The table of what is supported: each of its cells is a test.

A test that stands for a cell says so with `@pytest.mark.support(row, verdict="right", columns=None)`: `row` and
`verdict` are strings, or functions of the test's parameters; the column is that of the test's tuner, unless `columns`
names several. `python -m pytest --collect-only -q --support-table` prints the table, and `test_readme.py` compares it
with the one in docs/supported-engines.md.

`@pytest.mark.layer_support(layer, block, shortcut, verdict)` does the same for the table in `docs/supported.md`, which
`--layer-support-table` prints and `test_supported.py` compares.
"""

from __future__ import annotations

from typing import Any

import pytest

COLUMNS = ["input", "block", "middle", "MoRA"]
UNTESTED = "-"
_SHORTCUTS = ["input", "block", "middle"]
_BLOCKS = ["LoRA", "DoRA", "AdaLoRA", "nested ranks"]


def _column(params: dict[str, Any]) -> str:
    """The column by the parameter `tuner` or `shortcut`, such as 'input', 'reslora-input' or ('input', 1)."""
    tuner = params.get("tuner", params.get("shortcut", "mora"))
    name = (tuner if isinstance(tuner, str) else tuner[0]).removeprefix("reslora-").split("-")[0]
    return name if name in COLUMNS else "MoRA"


def _cells(item: pytest.Item) -> list[tuple[str, str, str]]:
    """Row, column and verdict of each cell for which a test stands."""
    params = item.callspec.params if hasattr(item, "callspec") else {}

    def resolve(value: Any) -> str:
        return value(**params) if callable(value) else value

    found = []
    for marker in item.iter_markers("support"):
        xfails = item.get_closest_marker("xfail") is not None
        verdict = "wrong" if xfails else resolve(marker.kwargs.get("verdict", "right"))
        for column in marker.kwargs.get("columns") or [_column(params)]:
            found.append((resolve(marker.args[0]), column, verdict))
    return found


def support_table(items: list[pytest.Item]) -> str:
    """The table in Markdown, its rows in the order of the tests."""
    rows: dict[str, dict[str, set[str]]] = {}
    for item in items:
        for row, column, verdict in _cells(item):
            rows.setdefault(row, {}).setdefault(column, set()).add(verdict)
    lines = [f"| trained with | {' | '.join(COLUMNS)} |", "|" + " --- |" * (len(COLUMNS) + 1)]
    for row, cells in rows.items():
        verdicts = ["/".join(sorted(cells.get(column, {UNTESTED}))) for column in COLUMNS]
        lines.append(f"| {row} | {' | '.join(verdicts)} |")
    return "\n".join(lines)


def layer_support_table(items: list[pytest.Item]) -> str:
    """By kind of layer, of block and of shortcut, in Markdown; the layers by their names."""
    cells: dict[tuple[str, str], dict[str, set[str]]] = {}
    layers: dict[str, None] = {}
    blocks: dict[str, None] = {}
    for item in items:
        for marker in item.iter_markers("layer_support"):
            layer, block, shortcut, verdict = marker.args
            xfails = item.get_closest_marker("xfail") is not None
            cells.setdefault((layer, block), {}).setdefault(shortcut, set()).add("wrong" if xfails else verdict)
            layers[layer] = blocks[block] = None
    heads = [(block, shortcut) for block in sorted(blocks, key=_BLOCKS.index) for shortcut in _SHORTCUTS]
    lines = [f"| layer | {' | '.join(f'{block}, {shortcut}' for block, shortcut in heads)} |"]
    lines.append("|" + " --- |" * (len(heads) + 1))
    for layer in sorted(layers):
        found = (cells.get((layer, block), {}).get(shortcut, {UNTESTED}) for block, shortcut in heads)
        lines.append(f"| {layer} | {' | '.join('/'.join(sorted(verdicts)) for verdicts in found)} |")
    return "\n".join(lines)
