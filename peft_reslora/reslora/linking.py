"""Linking: finds the target layers in a model, and tells each injected layer its place in its chain."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_reslora.reslora.attention import why_not_attention
from peft_reslora.reslora.chain_table import ChainTable, Target, chain_settings, find_chains, shortest_cuts
from peft_reslora.reslora.config import ResLoRAConfig
from peft_reslora.reslora.cuts import (
    FoundCuts,
    cuts_of,
    cuts_to_keep,
    find_cuts,
    is_new,
    refuse_moved_rows,
    replace_cuts,
    target_of,
    targets_of,
)
from peft_reslora.reslora.layer import ResLoRALayer
from peft_reslora.reslora.linked_chain import Chain
from peft_reslora.reslora.parameter_layer import ParamWrapper
from peft_reslora.reslora.passes import add_doorway
from peft_reslora.reslora.target_parameters import parameter_target, parameter_targets
from peft_reslora.shared.fields import oversized, refuse_slow_patterns
from peft_reslora.shared.host import CONVOLUTIONS, Convolution, custom_modules, has_adapter, in_out_features
from peft_reslora.shared.names import PREFIX, bare_name
from peft_reslora.shared.patterns import by_pattern
from peft_reslora.shared.targets import Targets, find_targets, is_plain_linear, is_routed

_OTHER_BLOCKS = {
    "use_dora": "DoRA (use_dora)",
    "total_step": "AdaLoRA (total_step)",
    "nested_ranks": "nested ranks (nested_ranks)",
}


def chains_of(model: nn.Module, adapter_name: str) -> list[Chain]:
    """The chains of one adapter, found on the layers themselves."""
    return chains_among(model.modules(), adapter_name)


def chains_among(modules: Iterable[nn.Module], adapter_name: str) -> list[Chain]:
    """The chains of one adapter to which any of the modules belongs."""
    found: dict[int, Chain] = {}
    for module in modules:
        if isinstance(module, ResLoRALayer) and (place := module.chain_of(adapter_name)) is not None:
            found.setdefault(id(place[0]), place[0])
    return list(found.values())


def link_chains(model: nn.Module, config: ResLoRAConfig, adapter_name: str) -> None:
    """Find the chains of an injected adapter and tell each layer its place."""
    targets = _targets_of(model, adapter_name)
    if new := is_new(config):
        config.chain_cuts = cuts_to_keep(model, config, targets)
    table = _checked(find_chains(targets, *chain_settings(config), cuts_of(config, targets)))
    layers = dict(_adapted_layers(model, adapter_name))
    paths = {module: name for name, module in model.named_modules()}
    for chained in table.chains:
        names = [target.name for target in chained]
        members = [layers[name] for name in names]
        doorways = [add_doorway(module) for module in _holding_all(model, [paths[layer] for layer in members])]
        chain = Chain(names, members, adapter_name, config, doorways)
        _refuse_other_groups(chain)
        for position, layer in enumerate(chain.layers):
            layer.link(adapter_name, chain, position)
    _warn_of_lone_layers(adapter_name, config, table, new)


def _refuse_other_groups(chain: Chain) -> None:
    """Refuse convolutions in one chain whose directions are in other groups, as only chosen `chain_cuts` make them.

    With 'input' no layer meets another's directions. 'middle' adds hidden states direction by direction, whatever the
    groups are; but which directions are left after pruning, or are in use at a rank, depends on them.

    Raises:
        ValueError: naming two of them.
    """
    config, layers = chain.config, chain.layers
    counts = [getattr(layer.get_base_layer(), "groups", 1) for layer in layers]
    whole = config.total_step is None and not config.nested_ranks
    if len(set(counts)) == 1 or config.shortcut == "input" or (config.shortcut == "middle" and whole):
        return
    other = next(n for n, count in enumerate(counts) if count != counts[0])
    raise ValueError(
        f"Layers {chain.names[0]!r} and {chain.names[other]!r} are convolutions in {counts[0]} and {counts[other]} "
        f"groups, and chain_cuts={config.chain_cuts!r} links them, so that shortcut={config.shortcut!r} cannot be "
        f"computed. Name {chain.names[other]!r} in chain_cuts, or set it to 'auto'."
    )


def _warn_of_lone_layers(adapter_name: str, config: ResLoRAConfig, table: ChainTable, new: bool) -> None:
    """Say so if no layer is linked; or, of a new adapter, if layers that are not have twice the scaling."""
    lone = [chain[0].name for chain in table.chains if len(chain) == 1]
    total = sum(len(chain) for chain in table.chains)
    doubled = ", at twice the scaling" if config.shortcut == "input" else ""
    if total and not table.num_links:
        warnings.warn(
            f"Adapter {adapter_name!r} has no shortcut at all: none of its {total} layers is linked to another, "
            f"so it trains plain LoRA{doubled}. See print(describe_chains(model)) for why, or set chain_pattern.",
            stacklevel=3,
        )
    elif new and lone and doubled:
        warnings.warn(
            f"{len(lone)} of the {total} layers of adapter {adapter_name!r} are linked to no other and train plain "
            f"LoRA{doubled}: {', '.join(lone[:3])}{', ...' if len(lone) > 3 else ''}. Leave them out with "
            "exclude_modules, or see print(describe_chains(model)).",
            stacklevel=3,
        )


def _holding_all(model: nn.Module, paths: Sequence[str]) -> list[nn.Module]:
    """The modules that hold a whole chain and can be called, from `model` down; of a single layer, `model` alone."""
    parts = [path.split(".")[:-1] for path in paths] if len(paths) > 1 else [[]]
    shared = [same[0] for same in itertools.takewhile(lambda same: len(set(same)) == 1, zip(*parts, strict=False))]
    modules = [model.get_submodule(".".join(shared[:depth])) for depth in range(len(shared) + 1)]
    return [module for module in modules if not isinstance(module, (nn.ModuleList, nn.ModuleDict))]


def find_injected_chains(model: nn.Module, config: ResLoRAConfig, adapter_name: str) -> ChainTable:
    """The chains of an adapter that is in the model."""
    targets = _targets_of(model, adapter_name)
    cuts = cuts_of(config, targets)
    reasons = find_cuts(model, targets, config.chain_pattern)
    explained = {name: reasons.get(name, reason) for name, reason in cuts.items()}
    return find_chains(targets, *chain_settings(config), explained)


def _targets_of(model: nn.Module, adapter_name: str) -> list[Target]:
    targets = []
    for name, layer in _adapted_layers(model, adapter_name):
        shape, rank = (layer.in_features, layer.out_features), layer.r[adapter_name]
        if isinstance(layer, ParamWrapper):
            targets.append(parameter_target(name, layer.num_experts, *shape, rank))
        else:
            targets.append(target_of(name, layer.get_base_layer(), shape, rank))
    return targets


@contextmanager
def combined_cuts(model: nn.Module, configs: Mapping[str, ResLoRAConfig], adapters: Sequence[str]) -> Iterator[None]:
    """Let the config of the first adapter, which PEFT copies for a combination, hold the cuts of the combination.

    Raises:
        ValueError: if the adapters link the same layers in different ways, which one adapter cannot.
    """
    chains = dict.fromkeys(tuple(chain.names) for name in adapters for chain in chains_of(model, name))
    _refuse_other_layers([configs[name] for name in adapters if name in configs])
    found = [target for name in adapters for target in _targets_of(model, name)]
    targets = list({target.name: target for target in found}.values())
    first = configs.get(adapters[0]) if adapters else None
    if first is None:
        yield  # PEFT says that there is no such adapter
        return
    cuts = {names[0]: "a chain begins here in one of the adapters" for names in chains}
    table = find_chains(targets, *chain_settings(first), cuts)
    made = {tuple(target.name for target in chain) for chain in table.chains}
    if unlike := [names for names in chains if names not in made]:
        raise ValueError(
            f"The adapters {list(adapters)} link their layers in different ways: the chain of {len(unlike[0])} layers "
            f"from {unlike[0][0]!r} to {unlike[0][-1]!r} is in one of them only, so one adapter cannot hold them all. "
            "Export each with save_as_lora and combine those."
        )
    kept = first.chain_cuts
    first.chain_cuts = shortest_cuts({link.after for link in table.missing if link.after in cuts}, table)
    try:
        yield
    finally:
        first.chain_cuts = kept


def _refuse_other_layers(configs: Sequence[ResLoRAConfig]) -> None:
    """PEFT gives a combination the first adapter's layers where these fields say which (read in 0.21.2)."""
    for field in ("layers_to_transform", "layers_pattern", "exclude_modules"):
        chosen = [getattr(config, field) for config in configs]
        if any(other != chosen[0] for other in chosen):
            raise ValueError(
                f"The adapters have different {field}, {chosen}, and the combination would have the layers of the "
                "first only. Choose layers with target_modules alone, or export each with save_as_lora and combine "
                "those."
            )


