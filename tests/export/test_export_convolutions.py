"""Convolutions and embeddings of PEFT's own methods as LoRA: each update equals what the method's layer merges."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import convolutions
from helpers.adapters import tuner_layers
from helpers.oracle import randomize_adapters, relative_error
from helpers.tolerances import EPS
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

from peft_reslora import ResLoRAConfig, combine_as_lora, export_lora, save_as_lora
from peft_reslora.export import export_lora_from_files
from peft_reslora.training import rank_in_use

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings("ignore")]
TARGETS = ["first", "second", "pointwise"]


class Net(nn.Module):
    """Kernels of one and of two dimensions, with a step of 2, after an embedding."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6, padding_idx=0)
        self.first = nn.Conv1d(6, 8, 3, padding=1, groups=groups)
        self.second = nn.Conv2d(1, 10, (3, 5), stride=2, padding=(1, 2), bias=False)
        self.pointwise = nn.Conv2d(10, 6, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.first(self.words(ids).transpose(1, 2))
        return self.pointwise(torch.tanh(self.second(x[:, None])))


def adapted(config: PeftConfig, base: nn.Module | None = None) -> PeftModel:
    torch.manual_seed(0)
    return randomize_adapters(get_peft_model(base or Net(), config)).eval()


def methods() -> dict[str, PeftConfig]:
    lycoris: dict[str, Any] = {"r": 2, "alpha": 3, "target_modules": TARGETS}
    effective = {**lycoris, "use_effective_conv2d": True}
    kronecker = {"target_modules": ["second", "pointwise"]}
    return {
        "LoRA": LoraConfig(r=4, lora_alpha=6, target_modules=[*TARGETS, "words"]),
        "rsLoRA": LoraConfig(r=4, use_rslora=True, target_modules=[*TARGETS, "words"]),
        "LoHa": LoHaConfig(**lycoris),
        "LoHa, effective": LoHaConfig(**effective),
        "LoKr": LoKrConfig(**lycoris | kronecker),
        "LoKr, effective": LoKrConfig(**effective | kronecker),
        "LoKr, both parts of low rank": LoKrConfig(**effective, decompose_both=True, decompose_factor=1),
    }


@pytest.mark.parametrize("method", methods())
def test_the_exported_factors_are_exact(method, tmp_path):
    torch.manual_seed(0)
    base = Net()
    model = adapted(methods()[method], copy.deepcopy(base))
    export = save_as_lora(tmp_path, model, base_model=copy.deepcopy(base).float())
    assert export.report.layers
    assert all(layer.exact for layer in export.report.layers)
    for name, layer in tuner_layers(model).items():
        A, B = (export.state_dict[f"base_model.model.{name}.{key}"].double() for key in _keys(name))
        delta = layer.get_delta_weight("default")
        found = B.flatten(1) @ A.flatten(1)
        assert relative_error(found.T if name == "words" else found, delta.flatten(1)) < 10 * EPS, name
    ids = torch.randint(0, 11, (2, 8))
    plain = PeftModel.from_pretrained(base, tmp_path).double()
    assert relative_error(plain(ids), model(ids)) < 100 * EPS


def _keys(name: str) -> tuple[str, str]:
    return ("lora_embedding_A", "lora_embedding_B") if name == "words" else ("lora_A.weight", "lora_B.weight")


def test_the_names_and_shapes_are_those_of_peft():
    config = LoraConfig(r=8, target_modules=[*TARGETS, "words"])
    exported = export_lora(adapted(config)).state_dict
    own = adapted(config).state_dict()
    trained = {key.replace(".default", ""): tensor.shape for key, tensor in own.items() if ".lora_" in key}
    assert {key: tensor.shape for key, tensor in exported.items()} == trained


def test_groups_are_kept_together_and_not_truncated():
    torch.manual_seed(0)
    base = Net(groups=2)
    model = adapted(LoraConfig(r=6, target_modules=["first"]), copy.deepcopy(base))
    export = export_lora(model)
    A, B = (export.state_dict[f"base_model.model.first.lora_{factor}.weight"].double() for factor in "AB")
    assert A.shape == (8, 6, 3)
    assert B.shape == (8, 4, 1)
    x = torch.randn(2, 6, 9)
    layer = model.get_base_model().first
    expected = layer(x) - layer.base_layer(x)
    hidden = torch.conv1d(x, A, padding=1)
    assert relative_error(torch.conv1d(hidden, B, groups=2), expected) < 10 * EPS
    with pytest.raises(ValueError, match=r"'first'.*in 2 groups, whose factors cannot be truncated"):
        export_lora(model, rank=2)
    with pytest.raises(ValueError, match=r"'first': its base layer is Conv1d in groups, of which .*loha"):
        export_lora(adapted(LoHaConfig(r=2, target_modules=["first"]), copy.deepcopy(base)))


def test_a_kronecker_product_that_is_none_is_refused():
    model = adapted(LoKrConfig(r=8, target_modules=["first"]))
    with pytest.raises(ValueError, match=r"'first': of a whole second part over nn\.Conv1d.*merge_and_unload"):
        export_lora(model)


def test_sums_of_exports_are_of_linear_layers_only():
    model = adapted(LoraConfig(r=4, target_modules=TARGETS))
    with pytest.raises(ValueError, match=r"is of a convolution or an embedding.*add_weighted_adapter"):
        combine_as_lora(model, ["default"], [1.0])


# Of ResLoRA's kinds of blocks

ADALORA = {"total_step": 12, "init_r": 4, "target_r": 2, "r": 8}
groups_too = pytest.mark.parametrize("case", ["2d", "groups"])


def in_peft(model: PeftModel, case: str, folder: Any, **options: Any) -> Any:
    """The output of the export in plain PEFT, and the export."""
    base, x = convolutions.net(case), convolutions.images(case)
    export = save_as_lora(folder, model, base_model=copy.deepcopy(base).float(), **options)
    return PeftModel.from_pretrained(base, folder).double().eval()(x), export


@groups_too
def test_adalora_is_exact_without_the_directions_that_were_pruned(case, tmp_path):
    model = convolutions.adapted(convolutions.net(case), "block", **ADALORA)
    for layer in tuner_layers(model).values():
        layer.lora_E["default"].data[:2] = 0  # of groups, all of the first one's
    found, export = in_peft(model, case, tmp_path)
    assert relative_error(found, model(convolutions.images(case))) < 20 * EPS
    assert all(layer.exact for layer in export.report.layers)
    assert {layer.rank_before for layer in export.report.layers} == {2, 4}  # of one block and of two


@pytest.mark.quick(case=["groups"], rank=[3, 4])
@groups_too
@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_nested_ranks_are_cut_off_in_each_group(case, rank, tmp_path):
    model = convolutions.adapted(convolutions.net(case), "block", nested_ranks=True)
    with rank_in_use(model, rank):
        expected = model(convolutions.images(case))
    found, export = in_peft(model, case, tmp_path, rank=rank)
    assert relative_error(found, expected) < 20 * EPS
    rows = {layer.layer: layer for layer in export.report.layers}
    b = rank if case == "2d" else -(-rank // 2) * 2
    assert rows["layers.0.up"].rank_after == b
    assert rows["layers.1.up"].rank_after == 2 * b
    assert rows["layers.1.up"].exact is (b == 4)
    assert rows["layers.1.up"].first == (rank if b < 4 else None)


@pytest.mark.quick(case=["1d", "2d"])
@pytest.mark.parametrize("case", ["1d", "2d", "2d, uneven kernel", "3d", "pointwise"])
def test_dora_is_a_dora_of_peft(case, tmp_path):
    model = convolutions.adapted(convolutions.net(case), "block", use_dora=True)
    for name, layer in tuner_layers(model).items():
        norm = layer.get_base_layer().weight.detach().flatten(1).norm(dim=1)
        layer.lora_magnitude["default"].data = norm * (1.2 + 0.1 * torch.arange(len(norm)) * (-1) ** len(name))
    found, export = in_peft(model, case, tmp_path, allow_dora=True)
    assert relative_error(found, model(convolutions.images(case))) < 40 * EPS
    assert export.config.use_dora
    assert export.state_dict["base_model.model.step.lora_magnitude_vector"].shape[:2] == (1, 5)


def test_dora_of_an_embedding_is_one_of_peft(tmp_path):
    base = nn.Sequential(nn.Embedding(11, 6))
    model = adapted(ResLoRAConfig(r=4, target_modules=["0"], use_dora=True), copy.deepcopy(base))
    layer = model.base_model.model[0]
    layer.lora_magnitude["default"].data = base[0].weight.detach().norm(dim=0) * 1.3
    save_as_lora(tmp_path, model, base_model=copy.deepcopy(base).float(), allow_dora=True)
    ids = torch.randint(0, 11, (2, 5))
    plain = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).double()
    assert relative_error(plain(ids), model(ids)) < 20 * EPS


@pytest.mark.parametrize(
    ("case", "why"),
    [("groups", r"2 groups, whose norms PEFT's DoRA takes of other kernels"), ("dilation", "PEFT's LoRA ignores")],
)
def test_a_dora_that_peft_would_misread_is_refused(case, why):
    model = convolutions.adapted(convolutions.net(case), "block", use_dora=True)
    with pytest.raises(ValueError, match=rf"layer 'layers\.0\.up': .*{why}.*merge_and_unload"):
        export_lora(model, allow_dora=True)


def resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[2, 2], layer_type="basic", num_labels=3)
    return ResNetForImageClassification(config).eval()


@pytest.mark.parametrize(
    ("fields", "options"),
    [({"use_dora": True}, {"allow_dora": True}), (ADALORA, {}), ({"nested_ranks": True, "r": 4}, {"rank": 2})],
    ids=["DoRA", "AdaLoRA", "nested"],
)
def test_from_files_it_is_the_same(fields, options, tmp_path):
    """Where the config of the base is here, which tells of strides and padding."""
    resnet().save_pretrained(tmp_path / "base")
    base = type(resnet()).from_pretrained(tmp_path / "base").double()
    model = adapted(ResLoRAConfig(target_modules=["convolution"], **fields), base)
    model.save_pretrained(tmp_path / "own")
    exported, expected = export_lora_from_files(tmp_path / "own", **options), export_lora(model, **options)
    assert exported.state_dict.keys() == expected.state_dict.keys()
    for key, tensor in exported.state_dict.items():
        assert torch.equal(tensor, expected.state_dict[key]), key
