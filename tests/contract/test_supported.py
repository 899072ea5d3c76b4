"""`docs/supported.md` shows what the tests show."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
from helpers.repository import ROOT
from helpers.support import layer_support_table

KINDS = ROOT / "tests" / "reslora" / "test_layer_kinds.py"


def test_the_table_of_layers_is_that_of_the_tests(all_tests: list[pytest.Item]) -> None:
    if any(item.path == KINDS for item in all_tests):
        table = layer_support_table(all_tests)
    else:  # another process collects them
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "--layer-support-table", str(KINDS)]
        command += ["-p", "no:cacheprovider"]
        printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
        table = "\n".join(line for line in printed.splitlines() if line.startswith("|"))
    assert table.count("\n") > 10
    assert "wrong" not in table
    assert "| - |" not in table
    page = (ROOT / "docs" / "supported.md").read_text(encoding="utf-8").splitlines()
    start = page.index(table.splitlines()[0])
    written = itertools.takewhile(lambda line: line.startswith("|"), page[start:])
    assert "\n".join(written) == table, table
