"""A layer's forward pass without gradients, in few steps: for a token at a time Python takes longer than the products.

What a layer computes with is looked up each time that it runs: nothing tells when parameters are replaced, moved,
hooked or sharded, or a module is set to training. Only where many layers' factors are put side by side is that done
once in a forward pass. Whatever is out of the ordinary is left to the ordinary way (`variant.py`), whose numbers these
are up to rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
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
_STACKED = 3  # terms of a sum from which on the factors of a chain are put side by side for a few tokens


class PlainTerm(NamedTuple):
    """The factors and the scaling of one layer of a chain."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: float


class Stack(NamedTuple):
    """The factors of all layers of a chain below each other: those of layers that follow each other are one view.

    Args:
        terms: what it is made of.
        A: `(sum of ranks, in_features)`.
        B: s B transposed, `(sum of ranks, out_features)`.
        ends: where the rows of each layer end.
    """

    terms: Sequence[PlainTerm]
    A: torch.Tensor
    B: torch.Tensor
    ends: Sequence[int]


class PlainPass(NamedTuple):
    """The running forward pass, and what a layer computes with in it.

    Args:
        terms: of the layer, and with 'block' of those that feed it, nearest first, if they are not in `stack`.
    """

    scope: Scope
    terms: Sequence[PlainTerm]
    stack: Stack | None


def plain_pass(chain: Chain, position: int, layer: Any, x: torch.Tensor) -> PlainPass | None:
    """What `add_plainly` needs for a layer with the input x; None where the ordinary way has to be taken."""
    scope = None if torch.is_grad_enabled() or is_observed() else chain.relay.plain_scope()
    if scope is None or chain.kind is not LinearBlock or (own := _plain_term(chain, layer)) is None:
        return None
    dtype = own.A.dtype
    if not (x.dtype is dtype or (dtype is torch.float32 and x.dtype in HALVES)) or x.device != own.A.device:
        return None
    if chain.config.shortcut != "block":
        return PlainPass(scope, [own], None)
    if not _is_whole(chain, scope):
        return None
    span = chain.span(position)
    if len(span) >= _STACKED and x.numel() < _FEW:
        stack = _stack(chain, scope, position, own)
        return None if stack is None else PlainPass(scope, [own], stack)
    terms = _plain_terms(chain, span[1:], own)
    return None if terms is None else PlainPass(scope, [own, *terms], None)


def add_plainly(
    running: PlainPass, chain: Chain, position: int, layer: Any, x: torch.Tensor, result: torch.Tensor
) -> torch.Tensor:
    """The base layer's output `result` plus the update.

    In the dtype of `result`; in that of the factors, if that is wider and x has been cast to it, as PEFT does for
    several adapters, whose sum is rounded once.
    """
    scope, terms, stack = running
    A, B, scaling = terms[0]
    layer.called_adapters.add(chain.adapter_name)
    if x.dtype is not A.dtype:
        dtype = result.dtype
    elif (dtype := torch.promote_types(result.dtype, A.dtype)) is not result.dtype:
        result = result.to(dtype)
    match chain.config.shortcut:
        case "input":
            hidden = F.linear(_summed(chain.relay, scope, position, x, A.dtype), A)
            output = _add_update(result, hidden, B, scaling)
        case "middle":
            projection = F.linear(x if x.dtype is A.dtype else x.to(A.dtype), A)
            hidden, earlier = chain.relay.pass_plainly(scope, position, projection)
            for previous in earlier:
                hidden = hidden + previous
            output = _add_update(result, hidden, B, scaling)
        case _:
            x = x if x.dtype is A.dtype else x.to(A.dtype)
            output = _with_updates(chain, position, x, result, terms, stack)
    return output if output.dtype is dtype else output.to(dtype)


def _plain_term(chain: Chain, layer: Any) -> PlainTerm | None:
    """What a layer computes with, if all that it does is to multiply by its two factors."""
    name = chain.adapter_name
    if layer is None or layer.training or (weights := plain_weights(layer, FACTOR_NAMES, name)) is None:
        return None
    parts: Any = children_by_name(layer)
    if name in parts["lora_annealed"] or not is_inactive(parts["lora_dropout"][name]):
        return None
    A, B = weights
    return PlainTerm(A, B, layer.scaling[name]) if A.dtype is B.dtype and A.device == B.device else None


