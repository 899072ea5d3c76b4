"""The README is true: its code runs, its commands exist, and its first block holds two of them."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from configparser import ConfigParser
from types import ModuleType, SimpleNamespace

import pytest
from helpers.repository import ROOT
from helpers.support import support_table
from helpers.tiny_models import TINY_MODELS

from peft_reslora import ResLoRAModel

BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)


def commands(block: str) -> list[str]:
    return [line for line in block.splitlines() if line and not line.startswith("#")]


def test_the_first_block_is_the_main_job_and_the_tests():
    language, block = BLOCKS[0]
    main_job, tests = commands(block)
    assert language == "bash"
    assert "peft-reslora quickstart" in main_job
    assert tests.endswith("pytest -n auto")
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for extra in re.findall(r"\.\[(\w+)\]", block):
        assert extra in setup["options.extras_require"]


def test_the_python_blocks_run_in_order_and_the_commands_after_them(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    swift, axolotl = stand_ins(monkeypatch)
    namespace: dict = {}
    for language, block in BLOCKS[1:]:
        if language == "python":
            exec(compile(block, "README.md", "exec"), namespace)
        elif language == "bash":
            for line in commands(block):
                program, *arguments = line.split()
                assert program == "peft-reslora"
                assert command(*arguments).code == 0
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "lora-from-files" / "adapter_model.safetensors").is_file()
    arguments = SimpleNamespace(lora_rank=4, lora_alpha=8)
    prepared = swift.tuners_map["reslora"].prepare_model(arguments, TINY_MODELS["llama"].make())
    assert isinstance(prepared.base_model, ResLoRAModel)
    assert prepared.peft_config["default"].r == 4
    assert namespace["Plugin"] is axolotl.BasePlugin


def stand_ins(monkeypatch):
    """For packages whose users read the README, and which the tests do not install."""
    modules = {name: ModuleType(name) for name in ("swift", "swift.tuner_plugin")}
    modules |= {name: ModuleType(name) for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base")}
    swift, axolotl = modules["swift.tuner_plugin"], modules["axolotl.integrations.base"]
    swift.PeftTuner, swift.tuners_map, axolotl.BasePlugin = type("PeftTuner", (), {}), {}, type("BasePlugin", (), {})
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return swift, axolotl


def test_the_table_of_what_is_supported_is_that_of_the_tests(all_tests):
    if {item.path for item in all_tests} >= set((ROOT / "tests").rglob("test_*.py")):
        table = support_table(all_tests)
    else:  # some files only: another process collects all
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "--support-table", "-p", "no:cacheprovider"]
        printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
        table = "\n".join(line for line in printed.splitlines() if line.startswith("|"))
    assert table.count("\n") > 20
    assert "wrong" not in table
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    start = readme.index(table.splitlines()[0])
    written = itertools.takewhile(lambda line: line.startswith("|"), readme[start:])
    assert sorted(written) == sorted(table.splitlines()), table  # in an order for readers


def test_the_checks_of_ci_are_in_the_test_extra():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    installed = setup["options.extras_require"]["test"]
    for program in ("ruff", "mypy"):
        assert re.search(rf"^{program}\b", (ROOT / ".ci" / "run").read_text(), re.M)
        assert re.search(rf"^{program}\b", installed, re.M)


@pytest.mark.parametrize("path", ["constraints.txt", "benchmarks/train_step.py", "LICENSE"])
def test_the_files_it_speaks_of_exist(path):
    assert (ROOT / path).is_file()
