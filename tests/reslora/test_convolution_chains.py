"""Convolutions in chains: what is linked, refused, estimated, and used as any other layer is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.adapters import tuner_layers
from helpers.convolutions import adapted, images, net, randomized
from helpers.oracle import relative_error
from helpers.tiny_models import TINY_MODELS, output_of
from helpers.tolerances import EPS, FLOAT64, MODEL64, half_rounding
from peft import PeftModel, get_peft_model
from torch import nn

from peft_reslora import ResLoRAConfig, calibrate_merge, describe_chains, merge_report, save_as_lora
from peft_reslora.export import export_lora_from_files
from peft_reslora.reslora.merging.anneal import anneal_shortcuts

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings("ignore:.* linked to no other")]


class Down(nn.Module):
    """Two convolutions of one shape, of which the second takes steps of 2."""

    def __init__(self, stride: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=stride, padding=1)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[1](torch.tanh(self.layers[0](x)))


class Pooled(Down):
    def __init__(self) -> None:
        super().__init__(stride=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[1](torch.max_pool2d(self.layers[0](x), 2))


def on_both(model: nn.Module, **fields: Any) -> PeftModel:
    return randomized(get_peft_model(model, ResLoRAConfig(r=2, target_modules=r"layers\.\d", **fields))).eval()


@pytest.mark.filterwarnings("ignore:.*has no shortcut at all")
def test_other_steps_end_a_chain_also_from_files(tmp_path):
    model = on_both(Down())
    table = describe_chains(model)
    assert table.num_links == 0
    assert "the convolutions differ in stride" in str(table)
    assert "4->4 (3x3)" in str(table)
    x, expected = torch.randn(2, 4, 8, 8), None
    expected = model(x)
    model.save_pretrained(tmp_path)
    torch.manual_seed(5)
    other = Down()
    other.load_state_dict(
        {k.replace(".base_layer", ""): v for k, v in model.get_base_model().state_dict().items() if "lora" not in k}
    )
    assert torch.equal(PeftModel.from_pretrained(other, tmp_path)(x), expected)


@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_maps_of_other_sizes_are_refused(shortcut):
    model = on_both(Pooled(), shortcut=shortcut)
    with pytest.raises(ValueError, match=r"layers\.0.*layers\.1.*shapes are .*8, 8.*4, 4.*shortcut='block'"):
        model(torch.randn(2, 4, 8, 8))
    block = on_both(Pooled())
    x = torch.randn(2, 4, 8, 8)
    expected = block(x)
    assert describe_chains(block).num_links == 1
    assert relative_error(block.merge_and_unload()(x), expected) < FLOAT64


class Standardized(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight / self.weight.std(), self.bias)


@pytest.mark.parametrize(
    ("layer", "fields", "message"),
    [
        (nn.ConvTranspose2d(4, 4, 3), {}, r"cannot adapt 0 \(ConvTranspose2d\), which is no linear layer"),
        (Standardized(4, 4, 3), {}, r"cannot adapt 0 \(Standardized\), .*another convolution"),
        (nn.Conv2d(4, 4, 3, groups=4), {"r": 2}, r"'0': rank 2 cannot be divided among its 4 groups"),
    ],
)
def test_what_cannot_be_right_is_refused(layer, fields, message):
    model = nn.Sequential(layer)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, ResLoRAConfig(target_modules=["0"], **fields))
    assert model[0] is layer


def test_groups_are_not_called_unmergeable(recwarn):
    adapted(net("groups"), "block")
    assert not [warning for warning in recwarn if "groups" in str(warning.message)]


@pytest.mark.parametrize("case", ["2d", "groups"])
@pytest.mark.parametrize("shortcut", ["input", "block", "middle"])
def test_several_adapters(case, shortcut):
    base, x = net(case), images(case, batch=3)
    model = adapted(base, shortcut)
    model.add_adapter("second", copy.copy(model.peft_config["default"]))
    randomized(model, seed=7)
    outputs = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        outputs[name] = model(x)
    assert relative_error(outputs["default"], outputs["second"]) > 0.01
    if shortcut == "block":
        mixed = model(x, adapter_names=["default", "second", "__base__"])
        for n, expected in enumerate([outputs["default"], outputs["second"], base(x)]):
            assert relative_error(mixed[n], expected[n]) < FLOAT64
        model.base_model.set_adapter(["default", "second"])
        both = model(x)
        assert relative_error(model.merge_and_unload(adapter_names=["default", "second"])(x), both) < FLOAT64
    else:
        model.delete_adapter("second")
        model.set_adapter("default")
        assert relative_error(model(x), outputs["default"]) < FLOAT64


def test_adapters_are_combined_by_cat():
    model = adapted(net("2d"), "block")
    model.add_adapter("second", copy.copy(model.peft_config["default"]))
    randomized(model, seed=7)
    model.add_weighted_adapter(["default", "second"], [0.5, 2.0], "both", combination_type="cat")
    for name, layer in tuner_layers(model).items():
        expected = 0.5 * layer.get_delta_weight("default") + 2.0 * layer.get_delta_weight("second")
        assert relative_error(layer.get_delta_weight("both"), expected) < FLOAT64, name


def test_combinations_in_groups_are_refused():
    model = adapted(net("groups"), "block")
    model.add_adapter("second", copy.copy(model.peft_config["default"]))
    with pytest.raises(ValueError, match=r"'layers\.0\.up' is a convolution in groups.*merge"):
        model.add_weighted_adapter(["default", "second"], [0.5, 2.0], "both", combination_type="cat")


class Classifier(nn.Module):
    """Gives what `merge_report` compares, and takes batches by name."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.net = net(case)

    def forward(self, images: torch.Tensor) -> Any:
        logits = self.net(images).flatten(2).mean(-1)
        return type("Output", (), {"logits": logits, "loss": None})()


