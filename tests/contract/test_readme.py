"""README is true: its code runs, its commands exist, its first block holds two; and so is the table of the support."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from configparser import ConfigParser

import pytest
from helpers.pages import MANUAL, README, blocks, run_python
from helpers.repository import ROOT
from helpers.support import support_table


def test_the_first_block_is_the_main_job_and_the_tests():
    first = blocks(README)[0]
    main_job, tests = first.commands()
    assert first.language == "bash"
    assert "peft-reslora quickstart" in main_job
    assert tests.endswith("pytest -n auto")
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for extra in re.findall(r"\.\[(\w+)\]", first.code):
        assert extra in setup["options.extras_require"]


def test_the_python_blocks_run_in_order_and_the_commands_after_them(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    run_python(README, slow=True)
    for block in blocks(README)[1:]:
        for line in block.commands() if block.language == "bash" else ():
            program, *arguments = line.split()
            assert program == "peft-reslora"
            assert command(*arguments).code == 0
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "lora-from-files" / "adapter_model.safetensors").is_file()


def test_the_table_of_what_is_supported_is_that_of_the_tests(all_tests):
    if {item.path for item in all_tests} >= set((ROOT / "tests").rglob("test_*.py")):
        table = support_table(all_tests)
    else:  # some files only: another process collects all
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "--support-table", "-p", "no:cacheprovider"]
        printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
        table = "\n".join(line for line in printed.splitlines() if line.startswith("|"))
    assert table.count("\n") > 20
    assert "wrong" not in table
    page = (MANUAL / "supported-engines.md").read_text(encoding="utf-8").splitlines()
    start = page.index(table.splitlines()[0])
    written = itertools.takewhile(lambda line: line.startswith("|"), page[start:])
    assert sorted(written) == sorted(table.splitlines()), table  # in an order for readers


def test_the_checks_of_ci_are_in_the_extras():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for program, extra in (("ruff", "test"), ("mypy", "test"), ("mkdocs", "docs")):
        assert re.search(rf"^{program}\b", (ROOT / ".ci" / "run").read_text(), re.M)
        assert re.search(rf"^{program}\b", setup["options.extras_require"][extra], re.M)


@pytest.mark.parametrize("path", ["constraints.txt", "benchmarks/uuid_pairs.py", "LICENSE"])
def test_the_files_it_speaks_of_exist(path):
    assert (ROOT / path).is_file()
