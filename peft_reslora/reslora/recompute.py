"""Recomputation: the checkpointed regions around the running code, and what layers took in them the first time.

A checkpointed region is run again during the backward pass, and its layers must then see what they saw before. What a
layer took from outside of the region is kept, detached, with torch's own object for the region: the frame of
non-re-entrant checkpointing, the context of a re-entrant one. Both end with the region's graph, and what is kept ends
with them. The same object is found again in the recomputation, whatever thread runs it and whatever else has run in
between, so that nothing depends on time. Within a region the layers of a chain run in the same order both times.

- Non-re-entrant checkpointing recomputes the saved tensors of the original graph, whose edges are complete.
- Re-entrant checkpointing runs the region without a graph first, and builds the region's graph, cut off from the rest,
  during the backward pass. No edge can cross, so the gradient is carried by hand, in a `Ledger`.

Private in torch (read in 2.13): the closures of the checkpoint's saved-tensor hooks and the local names of
`torch.utils.checkpoint`, which are the only way to its frames. A public name for the region that is running would end
the need.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType, GeneratorType
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch.autograd.function import BackwardCFunction, once_differentiable

from peft_reslora.shared.host import BACKWARD_ENGINE, backward_task, pack_hook, version_of

_REGION = "peft_reslora_region"  # attribute of torch's object for a region
_CHECKPOINT_GLOBALS = vars(torch.utils.checkpoint)


class Ledger:
    """Gradients on their way to layers of one chain in one forward pass, by the positions of giver and taker.

    Each entry names the backward pass that it belongs to, so that what an interrupted one has left is never used.
    """

    def __init__(self) -> None:
        self.deposits: dict[tuple[int, int], tuple[int, torch.Tensor]] = {}
        self.expected: dict[tuple[int, int], int] = {}
        self.collected: dict[int, int] = {}

    def deposit(self, giver: int, taker: int, task: int, grad: torch.Tensor) -> None:
        if self.collected.get(giver) == task:
            raise RuntimeError(
                f"The gradient of layer {taker} of a ResLoRA chain came after that of layer {giver}, from which it "
                "takes, and would be lost: under use_reentrant=True the later layer's output has to depend on the "
                "earlier one's. Checkpoint with use_reentrant=False."
            )
        self.deposits[giver, taker] = task, grad

    def collect(self, giver: int, task: int) -> torch.Tensor | None:
        """The sum of what later layers have deposited for `giver` in the backward pass `task`."""
        expected = {key for key, of in self.expected.items() if key[0] == giver and of == task}
        entries = {key: self.deposits.pop(key) for key in list(self.deposits) if key[0] == giver}
        grads = {key: grad for key, (of, grad) in entries.items() if of == task}
        self.collected[giver] = task
        self.expected = {key: of for key, of in self.expected.items() if key[0] != giver}
        if missing := expected - grads.keys():
            raise RuntimeError(
                f"Layers {sorted(key[1] for key in missing)} of a ResLoRA chain took from layer {giver}, in regions "
                "that are checkpointed re-entrantly, but no gradient came back from them: the backward of such a "
                "region asks for the gradients of some tensors only. Checkpoint with "
                "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
            )
        return functools.reduce(torch.add, grads.values()) if grads else None


@dataclass
class Taken:
    """What one layer took when it ran in a region.

    Args:
        position: of the layer in its chain.
        ordinal: which of the chain's passes in this region it was, from 0.
        ledger: of the pass.
        values: nearest giver first; None for what was not handed, `INSIDE` for what a layer of the region gave.
        ahead: whether it handed on a product with the next layer's factor.
        takers: how many later layers of the same region took from this one.
    """

    position: int
    ordinal: int
    ledger: Ledger
    values: list[Kept | None]
    ahead: bool = False
    takers: int = 0


@dataclass(frozen=True)
class Kept:
    """A detached tensor, and its version when it was taken; no tensor for what was given inside the region."""

    tensor: torch.Tensor | None = None
    version: int = 0


INSIDE = Kept()


class Region:
    """One checkpointed region in one forward: what the layers of each chain took in it, in the order they ran."""

    def __init__(self, reentrant: bool, task: int | None) -> None:
        self.reentrant = reentrant
        self.task = task  # the outermost backward pass, if the region was run within a recomputation
        self.taken: dict[int, list[Taken]] = {}
        self.facts: dict[int, Any] = {}  # by chain: see `Relay.as_before`
        self._ordinals: dict[int, list[Ledger]] = {}
        self._kept: dict[int, tuple[weakref.ref[torch.Tensor], Kept]] = {}
        self._replay: tuple[Any, Replay] | None = None

    def record(
        self, chain: int, position: int, ledger: Ledger, values: list[Kept | None], ahead: bool = False
    ) -> Taken:
        """Note that the layer at `position` of `chain` has run, and what it took."""
        ledgers = self._ordinals.setdefault(chain, [])
        if not any(known is ledger for known in ledgers):
            ledgers.append(ledger)
        ordinal = next(i for i, known in enumerate(ledgers) if known is ledger)
        taken = Taken(position, ordinal, ledger, values, ahead)
        self.taken.setdefault(chain, []).append(taken)
        return taken

    def keep(self, value: torch.Tensor) -> Kept:
        """`value`, detached; the same object for all layers of the region that take the same tensor."""
        ref, kept = self._kept.get(id(value), (None, None))
        if ref is None or kept is None or ref() is not value:
            detached = value.detach().requires_grad_(value.requires_grad)
            kept = Kept(detached, version_of(detached))
            self._kept[id(value)] = weakref.ref(value), kept
        return kept

    def replay(self, key: Any, task: int) -> Replay:
        """The recomputation that `key` names."""
        if self._replay is None or self._replay[0] != key:
            task = task if self.task is None else self.task
            self._replay = key, Replay(self.taken, self.reentrant, task, self.facts)
        return self._replay[1]


class Replay:
    """One recomputation of a region. `local` holds what its layers hand each other, by chain and pass."""

    def __init__(
        self, taken: dict[int, list[Taken]], reentrant: bool, task: int, facts: dict[int, Any] | None = None
    ) -> None:
        self.reentrant = reentrant
        self.task = task
        self.facts = {} if facts is None else facts
        self.local: dict[tuple[int, int], Any] = {}
        self._taken = taken
        self._cursors: dict[int, int] = {}

    def has(self, chain: int, position: int) -> bool:
        """Whether the layer at `position`, which runs next of its chain, took or gave anything the first time."""
        return self._at(chain, position) is not None

    def hands_ahead(self, chain: int, position: int) -> bool:
        """Whether the layer at `position`, which runs next of its chain, handed on a product with the next factor."""
        taken = self._at(chain, position)
        return taken is not None and taken.ahead

    def next(self, chain: int, position: int) -> Taken | None:
        """What the layer at `position` took the first time; None where another layer ran then, or none."""
        taken = self._at(chain, position)
        self._cursors[chain] = self._cursors.get(chain, 0) + 1
        return taken

    def _at(self, chain: int, position: int) -> Taken | None:
        cursor, record = self._cursors.get(chain, 0), self._taken.get(chain, [])
        return record[cursor] if cursor < len(record) and record[cursor].position == position else None


@dataclass(frozen=True)
class Nest:
    """The regions around the running code: those that run for the first time, innermost first, and then the
    recomputation that they are part of."""

    recording: tuple[Region, ...] = ()
    replay: Replay | None = None

    @property
    def reentrant(self) -> bool:
        """Whether the running code will have a graph of its own."""
        return any(region.reentrant for region in self.recording)


NO_REGION = Nest()


class Surroundings(NamedTuple):
    """What tells whether code runs in the same region as other code: cheap to get, and to compare."""

    pack: Callable[..., Any] | None
    grad_enabled: bool
    task: int

    @classmethod
    def now(cls) -> Surroundings:
        return cls(pack_hook(), torch.is_grad_enabled(), backward_task())

    @property
    def plain(self) -> bool:
        """Whether there is no region for sure."""
        return self.pack is None and self.grad_enabled and self.task == -1

    @property
    def tells_the_region(self) -> bool:
        """Whether nothing else has the same surroundings: the hooks of a checkpoint are made anew for every region
        that runs, and where there are gradients, no region without a graph stands within."""
        return self.grad_enabled and _of_hooks(self.pack) is not None


def enclosing_regions(around: Surroundings) -> Nest:
    """The regions around the running code, from the innermost out to the first recomputation or backward pass."""
    running = _running(around.pack)
    if not running:
        return NO_REGION
    replay = None
    if running[-1].recomputed:
        owner, _, key = running.pop()
        replay = _region_of(owner, None).replay(around.task if key is None else key, around.task)
    task = None if replay is None else replay.task
    return Nest(tuple(_region_of(found.owner, task) for found in running), replay)


class _Found(NamedTuple):
    """A region that is running: torch's object for it, whether it is recomputed, and by which name of torch's.

    A context is recomputed once in a backward pass, and needs no name.
    """

    owner: Any
    recomputed: bool
    key: Any = None


def _running(pack: Any) -> list[_Found]:
    """The regions that are running, innermost first, out to the first recomputation or backward pass."""
    running: list[_Found] = []
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code is not BACKWARD_ENGINE:
        if (found := _of_frame(frame)) is not None:
            running.append(found)
            if found.recomputed:
                break
        frame = frame.f_back
    by_hooks = _of_hooks(pack)
    # The composable checkpoint is entered and left by hooks of a module, and so has no frame on the stack.
    if by_hooks is not None and not any(found.owner is by_hooks.owner for found in running):
        running.insert(0, by_hooks)
    return running


def _of_hooks(pack: Any) -> _Found | None:
    """The region to which saved-tensor hooks belong, if they are those of a checkpoint."""
    pack = getattr(pack, "__wrapped__", pack)  # torch keeps some of them from its compiler
    if getattr(pack, "__globals__", None) is not _CHECKPOINT_GLOBALS or not pack.__closure__:
        return None
    held = dict(zip(pack.__code__.co_freevars, (cell.cell_contents for cell in pack.__closure__), strict=True))
    if "target_frame_ref" in held:
        return _Found(held["target_frame_ref"](), True, held["gid"])
    return _Found(held["frame"], False) if "frame" in held else None


def _of_frame(frame: FrameType) -> _Found | None:
    """The region whose checkpoint's own code runs in a frame of the stack."""
    code = frame.f_code
    if frame.f_globals is _CHECKPOINT_GLOBALS:
        if code.co_name == "checkpoint" and isinstance(generator := frame.f_locals.get("gen"), GeneratorType):
            inner = generator.gi_frame
            return None if inner is None else _Found(inner.f_locals["new_frame"], False)
        if code.co_name == "unpack_hook" and "gid" in frame.f_locals:
            return _Found(frame.f_locals["frame"], True, frame.f_locals["gid"])
    if code.co_varnames[:1] == ("ctx",):
        ctx = frame.f_locals.get("ctx")
        if isinstance(ctx, BackwardCFunction):
            if code.co_name == "forward":
                return _Found(ctx, False)
            if code.co_name == "backward" and _REGION in ctx.__dict__:
                return _Found(ctx, True)
    return None


