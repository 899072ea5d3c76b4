"""The quickstart: LoRA and ResLoRA side by side on real text, then the proof that the export is a standard LoRA."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import logging as transformers_logging

from peft_reslora.export import save_as_lora
from peft_reslora.recipes import use_lora
from peft_reslora.recipes.minilm import build_base, encode, find_weights, load_base, predict
from peft_reslora.recipes.plots import plot_losses
from peft_reslora.recipes.stdlib_docstrings import Split, load_split
from peft_reslora.recipes.training import RANK, TARGET_MODULES, Run, Task, tabulate, train_both
from peft_reslora.reslora.config import Shortcut
from peft_reslora.shared.plots import require_matplotlib
from peft_reslora.shared.tables import format_table

# Merging adds B A to W before the product with x instead of after it, which in float32 moves the logits by about 1e-6
# of their size; a wrong scaling, rank or layer moves them by more than 1e-2. The limit is far from both.
LARGEST_RELATIVE_DIFFERENCE = 1e-4

_MARKER = "quickstart.json"
_MADE_BY = "peft-reslora quickstart"
_WRITTEN = {
    "loss.png": "both loss curves",
    "reslora": "the ResLoRA adapter as trained; loads after `import peft_reslora`",
    "lora": "the same as a standard LoRA; loads wherever LoRA does",
    "base": "the base model, for both",
    "use_lora.py": "loads base and lora with plain PEFT: what the check ran",
    "test.json": "the test texts",
    _MARKER: "settings and all numbers",
}


@dataclass(frozen=True)
class Difference:
    """Largest difference between two sets of logits, and its ratio to the largest of the reference's."""

    absolute: float
    relative: float

    @classmethod
    def between(cls, logits: Tensor, reference: Tensor) -> Difference:
        absolute = (logits - reference).abs().max().item()
        return cls(absolute, absolute / reference.abs().max().item())

    def __str__(self) -> str:
        return f"{self.absolute:.1e} (relative {self.relative:.1e})"


@dataclass(frozen=True)
class Proof:
    """How well merging and exporting kept what was trained, on all test texts."""

    merge: Difference
    export: Difference
    accuracy: float
    merged_accuracy: float

    def failures(self, merge_is_exact: bool) -> list[str]:
        """Name the differences that rounding does not explain. NaN is one of them."""
        exact = {"export": self.export} | ({"merge": self.merge} if merge_is_exact else {})
        return [name for name, difference in exact.items() if not difference.relative <= LARGEST_RELATIVE_DIFFERENCE]


