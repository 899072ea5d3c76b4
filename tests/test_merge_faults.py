"""Merging where it used to go wrong without a word: each case against a dense computation in float64."""

from __future__ import annotations

import pytest
import torch
from test_forward import VARIANTS, adapted
from torch import nn

from peft_reslora.recipes.annealing import anneal_shortcuts
from peft_reslora.reslora.layer import ResLoRALayer


def reslora_layers(model: nn.Module) -> dict[str, ResLoRALayer]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, ResLoRALayer)
    }


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("shortcut", "pre_num"), VARIANTS)
def test_each_layer_knows_whether_its_merge_is_exact(shortcut, pre_num, share):
    """What a layer says of itself is what comparing its output, unmerged and merged, at one input shows."""
    _, model = adapted("llama", shortcut, pre_num, merge_estimator="drop")
    if shortcut != "block":
        anneal_shortcuts(model, share)
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    layers = reslora_layers(model)
    for name, layer in layers.items():
        layer.register_forward_hook(lambda m, args, output, name=name: seen.update({name: (args[0], output)}))
    with torch.no_grad():
        model.double()(input_ids=torch.arange(1, 8)[None])
    for name, layer in layers.items():
        x, output = seen[name]
        delta = layer.get_delta_weight("default")
        missed = (output - layer.base_layer(x) - x @ delta.T).norm() / (x @ delta.T).norm()
        assert (missed < 1e-6) == layer.merges_exactly("default"), name
        assert layer.merges_exactly("default") == (shortcut == "block" or share == 1.0 or ".layers.0." in f".{name}")
