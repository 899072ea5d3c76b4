"""`calibrate_merge`: C_n as the best linear map of the layer's own input.

The term that a shortcut adds to A_n x_n is t_n = A_n x_{n-1} for 'input' and sum_k A_{n-k} x_{n-k} for 'middle'. Over
calibration tokens, C_n = argmin_C sum |t_n - C x_n|^2 + ridge |C|^2, and the merged factor is A_n + C_n.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from peft_reslora.reslora.linked_chain import Chain
from peft_reslora.reslora.linking import chains_of
from peft_reslora.reslora.merging.observe import Batch, observed
from peft_reslora.shared.precision import full_precision
from peft_reslora.shared.tensors import NOT_HERE, is_readable

RIDGES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
_HELD_OUT = 4  # one sequence in so many chooses the ridge
_GIB = 2**30


@dataclass(frozen=True)
class LayerFit:
    """How a layer's C_n was fitted.

    Args:
        ridge: what was added to the diagonal of X^T X, as a multiple of its mean.
        error: ||t - C x|| / ||t|| over the held-out tokens; over all of them if the ridge was given.
    """

    ridge: float
    error: float


class Moments:
    """Sums over tokens, accumulated in float64: X^T X `(in, in)`, X^T T `(in, r)` and the sum of all T^2.

    Tokens wait until there are as many as features, so that small batches cost no more than large ones. The products
    of one such lot are in the activations' own precision (float32 at least). Their rounding is relative to each
    feature's own size, and where it matters the regression is singular and a larger ridge is taken.
    """

    def __init__(self, in_features: int, rank: int, device: torch.device) -> None:
        shapes = ((in_features, in_features), (in_features, rank), ())
        self._sums = [torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes]
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, x: torch.Tensor, term: torch.Tensor) -> None:
        """Count in the tokens `x (tokens, in)` with the values `term (tokens, r)`."""
        self._waiting.append((x, term))
        if sum(len(x) for x, _ in self._waiting) >= x.shape[1]:
            self._count()

    def _count(self) -> None:
        if self._waiting:
            x, term = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
            self._waiting.clear()
            for total, product in zip(
                self._sums, (x.t() @ x, x.t() @ term, term.double().square().sum()), strict=True
            ):
                total += product

    @property
    def sums(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """X^T X, X^T T and the sum of all T^2 over all tokens so far."""
        self._count()
        xx, xt, tt = self._sums
        return xx, xt, tt

    def merge(self, other: Moments) -> None:
        """Count in all tokens of `other`."""
        for total, more in zip(self.sums, other.sums, strict=True):
            total += more


def ridge_regression(moments: Moments, ridge: float) -> torch.Tensor | None:
    """C `(r, in)` that minimizes sum |t - C x|^2 + ridge m |C|^2, with m the mean of the diagonal of X^T X.

    None where the regularized matrix is singular.
    """
    xx, xt, _ = moments.sums
    regularized = xx.clone()
    regularized.diagonal().add_(ridge * xx.diagonal().mean())
    factor, info = torch.linalg.cholesky_ex(regularized)
    return None if info.item() else torch.cholesky_solve(xt, factor).t()


def residual(moments: Moments, C: torch.Tensor) -> float:
    """||t - C x|| / ||t|| over the tokens of `moments`; 0 where t is."""
    xx, xt, tt = moments.sums
    if not tt > 0:
        return 0.0
    error = tt - 2 * (C.t() * xt).sum() + ((C @ xx) * C).sum()
    return math.sqrt(max(0.0, float(error / tt)))


def choose_ridge(fit: Moments, held_out: Moments) -> tuple[float, float]:
    """The ridge with which the regression on `fit` errs least on `held_out`, and that error.

    From the largest down, until the error grows or the regression is singular.
    """
    best = RIDGES[0], math.inf
    for ridge in RIDGES:
        if (C := ridge_regression(fit, ridge)) is None or (error := residual(held_out, C)) > best[1]:
            break
        best = ridge, error
    return best


@full_precision()
def calibrate_merge(
    model: nn.Module,
    batches: Iterable[Batch],
    adapter_name: str = "default",
    ridge: float | None = None,
    *,
    max_memory: float = 4 * _GIB,
    progressbar: bool = False,
) -> dict[str, LayerFit]:
    """Fit C_n on every linked layer, so that merge_estimator 'least_squares' can be used, and choose that estimator.

    The model runs over `batches` in evaluation mode, without gradients. Padding, where `attention_mask` is 0, is left
    out. C_n goes into the adapter's checkpoint. It belongs to the factors as they are now: after more training a merge
    asks for another calibration.

    Args:
        model: holds the adapter, active and not merged. It is left in the mode in which it came.
        batches: what the model takes, as keyword arguments; a list, a DataLoader or any other iterable. A few hundred
            sequences of the kind the merged model will see.
        adapter_name: an adapter with shortcut 'input' or 'middle'.
        ridge: in relation to the mean of the diagonal of X^T X. None: for each layer what errs least on one sequence
            in four when fitted on the others; the fit itself then takes all.
        max_memory: bytes for the sums over tokens. A layer needs 24 in_features^2 of them; what does not fit at once
            takes another pass over `batches`.
        progressbar: show how many batches are done.

    Returns:
        The ridge and the error of each fit, by the layer's name.

    Raises:
        ValueError: if there is no such adapter or nothing to calibrate, if it is merged or inactive, if no token
            arrives, if there are too few sequences to choose a ridge from, or for NaN or inf in a layer's input.
    """
    if ridge is not None and not (math.isfinite(ridge) and ridge >= 0):
        raise ValueError(f"ridge={ridge!r} must be a number that is not negative, or None to have it chosen.")
    chains = ready_chains(model, adapter_name)
    _refuse_what_needs_no_calibration(chains, adapter_name)
    if isinstance(batches, Iterator):  # more than one pass may be needed
        batches = list(batches)
    groups = _groups([(chain, n) for chain in chains for n in range(1, len(chain.layers))], max_memory)
    total = len(groups) * len(batches) if isinstance(batches, Sized) else None
    found: dict[str, tuple[torch.Tensor, LayerFit]] = {}
    with tqdm(total=total, desc="Calibrating", unit="batch", disable=not progressbar) as bar:
        for group in groups:
            sums = _sums_of(model, batches, group, bar)
            while sums:
                name, (fit, held_out) = sums.popitem()
                found[name] = _fit(fit, held_out, ridge, name)
    for chain in chains:
        for n, layer in enumerate(chain.layers if len(chain.layers) > 1 else ()):
            layer.store_calibration(adapter_name, found[chain.names[n]][0] if n else None)
        chain.config.merge_estimator = "least_squares"
    return {name: found[name][1] for chain in chains for name in chain.names[1:]}


def ready_chains(model: nn.Module, adapter_name: str) -> list[Chain]:
    """The chains of an adapter that takes part in the model's forward pass.

    Raises:
        ValueError: if it does not, or its factors cannot be read.
    """
    chains = chains_of(model, adapter_name)
    if not chains:
        held = [f"{name} ({config.peft_type.value})" for name, config in getattr(model, "peft_config", {}).items()]
        raise ValueError(
            f"The model holds no ResLoRA adapter {adapter_name!r} with links (it has {', '.join(held) or 'none'})."
        )
    for chain in chains:
        for name, layer in zip(chain.names, chain.layers, strict=True):
            if not all(map(is_readable, layer.block_of(adapter_name).weights)):
                raise ValueError(
                    f"The LoRA factors of layer {name!r} are {NOT_HERE}. Load the model without sharding and "
                    "offloading for this."
                )
            if layer.merged:
                raise ValueError(
                    f"Adapters {layer.merged_adapters} are merged into layer {name!r}, so the shortcuts are no longer "
                    "computed. Call model.unmerge_adapter() first."
                )
            if layer.disable_adapters or adapter_name not in layer.active_adapters:
                raise ValueError(
                    f"Adapter {adapter_name!r} is not active on layer {name!r} (active: {layer.active_adapters}, "
                    f"disabled: {layer.disable_adapters}). Call model.set_adapter({adapter_name!r}) first."
                )
    return chains


def _refuse_what_needs_no_calibration(chains: Sequence[Chain], adapter_name: str) -> None:
    if chains[0].config.shortcut == "block":
        raise ValueError(
            f"Adapter {adapter_name!r} has shortcut='block', which merges exactly: there is nothing to calibrate."
        )
    named = [pair for chain in chains if len(chain) > 1 for pair in zip(chain.names, chain.layers, strict=True)]
    if grouped := [name for name, layer in named if getattr(layer.get_base_layer(), "groups", 1) > 1]:
        raise ValueError(
            f"Layer {grouped[0]!r} is a convolution in groups, whose kernel cannot hold a regression on all channels. "
            "Use merge_estimator='input_norm' or 'weight_norm', or leave such layers out with exclude_modules."
        )
    if any(adapter_name in layer.lora_annealed for chain in chains for layer in chain.layers):
        raise ValueError(
            f"Adapter {adapter_name!r} has been annealed: an estimate is part of its forward pass already, and "
            "another would change what the model computes. Merge it as it is."
        )


def _groups(layers: Sequence[tuple[Chain, int]], max_memory: float) -> list[list[tuple[Chain, int]]]:
    """Cut `layers` into runs whose sums over tokens fit into `max_memory`; one layer at least."""
    groups: list[list[tuple[Chain, int]]] = []
    used = math.inf
    for chain, n in layers:
        needed = 32 * chain.block(n).estimate_shape[1] ** 2  # two matrices of float64, and as many tokens waiting
        if used + needed > max_memory:
            groups.append([])
            used = 0
        groups[-1].append((chain, n))
        used += needed
    return groups


def _sums_of(
    model: nn.Module, batches: Iterable[Batch], group: Sequence[tuple[Chain, int]], bar: Any
) -> dict[str, tuple[Moments, Moments]]:
    """One pass over `batches`: the sums over the tokens to fit on and over the held-out ones, by layer."""
    sums: dict[str, tuple[Moments, Moments]] = {}

    def see(name: str, x: torch.Tensor, own: torch.Tensor, term: torch.Tensor, sequence: torch.Tensor) -> None:
        if name not in sums:
            sums[name] = Moments(x.shape[1], term.shape[1], x.device), Moments(x.shape[1], term.shape[1], x.device)
        held_out = sequence % _HELD_OUT == _HELD_OUT - 1
        for moments, chosen in zip(sums[name], (~held_out, held_out), strict=True):
            moments.add(x[chosen], term[chosen])

    with observed(model, group, see) as run:
        for batch in batches:
            run(batch)
            bar.update()
    for chain, n in group:
        if (name := chain.names[n]) not in sums or not sums[name][0].sums[0].any():
            raise ValueError(
                f"No token came through layer {name!r} while calibrating: `batches` is empty or all padding, or the "
                "layer is not used in this forward pass. Pass a list of batches, and the model as it is before "
                "torch.compile."
            )
    return sums


def _fit(fit: Moments, held_out: Moments, ridge: float | None, name: str) -> tuple[torch.Tensor, LayerFit]:
    """C_n from the tokens of both, with the given ridge or the one that predicts `held_out` best from `fit`."""
    for moments in (fit, held_out):
        if not all(total.isfinite().all() for total in moments.sums):
            raise ValueError(
                f"NaN or inf in the calibration inputs of layer {name!r}. Look for them in the batches and the "
                "adapter."
            )
    error = None
    if ridge is None:
        if not held_out.sums[0].any():
            raise ValueError(
                f"Choosing a ridge takes {_HELD_OUT} sequences, and fewer came through layer {name!r}. Pass more "
                "batches, or the ridge."
            )
        ridge, error = choose_ridge(fit, held_out)
    fit.merge(held_out)
    C = ridge_regression(fit, ridge)
    if C is None:
        raise ValueError(
            f"With ridge={ridge} the regression on layer {name!r} is singular: there are fewer independent tokens "
            "than the layer has in_features. Pass more batches, a larger ridge, or ridge=None."
        )
    return C, LayerFit(ridge, residual(fit, C) if error is None else error)
