"""Small helpers on tensors, and on the buffers that layers hold by adapter."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor

from peft_reslora.shared.host import BufferDict

NOT_HERE = "sharded or offloaded and cannot be read"  # for messages


def widen(tensor: torch.Tensor) -> torch.Tensor:
    """In float32, or as it is where that is wider."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def is_readable(tensor: torch.Tensor) -> bool:
    """Whether its numbers are all here: not sharded over processes, nor kept elsewhere by an engine or offloading."""
    return not (isinstance(tensor, DTensor) or tensor.is_meta or tensor.numel() == 0)


def stored(buffers: BufferDict, adapter_name: str) -> torch.Tensor | None:
    """The adapter's buffer, if there is one."""
    return buffers[adapter_name] if adapter_name in buffers else None  # noqa: SIM401 - it has no `get`


def restore(buffers: BufferDict, adapter_name: str, buffer: torch.Tensor | None) -> None:
    """Put back what `stored` gave; None takes the adapter's buffer away."""
    if buffer is not None:
        buffers[adapter_name] = buffer
    elif adapter_name in buffers:
        del buffers[adapter_name]
