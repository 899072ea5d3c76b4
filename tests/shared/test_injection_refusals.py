"""An injection that is refused leaves no trace: neither in the model, nor in its adapters, nor in the config."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.adapters import adapted, both_tuners, config_of, every_tuner, tuner_layers
from helpers.oracle import randomize_adapters, relative_error
from helpers.refusals import refuse
from helpers.tiny_models import llama, output_of
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from peft_reslora import ResLoRAConfig


class Ignorant(nn.Module):
    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> None:
        super().__init__()


TARGETS = ["q_proj", "down_proj"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing matches": ({"target_modules": ["nothing"]}, "not found"),
    "all excluded": ({"exclude_modules": TARGETS}, "No modules were targeted"),
    "an embedding": ({"target_modules": [*TARGETS, "embed_tokens"]}, "no linear layer"),
    "an activation": ({"target_modules": [*TARGETS, "act_fn"]}, "no linear layer"),
    "tokens of nothing": ({"trainable_token_indices": {"nothing": [1]}}, "nothing"),
    "unequal ranks": ({"rank_pattern": {"layers.2.mlp.down_proj": 3}}, "one rank in a chain"),
    "a bad pattern": ({"chain_pattern": "q_proj"}, "groups capture"),
    "a layer that ignores variants": ({"target_modules": [*TARGETS, "embed_tokens"]}, "would train plain LoRA"),
    "no layers": ({"layers_to_transform": [17]}, "layers_to_transform"),
    "tied tokens": (
        {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}, "ensure_weight_tying": True},
        "tied",
    ),
}


RESLORA_ONLY = {"tokens of nothing", "unequal ranks", "a bad pattern", "a layer that ignores variants", "tied tokens"}


CASES = [("middle", case) for case in REFUSED] + [("mora", case) for case in REFUSED if case not in RESLORA_ONLY]


def refused_config(tuner: str, case: str) -> tuple[Any, str]:
    fields, message = REFUSED[case]
    config = config_of(tuner, **{"r": 2, "target_modules": TARGETS, **fields})
    if case == "a layer that ignores variants":
        config._register_custom_module({nn.Embedding: Ignorant})
    return config, message


def tied_llama() -> nn.Module:
    torch.manual_seed(0)
    model = llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model.eval()


@pytest.mark.parametrize(("tuner", "case"), CASES)
def test_a_refused_config_leaves_the_model_and_itself_as_they_were(tuner, case):
    model = tied_llama()
    for act in (get_peft_model, lambda m, c: inject_adapter_in_model(c, m), lambda m, c: m.add_adapter(c)):
        config, message = refused_config(tuner, case)
        fields = copy.deepcopy(config.to_dict())
        refuse(model, message, lambda: act(model, config))  # noqa: B023
        assert config.to_dict() | {"base_model_name_or_path": None} == fields
    assert not hasattr(model, "peft_config")
    model.add_adapter(config_of(tuner, r=2, target_modules=TARGETS))
    assert len(tuner_layers(model)) == 8


@pytest.mark.parametrize(("tuner", "case"), CASES)
def test_a_refused_second_adapter_leaves_the_first_at_work(tuner, case):
    good = {"r": 3, "target_modules": ["q_proj", "up_proj"]}
    model = adapted(tied_llama(), config_of(tuner, **good)).train()
    inputs = {"input_ids": torch.randint(1, 53, (2, 5))}
    expected = output_of(model, inputs)
    config, message = refused_config(tuner, case)
    refuse(model, message, lambda: model.add_adapter("second", config))
    refuse(model, message, lambda: inject_adapter_in_model(config, model.base_model.model, "second"))
    refuse(model, message, lambda: inject_adapter_in_model(config, model.base_model.model, "default"))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(output_of(model, inputs), expected)
    model.add_adapter("second", config_of(tuner, **good))
    model.set_adapter("second")
    output_of(model, inputs).square().sum().backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert trained
    assert all(".second" in name for name in trained)


@every_tuner
def test_an_adapter_of_the_same_name_starts_anew(tuner):
    """As in LoRA, when a cell of a notebook runs twice."""
    base = llama().eval()
    model = randomize_adapters(get_peft_model(copy.deepcopy(base), config_of(tuner, r=3, target_modules=TARGETS)))
    inputs = {"input_ids": torch.randint(1, 53, (2, 5))}
    again = get_peft_model(model.base_model.model, config_of(tuner, r=2, target_modules=TARGETS)).eval()
    assert relative_error(output_of(again, inputs), output_of(base, inputs)) < 1e-6
    fresh = get_peft_model(copy.deepcopy(base), config_of(tuner, r=2, target_modules=TARGETS)).eval()
    expected = output_of(randomize_adapters(fresh), inputs)
    assert relative_error(output_of(randomize_adapters(again), inputs), expected) < 1e-6
    if tuner in ("input", "middle"):
        again.peft_config["default"].merge_estimator = "drop"
    again.merge_adapter()
    third, inner = config_of(tuner, r=2, target_modules=TARGETS), again.base_model.model
    refuse(inner, r"'default' is merged into layer model\..*Unmerge", lambda: get_peft_model(inner, third))


@every_tuner
def test_a_second_adapter_with_bias_is_refused_without_a_trace(tuner):
    only = config_of(tuner, r=2, target_modules=TARGETS, bias="all")
    model = get_peft_model(llama(), only)
    second = config_of(tuner, r=2, target_modules=TARGETS, bias="all")
    refuse(model, "only 1 adapter with bias", lambda: model.add_adapter("second", second))


def test_an_interrupted_injection_leaves_no_trace(monkeypatch):
    model = llama()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_reslora.reslora.model.link_chains", interrupt)
    refuse(model, "", lambda: get_peft_model(model, ResLoRAConfig(target_modules=TARGETS)), KeyboardInterrupt)


def test_refused_layer_replication_leaves_the_number_of_layers():
    model = llama()
    config = ResLoRAConfig(target_modules=["nothing"], layer_replication=[(0, 3), (1, 4)])
    refuse(model, "not found", lambda: get_peft_model(model, config))
    assert len(model.model.layers) == model.config.num_hidden_layers == 4


@both_tuners
def test_an_adapter_of_another_base_leaves_the_model_as_it_was(tuner, tmp_path):
    """Its config names a layer that here is no linear one."""
    other = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})
    get_peft_model(other, config_of(tuner, r=2, target_modules=["first", "second"])).save_pretrained(tmp_path)
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Embedding(4, 4, max_norm=1.0)})
    refuse(model, r"cannot adapt second \(Embedding\)", lambda: PeftModel.from_pretrained(model, tmp_path))


@both_tuners
def test_weights_are_tied_as_with_lora(tuner):
    fields = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    for config in (config_of(tuner, **fields), LoraConfig(**fields)):
        model = get_peft_model(tied_llama(), config)
        head = model.base_model.model.lm_head.modules_to_save["default"].weight
        assert head is model.base_model.model.model.embed_tokens.modules_to_save["default"].weight
