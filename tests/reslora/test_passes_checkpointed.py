"""Recomputations find the pass they belong to, in whatever way and order regions are checkpointed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.encoders import (
    Around,
    Encoder,
    adapted_encoder,
    assert_same,
    backwards,
    both_modes,
    by_torch,
    checkpointed,
    data,
    encoder,
    every_taking,
    every_variant,
    plain,
)
from helpers.gradients import gradients
from torch import nn
from torch.distributed._composable.checkpoint_activation import checkpoint as composable_checkpoint
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts


def by_a_wrapper(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """As FSDP's activation checkpointing wraps modules."""
    return checkpoint_wrapper(layer)(x)


class Pair(nn.Module):
    """One encoder for both of a pair, as a whole run through `around`."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.around: Around = plain

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.around(lambda a, b: self.encoder(a) * self.encoder(b), a, b)


@every_variant
@both_modes
@pytest.mark.parametrize("inner", ["plain", "checkpointed"])
def test_one_region_may_hold_two_passes(shortcut, pre_num, use_reentrant, inner):
    """A shared encoder of a pair; the inner blocks may be checkpointed too."""
    torch.manual_seed(0)
    model = adapted_encoder(Pair(), shortcut, pre_num)
    twin = copy.deepcopy(model)
    twin.base_model.model.around = by_torch(use_reentrant)
    if inner == "checkpointed":
        twin.base_model.model.encoder.around = by_torch(use_reentrant)
    for candidate in (model, twin):
        candidate(data(seed=1), data(seed=2)).square().sum().backward()
    assert_same(gradients(twin), gradients(model))


@every_variant
@pytest.mark.parametrize(("outer", "inner"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("span", [2, 4])
def test_regions_may_stand_in_regions(shortcut, pre_num, outer, inner, span):
    class Nested(Encoder):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            def group(start: int, x: torch.Tensor) -> torch.Tensor:
                for layer in self.layers[start : start + span]:
                    x = self.around(layer, x)
                return x

            for start in range(0, len(self.layers), span):
                x = self.outer(group, start, x)
            return x

    torch.manual_seed(0)
    base = Nested()
    base.outer = plain
    model = adapted_encoder(base, shortcut, pre_num)
    twin = checkpointed(model, by_torch(inner))
    twin.base_model.model.outer = by_torch(outer)
    assert_same(backwards(twin, data(), data(seed=2)), backwards(model, data(), data(seed=2)))


class GuidedCheckpoint(torch.autograd.Function):
    """Checkpointing that asks for the gradients of its inputs and of the parameters passed in, and no others."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., torch.Tensor], inputs: int, *args: torch.Tensor) -> torch.Tensor:
        ctx.function, ctx.inputs, ctx.parameters = function, args[:inputs], args[inputs:]
        return function(*ctx.inputs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        inputs = [x.detach().requires_grad_() for x in ctx.inputs]
        with torch.enable_grad():
            output = ctx.function(*[x.view_as(x) for x in inputs])
        grads = torch.autograd.grad(output, [*inputs, *ctx.parameters], grad, allow_unused=True)
        return None, None, *grads


@every_variant
def test_checkpointing_by_autograd_grad_loses_nothing(shortcut, pre_num):
    model = encoder(shortcut, pre_num)

    def around(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        parameters = [p for p in layer.parameters() if p.requires_grad]
        return GuidedCheckpoint.apply(layer, 1, x, *parameters)

    assert_same(backwards(checkpointed(model, around), data()), backwards(model, data()))


@every_variant
def test_other_ways_to_checkpoint(shortcut, pre_num):
    """The composable one has hooks on its modules, and no code of its own on the stack."""
    model = encoder(shortcut, pre_num)
    expected = backwards(copy.deepcopy(model), data(), data(seed=2))
    assert_same(backwards(checkpointed(model, by_a_wrapper), data(), data(seed=2)), expected)
    twin = copy.deepcopy(model)
    for layer in twin.base_model.model.layers:
        composable_checkpoint(layer)
    assert_same(backwards(twin, data(), data(seed=2)), expected)


@every_taking
def test_a_gradient_that_was_not_asked_for_is_not_lost_silently(shortcut, pre_num):
    """A region that asks for the gradient of its last parameter alone never comes to what it took."""

    class ParametersOnly(GuidedCheckpoint):
        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
            with torch.enable_grad():
                x = ctx.inputs[0].detach()
                output = ctx.function(x)
            torch.autograd.grad(output, [ctx.parameters[-1]], grad)
            return None, None, grad, *(torch.zeros_like(p) for p in ctx.parameters)

    def around(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        way = ParametersOnly if layer is model.base_model.model.layers[2] else GuidedCheckpoint
        return way.apply(layer, 1, x, *(p for p in layer.parameters() if p.requires_grad))

    model = checkpointed(encoder(shortcut, pre_num), around)
    with pytest.raises(RuntimeError, match=r"no gradient came back.*use_reentrant=False"):
        model(data()).square().sum().backward()


@every_variant
def test_an_interrupted_reentrant_backward_can_be_tried_again(shortcut, pre_num):
    model = encoder(shortcut, pre_num)
    expected = backwards(model, data())
    for failing in range(4):
        twin = checkpointed(encoder(shortcut, pre_num), by_torch(use_reentrant=True))
        fail = [True]

        def interrupt(gradient: torch.Tensor, fail: list[bool] = fail) -> None:
            if fail and fail.pop():
                raise InterruptedError

        def hook(module: nn.Module, args: Any, output: torch.Tensor, interrupt: Any = interrupt) -> None:
            if output.requires_grad and torch.is_grad_enabled():
                output.register_hook(interrupt)

        twin.base_model.model.layers[failing].up.register_forward_hook(hook)
        loss = twin(data()).square().sum()
        with pytest.raises(InterruptedError):
            loss.backward(retain_graph=True)
        twin.zero_grad()
        loss.backward()
        assert_same(gradients(twin), expected)


@pytest.mark.parametrize("pre_num", [1, -1])
def test_reentrant_checkpointing_accumulates_once_per_parameter(pre_num):
    """DDP, ZeRO and optimizers in the backward wait for that moment."""
    model = checkpointed(encoder("block", pre_num), by_torch(use_reentrant=True))
    fired: dict[str, int] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p, name=name: fired.__setitem__(name, fired.get(name, 0) + 1))
    backwards(model, data())
    assert len(fired) == 16
    assert set(fired.values()) == {1}


@every_variant
@pytest.mark.parametrize("around", ["checkpoint", "save_on_cpu", "save_on_cpu within a checkpoint"])
def test_gradients_of_gradients(shortcut, pre_num, around):
    def offloaded(function: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
        with torch.autograd.graph.save_on_cpu():
            return function(*args)

    ways = {
        "checkpoint": by_torch(use_reentrant=False),
        "save_on_cpu": offloaded,
        "save_on_cpu within a checkpoint": lambda function, x: checkpoint(
            lambda x: offloaded(function, x), x, use_reentrant=False
        ),
    }
    model = encoder(shortcut, pre_num)
    results = []
    for candidate in (model, checkpointed(model, ways[around])):
        x = data()
        (first,) = torch.autograd.grad(candidate(x).square().sum(), x, create_graph=True)
        first.square().sum().backward()
        results.append({**gradients(candidate), "x": x.grad, "first": first.detach()})
    assert_same(results[1], results[0])


@every_variant
@pytest.mark.parametrize("saved", ["add", "cat", "view", "mm"])
def test_selective_checkpointing_may_save_any_operation(shortcut, pre_num, saved):
    """It counts operations, so that those of a recomputation have to be those of the forward."""
    operations = {
        "add": [torch.ops.aten.add.Tensor],
        "cat": [torch.ops.aten.cat.default],
        "view": [torch.ops.aten.view.default, torch.ops.aten.reshape.default, torch.ops.aten.t.default],
        "mm": [torch.ops.aten.mm.default, torch.ops.aten.addmm.default],
    }

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        save = operation in operations[saved]
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    def around(function: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        contexts = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731
        return checkpoint(function, x, use_reentrant=False, context_fn=contexts)

    model = encoder(shortcut, pre_num)
    expected = backwards(copy.deepcopy(model), data(), data(seed=2))
    assert_same(backwards(checkpointed(model, around), data(), data(seed=2)), expected)
