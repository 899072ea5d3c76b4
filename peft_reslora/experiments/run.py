"""`train`: one run from a YAML file to a folder with adapter, export, metrics and card."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainingArguments
from transformers.integrations import TensorBoardCallback

from peft_reslora.experiments.card import run_card
from peft_reslora.experiments.config_file import from_mapping, read_config
from peft_reslora.experiments.merging import annealing, can_merge, merged_metrics
from peft_reslora.experiments.method_comparison import RESULT, RunLog, comparison_result
from peft_reslora.experiments.processes import join_processes, main_first, on_main
from peft_reslora.experiments.provenance import fingerprint, provenance
from peft_reslora.experiments.settings import SFT_KEYS, TrainSettings, as_config, train_settings
from peft_reslora.experiments.task import Task
from peft_reslora.experiments.tasks import make_task
from peft_reslora.experiments.training import (
    Method,
    Trained,
    fit,
    last_complete_checkpoint,
    planned_steps,
    training_arguments,
)
from peft_reslora.experiments.tuners import trained_parameters
from peft_reslora.export import save_as_lora

ADAPTER, LORA, MERGED, BASE = "adapter", "lora", "merged", "base"
METRICS, CONFIG, RUN = "metrics.json", "config.yaml", "run.json"
IMAGES = "images"
_CHECKPOINTS, _LOGS = "checkpoints", "logs"
_SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 0.1, "save_total_limit": 2}


def train(config: str | Path | Mapping[str, Any], *overrides: str) -> dict[str, Any]:
    """Train one adapter and write everything about it to the config's `output_dir`; returns the metrics.

    A run that was killed goes on from its last checkpoint when it is called again with the same settings, and gives
    the same numbers.

    Args:
        config: path of a YAML file, or the same as a mapping.
        overrides: `section.key=value`.

    Raises:
        ValueError: for settings or data that cannot be right, before training; for an `output_dir` that holds another
            run or a finished one.
    """
    read = from_mapping(config, overrides) if isinstance(config, Mapping) else read_config(config, overrides)
    return train_with(train_settings(read))


def train_with(settings: TrainSettings) -> dict[str, Any]:
    """`train` with settings that are checked; of several processes, all train and the main one does all else."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    folder = Path(settings.output_dir)
    _check_packages(settings)
    processes = join_processes(settings.training)
    on_main(lambda: _check_folder(folder, settings))
    log = RunLog(gpu=torch.cuda.is_available() and not settings.training.get("use_cpu"))
    task = main_first(lambda: make_task(settings))
    counting = {"include_num_input_tokens_seen": "non_padding"} if task.tokenizer is not None else {}
    arguments = training_arguments(
        {**_SAVING, **counting, **settings.training},
        settings.seed,
        folder / _CHECKPOINTS,
        "none" if settings.report_to == "tensorboard" else settings.report_to,
        settings.data.max_length,
    )
    checkpoint = on_main(lambda: _start(folder, settings, task, processes))
    method = Method(settings.tuner, settings.loraplus_lr_ratio)
    steps = planned_steps(settings.training, len(task.train), processes)
    on_main_process = arguments.process_index == 0
    callbacks = (
        log,
        *_tensorboard(folder, settings, arguments),
        *((task.watch(folder / IMAGES, settings.tuner["peft_type"]),) if task.watch and on_main_process else ()),
        *(annealing(task, settings.calibration_rows) if settings.annealed else ()),
    )
    trained = fit(task, method, arguments, steps, callbacks, resume=checkpoint)
    return on_main(lambda: _finish(folder, settings, task, trained, log))


def resolved(settings: TrainSettings) -> dict[str, Any]:
    """All settings with their defaults, as YAML and JSON hold them."""
    return dataclasses.asdict(settings)


