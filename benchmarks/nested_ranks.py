"""Quality against rank: one training with nested ranks against one training for each rank.

    python benchmarks/nested_ranks.py --data DATA            # one core, some minutes
    python benchmarks/nested_ranks.py --quick                # to see that it runs, on made-up data

DATA holds gsm8k/train.jsonl and svamp/svamp.jsonl. A small Llama on bytes, of 3 blocks and hidden size 64, is trained
on GSM8K's text; adapters on all of its 21 linear layers are trained on SVAMP's, all on the same batches with the same
alpha, learning rate and number of steps. Loss of the next byte on other rows, in nats, at each rank b of

    each       an adapter of rank b, trained by itself
    nested     the first b directions of one adapter, in whose training ranks were drawn from 1 to the largest
    last only  the same, where only direction b is trained in a step
    svd        the adapter of the largest rank that was trained by itself, truncated by export_lora(rank=b)
    first      the first b directions of that same adapter, which no training has put in order

without a shortcut (the chains are cut at each block), with 'block' and 'middle'. Of 'block', rank b of svd is that of
the sum over two layers; 'middle' has no svd, since its export is an estimate, whose error would be in the numbers.
Writes OUT.jsonl, OUT.md and OUT.png; --json as well, as all benchmarks do.
"""

from __future__ import annotations

import copy
import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import PALETTE, RESULTS, new_figure, new_parser, parse, save_figure, write_json
from dropped_layers import small_task
from merge_fidelity import BATCH, Task, fit, make_up_data, predictions
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from torch import nn

from peft_reslora import ResLoRAConfig, export_lora
from peft_reslora.training import OneDirection, draw_rank, rank_in_use, set_rank

SHORTCUTS = ("none", "block", "middle")
SERIES = ("each", "nested", "last only", "svd", "first")
ALPHA, LAYERS = 16, 3
Losses = dict[int, float]  # by rank


def adapted(task: Task, shortcut: str, rank: int) -> Any:
    base: Any = task.base
    cuts = [f"model.layers.{n}" for n in range(1, base.config.num_hidden_layers)]
    config = ResLoRAConfig(
        r=rank,
        lora_alpha=ALPHA,
        target_modules=task.targets,
        shortcut="middle" if shortcut == "middle" else "block",
        chain_cuts=cuts if shortcut == "none" else None,
        nested_ranks=True,
    )
    return get_peft_model(copy.deepcopy(base), config)


def loss_of(model: nn.Module, task: Task) -> float:
    """Nats per byte."""
    labels = torch.cat([batch["labels"][:, 1:].flatten() for batch in task.dev])
    return float(-predictions(model, task.dev).gather(1, labels[:, None]).mean())


def by_rank(model: nn.Module, task: Task, ranks: Sequence[int]) -> Losses:
    losses = {}
    for rank in ranks:
        with rank_in_use(model, rank):
            losses[rank] = loss_of(model, task)
    return losses


def exported(model: nn.Module, task: Task, ranks: Sequence[int]) -> Losses:
    """Of the LoRAs that a fit to the whole update gives."""
    model.peft_config["default"].nested_ranks = False  # type: ignore[union-attr, index]
    losses = {}
    for rank in ranks:
        lora = export_lora(model, rank=rank)
        plain: Any = PeftModel(copy.deepcopy(task.base), lora.config)
        set_peft_model_state_dict(plain, lora.state_dict)
        losses[rank] = loss_of(plain, task)
    return losses


def train(task: Task, shortcut: str, rank: int, nested: str, steps: int, seed: int) -> Any:
    torch.manual_seed(seed)
    model = adapted(task, shortcut, rank)
    only = OneDirection(model) if nested == "last only" else None
    for step, _ in fit(model, task.train(steps, seed)):
        if nested:
            drawn = draw_rank(range(1, rank + 1), seed, step)
            set_rank(model, drawn)
            if only is not None:
                only.set(drawn)
    set_rank(model, None)
    if only is not None:
        only.remove()
    return model


def run(task: Task, shortcut: str, ranks: Sequence[int], steps: int, seed: int) -> Iterator[dict[str, Any]]:
    def record(series: str, losses: Losses) -> dict[str, Any]:
        return {"method": shortcut, "series": series, "seed": seed, "steps": steps, "losses": losses}

    alone = {rank: train(task, shortcut, rank, "", steps, seed) for rank in ranks}
    yield record("each", {rank: loss_of(model, task) for rank, model in alone.items()})
    for kind in ("nested", "last only"):
        yield record(kind, by_rank(train(task, shortcut, ranks[-1], kind, steps, seed), task, ranks))
    yield record("first", by_rank(alone[ranks[-1]], task, ranks))
    if shortcut != "middle":
        yield record("svd", exported(alone[ranks[-1]], task, ranks))


