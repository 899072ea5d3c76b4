"""`describe_chains(model, config, batch=...)`: what one forward pass shows of the chains."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.oracle import randomize_adapters
from helpers.tiny_models import TINY_MODELS, output_of
from peft import get_peft_model
from torch import nn
from transformers import DebertaV2Config, DebertaV2Model

from peft_reslora import ResLoRAConfig, describe_chains


def found(model: nn.Module, batch: dict, **options) -> list[str]:
    return list(describe_chains(model, ResLoRAConfig(**options), batch=batch).findings)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
def test_blocks_one_after_the_other_give_nothing_to_say(name):
    tiny = TINY_MODELS[name]
    assert found(tiny.make(), tiny.inputs(), target_modules=tiny.targets, pre_num=-1) == []


def test_keys_of_cross_attention_all_get_one_input():
    tiny = TINY_MODELS["t5"]
    role = "decoder.block.*.layer.*.EncDecAttention"
    expected = [
        f"{role}.{part}: 2 of 3 layers (decoder.block.1.layer.1.EncDecAttention.{part}, ...) are given the same input "
        "as the layer before: 'input' is LoRA at twice the scaling"
        for part in "kv"
    ]
    config = ResLoRAConfig(target_modules=["q", "k", "v", "o", "wi", "wo"])
    table = describe_chains(tiny.make(), config, batch=tiny.inputs())
    assert list(table.findings) == expected
    assert f"seen in a forward pass:\n  {expected[0]}" in str(table)


def test_deberta_calls_its_queries_and_keys_twice():
    torch.manual_seed(0)
    config = DebertaV2Config(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24, vocab_size=37,
        relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True, position_buckets=4,
    )  # fmt: skip
    lines = found(DebertaV2Model(config), {"input_ids": torch.randint(1, 37, (2, 6))}, target_modules=["query_proj"])
    assert lines == [
        "encoder.layer.*.attention.self.query_proj: 3 of 3 layers (encoder.layer.0.attention.self.query_proj, ...) "
        "are called more than once; 'input' and 'middle' need one call for each layer"
    ]


class Heads(nn.Module):
    """Three heads side by side on what two layers make, and a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu_(self.layers[0](x))
        x += self.layers[1](x)
        outputs = [head(x[..., : 4 + i] + i) for i, head in enumerate(self.heads)]
        with torch.no_grad():
            x = self.heads[0](x)
        return sum(outputs) + x


def test_links_that_are_none_and_layers_that_are_not_called_are_named():
    options = {"target_modules": r".*\.\d", "chain_pattern": [r"heads\.(\d)", r"layers\.(\d)"]}
    assert found(Heads(), {"x": torch.randn(2, 4)}, **options) == [
        "layers.*: 1 of 3 layers (layers.2) are never called in this forward pass, and train nothing in it",
        "heads.*: 1 of 3 layers (heads.0) are called more than once; 'input' and 'middle' need one call for each "
        "layer",
        "heads.*: 2 of 3 layers (heads.1, ...) are fed by layers on which their input does not depend: not one after "
        "the other",
    ]


class Pooling(nn.Module):
    """The second layer sees every second token only."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](x)[:, ::2]
        return self.layers[2](self.layers[1](x))


def test_inputs_of_other_shapes_are_named():
    assert found(Pooling(), {"x": torch.randn(2, 6, 4)}, target_modules=r"layers\.\d") == [
        "layers.*: 1 of 3 layers (layers.1) are given an input of another shape than the layer before, which only "
        "'block' allows"
    ]


@pytest.mark.parametrize("merged", [False, True])
def test_the_model_stays_as_it_is(merged):
    tiny = TINY_MODELS["llama"]
    config = ResLoRAConfig(target_modules=["q_proj", "up_proj"], shortcut="middle", pre_num=-1, lora_dropout=0.5)
    model = randomize_adapters(get_peft_model(tiny.make(), config))
    inputs = tiny.inputs()
    model(**inputs)  # records norms
    if merged:
        model.eval()
        model.merge_adapter()
    model.base_model.model.model.layers[1].eval()
    expected = output_of(copy.deepcopy(model).eval(), inputs)

    def state() -> tuple:
        modes = [(module.training, len(module._forward_hooks)) for module in model.modules()]
        gradients = [(p.requires_grad, p.grad) for p in model.parameters()]
        return modes, gradients, torch.get_rng_state().tolist()

    before, tensors = state(), copy.deepcopy(model.state_dict())
    table = describe_chains(model, batch=inputs)
    assert table.findings == ()
    assert state() == before
    assert all(torch.equal(value, tensors[key]) for key, value in model.state_dict().items())
    assert torch.equal(output_of(model.eval(), inputs), expected)


def test_a_batch_without_a_model_is_refused():
    tiny = TINY_MODELS["llama"]
    with pytest.raises(ValueError, match=r"got a batch and a LlamaConfig, of which no model can run; pass the model"):
        describe_chains(tiny.make().config, ResLoRAConfig(target_modules=["q_proj"]), batch=tiny.inputs())
