"""What an export did, layer by layer."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any

from peft_reslora.shared.text import printable

COLUMNS = ("layer", "exact", "merge", "rank", "kept", "energy kept", "relative error")


@dataclass(frozen=True)
class LayerReport:
    """One layer's export.

    Args:
        layer: the module's name in the base model.
        merge: how the adapter became one matrix: 'exact', or the name of what estimated it. The error of an estimated
            merge is not part of `relative_error`; `peft_reslora.merge_report` measures it.
        exact: whether the export holds the adapter's update up to rounding: an exact merge, nothing cut off, float32.
        rank_before: directions in the factors of the update.
        rank_after: directions in the export, before padding with zeros.
        energy_kept: fraction of the update's squared singular values in the export.
        relative_error: of the conversion, ||update - exported||_F / ||update||_F.
    """

    layer: str
    merge: str
    exact: bool
    rank_before: int
    rank_after: int
    energy_kept: float
    relative_error: float

    def cells(self) -> tuple[str, ...]:
        """The row of the table, under `COLUMNS`."""
        numbers = (self.rank_before, self.rank_after, f"{self.energy_kept:.6f}", f"{self.relative_error:.2e}")
        return (printable(self.layer), "yes" if self.exact else "no", self.merge, *map(str, numbers))


@dataclass(frozen=True)
class ExportReport:
    """All layers of an export.

    Args:
        method: what was exported, such as 'LoHa' or 'ResLoRA (block)'.
        call: the Python call that made the export.
        r: the rank of every pair in the file, padding included.
        dtype: of the tensors in the file.
        layers: a row for each layer of the adapter.
        filled: layers without an update, which are in the file as zeros.
        tied: layers of the adapter that share their weight with another module; that module's name by theirs.
        unknown: layers that a model of the base's class lacks when it is built from its config.
    """

    method: str
    call: str
    r: int
    dtype: str
    layers: list[LayerReport]
    filled: list[str]
    tied: dict[str, str] = dataclasses.field(default_factory=dict)
    unknown: list[str] = dataclasses.field(default_factory=list)

    @property
    def exact(self) -> bool:
        """Whether every layer is exact up to rounding."""
        return all(layer.exact for layer in self.layers)

    @property
    def worst_error(self) -> float:
        """The largest relative error of a layer."""
        return max((layer.relative_error for layer in self.layers), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)

    def summary(self) -> str:
        """What was done, how well, in one or two sentences."""
        estimates = Counter(layer.merge for layer in self.layers if layer.merge != "exact")
        merges = [f"{merge} on {count} layers" for merge, count in sorted(estimates.items())]
        text = f"{self.method} with {len(self.layers)} layers as LoRA of r={self.r}, {self.dtype}: "
        text += "exact up to rounding" if self.exact else f"largest relative error {self.worst_error:.2e}"
        if merges:
            text += (
                f", of the conversion alone; the merge before it is {' and '.join(merges)}, and its own error is not "
                "in these numbers"
            )
        if self.filled:
            text += f". {len(self.filled)} layers without an update are filled with zeros"
        return " ".join([f"{text}.", *self.notes()])

    def notes(self) -> list[str]:
        """What one has to know before the export is used, a sentence each."""
        notes = [
            f"Layer {layer!r} shares its weight with {other!r}: apply the LoRA beside that weight, as PEFT does, and "
            "do not merge it in, which would change both."
            for layer, other in self.tied.items()
        ]
        if self.unknown:
            notes.append(
                f"{len(self.unknown)} layers are in no model of the base's class as its config builds it, "
                f"{self.unknown[0]!r} among them: a program that builds it so does not find them."
            )
        return notes

    def __str__(self) -> str:
        rows = [COLUMNS, *(layer.cells() for layer in self.layers)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        return "\n".join([self.summary(), *lines])
