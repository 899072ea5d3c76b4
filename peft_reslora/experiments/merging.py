"""Metrics of a trained adapter before and after its merge."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from peft import PeftModel
from transformers import TrainerCallback

from peft_reslora.experiments.task import Task
from peft_reslora.reslora import calibrate_merge
from peft_reslora.training import ShortcutAnnealing

Metrics = dict[str, float]


def can_merge(model: PeftModel) -> bool:
    """Whether the tuner goes into the base's weights; prompts and prefixes do not.

    Nor does any into 4 bits that were evaluated on a CPU, where bitsandbytes may repack them for good.
    """
    base: Any = model.get_base_model()
    repacked = getattr(base, "is_loaded_in_4bit", False) and base.device.type == "cpu"
    return hasattr(model.base_model, "merge_and_unload") and not repacked


def estimates_shortcuts(model: PeftModel) -> bool:
    """Whether the merge is an estimate: ResLoRA's input and middle."""
    return getattr(model.peft_config["default"], "shortcut", "block") in ("input", "middle")


def is_annealed(model: PeftModel) -> bool:
    """Whether its shortcuts were trained away, so that the merge is exact."""
    return getattr(model.peft_config["default"], "estimate", None) == "annealed"


def annealing(task: Task, calibration_rows: int) -> tuple[TrainerCallback]:
    """Trains the shortcuts away in the last third of the training, from estimates on so many rows if there are any."""
    return (ShortcutAnnealing(batches=task.batches(calibration_rows) or None),)


def merged_metrics(
    task: Task, model: PeftModel, splits: Sequence[str], calibration_rows: int = 0
) -> dict[str, dict[str, Metrics]]:
    """Metrics after the merge, by split and estimator; empty without a merge.

    Where the merge needs no estimator, `exact` or, since the shortcuts were trained away, `annealed`.

    With `calibration_rows`, adapters whose merge is an estimate are calibrated, and stay so.
    """
    found: dict[str, dict[str, Metrics]] = {split: {} for split in splits}

    def merge_as(estimator: str) -> None:
        merged = copy.deepcopy(model).merge_and_unload()
        for split in splits:
            found[split][estimator] = task.evaluate(merged, split)

    if not can_merge(model):
        return {}
    if is_annealed(model) or not estimates_shortcuts(model):
        merge_as("annealed" if is_annealed(model) else "exact")
        return found
    config: Any = model.peft_config["default"]
    if config.merge_estimator != "least_squares":
        merge_as(config.merge_estimator)
    if calibration_rows or config.merge_estimator == "least_squares":
        calibrate_merge(model, task.batches(calibration_rows or 256))
        merge_as("least_squares")
    return found
