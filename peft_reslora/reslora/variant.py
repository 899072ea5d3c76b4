"""`ResLoRAVariant`: joins the shortcuts to the hook that PEFT's LoRA layers offer.

PEFT's `LoraVariant` (private, read in 0.21.0 to 0.21.2) is asked for the forward of an adapter, and for its merge.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import LoraVariant
from torch import nn
from torch.distributed.tensor import DTensor

from peft_reslora.reslora.chain_table import reach
from peft_reslora.reslora.linked_chain import Chain, readable
from peft_reslora.reslora.shortcuts import (
    ProjectedSum,
    add_update,
    annealed_hidden,
    block_hidden,
    input_hidden,
    middle_hidden,
    whole_update_is_cheaper,
)
from peft_reslora.shared.host import is_bare_linear, is_tensor_parallel, is_transformed

if TYPE_CHECKING:
    from peft_reslora.reslora.layer import ResLoRALayer


class _Way(NamedTuple):
    """How the layers of a 'block' chain have each other's factors; in general they read them where they are.

    Args:
        hands: in their own forward, layers hand on copies. Under FSDP2 factors are only whole then. The same is done
            in re-entrant checkpointing, where a parameter would be given a part of its gradient by each region that
            reads it, while DDP, ZeRO and hooks wait for the first only, and a region that asks for the gradients of
            its own parameters would lose the others'.
        calls: factors are loaded by hooks on their modules, or are computed with in another way than they look.
    """

    hands: bool
    calls: bool


class ResLoRAVariant(LoraVariant):
    """The place of one layer in its chain. `position` counts from 0."""

    def __init__(self, chain: Chain, position: int) -> None:
        self.chain = chain
        self.position = position

    def forward(
        self, module: ResLoRALayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """The base layer's output `result` plus the update; `x` is `(..., in_features)`."""
        self._refuse_offloaded_training(module.lora_A[active_adapter].weight, x)
        match self.chain.config.shortcut:
            case "input":
                hidden = self._input(module, active_adapter, x)
            case "middle":
                hidden = self._middle(module, active_adapter, x)
            case _:
                return self._block(module, active_adapter, x, result)
        if active_adapter in module.lora_annealed:
            hidden = self._annealed(module, active_adapter, x, hidden)
        lora_b = module.lora_B[active_adapter]
        scaling = module.scaling[active_adapter]
        if is_plain(lora_b):
            return add_update(result, hidden, lora_b.weight, scaling)
        return result + lora_b(hidden) * scaling

    def _refuse_offloaded_training(self, weight: torch.Tensor, x: torch.Tensor) -> None:
        if weight.is_meta and weight.requires_grad and torch.is_grad_enabled() and not x.is_meta:
            raise RuntimeError(
                f"The LoRA factors of layer {self.chain.names[self.position]!r} are offloaded while gradients are "
                "enabled; accelerate loads copies of them, whose gradients are lost. Keep the blocks that are trained "
                "on a device (device_map), or run inference under torch.no_grad()."
            )

    def _input(self, module: ResLoRALayer, adapter: str, x: torch.Tensor) -> torch.Tensor:
        handed = self.chain.relay.pass_on(self.position, x)
        if not handed.recomputed:
            module.record_norm(adapter, x)
        own = handed.own
        previous = handed.earlier[0].to(x.device) if handed.earlier else own  # x_{-1} := x_0
        dropout, lora_a = module.lora_dropout[adapter], module.lora_A[adapter]
        if torch.compiler.is_compiling() or is_transformed() or not (is_plain(lora_a) and is_inactive(dropout)):
            return input_hidden(own, previous, dropout, lora_a)
        total = own + previous if handed.sums is None else handed.sums(own, previous)
        return ProjectedSum.apply(total, own, previous, lora_a.weight, handed.sums)

    def _middle(self, module: ResLoRALayer, adapter: str, x: torch.Tensor) -> torch.Tensor:
        projection = module.lora_A[adapter](module.lora_dropout[adapter](x))
        handed = self.chain.relay.pass_on(self.position, projection)
        if not handed.recomputed:
            module.record_norm(adapter, projection)
        return middle_hidden(handed.own, [previous.to(x.device) for previous in handed.earlier])

    def _annealed(self, module: ResLoRALayer, adapter: str, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        dropped = module.lora_dropout[adapter](x)
        projection = module.lora_A[adapter](dropped)
        return annealed_hidden(
            hidden, projection, dropped, module.lora_shortcut[adapter], module.lora_annealed[adapter]
        )

    def _block(self, module: ResLoRALayer, adapter: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        dropout = module.lora_dropout[adapter]
        way = self._way()
        handing = way.hands or self.chain.relay.crosses_graphs(self.position)
        if not handing and way.calls:
            return self._called(dropout(x), result, adapter)
        if not handing and self._sums_updates(module, x):
            return self._summed(dropout(x), result, adapter)
        pairs = self._handed_factors() if handing else [self._read(k) for k in self._span()]
        factors = [[factor.to(x.device) for factor in pair] for pair in pairs]
        hidden = block_hidden(x, [A for A, _ in factors], dropout)
        scalings = [self.chain.layer(k).scaling[adapter] for k in self._span()]
        common = scalings[0] if len(set(scalings)) == 1 else 1.0
        parts = [B if common == s else B * s for (_, B), s in zip(factors, scalings, strict=True)]
        return add_update(result, hidden, torch.cat(parts, dim=1), common)

    def _way(self) -> _Way:
        """How the factors of the chain can be had: found once in a forward pass."""

        def look(positions: Iterable[int]) -> _Way:
            sharded = any(map(self._is_sharded, positions))
            return _Way(sharded, not all(is_bare_linear(linear) for k in positions for linear in self._linears(k)))

        if torch.compiler.is_compiling():  # what is looked at is guarded
            return look(self._neighbors())
        return self.chain.relay.once(lambda: look(range(len(self.chain))), lambda: look(self._neighbors()))

    def _neighbors(self) -> range:
        """The positions that give to this layer or take from it, and its own."""
        reached = self.chain.relay.pre_num
        return range(max(0, self.position - reached), min(self.position + reached + 1, len(self.chain)))

    def _called(self, dropped: torch.Tensor, result: torch.Tensor, adapter: str) -> torch.Tensor:
        """`result` plus the updates, each by calls of its modules, whose hooks load the factors wherever they run."""
        for k in self._span():
            lora_a, lora_b = self._linears(k)
            update = lora_b(lora_a(dropped).to(dropped.device)).to(result.device)
            result = result + update * self.chain.layer(k).scaling[adapter]
        return result

    def _sums_updates(self, module: ResLoRALayer, x: torch.Tensor) -> bool:
        """Whether to keep one running sum of whole updates, (out, in): in deep chains that take from all layers.

        Only in the precision of the factors, since the sum would be rounded once per layer.
        """
        adapter = self.chain.adapter_name
        return (
            self.chain.config.pre_num == -1
            and self.position > 0
            and not (torch.compiler.is_compiling() or is_transformed() or torch.is_autocast_enabled(x.device.type))
            and x.dtype == module.lora_A[adapter].weight.dtype in (torch.float32, torch.float64)
            and whole_update_is_cheaper(
                x.numel() // x.shape[-1],
                module.r[adapter],
                self.chain.ranks[self.position],
                module.in_features,
                module.out_features,
            )
        )

    def _summed(self, dropped: torch.Tensor, result: torch.Tensor, adapter: str) -> torch.Tensor:
        """`result` plus x U^T, where U is the sum of this layer's update and those of all earlier ones."""

        def scaled(position: int) -> tuple[torch.Tensor, torch.Tensor]:
            A, B = (factor.to(dropped.device) for factor in self._read(position))
            return A, B * self.chain.layer(position).scaling[adapter]

        def start() -> torch.Tensor:
            factors = [scaled(k) for k in self._span()]
            return torch.cat([B for _, B in factors], dim=1) @ torch.cat([A for A, _ in factors])

        def extend(before: torch.Tensor) -> torch.Tensor:
            A, B = scaled(self.position)
            return torch.addmm(before.to(dropped.device), B, A)

        return result + F.linear(dropped, self.chain.relay.total(self.position, start, extend))

    def _span(self) -> range:
        """This layer's position and those of the earlier layers that feed it, nearest first."""
        return range(self.position, self.position - 1 - reach(self.position, self.chain.config.pre_num), -1)

    def _handed_factors(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """A and B of the layers in `_span`, as those layers hand them on in this forward pass."""
        linears, name, span = self._linears(self.position), self.chain.names[self.position], self._span()
        own = [
            weight_by_call(linear)
            if not is_bare_linear(linear) and not isinstance(linear.weight, DTensor)
            else readable(linear, name)
            for linear in linears
        ]
        handed = self.chain.relay.pass_on(self.position, torch.cat([factor.flatten() for factor in own]))
        values = dict(zip(span, (handed.own, *handed.earlier), strict=True))
        return [self._read(k) if value is None else self._unflatten(k, value) for k, value in values.items()]

    def _linears(self, position: int) -> tuple[nn.Linear, nn.Linear]:
        layer, name = self.chain.layer(position), self.chain.adapter_name
        return layer.lora_A[name], layer.lora_B[name]

    def _is_sharded(self, position: int) -> bool:
        """Whether the factors are whole in their own layer's forward only.

        Those of tensor parallelism never are: a call of their modules does what it takes, wherever they are called.
        """
        meshes = [
            linear.weight.device_mesh for linear in self._linears(position) if isinstance(linear.weight, DTensor)
        ]
        base_layer = self.chain.layer(position).get_base_layer()
        # More than one dimension of the mesh is sharded besides.
        return bool(meshes) and (not is_tensor_parallel(base_layer) or meshes[0].ndim > 1)

    def _read(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        lora_a, lora_b = self._linears(position)
        name = self.chain.names[position]
        return readable(lora_a, name), readable(lora_b, name)

    def _unflatten(self, position: int, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        lora_a, lora_b = self._linears(position)
        r = lora_a.out_features
        A, B = flat.split((r * lora_a.in_features, r * lora_b.out_features))
        return A.view(r, lora_a.in_features), B.view(lora_b.out_features, r)

    # PEFT calls these three; `orig_weight` is the weight that is to be changed, in its own orientation.

    def merge_safe(self, module: ResLoRALayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        return module.add_delta_weight(orig_weight, active_adapter, in_place=True)  # a copy already

    def merge_unsafe(self, module: ResLoRALayer, active_adapter: str, orig_weight: torch.Tensor) -> None:
        # In general another tensor: this one is what unmerging gives back, and others may share it.
        in_place = id(module) in self.chain.in_place
        orig_weight.data = module.add_delta_weight(orig_weight.data, active_adapter, in_place)

    def unmerge(self, module: ResLoRALayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        return (orig_weight - module.get_delta_weight(active_adapter)).to(orig_weight.dtype)


def is_plain(linear: nn.Module) -> bool:
    """Whether a call of `linear` does nothing but multiply by its weight: no hooks, no wrapped forward, no sharding.

    Offloading and sharding engines act on calls of the modules `lora_A` and `lora_B`.
    """
    return is_bare_linear(linear) and not isinstance(linear.weight, DTensor)


def is_inactive(dropout: nn.Module) -> bool:
    """Whether a dropout lets everything through."""
    return isinstance(dropout, nn.Identity) or (isinstance(dropout, nn.Dropout) and not dropout.training)


def weight_by_call(linear: nn.Linear) -> torch.Tensor:
    """The weight `(out, in)`, as what a call makes of the identity, where hooks load it only for the call."""
    return linear(torch.eye(linear.in_features, dtype=linear.weight.dtype, device=linear.weight.device)).t()
