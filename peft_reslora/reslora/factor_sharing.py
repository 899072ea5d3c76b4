"""How the layers of a 'block' chain have each other's factors.

In general a layer reads them where they are, in the other layers. Engines that shard or load parameters for the call
of their own layer only, and re-entrant checkpointing, allow for less.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import Enum, auto
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from peft_reslora.reslora.blocks.linear import Factors, LinearBlock, Term, readable
from peft_reslora.reslora.linked_chain import Chain
from peft_reslora.reslora.sums import whole_update_is_cheaper
from peft_reslora.shared.host import is_bare, is_tensor_parallel, is_transformed
from peft_reslora.shared.tensors import widen

_ADVICE = "Use shortcut='input' or 'middle', or exclude the LoRA modules from sharding and offloading."


class Way(Enum):
    """How a layer has the factors of the layers before it."""

    READ = auto()  # where they are
    SUMMED = auto()  # as one running sum of whole updates B A, each layer's added to that of the layer before
    HANDED = auto()  # as copies, which each layer hands on in its own forward
    CALLED = auto()  # by calls of the other layers' modules, whose hooks load the factors wherever they run


class _Seen(NamedTuple):
    """What the factors of a chain look like.

    Args:
        sharded: they are whole in their own layer's forward only, as under FSDP2.
        hooked: they are loaded by hooks on their modules, or are computed with in another way than they look.
    """

    sharded: bool
    hooked: bool


def way_to_factors(chain: Chain, position: int, x: torch.Tensor, folded: bool = False) -> Way:
    """How the layer at `position`, whose input is `x`, has the factors of those before it.

    `folded`: whether the sum of whole updates could go into the base weight (`whole_update_is_cheaper`).

    They are handed under FSDP2, and in re-entrant checkpointing, where a parameter would be given a part of its
    gradient by each region that reads it, while DDP, ZeRO and hooks wait for the first only, and a region that asks
    for the gradients of its own parameters would lose the others'.
    """
    if torch.compiler.is_compiling():  # what is looked at is guarded
        seen = _look(chain, _neighbors(chain, position))
    else:
        seen = chain.relay.once(
            lambda: _look(chain, range(len(chain))), lambda: _look(chain, _neighbors(chain, position))
        )
    if seen.sharded or chain.relay.crosses_graphs(position):
        return Way.HANDED
    if not chain.kind.adds_up:
        return Way.HANDED if seen.hooked else Way.READ
    if seen.hooked:
        return Way.CALLED
    return Way.SUMMED if _sums_updates(chain, position, x, folded) else Way.READ


def terms(chain: Chain, position: int, way: Way, device: torch.device) -> list[Term]:
    """A, B and s of the layer at `position` and of those that feed it, nearest first, on the device."""
    if way is Way.HANDED:
        pairs = _handed(chain, position, device)
    elif way is Way.CALLED:
        pairs = [_called(chain, k, device) for k in chain.span(position)]
    else:
        pairs = [read(chain, k) for k in chain.span(position)]
    scalings = [chain.block(k).scaling for k in chain.span(position)]
    return [(A.to(device), B.to(device), s) for (A, B), s in zip(pairs, scalings, strict=True)]


def read(chain: Chain, position: int) -> Factors:
    """The two factors of a layer's update, where they are."""
    block, name = chain.block(position), chain.names[position]
    A, B = (readable(weight, name, _ADVICE) for weight in block.weights)
    return block.in_use(A, B)


def _called(chain: Chain, position: int, device: torch.device) -> Factors:
    """The two factors of a layer's update, as calls of its modules show them."""
    block, name = chain.block(position), chain.names[position]
    A, B = (_whole(module, name, device) for module in block.modules)
    return block.in_use(A, B)


