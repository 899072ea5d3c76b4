"""A dry run: who is linked to whom, told by names and shapes, and on request by one forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig

from peft_reslora.reslora.chain_table import ChainTable
from peft_reslora.reslora.config import ResLoRAConfig
from peft_reslora.reslora.linking import find_chains_before_injection, find_injected_chains
from peft_reslora.reslora.tracing import findings


def describe_chains(
    model: nn.Module | PretrainedConfig,
    config: ResLoRAConfig | None = None,
    adapter_name: str = "default",
    batch: Mapping[str, Any] | None = None,
) -> ChainTable:
    """Who is linked to whom, and which links were not made and why: `print` the table, or end a notebook cell with it.

    Args:
        model: a model with the adapter in it; or, with `config`, one without it, which is not changed; or a
            transformers config, of which a model without weights is built.
        config: what would be injected.
        adapter_name: the adapter to describe, if the model holds several.
        batch: arguments of the model's forward. One pass of the base model shows layers that are not called or called
            several times, links between layers that do not depend on each other, and layers that all get one input,
            such as the keys of cross-attention. The model stays as it is.

    Raises:
        ValueError: if neither the model nor `config` says which adapter, or for a `batch` without a model.
    """
    if isinstance(model, PretrainedConfig):
        if batch is not None:
            raise ValueError(
                f"describe_chains got a batch and a {type(model).__name__}, of which no model can run; pass the model."
            )
        model = _without_weights(model)
    if config is not None:
        table = find_chains_before_injection(model, config)
    else:
        held = getattr(model, "peft_config", {})
        if not isinstance(held.get(adapter_name), ResLoRAConfig):
            raise ValueError(
                f"The model holds no ResLoRA adapter {adapter_name!r} (it has {sorted(held)}); pass "
                "describe_chains(model, ResLoRAConfig(...)) to see the chains before injection."
            )
        table = find_injected_chains(model, held[adapter_name], adapter_name)
    if batch is not None:
        table = replace(table, findings=findings(model, table, batch))
    return table


def _without_weights(config: PretrainedConfig) -> nn.Module:
    with torch.device("meta"):
        return AutoModel.from_config(config)
