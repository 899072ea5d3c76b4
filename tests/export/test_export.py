"""The export of every supported method: what a folder holds, what plain PEFT makes of it, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.adapters import adapted
from helpers.exports import CAUSAL, IDS, METHODS, UP_DOWN, Net, gpt2, llama, net, outputs, read_folder
from helpers.oracle import randomize_adapters, relative_error
from helpers.tiny_models import Block
from helpers.tolerances import half_rounding, rounding
from peft import (
    AdaLoraConfig,
    AutoPeftModelForCausalLM,
    FourierFTConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import LlamaForCausalLM

from peft_reslora import MoRAConfig, ResLoRAConfig
from peft_reslora.export import LoraExport, export_lora, export_lora_from_files, save_as_lora
from peft_reslora.export.card import write_native_card
from peft_reslora.export.fitting import RANKS

pytestmark = pytest.mark.filterwarnings("ignore:The LoRA has r=", "ignore:.*fan_in_fan_out")

# The only fields that an exported config may have, so that PEFT before 0.14 reads it too.
FIELDS = {
    *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias"),
    *("init_lora_weights", "lora_dropout", "inference_mode", "modules_to_save", "layers_to_transform"),
    *("layers_pattern", "target_modules", "task_type", "base_model_name_or_path", "revision", "auto_mapping"),
    "fan_in_fan_out",
}


FULL_RANK = {
    "net": (net, {"target_modules": UP_DOWN}),
    "llama": (llama, CAUSAL),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_fc"], "task_type": "CAUSAL_LM"}),
}


@pytest.mark.parametrize("name", METHODS)
def test_plain_peft_computes_what_the_merged_model_does(name: str, tmp_path: Path) -> None:
    make_base, config = METHODS[name]
    model = adapted(make_base(), config)
    export = save_as_lora(tmp_path / "lora", model, base_model=make_base())
    assert export.report.exact
    assert export.report.worst_error == 0.0
    merged = outputs(model.merge_and_unload())
    assert relative_error(outputs(make_base()), merged) > 1e-2, "the adapter has to do something"
    loaded = PeftModel.from_pretrained(make_base(), tmp_path / "lora").eval()
    assert relative_error(outputs(loaded), merged) < rounding(loaded)


@pytest.mark.parametrize("mora_type", ["rotation", "decoupling"])
@pytest.mark.parametrize("base", FULL_RANK)
def test_full_rank_mora_is_exported_on_request_only(mora_type: str, base: str, tmp_path: Path) -> None:
    make_base, targets = FULL_RANK[base]
    model = adapted(make_base(), MoRAConfig(r=2, mora_type=mora_type, **targets))
    with pytest.raises(ValueError, match=rf"'default', layer '.*{mora_type}.*`rank=` or `energy=`.*merge_and_unload"):
        export_lora(model)
    assert export_lora(model, rank=2).report.worst_error > 0.1
    export = save_as_lora(tmp_path, model, energy=1.0, base_model=make_base())
    assert export.report.worst_error < rounding(24 * 56)  # of an SVD of the largest matrix
    merged = outputs(model.merge_and_unload())
    assert relative_error(outputs(make_base()), merged) > 1e-2
    loaded = PeftModel.from_pretrained(make_base(), tmp_path).eval()
    assert relative_error(outputs(loaded), merged) < rounding(24 * 56) + rounding(loaded)


@pytest.mark.parametrize("shortcut", ["input", "middle"])
@pytest.mark.parametrize("estimator", ["input_norm", "weight_norm", "drop"])
def test_estimated_merges_export_what_they_merge(shortcut: str, estimator: str, tmp_path: Path) -> None:
    config = ResLoRAConfig(r=2, shortcut=shortcut, merge_estimator=estimator, **CAUSAL)
    model = adapted(llama(), config)
    model.train()
    outputs(model)  # records the norms
    model.eval()
    export = save_as_lora(tmp_path, model)
    assert not export.report.exact
    assert f"estimated by {estimator}" in str(export.report)
    merged = outputs(model.merge_and_unload())
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert relative_error(outputs(loaded), merged) < rounding(loaded)


def test_an_estimator_without_data_is_refused_also_with_a_rank() -> None:
    model = adapted(llama(), ResLoRAConfig(r=2, shortcut="input", merge_estimator="input_norm", **CAUSAL))
    with pytest.raises(ValueError, match=r"'default', layer 'model\.layers\.0.*no norms recorded"):
        export_lora(model)
    with pytest.raises(ValueError, match="no norms recorded"):
        export_lora(model, rank=2)


def test_adalora_drops_pruned_directions() -> None:
    model = adapted(net(), AdaLoraConfig(init_r=6, target_modules=UP_DOWN, total_step=10))
    layer = model.base_model.model.blocks[0].up
    layer.lora_E["default"].data[1:] = 0
    rows = {row.layer: row for row in export_lora(model).report.layers}
    assert rows["blocks.0.up"].rank_before == 1
    assert rows["blocks.1.up"].rank_before == 6


def test_an_update_of_zero_is_exported() -> None:
    export = export_lora(get_peft_model(net(), LoHaConfig(r=2, target_modules=UP_DOWN)), energy=0.5)
    assert export.config.r == RANKS[0]
    assert export.report.worst_error == 0.0
    assert not any(tensor.any() for name, tensor in export.state_dict.items() if "lora_B" in name)


def test_float64_factors_are_kept_to_float32() -> None:
    model = adapted(net().double(), LoHaConfig(r=3, target_modules=UP_DOWN)).double()
    export = export_lora(model)
    assert {tensor.dtype for tensor in export.state_dict.values()} == {torch.float32}
    assert 0 < export.report.worst_error < rounding(20)


# What the folder holds


def test_config_holds_the_standard_fields_only(tmp_path: Path) -> None:
    base = llama()
    base.config._name_or_path = base.name_or_path = "some/llama"
    model = adapted(base, LoraConfig(r=3, lora_alpha=7, lora_dropout=0.1, revision="v2", use_rslora=True, **CAUSAL))
    save_as_lora(tmp_path, model)
    config, _, header = read_folder(tmp_path)
    assert config.keys() == FIELDS
    assert header == {"format": "pt"}
    assert (config["r"], config["lora_alpha"], type(config["lora_alpha"])) == (8, 8, int)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    assert (config["use_rslora"], config["use_dora"], config["bias"]) == (False, False, "none")
    assert (config["init_lora_weights"], config["lora_dropout"], config["inference_mode"]) == (True, 0.0, True)
    assert (config["task_type"], config["auto_mapping"]) == ("CAUSAL_LM", None)
    assert (config["base_model_name_or_path"], config["revision"]) == ("some/llama", "v2")
    assert (tmp_path / "adapter_config.json").read_text() == json.dumps(config, indent=2, sort_keys=True) + "\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_auto_mapping_stands_in_for_a_task_type() -> None:
    export = export_lora(adapted(llama(), LoraConfig(target_modules=["q_proj", "v_proj"])))
    assert export.config.auto_mapping == {
        "base_model_class": "LlamaForCausalLM",
        "parent_library": LlamaForCausalLM.__module__,
    }


def test_tensors_are_padded_pairs_under_the_base_models_names(tmp_path: Path) -> None:
    save_as_lora(tmp_path, adapted(net(), LoraConfig(r=3, target_modules=UP_DOWN)))
    _, tensors, _ = read_folder(tmp_path)
    assert set(tensors) == {
        f"base_model.model.blocks.{i}.{name}.lora_{factor}.weight"
        for i in range(3)
        for name in UP_DOWN
        for factor in "AB"
    }
    A, B = (tensors[f"base_model.model.blocks.0.up.lora_{factor}.weight"] for factor in "AB")
    assert (A.shape, B.shape) == ((8, 20), (37, 8))
    assert not A[3:].any()
    assert not B[:, 3:].any()


def test_tensors_share_no_memory_with_the_model_or_each_other() -> None:
    model = adapted(net(), LoraConfig(r=8, lora_alpha=8, target_modules=UP_DOWN))
    export = export_lora(model)
    pointers = [t.untyped_storage().data_ptr() for t in (*export.state_dict.values(), *model.state_dict().values())]
    assert len(set(pointers)) == len(pointers)
    assert all(t.is_contiguous() and not t.requires_grad for t in export.state_dict.values())


@pytest.mark.parametrize(("update_rank", "file_rank"), [(1, 8), (8, 8), (9, 16), (33, 64)])
def test_the_file_takes_the_least_rank_that_is_served(update_rank: int, file_rank: int) -> None:
    model = adapted(nn.Sequential(nn.Linear(70, 80)), LoraConfig(r=update_rank, target_modules=["0"]))
    assert export_lora(model).config.r == file_rank


def test_a_requested_rank_sets_the_rank_of_the_file() -> None:
    model = adapted(net(), LoraConfig(r=3, target_modules=UP_DOWN))
    assert export_lora(model, rank=32).config.r == 32
    cut = export_lora(model, rank=2)
    assert cut.config.r == 8
    assert {row.rank_after for row in cut.report.layers} == {2}
    assert not cut.report.exact


def test_a_rank_above_what_is_served_is_refused() -> None:
    base = nn.Sequential(nn.Linear(520, 520))
    model = adapted(base, LoraConfig(r=513, target_modules=["0"]))
    with pytest.raises(ValueError, match=r"layer '0'.*rank 513.*512.*rank= or a lower energy=.*merge_and_unload"):
        export_lora(model)
    assert export_lora(model, rank=8).config.r == 8
    with pytest.raises(ValueError, match="rank=513 is above 512"):
        export_lora(model, rank=513)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_measured_again(dtype: torch.dtype, tmp_path: Path) -> None:
    model = adapted(net(), LoHaConfig(r=3, target_modules=UP_DOWN))
    export = save_as_lora(tmp_path, model, dtype=dtype, base_model=net())
    row = export.report.layers[0]
    delta = model.base_model.model.blocks[0].up.get_delta_weight("default").detach()
    A, B = (export.state_dict[f"base_model.model.blocks.0.up.lora_{f}.weight"].float() for f in "AB")
    assert A.dtype == torch.float32
    assert read_folder(tmp_path)[1]["base_model.model.blocks.0.up.lora_A.weight"].dtype == dtype
    assert row.relative_error == pytest.approx(relative_error(B @ A, delta), rel=half_rounding(4, dtype))
    assert not export.report.exact


def test_truncation_and_half_precision_report_their_joint_error() -> None:
    model = adapted(net(), LoHaConfig(r=3, target_modules=UP_DOWN))
    export = export_lora(model, rank=4, dtype=torch.bfloat16)
    delta = model.base_model.model.blocks[0].up.get_delta_weight("default").detach()
    A, B = (export.state_dict[f"base_model.model.blocks.0.up.lora_{f}.weight"].float() for f in "AB")
    assert export.report.layers[0].relative_error == pytest.approx(relative_error(B @ A, delta), rel=rounding(37))


# Which layers the folder names


def test_layers_that_lack_a_module_type_are_filled_with_zeros(tmp_path: Path) -> None:
    model = adapted(llama(), LoraConfig(r=3, layers_to_transform=[1], **CAUSAL))
    export = save_as_lora(tmp_path, model, base_model=llama())
    assert set(export.config.target_modules) == {"q_proj", "v_proj", "down_proj"}
    assert len(export.report.filled) == 6
    assert len(export.state_dict) == 2 * 9
    assert not export.state_dict["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].any()
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert relative_error(outputs(loaded), outputs(model)) < rounding(model)


def test_unfilled_layers_are_left_out_by_full_names(tmp_path: Path) -> None:
    model = adapted(llama(), LoraConfig(r=3, layers_to_transform=[1], **CAUSAL))
    export = save_as_lora(tmp_path, model, fill_missing_layers=False, base_model=llama())
    assert export.config.target_modules == {
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
        "model.layers.1.mlp.down_proj",
    }
    assert export.report.filled == []
    assert "fill_missing_layers=False" in export.report.call


def test_many_full_names_are_matched_as_they_are(tmp_path: Path) -> None:
    """From 20 names on, PEFT looks for a shorter list that matches the same modules."""

    def base() -> Net:
        model = net()
        model.blocks.extend(Block(20, 37) for _ in range(21))
        return model

    config = LoraConfig(r=3, target_modules=["up"], exclude_modules=["blocks.7.up"])
    export = export_lora(adapted(base(), config), fill_missing_layers=False)
    assert len(export.config.target_modules) == 23
    export.save_pretrained(tmp_path, base())


def test_v_proj_comes_with_q_proj() -> None:
    model = adapted(llama(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert export_lora(model).config.target_modules == {"q_proj", "v_proj"}
    assert export_lora(model, fill_missing_layers=False).config.target_modules == {"q_proj"}


def test_a_name_that_ends_another_brings_zeros_for_it(tmp_path: Path) -> None:
    """PEFT matches ends of names: the full name 'head' finds 'decoder.head' too."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 20)
            self.head = nn.Linear(20, 9)
            self.decoder = nn.ModuleDict({"head": nn.Linear(9, 12)})

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.decoder["head"](self.head(self.embed(ids)))

    torch.manual_seed(0)
    base = Two()
    model = adapted(base, LoraConfig(r=3, target_modules=r"head"))
    export = export_lora(model, fill_missing_layers=False)
    assert export.report.filled == ["decoder.head"]
    assert export.config.target_modules == {"head"}
    torch.manual_seed(0)
    export.save_pretrained(tmp_path, Two())


