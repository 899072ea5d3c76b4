"""`--tuner_type reslora` and `--tuner_type mora` of ms-swift, with ms-swift itself where it is installed."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.repository import ROOT
from helpers.tiny_checkpoints import write_chats, write_llama
from helpers.tiny_models import TINY_MODELS
from helpers.tolerances import rounding
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_reslora import MoRAModel, ResLoRAModel

DEFAULTS: dict[str, Any] = {
    "task_type": "causal_lm",
    "lora_rank": 4,
    "lora_alpha": 32.0,
    "lora_dropout": 0.05,
    "lora_bias": "none",
    "lora_dtype": None,
    "lorap_lr_ratio": None,
    "use_rslora": False,
    "use_dora": False,
    "init_weights": True,
    "target_modules": ["q_proj", "v_proj"],
    "target_parameters": None,
    "modules_to_save": [],
    "model_kwargs": {},
    "tuner_backend": "peft",
    "use_swift_lora": False,
    "use_galore": False,
}  # of ms-swift's TunerArguments and BaseArguments, but for rank and targets


def installed() -> str | None:
    try:
        return importlib.metadata.version("ms-swift")
    except importlib.metadata.PackageNotFoundError:
        return None


class PeftTuner:
    """ms-swift's class of the same methods (4.6.0), which leaves `state_dict` out when it saves."""

    @staticmethod
    def save_pretrained(
        model: Any, save_directory: str, state_dict: Any = None, safe_serialization: bool = True, **kwargs: Any
    ) -> None:
        if isinstance(model, PeftModel):
            kwargs.setdefault("selected_adapters", ["default"])
        model.save_pretrained(save_directory, safe_serialization=safe_serialization, **kwargs)

    @staticmethod
    def from_pretrained(model: Any, model_id: str, **kwargs: Any) -> Any:
        return PeftModel.from_pretrained(model, model_id, **kwargs)


