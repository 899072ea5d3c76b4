"""Names from somebody else in a model card and on a terminal: shown as they are, and neither formatted nor obeyed."""

from __future__ import annotations

import re

# What Markdown reads as formatting, links, HTML, tables or formulas; underscores within words are none.
_MARKDOWN = re.compile(r"[\\`*\[\]<>&|~$]|(?<!\w)_|_(?!\w)")


def printable(text: object) -> str:
    """On one line, without control characters, line ends and invisible signs: these as `\\n`, `\\x1b`, `\\u202e`."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))


def prose(text: object) -> str:
    """As Markdown that reads as the text does."""
    return _MARKDOWN.sub(lambda match: f"\\{match[0]}", printable(text))


def code(text: object) -> str:
    """As code within a line of Markdown, also in a table."""
    shown = printable(text).replace("|", "\\|")
    fence = _longer_than_runs(shown, 1)
    return f"{fence} {shown} {fence}" if "`" in shown else f"{fence}{shown}{fence}"


def code_block(language: str, text: object) -> str:
    """One line as a block of code."""
    shown = printable(text)
    fence = _longer_than_runs(shown, 3)
    return f"{fence}{language}\n{shown}\n{fence}"


def _longer_than_runs(text: str, least: int) -> str:
    """A fence that no run of backticks in the text ends."""
    return "`" * max([least, *(len(run) + 1 for run in re.findall("`+", text))])