def test_a_name_that_ends_a_module_which_is_not_linear_is_refused() -> None:
    base = nn.ModuleDict({"head": nn.Linear(9, 12), "decoder": nn.ModuleDict({"head": nn.LayerNorm(9)})})
    model = adapted(base, LoraConfig(r=3, target_modules=r"head"))
    with pytest.raises(ValueError, match=r"'decoder\.head', which is not linear"):
        export_lora(model)


# What is refused


def refused(base: nn.Module, config: PeftConfig, match: str, **arguments: object) -> None:
    model = get_peft_model(base, config)
    with pytest.raises(ValueError, match=match):
        export_lora(model, **arguments)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"use_dora": True}, "'default' fits into no plain LoRA: use_dora makes.*merge_and_unload"),
        ({"bias": "all"}, "bias='all' trains biases"),
        ({"lora_bias": True}, r"layer 'blocks\.0\.up': it trains a bias \(lora_bias=True\)"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changed the base weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' changed the base weights"),
        ({"init_lora_weights": "mica"}, "variant MiCALinearVariant"),
        ({"modules_to_save": ["head"]}, r"trains the module 'head' itself \(ModulesToSaveWrapper\)"),
        ({"target_modules": ["up", "embed"]}, "layer 'embed': its base layer is Embedding, and only linear"),
        ({"target_modules": ["up", "conv"]}, "layer 'conv': its base layer is Conv1d, and only linear"),
        ({"target_modules": [], "target_parameters": ["head.weight"]}, "target_parameters changes more"),
        ({"bias": "all", "use_dora": True}, "bias='all' trains biases.*; use_dora"),
    ],
)
def test_what_a_lora_cannot_hold_is_refused(fields: dict, match: str) -> None:
    refused(net(), LoraConfig(**{"target_modules": UP_DOWN, **fields}), match)


