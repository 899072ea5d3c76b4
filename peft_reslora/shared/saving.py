"""Saving and loading native adapters, on top of PEFT's: whole files, the model card, and a seal that shows damage.

PEFT writes the weights, and then asks the config to save itself (read in 0.21.0 to 0.21.2); both stand here.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from peft_reslora.shared.lora_savers import NotSavedAsLora

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_DIGEST = "sha256"  # in the header of the weights
_ABANDONED_AFTER = 60 * 60  # seconds


class SavedWhole(NotSavedAsLora):
    """What the configs of both tuners do when an adapter is saved and loaded."""

    def to_dict(self) -> dict[str, Any]:
        """As in PEFT, for the file: the tensors that are saved with it have stamps."""
        return {**super().to_dict(), "stamped": True}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As in PEFT; the file is replaced in one step, the weights beside it are sealed, and the model card says how
        to load and export the adapter.

        Raises:
            ValueError: if PEFT has saved tensors that were partitioned over processes; they are deleted.
        """
        from peft_reslora.export.card import write_native_card  # no tuner needs the export to be imported

        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        weights = folder / WEIGHTS_FILE
        if weights.is_file():
            _refuse_empty(weights)
        with _replaced(folder / CONFIG_FILE) as whole:
            super().save_pretrained(str(whole.parent), **kwargs)
        if weights.is_file():
            seal(weights)
        write_native_card(save_directory, self)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """As in PEFT; weights in the same local folder are checked for damage.

        Raises:
            ValueError: if their tensors are not those that were saved.
        """
        weights = Path(pretrained_model_name_or_path, subfolder or "", WEIGHTS_FILE)
        if weights.is_file():
            refuse_damaged(weights)
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)


def _refuse_empty(file: Path) -> None:
    """DeepSpeed ZeRO-3 leaves tensors without numbers in the model, which PEFT saves as they are."""
    with safe_open(file, "pt") as opened:
        empty = [name for name in opened.keys() if 0 in opened.get_slice(name).get_shape()]  # noqa: SIM118
    if empty:
        file.unlink()
        raise ValueError(
            f"{len(empty)} tensors of the adapter hold no numbers, {empty[0]} among them: they are partitioned over "
            "processes. Save with trainer.save_model(), or pass state_dict=accelerator.get_state_dict(model) to "
            "save_pretrained."
        )


def seal(file: Path) -> None:
    """Write the digest of the file's tensors into its header; the file is replaced in one step."""
    with safe_open(file, "pt") as opened:
        metadata = dict(opened.metadata() or {})
    tensors = load_file(file)
    with _replaced(file) as whole:
        save_file(tensors, whole, metadata={**metadata, _DIGEST: _digest(tensors)})


def refuse_damaged(file: Path) -> None:
    """Check the tensors of a sealed file; one without a seal, such as another program makes, passes.

    Raises:
        ValueError: if they are not those that were saved, or cannot be read.
    """
    try:
        with safe_open(file, "pt") as opened:
            sealed = (opened.metadata() or {}).get(_DIGEST)
        whole = sealed is None or sealed == _digest(load_file(file))
        fault = "its tensors are not those that were saved: their SHA-256 is not the one in its header"
    except SafetensorError as error:
        whole, fault = False, str(error)
    if not whole:
        raise ValueError(
            f"{file} is damaged or no safetensors file ({fault}). Save the adapter again, or take another copy of it."
        )


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def _replaced(file: Path) -> Iterator[Path]:
    """A place for what takes the place of `file` in one step."""
    for left in file.parent.glob(f".{file.name}-*"):  # by a process that was killed, unless it is still being written
        with suppress(FileNotFoundError):  # another process was faster
            if time.time() - left.stat().st_mtime > _ABANDONED_AFTER:
                shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}-") as folder:
        yield Path(folder, file.name)
        os.replace(Path(folder, file.name), file)
