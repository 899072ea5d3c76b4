"""Writing a folder whole or not at all."""

from __future__ import annotations

import ctypes
import glob
import os
import shutil
import sys
import time
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_ABANDONED_AFTER = 24 * 60 * 60  # seconds
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # Linux: fcntl.h, linux/fs.h


@contextmanager
def replaced_folder(path: str | os.PathLike[str], own_files: Collection[str]) -> Iterator[Path]:
    """A new folder beside `path`, to be filled in the block, that takes the place of `path` at its end.

    What was at `path` stays until everything new is on the disk; an exception in the block leaves it as it was. On
    Linux the two folders then change places in one step, so that a process killed at any moment leaves the old folder
    or the new one, whole. Elsewhere, and on file systems that cannot do so, there are two renames; a process killed
    between them leaves the old folder as `.<name>.old-<random>`, and the next call for `path` puts it back first.

    A killed process also leaves what it was writing, `.<name>.new-<random>`; a later call deletes it when it is a day
    old. A program that opens one file before the exchange and another one after it reads one of each folder.

    Args:
        path: the folder to make or to replace.
        own_files: the file names that may be lost with a folder that is replaced.

    Raises:
        ValueError: if `path` is a file, a folder with other files in it, a mount point or the working directory.
    """
    target = Path(path).resolve()
    _clear_up(target)
    _check_replaceable(target, own_files)
    target.parent.mkdir(parents=True, exist_ok=True)
    new = _beside(target, "new")
    new.mkdir()
    try:
        yield new
        for file in new.iterdir():
            _sync(file)
        _sync(new)
        if target.exists():
            _exchange(new, target)
        else:
            new.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)  # after an exchange, what was replaced


def _exchange(new: Path, target: Path) -> None:
    """Let two folders change places, in one step where that is possible."""
    if _exchange_at_once(new, target):
        return
    old = _beside(target, "old")
    target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        old.rename(target)
        raise
    old.rename(new)


def _exchange_at_once(one: Path, other: Path) -> bool:
    """Linux' `renameat2`, which Python does not offer; False where the system or the file system has none."""
    if sys.platform != "linux":
        return False
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except AttributeError:  # musl before 1.2.6, glibc before 2.28
        return False
    done: int = renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return done == 0


def _clear_up(target: Path) -> None:
    """Put back a folder that a killed process had moved away, and delete what such processes left a day ago."""

    def left(word: str) -> list[Path]:
        return list(target.parent.glob(f".{glob.escape(target.name)}.{word}-*"))

    def written(folder: Path) -> float:
        return folder.stat().st_mtime  # which a rename leaves as it is

    with suppress(FileNotFoundError):  # what another process has just moved or deleted itself
        if not target.exists() and (old := left("old")):
            max(old, key=written).rename(target)
        for folder in (*left("old"), *left("new")):
            if time.time() - written(folder) > _ABANDONED_AFTER:
                shutil.rmtree(folder, ignore_errors=True)


def _beside(target: Path, word: str) -> Path:
    return target.with_name(f".{target.name}.{word}-{uuid.uuid4().hex[:8]}")


def _check_replaceable(target: Path, own_files: Collection[str]) -> None:
    """Refuse to replace what is not ours.

    Raises:
        ValueError: naming what is in the way.
    """
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; give the path of a folder to write to.")
    if os.path.ismount(target) or Path.cwd().is_relative_to(target):
        raise ValueError(
            f"{target} is a mount point or the working directory, which cannot be replaced; give a folder inside it."
        )
    foreign = sorted({p.name for p in target.iterdir()} - set(own_files)) if target.exists() else []
    if foreign:
        raise ValueError(
            f"{target} holds other files ({', '.join(foreign[:5])}) and would be replaced as a whole; give a new or "
            "an empty folder."
        )


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk; Windows cannot do that for folders."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
