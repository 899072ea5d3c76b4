"""Time and memory of a training step relative to the reference, measured side by side in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch.multiprocessing.reductions import StorageWeakRef

from peft_reslora.experiments.task import Batch, Task
from peft_reslora.experiments.tuners import adapt, make_config
from peft_reslora.shared.host import TorchDispatchMode, storage_key, tree_leaves

_WARMUP = 2


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make, as long as they live: the same on every machine."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.live[storage_key(storage)] = StorageWeakRef(storage), storage.nbytes()
        self.live = {key: held for key, held in self.live.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


def relative_cost(
    task: Task, tuner: Mapping[str, Any], reference: Mapping[str, Any], pairs: int, batch_size: int, run_steps: int
) -> dict[str, Any]:
    """Median and quartiles of the step's time over the reference's on the same batch, and the ratio of peaks.

    The adapters are those of a run of `run_steps` steps, into which a schedule of AdaLoRA has to fit.

    On a CPU the time is that of the process, which other programs on the machine change little. Peak memory is what
    one forward and backward has alive beside weights and optimizer.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps, clock = [], _clock(device)
    for fields in (reference, tuner):
        torch.manual_seed(0)
        steps.append(_stepper(adapt(task.fresh_model(), make_config(fields, run_steps)).to(device).train()))
    batches = [_to(batch, device) for batch in task.batches(batch_size * 4, batch_size)]
    times = [_time_pair(steps, batches[i % len(batches)], clock, i) for i in range(pairs + _WARMUP)][_WARMUP:]
    ratios = [own / other for other, own in times]
    peaks = [_peak(step, batches[0], device) for step in steps]
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    return {
        "step_ratio": round(float(middle), 4),
        "step_ratio_quartiles": [round(float(low), 4), round(float(high), 4)],
        "reference_seconds": round(float(np.median([other for other, _ in times])), 5),
        "memory_ratio": round(peaks[1] / peaks[0], 4),
        "reference_bytes": int(peaks[0]),
        "device": str(device),
        "pairs": pairs,
    }


def _clock(device: torch.device) -> Callable[[], float]:
    if device.type == "cpu":
        return time.process_time

    def synchronized() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return synchronized


def _stepper(model: PeftModel) -> Callable[[Batch], None]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step(batch: Batch) -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _time_pair(
    steps: Sequence[Callable[[Batch], None]], batch: Batch, clock: Callable[[], float], turn: int
) -> tuple[float, float]:
    """Seconds of the reference's step and of the other's; they take turns in going first."""
    seconds = [0.0, 0.0]
    for which in (0, 1) if turn % 2 else (1, 0):
        begin = clock()
        steps[which](batch)
        seconds[which] = clock() - begin
    return seconds[0], seconds[1]


def _peak(step: Callable[[Batch], None], batch: Batch, device: torch.device) -> float:
    if device.type == "cpu":
        with LiveBytes() as counted:
            step(batch)
        return counted.peak
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(batch)
    return torch.cuda.max_memory_allocated() - before


def _to(batch: Batch, device: torch.device) -> Batch:
    return {name: value.to(device) for name, value in batch.items()}
