"""Merging into quantized layers and back, where PEFT 0.21 (read in 0.21.2) loses something."""

from __future__ import annotations

import copy

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import nn


def refuse_repacked(base_layer: nn.Module, layer_name: str) -> None:
    """bitsandbytes 0.50 repacks 4-bit weights in the first evaluation on a CPU with AVX512-BF16; PEFT does not notice,
    and what bitsandbytes has to undo it loses the scales.

    Raises:
        ValueError: if that has happened to the layer's weight.
    """
    state = getattr(getattr(base_layer, "weight", None), "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            f"The 4-bit weight of layer {layer_name!r} cannot be read any more: bitsandbytes repacked it when the "
            "model was first evaluated on the CPU. Load the base model again and merge before evaluating it."
        )


def dequantized_weight(base_layer: nn.Module) -> torch.Tensor:
    """The weight as plain numbers, in the layer's own orientation; itself, where it is not quantized."""
    held = getattr(base_layer, "weight", None)
    weight = dequantize_module_weight(base_layer).detach()
    # On a CPU, PEFT leaves a copy of an 8-bit weight without its scales in the layer, which then cannot run.
    if isinstance(held, nn.Parameter) and base_layer.weight is not held:
        base_layer.weight = held
    return weight


def kept_copy(base_layer: nn.Module) -> nn.Module:
    """A quantized layer as it is before a merge, for `put_back`."""
    # A merge replaces HQQ's layers as a whole. Others get another weight, or another state of the same one.
    return base_layer if _is_hqq(base_layer) else copy.deepcopy(base_layer)


def keep_bias(merged: nn.Module, kept: nn.Module) -> None:
    """Give the layer that a merge has made the bias from before; PEFT's merges into HQQ's layers lose it."""
    if _is_hqq(kept):
        merged.bias = kept.bias


def put_back(base_layer: nn.Module, kept: nn.Module) -> None:
    """Make `base_layer` what it was when `kept_copy` was called."""
    vars(base_layer).update(vars(kept))


def _is_hqq(base_layer: nn.Module) -> bool:
    return type(base_layer).__name__ == "HQQLinear"
