"""From a saved adapter, by its files alone, to a `LoraExport`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from peft_reslora.export.chains import ChainFit
from peft_reslora.export.checkpoint import DORA_PART, LoraExport, assemble
from peft_reslora.export.factors import Factors, factorize
from peft_reslora.export.fitting import Fit, FittedUpdate
from peft_reslora.export.forms import LINEAR, Form, dora_form_of, form_of
from peft_reslora.export.reading import FETCH, PARTS, WITH_BASE, SavedAdapter, read_adapter
from peft_reslora.export.source import MERGE_INSTEAD, in_layer, is_dora, refuse_truncated_dora
from peft_reslora.export.targets import linear_shape
from peft_reslora.mora import MoRAConfig
from peft_reslora.mora.operators import delta_weight, sharing_factors, square_size
from peft_reslora.reslora.blocks.dora import MAGNITUDE
from peft_reslora.reslora.config import ResLoRAConfig
from peft_reslora.reslora.merging.plan import merges_from_state_dict
from peft_reslora.shared.host import Convolution
from peft_reslora.shared.patterns import by_pattern, scaling_of
from peft_reslora.shared.precision import full_precision
from peft_reslora.shared.tensors import widen


def export_lora_from_files(
    adapter_dir: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    allow_dora: bool = False,
    dtype: torch.dtype | None = None,
) -> LoraExport:
    """Turn a saved ResLoRA, MoRA or LoRA adapter into a standard LoRA, without its base model.

    Of MoRA, the files hold the shapes of no layer: the config of the base model has to be on this machine, in its
    folder or the Hub's cache. Where it is, it also tells whether the files hold all layers.

    The file holds the adapter's layers alone, and for diffusers' pipelines none is written; `target_modules` are the
    adapter's own where they are plain names and full module names otherwise. An estimator that reads base weights
    ('weight_norm') takes the model, and `export_lora`.

    Args:
        adapter_dir: a folder with `adapter_config.json` and `adapter_model.safetensors`.
        rank, energy, allow_dora, dtype: as for `export_lora`; whether a row of a merged weight is zero is not seen.

    Raises:
        ValueError: naming the file that is missing, damaged or of another kind; or as `export_lora`.
    """
    fit = Fit(rank, energy, dtype or torch.float32)
    adapter = read_adapter(Path(adapter_dir), allow_dora)
    config: Any = adapter.config
    if dora := is_dora(config):
        refuse_truncated_dora(fit, adapter.name)
    updates = updates_in_files(adapter, fit)
    lora_config = LoraConfig(
        target_modules=targets_in_files(config, list(updates)),
        fan_in_fan_out=adapter.fan_in_fan_out,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        auto_mapping=config.auto_mapping,
    )
    call = f"export_lora_from_files({adapter.name!r}{fit.arguments()}{', allow_dora=True' if dora else ''})"
    export = assemble(updates, {}, lora_config, fit, config, call, None)
    export.warn()
    return export


@full_precision()
def updates_in_files(adapter: SavedAdapter, fit: Fit) -> dict[str, FittedUpdate]:
    """The update of every layer of a saved adapter, by the module's name in the base model.

    Raises:
        ValueError: naming adapter and layer, if one cannot be exported.
    """
    update_of, updates = _updates_in_files(adapter, fit), {}
    for name in adapter.tensors:
        with in_layer(adapter.name, name):
            updates[name] = update_of(name)
    return updates


def _form_in_files(adapter: SavedAdapter, name: str, form_of: Callable[[nn.Module], Form] = form_of) -> Form:
    """The form of a layer's factors, as `form_of` tells it of the base layer.

    Raises:
        ValueError: for a convolution without its base model, since only that tells how its kernels are applied.
    """
    A = adapter.tensors[name].get("lora_A.weight")
    if A is None or A.ndim < 3:
        return LINEAR
    if adapter.base is None:
        raise ValueError(
            "it is a convolution, and no config of its base model, which alone tells its groups, dilation and padding "
            f"mode, is on this machine. {FETCH} {WITH_BASE}"
        )
    return form_of(adapter.base.get_submodule(name))


def targets_in_files(config: Any, exported: list[str]) -> list[str]:
    """`target_modules` where the base model's other modules are not known.

    The adapter's own, if nothing but them decided which modules it has; the full names otherwise.
    """
    own = config.target_modules
    narrowed = config.exclude_modules or config.layers_to_transform is not None
    return sorted(exported if isinstance(own, str) or not own or narrowed else own)


def _updates_in_files(adapter: SavedAdapter, fit: Fit) -> Callable[[str], FittedUpdate]:
    """What computes a layer's update, and fits it."""
    config, tensors = adapter.config, adapter.tensors
    if isinstance(config, ResLoRAConfig):
        merges, chain_fit = merges_from_state_dict(config, adapter.state_dict()), ChainFit(fit, config)

        def merged(name: str) -> FittedUpdate:
            merge, position = merges[name]
            factors = Factors.of(*merge.factors(position))
            if config.use_dora:
                norms, form = _norms(tensors[name], MAGNITUDE, factors), _form_in_files(adapter, name, dora_form_of)
                return fit.dora_update(factors, norms, merge.exactness[position], form)
            return chain_fit.update(factors, merge, position, _form_in_files(adapter, name))

        return merged
    if isinstance(config, MoRAConfig):
        modules = _modules_of_base(adapter)

        def mora(name: str) -> FittedUpdate:
            factors = _mora(config, name, tensors[name], _matrix_shape(modules[name]), fit.approximate)
            return fit.update(factors, form=form_of(modules[name]))

        return mora
    if is_dora(config):

        def dora(name: str) -> FittedUpdate:
            parts = dict(tensors[name])
            if any(tensor.ndim > 2 for tensor in parts.values()):
                raise ValueError(f"its DoRA is of no linear layer. {MERGE_INSTEAD}")
            norms = parts.pop(DORA_PART, None)
            factors = _lora(config, name, parts, LINEAR)
            return fit.dora_update(factors, _norms({} if norms is None else {DORA_PART: norms}, DORA_PART, factors))

        return dora

    def lora(name: str) -> FittedUpdate:
        form = _form_in_files(adapter, name)
        return fit.update(_lora(config, name, tensors[name], form), form=form)

    return lora


