"""`add_weighted_adapter`: the combined adapter against the weighted sum of the updates, dense and in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.adapters import ONE_OR_ALL, tuner_layers
from helpers.oracle import randomize_adapters, relative_error
from helpers.tiny_models import NARROW_IDS, narrow_llama
from peft import PeftModel, get_peft_model
from torch import nn

from peft_reslora import ResLoRAConfig, export_lora

SCALINGS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "rslora-and-alpha-pattern": {"use_rslora": True, "alpha_pattern": {"up_proj": 9}},
    "plain": {"lora_alpha": 7},
}


def two_adapters(shortcut: str, pre_num: int, first: dict[str, Any], second: dict[str, Any], **both: Any) -> nn.Module:
    def config(r: int, targets: list[str], **kwargs: Any) -> ResLoRAConfig:
        return ResLoRAConfig(r=r, target_modules=targets, shortcut=shortcut, pre_num=pre_num, **kwargs)  # type: ignore[arg-type]

    defaults = {"merge_estimator": "drop", "r": 3, "targets": ["q_proj", "up_proj"], **both}
    model = get_peft_model(narrow_llama(), config(**{**defaults, **first}))
    model.add_adapter("second", config(**{**defaults, **second}))
    return randomize_adapters(model).eval()


def weighted_sum(model: nn.Module, weights: dict[str, float]) -> torch.Tensor:
    """The output in float64 with all adapters active, each with its weight on its scaling."""
    model = copy.deepcopy(model).double()
    for layer in tuner_layers(model).values():
        for adapter_name, weight in weights.items():
            if adapter_name in layer.scaling:
                layer.scaling[adapter_name] *= weight
    model.base_model.set_adapter(list(weights))
    return model(input_ids=NARROW_IDS).logits


def combined(model: nn.Module, name: str = "sum") -> torch.Tensor:
    model = copy.deepcopy(model)
    model.set_adapter(name)
    return model.double()(input_ids=NARROW_IDS).logits


@pytest.mark.quick(ranks=[(2, 4)])
@pytest.mark.parametrize("ranks", [(3, 2), (2, 4)])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(("shortcut", "pre_num"), ONE_OR_ALL)
def test_cat_is_the_weighted_sum_of_the_updates(shortcut, pre_num, scaling, ranks):
    second = {"r": ranks[1], "targets": ["q_proj", "o_proj"], "lora_alpha": 4}  # of another scaling
    model = two_adapters(shortcut, pre_num, {"r": ranks[0], **SCALINGS[scaling]}, second)
    weights = {"default": 0.7, "second": -0.4}
    expected = weighted_sum(model, weights)
    model.add_weighted_adapter(list(weights), list(weights.values()), "sum", combination_type="cat")
    assert relative_error(combined(model), expected) < 1e-6  # the factors are float32
    for layer in tuner_layers(model).values():
        delta = sum(
            weight * layer.get_delta_weight(name).double() for name, weight in weights.items() if name in layer.lora_A
        )
        assert relative_error(layer.get_delta_weight("sum"), delta) < 1e-6


@pytest.mark.quick(weight=[-1.7], pre_num=[1])
@pytest.mark.parametrize("combination_type", ["linear", "svd", "cat", "ties"])
@pytest.mark.parametrize("weight", [0.6, -1.7])
@pytest.mark.parametrize(("shortcut", "pre_num"), ONE_OR_ALL)
def test_one_adapter_with_a_weight_is_exact(shortcut, pre_num, weight, combination_type):
    """PEFT takes 'linear' for one adapter, whichever was asked for."""
    first = {"use_rslora": True, "lora_alpha": 5}
    model = two_adapters(shortcut, pre_num, first, {})
    expected = weighted_sum(model, {"default": weight})
    model.add_weighted_adapter(["default"], [weight], "sum", combination_type=combination_type)
    assert relative_error(combined(model), expected) < 1e-6


@pytest.mark.parametrize("combination_type", ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune", "cat"])
@pytest.mark.parametrize("shortcut", ["input", "block"])
def test_combinations_of_uneven_ranks_are_saved_and_loaded(shortcut, combination_type, tmp_path):
    pattern = {"rank_pattern": {"up_proj": 2}, "use_rslora": True}
    model = two_adapters(shortcut, 1, pattern, {**pattern, "lora_alpha": 3})
    density = {} if combination_type in ("linear", "cat") else {"density": 0.5}
    model.add_weighted_adapter(["default", "second"], [0.5, 0.8], "sum", combination_type=combination_type, **density)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(narrow_llama(), tmp_path / "sum").eval()
    expected = combined(model)
    assert relative_error(combined(loaded, "default"), expected) < 1e-12
    assert relative_error(combined(model), narrow_llama().double()(input_ids=NARROW_IDS).logits) > 1e-3
    exported = export_lora(model, "sum").state_dict
    for name, layer in tuner_layers(model).items():
        lora_a, lora_b = (exported[f"base_model.model.{name}.lora_{f}.weight"].double() for f in "AB")
        assert relative_error(lora_b @ lora_a, layer.get_delta_weight("sum")) < 1e-5


@pytest.mark.parametrize("second", [{"layers_to_transform": [1, 2]}, {"layers_to_transform": [0]}])
@pytest.mark.parametrize("first", [{}, {"layers_to_transform": [0, 1]}])
@pytest.mark.parametrize("shortcut", ["input", "block", "middle"])
def test_adapters_with_other_chains_are_refused(shortcut, first, second):
    """PEFT's new adapter has the layers of the first; its shortcuts would link what was not linked."""
    model = two_adapters(shortcut, 1, first, second)
    before = set(dict(model.named_parameters()))
    with pytest.raises(
        ValueError, match=r"(different layers_to_transform|link their layers in different ways).*save_as_lora"
    ):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum", combination_type="cat")
    assert set(model.peft_config) == {"default", "second"}
    assert set(dict(model.named_parameters())) == before


def test_weights_and_names_are_checked():
    model = two_adapters("block", 1, {}, {})
    for weights in ([1.0], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="one finite number for each"):
            model.add_weighted_adapter(["default", "second"], weights, "sum", combination_type="cat")
    with pytest.raises(ValueError, match="an adapter 'second' already"):
        model.add_weighted_adapter(["default"], [1.0], "second", combination_type="cat")
    assert set(model.peft_config) == {"default", "second"}


def test_a_combination_that_fails_leaves_no_adapter():
    model = two_adapters("block", 1, {}, {})
    kwargs = {"combination_type": "ties", "density": 0.5, "majority_sign_method": "most"}
    with pytest.raises(RuntimeError, match="Unimplemented mask method"):  # PEFT's own
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum", **kwargs)
    assert set(model.peft_config) == {"default", "second"}
    assert not any(".sum." in name for name, _ in model.named_parameters())
