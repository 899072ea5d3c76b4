"""The workflow against pre-releases parses, may fail, and names what exists."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml
from helpers.repository import ROOT
from packaging.requirements import Requirement

WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "pre-releases.yml").read_text(encoding="utf-8"))
JOB: dict[str, Any] = WORKFLOW["jobs"]["tests"]
COMMANDS: list[str] = [step["run"] for step in JOB["steps"] if "run" in step]


def test_it_runs_by_schedule_and_on_demand_and_may_fail():
    triggers = WORKFLOW[True]  # YAML 1.1 reads `on` so
    assert set(triggers) == {"schedule", "workflow_dispatch"}
    assert JOB["continue-on-error"] is True


def test_it_installs_both_packages_past_the_constraints_and_runs_the_default_selection():
    assert COMMANDS[-1] == "pytest -n auto"  # as README and CONTRIBUTING
    first, second = (command for command in COMMANDS if command.startswith("pip install"))
    assert "constraints.txt" in first
    assert second == "pip install ${{ matrix.packages }}"
    for entry in JOB["strategy"]["matrix"]["include"]:
        words = [word for word in shlex.split(entry["packages"]) if not word.startswith("--")]
        names = {Path(word).name if "/" in word else Requirement(word).name for word in words}
        assert names == {"peft", "transformers"}


def test_it_lifts_both_bounds_of_the_import(tmp_path: Path):
    folder = tmp_path / "peft_reslora"
    folder.mkdir()
    source = shutil.copy(ROOT / "peft_reslora" / "registration.py", folder)
    (command,) = (command for command in COMMANDS if command.startswith("sed "))
    subprocess.run(shlex.split(command), cwd=tmp_path, check=True)
    changed = Path(source).read_text(encoding="utf-8")
    lines = [line for line in changed.splitlines() if line.startswith("SUPPORTED_")]
    assert len(lines) == 2
    assert all(line.endswith(', Version("99"))') for line in lines)
    compile(changed, source, "exec")
