"""The memorization experiment of the MoRA paper in small: LoRA, MoRA sharing and MoRA rotation learn random pairs.

    python benchmarks/uuid_pairs.py --text gsm8k/train.jsonl gsm8k/test.jsonl svamp/svamp.jsonl --cache uuid_base
    python benchmarks/uuid_pairs.py --text story.txt --quick

The paper (arXiv 2405.12130, section 3) lets LLaMA-2 7B learn 10,000 pairs of UUIDs; the measure is the share of the
value's characters that come out right when the model is given the key. It finds LoRA of rank 8 far behind full
fine-tuning, and MoRA ahead of LoRA of the same parameter count.

Here a small Llama is first trained from scratch on the bytes of `--text` (kept in `--cache` for the next run), then
frozen. UUIDs are random in all of their 32 hexadecimal digits and written without dashes, so that guessing gets
6.25 %. The method is adapted to all linear layers and trained on `key=value` lines with the loss on the value; every
some steps all values are generated greedily and compared by position. The learning rate of every method and rank is
swept by factors of about three until the best one has a worse one on either side; the best one is then run with more
seeds. Written are a table and a figure. This takes about ten minutes on two free cores.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing
import random
import statistics
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import PALETTE, RESULTS, llama, new_figure, new_parser, parse, read_text, save_figure, write_json
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaForCausalLM

import peft_reslora  # noqa: F401  registers MoRA
from peft_reslora.mora import AUTO_SHARING_FROM_RANK, MoRAConfig

METHODS = ("LoRA", "MoRA sharing", "MoRA rotation")
COLORS = dict(zip(METHODS, PALETTE, strict=False))
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
FIRST_RATE = LEARNING_RATES.index(3e-3)
DIGITS = 32
IGNORED = -100  # what transformers leaves out of the loss
QUICK = {
    "text": [Path(__file__)],
    "out": None,
    "pairs": 4,
    "ranks": [8],
    "steps": 4,
    "batch": 4,
    "evaluations": 2,
    "seeds": 1,
    "hidden": 32,
    "layers": 1,
    "text_steps": 4,
}


@dataclass(frozen=True)
class Setting:
    """Everything that decides the result."""

    pairs: int = 64
    ranks: tuple[int, ...] = (8, 32)
    steps: int = 500
    batch: int = 16
    evaluations: int = 10
    seeds: int = 3
    hidden: int = 128
    layers: int = 2
    text_steps: int = 500
    text_batch: int = 16
    text_length: int = 128
    text_learning_rate: float = 2e-3


@dataclass(frozen=True)
class Curve:
    """One run: the character accuracies in percent, at the steps `steps`."""

    method: str
    rank: int
    learning_rate: float
    seed: int
    parameters: int
    steps: list[int]
    accuracies: list[float]

    @property
    def final(self) -> float:
        return self.accuracies[-1]

    @property
    def rating(self) -> tuple[float, float]:
        """What learning rates are compared by: the accuracy at the end; where that is equal, the mean on the way."""
        return self.final, statistics.fmean(self.accuracies)

    def steps_to(self, accuracy: float) -> int | None:
        """The first evaluation that reached `accuracy`."""
        reached = (step for step, value in zip(self.steps, self.accuracies, strict=True) if value >= accuracy)
        return next(reached, None)


def encode(text: str) -> Tensor:
    return torch.tensor(list(text.encode()))


def build_base(setting: Setting) -> LlamaForCausalLM:
    return llama(
        setting.hidden,
        setting.layers,
        vocab=256,
        heads=4,
        kv_heads=4,
        max_position_embeddings=max(setting.text_length, 2 * DIGITS + 1),
        bos_token_id=None,
        eos_token_id=None,  # generation is to go on to the last digit
        pad_token_id=0,
    )


def scheduled_adam(model: torch.nn.Module, learning_rate: float, steps: int) -> tuple[torch.optim.Adam, LambdaLR]:
    """Adam without weight decay, warmed up over 5 % of the steps, then decayed linearly to zero."""
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=learning_rate)
    warmup = max(1, steps // 20)
    schedule = LambdaLR(optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup)))
    return optimizer, schedule


def train_step(
    model: LlamaForCausalLM | PeftModel,
    optimizer: torch.optim.Optimizer,
    schedule: LambdaLR,
    tokens: Tensor,
    labels: Tensor,
) -> float:
    loss = model(input_ids=tokens, labels=labels).loss
    loss.backward()
    clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    return loss.item()


def trained_base(setting: Setting, text: Tensor, cache: Path | None) -> tuple[dict[str, Tensor], float]:
    """The weights of the small Llama after training on `text`, and its last losses' mean in nats per byte."""
    relevant = {k: v for k, v in dataclasses.asdict(setting).items() if k.startswith(("text_", "hidden", "layers"))}
    digest = hashlib.sha256(json.dumps(relevant).encode() + bytes(text.tolist())).hexdigest()[:16]
    file = cache / f"base-{digest}.pt" if cache else None
    if file and file.is_file():
        return torch.load(file, weights_only=True)
    model = build_base(setting).train()
    optimizer, schedule = scheduled_adam(model, setting.text_learning_rate, setting.text_steps)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(setting.text_steps):
        starts = torch.randint(len(text) - setting.text_length, (setting.text_batch,), generator=generator)
        tokens = torch.stack([text[start : start + setting.text_length] for start in starts])
        losses.append(train_step(model, optimizer, schedule, tokens, tokens))
    base = model.state_dict(), statistics.fmean(losses[-20:])
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(base, file)
    return base


