"""Private names of other packages stand in three files, so that a new version of PEFT or torch is read there only."""

from __future__ import annotations

import ast
from pathlib import Path

import peft_reslora
from peft_reslora.shared.host import OVERRIDDEN_HOOKS

PACKAGE = Path(peft_reslora.__file__).parent
DOCUMENTED = {"_", "_getframe"}  # the latter of the standard library
ALLOWED = {"shared/host.py", "registration.py", "reslora/recompute.py"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name not in DOCUMENTED


def own_names(trees: list[ast.Module]) -> set[str]:
    """All private names that the package itself defines: functions, classes, attributes and variables."""
    names: set[str] = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                names.add(name)
    return {name for name in names if is_private(name)}


def used_names(tree: ast.Module) -> set[str]:
    """The private attributes, and private parts of imports, that a file uses."""
    names: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name):
                names.add(name)
            case ast.ImportFrom(module=str(module), names=aliases):
                names.update([*module.split("."), *(alias.name for alias in aliases)])
            case ast.Import(names=aliases):
                names.update(part for alias in aliases for part in alias.name.split("."))
    return {name for name in names if is_private(name)}


def test_private_names_of_others_stand_in_three_files():
    trees = {p.relative_to(PACKAGE).as_posix(): ast.parse(p.read_text()) for p in PACKAGE.rglob("*.py")}
    known = own_names(list(trees.values())) | OVERRIDDEN_HOOKS
    found = {file: sorted(used_names(tree) - known) for file, tree in trees.items() if file not in ALLOWED}
    assert {file: names for file, names in found.items() if names} == {}
    assert {file for file in ALLOWED if used_names(trees[file]) - known} == ALLOWED - {"reslora/recompute.py"}
