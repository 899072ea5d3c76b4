"""From an adapter, in a model or in a folder, to a `LoraExport`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_reslora.export.base import unknown_layers
from peft_reslora.export.card import is_local, method_name
from peft_reslora.export.checkpoint import PREFIX, LoraExport
from peft_reslora.export.files import targets_in_files, updates_in_files
from peft_reslora.export.fitting import EXACT, Fit, FittedUpdate
from peft_reslora.export.pipeline import diffusers_prefix
from peft_reslora.export.reading import read_adapter
from peft_reslora.export.report import ExportReport, LayerReport
from peft_reslora.export.source import (
    MERGE_INSTEAD,
    config_in_model,
    name_of,
    refuse_config,
    refuse_resized,
    tied_layers,
    updates_in_model,
)
from peft_reslora.export.targets import (
    base_model_of,
    linear_shape,
    matched_besides,
    missing_partners,
    named_base_modules,
    refuse_misfits,
    target_names,
    tuner_layers,
)
from peft_reslora.shared.names import unwrapped
from peft_reslora.shared.precision import full_precision

_VLLM_DEFAULT_MAX_RANK = 16

Shapes = Mapping[str, tuple[int, int]]  # (in_features, out_features) by module


def export_lora(
    model: nn.Module,
    adapter_name: str = "default",
    *,
    rank: int | None = None,
    energy: float | None = None,
    fill_missing_layers: bool = True,
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
            also where less would do.
        energy: instead of `rank`, the fraction in (0, 1] of each update's squared singular values to keep at least.
        fill_missing_layers: give zeros to the layers that lack an update of a type that other layers have, and to a
            `v_proj` beside a `q_proj`. TGI, LoRAX and SGLang misread adapters without; False keeps the file small.
        dtype: of the tensors: float32 (the default), float16 or bfloat16.
        progressbar: show how many of the model's modules are done.

    Raises:
        ValueError: for an unknown adapter, for what a LoRA cannot hold, for an update of a rank above 512 without
            `rank` or `energy`, for NaN or inf, and for arguments out of range. It names adapter and layer.
    """
    fit = Fit(rank, energy, dtype or torch.float32)
    export = _export(model, adapter_name, fit, fill_missing_layers, progressbar)
    _warn(export)
    return export


def save_as_lora(
    path: str | os.PathLike[str],
    model: nn.Module,
    adapter_name: str = "default",
    *,
    rank: int | None = None,
    energy: float | None = None,
    fill_missing_layers: bool = True,
    dtype: torch.dtype | None = None,
    progressbar: bool = False,
    base_model: nn.Module | None = None,
    command: str | None = None,
) -> LoraExport:
    """`export_lora` and `LoraExport.save_pretrained` in one call; the arguments are theirs."""
    fit = Fit(rank, energy, dtype or torch.float32)
    export = _export(model, adapter_name, fit, fill_missing_layers, progressbar)
    _warn(export)
    export.save_pretrained(path, base_model, command=command)
    return export


def export_lora_from_files(
    adapter_dir: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    dtype: torch.dtype | None = None,
) -> LoraExport:
    """Turn a saved ResLoRA, MoRA or LoRA adapter into a standard LoRA, without its base model.

    Of MoRA, the files hold the shapes of no layer: the config of the base model has to be on this machine, in its
    folder or the Hub's cache. Where it is, it also tells whether the files hold all layers.

    What takes the base model is not done: layers without an update are not filled with zeros, `target_modules` are
    the adapter's own where they are plain names and full module names otherwise, and there is no file for diffusers.
    An estimator that reads base weights ('weight_norm') is refused; load the model and use `export_lora`.

    Args:
        adapter_dir: a folder with `adapter_config.json` and `adapter_model.safetensors`.
        rank, energy, dtype: as for `export_lora`.

    Raises:
        ValueError: naming the file that is missing, damaged or of another kind; or as `export_lora`.
    """
    fit = Fit(rank, energy, dtype or torch.float32)
    adapter = read_adapter(Path(adapter_dir))
    config: Any = adapter.config
    updates = updates_in_files(adapter, fit)
    lora_config = LoraConfig(
        target_modules=targets_in_files(config, list(updates)),
        fan_in_fan_out=adapter.fan_in_fan_out,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        auto_mapping=config.auto_mapping,
    )
    call = f"export_lora_from_files({adapter.name!r}{fit.arguments()})"
    export = _assemble(updates, {}, lora_config, fit, config, call, None)
    _warn(export)
    return export


