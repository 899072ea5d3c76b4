"""The export of every supported method: what plain PEFT makes of it, and that the model is left alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.adapters import adapted
from helpers.calibration import record_norms
from helpers.exports import CAUSAL, IDS, METHODS, UP_DOWN, gpt2, llama, net, outputs
from helpers.oracle import randomize_adapters, relative_error
from helpers.tolerances import rounding
from peft import (
    AdaLoraConfig,
    AutoPeftModelForCausalLM,
    LoHaConfig,
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import LlamaForCausalLM

from peft_reslora import MoRAConfig, ResLoRAConfig
from peft_reslora.export import export_lora, save_as_lora
from peft_reslora.export.fitting import RANKS

pytestmark = pytest.mark.filterwarnings("ignore:The LoRA has r=", "ignore:.*fan_in_fan_out")

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
    record_norms(model, [{"input_ids": IDS}])
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
