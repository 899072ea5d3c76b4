"""Sums that several layers need, computed once in a forward pass."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from peft_reslora.shared.host import version_of


class SharedSum:
    """x + previous, computed once for all layers that share both, such as query, key and value.

    One for each forward; holds the last sum until `forget`.
    """

    def __init__(self) -> None:
        self._last: tuple[Any, ...] | None = None

    def __call__(self, x: torch.Tensor, previous: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if x.is_inference():  # such tensors do not count their changes
            return wide_sum(x, previous, dtype)
        last, state = self._last, (version_of(x), version_of(previous), torch.is_grad_enabled(), dtype)
        if last is not None and last[0]() is x and last[1]() is previous and last[2] == state:
            return last[3]
        total = wide_sum(x, previous, dtype)
        self._last = (weakref.ref(x), weakref.ref(previous), state, total)
        return total

    def forget(self) -> None:
        self._last = None


def wide_sum(x: torch.Tensor, previous: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x + previous in their own precision, or in that of `dtype` if it is wider."""
    wide = torch.promote_types(x.dtype, dtype)
    return x.to(wide) + previous.to(wide)


def whole_update_is_cheaper(
    rows: int, rank: int, ranks: int, in_features: int, out_features: int, folded: bool = False
) -> bool:
    """Whether x (sum_k B_k A_k)^T takes fewer multiplications by the whole sum than by the factors side by side.

    Both have twice as many again in the backward pass, but for a sum that is `folded` into the base weight: that has
    the product for its own gradient, and no other with x or the output's gradient.

    Args:
        rows: of x.
        rank: of the term by which the sum of the layer before is extended.
        ranks: of all terms together.
    """
    products = rows if folded else 3 * rows
    return 3 * rows * (in_features + out_features) * ranks > in_features * out_features * (products + 3 * rank)
