"""The block of a parameter that holds the weights of several experts: s B^e A^e for each expert e.

As PEFT (0.21.2) has it for `target_parameters`: the factors of all experts stand in two matrices. Their layout is
known here alone. Two forms are in use:

    as held   A `(experts * r, in)`, expert by expert    B `(out, r * experts)`, direction by direction
    folded    A `(r, experts, in)`                       B `(out, r, experts)`

Folded, the factors of several layers go side by side as matrices do: by the first dimension of A and the second of B.
A parameter with two dimensions is that of one expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from peft_reslora.reslora.blocks.linear import Factors, LinearBlock, Term
from peft_reslora.shared.host import is_transposed_parameter


class ExpertsBlock(LinearBlock):
    """One adapter's block on PEFT's LoRA layer over a parameter."""

    is_linear: ClassVar[bool] = False
    __slots__ = ()

    @property
    def transposed(self) -> bool:
        """Whether the parameter is `(in, out)` for each expert."""
        return is_transposed_parameter(self.layer)

    @property
    def experts(self) -> int:
        return self.layer.num_experts

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        A, B = self.modules
        r = A.out_features // self.experts
        return (r, self.experts, A.in_features), (B.out_features, r, self.experts)

    def fold(self, A: torch.Tensor, B: torch.Tensor) -> Factors:
        return folded(A, B, self.experts)

    def side_by_side(self, terms: Sequence[Term]) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Eq. 3 for each expert: L, R and s with s L R the sum of the s_k B_k^e A_k^e, as the parameter holds it.

        L is `(experts, out, R)` and R `(experts, R, in)`; where the parameter is transposed, `(experts, in, R)` and
        `(experts, R, out)`.
        """
        common = terms[0][2] if len({s for _, _, s in terms}) == 1 else 1.0
        A = torch.cat([A for A, _, _ in terms]).transpose(0, 1)
        B = torch.cat([B if s == common else B * s for _, B, s in terms], dim=1).permute(2, 0, 1)
        return (A.mT, B.mT, common) if self.transposed else (B, A, common)

    def delta(self, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        """What merging the folded factors, scaling included, adds: `(experts, out, in)`."""
        return B.permute(2, 0, 1) @ A.transpose(0, 1)

    def largest_entry(self, A: torch.Tensor, B: torch.Tensor) -> float:
        rows = torch.linalg.vector_norm(B, dim=1).amax(dim=0)  # of each expert
        columns = torch.linalg.vector_norm(A, dim=0).amax(dim=1)
        return float((rows * columns).max())

    def merged(self, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, in_place: bool) -> torch.Tensor:
        """`weight`, as the parameter holds it, plus the merged update; one expert after the other, for the memory."""
        weight = weight if in_place else weight.clone()
        experts = weight if weight.ndim == 3 else weight.unsqueeze(0)
        for own, a, b in zip(experts, A.unbind(1), B.unbind(2), strict=True):
            super().merged(own, a, b, in_place=True)
        return weight


def folded(A: torch.Tensor, B: torch.Tensor, experts: int) -> Factors:
    """The factors, of those as held."""
    return A.unflatten(0, (experts, -1)).transpose(0, 1), B.unflatten(1, (-1, experts))


def as_held(A: torch.Tensor, B: torch.Tensor) -> Factors:
    """The factors as PEFT holds them, of those that are folded."""
    return A.transpose(0, 1).flatten(0, 1), B.flatten(1)
