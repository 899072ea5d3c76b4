"""Saving and loading native adapters, on top of PEFT's: whole files, the model card, and a seal that shows damage.

PEFT writes the weights, and then asks the config to save itself (read in 0.21.0 to 0.21.2); both stand here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftConfig
from safetensors import safe_open

from peft_reslora.shared.card import write_native_card
from peft_reslora.shared.digests import ReadFile
from peft_reslora.shared.files import CONFIG_FILE, WEIGHTS_FILE, refuse_damaged, replaced_file, seal
from peft_reslora.shared.host import loader_runs
from peft_reslora.shared.lora_savers import NotSavedAsLora


class SavedWhole(NotSavedAsLora):
    """What the configs of both tuners do when an adapter is saved and loaded."""

    # While PEFT loads the adapter: what its config was read with. No field, so that it is neither compared nor saved.
    read_file: ReadFile | None = None

    def to_dict(self) -> dict[str, Any]:
        """As in PEFT, for the file: the tensors that are saved with it have stamps."""
        return {**super().to_dict(), "stamped": True}

    def size_table(self, sides: Mapping[str, int]) -> list[tuple[str, ...]]:
        """For the model card, a header and rows on what the method made of the layers; none if the config says it all.

        Args:
            sides: the first dimension of each tensor in the checkpoint, by its key.
        """
        return []

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As in PEFT; the file is replaced in one step, the weights beside it are sealed, and the model card says how
        to load and export the adapter.

        Raises:
            ValueError: if PEFT has saved tensors that were partitioned over processes; they are deleted.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        weights = folder / WEIGHTS_FILE
        if weights.is_file():
            _refuse_empty(weights)
        with replaced_file(folder / CONFIG_FILE) as whole:
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
        read = refuse_damaged(weights) if weights.is_file() else None
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if read is not None and isinstance(config, SavedWhole) and loader_runs():
            config.read_file = read
        return config

    def take_read_file(self) -> ReadFile | None:
        """What was read with the config of an adapter that is loaded now, once; None if its file has been changed."""
        read, self.read_file = self.read_file, None
        return read if read is not None and read.is_current() else None


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
