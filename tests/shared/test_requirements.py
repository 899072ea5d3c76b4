"""What the package imports is declared in setup.cfg, with bounds that its import checks and constraints.txt meets."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser

import pytest
from helpers.repository import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from peft_reslora import registration

OWN = {"peft_reslora", "peft_reslora_cli"}
SOURCES = [file for package in sorted(OWN) for file in sorted((ROOT / package).rglob("*.py"))]
# A joint is imported by its trainer, which is there then, with what it needs itself.
TRAINERS = {"axolotl", "llamafactory", "pydantic", "swift"}
EXTRAS = ("demo", "experiments", "images", "test", "engines", "docs")


def section(name: str) -> dict[str, Requirement]:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    text = setup["options.extras_require"][name] if name != "core" else setup["options"]["install_requires"]
    found = [Requirement(line) for line in text.splitlines() if line and "%(" not in line]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def imported(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Top-level name of each import, and whether it is inside a function or for a type checker only."""
    inside = {id(node) for block in ast.walk(tree) if is_lazy(block) for node in ast.walk(block)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], id(node) in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module).partition(".")[0], id(node) in inside


def is_lazy(block: ast.AST) -> bool:
    typing_only = isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
    return typing_only or isinstance(block, (ast.FunctionDef, ast.AsyncFunctionDef))


def test_an_import_of_the_package_brings_nothing_that_peft_and_transformers_do_not():
    """Neither matplotlib nor datasets, trl, sklearn, rich, nor whatever else takes its time."""
    script = (
        "import sys, peft, transformers; before = {*sys.modules}; import peft_reslora; print({*sys.modules} - before)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    brought = {name.partition(".")[0] for name in ast.literal_eval(done.stdout.splitlines()[-1])}
    assert "peft_reslora" in brought
    assert brought - set(sys.stdlib_module_names) == {"peft_reslora"}


def test_every_import_is_declared():
    core, optional = section("core"), {}
    for extra in ("demo", "compose", "experiments", "images"):
        optional |= section(extra)
    seen = set()
    for path in SOURCES:
        for name, lazy in imported(ast.parse(path.read_text(encoding="utf-8"))):
            package = canonicalize_name({"yaml": "pyyaml", "PIL": "pillow"}.get(name, name))
            if name in sys.stdlib_module_names or name in OWN or ("integrations" in path.parts and name in TRAINERS):
                continue
            seen.add(package)
            may_need_extra = lazy or "experiments" in path.parts  # which only its commands import
            assert package in core or (may_need_extra and package in optional), f"{path.name} imports {name}"
    assert {"torch", "peft", "packaging", "huggingface-hub"} <= seen
    assert core.keys() <= seen, "declared and not used"


def test_the_constraints_meet_every_declared_bound():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {canonicalize_name(r.name): r for r in (Requirement(line) for line in lines if line[:1].isalpha())}
    for requirement in [r for name in ("core", *EXTRAS) for r in section(name).values()]:
        (pin,) = pinned[canonicalize_name(requirement.name)].specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), f"{requirement} and {pin}"


@pytest.mark.parametrize(
    ("package", "supported"),
    [("peft", registration.SUPPORTED_PEFT), ("transformers", registration.SUPPORTED_TRANSFORMERS)],
)
def test_the_bounds_are_those_that_the_import_checks(package, supported):
    specifier, (first, beyond) = section("core")[package].specifier, supported
    assert specifier.contains(str(first))
    assert not specifier.contains(str(beyond))
    lowest, highest = (re.escape(".".join(map(str, v.release[:2]))) for v in supported)
    assert re.search(rf">={lowest}\b", str(specifier))
    assert re.search(rf"<{highest}\b", str(specifier))


def test_safetensors_replaces_files_whole():
    """Before 0.8, `save_file` wrote into the old file: a full disk or a kill destroyed the adapter that was there."""
    assert not section("core")["safetensors"].specifier.contains("0.7.1")
