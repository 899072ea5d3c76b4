"""Embeddings with shortcut 'block': output, gradients and merges against plain products in float64."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers.adapters import tuner_layers
from helpers.gradients import assert_gradients_close
from helpers.oracle import randomize_adapters, relative_error
from helpers.tolerances import EPS, FLOAT64
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_reslora import ResLoRAConfig, describe_chains, save_as_lora
from peft_reslora.export import export_lora_from_files

pytestmark = pytest.mark.usefixtures("float64")
TARGETS = ["words", "up"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6, padding_idx=0)
        self.up = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.up(x + self.words(ids)))


class Net(nn.Module):
    """Embeddings of words of their own in each block, as some models add them, so that they are a chain."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.reentrant: bool | None = None

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            again = self.reentrant is not None
            x = checkpoint(layer, x, ids, use_reentrant=self.reentrant) if again else layer(x, ids)
        return x


@pytest.fixture
def base() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, 5, 6, requires_grad=True), torch.randint(0, 11, (2, 5))


def adapted(base: nn.Module, pre_num: int = 1) -> PeftModel:
    config = ResLoRAConfig(r=2, lora_alpha=3, target_modules=TARGETS, pre_num=pre_num)
    return randomize_adapters(get_peft_model(copy.deepcopy(base), config)).eval()


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name.removeprefix("base_model.model."): p for name, p in model.named_parameters() if p.requires_grad}


def oracle(base: Net, values: dict[str, torch.Tensor], x: torch.Tensor, ids: torch.Tensor, pre_num: int):
    def update(n: int, name: str, factor: str, end: str) -> torch.Tensor:
        first, total = 0 if pre_num == -1 else max(0, n - pre_num), 0
        for k in range(first, n + 1):
            A, B = (values[f"layers.{k}.{name}.lora_{factor}{which}.default{end}"] for which in "AB")
            if factor:  # what pads is not trained
                A = torch.cat([A[:, :1].detach(), A[:, 1:]], dim=1)
            total = total + 1.5 * B @ A
        return total

    for n, layer in enumerate(base.layers):
        table = layer.words.weight + update(n, "words", "embedding_", "").T
        words = F.one_hot(ids, 11).to(x) @ table
        up = layer.up.weight + update(n, "up", "", ".weight")
        x = x + torch.tanh(F.linear(x + words, up, layer.up.bias))
    return x


def gradients_of(output: torch.Tensor, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for p in values.values():
        p.grad = None
    output.square().sum().backward()
    return {name: p.grad.clone() for name, p in values.items()}


@pytest.mark.parametrize("pre_num", [1, -1])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_output_and_gradients_are_those_of_the_equation(base, inputs, pre_num, reentrant):
    model = adapted(base, pre_num)
    values = {name: p.detach().clone().requires_grad_() for name, p in trained(model).items()}
    expected = oracle(base, values, *inputs, pre_num)
    model.get_base_model().reentrant = reentrant
    actual = model(*inputs)
    assert relative_error(actual, expected) < FLOAT64
    found = gradients_of(actual, trained(model) | {"x": inputs[0]})
    assert_gradients_close(found, gradients_of(expected, values | {"x": inputs[0]}))


@pytest.mark.parametrize("safe_merge", [True, False])
def test_it_merges_exactly_and_is_restored_bit_for_bit(base, inputs, safe_merge):
    model = adapted(base)
    expected, before = model(*inputs), {name: p.clone() for name, p in model.named_parameters()}
    model.merge_adapter(safe_merge=safe_merge)
    assert relative_error(model(*inputs), expected) < FLOAT64
    model.unmerge_adapter()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    for layer in tuner_layers(model).values():
        assert layer.get_delta_weight("default").shape == layer.get_base_layer().weight.shape
    assert relative_error(pickle.loads(pickle.dumps(model)).merge_and_unload()(*inputs), expected) < FLOAT64


def test_saved_adapters_load_with_the_same_output(base, inputs, tmp_path):
    model = adapted(base)
    model.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}, {"adapter_name": "other"}):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, **options)
        assert torch.equal(loaded(*inputs), model(*inputs))
    with pytest.raises(ValueError, match="embeddings"):
        export_lora_from_files(tmp_path)