def test_new_tokens_are_refused() -> None:
    refused(llama(), LoraConfig(trainable_token_indices=[3], **CAUSAL), "trainable_token_indices changes more")


@pytest.mark.parametrize("config_class", [LoHaConfig, LoKrConfig])
@pytest.mark.parametrize("effective", [True, False])
def test_convolutions_are_refused_for_every_method(config_class: type, effective: bool) -> None:
    config = config_class(r=2, target_modules=["conv"], use_effective_conv2d=effective)
    refused(net(), config, "layer 'conv': its base layer is Conv1d")


def test_other_methods_are_refused() -> None:
    ia3 = IA3Config(target_modules=UP_DOWN, feedforward_modules=["down"])
    refused(net(), ia3, "ia3.layer.Linear is no layer whose update is a matrix added", rank=8)
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    refused(llama(), prompts, "changes the prompt and no weights")


def test_a_full_rank_method_needs_a_rank_or_an_energy() -> None:
    model = adapted(net(), FourierFTConfig(n_frequency=50, target_modules=UP_DOWN))
    with pytest.raises(ValueError, match="no exact factors of low rank; pass rank= or energy="):
        export_lora(model)
    delta = model.base_model.model.blocks[2].up.get_delta_weight("default").detach()
    S = torch.linalg.svdvals(delta)
    row = export_lora(model, rank=4).report.layers[-2]
    assert row.layer == "blocks.2.up"
    assert row.relative_error == pytest.approx(float(S[4:].norm() / S.norm()), rel=rounding(20 * 37))


