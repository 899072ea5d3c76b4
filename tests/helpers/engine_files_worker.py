"""One process of an engine: transformers' Trainer trains, saves, resumes; then what users call on the trained model.

Run by `test_engine_files.py`, under `accelerate launch` or alone: python engine_files_worker.py FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers.engine_worker import build, start_accelerate
from helpers.training import losses_of
from torch import nn
from transformers import Trainer, TrainingArguments

from peft_reslora import calibrate_merge, export_lora, merge_report, save_as_lora

TUNERS = {"input": 1, "block": 1, "middle": -1, "mora": 1}
STEPS, SAVED = 4, 2
BATCH = 4

Outcome = dict[str, Any]


def rows() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [{"input_ids": ids, "labels": ids} for ids in torch.randint(1, 53, (16, 7), generator=generator)]


def trainer(tuner: str, folder: Path, processes: int) -> Trainer:
    start_accelerate()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        save_steps=SAVED,
        per_device_train_batch_size=BATCH // processes,
        lr_scheduler_type="constant",
        logging_steps=1,
        average_tokens_across_devices=False,  # all rows have as many
        logging_nan_inf_filter=False,
        report_to=[],
        accelerator_config={"use_configured_state": True},  # what `start_accelerate` has made
        bf16=False,
        disable_tqdm=True,
    )
    optimizer = torch.optim.SGD, {"lr": 0.02, "momentum": 0.5}
    model = build((tuner, TUNERS[tuner]), "none")
    run = Trainer(model, arguments, train_dataset=rows(), optimizer_cls_and_kwargs=optimizer)
    if run.is_deepspeed_enabled:  # no parameter is small enough to stay whole
        settings = run.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        settings["stage3_param_persistence_threshold"] = 0
    return run


def attempts(model: nn.Module, folder: Path) -> dict[str, Callable[[], Any]]:
    """What users call on a trained model, all of which has to be right or to be refused."""
    batches = [{"input_ids": torch.stack([row["input_ids"] for row in rows()])}]
    return {
        "save_pretrained": lambda: model.save_pretrained(folder / "saved"),
        "export_lora": lambda: export_lora(model, rank=24).save_pretrained(folder / "exported"),
        "save_as_lora": lambda: save_as_lora(folder / "as_lora", model, rank=24),
        "calibrate_merge": lambda: calibrate_merge(model, batches, progressbar=False),
        "merge_report": lambda: merge_report(model, batches),
        "merge_adapter": lambda: model.merge_adapter(),
    }


def outcome(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "right"


def main(folder: Path) -> None:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(1)
    results: dict[str, Outcome] = {}
    for tuner in TUNERS:
        whole = trainer(tuner, folder / tuner / "whole", processes)
        whole.train()
        whole.save_model(str(folder / tuner / "final"))
        resumed = trainer(tuner, folder / tuner / "resumed", processes)
        resumed.train(resume_from_checkpoint=str(folder / tuner / "whole" / f"checkpoint-{SAVED}"))
        resumed.save_model(str(folder / tuner / "final-resumed"))
        own = folder / tuner / f"rank{dist.get_rank() if dist.is_initialized() else 0}"
        found = {name: outcome(call) for name, call in attempts(whole.model, own).items()}
        engine = str(whole.accelerator.distributed_type.value)
        results[tuner] = {
            "engine": engine,
            "losses": losses_of(whole),
            "resumed": losses_of(resumed),
            "attempts": found,
        }
    if whole.args.process_index == 0:
        (folder / "results.json").write_text(json.dumps(results))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