def batches(case: str, count: int = 4) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(3)
    return [{"images": torch.randn_like(images(case, batch=4))} for _ in range(count)]


@pytest.mark.parametrize("case", ["1d", "2d"])
@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_least_squares_is_the_regression_on_patches(case, shortcut):
    model = adapted(Classifier(case), shortcut, r=2)
    seen: dict[str, torch.Tensor] = {}
    layers = tuner_layers(model)
    for name in ("net.layers.0.down", "net.layers.1.down"):
        layers[name].register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0]}))
    calibrate_merge(model, batches(case, 1), ridge=1e-6)
    layer, before = layers["net.layers.1.down"], layers["net.layers.0.down"]
    x, previous = seen["net.layers.1.down"], seen["net.layers.0.down"]
    A = (layer if shortcut == "input" else before).lora_A["default"]
    term = A(previous).movedim(1, -1).flatten(0, -2)
    columns = layer.lora_A["default"].weight[0].numel()
    identity = copy.deepcopy(layer.lora_A["default"])
    identity.weight = nn.Parameter(torch.eye(columns).view(columns, *identity.weight.shape[1:]))
    X = identity(x).movedim(1, -1).flatten(0, -2)
    ridge = 1e-6 * (X.T @ X).diagonal().mean()
    C = torch.linalg.solve(X.T @ X + ridge * torch.eye(columns), X.T @ term).T
    assert relative_error(layer.lora_shortcut["default"], C) < 1000 * EPS  # kept in float32
    delta = (
        layer.scaling["default"]
        * layer.lora_B["default"].weight.flatten(1)
        @ (layer.lora_A["default"].weight.flatten(1) + C)
    )
    assert relative_error(layer.get_delta_weight("default").flatten(1), delta) < 1000 * EPS


@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_annealed_shortcuts_merge_exactly(shortcut):
    model = adapted(Classifier("2d"), shortcut, merge_estimator="weight_norm")
    inputs = batches("2d", 1)[0]
    expected = model(**inputs).logits
    anneal_shortcuts(model, 0.5)
    assert relative_error(model(**inputs).logits, expected) > 1e-3
    anneal_shortcuts(model, 1.0)
    annealed = model(**inputs).logits
    assert relative_error(model.merge_and_unload()(**inputs).logits, annealed) < MODEL64


@pytest.mark.parametrize("shortcut", ["input", "block", "middle"])
def test_reports_tell_what_merges_cost(shortcut):
    model = adapted(Classifier("2d"), shortcut, merge_estimator="weight_norm")
    report = merge_report(model, batches("2d", 2))
    assert report.exact == (shortcut == "block")
    costs = report.costs["exact" if report.exact else "weight_norm"]
    assert costs.kl < 1e-12 if report.exact else costs.kl > 1e-9
    assert len(costs.layers) == 7
    assert all(
        error > 0
        for name, error in costs.layers.items()
        if not report.exact and ".0." not in name and "step" not in name
    )


def test_a_regression_in_groups_is_refused():
    with pytest.raises(ValueError, match=r"'net\.layers\.0\.up' is a convolution in groups.*weight_norm"):
        calibrate_merge(adapted(Classifier("groups"), "input"), batches("groups"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The LoRA has r=", "ignore:.*of its update")
def test_the_convolutions_of_a_unet(tmp_path):
    """As diffusers builds it: merged, exported, and read by plain PEFT and by diffusers' own loader."""
    tiny = TINY_MODELS["unet"]
    base, inputs = tiny.make(), tiny.inputs()
    targets = ["conv1", "conv2", "conv_shortcut", "conv_in", "to_q", "to_out.0"]
    model = adapted(base, "block", -1, target_modules=targets)
    expected = output_of(model, inputs)
    assert relative_error(expected, output_of(base, inputs)) > 1e-3
    assert describe_chains(model).num_links > 5
    export = save_as_lora(tmp_path, model, base_model=copy.deepcopy(base).float())
    assert export.state_dict["base_model.model.conv_in.lora_B.weight"].shape == (8, export.config.r, 1, 1)
    plain = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).double()
    assert relative_error(output_of(plain, inputs), expected) < 100 * EPS
    base.load_lora_adapter(str(tmp_path), weight_name="adapter_model.safetensors", prefix="base_model.model")
    assert relative_error(output_of(base.double(), inputs), expected) < 100 * EPS
    assert relative_error(output_of(model.merge_and_unload(), inputs), expected) < MODEL64


@pytest.mark.slow
@pytest.mark.parametrize("shortcut", ["input", "block", "middle"])
def test_compiled_whole(shortcut):
    model, x = adapted(net("groups"), shortcut), images("groups")
    expected = model(x)
    assert relative_error(torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected) < FLOAT64


@pytest.mark.parametrize("shortcut", ["input", "block", "middle"])
def test_half_precision_stays_close(shortcut):
    model, x = adapted(net("2d"), shortcut).float(), images("2d").float()
    expected, bound = model(x), half_rounding(60, torch.bfloat16)  # in each of seven layers, a few after each other
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(model(x), expected) < bound
    assert relative_error(copy.deepcopy(model).bfloat16()(x.bfloat16()), expected) < bound


def test_files_alone_are_inspected_and_not_exported(tmp_path, command):
    """Groups, dilation and padding mode are in the base model only."""
    adapted(net("groups"), "block").save_pretrained(tmp_path)
    assert "6->8 (3x3)" in command("inspect", tmp_path).out
    with pytest.raises(ValueError, match=r"layer 'layers\.0\.down': it is a convolution, and no config of its base"):
        export_lora_from_files(tmp_path)
