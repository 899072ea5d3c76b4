"""The layers of both tuners have what other PEFT layers have; a scale holds in all that is made of an update."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.adapters import adapted
from helpers.oracle import randomize_adapters, relative_error
from helpers.tiny_models import TINY_MODELS, output_of, unet
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

from peft_reslora import MoRAConfig, ResLoRAConfig, export_lora

CONFIGS = [LoraConfig, LoHaConfig, LoKrConfig]
TYPES = ["sharing", "decoupling", "rotation"]

every_type = pytest.mark.parametrize("mora_type", TYPES)


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 5)).double()


def mora(mora_type: str) -> PeftModel:
    return adapted(layers(), MoRAConfig(r=2, mora_type=mora_type, target_modules=["0", "2"])).double()


def public(config: PeftConfig) -> dict[str, Any]:
    layer = get_peft_model(layers(), config).base_model.model[0]
    return {name: getattr(layer, name) for name in dir(layer) if not name.startswith("_")}


@pytest.mark.parametrize("make", [ResLoRAConfig, MoRAConfig])
def test_what_all_of_pefts_layers_have_is_there(make):
    shared = set.intersection(*(set(public(config(target_modules=["0"]))) for config in CONFIGS))
    assert {"scaling", "set_scale", "scale_layer", "unscale_layer", "merge", "get_delta_weight"} <= shared
    assert shared <= set(public(make(target_modules=["0"])))


def test_what_lora_layers_have_is_there_in_reslora():
    assert set(public(LoraConfig(target_modules=["0"]))) <= set(public(ResLoRAConfig(target_modules=["0"])))


class ByName(nn.Module):
    """Gives a layer its input by the name that torch's layers have for it, as diffusers' motion modules do."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(input=x)


@pytest.mark.filterwarnings("ignore:.*no shortcut at all")
@pytest.mark.parametrize(
    ("config", "layer", "x"),
    [
        (ResLoRAConfig, nn.Linear(5, 7), torch.randn(2, 5)),
        (MoRAConfig, nn.Linear(5, 7), torch.randn(2, 5)),
        (ResLoRAConfig, nn.Conv2d(5, 7, 3), torch.randn(2, 5, 4, 4)),
        (ResLoRAConfig, nn.Embedding(5, 7), torch.tensor([[1, 2, 0]])),
    ],
)
def test_a_layer_takes_its_input_by_name_as_the_base_does(config, layer, x):
    x = x.double() if x.is_floating_point() else x
    base = ByName(layer)
    model = randomize_adapters(get_peft_model(copy.deepcopy(base), config(r=2, target_modules=["layer"])).double())
    by_place = model.base_model.model.layer(x)
    assert torch.equal(model(x), by_place)
    assert relative_error(by_place, base(x)) > 0.01
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))


def scaled_updates(model: PeftModel, scale: float) -> dict[str, torch.Tensor]:
    """The oracle: each layer's update measured through its own forward, times the scale."""
    updates = {}
    for name, layer in (("0", model.base_model.model[0]), ("2", model.base_model.model[2])):
        eye = torch.eye(layer.in_features, dtype=torch.float64)
        updates[name] = scale * (layer(eye) - layer.base_layer(eye)).T.detach()
    return updates


@every_type
@pytest.mark.parametrize("scale", [0.5, -2.0, 0.0])
def test_a_scale_holds_in_forward_delta_merge_factors_and_export(mora_type, scale):
    model = mora(mora_type)
    expected = scaled_updates(model, scale)
    for name in ("0", "2"):
        model.base_model.model[int(name)].set_scale("default", scale)
    found = scaled_updates(model, 1.0)
    exported = export_lora(model, rank=7) if scale else None
    for name, update in expected.items():
        layer = model.base_model.model[int(name)]
        bound = 1e-10 * max(1.0, float(update.norm()))
        weight = layer.base_layer.weight.clone()
        assert torch.dist(found[name], update) < bound
        assert torch.dist(layer.get_delta_weight("default"), update) < bound
        if mora_type == "sharing":
            A, B = layer.merged_factors("default")
            assert torch.dist(B @ A, update) < bound
        layer.merge()
        assert torch.dist(layer.base_layer.weight - weight, update) < bound
        layer.unmerge()
        assert torch.equal(layer.base_layer.weight, weight)
        if exported is not None:
            state = {key.split(".")[-2]: value for key, value in exported.state_dict.items() if f".{name}." in key}
            factors = state["lora_B"] @ state["lora_A"] * exported.config.lora_alpha / exported.config.r
            # factors in float32, each product a sum of 7
            assert relative_error(factors, update) < 14 * torch.finfo(torch.float32).eps


