"""Exports of ResLoRA on fused experts: a LoRA that plain PEFT reads, with the same logits."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from helpers.experts import MIXTURES, adapted_mixture, mixture, tokens
from helpers.oracle import relative_error
from helpers.tolerances import rounding
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from peft_reslora import combine_as_lora, export_lora, export_lora_from_files, save_as_lora
from peft_reslora.reslora.layer import ResLoRALayer


def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=tokens()).logits


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.quick(name=["gpt_oss"], pre_num=[1])
@pytest.mark.quick(name=["qwen3_moe"], pre_num=[-1])
@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("pre_num", [1, -1])
def test_plain_peft_reads_the_same_function(name, pre_num, tmp_path):
    base = mixture(name, torch.float32)
    model = adapted_mixture(copy.deepcopy(base), pre_num=pre_num).eval()
    export = save_as_lora(tmp_path, model, base_model=base)  # which proves each layer besides
    assert all(layer.exact for layer in export.report.layers)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["target_parameters"] == sorted(
        f"model.layers.{n}.mlp.experts.{last}" for n in range(4) for last in ("gate_up_proj", "down_proj")
    )
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert not any(isinstance(module, ResLoRALayer) for module in loaded.modules())
    assert sum(isinstance(module, ParamWrapper) for module in loaded.modules()) == 8
    assert relative_error(logits(loaded), logits(model)) < rounding(base)
    save_as_lora(tmp_path, model)  # an earlier export is replaced


def test_only_parameters_are_exported_too(tmp_path):
    base = mixture("qwen3_moe", torch.float32)
    model = adapted_mixture(copy.deepcopy(base), target_modules=[], rank_pattern={"layers.1.mlp.experts.down_proj": 3})
    save_as_lora(tmp_path, model, base_model=base)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert relative_error(logits(loaded), logits(model)) < rounding(base)


@pytest.mark.parametrize("asked", [{"rank": 2}, {"energy": 0.9}])
def test_a_lower_rank_is_the_nearest_for_each_expert(asked):
    model = adapted_mixture(mixture("gpt_oss"))
    export = export_lora(model, **asked)
    path, key = "model.layers.2.mlp.experts.down_proj", "base_model.model.model.layers.2.mlp.experts"
    layer = model.get_base_model().get_submodule("model.layers.2.mlp.experts")
    whole = layer.get_delta_weight("default").detach().double()
    whole = whole.mT  # gpt-oss holds (experts, in, out)
    A, B = (export.state_dict[f"{key}.lora_{f}.weight"].double() for f in "AB")
    updates = torch.stack([B[:, e::3] @ rows for e, rows in enumerate(A.chunk(3))])
    U, S, V = torch.linalg.svd(whole, full_matrices=False)
    report = next(found for found in export.report.layers if found.layer == path)
    error = float((updates - whole).norm() / whole.norm())
    assert error == pytest.approx(report.relative_error, rel=1e-4)
    if "rank" in asked:
        nearest = U[:, :, :2] * S[:, None, :2] @ V[:, :2]
        assert relative_error(updates, nearest) < 1e-5
    else:
        assert error**2 <= 0.1
        assert report.energy_kept == pytest.approx(1 - error**2, abs=1e-5)


def test_what_cannot_be_exported_is_refused(tmp_path):
    base = mixture("mixtral", torch.float32)
    model = adapted_mixture(copy.deepcopy(base))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"only the base model tells .*export_lora\(model\).*merge_and_unload"):
        export_lora_from_files(tmp_path)
    with pytest.raises(ValueError, match=r"adapts parameters .*merge_and_unload"):
        combine_as_lora(model, ["default"], [0.5])
    fields = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}
    lora = get_peft_model(base, LoraConfig(**fields))
    with pytest.raises(ValueError, match=r"target_parameters changes more than .*merge_and_unload"):
        export_lora(lora)


def test_inspect_refuses_what_only_the_base_tells(command, tmp_path):
    adapted_mixture(mixture("mixtral", torch.float32)).save_pretrained(tmp_path)
    done = command("inspect", tmp_path)
    assert done.code == 1
    assert "only the base model tells" in done.err
