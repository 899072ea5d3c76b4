"""The block whose first b directions are an adapter of rank b, for each b: DyLoRA (arXiv 2210.07558).

A `(r, in_features)` and B `(out_features, r)` are those of a LoRA. With b directions in use, the first b rows of A and
columns of B take part, and the scaling is that of a LoRA of rank b with the same alpha:

    s_b B[:, :b] A[:b],    s_b = alpha / b, with rsLoRA alpha / sqrt(b)

The authors' code multiplies each factor by sqrt(r / b), and their product by alpha / r: alpha / b as well, and so is
LyCORIS' scaling with blocks of one direction. So what is cut off at b is a LoRA of rank b, and needs no other alpha.

The factors keep their shapes, so that torch.compile compiles once: each direction has a weight, s_b / s_r or zero. It
stands next to B, as AdaLoRA's E does, so that each shortcut (ResLoRA, arXiv 2402.18039) with b directions is that of
an adapter of rank b in all layers:

    input   s_b B[:, :b] A[:b] (x_n + x_{n-1})                                                 Eq. 2
    block   the sum of the s_b B_k[:, :b] A_k[:b] x_n of this layer and of earlier ones        Eq. 3
    middle  s_b B[:, :b] (A_n[:b] x_n + A_{n-1}[:b] x_{n-1} + ...)                             Eq. 4

All layers have the same b: 'middle' adds hidden states direction by direction, so that a layer with more directions in
use than the one before would be given those that are never trained together, and 'block' adds whole updates, which are
to be those of one adapter. A layer of a lower rank (rank_pattern) has all its directions from that rank on. In a
convolution each group has as many directions as any other (`first_numbers`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from peft_reslora.reslora.blocks.convolution import weigh_columns
from peft_reslora.reslora.blocks.linear import Factors, LinearBlock


@dataclass(frozen=True)
class Directions:
    """Which directions of a chain's layers are in use.

    Args:
        rank: b.
        weights: of each layer, `(r,)`: s_b / s_r for the first b directions, and zero.
        in_training_only: layers in evaluation mode, and merges, have all of them.
    """

    rank: int
    weights: list[torch.Tensor]
    in_training_only: bool


def first_numbers(rank: int, r: int, groups: int = 1) -> torch.Tensor:
    """The numbers of the directions, of r, that are in use at rank b: the first ones of each group.

    Where the groups of a convolution cannot share b, it has the next rank that they can.
    """
    return torch.arange(r).view(groups, -1)[:, : math.ceil(rank / groups)].flatten()


class NestedBlock(LinearBlock):
    """A LoRA block of which a forward pass may use the first directions only; merges and checkpoints have all."""

    __slots__ = ()

    def in_use(self, A: torch.Tensor, B: torch.Tensor) -> Factors:
        """A and B with a weight for each column."""
        A, B = super().in_use(A, B)
        weights = self._weights(B)
        return (A, B) if weights is None else (A, weigh_columns(B, weights, self.groups))

    def weigh(self, hidden: torch.Tensor) -> torch.Tensor:
        weights = self._weights(hidden)
        return hidden if weights is None else hidden * self.by_channel(weights)

    def _weights(self, like: torch.Tensor) -> torch.Tensor | None:
        """Those of the directions, on the device and in the dtype of `like`; None where all are in use.

        A checkpointed region that is computed again has those it had the first time.
        """
        chain, position = self.layer.chain_of(self.adapter_name)
        directions = chain.relay.as_before(chain.directions)
        if directions is None or (directions.in_training_only and not self.layer.training):
            return None
        return directions.weights[position].to(like)