def _check_packages(settings: TrainSettings) -> None:
    """Refuse what needs a package that is not installed.

    Raises:
        ValueError: naming it, and the key that asks for it.
    """
    needed: dict[str, str] = {}
    if settings.report_to != "none":
        needed[f"report_to={settings.report_to}"] = settings.report_to
    needed |= {f"training.{key}": "trl" for key in SFT_KEYS if key in settings.training}
    needed |= {"base.load_in_4bit": "bitsandbytes"} if settings.base.load_in_4bit else {}
    for key, name in needed.items():
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"{key} needs the package {name}, which is not installed: pip install {name}.")


def _tensorboard(
    folder: Path, settings: TrainSettings, arguments: TrainingArguments
) -> tuple[TensorBoardCallback, ...]:
    """Logs for TensorBoard in a folder that stays, where the Trainer's own would end with the checkpoints."""
    if settings.report_to != "tensorboard" or arguments.process_index != 0:
        return ()
    from torch.utils.tensorboard import SummaryWriter

    return (TensorBoardCallback(SummaryWriter(str(folder / _LOGS))),)


def _identity(settings: TrainSettings) -> str:
    return fingerprint({k: v for k, v in resolved(settings).items() if k not in ("output_dir", "report_to")})


def _check_folder(folder: Path, settings: TrainSettings) -> None:
    """Refuse to mix two runs in one folder."""
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / RUN).is_file():
        raise ValueError(f"{folder} holds other files; give a new or an empty folder as output_dir.")
    started = json.loads((folder / RUN).read_text(encoding="utf-8"))["identity"]
    if started != _identity(settings):
        raise ValueError(f"{folder} holds a run with other settings ({CONFIG} there); give another output_dir.")
    if (folder / METRICS).exists():
        raise ValueError(f"{folder} holds this run, finished ({METRICS}); give another output_dir or delete it.")


def _check_resume(
    folder: Path, settings: TrainSettings, checksums: Mapping[str, str], checkpoint: Path | None, processes: int
) -> None:
    """Refuse to go on where the numbers would not be those of an uninterrupted run."""
    if (folder / RUN).is_file():
        run = json.loads((folder / RUN).read_text(encoding="utf-8"))
        if (before := run.get("processes", 1)) != processes:
            raise ValueError(
                f"{folder} holds a run of {before} processes, and this one has {processes}, which would divide the "
                "rows in another way; start as many, or give another output_dir."
            )
        started = run["data_sha256"]
        if changed := sorted(name for name in {*started, *checksums} if started.get(name) != checksums.get(name)):
            raise ValueError(
                f"{folder} holds a run on other data: {', '.join(changed)} changed since it began ({RUN} there); give "
                "another output_dir."
            )
    if checkpoint is not None and settings.tuner["peft_type"] == "ADALORA":
        raise ValueError(
            f"{folder} holds a run of AdaLoRA that was stopped. It cannot go on: PEFT's checkpoints have neither the "
            "importance of its ranks nor the shapes after pruning. Start the run in a new folder (output_dir=DIR)."
        )


def _start(folder: Path, settings: TrainSettings, task: Task, processes: int) -> Path | None:
    """Write what is known before the training; the checkpoint to go on from, if there is one."""
    checkpoint = last_complete_checkpoint(folder / _CHECKPOINTS, processes)
    _check_resume(folder, settings, task.data.checksums, checkpoint, processes)
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(as_config(settings), sort_keys=False, allow_unicode=True)
    write_whole(folder / CONFIG, text)
    found = {"identity": _identity(settings), "processes": processes, **provenance(task.data.checksums)}
    write_json(folder / RUN, found)
    return checkpoint


