"""Which pass is this? Outputs and gradients where several forwards and threads meet; orders that are refused."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.encoders import (
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
from helpers.oracle import randomize_adapters, relative_error
from helpers.tolerances import FLOAT64
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_reslora import ResLoRAConfig


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
        assert relative_error(output, seen["plain"][0]) < FLOAT64
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
    assert relative_error(outputs[1], outputs[0]) < FLOAT64
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
        else:  # the input itself, as wherever another's factor cannot be read
            model.base_model.model.layers[1].lora_A.default.register_forward_hook(lambda *args: None)
            with pytest.raises(RuntimeError, match=r"'layers\.0' handed on to layer 'layers\.1' was changed in place"):
                model(x)
    with torch.inference_mode():  # nobody counts changes there, so that a copy is handed on
        inferred = model(x)
    twin = copy.deepcopy(model)
    twin.base_model.model.forward = lambda x: twin.base_model.model.layers[1](twin.base_model.model.layers[0](x))
    with torch.no_grad():
        assert relative_error(inferred, twin(x)) < 1e-5


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
    model = adapted_encoder(Contrasting(), shortcut, pre_num)
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
    assert relative_error(model(x), reference(x)) < FLOAT64


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
