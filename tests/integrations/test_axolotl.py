"""`adapter: reslora` and `adapter: mora` in axolotl's YAML, with axolotl itself where it is installed."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
from helpers.tiny_models import TINY_MODELS
from peft import PeftModel

from peft_reslora import MoRAConfig, MoRAModel, ResLoRAConfig, ResLoRAModel

YAML = {"lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "v_proj"]}


@dataclass(frozen=True)
class Capabilities:
    """axolotl's class of the same fields (0.19.0)."""

    name: str
    lora_like: bool = False
    relora: bool = False


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    try:
        importlib.import_module("axolotl.integrations.base")
    except ImportError:
        for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        base: Any = sys.modules["axolotl.integrations.base"]
        base.BasePlugin, base.AdapterCapabilities = type("BasePlugin", (), {}), Capabilities
    monkeypatch.delitem(sys.modules, "peft_reslora.integrations.axolotl", raising=False)
    return importlib.import_module("peft_reslora.integrations.axolotl").Plugin()


@pytest.mark.parametrize(
    ("adapter", "settings", "tuner", "expected"),
    [
        (
            "reslora",
            {**YAML, "lora_dropout": 0.1, "peft_use_rslora": True, "reslora": {"shortcut": "middle", "pre_num": 2}},
            ResLoRAModel,
            {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "use_rslora": True, "shortcut": "middle", "pre_num": 2},
        ),
        ("reslora", {"lora_r": 4, "lora_target_linear": True}, ResLoRAModel, {"shortcut": "block", "r": 4}),
        (
            "mora",
            {"lora_r": 4, "lora_dropout": 0.1, "lora_target_modules": ["q_proj"], "mora": {"mora_type": "sharing"}},
            MoRAModel,
            {"r": 4, "mora_dropout": 0.1, "mora_type": "sharing"},
        ),
    ],
)
def test_the_yaml_becomes_the_tuner(plugin, adapter, settings, tuner, expected):
    model, config = plugin.load_adapter(TINY_MODELS["llama"].make(), {"adapter": adapter, **settings})
    assert isinstance(model, PeftModel)
    assert isinstance(model.base_model, tuner)
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.task_type == "CAUSAL_LM"
    assert {capability.name for capability in plugin.get_adapter_capabilities()} >= {adapter}


def test_other_adapters_are_left_to_axolotl(plugin):
    assert plugin.load_adapter(TINY_MODELS["llama"].make(), {"adapter": "lora", **YAML}) is None
    settings = {"adapter": "lora"}
    plugin.register(settings)
    assert settings == {"adapter": "lora"}


def test_the_config_alone_leaves_the_model_as_it_is(plugin):
    base = TINY_MODELS["llama"].make()
    names = [name for name, _ in base.named_parameters()]
    model, config = plugin.load_adapter(base, {"adapter": "reslora", **YAML}, config_only=True)
    assert model is None
    assert isinstance(config, ResLoRAConfig)
    assert [name for name, _ in base.named_parameters()] == names


@pytest.mark.parametrize("inference", [False, True])
def test_a_saved_adapter_is_taken_up_again(plugin, inference, tmp_path):
    settings = {"adapter": "mora", "lora_r": 4, "lora_target_modules": ["q_proj"]}
    plugin.load_adapter(TINY_MODELS["llama"].make(), settings)[0].save_pretrained(tmp_path)
    model, config = plugin.load_adapter(
        TINY_MODELS["llama"].make(), {**settings, "lora_model_dir": str(tmp_path)}, inference=inference
    )
    assert isinstance(config, MoRAConfig)
    assert any(parameter.requires_grad for parameter in model.parameters()) is not inference


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"lora_mlp_kernel": True}, "lora_mlp_kernel cannot be used with `adapter: reslora`: .*set it to false"),
        ({"load_in_4bit": True}, "load_in_4bit cannot be used .* quantized already"),
        ({"peft": {"loftq_config": {"loftq_bits": 4}}}, r"peft\.loftq_config cannot be used"),
        ({"reslora": {"shortcuts": "input"}}, "ResLoRAConfig has no field 'shortcuts'. Did you mean 'shortcut'?"),
        ({"reslora": {"r": 2}}, "reslora: 'r' comes from axolotl's own settings"),
        ({"lora_target_linear": True}, "leave lora_target_modules out"),
        ({"adapter": "mora"}, "lora_alpha has no meaning for `adapter: mora`; leave it out"),
    ],
)
def test_what_would_have_no_effect_is_refused(plugin, settings, match):
    base = TINY_MODELS["llama"].make()
    with pytest.raises(ValueError, match=match):
        plugin.load_adapter(base, {"adapter": "reslora", **YAML, **settings})
    assert not any("lora" in name for name, _ in base.named_modules())


def test_merge_lora_asks_the_layers(plugin):
    """Its default computes plain LoRA from the factors in the file."""
    settings: dict[str, Any] = {"adapter": "reslora"}
    plugin.register(settings)
    assert settings["merge_method"] == "legacy"
    with pytest.raises(ValueError, match=r"'memory_efficient' reads plain LoRA's factors .* take 'legacy'"):
        plugin.register({"adapter": "reslora", "merge_method": "memory_efficient"})
