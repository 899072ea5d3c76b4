"""Models with MoRA, beyond what every tuner promises (tests/contract): other architectures, files, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.mora import inputs, mlp, mora_config, torchao_linear
from helpers.oracle import relative_error
from helpers.tiny_models import TINY_MODELS, output_of
from helpers.tolerances import rounding
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora.conversion import convert_to_lora
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from peft_reslora.mora import MoRALayer


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "vit"])
def test_every_architecture_merges_to_the_same_output(family):
    tiny = TINY_MODELS[family]
    batch = tiny.inputs()
    model = get_peft_model(tiny.make(), mora_config("auto", r=2, target_modules=tiny.targets))
    with torch.no_grad():
        expected = output_of(model, batch)
        merged = model.merge_and_unload(safe_merge=True)
        assert relative_error(output_of(merged, batch), expected) < rounding(merged)
    assert not any(isinstance(m, MoRALayer) for m in merged.modules())


def test_bias_of_the_adapted_layers_is_trained_and_saved():
    model = get_peft_model(mlp(), mora_config(bias="mora_only"))
    assert model.base_model.model.lin0.base_layer.bias.requires_grad
    assert not model.base_model.model.head.bias.requires_grad
    assert "base_model.model.lin0.base_layer.bias" in get_peft_model_state_dict(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("base_model.model.lin1.mora_M"), r"'default' on this model: 1 missing: lin1\.mora_M"),
        (
            lambda s: s.update({"base_model.model.lin9.mora_M": torch.zeros(2, 2)}),
            r"1 not in the model: lin9\.mora_M",
        ),
        (
            lambda s: s.update({"base_model.model.lin0.mora_M": torch.zeros(3, 3)}),
            r"lin0\.mora_M has shape \(3, 3\) instead of \(12, 12\), that of r=3",
        ),
    ],
)
def test_checkpoint_that_does_not_fit_is_refused(tmp_path, change: Callable[[dict], Any], message):
    get_peft_model(mlp(), mora_config("rotation")).save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    change(state)
    save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(mlp(), tmp_path)


@pytest.mark.parametrize(
    ("extra", "name"),
    [
        (nn.Embedding(4, 33), "extra"),
        (nn.Conv1d(4, 4, 1, groups=2), "extra"),
        (nn.MultiheadAttention(8, 2), "extra"),
        (nn.MultiheadAttention(8, 2), "extra.out_proj"),
        (nn.TransformerEncoderLayer(8, 2), "extra.linear1"),
    ],
)
def test_layers_that_are_not_linear_are_refused_by_name_before_any_change(extra, name):
    base = mlp()
    base.extra = extra
    with pytest.raises(ValueError, match=rf"{name} \(\w+\), which is .*exclude_modules"):
        get_peft_model(base, mora_config(target_modules=["lin0", name]))
    assert isinstance(base.lin0, nn.Linear)
    with pytest.raises(ValueError, match=f"cannot adapt {name} "):
        inject_adapter_in_model(mora_config(), base, state_dict={f"{name}.mora_M": torch.zeros(2, 2)})


def test_torchao_base_without_its_config_is_refused_before_any_change():
    base = torchao_linear()
    del base.hf_quantizer
    base.lin1 = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="'get_apply_tensor_subclass' was not provided"):
        get_peft_model(base, mora_config(target_modules=["lin1", "lin0"]))
    assert isinstance(base.lin1, nn.Linear)


def test_layer_with_another_methods_adapter_is_refused():
    base = inject_adapter_in_model(LoraConfig(target_modules=["lin0"]), mlp(), "lora")
    with pytest.raises(ValueError, match=r"lin0 .* already carries an adapter of another method"):
        inject_adapter_in_model(mora_config(), base, "mora")


def test_mixed_batches_are_refused():
    model = get_peft_model(mlp(), mora_config()).eval()
    with pytest.raises(ValueError, match=r"MoRA does not support `adapter_names`.*set_adapter"):
        model(inputs(), adapter_names=["default"] * 4)


def test_an_adapter_loads_beside_one_of_another_type(tmp_path):
    model = get_peft_model(mlp(), mora_config("rotation"))
    model.save_pretrained(tmp_path)
    other = get_peft_model(mlp(), mora_config("decoupling", r=7))
    other.load_adapter(tmp_path, "second")
    other.set_adapter("second")
    assert relative_error(other(inputs()), model(inputs())) < rounding(model)


def test_an_injected_model_takes_names_with_a_prefix_and_targets_from_a_state():
    source = inject_adapter_in_model(mora_config("rotation"), mlp())
    state = get_peft_model_state_dict(source)
    target = inject_adapter_in_model(mora_config("rotation"), mlp())
    assert not torch.equal(target(inputs()), source(inputs()))
    set_peft_model_state_dict(target, {f"base_model.model.{key}": value for key, value in state.items()})
    assert torch.equal(target(inputs()), source(inputs()))
    by_keys = inject_adapter_in_model(mora_config("rotation", target_modules=["lin0"]), mlp(), state_dict=state)
    assert isinstance(by_keys.lin1, MoRALayer)


def test_an_added_adapter_waits_and_a_deleted_one_leaves_nothing():
    model = get_peft_model(mlp(), mora_config("sharing"))
    model.add_adapter("other", mora_config("rotation", r=2, target_modules=["lin1"]))
    mora = model.base_model.model.lin1
    assert not mora.mora_M["other"].requires_grad
    model.set_adapter("other")
    assert mora.mora_M["other"].requires_grad
    expected = model(inputs())
    model.delete_adapter("default")
    assert set(mora.mora_M) == set(mora.r) == set(mora.mora_type) == set(mora.square_size) == {"other"}
    assert set(mora.mora_dropout) == {"other"}
    model.set_adapter("other")
    assert torch.equal(model(inputs()), expected)


def test_pefts_own_lora_conversion_is_right_for_conv1d_too():
    model = get_peft_model(mlp(), mora_config("rotation")).eval()
    assert model.supports_lora_conversion()
    lora_config, state = convert_to_lora(model, rank=17)
    lora = get_peft_model(mlp(), lora_config).eval()
    set_peft_model_state_dict(lora, state)
    assert relative_error(lora(inputs()), model(inputs())) < rounding(lora)
