"""Which modules a model had before it was adapted, and how a LoRA config names some of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_reslora.shared.names import unwrapped
from peft_reslora.shared.tensors import NOT_HERE, is_readable, widen


def base_model_of(model: nn.Module) -> nn.Module:
    """The base model inside a PeftModel, a PeftMixedModel or a tuner; another model is its own base model.

    Outside of what wraps it, such as torch.compile.
    """
    tuner = getattr(model, "base_model", None) if not isinstance(model, BaseTuner) else model
    return unwrapped(tuner.model if isinstance(tuner, BaseTuner) else model)


def named_base_modules(base_model: nn.Module) -> dict[str, nn.Module]:
    """All modules under the names that they have without adapters and wrappers, each once as in `named_modules`.

    In the place of an adapted module stands its tuner layer, in that of a wrapped one the wrapper; what adapters added
    is left out.
    """
    found: dict[str, nn.Module] = {}
    seen: set[nn.Module] = set()

    def walk(name: str, module: nn.Module) -> None:
        inner = list(layers_over(module))[-1]
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
    return [layer for layer in layers_over(module) if isinstance(layer, BaseTunerLayer)]


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of the linear layer in this place; None if there is another module."""
    *_, base = layers_over(module)
    if isinstance(base, Conv1D):
        return base.nx, base.nf
    return (base.in_features, base.out_features) if isinstance(base, nn.Linear) else None


def row_norms(module: nn.Module) -> torch.Tensor:
    """The norms `(out_features,)` of the rows of the linear layer's weight in this place.

    Raises:
        ValueError: if its weight is not here, or one of them is zero, by which PEFT's DoRA would divide (0.21.2).
    """
    *_, base = layers_over(module)
    weight: Any = base.weight
    if not is_readable(weight):
        raise ValueError(f"the weight of a layer without an update is {NOT_HERE}; pass fill_missing_layers=False")
    norms = torch.linalg.vector_norm(widen(weight.detach()), dim=0 if isinstance(base, Conv1D) else 1)
    if not norms.all():
        raise ValueError("a row of a layer without an update is zero; pass fill_missing_layers=False")
    return norms


def refuse_misfits(shapes: Mapping[str, tuple[int, int]], modules: Mapping[str, nn.Module]) -> None:
    """Check that what is exported are updates of the base model's layers, under the names that these have there.

    Args:
        shapes: (in_features, out_features) of each exported update.
        modules: of the base model, as from `named_base_modules`.

    Raises:
        ValueError: naming the layer that is not there, or has another shape.
    """
    for name, shape in shapes.items():
        module = modules.get(name)
        layers: list[Any] = [] if module is None else tuner_layers(module)  # of quantized layers they know the shape
        own = (layers[-1].in_features, layers[-1].out_features) if layers else module and linear_shape(module)
        if own != shape:
            there = f"a layer with {own[0]} and {own[1]}" if own else "no such layer"
            raise ValueError(
                f"The update of layer {name!r} is for {shape[0]} inputs and {shape[1]} outputs, and the base model "
                f"has {there} there. Gather a sharded model first, or load the adapter onto its base model."
            )


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
    taken = {ending for name in all_names if name not in exported for ending in endings_of(name)}
    suffixes = {name: _suffix(name) for name in exported}
    return sorted({name if suffix in taken else suffix for name, suffix in suffixes.items()})


def matched_besides(exported: Collection[str], targets: Collection[str], all_names: Iterable[str]) -> list[str]:
    """The modules that PEFT would adapt for `targets` although they are not in `exported`.

    There are some where the full name of one module is the end of another's: `head` and `decoder.head`.
    """
    exported, wanted = set(exported), set(targets)
    return [name for name in all_names if name and name not in exported and not wanted.isdisjoint(endings_of(name))]


def endings_of(name: str) -> list[str]:
    """The names in a `target_modules` by which PEFT finds the module: its own, and what follows each dot in it."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _suffix(name: str) -> str:
    """The last part of a name that is no index, and what follows it: `q_proj`, `to_out.0`."""
    parts = name.split(".")
    start = max((i for i, part in enumerate(parts) if not part.isdigit()), default=0)
    return ".".join(parts[start:])


def layers_over(module: nn.Module) -> Iterator[nn.Module]:
    """The module, and what it wraps, down to the base model's own module."""
    yield module
    while True:
        if isinstance(module, BaseTunerLayer):
            module = module.base_layer  # type: ignore[assignment]
        elif isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        elif (inside := unwrapped(module)) is not module:
            module = inside
        else:
            return
        yield module
