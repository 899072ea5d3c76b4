"""How large the gradients of A and B are in each block, under LoRA and under ResLoRA's shortcuts.

    python benchmarks/gradients.py --text gsm8k/train.jsonl svamp/svamp.jsonl --layers 6

ResLoRA (arXiv 2402.18039, section 1) is built on this: without shortcuts, gradients pass through many blocks on their
way to the earlier ones, which get too little of them. Here a small Llama on bytes learns the first file of `--text`
and is frozen; adapters on its query and value projections then learn the others, with the same rows in the same order
and the same factors at the start for all methods of a seed. The gradient is that of the mean loss over rows that are
held out, in which the loss is measured too. Of each block the norm is that of A (or B) of both its layers together.

Compared are two things. At equal weights: every method is given the factors that LoRA had at this step, so that only
the shortcuts differ, in what is computed and in how gradients come back. Along its own way: each with the factors that
it came to. B is zero at the start, so that A has no gradient at step 0, and all methods compute what the base does.

Adds a JSON line for every run to OUT.jsonl, so that depths, seeds and rates can be run one by one, and writes OUT.md
and OUT_LAYERS.png of all of them. A seed at one rate takes about a minute on one free core with 6 layers, with 32
three.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import PALETTE, RESULTS, llama, new_figure, new_parser, parse, read_text, save_figure, twin, write_json
from merge_fidelity import Batch, fit
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn

from peft_reslora import ResLoRAConfig
from peft_reslora.experiments.statistics import paired_difference
from peft_reslora.reslora.config import Shortcut

LORA = "LoRA"
SHORTCUTS: dict[str, tuple[Shortcut, int]] = {
    "input": ("input", 1),
    "block, m=1": ("block", 1),
    "block, m=all": ("block", -1),
    "middle, m=1": ("middle", 1),
    "middle, m=all": ("middle", -1),
}
METHODS = (LORA, *SHORTCUTS)
FACTORS = ("A", "B")
TARGETS = ["q_proj", "v_proj"]
BATCH, LENGTH = 4, 64
QUICK = {
    "text": [Path(__file__)] * 2,
    "layers": [3],
    "steps": 4,
    "base_steps": 2,
    "seeds": [0],
    "probe": 8,
    "out": None,
}

Norms = dict[str, list[list[float]]]  # of A and B, by moment and block
Factors = dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """A frozen base, the rows to train on, and those to measure on, each `(rows, LENGTH)`."""

    base: nn.Module
    rows: Tensor
    probe: Batch

    def batches(self, steps: int, seed: int) -> list[Batch]:
        choice = torch.randint(len(self.rows), (steps * BATCH,), generator=torch.Generator().manual_seed(seed))
        return [as_batch(part) for part in self.rows[choice.to(self.rows.device)].split(BATCH)]


def as_batch(rows: Tensor) -> Batch:
    return {"input_ids": rows, "labels": rows}


def make_task(options: argparse.Namespace, layers: int) -> Task:
    """The base after its training on the first file; of the others' rows, the first are held out."""
    texts = [read_text(options.text[:1]), read_text(options.text[1:])]
    first, rows = (text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH).to(options.device) for text in texts)
    base = llama(options.hidden, layers, vocab=256, heads=4, kv_heads=4).to(options.device)
    for _ in fit(base, Task(base, first, {}).batches(options.base_steps, seed=0), 2e-3):
        pass
    return Task(base.requires_grad_(False), rows[options.probe :], as_batch(rows[: options.probe]))


def config_of(method: str, rank: int) -> PeftConfig:
    if method == LORA:
        return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS)
    shortcut, pre_num = SHORTCUTS[method]
    return ResLoRAConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, shortcut=shortcut, pre_num=pre_num)


