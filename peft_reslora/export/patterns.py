"""The regular expressions of a config from somebody else, tried on the layers' names in a process that can be stopped.

Python's `re` cannot be: an expression such as `(a+)+b` takes years on a name of fifty letters, and holds all threads.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Collection
from typing import Any

_SECONDS = 5
_FEW = 100_000  # matches of plain names that need no trial
_PLAIN = re.compile(r"[\w.-]*")
_FIELDS = (
    *("target_modules", "exclude_modules", "modules_to_save"),
    *("layers_pattern", "rank_pattern", "alpha_pattern", "chain_pattern"),
)
_NAMES = ("target_modules", "exclude_modules")  # a list of these holds ends of names
# The three ways in which PEFT (0.21.2) and chains use them.
_TRIAL = r"""
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    try:
        tried = [re.compile(pattern), re.compile(rf"(.*\.)?({pattern})$")]
    except (re.error, OverflowError, RecursionError) as error:
        sys.exit(f"{pattern[:80]!r} is no regular expression: {error}")
    for name in names:
        tried[0].fullmatch(name), tried[0].search(name), tried[1].match(name)
"""


def refuse_slow_patterns(config: Any, names: Collection[str]) -> None:
    """Refuse a config whose expressions take too long on these names, or are none.

    Raises:
        ValueError: naming the fields that have them.
    """
    fields = _patterns(config)
    patterns = [pattern for held in fields.values() for pattern in held]
    if len(patterns) * len(names) < _FEW and all(map(_PLAIN.fullmatch, patterns)):
        return
    trial, given = [sys.executable, "-I", "-S", "-c", _TRIAL], json.dumps([patterns, list(names)])
    try:
        done = subprocess.run(trial, input=given, capture_output=True, text=True, timeout=_SECONDS, check=False)
        fault = "" if done.returncode == 0 else done.stderr.strip()
    except subprocess.TimeoutExpired:
        fault = f"they take more than {_SECONDS} s on the names of {len(names)} layers"
    if fault:
        raise ValueError(f"the regular expressions in {', '.join(fields)} cannot be used: {fault}")


def _patterns(config: Any) -> dict[str, list[str]]:
    """The expressions of a config by field; a list of modules holds none."""
    fields: dict[str, Any] = {}
    for name in _FIELDS:
        value = getattr(config, name, None)
        if isinstance(value, str):
            fields[name] = [value]
        elif isinstance(value, dict) or (isinstance(value, (list, set)) and name not in _NAMES):
            fields[name] = [str(pattern) for pattern in value]
    return fields
