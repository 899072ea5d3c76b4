"""What a config says of one layer: its entry among PEFT's patterns, and LoRA's scaling."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from typing import Any


def by_pattern(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The entry for the layer `name` as PEFT's `get_pattern_key` (0.21.2) finds it; each pattern is compiled once."""
    for key, compiled in zip(pattern or {}, _compiled(tuple(pattern or {})), strict=True):
        if compiled.match(name):
            return pattern[key]  # type: ignore[index]
    return (pattern or {}).get(name, default)


@functools.lru_cache(maxsize=4)
def _compiled(keys: tuple[str, ...]) -> list[re.Pattern[str]]:
    return [re.compile(rf"(.*\.)?({key})$") for key in keys]


def scaling_of(config: Any, r: int, alpha: float) -> float:
    """PEFT's s: alpha / r, or alpha / sqrt(r) with `use_rslora`."""
    return alpha / (math.sqrt(r) if config.use_rslora else r)
