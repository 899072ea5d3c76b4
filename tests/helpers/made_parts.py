"""The parts of the manual that are made from the package, its commands and the benchmarks' results.

They stand between `<!-- made: NAME -->` and `<!-- end -->`, so that whoever reads the files has them. After a change
of what they are made from:

    PYTHONPATH=tests python -m helpers.made_parts
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from helpers.pages import PAGES, README
from helpers.repository import ROOT
from peft import LoraConfig, PeftConfig

import peft_reslora_cli
from peft_reslora import MoRAConfig, ResLoRAConfig
from peft_reslora.reslora.config import _REFUSED_FIELDS

_PART = re.compile(r"^<!-- made: (.+?) -->\n(.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL)
_RESULTS = ROOT / "benchmarks" / "results"


def made_parts(page: Path) -> Iterator[tuple[str, str, str]]:
    """Of each such part of a page: its name, what it is, and what it has to be."""
    for match in _PART.finditer(page.read_text(encoding="utf-8")):
        yield match[1], match[2], make(match[1])


def make(name: str) -> str:
    """What a part has to be, with an empty line before and after it."""
    kind, _, argument = name.partition(" ")
    return f"\n{_MAKERS[kind](argument).strip()}\n\n"


def write_parts(page: Path) -> None:
    """Make the parts of a page anew."""
    text = page.read_text(encoding="utf-8")
    page.write_text(_PART.sub(lambda part: f"<!-- made: {part[1]} -->\n{make(part[1])}<!-- end -->", text), "utf-8")


def _table(*rows: tuple[str, ...]) -> str:
    """In Markdown; the first row is its head."""
    head, *others = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *others])


def _fields(name: str) -> str:
    """The fields that a config adds to those of its base class, by their metadata."""
    config: type[PeftConfig]
    config, base = {"ResLoRAConfig": (ResLoRAConfig, LoraConfig), "MoRAConfig": (MoRAConfig, PeftConfig)}[name]
    inherited, hints = {field.name for field in dataclasses.fields(base)}, get_type_hints(config)
    return _table(
        ("field", "values", "default", "what it is"),
        *(
            (f"`{field.name}`", _values(hints[field.name]), f"`{_default(field)}`", _plain(field.metadata["help"]))
            for field in dataclasses.fields(config)
            if field.name not in inherited
        ),
    )


def _values(hint: Any) -> str:
    """The words that a field takes, or the kinds of its values."""
    if get_origin(hint) is Literal:
        return ", ".join(f"`{word!r}`" for word in get_args(hint))
    if get_origin(hint) in (None, list, dict):
        return f"`{getattr(hint, '__name__', hint) if get_origin(hint) is None else hint}`"
    return " or ".join("`None`" if part is type(None) else _values(part) for part in get_args(hint))


def _default(field: dataclasses.Field[Any]) -> str:
    factory = field.default_factory
    return repr(field.default if isinstance(factory, dataclasses._MISSING_TYPE) else factory())


def _plain(text: str) -> str:
    """A text for a cell, in which nothing is a sign of Markdown."""
    return re.sub(r"([|<*])", r"\\\1", text)


def _refused_fields(_: str) -> str:
    """LoRA's fields that ResLoRA refuses unless they have their default."""
    return ", ".join(f"`{name}`" for name in sorted(_REFUSED_FIELDS)) + "."


def _help(_: str) -> str:
    """`--help` of the program and of each command."""
    os.environ["COLUMNS"] = "90"  # argparse reads it
    parser = peft_reslora_cli.build_parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    texts = {parser.prog: parser, **{f"{parser.prog} {name}": command for name, command in commands.choices.items()}}
    return "\n\n".join(
        f"## {name}\n\n```text\n{command.format_help().strip()}\n```" for name, command in texts.items()
    )


def _result(argument: str) -> str:
    """A table of a file in benchmarks/results: the file's name, and the table's number if it has several."""
    file, _, number = argument.partition(" ")
    text = (_RESULTS / file).read_text(encoding="utf-8")
    return re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)[int(number or 1) - 1]


def _fidelity(_: str) -> str:
    """benchmarks/results/merge_fidelity.md with a line for each task and shortcut."""
    lines: dict[tuple[str, str], dict[str, list[str]]] = {}
    for row in _result("merge_fidelity.md").splitlines()[2:]:
        task, shortcut, merge, *numbers = [cell.strip() for cell in row.strip("|").split("|")]
        lines.setdefault((task, shortcut), {})[merge] = numbers
    rows = []
    for key, merges in lines.items():
        divergences = [merges[name][0].split(" ")[0] for name in ("drop", "input_norm", "weight_norm")]
        accuracies = merges["drop"][2], merges["least_squares"][3], merges["annealed"][3]
        rows.append((", ".join(key), *divergences, merges["least_squares"][0], " / ".join(accuracies)))
    return _table(("task, shortcut", "drop", "input_norm", "weight_norm", "least_squares", "accuracy"), *rows)


_TASKS = {
    "sst2": "SST-2, accuracy in %",
    "emoji": "emoji, denoising loss in %",
    "uuid": "UUID pairs, characters in %",
}
_COMPARED = {
    "LoRA": ("LoRA",),
    "`block`, `pre_num` 1, all": ("ResLoRA block 1", "ResLoRA block all"),
    "`middle`, `pre_num` 1, all": ("ResLoRA middle 1", "ResLoRA middle all"),
    "`input`": ("ResLoRA input",),
    "MoRA `sharing`, `rotation`": ("MoRA sharing", "MoRA rotation"),
    "rsLoRA, DoRA, AdaLoRA": ("rsLoRA", "DoRA", "AdaLoRA"),
}


def _compared(argument: str) -> str:
    """The differences to LoRA of the comparisons in benchmarks/results, in bold where they are better or worse."""
    tables = []
    for folder in argument.split():
        with (_RESULTS / folder / "table.csv").open(encoding="utf-8", newline="") as file:
            tables.append({row["method"]: row for row in csv.DictReader(file)})
    rows = []
    for label, methods in _COMPARED.items():
        cells = (", ".join(_difference(table[method]) for method in methods) for table in tables)
        rows.append((label, *cells))
    return _table(("", *(_TASKS[folder] for folder in argument.split())), *rows)


def _difference(row: dict[str, str]) -> str:
    if row["verdict"] == "reference":
        return row["test"]
    return f"**{row['difference']}**" if row["verdict"] in ("better", "worse") else row["difference"]


_MAKERS: dict[str, Callable[[str], str]] = {
    "fields": _fields,
    "refused-fields": _refused_fields,
    "help": _help,
    "result": _result,
    "fidelity": _fidelity,
    "compared": _compared,
}

if __name__ == "__main__":
    for path in [README, *PAGES]:
        write_parts(path)
        sys.stdout.write(f"{path.relative_to(ROOT)}\n")
