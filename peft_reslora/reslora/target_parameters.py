"""Parameters as targets (`target_parameters`): which ones a config names, and which of them cannot be adapted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.utils import parametrize

from peft_reslora.reslora.chain_table import Target
from peft_reslora.reslora.config import ResLoRAConfig
from peft_reslora.shared.fields import oversized, shown
from peft_reslora.shared.forwards import reader_of
from peft_reslora.shared.host import children_by_name, parameter_shape
from peft_reslora.shared.names import bare_name, parameter_path
from peft_reslora.shared.patterns import by_pattern


def parameter_targets(model: nn.Module, config: ResLoRAConfig) -> list[Target]:
    """The parameters that `config` names, as chains see them; the model is not changed.

    Raises:
        ValueError: naming a parameter that cannot be adapted.
    """
    modules = dict(model.named_modules())
    inside = tuple(f"{name}." for name in _parts_of_adapters(modules))
    targets = []
    for name, module in modules.items():
        for parameter_name, parameter in _own_parameters(module):
            path = parameter_path(name, parameter_name)
            if not _is_named(path, config.target_parameters or ()):
                continue
            rank = by_pattern(config.rank_pattern, path, config.r)
            if fault := _fault(
                name, parameter_name, parameter, modules, rank, bool(inside) and name.startswith(inside)
            ):
                raise ValueError(
                    f"ResLoRA cannot adapt parameter {path!r} of {type(module).__name__}, {fault}. Name other "
                    f"parameters in target_parameters={shown(config.target_parameters)}, or name them in full."
                )
            targets.append(parameter_target(bare_name(path, model), *parameter_shape(module, parameter), rank))
    return targets


def parameter_target(path: str, experts: int, in_features: int, out_features: int, rank: int) -> Target:
    """A parameter as chains see it, `path` its name in the base model."""
    return Target(path, in_features, out_features, rank, f"{experts} experts" if experts > 1 else "parameter")


def parameters_beside(modules: Mapping[str, nn.Module], targets: list[Target]) -> Iterator[Target]:
    """The other parameters of the model, where some are targets: one between two of these ends their chain.

    Args:
        modules: by their names in the bare model.
    """
    last = {target.name.rpartition(".")[2] for target in targets}
    for name, module in modules.items():
        for parameter_name, parameter in _own_parameters(module) if last else ():
            if parameter_name in last and parameter.ndim in (2, 3):
                yield parameter_target(
                    parameter_path(name, parameter_name), *parameter_shape(module, parameter), rank=0
                )


def _own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """As PEFT (0.21.2) looks for them, and those that are computed from others."""
    if parametrize.is_parametrized(module):
        parametrizations: Any = module.parametrizations
        yield from ((name, getattr(module, name)) for name in children_by_name(parametrizations))
    yield from module.named_parameters(recurse=False)


def _layers_around(name: str, modules: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    """The layers of adapters inside each other in which a module stands, innermost first."""
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
        yield modules[name]


def _is_named(path: str, names: Any) -> bool:
    return any(f".{path}".endswith(f".{name}") for name in names)


def _parts_of_adapters(modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """What adapters have added to the layers that they adapt."""
    for name, module in modules.items():
        if isinstance(module, BaseTunerLayer):
            yield from (f"{name}.{child}" for child in children_by_name(module) if child != "base_layer")


def _fault(
    name: str,
    parameter_name: str,
    parameter: torch.Tensor,
    modules: Mapping[str, nn.Module],
    rank: int,
    is_of_adapter: bool,
) -> str | None:
    """Why the parameter cannot be adapted; None if it can."""
    module = modules[name]
    if is_of_adapter:
        return "which belongs to another adapter"
    if any(type(layer) is ParamWrapper for layer in _layers_around(name, modules)):
        return "to which PEFT's LoRA adds an adapter already, in layers that know no shortcuts (delete it first)"
    if not name:
        return "which the whole model itself holds, in whose place PEFT can put no layer"
    if parametrize.is_parametrized(module, parameter_name):
        return "which is computed from other tensors at every use (remove its parametrization, or load it unquantized)"
    dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
    if dimensions not in (2, 3):
        return f"which has {dimensions} dimensions, and PEFT adapts those with 2 and 3 only"
    if not parameter.is_floating_point():
        return f"which is {parameter.dtype} and no plain numbers: load the base model unquantized"
    if parameter_name == "weight" and (reader := reader_of(name, modules)) is not None:
        return (
            f"which is read by {type(reader).__name__} past the forward of its module, so that an adapter is ignored"
        )
    _, in_features, out_features = parameter_shape(module, parameter)
    return oversized(rank, in_features, out_features)
