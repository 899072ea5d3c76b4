"""The names of layers in the bare model, whatever wraps its blocks: torch.compile, checkpointing, FSDP, DDP.

Such wrappers are modules of their own, so that a part of each name below them is theirs: `layers.0._orig_mod.q_proj`.
A checkpoint with such names loads into no bare model, and PEFT loads it without a word (0.21.2).
"""

from __future__ import annotations

from torch import nn

from peft_reslora.shared.host import children_by_name

PREFIX = "base_model.model."  # which PeftModel puts before the names of the bare model
OUT_PROJECTION = ".base_layer.out_proj"  # of an adapted attention: where PEFT keeps the blocks of its second weight
# These no model uses for itself: torch.compile's, torch's checkpoint_wrapper's, FSDP1's and fairscale's.
_MARKS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_fpw_module")
# These keep what they wrap as `module`, which is a name like another; so the class has to say it.
_WRAPPERS = (
    "deepspeed.runtime.engine.DeepSpeedEngine",
    "torch.ao.quantization.stubs.QuantWrapper",
    "torch.nn.parallel.data_parallel.DataParallel",
    "torch.nn.parallel.distributed.DistributedDataParallel",
    "torch.optim.swa_utils.AveragedModel",
)


def bare_name(name: str, model: nn.Module | None = None) -> str:
    """The name of a module, parameter or buffer without the parts that wrappers put into it.

    Args:
        name: as in `named_modules` or `state_dict`; what follows the last module's name is kept.
        model: the model in which it has this name. DDP, DataParallel and others call what they wrap `module`, which
            only a look at the modules on the way can tell from a model's own name; without it, such parts stay.
    """
    kept, module = [], model
    for part in name.split("."):
        wrapped = part in _MARKS or (part == "module" and module is not None and _wraps(module))
        if not wrapped:
            kept.append(part)
        module = None if module is None else children_by_name(module).get(part)
    return ".".join(kept)


def parameter_path(name: str, parameter_name: str) -> str:
    """The name of a module's parameter in the base model, by the name of a layer around the module.

    Of several parameters of one module, PEFT (0.21.2) makes layers inside each other: `experts`, `experts.base_layer`.
    """
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    return f"{name}.{parameter_name}"


def role_of(name: str) -> str:
    """The name with `*` for the block indices in it: what layers of several blocks have in common."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside of all wrappers around it; itself, if there is none."""
    while (inside := _inside(module)) is not None:
        module = inside
    return module


def _inside(module: nn.Module) -> nn.Module | None:
    if _wraps(module):
        return children_by_name(module)["module"]
    return next((child for mark in _MARKS if (child := children_by_name(module).get(mark)) is not None), None)


def _wraps(module: nn.Module) -> bool:
    """Whether the module is a wrapper that calls what is inside `module`; by name, so that none is imported."""
    return any(f"{kind.__module__}.{kind.__qualname__}" in _WRAPPERS for kind in type(module).__mro__)
