"""Nested ranks in a model: how many of the directions of an adapter are in use (`blocks/nested.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from peft_reslora.reslora.blocks.nested import Directions, first_numbers
from peft_reslora.reslora.linked_chain import Chain
from peft_reslora.reslora.linking import chains_of
from peft_reslora.shared.patterns import scaling_of


def set_rank(
    model: nn.Module, rank: int | None, adapter_name: str = "default", *, in_training_only: bool = False
) -> None:
    """Let an adapter be that of rank `rank` which it holds; for training loops other than the Trainer's.

    Backward passes, checkpointed or not, are those of the forward pass that they belong to, whatever is set between.

    Args:
        model: holds the adapter.
        rank: how many of each layer's directions are in use, at most all of them; None for all.
        adapter_name: an adapter with nested_ranks=True.
        in_training_only: leave evaluation and merges with all directions, also where a step broke off.

    Raises:
        ValueError: for an adapter without nested ranks, or a rank below 1.
    """
    chains = nested_chains(model, adapter_name)
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank={rank!r} must be a positive integer, or None for all directions.")
    for chain in chains:
        chain.directions = None if rank is None else _directions(chain, rank, in_training_only)


@contextmanager
def rank_in_use(model: nn.Module, rank: int, adapter_name: str = "default") -> Iterator[None]:
    """Let an adapter be that of rank `rank` which it holds, in forward passes and merges.

    Args:
        model, rank, adapter_name: as for `set_rank`.

    Raises:
        ValueError: as `set_rank`.
    """
    before = [(chain, chain.directions) for chain in nested_chains(model, adapter_name)]
    set_rank(model, rank, adapter_name)
    try:
        yield
    finally:
        for chain, directions in before:
            chain.directions = directions


def nested_chains(model: nn.Module, adapter_name: str) -> list[Chain]:
    """The chains of an adapter with nested ranks.

    Raises:
        ValueError: if it is none.
    """
    chains = chains_of(model, adapter_name)
    if not chains or not chains[0].config.nested_ranks:
        raise ValueError(
            f"Adapter {adapter_name!r} is no ResLoRA adapter with nested_ranks=True, whose first directions would be "
            "an adapter by themselves. Make it with ResLoRAConfig(nested_ranks=True)."
        )
    return chains


def _directions(chain: Chain, rank: int, in_training_only: bool) -> Directions:
    """Those of a chain's layers, where the factors are."""
    weights: dict[tuple[int, int, torch.device, torch.dtype], torch.Tensor] = {}
    found = []
    for layer in chain.layers:
        block, r = layer.block_of(chain.adapter_name), layer.r[chain.adapter_name]
        A, _ = block.weights
        key = r, block.groups, A.device, A.dtype
        if key not in weights:
            first = first_numbers(rank, r, block.groups)
            share = scaling_of(chain.config, len(first), 1.0) / scaling_of(chain.config, r, 1.0)
            weights[key] = torch.zeros(r, dtype=A.dtype, device="cpu" if A.is_meta else A.device)
            weights[key][first] = share
        found.append(weights[key])
    return Directions(rank, found, in_training_only)
