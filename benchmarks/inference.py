"""Generation with ResLoRA and MoRA against PEFT's LoRA, unmerged and merged, in turns within one process.

    python benchmarks/inference.py
    python benchmarks/inference.py --device cuda --dtype bfloat16 --hidden 2048 --layers 16

One sequence, greedily, with the cache of keys and values, all linear layers adapted. Printed are the milliseconds per
new token and the time over LoRA's, unmerged over unmerged and merged over merged, as ratio of the minima over all
rounds with the quartiles of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import Ratio, finish, in_turns, llama, new_timing_parser, parse, plot_ratios, seconds, twin
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn

from peft_reslora import MoRAConfig, ResLoRAConfig
from peft_reslora.mora.operators import MoRAType
from peft_reslora.reslora.config import Shortcut

BASELINE = "LoRA"


def configs(rank: int) -> dict[str, PeftConfig]:
    fields: dict[str, Any] = {"r": rank, "target_modules": "all-linear"}
    found: dict[str, PeftConfig] = {BASELINE: LoraConfig(**fields, init_lora_weights=False)}
    variants: dict[Shortcut, tuple[int, ...]] = {"input": (1,), "block": (1, -1), "middle": (1, -1)}
    for shortcut, pre_num in ((s, n) for s, numbers in variants.items() for n in numbers):
        config = ResLoRAConfig(**fields, init_lora_weights=False, shortcut=shortcut, pre_num=pre_num)
        found[f"ResLoRA {shortcut}, pre_num {pre_num}"] = config
    types: tuple[MoRAType, ...] = ("sharing", "decoupling", "rotation")
    for mora_type in types:
        found[f"MoRA {mora_type}"] = MoRAConfig(**fields, init_weights=False, mora_type=mora_type)
    return found


def make_generation(
    base: nn.Module, config: PeftConfig, merged: bool, options: argparse.Namespace
) -> Callable[[], Any]:
    """A function that generates --tokens tokens."""
    model: Any = get_peft_model(copy.deepcopy(base) if merged else twin(base), config)
    prompt = torch.randint(3, 100, (1, options.prompt), generator=torch.Generator().manual_seed(0)).to(options.device)
    if merged:
        with torch.no_grad():
            model.train()(input_ids=prompt)  # records norms
        model = model.merge_and_unload()
    length = {"max_new_tokens": options.tokens, "min_new_tokens": options.tokens}
    fixed = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt), **length}
    return partial(model.eval().generate, input_ids=prompt, **fixed)


def main() -> None:
    parser = new_timing_parser(__doc__)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=16, help="tokens before the first new one")
    parser.add_argument("--tokens", type=int, default=16, help="new ones")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    options = parse(parser, {"hidden": 64, "layers": 2, "prompt": 2, "tokens": 3, "rounds": 2})
    torch.set_num_threads(options.threads)

    base = llama(options.hidden, options.layers, vocab=100).to(options.device, getattr(torch, options.dtype))
    results: list[dict[str, Any]] = []
    for state in ("unmerged", "merged"):
        runs = {n: make_generation(base, c, state == "merged", options) for n, c in configs(options.rank).items()}
        times = in_turns({n: partial(seconds, run, options.device) for n, run in runs.items()}, options.rounds)
        for name, own in times.items():
            per_token = min(own) / options.tokens
            ratio = Ratio.of(own, times[BASELINE])
            results.append({"method": name, "state": state, "seconds_per_token": per_token, "to_lora": ratio})
    rows = [(r["method"], r["state"], f"{1e3 * r['seconds_per_token']:.2f}", str(r["to_lora"])) for r in results]
    ratios = {f"{r['method']}, {r['state']}": r["to_lora"] for r in results}
    draw = partial(plot_ratios, ratios, title="Time per generated token against PEFT's LoRA")
    finish(options, ("method", "", "ms per token", "time / LoRA's (quartiles)"), rows, results, draw)


if __name__ == "__main__":
    main()