def test_a_layer_without_factors_of_its_own_gives_its_dense_update(monkeypatch: pytest.MonkeyPatch) -> None:
    def merged_factors(self: BaseTunerLayer, adapter_name: str) -> None:
        raise ValueError("this type is full rank.")

    model = adapted(net(), FourierFTConfig(n_frequency=50, target_modules=UP_DOWN))
    expected = export_lora(model, energy=0.9)
    monkeypatch.setattr(type(model.base_model.model.blocks[0].up), "merged_factors", merged_factors, raising=False)
    with pytest.raises(ValueError, match=r"layer 'blocks\.0\.up': this type is full rank\.$"):
        export_lora(model)
    assert export_lora(model, energy=0.9).report.layers == expected.report.layers


def test_unknown_adapters_and_bare_models_are_refused() -> None:
    model = adapted(net(), LoraConfig(target_modules=UP_DOWN))
    with pytest.raises(ValueError, match="no adapter 'other', it has 'default'"):
        export_lora(model, "other")
    with pytest.raises(ValueError, match="Net has no adapters"):
        export_lora(net())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_factors_are_refused_by_name(value: float) -> None:
    model = adapted(net(), LoHaConfig(r=2, target_modules=UP_DOWN))
    model.base_model.model.blocks[1].down.hada_w1_a["default"].data[0, 0] = value
    with pytest.raises(ValueError, match=r"'default', layer 'blocks\.1\.down': its factors hold NaN or inf"):
        export_lora(model, rank=4)


