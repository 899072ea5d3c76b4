"""The folder of an export is there whole or not at all, whenever the process that writes it is killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from peft_reslora.shared import files as folder
from peft_reslora.shared.files import replaced_folder

NAMES = ("one", "two")


def write(path: Path, text: str) -> None:
    with replaced_folder(path, NAMES) as new:
        for name in NAMES:
            (new / name).write_text(text)


def texts(path: Path) -> list[str]:
    return [(path / name).read_text() for name in NAMES]


@pytest.fixture(params=["at once", "by renames"])
def exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "by renames":
        monkeypatch.setattr(folder, "_exchange_at_once", lambda one, other: False)
    return request.param


@pytest.mark.usefixtures("exchange")
def test_a_folder_is_made_and_replaced(tmp_path: Path) -> None:
    for text in ("old", "new"):
        write(tmp_path / "a" / "lora", text)
        assert texts(tmp_path / "a" / "lora") == [text, text]
        assert [p.name for p in (tmp_path / "a").iterdir()] == ["lora"]


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux' own")
def test_linux_exchanges_folders_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "lora", "old")
    (tmp_path / "probe").mkdir()
    (tmp_path / "other").mkdir()
    if not folder._exchange_at_once(tmp_path / "probe", tmp_path / "other"):
        pytest.skip("the file system cannot")
    monkeypatch.delattr(Path, "rename")
    write(tmp_path / "lora", "new")
    assert texts(tmp_path / "lora") == ["new", "new"]


@pytest.mark.usefixtures("exchange")
def test_a_failure_leaves_the_old_folder(tmp_path: Path) -> None:
    write(tmp_path / "lora", "old")
    with pytest.raises(UnicodeEncodeError):
        write(tmp_path / "lora", "\ud800")
    assert texts(tmp_path / "lora") == ["old", "old"]
    assert [p.name for p in tmp_path.iterdir()] == ["lora"]


def test_a_failed_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "lora", "old")
    rename = Path.rename

    def fail_for_new(self: Path, target: Path) -> Path:
        if ".new-" in self.name:
            raise OSError("no rename")
        return rename(self, target)

    monkeypatch.setattr(folder, "_exchange_at_once", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", fail_for_new)
    with pytest.raises(OSError, match="no rename"):
        write(tmp_path / "lora", "new")
    assert texts(tmp_path / "lora") == ["old", "old"]
    assert [p.name for p in tmp_path.iterdir()] == ["lora"]


def test_a_folder_that_a_killed_process_moved_away_is_put_back(tmp_path: Path) -> None:
    for text, days in (("older", 3), ("old", 2), ("oldest", 4)):
        write(tmp_path / f".lora.old-{text}", text)
        os.utime(tmp_path / f".lora.old-{text}", (time.time() - days * 86400,) * 2)
    with pytest.raises(UnicodeEncodeError):
        write(tmp_path / "lora", "\ud800")
    assert [p.name for p in tmp_path.iterdir()] == ["lora"]
    assert texts(tmp_path / "lora") == ["old", "old"]


def test_what_killed_processes_left_is_deleted_after_a_day(tmp_path: Path) -> None:
    for name in (".lora.new-1", ".lora.new-2", ".lora.old-1", ".other.new-1"):
        (tmp_path / name).mkdir()
        if name != ".lora.new-2":
            os.utime(tmp_path / name, (0, 0))
    (tmp_path / "lora").mkdir()
    write(tmp_path / "lora", "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lora.new-2", ".other.new-1", "lora"]


def test_a_folder_behind_a_link_is_replaced_there(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert texts(tmp_path / "real") == ["new", "new"]


def test_a_folder_that_cannot_be_moved_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ValueError, match="or the working directory, which cannot be replaced"):
        write(Path("."), "new")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    with pytest.raises(ValueError, match="is a mount point"):
        write(tmp_path / "empty", "new")


# In each round a child writes one export over the other, again and again, until it is killed.
KILLED_AT_RANDOM = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from peft_reslora.export import export_lora
from peft_reslora.shared import files as folder

def rounds(target, at_once):
    exports[0].save_pretrained(target)
    started = target.with_name("started")
    for _ in range(50):
        child = os.fork()
        if child == 0:
            while True:
                for export in exports:
                    export.save_pretrained(target)
                started.touch()
        while not started.exists():
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        started.unlink()
        found = target
        if not at_once and not target.exists():
            found = max(target.parent.glob(".lora.old-*"), key=lambda folder: folder.stat().st_mtime)
        assert {p.name for p in found.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
        r = json.loads((found / "adapter_config.json").read_text())["r"]
        assert {min(t.shape) for t in load_file(found / "adapter_model.safetensors").values()} == {r}
    print(len([p for p in target.parent.iterdir() if p.name.startswith(".lora.")]))
    exports[1].save_pretrained(target)
    PeftModel.from_pretrained(torch.nn.Sequential(torch.nn.Linear(40, 50)), target)

torch.set_num_threads(1)
exports = []
for r in (8, 16):
    config = LoraConfig(r=r, target_modules=["0"], init_lora_weights=False)
    exports.append(export_lora(get_peft_model(torch.nn.Sequential(torch.nn.Linear(40, 50)), config)))
if sys.argv[2] == "True":
    rounds(Path(sys.argv[1], "a", "lora"), at_once=True)
folder._exchange_at_once = lambda one, other: False
rounds(Path(sys.argv[1], "b", "lora"), at_once=False)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the rounds fork")
def test_an_export_that_is_killed_leaves_the_old_folder_or_the_new(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    at_once = folder._exchange_at_once(tmp_path / "one", tmp_path / "other")
    arguments = [sys.executable, "-c", KILLED_AT_RANDOM, str(tmp_path), str(at_once)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    left = [int(line) for line in done.stdout.split()]
    assert len(left) == 1 + at_once
    assert min(left) > 0, "some were killed in the middle, and left what they were writing"
