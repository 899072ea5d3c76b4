"""Watching a model run: what the layers of chains get and hand on, token by token, without padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from peft_reslora.reslora.chain_table import reach
from peft_reslora.reslora.linked_chain import Chain
from peft_reslora.shared.tensors import widen

Batch = Mapping[str, Any]
See = Callable[[str, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


@contextmanager
def observed(model: nn.Module, layers: Sequence[tuple[Chain, int]], see: See) -> Iterator[Callable[[Batch], Any]]:
    """Watch layers of chains while the model runs in evaluation mode, without gradients.

    Yields a function that runs the model on one batch and returns its output. During it, for each of the `layers` that
    runs, `see` gets the layer's name and, for the tokens that are no padding, in float32 or wider: x_n `(tokens, in)`,
    A_n x_n `(tokens, r)`, the shortcut's term `(tokens, r)`, and the number of the sequence that each token is from.
    """
    observer = _Observer(model, see)
    modes = {module: module.training for module in model.modules()}
    needed: dict[int, tuple[Chain, dict[int, bool]]] = {}
    for chain, n in layers:
        _, positions = needed.setdefault(id(chain), (chain, {}))
        positions[n] = True
        for k in range(1, reach(n, chain.config.pre_num) + 1):
            positions.setdefault(n - k, False)
    handles = []
    try:
        for chain, positions in needed.values():
            factors = [widen(block.A) for block in chain.blocks()]
            for n, seen in positions.items():
                hook = partial(observer.hook, chain, n, factors[n], seen)
                handles.append(chain.layers[n].register_forward_pre_hook(hook, with_kwargs=True))
        model.eval()
        with torch.no_grad():
            yield observer.run
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training


class _Observer:
    """What `observed` remembers within a forward pass, and the number of sequences before it."""

    def __init__(self, model: nn.Module, see: See) -> None:
        self.model = model
        self.see = see
        self.sequences = 0
        self.masks: list[torch.Tensor] = []
        self.running = False  # the model may also run while it is not watched
        self.handed: dict[tuple[int, int], torch.Tensor] = {}  # by chain and position: x_n or A_n x_n

    def run(self, batch: Batch) -> Any:
        """The model's output for one batch, with the hooks awake."""
        batch = to_device(batch, self.model)
        self.masks, self.running = masks_of(batch), True
        try:
            return self.model(**batch)
        finally:
            self.running = False
            self.handed.clear()
            first = next((value for value in batch.values() if isinstance(value, torch.Tensor) and value.ndim), None)
            self.sequences += 0 if first is None else len(first)

    def hook(
        self,
        chain: Chain,
        n: int,
        A: torch.Tensor,
        seen: bool,
        layer: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Before layer n runs: keep what it hands on; if it is to be seen, show it with what came before."""
        if not self.running:
            return
        x = args[0] if args else kwargs["x"]
        by_input = chain.config.shortcut == "input"
        x = chain.block(n).patches(x)
        own = x if by_input else x.to(A.dtype) @ A.t()
        if seen:
            earlier = [self.handed[id(chain), n - k] for k in range(1, reach(n, chain.config.pre_num) + 1)]
            keep, sequence = tokens_of(x, self.masks)
            rows = x.flatten(0, -2)[keep].to(A.dtype)
            total = torch.stack([value.to(x.device).flatten(0, -2)[keep].to(A.dtype) for value in earlier]).sum(0)
            term = total @ A.t() if by_input else total
            self.see(chain.names[n], rows, rows @ A.t(), term, self.sequences + sequence[keep])
        self.handed[id(chain), n] = own


def masks_of(batch: Batch) -> list[torch.Tensor]:
    """The attention masks `(sequences, length)` in a batch, the decoder's too."""
    return [
        value
        for name, value in batch.items()
        if name.endswith("attention_mask") and isinstance(value, torch.Tensor) and value.ndim == 2
    ]


def tokens_of(x: torch.Tensor, masks: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows of `x (..., in)` are no padding, and which sequence of the batch each row is from.

    A mask counts if it has one entry for each row. Two that do (encoder and decoder of one length) both count: some
    tokens are lost then, but no padding gets in.
    """
    leading, rows = x.shape[:-1], x.shape[:-1].numel()
    fitting = [mask for mask in masks if mask.shape == leading or (len(leading) == 1 and mask.numel() == rows)]
    keep = torch.ones(rows, dtype=torch.bool, device=x.device)
    for mask in fitting:
        keep &= mask.to(x.device).flatten().bool()
    sequences = len(fitting[0]) if fitting else leading[0]
    number = torch.arange(sequences, device=x.device).repeat_interleave(rows // sequences)
    return keep, number


def to_device(batch: Batch, model: nn.Module) -> dict[str, Any]:
    """The batch's tensors on the device of the model's first parameter; untouched where a device map places them."""
    parameter = next(model.parameters(), None)
    if parameter is None or parameter.is_meta or getattr(model, "hf_device_map", None):
        return dict(batch)
    return {
        name: value.to(parameter.device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()
    }
