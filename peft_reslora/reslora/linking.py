"""Linking: finds the target layers in a model, and tells each injected layer its place in its chain."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PretrainedConfig

from peft_reslora.reslora.chain import ChainTable, Target, find_chains
from peft_reslora.reslora.config import ResLoRAConfig
from peft_reslora.reslora.layer import ResLoRALayer
from peft_reslora.reslora.variant import Chain
from peft_reslora.targets import Targets, find_targets, is_plain_linear, is_routed

# PEFT adapts these too, but with layers that know no variants; they are refused before the model is changed.
_REFUSED_BASE_LAYERS = (nn.Embedding, nn.modules.conv._ConvNd, nn.MultiheadAttention)


def chains_of(model: nn.Module, adapter_name: str) -> list[Chain]:
    """The chains of one adapter, found on the layers themselves."""
    found: dict[int, Chain] = {}
    for module in model.modules():
        if isinstance(module, ResLoRALayer) and (place := module.chain_of(adapter_name)) is not None:
            found.setdefault(id(place[0]), place[0])
    return list(found.values())


def link_chains(model: nn.Module, config: ResLoRAConfig, adapter_name: str) -> None:
    """Find the chains of an injected adapter and tell each layer its place."""
    table = find_injected_chains(model, config, adapter_name)
    layers = dict(_adapted_layers(model, adapter_name))
    for targets in table.chains:
        names = [target.name for target in targets]
        chain = Chain(names, [layers[name] for name in names], adapter_name, config)
        for position, layer in enumerate(chain.layers):
            layer.link(adapter_name, chain, position)
    if layers and not table.num_links:
        doubled = ", at twice the scaling" if config.shortcut == "input" else ""
        warnings.warn(
            f"Adapter {adapter_name!r} has no shortcut at all: none of its {len(layers)} layers is linked to another, "
            f"so it trains plain LoRA{doubled}. See describe_chains(model) for the reasons, or set chain_pattern.",
            stacklevel=2,
        )


def find_injected_chains(model: nn.Module, config: ResLoRAConfig, adapter_name: str) -> ChainTable:
    """The chains of an adapter that is in the model."""
    targets = [
        Target(name, layer.in_features, layer.out_features, layer.r[adapter_name])
        for name, layer in _adapted_layers(model, adapter_name)
    ]
    return _checked(find_chains(targets, config.shortcut, config.pre_num, config.chain_pattern))


def _adapted_layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, ResLoRALayer]]:
    for name, module in model.named_modules():
        if isinstance(module, ResLoRALayer) and adapter_name in module.lora_A:
            yield name.removeprefix("base_model.model."), module


def find_chains_before_injection(
    model: nn.Module, config: ResLoRAConfig, layers: Mapping[str, nn.Module] | None = None
) -> ChainTable:
    """The chains that `config` would make of `model`, which is not changed; of its target layers, or of `layers`.

    Raises:
        ValueError: naming target layers that ResLoRA cannot adapt, or chains that cannot be computed.
    """
    targets = []
    for name, layer in (find_target_layers(model, config).layers if layers is None else layers).items():
        in_features, out_features = _get_in_out_features(_base_of(layer))
        if in_features is None or out_features is None:
            continue  # a custom layer of PEFT's, which says so when it is made
        pattern = config.rank_pattern or {}
        rank = pattern.get(get_pattern_key(list(pattern), name), config.r)
        targets.append(Target(name, in_features, out_features, rank))
    return _checked(find_chains(targets, config.shortcut, config.pre_num, config.chain_pattern))


def find_target_layers(
    model: nn.Module, config: ResLoRAConfig, state_dict: Mapping[str, torch.Tensor] | None = None
) -> Targets:
    """The layers that `config`, or the keys of `state_dict`, choose; the model is not changed.

    Raises:
        ValueError: naming target layers that ResLoRA cannot adapt.
    """
    custom = tuple(config._custom_modules or ())

    def why_not(layer: nn.Module) -> str | None:
        base = _base_of(layer)
        if is_plain_linear(base) or isinstance(base, custom):
            return None
        if isinstance(base, nn.Embedding):
            return "which is no linear layer (modules_to_save and trainable_token_indices train embeddings)"
        with warnings.catch_warnings():  # of a type that PEFT does not know
            warnings.simplefilter("ignore")
            known = not isinstance(base, _REFUSED_BASE_LAYERS) and _get_in_out_features(base) != (None, None)
        return None if known else "which is no linear layer"

    return find_targets(model, config, LoraModel.target_module_mapping, why_not, state_dict)


def _base_of(layer: nn.Module) -> nn.Module:
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


def _checked(table: ChainTable) -> ChainTable:
    """Refuse chains that cannot be computed.

    Raises:
        ValueError: for shortcut 'middle' with different ranks in one chain, and for 'input' and 'middle' between the
            experts of mixtures.
    """
    if table.shortcut != "block":
        _refuse_routed(table)
    for chain in table.chains if table.shortcut == "middle" else ():
        if len({target.rank for target in chain}) > 1:
            ranks = ", ".join(f"{target.name}: {target.rank}" for target in chain[:4])
            raise ValueError(
                "shortcut='middle' adds the projections A x of linked layers and needs one rank in a chain, but "
                f"rank_pattern gives {ranks}. Use one rank, end the chain with chain_pattern, or use shortcut='block'."
            )
    return table


def _refuse_routed(table: ChainTable) -> None:
    """Experts of the same index in two blocks get different tokens, so that what one hands on belongs to others."""
    routed = [chain[0].name for chain in table.chains if len(chain) > 1 and is_routed(chain[0].name)]
    if routed:
        raise ValueError(
            f"shortcut={table.shortcut!r} adds up what consecutive layers compute for the same token, but other "
            f"tokens are routed to the experts of each block ({len(routed)} chains, such as that of {routed[0]}). Use "
            r"shortcut='block', or leave the experts out with exclude_modules=r'.*\bexperts?\b.*'."
        )


def describe_chains(
    model: nn.Module | PretrainedConfig, config: ResLoRAConfig | None = None, adapter_name: str = "default"
) -> ChainTable:
    """Print, and return, who is linked to whom, and which links were not made and why.

    Args:
        model: a model with the adapter in it; or, with `config`, one without it, which is not changed; or a
            transformers config, of which a model without weights is built.
        config: what would be injected.
        adapter_name: the adapter to describe, if the model holds several.

    Raises:
        ValueError: if neither the model nor `config` says which adapter.
    """
    if isinstance(model, PretrainedConfig):
        model = _without_weights(model)
    if config is not None:
        table = find_chains_before_injection(model, config)
    else:
        held = getattr(model, "peft_config", {})
        if not isinstance(held.get(adapter_name), ResLoRAConfig):
            raise ValueError(
                f"The model holds no ResLoRA adapter {adapter_name!r} (it has {sorted(held)}); pass "
                "describe_chains(model, ResLoRAConfig(...)) to see the chains before injection."
            )
        table = find_injected_chains(model, held[adapter_name], adapter_name)
    print(table)  # noqa: T201
    return table


def _without_weights(config: PretrainedConfig) -> nn.Module:
    from transformers import AutoModel

    with torch.device("meta"):
        return AutoModel.from_config(config)
