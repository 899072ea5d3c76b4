"""Engines that train in several processes: their names, and how their processes are started and ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import pytest
from helpers.repository import ROOT

WORKERS = ROOT / "tests" / "helpers"
CONFIGS = ROOT / "configs" / "accelerate"
LABELS = {"ddp": "DDP", "fsdp2": "FSDP2", "zero2": "DeepSpeed ZeRO-2", "zero3": "DeepSpeed ZeRO-3"}
ENGINES = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}  # accelerate's names


def by_engine(kind: str, engines: Iterable[str]) -> list[Any]:
    """Parameters for the tests of engines; those of one engine run in one worker, which starts its processes once."""
    return [pytest.param(e, marks=[pytest.mark.xdist_group(f"{kind} {e}"), pytest.mark.slow]) for e in engines]


def environment() -> dict[str, str]:
    """Of a worker: one thread, on the CPU, without a network."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)]),
    }


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_together(commands: list[tuple[list[str], dict[str, str]]]) -> None:
    """Start the commands, and wait for all; what one of them printed is shown where it fails."""
    processes = [
        subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        for command, env in commands
    ]
    try:
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it has launched
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]