@pytest.fixture
def tuners(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The tuners that the joint registers, beside a stand-in: the package itself would change PEFT in this process."""
    packages = ("swift", "swift.tuner_plugin", "swift.pipelines", "swift.pipelines.train")
    modules = {name: ModuleType(name) for name in (*packages, "swift.pipelines.train.tuner")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    plugin: Any = modules["swift.tuner_plugin"]
    plugin.PeftTuner, plugin.tuners_map = PeftTuner, {}
    pipeline: Any = modules["swift.pipelines.train.tuner"]
    pipeline.get_target_modules = lambda args, model: args.target_modules
    pipeline.get_modules_to_save = lambda args, model, task: args.modules_to_save.copy()
    monkeypatch.delitem(sys.modules, "peft_reslora.integrations.ms_swift", raising=False)
    importlib.import_module("peft_reslora.integrations.ms_swift")
    return plugin.tuners_map


@pytest.mark.parametrize(
    ("name", "arguments", "tuner", "expected"),
    [
        (
            "reslora",
            {"use_rslora": True, "model_kwargs": {"reslora": {"shortcut": "middle", "pre_num": 2}}},
            ResLoRAModel,
            {"r": 4, "lora_alpha": 32.0, "lora_dropout": 0.05, "use_rslora": True, "shortcut": "middle", "pre_num": 2},
        ),
        ("reslora", {"modules_to_save": ["lm_head"]}, ResLoRAModel, {"modules_to_save": ["lm_head"]}),
        (
            "mora",
            {"model_kwargs": {"mora": {"mora_type": "sharing"}, "reslora": {"pre_num": 2}}},
            MoRAModel,
            {"r": 4, "mora_dropout": 0.05, "mora_type": "sharing", "modules_to_save": None},
        ),
    ],
)
def test_the_arguments_become_the_tuner(tuners, name, arguments, tuner, expected):
    model = tuners[name].prepare_model(SimpleNamespace(**DEFAULTS | arguments), TINY_MODELS["llama"].make())
    assert isinstance(model.base_model, tuner)
    config = model.peft_config["default"]
    assert {field: getattr(config, field) for field in expected} == expected
    assert config.target_modules == {"q_proj", "v_proj"}
    assert config.task_type == "CAUSAL_LM"


@pytest.mark.parametrize(
    ("task", "expected"),
    [("embedding", None), ("reranker", "SEQ_CLS"), ("generative_reranker", "CAUSAL_LM"), ("seq_cls", "SEQ_CLS")],
)
def test_tasks_are_those_that_peft_knows(tuners, task, expected):
    arguments = SimpleNamespace(**DEFAULTS | {"task_type": task})
    model = tuners["mora"].prepare_model(arguments, TINY_MODELS["llama"].make())
    assert model.peft_config["default"].task_type == expected


@pytest.mark.parametrize("name", ["reslora", "mora"])
def test_what_processes_have_gathered_is_saved(tuners, name, tmp_path):
    """The file holds the tensors of `state_dict`, not those that lie in this process's layers."""
    model = tuners[name].prepare_model(SimpleNamespace(**DEFAULTS), TINY_MODELS["llama"].make())
    gathered = {key: torch.full_like(value, 2.0) for key, value in model.state_dict().items() if "lora_B" in key}
    gathered = gathered or {k: torch.full_like(v, 2.0) for k, v in model.state_dict().items() if "mora_" in k}
    tuners[name].save_pretrained(model, str(tmp_path), state_dict={**model.state_dict(), **gathered})
    saved = load_file(tmp_path / "adapter_model.safetensors")
    twos = [key for key, value in saved.items() if bool((value == 2.0).all())]
    assert len(twos) == len(gathered) > 0


def test_a_saved_adapter_is_taken_up_again(tuners, tmp_path):
    model = tuners["reslora"].prepare_model(SimpleNamespace(**DEFAULTS), TINY_MODELS["llama"].make())
    tuners["reslora"].save_pretrained(model, str(tmp_path))
    again = tuners["reslora"].from_pretrained(TINY_MODELS["llama"].make(), str(tmp_path), is_trainable=True)
    assert isinstance(again.base_model, ResLoRAModel)
    assert any(parameter.requires_grad for parameter in again.parameters())


@pytest.mark.parametrize(
    ("name", "arguments", "match"),
    [
        ("reslora", {"tuner_backend": "unsloth"}, "--tuner_backend cannot be used with `--tuner_type reslora`"),
        ("reslora", {"lorap_lr_ratio": 16.0}, "--lorap_lr_ratio cannot be used .* leave it out"),
        ("mora", {"use_dora": True}, "--use_dora cannot be used with `--tuner_type mora`: leave it out"),
        (
            "reslora",
            {"model_kwargs": {"reslora": {"shortcuts": "input"}}},
            "no field 'shortcuts'. Did you mean 's",
        ),
        ("reslora", {"model_kwargs": {"reslora": {"r": 2}}}, "reslora: 'r' comes from ms-swift's own settings"),
        ("mora", {"model_kwargs": {"mora": "sharing"}}, "holds fields of MoRAConfig by name, and came as 'sharing'"),
    ],
)
def test_what_would_have_no_effect_is_refused(tuners, name, arguments, match):
    base = TINY_MODELS["llama"].make()
    before = [key for key, _ in base.named_modules()]
    with pytest.raises(ValueError, match=match):
        tuners[name].prepare_model(SimpleNamespace(**DEFAULTS | arguments), base)
    assert [key for key, _ in base.named_modules()] == before


def test_the_path_of_the_file_is_printed_without_the_trainer():
    command = [sys.executable, "-m", "peft_reslora.integrations", "ms_swift"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    path = Path(done.stdout.strip())
    assert path.is_file()
    assert path.name == "ms_swift.py"


@pytest.mark.skipif(installed() is None, reason="ms-swift is not installed; it asks for PEFT below 0.21")
@pytest.mark.parametrize(
    ("name", "section"), [("reslora", {"shortcut": "block", "pre_num": 2}), ("mora", {"mora_type": "rotation"})]
)
def test_ms_swift_trains_saves_resumes_and_merges(name, section, tmp_path):
    base, rows = write_llama(tmp_path / "base"), write_chats(tmp_path / "rows", count=16)
    joint = ROOT / "peft_reslora" / "integrations" / "ms_swift.py"
    training = {
        "--model": base, "--model_type": "llama", "--template": "dummy", "--dataset": f"{rows}/train.jsonl",
        "--use_hf": "true", "--torch_dtype": "float32", "--tuner_type": name, "--external_plugins": str(joint),
        "--model_kwargs": json.dumps({name: section}), "--lora_rank": "4", "--lora_dropout": "0",
        "--max_steps": "4", "--save_steps": "2", "--learning_rate": "1e-2", "--per_device_train_batch_size": "2",
        "--gradient_accumulation_steps": "1", "--add_version": "false", "--report_to": "none",
        "--save_total_limit": "3", "--split_dataset_ratio": "0",
    }  # fmt: skip
    whole, resumed, merged = tmp_path / "whole", tmp_path / "resumed", tmp_path / "merged"
    last, middle = str(whole / "checkpoint-4"), str(whole / "checkpoint-2")
    commands = [
        ["sft", *flat(training | {"--output_dir": str(whole)})],
        ["sft", *flat(training | {"--output_dir": str(resumed), "--resume_from_checkpoint": middle})],
        # Without the plugin and the type, which ms-swift has noted beside the checkpoint.
        ["export", *flat({"--adapters": last, "--merge_lora": "true", "--output_dir": str(merged)})],
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    worker = [sys.executable, "-m", "helpers.swift_worker", json.dumps(commands)]
    done = subprocess.run(worker, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]

    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    ids = torch.randint(2, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        untrained = plain(input_ids=ids).logits
        model = PeftModel.from_pretrained(plain, last).eval()
        expected = model(input_ids=ids).logits
        found = AutoModelForCausalLM.from_pretrained(merged).eval()(input_ids=ids).logits
    config = model.peft_config["default"]
    assert config.peft_type == name.upper()
    assert {field: getattr(config, field) for field in section} == section
    tolerance = rounding(plain)
    assert (expected - untrained).abs().max() > 100 * tolerance
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    files = [
        load_file(folder / "adapter_model.safetensors")
        for folder in (whole / "checkpoint-4", resumed / "checkpoint-4")
    ]
    assert files[0].keys() == files[1].keys()
    for key, tensor in files[0].items():
        torch.testing.assert_close(files[1][key], tensor, msg=lambda text, key=key: f"{key}: {text}")


def flat(arguments: dict[str, str]) -> list[str]:
    return [part for pair in arguments.items() for part in pair]
