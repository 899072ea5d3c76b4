"""A layer's forward pass without gradients, in few steps: for a token at a time Python takes longer than the products.

What the layers of a chain compute with is looked up once in each forward pass and lives no longer: nothing tells when
parameters are replaced, moved, hooked or sharded, or a module is set to training. Only the parameters themselves are
held, never numbers made of them, but for stacks of many layers' factors. Whatever is out of the ordinary is left to
the ordinary way (`variant.py`), whose numbers these are up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from peft_reslora.reslora.blocks.linear import FACTOR_NAMES, LinearBlock, is_inactive
from peft_reslora.reslora.linked_chain import Chain
from peft_reslora.reslora.passes import Scope
from peft_reslora.reslora.products import HALVES, expand
from peft_reslora.reslora.relay import Relay
from peft_reslora.reslora.sums import wide_sum
from peft_reslora.shared.host import children_by_name, is_observed, plain_weights

_FEW = 2**16  # numbers in an output for which one more pass over it is cheaper than one more view of it
_STACKED = 3  # terms of a sum from which on the factors of a chain are put side by side


class PlainTerm(NamedTuple):
    """One layer of a chain, its factors and its scaling."""

    layer: Any
    A: torch.Tensor
    B: torch.Tensor
    scaling: float


class Stack(NamedTuple):
    """The factors of a chain's layers below each other: those of layers that follow each other are one view of it.

    Args:
        A: `(sum of ranks, in_features)`.
        B: s B transposed, `(sum of ranks, out_features)`.
        ends: where the rows of each layer end.
    """

    A: torch.Tensor
    B: torch.Tensor
    ends: Sequence[int]


class PlainPass(NamedTuple):
    """The running forward pass, and what the layers of a chain compute with in it."""

    scope: Scope
    terms: Sequence[PlainTerm]


def plain_pass(chain: Chain, position: int, layer: Any, x: torch.Tensor) -> PlainPass | None:
    """What `add_plainly` needs for a layer with the input x; None where the ordinary way has to be taken."""
    scope = None if torch.is_grad_enabled() or is_observed() else chain.relay.plain_scope()
    if scope is None:
        return None
    key = chain.relay.key
    if key not in scope.terms:
        scope.terms[key] = _plain_terms(chain)
    terms = scope.terms[key]
    if terms is None or terms[position].layer is not layer:
        return None
    A = terms[position].A
    fits = x.dtype is A.dtype or (A.dtype is torch.float32 and x.dtype in HALVES)
    return PlainPass(scope, terms) if fits and x.device == A.device else None


def add_plainly(
    running: PlainPass, chain: Chain, position: int, x: torch.Tensor, result: torch.Tensor
) -> torch.Tensor:
    """The base layer's output `result` plus the update.

    In the dtype of `result`; in that of the factors, if that is wider and x has been cast to it, as PEFT does for
    several adapters, whose sum is rounded once.
    """
    scope, terms = running
    layer, A, B, scaling = terms[position]
    layer.called_adapters.add(chain.adapter_name)
    if x.dtype is not A.dtype:
        dtype = result.dtype
    elif (dtype := torch.promote_types(result.dtype, A.dtype)) is not result.dtype:
        result = result.to(dtype)
    match chain.config.shortcut:
        case "input":
            hidden = F.linear(_summed(chain.relay, scope, position, x, A.dtype), A)
        case "middle":
            projection = F.linear(x if x.dtype is A.dtype else x.to(A.dtype), A)
            hidden, earlier = chain.relay.pass_plainly(scope, position, projection)
            for previous in earlier:
                hidden = hidden + previous
        case _:
            x = x if x.dtype is A.dtype else x.to(A.dtype)
            output = _with_updates(chain, scope, position, x, result, terms)
            return output if output.dtype is dtype else output.to(dtype)
    output = _add_update(result, hidden, B, scaling)
    return output if output.dtype is dtype else output.to(dtype)


def _plain_terms(chain: Chain) -> list[PlainTerm] | None:
    """What the layers compute with, if all that any of them does is to multiply by its two factors."""
    if chain.kind is not LinearBlock:
        return None
    name, terms = chain.adapter_name, []
    like: torch.Tensor | None = None
    for position in range(len(chain)):
        layer = chain.find(position)
        if layer is None or layer.training or (weights := plain_weights(layer, FACTOR_NAMES, name)) is None:
            return None
        parts: Any = children_by_name(layer)
        if name in parts["lora_annealed"] or not is_inactive(parts["lora_dropout"][name]):
            return None
        A, B = weights
        like = A if like is None else like
        if not A.dtype is B.dtype is like.dtype or not A.device == B.device == like.device:
            return None
        terms.append(PlainTerm(layer, A, B, layer.scaling[name]))
    return terms


def _summed(relay: Relay, scope: Scope, position: int, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x_n + x_{n-1}, where x_{-1} := x_0."""
    x, earlier = relay.pass_plainly(scope, position, x)
    previous = earlier[0] if earlier else x
    if x.numel() >= _FEW:
        return scope.sums(x, previous, dtype)
    return x + previous if x.dtype is dtype is previous.dtype else wide_sum(x, previous, dtype)


def _with_updates(
    chain: Chain, scope: Scope, position: int, x: torch.Tensor, result: torch.Tensor, terms: Sequence[PlainTerm]
) -> torch.Tensor:
    """`result` plus the sum of the s_k B_k A_k x."""
    span = chain.span(position)
    if len(span) < _STACKED and x.numel() < _FEW:
        for k in span:
            _, A, B, scaling = terms[k]
            result = _add_update(result, F.linear(x, A), B, scaling)
        return result
    if chain.relay.key not in scope.stacks:
        scope.stacks[chain.relay.key] = _stack(chain, terms)
    A, B, ends = scope.stacks[chain.relay.key]
    first, end = span[-1], ends[position]
    start = ends[first - 1] if first else 0
    return _add_update(result, F.linear(x, A[start:end]), B[start:end].t(), 1.0)


def _stack(chain: Chain, terms: Sequence[PlainTerm]) -> Stack:
    scaled = [B.t() if scaling == 1.0 else B.t() * scaling for _, _, B, scaling in terms]
    return Stack(torch.cat([A for _, A, _, _ in terms]), torch.cat(scaled), chain.ranks)


def _add_update(result: torch.Tensor, hidden: torch.Tensor, B: torch.Tensor, scaling: float) -> torch.Tensor:
    """result + s B hidden, in the wider of their dtypes or that of `result`."""
    if result.numel() < _FEW or torch.promote_types(result.dtype, hidden.dtype) is not hidden.dtype:
        return torch.add(result, F.linear(hidden, B), alpha=scaling)
    return expand(result, hidden, B, scaling)
