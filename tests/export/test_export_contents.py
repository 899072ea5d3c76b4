"""What an exported folder holds: config, tensors, ranks and precision, and the layers that it names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.adapters import adapted
from helpers.exports import CAUSAL, UP_DOWN, Net, llama, net, outputs, read_folder
from helpers.oracle import relative_error
from helpers.tiny_models import Block
from helpers.tolerances import half_rounding, rounding
from peft import LoHaConfig, LoraConfig, PeftModel
from torch import nn
from transformers import LlamaForCausalLM

from peft_reslora.export import export_lora, save_as_lora

pytestmark = pytest.mark.filterwarnings("ignore:The LoRA has r=")

# The only fields that an exported config may have, so that PEFT before 0.14 reads it too.
FIELDS = {
    *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias"),
    *("init_lora_weights", "lora_dropout", "inference_mode", "modules_to_save", "layers_to_transform"),
    *("layers_pattern", "target_modules", "task_type", "base_model_name_or_path", "revision", "auto_mapping"),
    "fan_in_fan_out",
}


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
