"""The block of an embedding, for shortcut 'block': s B A, with A `(r, entries)` and B `(dimensions, r)`.

An embedding multiplies its weight, transposed, by an index x in one-hot form; so A x is a column of A. Indices cannot
be added up, as the shortcuts 'input' and 'middle' do with what layers get. As in PEFT, there is no dropout on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from peft_reslora.reslora.blocks.linear import Factors, LinearBlock, Term, add_update
from peft_reslora.shared.offloading import held_tensor


class EmbeddingBlock(LinearBlock):
    """One adapter's block on PEFT's LoRA layer over `nn.Embedding`, whose factors are parameters without modules."""

    factor_names: ClassVar[tuple[str, str]] = ("lora_embedding_A", "lora_embedding_B")
    is_linear: ClassVar[bool] = False
    __slots__ = ()

    def __init__(self, layer: Any, adapter_name: str) -> None:
        self.layer, self.adapter_name, self.modules = layer, adapter_name, ()

    @property
    def transposed(self) -> bool:
        return True

    @property
    def dropout(self) -> nn.Module:
        return nn.Identity()

    @property
    def weights(self) -> Factors:
        A, B = (getattr(self.layer, name)[self.adapter_name] for name in self.factor_names)
        return A, B

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        (r, entries), (dimensions, _) = (weight.shape for weight in self.weights)
        return (r, entries), (dimensions, r)

    def hold(self, A: nn.Parameter, B: nn.Parameter) -> None:
        for name, parameter in zip(self.factor_names, (A, B), strict=True):
            getattr(self.layer, name)[self.adapter_name] = parameter

    def held(self) -> tuple[torch.Tensor, ...]:
        return tuple(held_tensor(getattr(self.layer, name), self.adapter_name) for name in self.factor_names)

    def set_rank(self, rank: int) -> None:
        """There are no modules to say it."""

    def through_a(self, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """The columns of the indices; what pads is no more trained than in the base, and gradients are scaled as
        there."""
        base = self.layer.get_base_layer()
        return F.embedding(x, matrix.t(), base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)

    def expand_terms(self, x: torch.Tensor, terms: Sequence[Term], result: torch.Tensor) -> torch.Tensor:
        """`result` plus the sum of the s_k B_k A_k[:, x]."""
        A, B = self.side_by_side(terms)
        return add_update(result, self.through_a(x, A), B, 1.0)
