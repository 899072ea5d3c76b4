"""One process of `train`: a tiny run of each tuner, and one that is stopped and goes on, in float64.

Run by `test_processes.py`, under `accelerate launch` or alone: python train_worker.py FILMS FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.engine_worker import start_accelerate
from helpers.tiny_runs import stop_at, tiny_run
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from peft_reslora.experiments import train

TUNERS: dict[str, dict[str, Any]] = {
    "input": {"peft_type": "RESLORA", "shortcut": "input"},
    "block": {"peft_type": "RESLORA", "shortcut": "block"},
    "middle": {"peft_type": "RESLORA", "shortcut": "middle", "pre_num": -1},
    "mora": {"peft_type": "MORA"},
}
STEPS, STOPPED = 4, 3
BATCH = 8
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def settings_of(films: Path, output: Path, tuner: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A run without chance, of as many rows a step in any number of processes.

    With this epsilon, Adam does not divide by gradients that are small, which would enlarge their rounding.
    """
    settings = tiny_run(films, output, tuner={**tuner, "r": 2, "target_modules": ["query", "value"]}, **changes)
    settings["base"] |= NO_DROPOUT
    settings["calibration_rows"] = 0
    settings["training"] = {
        "max_steps": STEPS,
        "save_steps": 1,
        "per_device_train_batch_size": BATCH // int(os.environ.get("WORLD_SIZE", "1")),
        "learning_rate": 0.5,
        "adam_epsilon": 1.0,
        "accelerator_config": {"use_configured_state": True},  # what `start_accelerate` has made
    }
    return settings


def stopped_and_resumed(settings: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stopped = stop_at(STOPPED, patch)
        with pytest.raises(stopped):
            train(settings)
    unset_hf_deepspeed_config()  # as in the new process that a run goes on in
    start_accelerate()
    train(settings)


def main(films: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    for name, tuner in TUNERS.items():
        start_accelerate()
        train(settings_of(films, folder / name, tuner))
    start_accelerate()
    train(settings_of(films, folder / "regression", TUNERS["middle"], task="regression"), "data.label=score")
    start_accelerate()
    stopped_and_resumed(settings_of(films, folder / "resumed", TUNERS["input"]))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
