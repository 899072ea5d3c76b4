"""Products with thin factors, and inputs in half precision beside float32 factors, against float64 and PEFT's LoRA."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.adapters import VARIANTS, adapted, base_and_adapted, tuner_layers
from helpers.gradients import gradients
from helpers.oracle import factors_of, randomize_adapters, relative_error, run_oracle
from helpers.tiny_models import TINY_MODELS, output_of
from helpers.tolerances import half_rounding, rounding
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from peft_reslora import ResLoRAConfig
from peft_reslora.reslora import products
from peft_reslora.reslora.products import expand, project

HALF = torch.bfloat16
AUTOCAST = [None, torch.bfloat16]


@pytest.fixture(autouse=True, params=[True, False], ids=["large", "small"])
def large(request, monkeypatch) -> bool:
    """Whether all tensors count as large, which are multiplied by Functions."""
    monkeypatch.setattr(products, "_LARGE", 0 if request.param else 2**40)
    return request.param


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7), (7,), (0, 7)])
def test_products_have_gradients_and_gradients_of_gradients(shape):
    x, A, A2, B = random(*shape), random(3, 7), random(2, 7), random(11, 3)
    result = random(*shape[:-1], 11)

    def both(x: torch.Tensor, A: torch.Tensor, A2: torch.Tensor, B: torch.Tensor, result: torch.Tensor) -> Any:
        hidden, ahead = project(x, [A, A2])
        return expand(result, hidden, B, 0.7), ahead

    out, ahead = both(x, A, A2, B, result)
    if x.numel():
        assert relative_error(out, result + 0.7 * x @ A.T @ B.T) < 1e-14
        assert relative_error(ahead, x @ A2.T) < 1e-14
    assert gradcheck(both, (x, A, A2, B, result))
    assert gradgradcheck(both, (x, A, A2, B, result))


@pytest.mark.parametrize("hidden_dtype", [torch.float32, HALF])
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7), (7,)])
def test_the_output_can_be_changed_in_place(shape, hidden_dtype):
    result, hidden, B = (
        random(*shape, dtype=HALF),
        random(*shape[:-1], 3, dtype=hidden_dtype),
        random(7, 3, dtype=HALF),
    )
    out = expand(result, hidden, B, 0.7)
    expected = torch.autograd.grad((3 * out).sum(), [result, hidden, B], retain_graph=True)
    out *= 3  # as Falcon adds up, and as activations with inplace=True
    found = torch.autograd.grad(out.sum(), [result, hidden, B])
    assert all(map(torch.equal, found, expected))


def chain(config: PeftConfig, widths: int = 24, dtype: torch.dtype = HALF) -> Any:
    """Three layers in half precision with adapters in float32, of random factors."""
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(widths, widths) for _ in range(3))).to(dtype)
    config.target_modules = {"0", "1", "2"}
    model = randomize_adapters(get_peft_model(base, config)).train()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    return model


def errors_against_float64(model: Any, x: torch.Tensor, autocast: torch.dtype | None) -> dict[str, float]:
    """Of the output and of each gradient, of a model in half precision against the same in float64."""
    exact = copy.deepcopy(model).double()
    weights = random(*x.shape, seed=5).detach()
    wide = x.detach().double().requires_grad_()
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", autocast or HALF, enabled=autocast is not None):
        out = model(x)
    (out.double() * weights).sum().backward()
    expected = exact(wide)
    (expected * weights).sum().backward()
    errors = {"output": relative_error(out, expected), "x": relative_error(x.grad, wide.grad)}
    wanted = gradients(exact)
    for name, grad in gradients(model).items():
        assert grad.dtype == torch.float32
        errors[name] = relative_error(grad, wanted[name])
    return errors


@pytest.mark.quick(pre_num=[1])
@pytest.mark.parametrize("autocast", AUTOCAST)
@pytest.mark.parametrize(("shortcut", "pre_num"), VARIANTS)
def test_half_precision_beside_float32_factors_is_as_exact_as_lora(shortcut, pre_num, autocast):
    """As many roundings to half precision as in LoRA, or fewer, so no larger errors: by chance up to twice as large,
    since they are other ones (and the mean over all tensors hardly so)."""
    x = random(64, 24).to(HALF)
    ours = errors_against_float64(chain(ResLoRAConfig(r=4, shortcut=shortcut, pre_num=pre_num)), x, autocast)
    lora = errors_against_float64(chain(LoraConfig(r=4)), x, autocast)
    assert ours.keys() == lora.keys()
    for name, error in ours.items():
        assert error < 2 * max(lora[name], torch.finfo(HALF).eps / 2), name
    assert sum(ours.values()) < 1.25 * sum(lora.values())


@pytest.mark.parametrize(("shortcut", "pre_num"), VARIANTS)
def test_without_autocast_products_are_in_float32(shortcut, pre_num):
    """The gradients of the last layer, whose gradient from above and whose input are given, have float32's digits."""
    model = chain(ResLoRAConfig(r=4, shortcut=shortcut, pre_num=pre_num))
    inputs: list[torch.Tensor] = []
    for layer in tuner_layers(model).values():
        layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach().double()))
    weights = random(64, 24, seed=3).to(HALF).detach()
    model(random(64, 24).to(HALF)).backward(weights)
    factors = factors_of(model)
    (A1, _, _), (A, B, s) = factors["1"], factors["2"]
    A0 = factors["0"][0]
    earlier = {"input": [inputs[1] @ A.T], "block": [], "middle": [inputs[1] @ A1.T, inputs[0] @ A0.T]}[shortcut]
    hidden = inputs[2] @ A.T + sum(earlier[: 1 if pre_num == 1 else None])
    (hidden @ B.T * s * weights.double()).sum().backward()
    B_grad = tuner_layers(model)["2"].lora_B.default.weight.grad
    assert relative_error(B_grad, B.grad) < rounding(64 + 3 * 24)


