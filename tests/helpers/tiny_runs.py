"""Settings of runs that take seconds: a tiny BERT built in code, and films that are good or bad."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from peft_reslora.experiments import training

GOOD, BAD = ["good", "great", "lovely", "fine"], ["bad", "awful", "dull", "poor"]


def write_films(folder: Path, rows: int = 160) -> Path:
    """train.tsv and test.tsv with the columns `sentence` and `label`, and `score`, a float."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for name, count in (("train", rows), ("test", rows // 4)):
        lines = ["sentence\tlabel\tscore"]
        for _ in range(count):
            label = draw.randrange(2)
            words = [draw.choice(["film", "plot", "cast"]), *draw.choices((BAD, GOOD)[label], k=3)]
            lines.append(f"{' '.join(words)}\t{label}\t{label + draw.random() / 10:.3f}")
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def tiny_run(folder: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A training run's settings, as a YAML file would hold them."""
    settings: dict[str, Any] = {
        "task": "classification",
        "base": {
            "config": "bert",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "vocabulary": 300,
            "head": "fit",
            "head_rows": 32,
        },
        "data": {
            "folder": str(folder),
            "files": {"train": "train.tsv", "test": "test.tsv"},
            "text": ["sentence"],
            "label": "label",
            "validation_rows": 40,
            "max_length": 16,
        },
        "tuner": {
            "peft_type": "RESLORA",
            "r": 2,
            "lora_alpha": 4,
            "lora_dropout": 0.1,
            "target_modules": ["query", "value"],
            "shortcut": "middle",
        },
        "training": {"max_steps": 10, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "use_cpu": True},
        "calibration_rows": 16,
        "output_dir": str(output),
    }
    return {**settings, **changes}


def write_sums(folder: Path) -> Path:
    """sums.jsonl, where Tom gets more of what he has."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    rows = []
    for _ in range(120):
        a, b = draw.randrange(10), draw.randrange(10)
        rows.append(
            {"body": f"Tom has {a}", "question": f"He gets {b} more", "equation": f"{a} + {b}", "answer": a + b}
        )
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "sums.jsonl").write_text(text, encoding="utf-8")
    return folder


def tiny_generation(sums: Path, output: Path) -> dict[str, Any]:
    """A run of generation on a tiny Llama, which is pretrained for three steps."""
    return tiny_run(
        sums,
        output,
        task="generation",
        base={
            "config": "llama",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "vocabulary": 300,
            "pretrain": {
                "sources": [{"text": "{body} {question} {equation}", "file": "sums.jsonl"}],
                "folder": str(sums),
                "steps": 3,
                "length": 32,
            },
        },
        data={
            "folder": str(sums),
            "files": {"train": "sums.jsonl"},
            "text": ["body", "question"],
            "label": "equation",
            "answer": "answer",
            "validation_rows": 10,
            "test_rows": 20,
            "max_length": 48,
            "new_tokens": 6,
        },
        tuner={"peft_type": "RESLORA", "r": 2, "target_modules": "all-linear", "shortcut": "block"},
    )


def tiny_comparison(data: Path, output: Path) -> dict[str, Any]:
    """A comparison's settings: LoRA, a ResLoRA, and a DoRA that cannot have as many parameters."""
    run = tiny_run(data, output)
    for name in ("tuner", "output_dir"):
        del run[name]
    run["training"] = {"max_steps": 4, "per_device_train_batch_size": 8, "use_cpu": True}
    tuner = {"r": 2, "lora_alpha": 4}
    return {
        **run,
        "title": "Films",
        "tuner": {"target_modules": ["query", "value"]},
        "methods": {
            "LoRA": {"tuner": {"peft_type": "LORA", **tuner}},
            "ResLoRA": {"tuner": {"peft_type": "RESLORA", **tuner, "shortcut": "input"}},
            "DoRA": {"tuner": {"peft_type": "LORA", **tuner, "use_dora": True}},
        },
        "reference": "LoRA",
        "rates": {"lowest": 1e-3, "highest": 3.2e-3},
        "seeds": [0, 1, 2],
        "cost_pairs": 1,
        "output_dir": str(output),
    }


def read_metrics(folder: Path) -> dict[str, Any]:
    """What a run measured, without what no two runs share."""
    metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return {name: value for name, value in metrics.items() if name != "train_seconds"}


class Killed(BaseException):
    """Stands for a signal that a process does not survive."""


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> type[BaseException]:
    """Let a training end without any more ado after a step, by the exception that is returned."""
    original = training._TaskLoss.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        original(self, args, state, control, **kwargs)
        if state.global_step == step:
            raise Killed

    monkeypatch.setattr(training._TaskLoss, "on_step_end", on_step_end)
    return Killed
