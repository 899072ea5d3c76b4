"""`merge_report`: what a merge costs, layer by layer and in the model's output."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import nn

from peft_reslora.reslora.config import MergeEstimator
from peft_reslora.reslora.layer import ResLoRALayer
from peft_reslora.reslora.linked_chain import Chain, planned
from peft_reslora.reslora.merging.calibrate import ready_chains
from peft_reslora.reslora.merging.estimators import SHORTCUT_PARTS, Block, exactness
from peft_reslora.reslora.merging.observe import Batch, masks_of, observed, to_device, tokens_of
from peft_reslora.reslora.merging.plan import ChainMerge
from peft_reslora.shared.host import own_parameter
from peft_reslora.shared.plots import new_figure, save_figure
from peft_reslora.shared.precision import full_precision
from peft_reslora.shared.tables import format_table
from peft_reslora.shared.tensors import restore, stored, widen

EXACT = "exact"


@dataclass(frozen=True)
class MergeCost:
    """What merging by one estimator changes.

    Args:
        layers: by layer, in the model's order, ||d - d*|| / ||d|| of the update's output over the tokens, d unmerged
            and d* merged, both at the unmerged model's inputs.
        kl: mean KL divergence of the merged model's output distribution from the unmerged one's, in nats.
        agreement: the share of outputs whose most likely class or token stays the same.
        loss: the task loss unmerged and merged; None if the batches have no labels.
    """

    layers: dict[str, float]
    kl: float
    agreement: float
    loss: tuple[float, float] | None


@dataclass(frozen=True)
class MergeReport:
    """What merging an adapter costs. `str()` prints it as a table.

    Args:
        adapter_name: the adapter.
        shortcut: its shortcut.
        rounded: whether the rounding of merged weights to the base's dtype is part of it.
        costs: by estimator; 'exact' alone if the merge needs none.
        unavailable: why an estimator could not be used, by its name.
        why: what makes the merge exact; empty if it is not.
    """

    adapter_name: str
    shortcut: str
    rounded: bool
    costs: dict[str, MergeCost]
    unavailable: dict[str, str]
    why: str = ""

    @property
    def exact(self) -> bool:
        """Whether the merge computes what the adapter does, whichever estimator there is."""
        return EXACT in self.costs

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [("estimator", "layer error, median", "worst", "worst layer", "KL", "top-1 kept", "loss", "merged")]
        for estimator, cost in self.costs.items():
            errors = sorted(cost.layers.values())
            worst = max(cost.layers, key=lambda name: cost.layers[name])
            losses = ("-", "-") if cost.loss is None else tuple(f"{loss:.4f}" for loss in cost.loss)
            row = (estimator, f"{errors[len(errors) // 2]:.2e}", f"{errors[-1]:.2e}", worst)
            rows.append((*row, f"{cost.kl:.2e}", f"{cost.agreement:.2%}", *losses))  # type: ignore[arg-type]
        how = f"the merge is exact: {self.why}" if self.exact else "the merge is an estimate"
        lines = [f"adapter {self.adapter_name!r}, shortcut={self.shortcut!r}: {how}", *format_table(rows)]
        return "\n".join([*lines, *(f"{name}: not available. {reason}" for name, reason in self.unavailable.items())])

    def plot(self, path: str | Path) -> None:
        """Draw the error of each layer by depth into a PNG, one line per estimator.

        Raises:
            ImportError: if matplotlib is missing; it names the extra that brings it.
        """
        figure, (axes,) = new_figure()
        for estimator, cost in self.costs.items():
            axes.plot(range(len(cost.layers)), list(cost.layers.values()), marker=".", linewidth=1, label=estimator)
        axes.set_yscale("log" if all(min(cost.layers.values()) > 0 for cost in self.costs.values()) else "symlog")
        axes.set(
            title=f"Merging {self.adapter_name!r}, shortcut={self.shortcut!r}",
            xlabel="layer, in the model's order",
            ylabel="relative error of the update's output",
        )
        axes.legend(frameon=False)
        save_figure(figure, path)


@full_precision()
def merge_report(
    model: nn.Module,
    batches: Iterable[Batch],
    adapter_name: str = "default",
    estimators: MergeEstimator | Sequence[MergeEstimator] | None = None,
) -> MergeReport:
    """Compare the merged model with the unmerged one on `batches`.

    The weights are merged and restored, bit for bit, for every batch. Where that cannot be (quantized layers, other
    adapters active at the same time) the merged update is computed beside the base layer; the rounding of merged
    weights to the base's own dtype is not in the report then, and `rounded` is False.

    Args:
        model: holds the adapter, active and not merged. It is left as it came.
        batches: what the model takes, as keyword arguments; with labels, the loss is compared too.
        adapter_name: the adapter.
        estimators: the one or those to compare; None for all. Of several, those that lack their data are listed as
            unavailable; a single one raises.

    Raises:
        ValueError: for an unknown estimator or a single one without its data, if the adapter is merged or inactive, if
            there are no batches or nothing but padding in them, if the model's output has no logits or NaN in them, or
            if a merged weight would not be finite (that of several estimators is listed as unavailable).
    """
    chains = ready_chains(model, adapter_name)
    wanted = [estimators] if isinstance(estimators, str) else list(estimators or get_args(MergeEstimator))
    if unknown := [name for name in wanted if name not in get_args(MergeEstimator)]:
        raise ValueError(f"Estimators {unknown} are unknown, choose from {', '.join(get_args(MergeEstimator))}.")
    blocks, config = [chain.blocks() for chain in chains], chains[0].config
    layers = [exactness(own, n, config) for own in blocks for n in range(len(own))]
    exact = all(layer.exact for layer in layers)
    estimates: dict[str, Estimates] = {}
    unavailable: dict[str, str] = {}
    for name in ["drop"] if exact else wanted:
        config = copy.copy(config)
        config.merge_estimator = name  # type: ignore[assignment]
        try:
            merges = [ChainMerge.of(own, config) for own in blocks]
            estimates[EXACT if exact else name] = _estimates(merges)
        except ValueError as error:
            if isinstance(estimators, str):
                raise
            unavailable[name] = str(error)
    rounded = all(
        layer.active_adapters == [adapter_name] and _restores_weight(layer)
        for chain in chains
        for layer in chain.layers
    )
    single = exact or isinstance(estimators, str)
    costs = _measure(model, batches, chains, estimates, rounded, None if single else unavailable)
    why = ", ".join(dict.fromkeys(layer.why for layer in layers)) if exact else ""
    return MergeReport(adapter_name, config.shortcut, rounded, costs, unavailable, why)


def _restores_weight(layer: ResLoRALayer) -> bool:
    """Whether merging and unmerging leaves the base weight as it was, bit for bit."""
    weight = own_parameter(layer.get_base_layer(), layer.weight_name)
    return layer.is_plain and weight is not None and weight.is_floating_point() and not weight.is_meta


Estimates = dict[str, torch.Tensor]  # E_n (r, in_features) by layer; none for the first of a chain, which is exact


def _estimates(merges: Sequence[ChainMerge]) -> Estimates:
    return {
        merge.blocks[n].name: merge.estimate(n)
        for merge in merges
        for n in range(1, len(merge.blocks) if merge.config.shortcut != "block" else 0)
    }


def _measure(
    model: nn.Module,
    batches: Iterable[Batch],
    chains: Sequence[Chain],
    estimates: Mapping[str, Estimates],
    merge: bool,
    unavailable: dict[str, str] | None,
) -> dict[str, MergeCost]:
    """One pass over `batches`, each of which runs unmerged and then merged by every estimator.

    An estimator whose merge cannot be computed goes into `unavailable`, or raises if that is None.
    """
    layers = [(chain, n) for chain in chains for n in range(1, len(chain.layers)) if chain.config.shortcut != "block"]
    cores = _cores(dict.fromkeys(chain for chain, _ in layers))
    blocks = {block.name: block for chain, _ in layers for block in chain.blocks()}
    sums = {estimator: _Sums() for estimator in estimates}

    def see(name: str, x: torch.Tensor, own: torch.Tensor, term: torch.Tensor, sequence: torch.Tensor) -> None:
        term = _annealed_term(blocks[name], x, term)
        unmerged = ((own + term) @ cores[name]).double().square().sum()
        for estimator, total in sums.items():
            missed = ((term - x @ estimates[estimator][name].to(x).t()) @ cores[name]).double().square().sum()
            total.add_layer(name, missed, unmerged)

    with observed(model, layers, see) as run:
        for batch in batches:
            expected, keep = _output(run(batch), batch, "unmerged")
            for estimator in list(sums) if keep.any() else ():
                try:
                    with _merged(chains, estimates[estimator], merge):
                        actual, _ = _output(model(**to_device(batch, model)), batch, f"merged ({estimator})")
                    sums[estimator].add_output(expected, actual, keep)
                except ValueError as error:
                    if unavailable is None or len(sums) == 1:
                        raise
                    unavailable[estimator] = str(error)
                    del sums[estimator]
    _refuse_nothing(sums.values())
    names = _in_order(model, chains)
    return {estimator: total.cost(names) for estimator, total in sums.items()}


def _annealed_term(block: Block, x: torch.Tensor, term: torch.Tensor) -> torch.Tensor:
    """What the forward adds to A_n x_n: `term`, but for the share t whose place C_n x_n has taken."""
    return term if block.shortcut is None else torch.lerp(term, x @ block.shortcut.to(x).t(), block.annealed)


def _in_order(model: nn.Module, chains: Sequence[Chain]) -> list[str]:
    """The names of all layers, in the model's order."""
    order = {id(layer): depth for depth, layer in enumerate(model.modules())}
    members = [(layer, name) for chain in chains for layer, name in zip(chain.layers, chain.names, strict=True)]
    return [name for layer, name in sorted(members, key=lambda member: order[id(member[0])])]


