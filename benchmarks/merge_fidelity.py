"""What merging costs: every estimator and annealing, on trained adapters, before and after the merge.

    python benchmarks/merge_fidelity.py --data DATA --tasks sst2 cola math --seeds 0 1 2

DATA holds sst2/{train,dev}.tsv and cola/{train,dev}.tsv (sentence, label), gsm8k/train.jsonl (question, answer) and
svamp/svamp.jsonl (Body, Question, Answer). sst2 and cola: all-MiniLM-L6-v2 with a linear head fitted to 1000 texts.
math: a small Llama on bytes, trained on GSM8K first, its adapters on SVAMP. The annealed adapter shares the first two
thirds of its training with the other one, batches and optimizer state included. Calibration takes 512 training texts
that the adapter has not seen (math: those it has seen). Prints a table, with times of the process, on one thread; adds
a JSON line per adapter to OUT.jsonl, so that runs can be made one by one, and writes the table of all to OUT.md.
"""

from __future__ import annotations

import copy
import csv
import itertools
import json
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS, llama, new_parser, parse, write_json
from peft import get_peft_model
from torch import nn

from peft_reslora import ResLoRAConfig
from peft_reslora.recipes.minilm import build_base, find_weights, load_base
from peft_reslora.reslora import calibrate_merge
from peft_reslora.reslora.config import Shortcut
from peft_reslora.training import anneal_shortcuts, annealed_share

VARIANTS: dict[str, tuple[Shortcut, int]] = {
    "input": ("input", 1),
    "middle, m=1": ("middle", 1),
    "middle, m=all": ("middle", -1),
}
ESTIMATORS = ("drop", "input_norm", "weight_norm", "least_squares")
RANK, BATCH, RATE, CALIBRATION = 8, 16, 1e-3, 512
ANNEAL_FROM, ANNEAL_TO = 2 / 3, 0.9

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Task:
    """A base model and the batches to train on, to calibrate on and to measure on."""

    base: nn.Module
    targets: str | list[str]
    train: Callable[[int, int], list[Batch]]
    calibration: list[Batch]
    dev: list[Batch]


def classification(folder: Path, scratch: Path) -> Task:
    def read(name: str) -> tuple[list[str], list[int]]:
        with (folder / f"{name}.tsv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
        random.Random(0).shuffle(rows)
        return [row[0] for row in rows], [int(row[1]) for row in rows]

    (texts, labels), dev = read("train"), read("dev")
    build_base(find_weights(), texts[:1000], labels[:1000], ["0", "1"], scratch)
    base, tokenizer = load_base(scratch)

    def batches(texts: list[str], labels: list[int], size: int) -> list[Batch]:
        parts = [(texts[i : i + size], labels[i : i + size]) for i in range(0, len(texts), size)]
        encoded = [dict(tokenizer(t, truncation=True, padding=True, return_tensors="pt")) for t, _ in parts]
        return [{**batch, "labels": torch.tensor(y)} for batch, (_, y) in zip(encoded, parts, strict=True)]

    seen = slice(0, len(texts) - CALIBRATION)
    targets = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]

    def train(steps: int, seed: int) -> list[Batch]:
        rows = random.Random(seed).sample(list(zip(texts[seen], labels[seen], strict=True)), steps * BATCH)
        return batches([text for text, _ in rows], [label for _, label in rows], BATCH)

    return Task(base, targets, train, batches(texts[seen.stop :], labels[seen.stop :], BATCH), batches(*dev, 64))


