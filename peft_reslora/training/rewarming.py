"""Warming the learning rate up again in the middle of a run, under a scheduler that knows nothing of it."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

_warmups: WeakKeyDictionary[Optimizer, list[RemovableHandle]] = WeakKeyDictionary()


def rewarm(optimizer: Optimizer, warmup_steps: int, done: int = 0) -> None:
    """Take the optimizer's next steps with (k + 1) / (warmup_steps + 1) of the learning rate, k = 0, 1, ...

    The learning rates are scaled just before a step and put back just after it. So the scheduler, of whatever kind,
    goes on as if nothing had happened, and its learning rate is what the warm-up rises to. A warm-up that is still
    under way ends; `warmup_steps=0` does no more than that.

    Args:
        optimizer: one of torch's, or accelerate's wrapper of it.
        warmup_steps: how many steps are taken with less than the whole learning rate.
        done: how many of them have been taken already.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    for handle in _warmups.pop(inner, []):
        handle.remove()
    if done >= warmup_steps:
        return
    step = done
    rates: list[Any] = []

    def scale(*_: Any) -> None:
        nonlocal step
        rates[:] = [group["lr"] for group in inner.param_groups]
        for group in inner.param_groups:
            group["lr"] = group["lr"] * warmup_factor(step, warmup_steps)
        step += 1

    def put_back(*_: Any) -> None:
        for group, rate in zip(inner.param_groups, rates, strict=True):
            group["lr"] = rate

    # Both stay, with a factor of 1, when the warm-up is over: hooks cannot be removed while torch goes through them.
    _warmups[inner] = [inner.register_step_pre_hook(scale), inner.register_step_post_hook(put_back)]


def warmup_factor(step: int, warmup_steps: int) -> float:
    """By what the learning rate is multiplied `step` steps after a restart."""
    return min(1.0, (step + 1) / (warmup_steps + 1))
