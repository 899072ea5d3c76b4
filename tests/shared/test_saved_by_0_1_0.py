"""Adapters that version 0.1.0 saved load, compute and merge as they did there.

`tests/data/saved_by_0_1_0` holds one folder for each: its files as saved, and the outputs before and after merging
that 0.1.0 computed for the input in `base.safetensors`, on a processor of that time.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.oracle import relative_error
from helpers.tolerances import EPS
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

import peft_reslora  # noqa: F401

DATA = Path(__file__).parents[1] / "data" / "saved_by_0_1_0"
ADAPTERS = ["input", "middle_calibrated", "middle_annealed", "block", "mora"]
WIDTH = 7


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(WIDTH, WIDTH + 3), "down": nn.Linear(WIDTH + 3, WIDTH)}) for _ in range(3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block["down"](torch.tanh(block["up"](x)))
        return x


def base_and_input() -> tuple[Stack, torch.Tensor]:
    tensors = load_file(DATA / "base.safetensors")
    x = tensors.pop("x")
    model = Stack()
    model.load_state_dict({name.removeprefix("base."): tensor for name, tensor in tensors.items()})
    return model.eval(), x


def assert_same(actual: torch.Tensor, recorded: torch.Tensor) -> None:
    """Equal up to the rounding of 18 layers' sums of at most 10 products, in any order."""
    assert float(recorded.norm()) > 1.0
    assert relative_error(actual, recorded) < 18 * 10 * EPS


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("name", ADAPTERS)
@torch.no_grad()
def test_it_computes_and_merges_as_before(name: str, low_cpu_mem_usage: bool) -> None:
    model, x = base_and_input()
    recorded = load_file(DATA / name / "outputs.safetensors")
    loaded = PeftModel.from_pretrained(model, DATA / name, low_cpu_mem_usage=low_cpu_mem_usage)
    assert_same(loaded(x), recorded["output"])
    assert_same(loaded.merge_and_unload()(x), recorded["merged"])


@pytest.mark.parametrize("name", ADAPTERS)
@torch.no_grad()
def test_it_is_saved_again_and_loads(name: str, tmp_path: Path) -> None:
    model, x = base_and_input()
    PeftModel.from_pretrained(model, DATA / name).save_pretrained(tmp_path)
    recorded = load_file(DATA / name / "outputs.safetensors")
    loaded = PeftModel.from_pretrained(base_and_input()[0], tmp_path)
    assert_same(loaded(x), recorded["output"])
    assert_same(loaded.merge_and_unload()(x), recorded["merged"])


@pytest.mark.parametrize("name", ADAPTERS)
@torch.no_grad()
def test_it_loads_over_an_adapter_of_its_kind(name: str) -> None:
    """As when a training that 0.1.0 began is resumed."""
    model, x = base_and_input()
    recorded = load_file(DATA / name / "outputs.safetensors")
    resumed = PeftModel.from_pretrained(model, DATA / name, is_trainable=True)
    for parameter in resumed.parameters():
        if parameter.requires_grad:
            parameter.data.zero_()
    resumed.load_adapter(DATA / name, "default", is_trainable=True)
    assert_same(resumed.eval()(x), recorded["output"])
