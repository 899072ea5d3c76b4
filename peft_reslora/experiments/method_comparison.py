"""A run as PEFT's own comparison of methods keeps it, and an experiment that PEFT's own loop can run.

The form is that of `method_comparison/MetaMathQA` in PEFT's repository (`utils.py`, `log_results` and `TrainConfig`):
accuracies are fractions, sizes are bytes, and memory is counted above what there was before the model was loaded.
"""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from peft_reslora.experiments.provenance import machine
from peft_reslora.experiments.settings import TrainSettings
from peft_reslora.experiments.statistics import window_of
from peft_reslora.experiments.task import Task
from peft_reslora.experiments.training import Trained
from peft_reslora.experiments.tuners import make_config

RESULT = "method_comparison.json"
TRAINING_PARAMS = "training_params.json"
_PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch", "peft_reslora")
_WARMUP = 0.1  # of the steps, in PEFT's loop with its cosine
_OPTIMIZERS = {"adamw_torch": "AdamW", "adamw_torch_fused": "AdamW", "sgd": "SGD"}
_SCHEDULES = ("lr_scheduler_type", "warmup_steps", "warmup_ratio")
_TAKEN_OVER = (
    *("learning_rate", "weight_decay", "max_grad_norm", "max_steps", "optim", "gradient_checkpointing"),
    *("per_device_train_batch_size", "per_device_eval_batch_size"),
)
_WITHOUT_EFFECT = ("logging_", "save_", "dataloader_", "use_cpu", "disable_tqdm", "eval_strategy")  # on numbers


class RunLog(TrainerCallback):
    """When a run began, and after each step the memory that it takes and the tokens and rows that it has seen.

    On a GPU memory is what PyTorch has reserved there, on a CPU what the process has resident; above what it was when
    this was made, so make it before the model is loaded.
    """

    def __init__(self, gpu: bool) -> None:
        self.date = datetime.datetime.now(tz=datetime.UTC).replace(microsecond=0).isoformat()
        self.memory: list[int] = []
        self.tokens = self.rows = 0
        self._gpu = gpu
        self._begin = time.perf_counter()
        self._before = self._bytes()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.memory.append(self._bytes() - self._before)
        self.tokens = state.num_input_tokens_seen
        self.rows = state.global_step * args.train_batch_size * args.gradient_accumulation_steps * args.world_size

    def seconds(self) -> float:
        return time.perf_counter() - self._begin

    def peak(self) -> int:
        """The most that there was; on a CPU, after a step."""
        return torch.cuda.max_memory_reserved() - self._before if self._gpu else max(self.memory, default=0)

    def _bytes(self) -> int:
        if self._gpu:
            return torch.cuda.memory_reserved()
        import psutil  # of accelerate's requirements

        return int(psutil.Process().memory_info().rss)


def comparison_result(
    settings: TrainSettings, task: Task, trained: Trained, metrics: Mapping[str, Any], file_size: int, log: RunLog
) -> dict[str, Any]:
    """What PEFT's `log_results` writes of a run; `metrics` are those of the run's own file, in percent."""
    return {
        "run_info": {
            "created_at": log.date,
            "total_time": log.seconds(),
            "experiment_name": f"{settings.tuner['peft_type'].lower()}/{Path(settings.output_dir).name}",
            "peft_branch": "peft_reslora",  # PEFT's own results are those of its main branch
            "train_config": _train_config(settings, trained.steps),
            "peft_config": _plain(trained.model.peft_config["default"].to_dict()),
            "error_msg": "the training diverged" if trained.diverged else "",
        },
        "train_info": _train_info(task, trained, metrics, file_size, log),
        "meta_info": _meta_info(task),
    }


def _train_info(
    task: Task, trained: Trained, metrics: Mapping[str, Any], file_size: int, log: RunLog
) -> dict[str, Any]:
    trainable, total = trained.model.get_nb_trainable_parameters()
    memory = log.memory or [0]
    return {
        "accelerator_memory_reserved_avg": int(statistics.fmean(memory)),
        "accelerator_memory_max": log.peak(),
        "accelerator_memory_reserved_99th": int(np.percentile(memory, 99)),
        "train_time": trained.seconds,
        "file_size": file_size,
        "num_trainable_params": trainable,
        "num_total_params": total,
        "status": "failed" if trained.diverged else "success",
        "metrics": [_last_metrics(task, trained, metrics, log)],
    }


def _last_metrics(task: Task, trained: Trained, metrics: Mapping[str, Any], log: RunLog) -> dict[str, Any]:
    """The last entry, which is the one that counts. Forgetting: by how much the loss on other text has grown.

    A loss is no accuracy, and stands there under its own name.
    """
    name, unit = (task.metric, 1) if task.lower_is_better else ("accuracy", 100)
    found = {f"{split} {name}": values[task.metric] / unit for split, values in metrics["before_merge"].items()}
    if "validation accuracy" in found:
        found["valid accuracy"] = found.pop("validation accuracy")
    losses = [loss for _, loss in trained.losses[-window_of(trained.steps) :]]
    return {
        "step": trained.steps,
        "test accuracy": None,
        **found,
        "train loss": statistics.fmean(losses) if losses else None,  # prefix tuning goes past the base's forward
        "train samples": log.rows,
        "train total tokens": log.tokens,
        "forgetting": metrics["forgetting"] - task.forgetting(task.base) if task.forgetting else None,
    }


