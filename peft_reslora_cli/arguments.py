"""What the arguments of several commands share."""

from __future__ import annotations

import argparse
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

# Those of the library, which would have to import torch to be asked; a test compares them.
SHORTCUTS = ("input", "block", "middle")
DTYPES = ("float32", "float16", "bfloat16")


def with_default(text: str) -> str:
    """The help of an option that has a default."""
    return f"{text} (default: %(default)s)"


def positive(text: str) -> int:
    """The type of an option that is a positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)
