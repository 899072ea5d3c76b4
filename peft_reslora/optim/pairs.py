"""The pairs of factors of an adapter: which A and B are multiplied by each other, and by what."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor

from peft_reslora.reslora.blocks.linear import FACTOR_NAMES
from peft_reslora.reslora.layer import ResLoRALayer
from peft_reslora.shared.host import has_adapter
from peft_reslora.shared.tensors import stored

_INSTEAD = "Use torch.optim.AdamW or PEFT's create_loraplus_optimizer for this adapter."

# PEFT's variants (read in 0.21.2) that depend on A and B through B A alone: DoRA takes its norm as a constant.
_VARIANTS_OF_THE_PRODUCT = ("ALoraLinearVariant", "DoraEmbeddingVariant", "DoraLinearVariant")


class FactorPair(NamedTuple):
    """A and B whose product, times the scaling s, is all through which the loss depends on them."""

    layer: str  # the name of the layer, for messages and to compare with a checkpoint
    A: torch.Tensor  # (r, in_features)
    B: torch.Tensor  # (out_features, r)
    scaling: float


def factor_pairs(model: nn.Module, adapter_name: str = "default") -> list[FactorPair]:
    """The pairs that an adapter trains, in the order of the layers.

    LoRA, also with DoRA, and ResLoRA with the shortcuts 'input' and 'block' have such pairs. Layers that are frozen
    are left out. What else is trained, such as DoRA's magnitudes, biases and `modules_to_save`, are the
    `remaining_parameters`. The scalings are read once: make the optimizer anew after a `set_scale`.

    Raises:
        ValueError: naming the layer, where the loss does not depend on A and B through B A alone, where only one of
            the two is trained or both are shared with another layer; and if there are no pairs.
        RuntimeError: naming the layer, if its factors are sharded or offloaded.
    """
    pairs: list[FactorPair] = []
    frozen = False
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer) or not has_adapter(layer, adapter_name):
            continue
        if reason := _why_no_pair(layer, adapter_name):
            raise ValueError(f"Adapter {adapter_name!r}, layer {name!r} ({type(layer).__name__}): {reason} {_INSTEAD}")
        pair = _pair_of(layer, name, adapter_name)
        trained = [factor.requires_grad for factor in (pair.A, pair.B)]
        if not any(trained):
            frozen = True
            continue
        if not all(trained):
            raise ValueError(
                f"Adapter {adapter_name!r}, layer {name!r}: {'A' if trained[1] else 'B'} is frozen, and a pair is "
                "trained as one. Let both require gradients; to train B alone, PEFT has create_lorafa_optimizer."
            )
        refuse_misfit(pair)
        pairs.append(pair)
    if not pairs:
        advice = "All are frozen: make it active with set_adapter, or load it with is_trainable=True."
        raise ValueError(
            f"Adapter {adapter_name!r} has no factors that are trained in this model. "
            + (advice if frozen else f"The model has the adapters {list(getattr(model, 'peft_config', {}))}.")
        )
    _refuse_shared(pairs)
    return pairs


def remaining_parameters(model: nn.Module, pairs: Iterable[FactorPair]) -> list[nn.Parameter]:
    """What the model trains besides the pairs: for a group `{"params": ...}`, which is updated as by AdamW."""
    paired = {id(factor) for pair in pairs for factor in (pair.A, pair.B)}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in paired]


def refuse_misfit(pair: FactorPair) -> None:
    """Check that a pair is one, and that all its numbers are here.

    Raises:
        ValueError: naming the layer, for other shapes, or rank 0.
        RuntimeError: naming the layer, if a factor is sharded or offloaded.
    """
    where = f"Layer {pair.layer!r}:"
    for name, factor in (("A", pair.A), ("B", pair.B)):
        if isinstance(factor, DTensor) or factor.is_meta or (factor.dim() == 1 and factor.numel() == 0):
            held = "offloaded" if factor.is_meta else "sharded"
            raise RuntimeError(
                f"{where} {name} is {held}, and the factors of a pair are needed whole and together. Train with DDP "
                "or on one device, or use torch.optim.AdamW, which takes each number for itself."
            )
    shapes = f"A {tuple(pair.A.shape)}, B {tuple(pair.B.shape)}"
    if pair.A.dim() != 2 or pair.B.dim() != 2 or pair.A.shape[0] != pair.B.shape[1]:
        raise ValueError(
            f"{where} a pair is A (r, in_features) and B (out_features, r), and these are {shapes}. Leave out the "
            "layer (convolutions have no such pairs) or use torch.optim.AdamW; engines that flatten parameters, such "
            "as DeepSpeed's ZeRO and FSDP1, cannot be used."
        )
    if pair.A.numel() == 0 or pair.B.numel() == 0:
        raise ValueError(f"{where} its rank is 0 ({shapes}), and there is nothing to train. Leave out this pair.")
    if not 0 < abs(pair.scaling) < float("inf"):
        raise ValueError(f"{where} scaling={pair.scaling!r} must be finite and not 0. Set it with set_scale.")


def _why_no_pair(layer: Any, adapter_name: str) -> str | None:
    """Why the loss depends on the adapter's parameters otherwise than through one B A; None if it does not."""
    if not isinstance(layer, LoraLayer):
        return "there are no factors A and B here."
    if isinstance(layer, AdaLoraLayer):
        return "AdaLoRA's update is B diag(E) A, with a third factor."
    if isinstance(layer, ParamWrapper):
        return "with target_parameters each expert has rows and columns of its own in A and B."
    if isinstance(layer, ResLoRALayer) and layer.chain_of(adapter_name) is not None:
        return _why_no_pair_in_chain(layer, adapter_name)
    variant = type(layer.lora_variant.get(adapter_name)).__name__
    known = variant in ("NoneType", *_VARIANTS_OF_THE_PRODUCT)
    return None if known else f"PEFT's {variant} computes something else than B A."


def _why_no_pair_in_chain(layer: ResLoRALayer, adapter_name: str) -> str | None:
    block = layer.block_of(adapter_name)
    if block.names != FACTOR_NAMES:
        return f"{type(block).__name__} trains {', '.join(block.names)}, and not A and B alone."
    place = layer.chain_of(adapter_name)
    if place is not None and place[0].config.shortcut == "middle" and len(place[0]) > 1:
        return (
            "with shortcut='middle' each A is multiplied by several B's, and the other way round, so that there are "
            "no pairs ('input' and 'block' have them)."
        )
    share = stored(layer.lora_annealed, adapter_name)
    if share is not None and share > 0:
        return "its shortcut is being annealed, and B is also multiplied by the frozen estimate E_n."
    return None


def _pair_of(layer: Any, name: str, adapter_name: str) -> FactorPair:
    scaling = layer.scaling[adapter_name]
    if isinstance(layer, ResLoRALayer) and layer.chain_of(adapter_name) is not None:
        return FactorPair(name, *layer.block_of(adapter_name).weights, scaling)
    if adapter_name in layer.lora_embedding_A:
        return FactorPair(name, layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name], scaling)
    return FactorPair(name, layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight, scaling)


def _refuse_shared(pairs: Iterable[FactorPair]) -> None:
    """Refuse factors that two layers hold, as PEFT's for tied weights do.

    Raises:
        ValueError: naming both layers.
    """
    owners: dict[int, str] = {}
    for pair in pairs:
        for factor in (pair.A, pair.B):
            owner = owners.setdefault(id(factor), pair.layer)
            if owner != pair.layer:
                raise ValueError(
                    f"Layers {owner!r} and {pair.layer!r} hold the same factor, which would be updated twice. Leave "
                    f"out one of the layers. {_INSTEAD}"
                )
