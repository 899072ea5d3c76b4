"""Which pass is this? Outputs and gradients where several forwards, recomputations and threads meet.

Everything is in float64 and compared with the same model without checkpointing, run in the plainest order.
"""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.oracle import randomize_adapters, relative_error
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed._composable.checkpoint_activation import checkpoint as composable_checkpoint
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from peft_reslora import ResLoRAConfig

VARIANTS = [("input", 1), ("block", 1), ("block", -1), ("middle", 1), ("middle", -1)]
TAKING = [("input", 1), ("middle", 1), ("middle", -1)]  # those that take what another layer saw
BOUND = 1e-10

every_variant = pytest.mark.parametrize(("shortcut", "pre_num"), VARIANTS)
every_taking = pytest.mark.parametrize(("shortcut", "pre_num"), TAKING)
both_modes = pytest.mark.parametrize("use_reentrant", [True, False])

Around = Callable[..., torch.Tensor]


def plain(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def by_torch(use_reentrant: bool) -> Around:
    return lambda function, *args: checkpoint(function, *args, use_reentrant=use_reentrant)


def by_a_wrapper(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """As FSDP's activation checkpointing wraps modules."""
    return checkpoint_wrapper(layer)(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 7), nn.Linear(7, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Encoder(nn.Module):
    """Blocks, each run through `around`."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(depth))
        self.around: Around = plain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = self.around(layer, x)
        return x


class Pair(nn.Module):
    """One encoder for both of a pair, as a whole run through `around`."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.around: Around = plain

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.around(lambda a, b: self.encoder(a) * self.encoder(b), a, b)


def adapted(model: nn.Module, shortcut: str, pre_num: int, **fields: Any) -> nn.Module:
    config = ResLoRAConfig(r=2, target_modules=["up", "down"], shortcut=shortcut, pre_num=pre_num, **fields)
    return randomize_adapters(get_peft_model(model.double(), config)).double().train()


def encoder(shortcut: str, pre_num: int, **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    return adapted(Encoder(), shortcut, pre_num, **fields)


def checkpointed(model: nn.Module, around: Around) -> nn.Module:
    """A copy of the model whose blocks are run through `around`."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if hasattr(module, "around"):
            module.around = around
    return twin


def data(*shape: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (3, 5)), generator=generator, dtype=torch.float64).requires_grad_()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert expected
    for name, grad in expected.items():
        assert relative_error(actual[name], grad) < BOUND, name


def backwards(model: nn.Module, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    for x in inputs:
        model(x).square().sum().backward()
    return gradients(model)


@pytest.mark.support("nn.DataParallel: forwards in threads, with checkpointing")
@every_variant
@both_modes
def test_threads_do_not_meet(shortcut, pre_num, use_reentrant):
    """As in nn.DataParallel: forwards in threads, in step with each other, and one backward for all."""
    model = encoder(shortcut, pre_num)
    expected = backwards(copy.deepcopy(model), data(seed=1), data(seed=2))
    meet = threading.Barrier(2)

    def around(function: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        if threading.current_thread() is not threading.main_thread():
            meet.wait(timeout=60)
        return checkpoint(function, x, use_reentrant=use_reentrant)

    model = checkpointed(model, around)
    losses: dict[int, torch.Tensor] = {}

    def forward(seed: int) -> None:
        losses[seed] = model(data(seed=seed)).square().sum()

    threads = [threading.Thread(target=forward, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sum(losses.values()).backward()
    assert_same(gradients(model), expected)


@every_variant
@both_modes
@pytest.mark.parametrize("inner", ["plain", "checkpointed"])
def test_one_region_may_hold_two_passes(shortcut, pre_num, use_reentrant, inner):
    """A shared encoder of a pair; the inner blocks may be checkpointed too."""
    torch.manual_seed(0)
    model = adapted(Pair(), shortcut, pre_num)
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
    model = adapted(base, shortcut, pre_num)
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
@both_modes
@pytest.mark.parametrize("grad", [True, False])
def test_a_forward_during_a_backward_is_a_forward(shortcut, pre_num, use_reentrant, grad):
    model = encoder(shortcut, pre_num)
    twin = checkpointed(model, by_torch(use_reentrant))
    seen: dict[str, list[torch.Tensor]] = {}

    def run(candidate: nn.Module, name: str) -> None:
        x = data()
        handles = []

        def look(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            if torch.is_grad_enabled() and output.requires_grad and not seen.get(name + "-inside"):
                output.register_hook(hook)

        def hook(gradient: torch.Tensor) -> None:
            seen[name + "-inside"] = [torch.ones(1)]  # the hook's own forward registers none
            with torch.set_grad_enabled(grad):
                seen.setdefault(name, []).append(candidate(data(seed=9)).detach())
            seen.pop(name + "-inside")

        block = candidate.base_model.model.layers[2]
        handles.append(block.register_forward_hook(look))
        candidate(x).square().sum().backward()
        handles[0].remove()

    run(model, "plain")
    run(twin, "checkpointed")
    assert seen["plain"]
    assert seen["checkpointed"]
    for output in seen["checkpointed"]:
        assert relative_error(output, seen["plain"][0]) < BOUND
    assert_same(gradients(twin), gradients(model))


class RunsAModel(torch.autograd.Function):
    """Identity; its backward runs a model, as losses that compare with a teacher do. Written with `setup_context`."""

    @staticmethod
    def forward(x: torch.Tensor, run: Callable[[], None]) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.run = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.run()
        return grad, None


@every_variant
@both_modes
def test_a_function_whose_backward_runs_the_model(shortcut, pre_num, use_reentrant):
    model = encoder(shortcut, pre_num)
    twin = checkpointed(model, by_torch(use_reentrant))
    outputs: list[torch.Tensor] = []
    for candidate in (model, twin):

        def run(candidate: nn.Module = candidate) -> None:
            outputs.append(candidate(data(seed=7)).detach())

        RunsAModel.apply(candidate(data()), run).square().sum().backward()
    assert relative_error(outputs[1], outputs[0]) < BOUND
    assert_same(gradients(twin), gradients(model))


@every_variant
def test_a_region_in_evaluation_mode_beside_one_in_training(shortcut, pre_num):
    model = encoder(shortcut, pre_num)
    twin = checkpointed(model, by_torch(use_reentrant=True))
    for candidate in (model, twin):
        loss = candidate.eval()(data()).square().sum()
        other = candidate.train()(data(seed=2)).square().sum()
        loss.backward()
        other.backward()
    assert_same(gradients(twin), gradients(model))


@every_taking
def test_layers_called_apart_are_refused(shortcut, pre_num):
    """Two micro-batches, layer by layer: nothing tells whose input the second layer would take."""
    model = encoder(shortcut, pre_num)
    first, second = model.base_model.model.layers[:2]
    a, b = first(data(seed=1)), first(data(seed=2))
    with pytest.raises(RuntimeError, match=r"'layers\.1\.up'.*outside of a call of a module that holds both"):
        second(a)
    with pytest.raises(RuntimeError, match=r"'layers\.1\.up'.*outside of a call of a module that holds both"):
        second(b)


@every_taking
@pytest.mark.parametrize("dropped", [0, 1, 2])
def test_a_skipped_block_is_refused_and_not_filled_from_an_earlier_pass(shortcut, pre_num, dropped):
    model = encoder(shortcut, pre_num)

    def skip(function: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x if function is layers[dropped] else function(x)

    layers = model.base_model.model.layers
    model(data())
    model.base_model.model.around = skip
    with pytest.raises(RuntimeError, match=rf"ran before its predecessor 'layers\.{dropped}\.up'.*layerdrop=0"):
        model(data(seed=2))
    model.base_model.model.around = plain
    assert model(data(seed=2)).isfinite().all()


@every_taking
def test_a_layer_that_runs_twice_in_a_pass_is_refused(shortcut, pre_num):
    model = encoder(shortcut, pre_num)
    model.base_model.model.around = lambda layer, x: layer(layer(x))
    with pytest.raises(RuntimeError, match=r"ran again in one call of the model.*'block'"):
        model(data())


@every_taking
@pytest.mark.parametrize("grad", [True, False])
def test_a_change_in_place_between_two_layers_is_refused(shortcut, pre_num, grad):
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x * 1.0
            y = self.layers[0](x)
            x.add_(1.0)
            return self.layers[1](y)

    config = ResLoRAConfig(r=2, target_modules=r"layers\.\d", shortcut=shortcut, pre_num=pre_num)
    model = randomize_adapters(get_peft_model(InPlace(), config))
    x = torch.randn(3, 5)
    with torch.set_grad_enabled(grad):
        if shortcut == "middle":  # hands on a tensor of its own, which nobody else changes
            assert model(x).isfinite().all()
        else:
            with pytest.raises(RuntimeError, match=r"'layers\.0' handed on to layer 'layers\.1' was changed in place"):
                model(x)
    with torch.inference_mode():  # nobody counts changes there, so that a copy is handed on
        inferred = model(x)
    twin = copy.deepcopy(model)
    twin.base_model.model.forward = lambda x: twin.base_model.model.layers[1](twin.base_model.model.layers[0](x))
    with torch.no_grad():
        assert relative_error(inferred, twin(x)) < 1e-5


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
@pytest.mark.parametrize("mode", ["plain", "reentrant", "non-reentrant"])
def test_an_exception_in_mid_forward_leaves_nothing(shortcut, pre_num, mode):
    model = encoder(shortcut, pre_num)
    if mode != "plain":
        model = checkpointed(model, by_torch(mode == "reentrant"))
    seen: list[weakref.ref[torch.Tensor]] = []

    class Fault(Exception):
        pass

    def fail(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        raise Fault

    def note(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        seen.extend(weakref.ref(t) for t in (args[0], output))

    layers = model.base_model.model.layers
    for layer in layers:
        layer.up.register_forward_hook(note)
        layer.down.register_forward_hook(note)
    gc.collect()
    gc.disable()
    try:
        for failing in range(4):
            seen.clear()
            handle = layers[failing].register_forward_hook(fail)
            with pytest.raises(Fault):
                model(data())
            handle.remove()
            assert len(seen) == 4 * (failing + 1)
            assert [ref() for ref in seen if ref() is not None] == []
    finally:
        gc.enable()
    expected = encoder(shortcut, pre_num)(data(seed=3))
    assert relative_error(model(data(seed=3)), expected) < BOUND


@every_variant
def test_an_interrupt_leaves_no_trace_in_the_next_pass(shortcut, pre_num):
    """Hooks do not run after a KeyboardInterrupt."""
    model = encoder(shortcut, pre_num)

    def interrupt(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        raise KeyboardInterrupt

    base = model.base_model.model
    handle = base.layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        base(data())
    handle.remove()
    from peft_reslora.reslora.passes import _running

    assert relative_error(base(data(seed=3)), encoder(shortcut, pre_num)(data(seed=3))) < BOUND
    assert _running.scopes == []


@every_variant
def test_a_model_may_call_itself_in_its_forward(shortcut, pre_num):
    class Contrasting(Encoder):
        inside = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for n, layer in enumerate(self.layers):
                if n == 2 and not self.inside:
                    self.inside = True
                    x = x - 0.1 * self(x)
                    self.inside = False
                x = layer(x)
            return x

    torch.manual_seed(0)
    model = adapted(Contrasting(), shortcut, pre_num)
    x = data()
    inner = model.base_model.model
    inner.inside = True
    values: list[torch.Tensor] = []
    handle = inner.layers[2].register_forward_pre_hook(lambda module, args: values.append(args[0].detach()))
    model(x)
    handle.remove()
    correction = model(values[0])
    inner.inside = False

    class Split(Encoder):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for n, layer in enumerate(self.layers):
                x = layer(x - 0.1 * correction if n == 2 else x)
            return x

    reference = copy.deepcopy(model)
    reference.base_model.model.__class__ = Split
    assert relative_error(model(x), reference(x)) < BOUND


@every_variant
def test_a_deleted_model_is_freed_at_once(shortcut, pre_num):
    model = encoder(shortcut, pre_num)
    model(data()).sum().backward()
    parts = [weakref.ref(module) for module in model.base_model.model.modules()]
    gc.collect()
    gc.disable()
    try:
        del model
        assert [part() for part in parts if part() is not None] == []
    finally:
        gc.enable()


@every_variant
def test_one_block_is_saved_alone(shortcut, pre_num):
    """As by checkpoints of parts, and by engines that send blocks to other processes."""
    sizes = {}
    for depth in (2, 8):
        torch.manual_seed(0)
        model = adapted(Encoder(depth), shortcut, pre_num)
        sizes[depth] = len(pickle.dumps(model.base_model.model.layers[1]))
    assert sizes[8] < 1.5 * sizes[2]


@pytest.mark.support("a part of a model, such as a pipeline stage", verdict="refused")
@every_variant
def test_a_part_of_a_model_is_refused(shortcut, pre_num):
    """A pipeline stage that was copied: its first block would need what the one before it has."""
    model = encoder(shortcut, pre_num)
    stage = Encoder()
    stage.layers = copy.deepcopy(model.base_model.model.layers[2:])
    with pytest.raises(RuntimeError, match=r"'layers\.[012]\.up'.*(part of the model|pipeline stage)"):
        stage.double()(data())


@every_taking
def test_a_model_whose_first_blocks_were_removed_is_refused(shortcut, pre_num):
    model = encoder(shortcut, pre_num)
    model.base_model.model.layers = model.base_model.model.layers[1:]
    with pytest.raises(RuntimeError, match=r"'layers\.1\.up' ran before its predecessor 'layers\.0\.up'"):
        model(data())


@every_variant
def test_doorways_go_with_the_adapter(shortcut, pre_num):
    model = encoder(shortcut, pre_num)
    unloaded = model.merge_and_unload() if shortcut == "block" else model.unload()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in unloaded.modules())
    assert b"peft_reslora" not in pickle.dumps(unloaded)


# What else may stand around a layer


@every_variant
def test_a_single_vector_is_an_input(shortcut, pre_num):
    model = encoder(shortcut, pre_num)
    rows = backwards(copy.deepcopy(model), data(1, 5))
    assert_same(backwards(model, data(5)), rows)


@every_variant
def test_function_transforms_see_the_layers(shortcut, pre_num):
    model = encoder(shortcut, pre_num)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    x = data().detach()

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    expected = backwards(copy.deepcopy(model), x)
    assert_same(torch.func.grad(loss)({n: p.detach() for n, p in parameters.items()}, x), expected)
    by_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(
        {n: p.detach() for n, p in parameters.items()}, x
    )
    assert_same({n: g.sum(0) for n, g in by_sample.items()}, expected)
    _, tangent = torch.func.jvp(lambda x: loss(parameters, x), (x,), (torch.ones_like(x),))
    leaf = x.clone().requires_grad_()
    loss(parameters, leaf).backward()
    assert relative_error(tangent, leaf.grad.sum()) < BOUND


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


@every_variant
def test_inputs_made_in_inference_mode(shortcut, pre_num):
    model = encoder(shortcut, pre_num)
    with torch.inference_mode():
        x = torch.randn(3, 5, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x.clone())
    with torch.inference_mode():
        assert relative_error(model(x), expected) < BOUND


@pytest.mark.slow
@every_variant
def test_compiled_blocks_in_eager_regions_are_right_or_refused(shortcut, pre_num):
    torch._dynamo.reset()
    model = encoder(shortcut, pre_num)
    expected = backwards(copy.deepcopy(model), data())
    twin = checkpointed(model, by_torch(use_reentrant=False))
    for layer in twin.base_model.model.layers:
        layer.compile(backend="aot_eager")
    try:
        actual = backwards(twin, data())
    except RuntimeError as error:
        assert "compile the whole model" in str(error)  # noqa: PT017
        assert shortcut != "block"
    else:
        assert_same(actual, expected)
    torch._dynamo.reset()


@pytest.mark.slow
@every_taking
def test_compiled_code_with_breaks_on_two_threads(shortcut, pre_num):
    class Breaking(Encoder):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
                torch._dynamo.graph_break()
            return x

    torch._dynamo.reset()
    torch.manual_seed(0)
    model = adapted(Breaking(), shortcut, pre_num, merge_estimator="weight_norm").eval()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
    inputs = [data(seed=seed).detach() for seed in range(8)]
    expected = [model(x).detach() for x in inputs]
    compiled(inputs[0])
    faults: list[Any] = []

    def work() -> None:
        for turn in range(200):
            x, output = inputs[turn % 8], expected[turn % 8]
            try:
                error = relative_error(compiled(x), output)
            except Exception as exception:
                faults.append(exception)
            else:
                if error > BOUND:
                    faults.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch._dynamo.reset()
    assert faults == []


def test_no_more_is_held_than_by_lora():
    """The frozen model and LoRA free at once; so the tests above show something."""
    torch.manual_seed(0)
    model = get_peft_model(Encoder(), LoraConfig(r=2, target_modules=["up", "down"]))
    part = weakref.ref(model.base_model.model.layers[1])
    gc.collect()
    gc.disable()
    try:
        del model
        assert part() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("around", ["plain", "checkpointed"])
def test_a_deep_chain_that_takes_from_all_sums_whole_updates(dropout, around, monkeypatch):
    """Where that is cheaper than the factors side by side; unequal shapes, scalings and ranks."""
    from peft_reslora.reslora import factor_sharing

    torch.manual_seed(0)
    patterns = {"rank_pattern": {r"layers\.2\.up": 3}, "alpha_pattern": {r"layers\.1\.down": 5}}
    model = adapted(Encoder(6), "block", -1, lora_dropout=dropout, **patterns)
    if around == "checkpointed":
        model = checkpointed(model, by_torch(use_reentrant=False))
    twin = copy.deepcopy(model)
    results = []
    for candidate, cheaper in ((model, True), (twin, False)):
        asked: list[tuple[int, ...]] = []

        def decided(*sizes: int, asked: list[tuple[int, ...]] = asked, cheaper: bool = cheaper) -> bool:
            asked.append(sizes)
            return cheaper

        monkeypatch.setattr(factor_sharing, "whole_update_is_cheaper", decided)
        torch.manual_seed(3)
        results.append(backwards(candidate, data(), data(seed=2)))
        assert (3, 2, 13, 5, 7) in asked
    assert_same(results[0], results[1])


@pytest.mark.parametrize(("rows", "ranks", "expected"), [(256, 100, False), (256, 1600, True), (1, 800, False)])
def test_when_whole_updates_are_cheaper(rows, ranks, expected):
    """Multiplications counted: rows (in + out) R against in out (rows + r)."""
    from peft_reslora.reslora.sums import whole_update_is_cheaper

    assert whole_update_is_cheaper(rows, 8, ranks, 256, 256) is expected
