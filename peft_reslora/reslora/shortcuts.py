"""The three shortcuts of ResLoRA (arXiv 2402.18039) as functions of tensors.

Notation: layer n of a chain has input x_n `(..., in_features)`, factors A_n `(r, in_features)` and
B_n `(out_features, r)`, scaling s_n, and dropout D. Each function returns the hidden state `(..., r)` and is followed
by `add_update`, which multiplies by B and adds to the base layer's output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

Map = Callable[[torch.Tensor], torch.Tensor]


def input_hidden(x: torch.Tensor, previous: torch.Tensor, dropout: Map, lora_a: Map) -> torch.Tensor:
    """Input shortcut, Eq. 2: A_n D(x_n + x_{n-1}); one dropout mask, on the sum."""
    return lora_a(dropout(x + previous))


def block_hidden(x: torch.Tensor, factors_a: Sequence[torch.Tensor], dropout: Map) -> torch.Tensor:
    """Block shortcut, Eq. 3: the A_{n-k} D(x_n) side by side, `(..., sum of ranks)`; one mask for all of them."""
    return F.linear(dropout(x), torch.cat(list(factors_a)))


def middle_hidden(projection: torch.Tensor, previous: Sequence[torch.Tensor]) -> torch.Tensor:
    """Middle shortcut, Eq. 4: sum_k A_{n-k} D(x_{n-k}); each term with the mask of its own layer."""
    for earlier in previous:
        projection = projection + earlier
    return projection


def annealed_hidden(hidden: torch.Tensor, fitted: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """(1 - t) times the shortcut's `hidden` plus t times what a LoRA with A_n + C_n has.

    Args:
        hidden: `(..., r)`, of `input_hidden` or `middle_hidden`.
        fitted: A_n x_n + C_n x_n, `(..., r)`; C_n is constant.
        share: t, `()`; at 1 no trace of `hidden` is left.
    """
    return torch.lerp(hidden, fitted, share.to(hidden.dtype))
