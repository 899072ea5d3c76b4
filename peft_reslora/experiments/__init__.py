"""Training runs and comparisons from a YAML file: `train` one adapter, `compare` many tuners on one task."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_reslora.experiments.comparison import compare
    from peft_reslora.experiments.run import train

__all__ = ["compare", "train"]

_PACKAGES = ("datasets", "psutil", "rich", "scipy", "tokenizers", "yaml")
"""By the names under which they are imported; what only some runs need is asked for by those."""


def _check_packages() -> None:
    """Refuse to be imported without what the extra brings, before a run comes to its first missing package.

    Raises:
        ImportError: naming all that are missing, and the extra.
    """
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise ImportError(
            f"Training and comparing need {', '.join(missing)}, which {'are' if missing[1:] else 'is'} not installed: "
            "pip install 'peft_reslora[experiments]'"
        )


_check_packages()


def __getattr__(name: str) -> Any:
    """Load Trainer and datasets only when a run is asked for."""
    if name == "train":
        from peft_reslora.experiments.run import train

        return train
    if name == "compare":
        from peft_reslora.experiments.comparison import compare

        return compare
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
