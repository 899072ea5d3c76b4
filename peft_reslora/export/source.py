"""The adapter that is exported, in a model or in a folder: its config, its updates, and what no LoRA can hold."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from safetensors.torch import load_file
from torch import Tensor, float64, nn
from tqdm import tqdm

from peft_reslora.export.card import method_name
from peft_reslora.export.checkpoint import PREFIX
from peft_reslora.export.factors import Factors, layer_factors
from peft_reslora.export.fitting import Fit, FittedUpdate
from peft_reslora.export.targets import tuner_layers
from peft_reslora.precision import full_precision
from peft_reslora.saving import CONFIG_FILE, WEIGHTS_FILE, refuse_damaged

MERGE_INSTEAD = "Use merge_and_unload() and save the whole model instead."

_FROM_FILES = ("RESLORA", "LORA")
_INITS_THAT_CHANGE_THE_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")


def config_in_model(model: nn.Module, adapter_name: str) -> PeftConfig:
    """The adapter's config; PEFT keeps it on the PeftModel, on the tuner, and on a model it injected into.

    Raises:
        ValueError: if the model has no such adapter; it names those that it has.
    """
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping):
        raise ValueError(
            f"{type(model).__name__} has no adapters (no `peft_config`). Pass the adapted model itself; where it is "
            "wrapped, as by DDP or torch.compile, pass the model inside."
        )
    if adapter_name not in configs:
        raise ValueError(f"The model has no adapter {adapter_name!r}, it has {', '.join(map(repr, configs))}.")
    return configs[adapter_name]


def refuse_config(config: PeftConfig, adapter_name: str) -> None:
    """Refuse an adapter that, by its config, is more than matrices added to the weights of linear layers.

    Raises:
        ValueError: naming every field at fault.
    """
    faults = []
    if config.is_prompt_learning:
        faults.append(f"{method_name(config)} changes the prompt and no weights")
    if (bias := getattr(config, "bias", "none")) != "none":
        faults.append(f"bias={bias!r} trains biases of the base model")
    init = getattr(config, "init_lora_weights", None)
    if isinstance(init, str) and init.lower().startswith(_INITS_THAT_CHANGE_THE_BASE):
        faults.append(f"init_lora_weights={init!r} changed the base weights, which a LoRA for the original one lacks")
    for name in ("layer_replication", "target_parameters", "trainable_token_indices"):
        if getattr(config, name, None):
            faults.append(f"{name} changes more than the weights of linear layers")
    for field in dataclasses.fields(config):
        if field.metadata.get("is_lora_variant") and getattr(config, field.name):
            faults.append(f"{field.name} makes the update another than scaling * B @ A")
    if faults:
        raise ValueError(f"Adapter {adapter_name!r} fits into no plain LoRA: {'; '.join(faults)}. {MERGE_INSTEAD}")


@full_precision()
def updates_in_model(
    modules: Mapping[str, nn.Module], adapter_name: str, fit: Fit, progressbar: bool = False
) -> dict[str, FittedUpdate]:
    """The update of every layer that has the adapter, by the module's name in the base model.

    Args:
        modules: of the base model, as from `named_base_modules`.
        adapter_name: which adapter.
        fit: how to fit each update into the file.
        progressbar: show how many of the modules are done.

    Raises:
        ValueError: naming adapter and layer, if one cannot be exported; or if there is none.
    """
    from peft_reslora.reslora.linking import chains_among
    from peft_reslora.reslora.variant import planned

    updates = {}
    layers: list[Any] = [layer for module in modules.values() for layer in tuner_layers(module)]
    with planned(chains_among(layers, adapter_name)):  # each chain is merged once, and not once for each of its layers
        for name, module in tqdm(modules.items(), disable=not progressbar, desc="Exporting as LoRA"):
            if isinstance(module, AuxiliaryTrainingWrapper) and adapter_name in module._get_available_adapters():
                raise ValueError(
                    f"Adapter {adapter_name!r} trains the module {name!r} itself ({type(module).__name__}), which no "
                    f"LoRA can hold. {MERGE_INSTEAD}"
                )
            for layer in tuner_layers(module):
                if adapter_name in layer._get_available_adapters():
                    with _named(adapter_name, name):
                        updates[name] = fit.update(layer_factors(layer, adapter_name, approximate=fit.approximate))
    if not updates:
        raise ValueError(f"Adapter {adapter_name!r} has no layers in this model, so there is nothing to export.")
    return updates


def read_adapter(folder: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Config and tensors of a saved ResLoRA or LoRA adapter.

    Raises:
        ValueError: naming the file that is missing, damaged or of another kind.
    """
    config_file, weights_file = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    for file in (config_file, weights_file):
        if not file.is_file():
            raise ValueError(f"{file} does not exist; a folder with {CONFIG_FILE} and {WEIGHTS_FILE} is needed.")
    try:
        peft_type = json.loads(config_file.read_text(encoding="utf-8")).get("peft_type")
        config = PeftConfig.from_pretrained(str(folder)) if peft_type in _FROM_FILES else None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{config_file} cannot be read as the config of an adapter: {error}") from error
    if not isinstance(config, LoraConfig):
        raise ValueError(
            f"{config_file} has peft_type {peft_type!r}; from files alone, only {' and '.join(_FROM_FILES)} are "
            "exported. Load the adapter onto its base model and use export_lora."
        )
    refuse_damaged(weights_file)
    return config, load_file(weights_file)


