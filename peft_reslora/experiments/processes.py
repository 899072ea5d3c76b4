"""Several processes of one launcher: the main one reads first, measures and writes; the others wait for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed as dist

Result = TypeVar("Result")

_LONGEST_WAIT = timedelta(days=30)  # a measurement may take longer than the half hour that a collective may


def refuse_several_processes(command: str) -> None:
    """Refuse a launcher's processes, which would write one folder at the same time.

    Raises:
        ValueError: if there is more than one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"peft-reslora {command} runs in one process; start it without accelerate launch or torchrun."
        )


def join_processes(training: Mapping[str, Any]) -> int:
    """Let the processes of a launcher, if there is one, find each other; returns how many they are.

    As TrainingArguments would, after which transformers divides every model that it builds or loads by ZeRO-3.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 1
    from accelerate import PartialState

    kwargs: dict[str, Any] = {"timeout": timedelta(seconds=training.get("ddp_timeout", 1800))}
    if (backend := training.get("ddp_backend")) is not None:
        kwargs["backend"] = backend
    return PartialState(cpu=training.get("use_cpu", False), **kwargs).num_processes


def on_main(call: Callable[[], Result]) -> Result:
    """Call it on the main process alone; all return its result, which has to be picklable.

    Raises:
        SystemExit: on the other processes, if it raises on the main one, which says why.
    """
    if not _are_several():
        return call()
    outcome: list[Any] = [False, None]
    patient = dist.new_group(backend="gloo", timeout=_LONGEST_WAIT)
    try:
        if dist.get_rank() == 0:
            outcome = [True, call()]
    finally:
        dist.broadcast_object_list(outcome, src=0, group=patient)
        dist.destroy_process_group(patient)
    if not outcome[0]:
        raise SystemExit(1)
    result: Result = outcome[1]
    return result


def main_first(call: Callable[[], Result]) -> Result:
    """Call it on all processes, but on the main one first: the others find what it has put into caches."""
    made: list[Result] = []
    on_main(lambda: made.append(call()))
    return made[0] if made else call()


def summed(value: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes."""
    if _are_several():
        dist.all_reduce(value := value.clone())
    return value


def _are_several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
