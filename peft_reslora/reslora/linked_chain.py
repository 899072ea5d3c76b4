"""`Chain`: the layers of one chain of one adapter, as they stand in the model."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from peft_reslora.reslora.blocks import LinearBlock, block_kind
from peft_reslora.reslora.blocks.nested import Directions
from peft_reslora.reslora.chain_table import reach
from peft_reslora.reslora.config import ResLoRAConfig
from peft_reslora.reslora.merging.estimators import Block, check_finite
from peft_reslora.reslora.merging.plan import ChainMerge
from peft_reslora.reslora.passes import Doorway
from peft_reslora.reslora.relay import Relay
from peft_reslora.shared.host import BufferDict
from peft_reslora.shared.tensors import stored


class ChainedLayer(Protocol):
    """What a chain asks of its layers."""

    r: dict[str, int]
    own_kind: ClassVar[type[LinearBlock] | None]
    lora_norm: BufferDict
    lora_shortcut: BufferDict
    lora_calibrated: BufferDict
    lora_annealed: BufferDict

    def check_loaded(self, adapter_name: str) -> None: ...
    def get_base_layer(self) -> nn.Module: ...
    def unmerged_base_weight(self) -> torch.Tensor: ...


class Chain:
    """The layers of one chain of one adapter, in order.

    The layers are referred to weakly: each stays where it is in the model, and a model, or a part of it, is freed,
    copied and pickled without the others. The layers of a copy enter themselves into the copy of the chain.
    """

    def __init__(
        self,
        names: Sequence[str],
        layers: Sequence[ChainedLayer],
        adapter_name: str,
        config: ResLoRAConfig,
        doorways: Sequence[Doorway] = (),
    ) -> None:
        self.names = list(names)
        self.adapter_name = adapter_name
        self.config = config
        self.kind = layers[0].own_kind or block_kind(config, layers[0].get_base_layer())
        self.relay = Relay(names, config.shortcut, config.pre_num, adapter_name, doorways)
        self.keeps_base_weights = True
        self.seen_sharded = False  # at any time
        self.merges_checked = False  # by whoever merges all layers
        self.in_place: set[int] = set()  # ids of the layers whose weight may be written into, while it is merged
        self.planned: ChainMerge | None = None
        self.keeps_plan = False
        self.allocation: Any = None  # of ranks, which chains of an adapter with AdaLoRA share
        self.directions: Directions | None = None  # of an adapter with nested ranks, where not all are in use
        self.ranks = list(itertools.accumulate(layer.r[adapter_name] for layer in layers))  # added up to each position
        self._members: list[Any] = [weakref.ref(layer) for layer in layers]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def layers(self) -> list[Any]:
        """All layers.

        Raises:
            RuntimeError: if the model holds a part of them only.
        """
        return [self.layer(position) for position in range(len(self))]

    def layer(self, position: int) -> Any:
        """The layer at `position`.

        Raises:
            RuntimeError: if it is not in the model.
        """
        layer = self.find(position)
        if layer is None:
            raise RuntimeError(
                f"Layer {self.names[position]!r}, which is in one chain of adapter {self.adapter_name!r} with "
                f"{self.names[0 if position else -1]!r}, is not in this model: it was taken out, or this is a copy of "
                "a part of the model, such as a pipeline stage. Use the whole model; or adapt the parts one by one, "
                "so that no chain goes from one to another."
            )
        return layer

    def enter(self, position: int, layer: Any) -> None:
        """Give a copied layer its place in the copy of the chain."""
        self._members[position] = weakref.ref(layer)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_members": [None] * len(self)}

    def block(self, position: int) -> LinearBlock:
        """The adapter on the layer at `position`."""
        return self.kind(self.layer(position), self.adapter_name)

    def fused_factors(self, positions: Iterable[int]) -> dict[int, torch.Tensor]:
        """The A of the layers whose inputs others may multiply by it, by position.

        Of none, where any has ever been seen sharded: such engines keep factors whole at times, but in the backward
        pass they wait for the gradient from the layer's own forward only.
        """
        name = self.adapter_name
        blocks = {k: self.block(k) for k in positions if self.has(k)}
        factors = {k: block.weights[0] for k, block in blocks.items()}
        self.seen_sharded |= any(isinstance(A, DTensor) or A.dim() != 2 for A in factors.values())
        if self.seen_sharded:
            return {}
        return {k: A for k, A in factors.items() if blocks[k].is_fused and name not in blocks[k].layer.lora_annealed}

    def has(self, position: int) -> bool:
        """Whether the layer at `position` is in the model."""
        return self.find(position) is not None

    def find(self, position: int) -> Any:
        """The layer at `position`, or None if it is not in the model."""
        member = self._members[position]
        return None if member is None else member()

    def span(self, position: int) -> range:
        """The layer's position and those of the earlier layers that feed it, nearest first."""
        return range(position, position - 1 - reach(position, self.config.pre_num), -1)

    def blocks(self) -> list[Block]:
        """The layers as merging sees them."""
        name = self.adapter_name
        for layer in self.layers:
            layer.check_loaded(name)
        return [
            Block(
                layer_name,
                *self.kind(layer, name).factors(layer_name, _FROM_FILES),
                self.kind(layer, name).scaling,
                stored(layer.lora_norm, name),
                layer.unmerged_base_weight,
                stored(layer.lora_shortcut, name),
                stored(layer.lora_calibrated, name),
                float(stored(layer.lora_annealed, name) or 0.0),
                groups=self.kind(layer, name).groups,
            )
            for layer_name, layer in zip(self.names, self.layers, strict=True)
        ]

    def merge(self) -> ChainMerge:
        """How the chain merges: as it was planned before the first weight was changed, or computed now."""
        if self.planned is not None:
            return self.planned
        merge = ChainMerge.of(self.blocks(), self.config)
        if self.directions is not None and not self.directions.in_training_only:
            merge = merge.truncated(self.directions.rank)
        if self.keeps_plan:
            self.planned = merge
        return merge

    def coefficients(self) -> Sequence[Sequence[float]]:
        return self.merge().coefficients

    def merged_factors(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`(A (R, in_features), B (out_features, R))` of one layer, scaling included."""
        A, B = self.merge().factors(position)
        check_finite(A, B, self.names[position], self.adapter_name)
        return A, B


@contextmanager
def planned(chains: Iterable[Chain]) -> Iterator[None]:
    """Let the merge of each chain be computed once, when it is first asked for, while nothing trains."""
    chains = [chain for chain in chains if not chain.keeps_plan]
    layers = [chain.layers for chain in chains]  # held while unloading takes them out of the model one by one
    for chain in chains:
        chain.keeps_plan = True
    try:
        yield
    finally:
        del layers
        for chain in chains:
            chain.keeps_plan, chain.planned = False, None


_FROM_FILES = (
    "Let the trainer save the adapter, and merge or export it from there: load it into a model without sharding and "
    "offloading, or call `peft-reslora export`."
)
