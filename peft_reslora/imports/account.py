"""What an import did with everything that it found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from peft_reslora.shared.tables import format_table
from peft_reslora.shared.text import printable

Outcome = Literal["kept", "converted", "dropped"]
COLUMNS = ("in the folder", "outcome", "here")


@dataclass(frozen=True)
class Row:
    """One thing that the folder holds or that its program did.

    Args:
        found: what it is there, such as 'mora_type=6'.
        outcome: 'kept' as it is, 'converted' to what computes the same, or 'dropped'.
        here: what it has become; of what was dropped, why that changes nothing, or what it changes.
    """

    found: str
    outcome: Outcome
    here: str


@dataclass(frozen=True)
class Account:
    """All of an import; `str` lays it out as a table.

    Args:
        source: what kind of adapter the folder held.
        base: the base model that the native adapter names.
        layers: how many layers were imported.
        rows: in the order of the source's config, then of its tensors.
    """

    source: str
    base: str
    layers: int
    rows: tuple[Row, ...]

    def of(self, outcome: Outcome) -> list[Row]:
        """The rows with this outcome."""
        return [row for row in self.rows if row.outcome == outcome]

    def __str__(self) -> str:
        lines = format_table([COLUMNS, *((row.found, row.outcome, row.here) for row in self.rows)])
        return "\n".join([f"{self.source} for {printable(self.base)}, {self.layers} layers", *map(printable, lines)])


def kept(config: dict[str, Any], *names: str) -> list[Row]:
    """A row for each of the fields that goes over as it is, where it is set."""
    return [Row(f"{n}={config[n]!r}", "kept", n) for n in names if config.get(n) not in (None, [], {})]
