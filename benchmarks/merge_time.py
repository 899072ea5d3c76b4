"""`merge_and_unload` of ResLoRA against PEFT's LoRA, interleaved in one process.

python benchmarks/merge_time.py --hidden 1024 --layers 8
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_reslora import ResLoRAConfig

VARIANTS = {
    "input, weight_norm": {"shortcut": "input", "merge_estimator": "weight_norm"},
    "input, input_norm": {"shortcut": "input"},
    "middle, input_norm": {"shortcut": "middle"},
    "block": {"shortcut": "block"},
    "block, m=3": {"shortcut": "block", "pre_num": 3},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        vocab_size=100,
    )
    base = LlamaForCausalLM(config).to(getattr(torch, args.dtype))
    ids = torch.randint(0, 100, (1, 8))

    def seconds(adapter: LoraConfig) -> float:
        model = get_peft_model(copy.deepcopy(base), adapter)
        with torch.no_grad():
            model.train()(input_ids=ids)  # records norms
        start = time.perf_counter()
        model.merge_and_unload()
        return time.perf_counter() - start

    fields = {"r": args.rank, "target_modules": "all-linear", "init_lora_weights": False}
    print(f"{args}\nvariant              merge_and_unload, ours / LoRA (min-max)")
    for name, variant in VARIANTS.items():
        ratios = []
        for i in range(args.repeats + 1):
            lora, ours = LoraConfig(**fields), ResLoRAConfig(**fields, **variant)
            times = {type(c): seconds(c) for c in ((lora, ours) if i % 2 else (ours, lora))}
            ratios.append(times[ResLoRAConfig] / times[LoraConfig])
        print(
            f"{name:20} {statistics.median(ratios[1:]):.2f} ({min(ratios[1:]):.2f}-{max(ratios[1:]):.2f})", flush=True
        )


if __name__ == "__main__":
    main()