@full_precision()
def updates_in_files(
    config: LoraConfig, state_dict: Mapping[str, Tensor], adapter_name: str, fit: Fit
) -> dict[str, FittedUpdate]:
    """The update of every layer of a saved adapter, by the module's name in the base model.

    Raises:
        ValueError: if a tensor belongs to no pair of factors, or as `updates_in_model`.
    """
    if others := [key for key in state_dict if ".lora_" not in key]:
        raise ValueError(
            f"Adapter {adapter_name!r} holds more than LoRA factors ({', '.join(others[:3])}): modules_to_save, new "
            f"tokens or copies of base weights fit into no plain LoRA. {MERGE_INSTEAD}"
        )
    if config.peft_type == "RESLORA":
        from peft_reslora.reslora.merge import merged_factors_from_state_dict

        pairs = merged_factors_from_state_dict(config, state_dict)  # type: ignore[arg-type]
    else:
        pairs = _lora_pairs(config, state_dict)
    updates = {}
    for name, (A, B) in pairs.items():
        with _named(adapter_name, name):
            updates[name] = fit.update(Factors.of(A, B))
    return updates


def targets_in_files(config: LoraConfig, exported: list[str]) -> list[str]:
    """`target_modules` where the base model's other modules are not known.

    The adapter's own, if nothing but them decided which modules it has; the full names otherwise.
    """
    own = config.target_modules
    narrowed = config.exclude_modules or config.layers_to_transform is not None
    return sorted(exported if isinstance(own, str) or not own or narrowed else own)


def diffusers_prefix(base_class: type) -> str | None:
    """The name under which a diffusers pipeline holds such a model; None for the models of other libraries."""
    names = {c.__name__ for c in base_class.__mro__ if c.__module__.split(".")[0] == "diffusers"}
    if "ModelMixin" not in names:
        return None
    return "unet" if any("UNet" in name for name in names) else "transformer"


def _lora_pairs(config: LoraConfig, state_dict: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, scaling * B) by module; the rank of each pair is the one it has."""
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state_dict.items():
        name, _, factor = key.removeprefix(PREFIX).rpartition(".lora_")
        factors.setdefault(name, {})[factor] = tensor
    alphas = config.alpha_pattern or {}
    pairs = {}
    for name, found in factors.items():
        if found.keys() != {"A.weight", "B.weight"}:
            raise ValueError(
                f"Layer {name!r} has the tensors {', '.join(f'lora_{f}' for f in sorted(found))} instead of "
                f"lora_A.weight and lora_B.weight, so it is no plain LoRA of a linear layer. {MERGE_INSTEAD}"
            )
        A, B = found["A.weight"], found["B.weight"]
        alpha = alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha)
        scaling = alpha / math.sqrt(A.shape[0]) if config.use_rslora else alpha / A.shape[0]
        pairs[name] = A, scaling * (B if B.dtype == float64 else B.float())
    return pairs


@contextmanager
def _named(adapter_name: str, layer: str) -> Iterator[None]:
    """Put adapter and layer before the reason for which a layer is refused."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"Adapter {adapter_name!r}, layer {layer!r}: {str(error).removesuffix('.')}.") from error
