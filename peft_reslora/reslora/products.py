"""Products with the two thin factors of an update, in the order and the precision in which they cost least.

Beside rows and features a rank is small. The products of BLAS are several times faster there with the long side last,
A `(r, n)` times x^T `(n, rows)`, than the other way round, and so are those of the backward pass, of which autograd
would choose the slow ones. So a hidden state is computed as `(r, rows)`, and seen as `(..., r)`.

An input in half precision beside factors in float32 is saved as it is, and cast where it is multiplied, in the forward
and again in the backward pass: the numbers are those of PEFT's LoRA, which saves a copy in float32 for each layer.
Under autocast all is computed in its precision, as torch's own products are. Each result is rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

HALVES = (torch.bfloat16, torch.float16)
_LARGE = 2**16  # elements, whose products take about as long as the Python of a Function


def working_dtype(x: torch.Tensor, factor: torch.Tensor) -> torch.dtype:
    """In which x and a factor are multiplied: autocast's, where it is on, or the wider of theirs."""
    if autocasts(x) and factor.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return torch.promote_types(x.dtype, factor.dtype)


def autocasts(x: torch.Tensor) -> bool:
    """Whether autocast is on where x is; some devices, such as meta, have none."""
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def project(x: torch.Tensor, factors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """A x, `(..., r)`, for each of the factors A `(r, in_features)`; x, `(..., in_features)`, is read once."""
    dtype = working_dtype(x, factors[0])
    if _is_worth_it(x):
        return Projected.apply(x, dtype, *factors)
    x = x.to(dtype)
    return tuple(F.linear(x, A.to(dtype)) for A in factors)


def expand(result: torch.Tensor, hidden: torch.Tensor, factor_b: torch.Tensor, scaling: float) -> torch.Tensor:
    """result + s B hidden, in the dtype of `result` `(..., out_features)`.

    Args:
        hidden: `(..., r)`, in the dtype of `result` or a wider one.
        factor_b: B, `(out_features, r)`.
    """
    rows, left = rows_of(result), rows_of(hidden)
    if _is_worth_it(result):  # seen in its shape out here: a view that a Function returns cannot be changed in place
        return Expanded.apply(rows, left, factor_b, scaling).view(result.shape)
    return _expand(rows, left, factor_b, scaling).view(result.shape)


def _is_worth_it(x: torch.Tensor) -> bool:
    """Whether a Function, whose backward is Python, takes less time than it saves: on large tensors, in training."""
    return torch.is_grad_enabled() and x.numel() >= _LARGE


class Projected(torch.autograd.Function):
    """`project`; saves x in its own precision."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dtype: torch.dtype, *factors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(x, *factors)
        return _project(x, dtype, factors)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *factors = ctx.saved_tensors
        needs_x, _, *needs_factors = ctx.needs_input_grad
        grad = _side_by_side([rows_of(part).t() for part in grads])
        grad_x: torch.Tensor | None = None
        grad_factors: list[torch.Tensor | None] = [None] * len(factors)
        if needs_x:
            grad_x = (grad.t() @ _side_by_side(factors).to(grad.dtype)).to(x.dtype).view(x.shape)
        if any(needs_factors):
            whole = grad @ rows_of(x).to(grad.dtype)
            parts = whole.split([A.shape[0] for A in factors]) if len(factors) > 1 else (whole,)
            grad_factors = [part.to(A.dtype) for part, A in zip(parts, factors, strict=True)]
        return grad_x, None, *grad_factors


class Expanded(torch.autograd.Function):
    """`expand`, of rows."""

    @staticmethod
    def forward(
        ctx: Any, result: torch.Tensor, hidden: torch.Tensor, factor_b: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, factor_b)
        ctx.scaling = scaling
        return _expand(result, hidden, factor_b, scaling)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, factor_b = ctx.saved_tensors
        rows = grad.to(hidden.dtype)
        grad_hidden = grad_b = None
        if ctx.needs_input_grad[1]:
            grad_hidden = ((factor_b.to(hidden.dtype).t() @ rows.t()) * ctx.scaling).t()
        if ctx.needs_input_grad[2]:
            grad_b = ((hidden.t() @ rows) * ctx.scaling).t().to(factor_b.dtype)
        return grad, grad_hidden, grad_b, None


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """`(..., n)` as `(rows, n)`."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _project(x: torch.Tensor, dtype: torch.dtype, factors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    hidden = _side_by_side(factors).to(dtype) @ rows_of(x).to(dtype).t()  # (sum of r, rows)
    parts = hidden.split([A.shape[0] for A in factors]) if len(factors) > 1 else (hidden,)
    return tuple(part.t().view(*x.shape[:-1], part.shape[0]) for part in parts)


def _expand(rows: torch.Tensor, left: torch.Tensor, factor_b: torch.Tensor, scaling: float) -> torch.Tensor:
    right = factor_b.to(left.dtype).t()
    if rows.dtype == left.dtype:
        return torch.addmm(rows, left, right, alpha=scaling)
    return rows.to(left.dtype).addmm_(left, right, alpha=scaling).to(rows.dtype)


def _side_by_side(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
