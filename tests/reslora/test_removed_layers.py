"""Models from which blocks are taken out after they were adapted, and layers that a model never calls."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from helpers.oracle import factors_of, randomize_adapters, relative_error, run_oracle
from helpers.tolerances import FLOAT64
from peft import PeftModel, get_peft_model
from torch import nn

from peft_reslora import MoRAConfig, ResLoRAConfig

VARIANTS = [("input", 1), ("block", 1), ("block", -1), ("middle", 2), ("middle", -1)]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 7), nn.Linear(7, 5)
        self.spare = nn.Linear(5, 7)  # which no forward calls

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Encoder(nn.Module):
    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def config_of(shortcut: str, pre_num: int, targets: tuple[str, ...] = ("up", "down")) -> ResLoRAConfig:
    return ResLoRAConfig(
        r=2, target_modules=list(targets), shortcut=shortcut, pre_num=pre_num, merge_estimator="weight_norm"
    )


@pytest.fixture
def base() -> nn.Module:
    torch.manual_seed(0)
    return Encoder().double()


@pytest.mark.parametrize(("shortcut", "pre_num"), VARIANTS)
def test_a_model_without_its_last_blocks_is_right_and_saved(base, shortcut, pre_num, tmp_path):
    x = torch.randn(3, 5, dtype=torch.float64)
    model = randomize_adapters(get_peft_model(copy.deepcopy(base), config_of(shortcut, pre_num)))
    model.base_model.model.layers, base.layers = model.base_model.model.layers[:3], base.layers[:3]
    expected = run_oracle(base, {"x": x}, factors_of(model), shortcut, pre_num, lambda m, inputs: m(**inputs))
    for _ in range(2):  # the pass before leaves nothing behind
        assert relative_error(model(x), expected) < FLOAT64
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert relative_error(loaded(x), expected) < FLOAT64


@pytest.mark.parametrize(("shortcut", "pre_num"), VARIANTS)
def test_a_model_without_a_block_in_between_is_not_saved(base, shortcut, pre_num, tmp_path):
    model = randomize_adapters(get_peft_model(base, config_of(shortcut, pre_num)))
    layers = model.base_model.model.layers  # and so the block that is taken out lives on
    model.base_model.model.layers = nn.ModuleList([layers[0], layers[2], layers[3]])
    with pytest.raises(ValueError, match=r"'layers\.1\.up'.*'default'.*not in this model"):
        model.save_pretrained(tmp_path)
    assert {file.name for file in Path(tmp_path).iterdir()} <= {"README.md"}  # which PEFT writes before it asks


def configs() -> dict[str, ResLoRAConfig | MoRAConfig]:
    targets = ["up", "down", "spare"]
    found: dict[str, ResLoRAConfig | MoRAConfig] = {
        shortcut: config_of(shortcut, 1, tuple(targets)) for shortcut in ("input", "block", "middle")
    }
    return found | {"mora": MoRAConfig(r=2, target_modules=targets)}


def warnings_of(model: nn.Module, x: torch.Tensor) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(x)
    return [str(w.message) for w in caught if "never called" in str(w.message)]


@pytest.mark.parametrize("tuner", ["input", "block", "middle", "mora"])
@pytest.mark.parametrize("through", ["peft", "bare"])
def test_layers_that_no_pass_calls_are_named_after_the_first_training_forward(base, tuner, through):
    x = torch.randn(3, 5, dtype=torch.float64)
    peft_model = get_peft_model(base, configs()[tuner])
    model = peft_model if through == "peft" else base
    model.eval()
    assert warnings_of(model, x) == []
    model.train()
    with torch.no_grad():
        assert warnings_of(model, x) == []
    (message,) = warnings_of(copy.deepcopy(model), x)
    assert "4 of the 12 layers of adapter 'default'" in message
    assert "layers.0.spare, layers.1.spare, layers.2.spare, ..." in message
    assert len(warnings_of(model, x)) == 1
    assert warnings_of(model, x) == []


@pytest.mark.parametrize("tuner", ["input", "block", "middle", "mora"])
def test_nothing_is_said_where_all_layers_are_called(base, tuner):
    config = configs()[tuner]
    config.target_modules = {"up", "down"}
    model = get_peft_model(base, config)
    assert warnings_of(model, torch.randn(3, 5, dtype=torch.float64)) == []


def test_experts_that_get_no_token_are_no_reason_for_a_warning():
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.experts[1](x)

    model = get_peft_model(Mixture(), ResLoRAConfig(r=2, target_modules=["0", "1", "2"]))
    assert warnings_of(model, torch.randn(3, 5)) == []
