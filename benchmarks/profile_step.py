"""Where the time of a training step goes: ResLoRA, MoRA rotation and PEFT's LoRA beside the frozen base's step.

    python benchmarks/profile_step.py                    # twenty minutes on one CPU core
    python benchmarks/profile_step.py --tokens 256

A step is that of `train_step.py`, on one sequence and with as many heads for keys and values as for queries, seen by
torch.profiler. Printed are milliseconds by kind of work,
each the least of all rounds, and what each method has above the floor:

- base products: with the frozen weights, forward and backward
- projections, expansions: products with A and with B, or with the square matrix, in the forward pass
- input gradients, factor gradients: products of the backward pass with the factors, and those that sum over the rows
- optimizer: all of its operations
- other operations: norms, attention, activations, sums, copies
- outside: no operation of torch's runs; Python, autograd's engine and the profiler

On a GPU the times are those of the launches on the CPU. All but the last kind are wall time within operations, so that
what other programs do shows in them.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from common import finish, in_turns, llama, new_timing_parser, parse
from torch import nn
from torch.profiler import ProfilerActivity, profile
from train_step import BASELINE, FLOOR, make_step

METHODS = (
    FLOOR,
    BASELINE,
    "ResLoRA input, pre_num 1",
    "ResLoRA middle, pre_num 1",
    "ResLoRA block, pre_num 1",
    "MoRA rotation",
)
BASE, PROJECTION, EXPANSION = "base products", "projections", "expansions"
INPUTS, FACTORS = "input gradients", "factor gradients"
OPTIMIZER, OTHER, OUTSIDE = "optimizer", "other operations", "outside"
KINDS = (BASE, PROJECTION, EXPANSION, INPUTS, FACTORS, OPTIMIZER, OTHER, OUTSIDE)
# Products of matrices, and at which argument the two matrices begin.
_PRODUCTS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::addmm_": 1, "aten::baddbmm": 1}


def kind_of_product(left: Sequence[int], right: Sequence[int], sides: set[int], rows: int, backward: bool) -> str:
    """Of a product of matrices `(..., m, k)` and `(..., k, n)`.

    Args:
        sides: the sizes that the base model's own products have.
        rows: how many tokens there are.
        backward: whether it belongs to the backward pass.
    """
    m, k, n = left[-2], left[-1], right[-1]
    if {m, k, n} <= sides | {rows}:
        return BASE
    if backward:
        return FACTORS if k == rows else INPUTS
    return PROJECTION if k in sides else EXPANSION


def work_by_kind(step: Callable[[], None], sides: set[int], rows: int) -> dict[str, float]:
    """Milliseconds of one step by `KINDS`."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        step()
    events = profiler.events() or []
    backward = _span([e for e in events if e.name.startswith("autograd::engine::evaluate_function")])
    optimizer = _span([e for e in events if e.name.startswith("Optimizer.step")])
    found: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    for event in events:
        if not event.name.startswith("aten::"):
            continue
        start = event.time_range.start
        if optimizer[0] <= start < optimizer[1]:
            kind = OPTIMIZER
        elif (first := _PRODUCTS.get(event.name)) is not None:
            left, right = event.input_shapes[first : first + 2]
            kind = kind_of_product(left, right, sides, rows, backward[0] <= start < backward[1])
        else:
            kind = OTHER
        found[kind] += event.self_cpu_time_total / 1e3
    start, end = _span(events)
    found[OUTSIDE] = (end - start) / 1e3 - sum(found.values())
    return found


def _span(events: Sequence[Any]) -> tuple[float, float]:
    """From the first start to the last end, in microseconds."""
    ranges = [event.time_range for event in events]
    return min((r.start for r in ranges), default=0.0), max((r.end for r in ranges), default=0.0)


def measure(base: nn.Module, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All methods at one length of the sequence."""
    sides = {side for p in base.parameters() if p.dim() == 2 for side in p.shape}
    if options.batch * options.tokens in sides:
        raise SystemExit(f"{options.tokens} tokens are as many as a layer has features; take another number.")
    steps = {name: make_step(base, name, options)[0] for name in METHODS}
    seen: dict[str, list[dict[str, float]]] = defaultdict(list)

    def look(name: str) -> float:
        seen[name].append(work_by_kind(steps[name], sides, options.batch * options.tokens))
        return 0.0

    in_turns({name: partial(look, name) for name in METHODS}, options.rounds)
    least = {name: {k: min(one[k] for one in all_[1:]) for k in KINDS} for name, all_ in seen.items()}
    totals = {name: sum(kinds.values()) for name, kinds in least.items()}
    return [
        {
            "method": name,
            "tokens": options.tokens,
            "milliseconds": least[name],
            "total": totals[name],
            "above_floor": {kind: least[name][kind] - least[FLOOR][kind] for kind in KINDS},
        }
        for name in METHODS
    ]


def main() -> None:
    parser = new_timing_parser(__doc__)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    options = parse(parser, {"hidden": 64, "layers": 2, "tokens": [16], "rounds": 2})
    torch.set_num_threads(options.threads)
    fixed = {"batch": 1, "dropout": 0.0, "autocast": "none", "checkpointing": False, "compile": None}

    # With as many heads for keys as for queries, so that no side is as long as the sequence, which tells kinds apart.
    base = llama(options.hidden, options.layers, kv_heads=8).to(options.device, getattr(torch, options.dtype))
    results: list[dict[str, Any]] = []
    for tokens in options.tokens:
        results += measure(base, argparse.Namespace(**{**vars(options), **fixed, "tokens": tokens}))
    rows = []
    for result in results:
        above = sum(result["above_floor"].values())
        times = [f"{result['milliseconds'][kind]:.1f}" for kind in KINDS]
        rows.append((result["method"], str(result["tokens"]), *times, f"{result['total']:.1f}", f"{above:+.1f}"))
    finish(options, ("method", "tokens", *KINDS, "all, ms", "above the floor"), rows, results)


if __name__ == "__main__":
    main()
