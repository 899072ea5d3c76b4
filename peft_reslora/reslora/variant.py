"""`ResLoRAVariant`: joins the shortcuts to the hook that PEFT's LoRA layers offer.

PEFT's `LoraVariant` (private, read in 0.21.0 to 0.21.2) is asked for the forward of an adapter, and for its merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.lora.layer import LoraVariant
from torch import nn
from torch.distributed.tensor import DTensor

from peft_reslora.reslora.chain import reach
from peft_reslora.reslora.merge import Block, check_finite, merged_factors, shortcut_coefficients
from peft_reslora.reslora.relay import Relay
from peft_reslora.reslora.shortcuts import (
    ProjectedSum,
    add_update,
    annealed_hidden,
    block_hidden,
    input_hidden,
    middle_hidden,
    shared_sum,
)

if TYPE_CHECKING:
    from peft_reslora.reslora.config import ResLoRAConfig
    from peft_reslora.reslora.layer import ResLoRALayer


class Chain:
    """The layers of one chain of one adapter, in order.

    The layers are held in a plain list, not registered: each stays where it is in the model, and copying or pickling
    the model copies the chain with it.
    """

    def __init__(
        self, names: Sequence[str], layers: Sequence[ResLoRALayer], adapter_name: str, config: ResLoRAConfig
    ) -> None:
        self.names = list(names)
        self.layers = list(layers)
        self.adapter_name = adapter_name
        self.config = config
        self.relay = Relay(names, config.pre_num, hands_factors=config.shortcut == "block")
        self.keeps_base_weights = True
        self.planned: list[list[float]] | None = None

    def blocks(self) -> list[Block]:
        name = self.adapter_name
        for layer in self.layers:
            layer.check_loaded(name)
        return [
            Block(
                layer_name,
                readable(layer.lora_A[name], layer_name, _FROM_FILES).detach(),
                readable(layer.lora_B[name], layer_name, _FROM_FILES).detach(),
                layer.scaling[name],
                stored(layer.lora_norm, name),
                layer.unmerged_base_weight,
                stored(layer.lora_shortcut, name),
                stored(layer.lora_calibrated, name),
                float(stored(layer.lora_annealed, name) or 0.0),
            )
            for layer_name, layer in zip(self.names, self.layers, strict=True)
        ]

    def coefficients(self) -> list[list[float]]:
        """The coefficients of the merge: those planned before the first weight was changed, or computed now."""
        return shortcut_coefficients(self.blocks(), self.config) if self.planned is None else self.planned

    def merged_factors(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`(A (R, in_features), B (out_features, R))` of one layer, scaling included."""
        A, B = merged_factors(self.blocks(), position, self.config, self.coefficients())
        check_finite(A, B, self.names[position], self.adapter_name)
        return A, B


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
        own, earlier, recomputed = self.chain.relay.pass_on(self.position, x, module.training)
        if not recomputed:
            module.record_norm(adapter, x)
        previous = earlier[0].to(x.device) if earlier else own  # x_{-1} := x_0
        self._check_shape(x, previous, "input")
        dropout, lora_a = module.lora_dropout[adapter], module.lora_A[adapter]
        if torch.compiler.is_compiling() or not (is_plain(lora_a) and is_inactive(dropout)):
            return input_hidden(own, previous, dropout, lora_a)
        hidden = ProjectedSum.apply(shared_sum(own, previous), own, previous, lora_a.weight)
        if self.position == len(self.chain.layers) - 1:
            shared_sum.forget()
        return hidden

    def _middle(self, module: ResLoRALayer, adapter: str, x: torch.Tensor) -> torch.Tensor:
        projection = module.lora_A[adapter](module.lora_dropout[adapter](x))
        own, earlier, recomputed = self.chain.relay.pass_on(self.position, projection, module.training)
        if not recomputed:
            module.record_norm(adapter, projection)
        for previous in earlier:
            self._check_shape(own, previous, "middle")
        return middle_hidden(own, [previous.to(x.device) for previous in earlier])

    def _annealed(self, module: ResLoRALayer, adapter: str, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        dropped = module.lora_dropout[adapter](x)
        projection = module.lora_A[adapter](dropped)
        return annealed_hidden(
            hidden, projection, dropped, module.lora_shortcut[adapter], module.lora_annealed[adapter]
        )

    def _block(self, module: ResLoRALayer, adapter: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        layers = [self.chain.layers[k] for k in self._span()]
        scalings = [layer.scaling[adapter] for layer in layers]
        dropout = module.lora_dropout[adapter]
        handing = self._hands_factors(module.training)
        if not handing and any(has_hooks(part[adapter]) for layer in layers for part in (layer.lora_A, layer.lora_B)):
            dropped = dropout(x)  # the hooks load the factors, wherever they are called
            for layer, scaling in zip(layers, scalings, strict=True):
                update = layer.lora_B[adapter](layer.lora_A[adapter](dropped).to(dropped.device)).to(result.device)
                result = result + update * scaling
            return result
        pairs = self._handed_factors(module.training) if handing else [self._read(k) for k in self._span()]
        factors = [[factor.to(x.device) for factor in pair] for pair in pairs]
        hidden = block_hidden(x, [A for A, _ in factors], dropout)
        common = scalings[0] if len(set(scalings)) == 1 else 1.0
        parts = [B if common == s else B * s for (_, B), s in zip(factors, scalings, strict=True)]
        return add_update(result, hidden, torch.cat(parts, dim=1), common)

    def _span(self) -> range:
        """This layer's position and those of the earlier layers that feed it, nearest first."""
        return range(self.position, self.position - 1 - reach(self.position, self.chain.config.pre_num), -1)

    def _hands_factors(self, training: bool) -> bool:
        """Whether the layers hand each other copies of their factors; in general they are read where they are.

        Under FSDP2 a layer's factors are only whole in its own forward. In re-entrant checkpointing a parameter would
        be given a part of its gradient by each region that reads it, while DDP and ZeRO wait for the first only.
        """
        if not dist.is_initialized():
            return False
        chain = self.chain
        last_taker = min(self.position + chain.relay.pre_num, len(chain.layers) - 1)
        neighbours = (*self._span()[1:], *range(self.position + 1, last_taker + 1))
        return any(map(self._is_sharded, neighbours)) or chain.relay.crosses_graphs(training)

    def _handed_factors(self, training: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """A and B of the layers in `_span`, as those layers hand them on in this forward pass."""
        linears, name, span = self._linears(self.position), self.chain.names[self.position], self._span()
        own = [weight_by_call(linear) if has_hooks(linear) else readable(linear, name) for linear in linears]
        flat = torch.cat([factor.flatten() for factor in own])
        value, earlier, _ = self.chain.relay.pass_on(self.position, flat, training)
        handed = dict(zip(span, (value, *earlier), strict=True))
        return [self._read(k) if value is None else self._unflatten(k, value) for k, value in handed.items()]

    def _linears(self, position: int) -> tuple[nn.Linear, nn.Linear]:
        layer, name = self.chain.layers[position], self.chain.adapter_name
        return layer.lora_A[name], layer.lora_B[name]

    def _is_sharded(self, position: int) -> bool:
        return any(isinstance(linear.weight, DTensor) for linear in self._linears(position))

    def _read(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        lora_a, lora_b = self._linears(position)
        name = self.chain.names[position]
        return readable(lora_a, name), readable(lora_b, name)

    def _unflatten(self, position: int, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        lora_a, lora_b = self._linears(position)
        r = lora_a.out_features
        A, B = flat.split((r * lora_a.in_features, r * lora_b.out_features))
        return A.view(r, lora_a.in_features), B.view(lora_b.out_features, r)

    def _check_shape(self, own: torch.Tensor, previous: torch.Tensor, shortcut: str) -> None:
        if own.shape != previous.shape:
            names = self.chain.names
            raise ValueError(
                f"shortcut={shortcut!r} adds what layers {names[self.position - 1]!r} and {names[self.position]!r} "
                f"compute from their inputs, but the shapes are {tuple(previous.shape)} and {tuple(own.shape)}. End "
                "the chain between the two with chain_pattern or exclude_modules, or use shortcut='block', which "
                "needs no equal inputs."
            )

    # PEFT calls these three; `orig_weight` is the weight that is to be changed, in its own orientation.

    def merge_safe(self, module: ResLoRALayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        if self.chain.keeps_base_weights:
            module.keep_base_weight(active_adapter)
        return module.add_delta_weight(orig_weight, active_adapter, in_place=True)  # a copy already

    def merge_unsafe(self, module: ResLoRALayer, active_adapter: str, orig_weight: torch.Tensor) -> None:
        keep = self.chain.keeps_base_weights
        if keep:
            module.keep_base_weight(active_adapter)
        orig_weight.data = module.add_delta_weight(orig_weight.data, active_adapter, in_place=not keep)

    def unmerge(self, module: ResLoRALayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        kept = module.kept_base_weights.pop(active_adapter, None)
        if kept is not None:
            return kept.to(orig_weight.device, orig_weight.dtype)
        return (orig_weight - module.get_delta_weight(active_adapter)).to(orig_weight.dtype)


def stored(buffers: BufferDict, adapter_name: str) -> torch.Tensor | None:
    """The adapter's buffer, if there is one."""
    return buffers[adapter_name] if adapter_name in buffers else None  # noqa: SIM401 - it has no `get`


def restore(buffers: BufferDict, adapter_name: str, buffer: torch.Tensor | None) -> None:
    """Put back what `stored` gave; None takes the adapter's buffer away."""
    if buffer is not None:
        buffers[adapter_name] = buffer
    elif adapter_name in buffers:
        del buffers[adapter_name]


def is_plain(linear: nn.Module) -> bool:
    """Whether a call of `linear` does nothing but multiply by its weight: no hooks, no wrapped forward, no sharding.

    Offloading and sharding engines act on calls of the modules `lora_A` and `lora_B`.
    """
    return not (has_hooks(linear) or isinstance(linear.weight, DTensor))


def has_hooks(linear: nn.Module) -> bool:
    """Whether a call of `linear` does more than multiply by its weight, as under ZeRO-3 and offloading."""
    return (
        type(linear) is not nn.Linear
        or bool(linear._forward_hooks or linear._forward_pre_hooks)
        or "forward" in linear.__dict__
    )


def is_inactive(dropout: nn.Module) -> bool:
    """Whether a dropout lets everything through."""
    return isinstance(dropout, nn.Identity) or (isinstance(dropout, nn.Dropout) and not dropout.training)


def weight_by_call(linear: nn.Linear) -> torch.Tensor:
    """The weight `(out, in)`, as what a call makes of the identity, where hooks load it only for the call."""
    return linear(torch.eye(linear.in_features, dtype=linear.weight.dtype, device=linear.weight.device)).t()


_OTHER_SHORTCUT = "Use shortcut='input' or 'middle', or exclude the LoRA modules from sharding and offloading."
_FROM_FILES = (
    "Let the trainer save the adapter, and merge or export it from there: load it into a model without sharding and "
    "offloading, or call `peft-reslora export`."
)


def readable(linear: nn.Linear, name: str, advice: str = _OTHER_SHORTCUT) -> torch.Tensor:
    """The factor's weight, refused where it is not there to be read outside of its own layer's forward.

    Raises:
        RuntimeError: if it is sharded or offloaded.
    """
    weight = linear.weight
    if isinstance(weight, DTensor) or weight.is_meta or weight.numel() == 0:
        raise RuntimeError(
            f"The LoRA factors of layer {name!r} are sharded or offloaded and cannot be read outside of its forward "
            f"pass. {advice}"
        )
    return weight
