"""State of a forward: nothing outlives its use, and recomputations find the pass they belong to."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import weakref

import pytest
import torch
from helpers.adapters import VARIANTS, base_and_adapted
from helpers.gradients import assert_gradients_close, gradients
from helpers.oracle import randomize_adapters, relative_error
from helpers.tiny_models import TINY_MODELS, output_of
from helpers.tolerances import rounding
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_reslora import MoRAConfig, ResLoRAConfig
from peft_reslora.reslora.linking import chains_of

pytestmark = pytest.mark.usefixtures("float64")


def activations_seen(model: nn.Module) -> list[weakref.ref]:
    """Weak references to every tensor that enters or leaves a LoRA factor, taken by hooks in the next forward."""
    seen: list[weakref.ref] = []

    def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        seen.extend(weakref.ref(t) for t in (args[0], output))

    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.lora_A["default"].register_forward_hook(hook)
            module.register_forward_hook(hook)
    return seen


@pytest.mark.quick(mode=["backward"])
@pytest.mark.parametrize(("shortcut", "pre_num"), VARIANTS)
@pytest.mark.parametrize("mode", ["no_grad", "forward", "backward"])
def test_no_activation_outlives_a_forward(shortcut, pre_num, mode):
    _, model = base_and_adapted("llama", shortcut, pre_num)
    model.train()
    seen = activations_seen(model)
    gc.collect()
    gc.disable()  # a reference cycle would be a leak too
    try:
        if mode == "no_grad":
            with torch.no_grad():
                output_of(model, TINY_MODELS["llama"].inputs())
        elif mode == "forward":
            output_of(model, TINY_MODELS["llama"].inputs())
        else:
            output_of(model, TINY_MODELS["llama"].inputs()).sum().backward()
        assert len(seen) > 20
        assert [ref() for ref in seen if ref() is not None] == []
    finally:
        gc.enable()


@pytest.mark.quick(pre_num=[-1])
@pytest.mark.parametrize(("shortcut", "pre_num"), VARIANTS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_no_activation_outlives_a_checkpointed_backward(shortcut, pre_num, use_reentrant):
    _, model = base_and_adapted("llama", shortcut, pre_num)
    enable_checkpointing(model, use_reentrant)
    seen = activations_seen(model)
    gc.collect()
    gc.disable()
    try:
        output_of(model, TINY_MODELS["llama"].inputs()).sum().backward()
        assert len(seen) > 20
        assert [ref() for ref in seen if ref() is not None] == []
    finally:
        gc.enable()


def enable_checkpointing(model: nn.Module, use_reentrant: bool) -> None:
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})


def one_forward(model: nn.Module, inputs: list[dict]) -> None:
    output_of(model, inputs[0]).square().mean().backward()


def two_forwards_one_backward(model: nn.Module, inputs: list[dict]) -> None:
    (output_of(model, inputs[0]).square().mean() + output_of(model, inputs[1]).square().mean()).backward()


def two_forwards_two_backwards(model: nn.Module, inputs: list[dict]) -> None:
    losses = [output_of(model, i).square().mean() for i in inputs[:2]]
    for loss in losses:
        loss.backward()


def two_forwards_backwards_in_reverse(model: nn.Module, inputs: list[dict]) -> None:
    losses = [output_of(model, i).square().mean() for i in inputs[:2]]
    for loss in reversed(losses):
        loss.backward()


def no_grad_forward_in_between(model: nn.Module, inputs: list[dict]) -> None:
    loss = output_of(model, inputs[0]).square().mean()
    with torch.no_grad():
        output_of(model, inputs[2])
    loss.backward()


def evaluation_in_between(model: nn.Module, inputs: list[dict]) -> None:
    loss = output_of(model, inputs[0]).square().mean()
    model.eval()
    with torch.no_grad():
        model.generate(**inputs[2], max_new_tokens=3, do_sample=False)
    model.train()
    loss.backward()


def accumulation(model: nn.Module, inputs: list[dict]) -> None:
    for i in inputs:
        output_of(model, i).square().mean().backward()


SCHEDULES = [
    one_forward,
    two_forwards_one_backward,
    two_forwards_two_backwards,
    two_forwards_backwards_in_reverse,
    no_grad_forward_in_between,
    evaluation_in_between,
    accumulation,
]


@pytest.mark.support("gradient checkpointing, both modes, any order of forwards and backwards")
@pytest.mark.quick(schedule=[two_forwards_backwards_in_reverse], tuner=["input", "block", "middle"])
@pytest.mark.quick(schedule=[evaluation_in_between], pre_num=[-1])
@pytest.mark.quick(schedule=[accumulation], tuner=["input", "mora"])
@pytest.mark.parametrize(("tuner", "pre_num"), [*VARIANTS, ("mora", 1)])
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_checkpointing_keeps_the_gradient(schedule, use_reentrant, tuner, pre_num):
    """With dropout, so that a recomputation that took a wrong or fresh value would show."""
    if tuner == "mora":
        config = MoRAConfig(r=3, target_modules=TINY_MODELS["llama"].targets, mora_dropout=0.2)
        plain = randomize_adapters(get_peft_model(TINY_MODELS["llama"].make(), config))
    else:
        _, plain = base_and_adapted("llama", tuner, pre_num, lora_dropout=0.2)
    checkpointed = copy.deepcopy(plain)
    plain.train()
    plain.enable_input_require_grads()
    enable_checkpointing(checkpointed, use_reentrant)
    inputs = [{"input_ids": torch.randint(1, 53, shape)} for shape in ((2, 7), (2, 7), (3, 4))]
    for model in (plain, checkpointed):
        torch.manual_seed(11)
        schedule(model, inputs)
    assert_gradients_close(gradients(checkpointed), gradients(plain))


@pytest.mark.parametrize(("shortcut", "pre_num"), VARIANTS)
def test_retained_graphs_can_be_used_twice_under_checkpointing(shortcut, pre_num):
    _, plain = base_and_adapted("llama", shortcut, pre_num)
    checkpointed = copy.deepcopy(plain)
    enable_checkpointing(checkpointed, use_reentrant=False)
    inputs = TINY_MODELS["llama"].inputs()
    for model in (plain, checkpointed):
        loss = output_of(model, inputs).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
    assert_gradients_close(gradients(checkpointed), gradients(plain))


@pytest.mark.parametrize(("shortcut", "pre_num"), VARIANTS)
def test_gradients_asked_for_by_name_are_complete(shortcut, pre_num):
    """`torch.autograd.grad` prunes the graph; a gradient carried outside of it would be lost."""
    _, model = base_and_adapted("llama", shortcut, pre_num)
    checkpointed = copy.deepcopy(model)
    enable_checkpointing(checkpointed, use_reentrant=False)
    inputs = TINY_MODELS["llama"].inputs()
    output_of(model, inputs).square().mean().backward()
    for candidate in (model, checkpointed):
        names, parameters = zip(
            *((n, p) for n, p in candidate.named_parameters() if "layers.0" in n and "lora_A" in n), strict=True
        )
        grads = torch.autograd.grad(output_of(candidate, inputs).square().mean(), parameters)
        assert_gradients_close(
            dict(zip(names, grads, strict=True)), {n: g for n, g in gradients(model).items() if n in names}
        )


class _CheckpointedMLP(nn.Module):
    """Blocks checkpointed in a user's own way: regions of `span` blocks."""

    def __init__(self, span: int, use_reentrant: bool | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6)) for _ in range(6))
        self.span, self.use_reentrant = span, use_reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def run(start: int, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers[start : start + self.span]:
                x = x + layer(x)
            return x

        for start in range(0, len(self.layers), self.span):
            if self.use_reentrant is None:
                x = run(start, x)
            else:
                x = checkpoint(run, start, x, use_reentrant=self.use_reentrant)
        return x


@pytest.mark.parametrize(("shortcut", "pre_num"), VARIANTS)
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("span", [1, 2, 6])
@pytest.mark.support("torch.utils.checkpoint over any number of blocks of a custom model")
def test_checkpointed_regions_may_span_blocks(span, use_reentrant, shortcut, pre_num):
    torch.manual_seed(0)
    x = torch.randn(4, 6, requires_grad=True)
    config = ResLoRAConfig(r=2, target_modules=r"layers\.\d+\.[02]", shortcut=shortcut, pre_num=pre_num)
    plain = _CheckpointedMLP(span, None)
    checkpointed = _CheckpointedMLP(span, use_reentrant)
    checkpointed.load_state_dict(plain.state_dict())
    results = []
    for model in (plain, checkpointed):
        model = randomize_adapters(get_peft_model(model, copy.copy(config)))
        x.grad = None
        for _ in range(2):
            model(x).square().mean().backward()
        results.append({**gradients(model), "x": x.grad.clone()})
    assert_gradients_close(results[1], results[0])


@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_a_layer_before_its_predecessor_is_refused(shortcut):
    _, model = base_and_adapted("llama", shortcut, 1)
    layer = model.base_model.model.model.layers[2].self_attn.q_proj
    with pytest.raises(RuntimeError, match=r"layers\.2\.self_attn\.q_proj.* ran before its predecessor .*layers\.1"):
        layer(torch.randn(1, 3, 24))


@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_a_skipped_layer_is_refused_also_after_complete_passes(shortcut):
    _, model = base_and_adapted("llama", shortcut, 1)
    inputs = TINY_MODELS["llama"].inputs()
    output_of(model, inputs)
    layers = model.base_model.model.model.layers
    kept = layers[1]
    layers[1] = nn.Identity()
    layers[1].forward = lambda x, **kwargs: x
    with pytest.raises(RuntimeError, match=r"ran before its predecessor 'model\.layers\.1"):
        output_of(model, inputs)
    layers[1] = kept
    assert output_of(model, inputs).isfinite().all()


@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_inputs_of_different_shape_are_refused(shortcut):
    class Pooling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers[1](self.layers[0](x)[:, ::2])

    config = ResLoRAConfig(target_modules=r"layers\.\d", shortcut=shortcut)
    model = get_peft_model(Pooling(), config)
    with pytest.raises(ValueError, match=r"layers 'layers\.0' and 'layers\.1'.*\(3, 8, \d\) and \(3, 4, \d\).*block"):
        model(torch.randn(3, 8, 6))


class Flattening(nn.Module):
    """Two layers, of which the second is given the rows `(batch * length, features)`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[1](self.layers[0](x).flatten(0, -2))


@pytest.mark.parametrize("shape", [(1, 1, 6), (3, 1, 6), (3, 2, 6)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("shortcut", "r"), [("input", 6), ("input", 2), ("middle", 2), ("middle", 1)])
def test_inputs_of_more_dimensions_are_refused(shortcut, r, training, shape):
    model = get_peft_model(Flattening(), ResLoRAConfig(shortcut=shortcut, r=r, target_modules=["0", "1"]))
    given = shape if shortcut == "input" else (*shape[:-1], r)
    with torch.set_grad_enabled(training), pytest.raises(ValueError, match=re.escape(f"the shapes are {given} and")):
        model(torch.randn(shape))


@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_a_reentrant_region_after_a_plain_block_is_refused(shortcut):
    class FirstBlockPlain(_CheckpointedMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.layers[1], self.layers[0](x), use_reentrant=True)

    config = ResLoRAConfig(r=2, target_modules=r"layers\.\d+\.[02]", shortcut=shortcut)
    model = randomize_adapters(get_peft_model(FirstBlockPlain(1, None), config))
    with pytest.raises(RuntimeError, match=r"use_reentrant=True, but layer 'layers\.0\.0'"):
        model(torch.randn(4, 6, requires_grad=True))


@pytest.mark.parametrize(("shortcut", "pre_num"), VARIANTS)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_their_own_chains(duplicate, shortcut, pre_num):
    _, model = base_and_adapted("llama", shortcut, pre_num)
    inputs = TINY_MODELS["llama"].inputs()
    expected = output_of(model, inputs)
    twin = duplicate(model)
    own = {id(module) for module in twin.modules()}
    chains = chains_of(twin, "default")
    assert len(chains) == 7
    assert all(id(layer) in own for chain in chains for layer in chain.layers)
    for p in model.parameters():
        p.data.zero_()
    assert relative_error(output_of(twin, inputs), expected) < rounding(twin)