@every_type
def test_a_scale_holds_in_the_gradient(mora_type):
    model = mora(mora_type).train()
    x = torch.randn(6, 7, dtype=torch.float64)
    layer = model.base_model.model[0]
    weight = torch.randn(6, 11, dtype=torch.float64)
    (layer(x) * weight).sum().backward()
    expected = -0.3 * layer.mora_M["default"].grad
    layer.mora_M["default"].grad = None
    layer.set_scale("default", -0.3)
    (layer(x) * weight).sum().backward()
    assert relative_error(layer.mora_M["default"].grad, expected) < 1e-10


def test_scales_multiply_and_go_back_as_in_lora():
    ours = mora("rotation").base_model.model[0]
    theirs = get_peft_model(layers(), LoraConfig(target_modules=["0"], r=8, lora_alpha=8)).base_model.model[0]
    for method, arguments in [
        ("set_scale", ("default", 0.5)),
        ("set_scale", ("another", 3.0)),
        ("scale_layer", (3.0,)),
        ("scale_layer", (1,)),
        ("unscale_layer", (2.0,)),
        ("set_scale", ("default", 0.0)),
        ("scale_layer", (3.0,)),
        ("unscale_layer", ()),
    ]:
        for layer in (ours, theirs):
            getattr(layer, method)(*arguments)
        assert ours.scaling == theirs.scaling
    with pytest.raises(ValueError, match=r"divided by 0; unscale_layer\(None\)"):
        ours.unscale_layer(0)


def test_a_merged_scale_is_not_changed():
    model = mora("sharing")
    model.merge_adapter()
    layer = model.base_model.model[0]
    layer.set_scale("default", 1.0)
    for act in (lambda: layer.set_scale("default", 0.5), lambda: layer.scale_layer(0.5)):
        with pytest.raises(ValueError, match=r"'default' is merged into layer 0 with scale 1\.0.*Unmerge"):
            act()
    model.unmerge_adapter()
    layer.set_scale("default", 0.5)


def test_a_scale_ends_with_its_adapter():
    model = mora("rotation")
    model.add_adapter("second", MoRAConfig(r=2, target_modules=["0"]))
    layer = model.base_model.model[0]
    layer.set_scale("second", 0.25)
    assert layer.scaling == {"default": 1.0, "second": 0.25}
    assert copy.deepcopy(layer).scaling == layer.scaling
    model.delete_adapter("second")
    assert layer.scaling == {"default": 1.0}


@pytest.mark.parametrize("tuner", ["lora", "input", "block", "middle", *TYPES])
def test_diffusers_sets_scales(tuner):
    """`set_adapters(name, 0.5)` halves the update, as with LoRA; measured on one layer."""
    fields: dict[str, Any] = {"r": 2, "target_modules": TINY_MODELS["unet"].targets}
    if tuner == "lora":
        config: PeftConfig = LoraConfig(**fields)
    else:
        config = MoRAConfig(**fields, mora_type=tuner) if tuner in TYPES else ResLoRAConfig(**fields, shortcut=tuner)
    torch.manual_seed(0)
    model = unet().double().eval()
    model.add_adapter(config, adapter_name="style")
    randomize_adapters(model).double()
    layer = next(m for m in model.modules() if hasattr(m, "base_layer"))
    x = torch.randn(2, 5, layer.in_features, dtype=torch.float64)
    whole = layer(x) - layer.base_layer(x)
    model.set_adapters("style", 0.5)
    assert relative_error(layer(x) - layer.base_layer(x), 0.5 * whole) < 1e-10
    model.set_adapters(["style"], [2.0])
    assert relative_error(layer(x) - layer.base_layer(x), 2 * whole) < 1e-10
    model.set_adapters("style", 0.0)
    assert relative_error(layer(x), layer.base_layer(x)) < 1e-10


@every_type
def test_diffusers_fuses_with_a_scale(mora_type):
    torch.manual_seed(0)
    tiny = TINY_MODELS["unet"]
    model = unet().double().eval()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in tiny.inputs().items()}
    model.add_adapter(MoRAConfig(r=2, target_modules=tiny.targets, mora_type=mora_type), adapter_name="style")
    randomize_adapters(model).double()
    model.set_adapters("style", 0.5)
    expected = output_of(model, inputs)
    model.set_adapters("style", 1.0)
    model.fuse_lora(lora_scale=0.5)
    assert relative_error(output_of(model, inputs), expected) < 1e-10
    model.unfuse_lora()
    assert relative_error(output_of(model, inputs), expected) < 1e-10