def _finish(folder: Path, settings: TrainSettings, task: Task, trained: Trained, log: RunLog) -> dict[str, Any]:
    splits = [name for name in task.data.splits if name != "train"]
    metrics = measure(task, trained, settings.calibration_rows, splits)
    if trained.diverged:
        warnings.warn(
            f"The training diverged: the loss of its last step is {trained.losses[-1][1]}. Nothing that was measured "
            "means anything; lower training.learning_rate and give another output_dir.",
            stacklevel=2,
        )
    if settings.base.head == "fit":
        task.fresh_model().save_pretrained(str(folder / BASE))  # type: ignore[operator]
    save_adapter(trained, folder / ADAPTER)
    if task.tokenizer is not None:
        task.tokenizer.save_pretrained(folder / ADAPTER)
    size = file_size(folder / ADAPTER)
    write_json(folder / RESULT, comparison_result(settings, task, trained, metrics, size, log))
    metrics["export"] = _export(folder, trained) if settings.export else None
    if settings.merge and can_merge(trained.model):
        trained.model.merge_and_unload().save_pretrained(str(folder / MERGED))
    metrics["bytes"] = {name: file_size(folder / name) for name in (ADAPTER, LORA) if (folder / name).exists()}
    write_whole(folder / "README.md", run_card(as_config(settings), metrics, task))
    write_json(folder / METRICS, metrics)
    shutil.rmtree(folder / _CHECKPOINTS, ignore_errors=True)
    return metrics


def measure(task: Task, trained: Trained, calibration_rows: int, merged: Sequence[str]) -> dict[str, Any]:
    """Everything that is measured on a trained model; after the merge on the splits `merged`, if it can be merged."""
    splits = [name for name in task.data.splits if name != "train"]
    return {
        "metric": task.metric,
        "before_merge": {split: task.evaluate(trained.model, split) for split in splits},
        "after_merge": {} if trained.diverged else merged_metrics(task, trained.model, merged, calibration_rows),
        "forgetting": task.forgetting(trained.model) if task.forgetting else None,
        "generated": task.generated(trained.model) if task.generated and not trained.diverged else None,
        "losses": [round(loss, 6) for _, loss in trained.losses],
        "steps": trained.steps,
        "trained_parameters": trained_parameters(trained.model),
        "train_seconds": round(trained.seconds, 2),
    }


def result_lines(settings: TrainSettings, metrics: Mapping[str, Any]) -> list[str]:
    """What a terminal shows at the end."""
    lines = [f"{metrics['steps']} steps in {metrics['train_seconds']:.0f} s, final loss {metrics['losses'][-1]:.4f}"]
    for split, found in metrics["before_merge"].items():
        values = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
        merged = "; ".join(
            f"{estimator} {kinds[metrics['metric']]:.2f}"
            for estimator, kinds in metrics["after_merge"].get(split, {}).items()
        )
        lines.append(f"{split}: {values}; {metrics['metric']} after the merge: {merged or 'none'}")
    if metrics["generated"]:
        shown = ", ".join(f"{name} {value:.2f}" for name, value in metrics["generated"].items())
        lines.append(f"generated: {shown}" + ("" if (d := metrics["forgetting"]) is None else f", drift {d:.2f}"))
    if metrics["export"] and "refused" in metrics["export"]:
        lines.append(f"no LoRA export: {metrics['export']['refused']}")
    return [*lines, f"everything is in {settings.output_dir}"]


def _export(folder: Path, trained: Trained) -> dict[str, Any]:
    """Write the LoRA export; where there is none without a rank (MoRA rotation), say so."""
    if trained.diverged:
        return {"refused": "the training diverged"}
    try:
        export = save_as_lora(folder / LORA, trained.model)
    except (ValueError, NotImplementedError) as error:
        return {"refused": " ".join(str(error).split())}
    return {"exact": export.report.exact, "worst_relative_error": export.report.worst_error}


def save_adapter(trained: Trained, folder: Path) -> None:
    """As PEFT saves it, without its question to the Hub whether the vocabulary was changed: it was not."""
    trained.model.save_pretrained(str(folder), save_embedding_layers=False)


def file_size(folder: Path) -> int:
    """Bytes of the tensors in a saved adapter."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(finite(value), indent=1, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """The value with None for nan and infinity, which JSON has not."""
    if isinstance(value, Mapping):
        return {name: finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
