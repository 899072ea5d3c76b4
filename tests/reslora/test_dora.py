"""DoRA with shortcut 'block': against its equation in float64, and against PEFT's own DoRA where nothing is linked."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from helpers.oracle import randomize_adapters, relative_error
from helpers.tiny_models import TINY_MODELS, output_of
from helpers.tolerances import FLOAT64, MODEL64, half_rounding
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_reslora import ResLoRAConfig, export_lora

pytestmark = pytest.mark.usefixtures("float64")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 7), nn.Linear(7, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(depth))
        self.reentrant: bool | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


class Mask(nn.Module):
    """A dropout that lets the same features through every time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.arange(x.shape[-1]).remainder(3).ne(0).to(x) * 1.5


def config_of(pre_num: int = 1, **changes) -> ResLoRAConfig:
    fields = {"r": 2, "lora_alpha": 3, "target_modules": ["up", "down"], "shortcut": "block", "pre_num": pre_num}
    return ResLoRAConfig(**{**fields, "use_dora": True, **changes})


def adapted(base: nn.Module, **changes) -> nn.Module:
    model = get_peft_model(copy.deepcopy(base), config_of(**changes))
    starts = {name: p.detach().clone() for name, p in model.named_parameters() if "magnitude" in name}
    randomize_adapters(model)
    for name, parameter in model.named_parameters():
        if name in starts:  # of the size of the norms, and not theirs
            parameter.data = starts[name] * (1.2 + 0.3 * parameter.data.sin())
    return model


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name.removeprefix("base_model.model."): p for name, p in model.named_parameters() if p.requires_grad}


def oracle(
    base: Net, values: dict[str, torch.Tensor], x: torch.Tensor, pre_num: int, mask=lambda x: x
) -> torch.Tensor:
    """m (W + U) x / ||W + U||, with a dense U."""

    def linear(n: int, name: str, x: torch.Tensor) -> torch.Tensor:
        layer = base.layers[n].get_submodule(name)
        first = 0 if pre_num == -1 else max(0, n - pre_num)
        U = 0
        for k in range(first, n + 1):
            A, B = (values[f"layers.{k}.{name}.lora_{factor}.default.weight"] for factor in "AB")
            U = U + 1.5 * B @ A
        V = layer.weight + U
        V = (values[f"layers.{n}.{name}.lora_magnitude.default"] / V.detach().norm(dim=1))[:, None] * V
        return F.linear(x, layer.weight, layer.bias) + F.linear(mask(x), V - layer.weight)

    for n in range(len(base.layers)):
        x = x + linear(n, "down", torch.tanh(linear(n, "up", x)))
    return x


def gradients(output: torch.Tensor, of: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(zip(of, torch.autograd.grad(output.square().sum(), list(of.values())), strict=True))


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) < FLOAT64, name


@pytest.fixture
def base() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 5, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("pre_num", [1, 2, -1])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_output_and_gradients_are_those_of_the_equation(base, x, pre_num, masked, reentrant):
    model = adapted(base, pre_num=pre_num)
    mask = Mask() if masked else nn.Identity()
    for module in model.modules():
        if masked and hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = mask
    values = {name: p.detach().clone().requires_grad_() for name, p in trained(model).items()}
    assert sum("magnitude" in name for name in values) == 8
    expected = oracle(base, values, x, pre_num, mask)
    model.base_model.model.reentrant = reentrant
    found = model(x.clone().requires_grad_())  # without which a re-entrant region has no gradients
    assert relative_error(found, expected) < FLOAT64
    found.square().sum().backward()  # re-entrant checkpointing takes no other
    assert_same({name: p.grad for name, p in trained(model).items()}, gradients(expected, values))