@pytest.mark.quick(stepping_aside=["1"])
@pytest.mark.parametrize("dtype", [torch.float64, HALF])
@pytest.mark.parametrize("stepping_aside", ["0", "1", "2"])
@pytest.mark.parametrize(("shortcut", "pre_num"), [("input", 1), ("block", 1), ("middle", -1)])
def test_layers_that_step_aside_compute_the_same(shortcut, pre_num, stepping_aside, dtype):
    """Beside layers that do not, and with them."""
    model = chain(ResLoRAConfig(r=4, shortcut=shortcut, pre_num=pre_num))
    if dtype == torch.float64:
        model = model.double()
    plain = copy.deepcopy(model)
    layer = tuner_layers(model)[stepping_aside]
    layer.lora_A.default.register_forward_hook(lambda *args: None)
    x = random(5, 3, 24).to(dtype)
    for each in (model, plain):
        each(x).square().sum().backward()
    assert relative_error(model(x), plain(x)) < (1e-14 if dtype == torch.float64 else half_rounding(2 * 3, dtype))
    bound = 1e-13 if dtype == torch.float64 else half_rounding(4 * 3, dtype)
    for name, grad in gradients(plain).items():
        assert relative_error(gradients(model)[name], grad) < bound, name


def test_several_adapters_are_rounded_once():
    """As in PEFT, which then casts the input for all of them."""
    model = chain(ResLoRAConfig(r=4, shortcut="middle"))
    model.add_adapter("second", ResLoRAConfig(r=2, shortcut="block", target_modules=["0", "1", "2"]))
    randomize_adapters(model, seed=3)
    model.base_model.set_adapter(["default", "second"])
    seen: list[torch.dtype] = []
    variant = tuner_layers(model)["2"].lora_variant["second"]
    forward = variant.forward

    def watch(module: Any, x: torch.Tensor, result: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        seen.extend((x.dtype, result.dtype))
        return forward(module, x=x, result=result, **kwargs)

    variant.forward = watch
    assert model(random(5, 24).to(HALF)).dtype == HALF
    assert seen == [torch.float32, torch.float32]


@pytest.mark.parametrize("tuner", ["input", "block", "middle"])
def test_a_model_in_half_precision_is_as_exact_as_by_calls_of_the_modules(tuner):
    """Which is how PEFT computes, on a float32 copy of each input."""
    base = TINY_MODELS["llama"].make().to(HALF)
    fields = {"r": 3, "target_modules": TINY_MODELS["llama"].targets}
    model = adapted(copy.deepcopy(base), ResLoRAConfig(shortcut=tuner, **fields))
    called = copy.deepcopy(model)
    for layer in tuner_layers(called).values():
        for linear in (layer.lora_A.default, layer.lora_B.default):
            linear.register_forward_hook(lambda *args: None)
    inputs = TINY_MODELS["llama"].inputs()
    expected = run_oracle(base, inputs, factors_of(model), tuner, 1, output_of)
    fused, by_calls = (relative_error(output_of(each, inputs), expected) for each in (model, called))
    assert fused < 1.5 * by_calls


@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_shapes_can_be_tried_on_the_meta_device(shortcut):
    model = chain(ResLoRAConfig(r=4, shortcut=shortcut)).to("meta")
    x = torch.empty(5, 24, dtype=HALF, device="meta")
    assert model(x).shape == x.shape


def test_a_chain_that_was_seen_sharded_is_not_read_ahead():
    _, model = base_and_adapted("llama", "input")
    layer = tuner_layers(model)["model.layers.1.self_attn.q_proj"]
    weight = layer.lora_A.default.weight
    shard, whole = weight.data.flatten()[:3], weight.data
    chain, _ = layer.chain_of("default")
    loaded = layer.register_forward_pre_hook(lambda *args: setattr(weight, "data", whole))
    handed: list[int] = []
    pass_on = chain.relay.pass_on

    def watch(position: int, value: torch.Tensor, **kwargs: Any) -> Any:
        handed.append(value.dim())
        return pass_on(position, value, **kwargs)

    chain.relay.pass_on = watch
    inputs = TINY_MODELS["llama"].inputs()
    expected = output_of(model, inputs)
    weight.data = shard
    assert relative_error(output_of(model, inputs), expected) < rounding(model)
    loaded.remove()
    assert relative_error(output_of(model, inputs), expected) < rounding(model)
    assert handed == [4, 4, 4, 3] + 2 * [3, 3, 3, 3]  # the last one has no layer to hand to
    assert chain.seen_sharded
