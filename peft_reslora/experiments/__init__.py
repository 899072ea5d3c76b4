"""Training runs and comparisons from a YAML file: `train` one adapter, `compare` many tuners on one task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_reslora.experiments.comparison import compare
    from peft_reslora.experiments.run import train

__all__ = ["compare", "train"]


def __getattr__(name: str) -> Any:
    """Load Trainer and datasets only when a run is asked for."""
    if name == "train":
        from peft_reslora.experiments.run import train

        return train
    if name == "compare":
        from peft_reslora.experiments.comparison import compare

        return compare
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