def _is_whole(chain: Chain, scope: Scope) -> bool:
    """Whether all layers have plain factors as the first of them runs; where not, all of them hand theirs on."""
    key = chain.relay.key
    if key not in scope.whole:
        layers = [layer for k in range(len(chain)) if (layer := chain.find(k)) is not None]
        scope.whole[key] = all(plain_weights(layer, FACTOR_NAMES, chain.adapter_name) is not None for layer in layers)
    return scope.whole[key]


def _plain_terms(chain: Chain, positions: Iterable[int], like: PlainTerm) -> list[PlainTerm] | None:
    """Those of several layers, if all of them have such, of one dtype and on one device."""
    terms: list[PlainTerm] = []
    for position in positions:
        term = _plain_term(chain, chain.find(position))
        if term is None or term.A.dtype is not like.A.dtype or term.A.device != like.A.device:
            return None
        terms.append(term)
    return terms


def _summed(relay: Relay, scope: Scope, position: int, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x_n + x_{n-1}, where x_{-1} := x_0."""
    x, earlier = relay.pass_plainly(scope, position, x)
    previous = earlier[0] if earlier else x
    if x.numel() >= _FEW:
        return scope.sums(x, previous, dtype)
    return x + previous if x.dtype is dtype is previous.dtype else wide_sum(x, previous, dtype)


def _with_updates(
    chain: Chain,
    position: int,
    x: torch.Tensor,
    result: torch.Tensor,
    terms: Sequence[PlainTerm],
    stack: Stack | None,
) -> torch.Tensor:
    """`result` plus the sum of the s_k B_k A_k x."""
    if stack is not None:
        first, end = chain.span(position)[-1], stack.ends[position]
        start = stack.ends[first - 1] if first else 0
        A, B = stack.A[start:end], stack.B[start:end].t()
    elif len(terms) > 1 and x.numel() >= _FEW:
        A = torch.cat([A for A, _, _ in terms])
        B = torch.cat([_scaled(B, scaling) for _, B, scaling in terms], dim=1)
    else:
        for A, B, scaling in terms:
            result = _add_update(result, F.linear(x, A), B, scaling)
        return result
    return _add_update(result, F.linear(x, A), B, 1.0)


def _stack(chain: Chain, scope: Scope, position: int, own: PlainTerm) -> Stack | None:
    """That of the running forward pass; None if not all layers of the chain can be in it.

    Made anew when layers run again in one call of a model, or the layer has been given other factors.
    """
    key = chain.relay.key
    before, stack = scope.stacks.get(key, (position, None))
    if before >= position or (stack is not None and not _is_same(stack.terms[position], own)):
        terms = _plain_terms(chain, range(len(chain)), own)
        stack = None if terms is None else _side_by_side(terms)
    scope.stacks[key] = position, stack
    return stack


def _is_same(term: PlainTerm, other: PlainTerm) -> bool:
    return term.A is other.A and term.B is other.B and term.scaling == other.scaling


def _side_by_side(terms: Sequence[PlainTerm]) -> Stack:
    ends = list(itertools.accumulate(A.shape[0] for A, _, _ in terms))
    scaled = [_scaled(B.t(), scaling) for _, B, scaling in terms]
    return Stack(terms, torch.cat([A for A, _, _ in terms]), torch.cat(scaled), ends)


def _scaled(B: torch.Tensor, scaling: float) -> torch.Tensor:
    return B if scaling == 1.0 else B * scaling


def _add_update(result: torch.Tensor, hidden: torch.Tensor, B: torch.Tensor, scaling: float) -> torch.Tensor:
    """result + s B hidden, in the wider of their dtypes or that of `result`."""
    if result.numel() < _FEW or torch.promote_types(result.dtype, hidden.dtype) is not hidden.dtype:
        return torch.add(result, F.linear(hidden, B), alpha=scaling)
    return expand(result, hidden, B, scaling)
