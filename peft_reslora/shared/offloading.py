"""Parameters that accelerate keeps elsewhere: read where they are kept, and loaded one layer at a time for a merge.

`AlignDevicesHook` (accelerate 1.0 and later, read in 1.14) leaves parameters without data in the module and holds the
values in `weights_map`, in memory or in files on a disk. PEFT's `onload_layer` (private, read in 0.21.2) loads a layer
before it merges; here is what it does not do: reading other layers meanwhile, and merging outside of PEFT's loops.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils import named_module_tensors
from torch import nn


def offload_hook(module: nn.Module) -> Any:
    """The hook that keeps the module's parameters elsewhere; None if there is none."""
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return next((h for h in hooks if isinstance(h, AlignDevicesHook) and h.offload), None)


def held_tensor(module: nn.Module, name: str) -> torch.Tensor:
    """The module's parameter `name`, or the value that is kept for it; on the meta device if there is none."""
    tensor = getattr(module, name)
    hook = offload_hook(module) if tensor.is_meta else None
    value = None if hook is None or hook.weights_map is None else hook.weights_map[name]
    return tensor if value is None else value.detach()


def hooked_forward(module: nn.Module, other: nn.Module) -> dict[str, Any] | None:
    """The attributes by which the hook on a module runs around the forward of another, which shares its attributes;
    None if it is not accelerate that has put a forward in the place of the module's own (`add_hook_to_module`).
    """
    forward: Any = vars(module).get("forward")
    own: Any = vars(module).get("_old_forward")
    ours = isinstance(forward, partial) and forward.args == (module,) and getattr(own, "__self__", None) is module
    if not ours or "_hf_hook" not in vars(module):
        return None
    return {"forward": partial(forward.func, other), "_old_forward": MethodType(own.__func__, other)}


@contextmanager
def onloaded(base_layer: nn.Module) -> Iterator[None]:
    """Load an offloaded base layer, and keep what it holds at the end; nothing, where it is loaded already."""
    hook = offload_hook(base_layer)
    if hook is None or not any(tensor.is_meta for _, tensor in named_module_tensors(base_layer)):
        yield
        return
    hook.pre_forward(base_layer)
    try:
        yield
    finally:
        hook.weights_map = {name: tensor.to("cpu") for name, tensor in named_module_tensors(base_layer)}
        hook.post_forward(base_layer, torch.tensor([]))
