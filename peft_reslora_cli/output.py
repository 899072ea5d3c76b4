"""What commands print."""

from __future__ import annotations


def say(text: object) -> None:
    """Print; of what a name may hold, only what does nothing to the terminal."""
    from peft_reslora.shared.text import printable

    print("\n".join(map(printable, str(text).split("\n"))), flush=True)  # noqa: T201
