"""What a config may hold: kinds and sizes of its fields, and patterns that match in bounded time.

Configs come from anywhere, so that nothing in them may cost unbounded time or memory, or end in a traceback from deep
inside of PEFT.
"""

from __future__ import annotations

import functools
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from peft import PeftConfig, TaskType

MAX_RANK = 2**16
MAX_NORM_WINDOW = 100_000
_MAX_ENTRIES = 20_000  # of a list or dict
_MAX_TEXT = 10_000  # characters of a pattern or name
_MAX_REPLICATED = 1024  # layers
_LISTED = 12  # faults in a message
_SECONDS = 10.0  # that all patterns of a config may take on all names of a model

Check = Callable[[Any], "str | None"]
"""None for a value that is accepted, or what is."""


def shown(value: object) -> str:
    """The value for a message: on one line, and short whatever it is."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a value inside itself
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def refuse(config: object, faults: Sequence[str]) -> None:
    """Refuse a config for all its faults at once.

    Raises:
        ValueError: if there are any.
    """
    if faults:
        more = f"; and {len(faults) - _LISTED} more" if len(faults) > _LISTED else ""
        raise ValueError(f"{type(config).__name__} cannot be used: " + "; ".join(faults[:_LISTED]) + f"{more}.")


def field_faults(config: object, checks: Mapping[str, Check], entries: Mapping[str, Check]) -> list[str]:
    """A line for each field of `config` whose value is not accepted.

    Args:
        config: of any kind.
        checks: of fields.
        entries: of the values of fields that are dicts of patterns.
    """
    values = [(name, getattr(config, name), check) for name, check in checks.items()]
    for name, check in entries.items():
        values.append((name, patterns := getattr(config, name), by_pattern))
        if by_pattern(patterns) is None:
            values += [(f"{name}[{shown(key)}]", value, check) for key, value in (patterns or {}).items()]
    faults = ((name, value, check(value)) for name, value, check in values)
    return [f"{name}={shown(value)} must be {accepted}" for name, value, accepted in faults if accepted is not None]


def rank(value: Any) -> str | None:
    ok = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_RANK
    return None if ok else f"a positive integer, at most {MAX_RANK}"


def steps(value: Any) -> str | None:
    """How many steps something takes; perhaps none."""
    return None if _is_index(value) else "an integer that is not negative"


def interval(value: Any) -> str | None:
    return None if _is_index(value) and value > 0 else "a positive integer"


def decay(value: Any) -> str | None:
    """Of a moving average."""
    return None if _is_number(value) and 0 < value < 1 else "a number between 0 and 1"


def penalty(value: Any) -> str | None:
    return None if _is_number(value) and value >= 0 else "a number that is not negative"


def norm_window(value: Any) -> str | None:
    ok = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_NORM_WINDOW
    return None if ok else f"a positive integer, at most {MAX_NORM_WINDOW}"


def dropout(value: Any) -> str | None:
    return None if _is_number(value) and 0 <= value < 1 else "a number in [0, 1)"


def alpha(value: object) -> str | None:
    return None if _is_number(value) else "a finite number"


def flag(value: object) -> str | None:
    return None if isinstance(value, bool) else "True or False"


def text(value: object) -> str | None:
    ok = value is None or (isinstance(value, str) and len(value) <= _MAX_TEXT)
    return None if ok else f"a string of at most {_MAX_TEXT} characters, or None"


def one_of(*known: str) -> Check:
    def check(value: object) -> str | None:
        return None if value in known else f"one of {', '.join(map(repr, known))}"

    return check


def task_type(value: object) -> str | None:
    return None if value is None else one_of(*(member.value for member in TaskType))(value)


def names(value: object) -> str | None:
    """Names or patterns in a list or set."""
    ok = value is None or (isinstance(value, (list, set, tuple)) and len(value) <= _MAX_ENTRIES and _are_texts(value))
    return None if ok else f"a list of at most {_MAX_ENTRIES} strings, or None"


def names_or_pattern(value: object) -> str | None:
    ok = value is None or (_is_text(value) if isinstance(value, str) else names(value) is None)
    return None if ok else f"a string, a list of at most {_MAX_ENTRIES} strings, or None"


def by_pattern(value: object) -> str | None:
    """A dict of names or patterns."""
    ok = value is None or (isinstance(value, dict) and len(value) <= _MAX_ENTRIES and _are_texts(value))
    return None if ok else f"a dict of at most {_MAX_ENTRIES} layer names or patterns"


def indices(value: object) -> str | None:
    """One index or several."""
    ok = value is None or _is_index(value) or (isinstance(value, (list, tuple)) and all(map(_is_index, value)))
    return None if ok else "an integer, a list of integers, or None"


def token_indices(value: object) -> str | None:
    listed = list(value.values()) if isinstance(value, dict) and _are_texts(value) else [value]
    ok = value is None or all(isinstance(entry, (list, tuple)) and all(map(_is_index, entry)) for entry in listed)
    return None if ok else "a list of integers, a dict of such lists, or None"


def replication(value: object) -> str | None:
    ok = value is None or (
        isinstance(value, (list, tuple))
        and all(
            isinstance(pair, (list, tuple)) and len(pair) == 2 and all(map(_is_index, pair)) and pair[0] < pair[1]
            for pair in value
        )
        and sum(stop - start for start, stop in value) <= _MAX_REPLICATED
    )
    return None if ok else f"a list of ranges [first, end) of layers, {_MAX_REPLICATED} layers at most, or None"


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _is_text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _MAX_TEXT


def _are_texts(values: Iterable[Any]) -> bool:
    return all(map(_is_text, values))


# Patterns. How PEFT matches each of them was read in 0.21.2.


def _patterns(config: PeftConfig) -> Iterator[tuple[str, str, str, str]]:
    """Field, pattern as the user wrote it, method of `re`, and pattern as it is matched."""
    for name in ("target_modules", "exclude_modules"):
        if isinstance(value := getattr(config, name), str):
            yield name, value, "fullmatch", value
    for name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, name, None) or ():
            yield name, key, "match", rf"(.*\.)?({key})$"
    layers = config.layers_pattern or ()  # type: ignore[attr-defined]
    for pattern in [layers] if isinstance(layers, str) else layers:
        yield "layers_pattern", pattern, "match", rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."
    for pattern in config.modules_to_save or ():  # type: ignore[attr-defined]
        yield "modules_to_save", pattern, "match", rf"(^|.*\.){pattern}($|\..*)"
    chains = getattr(config, "chain_pattern", None) or ()
    for pattern in [chains] if isinstance(chains, str) else chains:
        yield "chain_pattern", pattern, "search", pattern


def pattern_faults(config: PeftConfig) -> list[str]:
    """A line for each pattern of `config` that is no regular expression."""
    faults = []
    for name, pattern, _, matched in _patterns(config):
        try:
            re.compile(matched)
        except (re.error, RecursionError, OverflowError, MemoryError) as error:
            faults.append(f"{name}: {shown(pattern)} is no regular expression ({type(error).__name__}: {error})")
    return faults


# Runs in a process of its own, since Python's `re` can neither be interrupted nor told how long it may take.
_MEASURE = """
import json, re, sys
names, patterns = json.load(sys.stdin)
for n, (method, pattern) in enumerate(patterns):
    match = getattr(re.compile(pattern), method)
    for name in names:
        match(name)
    print(n, flush=True)
