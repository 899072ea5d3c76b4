"""Blocks: what an adapter holds on one layer, and what it computes from it. One file per form and per kind.

Only here are the names of PEFT's parameters known. A block is a view of one adapter on one layer; `LinearBlock` shows
what the shortcuts, the merge and the checkpoint ask of it.

The base layer decides the *form* of a block: how A and B multiply, and how their numbers stand. The config decides its
*kind*: what is trained besides A and B, and where it stands in the equation. Both are subclasses of `LinearBlock`, the
form of a linear layer and the kind of a LoRA. A kind says what it adds by `super()` and by what the forms have in
common (`by_channel`, `through_a`, `through_b`, `side_by_side`, `rows`, `groups`). So a block is a kind in front of a
form, and all combinations are made here: a new one of either is a class in a file of its own, and its line.
"""

from __future__ import annotations

import itertools
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

_Type = type[LinearBlock]

# The first whose condition the base layer meets, and the first whose condition the config meets.
FORMS: tuple[tuple[Callable[[nn.Module], bool], _Type], ...] = (
    (lambda base: isinstance(base, Convolution), ConvolutionBlock),
    (lambda base: isinstance(base, nn.Embedding), EmbeddingBlock),
    (lambda base: True, LinearBlock),
)
KINDS: tuple[tuple[Callable[[ResLoRAConfig], bool], _Type], ...] = (
    (lambda config: config.use_dora, DoraBlock),
    (lambda config: config.total_step is not None, AdaloraBlock),
    (lambda config: config.nested_ranks, NestedBlock),
    (lambda config: True, LinearBlock),
)


def _combined(kind: _Type, form: _Type) -> _Type:
    """The kind in front of the form: `AdaloraBlock` and `ConvolutionBlock` make `AdaloraConvolutionBlock`."""
    if issubclass(form, kind):
        return form
    if issubclass(kind, form):
        return kind
    name = kind.__name__.removesuffix("Block") + form.__name__
    return type(name, (kind, form), {"__slots__": (), "__module__": __name__, "__doc__": kind.__doc__})


_BLOCKS = {pair: _combined(*pair) for pair in itertools.product((k for _, k in KINDS), (f for _, f in FORMS))}
globals().update({block.__name__: block for block in _BLOCKS.values()})  # by which models that hold them are unpickled

# The attributes of a layer that hold what the blocks of any form and kind train.
PARAMETER_NAMES = tuple(
    dict.fromkeys(name for block in _BLOCKS.values() for name in (*block.factor_names, *block.own_names))
)


def block_kind(config: ResLoRAConfig, base_layer: nn.Module) -> type[LinearBlock]:
    """The class of the blocks that an adapter with this config has on layers such as the base layer."""
    kind = next(kind for takes, kind in KINDS if takes(config))
    return _BLOCKS[kind, next(form for takes, form in FORMS if takes(base_layer))]
