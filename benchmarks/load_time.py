"""Loading of a saved ResLoRA or MoRA adapter, with all its checks, against PEFT's LoRA, in turns within one process.

    python benchmarks/load_time.py                    # 200 MB of adapter: about three minutes on one CPU core
    python benchmarks/load_time.py --megabytes 20

Each round loads every adapter with PeftModel.from_pretrained, from files that the system holds in memory, onto a model
of its own that shares its base weights with the others. Printed are the time over LoRA's, as ratio of the minima over
all rounds with the quartiles of the rounds' ratios, and the size of the weights.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Ratio, finish, in_turns, llama, new_timing_parser, parse, seconds, twin
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

from peft_reslora import MoRAConfig, ResLoRAConfig

BASELINE = "LoRA"
WEIGHTS = "adapter_model.safetensors"


def configs(rank: int) -> dict[str, PeftConfig]:
    fields: dict[str, Any] = {"r": rank, "target_modules": "all-linear"}
    return {
        BASELINE: LoraConfig(**fields),
        "ResLoRA input": ResLoRAConfig(**fields, shortcut="input"),
        "ResLoRA block": ResLoRAConfig(**fields, shortcut="block"),
        "ResLoRA middle": ResLoRAConfig(**fields, shortcut="middle"),
        "MoRA sharing": MoRAConfig(**fields, mora_type="sharing"),
    }


def rank_of(base: nn.Module, megabytes: float) -> int:
    """The rank of a LoRA on all linear layers but the head that has about this size in float32."""
    layers = [m for name, m in base.named_modules() if isinstance(m, nn.Linear) and not name.endswith("lm_head")]
    return max(1, round(megabytes * 1e6 / 4 / sum(m.in_features + m.out_features for m in layers)))


@torch.no_grad()
def save(base: nn.Module, config: PeftConfig, folder: Path) -> None:
    """An adapter as training leaves it: with random factors, and a config that says how they began."""
    model: Any = get_peft_model(twin(base), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    model.save_pretrained(str(folder))


def load_time(base: nn.Module, folder: Path, options: argparse.Namespace) -> float:
    """Seconds of one load."""
    model: Any = twin(base)
    load = partial(PeftModel.from_pretrained, model, folder, torch_device=options.device)
    return seconds(load, options.device)


def main() -> None:
    parser = new_timing_parser(__doc__)
    parser.add_argument("--megabytes", type=float, default=200, help="of LoRA's weights")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    options = parse(parser, {"megabytes": 0.1, "hidden": 64, "layers": 2, "rounds": 2})
    torch.set_num_threads(options.threads)

    base = llama(options.hidden, options.layers, vocab=100).to(options.device, getattr(torch, options.dtype))
    with tempfile.TemporaryDirectory() as folder:
        folders = {name: Path(folder, name) for name in configs(1)}
        for name, config in configs(rank_of(base, options.megabytes)).items():
            save(base, config, folders[name])
        times = in_turns({n: partial(load_time, base, path, options) for n, path in folders.items()}, options.rounds)
        sizes = {name: (path / WEIGHTS).stat().st_size for name, path in folders.items()}
    results: list[dict[str, Any]] = [
        {"method": name, "bytes": sizes[name], "seconds": min(own), "to_lora": Ratio.of(own, times[BASELINE])}
        for name, own in times.items()
    ]
    rows = [(r["method"], f"{r['bytes'] / 1e6:.1f}", f"{r['seconds']:.3f}", str(r["to_lora"])) for r in results]
    finish(options, ("method", "MB", "seconds", "load / LoRA's (quartiles)"), rows, results)


if __name__ == "__main__":
    main()
