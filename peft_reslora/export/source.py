"""The adapter that is exported: its config, and what no LoRA can hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from peft import PeftConfig
from torch import nn
from transformers import PretrainedConfig

from peft_reslora.export.base import config_of_base
from peft_reslora.export.fitting import Fit
from peft_reslora.reslora.config import ResLoRAConfig
from peft_reslora.shared.card import method_name

MERGE_INSTEAD = "Use merge_and_unload() and save the whole model instead."

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


def is_dora(config: PeftConfig) -> bool:
    """Whether an adapter has DoRA's norms."""
    return bool(getattr(config, "use_dora", False))


def refuse_config(config: PeftConfig, adapter_name: str, allow_dora: bool = False, in_model: bool = False) -> None:
    """Refuse an adapter that, by its config, is more than matrices added to the weights of linear layers.

    Args:
        allow_dora: it may have DoRA's norms besides.
        in_model: it is on its base model, so that it may be ResLoRA on parameters.

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
    for name in ("layer_replication", "trainable_token_indices"):
        if getattr(config, name, None):
            faults.append(f"{name} changes more than the weights of linear layers")
    if getattr(config, "target_parameters", None) and not (in_model and isinstance(config, ResLoRAConfig)):
        faults.append(
            "target_parameters names parameters, and only the base model tells whose are the factors in the file; "
            "export it with its base (--base MODEL, export_lora(model))"
            if isinstance(config, ResLoRAConfig)
            else "target_parameters changes more than the weights of linear layers"
        )
    for field in dataclasses.fields(config):
        if field.metadata.get("is_lora_variant") and getattr(config, field.name):
            if field.name != "use_dora":
                faults.append(f"{field.name} makes the update another than scaling * B @ A")
            elif not allow_dora:
                faults.append(
                    "use_dora makes the update another than scaling * B @ A, and fits into a DoRA checkpoint for PEFT "
                    "(allow_dora=True, --allow-dora)"
                )
    if faults:
        raise ValueError(f"Adapter {adapter_name!r} fits into no plain LoRA: {'; '.join(faults)}. {MERGE_INSTEAD}")


def refuse_truncated_dora(fit: Fit, adapter_name: str) -> None:
    """Refuse to fit the factors of a DoRA, whose norms belong to all of the update.

    Raises:
        ValueError: if `fit` takes less than the whole update.
    """
    if fit.approximate:
        raise ValueError(
            f"Adapter {adapter_name!r} has use_dora=True, and its norms are those of the whole update: no lower rank "
            f"is near to it in the sense of rank= and energy=. Export it without them. {MERGE_INSTEAD}"
        )


def refuse_resized(base_model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
    """Refuse an adapter of a base with another vocabulary than it was loaded with: PEFT saves the new rows of the
    embedding with the native adapter, and a LoRA has no place for them.

    Raises:
        ValueError: naming both sizes.
    """
    own = getattr(base_model, "config", None)
    if not isinstance(own, PretrainedConfig):
        return
    loaded = config_of_base(config, None if config.base_model_name_or_path else name_of(base_model))
    sizes = [size for c in (own, loaded) if c is not None and (size := _vocabulary(c)) is not None]
    if len(set(sizes)) > 1:
        raise ValueError(
            f"The base model of adapter {adapter_name!r} has a vocabulary of {sizes[0]}, and it was loaded with one "
            f"of {sizes[1]} (resize_token_embeddings): a LoRA cannot hold the rows that were added. Save the resized "
            "base model, set config.base_model_name_or_path to where it is, and export again; or use "
            "merge_and_unload() and save the whole model."
        )


def _vocabulary(config: PretrainedConfig) -> int | None:
    try:
        return getattr(config.get_text_config(), "vocab_size", None)
    except ValueError:  # several parts of the model read text
        return None


def name_of(base_model: nn.Module) -> str | None:
    """Where the base model came from: transformers keep it on the model, diffusers in its config."""
    name = getattr(base_model, "name_or_path", None) or getattr(
        getattr(base_model, "config", None), "_name_or_path", None
    )
    return name or None


@contextmanager
def in_layer(adapter_name: str, layer: str) -> Iterator[None]:
    """Put adapter and layer before the reason for which a layer is refused."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"Adapter {adapter_name!r}, layer {layer!r}: {str(error).removesuffix('.')}.") from error
