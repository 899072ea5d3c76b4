"""Files of other programs: JSON and tensors, read without running anything that is in them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_reslora.export.base import config_of_base, fitting_bases
from peft_reslora.export.reading import FETCH
from peft_reslora.imports.account import Account

_LARGEST_CONFIG = 2**24  # bytes


@dataclass(frozen=True)
class Imported:
    """An adapter that can be written as a native one.

    Args:
        config: of the native adapter.
        tensors: by their keys in the native checkpoint, with the names of the bare model.
        base: the base model without weights.
        account: of what became of the source.
    """

    config: PeftConfig
    tensors: dict[str, Tensor]
    base: nn.Module
    account: Account


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: if the file holds something else.
    """
    try:
        if file.stat().st_size > _LARGEST_CONFIG:
            raise ValueError(f"it has more than {_LARGEST_CONFIG:,} bytes")
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} cannot be read as a config: it is no JSON object.")
    return found


def read_tensors(files: Iterable[Path]) -> dict[str, Tensor]:
    """The tensors of all files, safetensors or torch's; of the latter nothing but tensors is unpickled.

    Raises:
        ValueError: if a file is damaged, or holds something else than tensors by name.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            safe = file.suffix == ".safetensors"
            found = load_file(file) if safe else torch.load(file, map_location="cpu", weights_only=True)
        except (SafetensorError, OSError, RuntimeError, EOFError) as error:
            raise ValueError(f"{file} is damaged or holds no tensors: {error}") from error
        except Exception as error:  # pickle.UnpicklingError, and what else the file makes torch raise
            raise ValueError(f"{file} holds more than tensors, and is not opened: {error}") from error
        if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
            raise ValueError(f"{file} holds something else than tensors by name, so it is no state dict.")
        tensors |= {str(key): tensor.detach() for key, tensor in found.items()}
    return tensors


def refuse_nonfinite(tensors: dict[str, Tensor]) -> None:
    """Refuse a broken adapter.

    Raises:
        ValueError: naming a tensor with NaN or inf.
    """
    if broken := [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise ValueError(f"{len(broken)} tensors hold NaN or inf, {broken[0]} among them: the adapter is broken.")


def base_with(config: PeftConfig, layers: Iterable[str]) -> nn.Module:
    """The base model of an adapter without weights, by its config, with these layers.

    Raises:
        ValueError: if its config is not on this machine, or makes no model that has them.
    """
    layers = list(layers)
    name = config.base_model_name_or_path
    advice = f"Pass base= (--base) with the folder or the Hub id of the base model. {FETCH}"
    if not name:
        raise ValueError(f"The files do not say which base model the adapter is for, which its import needs. {advice}")
    if (base_config := config_of_base(config)) is None:
        raise ValueError(f"There is no config of the base model {name!r} on this machine. {advice}")
    base = next((model for _, model in fitting_bases(config, base_config, layers)), None)
    if base is None:
        raise ValueError(f"No model with the config of {name!r} has the layer {layers[0]!r} and the others. {advice}")
    return base


def integer(config: dict[str, Any], name: str, default: int, file: Path) -> int:
    """An integer of a config.

    Raises:
        ValueError: naming file and field, if it is none.
    """
    value = config.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{file} has {name}={value!r}, which is no integer.")
    return value
