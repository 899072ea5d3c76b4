"""The block of DoRA (arXiv 2402.09353), for shortcut 'block'.

DoRA's Eq. 5 is h = m (W + U) x / ||W + U||, row by row, where m `(out_features,)` is trained, ||.|| is the norm of
each row, taken as a constant in the backward pass (its section 4.3), and U is the update: with shortcut 'block', the
sum of the s_k B_k A_k of this layer and of earlier ones (ResLoRA, Eq. 3). Under dropout D all of it acts on D(x), as
in PEFT: h = W x + m / ||W + U|| (W + U) D(x) - W D(x).

The shortcuts 'input' and 'middle' have no such U before they are merged, and so no norm: they are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from peft_reslora.reslora.blocks.linear import FACTOR_NAMES, LinearBlock, Term, is_inactive, readable
from peft_reslora.shared.offloading import held_tensor
from peft_reslora.shared.tensors import widen

_ADVICE = "Train with whole parameters on one device or under DDP, or without use_dora."
MAGNITUDE = "lora_magnitude"  # not PEFT's name, under which a plain DoRA would be loaded


class DoraBlock(LinearBlock):
    """A LoRA block whose sum with the base weight is scaled, row by row, to trained norms."""

    names: ClassVar[tuple[str, ...]] = (*FACTOR_NAMES, MAGNITUDE)
    adds_up: ClassVar[bool] = False
    __slots__ = ()

    @property
    def magnitude(self) -> nn.Parameter:
        """m `(out_features,)`."""
        return getattr(self.layer, MAGNITUDE)[self.adapter_name]

    def start(self) -> None:
        """m becomes the norm of each row of the base weight."""
        A, _ = self.weights
        norm = torch.linalg.vector_norm(widen(self._base_weight()), dim=1).to(A)
        getattr(self.layer, MAGNITUDE)[self.adapter_name] = nn.Parameter(norm, requires_grad=A.requires_grad)

    def tensors(self) -> dict[str, torch.Tensor]:
        return super().tensors() | {MAGNITUDE: self.magnitude}

    def expand_terms(self, x: torch.Tensor, terms: Sequence[Term], result: torch.Tensor) -> torch.Tensor:
        A, B = torch.cat([A for A, _, _ in terms]), torch.cat([B * s for _, B, s in terms], dim=1)
        weight, dropped = self._base_weight(), self.dropout(x)
        share = self._share(weight, A, B)
        if is_inactive(self.dropout):
            base_layer = self.layer.get_base_layer()
            base = result if base_layer.bias is None else result - held_tensor(base_layer, "bias").to(result.device)
        else:
            base = F.linear(dropped, weight.to(dropped.dtype))
        return result + (share - 1) * base + share * F.linear(F.linear(dropped, A), B)

    def delta(self, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        weight = widen(self._base_weight())
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
        if not _norm(self._base_weight(), A, B).all():
            raise ValueError(
                "a row of W + B A is zero, and PEFT's DoRA would divide by its norm; use merge_and_unload()"
            )
        return widen(self._held_magnitude(A).detach())

    def merged(self, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, in_place: bool) -> torch.Tensor:
        """m / ||W + B A|| (weight + B A), where W is the base weight without any adapter."""
        share = self._share(self._base_weight(), A, B).detach()
        left, right = (A.t(), B.t()) if self.layer.fan_in_fan_out else (B, A)
        share = share if self.layer.fan_in_fan_out else share[:, None]
        merged = (share * torch.addmm(weight.to(left), left, right)).to(weight)
        return weight.copy_(merged) if in_place else merged

    def _share(self, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        """m / ||W + B A|| of each row, `(out_features,)`; a row of zeros stays one."""
        norm = _norm(weight, A, B)
        return self._held_magnitude(norm) / torch.where(norm == 0, 1.0, norm)

    def _held_magnitude(self, like: torch.Tensor) -> torch.Tensor:
        """m on the device of `like`, also where accelerate keeps it elsewhere."""
        held = held_tensor(getattr(self.layer, MAGNITUDE), self.adapter_name)
        return readable(held, self.layer.layer_name, _ADVICE).to(like.device)

    def _base_weight(self) -> torch.Tensor:
        """W `(out_features, in_features)`, of a layer into which nothing is merged, or that knows what it was.

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


def _norm(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """||W + B A|| of each row, `(out_features,)`, as a constant."""
    with torch.no_grad(), torch.autocast(A.device.type, enabled=False):
        A, B = widen(A), widen(B)
        return torch.linalg.vector_norm(torch.addmm(weight.to(A), B, A), dim=1)
