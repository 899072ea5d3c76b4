"""The base weights under a restarted adapter, in a file beside each checkpoint, which holds the adapter only."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from peft_reslora.mora import MoRALinear
from peft_reslora.training.restartable import adapted_layers, set_operator

RESTARTS_FILE = "restarts.safetensors"


def save_base_weights(model: nn.Module, file: Path, adapter_name: str = "default", **metadata: str) -> None:
    """Write the base weights under the adapter, with all that was merged into them; to be read by the function below.

    PEFT's checkpoints hold the adapter only, so that each needs this beside it. It replaces `file` in one go.
    """
    tensors = {}
    for name, layer in adapted_layers(model, adapter_name):
        tensors[name] = layer.get_base_layer().weight.detach().contiguous()
        if isinstance(layer, MoRALinear):
            metadata["mora_type"] = layer.mora_type[adapter_name]
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        save_file(tensors, unfinished, metadata=metadata)
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


@torch.no_grad()
def load_base_weights(model: nn.Module, file: Path, adapter_name: str = "default") -> None:
    """Put the base weights written by `save_base_weights` back, bit for bit.

    Raises:
        ValueError: if the file is missing, damaged, or of another model; nothing is changed then.
    """
    layers = {name: layer.get_base_layer().weight for name, layer in adapted_layers(model, adapter_name)}
    metadata = read_metadata(file)
    with safe_open(file, framework="pt") as opened:
        shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        if wrong := [
            name for name in {**layers, **shapes} if name not in layers or shapes.get(name) != layers[name].shape
        ]:
            raise ValueError(
                f"{file} does not fit adapter {adapter_name!r} on this model: {len(wrong)} layers are missing, extra "
                f"or of another shape, the first {wrong[0]}. Load the base model and config that the run began with."
            )
        for name, weight in layers.items():
            weight.copy_(opened.get_tensor(name))
    if "mora_type" in metadata:
        set_operator(model, adapter_name, metadata["mora_type"])


def read_metadata(file: Path) -> dict[str, str]:
    """What `save_base_weights` was told to write beside the tensors.

    Raises:
        ValueError: if the file is missing or damaged.
    """
    if not file.is_file():
        raise ValueError(
            f"{file} does not exist. It holds the base weights with the updates of earlier cycles, which are not in "
            "the adapter. Pass the folder with it as MergeAndRestartCallback(resume_from=...), resume from another "
            "checkpoint, or start a new run."
        )
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}): resume from another checkpoint.") from error
