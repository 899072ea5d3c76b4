"""What may be adapted, for both tuners: finds the layers a config selects, and refuses those that cannot be adapted.

A layer that was named is refused. One that nobody named, since "all-linear" or the default for the architecture chose
it, is left out with a warning.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    check_target_module_exists,
)
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_reslora.shared.forwards import computes_linearly, reader_of
from peft_reslora.shared.host import with_all_linear_layers
from peft_reslora.shared.names import role_of

Config: TypeAlias = Any  # a PeftConfig that has `target_modules`
WhyNot = Callable[[nn.Module], "str | None"]

_SHOWN = 5  # roles in a message

# The layers of one expert, before transformers 5 fused them into parameters of all experts.
_EXPERT_LAYERS = ("w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")
# Part of a module's name: its tokens are routed there. Shared experts see all tokens.
_ROUTED = re.compile(r"(?!.*shared)(\w+_)?experts?(_?\d+)?")


@dataclass
class Targets:
    """The layers that an injection adapts, by name in the model's order, and the names of those it leaves out."""

    layers: dict[str, nn.Module]
    left_out: list[str] = field(default_factory=list)

    def narrow(self, config: Config) -> None:
        """Let `config` select these layers and no others, where some were left out."""
        if self.left_out:
            config.target_modules = set(self.layers)


def find_targets(
    model: nn.Module,
    config: Config,
    defaults: Mapping[str, Iterable[str]],
    why_not: WhyNot,
    state_dict: Mapping[str, Any] | None = None,
) -> Targets:
    """The layers that PEFT would adapt, found with PEFT's own matching (private, read in 0.21.2), less those that
    cannot be. Nothing is changed.

    Args:
        model: the model, with or without adapters.
        config: what is to be injected.
        defaults: the targets by model type where `config` names none.
        why_not: the tuner's own reason against a layer, or None.
        state_dict: where given, its keys and not `config` choose the layers, as in PEFT.

    Raises:
        ValueError: naming layers, or experts, that were asked for and cannot be adapted; or if there is none.
    """
    named = state_dict is not None or not (config.target_modules is None or _is_all_linear(config))
    resolved = _resolved(model, config, defaults)
    if resolved is None:
        return Targets({})  # PEFT asks for target_modules in its own words
    if _is_all_linear(config) and not resolved.target_modules and state_dict is None:
        raise ValueError(
            f"target_modules='all-linear' selects nothing: {type(model).__name__} has no linear layers that "
            f"{_tuner(config)} could adapt. Name other layers in target_modules."
        )
    if state_dict is None:
        _mention_experts(model, config, resolved, named)
    modules = dict(model.named_modules())
    chosen = _chosen(modules, resolved, state_dict)
    faults = {name: fault for name, layer in chosen.items() if (fault := _fault(name, layer, modules, why_not))}
    layers = {name: layer for name, layer in chosen.items() if name not in faults}
    if not faults:
        return Targets(layers)
    if layers and not named and not _selected_anyway(faults, layers, config):
        warnings.warn(f"{_tuner(config)} leaves out {_listed(faults)}.", stacklevel=3)
        return Targets(layers, list(faults))
    if config.inference_mode and all(fault.loads for fault in faults.values()):
        warnings.warn(f"{_tuner(config)} has no effect on {_listed(faults)}.", stacklevel=3)
        return Targets(chosen)
    excluded = "|".join(re.escape(role).replace(r"\*", r"\d+") for role in dict.fromkeys(map(role_of, faults)))
    raise ValueError(
        f"{_tuner(config)} cannot adapt {_listed(faults)}. Name fewer modules in target_modules, or leave these out "
        f"with exclude_modules=r'{excluded}'."
    )