def test_factors_beyond_half_precision_are_refused() -> None:
    model = adapted(net(), LoraConfig(r=2, target_modules=UP_DOWN))
    model.base_model.model.blocks[1].down.lora_A["default"].weight.data *= 1e6
    with pytest.raises(ValueError, match=r"layer 'blocks\.1\.down': its factors do not fit into torch.float16"):
        export_lora(model, dtype=torch.float16)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"rank": 4, "energy": 0.5}, "not both; got rank=4 and energy=0.5"),
        ({"rank": 0}, "rank=0 must be a positive integer"),
        ({"rank": -1}, "rank=-1"),
        ({"rank": 0.9}, "rank=0.9 must be a positive integer; for a fraction"),
        ({"rank": True}, "rank=True"),
        ({"energy": 0}, r"energy=0 must be a number in \(0, 1\]"),
        ({"energy": 1.5}, "energy=1.5"),
        ({"energy": float("nan")}, "energy=nan"),
        ({"dtype": torch.float64}, "dtype=torch.float64 is not written"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        export_lora(net(), **arguments)


def test_parameters_that_are_elsewhere_are_refused() -> None:
    model = adapted(net(), LoraConfig(target_modules=UP_DOWN))
    model.base_model.model.blocks[0].up.lora_A.to("meta")
    with pytest.raises(ValueError, match=r"layer 'blocks\.0\.up': its parameters are offloaded or sharded"):
        export_lora(model)


# Warnings


@pytest.mark.filterwarnings("ignore:The base model of the LoRA is the local path:UserWarning")
@pytest.mark.parametrize("way", ["export_lora", "save_as_lora", "export_lora_from_files"])
def test_warns_where_other_programs_need_to_know(way: str, tmp_path: Path) -> None:
    base = net()
    base.name_or_path = str(tmp_path)
    model = adapted(base, LoraConfig(r=25, target_modules=[*UP_DOWN, "head"]))
    model.save_pretrained(tmp_path / "native")
    ways: dict[str, Callable[[], object]] = {
        "export_lora": lambda: export_lora(model, rank=20),
        "save_as_lora": lambda: save_as_lora(tmp_path / "lora", model, rank=20),
        "export_lora_from_files": lambda: export_lora_from_files(tmp_path / "native", rank=20),
    }
    with pytest.warns(UserWarning, match="The LoRA has r=32") as caught:
        ways[way]()
    messages = [str(w.message) for w in caught]
    assert len(messages) == 3
    assert "vLLM needs --max-lora-rank 32" in messages[0]
    assert "smaller side of 7 modules (blocks.0." in messages[1]
    assert str(tmp_path) in messages[2]
    assert all(w.filename == __file__ for w in caught)


def test_a_progress_bar_is_shown_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted(net(), LoraConfig(r=3, target_modules=UP_DOWN))
    export_lora(model)
    assert capsys.readouterr().err == ""
    export_lora(model, progressbar=True)
    assert "Exporting as LoRA: 100%" in capsys.readouterr().err


def test_a_small_lora_of_a_hub_model_warns_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    base = net()
    base.name_or_path = "org/model"
    model = adapted(base, LoraConfig(target_modules=UP_DOWN))
    recwarn.clear()
    export_lora(model)
    assert not recwarn.list


# The model that is exported


def test_the_model_is_left_as_it_was() -> None:
    model = adapted(net(), LoHaConfig(r=3, target_modules=UP_DOWN))
    model.train()
    model.merge_adapter()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    export = export_lora(model, rank=4)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == grads
    assert all(layer.merged for layer in model.modules() if isinstance(layer, BaseTunerLayer))
    assert model.training
    model.unmerge_adapter()
    again = export_lora(model, rank=4)
    assert all(torch.equal(again.state_dict[name], tensor) for name, tensor in export.state_dict.items())


def test_tuner_injected_model_and_peft_model_give_the_same_export() -> None:
    config = LoraConfig(r=3, target_modules=UP_DOWN)
    model = adapted(net(), config)
    injected = inject_adapter_in_model(config, net())
    randomize_adapters(injected)
    expected = export_lora(model)
    for other in (model.base_model, model.base_model.model, injected):
        actual = export_lora(other)
        assert actual.config == expected.config
        assert all(torch.equal(actual.state_dict[name], t) for name, t in expected.state_dict.items())


def test_an_adapter_that_is_not_active_is_exported() -> None:
    model = adapted(net(), LoraConfig(r=3, target_modules=UP_DOWN))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["head"]))
    randomize_adapters(model)
    assert {row.layer for row in export_lora(model, "other").report.layers} == {"head"}
    assert len(export_lora(model).report.layers) == 6


