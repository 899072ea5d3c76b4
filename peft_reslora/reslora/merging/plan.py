"""The plan of a merge: what one chain's merge needs of all its layers, as a value, before any of them is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from peft_reslora.reslora.config import ResLoRAConfig
from peft_reslora.reslora.merging.estimators import (
    Block,
    Exactness,
    blocks_from_state_dict,
    chains_of_blocks,
    exactness,
    first_directions,
    merged_factors,
    shortcut_coefficients,
    shortcut_estimate,
)


@dataclass(frozen=True)
class ChainMerge:
    """How one chain merges, computed once: for whoever merges, exports or reports it.

    Args:
        blocks: the chain's layers.
        config: the adapter's config.
        coefficients: by layer, those of `shortcut_coefficients`.
        exactness: by layer, whether its merge is exact, and why.
    """

    blocks: Sequence[Block]
    config: ResLoRAConfig
    coefficients: Sequence[Sequence[float]]
    exactness: Sequence[Exactness]

    @classmethod
    def of(cls, blocks: Sequence[Block], config: ResLoRAConfig) -> ChainMerge:
        """Reads each base weight at most once.

        Raises:
            ValueError: as `shortcut_coefficients`.
        """
        exact = [exactness(blocks, position, config) for position in range(len(blocks))]
        return cls(blocks, config, shortcut_coefficients(blocks, config), exact)

    def truncated(self, rank: int) -> ChainMerge:
        """Of an adapter with nested ranks, the merge of the adapter of this rank that it holds; this one, if no block
        has more directions.

        Raises:
            ValueError: as `shortcut_coefficients`.
        """
        parts = [first_directions(block, rank, self.config) for block in self.blocks]
        if all(part is block for part, block in zip(parts, self.blocks, strict=True)):
            return self
        return ChainMerge.of(parts, self.config)

    def factors(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`(A (R, in_features), B (out_features, R))` of one layer, scaling included."""
        return merged_factors(self.blocks, position, self.config, self.coefficients[position])

    def estimate(self, position: int) -> torch.Tensor:
        """E_n `(r, in_features)` of one layer, whose shortcut is 'input' or 'middle'."""
        return shortcut_estimate(self.blocks, position, self.config, self.coefficients[position])


def merges_from_state_dict(
    config: ResLoRAConfig, state_dict: Mapping[str, torch.Tensor]
) -> dict[str, tuple[ChainMerge, int]]:
    """Of every layer of a saved adapter how its chain merges, and its position in it; from the adapter's files alone.

    Args:
        config: the adapter's config.
        state_dict: the content of `adapter_model.safetensors`.

    Returns:
        By the layer's path in the base model, in the order of the file.

    Raises:
        ValueError: if a factor is missing or misshapen, or if the estimator needs the base model.
    """
    blocks = blocks_from_state_dict(config, state_dict)
    places = {}
    for chain in chains_of_blocks(config, blocks).chains:
        merge = ChainMerge.of([blocks[target.name] for target in chain], config)
        places.update({block.name: (merge, position) for position, block in enumerate(merge.blocks)})
    return {name: places[name] for name in blocks}
