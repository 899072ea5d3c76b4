"""Several adapters as one LoRA: their weighted sum, with weights that are given or found on a few examples."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from peft_reslora.export.checkpoint import PREFIX, LoraExport, assemble
from peft_reslora.export.factors import Factors
from peft_reslora.export.fitting import AS_TRAINED, Fit, FittedUpdate
from peft_reslora.export.forms import LINEAR, Form
from peft_reslora.export.from_model import export_quietly
from peft_reslora.reslora.merging.estimators import Exactness
from peft_reslora.shared.precision import full_precision

_CUT_BEFORE = "cut off in an export before"
_NO_LOSS = 1e30  # of coefficients that break the model: worse than any that do not


@dataclass(frozen=True)
class Composition:
    """What `compose_adapters` found.

    Args:
        export: the weighted sum as a LoRA.
        coefficients: the weight of each adapter.
        loss: that of the model with the sum, without the penalty.
        base_loss: that of the base model.
    """

    export: LoraExport
    coefficients: dict[str, float]
    loss: float
    base_loss: float


class _Whole(Fit):
    """Leaves an update as it is, of whatever rank: it is one of several, and their sum is what goes into a file."""

    def update(self, factors: Factors, merge: Exactness = AS_TRAINED, form: Form = LINEAR) -> FittedUpdate:
        return FittedUpdate(Factors(factors.A.cpu(), factors.B.cpu()), factors.rank, 1.0, 0.0, merge, form=form)

    @property
    def nested_rank(self) -> int | None:
        return None

    def file_rank(self, updates: Mapping[str, FittedUpdate]) -> int:
        return max(1, *(update.form.needs(*update.factors.pair) for update in updates.values()))


def combine_as_lora(
    model_or_exports: nn.Module | Mapping[str, LoraExport],
    adapters: Sequence[str],
    weights: Sequence[float],
    *,
    rank: int | None = None,
    energy: float | None = None,
    dtype: torch.dtype | None = None,
) -> LoraExport:
    """The weighted sum of several adapters' updates, sum_i w_i dW_i, as one standard LoRA; nothing is changed.

    Of any adapters that `export_lora` takes, also of different methods, ranks and layers. Exact with the sum of their
    ranks; with `rank` or `energy` the nearest LoRA to the sum, whose error the report has. It is the sum of updates,
    for which it does not matter how an update is split into factors, and not the product of summed factors.

    Args:
        model_or_exports: the model that has the adapters; or exports of one base model by name.
        adapters: their names; a name may occur once.
        weights: one finite number for each.
        rank, energy, dtype: of the sum, as for `export_lora`.

    Raises:
        ValueError: as `export_lora`; for weights that are no finite numbers, and for exports of different base models
            or shapes.
    """
    fit = Fit(rank, energy, dtype or torch.float32)
    _check(adapters, weights)
    if isinstance(model_or_exports, nn.Module):
        whole = _Whole(rank, energy)  # says that an approximation will do, if it will
        exports = [export_quietly(model_or_exports, name, whole, True, False) for name in adapters]
    else:
        exports = _chosen(model_or_exports, adapters)
    call = f"combine_as_lora(model_or_exports, {list(adapters)}, {list(weights)}{fit.arguments()})"
    combined = _combine(exports, weights, fit, call)
    combined.warn()
    return combined


def compose_adapters(
    base_model: nn.Module,
    exports: Mapping[str, LoraExport],
    loss: Callable[[nn.Module], float],
    *,
    bounds: tuple[float, float] = (-1.5, 1.5),
    l1: float = 0.05,
    budget: int = 40,
    seed: int = 0,
    rank: int | None = None,
    energy: float | None = None,
) -> Composition:
    """Weights for several adapters from a few examples of a new task, without gradients (LoRAHub, arXiv 2307.13269).

    Minimizes loss + l1 * sum_i |w_i| over the weights within the bounds (section 3.3 of the paper, whose values the
    defaults are), by CMA-ES from w = 0. The weights are of updates, sum_i w_i B_i A_i; the paper sums the
    factors A and B apart, which gives products between adapters and depends on how each update is split into factors.

    There is one weight per adapter for all inputs. A mixture whose weights depend on the token (LoRAMoE and others)
    is none of this: it is no fixed update of the weights, and fits into no LoRA.

    Args:
        base_model: the bare base model, in memory. It gets the sums as an adapter for the search, and is as it was
            afterwards.
        exports: the adapters by name, of this base model; `export_lora` makes them of any native adapter.
        loss: the mean loss of a model on the examples, called `budget` times and once for the base model, in eval
            mode and without gradients.
        bounds: of each weight.
        l1: of the penalty.
        budget: how many weights are tried.
        seed: of the search; the same seed finds the same weights if `loss` gives the same numbers.
        rank, energy: of the sum, as for `combine_as_lora`.

    Raises:
        ImportError: without nevergrad.
        ValueError: for an adapted base model, exports that do not fit it, a loss that is no finite number for the
            base model, or arguments out of range.
    """
    fit = Fit(rank, energy)
    names = list(exports)
    _check(names, [0.0] * len(names))
    if not bounds[0] <= 0.0 <= bounds[1] or bounds[0] == bounds[1] or not all(map(math.isfinite, (*bounds, l1))):
        raise ValueError(f"bounds={bounds!r} have to enclose 0, where the search starts, and l1={l1!r} to be finite.")
    if budget < 1 or l1 < 0:
        raise ValueError(f"budget={budget!r} has to be at least 1, and l1={l1!r} at least 0.")
    chosen = _chosen(exports, names)
    _refuse_unlike(chosen)
    with _composable(base_model, chosen) as (model, set_weights), torch.no_grad():
        base_loss = float(loss(model))
        if not math.isfinite(base_loss):
            raise ValueError(f"The loss of the base model is {base_loss}, so that no weights can be compared by it.")

        def objective(weights: Sequence[float]) -> tuple[float, float]:
            set_weights(weights)
            found = float(loss(model))
            penalized = found + l1 * sum(map(abs, weights))
            return (penalized if math.isfinite(penalized) else _NO_LOSS), found

        tried = [(base_loss, base_loss, [0.0] * len(names))]
        tried += [(*result, weights) for weights, result in _search(objective, len(names), bounds, budget, seed)]
    _, best_loss, weights = min(tried, key=lambda one: one[0])
    call = f"compose_adapters(base_model, exports, loss, l1={l1}, budget={budget}, seed={seed}{fit.arguments()})"
    export = _combine(chosen, weights, fit, f"{call}  # weights {dict(zip(names, weights, strict=True))}")
    export.warn()
    return Composition(export, dict(zip(names, weights, strict=True)), best_loss, base_loss)


def _search(
    objective: Callable[[Sequence[float]], tuple[float, float]],
    number: int,
    bounds: tuple[float, float],
    budget: int,
    seed: int,
) -> Iterator[tuple[list[float], tuple[float, float]]]:
    """The weights that nevergrad tries, and what the objective says of them."""
    try:
        import nevergrad
    except ImportError as error:
        raise ImportError("compose_adapters needs nevergrad: pip install 'peft_reslora[compose]'.") from error
    space = nevergrad.p.Array(init=[0.0] * number, lower=bounds[0], upper=bounds[1])
    space.random_state.seed(seed)
    optimizer = nevergrad.optimizers.CMA(parametrization=space, budget=budget)
    for _ in range(budget):
        candidate = optimizer.ask()
        weights = [float(weight) for weight in candidate.value]
        result = objective(weights)
        optimizer.tell(candidate, result[0])
        yield weights, result


@contextmanager
def _composable(
    base_model: nn.Module, exports: Sequence[LoraExport]
) -> Iterator[tuple[nn.Module, Callable[[Sequence[float]], None]]]:
    """The model with the exports side by side as one adapter, and what sets their weights; undone at the end."""
    if any(isinstance(module, BaseTunerLayer) for module in base_model.modules()):
        raise ValueError("base_model has an adapter already; give the bare base model.")
    r = sum(export.config.r for export in exports)
    config = LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=sorted({name for export in exports for name in _targets(export)}),
        fan_in_fan_out=exports[0].config.fan_in_fan_out,
    )
    training = {module: module.training for module in base_model.modules()}
    trainable = {parameter: parameter.requires_grad for parameter in base_model.parameters()}
    model: Any = get_peft_model(base_model, config)
    try:
        sides = _put_side_by_side(model.get_base_model(), exports)

        def set_weights(weights: Sequence[float]) -> None:
            ranks = torch.tensor([export.config.r for export in exports])
            for layer, side in sides.items():
                columns = torch.tensor(weights).repeat_interleave(ranks)
                layer.lora_B["default"].weight.data.copy_(side * columns.to(side))

        set_weights([0.0] * len(exports))
        model.eval()
        yield model, set_weights
    finally:
        model.unload()
        for module, was in training.items():
            module.training = was
        for parameter, requires_grad in trainable.items():
            parameter.requires_grad_(requires_grad)


def _put_side_by_side(model: nn.Module, exports: Sequence[LoraExport]) -> dict[Any, Tensor]:
    """Write the exports' A below each other into the layers, and give each layer's B, all with weight 1.

    Raises:
        ValueError: if the layers are not those of the exports.
    """
    layers: dict[str, Any] = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    held = {name for export in exports for name in export.shapes()}
    if layers.keys() != held:
        other = ", ".join(sorted(layers.keys() ^ held)[:3])
        raise ValueError(f"PEFT adapts other layers of the base model than the exports hold: {other}.")
    sides: dict[Any, Tensor] = {}
    for name, layer in layers.items():
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        pairs = [_pair(export, name) or _zeros(export, A, B) for export in exports]
        A.data.copy_(torch.cat([pair[0] for pair in pairs]))
        sides[layer] = torch.cat([pair[1] for pair in pairs], dim=1).to(B)
    return sides


def _check(adapters: Sequence[str], weights: Sequence[float]) -> None:
    numbers = all(isinstance(w, (int, float)) and not isinstance(w, bool) and math.isfinite(w) for w in weights)
    if not adapters or len(adapters) != len(weights) or not numbers:
        raise ValueError(
            f"weights={list(weights)!r} has to hold one finite number for each of the adapters {list(adapters)}, of "
            "which there has to be one at least."
        )
    if len(set(adapters)) < len(adapters):
        raise ValueError(f"The adapters {list(adapters)} hold a name twice; add its weights up.")


def _chosen(exports: Mapping[str, LoraExport], adapters: Sequence[str]) -> list[LoraExport]:
    if unknown := [name for name in adapters if name not in exports]:
        raise ValueError(f"There is no export {unknown[0]!r}, there are {', '.join(map(repr, exports))}.")
    if dora := [name for name in adapters if exports[name].config.use_dora]:
        raise ValueError(
            f"Export {dora[0]!r} is a DoRA, whose norms are not those of a sum. Merge its adapter with "
            "merge_and_unload() instead."
        )
    return [exports[name] for name in adapters]


@full_precision()
def _combine(exports: Sequence[LoraExport], weights: Sequence[float], fit: Fit, call: str) -> LoraExport:
    """The weighted sum of exports of one base model, fitted once."""
    _refuse_unlike(exports)
    updates: dict[str, FittedUpdate] = {}
    zeros: dict[str, tuple[int, int]] = {}
    for name, shape in {name: shape for export in exports for name, shape in export.shapes().items()}.items():
        parts = [(w, pair) for w, export in zip(weights, exports, strict=True) if (pair := _pair(export, name))]
        if all(name in export.report.filled for export in exports if name in export.shapes()):
            zeros[name] = shape
            continue
        A, B = torch.cat([pair[0] for _, pair in parts]), torch.cat([w * pair[1] for w, pair in parts], dim=1)
        try:
            updates[name] = fit.update(Factors.of(A, B), _merge_of(exports, name))
        except ValueError as error:
            raise ValueError(f"The sum of the adapters, layer {name!r}: {error}.") from error
    first = exports[0].config
    config = LoraConfig(
        target_modules=sorted({target for export in exports for target in _targets(export)}),
        fan_in_fan_out=first.fan_in_fan_out,
        task_type=first.task_type,
        base_model_name_or_path=first.base_model_name_or_path,
        revision=first.revision,
        auto_mapping=first.auto_mapping,
    )
    combined = assemble(updates, zeros, config, fit, first, call, exports[0].diffusers_prefix)
    methods = " + ".join(dict.fromkeys(export.report.method for export in exports))
    report = dataclasses.replace(
        combined.report,
        method=f"{methods}, {len(exports)} adapters summed",
        tied={layer: other for export in exports for layer, other in export.report.tied.items()},
        unknown=list(dict.fromkeys(layer for export in exports for layer in export.report.unknown)),
    )
    return dataclasses.replace(combined, report=report)


def _merge_of(exports: Sequence[LoraExport], name: str) -> Exactness:
    """How the summands of a layer came about, where not all of them are exact."""
    reports = [layer for export in exports for layer in export.report.layers if layer.layer == name]
    merged = [layer for layer in reports if layer.merge == "exact"]
    inexact = {layer.merge for layer in reports if layer.merge != "exact"}
    inexact |= {_CUT_BEFORE for layer in merged if not layer.exact and layer.relative_error}
    return Exactness(False, " and ".join(sorted(inexact))) if inexact else AS_TRAINED


def _refuse_unlike(exports: Sequence[LoraExport]) -> None:
    """Exports have to be of one base model, as far as they tell.

    Raises:
        ValueError: naming what differs.
    """
    tensors = {key: tensor for export in exports for key, tensor in export.state_dict.items()}
    if any(export.config.target_parameters for export in exports):
        raise ValueError(
            "An export adapts parameters (target_parameters), and only adapters of linear layers are summed. Merge "
            "the adapters one after the other with merge_and_unload()."
        )
    if other := [key for key, tensor in tensors.items() if tensor.ndim != 2 or "lora_embedding_" in key]:
        raise ValueError(
            f"{other[0].removeprefix(PREFIX)} is of a convolution or an embedding, and only adapters of linear layers "
            "are summed. Combine the adapters before, with add_weighted_adapter(..., combination_type='cat')."
        )
    shapes: dict[str, tuple[int, int]] = {}
    for export in exports:
        for name, shape in export.shapes().items():
            if shapes.setdefault(name, shape) != shape:
                raise ValueError(
                    f"The exports have layer {name!r} with {shapes[name]} and with {shape} inputs and outputs: they "
                    "are of different base models, and cannot be summed."
                )
    for field in ("base_model_name_or_path", "fan_in_fan_out"):
        if len(values := {getattr(export.config, field) for export in exports}) > 1:
            raise ValueError(
                f"The exports differ in {field}, {', '.join(sorted(map(repr, values)))}. Only adapters of one base "
                "model are summed; if it is the same one under two names, set it to one in each export.config."
            )
    if len(prefixes := {export.diffusers_prefix for export in exports}) > 1:
        raise ValueError(f"The exports are of different models of a pipeline, {', '.join(map(repr, prefixes))}.")


def _pair(export: LoraExport, name: str) -> tuple[Tensor, Tensor] | None:
    """A and B of a layer, in float32 or better, every scale in B."""
    A, B = (export.state_dict.get(f"{PREFIX}{name}.lora_{factor}.weight") for factor in "AB")
    if A is None or B is None:
        return None
    scale = export.config.lora_alpha / export.config.r
    return (A, scale * B) if A.dtype == torch.float64 else (A.float(), scale * B.float())


def _zeros(export: LoraExport, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """What an export without this layer adds to it, with factors like A and B."""
    r = export.config.r
    return torch.zeros(r, A.shape[1]), torch.zeros(B.shape[0], r)


def _targets(export: LoraExport) -> list[str]:
    targets = export.config.target_modules
    return [targets] if isinstance(targets, str) else list(targets or ())
