"""Names the layers that a model never calls, and whose adapters would train nothing, after the first training forward.

A layer notes the adapters that have taken part in a forward pass; when the model's own forward ends, the others are
looked for, once.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from peft_reslora.shared.checkpoints import canonical
from peft_reslora.shared.host import forward_hooks, is_compiled, remove_hooks
from peft_reslora.shared.stamps import StampedLayer
from peft_reslora.shared.targets import is_routed

_LISTED = 3


def watch_first_pass(model: nn.Module) -> None:
    """Look once at what the first training forward of `model` calls."""
    stop_watching(model)
    model.register_forward_hook(name_uncalled)


def stop_watching(model: nn.Module) -> None:
    """Take the hook off again."""
    remove_hooks(model, lambda hook: hook is name_uncalled)


def after_pass(model: nn.Module) -> None:
    """Look now: for a caller who has called the model's forward past its hooks."""
    if name_uncalled in forward_hooks(model):
        name_uncalled(model)


def name_uncalled(model: nn.Module, args: Any = None, output: Any = None) -> None:
    """Warn of layers whose adapters are to be trained and were not called; a forward hook, until it has looked."""
    if torch.compiler.is_compiling() or not (model.training and torch.is_grad_enabled()):
        return
    if any(map(is_compiled, model.modules())):  # compiled code tells nobody what it calls
        stop_watching(model)
        return
    called: dict[str, list[str]] = {}
    uncalled: dict[str, list[str]] = {}
    for name, layer in model.named_modules():
        for adapter_name in layer.active_adapters if isinstance(layer, StampedLayer) else ():
            if _is_trained(layer, adapter_name) and not is_routed(name):
                found = called if adapter_name in layer.called_adapters else uncalled
                found.setdefault(adapter_name, []).append(canonical(name))
    if not called:  # as with adapters that are switched off
        return
    stop_watching(model)
    for adapter_name, names in uncalled.items():
        total = len(names) + len(called.get(adapter_name, ()))
        more = ", ..." if len(names) > _LISTED else ""
        warnings.warn(
            f"{len(names)} of the {total} layers of adapter {adapter_name!r} were never called in the first training "
            f"forward pass: {', '.join(names[:_LISTED])}{more}. If the model always runs like that, their adapters "
            "train nothing and are saved as they were made. Leave the layers out with exclude_modules.",
            stacklevel=3,
        )


def _is_trained(layer: StampedLayer, adapter_name: str) -> bool:
    if layer.disable_adapters or layer.merged or adapter_name not in layer.r:
        return False
    tensors = layer.stamped_parts(adapter_name).values()
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)
