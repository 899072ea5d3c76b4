"""Deep chains that take from all earlier layers sum whole updates, where that is cheaper."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.encoders import Encoder, adapted_encoder, assert_same, backwards, by_torch, checkpointed, data
from torch import nn
from torch.nn.utils import parametrize


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("around", ["plain", "checkpointed"])
def test_a_deep_chain_that_takes_from_all_sums_whole_updates(dropout, around, monkeypatch):
    """Where that is cheaper than the factors side by side; unequal shapes, scalings and ranks."""
    from peft_reslora.reslora import factor_sharing

    torch.manual_seed(0)
    patterns = {"rank_pattern": {r"layers\.2\.up": 3}, "alpha_pattern": {r"layers\.1\.down": 5}}
    model = adapted_encoder(Encoder(6), "block", -1, lora_dropout=dropout, **patterns)
    if around == "checkpointed":
        model = checkpointed(model, by_torch(use_reentrant=False))
    twin = copy.deepcopy(model)
    results = []
    for candidate, cheaper in ((model, True), (twin, False)):
        asked: list[tuple[int, ...]] = []

        def decided(*sizes: int, asked: list[tuple[int, ...]] = asked, cheaper: bool = cheaper) -> bool:
            asked.append(sizes)
            return cheaper

        monkeypatch.setattr(factor_sharing, "whole_update_is_cheaper", decided)
        torch.manual_seed(3)
        results.append(backwards(candidate, data(), data(seed=2)))
        assert ((3, 2, 13, 5, 7, True) in asked) == (not dropout)  # folded into the base weight but for a dropout
        assert ((3, 2, 13, 5, 7, False) in asked) == (bool(dropout) or not cheaper)
    assert_same(results[0], results[1])


def hooked(base: nn.Module) -> None:
    base.register_forward_hook(lambda module, args, output: 2 * output)


def called_otherwise(base: nn.Module) -> None:
    forward = base.forward
    base.forward = lambda x: 2 * forward(x)


def computed(base: nn.Module) -> None:
    parametrize.register_parametrization(base, "weight", nn.Tanh())


def followed_backwards(base: nn.Module) -> None:
    base.register_full_backward_hook(lambda module, grad_input, grad_output: tuple(2 * g for g in grad_input))


def led_backwards(base: nn.Module) -> None:
    base.register_full_backward_pre_hook(lambda module, grad_output: tuple(2 * g for g in grad_output))


def trained(base: nn.Module) -> None:
    base.weight.requires_grad_()


@pytest.mark.parametrize("change", [hooked, called_otherwise, computed, followed_backwards, led_backwards, trained])
def test_a_base_layer_that_does_more_than_multiply_is_called(change, monkeypatch):
    """The update goes into the weight of plain layers only; a weight that is trained besides has its gradient."""
    from peft_reslora.reslora import factor_sharing

    torch.manual_seed(0)
    model = adapted_encoder(Encoder(4), "block", -1)
    unchanged = backwards(copy.deepcopy(model), data())
    change(model.base_model.model.layers[2].up.base_layer)
    results = []
    for cheaper in (True, False):
        monkeypatch.setattr(factor_sharing, "whole_update_is_cheaper", lambda *sizes, cheaper=cheaper: cheaper)
        results.append(backwards(copy.deepcopy(model), data()))
    assert_same(results[0], results[1])
    first = "base_model.model.layers.0.up.lora_A.default.weight"
    assert torch.equal(results[0][first], unchanged[first]) == (change is trained)


def test_hooks_on_all_modules_see_the_base_layers(monkeypatch):
    from peft_reslora.reslora import factor_sharing

    torch.manual_seed(0)
    model = adapted_encoder(Encoder(4), "block", -1)
    monkeypatch.setattr(factor_sharing, "whole_update_is_cheaper", lambda *sizes: True)
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module))
    try:
        model(data())
    finally:
        handle.remove()
    layers = model.base_model.model.layers
    assert {id(block.up.base_layer) for block in layers} <= set(map(id, seen))


def test_two_adapters_are_each_added_to_what_the_base_layer_makes(monkeypatch):
    from peft_reslora.reslora import factor_sharing

    torch.manual_seed(0)
    model = adapted_encoder(Encoder(4), "block", -1)
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    for parameter in model.double().parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    results = []
    for cheaper in (True, False):
        monkeypatch.setattr(factor_sharing, "whole_update_is_cheaper", lambda *sizes, cheaper=cheaper: cheaper)
        results.append(backwards(copy.deepcopy(model), data()))
    assert_same(results[0], results[1])


@pytest.mark.parametrize(
    ("rows", "ranks", "folded", "expected"),
    [
        (256, 100, False, False),
        (256, 1600, False, True),
        (1, 800, False, False),
        (256, 100, True, True),
        (256, 40, True, False),
        (1, 800, True, False),
    ],
)
def test_when_whole_updates_are_cheaper(rows, ranks, folded, expected):
    """Multiplications counted, backward ones as well: 3 rows (in + out) R against in out (3 rows + 3 r), or
    in out (rows + 3 r) where the sum is folded into the base weight."""
    from peft_reslora.reslora.sums import whole_update_is_cheaper

    assert whole_update_is_cheaper(rows, 8, ranks, 256, 256, folded) is expected