@pytest.mark.filterwarnings("ignore:The LoRA has r=")
def test_the_export_is_exact_in_plain_peft(base, inputs, tmp_path):
    model = adapted(base, -1)
    export = save_as_lora(tmp_path, model, base_model=copy.deepcopy(base).float())
    assert export.state_dict["base_model.model.layers.2.words.lora_embedding_A"].shape == (8, 11)
    assert export.state_dict["base_model.model.layers.2.words.lora_embedding_B"].shape == (6, 8)
    plain = PeftModel.from_pretrained(base, tmp_path).double()
    assert relative_error(plain(*inputs), model(*inputs)) < 20 * EPS


def test_batches_of_several_adapters(base, inputs):
    model = adapted(base)
    with pytest.raises(ValueError, match=r"links embedding 'layers\.1\.words' to another.*set_adapter"):
        model(*inputs, adapter_names=["default", "__base__"])
    single = get_peft_model(nn.Sequential(copy.deepcopy(base.layers[0].words)), ResLoRAConfig(target_modules=["0"]))
    randomize_adapters(single).eval()
    expected = single(inputs[1])
    mixed = single(inputs[1], adapter_names=["default", "__base__"])
    assert relative_error(mixed[0], expected[0]) < FLOAT64
    assert torch.equal(mixed[1], base.layers[0].words(inputs[1])[1])


def test_autocast_rounds_the_update_and_not_the_words(inputs):
    words = nn.ModuleList(nn.Embedding(11, 6) for _ in range(2)).float()
    model = get_peft_model(copy.deepcopy(words), ResLoRAConfig(r=2, target_modules=["0", "1"]))
    layer = tuner_layers(model)["1"]
    for other in tuner_layers(model).values():
        nn.init.zeros_(other.lora_embedding_B["default"])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(inputs[1]), words[1](inputs[1]))


def test_the_table_says_what_is_linked(base):
    assert "11->6 (embedding)" in str(describe_chains(adapted(base)))


class Scaled(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(ids)


@pytest.mark.parametrize(
    ("layer", "fields", "message"),
    [
        (nn.Embedding(5, 4), {"shortcut": "input"}, r"cannot adapt 0 \(Embedding\).*indices.*shortcut='block'"),
        (nn.Embedding(5, 4), {"shortcut": "middle"}, r"cannot adapt 0 \(Embedding\).*indices.*shortcut='block'"),
        (nn.Embedding(5, 4, max_norm=1.0), {}, r"cannot adapt 0 \(Embedding\).*more than its weight's rows"),
        (Scaled(5, 4), {}, r"cannot adapt 0 \(Scaled\).*more than its weight's rows"),
    ],
)
def test_what_cannot_be_right_is_refused(layer, fields, message):
    model = nn.Sequential(layer)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, ResLoRAConfig(target_modules=["0"], **fields))
    assert model[0] is layer


def test_gradients_are_scaled_by_frequency_where_the_base_scales_them():
    """As in PEFT's LoRA: those of A, by how often an index is in the batch."""
    base = nn.Sequential(nn.Embedding(11, 6, scale_grad_by_freq=True)).double()
    indices, gradients = torch.tensor([[1, 1, 1, 4], [4, 7, 1, 0]]), []
    for config in (ResLoRAConfig, LoraConfig):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a chain with one layer
            model = get_peft_model(copy.deepcopy(base), config(r=3, target_modules=["0"]))
        randomize_adapters(model)
        model(indices).square().sum().backward()
        gradients.append(model.base_model.model[0].lora_embedding_A["default"].grad)
    assert relative_error(gradients[0], gradients[1]) < FLOAT64
