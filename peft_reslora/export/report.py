"""What an export did, layer by layer: as a value, as text and in the model card."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft import PeftConfig

from peft_reslora.shared.card import card_head, markdown_table, versions
from peft_reslora.shared.tables import format_table
from peft_reslora.shared.text import code, code_block, printable, prose

COLUMNS = ("layer", "exact", "merge", "rank", "kept", "energy kept", "relative error")
LEGEND = "rank: directions in the factors of the update; kept: those in the export, before padding with zeros."


@dataclass(frozen=True)
class LayerReport:
    """One layer's export.

    Args:
        layer: the module's name in the base model.
        merge: how the adapter became one matrix: 'exact', or the name of what estimated it. The error of an estimated
            merge is not part of `relative_error`; `peft_reslora.merge_report` measures it.
        why: of an exact merge of ResLoRA, the reason.
        exact: whether the export holds the adapter's update up to rounding: an exact merge, nothing cut off, float32.
        rank_before: directions in the factors of the update.
        rank_after: directions in the export, before padding with zeros.
        energy_kept: fraction of the update's squared singular values in the export; None if `first` is given, since a
            part of an adapter with nested ranks has another scaling than the whole.
        relative_error: of the conversion, ||update - exported||_F / ||update||_F.
        first: of an adapter with nested ranks, the rank at which it was truncated: no fit to the whole update, but the
            first directions of each block, which were trained to do by themselves.
    """

    layer: str
    merge: str
    why: str
    exact: bool
    rank_before: int
    rank_after: int
    energy_kept: float | None
    relative_error: float
    first: int | None = None

    def cells(self) -> tuple[str, ...]:
        """The row of the table, under `COLUMNS`."""
        kept = str(self.rank_after) if self.first is None else f"{self.rank_after}, truncated at {self.first}"
        energy = "-" if self.energy_kept is None else f"{self.energy_kept:.6f}"
        numbers = (self.rank_before, kept, energy, f"{self.relative_error:.2e}")
        merge = f"{self.merge} ({self.why})" if self.why else self.merge
        return (printable(self.layer), "yes" if self.exact else "no", merge, *map(str, numbers))


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
        is_dora: the file has DoRA's norms besides.
    """

    method: str
    call: str
    r: int
    dtype: str
    layers: list[LayerReport]
    filled: list[str]
    tied: dict[str, str] = dataclasses.field(default_factory=dict)
    unknown: list[str] = dataclasses.field(default_factory=list)
    is_dora: bool = False

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

    @property
    def kind(self) -> str:
        """What the file is."""
        return "DoRA" if self.is_dora else "LoRA"

    def summary(self) -> str:
        """What was done, how well, in one or two sentences."""
        estimates = Counter(layer.merge for layer in self.layers if layer.merge != "exact")
        merges = [f"{merge} on {count} layers" for merge, count in sorted(estimates.items())]
        text = f"{self.method} with {len(self.layers)} layers as {self.kind} of r={self.r}, {self.dtype}: "
        text += "exact up to rounding" if self.exact else f"largest relative error {self.worst_error:.2e}"
        if merges:
            text += (
                f", of the conversion alone; the merge before it is {' and '.join(merges)}, and its own error is not "
                "in these numbers"
            )
        if first := {layer.first for layer in self.layers} - {None}:
            text += (
                f". Its ranks are nested: it is truncated to the first {first.pop()} directions of each block, and "
                "the error is the distance from the adapter with all of them"
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
        table = format_table([COLUMNS, *(layer.cells() for layer in self.layers)])
        return "\n".join([self.summary(), *table, LEGEND])


def lora_card(config: PeftConfig, report: ExportReport, command: str | None = None) -> str:
    """The `README.md` of an exported LoRA.

    Args:
        config: the config in the same folder.
        report: what the export did.
        command: the shell command that made it, if it was one.
    """
    method = report.method.split(" ")[0]
    readers = "PEFT" if report.is_dora else "PEFT, and with what reads PEFT's checkpoints,"
    return f"""{card_head(config, [report.kind.lower(), method.lower()])}
# {report.kind} from {prose(report.method)}

A standard {report.kind} (r = alpha = {report.r}): it loads with {readers} without
`peft_reslora`. The adapter was trained with {prose(method)}.

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/or/repo")
```

## What the conversion kept

{_kept(report)}

## How it was made

{code_block("sh", command) if command else code_block("python", report.call)}

{versions()}
"""


def pipeline_card(config: PeftConfig, reports: Mapping[str, ExportReport]) -> str:
    """The `README.md` beside one file with the exports of several models of a diffusers pipeline."""
    methods = sorted({report.method.split(" ")[0] for report in reports.values()})
    parts = "\n\n".join(f"### {code(name)}\n\n{_kept(report)}" for name, report in reports.items())
    return f"""{card_head(config, ["lora", *map(str.lower, methods)])}
# LoRA from {prose(", ".join(methods))} for a diffusers pipeline

A standard LoRA for the models {", ".join(map(code, reports))}: it loads without `peft_reslora`.

```python
pipeline.load_lora_weights("path/or/repo")
```

## What the conversion kept

{parts}

{versions()}
"""


def _kept(report: ExportReport) -> str:
    """What the conversion kept, in words and as a table."""
    table = markdown_table([COLUMNS, *(layer.cells() for layer in report.layers)])
    return f"{prose(report.summary())}\n\n{table}\n\n{LEGEND}"