def _region_of(owner: Any, task: int | None) -> Region:
    if (region := owner.__dict__.get(_REGION)) is None:
        region = Region(isinstance(owner, BackwardCFunction), task)
        setattr(owner, _REGION, region)
    return region


class Give(torch.autograd.Function):
    """Identity; its backward adds what later layers have deposited.

    `anchor` is an empty tensor that requires a gradient, so that there is a node even where `value` requires none.
    """

    @staticmethod
    def forward(
        ctx: Any, anchor: torch.Tensor, value: torch.Tensor, ledger: Ledger, position: int, task: int
    ) -> torch.Tensor:
        ctx.ledger, ctx.position, ctx.task = ledger, position, task
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor, None, None, None]:
        deposit = ctx.ledger.collect(ctx.position, ctx.task)
        return None, grad if deposit is None else grad + deposit, None, None, None


class Take(torch.autograd.Function):
    """The value handed on, without its graph; its backward deposits the gradient with the layer that gave it.

    `carrier` is what the taker makes of its own input. It gets no gradient, but where the gradient of anything before
    the taker is asked for, the deposit is made, even by a backward that asks for some gradients only.
    """

    @staticmethod
    def forward(
        ctx: Any, anchor: torch.Tensor, carrier: torch.Tensor, value: torch.Tensor, entry: tuple[Any, ...]
    ) -> torch.Tensor:
        ctx.entry = entry
        return value.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, None, None, None]:
        ledger, giver, taker, task = ctx.entry
        ledger.deposit(giver, taker, backward_task() if task is None else task, grad)
        return None, None, None, None


def give(value: torch.Tensor, ledger: Ledger, position: int, task: int) -> torch.Tensor:
    """`value` as the layer itself has to use it, so that it gets the gradients that later layers deposit."""
    return Give.apply(_anchor(value), value, ledger, position, task)


def take(
    value: torch.Tensor, carrier: torch.Tensor, ledger: Ledger, giver: int, taker: int, task: int | None
) -> torch.Tensor:
    """`value` cut off from its graph, with its gradient carried by the ledger.

    Args:
        task: the backward pass of the recomputation in which the layer takes; None where it runs for the first time.
    """
    if task is not None and torch.is_grad_enabled():
        ledger.expected[giver, taker] = task
    return Take.apply(_anchor(value), carrier, value, (ledger, giver, taker, task))


def _anchor(value: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, device=value.device, requires_grad=True)
