"""Block kinds: what an adapter holds on one layer, and what it computes from it. One file per kind.

Only here are the names of PEFT's parameters known. A block is a view of one adapter on one layer; `LinearBlock` shows
what the shortcuts, the merge and the checkpoint ask of it. The config and the layer choose a kind. A new one is a
class with the same methods, in a file of its own, and its line in `KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from peft_reslora.reslora.blocks.adalora import AdaloraBlock
from peft_reslora.reslora.blocks.convolution import ConvolutionBlock
from peft_reslora.reslora.blocks.dora import DoraBlock
from peft_reslora.reslora.blocks.embedding import EmbeddingBlock
from peft_reslora.reslora.blocks.linear import LinearBlock
from peft_reslora.reslora.blocks.nested import NestedBlock
from peft_reslora.reslora.config import ResLoRAConfig
from peft_reslora.shared.host import Convolution

# The first kind whose condition a config and the base layer meet.
KINDS: tuple[tuple[Callable[[ResLoRAConfig, nn.Module], bool], type[LinearBlock]], ...] = (
    (lambda config, base: isinstance(base, Convolution), ConvolutionBlock),
    (lambda config, base: isinstance(base, nn.Embedding), EmbeddingBlock),
    (lambda config, base: config.use_dora, DoraBlock),
    (lambda config, base: config.total_step is not None, AdaloraBlock),
    (lambda config, base: config.nested_ranks, NestedBlock),
    (lambda config, base: True, LinearBlock),
)

# The attributes of a layer that hold what the blocks of any kind train.
PARAMETER_NAMES = tuple(dict.fromkeys(name for _, kind in KINDS for name in kind.names))


def block_kind(config: ResLoRAConfig, base_layer: nn.Module) -> type[LinearBlock]:
    """The kind of blocks that an adapter with this config has on layers such as the base layer."""
    return next(kind for takes, kind in KINDS if takes(config, base_layer))