def test_mixed_tuners_export_the_adapter_below_another() -> None:
    model = PeftMixedModel(net(), LoraConfig(r=3, target_modules=UP_DOWN), "lora")
    model.add_adapter("loha", LoHaConfig(r=2, target_modules=["up"]))
    randomize_adapters(model)
    lora, loha = export_lora(model, "lora"), export_lora(model, "loha")
    assert {row.layer for row in loha.report.layers} == {f"blocks.{i}.up" for i in range(3)}
    assert len(lora.report.layers) == 6
    assert (lora.report.method, loha.report.method) == ("LoRA", "LoHa")


# The folder is written whole or not at all


def small_export() -> LoraExport:
    return export_lora(adapted(net(), LoraConfig(r=3, target_modules=UP_DOWN)))


@pytest.mark.parametrize("step", ["lora_card", "save_file", "_prove"])
def test_a_failure_while_writing_changes_nothing(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    export = small_export()
    export.save_pretrained(tmp_path / "old")
    before = {p.name: p.read_bytes() for p in (tmp_path / "old").iterdir()}
    monkeypatch.setattr(f"peft_reslora.export.checkpoint.{step}", fail)
    for name in ("old", "new"):
        with pytest.raises(OSError, match="disk full"):
            export_lora(adapted(net(), LoraConfig(r=9, target_modules=UP_DOWN))).save_pretrained(
                tmp_path / name, net()
            )
    assert [p.name for p in tmp_path.iterdir()] == ["old"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "old").iterdir()} == before


def test_what_is_no_export_is_not_replaced(tmp_path: Path) -> None:
    export = small_export()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        export.save_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match=r"holds other files \(file\)"):
        export.save_pretrained(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="notes holds files, and no earlier export"):
        export.save_pretrained(tmp_path / "notes")
    assert (tmp_path / "notes" / "README.md").read_text() == "mine"


@pytest.mark.parametrize("config_class", [LoHaConfig, LoraConfig, ResLoRAConfig])
def test_the_adapter_that_is_exported_is_not_replaced(config_class: type, tmp_path: Path) -> None:
    model = adapted(net(), config_class(r=2, target_modules=UP_DOWN))
    model.save_pretrained(tmp_path / "native")
    before = {p.name: p.read_bytes() for p in (tmp_path / "native").iterdir()}
    with pytest.raises(ValueError, match=r"holds an adapter with peft_type '[A-Z]+', and no earlier export"):
        save_as_lora(tmp_path / "native", model)
    assert {p.name: p.read_bytes() for p in (tmp_path / "native").iterdir()} == before
    save_as_lora(tmp_path / "lora", model)
    again = PeftModel.from_pretrained(net(), tmp_path / "lora")
    save_as_lora(tmp_path / "lora", again)  # an export may be replaced, also by one made from it


# Read back as proof


def test_the_proof_leaves_the_base_model_alone(tmp_path: Path) -> None:
    base = net()
    small_export().save_pretrained(tmp_path, base)
    assert not any(isinstance(module, BaseTunerLayer) for module in base.modules())


def test_the_proof_fails_on_another_base_model(tmp_path: Path) -> None:
    wider = net()
    wider.blocks.append(Block(20, 37))
    with pytest.raises(ValueError, match=r"adapts other layers.*blocks\.3"):
        small_export().save_pretrained(tmp_path / "lora", wider)
    other_shape = net()
    other_shape.blocks[0].up = nn.Linear(20, 38)
    with pytest.raises(ValueError, match="does not load onto the base model"):
        small_export().save_pretrained(tmp_path / "lora", other_shape)
    with pytest.raises(ValueError, match="has an adapter already"):
        small_export().save_pretrained(tmp_path / "lora", adapted(net(), LoraConfig(target_modules=["up"])))
    assert not (tmp_path / "lora").exists()


def test_the_proof_fails_on_another_scale(tmp_path: Path) -> None:
    export = small_export()
    export.config.lora_alpha = 16
    with pytest.raises(ValueError, match=r"layer 'blocks\.0\.up' computes something else"):
        export.save_pretrained(tmp_path / "lora", net())


# From files alone


def test_lora_files_give_what_the_model_gives(tmp_path: Path) -> None:
    config = LoraConfig(
        r=3, target_modules=UP_DOWN, rank_pattern={"up": 5}, alpha_pattern={"blocks.1.down": 9}, use_rslora=True
    )
    model = adapted(net(), config)
    model.save_pretrained(tmp_path)
    expected, actual = export_lora(model, rank=2), export_lora_from_files(tmp_path, rank=2)
    assert actual.config == expected.config
    assert all(relative_error(actual.state_dict[name], t) <= rounding(37) for name, t in expected.state_dict.items())
    assert {row.layer: row for row in actual.report.layers} == {row.layer: row for row in expected.report.layers}


