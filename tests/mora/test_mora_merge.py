"""Merging MoRA: bits come back, each merge rounds once, broken adapters are refused."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from helpers.mora import MLP, TYPES, dense_reference, inputs, mlp, mora_config
from helpers.oracle import relative_error
from helpers.tolerances import rounding
from peft import get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import nn

from peft_reslora.mora import MoRALayer


def base_weights(model: nn.Module) -> list[torch.Tensor]:
    return [m.get_base_layer().weight.detach().clone() for m in model.modules() if isinstance(m, MoRALayer)]


def _pickled(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_unmerging_restores_the_bits_after_many_cycles_and_two_adapters(dtype):
    model = get_peft_model(mlp(dtype), mora_config("sharing"))
    model.add_adapter("other", mora_config("rotation", r=5))
    before = base_weights(model)
    for names in (["default"], ["default", "other"], None, ["other"]) * 3:
        model.merge_adapter(adapter_names=names)
        assert not torch.equal(base_weights(model)[0], before[0])
        model.unmerge_adapter()
        for ours, theirs in zip(base_weights(model), before, strict=True):
            assert torch.equal(ours, theirs)


def test_merging_one_after_another_adds_both():
    model = get_peft_model(mlp(), mora_config("sharing"))
    model.add_adapter("other", mora_config("rotation", r=5))
    before = base_weights(model)
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging other"):
        model.merge_adapter(["other"])
    for mora, weight in zip((model.base_model.model.lin0, model.base_model.model.lin1), before, strict=True):
        expected = weight + mora.get_delta_weight("default") + mora.get_delta_weight("other")
        torch.testing.assert_close(mora.base_layer.weight.detach(), expected)
    model.unmerge_adapter()
    for ours, theirs in zip(base_weights(model), before, strict=True):
        assert torch.equal(ours, theirs)


def test_half_precision_merge_rounds_once():
    model = get_peft_model(mlp(torch.bfloat16), mora_config("rotation"))
    mora = model.base_model.model.lin0
    exact = mora.base_layer.weight.float() + mora.get_delta_weight("default")
    model.merge_adapter()
    assert torch.equal(mora.base_layer.weight.detach(), exact.bfloat16())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_safe_merge_refuses_broken_adapters_with_pefts_message(value):
    model = get_peft_model(mlp(), mora_config())
    before = base_weights(model)
    model.base_model.model.lin1.mora_M["default"].data[0, 0] = value  # the last layer: nothing may be merged before
    message = r"^NaNs detected in the merged weights\. The adapter default seems to be broken$"
    with pytest.raises(ValueError, match=message):
        model.merge_adapter(safe_merge=True)
    with pytest.raises(ValueError, match=message):
        model.merge_and_unload(safe_merge=True)
    assert len(base_weights(model)) == 2
    for ours, theirs in zip(base_weights(model), before, strict=True):
        assert torch.equal(ours, theirs)


def test_safe_merge_refuses_overflow_of_the_base_dtype():
    model = get_peft_model(mlp(torch.float16), mora_config())
    model.base_model.model.lin0.mora_M["default"].data.fill_(1e5)
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)


@pytest.mark.parametrize("copier", [lambda m: m, copy.deepcopy, _pickled])
def test_original_weight_follows_casts_and_copies_and_stays_out_of_checkpoints(copier):
    model = get_peft_model(mlp(), mora_config("rotation"))
    before = base_weights(model)
    keys = set(model.state_dict())
    model.merge_adapter()
    assert set(model.state_dict()) == keys
    saved = {f"base_model.model.lin{i}.mora_{part}" for i in (0, 1) for part in ("M", "stamp")}
    assert set(get_peft_model_state_dict(model)) == saved
    moved = copier(model).to(torch.bfloat16)
    moved.unmerge_adapter()
    for ours, theirs in zip(base_weights(moved), before, strict=True):
        assert torch.equal(ours, theirs.bfloat16())


def test_disabling_or_deleting_a_merged_adapter_restores_the_base():
    base = mlp()
    plain = base(inputs())
    model = get_peft_model(base, mora_config())
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(inputs()), plain)
    model.merge_adapter()
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("default")
    mora = model.base_model.model.lin0
    with pytest.warns(UserWarning, match="'default' is merged into layer lin0"):
        mora.delete_adapter("default")
    assert not mora.merged
    assert not mora._unmerged


def test_merge_and_unload_of_named_adapters():
    model = get_peft_model(mlp(), mora_config("sharing")).eval()
    model.add_adapter("other", mora_config("rotation", r=5))
    model.set_adapter("other")
    expected = model(inputs())
    model.set_adapter("default")
    merged = model.merge_and_unload(adapter_names=["other"])
    assert isinstance(merged, MLP)
    assert relative_error(merged(inputs()), expected) < rounding(merged)
    assert set(merged.state_dict()) == set(mlp().state_dict())


def test_weight_that_is_no_plain_number_is_refused():
    model = get_peft_model(mlp(), mora_config())
    mora = model.base_model.model.lin0
    mora.base_layer.weight = nn.Parameter(mora.base_layer.weight.detach().to(torch.float8_e4m3fn))
    with pytest.raises(TypeError, match=r"layer lin0 has type torch\.float8_e4m3fn, which PEFT cannot dequantize"):
        model.merge_adapter()


@pytest.mark.parametrize("mora_type", TYPES)
@pytest.mark.parametrize("r", [1, 3, 64])
def test_each_way_to_merge_adds_the_delta_weight_of_the_paper(mora_type, r):
    """With squares smaller and larger than the layers, on a linear layer and on a Conv1D."""
    model = get_peft_model(mlp(), mora_config(mora_type, r=r))
    expected = {}
    for name in ("lin0", "lin1"):
        mora = getattr(model.base_model.model, name)
        delta = dense_reference(
            mora.mora_M["default"].detach().double(), mora.in_features, mora.out_features, mora_type
        )
        expected[name] = mora.base_layer.weight.detach().double() + (delta.T if name == "lin1" else delta)
    model.merge_adapter()
    for name, weight in expected.items():
        assert relative_error(getattr(model.base_model.model, name).base_layer.weight, weight) < rounding(model)
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    for name, weight in expected.items():
        assert relative_error(getattr(merged, name).weight, weight) < rounding(merged)


@pytest.mark.parametrize("mora_type", TYPES)
def test_merging_for_good_writes_into_the_weights_and_says_the_same_numbers(mora_type):
    model = get_peft_model(mlp(), mora_config(mora_type))
    kept = copy.deepcopy(model)
    kept.merge_adapter()
    places = [module.base_layer.weight.data_ptr() for module in model.modules() if isinstance(module, MoRALayer)]
    merged = model.merge_and_unload()
    assert [merged.lin0.weight.data_ptr(), merged.lin1.weight.data_ptr()] == places
    for ours, theirs in zip((merged.lin0.weight, merged.lin1.weight), base_weights(kept), strict=True):
        assert torch.equal(ours, theirs)


def test_merging_for_good_leaves_memory_that_something_else_reads():
    base = mlp()
    base.other = nn.Linear(33, 17)
    base.other.weight = nn.Parameter(base.lin0.weight.data)  # another parameter, and the same memory
    before = base.other.weight.detach().clone()
    merged = get_peft_model(base, mora_config()).merge_and_unload()
    assert torch.equal(merged.other.weight, before)
    assert not torch.equal(merged.lin0.weight, before)


def test_a_model_made_in_inference_mode_is_merged_for_good():
    with torch.inference_mode():
        model = get_peft_model(mlp(), mora_config())
    kept = copy.deepcopy(model)
    kept.merge_adapter()
    merged = model.merge_and_unload()
    assert torch.equal(merged.lin0.weight, base_weights(kept)[0])


def test_a_merge_for_good_that_is_interrupted_is_not_undone_by_halves(monkeypatch):
    model = get_peft_model(mlp(), mora_config())
    mora = model.base_model.model.lin0

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(model.base_model), "_replace_module", interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.merge_and_unload()
    assert mora.merged
    with pytest.raises(RuntimeError, match=r"layer lin0 from before the merge was given up.*Load the base model"):
        model.unmerge_adapter()
