"""`merge_and_unload` of ResLoRA and MoRA against PEFT's LoRA, in turns within one process.

    python benchmarks/merge_time.py --hidden 1024 --layers 8

Each round merges a new copy of the adapted model; printed are the time over LoRA's, as ratio of the minima over all
rounds with the quartiles of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import copy
from functools import partial
from typing import Any

import torch
from common import Ratio, finish, in_turns, llama, new_timing_parser, parse, seconds
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn

from peft_reslora import MoRAConfig, ResLoRAConfig

BASELINE = "LoRA"
VARIANTS: dict[str, dict[str, Any]] = {
    "ResLoRA input, input_norm": {"shortcut": "input"},
    "ResLoRA input, weight_norm": {"shortcut": "input", "merge_estimator": "weight_norm"},
    "ResLoRA middle, input_norm": {"shortcut": "middle"},
    "ResLoRA middle, weight_norm": {"shortcut": "middle", "merge_estimator": "weight_norm"},
    "ResLoRA block": {"shortcut": "block"},
    "ResLoRA block, pre_num 3": {"shortcut": "block", "pre_num": 3},
}


def configs(rank: int) -> dict[str, PeftConfig]:
    fields: dict[str, Any] = {"r": rank, "target_modules": "all-linear"}
    return {
        BASELINE: LoraConfig(**fields, init_lora_weights=False),
        **{name: ResLoRAConfig(**fields, init_lora_weights=False, **own) for name, own in VARIANTS.items()},
        **{
            f"MoRA {kind}": MoRAConfig(**fields, mora_type=kind, init_weights=False)
            for kind in ("sharing", "decoupling", "rotation")
        },
    }


def merge_time(base: nn.Module, config: PeftConfig, options: argparse.Namespace) -> float:
    """Seconds of one merge."""
    model = get_peft_model(copy.deepcopy(base), copy.deepcopy(config))
    with torch.no_grad():
        model.train()(input_ids=torch.zeros(1, 8, dtype=torch.long, device=options.device))  # records norms
    return seconds(model.merge_and_unload, options.device)


def main() -> None:
    parser = new_timing_parser(__doc__)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    options = parse(parser, {"hidden": 64, "layers": 2, "rounds": 2})
    torch.set_num_threads(options.threads)

    base = llama(options.hidden, options.layers, vocab=100).to(options.device, getattr(torch, options.dtype))
    jobs = {name: partial(merge_time, base, config, options) for name, config in configs(options.rank).items()}
    times = in_turns(jobs, options.rounds)
    results: list[dict[str, Any]] = [
        {"method": name, "seconds": min(own), "to_lora": Ratio.of(own, times[BASELINE])} for name, own in times.items()
    ]
    rows = [(r["method"], f"{r['seconds']:.4f}", str(r["to_lora"])) for r in results]
    finish(options, ("method", "seconds", "merge / LoRA's (quartiles)"), rows, results)


if __name__ == "__main__":
    main()