def _adapted_layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, ResLoRALayer]]:
    for name, module in model.named_modules():
        if isinstance(module, ResLoRALayer) and has_adapter(module, adapter_name):
            name = bare_name(name, model).removeprefix(PREFIX)
            yield module.weight_name(name) if isinstance(module, ParamWrapper) else name, module


def find_chains_before_injection(
    model: nn.Module, config: ResLoRAConfig, layers: Mapping[str, nn.Module] | None = None
) -> ChainTable:
    """The chains that `config` would make of `model`, which is not changed; of its target layers, or of `layers`.

    Raises:
        ValueError: naming target layers that ResLoRA cannot adapt, or chains that cannot be computed.
    """
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    refuse_slow_patterns(config, [name for name, _ in model.named_modules()])
    targets = _targets_among(model, config, find_target_layers(model, config).layers if layers is None else layers)
    if not is_new(config):
        return _checked(find_chains(targets, *chain_settings(config), cuts_of(config, targets)))
    table = find_chains(targets, *chain_settings(config), find_cuts(model, targets, config.chain_pattern))
    refuse_moved_rows(model, table)
    return _checked(table)


def _targets_among(model: nn.Module, config: ResLoRAConfig, layers: Mapping[str, nn.Module]) -> list[Target]:
    """Layers that are not adapted yet, and parameters, as `config` would adapt them."""
    targets = []
    for name, layer in layers.items():
        in_features, out_features = in_out_features(_base_of(layer))
        if in_features is None or out_features is None:
            continue  # a custom layer of PEFT's, which says so when it is made
        rank = by_pattern(config.rank_pattern, name, config.r)
        if fault := oversized(rank, in_features, out_features) or _ungrouped(_base_of(layer), rank):
            raise ValueError(f"ResLoRA cannot adapt layer {name!r}: {fault}. Change r or its entry in rank_pattern.")
        targets += targets_of(bare_name(name, model), _base_of(layer), (in_features, out_features), rank)
    return [*targets, *parameter_targets(model, config)]


