"""Chains of models whose blocks are not all of one kind: what is linked, that it computes so, and that files agree."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from helpers import oracle
from helpers.adapters import adapted
from helpers.hybrid_models import HYBRID_MODELS, hybrid_output
from helpers.oracle import factors_of, relative_error, run_oracle
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from peft_reslora import ResLoRAConfig, describe_chains
from peft_reslora.reslora.linking import chains_of
from peft_reslora.reslora.merging.estimators import blocks_from_state_dict, chains_of_blocks

# The models compute norms and rotations in float32 whatever their dtype: a hundred roundings of it.
TOLERANCE = 100 * torch.finfo(torch.float32).eps
MODES = [("input", 1), ("middle", -1), ("block", 2)]


def linked(model: nn.Module) -> list[list[str]]:
    return [chain.names for chain in chains_of(model, "default")]


def chains_in_plain_words(name: str):
    """For the oracle: layers of one role and one shape, in order, follow each other; for Gemma the last four apart."""

    def chains(names, shape_of):
        found: dict[tuple, list[str]] = {}
        for layer in sorted(names, key=lambda layer: [int(part) for part in layer.split(".") if part.isdigit()]):
            number = int(re.search(r"\.(\d+)\.", layer)[1])
            key = (re.sub(r"\d+", "*", layer), shape_of(layer), name.startswith("gemma") and number >= 4)
            found.setdefault(key, []).append(layer)
        return list(found.values())

    return chains


def hybrid_and_adapted(name: str, shortcut: str, pre_num: int) -> tuple[nn.Module, nn.Module]:
    """The base model in float64, and a copy of it with an adapter of random factors."""
    hybrid = HYBRID_MODELS[name]
    base = hybrid.make().double()
    config = ResLoRAConfig(r=3, lora_alpha=4, target_modules=hybrid.targets, shortcut=shortcut, pre_num=pre_num)
    return base, adapted(copy.deepcopy(base), config).double()


@pytest.mark.parametrize("name", HYBRID_MODELS)
def test_layers_are_linked_to_the_previous_one_of_their_role_and_shape(name):
    hybrid = HYBRID_MODELS[name]
    table = describe_chains(hybrid.make(), ResLoRAConfig(target_modules=hybrid.targets))
    found = [tuple(target.name for target in chain) for chain in table.chains]
    assert set(hybrid.expected) <= set(found)


# By default each model is run once, and the one in which chains end in all three ways in every mode.
CASES = [
    pytest.param(name, *mode, marks=[] if name == "gemma4" or mode == MODES[n % 3] else [pytest.mark.slow])
    for n, name in enumerate(HYBRID_MODELS)
    for mode in MODES
]


@pytest.mark.parametrize(("name", "shortcut", "pre_num"), CASES)
def test_output_and_gradients_are_those_of_the_oracle(name, shortcut, pre_num, monkeypatch):
    base, model = hybrid_and_adapted(name, shortcut, pre_num)
    monkeypatch.setattr(oracle, "chains_by_block", chains_in_plain_words(name))
    torch.manual_seed(1)
    inputs = HYBRID_MODELS[name].inputs()
    factors = factors_of(model)
    expected = run_oracle(base, inputs, factors, shortcut, pre_num, hybrid_output)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    actual = hybrid_output(model, inputs)
    assert relative_error(expected, hybrid_output(base, inputs)) > 0.01  # the adapter matters
    assert relative_error(actual, expected) < TOLERANCE
    probe = torch.randn_like(expected)
    (expected * probe).sum().backward()
    (actual * probe).sum().backward()
    for layer, (A, B, _) in factors.items():
        module = model.get_submodule(f"base_model.model.{layer}")
        for leaf, part in ((A, module.lora_A), (B, module.lora_B)):
            assert relative_error(part["default"].weight.grad, leaf.grad) < TOLERANCE


@pytest.mark.parametrize("name", HYBRID_MODELS)
def test_files_and_loaded_adapters_have_the_same_chains(name, tmp_path):
    base, model = hybrid_and_adapted(name, "block", 1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    config = loaded.peft_config["default"]
    from_files = chains_of_blocks(
        config, blocks_from_state_dict(config, load_file(tmp_path / "adapter_model.safetensors"))
    )
    assert linked(loaded) == linked(model)
    assert sorted([t.name for t in chain] for chain in from_files.chains) == sorted(linked(model))


@pytest.mark.parametrize("name", ["gemma4", "gemma3n"])
@pytest.mark.parametrize(("shortcut", "pre_num"), MODES)
def test_layers_that_share_keys_train_generate_and_keep_logits(name, shortcut, pre_num):
    """Gemma 4 lets the layers without keys run on the last token only, where no more is asked for."""
    _, model = hybrid_and_adapted(name, shortcut, pre_num)
    inputs = {"input_ids": torch.randint(3, 37, (2, 7))}
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad.norm() > 0 for n, p in model.named_parameters() if ".lora_" in n)
    model.eval()
    whole = model(**inputs).logits
    kept = model(**inputs, logits_to_keep=1).logits
    assert relative_error(kept, whole[:, -1:]) < TOLERANCE
    tokens = inputs["input_ids"]
    for _ in range(3):
        tokens = torch.cat([tokens, model(input_ids=tokens).logits[:, -1:].argmax(-1)], dim=1)
    generated = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, eos_token_id=None)
    assert torch.equal(generated, tokens)
