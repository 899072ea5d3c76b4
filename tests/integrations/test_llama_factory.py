"""A section `reslora` or `mora` in LLaMA-Factory's YAML, with LLaMA-Factory itself where it is installed."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from helpers.repository import ROOT
from helpers.tiny_checkpoints import write_chats, write_llama
from helpers.tolerances import rounding
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from peft_reslora import MoRAConfig, ResLoRAConfig

MODULES = ("llamafactory", "llamafactory.cli", "llamafactory.hparams", "llamafactory.hparams.parser")
MODULES += ("llamafactory.model", "llamafactory.model.adapter", "llamafactory.train", "llamafactory.train.tuner")
GIVEN: dict[str, Any] = {
    "r": 4,
    "target_modules": ["q_proj"],
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "use_rslora": False,
    "use_dora": False,
    "modules_to_save": None,
    "task_type": "CAUSAL_LM",
    "inference_mode": False,
}  # what LLaMA-Factory 0.9.5 gives to LoraConfig


def installed() -> str | None:
    try:
        return importlib.metadata.version("llamafactory")
    except importlib.metadata.PackageNotFoundError:
        return None


@pytest.fixture
def joint(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The joint beside a stand-in, whose `run_exp` makes a config as LLaMA-Factory does."""
    modules: dict[str, Any] = {name: ModuleType(name) for name in MODULES}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    adapter = modules["llamafactory.model.adapter"]
    adapter.LoraConfig, adapter.made = LoraConfig, []
    modules["llamafactory.cli"].main = lambda: adapter.made.append(sys.argv[1:])
    modules["llamafactory.hparams.parser"].read_args = lambda: yaml.safe_load(sys.argv[1])

    def run_exp(settings: dict[str, Any]) -> None:
        assert not {"reslora", "mora"} & set(settings), "LLaMA-Factory refuses keys that it does not know"
        adapter.made.append(adapter.LoraConfig(**GIVEN | settings.get("given", {})))

    modules["llamafactory.train.tuner"].run_exp = run_exp
    monkeypatch.delitem(sys.modules, "peft_reslora.integrations.llama_factory", raising=False)
    return importlib.import_module("peft_reslora.integrations.llama_factory")


def run(joint: Any, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "argv", ["launcher", "train", json.dumps(settings)])
    joint.main()
    return joint.adapter.made[-1]


@pytest.mark.parametrize(
    ("settings", "kind", "expected"),
    [
        ({}, LoraConfig, {"r": 4, "lora_alpha": 8}),
        (
            {"reslora": {"shortcut": "middle", "pre_num": 2}},
            ResLoRAConfig,
            {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "shortcut": "middle", "pre_num": 2},
        ),
        ({"reslora": None}, ResLoRAConfig, {"r": 4, "shortcut": "block"}),
        ({"mora": {"mora_type": "sharing"}}, MoRAConfig, {"r": 4, "mora_dropout": 0.1, "mora_type": "sharing"}),
    ],
)
def test_the_yaml_becomes_the_config(joint, settings, kind, expected, monkeypatch):
    config = run(joint, settings, monkeypatch)
    assert type(config) is kind
    assert {field: getattr(config, field) for field in expected} == expected
    assert joint.adapter.LoraConfig is LoraConfig


def test_other_commands_are_llama_factorys_own(joint, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["launcher", "export", "export.yaml"])
    joint.main()
    assert joint.adapter.made == [["export", "export.yaml"]]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"reslora": {}, "mora": {}}, "sections for reslora and mora"),
        ({"reslora": {}, "finetuning_type": "full"}, "finetuning_type: full does not go with a section reslora"),
        ({"mora": {}, "use_unsloth": True}, "use_unsloth cannot be used with a section mora: it reads"),
        ({"mora": {}, "lora_alpha": 16}, "lora_alpha has no meaning for MoRA"),
        ({"mora": {}, "given": {"use_dora": True}}, "use_dora has no meaning for MoRA"),
        ({"reslora": {"shortcuts": "input"}}, "no field 'shortcuts'. Did you mean 'shortcut'"),
        ({"reslora": {"lora_alpha": 2}}, "'lora_alpha' comes from LLaMA-Factory's own settings"),
    ],
)
def test_what_would_have_no_effect_is_refused(joint, settings, match, monkeypatch):
    with pytest.raises(ValueError, match=match):
        run(joint, settings, monkeypatch)
    assert joint.adapter.LoraConfig is LoraConfig


@pytest.mark.skipif(installed() is None, reason="LLaMA-Factory is not installed; it asks for PEFT of at most 0.20")
@pytest.mark.parametrize(
    ("name", "section"), [("reslora", {"shortcut": "block", "pre_num": 2}), ("mora", {"mora_type": "rotation"})]
)
def test_llama_factory_trains_saves_goes_on_and_merges(name, section, tmp_path):
    base, rows = write_llama(tmp_path / "base"), write_chats(tmp_path / "rows", count=16)
    known = {
        "file_name": "train.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    }
    (tmp_path / "rows" / "dataset_info.json").write_text(json.dumps({"chats": known}), encoding="utf-8")
    common = {"model_name_or_path": base, "template": "empty", "finetuning_type": "lora"}
    training = common | {
        "stage": "sft", "do_train": True, "lora_rank": 4, "lora_target": "all", "dataset": "chats",
        "dataset_dir": rows, "cutoff_len": 32, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "max_steps": 4, "logging_steps": 1, "report_to": "none", "use_cpu": True,
    }  # fmt: skip
    first, second, merged = (str(tmp_path / part) for part in ("first", "second", "merged"))
    again = {"output_dir": second, "adapter_name_or_path": first}
    steps = [
        ("train", training | {name: section, "output_dir": first}),
        ("train", training | again),  # the adapter says what it is
        ("export", common | {"adapter_name_or_path": second, "export_dir": merged, "infer_dtype": "float32"}),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"DISABLE_VERSION_CHECK": "1"}
    for command, settings in steps:
        (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        launcher = [sys.executable, "-m", "peft_reslora.integrations.llama_factory", command, "settings.yaml"]
        done = subprocess.run(launcher, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]

    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    ids = torch.randint(2, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    tolerance, outputs = rounding(plain), []
    with torch.no_grad():
        outputs.append(plain(input_ids=ids).logits)
        for folder in (first, second):
            model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
            outputs.append(model(input_ids=ids).logits)
            config = model.peft_config["default"]
            assert config.peft_type == name.upper()
            assert {field: getattr(config, field) for field in section} == section
        found = AutoModelForCausalLM.from_pretrained(merged).eval()(input_ids=ids).logits
    assert all((b - a).abs().max() > 100 * tolerance for a, b in pairwise(outputs))
    torch.testing.assert_close(found, outputs[-1], rtol=tolerance, atol=tolerance)
