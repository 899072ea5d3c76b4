"""Real text that every Python installation carries: the docstrings of its standard library.

The task is to tell from a docstring which package it documents. The names of the packages are masked, so that the
text has to be understood and not only looked up; derived words (`HTTPError` in http and urllib) stay.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "urllib", "xml")
FEWEST_PACKAGES = 6
FEWEST_DOCSTRINGS = 20
FEWEST_WORDS = 8
TEST_SHARE = 0.25

_MASK = "package"
_NAMES = re.compile(rf"\b({'|'.join(PACKAGES)})\b", re.IGNORECASE)
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Docstring:
    """One text, the package it documents (the label), and the file it stands in (the unit of the split)."""

    text: str
    package: str
    file: str


@dataclass(frozen=True)
class Split:
    """Train and test texts that share no file and no text; `labels` are the packages, in the order of their index."""

    labels: tuple[str, ...]
    train: list[Docstring]
    test: list[Docstring]

    def targets(self, docstrings: Sequence[Docstring]) -> list[int]:
        """Return the index of each docstring's package in `labels`."""
        return [self.labels.index(docstring.package) for docstring in docstrings]


def load_split(stdlib: Path | None = None) -> Split:
    """Read the standard library's sources and split them; the same files always give the same split.

    Args:
        stdlib: folder of the standard library; by default the one of the running Python.

    Raises:
        ValueError: if fewer than `FEWEST_PACKAGES` of `PACKAGES` are there with enough docstrings, as in
            installations that ship compiled files only.
    """
    root = stdlib or Path(sysconfig.get_paths()["stdlib"])
    split = split_by_file(read_docstrings(root))
    if len(split.labels) < FEWEST_PACKAGES:
        raise ValueError(
            f"The standard library in {root} has readable docstrings for {len(split.labels)} of {len(PACKAGES)} "
            f"packages ({', '.join(split.labels) or 'none'}), and {FEWEST_PACKAGES} are needed. This Python seems to "
            "come without the source files of its standard library; use one that has them, such as python.org's."
        )
    return split


def read_docstrings(root: Path) -> list[Docstring]:
    """Collect the docstrings of `PACKAGES` under `root`, in a fixed order, without importing anything."""
    found: dict[str, Docstring] = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            for text in parse_docstrings(path.read_bytes()):
                # A text that is repeated elsewhere counts once, or it could be in both halves of the split.
                found.setdefault(text, Docstring(text, package, path.relative_to(root).as_posix()))
    return list(found.values())


def parse_docstrings(source: bytes) -> Iterator[str]:
    """Yield the docstrings of at least `FEWEST_WORDS` words in a source file, package names masked, on one line."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # deliberately broken files are part of some standard libraries
        return
    for node in ast.walk(tree):
        words = (ast.get_docstring(node) or "").split() if isinstance(node, _DOCUMENTED) else []
        if len(words) >= FEWEST_WORDS:
            yield _NAMES.sub(_MASK, " ".join(words))


def split_by_file(docstrings: Sequence[Docstring]) -> Split:
    """Put whole files into test, up to `TEST_SHARE` of each package's docstrings, and the others into train.

    Packages with a single file or fewer than `FEWEST_DOCSTRINGS` docstrings are left out.
    """
    test_files: set[str] = set()
    labels: list[str] = []
    for package in PACKAGES:
        files = Counter(docstring.file for docstring in docstrings if docstring.package == package)
        if len(files) > 1 and files.total() >= FEWEST_DOCSTRINGS:
            labels.append(package)
            test_files.update(_choose_test_files(files))
    kept = [docstring for docstring in docstrings if docstring.package in labels]
    return Split(
        tuple(labels),
        train=[docstring for docstring in kept if docstring.file not in test_files],
        test=[docstring for docstring in kept if docstring.file in test_files],
    )


def _choose_test_files(files: Counter[str]) -> set[str]:
    """Go through the files in the order of their names' hash, and take each that still fits; at least the smallest."""
    room = TEST_SHARE * files.total()
    chosen = set()
    for name in sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if files[name] <= room:
            chosen.add(name)
            room -= files[name]
    return chosen or {min(files, key=lambda name: (files[name], name))}
