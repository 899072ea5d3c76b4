"""The updates of a saved adapter, from its files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from peft_reslora.export.factors import Factors, factorise
from peft_reslora.export.fitting import EXACT, Fit, FittedUpdate
from peft_reslora.export.reading import FETCH, PARTS, WITH_BASE, SavedAdapter, by_pattern
from peft_reslora.export.source import MERGE_INSTEAD, in_layer
from peft_reslora.export.targets import linear_shape
from peft_reslora.mora import MoRAConfig
from peft_reslora.mora.operators import delta_weight, sharing_factors, square_size
from peft_reslora.reslora.config import ResLoRAConfig
from peft_reslora.reslora.merging.estimators import (
    blocks_from_state_dict,
    chains_of_blocks,
    layer_is_exact,
    merged_factors_from_state_dict,
)
from peft_reslora.shared.precision import full_precision


@full_precision()
def updates_in_files(adapter: SavedAdapter, fit: Fit) -> dict[str, FittedUpdate]:
    """The update of every layer of a saved adapter, by the module's name in the base model.

    Raises:
        ValueError: naming adapter and layer, if one cannot be exported.
    """
    updates = {}
    for name, factors, merge in _factors_in_files(adapter, fit.approximate):
        with in_layer(adapter.name, name):
            updates[name] = fit.update(factors(), merge)
    return updates


def targets_in_files(config: Any, exported: list[str]) -> list[str]:
    """`target_modules` where the base model's other modules are not known.

    The adapter's own, if nothing but them decided which modules it has; the full names otherwise.
    """
    own = config.target_modules
    narrowed = config.exclude_modules or config.layers_to_transform is not None
    return sorted(exported if isinstance(own, str) or not own or narrowed else own)


def _factors_in_files(adapter: SavedAdapter, approximate: bool) -> Iterator[tuple[str, Callable[[], Factors], str]]:
    """Of every layer its name, what computes its factors, and how they come about."""
    config = adapter.config
    if isinstance(config, ResLoRAConfig):
        pairs = merged_factors_from_state_dict(config, adapter.state_dict())
        merges = _merges_in_files(config, adapter.state_dict())
        for name, (A, B) in pairs.items():
            yield name, lambda A=A, B=B: Factors.of(A, B), merges[name]  # type: ignore[misc]
    elif isinstance(config, MoRAConfig):
        modules = _modules_of_base(adapter)
        for name, parts in adapter.tensors.items():
            if "mora_M" not in parts:
                raise ValueError(f"Adapter {adapter.name!r}, layer {name!r}: its matrix is not in the file.")
            shape = linear_shape(modules[name])
            yield name, lambda M=parts["mora_M"], n=name, s=shape: _mora(config, n, M, s, approximate), EXACT  # type: ignore[misc]
    elif isinstance(config, LoraConfig):
        for name, parts in adapter.tensors.items():
            yield name, lambda n=name, p=parts: _lora(config, n, p), EXACT  # type: ignore[misc]


def _merges_in_files(config: ResLoRAConfig, state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """How each layer's update comes about: `EXACT`, or what estimates it."""
    blocks, merges = blocks_from_state_dict(config, state_dict), {}
    for chain in chains_of_blocks(config, blocks).chains:
        members = [blocks[target.name] for target in chain]
        for position, target in enumerate(chain):
            exact = layer_is_exact(members, position, config)
            merges[target.name] = EXACT if exact else f"estimated by {config.merge_estimator}"
    return merges


def _lora(config: LoraConfig, name: str, parts: Mapping[str, Tensor]) -> Factors:
    """s B A, of the rank and alpha that the config gives the layer."""
    if parts.keys() != set(PARTS["LORA"]):
        raise ValueError(
            f"it has the tensors {', '.join(sorted(parts))} instead of {' and '.join(PARTS['LORA'])}, so it is no "
            f"plain LoRA of a linear layer. {MERGE_INSTEAD}"
        )
    alpha = by_pattern(config.alpha_pattern, name, config.lora_alpha)
    r = by_pattern(config.rank_pattern, name, config.r)
    scaling = alpha / math.sqrt(r) if config.use_rslora else alpha / r
    return Factors.of(parts["lora_A.weight"], parts["lora_B.weight"], scaling)


def _mora(config: MoRAConfig, name: str, M: Tensor, shape: tuple[int, int] | None, approximate: bool) -> Factors:
    """Of type 'sharing' the exact factors; of the others, which are full rank, the whole update."""
    if shape is None:
        raise ValueError(f"its base layer is not linear. {MERGE_INSTEAD}")
    r = by_pattern(config.rank_pattern, name, config.r)
    mora_type = config.resolve_type(r)
    if tuple(M.shape) != (q := square_size(*shape, r, mora_type), q):
        raise ValueError(
            f"its matrix is {tuple(M.shape)}, and r={r} with {shape[0]} inputs and {shape[1]} outputs makes it "
            f"{(q, q)}: file, config and base do not match. Set base_model_name_or_path in its "
            "config to the base on which it was trained"
        )
    M = M if M.dtype == torch.float64 else M.float()
    if mora_type == "sharing":
        return Factors.of(*sharing_factors(M, *shape))
    if not approximate:
        raise ValueError(
            f"with mora_type={mora_type!r} its update is full rank, so that no LoRA of a small rank equals it. Pass "
            "rank= or energy= (--rank, --energy) for the nearest LoRA, or merge it into the base model with "
            "merge_and_unload()"
        )
    return Factors.of(*factorise(delta_weight(M, *shape, mora_type)))


def _modules_of_base(adapter: SavedAdapter) -> dict[str, nn.Module]:
    """The modules of the base, which MoRA's files cannot do without: they hold only its square matrices.

    Raises:
        ValueError: if the base's config is not here, or makes no model with the adapter's layers.
    """
    if adapter.base is None:
        raise ValueError(
            f"Adapter {adapter.name!r} is MoRA, whose files do not hold the shapes of its layers; they are those of "
            f"the base model {adapter.config.base_model_name_or_path!r}, and no config of it that has these layers is "
            f"on this machine. {FETCH} {WITH_BASE}"
        )
    return dict(adapter.base.named_modules())
