"""A MoRA layer against the dense formula, in every precision."""

from __future__ import annotations

import pytest
import torch
from helpers.mora import TYPES, dense_reference, inputs, mlp, mora_config
from helpers.oracle import relative_error
from helpers.tolerances import half_rounding, rounding
from peft import get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_reslora.mora import MoRAConfig, MoRALinear


def layer(base: nn.Module, *adapters: tuple[str, MoRAConfig]) -> MoRALinear:
    (name, first), *others = adapters
    result = MoRALinear(base, name, first.r, first)
    for name, other in others:
        result.update_layer(name, other.r, other)
    result.set_adapter([name for name, _ in adapters])
    return result


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("mora_type", TYPES)
@pytest.mark.parametrize("shape", [(33, 17, 2), (8, 96, 3), (20, 2, 4), (2, 20, 8), (5, 7, 9)])
def test_output_and_gradients_equal_the_dense_formula(shape, mora_type, conv1d):
    in_features, out_features, r = shape
    base = Conv1D(out_features, in_features) if conv1d else nn.Linear(in_features, out_features)
    mora = layer(base, ("default", mora_config(mora_type, r)))
    x = torch.randn(2, 5, in_features, requires_grad=True)
    M = mora.mora_M["default"]
    bound = rounding(10 * (in_features + out_features))  # a gradient sums over 10 rows, too

    x64, M64 = (t.detach().double().requires_grad_() for t in (x, M))
    weight = base.weight.detach().double()
    weight = weight.T if conv1d else weight
    dense = dense_reference(M64, in_features, out_features, mora_type)
    expected = x64 @ (weight + dense).T + base.bias.detach().double()
    upstream = torch.randn(2, 5, out_features)
    expected.backward(upstream.double())
    actual = mora(x)
    actual.backward(upstream)
    assert relative_error(actual, expected) < bound
    assert relative_error(M.grad, M64.grad) < bound
    assert relative_error(x.grad, x64.grad) < bound
    delta = mora.get_delta_weight("default")
    assert delta.shape == base.weight.shape
    assert relative_error(delta.T if conv1d else delta, dense) < bound


def test_two_adapters_of_different_rank_and_type_add_up():
    mora = layer(
        nn.Linear(33, 17),
        ("a", mora_config("sharing", 2)),
        ("b", mora_config("rotation", 5)),
        ("c", mora_config("decoupling", 3)),
    )
    x = torch.randn(4, 33)
    expected = mora.base_layer(x) + sum(x @ mora.get_delta_weight(name).T for name in ("a", "b", "c"))
    torch.testing.assert_close(mora(x), expected)
    assert {mora.square_size[n] for n in "abc"} == {10, 16, 12}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast_adapter", [True, False])
@pytest.mark.parametrize("mora_type", TYPES)
def test_half_precision_equals_the_delta_weight_up_to_rounding(mora_type, cast_adapter, dtype):
    model = get_peft_model(mlp(dtype), mora_config(mora_type), autocast_adapter_dtype=cast_adapter)
    mora = model.base_model.model.lin0
    assert mora.mora_M["default"].dtype == (torch.float32 if cast_adapter else dtype)
    x = inputs(dtype)
    result = mora(x)
    weight = mora.base_layer.weight.double() + mora.get_delta_weight("default").double()
    expected = x.double() @ weight.T + mora.base_layer.bias.double()
    assert result.dtype == dtype
    assert relative_error(result, expected) < 2 * torch.finfo(dtype).eps
    result.sum().backward()
    assert torch.isfinite(mora.mora_M["default"].grad).all()


@pytest.mark.parametrize("mora_type", TYPES)
def test_autocast_equals_full_precision_up_to_rounding(mora_type):
    model = get_peft_model(mlp(), mora_config(mora_type))
    expected = model(inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = model(inputs())
    actual.float().sum().backward()
    assert relative_error(actual, expected) < half_rounding(12, torch.bfloat16)
    assert model.base_model.model.lin0.mora_M["default"].grad.dtype == torch.float32


def test_input_dtype_casting_can_be_disabled():
    model = get_peft_model(mlp(), mora_config())
    with disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="dtype"):
        model.base_model.model.lin0(inputs().double())


def test_dropout_acts_on_the_update_only_and_only_in_training():
    mora = layer(nn.Linear(33, 17), ("default", mora_config(mora_dropout=0.5)))
    x = torch.randn(4, 33)
    assert not torch.equal(mora(x), mora(x))
    mora.eval()
    assert torch.equal(mora(x), mora(x))
    mora.train()
    mora.mora_M["default"].data.zero_()
    assert torch.equal(mora(x), mora.base_layer(x))


def test_merged_factors_are_exact_for_sharing_and_in_linear_orientation():
    for base in (nn.Linear(33, 17), Conv1D(17, 33)):
        mora = layer(base, ("default", mora_config("sharing", 4)))
        A, B = mora.merged_factors("default")
        delta = mora.get_delta_weight("default")
        torch.testing.assert_close(B @ A, delta.T if isinstance(base, Conv1D) else delta)
        assert A.shape == (mora.square_size["default"], 33)


@pytest.mark.parametrize("mora_type", ["decoupling", "rotation"])
def test_merged_factors_of_full_rank_updates_are_refused(mora_type):
    mora = layer(nn.Linear(33, 17), ("default", mora_config(mora_type)))
    with pytest.raises(
        ValueError, match=rf"'default' has mora_type='{mora_type}'.*full rank.*rank=.*energy=.*merge_and_unload"
    ):
        mora.merged_factors("default")


def test_unknown_adapter_is_named():
    mora = layer(nn.Linear(33, 17), ("default", mora_config()))
    with pytest.raises(ValueError, match="'other' is not on layer without a name; it has 'default'"):
        mora.get_delta_weight("other")


@pytest.mark.parametrize("mora_type", TYPES)
def test_compiles_without_graph_breaks(mora_type):
    mora = layer(nn.Linear(33, 17), ("default", mora_config(mora_type)))
    compiled = torch.compile(mora, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 33)
    actual = compiled(x)
    torch.testing.assert_close(actual, mora(x))
    actual.sum().backward()
    compiled_grad, mora.mora_M["default"].grad = mora.mora_M["default"].grad, None
    mora(x).sum().backward()
    torch.testing.assert_close(compiled_grad, mora.mora_M["default"].grad)
