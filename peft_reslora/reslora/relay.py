"""Relay: how the layers of a chain hand tensors on within one forward pass (`passes.py`).

In an ordinary forward pass the tensor itself is handed on, graph and all: autograd then does what it always does. What
checkpointing needs besides is in `recompute`: there a layer takes what it took the first time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from peft_reslora.reslora.chain_table import reach
from peft_reslora.reslora.passes import Doorway, ForwardPass, Given, Scope, innermost_scope, nest_in
from peft_reslora.reslora.recompute import (
    INSIDE,
    NO_REGION,
    Kept,
    Nest,
    Region,
    Replay,
    Taken,
    give,
    take,
)
from peft_reslora.reslora.sums import SharedSum
from peft_reslora.shared.host import version_of

_keys = itertools.count()
_T = TypeVar("_T")


@dataclass
class Handed:
    """What a layer gets from the relay.

    Args:
        own: its own tensor, as it has to use it itself.
        earlier: what it takes, nearest first; None for a factor that was not handed.
        recomputed: whether this is a recomputation, which counts for no statistics.
        sums: what the layers of one forward share; None where there is nothing to share.
    """

    own: torch.Tensor
    earlier: list[Any]
    recomputed: bool
    sums: SharedSum | None


class Relay:
    """Hands one tensor per layer to the `pre_num` layers after it.

    With `pre_num` -1 each layer hands on the sum of its own tensor and all earlier ones, so that the work per layer
    does not grow with depth. Holds no tensor itself.

    `shortcut` 'block' hands no tensors of the forward pass but copies of parameters, which are not summed, and which a
    layer may also have from elsewhere if an earlier layer hands it none.
    """

    def __init__(
        self, names: Sequence[str], shortcut: str, pre_num: int, adapter_name: str, doorways: Sequence[Doorway] = ()
    ) -> None:
        self.names = list(names)
        self.shortcut = shortcut
        self.adapter_name = adapter_name
        self.doorways = list(doorways)
        self.key = next(_keys)
        self.hands_factors = shortcut == "block"
        self.accumulates = pre_num == -1 and not self.hands_factors
        self.pre_num = 1 if self.accumulates else reach(len(names), pre_num)
        self._givers = [range(n - 1, n - 1 - reach(n, self.pre_num), -1) for n in range(len(names))]

    def crosses_graphs(self, position: int) -> bool:
        """Whether the running layer's neighbors may have graphs of their own, as in re-entrant checkpointing.

        In a recomputation, whether that was so the first time.
        """
        if torch.compiler.is_compiling():
            return False
        nest = nest_in(self._scope())
        return nest.reentrant if nest.replay is None else nest.replay.has(self.key, position)

    def may_hand_ahead(self, position: int) -> bool:
        """Whether the running layer may hand on what the next one's factor makes of its input (`is_ahead`).

        Not in re-entrant checkpointing, where a factor would be given a part of its gradient by each region that
        reads it; nor in a call made without gradients, where layers outside of `enable_grad` take the inputs. In a
        recomputation, whether it did so the first time.
        """
        scope = self._scope()
        nest = nest_in(scope)
        if nest.replay is not None:
            return nest.replay.hands_ahead(self.key, position)
        return not (nest.reentrant or (scope is not None and scope.plain))

    def pass_on(self, position: int, value: torch.Tensor, carrier: torch.Tensor | None = None) -> Handed:
        """Take what earlier layers handed to the one at `position`, and hand `value` to the later ones.

        Args:
            carrier: the layer's own tensor that takes the place of what it is handed, if that is not `value`.

        Raises:
            RuntimeError: if an earlier layer has not run in this forward pass, if what it handed on has been changed
                in place since, or if a region that is checkpointed re-entrantly takes from a layer outside of it.
            ValueError: if the tensors that are to be added have different shapes.
        """
        carrier = value if carrier is None else carrier
        scope = self._scope()
        nest = NO_REGION if torch.compiler.is_compiling() else nest_in(scope)
        replay = nest.replay
        first = None if replay is None else self._first_time(replay, position)
        if replay is not None and first is not None:
            forward_pass = self._local_pass(replay, first)
            earlier, kept = self._take_again(replay, first, forward_pass, position, carrier, nest)
        else:
            forward_pass = self._running_pass(scope, position)
            earlier, kept = self._take_from(forward_pass, position, carrier, nest)
        if self.accumulates:
            value, earlier = sum(earlier, value), []
        if replay is not None and first is not None and replay.reentrant and torch.is_grad_enabled():
            value = give(value, first.ledger, position, replay.task)
        ahead = is_ahead(value, carrier)
        regions = {
            region: region.record(self.key, position, forward_pass.ledger, kept.get(region, []), ahead)
            for region in nest.recording
        }
        if first is None:
            self._hand_on(forward_pass, position, value, regions)
        elif first.takers:
            forward_pass.given[position] = Given(value, version_of(value), regions, first.takers)
        # Within a region a shared sum would hold the graph of a recomputation, which nobody else does.
        sums = scope.sums if scope is not None and nest is NO_REGION else None
        return Handed(value, earlier, first is not None, sums)

    def plain_scope(self) -> Scope | None:
        """The innermost running call of a module that holds the chain, if it is `plain`."""
        scope = self._scope()
        return scope if scope is not None and scope.plain else None

    def pass_plainly(
        self, scope: Scope, position: int, value: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """`pass_on` in a plain scope: the layer's own tensor, and those that it takes."""
        forward_pass = self._running_pass(scope, position)
        earlier: list[torch.Tensor] = []
        for giver in self._givers[position]:
            given = forward_pass.given[giver]
            self._check(given.value, given.version, value, giver, position)
            earlier.append(given.value)
        if self.accumulates:
            value, earlier = sum(earlier, value), []
        self._hand_on(forward_pass, position, value, {})
        return value, earlier

    def once(self, make: Callable[[], _T], otherwise: Callable[[], _T]) -> _T:
        """What `make` gives, asked once in a forward pass; outside of one, what `otherwise` gives."""
        scope = self._scope()
        if scope is None:
            return otherwise()
        if self.key not in scope.facts:
            scope.facts[self.key] = make()
        return scope.facts[self.key]

    def as_before(self, fact: _T) -> _T:
        """`fact`, which holds for all layers of the chain; in the recomputation of a region what it was in the region
        the first time, whatever has been set since."""
        if torch.compiler.is_compiling():
            return fact
        nest = nest_in(self._scope())
        if nest.replay is not None:
            fact = nest.replay.facts.get(self.key, fact)
        for region in nest.recording:
            region.facts.setdefault(self.key, fact)
        return fact

    def total(
        self, position: int, start: Callable[[], torch.Tensor], extend: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """A sum over the layers up to `position`: that of the layer before, extended, if that layer has made one in
        this forward pass, and started anew otherwise."""
        scope = self._scope()
        if scope is None or nest_in(scope) is not NO_REGION:
            return start()
        before = scope.totals.get(self.key)
        goes_on = before is not None and before[:2] == (position - 1, torch.is_grad_enabled())
        total = extend(before[2]) if before is not None and goes_on else start()
        scope.totals[self.key] = position, torch.is_grad_enabled(), total
        return total

    def _scope(self) -> Scope | None:
        """The innermost running call of a module that holds the chain."""
        return innermost_scope(self.doorways)

    def _running_pass(self, scope: Scope | None, position: int) -> ForwardPass:
        forward_pass = None if scope is None else scope.passes.get(self.key)
        if self.hands_factors:  # layers may be left out, so that no layer is sure to be the first
            fresh = forward_pass is None or position <= forward_pass.last
        else:
            fresh = position == 0
            if position > 0 and (forward_pass is None or forward_pass.last != position - 1):
                raise RuntimeError(self._out_of_order(scope, forward_pass, position))
            if fresh and forward_pass is not None and forward_pass.last < len(self.names) - 1:
                raise RuntimeError(self._restarted(forward_pass))
        if fresh or forward_pass is None:
            forward_pass = ForwardPass()
            if scope is not None:
                scope.passes[self.key] = forward_pass
        forward_pass.last = position
        return forward_pass

    def _take_from(
        self, forward_pass: ForwardPass, position: int, carrier: torch.Tensor, nest: Nest
    ) -> tuple[list[Any], dict[Region, list[Kept | None]]]:
        """What a layer that runs for the first time takes, and what its regions keep of it."""
        earlier: list[Any] = []
        kept: dict[Region, list[Kept | None]] = {region: [] for region in nest.recording}
        for giver in self._givers[position]:
            given = forward_pass.given.get(giver)
            value = None if given is None else self._usable(given, forward_pass, giver, position, carrier, nest)
            earlier.append(value)
            for region, values in kept.items():
                values.append(None if given is None or value is None else _seen_from(region, given))
        return earlier, kept

    def _usable(
        self,
        given: Given,
        forward_pass: ForwardPass,
        giver: int,
        taker: int,
        carrier: torch.Tensor,
        nest: Nest,
    ) -> torch.Tensor | None:
        """What the taker uses of what was given: the tensor, or where no edge can cross, a copy without a graph."""
        value = given.value
        self._check(value, given.version, carrier, giver, taker)
        if given.without_graph and torch.is_grad_enabled():
            task = None if nest.replay is None else nest.replay.task
            return take(value, carrier, forward_pass.ledger, giver, taker, task)
        crossed = any(region.reentrant and region not in given.regions for region in nest.recording)
        if crossed and not given.without_graph and value.requires_grad:
            if self.hands_factors:
                return None  # they are read where they are
            raise RuntimeError(
                f"Layer {self.names[taker]!r} is checkpointed with use_reentrant=True, but layer "
                f"{self.names[giver]!r}, from which it takes, is not: that layer's gradient would be lost. Checkpoint "
                "with use_reentrant=False, or checkpoint all blocks."
            )
        return value

    def _first_time(self, replay: Replay, position: int) -> Taken:
        first = replay.next(self.key, position)
        if first is None:
            raise RuntimeError(
                f"Layer {self.names[position]!r} runs in the recomputation of a checkpointed region, but it did not "
                "at this place the first time, so that what it took then is not known. Where the region is compiled "
                "by itself, compile the whole model instead, or use shortcut='block'; else let the region run the "
                "same layers in the same order."
            )
        return first

    def _local_pass(self, replay: Replay, first: Taken) -> ForwardPass:
        return replay.local.setdefault((self.key, first.ordinal), ForwardPass(first.ledger))

    def _take_again(
        self,
        replay: Replay,
        first: Taken,
        forward_pass: ForwardPass,
        position: int,
        carrier: torch.Tensor,
        nest: Nest,
    ) -> tuple[list[Any], dict[Region, list[Kept | None]]]:
        """What a recomputed layer takes: what it took the first time."""
        earlier: list[Any] = []
        kept: dict[Region, list[Kept | None]] = {region: [] for region in nest.recording}
        for giver, before in zip(self._givers[position], first.values, strict=True):
            value: torch.Tensor | None = None
            seen: dict[Region, Kept | None] = dict.fromkeys(kept)
            if before is not None and before.tensor is not None:
                value = before.tensor
                self._check(value, before.version, carrier, giver, position)
                seen = {region: region.keep(before.tensor) for region in kept}
                if replay.reentrant:
                    value = take(value, carrier, first.ledger, giver, position, replay.task)
            elif before is not None:  # given inside the region, so again now
                given = forward_pass.given[giver]
                value = self._usable(given, forward_pass, giver, position, carrier, nest)
                seen = {region: _seen_from(region, given) for region in kept}
                given.takers -= 1
                if not given.takers:
                    del forward_pass.given[giver]
            earlier.append(value)
            for region, values in kept.items():
                values.append(seen[region])
        return earlier, kept

    def _hand_on(
        self, forward_pass: ForwardPass, position: int, value: torch.Tensor, regions: dict[Region, Taken]
    ) -> None:
        if position == len(self.names) - 1:
            forward_pass.given.clear()
            return
        if self.shortcut == "input" and not torch.compiler.is_compiling() and value.is_inference():
            value = value.clone()  # nobody would notice if it were changed in place
        forward_pass.given[position] = Given(value, version_of(value), regions, 0)
        forward_pass.given.pop(position - self.pre_num, None)

    def _check(self, value: torch.Tensor, version: int, carrier: torch.Tensor, giver: int, taker: int) -> None:
        now = version_of(value)
        if now == version and value.shape == carrier.shape:
            return
        if now != version:
            raise RuntimeError(
                f"What layer {self.names[giver]!r} handed on to layer {self.names[taker]!r} was changed in place in "
                f"between, so that the {self.shortcut!r} shortcut of adapter {self.adapter_name!r} would add another "
                "tensor than that layer saw. Change a copy instead (x = x + y, not x += y), or use shortcut='block'."
            )
        ahead = self.shortcut == "input" and is_ahead(value, carrier)
        shape = (*value.shape[:-2], carrier.shape[-1]) if ahead else tuple(value.shape)
        if not self.hands_factors and shape != carrier.shape:
            raise ValueError(
                f"shortcut={self.shortcut!r} adds what layers {self.names[giver]!r} and {self.names[taker]!r} "
                f"compute from their inputs, but the shapes are {shape} and {tuple(carrier.shape)}. End "
                "the chain between the two with chain_pattern or exclude_modules, or use shortcut='block', which "
                "needs no equal inputs."
            )

    def _out_of_order(self, scope: Scope | None, forward_pass: ForwardPass | None, position: int) -> str:
        name, before = self.names[position], self.names[position - 1]
        needs = f"the {self.shortcut!r} shortcut of adapter {self.adapter_name!r} needs what that layer hands on"
        if scope is None:
            return (
                f"Layer {name!r} ran before its predecessor {before!r}, or outside of a call of a module that holds "
                f"both: {needs} in the same forward pass. Call the model, or the part of it that holds the whole "
                "chain (not its `forward`), or use shortcut='block'. Part of a model, such as a pipeline stage, can "
                "only have the latter."
            )
        if forward_pass is not None and forward_pass.last >= position:
            return (
                f"Layer {name!r} ran again in one forward pass, after {self.names[forward_pass.last]!r}: {needs}, and "
                "cannot tell whose it is when a layer runs twice. Leave such layers out with exclude_modules, or use "
                "shortcut='block', which needs no order."
            )
        return (
            f"Layer {name!r} ran before its predecessor {before!r}: {needs} in the same forward pass. Do not skip, "
            "reorder or repeat blocks (layerdrop=0 in the model's config), or end the chain between them with "
            "chain_pattern; shortcut='block' needs no order."
        )

    def _restarted(self, forward_pass: ForwardPass) -> str:
        return (
            f"Layer {self.names[0]!r} ran again in one call of the model, before layer "
            f"{self.names[forward_pass.last + 1]!r} had its turn: the {self.shortcut!r} shortcut of adapter "
            f"{self.adapter_name!r} cannot tell the two passes apart. If blocks call such a layer twice (as DeBERTa's "
            "query and key, for positions), leave it out with exclude_modules; if the model runs two inputs through "
            "its blocks by turns, let it run one after the other; or use shortcut='block', which needs no order."
        )


def is_ahead(value: torch.Tensor, carrier: torch.Tensor) -> bool:
    """Whether what is handed on for `carrier` `(..., in_features)` is a product with the taker's factor,
    `(..., r, 1)`, which the giver has computed in its place."""
    return value.dim() > carrier.dim() and value.shape[-1] == 1


def _seen_from(region: Region, given: Given) -> Kept:
    """What a region keeps of what one of its layers takes: nothing where another of its layers has given it."""
    if (giver := given.regions.get(region)) is not None:
        giver.takers += 1
        return INSIDE
    return region.keep(given.value)