def random_pairs(count: int) -> Tensor:
    """`key=value` lines as bytes, shape `(count, 65)`."""
    draw = random.Random(0)
    identifiers = [uuid.UUID(int=draw.getrandbits(128)).hex for _ in range(2 * count)]
    return torch.stack([encode(f"{k}={v}") for k, v in zip(identifiers[:count], identifiers[count:], strict=True)])


def method_config(method: str, rank: int) -> PeftConfig:
    if method == "LoRA":
        return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    mora_type = method.removeprefix("MoRA ")
    return MoRAConfig(r=rank, mora_type=mora_type, target_modules="all-linear")  # type: ignore[arg-type]


@torch.no_grad()
def character_accuracy(model: PeftModel, pairs: Tensor) -> float:
    """Percentage of the values' digits that greedy generation from `key=` gets right, by position."""
    model.eval()
    keys = pairs[:, : DIGITS + 1]
    generated = model.generate(
        input_ids=keys, attention_mask=torch.ones_like(keys), max_new_tokens=DIGITS, do_sample=False
    )
    model.train()
    return 100 * (generated[:, DIGITS + 1 :] == pairs[:, DIGITS + 1 :]).double().mean().item()


def memorize(
    setting: Setting, base: dict[str, Tensor], method: str, rank: int, learning_rate: float, seed: int
) -> Curve:
    model = build_base(setting)
    model.load_state_dict(base)
    torch.manual_seed(seed)
    adapted = get_peft_model(model, method_config(method, rank)).train()
    optimizer, schedule = scheduled_adam(adapted, learning_rate, setting.steps)
    pairs = random_pairs(setting.pairs)
    labels = pairs.clone()
    labels[:, : DIGITS + 1] = IGNORED
    order = torch.cat([torch.randperm(setting.pairs) for _ in range(-(-setting.steps * setting.batch // len(pairs)))])
    steps, accuracies = [0], [character_accuracy(adapted, pairs)]
    for step, rows in enumerate(order.split(setting.batch)[: setting.steps], start=1):
        train_step(adapted, optimizer, schedule, pairs[rows], labels[rows])
        if step * setting.evaluations // setting.steps > len(steps) - 1:
            steps.append(step)
            accuracies.append(character_accuracy(adapted, pairs))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    return Curve(method, rank, learning_rate, seed, trained, steps, accuracies)


def sweep(setting: Setting, base: dict[str, Tensor], method_and_rank: tuple[str, int]) -> list[Curve]:
    """All runs of one method and rank: the search for the learning rate with seed 0, its best with the other seeds."""
    torch.set_num_threads(1)

    def run(rate: int, seed: int = 0) -> Curve:
        start = time.perf_counter()
        curve = memorize(setting, base, *method_and_rank, LEARNING_RATES[rate], seed)
        seconds = time.perf_counter() - start
        print(
            f"{curve.method}, rank {curve.rank}, learning rate {curve.learning_rate:g}, seed {seed}: "
            f"{curve.final:.1f} % after {setting.steps} steps, {seconds:.0f} s",
            flush=True,
        )
        return curve

    runs = {FIRST_RATE: run(FIRST_RATE)}
    while True:
        best = max(runs, key=lambda rate: runs[rate].rating)
        beside = [rate for rate in (best - 1, best + 1) if 0 <= rate < len(LEARNING_RATES) and rate not in runs]
        if not beside:
            return [*runs.values(), *(run(best, seed) for seed in range(1, setting.seeds))]
        runs[beside[-1]] = run(beside[-1])


def best_runs(curves: Sequence[Curve], method: str, rank: int) -> list[Curve]:
    """The runs, one per seed, with the learning rate that was best with the first."""
    own = [curve for curve in curves if (curve.method, curve.rank) == (method, rank)]
    best = max((curve for curve in own if curve.seed == 0), key=lambda curve: curve.rating)
    return [curve for curve in own if curve.learning_rate == best.learning_rate]


def as_markdown(setting: Setting, curves: Sequence[Curve], text_bytes: int, text_loss: float) -> str:
    """The report: the setting, the best of each method and rank, and all learning rates tried."""
    epochs = setting.steps * setting.batch / setting.pairs
    lines = [
        "# Memorizing random UUID pairs",
        "",
        "By `benchmarks/uuid_pairs.py`, after section 3 of arXiv 2405.12130 (there: LLaMA-2 7B, 10,000 pairs). A "
        f"Llama with {setting.layers} blocks of width {setting.hidden} "
        f"({build_base(setting).num_parameters():,} parameters), trained on {text_bytes:,} bytes of text for "
        f"{setting.text_steps} steps of {setting.text_batch} x {setting.text_length} bytes (loss at the end "
        f"{text_loss:.2f} nats per byte), then frozen and adapted in all linear layers. {setting.pairs} pairs, "
        f"{setting.steps} steps of {setting.batch} pairs ({epochs:.0f} epochs), Adam, linear decay.",
        "",
        "Accuracy: characters of the value that greedy generation from the key gets right, by position; guessing gets "
        f"6.25 %. Mean over the seeds of initialization and order ({setting.seeds}), lowest and highest in "
        "parentheses; the learning rate is the best of those tried with the first seed. Groups: into how many pieces "
        "MoRA cuts the input of an attention projection; at width 4096 it is 16 at rank 8, 8 at rank 32, 2.8 at 256.",
        "",
        "| rank | method | trained parameters | groups | learning rate | accuracy at the end, % | steps to 90 % |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for rank in setting.ranks:
        for method in METHODS:
            runs = best_runs(curves, method, rank)
            finals = [curve.final for curve in runs]
            groups = "-" if method == "LoRA" else f"{setting.hidden / (2 * setting.hidden * rank) ** 0.5:.1f}"
            reached = ", ".join(str(curve.steps_to(90) or "never") for curve in runs)
            lines.append(
                f"| {rank} | {method} | {runs[0].parameters:,} | {groups} | {runs[0].learning_rate:g} | "
                f"{statistics.fmean(finals):.1f} ({min(finals):.1f} to {max(finals):.1f}) | {reached} |"
            )
    lines += ["", *findings(setting, curves), "", "![character accuracy against steps](uuid_pairs.png)", ""]
    lines += ["All learning rates tried, with the first seed:", "", "| rank | method | accuracy % by learning rate |"]
    lines += ["| ---: | --- | --- |"]
    for rank in setting.ranks:
        for method in METHODS:
            own = [c for c in curves if (c.method, c.rank, c.seed) == (method, rank, 0)]
            tried = ", ".join(
                f"{c.learning_rate:g}: {c.final:.1f}" for c in sorted(own, key=lambda c: c.learning_rate)
            )
            lines.append(f"| {rank} | {method} | {tried} |")
    return "\n".join(lines) + "\n"


def findings(setting: Setting, curves: Sequence[Curve]) -> list[str]:
    """What the numbers say, in words that follow from them: a lead counts where the seeds' ranges do not overlap."""
    lines = []
    for rank in setting.ranks:
        for measure, rate in (
            ("accuracy at the end", lambda curve: curve.final),
            ("mean accuracy on the way", lambda curve: statistics.fmean(curve.accuracies)),
        ):
            values = {method: [rate(curve) for curve in best_runs(curves, method, rank)] for method in METHODS}
            order = sorted(METHODS, key=lambda method: -statistics.fmean(values[method]))
            words = [order[0]]
            for better, worse in itertools.pairwise(order):
                words += [">" if min(values[better]) > max(values[worse]) else "~", worse]
            lines.append(f"- Rank {rank}, {measure}: {' '.join(words)}.")
        automatic = "rotation" if rank < AUTO_SHARING_FROM_RANK else "sharing"
        lines[-1] += f' `mora_type="auto"` takes {automatic} here.'
    legend = (
        "`>`: better with every seed; `~`: the seeds overlap. The learning rates tried are a factor of three apart, "
        "so that part of a small lead can be theirs, and where all end near 100 % only the way there tells them apart."
    )
    return [legend, "", *lines]


def plot(setting: Setting, curves: Sequence[Curve], path: Path) -> None:
    """One panel per rank, one line per method at its best learning rate: the mean over the seeds, and their range."""
    figure, panels = new_figure(len(setting.ranks), width=5, height=4.2)
    for axes, rank in zip(panels, setting.ranks, strict=True):
        for method in METHODS:
            runs = best_runs(curves, method, rank)
            by_step = list(zip(*(curve.accuracies for curve in runs), strict=True))
            mean = [statistics.fmean(values) for values in by_step]
            axes.fill_between(
                runs[0].steps, [min(v) for v in by_step], [max(v) for v in by_step], color=COLORS[method], alpha=0.2
            )
            label = f"{method}, learning rate {runs[0].learning_rate:g}"
            axes.plot(runs[0].steps, mean, color=COLORS[method], linewidth=2, marker="o", markersize=4, label=label)
        axes.axhline(100 / 16, color="0.5", linestyle=":", linewidth=1)
        axes.annotate("guessing", (setting.steps, 100 / 16), ha="right", va="bottom", fontsize=8, color="0.4")
        axes.set(title=f"rank {rank}", xlabel="training step", ylim=(0, 102))
        axes.legend(frameon=False, fontsize=9, loc="upper left")
    panels[0].set_ylabel("characters right (%)")
    figure.suptitle(f"Memorizing {setting.pairs} random UUID pairs at equal parameter counts")
    save_figure(figure, path)


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--text", type=Path, nargs="+", help="text files or JSON lines to train on first")
    parser.add_argument("--cache", type=Path, help="folder that keeps the base model for the next run")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of table and figure; with --quick none")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    fields = dataclasses.fields(Setting)
    for field in fields:
        kind: Any = {"type": type(field.default)} if field.name != "ranks" else {"type": int, "nargs": "+"}
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=field.default, **kind)
    options = parse(parser, QUICK)
    if options.text is None:
        parser.error("--text is needed, unless --quick is given")
    chosen = {field.name: getattr(options, field.name) for field in fields}
    setting = Setting(**{**chosen, "ranks": tuple(options.ranks)})

    start = time.perf_counter()
    text = read_text(options.text)
    base, text_loss = trained_base(setting, text, options.cache)
    print(f"base model: {text_loss:.2f} nats per byte, {time.perf_counter() - start:.0f} s", flush=True)
    jobs = [(method, rank) for rank in setting.ranks for method in METHODS]
    with ProcessPoolExecutor(options.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        curves = [curve for sweep_ in pool.map(functools.partial(sweep, setting, base), jobs) for curve in sweep_]
    report = as_markdown(setting, curves, len(text), text_loss)
    print(f"\n{report}\n{time.perf_counter() - start:.0f} s")
    write_json(options, [dataclasses.asdict(curve) for curve in curves])
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "uuid_pairs.md").write_text(report, encoding="utf-8")
        plot(setting, curves, options.out / "uuid_pairs.png")


if __name__ == "__main__":
    main()
