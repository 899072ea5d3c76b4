"""Nested ranks during training: in each step all layers have so many directions as are drawn (DyLoRA, 2210.07558).

One b is drawn for each optimizer step, and all layers and all micro-batches that are accumulated into the step have
it: so a step's gradient is that of one adapter of rank b, as it is without accumulation, and directions from b on have
none, whatever the shortcut. Under Adam their momentum still moves them, and weight decay too, as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from peft_reslora.reslora.nested_ranks import nested_chains, set_rank


class NestedRanks(TrainerCallback):
    """Draws how many directions are in use while transformers' Trainer trains an adapter with nested_ranks=True.

    Trainer(model, ..., callbacks=[NestedRanks()])

    Between steps, as in evaluation and in what is saved, all directions are in use. The rank of a step follows from
    the seed and the step's number alone: so the processes of a distributed run draw the same, and a resumed run draws
    what it would have drawn.

    Args:
        ranks: those that are drawn from, each as often as the others; all from 1 to the largest of the layers if None.
        seed: of the draws.
        adapter_name: the adapter.
        last_direction_only: train direction b alone, and use those before it as they are: the paper's cheaper variant.

    Raises:
        ValueError: for `ranks` that are no positive integers.
    """

    def __init__(
        self,
        ranks: Sequence[int] | None = None,
        seed: int = 0,
        adapter_name: str = "default",
        last_direction_only: bool = False,
    ) -> None:
        if ranks is not None and (not ranks or any(type(rank) is not int or rank < 1 for rank in ranks)):
            raise ValueError(f"ranks={ranks!r} must be positive integers, one or more, or None for all.")
        self.ranks = ranks
        self.seed = seed
        self.adapter_name = adapter_name
        self.last_direction_only = last_direction_only
        self._drawn: list[int] = []
        self._only: OneDirection | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raises ValueError if the adapter has no nested ranks, or none of its layers has the largest rank."""
        self.on_train_end(args, state, control, **kwargs)
        model = kwargs["model"]
        layers = [layer for chain in nested_chains(model, self.adapter_name) for layer in chain.layers]
        largest = max(layer.r[self.adapter_name] for layer in layers)
        self._drawn = list(range(1, largest + 1) if self.ranks is None else self.ranks)
        if max(self._drawn) > largest:
            raise ValueError(f"ranks={self.ranks!r} has a rank above {largest}, which no layer of the adapter has.")
        if self.last_direction_only:
            self._only = OneDirection(model, self.adapter_name)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rank = draw_rank(self._drawn, self.seed, state.global_step)
        set_rank(kwargs["model"], rank, self.adapter_name, in_training_only=True)
        if self._only is not None:
            self._only.set(rank)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        set_rank(kwargs["model"], None, self.adapter_name)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        set_rank(kwargs["model"], None, self.adapter_name)
        if self._only is not None:
            self._only.remove()
        self._only = None


def draw_rank(ranks: Sequence[int], seed: int, step: int) -> int:
    """The rank of a step: the same in every process, on every machine, whatever has been drawn before."""
    return Random(f"{seed}, {step}").choice(ranks)  # a text is seeded by its SHA-512


class OneDirection:
    """Lets the factors of an adapter with nested ranks have a gradient in one direction only.

    That of the others is dropped where autograd adds it up: before it is averaged over processes, or clipped.

    Args:
        model: holds the adapter.
        adapter_name: which one.

    Raises:
        ValueError: if it has no nested ranks.
    """

    def __init__(self, model: torch.nn.Module, adapter_name: str = "default") -> None:
        self.rank = 1
        self._handles: list[RemovableHandle] = []
        for layer in (layer for chain in nested_chains(model, adapter_name) for layer in chain.layers):
            for dim, factor in enumerate(layer.block_of(adapter_name).weights):
                self._handles.append(factor.register_hook(lambda grad, dim=dim: self._keep(grad, dim)))

    def set(self, rank: int) -> None:
        """From now on, direction `rank` has a gradient; in layers of a lower rank their last."""
        self.rank = rank

    def remove(self) -> None:
        """All directions have their gradients again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _keep(self, grad: torch.Tensor, dim: int) -> torch.Tensor:
        kept = torch.zeros_like(grad)
        last = min(self.rank, grad.shape[dim]) - 1
        kept.select(dim, last).copy_(grad.select(dim, last))
        return kept
