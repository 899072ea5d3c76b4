"""Block kinds: what an adapter holds on one layer, and what it computes from it. One file per kind.

Only here are the names of PEFT's parameters known. A block is a view of one adapter on one layer; `LinearBlock` shows
what the shortcuts, the merge and the checkpoint ask of it. A new kind is a class with the same methods, in a file of
its own, and its line in `KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable

from peft_reslora.reslora.blocks.adalora import AdaloraBlock
from peft_reslora.reslora.blocks.dora import DoraBlock
from peft_reslora.reslora.blocks.linear import LinearBlock
from peft_reslora.reslora.blocks.nested import NestedBlock
from peft_reslora.reslora.config import ResLoRAConfig

# The first kind whose condition a config meets.
KINDS: tuple[tuple[Callable[[ResLoRAConfig], bool], type[LinearBlock]], ...] = (
    (lambda config: config.use_dora, DoraBlock),
    (lambda config: config.total_step is not None, AdaloraBlock),
    (lambda config: config.nested_ranks, NestedBlock),
    (lambda config: True, LinearBlock),
)

# The attributes of a layer that hold what the blocks of any kind train.
PARAMETER_NAMES = tuple(dict.fromkeys(name for _, kind in KINDS for name in kind.names))


def block_kind(config: ResLoRAConfig) -> type[LinearBlock]:
    """The kind of blocks that an adapter with this config has."""
    return next(kind for takes, kind in KINDS if takes(config))
