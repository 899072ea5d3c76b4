"""Gradients of a whole model, and whether two are the same."""

from __future__ import annotations

from typing import Any

import torch
from helpers.tolerances import MODEL64, rounding
from torch import nn


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients_close(
    actual: dict[Any, torch.Tensor], expected: dict[Any, torch.Tensor], terms: int = 3_000, bound: float = MODEL64
) -> None:
    """Each gradient by its relative error: within `bound` if both are float64, else within the rounding of so many
    terms (those of the tiny models: forward, backward, and the sum over tokens).

    A gradient that is small because large terms cancel has no more digits than they have: below a thousandth of the
    largest gradient, the error counts relative to that.
    """
    assert actual.keys() == expected.keys()
    largest = max(float(grad.norm()) for grad in expected.values())
    assert largest > 0, "all gradients are zero: the comparison would show nothing"
    for name, grad in expected.items():
        double = actual[name].dtype == grad.dtype == torch.float64
        error = float((actual[name].double() - grad.double()).norm())
        assert error <= (bound if double else rounding(terms)) * max(float(grad.norm()), 1e-3 * largest), name
