"""Tracing: what one forward pass of the base model shows of the chains that names and shapes suggest.

Only the base model runs: in evaluation mode, with adapters off, watched by hooks that are taken away again. What its
layers depend on is read from the autograd graph, which keeps no activations here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_reslora.reslora.chain_table import ChainTable, Target, reach
from peft_reslora.reslora.merging.observe import to_device
from peft_reslora.shared.host import is_from_function, set_adapters_off
from peft_reslora.shared.names import PREFIX, bare_name


@dataclass
class Calls:
    """How often a layer was called in the forward pass, and what was seen of its first call."""

    number: int = 0
    order: int = 0
    shape: tuple[int, ...] = ()
    digest: bytes = b""
    depends_on: int | None = None  # a bit for each layer that gave something to its input; None where none can be seen


class _Mark(torch.autograd.Function):
    """The identity; its node in the graph says which layer's output this is."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, output: torch.Tensor, index: int) -> torch.Tensor:
        ctx.index = index
        return output.clone()


@dataclass
class _Tracer:
    calls: list[Calls]
    _givers: dict[Any, int] = field(default_factory=dict)  # by node of the graph, which is kept alive by it

    def enter(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
        calls = self.calls[index]
        calls.number += 1
        if x is None or calls.number > 1:
            return
        calls.order = sum(other.number > 0 for other in self.calls)
        calls.shape, calls.digest = tuple(x.shape), _digest(x)
        if torch.is_grad_enabled():
            calls.depends_on = self._givers_of(x.grad_fn)

    def leave(self, index: int, module: nn.Module, args: Any, output: Any) -> Any:
        if not (isinstance(output, torch.Tensor) and torch.is_grad_enabled()):
            return output
        return _Mark.apply(torch.empty(0, device=output.device, requires_grad=True), output, index)

    def _givers_of(self, node: Any) -> int:
        """The layers on whose outputs what `node` computed depends, as bits."""
        waiting = [node] if node is not None else []
        while waiting:
            current = waiting[-1]
            before = [n for n, _ in current.next_functions if n is not None]
            unknown = [n for n in before if n not in self._givers]
            if unknown and current not in self._givers:
                waiting.extend(unknown)
                continue
            waiting.pop()
            found = 1 << current.index if is_from_function(current, _Mark) else 0
            for n in before:
                found |= self._givers[n]
            self._givers[current] = found
        return self._givers[node] if node is not None else 0


def findings(model: nn.Module, table: ChainTable, batch: Mapping[str, Any]) -> tuple[str, ...]:
    """What a forward pass on `batch` shows that `table` does not: one line for each thing to know."""
    targets = [target for chain in table.chains for target in chain]
    modules = {bare_name(name, model).removeprefix(PREFIX): module for name, module in model.named_modules()}
    paths = [t.name if t.name in modules else t.name.rpartition(".")[0] for t in targets]  # of a parameter, its module
    called = [modules[path] for path in paths]
    calls = dict(zip(targets, _trace(model, called, batch), strict=True))
    index = {target: n for n, target in enumerate(targets)}
    lines: list[str] = []
    for role in table.roles:
        for chain in role.chains:
            where = f"{role.name} ({chain[0].name})" if len(role.chains) > 1 else role.name
            lines += [f"{where}: {text}" for text in _seen_in(chain, calls, index, table.pre_num)]
    return tuple(lines)


def _trace(model: nn.Module, layers: Sequence[nn.Module], batch: Mapping[str, Any]) -> list[Calls]:
    tracer = _Tracer([Calls() for _ in layers])
    with ExitStack() as stack:
        stack.enter_context(_as_plain_base(model))
        for n, layer in enumerate(layers):
            handles = (
                layer.register_forward_pre_hook(lambda *args, n=n: tracer.enter(n, *args), with_kwargs=True),
                layer.register_forward_hook(lambda *args, n=n: tracer.leave(n, *args)),
            )
            for handle in handles:
                stack.callback(handle.remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing))
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(torch.enable_grad())
        model(**to_device(batch, model))
    return tracer.calls


@contextmanager
def _as_plain_base(model: nn.Module) -> Iterator[None]:
    """In evaluation mode and with all adapters off, but for those that are merged."""
    training = [module for module in model.modules() if module.training]
    running = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and not (m.merged or m.disable_adapters)]
    try:
        model.eval()
        for layer in running:
            set_adapters_off(layer, True)
        yield
    finally:
        for layer in running:
            set_adapters_off(layer, False)
        for module in training:
            module.training = True


def _digest(x: torch.Tensor) -> bytes:
    data = x.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data
    return hashlib.blake2b(data, digest_size=16).digest()


def _seen_in(
    chain: Sequence[Target], calls: Mapping[Target, Calls], index: Mapping[Target, int], pre_num: int
) -> Iterator[str]:
    never = [target for target in chain if calls[target].number == 0]
    if never:
        yield f"{_some(never, chain)} never called in this forward pass, and train nothing in it"
    if repeated := [target for target in chain if calls[target].number > 1]:
        yield f"{_some(repeated, chain)} called more than once; 'input' and 'middle' need one call for each layer"
    called = [target for target in chain if calls[target].number > 0]
    neighbors = list(pairwise(called))
    twins = [after for before, after in neighbors if calls[before].digest == calls[after].digest]
    if twins:
        yield f"{_some(twins, chain)} given the same input as the layer before: 'input' is LoRA at twice the scaling"
    if uneven := [after for before, after in neighbors if calls[before].shape != calls[after].shape]:
        only = "an input of another shape than the layer before, which only 'block' allows"
        yield f"{_some(uneven, chain)} given {only}"
    links = [(a, called[n]) for n in range(1, len(called)) for a in called[n - reach(n, pre_num) : n]]
    apart = [after for before, after in links if after not in twins and _independent(calls, index, before, after)]
    if apart:
        yield f"{_some(apart, chain)} fed by layers on which their input does not depend: not one after the other"


def _independent(calls: Mapping[Target, Calls], index: Mapping[Target, int], before: Target, after: Target) -> bool:
    depends_on = calls[after].depends_on
    return depends_on is not None and not depends_on >> index[before] & 1


def _some(members: Sequence[Target], chain: Sequence[Target]) -> str:
    distinct = list(dict.fromkeys(target.name for target in members))
    return f"{len(distinct)} of {len(chain)} layers ({distinct[0]}{', ...' if len(distinct) > 1 else ''}) are"
