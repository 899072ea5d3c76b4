"""Metrics of a trained adapter before and after its merge."""

from __future__ import annotations

import copy
from typing import Any

from peft import PeftModel

from peft_reslora.experiments.task import Task
from peft_reslora.reslora import calibrate_merge

Metrics = dict[str, float]


def estimates_shortcuts(model: PeftModel) -> bool:
    """Whether the merge is an estimate: ResLoRA's input and middle."""
    return getattr(model.peft_config["default"], "shortcut", "block") in ("input", "middle")


def merged_metrics(task: Task, model: PeftModel, split: str, calibration_rows: int = 0) -> dict[str, Metrics]:
    """Metrics after the merge, by estimator; `exact` where the merge needs none.

    With `calibration_rows`, adapters whose merge is an estimate are calibrated, and stay so.
    """
    if not estimates_shortcuts(model):
        return {"exact": _after_merge(task, model, split)}
    config: Any = model.peft_config["default"]
    found = {}
    if config.merge_estimator != "least_squares":
        found[config.merge_estimator] = _after_merge(task, model, split)
    if calibration_rows or config.merge_estimator == "least_squares":
        calibrate_merge(model, task.batches(calibration_rows or 256))
        found["least_squares"] = _after_merge(task, model, split)
    return found


def _after_merge(task: Task, model: PeftModel, split: str) -> Metrics:
    merged = copy.deepcopy(model).merge_and_unload()
    return task.evaluate(merged, split)
