"""Numbers as if no global setting of torch's were there: for whatever merges, calibrates, exports or restarts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

_BACKENDS: tuple[Any, ...] = (torch.backends.cuda, torch.backends.mkldnn)


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute in the tensors' own dtypes, without gradients, and make tensors that can be trained later.

    Autocast would multiply factors in half precision and give weights that dtype; TF32 rounds products of float32 to
    10 bits; under `inference_mode` every result would be a tensor that no later training can use; a default dtype
    would go into what is made along the way. All are as they were at the end. Usable as a decorator.
    """
    device_types = {"cpu", "cuda", *_accelerators()}
    if _is_full(device_types):  # as within another such block, one for each layer of a merge
        yield
        return
    with ExitStack() as settings:
        settings.enter_context(torch.inference_mode(False))
        settings.enter_context(torch.no_grad())
        settings.enter_context(_default_dtype(torch.float32))
        settings.enter_context(_exact_matmuls())
        for device_type in device_types:
            if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
                settings.enter_context(torch.autocast(device_type, enabled=False))
        yield


def _is_full(device_types: Iterable[str]) -> bool:
    """Whether there is nothing to set."""
    return (
        not (torch.is_inference_mode_enabled() or torch.is_grad_enabled())
        and torch.get_default_dtype() is torch.float32
        and hasattr(torch.backends.cuda.matmul, "fp32_precision")
        and all(backend.matmul.fp32_precision == "ieee" for backend in _BACKENDS)
        and not any(torch.amp.is_autocast_available(d) and torch.is_autocast_enabled(d) for d in device_types)
    )


def _accelerators() -> list[str]:
    found = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None
    return [] if found is None else [found.type]


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _exact_matmuls() -> Iterator[None]:
    """Products of float32 in float32; `fp32_precision` came with torch 2.9, and is not to be mixed with the older."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        legacy = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(legacy)
        return
    before = [backend.matmul.fp32_precision for backend in _BACKENDS]
    for backend in _BACKENDS:
        backend.matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(_BACKENDS, before, strict=True):
            backend.matmul.fp32_precision = precision
