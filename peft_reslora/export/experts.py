"""Exports of parameters, such as fused experts: the update of each expert is fitted by itself."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from peft_reslora.export.factors import Factors
from peft_reslora.export.fitting import Fit, FittedUpdate, frobenius_norm
from peft_reslora.export.forms import ParameterForm
from peft_reslora.reslora.merging.estimators import Exactness


def fit_experts(fit: Fit, A: Tensor, B: Tensor, merge: Exactness, form: ParameterForm) -> FittedUpdate:
    """The update of one parameter, as many directions for each expert as the one with the most of them has.

    Args:
        fit: what is asked for, of each expert.
        A: `(R, experts, in_features)`, and B `(out_features, R, experts)`, scaling included.
        merge: how the adapter became one matrix for each expert.
        form: of the factors in the file.

    Raises:
        ValueError: as `Fit.update`.
    """
    wholes = [Factors.of(a, b) for a, b in zip(A.unbind(1), B.unbind(2), strict=True)]
    fitted = [fit.update(whole, merge) for whole in wholes]
    rank = max(update.factors.rank for update in fitted)
    pairs = [_padded(update.factors, rank) for update in fitted]
    norms = [frobenius_norm(whole.A.double(), whole.B.double()) for whole in wholes]
    total = math.hypot(*norms)
    lost = math.hypot(*(norm * update.relative_error for norm, update in zip(norms, fitted, strict=True)))
    kept = [norm**2 * (update.energy_kept or 0.0) for norm, update in zip(norms, fitted, strict=True)]
    return dataclasses.replace(
        fitted[0],
        factors=Factors(torch.stack([a for a, _ in pairs], dim=1), torch.stack([b for _, b in pairs], dim=2)),
        rank_before=max(update.rank_before for update in fitted),
        energy_kept=sum(kept) / total**2 if total > 0 else 1.0,
        relative_error=lost / total if total > 0 else 0.0,
        form=form,
    )


def _padded(factors: Factors, rank: int) -> tuple[Tensor, Tensor]:
    missing = rank - factors.rank
    return torch.nn.functional.pad(factors.A, (0, 0, 0, missing)), torch.nn.functional.pad(factors.B, (0, missing))
