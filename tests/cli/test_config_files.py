"""Configs are found by name, wherever the package is installed, and shipped with it."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from helpers.repository import ROOT

from peft_reslora_cli import config_files
from peft_reslora_cli.config_files import find_config, list_configs

SHIPPED = sorted((ROOT / "peft_reslora_cli" / "configs").rglob("*.y*ml"))


def test_every_config_is_found_by_its_name() -> None:
    names = {name for kind in ("accelerate", "train", "compare") for name in list_configs(kind)}
    assert {find_config(name) for name in names} == set(SHIPPED)
    assert {"accelerate/ddp", "accelerate/fsdp2", "accelerate/zero2", "accelerate/zero3"} <= names


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_config_is_yaml_whose_header_has_its_command(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert isinstance(yaml.safe_load(text), dict)
    header = list(itertools.takewhile(lambda line: line.startswith("#"), text.splitlines()))
    (command,) = (line for line in header if line.startswith("# Command:"))
    assert path.stem in command


@pytest.mark.parametrize("name", ["accelerate/ddp", "accelerate/ddp.yaml", "ddp", "ddp.yaml", Path("accelerate/ddp")])
def test_names_may_be_shortened(name: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config(name) == ROOT / "peft_reslora_cli" / "configs" / "accelerate" / "ddp.yaml"


def test_files_of_ones_own_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ddp.yaml").touch()
    assert find_config("ddp.yaml") == Path("ddp.yaml")
    assert find_config(tmp_path / "ddp.yaml") == tmp_path / "ddp.yaml"
    assert find_config("ddp") == ROOT / "peft_reslora_cli" / "configs" / "accelerate" / "ddp.yaml"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("accelerate/dpp", r"accelerate/dpp is no file and no config of this package; did you mean accelerate/ddp\?"),
        ("zero", "did you mean accelerate/zero[23] or accelerate/zero[23]"),
        ("my/fdsp2.yaml", r"did you mean accelerate/fsdp2\?"),
        ("llama", "known are accelerate/ddp, accelerate/fsdp2, "),
        ("accelerate", "known are "),
        ("", "known are "),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said):
        find_config(name)


def test_names_that_several_have_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_files, "_FOLDER", tmp_path)
    for kind in ("train", "compare"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "small.yaml").touch()
    with pytest.raises(ValueError, match="several configs are called small; choose from compare/small, train/small"):
        find_config("small")
    assert find_config("train/small") == tmp_path / "train" / "small.yaml"
    assert list_configs("train") == ["train/small"]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="a source archive holds copies, as it has no links")
def test_a_clone_has_them_where_the_readme_says() -> None:
    assert (ROOT / "configs").resolve() == ROOT / "peft_reslora_cli" / "configs"


@pytest.mark.slow
def test_the_wheel_holds_them_all(tmp_path: Path) -> None:
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("peft_reslora", "peft_reslora_cli"):
        shutil.copytree(ROOT / name, tmp_path / name)
    build = [sys.executable, "-c", "import setuptools; setuptools.setup()", "-q", "bdist_wheel"]
    subprocess.run(build, cwd=tmp_path, check=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    files = set(zipfile.ZipFile(wheel).namelist())
    assert {path.relative_to(ROOT).as_posix() for path in SHIPPED} <= files
    sources = (path for name in ("peft_reslora", "peft_reslora_cli") for path in (ROOT / name).rglob("*.py"))
    assert {path.relative_to(ROOT).as_posix() for path in sources} <= files
    assert {"peft_reslora/py.typed", "peft_reslora_cli/py.typed"} <= files
