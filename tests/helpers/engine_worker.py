"""One process of an engine: trains a tiny model for two steps per case and writes what it saw.

Run by `test_engines.py` with the environment that torchrun sets: python engine_worker.py ENGINE OUTPUT, where the
engine "each" stands for one case under each of them, for which the processes start once.
"""

from __future__ import annotations

import itertools
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from helpers.adapters import adapted
from helpers.attention import with_attention_of_torch
from helpers.experts import TARGETS, mixture
from helpers.tiny_models import TINY_MODELS
from torch import nn

from peft_reslora import MoRAConfig, ResLoRAConfig
from peft_reslora.training import set_rank, update_and_allocate

# fmt: off
TUNERS = [("input", 1), ("block", 1), ("block", -1), ("middle", 1), ("middle", -1), ("mora", 1)]
# fmt: on
CHECKPOINTING = {"none": None, "non-reentrant": False, "reentrant": True}
CASES = list(itertools.product(TUNERS, CHECKPOINTING))
# Other kinds of blocks, each under all engines; AdaLoRA allocates ranks from whole factors and their gradients.
KINDS = [("block-dora", 1), ("input-adalora", 1), ("block-adalora", 1), ("middle-adalora", 1), ("middle-nested", 1)]
KINDS += [("block-experts", -1), ("block-attention", -1)]
KIND_CASES = list(itertools.product(KINDS, CHECKPOINTING))
CASE_OF_EACH = {
    "ddp": (("middle", -1), "non-reentrant"),
    "fsdp2": (("block", 1), "none"),
    "zero2": (("mora", 1), "none"),
    "zero3": (("input", 1), "reentrant"),
}
LEARNING_RATE = 0.05
BATCH = 4

Results = dict[str, Any]


def case_id(tuner: tuple[str, int], checkpointing: str) -> str:
    return f"{tuner[0]}-{tuner[1]}-{checkpointing}"


FIELDS_OF_KIND: dict[str, dict[str, Any]] = {
    "": {},
    "dora": {"use_dora": True},
    "adalora": {"r": 8, "init_r": 3, "target_r": 1, "total_step": 4},
    "nested": {"nested_ranks": True},
    "experts": TARGETS,
    "attention": {"target_modules": ["attention", "up_proj", "down_proj"]},
}


def build(tuner: tuple[str, int], checkpointing: str) -> nn.Module:
    """The same model with the same adapter in every process, in float64."""
    name, pre_num = tuner
    fields: dict[str, Any] = {"r": 3, "target_modules": TINY_MODELS["llama"].targets}
    shortcut, _, kind = name.partition("-")
    fields |= FIELDS_OF_KIND[kind]
    config = MoRAConfig(**fields) if name == "mora" else ResLoRAConfig(**fields, shortcut=shortcut, pre_num=pre_num)
    base = mixture("qwen3_moe") if kind == "experts" else TINY_MODELS["llama"].make()
    model = adapted((with_attention_of_torch(base) if kind == "attention" else base).double(), config).train()
    if kind == "nested":
        set_rank(model, 2, in_training_only=True)
    model.enable_input_require_grads()
    if (use_reentrant := CHECKPOINTING[checkpointing]) is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    return model


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(1, 53, (BATCH, 7), generator=generator) for _ in range(2)]


def loss_of(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    return model(input_ids=rows).logits.square().mean()


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name.removeprefix("module."): p for name, p in model.named_parameters() if p.requires_grad}


def train(
    model: nn.Module,
    backward: Callable[[torch.Tensor], Any],
    step: Callable[[], Any],
    gradient: Callable[[nn.Parameter], torch.Tensor],
    rank: int,
    world: int,
) -> Results:
    """Two steps; the losses, averaged over the processes, the gradients of each, and the norms that were recorded.

    Before the steps and after them, the loss of an evaluation, which has no gradients.
    """

    def averaged(loss: torch.Tensor) -> float:
        mean = loss.detach().double() / world
        if world > 1:
            dist.all_reduce(mean)
        return float(mean)

    def evaluated() -> float:
        model.eval()
        with torch.no_grad():
            loss = averaged(loss_of(model, batches()[0].chunk(world)[rank]))
        model.train()
        return loss

    results: Results = {"losses": [], "gradients": [], "evaluated": [evaluated()]}
    for rows in batches():
        loss = loss_of(model, rows.chunk(world)[rank])
        results["losses"].append(averaged(loss))
        backward(loss)
        results["gradients"].append({name: gradient(p).clone() for name, p in trainable(model).items()})
        step()
    results["evaluated"].append(evaluated())
    results["norms"] = {
        name.removeprefix("module."): b.clone() for name, b in model.named_buffers() if "lora_norm" in name
    }
    return results


def plain(model: nn.Module) -> Results:
    """The reference: the whole batch in this process."""
    optimizer = torch.optim.SGD(trainable(model).values(), lr=LEARNING_RATE)
    return train(model, torch.Tensor.backward, _stepper(optimizer, model), lambda p: p.grad, 0, 1)


