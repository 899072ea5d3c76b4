"""Without gradients layers take fewer steps: to the same numbers, whatever has changed since the last forward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.adapters import VARIANTS, tuner_layers
from helpers.encoders import Encoder, adapted_encoder, data
from helpers.tolerances import FLOAT64, half_rounding, rounding
from torch import nn

from peft_reslora.reslora import factor_sharing, inference, variant
from peft_reslora.reslora.passes import Scope

SHORTCUTS = [("input", 1), ("block", 1), ("block", -1), ("middle", 1), ("middle", -1)]


def filled(shortcut: str, pre_num: int, **fields: Any) -> Any:
    torch.manual_seed(0)
    return adapted_encoder(Encoder(5), shortcut, pre_num, init_lora_weights=False, **fields).eval()


def ordinary(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        return model(x).detach()


def in_the_ordinary_way(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Without gradients, each layer's factors read when it runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variant, "plain_pass", lambda *args: None)
        patch.setattr(factor_sharing, "_sums_updates", lambda *args: False)
        return quick(model, x)


def assert_near(found: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=bound * float(expected.abs().max()))


def quick(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The positions of the layers that have taken the short way."""
    positions: list[int] = []

    def watch(running: Any, chain: Any, position: int, *args: Any) -> torch.Tensor:
        positions.append(position)
        return add_plainly(running, chain, position, *args)

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


def within_the_pass(model: Any, at: str, change: Callable[[Any], None]) -> Any:
    """The model, changed whenever the layer `at` is about to run."""
    tuner_layers(model)[at].register_forward_pre_hook(lambda layer, args: change(model))
    return model


def double_scale(model: Any) -> None:
    for layer in tuner_layers(model).values():
        layer.set_scale("default", 2 * layer.scaling["default"])


@pytest.mark.parametrize(("shortcut", "pre_num"), VARIANTS)
@pytest.mark.parametrize("change", [set_data, replace_parameters, double_scale], ids=lambda change: change.__name__)
@pytest.mark.parametrize("at", ["layers.0.down", "layers.2.up", "layers.4.up"])
def test_changes_within_the_forward_pass_hold_from_there_on(
    shortcut: str, pre_num: int, change: Callable[[Any], None], at: str
) -> None:
    """Of what an earlier layer hands on, what it was when that layer ran; of its factors, what they are."""
    if (shortcut, change) == ("block", set_data) and pre_num != 1:
        pytest.skip("factors put side by side are copies, and nothing counts such a change")
    x = data()
    torch.manual_seed(2)
    expected = in_the_ordinary_way(within_the_pass(filled(shortcut, pre_num), at, change), x)
    torch.manual_seed(2)
    model = within_the_pass(filled(shortcut, pre_num), at, change)
    assert_near(quick(model, x), expected, FLOAT64)


@pytest.mark.parametrize(("shortcut", "pre_num"), VARIANTS)
def test_blocks_that_run_again_in_one_call_see_what_has_changed_in_between(shortcut: str, pre_num: int) -> None:
    class Loop(Encoder):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = super().forward(x)
            set_data(self)
            return super().forward(x)

    torch.manual_seed(0)
    model = adapted_encoder(Loop(5), shortcut, pre_num, init_lora_weights=False).eval()
    twin, x = copy.deepcopy(model), data()
    torch.manual_seed(2)
    expected = ordinary(twin, x)
    torch.manual_seed(2)
    assert_near(quick(model, x), expected, FLOAT64)


@pytest.mark.parametrize(("shortcut", "pre_num"), VARIANTS)
@pytest.mark.parametrize("with_gradients", [[0], [1], [2, 3], [0, 4]])
def test_gradients_that_are_enabled_within_do_not_mix_up_what_is_handed_on(
    shortcut: str, pre_num: int, with_gradients: list[int]
) -> None:
    model, x = filled(shortcut, pre_num), data()
    expected = ordinary(model, x)
    for i in with_gradients:
        layer = model.base_model.model.layers[i]
        layer.forward = torch.enable_grad()(layer.forward)
    assert_near(quick(model, x), expected, FLOAT64)


@pytest.mark.parametrize("pre_num", [1, 2, -1])
def test_no_layer_holds_copies_of_many_factors_beside_many_rows(pre_num: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, closed = filled("block", pre_num), list[int]()
    monkeypatch.setattr(Scope, "close", lambda scope: closed.append(len(scope.stacks)))
    quick(model, data(20000, 5))
    assert closed
    assert not any(closed)


@pytest.mark.parametrize(("shortcut", "pre_num"), VARIANTS)
def test_a_trace_takes_the_ordinary_way_which_chooses_nothing_by_sizes(
    shortcut: str, pre_num: int, taken: list[int]
) -> None:
    model, x = filled(shortcut, pre_num), data().detach()
    with torch.no_grad():
        traced = torch.jit.trace(model.base_model.model, x, check_trace=False)
    assert not taken
    assert_near(traced(x), ordinary(model, x), FLOAT64)


@pytest.mark.parametrize(("shortcut", "pre_num"), VARIANTS)
def test_a_graph_without_gradients_is_whole(shortcut: str, pre_num: int) -> None:
    model, x = filled(shortcut, pre_num), data()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    assert_near(quick(compiled, x), ordinary(model, x), FLOAT64)
