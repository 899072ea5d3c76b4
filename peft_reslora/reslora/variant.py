"""`ResLoRAVariant`: joins the shortcuts to the hook that PEFT's LoRA layers offer.

PEFT's `LoraVariant` (read in 0.21.0 to 0.21.2) is asked for the forward of an adapter, and for its merge.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import LoraVariant
from torch import nn

from peft_reslora.reslora.blocks.linear import LinearBlock, is_inactive
from peft_reslora.reslora.factor_sharing import Way, add_by_calls, summed_update, terms, way_to_factors
from peft_reslora.reslora.inference import add_plainly, plain_pass
from peft_reslora.reslora.linked_chain import Chain
from peft_reslora.reslora.products import HALVES, autocasts, project
from peft_reslora.reslora.relay import is_ahead
from peft_reslora.reslora.shortcuts import annealed_hidden, middle_hidden
from peft_reslora.shared.host import is_bare_linear, is_transformed


class ResLoRAVariant(LoraVariant):
    """The place of one layer in its chain. `position` counts from 0."""

    def __init__(self, chain: Chain, position: int) -> None:
        self.chain = chain
        self.position = position

    def forward(
        self, module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """The base layer's output `result` plus the update; `x` is `(..., in_features)`."""
        if (running := plain_pass(self.chain, self.position, module, x)) is not None:
            return add_plainly(running, self.chain, self.position, module, x, result)
        block = self.chain.kind(module, active_adapter)
        weight = block.weights[0]
        if weight.is_meta:
            self._refuse_offloaded_training(weight, x)
        module.note_call(active_adapter)
        annealed = active_adapter in module.lora_annealed
        if x.is_floating_point() and (x.dtype != weight.dtype or result.dtype != weight.dtype):
            x, result = _in_precision(block, x, result, annealed)
        match self.chain.config.shortcut:
            case "input":
                hidden = self._input(block, x)
            case "middle":
                hidden = self._middle(block, x)
            case _:
                return self._block(block, x, result)
        if annealed:
            hidden = self._annealed(block, x, hidden)
        return block.expand(hidden, result)

    def forward_alone(self, module: Any, x: torch.Tensor) -> torch.Tensor | None:
        """The layer's output where this is its only adapter; None where PEFT's own forward has to ask for it."""
        if torch.is_grad_enabled():
            return self._folded(module, x)
        if (running := plain_pass(self.chain, self.position, module, x)) is None:
            return None
        result = module.base_layer(x)
        output = add_plainly(running, self.chain, self.position, module, x, result)
        return output if output.dtype is result.dtype else output.to(result.dtype)

    def _folded(self, module: Any, x: torch.Tensor) -> torch.Tensor | None:
        """Eq. 3 as (W + U) x + b, for a sum U of whole updates: one product where W x + U x are two.

        Where anything but W itself stands between x and W x, or a dropout before U, each has its own.
        """
        base, chain = module.base_layer, self.chain
        if chain.config.pre_num != -1 or chain.config.shortcut != "block" or not is_bare_linear(base):
            return None
        weight, block = base.weight, chain.kind(module, chain.adapter_name)
        if type(weight) is not nn.Parameter or weight.dtype != x.dtype or weight.device != x.device:
            return None
        if not is_inactive(block.dropout) or way_to_factors(chain, self.position, x, folded=True) is not Way.SUMMED:
            return None
        module.note_call(chain.adapter_name)
        return F.linear(x, weight + summed_update(chain, self.position, x.device), base.bias)

    def _input(self, block: LinearBlock, x: torch.Tensor) -> torch.Tensor:
        """Eq. 2: A_n D(x_n + x_{n-1}), where x_{-1} := x_0.

        Where nothing stands between the two layers, A_n x_{n-1} is handed on in place of x_{n-1}: it is computed with
        A_{n-1} x_{n-1}, and is as small, which counts where it is kept until a checkpointed block is recomputed.
        """
        following = self._next_factor(x)
        hidden: torch.Tensor | None = None
        if following is None:
            handed = self.chain.relay.pass_on(self.position, x)
            x = handed.own
        else:
            hidden, ahead = project(x, [block.weights[0], following])
            handed = self.chain.relay.pass_on(self.position, ahead.unsqueeze(-1), carrier=x)
        if not handed.recomputed:
            block.layer.record_norm(block.adapter_name, x)
        previous = handed.earlier[0].to(x.device) if handed.earlier else x
        if is_ahead(previous, x):
            return (block.project(x) if hidden is None else hidden) + previous.squeeze(-1)
        if previous is x and hidden is not None:
            return hidden + hidden
        return block.project_sum(x, previous, handed.sums)

    def _next_factor(self, x: torch.Tensor) -> torch.Tensor | None:
        """A of the next layer, if this one may multiply by it in that one's place."""
        chain, position = self.chain, self.position
        if position + 1 == len(chain) or not torch.is_grad_enabled():
            return None
        if torch.compiler.is_compiling() or is_transformed():
            return None
        factors = chain.relay.once(
            lambda: chain.fused_factors(range(len(chain))), lambda: chain.fused_factors((position, position + 1))
        )
        A = factors.get(position + 1)
        if A is None or position not in factors or A.device != x.device or A.shape[1] != x.shape[-1]:
            return None
        return A if chain.relay.may_hand_ahead(position) else None

    def _middle(self, block: LinearBlock, x: torch.Tensor) -> torch.Tensor:
        """Eq. 4: A_n D(x_n) plus the A_{n-k} D(x_{n-k})."""
        projection = block.project(x)
        handed = self.chain.relay.pass_on(self.position, projection)
        if not handed.recomputed:
            block.layer.record_norm(block.adapter_name, projection)
        return middle_hidden(handed.own, [previous.to(x.device) for previous in handed.earlier])

    def _annealed(self, block: LinearBlock, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        layer, name = block.layer, block.adapter_name
        dropped = block.dropout(x)
        fitted = block.project_dropped(dropped) + block.apply(dropped, layer.lora_shortcut[name])
        return annealed_hidden(hidden, fitted, layer.lora_annealed[name])

    def _block(self, block: LinearBlock, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """Eq. 3: `result` plus the sum of the s_k B_k A_k D(x)."""
        match way_to_factors(self.chain, self.position, x):
            case Way.CALLED:
                x = block.layer.cast_to_adapter(x, block.weights[0].dtype)
                return add_by_calls(self.chain, self.position, block.dropout(x), result)
            case Way.SUMMED:
                return result + F.linear(block.dropout(x), summed_update(self.chain, self.position, x.device))
            case way:
                return block.expand_terms(x, terms(self.chain, self.position, way, x.device), result)

    def _refuse_offloaded_training(self, weight: torch.Tensor, x: torch.Tensor) -> None:
        if weight.requires_grad and torch.is_grad_enabled() and not x.is_meta:
            raise RuntimeError(
                f"The LoRA factors of layer {self.chain.names[self.position]!r} are offloaded while gradients are "
                "enabled; accelerate loads copies of them, whose gradients are lost. Keep the blocks that are trained "
                "on a device (device_map), or run inference under torch.no_grad()."
            )

    # PEFT calls these three; `orig_weight` is the weight that is to be changed, in its own orientation.

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        return module.add_delta_weight(orig_weight, active_adapter, in_place=True)  # a copy already

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: torch.Tensor) -> None:
        # In general another tensor: this one is what unmerging gives back, and others may share it.
        in_place = id(module) in self.chain.in_place
        orig_weight.data = module.add_delta_weight(orig_weight.data, active_adapter, in_place)

    def unmerge(self, module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        return (orig_weight - module.get_delta_weight(active_adapter)).to(orig_weight.dtype)


def _in_precision(
    block: LinearBlock, x: torch.Tensor, result: torch.Tensor, annealed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The input and the base layer's output, in the precisions in which the block computes with them.

    An input in half precision stays as it is (`products.py`), or is cast to that of the factors, as in PEFT. Where
    there are several adapters PEFT casts it for all, and what they add up to is rounded once.
    """
    dtype = block.weights[0].dtype
    if x.dtype != dtype and (annealed or not (block.is_fused and block.adds_up)):
        x = block.layer.cast_to_adapter(x, dtype)
    elif x.dtype == dtype and result.dtype in HALVES and not autocasts(x):
        result = result.to(torch.promote_types(dtype, result.dtype))
    return x, result
