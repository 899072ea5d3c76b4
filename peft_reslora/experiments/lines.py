"""JSON lines, one run a line, that survive being interrupted at any moment."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Append a line and wait until it is on the disk; half a line that a killed process left is cut off first.

    Raises:
        ValueError: if the line holds nan or infinity, which JSON has not.
    """
    text = json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"
    with path.open("ab+") as file:
        file.seek(0)
        whole = file.read()
        file.truncate(whole.rfind(b"\n") + 1)
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def read_lines(folder: Path) -> list[Line]:
    """The lines of all `runs*.jsonl` of a folder, those of several shards joined; of one key the first counts.

    Raises:
        ValueError: naming file and line of what is no JSON object with a key, unless it is the last line and has no
            line end: it was not finished.
    """
    found: dict[str, Line] = {}
    for path in sorted(folder.glob("runs*.jsonl")):
        finished = path.read_bytes().split(b"\n")[:-1]  # bytes: half a line may end within a character
        for number, text in enumerate(finished, start=1):
            try:
                line = json.loads(text.decode())
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is no JSON: {error}.") from error
            if not isinstance(line, dict) or "key" not in line:
                raise ValueError(f"{path}, line {number} has no key; it is no line of a comparison. Remove it.")
            found.setdefault(line["key"], line)
    return list(found.values())
