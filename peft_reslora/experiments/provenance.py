"""What a result came from: versions, the state of the repository, the machine, checksums."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("peft_reslora", "peft", "transformers", "torch", "accelerate", "datasets", "tokenizers", "numpy")


def fingerprint(value: Any) -> str:
    """A short hash of anything that JSON holds; the order of keys does not count."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def git_state() -> dict[str, Any]:
    """Commit of the package's own checkout and whether it was changed; empty for an installed wheel."""
    folder = Path(__file__).resolve().parent

    def ask(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit, changes = ask("rev-parse", "HEAD"), ask("status", "--porcelain", "--", ".")
    return {} if commit is None else {"commit": commit, "changed": bool(changes)}


def machine() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count(), "gpu": gpu}


def provenance(checksums: dict[str, str]) -> dict[str, Any]:
    return {
        "versions": versions(),
        "git": git_state(),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "data_sha256": checksums,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }
