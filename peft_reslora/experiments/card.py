"""The README.md of a run's folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from peft_reslora.experiments.task import Task
from peft_reslora.shared.text import code, printable, prose


def run_card(settings: Mapping[str, Any], metrics: Mapping[str, Any], task: Task) -> str:
    """What was trained on what, how well it does before and after the merge, and how to load it."""
    base = settings["base"].get("name") or settings["base"]["config"]
    lines = [
        "---",
        "library_name: peft",
        f"tags: [{settings['tuner']['peft_type'].lower()}, peft_reslora]",
        "---",
        "",
        f"# {prose(settings['tuner']['peft_type'])} on {prose(base)}: {settings['task']}",
        "",
        f"{metrics['trained_parameters']:,} trained parameters, {metrics['steps']} steps, "
        f"{metrics['train_seconds']:.0f} seconds, seed {settings['seed']}. Rows: "
        + ", ".join(f"{size} {name}" for name, size in task.data.sizes().items())
        + ".",
        "",
        *_metric_table(metrics),
        "",
        *_files(metrics, settings["base"]["head"] == "fit"),
        "",
        "The settings, with all defaults:",
        "",
        *_indented(yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)),
    ]
    return "\n".join(lines) + "\n"


def _indented(text: str) -> list[str]:
    """A block of code that nothing inside of it can end."""
    return [f"    {printable(line)}" for line in text.splitlines()]


def _metric_table(metrics: Mapping[str, Any]) -> list[str]:
    lines = ["| split | metric | before the merge | after the merge |", "| --- | --- | --- | --- |"]
    for split, found in metrics["before_merge"].items():
        for name, value in found.items():
            merged = metrics["after_merge"].get(split, {})
            after = ", ".join(f"{kinds[name]:.2f} ({estimator})" for estimator, kinds in merged.items())
            lines.append(f"| {split} | {name} | {value:.2f} | {after or '-'} |")
    return lines


def _files(metrics: Mapping[str, Any], fitted_head: bool) -> list[str]:
    lines = [
        '- `adapter`: as trained, with the tokenizer; `PeftModel.from_pretrained(base, "adapter")` after '
        "`import peft_reslora`.",
        "- `metrics.json`, `config.yaml`, `run.json`: all numbers, the settings, and versions and checksums.",
        "- `method_comparison.json`: the result in the form of PEFT's comparison of methods.",
    ]
    if fitted_head:
        lines.append(
            "- `base`: the base with the head that was fitted before training; load the adapter onto this one."
        )
    if metrics["generated"] is not None:
        lines.append("- `images.png`: what the model draws at the start and after each quarter of the steps.")
    export = metrics["export"]
    if export and "refused" in export:
        lines.append(f"- No LoRA export: {code(export['refused'])}")
    elif export:
        how = "exact" if export["exact"] else f"largest relative error of a layer {export['worst_relative_error']:.1e}"
        lines.append(f"- `lora`: a standard LoRA ({how}); loads where this plugin is not installed.")
    return lines
