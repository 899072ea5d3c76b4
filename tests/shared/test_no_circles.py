"""No module needs itself: imports go from the upper floors to the lower ones, those inside functions included."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import peft_reslora

PACKAGE = Path(peft_reslora.__file__).parent
MODULES = {
    ".".join(["peft_reslora", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
# Which floors the modules of a floor import, beside their own.
FLOORS = {
    "shared": set(),
    "mora": {"shared"},
    "reslora": {"shared"},
    "export": {"shared", "mora", "reslora"},
    "training": {"shared", "mora", "reslora", "export"},
}


def run_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below one, without what only type checkers read."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield child
            yield from run_time_nodes(child)


def imports_of(name: str) -> set[str]:
    """The modules of the package that a module imports anywhere in it."""
    package = name.split(".") if MODULES[name].name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in run_time_nodes(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            inner = {f"{source}.{alias.name}" for alias in node.names}
            found |= {module if module in MODULES else source for module in inner}
    return found & MODULES.keys() - {name}


def test_no_module_imports_itself_by_way_of_others():
    graph = {name: imports_of(name) for name in MODULES}
    assert sum(map(len, graph.values())) > len(graph)  # imports are found
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_floors_import_those_below_only():
    for name in MODULES:
        floor = name.split(".")[1] if "." in name else ""
        if floor in FLOORS:
            others = {module.partition(".")[2].partition(".")[0] for module in imports_of(name)} - {floor}
            assert others <= FLOORS[floor], (name, others - FLOORS[floor])
