"""Where chains end, other than at a new shape: found on the model once, and kept by the adapter's config."""

from __future__ import annotations

import copy
import dataclasses
import json
from contextlib import nullcontext

import pytest
import torch
from helpers.adapters import adapted
from helpers.oracle import randomize_adapters, relative_error
from helpers.tiny_models import TINY_MODELS, output_of
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import SwinConfig, SwinModel

from peft_reslora import ResLoRAConfig, describe_chains, export_lora
from peft_reslora.export import export_lora_from_files
from peft_reslora.reslora.chain_table import Target, cuts_by_number, find_chains, shortest_cuts
from peft_reslora.reslora.linking import chains_of
from peft_reslora.reslora.merging.estimators import blocks_from_state_dict, chains_of_blocks

pytestmark = pytest.mark.filterwarnings("ignore:Adapter .* has no shortcut at all")  # most of these are cut short

LLAMA = TINY_MODELS["llama"]


def lengths(model: nn.Module, adapter_name: str = "default") -> list[int]:
    return [len(chain.names) for chain in chains_of(model, adapter_name)]


def linked(base: nn.Module, *targets: str, **options) -> PeftModel:
    """With random factors; targets that are not named are q_proj alone."""
    return adapted(base, ResLoRAConfig(r=3, target_modules=list(targets or ["q_proj"]), **options))


def lengths_in_files(folder) -> list[int]:
    config = PeftConfig.from_pretrained(folder)
    blocks = blocks_from_state_dict(config, load_file(folder / "adapter_model.safetensors"))
    return [len(chain) for chain in chains_of_blocks(config, blocks).chains]


class Blocks(nn.Module):
    """Linear layers of one role, in a list whose name is given."""

    def __init__(self, name: str, members: nn.Module) -> None:
        super().__init__()
        self.add_module(name, members)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_a_layer_that_is_not_targeted_ends_a_chain_in_the_model_and_in_its_files(tmp_path):
    base = LLAMA.make()
    model = linked(copy.deepcopy(base), "q_proj", "up_proj", layers_to_transform=[0, 2, 3])
    assert model.peft_config["default"].chain_cuts == ["model.layers.2"]
    assert lengths(model) == [1, 1, 2, 2]
    (link, _) = describe_chains(model).missing
    assert link.reason == "layer model.layers.1.self_attn.q_proj lies between and is not targeted"
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["chain_cuts"] == ["model.layers.2"]
    assert lengths_in_files(tmp_path) == [1, 2, 1, 2]
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert lengths(loaded) == [1, 1, 2, 2]
    inputs = LLAMA.inputs()
    assert relative_error(output_of(loaded, inputs), output_of(model, inputs)) < 1e-6
    in_model, from_files = export_lora(model).state_dict, export_lora_from_files(tmp_path).state_dict
    assert all(relative_error(in_model[key], from_files[key]) < 1e-6 for key in from_files)


def test_a_model_without_the_layer_between_links_and_keeps_no_cuts():
    model = linked(without_two_queries())
    assert model.peft_config["default"].chain_cuts == []
    assert lengths(model) == [2]


