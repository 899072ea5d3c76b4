"""Adapters with nested ranks: an export at a rank is the adapter of that rank, cut off and not fitted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapters import adapted
from helpers.exports import CAUSAL, IDS, llama, outputs
from helpers.oracle import relative_error
from helpers.tolerances import FLOAT64, rounding
from peft import PeftModel

from peft_reslora import ResLoRAConfig, export_lora, save_as_lora
from peft_reslora.export import combine_as_lora, export_lora_from_files
from peft_reslora.training import rank_in_use

pytestmark = pytest.mark.filterwarnings("ignore:The LoRA has r=:UserWarning", "ignore:The base model of the LoRA")
BOUND = rounding(llama())


def nested(shortcut: Any = "block", pre_num: int = 1, **fields: Any) -> Any:
    fields = {"r": 4, "lora_alpha": 6, **CAUSAL, "merge_estimator": "weight_norm", **fields}
    return adapted(llama(), ResLoRAConfig(shortcut=shortcut, pre_num=pre_num, nested_ranks=True, **fields))


@pytest.mark.quick(rank=[2, 6])
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 6])
def test_of_block_it_is_the_adapter_with_that_rank_in_use(rank: int, tmp_path: Path) -> None:
    """With all earlier layers, so that as many directions add up; fewer would not hold them."""
    model = nested(pre_num=-1)
    with rank_in_use(model, rank):
        expected = outputs(model)
    export = save_as_lora(tmp_path, model, rank=rank, base_model=llama())
    assert relative_error(outputs(PeftModel.from_pretrained(llama(), tmp_path)), expected) < BOUND
    b = min(rank, 4)
    for layer in export.report.layers:
        n = int(layer.layer.split(".")[2])
        assert (layer.rank_before, layer.rank_after) == ((n + 1) * 4, (n + 1) * b)
        assert layer.first == (rank if rank < 4 else None)
        assert layer.exact is (rank >= 4)
        assert (layer.energy_kept is None) is (rank < 4)
        assert (layer.relative_error > 0.1) is (rank < 4)


@pytest.mark.quick(shortcut=["middle"])
@pytest.mark.parametrize("shortcut", ["input", "middle"])
@pytest.mark.parametrize("estimator", ["weight_norm", "drop"])
def test_factors_are_those_of_the_merge_at_that_rank(shortcut: str, estimator: str) -> None:
    model = nested(shortcut, merge_estimator=estimator)
    for rank in (1, 3):
        export = export_lora(model, rank=rank)
        with rank_in_use(model, rank):
            for layer in export.report.layers:
                A, B = (export.state_dict[f"base_model.model.{layer.layer}.lora_{f}.weight"] for f in "AB")
                delta = model.get_submodule(f"base_model.model.{layer.layer}").get_delta_weight("default")
                assert relative_error(B @ A, delta) < rounding(64)
                assert layer.rank_after == rank
                own = model.get_submodule(f"base_model.model.{layer.layer}").lora_B["default"].weight[:, :rank]
                assert relative_error(B[:, :rank], 6 / rank * own) < rounding(4)  # a part of it, and no other basis


def test_the_report_says_that_it_is_a_truncation() -> None:
    export = export_lora(nested("middle", merge_estimator="drop"), rank=2)
    row = next(line for line in str(export.report).splitlines() if "layers.1.self_attn.q_proj" in line)
    assert "2, truncated at 2" in row
    assert "truncated to the first 2 directions of each block" in export.report.summary()
    plain = export_lora(adapted(llama(), ResLoRAConfig(r=4, **CAUSAL)), rank=2)
    assert "truncated" not in str(plain.report)
    whole = export_lora(nested())
    assert whole.report.exact
    assert "truncated" not in str(whole.report)


def test_by_energy_it_is_fitted_as_any_adapter() -> None:
    export = export_lora(nested(), energy=0.9)
    assert all(layer.first is None and 0.9 <= layer.energy_kept <= 1 for layer in export.report.layers)


def test_a_sum_is_fitted_as_a_whole() -> None:
    """Its rank is that of the sum, and not of what is summed."""
    model = nested()
    combined = combine_as_lora(model, ["default"], [1.0], rank=2)
    for layer in combined.report.layers:
        A, B = (combined.state_dict[f"base_model.model.{layer.layer}.lora_{f}.weight"] for f in "AB")
        delta = model.get_submodule(f"base_model.model.{layer.layer}").get_delta_weight("default")
        U, S, Vh = torch.linalg.svd(delta.double())
        best = (U[:, :2] * S[:2]) @ Vh[:2]
        assert relative_error(B @ A, best) < rounding(delta.numel())
        assert layer.first is None


@pytest.mark.parametrize(("shortcut", "estimator"), [("block", "drop"), ("input", "drop"), ("middle", "drop")])
def test_from_files_it_is_the_same(shortcut: str, estimator: str, tmp_path: Path) -> None:
    model = nested(shortcut, merge_estimator=estimator)
    model.save_pretrained(tmp_path)
    for rank in (1, 3, 4):
        export, expected = export_lora_from_files(tmp_path, rank=rank), export_lora(model, rank=rank)
        both = [sorted(e.report.layers, key=lambda layer: layer.layer) for e in (export, expected)]
        assert both[0] == both[1]
        for key, tensor in export.state_dict.items():
            assert torch.equal(tensor, expected.state_dict[key]), key


def test_in_half_precision_the_error_counts_the_rounding_too() -> None:
    export = export_lora(nested(), rank=2, dtype=torch.bfloat16)
    assert all(tensor.dtype == torch.bfloat16 for tensor in export.state_dict.values())
    exact = export_lora(nested(), rank=2)
    for rounded, layer in zip(export.report.layers, exact.report.layers, strict=True):
        assert abs(rounded.relative_error - layer.relative_error) < torch.finfo(torch.bfloat16).eps
        assert rounded.relative_error != layer.relative_error


def test_a_rank_above_the_smaller_side_is_still_cut_off() -> None:
    """Of three blocks with 12 directions each, on layers of 24 features, whose update has no more than these."""
    model = nested(pre_num=-1, r=12)
    export = export_lora(model, rank=10)
    with rank_in_use(model, 10):
        for layer in export.report.layers:
            A, B = (export.state_dict[f"base_model.model.{layer.layer}.lora_{f}.weight"] for f in "AB")
            delta = model.get_submodule(f"base_model.model.{layer.layer}").get_delta_weight("default")
            assert relative_error(B @ A, delta) < rounding(64)
            assert layer.first == 10
            assert not layer.exact


def test_in_float64_the_factors_are_cut_off_exactly() -> None:
    model = nested("block").double()
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    chain, position = layer.chain_of("default")
    A, B = chain.merge().truncated(3).factors(position)
    expected = sum(
        6 / 3 * other.lora_B["default"].weight[:, :3] @ other.lora_A["default"].weight[:3]
        for other in (layer, model.base_model.model.model.layers[0].self_attn.q_proj)
    )
    assert relative_error(B @ A, expected) < FLOAT64


WITHOUT_PLUGIN = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/base"), sys.argv[1] + "/lora")
torch.save(model(input_ids=torch.load(sys.argv[1] + "/ids")).logits, sys.argv[1] + "/logits")
sys.exit("peft_reslora" in sys.modules)
"""


@pytest.mark.slow
def test_it_loads_where_the_plugin_is_not_imported(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = nested("block")
    torch.save(IDS, tmp_path / "ids")
    save_as_lora(tmp_path / "lora", model, rank=2)
    subprocess.run([sys.executable, "-c", WITHOUT_PLUGIN, str(tmp_path)], check=True, capture_output=True)
    with rank_in_use(model, 2):
        assert relative_error(torch.load(tmp_path / "logits"), outputs(model)) < BOUND
