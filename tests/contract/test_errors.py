"""What bad input gets: an error that says which adapter and layer, what came, what is accepted, what to do."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from helpers.adapters import base_and_adapted
from helpers.oracle import relative_error
from helpers.tiny_models import TINY_MODELS, llama, output_of
from helpers.tolerances import rounding
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from peft_reslora import ResLoRAConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shortcut": "blocks"}, r"shortcut='blocks' is unknown, choose one of 'input', 'block', 'middle'"),
        ({"merge_estimator": "norm"}, r"merge_estimator='norm' is unknown, choose one of 'input_norm', .*'drop'"),
        ({"pre_num": 0}, r"pre_num=0 must be a positive integer, or -1"),
        ({"pre_num": -2}, r"pre_num=-2 must be a positive integer, or -1"),
        ({"shortcut": "input", "pre_num": 2}, r"pre_num=2 with shortcut='input', which accepts 1 only"),
        ({"shortcut": "input", "pre_num": -1}, r"pre_num=-1 with shortcut='input', which accepts 1 only"),
        ({"norm_window": 0}, r"norm_window=0 must be a positive integer"),
        ({"r": 0}, r"r=0 must be a positive integer"),
        ({"r": -4}, r"r=-4 must be a positive integer"),
        (
            {"use_dora": True, "shortcut": "middle"},
            r"use_dora=True with shortcut=.middle., whose merge is an estimate",
        ),
        ({"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"}, r"alora_invocation_tokens=\[1, 2\] changes"),
        ({"lora_bias": True}, r"lora_bias=True changes"),
        ({"use_qalora": True}, r"use_qalora=True changes"),
        (
            {"target_parameters": ["weight"], "shortcut": "input"},
            r"target_parameters=\['weight'\] with shortcut='input', .*choose shortcut='block'",
        ),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa' changes the base weight.*choose one of True"),
        ({"init_lora_weights": "olora"}, r"init_lora_weights='olora' changes the base weight"),
        ({"init_lora_weights": "orthogonal", "shortcut": "middle"}, r"orthogonal.*choose True or 'gaussian'"),
    ],
)
def test_config_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        ResLoRAConfig(**fields)


def test_config_lists_all_faults_at_once():
    with pytest.raises(ValueError, match=r"shortcut='x'.*; pre_num=0.*; use_dora=True"):
        ResLoRAConfig(shortcut="x", pre_num=0, use_dora=True)


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
def test_inits_that_leave_the_base_alone_are_accepted(init):
    base = llama()
    model = get_peft_model(copy.deepcopy(base), ResLoRAConfig(r=4, target_modules=["q_proj"], init_lora_weights=init))
    inputs = TINY_MODELS["llama"].inputs()
    if init is not False:
        assert relative_error(output_of(model, inputs), output_of(base, inputs)) < rounding(model)


def test_middle_with_unequal_ranks_is_refused_before_the_model_is_changed():
    model = llama()
    config = ResLoRAConfig(target_modules=["q_proj"], shortcut="middle", rank_pattern={"layers.2.self_attn.q_proj": 3})
    with pytest.raises(
        ValueError, match=r"one rank in a chain, but .*layers\.0.*: 8.*layers\.2\.self_attn\.q_proj: 3"
    ):
        get_peft_model(model, config)
    assert not any("lora" in name for name, _ in model.named_modules())


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (nn.Embedding(5, 4, max_norm=1.0), "Embedding"),
        (nn.ConvTranspose2d(3, 4, 1), "ConvTranspose2d"),
        (nn.Bilinear(4, 4, 2), "Bilinear"),
    ],
)
def test_layers_that_would_train_plain_lora_are_refused_before_the_model_is_changed(layer, kind):
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "other": layer})
    with pytest.raises(
        ValueError, match=rf"cannot adapt other \({kind}\), which is no linear.*exclude_modules=r'other'"
    ):
        get_peft_model(model, ResLoRAConfig(target_modules=["first", "other"]))
    assert isinstance(model["first"], nn.Linear)


def test_a_layer_class_that_ignores_variants_is_refused_by_name():
    class Ignorant(nn.Module):
        def __init__(self, base_layer, adapter_name, config, **kwargs) -> None:
            super().__init__()

    config = ResLoRAConfig(target_modules=["special"])
    config._register_custom_module({nn.Bilinear: Ignorant})
    model = nn.ModuleDict({"special": nn.Bilinear(2, 3, 4)})
    with pytest.raises(
        ValueError, match=r"cannot be applied to layer 'special'.*Ignorant, which would train plain LoRA"
    ):
        get_peft_model(model, config)


def saved(tmp_path, shortcut: str = "input"):
    _, model = base_and_adapted("llama", shortcut, 1)
    model.save_pretrained(tmp_path)
    return tmp_path / "adapter_model.safetensors"


def rewrite(file, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


KEY = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(KEY), r"adapter 'default'.*1 missing: .*layers\.1\.mlp\.up_proj\.lora_A"),
        (lambda t: t.pop(KEY.replace("lora_A.weight", "lora_norm")), r"1 missing: .*up_proj\.lora_norm"),
        (
            lambda t: t.update({KEY.replace("layers.1", "layers.7"): torch.zeros(3, 24)}),
            r"1 not in the model: .*layers\.7",
        ),
        (
            lambda t: t.update({KEY: torch.zeros(5, 24)}),
            r"1 of another shape: .*lora_A.*\(5, 24\) instead of \(3, 24\)",
        ),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(change, message, tmp_path):
    rewrite(saved(tmp_path), change)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(llama(), tmp_path)
    _, model = base_and_adapted("llama", "block", 1)
    with pytest.raises(ValueError, match=message.replace("default", "second")):
        model.load_adapter(tmp_path, adapter_name="second")


def test_a_checkpoint_for_another_base_is_refused(tmp_path):
    saved(tmp_path)
    config = llama().config
    config.num_hidden_layers = 3
    with pytest.raises(ValueError, match=r"not in the model: .*layers\.3"):
        PeftModel.from_pretrained(type(llama())(config), tmp_path)
    config.num_hidden_layers, config.hidden_size = 4, 32
    with pytest.raises(ValueError, match=r"of another shape: .* instead of"):
        PeftModel.from_pretrained(type(llama())(config), tmp_path)


def test_a_truncated_checkpoint_is_refused(tmp_path):
    file = saved(tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(Exception, match=r"(?i)deserializ"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_another_peft_type_cannot_be_loaded_beside(tmp_path):
    get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    _, model = base_and_adapted("llama", "block", 1)
    with pytest.raises(ValueError, match="RESLORA"):
        model.load_adapter(tmp_path, adapter_name="second")


def test_a_saved_config_with_an_unknown_shortcut_is_refused(tmp_path):
    saved(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "shortcut": "diagonal"}))
    with pytest.raises(ValueError, match="shortcut='diagonal' is unknown"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_state_dicts_of_injected_models_are_checked_too():
    config = ResLoRAConfig(r=2, target_modules=["q_proj"])
    model = inject_adapter_in_model(config, llama())
    state = get_peft_model_state_dict(model)
    assert set_peft_model_state_dict(model, state).unexpected_keys == []
    state.pop(next(iter(state)))
    with pytest.raises(ValueError, match="1 missing"):
        set_peft_model_state_dict(model, state)