@pytest.mark.parametrize("shortcut", ["input", "block", "middle"])
def test_reslora_files_give_what_the_model_gives(shortcut: str, tmp_path: Path) -> None:
    model = adapted(llama(), ResLoRAConfig(r=2, shortcut=shortcut, **CAUSAL))
    model.train()
    outputs(model)
    model.save_pretrained(tmp_path)
    expected, actual = export_lora(model), export_lora_from_files(tmp_path)
    assert actual.config == expected.config
    assert all(relative_error(actual.state_dict[name], t) <= rounding(56) for name, t in expected.state_dict.items())
    actual.save_pretrained(tmp_path / "lora", llama())


def test_files_cannot_give_an_estimate_from_base_weights(tmp_path: Path) -> None:
    adapted(llama(), ResLoRAConfig(r=2, shortcut="input", merge_estimator="weight_norm", **CAUSAL)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match=r"weight_norm.*base"):
        export_lora_from_files(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": r"blocks\.\d\.up"},
        {"target_modules": ["up"], "layers_to_transform": [0, 2], "layers_pattern": "blocks"},
    ],
)
def test_files_with_narrowed_targets_give_full_names(fields: dict, tmp_path: Path) -> None:
    adapted(net(), LoraConfig(r=3, **fields)).save_pretrained(tmp_path / "native")
    export = export_lora_from_files(tmp_path / "native")
    assert all(name.startswith("blocks.") for name in export.config.target_modules)
    export.save_pretrained(tmp_path / "lora", net())


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    model = adapted(net(), LoraConfig(r=3, target_modules=UP_DOWN))
    model.save_pretrained(tmp_path)
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    content, text = weights.read_bytes(), config.read_text()
    for damaged in (content[:-7], content[:5], b""):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors is damaged"):
            export_lora_from_files(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors does not exist"):
        export_lora_from_files(tmp_path)
    weights.write_bytes(content)
    for damaged_text in (
        text[:40],
        "[]",
        '{"peft_type": "LORA", "use_rslora": true, "bias": 3, "layers_pattern": "h"}',
    ):
        config.write_text(damaged_text)
        with pytest.raises(ValueError, match=r"adapter_config\.json"):
            export_lora_from_files(tmp_path)
    config.unlink()
    with pytest.raises(ValueError, match=r"adapter_config\.json does not exist"):
        export_lora_from_files(tmp_path)


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    for config, match in [
        (LoHaConfig(r=3, target_modules=UP_DOWN), r"peft_type 'LOHA'.*LORA, MORA, RESLORA.*base model"),
        (MoRAConfig(r=3, target_modules=UP_DOWN), r"MoRA, whose files do not hold the shapes.*hf download"),
    ]:
        adapted(net(), config).save_pretrained(tmp_path / config.peft_type)
        with pytest.raises(ValueError, match=match):
            export_lora_from_files(tmp_path / config.peft_type)
    for name, fields, match in [
        ("dora", {"use_dora": True}, "use_dora makes"),
        ("bias", {"lora_bias": True}, "lora_B.bias"),
        ("saved", {"modules_to_save": ["head"]}, "holds more than LoRA factors"),
        ("embed", {"target_modules": ["embed"]}, "lora_embedding_A"),
    ]:
        adapted(net(), LoraConfig(**{"target_modules": UP_DOWN, **fields})).save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=match):
            export_lora_from_files(tmp_path / name)


# Other programs


@pytest.mark.slow
def test_loads_in_a_process_without_the_plugin(tmp_path: Path) -> None:
    model = adapted(llama(), ResLoRAConfig(r=2, **CAUSAL))
    llama().save_pretrained(tmp_path / "base")
    save_as_lora(tmp_path / "lora", model)
    torch.save({"ids": IDS, "merged": outputs(model.merge_and_unload())}, tmp_path / "expected.pt")
    script = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, lora, expected = sys.argv[1:]
expected = torch.load(expected)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), lora).eval()
with torch.no_grad():
    out = model(expected["ids"]).logits