def refuse_merged(model: nn.Module, adapter_name: str) -> None:
    """Refuse to make an adapter anew whose former self is merged.

    Raises:
        ValueError: if a layer has an adapter of that name merged.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and adapter_name in layer.merged_adapters:
            raise ValueError(
                f"Adapter {adapter_name!r} is merged into layer {name}, so that another of the same name cannot take "
                "its place. Unmerge it first (unmerge_adapter), or give the new one another name."
            )


def _selected_anyway(faults: Iterable[str], layers: Iterable[str], config: Config) -> bool:
    """Whether a list of the other layers' names would select a faulty one too: PEFT compares the ends of names, and
    replicates layers later."""
    ends = tuple(f".{name}" for name in layers)
    return bool(getattr(config, "layer_replication", None)) or any(name.endswith(ends) for name in faults)


def _is_all_linear(config: Config) -> bool:
    targets = config.target_modules
    return isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND


def _resolved(model: nn.Module, config: Config, defaults: Mapping[str, Iterable[str]]) -> Any:
    """A copy of `config` with its target_modules as PEFT would fill them in; None if there are no defaults."""
    resolved: Any = copy.copy(config)
    if resolved.target_modules is None:
        chosen = defaults.get(BaseTuner.get_model_config(model).get("model_type", ""))
        if chosen is None:
            return None
        resolved.target_modules = chosen if isinstance(chosen, str) else set(chosen)
    return with_all_linear_layers(resolved, model)


def _chosen(
    modules: Mapping[str, nn.Module], config: Any, state_dict: Mapping[str, Any] | None
) -> dict[str, nn.Module]:
    keys = None
    if state_dict is not None:
        prefix = "." + PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]
        keys = {key.rsplit(prefix, 1)[0].removeprefix("_orig_mod.") for key in state_dict}
    chosen: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()  # what lies inside an adapted layer is no target of its own
    for name, module in modules.items():
        if not name or name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside += (f"{name}.",)
        found = check_target_module_exists(config, name) if keys is None else name.removeprefix("_orig_mod.") in keys
        if found:
            chosen[name] = module
    return chosen


@dataclass(frozen=True)
class _Fault:
    """Why a layer cannot be adapted; `loads` where an adapter does nothing, so that a saved one may be loaded."""

    kind: str
    reason: str
    loads: bool = False


def _fault(name: str, layer: nn.Module, modules: Mapping[str, nn.Module], why_not: WhyNot) -> _Fault | None:
    base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    kind = type(base).__name__
    if reason := why_not(layer):
        return _Fault(kind, reason)
    if not computes_linearly(base):
        return _Fault(kind, "whose forward is not that of a linear layer")
    if (reader := reader_of(name, modules)) is None:
        return None
    past = f"which is read by {type(reader).__name__} past its forward, so that an adapter would"
    if isinstance(reader, (nn.TransformerEncoderLayer, nn.TransformerEncoder)):
        remedy = "call torch.backends.mha.set_fastpath_enabled(False) first"
        return _Fault(kind, f"{past} be ignored in evaluation ({remedy})", loads=True)
    return _Fault(kind, f"{past} be ignored there", loads=True)


def _listed(faults: Mapping[str, _Fault]) -> str:
    """The layers and what is wrong with them; those of one role and one fault in one."""
    groups: dict[tuple[str, _Fault], list[str]] = {}
    for name, fault in faults.items():
        groups.setdefault((role_of(name), fault), []).append(name)
    shown = [
        f"{names[0]} ({fault.kind}), {fault.reason}"
        if len(names) == 1
        else f"{role} ({fault.kind}, {len(names)} layers), {fault.reason}"
        for (role, fault), names in list(groups.items())[:_SHOWN]
    ]
    return "; ".join([*shown, f"and {len(groups) - _SHOWN} more"] if len(groups) > _SHOWN else shown)


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether the layer is `nn.Linear` or transformers' `Conv1D`, or a subclass."""
    return isinstance(layer, (nn.Linear, Conv1D))


def is_routed(name: str) -> bool:
    """Whether a layer belongs to an expert of a mixture, which sees the tokens that were routed to it."""
    return any(_ROUTED.fullmatch(part) for part in name.split("."))


def _mention_experts(model: nn.Module, config: Config, resolved: Any, named: bool) -> None:
    """Say that experts are left out where they were asked for.

    transformers 5 keeps the experts of a mixture in parameters of three dimensions, and PEFT converts a `LoraConfig`
    that names their former layers.

    Raises:
        ValueError: if `config` names them.
    """
    experts = {name: module for name, module in _fused_experts(model) if not _are_reached(config, name, module)}
    asked = [name for name, module in experts.items() if _is_all_linear(config) or _asks_for(resolved, name, module)]
    if not asked:
        return
    count = sum(p.numel() for name in asked for p in experts[name].parameters())
    share = count / sum(p.numel() for p in model.parameters())
    roles = ", ".join(sorted(set(map(role_of, asked))))
    fused = (
        f"the experts in {roles} ({len(asked)} modules, {share:.0%} of the model's parameters): their weights are "
        f"fused into parameters, and {_tuner(config)} adapts layers"
    )
    own = hasattr(config, "target_parameters")
    reaches = f"{_tuner(config)}Config (shortcut='block')" if own else "LoraConfig"
    if named and not config.inference_mode:
        raise ValueError(
            f"target_modules={config.target_modules} asks for {fused}. Name the attention's layers only, leave the "
            rf"experts out with exclude_modules=r'.*\.{asked[0].rpartition('.')[2]}\..*', or use the "
            f"target_parameters of {reaches}, which reach them."
        )
    warnings.warn(f"Left out are {fused}. The target_parameters of {reaches} reach them.", stacklevel=4)


def _tuner(config: Config) -> str:
    return type(config).__name__.removesuffix("Config")


def _fused_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that hold the weights of several experts themselves."""
    layers = (nn.Linear, nn.Embedding, Conv1D)
    for name, module in model.named_modules():
        dimensions = {p.ndim for p in module.parameters(recurse=False)}
        kind = type(module).__name__.lower()
        fused = 3 in dimensions or (2 in dimensions and "expert" in kind and not isinstance(module, layers))
        if fused and "expert" in f"{name} {kind}".lower():
            yield name, module


def _are_reached(config: Any, name: str, module: nn.Module) -> bool:
    """Whether target_parameters names a parameter of these experts."""
    named = tuple(f".{target}" for target in getattr(config, "target_parameters", None) or ())
    return any(f".{name}.{parameter}".endswith(named) for parameter, _ in module.named_parameters(recurse=False))


def _asks_for(config: Any, name: str, module: nn.Module) -> bool:
    """Whether target_modules would choose a layer of the experts, if they still were layers."""
    parameters = [parameter for parameter, _ in module.named_parameters(recurse=False)]
    return any(
        check_target_module_exists(config, key)
        for layer in (*_EXPERT_LAYERS, *parameters)
        for key in (f"{name}.{layer}", f"{name}.0.{layer}")
    )
