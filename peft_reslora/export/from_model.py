"""From an adapter in a model to a `LoraExport`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from peft_reslora.export.base import unknown_layers
from peft_reslora.export.chains import ChainFit
from peft_reslora.export.checkpoint import LoraExport, Shapes, assemble
from peft_reslora.export.experts import fit_experts
from peft_reslora.export.factors import dora_factors, layer_factors
from peft_reslora.export.fitting import AS_TRAINED, Fit, FittedUpdate
from peft_reslora.export.forms import ParameterForm, dora_form_of, form_of_adapted
from peft_reslora.export.pipeline import diffusers_prefix
from peft_reslora.export.source import (
    MERGE_INSTEAD,
    config_in_model,
    in_layer,
    is_dora,
    name_of,
    refuse_config,
    refuse_resized,
    refuse_truncated_dora,
)
from peft_reslora.export.targets import (
    base_model_of,
    layers_over,
    linear_shape,
    matched_besides,
    missing_partners,
    named_base_modules,
    refuse_misfits,
    row_norms,
    target_names,
    tuner_layers,
)
from peft_reslora.reslora.layer import ResLoRALayer
from peft_reslora.reslora.linked_chain import planned
from peft_reslora.reslora.linking import chains_among
from peft_reslora.shared.host import has_adapter, own_parameters
from peft_reslora.shared.names import parameter_path, unwrapped
from peft_reslora.shared.precision import full_precision


def export_lora(
    model: nn.Module,
    adapter_name: str = "default",
    *,
    rank: int | None = None,
    energy: float | None = None,
    fill_missing_layers: bool = True,
    allow_dora: bool = False,
    dtype: torch.dtype | None = None,
    progressbar: bool = False,
) -> LoraExport:
    """Turn an adapter into a standard LoRA; the model is left as it is.

    Exact for LoRA, AdaLoRA, LoHa, LoKr, ResLoRA's 'block' and MoRA's 'sharing'; ResLoRA's 'input' and 'middle' by the
    config's `merge_estimator`, exact where a layer is annealed or the first of its chain. The names in the file are
    those of the bare model, also where torch.compile, checkpointing, FSDP or DDP wraps its blocks. All pairs get one
    rank, the least of 8, 16, 32, 64, 128, 256, 320 and 512 that holds every update, by padding with zeros.

    Args:
        model: a PeftModel, a tuner, or a model into which the adapter was injected.
        adapter_name: which adapter; it need not be active.
        rank: keep at most so many directions per layer, and give the file the least of those ranks from `rank` up,
            also where less would do. An adapter with nested ranks is truncated to the first `rank` directions of each
            block instead, as it was trained to be; with shortcut 'block' those of several blocks add up.
        energy: instead of `rank`, the fraction in (0, 1] of each update's squared singular values to keep at least.
        fill_missing_layers: give zeros to the layers that lack an update of a type that other layers have, and to a
            `v_proj` beside a `q_proj`. TGI, LoRAX and SGLang misread adapters without; False keeps the file small.
        allow_dora: let an adapter with use_dora become a DoRA checkpoint, which loads in PEFT, exactly; elsewhere, it
            is refused. Others are exported as ever.
        dtype: of the tensors: float32 (the default), float16 or bfloat16.
        progressbar: show how many of the model's modules are done.

    Raises:
        ValueError: for an unknown adapter, for what a LoRA cannot hold, for an update of a rank above 512 without
            `rank` or `energy`, for NaN or inf, and for arguments out of range. It names adapter and layer.
    """
    fit = Fit(rank, energy, dtype or torch.float32)
    export = export_quietly(model, adapter_name, fit, fill_missing_layers, progressbar, allow_dora)
    export.warn()
    return export


def save_as_lora(
    path: str | os.PathLike[str],
    model: nn.Module,
    adapter_name: str = "default",
    *,
    rank: int | None = None,
    energy: float | None = None,
    fill_missing_layers: bool = True,
    allow_dora: bool = False,
    dtype: torch.dtype | None = None,
    progressbar: bool = False,
    base_model: nn.Module | None = None,
    command: str | None = None,
) -> LoraExport:
    """`export_lora` and `LoraExport.save_pretrained` in one call; the arguments are theirs."""
    fit = Fit(rank, energy, dtype or torch.float32)
    export = export_quietly(model, adapter_name, fit, fill_missing_layers, progressbar, allow_dora)
    export.warn()
    export.save_pretrained(path, base_model, command=command)
    return export


def export_quietly(
    model: nn.Module,
    adapter_name: str,
    fit: Fit,
    fill_missing_layers: bool,
    progressbar: bool,
    allow_dora: bool = False,
) -> LoraExport:
    """What `export_lora` does, without its warnings: those point to the line that called a public function."""
    model = unwrapped(model)
    config = config_in_model(model, adapter_name)
    refuse_config(config, adapter_name, allow_dora, in_model=True)
    if dora := is_dora(config):
        refuse_truncated_dora(fit, adapter_name)
    base_model = base_model_of(model)
    refuse_resized(base_model, config, adapter_name)
    modules = named_base_modules(base_model)
    updates = updates_in_model(modules, adapter_name, config, fit, progressbar)
    parameters = {name: u.form.path for name, u in updates.items() if isinstance(u.form, ParameterForm)}
    layers = {name: update for name, update in updates.items() if name not in parameters}
    zeros, targets = _complete(layers, modules, fill_missing_layers)
    base_class = type(base_model)
    auto_mapping = {"base_model_class": base_class.__name__, "parent_library": base_class.__module__}
    lora_config = LoraConfig(
        target_modules=targets,
        target_parameters=sorted(parameters.values()) or None,
        fan_in_fan_out=any(isinstance(tuner_layers(modules[n])[-1].get_base_layer(), Conv1D) for n in layers),
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path or name_of(base_model),
        revision=config.revision,
        auto_mapping=auto_mapping if config.task_type is None else None,
    )
    options = ("" if fill_missing_layers else ", fill_missing_layers=False") + (", allow_dora=True" if dora else "")
    call = f"export_lora(model, {adapter_name!r}{fit.arguments()}{options})"
    prefix = None if dora else diffusers_prefix(base_model)
    norms = {name: _norms_of(name, modules, adapter_name) for name in zeros} if dora else None
    export = assemble(updates, zeros, lora_config, fit, config, call, prefix, norms)
    shapes = {name: shape for name, shape in export.shapes().items() if name not in parameters}
    refuse_misfits(shapes, modules)
    export.report.tied.update(tied_layers(updates, modules))
    export.report.unknown.extend(unknown_layers(base_model, list(shapes)))
    return export


def _complete(
    updates: Mapping[str, FittedUpdate], modules: Mapping[str, nn.Module], fill: bool
) -> tuple[Shapes, list[str]]:
    """The layers to fill with zeros, and the `target_modules` that name them and the updated ones and no others."""
    zeros = missing_partners(updates, modules) if fill else []
    while True:
        exported = {*updates, *zeros}
        targets = target_names(exported, modules)
        if not (besides := matched_besides(exported, targets, modules)):
            break
        zeros = [*zeros, *besides]
    shapes = {}
    for name in zeros:
        if (shape := linear_shape(modules[name])) is None:
            raise ValueError(
                f"No list of target_modules names the adapted layers and not {name!r}, which is not linear and whose "
                f"name ends as one of theirs. {MERGE_INSTEAD}"
            )
        shapes[name] = shape
    return shapes, targets


@full_precision()
def updates_in_model(
    modules: Mapping[str, nn.Module], adapter_name: str, config: PeftConfig, fit: Fit, progressbar: bool = False
) -> dict[str, FittedUpdate]:
    """The update of every layer that has the adapter, by the module's name in the base model.

    Those of several parameters of one module by the names of PEFT's layers, `experts` and `experts.base_layer`.

    Args:
        modules: of the base model, as from `named_base_modules`.
        adapter_name: which adapter, and `config` its config.
        fit: how to fit each update into the file.
        progressbar: show how many of the modules are done.

    Raises:
        ValueError: naming adapter and layer, if one cannot be exported; or if there is none.
    """
    updates = {}
    chain_fit = ChainFit(fit, config)
    layers: list[Any] = [layer for module in modules.values() for layer in tuner_layers(module)]
    with planned(chains_among(layers, adapter_name)):  # each chain is merged once, and not once for each of its layers
        for name, module in tqdm(modules.items(), disable=not progressbar, desc="Exporting as LoRA"):
            for layer in layers_over(module):
                if isinstance(layer, AuxiliaryTrainingWrapper) and has_adapter(layer, adapter_name):
                    raise ValueError(
                        f"Adapter {adapter_name!r} trains the module {name!r} itself ({type(layer).__name__}), which "
                        f"no LoRA can hold. {MERGE_INSTEAD}"
                    )
                if isinstance(layer, BaseTunerLayer) and has_adapter(layer, adapter_name):
                    with in_layer(adapter_name, name):
                        key = _key_of(name, layer, module)
                        updates[key] = _update(name, layer, adapter_name, config, fit, chain_fit)
    if not updates:
        raise ValueError(f"Adapter {adapter_name!r} has no layers in this model, so there is nothing to export.")
    return updates


def _key_of(name: str, layer: nn.Module, module: nn.Module) -> str:
    """How a file calls one of the layers that stand in a module's place, where each adapts another parameter."""
    if not isinstance(layer, ParamWrapper):
        return name
    around = [other for other in tuner_layers(module) if isinstance(other, ParamWrapper)]
    return name + ".base_layer" * around.index(layer)


