"""A training step of ResLoRA, MoRA and PEFT's own methods against PEFT's LoRA, in turns within one process.

    python benchmarks/train_step.py --layers 4 --batch 1 --tokens 256
    python benchmarks/train_step.py --batch 1 2 4 --tokens 128 512 --autocast bfloat16
    python benchmarks/train_step.py --device cuda --dtype bfloat16 --hidden 2048 --layers 16 --checkpointing

A step is forward, backward, the optimizer's step and zero_grad on a Llama-shaped model, all linear layers adapted. All
methods have about the parameters of LoRA of the same rank, where they let one choose. The floor is the forward of the
frozen base and the backward to its embeddings, without an optimizer: what no method can go below.

Printed are, for each method: the step's time (on one CPU thread: the process's) over LoRA's and over the floor's, as
ratio of the minima over all rounds, with the quartiles of the rounds' ratios; tokens per second of the fastest step;
and the peak memory of base, adapter, optimizer state and two steps together. On a GPU that is what PyTorch had
allocated there at most; on a CPU, by how much the resident memory of a process that trains with this method alone grew
at most after its imports. With several numbers for --batch or --tokens, all pairs are measured.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import (
    Ratio,
    finish,
    growth_of_process,
    in_turns,
    is_cuda,
    llama,
    new_timing_parser,
    parse,
    plot_ratios,
    seconds,
    twin,
)
from peft import (
    AdaLoraConfig,
    C3AConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    PeftConfig,
    get_peft_model,
)
from torch import nn

from peft_reslora import MoRAConfig, ResLoRAConfig
from peft_reslora.mora.operators import MoRAType
from peft_reslora.reslora.config import Shortcut

FLOOR, BASELINE = "frozen base", "LoRA"
SMALLEST = {"hidden": 64, "layers": 2, "batch": 1, "tokens": 2}
QUICK = {"hidden": 64, "layers": 2, "batch": [1], "tokens": [16], "rounds": 2}
_ALL_STEPS = 10**6  # of AdaLoRA's schedule, which has to know


def configs(rank: int, hidden: int, dropout: float) -> dict[str, PeftConfig | None]:
    """What each method is to be configured as, besides its targets; None for no adapter."""
    half = max(1, rank // 2)
    found: dict[str, PeftConfig | None] = {
        FLOOR: None,
        BASELINE: LoraConfig(r=rank, lora_dropout=dropout),
        "DoRA": LoraConfig(r=rank, lora_dropout=dropout, use_dora=True),
        "AdaLoRA": AdaLoraConfig(init_r=rank, target_r=half, lora_dropout=dropout, total_step=_ALL_STEPS),
        "LoHa": LoHaConfig(r=half, module_dropout=dropout),
        "LoKr": LoKrConfig(r=rank, module_dropout=dropout),
        "C3A": C3AConfig(block_size=c3a_block(hidden, rank)),
        "MiSS": MissConfig(r=2 * rank, miss_dropout=dropout),
    }
    mora_types: tuple[MoRAType, ...] = ("sharing", "decoupling", "rotation")
    for mora_type in mora_types:
        found[f"MoRA {mora_type}"] = MoRAConfig(r=rank, mora_dropout=dropout, mora_type=mora_type)
    variants: dict[Shortcut, tuple[int, ...]] = {"input": (1,), "block": (1, 4, -1), "middle": (1, 4, -1)}
    for shortcut, pre_num in ((s, n) for s, numbers in variants.items() for n in numbers):
        config = ResLoRAConfig(r=rank, lora_dropout=dropout, shortcut=shortcut, pre_num=pre_num)
        found[f"ResLoRA {shortcut}, pre_num {pre_num}"] = config
    return found


def c3a_block(hidden: int, rank: int) -> int:
    """The block size that divides all features and gives a square layer the parameters of LoRA of the same rank."""
    divisor = math.gcd(hidden // 2, hidden * 11 // 4)
    return math.gcd(divisor, 1 << max(0, (hidden // (2 * rank)).bit_length() - 1))


METHODS = tuple(configs(rank=8, hidden=64, dropout=0.0))


def make_step(base: nn.Module, name: str, options: argparse.Namespace) -> tuple[Callable[[], None], int]:
    """A function that trains one step with a method, and how many parameters it trains."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 1000, (options.batch, options.tokens), generator=generator).to(options.device)
    model: Any = twin(base)
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    autocast: dict[str, Any] = {"device_type": torch.device(options.device).type, "enabled": False}
    if options.autocast != "none":
        autocast |= {"enabled": True, "dtype": getattr(torch, options.autocast)}

    if (config := configs(options.rank, options.hidden, options.dropout)[name]) is None:
        model.requires_grad_(False).train()
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        model = compiled(model, options)

        def floor() -> None:
            with torch.autocast(**autocast):
                loss = model(inputs_embeds=embeddings, labels=ids).loss
            loss.backward()
            embeddings.grad = None

        return floor, 0

    config.target_modules = "all-linear"  # type: ignore[attr-defined]
    model = get_peft_model(model, config).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model, tuner = compiled(model, options), model.base_model
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    steps = iter(range(1, _ALL_STEPS))

    def step() -> None:
        with torch.autocast(**autocast):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        if isinstance(config, AdaLoraConfig):
            tuner.update_and_allocate(next(steps))
        optimizer.zero_grad()

    return step, sum(parameter.numel() for parameter in trained)


