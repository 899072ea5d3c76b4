"""The block of a convolution: s B A, with A a convolution as the base's and B a pointwise one, in the base's groups.

A kernel `(out, in / groups, *size)` is a matrix too, of what it makes of a patch: `(out, in / groups * positions)`. So
all that a merge knows of matrices holds for kernels as it is. Two forms of the factors are in use, equal but for
convolutions in groups:

    as held   A `(r, in / groups * positions)`,  B `(out, r / groups)`     for the forward pass
    spread    A `(r, in * positions)`,           B `(out, r)`              for merges: zeros between the groups

With groups, PEFT's own A (read in 0.21.2) mixes all channels, and its sum with the base has no kernel of the base's
shape: it cannot be merged. Here A keeps to the groups. PEFT's A also ignores the base's dilation and padding mode.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from peft_reslora.reslora.blocks.linear import Factors, LinearBlock, Term
from peft_reslora.shared.host import convolve


class ConvolutionBlock(LinearBlock):
    """One adapter's block on PEFT's LoRA layer over `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`."""

    __slots__ = ()
    is_linear = False

    @property
    def groups(self) -> int:
        return self.modules[1].groups

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        A, B = self._convolutions
        own = A.out_channels, A.in_channels // A.groups * math.prod(A.kernel_size)
        return own, (B.out_channels, B.in_channels // B.groups)

    @property
    def estimate_shape(self) -> tuple[int, int]:
        rank, columns = self.shapes[0]
        return rank, columns * self.groups

    @property
    def _convolutions(self) -> tuple[Any, Any]:
        return self.modules

    def start(self) -> None:
        """Let A be a convolution as the base's in all that PEFT's is not."""
        A, _ = self._convolutions
        base = self.layer.get_base_layer()
        same = base.groups == 1 and set(base.dilation) == {1} and base.padding_mode == "zeros"
        if same or A.groups == base.groups > 1:
            return
        own = type(base)(
            base.in_channels,
            A.out_channels,
            base.kernel_size,
            base.stride,
            base.padding,
            base.dilation,
            base.groups,
            bias=False,
            padding_mode=base.padding_mode,
            device=A.weight.device,
            dtype=A.weight.dtype,
        )
        if base.groups == 1:
            own.weight = A.weight
        elif self.layer.chain_of(self.adapter_name)[0].config.init_lora_weights == "gaussian":
            nn.init.normal_(own.weight, std=1 / A.out_channels)
        own.weight.requires_grad_(A.weight.requires_grad)
        self.layer.lora_A[self.adapter_name] = own

    def fold(self, A: torch.Tensor, B: torch.Tensor) -> Factors:
        A, B = super().fold(A, B)
        return A.flatten(1), B.flatten(1)

    def factors(self, name: str, advice: str) -> Factors:
        return spread(*super().factors(name, advice), self.groups)

    def set_rank(self, rank: int) -> None:
        A, B = self._convolutions
        A.out_channels = B.in_channels = rank

    def apply(self, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        return self.through_a(x, gather(matrix, self.groups).to(x.dtype))

    def through_a(self, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        return _convolve(self._convolutions[0], x, matrix)

    def through_b(self, hidden: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        return _convolve(self._convolutions[1], hidden, matrix)

    def by_channel(self, numbers: torch.Tensor) -> torch.Tensor:
        """`(n, 1, ...)`: channels come before positions."""
        return numbers.view(-1, *(1 for _ in self._convolutions[0].kernel_size))

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """A kernel `(out, in / groups, *size)` as `(out, in / groups * positions)`."""
        return weight.flatten(1)

    def side_by_side(self, terms: Sequence[Term]) -> Factors:
        """Group by group: the directions of a group stay together."""
        A = torch.cat([A.unflatten(0, (self.groups, -1)) for A, _, _ in terms], dim=1).flatten(0, 1)
        return A, torch.cat([B * s for _, B, s in terms], dim=1)

    def patches(self, x: torch.Tensor) -> torch.Tensor:
        A, _ = self._convolutions
        _, columns = self.shapes[0]
        identity = torch.eye(columns, dtype=x.dtype, device=x.device).repeat(A.groups, 1)
        return _convolve(A, x, identity).movedim(-len(A.kernel_size) - 1, -1)

    def expand_terms(self, x: torch.Tensor, terms: Sequence[Term], result: torch.Tensor) -> torch.Tensor:
        """Eq. 3, in one convolution by A's side by side and a pointwise one by B's."""
        A, B = self.side_by_side(terms)
        return result + self.through_b(self.through_a(self.dropout(x), A), B)

    def merged(self, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, in_place: bool) -> torch.Tensor:
        weight = weight if in_place else weight.clone()
        return weight.add_(self.layer.as_weight(self.delta(A, B)).to(weight.device))


def spread(A: torch.Tensor, B: torch.Tensor, groups: int) -> Factors:
    """The factors as held, with zeros between the groups: `(r, in * positions)` and `(out, r)`."""
    if groups == 1:
        return A, B
    return torch.block_diag(*A.chunk(groups)), torch.block_diag(*B.chunk(groups))


def gather(matrix: torch.Tensor, groups: int) -> torch.Tensor:
    """What of a matrix `(out, in * positions)` lies within the groups: `(out, in / groups * positions)`."""
    if groups == 1:
        return matrix
    rows, columns = matrix.shape
    blocks = matrix.view(groups, rows // groups, groups, columns // groups)
    return blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0).reshape(rows, columns // groups)


def columns(B: torch.Tensor, groups: int) -> torch.Tensor:
    """B as held, with a column for each direction, of the rows of its group: `(out / groups, r, ...)`."""
    return B.unflatten(0, (groups, -1)).transpose(0, 1).flatten(1, 2)


def from_columns(columns: torch.Tensor, groups: int) -> torch.Tensor:
    """B as held, `(out, r / groups, ...)`, of what `columns` gives."""
    return columns.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 1)


def weigh_columns(B: torch.Tensor, weights: torch.Tensor, groups: int) -> torch.Tensor:
    """The matrix B as held, times a number for each direction, `(r,)`."""
    return B * weights if groups == 1 else from_columns(columns(B, groups) * weights, groups)


def are_kernels(A: torch.Tensor, B: torch.Tensor) -> bool:
    """Whether they are kernels `(r, in / groups, *size)` and `(out, r / groups, 1, ...)`."""
    if A.ndim < 3 or A.ndim != B.ndim or 0 in B.shape or math.prod(B.shape[2:]) != 1:
        return False
    groups, left = divmod(A.shape[0], B.shape[1])
    return left == 0 and groups > 0 and B.shape[0] % groups == 0


def factors_of_kernels(A: torch.Tensor, B: torch.Tensor) -> Factors:
    """The factors, spread, of kernels `(r, in / groups, *size)` and `(out, r / groups, 1, ...)` as a file has them."""
    return spread(A.flatten(1), B.flatten(1), A.shape[0] // B.shape[1])


def _convolve(convolution: Any, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """A convolution as `convolution`, with the kernels `(any, in / groups * positions)`."""
    return convolve(convolution, x, matrix.unflatten(1, (-1, *convolution.kernel_size)))
