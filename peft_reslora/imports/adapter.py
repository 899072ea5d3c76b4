"""`import_adapter`: from a folder of the papers' repositories to the folder of a native adapter."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn

from peft_reslora.imports.account import Account
from peft_reslora.imports.mora import is_mora, read_mora
from peft_reslora.imports.reading import Imported
from peft_reslora.imports.reslora import is_reslora, read_reslora
from peft_reslora.shared.files import replaced_folder


def import_adapter(source: str | os.PathLike[str], out: str | os.PathLike[str], *, base: str | None = None) -> Account:
    """Read an adapter of kongds/MoRA or of microsoft/LMOps' ResLoRA, and write it as a MoRA or ResLoRA adapter.

    MoRA: `adapter_config.json` with `use_mora` and the adapter's tensors, as the PEFT fork of kongds/MoRA saves them.
    ResLoRA: `reslora_config.json` and `pytorch_model_lora.bin`, or the folder of a whole model that LMOps' trainer
    saved. The adapter that is written computes in its forward pass what theirs computes while training.

    Only the base model's config is read, for the names and shapes of its layers, and never its weights.

    Args:
        source: the folder.
        out: a new or an empty folder.
        base: the base model, a folder or a Hub id; by default what the files say. It has to be on this machine.

    Raises:
        ValueError: for what has no equal here, or cannot be known from the files, by its name and with the reason;
            nothing has been written then.
    """
    source, out = Path(source), Path(out)
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} holds files, which would be replaced. Give a new or an empty folder.")
    imported = _read(source, base)
    _write(imported, out)
    return imported.account


def _read(source: Path, base: str | None) -> Imported:
    if is_mora(source):
        return read_mora(source, base)
    if is_reslora(source):
        return read_reslora(source, base)
    raise ValueError(
        f"{source} holds neither an adapter_config.json with use_mora=true (kongds/MoRA), nor a reslora_config.json "
        "(LMOps' ResLoRA), nor a model's config.json with a resconfig (the same, saved whole). Adapters of PEFT need "
        "no import."
    )


def _write(imported: Imported, out: Path) -> None:
    """Save the adapter as PEFT does, from a model without weights: what does not fit is refused before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a model on the meta device, and of layers without links
        model: Any = get_peft_model(imported.base, imported.config, low_cpu_mem_usage=True)
        set_peft_model_state_dict(
            model, imported.tensors, low_cpu_mem_usage=True
        )  # checks; what it loads goes to meta
        model.peft_config["default"].base_model_name_or_path = imported.account.base
        with replaced_folder(out, ()) as folder:
            state_dict = _full_state_dict(model, imported.tensors)
            model.save_pretrained(str(folder), state_dict=state_dict, save_embedding_layers=False)


def _full_state_dict(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's state dict with the adapter's tensors in it, whose own keys lack the adapter's name."""
    added = ("default", "modules_to_save")
    own = {".".join(part for part in key.split(".") if part not in added): key for key in model.state_dict()}
    return {**model.state_dict(), **{own[key]: tensor for key, tensor in tensors.items()}}
