"""`nn.MultiheadAttention` with other weights than its own.

torch's attention keeps its projections as weights, and calls no layer that could have an x to multiply with. So what a
block adds (ResLoRA, arXiv 2402.18039, Eq. 3) is added to the weight, anew in each forward pass:

    in_proj_weight `(3 E, E)`    W_n + sum_k s_{n-k} B_{n-k} A_{n-k}
    out_proj.weight `(E, E)`     the same, with blocks of its own

The base's own forward then runs on a *stand-in*, which shares everything with the base but these two tensors. So
masks, torch's fast path and subclasses are the base's, and nothing is written into the base, which other threads may
be using.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.func import functional_call

from peft_reslora.reslora.config import ResLoRAConfig
from peft_reslora.reslora.factor_sharing import whole_update
from peft_reslora.reslora.products import autocasts
from peft_reslora.shared.base_weights import refuse_given_up
from peft_reslora.shared.host import own_parameter, stand_in
from peft_reslora.shared.offloading import hooked_forward
from peft_reslora.shared.stamps import check_when_used
from peft_reslora.shared.tensors import NOT_HERE, is_readable


def why_not_attention(base: nn.MultiheadAttention, config: ResLoRAConfig) -> str | None:
    """Why an attention cannot have the blocks of a config; None if it can."""
    if config.shortcut != "block":
        return (
            "which is no linear layer: it projects query, key and value within torch's function, so that no layer "
            f"has the inputs or projections of an earlier one, which shortcut={config.shortcut!r} adds (use "
            "shortcut='block')"
        )
    if config.lora_dropout:
        return (
            f"in which lora_dropout={config.lora_dropout} would have no effect: the update is added to the weights, "
            "and there is no input to drop (set lora_dropout=0; PEFT's LoRA ignores it there)"
        )
    if base.q_proj_weight is not None:
        return "whose keys or values have another size than its queries (kdim, vdim), and so weights of their own"
    out_proj = base.out_proj.get_base_layer() if isinstance(base.out_proj, BaseTunerLayer) else base.out_proj
    weights = own_parameter(base, "in_proj_weight"), own_parameter(out_proj, "weight")
    if not isinstance(out_proj, nn.Linear) or not all(map(_is_plain, weights)):
        return "whose weights are quantized, sharded, or computed from other tensors"
    if "forward" in vars(base) and hooked_forward(base, base) is None:
        return "in the place of whose forward something has put another, which would compute with its own weights"
    return None


def _is_plain(weight: torch.Tensor | None) -> bool:
    return type(weight) is nn.Parameter and weight.is_floating_point()


def refuse_wrapped(attention: nn.Module, layer_name: str) -> None:
    """Refuse an attention for which no stand-in computes.

    Raises:
        RuntimeError: if it is inside a wrapper, or something other than accelerate has put another forward in the
            place of its own.
    """
    wrapper = None if isinstance(attention, nn.MultiheadAttention) else type(attention).__name__
    if wrapper is not None or ("forward" in vars(attention) and hooked_forward(attention, attention) is None):
        raise RuntimeError(
            f"The base layer of attention {layer_name!r} is called by {wrapper or 'a forward put in its place'}, "
            "which would compute with its own weights, without the adapter. Wrap the block around it instead, or call "
            "merge_adapter()."
        )


def weight_with_updates(layer: Any, adapters: Sequence[str], *, in_own_pass: bool) -> torch.Tensor:
    """W + the updates of the adapters on one of the two layers, rounded once to the dtype of W; W, where it is merged.

    Args:
        in_own_pass: as for `whole_update`.

    Raises:
        RuntimeError: if W is not here.
    """
    refuse_given_up(layer, layer.layer_name)
    weight = getattr(layer.get_base_layer(), layer.parameter_name)
    if layer.merged:
        return weight
    if not is_readable(weight):
        raise RuntimeError(
            f"The weight of layer {layer.layer_name!r}, to which the update is added, is {NOT_HERE} where it is "
            "needed. Shard the block around the attention (FSDP2), do not offload it, and in evaluation call "
            "torch.backends.mha.set_fastpath_enabled(False)."
        )
    check_when_used(layer, ())
    total = weight
    with torch.autocast(weight.device.type, enabled=False) if autocasts(weight) else nullcontext():
        for name in adapters:
            layer.note_call(name)
            chain, position = layer.chain_of(name)
            total = total + whole_update(chain, position, weight.device, in_own_pass=in_own_pass)
    return total.to(weight.dtype)


def attend(
    attention: Any,
    in_proj_weight: torch.Tensor,
    out_proj_weight: torch.Tensor,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """What the attention, whose out_proj is PEFT's layer over it, computes with these weights."""
    if torch.compiler.is_compiling():  # it follows no stand-in, and keeps what is swapped to itself
        weights = {"in_proj_weight": in_proj_weight, "out_proj.base_layer.weight": out_proj_weight}
        return functional_call(attention, weights, tuple(args), dict(kwargs))
    out_proj = stand_in(attention.out_proj.get_base_layer(), weight=out_proj_weight)
    other = stand_in(attention, in_proj_weight=in_proj_weight, out_proj=out_proj)
    vars(other).update(hooked_forward(attention, other) or {})
    before = dict(vars(other))
    result = other(*args, **kwargs)
    # What a forward or a hook notes on the module, such as maps of attention, is to be found on the base.
    vars(attention).update({name: v for name, v in vars(other).items() if before.get(name, other) is not v})
    return result
