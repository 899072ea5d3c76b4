"""Forward passes: which one a layer runs in, and what the layers of its chain have handed on in it.

A pass belongs to a call of a module that holds the whole chain. A `Doorway` on each such module opens a scope when it
is called and closes it when the call ends, also by an exception; what was handed on ends with it. A layer takes from
the innermost open scope of its chain in its own thread. Called on its own, outside of any, it has nothing to take
from, so that it never sees what an earlier pass has left.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from torch import nn

from peft_reslora.reslora.recompute import NO_REGION, Ledger, Nest, Region, Surroundings, Taken, enclosing_regions
from peft_reslora.reslora.sums import SharedSum
from peft_reslora.shared.host import pre_hooks, remove_hooks


class Given:
    """What one layer has handed on: the tensor, its version then, and the regions in which it ran."""

    __slots__ = ("regions", "takers", "value", "version")

    def __init__(self, value: torch.Tensor, version: int, regions: dict[Region, Taken], takers: int) -> None:
        self.value = value
        self.version = version
        self.regions = regions
        self.takers = takers  # in a recomputation: how many layers are still to take it

    @property
    def without_graph(self) -> bool:
        return any(region.reentrant for region in self.regions)


class ForwardPass:
    """What the layers of one chain handed on in one forward pass, by position, until the last taker has run."""

    def __init__(self, ledger: Ledger | None = None) -> None:
        self.ledger = Ledger() if ledger is None else ledger
        self.given: dict[int, Given] = {}
        self.last = -1  # the position that ran last


class Scope:
    """One call of a module that holds whole chains."""

    def __init__(self, doorway: Doorway) -> None:
        self.doorway = doorway
        self.passes: dict[int, ForwardPass] = {}  # the running one of each chain
        self.sums = SharedSum()
        self.totals: dict[int, tuple[int, bool, torch.Tensor]] = {}  # of each chain: see `Relay.total`
        self.facts: dict[int, Any] = {}  # of each chain: see `Relay.once`
        self.stacks: dict[int, Any] = {}  # of each chain: see `inference.py`
        self.whole: dict[int, bool] = {}  # likewise
        self.around: Surroundings | None = None
        self.nest = NO_REGION
        self.plain = False  # made without gradients, outside of all regions, hooks and backward passes
        self.inner: tuple[Surroundings, Nest] | None = None  # the region last seen within this call

    def close(self) -> None:
        self.sums.forget()
        self.totals.clear()
        self.stacks.clear()
        for forward_pass in self.passes.values():
            forward_pass.given.clear()


class _Running(threading.local):
    """The open scopes of a thread, innermost last."""

    def __init__(self) -> None:
        self.scopes: list[Scope] = []


_running = _Running()


def innermost_scope(doorways: Sequence[Doorway]) -> Scope | None:
    """The innermost call that runs in this thread of a module on which one of the doorways stands."""
    for scope in reversed(_running.scopes):
        if scope.doorway in doorways:
            return scope
    return None


class Doorway:
    """Opens a scope when the module is called on which its hooks stand. Copies of the module have their own."""

    def enter(self, module: nn.Module, args: Any) -> None:
        scope = Scope(self)
        scopes = _running.scopes
        if not torch.compiler.is_compiling():
            self._drop_interrupted(module)
            outer = scopes[-1] if scopes else None
            scope.around = Surroundings.now()
            scope.nest = nest_in(outer, scope.around)
            scope.plain = scope.nest is NO_REGION and scope.around == (None, False, -1)
        scopes.append(scope)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        scopes = _running.scopes
        if any(scope.doorway is self for scope in scopes):
            while True:
                scope = scopes.pop()
                scope.close()
                if scope.doorway is self:
                    break

    def _drop_interrupted(self, module: nn.Module) -> None:
        """Drop scopes that an interrupt has left open (hooks run after an `Exception`, but not after others)."""
        scopes = _running.scopes
        first = next((i for i, scope in enumerate(scopes) if scope.doorway is self), None)
        if first is not None and not _is_running(module):
            for scope in scopes[first:]:
                scope.close()
            del scopes[first:]


def _is_running(module: nn.Module) -> bool:
    """Whether a call of `module` is under way around the one that has just begun."""
    calls = 0
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        calls += frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is module
        frame = frame.f_back
    return calls > 1


def doorway_of(module: nn.Module) -> Doorway | None:
    """The doorway on a module, if it has one."""
    owners = (getattr(hook, "__self__", None) for hook in pre_hooks(module))
    return next((owner for owner in owners if isinstance(owner, Doorway)), None)


def add_doorway(module: nn.Module) -> Doorway:
    """The doorway on a module; made if there is none."""
    if (doorway := doorway_of(module)) is None:
        doorway = Doorway()
        module.register_forward_pre_hook(doorway.enter)
        module.register_forward_hook(doorway.leave, always_call=True)
    return doorway


def remove_doorways(model: nn.Module) -> None:
    """Take all doorways off a model from which the adapters are gone."""
    for module in model.modules():
        remove_hooks(module, lambda hook: isinstance(getattr(hook, "__self__", None), Doorway))


def nest_in(scope: Scope | None, around: Surroundings | None = None) -> Nest:
    """The regions around the running code, of which `scope` may know them already."""
    around = Surroundings.now() if around is None else around
    if around.plain:
        return NO_REGION
    if scope is not None and scope.around == around:
        return scope.nest
    if scope is not None and scope.inner is not None and scope.inner[0] == around:
        return scope.inner[1]
    nest = enclosing_regions(around)
    if scope is not None and around.tells_the_region:
        scope.inner = around, nest
    return nest
