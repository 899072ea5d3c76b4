"""The three shortcuts of ResLoRA (arXiv 2402.18039) as functions of tensors.

Notation: layer n of a chain has input x_n `(..., in_features)`, factors A_n `(r, in_features)` and
B_n `(out_features, r)`, scaling s_n, and dropout D. Each function returns the hidden state `(..., r)` and is followed
by `add_update`, which multiplies by B and adds to the base layer's output.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from peft_reslora.shared.host import version_of

Map = Callable[[torch.Tensor], torch.Tensor]


def input_hidden(x: torch.Tensor, previous: torch.Tensor, dropout: Map, lora_a: Map) -> torch.Tensor:
    """Input shortcut, Eq. 2: A_n D(x_n + x_{n-1}); one dropout mask, on the sum."""
    return lora_a(dropout(x + previous))


def block_hidden(x: torch.Tensor, factors_a: Sequence[torch.Tensor], dropout: Map) -> torch.Tensor:
    """Block shortcut, Eq. 3: the A_{n-k} D(x_n) side by side, `(..., sum of ranks)`; one mask for all of them."""
    return F.linear(dropout(x), torch.cat(list(factors_a)))


def whole_update_is_cheaper(rows: int, rank: int, ranks: int, in_features: int, out_features: int) -> bool:
    """Whether x (sum_k B_k A_k)^T takes fewer multiplications by the whole sum than by the factors side by side.

    Args:
        rows: of x.
        rank: of the term by which the sum of the layer before is extended.
        ranks: of all terms together.
    """
    return rows * (in_features + out_features) * ranks > in_features * out_features * (rows + rank)


def middle_hidden(projection: torch.Tensor, previous: Sequence[torch.Tensor]) -> torch.Tensor:
    """Middle shortcut, Eq. 4: sum_k A_{n-k} D(x_{n-k}); each term with the mask of its own layer."""
    for earlier in previous:
        projection = projection + earlier
    return projection


def annealed_hidden(
    hidden: torch.Tensor, projection: torch.Tensor, x: torch.Tensor, estimate: torch.Tensor, share: torch.Tensor
) -> torch.Tensor:
    """(1 - t) times the shortcut's `hidden` plus t times A_n x_n + E_n x_n, which is what a LoRA with A_n + E_n has.

    Args:
        hidden: `(..., r)`, of `input_hidden` or `middle_hidden`.
        projection: A_n x_n, `(..., r)`.
        x: x_n, `(..., in_features)`.
        estimate: E_n, `(r, in_features)`, constant.
        share: t, `()`; at 1 no trace of `hidden` is left.
    """
    return torch.lerp(hidden, projection + F.linear(x, estimate.to(x.dtype)), share.to(hidden.dtype))


class SharedSum:
    """x + previous, computed once for all layers that share both, such as query, key and value.

    One for each forward; holds the last sum until `forget`.
    """

    def __init__(self) -> None:
        self._last: tuple[Any, ...] | None = None

    def __call__(self, x: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        if x.is_inference():  # such tensors do not count their changes
            return x + previous
        last, state = self._last, (version_of(x), version_of(previous), torch.is_grad_enabled())
        if last is not None and last[0]() is x and last[1]() is previous and last[2] == state:
            return last[3]
        total = x + previous
        self._last = (weakref.ref(x), weakref.ref(previous), state, total)
        return total

    def forget(self) -> None:
        self._last = None


class ProjectedSum(torch.autograd.Function):
    """A `total`, where total = x + previous, saving x and previous in its place.

    Layers with a common input have in common what they save, then, and as much as in LoRA: their inputs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        total: torch.Tensor,
        x: torch.Tensor,
        previous: torch.Tensor,
        factor_a: torch.Tensor,
        sums: SharedSum | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, previous, factor_a)
        ctx.first_in_chain = previous is x
        ctx.sums = sums
        return F.linear(total, factor_a)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None, None, torch.Tensor | None, None]:
        x, previous, factor_a = ctx.saved_tensors
        grad_total = grad_a = None
        if ctx.needs_input_grad[0]:
            grad_total = (grad @ factor_a.to(grad.dtype)).to(x.dtype)
        if ctx.needs_input_grad[3]:
            # With a graph of the backward, the sum would hold what holds it.
            alone = ctx.sums is None or torch.is_grad_enabled()
            total = (x + previous if alone else ctx.sums(x, previous)).to(grad.dtype)
            grad_a = (_rows(grad).t() @ _rows(total)).to(factor_a.dtype)
        if ctx.first_in_chain and ctx.sums is not None:
            ctx.sums.forget()
        return grad_total, None, None, grad_a, None


def _rows(x: torch.Tensor) -> torch.Tensor:
    """`(..., n)` as `(rows, n)`."""
    return x.reshape(-1, x.shape[-1])


def add_update(result: torch.Tensor, hidden: torch.Tensor, factor_b: torch.Tensor, scaling: float) -> torch.Tensor:
    """result + scaling * hidden @ B.T, in one pass over the output where the dtypes allow it.

    Args:
        result: the base layer's output `(..., out_features)`.
        hidden: `(..., r)`.
        factor_b: B, `(out_features, r)`.
    """
    if result.dtype != hidden.dtype:
        return result + F.linear(hidden, factor_b) * scaling
    return torch.addmm(_rows(result), _rows(hidden), factor_b.t(), alpha=scaling).view(result.shape)