def language_modeling(data: Path, steps: int = 600, length: int = 128) -> Task:
    def rows_of(path: Path, text: Callable[[dict[str, Any]], str]) -> torch.Tensor:
        lines = path.read_text(encoding="utf-8").splitlines()
        stream = b"\0".join(text(json.loads(line)).encode() for line in lines)
        return torch.tensor(list(stream[: len(stream) // length * length])).view(-1, length)

    gsm8k = rows_of(data / "gsm8k/train.jsonl", lambda row: f"{row['question']}\n{row['answer']}")
    svamp = rows_of(data / "svamp/svamp.jsonl", lambda row: f"{row['Body']} {row['Question']}\n{row['Answer']}")
    base = llama(128, 8, vocab=256, heads=4, kv_heads=4, intermediate_size=344)

    def batches(rows: torch.Tensor, size: int = BATCH) -> list[Batch]:
        return [{"input_ids": part, "labels": part} for part in rows.split(size)]

    def sample(rows: torch.Tensor, steps: int, seed: int) -> list[Batch]:
        choice = torch.randint(len(rows), (steps * BATCH,), generator=torch.Generator().manual_seed(seed))
        return batches(rows[choice])

    for _ in fit(base, sample(gsm8k, steps, 0), 1e-3):
        pass
    part = len(svamp) * 3 // 4
    train, dev = svamp[:part], svamp[part:][:256]
    return Task(base, "all-linear", lambda n, seed: sample(train, n, seed), batches(train[:CALIBRATION]), batches(dev))


def fit(model: nn.Module, batches: list[Batch], rate: float = RATE, state: Any = None) -> Iterator[tuple[int, Any]]:
    """Train; yields before each step its number and the optimizer's state."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    first = 0
    if state is not None:
        first, saved = state
        optimizer.load_state_dict(saved)
    for step in range(first, len(batches)):
        yield step, optimizer.state_dict()
        warmup, left = (step + 1) / (len(batches) / 20), (len(batches) - step) / len(batches)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(warmup, left)
        model.train()
        model(**batches[step]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def predictions(model: nn.Module, batches: list[Batch]) -> torch.Tensor:
    """Log-probabilities `(outputs, classes)`; of the next byte for language models."""
    model.eval()
    logits = [model(**batch).logits for batch in batches]
    logits = [part[:, :-1].flatten(0, 1) if part.ndim == 3 else part for part in logits]
    return torch.cat(logits).double().log_softmax(-1)


def compare(unmerged: torch.Tensor, merged: torch.Tensor, batches: list[Batch]) -> dict[str, float]:
    labels = [batch["labels"] for batch in batches]
    target = torch.cat([part[:, 1:].flatten() if part.ndim == 2 else part for part in labels])
    return {
        "kl": float(F.kl_div(merged, unmerged, log_target=True, reduction="batchmean")),
        "kept": float((merged.argmax(-1) == unmerged.argmax(-1)).double().mean()),
        "before": float((unmerged.argmax(-1) == target).double().mean()),
        "after": float((merged.argmax(-1) == target).double().mean()),
    }


def run(task: Task, variant: str, steps: int, seed: int) -> dict[str, Any]:
    """Train one adapter, and its annealed twin; merge both in every way."""
    torch.manual_seed(seed)
    shortcut, pre_num = VARIANTS[variant]
    config = ResLoRAConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=task.targets, shortcut=shortcut, pre_num=pre_num
    )
    model = get_peft_model(copy.deepcopy(task.base), config)
    batches = task.train(steps, seed)
    fork: Any = None
    begin = time.process_time()
    for step, state in fit(model, batches):
        if fork is None and annealed_share((step + 1) / steps, ANNEAL_FROM, ANNEAL_TO) > 0.0:
            fork = copy.deepcopy(model), (step, copy.deepcopy(state))
    epoch = (time.process_time() - begin) / steps * len(task.calibration)

    unmerged = predictions(model, task.dev)
    begin = time.process_time()
    fits = calibrate_merge(model, task.calibration)
    result: dict[str, Any] = {"epoch_s": epoch, "calibration_s": time.process_time() - begin}
    result["residual"] = statistics.median(layer.error for layer in fits.values())
    adapter: Any = model.peft_config["default"]
    for estimator in ESTIMATORS:
        adapter.merge_estimator = estimator
        merged = copy.deepcopy(model).merge_and_unload()
        result[estimator] = compare(unmerged, predictions(merged, task.dev), task.dev)

    twin, state = fork
    for step, _ in fit(twin, batches, state=state):
        anneal_shortcuts(twin, annealed_share((step + 1) / steps, ANNEAL_FROM, ANNEAL_TO), batches=task.calibration)
    unmerged = predictions(twin, task.dev)
    result["annealed"] = compare(unmerged, predictions(twin.merge_and_unload(), task.dev), task.dev)
    return result


def table(records: list[dict[str, Any]]) -> str:
    """Mean over the seeds, with the lowest and highest KL."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        groups[record["task"], record["variant"]].append(record)
    lines = [
        "| task | shortcut | merge | KL, mean (lowest-highest) | same top-1, % | accuracy before, % | after, % |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    notes = []
    for (task, variant), runs in groups.items():
        kl = {name: statistics.fmean(run[name]["kl"] for run in runs) for name in (*ESTIMATORS, "annealed")}
        for name in kl:
            values = [run[name]["kl"] for run in runs]
            kept, before, after = (
                100 * statistics.fmean(r[name][k] for r in runs) for k in ("kept", "before", "after")
            )
            spread = f"{kl[name]:.1e} ({min(values):.1e}-{max(values):.1e})"
            lines.append(f"| {task} | {variant} | {name} | {spread} | {kept:.1f} | {before:.1f} | {after:.1f} |")
        better = min(kl["input_norm"], kl["weight_norm"])
        seconds, epoch = (statistics.fmean(run[k] for run in runs) for k in ("calibration_s", "epoch_s"))
        notes.append(
            f"- {task}, {variant}, {len(runs)} seed(s): least_squares has 1/{better / kl['least_squares']:.1f} of the "
            f"KL of the better norm; calibrated in {seconds:.0f} s, a training epoch over the same texts takes "
            f"{epoch:.0f} s; median residual of the regression {statistics.fmean(r['residual'] for r in runs):.2f}."
        )
    return "\n".join([*lines, "", *notes, ""])


def make_up_data(folder: Path) -> None:
    """Files of sums, for the task math, to see that all of this runs."""
    draw = random.Random(0)
    lines = []
    for _ in range(200):
        a, b = draw.randrange(100), draw.randrange(100)
        question, answer = f"What is {a} + {b}?", str(a + b)
        row = {"Body": "A sum.", "Question": question, "Answer": answer, "question": question, "answer": answer}
        lines.append(json.dumps(row))
    for file in (folder / "gsm8k/train.jsonl", folder / "svamp/svamp.jsonl"):
        file.parent.mkdir(parents=True)
        file.write_text("\n".join(lines), encoding="utf-8")


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tasks", nargs="+", choices=["sst2", "cola", "math"], default=["sst2", "cola", "math"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200, help="of the adapter's training")
    parser.add_argument("--base-steps", type=int, default=600, help="of the training of math's base model")
    parser.add_argument("--out", type=Path, default=RESULTS / "merge_fidelity", help="with --quick none")
    quick = {"tasks": ["math"], "variants": ["input"], "seeds": [0], "steps": 6, "base_steps": 2, "out": None}
    options = parse(parser, quick)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        if options.data is None and not options.quick:
            parser.error("--data is needed, unless --quick is given")
        if (data := options.data) is None:
            make_up_data(data := Path(scratch) / "made_up")
        records = []
        for name in options.tasks:
            if name == "math":
                task = language_modeling(data, options.base_steps)
            else:
                task = classification(data / name, Path(scratch) / name)
            for seed, variant in itertools.product(options.seeds, options.variants):
                record = {"task": name, "variant": variant, "seed": seed, "steps": options.steps}
                records.append(record | run(task, variant, options.steps, seed))
                print(json.dumps(records[-1]), flush=True)
                if options.out is not None:
                    add_to(options.out, records[-1])
    print(table(records))
    write_json(options, records)


def add_to(out: Path, record: dict[str, Any]) -> None:
    """Append to the log of all runs, and write the table of it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    log = out.with_suffix(".jsonl")
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    out.with_suffix(".md").write_text(table(records), encoding="utf-8")


if __name__ == "__main__":
    main()