assert "peft_reslora" not in sys.modules
print(float((out - expected["merged"]).norm() / expected["merged"].norm()))
"""
    arguments = [tmp_path / name for name in ("base", "lora", "expected.pt")]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    assert float(done.stdout) < rounding(llama())


def test_loads_through_transformers_and_the_auto_class(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = adapted(base, LoraConfig(r=3, **CAUSAL))
    with pytest.warns(UserWarning, match="local path"):
        save_as_lora(tmp_path / "lora", model)
    expected = outputs(model)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora").eval()
    assert relative_error(outputs(loaded), expected) < rounding(model)
    plain = llama()
    plain.load_adapter(str(tmp_path / "lora"))
    assert relative_error(outputs(plain.eval()), expected) < rounding(model)


# Card and report


def test_the_card_tells_what_made_the_file(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    base = llama()
    base.name_or_path = "org/model"
    model = adapted(base, ResLoRAConfig(r=2, **CAUSAL))
    export = save_as_lora(tmp_path, model, rank=1)
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.library_name, card.data.base_model, card.data.tags, card.data.pipeline_tag) == (
        "peft",
        "org/model",
        ["lora", "reslora"],
        "text-generation",
    )
    assert "export_lora(model, 'default', rank=1)" in card.text
    assert f"{export.report.worst_error:.2e}" in card.text
    assert all(row.layer in card.text for row in export.report.layers)
    save_as_lora(tmp_path, model, command="peft-reslora export out")
    assert "```sh\npeft-reslora export out\n```" in (tmp_path / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:The base model of the LoRA is the local path:UserWarning")
def test_the_card_names_no_local_path(tmp_path: Path) -> None:
    base = net()
    base.name_or_path = str(tmp_path)
    save_as_lora(tmp_path / "lora", adapted(base, LoraConfig(target_modules=UP_DOWN)))
    assert str(tmp_path) not in (tmp_path / "lora" / "README.md").read_text()


NATIVE = {
    "reslora": ResLoRAConfig(r=2, **CAUSAL),
    "mora": MoRAConfig(r=2, **CAUSAL),
}


@pytest.mark.parametrize("name", NATIVE)
def test_the_native_card_takes_the_place_of_pefts_blanks(name: str, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    base = llama()
    base.config._name_or_path = base.name_or_path = "org/model"
    model = adapted(base, NATIVE[name])
    cards = []
    for _ in range(2):  # as a checkpoint is written over an earlier one
        model.save_pretrained(tmp_path)
        write_native_card(tmp_path, NATIVE[name])
        cards.append((tmp_path / "README.md").read_text())
    assert cards[0] == cards[1]
    card = ModelCard.load(tmp_path / "README.md")
    assert "[More Information Needed]" not in card.text
    assert card.text.count("pip install peft_reslora") == 1
    assert "save_as_lora" in card.text
    assert "- PEFT " in card.text
    assert (card.data.base_model, card.data.library_name) == ("org/model", "peft")
    assert name in card.data.tags
    assert card.data.pipeline_tag == "text-generation"


def test_the_native_card_leaves_the_users_words(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    config = ResLoRAConfig(r=2, base_model_name_or_path="org/model", **CAUSAL)
    write_native_card(tmp_path, config)
    assert "base_model: org/model" in file.read_text()
    file.write_text("---\nlicense: mit\n---\n# Mine\n")
    for shortcut in ("input", "block"):
        config.shortcut = shortcut
        write_native_card(tmp_path, config)
    file.write_text(file.read_text() + "\n## My results\n")
    write_native_card(tmp_path, config)
    text = file.read_text()
    assert text.startswith("---\nlicense: mit\ntags:\n- reslora\n---\n# Mine\n")
    assert text.endswith("\n## My results\n")
    assert text.count("# ResLoRA (block) adapter") == text.count("pip install peft_reslora") == 1
    blanks = get_peft_model(net(), LoraConfig(target_modules=UP_DOWN))
    blanks.save_pretrained(tmp_path / "filled")
    filled = tmp_path / "filled" / "README.md"
    filled.write_text(filled.read_text().replace("[More Information Needed]", "My words", 1))
    write_native_card(tmp_path / "filled", config)
    assert "My words" in filled.read_text()


@pytest.mark.parametrize("name", NATIVE)
def test_saving_a_native_adapter_writes_its_card(name: str, tmp_path: Path) -> None:
    adapted(llama(), NATIVE[name]).save_pretrained(tmp_path)
    assert "pip install peft_reslora" in (tmp_path / "README.md").read_text()


def test_the_report_is_a_table_and_plain_values() -> None:
    report = export_lora(adapted(net(), LoHaConfig(r=3, target_modules=UP_DOWN)), energy=0.8).report
    lines = str(report).splitlines()
    assert len(lines) == 2 + 6
    assert lines[2].startswith("blocks.0.up")
    values = json.loads(json.dumps(report.to_dict()))
    assert values["layers"][0]["rank_before"] == 9
    assert all(0.8 <= row["energy_kept"] <= 1 for row in values["layers"])