def test_a_new_adapter_changes_nothing(base, x):
    model = get_peft_model(copy.deepcopy(base), config_of())
    assert relative_error(model(x), base(x)) < FLOAT64
    assert relative_error(get_peft_model(copy.deepcopy(base), config_of(inference_mode=True))(x), base(x)) < FLOAT64
    frozen = get_peft_model(copy.deepcopy(base), config_of(inference_mode=True))
    assert not trained(frozen)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_where_nothing_is_linked_it_is_the_dora_of_peft(name):
    torch.manual_seed(0)
    tiny = TINY_MODELS[name]
    plain, inputs = tiny.make().double(), tiny.inputs()
    target = next(n for n, _ in plain.named_modules() if n.endswith(("0.self_attn.q_proj", "0.attn.c_attn")))
    theirs = get_peft_model(copy.deepcopy(plain), LoraConfig(r=2, target_modules=[target], use_dora=True))
    with pytest.warns(UserWarning, match="no shortcut at all"):
        ours = get_peft_model(copy.deepcopy(plain), config_of(target_modules=[target], lora_alpha=8))
    randomize_adapters(theirs)
    values = {n.replace("lora_magnitude", "lora_magnitude_vector"): p for n, p in trained(ours).items()}
    with torch.no_grad():
        for key, parameter in trained(theirs).items():
            if "magnitude" in key:
                parameter.mul_(0.1).add_(0.5)
            values[key.removesuffix(".weight") if "magnitude" in key else key].copy_(parameter)
    expected, found = output_of(theirs, inputs), output_of(ours, inputs)
    assert relative_error(found, expected) < MODEL64
    expected.square().sum().backward()
    found.square().sum().backward()
    for key, parameter in trained(theirs).items():
        own = values[key.removesuffix(".weight") if "magnitude" in key else key]
        assert relative_error(own.grad, parameter.grad) < MODEL64, key


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_is_saved_loaded_and_merged(name, tmp_path):
    torch.manual_seed(0)
    tiny = TINY_MODELS[name]
    plain, inputs = tiny.make().double(), tiny.inputs()
    model = adapted(plain, target_modules=tiny.targets, pre_num=-1).eval()
    expected, before = output_of(model, inputs).detach(), output_of(plain.eval(), inputs).detach()
    assert relative_error(expected, before) > 0.01
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()
    assert relative_error(output_of(loaded, inputs), expected) < MODEL64
    weights = {n: p.clone() for n, p in model.named_parameters() if "base_layer" in n}
    model.merge_adapter()
    assert relative_error(output_of(model, inputs), expected) < MODEL64
    model.unmerge_adapter()
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if "base_layer" in n)
    assert relative_error(output_of(model.merge_and_unload(safe_merge=True), inputs), expected) < MODEL64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_stay_close(base, x, dtype):
    model = adapted(base).float()
    expected = adapted(base)(x)
    with torch.autocast("cpu", dtype):
        assert relative_error(model(x.float()).double(), expected) < half_rounding(40, dtype)
    delta = model.base_model.model.layers[2].up.get_delta_weight("default")
    with torch.autocast("cpu", dtype):
        assert torch.equal(model.base_model.model.layers[2].up.get_delta_weight("default"), delta)


def test_no_plain_lora_can_hold_it(base, x):
    model = adapted(base)
    with pytest.raises(ValueError, match=r"Adapter 'default' fits into no plain LoRA: use_dora .*merge_and_unload"):
        export_lora(model)
    with pytest.raises(ValueError, match=r"use_dora=True.*'layers\.0\.up'.*no matrix of low rank"):
        model.base_model.model.layers[0].up.merged_factors("default")


@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_shortcuts_without_an_exact_merge_are_refused(shortcut):
    with pytest.raises(ValueError, match=f"use_dora=True with shortcut='{shortcut}'.*choose shortcut='block'"):
        config_of(shortcut=shortcut)


def test_weighted_adapters_are_refused(base):
    model = adapted(base)
    with pytest.raises(ValueError, match="Adapter 'default' has use_dora=True"):
        model.add_weighted_adapter(["default"], [0.5], "half", combination_type="cat")
    assert list(model.peft_config) == ["default"]


def test_compiled_it_is_the_same(base, x):
    torch._dynamo.reset()
    model = adapted(base)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    found, expected = compiled(x), model(x)
    assert relative_error(found, expected) < FLOAT64
    torch._dynamo.reset()


@pytest.mark.parametrize("kinds", [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("safe_merge", [False, True])
def test_active_adapters_merge_as_they_compute(base, x, kinds, safe_merge):
    first, second = kinds
    model = adapted(base, use_dora=first)
    model.add_adapter("b", config_of(target_modules=["down"], use_dora=second))
    for name, parameter in model.named_parameters():
        if ".b" in name:
            parameter.data = parameter.data * 1.1 if "magnitude" in name else torch.randn_like(parameter) * 0.3
    model.base_model.set_adapter(["default", "b"])
    model.eval()
    expected = model(x)
    weights = {n: p.clone() for n, p in model.named_parameters() if "base_layer" in n}
    model.merge_adapter(safe_merge=safe_merge)
    assert relative_error(model(x), expected) < FLOAT64
    model.unmerge_adapter()
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if "base_layer" in n)
    assert relative_error(model.merge_and_unload(safe_merge=safe_merge)(x), expected) < FLOAT64


def test_a_row_of_zeros_stays_one(base, x):
    with torch.no_grad():
        base.layers[1].up.weight[2] = 0
    model = get_peft_model(copy.deepcopy(base), config_of())
    assert relative_error(model(x), base(x)) < FLOAT64
    model(x).square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_in_half_precision_a_new_adapter_changes_no_more_than_the_rounding_of_its_norms(base, x):
    """Of 8 layers, in the dtype in which PEFT makes adapters (0.21.2), and of the sums; PEFT's DoRA does as well."""
    half = base.to(torch.bfloat16)
    model = get_peft_model(copy.deepcopy(half), config_of())
    assert relative_error(model(x.bfloat16()), half(x.bfloat16())) < half_rounding(16, torch.bfloat16)


def test_an_offloaded_model_computes_the_same(base, x):
    model = adapted(base).eval()
    expected = model(x).detach()
    with torch.no_grad():
        assert relative_error(cpu_offload(copy.deepcopy(model), torch.device("cpu"))(x), expected) < FLOAT64