def _stepper(optimizer: torch.optim.Optimizer, model: nn.Module) -> Callable[[], None]:
    """A step of the optimizer, with the allocation of ranks from the averaged gradients."""
    allocated = _then_allocate(optimizer.step, model)

    def step() -> None:
        allocated()
        optimizer.zero_grad()

    return step


def _then_allocate(step: Callable[[], Any], model: nn.Module) -> Callable[[], None]:
    """The step, after which the ranks of a model with AdaLoRA are allocated."""
    steps = itertools.count(1)

    def allocated() -> None:
        step()
        if getattr(model.peft_config["default"], "total_step", None) is not None:
            update_and_allocate(model, next(steps))

    return allocated


def ddp(model: nn.Module) -> Results:
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(trainable(wrapped).values(), lr=LEARNING_RATE)
    ranks = dist.get_rank(), dist.get_world_size()
    return train(wrapped, torch.Tensor.backward, _stepper(optimizer, model), lambda p: p.grad, *ranks)


def fsdp2(model: nn.Module) -> Results:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.base_model.model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(trainable(model).values(), lr=LEARNING_RATE)
    ranks = dist.get_rank(), dist.get_world_size()
    return train(model, torch.Tensor.backward, _stepper(optimizer, model), lambda p: p.grad.full_tensor(), *ranks)


def zero(model: nn.Module, stage: int) -> Results:
    from deepspeed.utils import safe_get_full_grad

    deepspeed = import_deepspeed()

    config = {
        "train_micro_batch_size_per_gpu": BATCH // dist.get_world_size(),
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.SGD(trainable(model).values(), lr=LEARNING_RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    ranks = dist.get_rank(), dist.get_world_size()
    return train(engine, engine.backward, _then_allocate(engine.step, model), safe_get_full_grad, *ranks)


def import_deepspeed() -> Any:
    """DeepSpeed without the operators that it would compile first, and wait for each other's compilers."""
    import deepspeed

    deepspeed.ops.__compatible_ops__.update(dict.fromkeys(deepspeed.ops.__compatible_ops__, False))
    return deepspeed


def start_accelerate() -> None:
    """Let accelerate use the engine that `accelerate launch` was told to use.

    It shards on accelerators only, and on CPUs would use DDP or nothing at all, without a word (read in 1.15).
    """
    from accelerate import PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state(reset_partial_state=True)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED"):
        import_deepspeed()
    PartialState(cpu=True)
    if os.environ.get("ACCELERATE_USE_FSDP") or os.environ.get("ACCELERATE_USE_DEEPSPEED"):
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def accelerated(model: nn.Module) -> Results:
    """Whatever engine `accelerate launch` was told to use."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedType

    accelerator = Accelerator()
    optimizer = torch.optim.SGD(trainable(model).values(), lr=LEARNING_RATE)
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    if deepspeed:
        plugin = accelerator.state.deepspeed_plugin
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = BATCH // accelerator.num_processes
        plugin.deepspeed_config["zero_allow_untested_optimizer"] = True
        plugin.deepspeed_config["gradient_clipping"] = 1e6
    prepared, optimizer = accelerator.prepare(model, optimizer)

    def gradient(p: nn.Parameter) -> torch.Tensor:
        if deepspeed:  # accelerate steps within `backward`: the second loss shows the gradient
            return torch.zeros(0)
        return p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad

    ranks = accelerator.process_index, accelerator.num_processes
    results = train(prepared, accelerator.backward, _stepper(optimizer, model), gradient, *ranks)
    return {**results, "engine": accelerator.distributed_type.value}


RUNNERS: dict[str, Callable[[nn.Module], Results]] = {
    "ddp": ddp,
    "fsdp2": fsdp2,
    "zero2": lambda model: zero(model, 2),
    "zero3": lambda model: zero(model, 3),
    "accelerate": accelerated,
}


def attempt(engine: str, tuner: tuple[str, int], checkpointing: str) -> Results | str:
    try:
        return RUNNERS[engine](build(tuner, checkpointing))
    except Exception:
        return traceback.format_exc()


def main(engine: str, output: str) -> None:
    engine, _, kinds = engine.partition("-")
    if engine.startswith("zero"):
        import_deepspeed().init_distributed("gloo")
    elif engine == "accelerate":
        start_accelerate()
    else:
        dist.init_process_group("gloo")
    torch.set_num_threads(1)
    if kinds:
        results = {case_id(*case): attempt(engine, *case) for case in KIND_CASES}
    elif engine == "each":
        results = {name: attempt(name, *case) for name, case in CASE_OF_EACH.items()}
    else:
        cases = [(tuner, "non-reentrant") for tuner in TUNERS] if engine == "accelerate" else CASES
        results = {case_id(*case): attempt(engine, *case) for case in cases}
    if dist.get_rank() == 0:
        torch.save(results, output)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(__file__)))
    main(*sys.argv[1:])