def test_an_adapter_of_0_1_0_keeps_its_chains(tmp_path):
    """Its config has no `chain_cuts`; there, a gap in the block numbers ended a chain, whatever the model had."""
    base = without_two_queries()
    linked(copy.deepcopy(base)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    del config["chain_cuts"], config["stamped"]
    file.write_text(json.dumps(config))
    weights = tmp_path / "adapter_model.safetensors"
    tensors = {key: tensor for key, tensor in load_file(weights).items() if not key.endswith("lora_magnitude_vector")}
    save_file(tensors, weights, metadata={"format": "pt"})
    for _ in range(2):  # loaded, saved again, loaded
        model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        assert lengths(model) == lengths_in_files(tmp_path) == [1, 1]
        assert model.peft_config["default"].chain_cuts == "by_number"
        assert describe_chains(model).missing[0].reason == "blocks 0 and 3 are not consecutive"
        model.save_pretrained(tmp_path)


def test_a_config_made_of_a_lora_config_is_new():
    config = ResLoRAConfig(**LoraConfig(target_modules=["q_proj"], layers_to_transform=[0, 2, 3]).to_dict())
    assert config.chain_cuts == "auto"


def test_the_rule_of_0_1_0_cuts_at_every_change_of_shape():
    targets = [Target(f"h.{n}.q", 8, width, rank=4) for n, width in enumerate((8, 16, 8, 8))]
    assert [len(chain) for chain in find_chains(targets, "block", 1).chains] == [3, 1]
    cuts = cuts_by_number(targets, None)
    assert [len(c) for c in find_chains(targets, "block", 1, cuts=cuts).chains] == [1, 1, 2]


def without_two_queries() -> nn.Module:
    base = LLAMA.make()
    for n in (1, 2):
        del base.model.layers[n].self_attn.q_proj
    return base


@pytest.mark.parametrize("copied", [lambda config: config, copy.copy, copy.deepcopy, dataclasses.replace])
def test_a_config_that_is_used_again_has_its_cuts_found_on_the_other_model(copied, tmp_path):
    config = ResLoRAConfig(target_modules=["q_proj"], layers_to_transform=[0, 3])
    first = get_peft_model(LLAMA.make(), config)
    again = copied(config)
    assert lengths(get_peft_model(without_two_queries(), again)) == [2]
    assert lengths(first) == [1, 1]
    first.save_pretrained(tmp_path)  # still with its own
    assert lengths_in_files(tmp_path) == [1, 1]
    assert config.chain_cuts == ["model"]  # every layer of the adapter in it begins a chain


def test_transformers_own_way_keeps_the_cuts(tmp_path):
    base = LLAMA.make()
    base.add_adapter(ResLoRAConfig(target_modules=["q_proj"], layers_to_transform=[0, 2, 3]), adapter_name="default")
    base.save_pretrained(tmp_path)
    assert lengths(base) == lengths_in_files(tmp_path) == [1, 2]
    loaded = LLAMA.make()
    loaded.load_adapter(tmp_path, adapter_name="default")
    assert lengths(loaded) == [1, 2]


def test_the_table_of_a_second_adapter_is_the_one_it_gets():
    model = get_peft_model(LLAMA.make(), ResLoRAConfig(target_modules=["q_proj"]))
    config = ResLoRAConfig(target_modules=["q_proj"], layers_to_transform=[0, 2, 3])
    table = describe_chains(model, config)
    model.add_adapter("second", config)
    assert table == describe_chains(model, adapter_name="second")
    assert [len(chain) for chain in table.chains] == [1, 2]


def test_a_config_that_is_written_and_read_before_injection_is_still_new(tmp_path):
    ResLoRAConfig(target_modules=["q_proj"], layers_to_transform=[0, 3]).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert lengths(get_peft_model(LLAMA.make(), config)) == [1, 1]


def test_other_adapters_and_modules_that_are_trained_whole_count_as_layers_between():
    model = get_peft_model(
        LLAMA.make(), ResLoRAConfig(target_modules=["q_proj"], modules_to_save=["layers.1.self_attn"])
    )
    model.add_adapter("second", ResLoRAConfig(target_modules=["q_proj"], layers_to_transform=[0, 2, 3]))
    assert lengths(model, "second") == [1, 2]


def test_cuts_of_another_model_are_refused_before_the_model_is_changed():
    base = LLAMA.make()
    before = dict(base.named_modules())
    config = ResLoRAConfig(target_modules=["q_proj"], chain_cuts=["model.layers.9"])
    with pytest.raises(ValueError, match=r"chain_cuts .* names 'model\.layers\.9', where the adapter has no layers"):
        get_peft_model(base, config)
    assert dict(base.named_modules()) == before


@pytest.mark.parametrize("cuts", ["other", [1], {"a": 1}, 3])
def test_chain_cuts_of_another_type_are_refused(cuts):
    with pytest.raises(ValueError, match=r"chain_cuts=.* must be 'auto', 'by_number' or a list of names"):
        ResLoRAConfig(chain_cuts=cuts)


def test_files_that_do_not_say_where_chains_end_are_refused(tmp_path):
    linked(LLAMA.make()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chain_cuts": "auto"}))
    with pytest.raises(ValueError, match="only the model tells where its chains end"):
        export_lora_from_files(tmp_path)


def test_a_config_of_thousands_of_layers_stays_short():
    names = [f"model.layers.{n}.{role}.w{i}" for n in range(0, 400, 2) for role in ("attn", "mlp") for i in range(9)]
    table = find_chains([Target(name, 8, 8, 4) for name in names], "block", 1, cuts=dict.fromkeys(names, ""))
    assert shortest_cuts(names[18:], table) == ["model"]
    continued = [name for name in names if name.startswith("model.layers.2.attn")]
    cuts = dict.fromkeys(set(names) - set(continued), "")
    table = find_chains([Target(name, 8, 8, 4) for name in names], "block", 1, cuts=cuts)
    short = shortest_cuts({link.after for link in table.missing}, table)
    assert short == sorted([*(f"model.layers.{n}" for n in range(4, 400, 2)), "model.layers.2.mlp"])


@pytest.mark.parametrize(
    ("name", "linked"), [("lm_heads", [1, 1, 1]), ("bbox_embed", [1, 1, 1]), ("altup_projections", [1, 1, 1]),
                         ("deepstack_merger_list", [1, 1, 1]), ("output_hypernetworks_mlps", [1, 1, 1]),
                         ("caption_projection", [1, 1, 1]), ("layers", [3]), ("blocks", [3])]
)  # fmt: skip
def test_lists_of_heads_and_projections_are_no_chains(name, linked):
    members = [nn.Linear(4, 4) for _ in range(3)]
    config = ResLoRAConfig(target_modules=r".*\.\d")
    with pytest.warns(match="no shortcut at all") if linked == [1, 1, 1] else nullcontext():
        assert lengths(get_peft_model(Blocks(name, nn.ModuleList(copy.deepcopy(members))), config)) == linked
    assert lengths(get_peft_model(Blocks(name, nn.Sequential(*members)), copy.deepcopy(config))) == [3]


def test_a_pattern_links_heads_all_the_same():
    model = Blocks("lm_heads", nn.ModuleList(nn.Linear(4, 4) for _ in range(3)))
    table = describe_chains(model, ResLoRAConfig(target_modules=r".*\.\d", chain_pattern=r"heads\.(\d)"))
    assert [len(chain) for chain in table.chains] == [3]


def swin() -> nn.Module:
    torch.manual_seed(0)
    return SwinModel(SwinConfig(embed_dim=8, depths=[2, 4], num_heads=[2, 2], image_size=32, window_size=4))


@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_shifted_windows_are_refused_before_the_model_is_changed(shortcut):
    base = swin()
    before = dict(base.named_modules())
    name = next(name.rpartition(".")[2] for name in before if name.endswith(("query", "q_proj")))
    with pytest.raises(ValueError, match=r"blocks\.0\.attention.*blocks\.1\.attention.*windows.*Use shortcut='block'"):
        get_peft_model(base, ResLoRAConfig(target_modules=[name], shortcut=shortcut))
    assert dict(base.named_modules()) == before
    assert lengths(get_peft_model(swin(), ResLoRAConfig(target_modules=[name], shortcut="block"))) == [2, 4]
    equal_windows = r"layers\.(\d)\.blocks\.([02])\."
    config = ResLoRAConfig(target_modules=[name], shortcut=shortcut, chain_pattern=equal_windows, exclude_modules=[])
    assert 2 in [len(c) for c in describe_chains(swin(), _even_blocks(config)).chains]


def _even_blocks(config: ResLoRAConfig) -> ResLoRAConfig:
    (name,) = config.target_modules
    config.target_modules = rf".*blocks\.[02]\..*\.{name}"
    return config


def test_the_mlp_between_windows_is_linked():
    base = swin()
    name = next(n for n, m in base.named_modules() if isinstance(m, nn.Linear) and m.out_features > m.in_features)
    target = ".".join(name.split(".")[-2:])
    config = ResLoRAConfig(target_modules=[target], shortcut="input")
    assert lengths(get_peft_model(base, config)) == [2, 4]


def of_layers(numbers: str) -> str:
    return rf".*layers\.[{numbers}]\..*q_proj"


@pytest.mark.parametrize(("shortcut", "pre_num"), [("input", 1), ("block", 1), ("middle", 1)])
def test_a_combination_of_disjoint_adapters_has_the_chains_of_each(shortcut, pre_num):
    """Layers 1 and 2 are neighbors in the combination only; a link between them would be neither adapter's."""
    options = {"r": 3, "shortcut": shortcut, "pre_num": pre_num}
    base = LLAMA.make()
    model = get_peft_model(copy.deepcopy(base), ResLoRAConfig(target_modules=of_layers("01"), **options))
    model.add_adapter("b", ResLoRAConfig(target_modules=of_layers("23"), **options))
    randomize_adapters(model)
    model.base_model.set_adapter(["default", "b"])
    inputs = LLAMA.inputs()
    expected = output_of(model, inputs)
    model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "both", combination_type="cat")
    model.set_adapter("both")
    assert lengths(model, "both") == [2, 2]
    assert relative_error(output_of(model, inputs), expected) < 1e-5
    assert relative_error(expected, output_of(base, inputs)) > 0.01


@pytest.mark.parametrize("layers", ["02", "12"])
def test_a_combination_of_adapters_that_link_in_different_ways_is_refused(layers):
    model = get_peft_model(LLAMA.make(), ResLoRAConfig(r=3, target_modules=of_layers("012")))
    model.add_adapter("b", ResLoRAConfig(r=3, target_modules=of_layers(layers)))
    before = copy.deepcopy(model.peft_config), list(dict(model.named_modules()))
    with pytest.raises(ValueError, match="link their layers in different ways"):
        model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "both", combination_type="cat")
    assert (model.peft_config, list(dict(model.named_modules()))) == before


def test_a_combination_that_would_lose_layers_is_refused():
    model = linked(LLAMA.make(), layers_to_transform=[0, 1])
    model.add_adapter("b", ResLoRAConfig(r=3, target_modules=["q_proj"], layers_to_transform=[2, 3]))
    with pytest.raises(ValueError, match=r"different layers_to_transform, \[\[0, 1\], \[2, 3\]\]"):
        model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "both", combination_type="cat")


def test_a_config_used_again_is_kept_where_its_cuts_are_the_same():
    """As PEFT promises of `from_pretrained(config=config)`; on another model, the first one's cuts stay its own."""
    config = ResLoRAConfig(r=2, target_modules=["q_proj"], layers_to_transform=[0, 2, 3])
    models = [get_peft_model(TINY_MODELS["llama"].make(), config) for _ in range(2)]
    assert all(model.peft_config["default"] is config for model in models)
    other = get_peft_model(without_two_queries(), config)
    assert other.peft_config["default"] is not config
    assert config.chain_cuts == models[0].peft_config["default"].chain_cuts == ["model.layers.2"]
