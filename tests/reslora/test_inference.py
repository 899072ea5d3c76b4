"""Without gradients layers take fewer steps: to the same numbers, whatever has changed since the last forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.adapters import tuner_layers
from helpers.encoders import Encoder, adapted_encoder, data
from helpers.tolerances import half_rounding, rounding
from torch import nn

from peft_reslora.reslora import inference

SHORTCUTS = [("input", 1), ("block", 1), ("block", -1), ("middle", 1), ("middle", -1)]


def filled(shortcut: str, pre_num: int, **fields: Any) -> Any:
    torch.manual_seed(0)
    return adapted_encoder(Encoder(5), shortcut, pre_num, init_lora_weights=False, **fields).eval()


def ordinary(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        return model(x).detach()


def assert_near(found: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=bound * float(expected.abs().max()))


def quick(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The positions of the layers that have taken the short way."""
    positions: list[int] = []

    def watch(running: Any, chain: Any, position: int, *tensors: torch.Tensor) -> torch.Tensor:
        positions.append(position)
        return add_plainly(running, chain, position, *tensors)

    add_plainly = inference.add_plainly
    monkeypatch.setattr("peft_reslora.reslora.variant.add_plainly", watch)
    return positions


def set_data(model: Any) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn_like(parameter))  # nothing counts this


def replace_parameters(model: Any) -> None:
    for layer in tuner_layers(model).values():
        layer.lora_B["default"].weight = nn.Parameter(torch.randn_like(layer.lora_B["default"].weight))


def scale(model: Any) -> None:
    for layer in tuner_layers(model).values():
        layer.set_scale("default", 3.0)


def other_adapter(model: Any) -> None:
    model.add_adapter("other", model.peft_config["default"])
    model.double().eval()
    model.set_adapter("other")


def both_adapters(model: Any) -> None:
    other_adapter(model)
    model.base_model.set_adapter(["default", "other"])


def merge(model: Any) -> None:
    model.merge_adapter()


def unmerge(model: Any) -> None:
    model.merge_adapter()
    model.unmerge_adapter()


def hook(model: Any) -> None:
    for layer in tuner_layers(model).values():
        layer.lora_A["default"].register_forward_hook(lambda module, args, output: 2 * output)


def narrow(model: Any) -> None:
    model.float()


CHANGES = (set_data, replace_parameters, scale, other_adapter, both_adapters, unmerge, hook, narrow)


@pytest.mark.parametrize(("shortcut", "pre_num"), SHORTCUTS)
@pytest.mark.parametrize("rows", [1, 9000])
def test_the_short_way_gives_the_numbers_of_the_ordinary_one(
    shortcut: str, pre_num: int, rows: int, taken: list[int]
) -> None:
    model = filled(shortcut, pre_num, alpha_pattern={r"layers\.1\.down": 5} if shortcut == "block" else {})
    x = data(rows, 5)
    expected = ordinary(model, x)
    assert not taken
    torch.testing.assert_close(
        quick(model, x), expected, rtol=0, atol=rounding(model, x.dtype) * float(expected.abs().max())
    )
    assert len(taken) == len(tuner_layers(model))


@pytest.mark.parametrize(("shortcut", "pre_num"), SHORTCUTS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_nothing_that_was_looked_up_outlives_the_forward_pass(
    shortcut: str, pre_num: int, change: Callable[[Any], None]
) -> None:
    model, x = filled(shortcut, pre_num, merge_estimator="weight_norm"), data()
    before = quick(model, x)
    change(model)
    x = x.to(next(model.parameters()).dtype)
    expected = ordinary(model, x)
    if change is not unmerge:
        assert not torch.equal(expected.double(), before)
    torch.testing.assert_close(
        quick(model, x), expected, rtol=0, atol=rounding(model, x.dtype) * float(expected.abs().max())
    )


@pytest.mark.parametrize("shortcut", ["input", "block", "middle"])
def test_merged_and_switched_off_adapters_take_no_part(shortcut: str, taken: list[int]) -> None:
    model, x = filled(shortcut, 1, merge_estimator="weight_norm"), data()
    quick(model, x)
    taken.clear()
    with model.disable_adapter():
        assert torch.equal(quick(model, x), ordinary(model, x))
    model.merge_adapter()
    assert torch.equal(quick(model, x), ordinary(model, x))
    assert not taken


@pytest.mark.parametrize("shortcut", ["input", "block", "middle"])
def test_a_dropout_that_is_on_is_not_left_out(shortcut: str, taken: list[int]) -> None:
    model, x = filled(shortcut, 1, lora_dropout=0.5), data()
    quick(model, x)
    assert taken
    taken.clear()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    torch.manual_seed(1)
    expected = ordinary(model, x)
    torch.manual_seed(1)
    assert torch.equal(quick(model, x), expected)
    assert not taken


@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_norms_are_recorded_in_training_mode_without_gradients_too(shortcut: str, taken: list[int]) -> None:
    model = filled(shortcut, 1).train()
    quick(model, data())
    assert not taken
    for layer in tuner_layers(model).values():
        assert int((layer.lora_norm["default"] >= 0).sum()) == 1


@pytest.mark.parametrize("shortcut", ["input", "block", "middle"])
def test_autocast_and_inputs_in_half_precision_keep_their_numbers(shortcut: str, taken: list[int]) -> None:
    model, x = filled(shortcut, 1).float(), data().float()
    bound = half_rounding(4 * len(tuner_layers(model)), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert_near(quick(model, x), ordinary(model, x), bound)
    assert not taken
    for module in model.modules():
        if isinstance(module, nn.Linear) and not any(p.requires_grad for p in module.parameters()):
            module.bfloat16()
    assert_near(quick(model, x.bfloat16()), ordinary(model, x.bfloat16()), bound)
    assert taken


@pytest.mark.parametrize("shortcut", ["input", "block", "middle"])
@pytest.mark.parametrize("rows", [1, 9000])
@pytest.mark.parametrize(
    ("of_input", "of_base"), [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")]
)
def test_outputs_have_the_dtype_that_they_have_in_the_ordinary_way(
    shortcut: str, rows: int, of_input: str, of_base: str, taken: list[int]
) -> None:
    """Of each adapter, as layers see it that leave it at that, such as the quantized ones of bitsandbytes."""
    model, seen = filled(shortcut, 1).float(), list[torch.Tensor]()
    layer = next(iter(tuner_layers(model).values()))

    def forward(x: torch.Tensor) -> torch.Tensor:
        x, result = x.to(getattr(torch, of_input)), layer.base_layer(x).to(getattr(torch, of_base))
        seen.append(layer.lora_variant["default"].forward(layer, "default", x, result))
        return seen[-1].float()

    layer.forward = forward
    x = data(rows, 5).float()
    ordinary(model, x)
    assert not taken
    quick(model, x)
    assert taken
    expected, found = seen
    assert found.dtype == expected.dtype
    assert_near(found, expected.detach(), half_rounding(4, torch.bfloat16))
