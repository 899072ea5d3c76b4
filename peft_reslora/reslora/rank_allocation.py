"""AdaLoRA's allocation of ranks (arXiv 2303.10512, section 3.2 and 3.3) among the layers of a ResLoRA adapter.

The importance of a direction is that of its entries in E, A and B: sensitivity |w dL/dw| times its uncertainty, both
as moving averages. A gradient is that of the whole loss, so that with shortcut 'block' a direction counts by all
layers that use it. The budget shrinks from init_r to target_r per layer; the directions with the least importance get
E = 0. All of this is computed by PEFT's `RankAllocator` (read in 0.21.2), which sees the factors under its own names.

What is allocated is kept on the chains, so that it needs no tuner: `inject_adapter_in_model` leaves none.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners.adalora.layer import RankAllocator
from torch import nn
from transformers.integrations import deepspeed_config

from peft_reslora.reslora.blocks.adalora import SINGULAR_VALUES, AdaloraBlock
from peft_reslora.reslora.blocks.convolution import columns, from_columns
from peft_reslora.reslora.blocks.linear import FACTOR_NAMES, LinearBlock, is_readable
from peft_reslora.reslora.config import ResLoRAConfig
from peft_reslora.reslora.layer import ResLoRALayer
from peft_reslora.reslora.linked_chain import Chain
from peft_reslora.reslora.linking import chains_of
from peft_reslora.shared.checkpoints import adapted_layers
from peft_reslora.shared.host import remove_hooks, version_of
from peft_reslora.shared.names import bare_name

_NAME = "default"  # under which the allocator knows any adapter
# What a layer keeps by direction besides A and B, along the first dimension: how many numbers of each.
_BY_DIRECTION = {SINGULAR_VALUES: 1, "lora_shortcut": 1, "lora_calibrated": 2}


class RankAllocation:
    """The importances of the directions of one adapter, and what is allocated in the end."""

    def __init__(self, config: ResLoRAConfig, blocks: Mapping[str, AdaloraBlock]) -> None:
        self.config = config
        self.final_step = (config.total_step or 0) - config.tfinal  # without total_step, the blocks are others
        self.called = bool(config.rank_pattern)  # there is nothing left to allocate
        # By layer `(r,)`: which directions have a rank, once that is final, as in an adapter that was loaded so.
        self.kept: dict[str, torch.Tensor] | None = None
        if config.rank_pattern:
            self.kept = _nonzero(blocks)
        self._allocator: RankAllocator | None = None
        self._steps_missed = 0
        self._went_back = False  # since the last step that was seen
        self._version: int | None = None  # of a parameter, when it was last seen

    def update(self, blocks: Mapping[str, AdaloraBlock], step: int) -> None:
        """Count in the gradients of a step, and set E of the directions to zero that are not in its budget.

        Raises:
            RuntimeError: if there are no gradients, or the step is one after the allocation, which has not been.
        """
        self.called = True
        config, view = self.config, _PeftView(list(blocks.values()))
        if self.kept is not None:
            if not any(mask.any() for mask in self.kept.values()):
                raise RuntimeError(
                    "The config's rank_pattern says that AdaLoRA's ranks are allocated, but no adapter that has them "
                    "was loaded. Load it, or set config.rank_pattern = {} to train a new adapter with this config."
                )
            for name, block in blocks.items():
                E = block.singular_values.detach()
                E.masked_fill_(~self.kept[name].to(E.device)[:, None], 0.0)
            return
        over = step >= self.final_step
        if not over and not view.has_gradients():
            raise RuntimeError(
                "update_and_allocate found no gradients, from which importances are computed. Call it after "
                "loss.backward() and optimizer.step(), before optimizer.zero_grad(). DeepSpeed never shows "
                "them: use DDP."
            )
        if self._allocator is None:
            self._allocator = RankAllocator(view, config, _NAME)
        if over and not self._allocator.ipt:
            raise RuntimeError(
                f"update_and_allocate({step}) is the first call, and by then the ranks are allocated by what was seen "
                f"in the steps before (total_step={config.total_step}, tfinal={config.tfinal}). Call it after every "
                "optimizer step, or set total_step and tfinal to the steps that this training takes."
            )
        _, pattern = self._allocator.update_and_allocate(view, step, force_mask=over)
        if over:
            masks = (torch.tensor(pattern[f"{n}.{SINGULAR_VALUES}.{_NAME}"]) for n in range(len(blocks)))
            self.kept = dict(zip(blocks, masks, strict=True))
            self._allocator.reset_ipt()

    def note_forward(self, parameter: torch.Tensor, loss: torch.Tensor | None, adapter_name: str) -> None:
        """Warn, once, of a training that goes on without `update`.

        A step has been done when the parameter has changed (which fused optimizers do not tell), or its gradient is
        gone after a backward pass.
        """
        if self.called:
            return
        version = version_of(parameter)
        changed = self._version is not None and version != self._version
        if changed or (self._went_back and parameter.grad is None):
            self._steps_missed += 1
            self._went_back = False
        self._version = version
        if loss is not None and loss.requires_grad:
            loss.register_hook(self._note_backward)
        if self._steps_missed >= self.config.deltaT:
            self.called = True
            warnings.warn(
                f"Adapter {adapter_name!r} was trained for {self._steps_missed} steps, and no ranks were allocated: "
                "AdaLoRA needs Trainer(callbacks=[RankAllocationCallback()]), from peft_reslora.training, or a call "
                "of update_and_allocate(model, step) after each optimizer step and before zero_grad. Without, all "
                "layers keep init_r.",
                stacklevel=2,
            )

    def _note_backward(self, grad: torch.Tensor) -> None:
        self._went_back = True


class _PeftView:
    """The factors of an adapter as `RankAllocator` asks for them: matrices, with a row of A and a column of B for each
    direction. In a convolution these hold the numbers of the direction's own group."""

    def __init__(self, blocks: Sequence[AdaloraBlock]) -> None:
        self._blocks = blocks

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        for n, block in enumerate(self._blocks):
            A, B = block.weights
            yield f"{n}.{FACTOR_NAMES[0]}.{_NAME}", _with_gradient(A, lambda A: A.flatten(1))
            yield f"{n}.{FACTOR_NAMES[1]}.{_NAME}", _with_gradient(B, partial(_columns, groups=block.groups))
            yield f"{n}.{SINGULAR_VALUES}.{_NAME}", _with_gradient(block.singular_values, lambda E: E)

    def has_gradients(self) -> bool:
        grads = [block.singular_values.grad for block in self._blocks]
        return any(grad is not None and bool(grad.any()) for grad in grads)


