"""Which modules a model had before it was adapted, and how a LoRA config names some of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D


def base_model_of(model: nn.Module) -> nn.Module:
    """The base model inside a PeftModel, a PeftMixedModel or a tuner; another model is its own base model."""
    tuner = getattr(model, "base_model", None) if not isinstance(model, BaseTuner) else model
    return tuner.model if isinstance(tuner, BaseTuner) else model


def named_base_modules(base_model: nn.Module) -> dict[str, nn.Module]:
    """All modules under the names that they have without adapters, each module once as in `named_modules`.

    In the place of an adapted module stands its tuner layer (or wrapper); what adapters added is left out.
    """
    found: dict[str, nn.Module] = {}
    seen: set[nn.Module] = set()

    def walk(name: str, module: nn.Module) -> None:
        inner = list(_layers_over(module))[-1]
        if inner in seen:
            return
        seen.add(inner)
        found[name] = module
        for child_name, child in inner.named_children():
            walk(f"{name}.{child_name}" if name else child_name, child)

    walk("", base_model)
    return found


def tuner_layers(module: nn.Module) -> list[BaseTunerLayer]:
    """The tuner layers that stand in one place, outermost first; more than one where tuners are mixed."""
    return [layer for layer in _layers_over(module) if isinstance(layer, BaseTunerLayer)]


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of the linear layer in this place; None if there is another module."""
    *_, base = _layers_over(module)
    if isinstance(base, Conv1D):
        return base.nx, base.nf
    return (base.in_features, base.out_features) if isinstance(base, nn.Linear) else None


def missing_partners(exported: Collection[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """The linear layers of a type that is among `exported`, in the layers that lack it.

    Two modules are of one type if their names differ in block indices only. `v_proj` counts as of the type of
    `q_proj` beside it: SGLang does not load one without the other.
    """
    types = {module_type(name) for name in exported}
    types |= {f"{t.removesuffix('q_proj')}v_proj" for t in types if t.split(".")[-1] == "q_proj"}
    return [
        name
        for name, module in modules.items()
        if name not in exported and module_type(name) in types and linear_shape(module) is not None
    ]


def module_type(name: str) -> str:
    """The name with `*` for the block indices on the way to the module: `layers.*.mlp.up_proj`."""
    *path, last = name.split(".")
    return ".".join([*("*" if part.isdigit() else part for part in path), last])


def target_names(exported: Iterable[str], all_names: Iterable[str]) -> list[str]:
    """A sorted `target_modules` for PEFT's suffix matching.

    A bare suffix (`q_proj`) where every module of that suffix is in `exported`, the full name of a module otherwise.
    """
    exported = set(exported)
    others = [f".{name}" for name in all_names if name not in exported]
    suffixes = {name: _suffix(name) for name in exported}
    ambiguous = {s for s in set(suffixes.values()) if any(other.endswith(f".{s}") for other in others)}
    return sorted({name if suffix in ambiguous else suffix for name, suffix in suffixes.items()})


def matched_besides(exported: Collection[str], targets: list[str], all_names: Iterable[str]) -> list[str]:
    """The modules that PEFT would adapt for `targets` although they are not in `exported`.

    There are some where the full name of one module is the end of another's: `head` and `decoder.head`.
    """
    config = LoraConfig(target_modules=targets)
    return [n for n in all_names if n and n not in exported and check_target_module_exists(config, n)]


def _suffix(name: str) -> str:
    """The last part of a name that is no index, and what follows it: `q_proj`, `to_out.0`."""
    parts = name.split(".")
    start = max((i for i, part in enumerate(parts) if not part.isdigit()), default=0)
    return ".".join(parts[start:])


def _layers_over(module: nn.Module) -> Iterator[nn.Module]:
    """The module, and what it wraps, down to the base model's own module."""
    yield module
    while isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        module = module.base_layer if isinstance(module, BaseTunerLayer) else module.original_module
        yield module
