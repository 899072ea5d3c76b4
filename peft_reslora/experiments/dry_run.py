"""What a run would do, from configs and local data alone: no weights are loaded, nothing is trained."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig

from peft_reslora.experiments.data import Data, load_data
from peft_reslora.experiments.hub_base import reading_base
from peft_reslora.experiments.settings import BaseSettings, TrainSettings
from peft_reslora.experiments.training import planned_steps
from peft_reslora.experiments.tuners import make_config, trained_parameters
from peft_reslora.reslora import ResLoRAConfig, describe_chains

_ADAM = 16  # bytes of a trained parameter: itself, its gradient, and two moments, in float32


def describe_run(settings: TrainSettings) -> str:
    """Model, chains, parameters, sizes of the data, steps, and an estimate of memory.

    Raises:
        ValueError: for local data that is damaged, and for a tuner that does not fit the model.
    """
    data = _local_data(settings)
    base = empty_base(settings)
    total = sum(p.numel() for p in base.parameters())
    tuner = make_config(settings.tuner, 100)
    chains = (
        str(describe_chains(base, tuner)) if isinstance(tuner, ResLoRAConfig) else "none; only ResLoRA links layers"
    )
    model = get_peft_model(base, tuner)
    batch = settings.training.get("per_device_train_batch_size", 16)
    memory = memory_estimate(model, total, batch, settings.data.max_length)
    return "\n".join(
        [
            f"task: {settings.task}, seed {settings.seed}, written to {settings.output_dir}",
            f"base: {type(base).__name__} ({settings.base.name or settings.base.config}), {total:,} parameters",
            f"tuner: {settings.tuner['peft_type']}, {trained_parameters(model):,} trained parameters "
            f"({100 * trained_parameters(model) / total:.2f} %)",
            f"data: {_sizes(settings, data)}",
            f"steps: {_steps(settings, data)} of {batch} rows",
            f"memory: about {memory / 2**30:.1f} GB, {_of_a_row(settings)}",
            f"chains: {chains}",
        ]
    )


def _local_data(settings: TrainSettings) -> Data | None:
    if settings.data.folder is None and settings.data.uuid_pairs is None and settings.data.hub is not None:
        return None
    if settings.task == "text_to_image":
        from peft_reslora.experiments.images import load_image_data

        return load_image_data(settings.data)
    if settings.data.messages is not None:
        return load_data(settings.data, [settings.data.messages])
    return load_data(settings.data, [*settings.data.text, settings.data.label])


def _sizes(settings: TrainSettings, data: Data | None) -> str:
    hub = settings.data.hub
    if data is None and hub is not None:
        return f"{hub.name}{'/' + hub.config if hub.config else ''} of the Hub, not read in a dry run"
    return ", ".join(f"{size:,} {name}" for name, size in data.sizes().items()) if data is not None else "none"


def _of_a_row(settings: TrainSettings) -> str:
    if settings.task == "text_to_image":
        return "of weights and optimizer alone"
    return f"with {settings.data.max_length} tokens a row"


def _steps(settings: TrainSettings, data: Data | None) -> str:
    if settings.training.get("max_steps", -1) <= 0 and (data is None or settings.training.get("packing")):
        return f"{settings.training.get('num_train_epochs', 3)} epochs"
    rows = len(data.splits["train"].rows) * (settings.data.images.draws if settings.data.images else 1) if data else 0
    return str(planned_steps(settings.training, rows))


def empty_base(settings: TrainSettings) -> nn.Module:
    """The base on the meta device: shapes without memory. Of a Hub name, only the config is read."""
    if settings.task == "text_to_image":
        from peft_reslora.experiments.image_base import empty_model

        return empty_model(settings.base, settings.data)
    kind = AutoModelForCausalLM if settings.task in ("generation", "choice") else AutoModelForSequenceClassification
    with torch.device("meta"):
        return kind.from_config(base_config(settings.base))


def base_config(settings: BaseSettings) -> PretrainedConfig:
    if settings.config:
        return AutoConfig.for_model(settings.config, **{"vocab_size": settings.vocabulary, **settings.fields})
    if settings.name == "minilm":
        from peft_reslora.recipes.minilm import find_weights

        return AutoConfig.from_pretrained(find_weights())
    with reading_base(str(settings.name)):
        return AutoConfig.from_pretrained(str(settings.name))


def memory_estimate(model: PeftModel, base_parameters: int, batch: int, tokens: int) -> float:
    """Bytes of a training step in float32: weights, the optimizer of what trains, and activations.

    Of a transformer layer, activations take s b h (34 + 5 a s / h) bytes in 16 bits (arXiv 2205.05198, Eq. 2), with s
    tokens, b rows, hidden size h and a heads; twice that in 32. Models without such sizes count their weights only.
    """
    config: Any = model.get_base_model().config
    sizes = [getattr(config, name, None) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")]
    weights = 4.0 * base_parameters + _ADAM * trained_parameters(model, saved_whole=True)
    if None in sizes:
        return weights
    hidden, layers, heads = (float(size or 0) for size in sizes)
    return weights + 2 * layers * tokens * batch * hidden * (34 + 5 * heads * tokens / hidden)