def _refuse_nothing(sums: Iterable[_Sums]) -> None:
    if any(total.rows == 0 for total in sums):
        raise ValueError(
            "merge_report got no batches, or nothing but padding in them (attention_mask 0 everywhere). Pass a list "
            "of batches, each with what the model takes."
        )


def _cores(chains: Iterable[Chain]) -> dict[str, torch.Tensor]:
    """By layer `(r, r)`, which has B_n's effect on norms: |B_n v| = |v @ core|."""
    return {block.name: torch.linalg.qr(widen(block.B)).R.t() for chain in chains for block in chain.blocks()}


@contextmanager
def _merged(chains: Sequence[Chain], estimates: Estimates, merge: bool) -> Iterator[None]:
    """With `estimates` in place of the shortcuts, and merged into the weights if `merge`; undone at the end."""
    before = []
    configs = [(chain.config, chain.config.estimate) for chain in chains]
    try:
        for chain in chains:
            for name, layer in zip(chain.names, chain.layers, strict=True):
                for buffers in (getattr(layer, part) for part in SHORTCUT_PARTS):
                    before.append((buffers, chain.adapter_name, stored(buffers, chain.adapter_name)))
                if name in estimates:
                    layer.anneal(chain.adapter_name, estimates[name], 1.0)
        with planned(chains):
            for chain in chains if merge else ():
                for layer in chain.layers:
                    layer.merge(adapter_names=[chain.adapter_name])
        yield
    finally:
        for chain in chains:
            for layer in chain.layers:
                if layer.merged:
                    layer.unmerge()
        for buffers, adapter_name, buffer in before:
            restore(buffers, adapter_name, buffer)
        for config, estimate in configs:
            config.estimate = estimate


