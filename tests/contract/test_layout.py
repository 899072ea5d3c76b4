"""How the tests are laid out: what several of them need is in `tests/helpers`, and none imports another."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.repository import ROOT

FILES = sorted((ROOT / "tests").rglob("*.py"))
TESTS = {file.stem for file in FILES if file.stem.startswith("test_")} | {"conftest", "tests"}


def imported(source: str) -> Iterator[str]:
    """Every part of the name of each module and object that is imported, wherever in the file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from (part for name in names for part in name.split("."))


def test_no_file_imports_a_test_file():
    found = {str(file): TESTS & set(imported(file.read_text(encoding="utf-8"))) for file in FILES}
    assert {file: names for file, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import test_layout",
        "from test_layout import FILES",
        "from contract.test_layout import FILES",
        "from contract import test_layout as other",
        "def test():\n    import tests.contract",
    ],
    ids=["module", "name", "in a folder", "under another name", "late"],
)
def test_an_import_of_a_test_file_would_be_seen(source: str):
    assert TESTS & set(imported(source))


def test_helpers_hold_no_tests():
    helpers = Path(ROOT, "tests", "helpers").glob("*.py")
    assert [file.name for file in helpers if "\ndef test_" in file.read_text(encoding="utf-8")] == []
