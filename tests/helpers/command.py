"""What a command of `peft-reslora` leaves, which the fixture `command` runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Done:
    """What a command left: exit code and the two streams."""

    code: int | str | None
    out: str
    err: str
