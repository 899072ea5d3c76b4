"""Time of the export of LoHa and LoKr against PEFT's own conversion to LoRA, at the same rank.

    python benchmarks/export_time.py                    # 4096 x 4096, rank 64: about five minutes on one CPU core
    python benchmarks/export_time.py --size 1024 --repeats 5

Both run in turn in one process, on one linear layer with random factors. Prints the median times, their ratio
(ours/PEFT's) and both relative errors in the Frobenius norm.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from statistics import median

import torch
from peft import LoHaConfig, LoKrConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora.conversion import convert_to_lora
from torch import Tensor, nn

from peft_reslora.export import export_lora

StateDict = dict[str, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096, help="features of the square layer")
    parser.add_argument("--rank", type=int, default=64, help="of the LoRA")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    print(f"{args.size} x {args.size}, rank {args.rank}, {args.threads} thread(s), torch {torch.__version__}")
    for name, config in {
        "LoHa r=8": LoHaConfig(r=8, target_modules=["0"], init_weights=False),
        "LoKr r=8": LoKrConfig(r=8, target_modules=["0"], init_weights=False),
        "LoKr r=8, decompose_both": LoKrConfig(r=8, target_modules=["0"], init_weights=False, decompose_both=True),
    }.items():
        print(f"{name:26}{compare(config, args.size, args.rank, args.repeats)}")


def compare(config: PeftConfig, size: int, rank: int, repeats: int) -> str:
    """One line: seconds of both, their ratio, the errors of both."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(size, size, bias=False)), config)
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(repeats):
        exported = timed(lambda: export_lora(model, rank=rank).state_dict, ours)
        converted = timed(lambda: convert_to_lora(model, rank=rank)[1], theirs)
    return (
        f"{median(ours):.3f} s / {median(theirs):.3f} s = {median(ours) / median(theirs):.4f}, "
        f"errors {error(exported, model):.6f} / {error(converted, model):.6f}"
    )


def timed(convert: Callable[[], StateDict], seconds: list[float]) -> StateDict:
    start = time.perf_counter()
    result = convert()
    seconds.append(time.perf_counter() - start)
    return result


@torch.no_grad()
def error(state_dict: StateDict, model: PeftModel) -> float:
    """||delta - B @ A||_F / ||delta||_F, with the delta weight of the layer itself."""
    delta = model.base_model.model[0].get_delta_weight("default")
    A, B = (state_dict[f"base_model.model.0.lora_{factor}.weight"] for factor in "AB")
    return float((delta - B @ A).norm() / delta.norm())


if __name__ == "__main__":
    main()
