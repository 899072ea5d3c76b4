"""MoRA on quantized base weights: training, merging, and the stored numbers that come back."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.mora import bitsandbytes_linear, mora_config, torchao_linear
from helpers.oracle import relative_error
from peft import get_peft_model

from peft_reslora.mora import MoRAConfig, MoRALinear


def quantized_weight(mora: MoRALinear) -> list[torch.Tensor]:
    """The stored numbers, packed values and scales, not the weight they stand for."""
    weight = mora.get_base_layer().weight
    if hasattr(weight, "quant_state"):
        return [weight.data.clone(), weight.quant_state.absmax.clone()]
    if hasattr(weight, "SCB"):
        state = mora.get_base_layer().state
        return [weight.data.clone(), (weight.SCB if state.SCB is None else state.SCB).clone()]
    return [weight.qdata.clone(), weight.scale.clone()]


kinds = pytest.mark.parametrize("mora_type", ["sharing", "rotation"])
backends = pytest.mark.parametrize(
    ("build", "step"),
    [(lambda: bitsandbytes_linear(4), 0.15), (lambda: bitsandbytes_linear(8), 0.01), (torchao_linear, 0.01)],
    ids=["4bit", "8bit", "torchao"],
)


@kinds
@backends
def test_quantized_base_trains(build, step, mora_type):
    model = get_peft_model(build(), MoRAConfig(r=4, mora_type=mora_type, target_modules=["lin0"]))
    mora = model.base_model.model.lin0
    x = torch.randn(5, 64)
    base_output = model(x).detach()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(3):
        loss = (model(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    torch.testing.assert_close(model(x), base_output + x @ mora.get_delta_weight("default").T)


@kinds
@backends
def test_merge_quantizes_the_sum_and_unmerge_restores_the_bits(build, step, mora_type):
    # in training mode, as evaluation on a CPU may repack a 4-bit weight
    model = get_peft_model(build(), mora_config(mora_type, r=4, target_modules=["lin0"])).train()
    mora = model.base_model.model.lin0
    mora.mora_M["default"].data.mul_(0.1)
    x = torch.randn(5, 64)
    expected = model(x)
    before = quantized_weight(mora)
    dequantized = mora.get_base_weight().clone().float()
    for cycle in range(3):
        model.merge_adapter(safe_merge=True)
        error = relative_error(mora.get_base_weight(), dequantized + mora.get_delta_weight("default"))
        assert error < step
        assert relative_error(model(x), expected) < step
        if cycle == 1:
            model = copy.deepcopy(model).to("cpu")
            mora = model.base_model.model.lin0
        model.unmerge_adapter()
        for ours, theirs in zip(quantized_weight(mora), before, strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(model(x), expected)
    merged = model.merge_and_unload()
    assert relative_error(merged.lin0(x), expected) < step
    assert type(merged.lin0) is type(build().lin0)


def test_four_bit_weight_repacked_by_an_evaluation_is_refused_not_merged_wrongly():
    model = get_peft_model(bitsandbytes_linear(4), mora_config(r=4, target_modules=["lin0"])).eval()
    model(torch.randn(5, 64))
    if not getattr(model.base_model.model.lin0.base_layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("bitsandbytes repacks 4-bit weights only on CPUs with AVX512-BF16")
    with pytest.raises(ValueError, match=r"repacked .* merge before evaluating"):
        model.merge_adapter()