@dataclass(frozen=True)
class _Output:
    logits: torch.Tensor  # (..., classes)
    loss: float | None


def _output(output: Any, batch: Batch, which: str) -> tuple[_Output, torch.Tensor]:
    """Logits and loss, and which rows of the logits are no padding.

    Raises:
        ValueError: if there are no logits, or NaN or +inf in those of the `which` model; -inf is a class ruled out.
    """
    logits = getattr(output, "logits", None)
    if not isinstance(logits, torch.Tensor) or logits.shape[-1] < 2:
        found = type(output).__name__ if logits is None else f"logits of shape {tuple(logits.shape)}"
        raise ValueError(
            f"merge_report compares distributions over classes or tokens and needs an output with `.logits` (..., "
            f"classes), but the model returned {found}. Use a model with a classification or language modelling head."
        )
    loss = getattr(output, "loss", None)
    keep = tokens_of(logits, masks_of(batch))[0]
    rows = logits.flatten(0, -2)[keep]
    if (rows.isnan() | rows.isposinf()).any():
        raise ValueError(
            f"The logits of the {which} model hold NaN or inf, so that nothing can be compared. Look for an overflow: "
            "run the model in float32 or bfloat16."
        )
    return _Output(logits, None if loss is None else float(loss)), keep


class _Sums:
    """Running sums over layers and outputs of what a `MergeCost` averages."""

    def __init__(self) -> None:
        self.layers: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.kl = self.kept = self.before = self.after = 0.0
        self.rows = self.with_loss = 0

    def add_layer(self, name: str, missed: torch.Tensor, unmerged: torch.Tensor) -> None:
        total = self.layers.get(name)
        self.layers[name] = (missed, unmerged) if total is None else (total[0] + missed, total[1] + unmerged)

    def add_output(self, expected: _Output, actual: _Output, keep: torch.Tensor) -> None:
        p, q = (F.log_softmax(o.logits.flatten(0, -2)[keep], dim=-1, dtype=torch.float64) for o in (expected, actual))
        self.kl += float(torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum())
        self.kept += int((p.argmax(-1) == q.argmax(-1)).sum())
        self.rows += len(p)
        # The loss of a batch without a single label is NaN.
        if expected.loss is not None and actual.loss is not None and math.isfinite(expected.loss):
            sequences = len(expected.logits)
            self.with_loss += sequences
            self.before += sequences * expected.loss
            self.after += sequences * actual.loss

    def cost(self, names: Sequence[str]) -> MergeCost:
        errors = {name: (float(m), float(u)) for name, (m, u) in self.layers.items()}
        return MergeCost(
            layers={name: math.sqrt(m / u) if u else 0.0 for name in names for m, u in [errors.get(name, (0.0, 0.0))]},
            kl=max(0.0, self.kl / self.rows),
            agreement=self.kept / self.rows,
            loss=(self.before / self.with_loss, self.after / self.with_loss) if self.with_loss else None,
        )