def _update(
    name: str, layer: BaseTunerLayer, adapter_name: str, config: PeftConfig, fit: Fit, chain_fit: ChainFit
) -> FittedUpdate:
    """One layer's, fitted."""
    place = layer.chain_of(adapter_name) if isinstance(layer, ResLoRALayer) else None
    form = form_of_adapted(layer)
    if isinstance(layer, ResLoRALayer) and place is not None and isinstance(form, ParameterForm):
        A, B = layer.merged_factors(adapter_name)
        form = dataclasses.replace(form, path=parameter_path(name, form.path))
        return fit_experts(fit, A, B, place[0].merge().exactness[place[1]], form)
    if is_dora(config):
        merge = AS_TRAINED if place is None else place[0].merge().exactness[place[1]]
        return fit.dora_update(*dora_factors(layer, adapter_name), merge, dora_form_of(layer.get_base_layer()))
    factors = layer_factors(layer, adapter_name, approximate=fit.approximate)
    if place is None:
        return fit.update(factors, form=form)
    return chain_fit.update(factors, place[0].merge(), place[1], form)


def _norms_of(name: str, modules: Mapping[str, nn.Module], adapter_name: str) -> torch.Tensor:
    with in_layer(adapter_name, name):
        return row_norms(modules[name])


def tied_layers(exported: Collection[str], modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """The exported layers whose weight another module uses as its own, such as an embedding; with that module."""
    users: dict[int, list[str]] = {}
    for name, module in modules.items():
        *_, base = layers_over(module)
        for parameter in own_parameters(base):
            users.setdefault(id(parameter), []).append(name)
    return {
        name: next(user for user in names if user != name)
        for names in users.values()
        for name in names
        if len(names) > 1 and name in exported
    }
