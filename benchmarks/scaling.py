"""How time and memory of a training step grow with the length of the chains, for each shortcut and pre_num.

    python benchmarks/scaling.py                      # 4 to 64 layers: about five minutes on one CPU core

The step is that of train_step.py, on models of more and more layers, methods in turns within one process. Printed are
time and peak memory over LoRA's at each length, and the exponents p with which both grow as length^p over all lengths.
Of LoRA p is nearly 1; a method whose p is as large costs the same share at any depth.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Ratio, finish, growth_exponent, in_turns, is_cuda, new_timing_parser, parse, seconds
from train_step import BASELINE, METHODS, make_base, make_step, peak_memory

from peft_reslora.shared.plots import new_figure, save_figure

NAMES = (BASELINE, *(name for name in METHODS if name.startswith("ResLoRA")))
QUICK = {"lengths": [2, 4], "hidden": 32, "batch": 1, "tokens": 4, "rounds": 2}
FIXED = {"dropout": 0.0, "checkpointing": False, "autocast": "none", "compile": None}


def measure(length: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All methods at one length."""
    one = argparse.Namespace(**{**vars(options), **FIXED, "layers": length})
    base, steps, memory = make_base(one), {}, {}
    for name in NAMES:
        others = torch.cuda.memory_allocated(one.device) if is_cuda(one.device) else 0
        steps[name], _ = make_step(base, name, one)
        memory[name] = peak_memory(steps[name], name, others, one)
    times = in_turns({n: partial(seconds, step, one.device) for n, step in steps.items()}, one.rounds)
    return [
        {
            "method": name,
            "length": length,
            "seconds": min(times[name]),
            "to_lora": Ratio.of(times[name], times[BASELINE]),
            "peak_bytes": memory[name],
            "peak_to_lora": memory[name] / max(1, memory[BASELINE]),
        }
        for name in NAMES
    ]


def exponents(results: list[dict[str, Any]], name: str) -> tuple[float, ...]:
    """With which the time and the memory of a method grow; none of a single length."""
    own = [result for result in results if result["method"] == name]
    if len({result["length"] for result in own}) < 2:
        return ()
    lengths = [float(result["length"]) for result in own]
    time, memory = ([max(1e-9, result[key]) for result in own] for key in ("seconds", "peak_bytes"))
    return growth_exponent(lengths, time), growth_exponent(lengths, memory)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Time over LoRA's and memory over LoRA's, by length."""
    figure, panels = new_figure(2, width=6.0)
    for axes, key, title in zip(panels, ("to_lora", "peak_to_lora"), ("Time", "Peak memory"), strict=True):
        for name in NAMES[1:]:
            own = [result for result in results if result["method"] == name]
            values = [getattr(result[key], "minima", result[key]) for result in own]
            axes.plot([result["length"] for result in own], values, marker=".", label=name)
        axes.axhline(1.0, color="0.3", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set(title=f"{title} of a training step over LoRA's", xlabel="layers in a chain", ylabel="ratio")
    panels[0].legend(frameon=False, fontsize="small")
    save_figure(figure, path)


def main() -> None:
    parser = new_timing_parser(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128, help="of each sequence")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    options = parse(parser, QUICK)
    torch.set_num_threads(options.threads)

    results = [result for length in options.lengths for result in measure(length, options)]
    header = ["method", *(f"{length} layers: time, memory / LoRA's" for length in options.lengths), "exponents"]
    rows = []
    for name in NAMES:
        own = [result for result in results if result["method"] == name]
        ratios = [f"{r['to_lora']}, {r['peak_to_lora']:.2f}" for r in own]
        grown = ", ".join(f"{exponent:.2f}" for exponent in exponents(results, name))
        rows.append([name, *ratios, grown or "-"])
    finish(options, header, rows, results, partial(plot, results))


if __name__ == "__main__":
    main()