def means(records: list[dict[str, Any]], shortcut: str, series: str) -> dict[int, list[float]]:
    """Of each rank the losses of all seeds."""
    found: dict[int, list[float]] = {}
    for record in records:
        if (record["method"], record["series"]) == (shortcut, series):
            for rank, loss in record["losses"].items():
                found.setdefault(rank, []).append(loss)
    return found


def table(records: list[dict[str, Any]], ranks: Sequence[int], base: float) -> str:
    """Means over the seeds, and how far the seeds lie apart."""
    head = ["shortcut", "series", *(f"rank {rank}" for rank in ranks)]
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join(['---'] * len(head))} |"]
    for shortcut in SHORTCUTS:
        for series in SERIES:
            if losses := means(records, shortcut, series):
                ranges = [f" ({max(of) - min(of):.3f})" if len(of) > 1 else "" for of in losses.values()]
                cells = [f"{statistics.fmean(of):.3f}{r}" for of, r in zip(losses.values(), ranges, strict=True)]
                lines.append(f"| {shortcut} | {series} | {' | '.join(cells)} |")
    seeds, steps = len({r["seed"] for r in records}), records[0]["steps"]
    note = f"{steps} steps of {BATCH} rows, {seeds} seed(s); of several in brackets the highest less the lowest. "
    return "\n".join([*lines, "", f"{note}Without any adapter: {base:.3f}.", ""])


def plot(records: list[dict[str, Any]], ranks: Sequence[int], path: Path) -> None:
    """One panel per shortcut, one line per series: the mean over the seeds, and their range."""
    shown = [shortcut for shortcut in SHORTCUTS if means(records, shortcut, "each")]
    figure, panels = new_figure(len(shown), width=4.6, height=4.2)
    top = 0.0
    for axes, shortcut in zip(panels, shown, strict=True):
        for series, color in zip(SERIES, PALETTE, strict=False):
            if not (losses := means(records, shortcut, series)):
                continue
            mean = [statistics.fmean(of) for of in losses.values()]
            top = max(top, *mean) if series in ("each", "nested", "last only") else top
            places = range(len(ranks))
            lowest, highest = ([pick(of) for of in losses.values()] for pick in (min, max))
            axes.fill_between(places, lowest, highest, color=color, alpha=0.2)
            axes.plot(places, mean, color=color, linewidth=2, marker="o", markersize=4, label=series)
        axes.set(title=f"shortcut: {shortcut}", xlabel="rank", xticks=range(len(ranks)), xticklabels=ranks)
    panels[0].set_ylabel("loss of the next byte (nats)")
    panels[0].legend(frameon=False, fontsize=9)
    low = min(min(of) for s in shown for k in SERIES for of in means(records, s, k).values())
    panels[0].set_ylim(low - 0.01, top + (top - low) * 0.6)
    figure.suptitle("One training with nested ranks, against one for each rank")
    save_figure(figure, path)


def write(records: list[dict[str, Any]], args: Any, base: float) -> None:
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records))
    args.out.with_suffix(".md").write_text(table(records, args.ranks, base), encoding="utf-8")
    plot(records, args.ranks, args.out.with_suffix(".png"))


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--data", type=Path, help="folder of the texts; with --quick not needed")
    parser.add_argument("--shortcuts", nargs="+", choices=SHORTCUTS, default=list(SHORTCUTS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4, 8], help="ascending")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--base-steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=RESULTS / "nested_ranks", help="with --quick none")
    quick = {"steps": 4, "shortcuts": ["block"], "ranks": [1, 2], "base_steps": 4, "out": None}
    args = parse(parser, quick)
    if args.data is None and not args.quick:
        parser.error("--data is needed, unless --quick is given")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        if (data := args.data) is None:
            make_up_data(data := Path(scratch) / "made_up")
        task = small_task(data, args.base_steps, layers=LAYERS)
    base = loss_of(task.base, task)
    records: list[dict[str, Any]] = []
    for seed in args.seeds:
        for shortcut in args.shortcuts:
            for record in run(task, shortcut, args.ranks, args.steps, seed):
                records.append(record)
                print(json.dumps(record), flush=True)
                if args.out is not None:
                    write(records, args, base)
    print(table(records, args.ranks, base))
    write_json(args, records)


if __name__ == "__main__":
    main()
