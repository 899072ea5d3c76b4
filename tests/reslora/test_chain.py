"""Chains are found from module names and shapes, and every link that is not made has a reason."""

from __future__ import annotations

import pytest
import torch
from helpers.oracle import relative_error
from helpers.tiny_models import TINY_MODELS
from helpers.tolerances import rounding
from peft import get_peft_model
from torch import nn

from peft_reslora import ResLoRAConfig, describe_chains
from peft_reslora.reslora.chain_table import Target, find_chains


def targets(*names: str, shape: tuple[int, int] = (8, 8)) -> list[Target]:
    return [Target(name, *shape, rank=4) for name in names]


def chains_of_names(*names: str, **options) -> list[list[str]]:
    table = find_chains(targets(*names), "block", 1, **options)
    return [[target.name for target in chain] for chain in table.chains]


def roles(name: str, extra: list[str] | None = None) -> dict[str, list[int]]:
    """The lengths of the chains of each role, for all target layers of a tiny model."""
    tiny = TINY_MODELS[name]
    config = ResLoRAConfig(target_modules=tiny.targets + (extra or []))
    table = describe_chains(tiny.make(), config)
    return {role.name: [len(chain) for chain in role.chains] for role in table.roles}


def test_llama_has_a_chain_per_projection():
    found = roles("llama")
    assert found == {
        f"model.layers.*.{role}": [4]
        for role in (*(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down")))
    }


def test_gpt2_projections_of_attention_and_mlp_are_apart():
    assert roles("gpt2") == {
        "transformer.h.*.attn.c_attn": [3],
        "transformer.h.*.attn.c_proj": [3],
        "transformer.h.*.mlp.c_fc": [3],
        "transformer.h.*.mlp.c_proj": [3],
    }


def test_bert_dense_layers_of_different_places_are_apart():
    found = roles("bert")
    assert found["bert.encoder.layer.*.attention.output.dense"] == [4]
    assert found["bert.encoder.layer.*.intermediate.dense"] == [4]
    assert found["bert.encoder.layer.*.output.dense"] == [4]
    assert found["bert.pooler.dense"] == [1]


def test_t5_has_three_families_of_chains():
    found = roles("t5")
    families = {role.rsplit(".", 1)[0] for role in found}
    assert {"encoder.block.*.layer.*.SelfAttention", "decoder.block.*.layer.*.SelfAttention"} < families
    assert "decoder.block.*.layer.*.EncDecAttention" in families
    assert all(lengths == [3] for lengths in found.values())


def test_unet_chains_end_where_the_width_changes():
    found = roles("unet")
    assert found["down_blocks.*.attentions.*.transformer_blocks.*.attn1.to_q"] == [2, 2]
    assert found["up_blocks.*.attentions.*.transformer_blocks.*.attn2.to_k"] == [3, 3]
    assert found["mid_block.attentions.*.transformer_blocks.*.attn1.to_out.0"] == [1]
    tiny = TINY_MODELS["unet"]
    missing = describe_chains(tiny.make(), ResLoRAConfig(target_modules=tiny.targets)).missing
    assert any("shapes differ, 8->8 and 16->16" in link.reason for link in missing)


def test_a_gap_ends_no_chain_but_a_cut_does():
    names = [f"model.layers.{n}.q_proj" for n in (0, 1, 3, 4, 5)]
    assert chains_of_names(*names) == [names]
    cuts = {names[2]: "layer 2 is not targeted"}
    assert chains_of_names(*names, cuts=cuts) == [names[:2], names[2:]]
    (link,) = find_chains(targets(*names), "block", 1, cuts=cuts).missing
    assert (link.before, link.after) == (names[1], names[2])
    assert link.reason == "layer 2 is not targeted"


def test_blocks_are_ordered_as_numbers():
    names = [f"h.{n}.q" for n in (9, 10, 8, 11)]
    assert chains_of_names(*names) == [["h.8.q", "h.9.q", "h.10.q", "h.11.q"]]


def test_experts_of_different_index_never_share_a_chain():
    names = [f"layers.{n}.mlp.experts.{e}.w1" for n in range(3) for e in range(2)]
    assert chains_of_names(*names) == [[f"layers.{n}.mlp.experts.{e}.w1" for n in range(3)] for e in range(2)]


def test_numbered_layers_inside_a_block_are_roles():
    names = [f"blocks.{n}.mlp.{i}" for n in range(2) for i in (0, 2)]
    assert chains_of_names(*names) == [["blocks.0.mlp.0", "blocks.1.mlp.0"], ["blocks.0.mlp.2", "blocks.1.mlp.2"]]


def test_nested_indices_follow_the_order_of_the_tree():
    names = ["d.0.a.0.q", "d.0.a.1.q", "d.1.a.0.q", "d.1.a.1.q"]
    assert chains_of_names(*reversed(names)) == [names]


def test_chain_pattern_overrides_the_grouping():
    names = ["lin0", "lin1", "lin3", "head"]
    assert chains_of_names(*names) == [[name] for name in names]
    assert chains_of_names(*names, chain_pattern=r"^lin(\d+)$") == [["lin0", "lin1", "lin3"], ["head"]]


def test_chain_pattern_without_a_number_is_refused():
    with pytest.raises(ValueError, match=r"chain_pattern 'lin' matches layer 'lin0' but its groups capture \[\]"):
        chains_of_names("lin0", chain_pattern="lin")


def test_chain_pattern_that_confuses_layers_is_refused():
    with pytest.raises(ValueError, match=r"cannot tell the layers 'a\.0' and 'a\.00' apart"):
        chains_of_names("a.0", "a.00", chain_pattern=r"a\.(\d+)")


def test_the_table_reads_the_same_before_and_after_injection():
    tiny = TINY_MODELS["unet"]
    model = tiny.make()
    config = ResLoRAConfig(target_modules=tiny.targets, rank_pattern={"attn1.to_q": 2}, shortcut="middle", pre_num=2)
    before = describe_chains(model, config)
    assert not any("lora" in name for name, _ in model.named_modules())
    injected = get_peft_model(model, config)
    after = describe_chains(injected)
    assert before == after
    assert str(before) == repr(before) == str(after)  # `repr`: what a notebook shows
    assert "links not made:" in str(before)
    assert "middle" in str(before)


def test_describe_chains_prints_nothing(capsys):
    table = describe_chains(TINY_MODELS["llama"].make(), ResLoRAConfig(target_modules=["q_proj"]))
    assert capsys.readouterr().out == ""
    assert "4 layers in 1 chains, 3 links" in str(table)


def test_describe_chains_takes_a_transformers_config():
    config = TINY_MODELS["llama"].make().config
    table = describe_chains(config, ResLoRAConfig(target_modules=["q_proj"]))
    assert [target.name for target in table.chains[0]] == [f"layers.{n}.self_attn.q_proj" for n in range(4)]


def test_describe_chains_without_an_adapter_says_what_to_pass():
    with pytest.raises(ValueError, match=r"no ResLoRA adapter 'default'.*describe_chains\(model, ResLoRAConfig"):
        describe_chains(TINY_MODELS["llama"].make())


def test_a_model_without_links_warns():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    with pytest.warns(UserWarning, match="no shortcut at all: none of its 2 layers is linked"):
        get_peft_model(model, ResLoRAConfig(target_modules=["0", "2"]))


def test_layers_to_transform_cuts_chains():
    model = get_peft_model(
        TINY_MODELS["llama"].make(), ResLoRAConfig(target_modules=["q_proj"], layers_to_transform=[0, 1, 3])
    )
    table = describe_chains(model)
    assert [len(chain) for chain in table.chains] == [2, 1]


@pytest.mark.parametrize("pre_num", [1, 2, -1])
def test_the_number_of_links_counts_what_each_layer_takes(pre_num):
    table = find_chains(targets(*(f"h.{n}.q" for n in range(4))), "block", pre_num)
    assert table.num_links == {1: 3, 2: 5, -1: 6}[pre_num]


def test_a_chain_of_one_is_plain_lora_and_input_doubles_it():
    torch.manual_seed(0)
    for shortcut, factor in (("input", 2.0), ("block", 1.0), ("middle", 1.0)):
        model = nn.Sequential(nn.Linear(4, 5, bias=False))
        x = torch.randn(3, 4)
        config = ResLoRAConfig(r=2, lora_alpha=2, target_modules=["0"], shortcut=shortcut, init_lora_weights=False)
        with pytest.warns(UserWarning, match="no shortcut at all"):
            adapted = get_peft_model(model, config)
        layer = adapted.base_model.model[0]
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        expected = x @ layer.base_layer.weight.T + factor * x @ A.T @ B.T
        assert relative_error(adapted(x), expected) < rounding(4 + 2)
