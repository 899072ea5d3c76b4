"""A tuner's section in a trainer's settings: the fields of its config that the trainer has no words for."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Mapping
from typing import Any

from peft import PeftConfig


def check_section(
    name: str, config: type[PeftConfig], section: Mapping[str, Any], given: Collection[str], trainer: str
) -> None:
    """Check that a section holds fields of the config, and none that the trainer's own settings fill.

    Args:
        name: the section's.
        config: the class whose fields it holds.
        section: the section.
        given: the fields that the trainer's own settings fill.
        trainer: the trainer's name, for the message.

    Raises:
        ValueError: for another field.
    """
    if not isinstance(section, Mapping):
        raise ValueError(f"{name}: it holds fields of {config.__name__} by name, and came as {section!r}.")
    known = [field.name for field in dataclasses.fields(config) if field.init]
    for key in section:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"It takes {', '.join(sorted(known))}."
            raise ValueError(f"{name}: {config.__name__} has no field {key!r}. {hint}")
        if key in given:
            raise ValueError(f"{name}: {key!r} comes from {trainer}'s own settings; leave it out of this section.")