def run_quickstart(out: Path, shortcut: Shortcut, steps: int, seed: int, say: Callable[[str], None] = print) -> bool:
    """Train, merge, export and check, and tell `say` about it.

    Args:
        out: folder to write to: a new or empty one, or an earlier quickstart's, which is replaced.
        shortcut: ResLoRA's shortcut.
        steps: training steps per method.
        seed: of the adapters' initialization, the dropout and the order of the data.
        say: gets each paragraph of the report.

    Returns:
        Whether the exported LoRA computes what the merged model does, and for `block` the merged what the unmerged.

    Raises:
        ValueError: if `steps` is not positive, `out` holds something else, or data or base are not to be had.
        ImportError: if matplotlib is missing.
    """
    if steps < 1:
        raise ValueError(f"--steps {steps}: at least one training step is needed")
    require_matplotlib()
    split, weights = load_split(), find_weights()
    prepare_folder(out)
    _quieten_transformers()
    say(f"About {round((40 + 0.6 * steps) / 60) or 1} min on two CPU cores.")
    task = _prepare_task(out, split, weights, say)
    runs = train_both(task, shortcut, steps, seed, say)

    window = max(1, steps // 10)
    table = tabulate(runs, task, window)
    say("\n" + "\n".join(format_table(table)))
    say(f"Losses: mean of the last {window} steps; s/step: the fastest, which other programs disturbed least.")
    say("One seed on a small task: a demonstration, no benchmark.")
    losses = {run.method: run.losses for run in runs}
    plot_losses(losses, out / "loss.png", f"all-MiniLM-L6-v2 on standard-library docstrings, r = {RANK}", window)

    proof = _merge_and_export(runs[-1], task, out)
    merge_is_exact = shortcut == "block"
    say(_describe(proof, merge_is_exact))
    results = {
        "made_by": _MADE_BY,
        "settings": {"shortcut": shortcut, "steps": steps, "seed": seed, "r": RANK, "target_modules": TARGET_MODULES},
        "table": [dict(zip(table[0], row, strict=True)) for row in table[1:]],
        "proof": dataclasses.asdict(proof),
        "losses": losses,
    }
    (out / _MARKER).write_text(json.dumps(results, indent=1), encoding="utf-8")
    width = max(len(str(out / name)) for name in _WRITTEN)
    say("\nWritten:\n" + "\n".join(f"  {out / name!s:<{width}}  {what}" for name, what in _WRITTEN.items()))
    return not proof.failures(merge_is_exact)


def prepare_folder(out: Path) -> None:
    """Make `out` ready: create it, or empty it of what an earlier quickstart wrote, and leave the marker.

    Raises:
        ValueError: if `out` is a file, or holds something and no quickstart's marker.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; name a folder with --out")
    if out.is_dir() and any(out.iterdir()) and not _is_quickstart(out):
        raise ValueError(f"{out} is not empty and not from an earlier quickstart; name another folder with --out")
    for path in (out / name for name in _WRITTEN):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARKER).write_text(json.dumps({"made_by": _MADE_BY}), encoding="utf-8")


def _is_quickstart(out: Path) -> bool:
    try:
        return json.loads((out / _MARKER).read_text(encoding="utf-8")).get("made_by") == _MADE_BY
    except (OSError, ValueError, AttributeError):
        return False


def _quieten_transformers() -> None:
    """Silence loading bars and reports; what matters is said by the quickstart. Training bars stay."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _prepare_task(out: Path, split: Split, weights: Path, say: Callable[[str], None]) -> Task:
    """Build and save the base and the test texts."""
    say(
        f"Task: which of {len(split.labels)} packages of Python's standard library does a docstring belong to? (Their "
        f"names are masked.)\n      {len(split.train)} to train on, {len(split.test)} from other files to test on."
    )
    say("Base: all-MiniLM-L6-v2, fitting a linear head to its features ...")
    texts, targets = [docstring.text for docstring in split.train], split.targets(split.train)
    build_base(weights, texts, targets, split.labels, out / "base")
    model, tokenizer = load_base(out / "base")
    columns = encode(tokenizer, texts) | {"labels": torch.tensor(targets)}
    test_texts, test_targets = [docstring.text for docstring in split.test], split.targets(split.test)
    (out / "test.json").write_text(json.dumps({"texts": test_texts, "targets": test_targets}), encoding="utf-8")
    task = Task(
        base=out / "base",
        train=[{name: column[i] for name, column in columns.items()} for i in range(len(texts))],
        test=encode(tokenizer, test_texts),
        test_targets=torch.tensor(test_targets),
    )
    say(f"      its test accuracy is {task.accuracy(predict(model, task.test)):.1f} %.")
    return task


def _merge_and_export(run: Run, task: Task, out: Path) -> Proof:
    """Save the adapter, merge a copy, export, and compare what the three compute."""
    run.model.save_pretrained(str(out / "reslora"))
    with warnings.catch_warnings():
        # Here the base is a local folder, which a published adapter should not name.
        warnings.filterwarnings("ignore", message=".*local path")
        save_as_lora(out / "lora", run.model)
    merged = predict(copy.deepcopy(run.model).merge_and_unload(), task.test)
    exported = predict_in_plain_peft(out)
    return Proof(
        merge=Difference.between(merged, run.logits),
        export=Difference.between(exported, merged),
        accuracy=task.accuracy(run.logits),
        merged_accuracy=task.accuracy(merged),
    )


def predict_in_plain_peft(out: Path) -> Tensor:
    """Return the test logits that `use_lora.py` computes in a new Python process, which never imports this package.

    Raises:
        RuntimeError: if that process fails, with what it wrote.
    """
    script = out / "use_lora.py"
    shutil.copyfile(use_lora.__file__, script)
    with tempfile.TemporaryDirectory() as scratch:
        logits = Path(scratch) / "logits.safetensors"
        command = [sys.executable, str(script), str(logits)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed with exit code {done.returncode}:\n{done.stderr}")
        return load_file(logits)["logits"]


def _describe(proof: Proof, merge_is_exact: bool) -> str:
    kind = "exact but for rounding" if merge_is_exact else "an estimate with this shortcut"
    failures = proof.failures(merge_is_exact)
    verdict = f"FAILED for {' and '.join(failures)}" if failures else "passed"
    return (
        f"\nMerge ({kind}): merged against unmerged ResLoRA\n"
        f"  largest logit difference {proof.merge}\n"
        f"  test accuracy {proof.accuracy:.1f} % unmerged, {proof.merged_accuracy:.1f} % merged\n"
        "Export: standard LoRA, loaded by plain PEFT in a new process without peft_reslora, against merged\n"
        f"  largest logit difference {proof.export}\n"
        f"Check (relative difference at most {LARGEST_RELATIVE_DIFFERENCE:.0e}): {verdict}"
    )
