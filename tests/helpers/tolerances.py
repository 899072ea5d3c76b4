"""How far two computations of the same value may lie apart: from the dtype and the sums, for every processor.

Processors add in different orders, and some fuse multiplication and addition. In any order, a sum of n products is off
by at most n u of the sum of its terms' absolute values, u = eps / 2 (Higham, Accuracy and Stability of Numerical
Algorithms, 2002, section 3.1), so two computations lie at most n eps apart. Terms of both signs cancel, to about
1 / sqrt(n) of their absolute values; their roundings do too, to about sqrt(n) u: n eps of the sum itself still covers
that, with sqrt(n) to spare for what a network amplifies. Sums that follow each other, as a network's layers, pass
their errors on, which add up: n counts the terms of all of them.

Where the amplification is not known at all (gradients through softmax, quotients, long training runs), or where
sharper eyes are wanted, a test computes in float64: `FLOAT64` leaves a factor of 4e5 of its eps to sums and
amplification, and lies far below any fault. The fixture `float64` makes the models of a test so.

Llama's and T5's norms compute in float32 whatever the dtype is (read in transformers 5.23): where two computations
that differ in the 16th digit lie on either side of a float32 rounding, an element jumps by its eps. So outputs and
gradients of models keep to `MODEL64`.
"""

from __future__ import annotations

import math

import torch
from torch import nn

EPS = torch.finfo(torch.float32).eps
FLOAT64 = 1e-10
MODEL64 = EPS


def rounding(terms: int | nn.Module, dtype: torch.dtype | None = None) -> float:
    """Bound on the relative error of a result that sums up so many terms, or comes from one pass through a model.

    Of a model, each weight counts with its longer side, as if all were applied one after the other. Without `dtype` it
    is that of the model's coarsest weight, of a number float32.
    """
    if isinstance(terms, nn.Module):
        weights = [p for p in terms.parameters() if p.is_floating_point() and p.dim() > 1]
        dtype = dtype or max((p.dtype for p in weights), key=lambda dtype: torch.finfo(dtype).eps)
        terms = sum(max(p.shape[0], p[0].numel()) for p in weights)
    return terms * torch.finfo(dtype or torch.float32).eps


def half_rounding(steps: int, dtype: torch.dtype) -> float:
    """Bound on the relative error of a result that was rounded to a half precision so many times on its way.

    Sums are kept in float32 and rounded once (torch's matrix products, norms and softmax); each rounding is off by at
    most eps / 2, and independent ones add up as their squares do. Twice that, since they are not quite independent.
    """
    return math.sqrt(steps) * torch.finfo(dtype).eps