def _meta_info(task: Task) -> dict[str, Any]:
    packages: dict[str, str | None] = {}
    for name in _PACKAGES:
        packages[f"{name}-version"] = _version(name)
        packages[f"{name}-commit-hash"] = None
    system = {name: getattr(platform, name)() for name in ("system", "release", "version", "machine", "processor")}
    return {
        "model_info": {"sha": None, "created_at": None},
        "dataset_info": {name: {"sha": sha, "created_at": None} for name, sha in task.data.checksums.items()},
        "package_info": packages,
        "system_info": {**system, "accelerator": machine()["gpu"] or "cpu"},
        "pytorch_info": torch.__config__.show(),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _plain(value: Any) -> Any:
    """What JSON holds; sets as sorted lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return value if isinstance(value, (str, int, float, bool, list, tuple, type(None))) else str(value)


def _train_config(settings: TrainSettings, steps: int) -> dict[str, Any]:
    """The fields of PEFT's `TrainConfig`; the schedule by the Trainer's name, since it was the Trainer's."""
    training = settings.training
    batch = training.get("per_device_train_batch_size", 16)
    return {
        "model_id": settings.base.name or str(settings.base.config),
        "dtype": settings.base.dtype,
        "max_seq_length": settings.data.max_length,
        "batch_size": batch,
        "batch_size_eval": training.get("per_device_eval_batch_size", batch),
        "max_steps": steps,
        "eval_steps": steps,
        "compile": bool(training.get("torch_compile", False)),
        "use_gc": bool(training.get("gradient_checkpointing", False)),
        "query_template": "{query}\n",
        "seed": settings.seed,
        "grad_norm_clip": float(training.get("max_grad_norm", 1.0)),
        **_optimizer(settings),
        "lr_scheduler": str(training.get("lr_scheduler_type", "linear")),
        "use_amp": bool(training.get("bf16", False) or training.get("fp16", False)),
        "autocast_adapter_dtype": True,
        "generation_kwargs": {"max_new_tokens": settings.data.new_tokens} if settings.task == "generation" else {},
        "attn_implementation": None,
    }


def _optimizer(settings: TrainSettings) -> dict[str, Any]:
    training = settings.training
    kwargs = {"lr": training.get("learning_rate", 5e-5), "weight_decay": training.get("weight_decay", 0.0)}
    if settings.loraplus_lr_ratio is not None:
        kwargs["loraplus_lr_ratio"] = settings.loraplus_lr_ratio
        return {"optimizer_type": "lora+", "optimizer_kwargs": kwargs}
    name = str(training.get("optim", "adamw_torch"))
    return {"optimizer_type": _OPTIMIZERS.get(name, name), "optimizer_kwargs": kwargs}


def write_experiment(settings: TrainSettings, folder: Path) -> None:
    """Write `adapter_config.json` and `training_params.json`, from which PEFT's MetaMathQA suite runs.

    PEFT's `run.py` trains on its own data, and evaluates as it does; it takes from here the base, the tuner, and what
    these settings say of the training.

    Raises:
        ValueError: listing everything that PEFT's loop does not do, and if the folder's path is not
            `experiments/METHOD/NAME` at its end; nothing is written then.
    """
    faults = [*_path_faults(folder), *_faults(settings)]
    if faults:
        raise ValueError(f"PEFT's method_comparison cannot run these settings: {'; '.join(faults)}.")
    steps = settings.training["max_steps"]
    own = _train_config(settings, steps)
    taken = ("model_id", "dtype", "max_seq_length", "batch_size", "max_steps", "use_gc", "seed", "grad_norm_clip")
    values = {name: own[name] for name in (*taken, "optimizer_type", "optimizer_kwargs")}
    values["eval_steps"] = max(1, steps // 20)  # as in their own settings
    values["lr_scheduler"] = None if own["lr_scheduler"] == "constant" else "cosine"
    if "per_device_eval_batch_size" in settings.training:
        values["batch_size_eval"] = own["batch_size_eval"]
    folder.mkdir(parents=True, exist_ok=True)
    make_config(settings.tuner, steps).save_pretrained(str(folder))
    (folder / TRAINING_PARAMS).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _path_faults(folder: Path) -> list[str]:
    if folder.absolute().parts[-3:-2] == ("experiments",):
        return []
    return [f"the folder {folder} must end with experiments/METHOD/NAME, as experiments/reslora/block"]


def _faults(settings: TrainSettings) -> Sequence[str]:
    """What these settings ask for and PEFT's loop does not do."""
    faults, training = [], settings.training
    if settings.task != "generation" or settings.base.name is None:
        faults.append("it needs task=generation and a base.name of the Hub, a causal language model")
    if settings.annealed:
        faults.append("annealed=true needs a callback")
    if settings.tuner["peft_type"] == "RESLORA" and settings.tuner.get("total_step") is not None:
        faults.append("tuner.total_step needs a step of its own in the loop, which PEFT's takes for AdaLoRA only")
    if training.get("max_steps", -1) < 1:
        faults.append("it counts steps: set training.max_steps")
    if str(training.get("optim", "adamw_torch")) not in _OPTIMIZERS:
        faults.append(f"training.optim={training['optim']!r} must be one of {', '.join(_OPTIMIZERS)}")
    if not _is_known_schedule(training):
        faults.append(
            "the learning rate must be constant without warmup (training.lr_scheduler_type=constant), or cosine with "
            f"{_WARMUP:.0%} warmup (lr_scheduler_type=cosine, warmup_steps={_WARMUP})"
        )
    known = (*_TAKEN_OVER, *_SCHEDULES)
    unknown = [name for name in training if name not in known and not name.startswith(_WITHOUT_EFFECT)]
    return [*faults, *(f"training.{name} has no counterpart there, leave it out" for name in unknown)]


def _is_known_schedule(training: Mapping[str, Any]) -> bool:
    kind = training.get("lr_scheduler_type", "linear")
    warmup = training.get("warmup_steps") or training.get("warmup_ratio") or 0
    if kind == "constant":
        return not warmup
    return bool(kind == "cosine" and warmup in (_WARMUP, int(_WARMUP * training.get("max_steps", 0))))
