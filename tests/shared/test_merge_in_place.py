"""Merges for good write into the weights: what else reads that memory, and what a merge leaves that breaks off."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.adapters import config_of
from helpers.oracle import randomize_adapters, relative_error
from helpers.tolerances import rounding
from peft import PeftModel, get_peft_model
from torch import nn

from peft_reslora.mora.layer import MoRALinear
from peft_reslora.reslora.layer import ResLoRALayer

# The method that adds an update to a weight, which is to fail for the second adapter.
TUNERS: dict[str, tuple[type, str]] = {
    "block": (ResLoRALayer, "add_delta_weight"),
    "mora": (MoRALinear, "_add_delta_weight"),
}


class Attention(nn.MultiheadAttention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x, x, x)[0]


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(13, 29), nn.Linear(29, 13))


def adapted(model: nn.Module, tuner: str, *adapters: str) -> PeftModel:
    targets = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.MultiheadAttention)]
    config = config_of(tuner, r=2, target_modules=[name for name in targets if "out_proj" not in name])
    model = get_peft_model(model, config, adapter_name=adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, copy.deepcopy(config))
    randomize_adapters(model)
    model.base_model.set_adapter(list(adapters))
    return model.eval()


def failing_for(adapter: str, monkeypatch: pytest.MonkeyPatch, tuner: str) -> None:
    layer, method = TUNERS[tuner]
    add = getattr(layer, method)

    def out_of_memory(self: Any, weight: torch.Tensor, name: str, *args: Any, **kwargs: Any) -> Any:
        if name == adapter:
            raise torch.OutOfMemoryError
        return add(self, weight, name, *args, **kwargs)

    monkeypatch.setattr(layer, method, out_of_memory)


@pytest.mark.parametrize("tuner", TUNERS)
def test_a_layer_whose_merge_breaks_off_is_refused_from_then_on(tuner, monkeypatch):
    """The first of two updates is in its weight, which nothing would notice."""
    model, x = adapted(base(), tuner, "first", "second"), torch.randn(4, 13)
    with monkeypatch.context() as patched:
        failing_for("second", patched, tuner)
        with pytest.raises(torch.OutOfMemoryError):
            model.merge_and_unload()
    for use in (lambda: model(x), model.merge_and_unload, model.merge_adapter):
        with pytest.raises(
            RuntimeError, match=r"has left the weight of layer '?0'? half written.*Load the base model"
        ):
            use()


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("merge", ["merge_adapter", "safe merge_and_unload"])
def test_a_merge_that_keeps_the_weights_can_break_off(tuner, merge, monkeypatch):
    model, x = adapted(base(), tuner, "first", "second"), torch.randn(4, 13)
    expected = model(x)
    with monkeypatch.context() as patched:
        failing_for("second", patched, tuner)
        with pytest.raises(torch.OutOfMemoryError):
            model.merge_adapter() if merge == "merge_adapter" else model.merge_and_unload(safe_merge=True)
    assert torch.equal(model(x), expected)
    assert relative_error(model.merge_and_unload()(x), expected) < rounding(29)


def test_an_attention_of_which_one_weight_is_half_written_is_refused(monkeypatch):
    torch.manual_seed(0)
    model, x = nn.Sequential(Attention(8, 2)), torch.randn(3, 2, 8)
    model = adapted(model, "block", "first")
    add = ResLoRALayer.add_delta_weight

    def out_of_memory(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = add(self, *args, **kwargs)
        if "out_proj" in self.layer_name:
            raise torch.OutOfMemoryError
        return result

    with monkeypatch.context() as patched:
        patched.setattr(ResLoRALayer, "add_delta_weight", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            model.merge_and_unload()
    with pytest.raises(RuntimeError, match="half written"):
        model(x)


@pytest.mark.parametrize("tuner", TUNERS)
def test_a_safe_merge_leaves_what_others_hold(tuner):
    """As in PEFT: a state dict that was taken before shares the memory of the weights."""
    model = base()
    held, before = model.state_dict(), copy.deepcopy(model.state_dict())
    merged = adapted(model, tuner, "first").merge_and_unload(safe_merge=True)
    assert all(torch.equal(held[name], before[name]) for name in held)
    assert not torch.equal(merged[0].weight, before["0.weight"])


@pytest.mark.parametrize("tuner", TUNERS)
def test_a_buffer_that_shares_a_weights_memory_keeps_its_numbers(tuner):
    model = base()
    model.register_buffer("reference", model[0].weight.data)
    before = model.reference.clone()
    merged = adapted(model, tuner, "first").merge_and_unload()
    assert torch.equal(merged.reference, before)
    assert not torch.equal(merged[0].weight, before)


def test_updates_that_overflow_by_adding_up_are_refused():
    """With more rows of groups than columns, one entry of MoRA's delta weight is a sum of many of M."""
    model = nn.Sequential(nn.Linear(2, 1000).half())
    model = get_peft_model(model, config_of("mora", r=8, target_modules=["0"], mora_type="sharing"))
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.base_layer.weight.fill_(65500.0)
        layer.mora_M["default"].fill_(7.0)
    with pytest.raises(ValueError, match=r"layer '?0'?"):
        model.merge_and_unload()
    assert bool(layer.base_layer.weight.isfinite().all())
