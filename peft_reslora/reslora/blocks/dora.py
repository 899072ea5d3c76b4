"""The block of DoRA (arXiv 2402.09353), for shortcut 'block'.

DoRA's Eq. 5 is h = m (W + U) x / ||W + U||, row by row, where m `(out_features,)` is trained, ||.|| is the norm of
each row (of a convolution, of the kernel of each output channel), taken as a constant in the backward pass (its
section 4.3), and U is the update: with shortcut 'block', the sum of the s_k B_k A_k of this layer and of earlier ones
(ResLoRA, Eq. 3). Under dropout D all of it acts on D(x), as in PEFT: h = W x + m / ||W + U|| (W + U) D(x) - W D(x).

The shortcuts 'input' and 'middle' have no such U before they are merged, and so no norm: they are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from peft_reslora.reslora.blocks.linear import LinearBlock, Term, is_inactive, readable
from peft_reslora.shared.offloading import held_tensor
from peft_reslora.shared.tensors import widen

_ADVICE = "Train with whole parameters on one device or under DDP, or without use_dora."
MAGNITUDE = "lora_magnitude"  # not PEFT's name, under which a plain DoRA would be loaded


class DoraBlock(LinearBlock):
    """A LoRA block whose sum with the base weight is scaled, row by row, to trained norms."""

    own_names: ClassVar[tuple[str, ...]] = (MAGNITUDE,)
    adds_up: ClassVar[bool] = False
    __slots__ = ()

    @property
    def magnitude(self) -> nn.Parameter:
        """m `(out_features,)`."""
        return getattr(self.layer, MAGNITUDE)[self.adapter_name]

    def start(self) -> None:
        """m becomes the norm of each row of the base weight."""
        super().start()
        A, _ = self.weights
        norm = torch.linalg.vector_norm(widen(self.rows(self._base_weight())), dim=1).to(A)
        getattr(self.layer, MAGNITUDE)[self.adapter_name] = nn.Parameter(norm, requires_grad=A.requires_grad)

    def tensors(self) -> dict[str, torch.Tensor]:
        return super().tensors() | {MAGNITUDE: self.magnitude}

    def expand_terms(self, x: torch.Tensor, terms: Sequence[Term], result: torch.Tensor) -> torch.Tensor:
        (A, B), W = self.side_by_side(terms), self.rows(self._base_weight())
        share, dropped = self.by_channel(self._share(W, A, B, self.groups)), self.dropout(x)
        if is_inactive(self.dropout):
            base_layer = self.layer.get_base_layer()
            has_bias = getattr(base_layer, "bias", None) is not None
            bias = held_tensor(base_layer, "bias").to(result.device) if has_bias else None
            base = result if bias is None else result - self.by_channel(bias)
        else:
            base = self.through_a(dropped, W.to(dropped.dtype))
        return result + (share - 1) * base + share * self.through_b(self.through_a(dropped, A), B)

    def delta(self, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        weight = widen(self.layer.as_matrix(self._base_weight()))
        share = self._share(weight, A, B).detach()
        return share[:, None] * torch.addmm(weight.to(B), B, A) - weight.to(B)

    def largest_entry(self, A: torch.Tensor, B: torch.Tensor) -> float:
        # The norm of a row of the merged weight is its m, whatever the factors are; unless they are no numbers.
        merged = float(self._held_magnitude(A).detach().abs().max()) + 0.0 * super().largest_entry(A, B)
        return merged + float(self._base_weight().abs().max())

    def magnitude_for_peft(self, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        """m `(out_features,)` for PEFT's DoRA with the factors `A` and `B`.

        Raises:
            ValueError: if a row of the merged weight is zero: PEFT divides by its norm (0.21.2).
        """
        if not _norm(self.layer.as_matrix(self._base_weight()), A, B).all():
            raise ValueError(
                "a row of W + B A is zero, and PEFT's DoRA would divide by its norm; use merge_and_unload()"
            )
        return widen(self._held_magnitude(A).detach())

    def merged(self, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, in_place: bool) -> torch.Tensor:
        """m / ||W + B A|| (weight + B A), where W is the base weight without any adapter."""
        share = self._share(self.layer.as_matrix(self._base_weight()), A, B).detach()
        merged = share[:, None] * torch.addmm(self.layer.as_matrix(weight).to(B), B, A)
        return (weight if in_place else torch.empty_like(weight)).copy_(self.layer.as_weight(merged))

    def _share(self, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, groups: int = 1) -> torch.Tensor:
        """m / ||W + B A|| of each row, `(out_features,)`; a row of zeros stays one."""
        norm = _norm(weight, A, B, groups)
        return self._held_magnitude(norm) / torch.where(norm == 0, 1.0, norm)

    def _held_magnitude(self, like: torch.Tensor) -> torch.Tensor:
        """m on the device of `like`, also where accelerate keeps it elsewhere."""
        held = held_tensor(getattr(self.layer, MAGNITUDE), self.adapter_name)
        return readable(held, self.layer.layer_name, _ADVICE).to(like.device)

    def _base_weight(self) -> torch.Tensor:
        """W, in its own orientation, of a layer into which nothing is merged, or that knows what it was.

        Raises:
            RuntimeError: if it is not all here.
        """
        weight = self.layer.frozen_weight()
        if isinstance(weight, DTensor) or weight.numel() == 0:
            raise RuntimeError(
                f"use_dora=True needs the norms of the base weight of layer {self.layer.layer_name!r}, which is "
                "sharded. Train without sharding the base model (DDP, ZeRO-2), or without use_dora."
            )
        return weight


def _norm(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, groups: int = 1) -> torch.Tensor:
    """||W + B A|| of each row, `(out_features,)`, as a constant; in groups, of matrices as held."""
    with torch.no_grad(), torch.autocast(A.device.type, enabled=False):
        A, B = widen(A), widen(B)
        W, B, A = (matrix.to(A).unflatten(0, (groups, -1)) for matrix in (weight, B, A))
        return torch.linalg.vector_norm(torch.baddbmm(W, B, A), dim=2).flatten()
