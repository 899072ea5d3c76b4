"""The adapters that can be merged and started anew: which they are, and what they hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_reslora.export.source import config_in_model
from peft_reslora.mora import MoRALinear
from peft_reslora.reslora.blocks.linear import LinearBlock
from peft_reslora.reslora.layer import Linear as ResLoRALinear
from peft_reslora.shared.host import has_adapter, own_parameter
from peft_reslora.shared.tensors import is_readable

WHOLE_WEIGHTS = "train with whole weights, on one device or under DDP"

_LAYERS: dict[str, Any] = {"LORA": LoraLinear, "RESLORA": ResLoRALinear, "MORA": MoRALinear}
_EXACT_DTYPES = (torch.float32, torch.float64)


def check_restartable(model: nn.Module, adapter_name: str = "default") -> None:
    """Refuse an adapter whose merge is not exact, or which cannot be started anew.

    Raises:
        ValueError: listing the reasons, and what to do about each.
    """
    config = config_in_model(model, adapter_name)
    method = _method(config)
    if method not in _LAYERS:
        raise ValueError(
            f"Adapter {adapter_name!r} is of type {method}, which cannot be merged and restarted. Take LoRA, MoRA or "
            "ResLoRA with shortcut='block', or train without restarts."
        )
    layers = dict(adapted_layers(model, adapter_name))
    faults = [*_config_faults(config, layers.values(), adapter_name)]
    uses = Counter(_place(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for name, layer in layers.items():
        faults += [f"layer {name} {fault}" for fault in _layer_faults(layer, adapter_name, method, uses)]
    if faults:
        shown = [*faults[:5], *([f"and {len(faults) - 5} more of the kind"] if len(faults) > 5 else [])]
        raise ValueError(f"Adapter {adapter_name!r} cannot be merged and restarted: {'; '.join(shown)}.")


def _place(weight: torch.Tensor) -> int:
    """What two names of one weight have in common, also where they are two parameters that share their memory."""
    return weight.data_ptr() or id(weight)


def _config_faults(config: Any, layers: Collection[Any], adapter_name: str) -> Iterator[str]:
    if not layers:
        yield "it has no layers in this model"
    if (shortcut := getattr(config, "shortcut", "block")) != "block":
        yield (
            f"shortcut={shortcut!r} is merged by an estimate, so that every restart would change the function; take "
            "shortcut='block', whose merge is exact"
        )
    if (init := getattr(config, "init_lora_weights", True)) not in (True, "gaussian"):
        yield f"init_lora_weights={init!r} cannot be repeated at a restart; take True or 'gaussian'"
    if getattr(config, "lora_bias", False):
        yield "lora_bias=True puts a bias into the adapter, which is not merged; leave it unset"
    operators = {layer.mora_type[adapter_name] for layer in layers if isinstance(layer, MoRALinear)}
    if len(operators) > 1:
        yield f"mora_type={config.mora_type!r} takes {' and '.join(sorted(operators))}; name the one to start with"


def _layer_faults(layer: Any, adapter_name: str, method: str, uses: Counter[int]) -> Iterator[str]:
    if type(layer) is not _LAYERS[method]:
        yield (
            f"is a {type(layer).__module__}.{type(layer).__name__}, whose merge is not known to be exact; load the "
            "base model unquantized, and target linear layers only"
        )
        return
    if method == "LORA" and adapter_name in layer.lora_variant:
        yield f"has a {type(layer.lora_variant[adapter_name]).__name__}, more than scaling * B A; take plain LoRA"
    if method == "RESLORA" and layer.chain_of(adapter_name)[0].config.total_step is not None:
        yield "has AdaLoRA (total_step), whose budget of ranks is that of one cycle; leave total_step out"
    if method == "RESLORA" and not layer.block_of(adapter_name).adds_up:
        yield "has use_dora=True, more than scaling * B A; leave it out"
    weight = layer.get_base_layer().weight
    if not is_readable(weight):
        yield f"is sharded or offloaded; {WHOLE_WEIGHTS}"
    elif own_parameter(layer.get_base_layer(), "weight") is None:
        yield "has a base weight that is computed from other tensors at every use; remove its parametrization first"
    elif type(weight) is not nn.Parameter:
        yield f"has a base weight of type {type(weight).__name__}, to which a merge is rounded; load it unquantized"
    elif rounded := {p.dtype for p in (weight, *trained_parameters(layer, adapter_name))}.difference(_EXACT_DTYPES):
        yield (
            f"has weights in {', '.join(map(str, rounded))}, to which every merge would be rounded; load the base "
            "model in float32 and compute in half precision by bf16=True or fp16=True"
        )
    if uses[_place(weight)] > 1:
        yield "shares its base weight with another module, which a merge would change too; do not target it"
    if layer.merged:
        yield f"has {layer.merged_adapters} merged; call unmerge_adapter first"


def _method(config: PeftConfig) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def adapted_layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Any]]:
    """Name and layer of all that have the adapter."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and has_adapter(module, adapter_name):
            yield name, module


def trained_parameters(layer: Any, adapter_name: str) -> list[torch.Tensor]:
    """What training changes of the adapter on one layer."""
    if isinstance(layer, MoRALinear):
        return [layer.mora_M[adapter_name]]
    return list(LinearBlock(layer, adapter_name).weights)


def set_operator(model: nn.Module, adapter_name: str, mora_type: str) -> None:
    """Let a MoRA adapter compute with another operator, on all of its layers and in its config."""
    config_in_model(model, adapter_name).mora_type = mora_type  # type: ignore[attr-defined]
    for _, layer in adapted_layers(model, adapter_name):
        layer.mora_type[adapter_name] = mora_type
