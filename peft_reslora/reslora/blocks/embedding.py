"""The block of an embedding, for shortcut 'block': s B A, with A `(r, entries)` and B `(dimensions, r)`.

An embedding multiplies its weight, transposed, by an index x in one-hot form; so A x is a column of A. Indices cannot
be added up, as the shortcuts 'input' and 'middle' do with what layers get. As in PEFT, there is no dropout on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from peft_reslora.reslora.blocks.linear import Factors, LinearBlock, Term, add_update, readable
from peft_reslora.shared.offloading import held_tensor


class EmbeddingBlock(LinearBlock):
    """One adapter's block on PEFT's LoRA layer over `nn.Embedding`, whose factors are parameters without modules."""

    names: ClassVar[tuple[str, ...]] = ("lora_embedding_A", "lora_embedding_B")
    is_linear: ClassVar[bool] = False
    __slots__ = ()

    def __init__(self, layer: Any, adapter_name: str) -> None:
        self.layer, self.adapter_name, self.modules = layer, adapter_name, ()

    @property
    def transposed(self) -> bool:
        return True

    @property
    def weights(self) -> Factors:
        A, B = (getattr(self.layer, name)[self.adapter_name] for name in self.names)
        return A, B

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        (r, entries), (dimensions, _) = (weight.shape for weight in self.weights)
        return (r, entries), (dimensions, r)

    def tensors(self) -> dict[str, torch.Tensor]:
        return dict(zip(self.names, self.weights, strict=True))

    def factors(self, name: str, advice: str) -> Factors:
        held = (held_tensor(getattr(self.layer, factor), self.adapter_name) for factor in self.names)
        A, B = (readable(weight, name, advice).detach() for weight in held)
        return A, B

    def set_rank(self, rank: int) -> None:
        """There are no modules to say it."""

    def expand_terms(self, x: torch.Tensor, terms: Sequence[Term], result: torch.Tensor) -> torch.Tensor:
        """`result` plus the sum of the s_k B_k A_k[:, x]; what pads is no more trained than in the base."""
        padding = self.layer.get_base_layer().padding_idx
        hidden = F.embedding(x, torch.cat([A for A, _, _ in terms]).t(), padding)
        return add_update(result, hidden, torch.cat([B * s for _, B, s in terms], dim=1), 1.0)
