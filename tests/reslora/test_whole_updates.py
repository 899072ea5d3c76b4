"""Deep chains that take from all earlier layers sum whole updates, where that is cheaper."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.encoders import Encoder, adapted_encoder, assert_same, backwards, by_torch, checkpointed, data


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
        assert (3, 2, 13, 5, 7) in asked
    assert_same(results[0], results[1])


@pytest.mark.parametrize(("rows", "ranks", "expected"), [(256, 100, False), (256, 1600, True), (1, 800, False)])
def test_when_whole_updates_are_cheaper(rows, ranks, expected):
    """Multiplications counted: rows (in + out) R against in out (rows + r)."""
    from peft_reslora.reslora.sums import whole_update_is_cheaper

    assert whole_update_is_cheaper(rows, 8, ranks, 256, 256) is expected
