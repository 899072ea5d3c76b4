"""Results and experiments in the form of PEFT's method_comparison."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_runs import tiny_run, write_films
from peft import PeftConfig

from peft_reslora.experiments import train
from peft_reslora.experiments.config_file import from_mapping
from peft_reslora.experiments.method_comparison import write_experiment
from peft_reslora.experiments.settings import TrainSettings, train_settings
from peft_reslora.reslora import ResLoRAConfig

NONE = type(None)
# `TrainConfig` of method_comparison/MetaMathQA/utils.py in PEFT's repository, with the types of its fields.
TRAIN_CONFIG: dict[str, Any] = {
    **dict.fromkeys(("model_id", "dtype", "query_template", "optimizer_type"), str),
    **dict.fromkeys(("max_seq_length", "batch_size", "batch_size_eval", "max_steps", "eval_steps", "seed"), int),
    **dict.fromkeys(("compile", "use_gc", "use_amp", "autocast_adapter_dtype"), bool),
    **dict.fromkeys(("optimizer_kwargs", "generation_kwargs"), dict),
    **dict.fromkeys(("lr_scheduler", "attn_implementation"), (str, NONE)),
    "grad_norm_clip": float,
}
VERSIONS = [f"{name}-version" for name in ("transformers", "peft", "datasets", "bitsandbytes", "torch")]
HASHES = [f"{name}-commit-hash" for name in ("transformers", "peft", "datasets", "bitsandbytes", "torch")]
# `log_results` there, and the last of its metrics as run.py makes it.
SCHEMA: dict[str, Any] = {
    "run_info": {
        "created_at": str,
        "total_time": float,
        "experiment_name": str,
        "peft_branch": str,
        "train_config": TRAIN_CONFIG,
        "peft_config": {"peft_type": str},
        "error_msg": str,
    },
    "train_info": {
        **dict.fromkeys(("accelerator_memory_reserved_avg", "accelerator_memory_max"), int),
        **dict.fromkeys(("accelerator_memory_reserved_99th", "file_size"), int),
        **dict.fromkeys(("num_trainable_params", "num_total_params"), int),
        "train_time": float,
        "status": str,
        "metrics": list,
    },
    "meta_info": {
        "model_info": {"sha": (str, NONE), "created_at": (str, NONE)},
        "dataset_info": dict,
        "package_info": dict.fromkeys([*VERSIONS, *HASHES], (str, NONE)),
        "system_info": dict.fromkeys(("system", "release", "version", "machine", "processor", "accelerator"), str),
        "pytorch_info": str,
    },
}
LAST = {
    **dict.fromkeys(("step", "train samples", "train total tokens"), int),
    **dict.fromkeys(("test accuracy", "train loss"), float),
    "forgetting": (float, NONE),
}


def check(value: Any, schema: Any, place: str) -> None:
    if isinstance(schema, dict):
        assert isinstance(value, dict), place
        for name, part in schema.items():
            assert name in value, f"{place}.{name}"
            check(value[name], part, f"{place}.{name}")
    else:
        assert isinstance(value, schema), f"{place}={value!r}"
        assert not (schema is int and isinstance(value, bool)), place


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    train(tiny_run(write_films(folder / "films"), folder / "run"), "merge=true")
    return folder / "run"


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "method_comparison.json").read_text(encoding="utf-8"))
    return found


def test_a_result_has_the_keys_and_types_of_pefts(finished: Path) -> None:
    result = read(finished)
    assert set(result) == set(SCHEMA)
    check(result, SCHEMA, "result")
    for name in ("run_info", "train_info", "meta_info"):
        assert set(result[name]) == set(SCHEMA[name])
    check(result["train_info"]["metrics"][-1], LAST, "metrics")
    assert datetime.datetime.fromisoformat(result["run_info"]["created_at"]).tzinfo is not None


def test_a_result_says_what_the_runs_own_file_says(finished: Path) -> None:
    result, metrics = read(finished), json.loads((finished / "metrics.json").read_text(encoding="utf-8"))
    train_info = result["train_info"]
    last = train_info["metrics"][-1]
    assert last["test accuracy"] == pytest.approx(metrics["before_merge"]["test"]["accuracy"] / 100)
    assert last["valid accuracy"] == pytest.approx(metrics["before_merge"]["validation"]["accuracy"] / 100)
    assert (last["step"], last["train samples"]) == (10, 10 * 8)
    assert 3 * 80 < last["train total tokens"] <= 16 * 80  # three words or more, cut at 16 tokens
    assert train_info["file_size"] == metrics["bytes"]["adapter"]
    assert train_info["num_trainable_params"] == metrics["trained_parameters"]
    assert train_info["num_total_params"] > train_info["num_trainable_params"]
    assert train_info["status"] == "success"
    assert train_info["accelerator_memory_reserved_99th"] <= train_info["accelerator_memory_max"]
    assert result["run_info"]["experiment_name"] == "reslora/run"
    assert result["run_info"]["peft_config"]["shortcut"] == "middle"
    assert result["run_info"]["total_time"] > train_info["train_time"] > 0


LARGE = {
    "task": "generation",
    "base": {"name": "meta-llama/Llama-3.2-3B", "dtype": "bfloat16"},
    "data": {"folder": ".", "files": {"train": "train.jsonl"}, "text": ["query"], "label": "response"},
    "tuner": {"peft_type": "RESLORA", "r": 32, "lora_alpha": 64, "target_modules": ["q_proj", "v_proj"]},
    "training": {
        "max_steps": 5000,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-4,
        "weight_decay": 0.1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 500,
        "logging_steps": 5,
    },
}


def large(*overrides: str) -> TrainSettings:
    return train_settings(from_mapping(LARGE, overrides))


def test_an_experiment_is_one_that_pefts_loop_reads(tmp_path: Path) -> None:
    folder = tmp_path / "experiments" / "reslora" / "block"
    write_experiment(large("data.max_length=768"), folder)
    assert {path.name for path in folder.iterdir()} == {"README.md", "adapter_config.json", "training_params.json"}
    config = PeftConfig.from_pretrained(str(folder))
    assert isinstance(config, ResLoRAConfig)
    assert (config.r, config.shortcut, config.target_modules) == (32, "block", {"q_proj", "v_proj"})
    assert config.chain_cuts == "auto"
    params = json.loads((folder / "training_params.json").read_text(encoding="utf-8"))
    check(params, {name: TRAIN_CONFIG[name] for name in params}, "params")
    assert params == {
        "model_id": "meta-llama/Llama-3.2-3B",
        "dtype": "bfloat16",
        "max_seq_length": 768,
        "batch_size": 4,
        "max_steps": 5000,
        "eval_steps": 250,
        "use_gc": False,
        "seed": 0,
        "grad_norm_clip": 1.0,
        "optimizer_type": "AdamW",
        "optimizer_kwargs": {"lr": 1e-4, "weight_decay": 0.1},
        "lr_scheduler": "cosine",
    }


def test_lora_plus_and_a_constant_rate_are_known_to_pefts_loop(tmp_path: Path) -> None:
    folder = tmp_path / "experiments" / "reslora" / "plus"
    settings = large("loraplus_lr_ratio=16.0", "training.lr_scheduler_type=constant", "training.warmup_steps=0")
    write_experiment(settings, folder)
    params = json.loads((folder / "training_params.json").read_text(encoding="utf-8"))
    assert (params["optimizer_type"], params["lr_scheduler"]) == ("lora+", None)
    assert params["optimizer_kwargs"]["loraplus_lr_ratio"] == 16.0


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["task=classification"], "task=generation"),
        (["training.lr_scheduler_type=linear"], r"lr_scheduler_type=cosine, warmup_steps=0.1"),
        (["training.warmup_steps=7"], r"cosine with 10% warmup"),
        (["training.gradient_accumulation_steps=2"], "training.gradient_accumulation_steps has no counterpart"),
        (["training.max_steps=-1"], "set training.max_steps"),
        (["training.optim=adafactor"], "training.optim='adafactor' must be one of adamw_torch"),
        (["annealed=true", "tuner.shortcut=input"], "annealed=true needs a callback"),
        (["tuner.total_step=5000"], "tuner.total_step needs a step of its own"),
    ],
)
def test_what_pefts_loop_does_not_do_is_refused(tmp_path: Path, overrides: list[str], said: str) -> None:
    folder = tmp_path / "experiments" / "reslora" / "block"
    with pytest.raises(ValueError, match=said):
        write_experiment(large(*overrides), folder)
    assert not folder.exists()


def test_a_folder_that_pefts_loop_would_not_take_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must end with experiments/METHOD/NAME"):
        write_experiment(large(), tmp_path / "block")