def moments(steps: int) -> list[int]:
    """After how many steps gradients are looked at."""
    return sorted({0, 1, steps // 2, steps})


def factors_of(model: nn.Module) -> Factors:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def give(model: nn.Module, factors: Factors) -> None:
    for name, value in factors.items():
        model.get_parameter(name).copy_(value)


def look(model: nn.Module, probe: Batch, layers: int) -> tuple[float, dict[str, list[float]]]:
    """The loss, and the norms of its gradient by block; no gradient is left."""
    loss = model(**probe).loss
    loss.backward()
    squares = {factor: [0.0] * layers for factor in FACTORS}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            (block,) = re.findall(r"\.layers\.(\d+)\.", name)
            squares["A" if "lora_A" in name else "B"][int(block)] += float(parameter.grad.double().square().sum())
    model.zero_grad()
    return float(loss.detach()), {factor: [math.sqrt(value) for value in values] for factor, values in squares.items()}


@dataclass
class Course:
    """What was seen at the moments."""

    losses: list[float]
    norms: Norms
    factors: list[Factors]

    def see(self, model: nn.Module, task: Task, layers: int) -> None:
        loss, norms = look(model, task.probe, layers)
        self.losses.append(loss)
        self.factors.append(factors_of(model))
        for factor in FACTORS:
            self.norms[factor].append(norms[factor])


def new_course() -> Course:
    return Course([], {factor: [] for factor in FACTORS}, [])


def train(model: nn.Module, task: Task, layers: int, steps: int, rate: float, seed: int) -> Course:
    course = new_course()
    for step, _ in fit(model, task.batches(steps, seed), rate):
        if step in moments(steps):
            course.see(model, task, layers)
    course.see(model, task, layers)
    return course


def runs(task: Task, layers: int, seed: int, rate: float, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A record for each method; the others get LoRA's factors, those at the start to train from."""
    given: list[Factors] = []
    for method in METHODS:
        torch.manual_seed(seed)
        model: Any = get_peft_model(twin(task.base), config_of(method, options.rank)).train()
        equal = new_course()
        for factors in given:
            give(model, factors)
            equal.see(model, task, layers)
        if given:
            give(model, given[0])
        own = train(model, task, layers, options.steps, rate, seed)
        if method == LORA:
            given, equal = own.factors, own
        yield {
            "method": method,
            "layers": layers,
            "seed": seed,
            "rate": rate,
            "setting": setting_of(options),
            "losses": own.losses,
            "own": own.norms,
            "equal_losses": equal.losses,
            "equal": equal.norms,
        }


def setting_of(options: argparse.Namespace) -> dict[str, int]:
    """What runs must have in common to be compared."""
    return {name: getattr(options, name) for name in ("hidden", "rank", "steps", "base_steps", "probe")}


@dataclass(frozen=True)
class Depth:
    """All runs at one number of layers."""

    layers: int
    records: Sequence[Mapping[str, Any]]

    def rates(self, method: str) -> dict[float, float]:
        """The mean of the last losses over the seeds, by learning rate; of the rates that all seeds have."""
        own = [r for r in self.records if r["method"] == method]
        seeds = {r["seed"] for r in own}
        tried = {rate: [r["losses"][-1] for r in own if r["rate"] == rate] for rate in {r["rate"] for r in own}}
        return {rate: statistics.fmean(tried[rate]) for rate in sorted(tried) if len(tried[rate]) == len(seeds)}

    def best(self, method: str) -> list[Mapping[str, Any]]:
        """The runs at the method's best rate, by seed."""
        tried = self.rates(method)
        return self.at(method, min(tried, key=lambda rate: tried[rate]))

    def at(self, method: str, rate: float) -> list[Mapping[str, Any]]:
        found = [r for r in self.records if (r["method"], r["rate"]) == (method, rate)]
        return sorted(found, key=lambda r: int(r["seed"]))

    def ratios(self, method: str, kind: str, factor: str, moment: int) -> list[list[float]]:
        """The norms over LoRA's of the same seed, step and block, at LoRA's best rate; by seed and block."""
        lora = self.best(LORA)
        other = self.at(method, lora[0]["rate"])
        pairs = zip(other, lora, strict=True)
        return [quotients(a[kind][factor][moment], b["own"][factor][moment]) for a, b in pairs]

    def gains(self, method: str) -> list[float]:
        """LoRA's last loss less the method's, each at its best rate, by seed."""
        pairs = zip(self.best(method), self.best(LORA), strict=True)
        return [float(theirs["losses"][-1] - ours["losses"][-1]) for ours, theirs in pairs]


def quotients(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [a / b if b else math.nan for a, b in zip(ours, theirs, strict=True)]


def thirds(values: Sequence[float]) -> tuple[float, float]:
    """Geometric means over the first third of the blocks and over the last."""
    third = max(1, len(values) // 3)
    return statistics.geometric_mean(values[:third]), statistics.geometric_mean(values[-third:])


def tilts(rows: Sequence[Sequence[float]]) -> list[float]:
    """By seed, the first third of the blocks over the last; above 1 where the earlier blocks have more."""
    return [first / last for first, last in map(thirds, rows)]


def depths_of(records: Sequence[Mapping[str, Any]]) -> list[Depth]:
    layers = sorted({int(r["layers"]) for r in records})
    return [Depth(n, [r for r in records if r["layers"] == n]) for n in layers]


def report(records: Sequence[Mapping[str, Any]], name: str) -> str:
    """First what the data say, then how they came about, then tables of each depth."""
    depths, setting = depths_of(records), records[0]["setting"]
    lines = [
        "# Gradients by depth",
        "",
        *conclusion(depths),
        "",
        f"By `benchmarks/gradients.py`. Llamas on bytes of width {setting['hidden']}, {setting['base_steps']} steps "
        f"trained on one text and frozen; adapters of rank {setting['rank']} on the query and value projections, "
        f"{setting['steps']} steps of {BATCH} x {LENGTH} bytes of another, AdamW. Gradients and "
        f"losses are of {setting['probe']} rows held out. Losses are nats per byte; the bases' there are "
        f"{' and '.join(base_loss(depth) for depth in depths)}. So these are small models that have hardly learned "
        "anything; with the residual stream and the norms of every Llama, through which gradients reach the first "
        "blocks anyway. Larger ones, trained for longer, may show something else.",
        "",
        "Cells: the norm over LoRA's of the same seed, step and block, geometric mean over the first third of the "
        "blocks / over the last third, then over seeds. Equal weights: in all methods the factors that LoRA came to, "
        "so that the same gradient, through other functions, is compared; away from step 0 the function that a "
        "shortcut makes of LoRA's factors is one that nobody trained, and its loss is higher. Own way: with the "
        "factors that each came to, at the rate that is best for LoRA. At step 0 B is zero: A has no gradient, all "
        "methods compute the same, and equal weights and own way are one. The optimizer divides each gradient by its "
        "own running size, so that a larger norm alone makes no step larger.",
        "",
        "Loss: at the end, each method at its best rate of those tried. Difference: LoRA's less the method's, paired "
        "by seed, above zero where the shortcut helps; with fewer than five seeds no interval is given, only whether "
        "all have one sign, which by chance alone two seeds have in half of the cases, three in a quarter.",
    ]
    for depth in depths:
        lines += ["", f"## {depth.layers} blocks", "", *table(depth), "", *rates_tried(depth), ""]
        lines += [f"![norms by block, and their ratios to LoRA's]({name}_{depth.layers}.png)"]
    return "\n".join(lines) + "\n"


def base_loss(depth: Depth) -> str:
    """B is zero at the start."""
    return f"{depth.records[0]['losses'][0]:.2f} ({depth.layers} blocks)"


def conclusion(depths: Sequence[Depth]) -> list[str]:
    """Sentences in words that follow from the numbers, where what all seeds agree on counts; the first sums up."""
    shares = [share for depth in depths for share in (shares_of(depth, factor) for factor in FACTORS)]
    changed = [m for m in SHORTCUTS if any(share.get(m) for share in shares)]
    early = [m for m in SHORTCUTS if all(share.get(m) == 1 for share in shares)]
    searched = [losses_of(depth) for depth in depths if len(depth.rates(LORA)) > 1]
    lower = [m for m in SHORTCUTS if searched and all(losses.get(m) == 1 for losses in searched)]
    return [
        f"Shortcuts {'change' if changed else 'do not change'} how the gradient is spread over the blocks; they move "
        f"it to the earlier ones, as the paper claims, in both factors and at all depths with {listed(early)}; and "
        "where several learning rates were tried, the loss is lower than LoRA's, each at its best rate and at every "
        f"seed, with {listed(lower)}.",
        "",
        *map(findings, depths),
    ]


def shares_of(depth: Depth, factor: str) -> dict[str, int]:
    """By method 1 where the earlier blocks have a larger share than under LoRA, -1 where a smaller one."""
    return {m: agreed(tilts(depth.ratios(m, "equal", factor, -1)), 1.0) for m in present(depth)}


def losses_of(depth: Depth) -> dict[str, int]:
    """By method 1 where the loss is lower than LoRA's, -1 where it is higher."""
    return {m: agreed(depth.gains(m), 0.0) for m in present(depth)}


def findings(depth: Depth) -> str:
    own = tilts([r["own"]["B"][0] for r in depth.best(LORA)])
    fading = f"{'do' if max(own) < 1 else 'do not'} fade towards the first blocks"
    parts = [f"LoRA's own gradients {fading} (first third over last, B at step 0: {spread(own)})"]
    for factor in FACTORS:
        more, less = both_ways(shares_of(depth, factor))
        parts.append(
            f"at equal weights the earlier blocks have a larger share of the gradient of {factor} than under LoRA "
            f"with {more}, a smaller one with {less}"
        )
    one = "at the one rate tried, which need not suit all, " if len(depth.rates(LORA)) == 1 else ""
    lower, higher = both_ways(losses_of(depth))
    parts.append(f"{one}the loss is lower than LoRA's at every seed with {lower}, higher with {higher}")
    return f"- With {depth.layers} blocks, {'; '.join(parts)}."


def both_ways(signs: Mapping[str, int]) -> tuple[str, str]:
    up, down = (listed([m for m, sign in signs.items() if sign == wanted]) for wanted in (1, -1))
    return up, down


def present(depth: Depth) -> list[str]:
    return [method for method in SHORTCUTS if any(r["method"] == method for r in depth.records)]


def agreed(values: Sequence[float], neutral: float) -> int:
    """1 or -1 where all values are above or below the neutral one, else 0."""
    return 1 if min(values) > neutral else -1 if max(values) < neutral else 0


def listed(names: Sequence[str]) -> str:
    return " and ".join(f"`{name}`" for name in names) or "none"


def spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.2f}, {min(values):.2f} to {max(values):.2f}"


def table(depth: Depth) -> list[str]:
    columns = [("equal", "B", 0), *((kind, factor, -1) for kind in ("equal", "own") for factor in FACTORS)]
    lines = [
        "| method | B, step 0 | equal weights, end: A | B | own way, end: A | B | loss (rate) | difference |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method in [LORA, *present(depth)]:
        cells = [in_thirds(depth.ratios(method, *column)) for column in columns]
        best = depth.best(method)
        loss = statistics.fmean(r["losses"][-1] for r in best)
        cells += [f"{loss:.4f} ({best[0]['rate']:g})", "-" if method == LORA else difference(depth, method)]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def in_thirds(rows: Sequence[Sequence[float]]) -> str:
    first, last = zip(*map(thirds, rows), strict=True)
    return f"{statistics.geometric_mean(first):.2f} / {statistics.geometric_mean(last):.2f}"


def difference(depth: Depth, method: str) -> str:
    gains = depth.gains(method)
    found = paired_difference(gains, [0.0] * len(gains))
    if found.verdict != "too few seeds":
        return f"{found.mean:+.4f} ({found.low:+.4f} to {found.high:+.4f}), {found.verdict}"
    return f"{found.mean:+.4f}, {'all' if agreed(gains, 0.0) else 'not all'} {found.seeds} seeds of one sign"


def rates_tried(depth: Depth) -> list[str]:
    """The losses by rate, so that a best one at the edge is seen."""
    tried = {method: depth.rates(method) for method in [LORA, *present(depth)]}
    found = [f"{m}: {', '.join(f'{rate:g} {loss:.4f}' for rate, loss in by.items())}" for m, by in tried.items()]
    seeds = ", ".join(str(r["seed"]) for r in depth.best(LORA))
    edge = max(tried[LORA]) == depth.best(LORA)[0]["rate"]
    hint = " LoRA's best rate is the highest tried, so that a higher one may be better still." if edge else ""
    return [f"Seeds {seeds}. Mean loss by rate. {'; '.join(found)}.{hint}"]


def write_report(out: Path) -> None:
    """The table and the figures of all runs there are."""
    records = read_records(out)
    out.with_suffix(".md").write_text(report(records, out.name), encoding="utf-8")
    for depth in depths_of(records):
        plot(depth, out.with_name(f"{out.name}_{depth.layers}.png"))


def plot(depth: Depth, path: Path) -> None:
    """Norms along each method's own way, and their ratios to LoRA's; lines are geometric means over seeds, bands
    their range."""
    last = len(depth.records[0]["losses"]) - 1
    columns = [("B", 0), ("A", 1), *((factor, moment) for moment in (last - 1, last) for factor in FACTORS)]
    figure, grid = new_figure(len(columns), width=3.0, height=2.8, rows=3)
    steps = moments(depth.records[0]["setting"]["steps"])
    for axes, (row, (factor, moment)) in zip(grid, itertools.product(range(3), columns), strict=True):
        for method, color in zip([LORA, *present(depth)], PALETTE, strict=False):
            if row == 0:
                values = [r["own"][factor][moment] for r in depth.at(method, depth.best(LORA)[0]["rate"])]
            else:
                values = depth.ratios(method, "equal" if row == 1 else "own", factor, moment)
            by_block = list(zip(*values, strict=True))
            blocks = range(1, depth.layers + 1)
            axes.fill_between(blocks, list(map(min, by_block)), list(map(max, by_block)), color=color, alpha=0.2)
            axes.plot(blocks, list(map(statistics.geometric_mean, by_block)), color=color, linewidth=1.5, label=method)
        axes.set_yscale("log")
        if row == 0:
            axes.set_title(f"{factor}, step {steps[moment]}")
        if row == 2:
            axes.set_xlabel("block")
    for row, label in enumerate(("norm, own way", "over LoRA's, equal weights", "over LoRA's, own way")):
        grid[row * len(columns)].set_ylabel(label)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper center", ncols=6, frameon=False)
    save_figure(figure, path)


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--text", type=Path, nargs="+", help="files: the base learns the first, adapters the others")
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 32])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-2])
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--steps", type=int, default=50, help="of the adapters' training")
    parser.add_argument("--base-steps", type=int, default=200, help="of the base's")
    parser.add_argument("--probe", type=int, default=24, help="rows that are held out to measure on")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS / "gradients", help="with --quick none")
    options = parse(parser, QUICK)
    if options.text is None or len(options.text) < 2:
        parser.error("--text needs two files or more, unless --quick is given")
    torch.set_num_threads(1)
    records = read_records(options.out)
    if any(record["setting"] != setting_of(options) for record in records):
        parser.error(f"{options.out}.jsonl holds runs of other settings; give another --out, or delete it")
    for layers in options.layers:
        task = make_task(options, layers)
        for rate, seed in itertools.product(options.rates, options.seeds):
            records += add_runs(records, task, layers, seed, rate, options)
    print(report(records, "gradients"))
    write_json(options, records)
    if options.out is not None:
        write_report(options.out)


def add_runs(
    records: Sequence[Mapping[str, Any]], task: Task, layers: int, seed: int, rate: float, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """All methods of one seed and rate, unless they are there; their lines are written together."""
    if any((r["layers"], r["seed"], r["rate"]) == (layers, seed, rate) for r in records):
        return []
    found = list(runs(task, layers, seed, rate, options))
    for record in found:
        print(
            f"{layers} layers, rate {rate:g}, seed {seed}, {record['method']}: {record['losses'][-1]:.4f}", flush=True
        )
    if options.out is not None:
        with options.out.with_suffix(".jsonl").open("a", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(rounded(record))}\n" for record in found)
    return found


def rounded(value: Any) -> Any:
    """To five digits, which is more than a norm means."""
    if isinstance(value, dict):
        return {name: rounded(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [rounded(entry) for entry in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def read_records(out: Path | None) -> list[dict[str, Any]]:
    if out is None or not out.with_suffix(".jsonl").is_file():
        return []
    return [json.loads(line) for line in out.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
