"""README and the pages of the manual, and the blocks of code in them.

A Python block runs after those before it on its page, in a folder that has a small Llama in `base`, unless a comment
before it says why not:

    <!-- not run: needs a GPU -->         is compiled only
    <!-- slow: imports take seconds -->   runs in the slow tests only
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.repository import ROOT

README, MANUAL = ROOT / "README.md", ROOT / "docs"
PAGES = sorted(MANUAL.glob("*.md"))
_BLOCK = re.compile(r"(?:^<!-- (not run|slow): ([^\n]+) -->\n+)?^```(\w+)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class CodeBlock:
    """A fenced block.

    Args:
        language: as it says behind the fence.
        code: its text.
        line: of the page, where the code begins.
        mark: 'not run', 'slow' or None.
    """

    language: str
    code: str
    line: int
    mark: str | None

    def commands(self) -> list[str]:
        """The lines of a shell block that are commands, without the comments behind them."""
        text = self.code.replace("\\\n", " ")
        return [line.split("  #")[0].strip() for line in text.splitlines() if line and not line.startswith("#")]


def blocks(page: Path) -> list[CodeBlock]:
    """The blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        CodeBlock(match[3], match[4], text.count("\n", 0, match.start(4)) + 1, match[1])
        for match in _BLOCK.finditer(text)
    ]


def has_python(page: Path, mark: str | None) -> bool:
    """Whether the page has a Python block with this mark."""
    return any(block.language == "python" and block.mark == mark for block in blocks(page))


def run_python(page: Path, slow: bool) -> dict[str, Any]:
    """Run the Python blocks of a page in order, and give the names that they define.

    All are compiled. A traceback shows the lines of the page.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language == "python":
            code = compile("\n" * (block.line - 1) + block.code, str(page.relative_to(ROOT)), "exec")
            if block.mark is None or (slow and block.mark == "slow"):
                exec(code, namespace)
    return namespace
