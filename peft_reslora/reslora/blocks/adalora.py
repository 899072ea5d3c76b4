"""The block of AdaLoRA (arXiv 2303.10512, Eq. 3): s B E A, with E diagonal and zero at the start.

A `(r, in_features)`, B `(out_features, r)` and E `(r, 1)`, of r = `init_r` directions, among which a budget is
allocated while they train (`rank_allocation.py`): those that matter least have E = 0 then. As in PEFT (0.21.2),
s = alpha / (init_r + 1e-5), whatever is pruned.

E stands next to B. So each shortcut (ResLoRA, arXiv 2402.18039) is that of a LoRA whose B is B E:

    input   s B E A (x_n + x_{n-1})                                                  Eq. 2
    block   the sum of the s_k B_k E_k A_k x_n of this layer and of earlier ones     Eq. 3
    middle  s B E (A_n x_n + A_{n-1} x_{n-1} + ...): what is handed on has no E      Eq. 4
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from peft_reslora.reslora.blocks.convolution import weigh_columns
from peft_reslora.reslora.blocks.linear import Factors, LinearBlock, readable
from peft_reslora.shared.offloading import held_tensor

SINGULAR_VALUES = "lora_E"  # PEFT's name
_STD = 0.02  # of A and B at the start, as in PEFT
_ADVICE = "Train AdaLoRA without sharding (DDP), or without total_step."


class AdaloraBlock(LinearBlock):
    """A LoRA block with a factor for each of its directions, by which directions can be pruned."""

    own_names: ClassVar[tuple[str, ...]] = (SINGULAR_VALUES,)
    __slots__ = ()

    @property
    def singular_values(self) -> nn.Parameter:
        """E `(r, 1)`."""
        return getattr(self.layer, SINGULAR_VALUES)[self.adapter_name]

    def start(self) -> None:
        """E is zero, and A and B normal; with init_lora_weights=False all three are standard normal, as in PEFT."""
        super().start()
        A, B = self.weights
        E = nn.Parameter(A.new_zeros(A.shape[0], 1), requires_grad=A.requires_grad)
        getattr(self.layer, SINGULAR_VALUES)[self.adapter_name] = E
        new = bool(self.layer.chain_of(self.adapter_name)[0].config.init_lora_weights)
        for factor in (A, B) if new else (A, B, E):
            nn.init.normal_(factor, std=_STD if new else 1.0)

    def tensors(self) -> dict[str, torch.Tensor]:
        return super().tensors() | {SINGULAR_VALUES: self.singular_values}

    def fold(self, A: torch.Tensor, B: torch.Tensor) -> Factors:
        """A and B E."""
        A, B = super().fold(A, B)
        return A, weigh_columns(B, self._readable_values(B), self.groups)

    def weigh(self, hidden: torch.Tensor) -> torch.Tensor:
        """E `hidden`."""
        return hidden * self.by_channel(self._readable_values(hidden))

    def resize(self, rank: int) -> Callable[[], None]:
        """Make room for another number of directions, without numbers; returns what undoes it."""
        A, B = self.weights
        before: tuple[Any, ...] = (A, B, self.singular_values)
        shapes = ((rank, *A.shape[1:]), (B.shape[0], rank // self.groups, *B.shape[2:]), (rank, 1))
        self._take(
            *(nn.Parameter(old.new_empty(shape), old.requires_grad) for old, shape in zip(before, shapes, strict=True))
        )
        return lambda: self._take(*before)

    def _take(self, A: nn.Parameter, B: nn.Parameter, E: nn.Parameter) -> None:
        self.hold(A, B)
        getattr(self.layer, SINGULAR_VALUES)[self.adapter_name] = E
        self.layer.r[self.adapter_name] = len(E)
        self.set_rank(len(E))

    def _readable_values(self, like: torch.Tensor) -> torch.Tensor:
        """The diagonal of E, `(r,)`, on the device and in the dtype of `like`."""
        E = held_tensor(getattr(self.layer, SINGULAR_VALUES), self.adapter_name)
        return readable(E, self.layer.layer_name, _ADVICE).to(like).flatten()