def _ungrouped(base_layer: nn.Module, rank: int) -> str | None:
    """Why a convolution in groups cannot have this rank; None if it can."""
    groups = getattr(base_layer, "groups", 1) if isinstance(base_layer, Convolution) else 1
    return f"rank {rank} cannot be divided among its {groups} groups" if rank % groups else None


def own_config(model: nn.Module, config: ResLoRAConfig, layers: Mapping[str, nn.Module]) -> ResLoRAConfig:
    """The config for an adapter of `layers`: a copy, if another one keeps in this one cuts that it would not have, or
    if this one will keep ranks in it."""
    if config.total_step is not None:
        config = copy.copy(config)
    if not isinstance(config.chain_cuts, FoundCuts):
        return config
    own = replace_cuts(config)
    same = cuts_to_keep(model, own, _targets_among(model, own, layers)) == config.chain_cuts
    return config if same else own


def find_target_layers(
    model: nn.Module, config: ResLoRAConfig, state_dict: Mapping[str, torch.Tensor] | None = None
) -> Targets:
    """The layers that `config`, or the keys of `state_dict`, choose; the model is not changed.

    Raises:
        ValueError: naming target layers that ResLoRA cannot adapt or link.
    """
    custom = custom_modules(config)

    def why_not(layer: nn.Module) -> str | None:
        base = _base_of(layer)
        if is_plain_linear(base) or isinstance(base, custom):
            return None
        if isinstance(base, CONVOLUTIONS):
            return _why_not_convolution(base)
        if isinstance(base, nn.Embedding):
            return _why_not_embedding(base, config)
        if isinstance(base, nn.MultiheadAttention):
            return _why_not_attention(layer, config)
        with warnings.catch_warnings():  # of a type that PEFT does not know
            warnings.simplefilter("ignore")
            # Transposed convolutions have features too, which no layer of PEFT's adapts.
            known = not isinstance(base, Convolution) and in_out_features(base) != (None, None)
        return None if known else "which is no linear layer"

    return find_targets(model, config, LoraModel.target_module_mapping, why_not, state_dict)


def _why_not_convolution(base: nn.Module) -> str | None:
    if type(base) not in CONVOLUTIONS:
        return "which is no linear layer and computes another convolution than torch's own class"
    return None


def _why_not_embedding(base: nn.Embedding, config: ResLoRAConfig) -> str | None:
    if config.shortcut != "block":
        return (
            f"which is no linear layer: its inputs are indices, which shortcut={config.shortcut!r} cannot add up (use "
            "shortcut='block'; modules_to_save and trainable_token_indices train embeddings too)"
        )
    if type(base).forward is not nn.Embedding.forward or base.max_norm is not None:
        return "which is no linear layer and computes more than its weight's rows"
    return None


def _why_not_attention(layer: nn.Module, config: ResLoRAConfig) -> str | None:
    if isinstance(layer, BaseTunerLayer) and not isinstance(layer, ResLoRALayer):
        return "which has an adapter of PEFT's, whose forward writes into the weights (0.21.2)"
    if other := [words for field, words in _OTHER_BLOCKS.items() if getattr(config, field)]:
        return f"an attention, which has no blocks of {other[0]} here; train it without, in an adapter of its own"
    return why_not_attention(_base_of(layer), config)  # type: ignore[arg-type]


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