def add_by_calls(chain: Chain, position: int, dropped: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """`result` plus the sum of the s_k B_k A_k D(x), each by calls of its modules."""
    for k in chain.span(position):
        block = chain.block(k)
        result = result + block.call(dropped).to(result.device) * block.scaling
    return result


def summed_update(chain: Chain, position: int, device: torch.device) -> torch.Tensor:
    """U `(out_features, in_features)`, the sum of the s_k B_k A_k of this layer and of all earlier ones."""

    def start() -> torch.Tensor:
        A, B = chain.block(position).side_by_side(terms(chain, position, Way.SUMMED, device))
        return B @ A

    def extend(before: torch.Tensor) -> torch.Tensor:
        A, B = (factor.to(device) for factor in read(chain, position))
        return torch.addmm(before.to(device), B * chain.block(position).scaling, A)

    return chain.relay.total(position, start, extend)


def whole_update(chain: Chain, position: int, device: torch.device, *, in_own_pass: bool) -> torch.Tensor:
    """U `(out_features, in_features)`, the sum of the s_k B_k A_k of this layer and of those that feed it (Eq. 3), for
    layers in which no x is multiplied by it. In float32 at least: it is rounded once, with what it is added to.

    Args:
        in_own_pass: the layer itself runs; another that only looks hands nothing on.
    """
    block = chain.block(position)
    way = way_to_factors(chain, position, block.weights[0])
    if way is Way.HANDED and not in_own_pass:
        way = Way.READ
    found = terms(chain, position, way, device)
    return block.delta(*block.side_by_side([(widen(A), widen(B), s) for A, B, s in found]))


def _sums_updates(chain: Chain, position: int, x: torch.Tensor, folded: bool) -> bool:
    """Whether to keep one running sum of whole updates: in deep chains that take from all layers.

    Only in the precision of the factors, since the sum would be rounded once per layer.
    """
    if chain.config.pre_num != -1 or position == 0 or not chain.kind.is_linear:
        return False
    if torch.compiler.is_compiling() or is_transformed() or torch.is_autocast_enabled(x.device.type):
        return False
    A, B = chain.block(position).weights
    return x.dtype == A.dtype in (torch.float32, torch.float64) and whole_update_is_cheaper(
        x.numel() // x.shape[-1], A.shape[0], chain.ranks[position], A.shape[1], B.shape[0], folded
    )


def _look(chain: Chain, positions: Iterable[int]) -> _Seen:
    blocks = [chain.block(k) for k in positions if chain.has(k)]
    sharded = any(map(_is_sharded, blocks))
    return _Seen(sharded, not all(is_bare(module) for block in blocks for module in block.modules))


def _neighbors(chain: Chain, position: int) -> range:
    """The positions that give to this layer or take from it, and its own."""
    reached = chain.relay.pre_num
    return range(max(0, position - reached), min(position + reached + 1, len(chain)))


def _is_sharded(block: LinearBlock) -> bool:
    """Whether the factors are whole in their own layer's forward only.

    Those of tensor parallelism never are: a call of their modules does what it takes, wherever they are called.
    """
    meshes = [weight.device_mesh for weight in block.weights if isinstance(weight, DTensor)]
    # More than one dimension of the mesh is sharded besides.
    return bool(meshes) and (not is_tensor_parallel(block.layer.get_base_layer()) or meshes[0].ndim > 1)


def _handed(chain: Chain, position: int, device: torch.device) -> list[Factors]:
    """A and B of the layer and of those that feed it, as those layers hand them on in this forward pass."""
    block = chain.block(position)
    whole = [_whole(module, chain.names[position], device) for module in block.modules]
    own = block.in_use(*whole) if whole else read(chain, position)  # an embedding has no modules
    handed = chain.relay.pass_on(position, torch.cat([factor.flatten() for factor in own]))
    values = zip(chain.span(position), (handed.own, *handed.earlier), strict=True)
    return [read(chain, k) if value is None else _unflatten(chain.block(k), value) for k, value in values]


def _whole(linear: nn.Linear, name: str, device: torch.device) -> torch.Tensor:
    """The weight, as its own layer's forward sees it."""
    if is_bare(linear) or isinstance(linear.weight, DTensor) or not isinstance(linear, nn.Linear):
        return readable(linear.weight, name, _ADVICE)
    return weight_by_call(linear, device if linear.weight.is_meta else linear.weight.device)


def weight_by_call(linear: nn.Linear, device: torch.device) -> torch.Tensor:
    """The weight `(out, in)`, as what a call on the device makes of the identity, where hooks load it for the call."""
    return linear(torch.eye(linear.in_features, dtype=linear.weight.dtype, device=device)).t()


def _unflatten(block: LinearBlock, flat: torch.Tensor) -> Factors:
    shape_a, shape_b = block.shapes
    A, B = flat.split((math.prod(shape_a), math.prod(shape_b)))
    return A.view(shape_a), B.view(shape_b)
