"""Relay: how the layers of a chain hand tensors on within one forward pass.

In an ordinary forward pass the tensor itself is handed on, graph and all: autograd then does what it always does. The
pass is forgotten as soon as its last layer has run.

A checkpointed region is run again during the backward pass, and its layers must then see what they saw the first time.
Two things are needed. What a layer took inside a checkpointed region is kept, detached, as long as the region's own
graph lives. And the recomputation has to find the pass it belongs to, since several forwards may wait for their
backward: the autograd node that is being evaluated tells.

- Non-re-entrant checkpointing recomputes while a node of the original graph asks for its saved tensors. Sequence
  numbers of nodes grow with time, so the pass is the latest one that had started when the node was made. The graph
  itself is the original one, and its edges are complete.
- Re-entrant checkpointing runs the region without a graph first, and builds the region's graph, cut off from the
  rest, during the backward pass. No edge can cross, so the gradient is carried by hand: the taker deposits it, and the
  giver, whose region is recomputed later, adds the deposit to its own gradient.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction, once_differentiable

from peft_reslora.reslora.chain import reach

_PASSES = "peft_reslora_passes"  # attribute of a re-entrant checkpoint's node


class ForwardPass:
    """What the layers of one chain handed on in one forward pass, by position."""

    def __init__(self) -> None:
        # Private in torch (read in 2.13, where torch's own graph tracing uses it).
        self.started = 0 if torch.compiler.is_compiling() else torch.autograd._get_sequence_nr()
        self.values: dict[int, torch.Tensor] = {}  # with their graph, until the last layer that takes them has run
        self.kept: dict[int, torch.Tensor] = {}  # detached, for recomputations
        self.without_graph: set[int] = set()  # positions that gave inside a re-entrant region
        self.deposits: dict[int, torch.Tensor] = {}  # gradients on their way to such a region
        self.last = 0  # the position that ran last


class _Give(torch.autograd.Function):
    """Identity that keeps the pass alive with the graph; its backward adds what later layers have deposited.

    `anchor` is an empty tensor that requires a gradient, so that there is a node even where `value` requires none.
    """

    @staticmethod
    def forward(
        ctx: Any, anchor: torch.Tensor, value: torch.Tensor, forward_pass: ForwardPass, position: int
    ) -> torch.Tensor:
        ctx.forward_pass, ctx.position = forward_pass, position
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor, None, None]:
        deposit = ctx.forward_pass.deposits.pop(ctx.position, None)
        return None, grad if deposit is None else grad + deposit, None, None


class _Take(torch.autograd.Function):
    """The value handed on, without its graph; its backward deposits the gradient with the layer that gave it."""

    @staticmethod
    def forward(
        ctx: Any, anchor: torch.Tensor, value: torch.Tensor, forward_pass: ForwardPass, position: int
    ) -> torch.Tensor:
        ctx.forward_pass, ctx.position = forward_pass, position
        return value.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, None, None, None]:
        deposits, position = ctx.forward_pass.deposits, ctx.position
        deposits[position] = deposits[position] + grad if position in deposits else grad
        return None, None, None, None


class Relay:
    """Hands one tensor per layer to the `pre_num` layers after it.

    With `pre_num` -1 each layer hands on the sum of its own tensor and all earlier ones, so that the work per layer
    does not grow with depth. Holds no tensor once the last layer of the chain has run; copies and pickles are empty.

    `hands_factors`: the tensors are not computed in the forward pass but are copies of parameters, which are not
    summed, and which a layer may also have from elsewhere if an earlier layer hands it none.
    """

    def __init__(self, names: Sequence[str], pre_num: int, hands_factors: bool = False) -> None:
        self.names = list(names)
        self.hands_factors = hands_factors
        self.accumulates = pre_num == -1 and not hands_factors
        self.pre_num = 1 if self.accumulates else reach(len(names), pre_num)
        self._forget()

    def _forget(self) -> None:
        self._current: dict[int, ForwardPass] = {}  # by thread, so that threads do not mix their passes
        self._kept: weakref.WeakSet[ForwardPass] = weakref.WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def crosses_graphs(self, training: bool) -> bool:
        """Whether the running layer's neighbours may have graphs of their own: in re-entrant checkpointing, and in the
        recomputation of what was handed on."""
        return self._recomputed_pass() is not None or isinstance(_enclosing_checkpoint(training), BackwardCFunction)

    def pass_on(self, position: int, value: torch.Tensor, training: bool) -> tuple[torch.Tensor, list[Any], bool]:
        """Take what earlier layers handed to the one at `position`, and hand `value` to the later ones.

        Returns:
            `value` as this layer itself has to use it, what it takes (nearest first; None for a factor that was not
            handed), and whether this is a recomputation, which counts for no statistics.

        Raises:
            RuntimeError: if an earlier layer has not run in this forward pass, or if a region that is checkpointed
                re-entrantly takes from a layer outside of such a region.
        """
        if (recomputed := self._recomputed_pass()) is not None:
            return *self._recompute(position, value, *recomputed), True
        checkpoint = _enclosing_checkpoint(training)
        forward_pass = self._running_pass(position)
        previous: list[Any] = [self._take(forward_pass, k, position, checkpoint) for k in self._givers(position)]
        if self.accumulates:
            value, previous = sum(previous, value), []
        if checkpoint is not None:
            value = self._keep(forward_pass, position, value, checkpoint)
        self._hand_on(forward_pass, position, value)
        return value, previous, False

    def _givers(self, position: int) -> range:
        return range(position - 1, position - 1 - reach(position, self.pre_num), -1)

    def _running_pass(self, position: int) -> ForwardPass:
        thread = _thread()
        running = self._current.get(thread)
        # Where factors are handed, layers may be left out, so that no layer is sure to be the first.
        if position == 0 or (self.hands_factors and (running is None or position <= running.last)):
            if running is not None:
                running.values.clear()
            self._current[thread] = ForwardPass()
        elif running is None:
            raise RuntimeError(self._out_of_order(position, position - 1))
        self._current[thread].last = position
        return self._current[thread] if position < len(self.names) - 1 else self._current.pop(thread)

    def _take(
        self, forward_pass: ForwardPass, giver: int, taker: int, checkpoint: BackwardCFunction | bool | None
    ) -> torch.Tensor | None:
        if giver not in forward_pass.values:
            if self.hands_factors:
                return None
            raise RuntimeError(self._out_of_order(taker, giver))
        value = forward_pass.values[giver]
        crossed = isinstance(checkpoint, BackwardCFunction) and giver not in forward_pass.without_graph
        if crossed and value.requires_grad:
            raise RuntimeError(
                f"Layer {self.names[taker]!r} is checkpointed with use_reentrant=True, but layer "
                f"{self.names[giver]!r}, from which it takes, is not: that layer's gradient would be lost. Checkpoint "
                "with use_reentrant=False, or checkpoint all blocks."
            )
        if checkpoint is not None:
            forward_pass.kept[giver] = value.detach().requires_grad_(value.requires_grad)
        if giver in forward_pass.without_graph and torch.is_grad_enabled():
            return _Take.apply(_anchor(value), value, forward_pass, giver)
        return value

    def _keep(
        self, forward_pass: ForwardPass, position: int, value: torch.Tensor, checkpoint: BackwardCFunction | bool
    ) -> torch.Tensor:
        """Let the graph of the checkpointed region hold the pass, so that a recomputation finds it."""
        self._kept.add(forward_pass)
        if isinstance(checkpoint, BackwardCFunction):
            checkpoint.__dict__.setdefault(_PASSES, {})[self] = forward_pass
            forward_pass.without_graph.add(position)
            return value
        return _Give.apply(_anchor(value), value, forward_pass, position)

    def _hand_on(self, forward_pass: ForwardPass, position: int, value: torch.Tensor) -> None:
        if position == len(self.names) - 1:
            forward_pass.values.clear()
        else:
            forward_pass.values[position] = value
            forward_pass.values.pop(position - self.pre_num, None)

    def _recomputed_pass(self) -> tuple[ForwardPass, bool] | None:
        """The pass that is recomputed in the current backward, and whether re-entrantly; None in a forward pass."""
        # Private in torch (read in 2.13): torch.utils.checkpoint uses the first, torch.autograd.graph the second.
        if torch.compiler.is_compiling() or not self._kept or torch._C._current_graph_task_id() == -1:
            return None
        node: Any = torch._C._current_autograd_node()
        region: dict[Relay, ForwardPass] = getattr(node, _PASSES, {})
        if self in region:
            return region[self], True
        started = [kept for kept in self._kept if node is None or kept.started <= node._sequence_nr()]
        return (max(started, key=lambda kept: kept.started), False) if started else None

    def _recompute(
        self, position: int, value: torch.Tensor, forward_pass: ForwardPass, reentrant: bool
    ) -> tuple[torch.Tensor, list[Any]]:
        previous: list[Any] = [forward_pass.kept.get(k) for k in self._givers(position)]
        if reentrant:
            previous = [
                None if kept is None else _Take.apply(_anchor(kept), kept, forward_pass, k)
                for kept, k in zip(previous, self._givers(position), strict=True)
            ]
        if self.accumulates:
            value, previous = sum(previous, value), []
        return _Give.apply(_anchor(value), value, forward_pass, position), previous

    def _out_of_order(self, position: int, missing: int) -> str:
        return (
            f"Layer {self.names[position]!r} ran before its predecessor {self.names[missing]!r}: the shortcut needs "
            "what that layer hands on in the same forward pass. Do not skip, reorder or repeat blocks, or end the "
            "chain between them with chain_pattern; shortcut='block' needs no order."
        )


def _enclosing_checkpoint(training: bool) -> BackwardCFunction | bool | None:
    """The checkpoint around the running code: a re-entrant one's node, True for a non-re-entrant one, else None."""
    if torch.compiler.is_compiling():
        return None
    if torch.is_grad_enabled():
        # Set by non-re-entrant checkpointing (and by saved-tensor offloading, where keeping does no harm).
        return True if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None else None
    return _enclosing_function() if training else None


def _enclosing_function() -> BackwardCFunction | None:
    """The node of the nearest autograd Function whose `forward(ctx, ...)` is running.

    Re-entrant checkpointing, of torch and of others, is such a Function; nothing else tells its forward from a
    forward without gradients, whose values nobody will ask for again.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_varnames[:1] == ("ctx",):
            ctx = frame.f_locals.get("ctx")
            if isinstance(ctx, BackwardCFunction):
                return ctx
        frame = frame.f_back  # type: ignore[assignment]
    return None


@torch.compiler.assume_constant_result
def _thread() -> int:
    """The running thread; in compiled code the one that compiled, so that compiled and eager layers meet."""
    return threading.get_ident()


def _anchor(value: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, device=value.device, requires_grad=True)
