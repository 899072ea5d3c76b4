"""What the benchmarks share: models, timing in turns within one process, ratios, and how these are shown and kept."""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import math
import multiprocessing
import os
import platform
import random
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from peft_reslora.shared.plots import PALETTE, new_figure, save_figure
from peft_reslora.shared.tables import format_table

warnings.simplefilter("ignore", FutureWarning)  # of other libraries' use of each other
RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "transformers", "peft", "peft_reslora")
T = TypeVar("T")


def new_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options of all benchmarks, described by the docstring of the script."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="seconds, to see that it runs; the numbers mean nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers, and what they were measured on")
    return parser


def new_timing_parser(doc: str | None) -> argparse.ArgumentParser:
    """Also with the options of benchmarks that measure time, whose table `finish` can keep."""
    parser = new_parser(doc)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the base")
    parser.add_argument("--keep", type=Path, metavar="STEM", help="write STEM.md, STEM.jsonl and the figure, STEM.png")
    return parser


def parse(parser: argparse.ArgumentParser, quick: Mapping[str, Any]) -> argparse.Namespace:
    """The options of this run; with --quick, those that are not given are `quick`'s."""
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**quick)
    return parser.parse_args()


def llama(
    hidden: int, layers: int, *, vocab: int = 1000, heads: int = 8, kv_heads: int = 4, **fields: Any
) -> LlamaForCausalLM:
    """A Llama with random weights, the same at each call; `fields` are others of its config."""
    torch.manual_seed(0)
    shape = {
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
    }
    return LlamaForCausalLM(LlamaConfig(**{**shape, **fields}))


def twin(model: nn.Module) -> nn.Module:
    """Another model on the same weights, so that many adapted models need the memory of one."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def read_text(paths: Sequence[Path]) -> torch.Tensor:
    """The bytes of the files; of JSON lines, those of the strings in them."""
    parts: list[str] = []
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            values = json.loads(line).values() if path.suffix == ".jsonl" else [line]
            parts += [value for value in values if isinstance(value, str)]
    return torch.tensor(list("\n".join(parts).encode()))


def seconds(run: Callable[[], object], device: str = "cpu") -> float:
    """The time of one call, until the device is done.

    On one thread of a CPU it is the time that the process had of it, which other programs disturb less.
    """
    clock = time.perf_counter if is_cuda(device) or torch.get_num_threads() > 1 else time.process_time
    _wait_for(device)
    start = clock()
    run()
    _wait_for(device)
    return clock() - start


def _wait_for(device: str) -> None:
    if is_cuda(device):
        torch.cuda.synchronize(device)


def is_cuda(device: str) -> bool:
    return torch.device(device).type == "cuda"


def in_turns(jobs: Mapping[str, Callable[[], float]], rounds: int, warmups: int = 1) -> dict[str, list[float]]:
    """What each job returns, by rounds: in each, all run once, in another order, so that what slows one slows all."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    shuffle = random.Random(0).shuffle
    for done in tqdm(range(-warmups, rounds), unit="round", disable=not sys.stderr.isatty()):
        order = list(jobs)
        shuffle(order)
        for name in order:
            value = jobs[name]()
            if done >= 0:
                times[name].append(value)
    return times


@dataclass(frozen=True)
class Ratio:
    """Ours over theirs: of the minima, which other programs disturb least, and the quartiles of the rounds' ratios."""

    minima: float
    low: float
    median: float
    high: float

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
        by_round = [a / b for a, b in zip(ours, theirs, strict=True)]
        return cls(min(ours) / min(theirs), *statistics.quantiles(by_round, n=4, method="inclusive"))

    def __str__(self) -> str:
        return f"{_short(self.minima)} ({_short(self.low)}-{_short(self.high)})"


def _short(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}"


def growth_of_process(run: Callable[[T], object], small: T, full: T) -> int:
    """By how many bytes the resident memory of a process grows at most while it calls `run(full)`.

    It calls `run(small)` before, so that what is loaded at a first call does not count.
    """
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(["peft_reslora"])  # imported once for all processes, and starts no threads
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_growth, run, small, full).result()


def _growth(run: Callable[[T], object], small: T, full: T) -> int:
    import resource  # of Unix

    run(small)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(full)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return grown if sys.platform == "darwin" else 1024 * grown


def show(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table."""
    print("\n".join(format_table([header, *rows])), flush=True)


def finish(
    options: argparse.Namespace,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    results: Sequence[Mapping[str, Any]],
    draw: Callable[[Path], None] | None = None,
) -> None:
    """Print a table, and write what --json and --keep ask for; `draw` writes the figure of the results."""
    show(header, rows)
    write_json(options, results)
    if options.keep is None:
        return
    options.keep.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(f"{json.dumps(result, default=_plain)}\n" for result in results)
    options.keep.with_suffix(".jsonl").write_text(lines, encoding="utf-8")
    table = [" | ".join(["", *row, ""]).strip() for row in (header, ["---"] * len(header), *rows)]
    text = [f"{_origin(options)}\n", *table]
    options.keep.with_suffix(".md").write_text("\n".join(text) + "\n", encoding="utf-8")
    if draw is not None:
        draw(options.keep.with_suffix(".png"))


def _origin(options: argparse.Namespace) -> str:
    """What ran when on what, on a line."""
    own = [word for n, word in enumerate(sys.argv[1:]) if "--keep" not in (word, sys.argv[n])]
    facts = environment(options.device)
    place = facts["device"] if is_cuda(options.device) else f"{os.cpu_count()} CPU cores, {facts['device']}"
    versions = ", ".join(f"{package} {facts[package]}" for package in _PACKAGES)
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *own])
    return f"`{command}`, {datetime.date.today()}, {place}, {versions}."


def growth_exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """p of the power law values = c sizes^p that fits best, in logarithms."""
    slope, _ = statistics.linear_regression([math.log(size) for size in sizes], [math.log(value) for value in values])
    return slope


def write_json(options: argparse.Namespace, results: Sequence[Mapping[str, Any]]) -> None:
    """Write `results` to the file of --json, if that was given, with what they were measured on."""
    if options.json is None:
        return
    content = {
        "benchmark": Path(sys.argv[0]).stem,
        "options": {name: value for name, value in vars(options).items() if name != "json"},
        "environment": environment(getattr(options, "device", "cpu")),
        "results": list(results),
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(f"{json.dumps(content, indent=1, default=_plain)}\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    """For JSON; of paths the name, since the rest is of one machine."""
    return value.name if isinstance(value, Path) else asdict(value)


def environment(device: str) -> dict[str, Any]:
    """What the numbers depend on besides the options."""
    return {
        "device": torch.cuda.get_device_name(device) if is_cuda(device) else platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in _PACKAGES},
    }


def plot_ratios(ratios: Mapping[str, Ratio], path: Path, title: str) -> None:
    """Draw one bar per ratio, as long as that of the minima, with the quartiles of the rounds, into a PNG."""
    figure, (axes,) = new_figure(height=1.5 + 0.3 * len(ratios))
    names, values = list(ratios)[::-1], list(ratios.values())[::-1]
    axes.barh(names, [ratio.minima for ratio in values], color=PALETTE[0], height=0.6)
    axes.hlines(names, [r.low for r in values], [r.high for r in values], color=PALETTE[1], linewidth=3)
    axes.axvline(1.0, color="0.3", linewidth=1)
    axes.set(title=title, xlabel="ratio of minima (line: quartiles of the rounds' ratios)")
    axes.grid(visible=False, axis="y")
    save_figure(figure, path)
