"""Training step of ResLoRA against PEFT's LoRA: forward, backward and optimiser step, interleaved in one process.

    python benchmarks/step_time.py --hidden 512 --layers 8 --tokens 256

A Llama-shaped model, all linear layers targeted, same r and targets. Prints for each variant the median ratio of its
step to the LoRA step that ran directly before it, with quartiles, and the ratio of peak memory of one step.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import time

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_reslora import ResLoRAConfig

VARIANTS = {
    "input": {"shortcut": "input"},
    "input, weight_norm": {"shortcut": "input", "merge_estimator": "weight_norm"},
    "middle": {"shortcut": "middle"},
    "middle, m=all": {"shortcut": "middle", "pre_num": -1},
    "block": {"shortcut": "block"},
    "block, m=all": {"shortcut": "block", "pre_num": -1},
}


class Trainee:
    """A model with an adapter, its optimiser, and one step of training."""

    def __init__(self, base: nn.Module, config: LoraConfig, ids: torch.Tensor) -> None:
        self.model = get_peft_model(copy.deepcopy(base), config).train()
        self.optimizer = torch.optim.AdamW(p for p in self.model.parameters() if p.requires_grad)
        self.ids = ids

    def step(self) -> float:
        start = time.perf_counter()
        self.model(input_ids=self.ids, labels=self.ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start

    def peak_memory(self) -> int:
        """Bytes of the tensors saved for the backward pass, each storage counted once."""
        storages: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.model(input_ids=self.ids, labels=self.ids).loss
        loss.backward()
        self.optimizer.zero_grad()
        return sum(storages.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    args = parser.parse_args()

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=1000,
    )
    base = LlamaForCausalLM(config)
    ids = torch.randint(0, 1000, (args.batch, args.tokens))
    fields = {"r": args.rank, "lora_dropout": args.dropout, "target_modules": "all-linear"}
    lora = Trainee(base, LoraConfig(**fields), ids)
    lora_memory = lora.peak_memory()
    print(f"{args}\nvariant              step ratio (quartiles)   saved tensors ratio")
    for name in args.only:
        ours = Trainee(base, ResLoRAConfig(**fields, **VARIANTS[name]), ids)
        memory = ours.peak_memory()
        ratios = []
        for i in range(args.steps + 2):
            first, second = (lora, ours) if i % 2 else (ours, lora)
            times = {id(first): first.step(), id(second): second.step()}
            ratios.append(times[id(ours)] / times[id(lora)])
        low, median, high = statistics.quantiles(ratios[2:], n=4)
        print(f"{name:20} {median:.3f} ({low:.3f}-{high:.3f})      {memory / lora_memory:.3f}", flush=True)
        del ours
        gc.collect()


if __name__ == "__main__":
    main()
