"""Export of LoHa and LoKr against PEFT's own conversion to LoRA, at the same rank, in turns within one process.

    python benchmarks/export_time.py                    # 4096 x 4096, rank 64: about five minutes on one CPU core
    python benchmarks/export_time.py --size 1024 --rounds 5

On one linear layer with random factors. Printed are the times, ours over PEFT's as ratio of the minima over all rounds
with the quartiles of the rounds' ratios, and the relative errors ||delta - B A||_F / ||delta||_F of both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import Ratio, finish, in_turns, new_timing_parser, parse, seconds
from peft import LoHaConfig, LoKrConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora.conversion import convert_to_lora
from torch import Tensor, nn

from peft_reslora.export import export_lora

CONFIGS: dict[str, PeftConfig] = {
    "LoHa r=8": LoHaConfig(r=8, target_modules=["0"], init_weights=False),
    "LoKr r=8": LoKrConfig(r=8, target_modules=["0"], init_weights=False),
    "LoKr r=8, decompose_both": LoKrConfig(r=8, target_modules=["0"], init_weights=False, decompose_both=True),
}
StateDict = dict[str, Tensor]


def adapted(config: PeftConfig, size: int) -> Any:
    torch.manual_seed(0)
    return get_peft_model(nn.Sequential(nn.Linear(size, size, bias=False)), config)


def conversions(model: PeftModel, rank: int) -> dict[str, Callable[[], StateDict]]:
    return {
        "ours": lambda: export_lora(model, rank=rank).state_dict,
        "theirs": lambda: convert_to_lora(model, rank=rank)[1],
    }


@torch.no_grad()
def error(state_dict: StateDict, model: PeftModel) -> float:
    """||delta - B A||_F / ||delta||_F, with the delta weight of the layer itself."""
    layer: Any = model.get_submodule("base_model.model.0")
    delta = layer.get_delta_weight("default")
    A, B = (state_dict[f"base_model.model.0.lora_{factor}.weight"] for factor in "AB")
    delta, A, B = (tensor.to(layer.weight.device, torch.float32) for tensor in (delta, A, B))
    return float((delta - B @ A).norm() / delta.norm())


def main() -> None:
    parser = new_timing_parser(__doc__)
    parser.add_argument("--size", type=int, default=4096, help="features of the square layer")
    parser.add_argument("--rank", type=int, default=64, help="of the LoRA")
    parser.add_argument("--rounds", type=int, default=3)
    options = parse(parser, {"size": 64, "rank": 8, "rounds": 2})
    torch.set_num_threads(options.threads)

    results: list[dict[str, Any]] = []
    for name, config in CONFIGS.items():
        model = adapted(config, options.size).to(options.device, getattr(torch, options.dtype))
        both = conversions(model, options.rank)
        jobs = {who: partial(seconds, run, options.device) for who, run in both.items()}
        times = in_turns(jobs, options.rounds, warmups=0)
        results.append(
            {
                "method": name,
                **{f"{who}_seconds": min(values) for who, values in times.items()},
                **{f"{who}_error": error(convert(), model) for who, convert in both.items()},
                "to_theirs": Ratio.of(times["ours"], times["theirs"]),
            }
        )
    rows = [
        (
            r["method"],
            f"{r['ours_seconds']:.4f}",
            f"{r['theirs_seconds']:.4f}",
            str(r["to_theirs"]),
            f"{r['ours_error']:.6f}",
            f"{r['theirs_error']:.6f}",
        )
        for r in results
    ]
    header = ("method", "ours, s", "PEFT's, s", "ours / PEFT's (quartiles)", "our error", "PEFT's error")
    finish(options, header, rows, results)


if __name__ == "__main__":
    main()