def _norms(parts: Mapping[str, Tensor], part: str, factors: Factors) -> Tensor:
    """DoRA's norms of one layer, `(out_features,)`."""
    if part not in parts or tuple(parts[part].shape) != (factors.B.shape[0],):
        shape = tuple(parts[part].shape) if part in parts else "missing"
        raise ValueError(
            f"{part} is {shape} instead of {(factors.B.shape[0],)}: config and tensors are not of one adapter. Take "
            "both from one save"
        )
    return widen(parts[part])


def _lora(config: Any, name: str, parts: Mapping[str, Tensor], form: Form) -> Factors:
    """s B A, of the rank and alpha that the config gives the layer."""
    if parts.keys() != set(PARTS["LORA"]):
        raise ValueError(
            f"it has the tensors {', '.join(sorted(parts))} instead of {' and '.join(PARTS['LORA'])}, so it is no "
            f"plain LoRA of a linear layer or convolution. {MERGE_INSTEAD}"
        )
    alpha = by_pattern(config.alpha_pattern, name, config.lora_alpha)
    r = by_pattern(config.rank_pattern, name, config.r)
    pair = parts["lora_A.weight"], parts["lora_B.weight"]
    return Factors.of(*(pair if form == LINEAR else form.matrices(pair)), scaling_of(config, r, alpha))


def _mora(
    config: MoRAConfig, name: str, parts: Mapping[str, Tensor], shape: tuple[int, int] | None, approximate: bool
) -> Factors:
    """Of type 'sharing' the exact factors; of the others, which are full rank, the whole update."""
    if "mora_M" not in parts:
        raise ValueError("its matrix is not in the file")
    if shape is None:
        raise ValueError(f"its base layer is neither linear nor a convolution. {MERGE_INSTEAD}")
    r = by_pattern(config.rank_pattern, name, config.r)
    mora_type, M = config.resolve_type(r), widen(parts["mora_M"])
    if tuple(M.shape) != (q := square_size(*shape, r, mora_type), q):
        raise ValueError(
            f"its matrix is {tuple(M.shape)}, and r={r} with {shape[0]} inputs and {shape[1]} outputs makes it "
            f"{(q, q)}: file, config and base do not match. Set base_model_name_or_path in its "
            "config to the base on which it was trained"
        )
    if mora_type == "sharing":
        return Factors.of(*sharing_factors(M, *shape))
    if not approximate:
        raise ValueError(
            f"with mora_type={mora_type!r} its update is full rank, so that no LoRA of a small rank equals it. Pass "
            "rank= or energy= (--rank, --energy) for the nearest LoRA, or merge it into the base model with "
            "merge_and_unload()"
        )
    return Factors.of(*factorize(delta_weight(M, *shape, mora_type)))


def _matrix_shape(base_layer: nn.Module) -> tuple[int, int] | None:
    """Columns and rows of a layer's update as a matrix; None for a layer that is neither linear nor a convolution."""
    if not isinstance(base_layer, Convolution):
        return linear_shape(base_layer)
    return base_layer.in_channels * math.prod(base_layer.kernel_size), base_layer.out_channels


def _modules_of_base(adapter: SavedAdapter) -> dict[str, nn.Module]:
    """The modules of the base, which MoRA's files cannot do without: they hold only its square matrices.

    Raises:
        ValueError: if the base's config is not here, or makes no model with the adapter's layers.
    """
    if adapter.base is None:
        raise ValueError(
            f"Adapter {adapter.name!r} is MoRA, whose files do not hold the shapes of its layers; they are those of "
            f"the base model {adapter.config.base_model_name_or_path!r}, and no config of it that has these layers is "
            f"on this machine. {FETCH} {WITH_BASE}"
        )
    return dict(adapter.base.named_modules())