def compiled(model: Any, options: argparse.Namespace) -> Any:
    """By torch.compile, if that was asked for."""
    return torch.compile(model, backend=options.compile) if options.compile else model


def make_base(options: argparse.Namespace) -> nn.Module:
    """On its device, in its dtype."""
    return llama(options.hidden, options.layers).to(options.device, getattr(torch, options.dtype))


def two_steps(method: tuple[str, argparse.Namespace]) -> None:
    """From the base model on, in a process of its own."""
    name, options = method
    torch.set_num_threads(options.threads)
    step, _ = make_step(make_base(options), name, options)
    step()
    step()


def peak_memory(step: Callable[[], None], name: str, before: int, options: argparse.Namespace) -> int:
    """Bytes, as the docstring of this file says; on a GPU less what other methods hold there (`before`)."""
    if not is_cuda(options.device):
        small = argparse.Namespace(**{**vars(options), **SMALLEST})
        return growth_of_process(two_steps, (name, small), (name, options))
    torch.cuda.reset_peak_memory_stats(options.device)
    step()
    step()
    return torch.cuda.max_memory_allocated(options.device) - before


def measure(base: nn.Module, names: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """All methods at one batch size and sequence length."""
    size = sum(parameter.nbytes for parameter in base.parameters())
    steps: dict[str, Callable[[], None]] = {}
    parameters: dict[str, int] = {}
    memory: dict[str, int] = {}
    for name in names:
        others = torch.cuda.memory_allocated(options.device) - size if is_cuda(options.device) else 0
        steps[name], parameters[name] = make_step(base, name, options)
        memory[name] = peak_memory(steps[name], name, others, options)
    jobs = {name: partial(seconds, step, options.device) for name, step in steps.items()}
    times = in_turns(jobs, options.rounds, warmups=2)
    return [
        {
            "method": name,
            "batch": options.batch,
            "tokens": options.tokens,
            "parameters": parameters[name],
            "seconds": min(times[name]),
            "to_lora": Ratio.of(times[name], times[BASELINE]),
            "to_floor": Ratio.of(times[name], times[FLOOR]),
            "tokens_per_second": options.batch * options.tokens / min(times[name]),
            "peak_bytes": memory[name],
            "peak_to_lora": memory[name] / max(1, memory[BASELINE]),
        }
        for name in names
    ]


HEADER = (
    "method",
    "batch x tokens",
    "parameters",
    "step / LoRA's (quartiles)",
    "step / floor",
    "tokens/s",
    "peak MiB",
    "/ LoRA's",
)


def row(result: dict[str, Any]) -> tuple[str, ...]:
    return (
        result["method"],
        f"{result['batch']} x {result['tokens']}",
        str(result["parameters"]),
        str(result["to_lora"]),
        f"{result['to_floor'].minima:.2f}",
        f"{result['tokens_per_second']:.0f}",
        f"{result['peak_bytes'] / 2**20:.0f}",
        f"{result['peak_to_lora']:.2f}",
    )


def main() -> None:
    parser = new_timing_parser(__doc__)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, nargs="+", default=[2])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512], help="of each sequence")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--autocast", choices=["none", "bfloat16", "float16"], default="none")
    parser.add_argument("--checkpointing", action="store_true", help="recompute each block in the backward")
    parser.add_argument("--compile", nargs="?", const="inductor", metavar="BACKEND", help="by torch.compile")
    parser.add_argument("--only", nargs="+", choices=METHODS, metavar="METHOD", default=METHODS)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the ratios to LoRA into a PNG")
    options = parse(parser, QUICK)
    torch.set_num_threads(options.threads)

    names = list(dict.fromkeys((FLOOR, BASELINE, *options.only)))
    base = make_base(options)
    results: list[dict[str, Any]] = []
    for batch, tokens in itertools.product(options.batch, options.tokens):
        one = argparse.Namespace(**{**vars(options), "batch": batch, "tokens": tokens})
        results += measure(base, names, one)
    sizes = [f", {r['batch']} x {r['tokens']}" if len(results) > len(names) else "" for r in results]
    ratios = {r["method"] + size: r["to_lora"] for r, size in zip(results, sizes, strict=True)}
    draw = partial(plot_ratios, ratios, title="Training step against PEFT's LoRA")
    finish(options, HEADER, [row(result) for result in results], results, draw)
    if options.plot is not None:
        draw(options.plot)


if __name__ == "__main__":
    main()