"""


def refuse_slow_patterns(config: PeftConfig, layer_names: Iterable[str]) -> None:
    """Refuse patterns that would take forever on these names, as `(a+)+b` does.

    Most patterns need no measurement: what repeats at most two single characters takes at most cubic time. The others
    are tried in a process of their own that is ended after `_SECONDS`.

    Raises:
        ValueError: naming field and pattern.
    """
    suspects = [entry for entry in _patterns(config) if not _is_cheap(entry[1])]
    if not suspects:
        return
    slow = _first_slow(tuple((method, matched) for *_, method, matched in suspects), tuple(layer_names))
    if slow is not None:
        name, pattern, *_ = suspects[slow]
        raise ValueError(
            f"{name}: the regular expression {shown(pattern)} takes more than {_SECONDS:g} seconds on the names of "
            "this model's modules, or cannot be tried. Write it without repeats inside of repeats, or name the "
            "modules in a list."
        )


def _is_cheap(pattern: str) -> bool:
    repeats = re.findall(r"(?<!\()[*+?]|\{", pattern)
    return len(repeats) <= 2 and not re.search(r"\)[*+?{]", pattern)


@functools.lru_cache(maxsize=16)
def _first_slow(patterns: tuple[tuple[str, str], ...], layer_names: tuple[str, ...]) -> int | None:
    """The first pattern that does not come to its end in time."""
    if not sys.executable or getattr(sys, "frozen", False):  # no Python to run
        return 0
    task = json.dumps([layer_names, patterns])
    command = [sys.executable, "-I", "-S", "-c", _MEASURE]
    try:
        done = subprocess.run(command, input=task, capture_output=True, text=True, timeout=_SECONDS).stdout
    except subprocess.TimeoutExpired as expired:
        done = (expired.stdout or b"").decode()
    except OSError:
        done = ""
    finished = len(done.split())
    return finished if finished < len(patterns) else None


def oversized(layer_rank: int, in_features: int, out_features: int) -> str | None:
    """Why a layer of this shape gets no adapter of this rank, which would be many times its size; None if it does."""
    most = max(1024, 4 * max(in_features, out_features))
    return None if layer_rank <= most else f"rank {layer_rank} is more than {most}, which a layer of its shape can use"