def _export(model: nn.Module, adapter_name: str, fit: Fit, fill_missing_layers: bool, progressbar: bool) -> LoraExport:
    """What `export_lora` does, without its warnings: those point to the line that called a public function."""
    model = unwrapped(model)
    config = config_in_model(model, adapter_name)
    refuse_config(config, adapter_name)
    base_model = base_model_of(model)
    refuse_resized(base_model, config, adapter_name)
    modules = named_base_modules(base_model)
    updates = updates_in_model(modules, adapter_name, fit, progressbar)
    zeros, targets = _complete(updates, modules, fill_missing_layers)
    base_class = type(base_model)
    auto_mapping = {"base_model_class": base_class.__name__, "parent_library": base_class.__module__}
    lora_config = LoraConfig(
        target_modules=targets,
        fan_in_fan_out=any(isinstance(tuner_layers(modules[n])[-1].get_base_layer(), Conv1D) for n in updates),
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path or name_of(base_model),
        revision=config.revision,
        auto_mapping=auto_mapping if config.task_type is None else None,
    )
    unfilled = "" if fill_missing_layers else ", fill_missing_layers=False"
    call = f"export_lora(model, {adapter_name!r}{fit.arguments()}{unfilled})"
    export = _assemble(updates, zeros, lora_config, fit, config, call, diffusers_prefix(base_model))
    refuse_misfits(export.shapes(), modules)
    export.report.tied.update(tied_layers(updates, modules))
    export.report.unknown.extend(unknown_layers(base_model, list(export.shapes())))
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
def _assemble(
    updates: Mapping[str, FittedUpdate],
    zeros: Shapes,
    lora_config: LoraConfig,
    fit: Fit,
    source: PeftConfig,
    call: str,
    prefix: str | None,
) -> LoraExport:
    """Pad all pairs to one rank, and report."""
    r = fit.file_rank(updates)
    lora_config.r = lora_config.lora_alpha = r
    lora_config.inference_mode = True
    pairs = {
        name: (torch.zeros(0, in_features, dtype=fit.dtype), torch.zeros(out_features, 0, dtype=fit.dtype))
        for name, (in_features, out_features) in zeros.items()
    }
    pairs.update({name: (update.factors.A, update.factors.B) for name, update in updates.items()})
    state_dict = {}
    for name, (A, B) in pairs.items():
        missing = r - A.shape[0]
        state_dict[f"{PREFIX}{name}.lora_A.weight"] = nn.functional.pad(A, (0, 0, 0, missing)).contiguous()
        state_dict[f"{PREFIX}{name}.lora_B.weight"] = nn.functional.pad(B, (0, missing)).contiguous()
    dtype = str(fit.dtype).removeprefix("torch.")
    layers = _layer_reports(updates, fit)
    report = ExportReport(method_name(source), call, r, dtype, layers, list(zeros))
    return LoraExport(lora_config, state_dict, report, prefix)


def _layer_reports(updates: Mapping[str, FittedUpdate], fit: Fit) -> list[LayerReport]:
    return [
        LayerReport(
            layer=name,
            merge=update.merge,
            exact=update.merge == EXACT and not update.truncated and fit.dtype == torch.float32,
            rank_before=update.rank_before,
            rank_after=update.factors.rank,
            energy_kept=update.energy_kept,
            relative_error=update.relative_error,
        )
        for name, update in updates.items()
    ]


def _warn(export: LoraExport) -> None:
    """Say what the export will meet elsewhere; called by the function that the user called."""
    r, base = export.config.r, export.config.base_model_name_or_path
    sides = {name: min(shape) for name, shape in export.shapes().items()}
    if r > _VLLM_DEFAULT_MAX_RANK:
        warnings.warn(f"The LoRA has r={r}: vLLM needs --max-lora-rank {r} to serve it.", stacklevel=3)
    if narrow := [name for name, side in sides.items() if side < r]:
        warnings.warn(
            f"The LoRA has r={r}, more than the smaller side of {len(narrow)} modules ({narrow[0]}: "
            f"{sides[narrow[0]]}): Ollama's import of an adapter folder would misread them. Convert the folder with "
            "llama.cpp, or export with a lower rank=.",
            stacklevel=3,
        )
    for note in export.report.notes():
        warnings.warn(note, stacklevel=3)
    if base is not None and is_local(base):
        warnings.warn(
            f"The base model of the LoRA is the local path {base!r}, which others cannot load. Set "
            "export.config.base_model_name_or_path to its Hub id before saving.",
            stacklevel=3,
        )
