"""The files of an adapter: read and refused where they are damaged, sealed, and written whole or not at all."""

from __future__ import annotations

import ctypes
import glob
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from peft import PeftConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from peft_reslora.shared import fields
from peft_reslora.shared.digests import ReadFile, digests_of, memory_of, sha256, version_of_file

CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "adapter_config.json", "adapter_model.safetensors", "README.md"
# In the header of the weights: a digest of all that is in them, which 0.1.0 reads too, and one made of the digests of
# the tensors, which can be taken of several at a time and serve the stamps as well.
_DIGEST, _DIGEST_BY_TENSOR = "sha256", "sha256_by_tensor"
_LARGEST_CONFIG = 2**24  # bytes
# Of the fields that an export reads, and that not each config checks itself.
_CHECKS: dict[str, fields.Check] = {
    "r": fields.rank,
    "lora_alpha": fields.alpha,
    "target_modules": fields.names_or_pattern,
    "exclude_modules": fields.names_or_pattern,
    "layers_pattern": fields.names_or_pattern,
    "modules_to_save": fields.names,
    "layers_to_transform": fields.indices,
    "base_model_name_or_path": fields.text,
    "revision": fields.text,
    "auto_mapping": fields.by_pattern,
    "use_rslora": fields.flag,
    "fan_in_fan_out": fields.flag,
    "norm_window": fields.norm_window,
    "chain_pattern": fields.names_or_pattern,
}
_ENTRIES: dict[str, fields.Check] = {"rank_pattern": fields.rank, "alpha_pattern": fields.alpha}
_ABANDONED_FILE, _ABANDONED_FOLDER = 60 * 60, 24 * 60 * 60  # seconds after which what a killed process left is deleted
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # Linux: fcntl.h, linux/fs.h


def read_config(folder: Path) -> PeftConfig:
    """The config of a saved adapter, whoever wrote it.

    Raises:
        ValueError: naming the file that is missing, or what it holds that no config may.
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise ValueError(f"{file} does not exist, so {folder} is not the folder of a saved adapter.")
    try:
        if file.stat().st_size > _LARGEST_CONFIG:
            raise ValueError(f"it has more than {_LARGEST_CONFIG:,} bytes")
        if not isinstance(json.loads(file.read_text(encoding="utf-8")), dict):
            raise ValueError("it is no JSON object")
        config = PeftConfig.from_pretrained(str(folder))
        if config.peft_type is None:
            raise ValueError("it names no peft_type")
        if faults := _faults(config):
            raise ValueError("; ".join(faults))
    except Exception as error:  # PEFT and json raise what the file makes them: KeyError, RecursionError and others
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{file} cannot be read as an adapter's config: {reason}") from error
    return config


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a saved adapter, as they are in its file.

    Raises:
        ValueError: if the file is missing, damaged or empty, or has names that are none.
    """
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise ValueError(f"{file} does not exist; a folder with {CONFIG_FILE} and {WEIGHTS_FILE} is needed.")
    refuse_damaged(file)
    tensors = load_file(file)
    if not tensors:
        raise ValueError(f"{file} holds no tensors, so there is no adapter in it. Save the adapter again.")
    if strange := [key for key in tensors if not key.isprintable()]:
        raise ValueError(f"{file} has names that no layer has: {strange[0]!a}. It is no adapter of PEFT's.")
    return tensors


def _faults(config: PeftConfig) -> list[str]:
    """The fields of a config that are not what they may be."""
    checks, entries = ({name: c for name, c in all_.items() if hasattr(config, name)} for all_ in (_CHECKS, _ENTRIES))
    return fields.field_faults(config, checks, entries)


def seal(file: Path) -> None:
    """Write the digests of the file's tensors into its header; the file is replaced in one step."""
    with safe_open(file, "pt") as opened:
        metadata = dict(opened.metadata() or {})
    tensors = load_file(file)
    metadata[_DIGEST] = _digest(tensors)
    metadata[_DIGEST_BY_TENSOR] = _digest_by_tensor(tensors, digests_of(tensors), metadata[_DIGEST])
    with replaced_file(file) as whole:
        save_file(tensors, whole, metadata=metadata)


def refuse_damaged(file: Path) -> ReadFile | None:
    """Check the tensors of a sealed file; one without a seal, such as another program makes, passes.

    Returns:
        What was read and hashed for it, if the seal is one made of the digests of the tensors.

    Raises:
        ValueError: if they are not those that were saved, or cannot be read.
    """
    version, read = version_of_file(file), None
    try:
        sealed, by_tensor = _seals_of(file)
        whole = sealed is None and by_tensor is None
        if by_tensor is not None:
            tensors = load_file(file)
            read = ReadFile(file, version, tensors, digests_of(tensors))
            whole = by_tensor == _digest_by_tensor(tensors, read.digests, sealed)
        elif sealed is not None:
            whole = sealed == _digest(load_file(file))
        fault = "its tensors are not those that were saved: their SHA-256 is not the one in its header"
    except SafetensorError as error:
        whole, fault = False, str(error)
    if not whole:
        raise ValueError(
            f"{file} is damaged or no safetensors file ({fault}). Save the adapter again, or take another copy of it."
        )
    return read


def seal_of(file: Path) -> str | None:
    """The digest in the header of a file of tensors; None if nobody has sealed it."""
    return _seals_of(file)[0]


def _seals_of(file: Path) -> tuple[str | None, str | None]:
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() or {}
    return metadata.get(_DIGEST), metadata.get(_DIGEST_BY_TENSOR)


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(memory_of(tensor))
    return digest.hexdigest()


def _digest_by_tensor(tensors: Mapping[str, torch.Tensor], digests: Mapping[str, bytes], sealed: str | None) -> str:
    """SHA-256 of names, dtypes, and digests of shapes and values; and of the other seal."""
    entries = (f"{name} {tensors[name].dtype} ".encode() + digest for name, digest in sorted(digests.items()))
    return sha256(f"{sealed} ".encode(), *entries).hex()


@contextmanager
def replaced_file(file: Path) -> Iterator[Path]:
    """A place for what takes the place of `file` in one step."""
    for left in file.parent.glob(f".{file.name}-*"):  # by a process that was killed, unless it is still being written
        with suppress(FileNotFoundError):  # another process was faster
            if time.time() - left.stat().st_mtime > _ABANDONED_FILE:
                shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}-") as folder:
        yield Path(folder, file.name)
        os.replace(Path(folder, file.name), file)


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
            if time.time() - written(folder) > _ABANDONED_FOLDER:
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
