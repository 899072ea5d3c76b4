"""Training step of MoRA against PEFT's LoRA of the same parameter count, on a Llama with all linear layers adapted.

    python benchmarks/mora_step.py
    python benchmarks/mora_step.py --hidden 512 --rank 64 --device cuda --dtype bfloat16

A step is forward, backward and optimiser step. The methods take turns within one process, so that what slows the
machine slows all of them; printed are the median over the rounds of each round's ratio to LoRA, and its quartiles.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import peft_reslora  # noqa: F401  registers MoRA
from peft_reslora.mora import MoRAConfig


def make_step(config: PeftConfig, options: argparse.Namespace) -> tuple[Callable[[], None], int]:
    """A function that trains one step, and the number of parameters it trains."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=options.hidden,
            intermediate_size=options.hidden * 8 // 3,
            num_hidden_layers=options.layers,
            num_attention_heads=options.hidden // 64,
            num_key_value_heads=options.hidden // 64,
            vocab_size=1000,
        )
    )
    model = get_peft_model(base.to(options.device, getattr(torch, options.dtype)), config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    tokens = torch.randint(0, 1000, (options.batch, options.length), device=options.device)

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, sum(p.numel() for p in trained)


def measure(step: Callable[[], None], device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()

    configs: dict[str, PeftConfig] = {
        "LoRA": LoraConfig(r=options.rank, target_modules="all-linear", lora_alpha=2 * options.rank),
        **{
            mora_type: MoRAConfig(r=options.rank, mora_type=mora_type, target_modules="all-linear")
            for mora_type in ("sharing", "decoupling", "rotation")
        },
    }
    steps = {name: make_step(config, options) for name, config in configs.items()}
    for step, _ in steps.values():
        for _ in range(2):
            step()
    rounds = [
        {name: measure(step, options.device) for name, (step, _) in steps.items()} for _ in range(options.rounds)
    ]
    print(f"LoRA: {statistics.median(r['LoRA'] for r in rounds) * 1e3:.1f} ms, {steps['LoRA'][1]} parameters")
    for name in ("sharing", "decoupling", "rotation"):
        low, median, high = statistics.quantiles([r[name] / r["LoRA"] for r in rounds], n=4)
        print(f"{name} / LoRA: {median:.3f} (quartiles {low:.3f} to {high:.3f}), {steps[name][1]} parameters")


if __name__ == "__main__":
    main()
