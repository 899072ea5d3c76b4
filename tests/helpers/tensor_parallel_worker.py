"""One process of transformers' tensor parallelism: compares a sharded model with the whole one.

Run by `test_tensor_parallel.py` with the environment that torchrun sets: python tensor_parallel_worker.py BASE OUTPUT
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from helpers.oracle import randomize_adapters, relative_error
from helpers.tiny_models import TINY_MODELS
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM

from peft_reslora import MoRAConfig, ResLoRAConfig

# Row-wise sharded layers (o_proj, down_proj) fail in training in PEFT 0.21.2 with transformers 5.23, in LoRA too:
# what PEFT takes for their width is the width of one shard. Without gradients all layers are right.
TARGETS = {"inference": TINY_MODELS["llama"].targets, "training": ["q_proj", "k_proj", "v_proj", "gate_proj"]}
TUNERS: dict[str, Any] = {
    "lora": LoraConfig,
    "input": lambda **fields: ResLoRAConfig(shortcut="input", **fields),
    "block": lambda **fields: ResLoRAConfig(shortcut="block", pre_num=-1, **fields),
    "middle": lambda **fields: ResLoRAConfig(shortcut="middle", pre_num=-1, **fields),
    "mora": MoRAConfig,
}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def logits_of(model: nn.Module) -> torch.Tensor:
    ids = torch.randint(1, 53, (2, 7), generator=torch.Generator().manual_seed(3))
    return whole(model(input_ids=ids).logits)


def compare(base: str, config: PeftConfig, training: bool) -> dict[str, float]:
    """Relative errors of the logits, and when training of all gradients, by name."""
    plain = randomize_adapters(get_peft_model(AutoModelForCausalLM.from_pretrained(base), config))
    sharded = get_peft_model(AutoModelForCausalLM.from_pretrained(base, tp_plan="auto"), config)
    parameters = dict(plain.named_parameters())
    with torch.no_grad():
        for name, p in sharded.named_parameters():
            if p.requires_grad:
                value = parameters[name].detach()
                p.copy_(distribute_tensor(value, p.device_mesh, p.placements) if isinstance(p, DTensor) else value)
    with torch.set_grad_enabled(training):
        expected, actual = logits_of(plain), logits_of(sharded)
    errors = {"logits": relative_error(actual, expected)}
    if training:
        expected.square().mean().backward()
        actual.square().mean().backward()
        grads = {name: whole(p.grad) for name, p in sharded.named_parameters() if p.grad is not None}
        errors.update({name: relative_error(grad, parameters[name].grad) for name, grad in grads.items()})
    return errors


def main(base: str, output: str) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    results: dict[tuple[str, str], dict[str, float] | str] = {}
    for mode, targets in TARGETS.items():
        for tuner, config in TUNERS.items():
            try:
                results[tuner, mode] = compare(base, config(r=3, target_modules=targets), mode == "training")
            except (ValueError, RuntimeError) as error:
                results[tuner, mode] = str(error)
    if dist.get_rank() == 0:
        torch.save(results, output)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