def _nonzero(blocks: Mapping[str, AdaloraBlock]) -> dict[str, torch.Tensor]:
    """By layer `(r,)`: which directions have an E that is not zero."""
    return {name: block.singular_values.detach().flatten() != 0 for name, block in blocks.items()}


def _with_gradient(parameter: torch.Tensor, view: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """What `view` shows of the parameter's numbers, with its gradient: zero where there is none, or where it has
    overflowed (such a step is left out)."""
    seen = view(parameter.detach())
    grad = parameter.grad
    seen.grad = torch.zeros_like(seen) if grad is None else view(grad.detach().nan_to_num(0.0, 0.0, 0.0))
    return seen


def _columns(B: torch.Tensor, groups: int) -> torch.Tensor:
    return columns(B.flatten(1), groups)


def update_and_allocate(model: nn.Module, step: int) -> None:
    """Allocate the ranks of the AdaLoRA adapters that are trained, as PEFT's `AdaLoraModel.update_and_allocate` does.

    Call it after each `optimizer.step()`, before `optimizer.zero_grad()`; `RankAllocationCallback` does.

    Args:
        model: holds the adapters, with a tuner or without one.
        step: how many steps have been done. At step total_step - tfinal the ranks are final; from then on the call
            keeps the directions at zero that were pruned.

    Raises:
        ValueError: if no adapter with AdaLoRA is trained.
        RuntimeError: if its factors or gradients are sharded, or there are none.
    """
    names = trained_adapters(model)
    if not names:
        raise ValueError(
            "update_and_allocate found no AdaLoRA to train in the model: an active adapter whose ResLoRAConfig has "
            "total_step. Leave the call out, or activate the adapter with set_adapter."
        )
    if deepspeed_config() is not None:
        raise RuntimeError(f"Adapter {names[0]!r} has AdaLoRA, whose gradients DeepSpeed does not show. Use DDP.")
    for adapter_name in names:
        chains = chains_of(model, adapter_name)
        blocks = _blocks(chains)
        unreadable = [n for n, block in blocks.items() if not all(map(is_readable, block.tensors().values()))]
        if unreadable:
            raise RuntimeError(
                f"The factors of layer {unreadable[0]!r} are sharded or offloaded, so that no ranks can be allocated "
                "for AdaLoRA. Train without sharding (DDP), or without total_step."
            )
        allocation = _allocation(chains)
        was_over = allocation.kept is not None or bool(allocation.config.rank_pattern)
        allocation.update(blocks, step)
        if allocation.kept is not None and not was_over:
            note_ranks(chains)


def note_ranks(chains: Sequence[Chain]) -> None:
    """Let the config say the ranks that are allocated, with which the adapter is saved."""
    ranks = {
        name: len(kept)
        for chain in chains
        for name, kept in zip(chain.names, directions(chain), strict=True)
        if kept is not None
    }
    chains[0].config.rank_pattern = {"^" + re.escape(name): rank for name, rank in ranks.items()}


def directions(chain: Chain) -> list[torch.Tensor | None]:
    """The numbers of the directions that each layer of the chain needs, those with E = 0 left out.

    With shortcut 'middle' a layer hands on its hidden states before E, so that what one layer needs all have to keep.
    A layer that needs none keeps one whose E is zero: no layer can be made with rank 0 (PEFT's `update_layer`). In a
    convolution each group keeps as many as the one that needs most. None for a layer that is not in the model.
    """
    present = [n for n in range(len(chain)) if chain.has(n)]
    needed = {n: _values(chain, n).flatten().cpu() != 0 for n in present}
    if chain.config.shortcut == "middle":
        needed = dict.fromkeys(present, torch.stack(list(needed.values())).any(dim=0))
    numbers = {n: _evenly(mask, chain.block(n).groups) for n, mask in needed.items()}
    return [numbers.get(n) for n in range(len(chain))]


def _evenly(needed: torch.Tensor, groups: int) -> torch.Tensor:
    """The numbers of the directions that are needed, `(r,)`, and of so many others that all groups have as many."""
    by_group = needed.view(groups, -1)
    most = max(1, int(by_group.sum(dim=1).max()))
    first = by_group.int().argsort(dim=1, descending=True, stable=True)[:, :most].sort(dim=1).values
    return (first + torch.arange(groups)[:, None] * by_group.shape[1]).flatten()


def factors_of(model: nn.Module, adapter_name: str) -> list[torch.Tensor]:
    """A, B and E of all layers that have the adapter, which has AdaLoRA."""
    return [
        tensor for block in _blocks(chains_of(model, adapter_name)).values() for tensor in block.tensors().values()
    ]


def _values(chain: Chain, position: int) -> torch.Tensor:
    return getattr(chain.layer(position), SINGULAR_VALUES)[chain.adapter_name].detach()


def without_pruned(
    model: nn.Module, adapter_name: str, state_dict: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """A state dict by the names of the bare model, without the directions of the adapter that were pruned."""
    named = {bare_name(key): tensor for key, tensor in state_dict.items()}
    chains = chains_of(model, adapter_name)
    if not named or not any(chain.allocation is not None and chain.allocation.kept is not None for chain in chains):
        return named
    note_ranks(chains)
    kept = {
        id(chain.layer(n)): numbers
        for chain in chains
        for n, numbers in enumerate(directions(chain))
        if numbers is not None
    }
    for name, layer in adapted_layers(model, ResLoRALayer, adapter_name):
        block = layer.block_of(adapter_name)
        for part, own in layer.stamped_parts(adapter_name).items():
            if own is None or part not in (*block.factor_names, *_BY_DIRECTION):
                continue
            keys = (f"{bare_name(name)}.{part}.{adapter_name}", f"{bare_name(name)}.{part}.{adapter_name}.weight")
            key = next((key for key in keys if key in named), None)
            if key is None and not isinstance(own, nn.Parameter):
                key, named[keys[0]] = keys[0], own
            if key is not None:
                named[key] = _select(named[key].detach(), part, kept[id(layer)], block)
    return named


def _select(tensor: torch.Tensor, part: str, kept: torch.Tensor, block: LinearBlock) -> torch.Tensor:
    """What the directions `kept` have of a part of the block."""
    kept = kept.to(tensor.device)
    if part == block.factor_names[1]:
        return from_columns(columns(tensor, block.groups)[:, kept], block.groups).contiguous()
    copies = _BY_DIRECTION.get(part, 1)
    return tensor.unflatten(0, (copies, -1))[:, kept].flatten(0, 1)


def watch_training(model: nn.Module) -> None:
    """Add the orthogonality term to the losses that the model's forward gives, and look out for a training loop that
    allocates no ranks."""
    stop_watching_training(model)
    model.register_forward_hook(_after_pass)


def stop_watching_training(model: nn.Module) -> None:
    """Take the hook off again."""
    remove_hooks(model, lambda hook: hook is _after_pass)


def _after_pass(model: nn.Module, args: Any, output: Any) -> Any:
    """A forward hook. Like PEFT, only outputs with an attribute `loss` get the term; unlike it, none without
    gradients do, as in an evaluation."""
    if not torch.is_grad_enabled():
        return output
    for adapter_name in trained_adapters(model):
        chains = chains_of(model, adapter_name)
        blocks = _blocks(chains)
        loss = getattr(output, "loss", None)
        weight = chains[0].config.orth_reg_weight
        if isinstance(loss, torch.Tensor) and weight > 0:
            output.loss = loss = loss + weight * orthogonality(list(blocks.values())).to(loss.device)
        if model.training and not torch.compiler.is_compiling():
            first = next(iter(blocks.values())).singular_values
            _allocation(chains).note_forward(first, loss if isinstance(loss, torch.Tensor) else None, adapter_name)
    return output


def orthogonality(blocks: Sequence[AdaloraBlock]) -> torch.Tensor:
    """The mean of ||A A^T - I||_F and ||B^T B - I||_F over all A and B (Eq. 4 of AdaLoRA, with PEFT's norm and mean).

    Kernels are matrices of what they make of a patch. Directions of two groups have no channel in common.

    Raises:
        RuntimeError: if they are sharded.
    """
    terms = []
    for block in blocks:
        A, B = block.weights
        if not (is_readable(A) and is_readable(B)):
            raise RuntimeError(
                f"The factors of layer {block.layer.layer_name!r} are sharded or offloaded, so that AdaLoRA's "
                "orthogonality term cannot be computed. Train without sharding (DDP), or without total_step."
            )
        A, B = (factor.flatten(1).unflatten(0, (block.groups, -1)) for factor in (A, B))
        with torch.autocast(A.device.type, enabled=False):
            for squares in (A @ A.mT, B.mT @ B):
                identity = torch.eye(squares.shape[1], dtype=squares.dtype, device=squares.device)
                terms.append(torch.linalg.vector_norm(squares - identity).to(blocks[0].weights[0].device))
    return torch.stack(terms).mean()


def trained_adapters(model: nn.Module) -> list[str]:
    """The names of the adapters with AdaLoRA that are active and trained."""
    names: dict[str, None] = {}
    for layer in model.modules():
        if isinstance(layer, ResLoRALayer) and not layer.disable_adapters and not layer.merged:
            for name in layer.active_adapters:
                place = layer.chain_of(name)
                trained = place is not None and issubclass(place[0].kind, AdaloraBlock)
                if trained and getattr(layer, SINGULAR_VALUES)[name].requires_grad:
                    names[name] = None
    return list(names)


def _blocks(chains: Sequence[Chain]) -> dict[str, Any]:
    """The blocks of the layers that are in the model, by the layer's name."""
    return {chain.names[n]: chain.block(n) for chain in chains for n in range(len(chain)) if chain.has(n)}


def _allocation(chains: Sequence[Chain]) -> RankAllocation:
    """That of the adapter with these chains, which share it; begun, if there is none."""
    allocation = next((chain.allocation for chain in chains if chain.allocation is not None), None)
    if allocation is None:
        allocation = RankAllocation(chains[0].config, _blocks(chains))
    for chain in chains:
        chain.allocation = allocation
    return allocation
