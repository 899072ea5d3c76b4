"""What commands print."""

from __future__ import annotations

import os


def say(text: object) -> None:
    """Print, in the first process of a launcher; of what a name may hold, only what does nothing to the terminal."""
    if os.environ.get("RANK", "0") != "0":
        return
    from peft_reslora.shared.text import printable

    print("\n".join(map(printable, str(text).split("\n"))), flush=True)  # noqa: T201
