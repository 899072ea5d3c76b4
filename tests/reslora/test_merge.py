"""Merging: every estimator against a dense computation from the paper's table, exact where it promises to be."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from helpers.adapters import VARIANTS, base_and_adapted
from helpers.calibration import record_norms
from helpers.oracle import chains_by_block, factors_of, randomize_adapters, relative_error
from helpers.tiny_models import TINY_MODELS, output_of
from helpers.tolerances import FLOAT64, MODEL64, rounding
from peft import PeftModel, get_peft_model
from peft.tuners.lora.conversion import convert_to_lora
from torch import nn
from transformers import LlamaForCausalLM

from peft_reslora import ResLoRAConfig
from peft_reslora.reslora.linking import chains_of

pytestmark = pytest.mark.usefixtures("float64")
ESTIMATORS = ["input_norm", "weight_norm", "drop"]


def recorded(model: nn.Module, name: str, adapter: str = "default") -> float:
    window = model.get_submodule(f"base_model.model.{name}").lora_norm[adapter].double()
    return float(window[window >= 0].mean())


def dense_deltas(model: nn.Module, base: nn.Module, shortcut: str, pre_num: int, estimator: str) -> dict:
    """The merged delta weights (out, in) by the table of estimators, dense and in float64."""
    factors = {name: (A.detach(), B.detach(), s) for name, (A, B, s) in factors_of(model).items()}
    weights = {name: base.get_submodule(name).weight.detach().double() for name in factors}
    if type(base.get_submodule(next(iter(factors)))).__name__ == "Conv1D":
        weights = {name: W.T for name, W in weights.items()}
    deltas = {}
    for chain in chains_by_block(list(factors), lambda n: (factors[n][0].shape[1], factors[n][1].shape[0])):
        merged_norms: list[float] = []
        for n, name in enumerate(chain):
            A, B, s = factors[name]
            m = n if pre_num == -1 else min(pre_num, n)
            norms = [recorded(model, k) for k in chain] if estimator == "input_norm" and shortcut != "block" else None
            if shortcut == "block":
                deltas[name] = sum(factors[k][2] * factors[k][1] @ factors[k][0] for k in chain[n - m : n + 1])
            elif shortcut == "input":
                if n == 0:
                    a = 1.0
                elif estimator == "input_norm":
                    a = norms[n - 1] / norms[n]
                elif estimator == "weight_norm":
                    a = merged_norms[n - 2] / merged_norms[n - 1] if n >= 2 else 1.0
                else:
                    a = 0.0
                deltas[name] = s * (1 + a) * B @ A
            elif estimator == "weight_norm":
                mixed = A.clone()
                for k in range(1, m + 1):
                    a = merged_norms[n - k - 1] / merged_norms[n - 1] if n - k - 1 >= 0 else 1.0
                    mixed += a * factors[chain[n - k]][0]
                deltas[name] = s * B @ mixed
            else:
                total = sum(norms[n - k] / norms[n] for k in range(1, m + 1)) if norms else 0.0
                deltas[name] = s * (1 + total) * B @ A
            merged_norms.append(float((weights[name] + deltas[name]).norm()))
    return deltas


@pytest.mark.quick(name=["gpt2"])
@pytest.mark.quick(name=["llama"], pre_num=[-1])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("shortcut", "pre_num"), VARIANTS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_merged_weights_follow_the_table_of_estimators(name, shortcut, pre_num, estimator):
    alpha_pattern = {"mlp.c_proj": 3} if name == "gpt2" else {}
    base, model = base_and_adapted(name, shortcut, pre_num, merge_estimator=estimator, alpha_pattern=alpha_pattern)
    record_norms(model, TINY_MODELS[name].batches(3))
    expected = dense_deltas(model, base, shortcut, pre_num, estimator)
    for layer_name, delta in expected.items():
        layer = model.get_submodule(f"base_model.model.{layer_name}")
        actual = layer.get_delta_weight("default")
        assert relative_error(actual.T if layer.fan_in_fan_out else actual, delta) < FLOAT64
    merged = copy.deepcopy(model).merge_and_unload()
    for layer_name, delta in expected.items():
        change = merged.get_submodule(layer_name).weight - base.get_submodule(layer_name).weight
        assert (
            relative_error(change.T if "Conv1D" in str(type(merged.get_submodule(layer_name))) else change, delta)
            < FLOAT64
        )


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("pre_num", [1, 2, -1])
def test_block_merges_exactly(name, pre_num):
    _, model = base_and_adapted(name, "block", pre_num)
    inputs = TINY_MODELS[name].inputs()
    expected = output_of(model, inputs)
    model.merge_adapter()
    assert relative_error(output_of(model, inputs), expected) < MODEL64
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    assert not any(hasattr(module, "lora_A") for module in merged.modules())
    assert relative_error(output_of(merged, inputs), expected) < MODEL64


@pytest.mark.parametrize(("shortcut", "pre_num"), VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.quick(dtype=[torch.float32], safe_merge=[True])
@pytest.mark.quick(dtype=[torch.bfloat16], safe_merge=[False])
@pytest.mark.parametrize("safe_merge", [True, False])
def test_unmerging_restores_every_bit(shortcut, pre_num, dtype, safe_merge):
    base, model = base_and_adapted("gpt2", shortcut, pre_num, merge_estimator="weight_norm")
    model = randomize_adapters(get_peft_model(copy.deepcopy(base).to(dtype), model.peft_config["default"]))
    model.add_adapter(
        "second", ResLoRAConfig(r=2, target_modules=["c_attn"], shortcut="middle", merge_estimator="drop")
    )
    randomize_adapters(model, seed=3)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for _ in range(10):
        model.merge_adapter(["default", "second"], safe_merge=safe_merge)
        weight = model.base_model.model.transformer.h[1].attn.c_attn.base_layer.weight
        assert not torch.equal(weight, before["base_model.model.transformer.h.1.attn.c_attn.base_layer.weight"])
        model.unmerge_adapter()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name


@pytest.mark.filterwarnings("ignore:Adapter 'default' has no shortcut at all:UserWarning")
def test_a_thousand_merges_lose_nothing():
    model = randomize_adapters(get_peft_model(nn.Sequential(nn.Linear(9, 7)), ResLoRAConfig(target_modules=["0"])))
    weight = model.base_model.model[0].base_layer.weight
    before = weight.clone()
    for _ in range(1000):
        model.merge_adapter()
        model.unmerge_adapter()
    assert torch.equal(model.base_model.model[0].base_layer.weight, before)


def test_merged_models_survive_moves_and_copies():
    base, model = base_and_adapted("llama", "block", 1)
    model.merge_adapter()
    twin = copy.deepcopy(model).double()
    twin.unmerge_adapter()
    for (name, weight), (_, original) in zip(
        twin.get_base_model().named_parameters(), model.get_base_model().named_parameters(), strict=True
    ):
        if "base_layer" in name:
            assert weight.dtype == torch.float64
            assert torch.equal(weight, base.get_parameter(name.replace(".base_layer", "")).double())
            assert not torch.equal(weight, original.double())


def test_a_merge_reads_all_layers_before_it_changes_any():
    """weight_norm looks at the base weights of earlier layers, and two adapters are merged layer by layer."""
    base, model = base_and_adapted("llama", "input", 1, merge_estimator="weight_norm")
    config = ResLoRAConfig(
        r=2, target_modules=["q_proj"], shortcut="middle", pre_num=-1, merge_estimator="weight_norm"
    )
    model.add_adapter("second", config)
    randomize_adapters(model, seed=3)
    deltas = {
        name: sum(layer.get_delta_weight(a) for a in ("default", "second") if a in layer.lora_A)
        for name, layer in model.get_base_model().named_modules()
        if hasattr(layer, "lora_A")
    }
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=["default", "second"])
    model.merge_adapter(["default", "second"])
    for name, delta in deltas.items():
        change = merged.get_submodule(name).weight - base.get_submodule(name).weight
        assert relative_error(change, delta) < FLOAT64
        change = model.get_base_model().get_submodule(name).base_layer.weight - base.get_submodule(name).weight
        assert relative_error(change, delta) < FLOAT64


def test_merging_chosen_adapters_only():
    _, model = base_and_adapted("llama", "block", 1)
    inputs = TINY_MODELS["llama"].inputs()
    model.add_adapter("second", ResLoRAConfig(r=2, target_modules=["q_proj"], pre_num=-1))
    randomize_adapters(model, seed=3)
    model.set_adapter("second")
    expected = output_of(model, inputs)
    assert relative_error(output_of(model.merge_and_unload(adapter_names=["second"]), inputs), expected) < MODEL64


@pytest.mark.parametrize(("shortcut", "pre_num"), VARIANTS)
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_broken_factors_are_refused_and_nothing_is_changed(shortcut, pre_num, broken):
    base, model = base_and_adapted("llama", shortcut, pre_num, merge_estimator="weight_norm")
    model.get_base_model().model.layers[2].mlp.up_proj.lora_A["default"].weight.data[0] = broken
    with pytest.raises(
        ValueError, match=r"^NaNs detected in the merged weights\. The adapter default seems to be broken$"
    ):
        model.merge_and_unload(safe_merge=True)
    with pytest.raises(
        ValueError, match=r"(NaN or inf in the merged factors of adapter 'default' on|norm of the merged)"
    ):
        model.merge_adapter()
    weight = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    assert torch.equal(weight, base.model.layers[0].self_attn.q_proj.weight)


@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_input_norm_without_norms_names_the_way_to_them(shortcut):
    _, model = base_and_adapted("llama", shortcut, 1)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"no norms recorded on layer 'model\.layers\.0.*model\.train\(\)"):
            merge()
    assert not model.get_base_model().model.layers[0].self_attn.q_proj.supports_lora_conversion("default")
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(model, rank=3)


@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_least_squares_without_calibration_is_refused(shortcut):
    _, model = base_and_adapted("llama", shortcut, 1, merge_estimator="least_squares")
    with pytest.raises(ValueError, match=r"merge_estimator='least_squares' needs a calibrated adapter"):
        model.merge_and_unload()


@pytest.mark.parametrize("broken", [math.nan, 0.0])
def test_norms_that_cannot_be_used_are_refused(broken):
    _, model = base_and_adapted("llama", "input", 1)
    record_norms(model, TINY_MODELS["llama"].batches(3))
    model.get_base_model().model.layers[1].mlp.up_proj.lora_norm["default"].fill_(broken)
    with pytest.raises(ValueError, match=r"norm of the recorded input of layer 'model\.layers\.1\.mlp\.up_proj'"):
        model.merge_adapter()


def test_the_estimator_can_be_changed_until_the_merge():
    base, model = base_and_adapted("llama", "input", 1)
    record_norms(model, TINY_MODELS["llama"].batches(3))
    weights = []
    for estimator in ESTIMATORS:
        model.peft_config["default"].merge_estimator = estimator
        weights.append(copy.deepcopy(model).merge_and_unload().model.layers[2].mlp.up_proj.weight)
    original = base.model.layers[2].mlp.up_proj.weight
    assert all(relative_error(a - original, b - original) > 1e-4 for a, b in pairwise(weights))


def test_norms_are_the_mean_root_mean_square_of_the_window():
    _, model = base_and_adapted("llama", "input", 1, norm_window=3)
    seen: list[torch.Tensor] = []
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model.train()
    for length in (3, 9, 5, 4):
        output_of(model, {"input_ids": torch.randint(1, 53, (2, length))})
    model.eval()
    output_of(model, {"input_ids": torch.randint(1, 53, (2, 6))})
    expected = sum(float(x.double().square().mean().sqrt()) for x in seen[1:4]) / 3
    assert math.isclose(recorded(model, "model.layers.1.mlp.down_proj"), expected, rel_tol=rounding(200))


def test_norms_of_middle_are_those_of_the_projection():
    _, model = base_and_adapted("llama", "middle", 1)
    seen: list[torch.Tensor] = []
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    layer.lora_A["default"].register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    record_norms(model, TINY_MODELS["llama"].batches(2))
    expected = sum(float(v.double().square().mean().sqrt()) for v in seen[:2]) / 2
    assert math.isclose(recorded(model, "model.layers.1.mlp.down_proj"), expected, rel_tol=rounding(200))


def test_norms_do_not_depend_on_the_number_of_tokens():
    _, model = base_and_adapted("llama", "input", 1)
    ids = torch.randint(1, 53, (1, 5))
    norms = []
    for repeats in (1, 7):
        twin = copy.deepcopy(model).train()
        twin(input_ids=ids.repeat(repeats, 1))
        norms.append(recorded(twin, "model.layers.2.mlp.down_proj"))
    assert math.isclose(*norms, rel_tol=rounding(200))


@pytest.mark.filterwarnings("ignore:Adapter 'default' has no shortcut at all:UserWarning")
def test_norms_do_not_overflow_in_half_precision():
    """The sum of squares of this input is beyond float16, its mean is not."""
    model = get_peft_model(nn.ModuleDict({"h": nn.ModuleList([nn.Linear(64, 64).half()])}), ResLoRAConfig(
        target_modules=r"h\.0", shortcut="input"), autocast_adapter_dtype=False)  # fmt: skip
    layer = model.base_model.model["h"][0]
    layer.train()
    layer.record_norm("default", torch.full((512, 64), 200.0, dtype=torch.float16))
    assert layer.lora_norm["default"].dtype == torch.float32
    assert math.isclose(float(layer.lora_norm["default"][-1]), 200.0, rel_tol=rounding(200))


def test_recomputations_are_not_recorded():
    _, model = base_and_adapted("llama", "input", 1)
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    output_of(model, TINY_MODELS["llama"].inputs()).sum().backward()
    window = model.get_base_model().model.layers[1].mlp.down_proj.lora_norm["default"]
    assert int((window >= 0).sum()) == 1


@pytest.mark.parametrize(("shortcut", "pre_num"), VARIANTS)
def test_peft_converts_to_lora_with_the_same_delta(shortcut, pre_num):
    _, model = base_and_adapted("llama", shortcut, pre_num, merge_estimator="weight_norm")
    _, state_dict = convert_to_lora(model, rank=12)  # the smaller side of k_proj and v_proj; all updates have less
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            converted = state_dict[f"{name}.lora_B.weight"] @ state_dict[f"{name}.lora_A.weight"]
            assert relative_error(converted, layer.get_delta_weight("default")) < rounding(24 * 40)


FRESH_PROCESS = """
import sys, torch, peft_reslora
from pathlib import Path
from peft import PeftModel
from transformers import LlamaForCausalLM

folder = Path(sys.argv[1])
for adapter in sorted(folder.glob("adapter-*")):
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder / "base"), adapter)
    torch.save(model.merge_and_unload()(input_ids=torch.load(folder / "ids")).logits, adapter / "logits")
"""


@pytest.mark.slow
def test_merging_after_loading_in_a_fresh_process_equals_merging_the_trained_model(tmp_path):
    inputs = TINY_MODELS["llama"].inputs()
    torch.save(inputs["input_ids"], tmp_path / "ids")
    expected = []
    for n, (shortcut, pre_num) in enumerate(VARIANTS):
        base, model = base_and_adapted("llama", shortcut, pre_num)
        record_norms(model, TINY_MODELS["llama"].batches(3))
        base.save_pretrained(tmp_path / "base")
        model.save_pretrained(tmp_path / f"adapter-{n}")
        loaded = PeftModel.from_pretrained(
            LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / f"adapter-{n}"
        )
        assert relative_error(output_of(loaded, inputs), output_of(model, inputs)) < MODEL64
        expected.append(output_of(model.merge_and_unload(), inputs))
    subprocess.run([sys.executable, "-c", FRESH_PROCESS, str(tmp_path)], check=True, capture_output=True)
    for n, logits in enumerate(expected):
        assert relative_error(torch.load(tmp_path / f"adapter-{n}" / "logits"), logits) < MODEL64


@pytest.mark.parametrize(("shortcut", "pre_num"), VARIANTS)
def test_weighted_adapters_by_cat_add_the_updates(shortcut, pre_num):
    _, model = base_and_adapted("llama", shortcut, pre_num)
    targets = TINY_MODELS["llama"].targets
    model.add_adapter("second", ResLoRAConfig(r=2, target_modules=targets, shortcut=shortcut, pre_num=pre_num))
    randomize_adapters(model, seed=3)
    model.add_weighted_adapter(["default", "second"], [0.7, -0.4], "sum", combination_type="cat")
    inputs = TINY_MODELS["llama"].inputs()
    for layer in (module for module in model.modules() if hasattr(module, "lora_A")):
        layer.scaling["default"] *= 0.7
        layer.scaling["second"] *= -0.4
    model.base_model.set_adapter(["default", "second"])
    expected = output_of(model, inputs)
    model.set_adapter("sum")
    assert relative_error(output_of(model, inputs), expected) < MODEL64


def test_weighted_adapters_that_would_apply_shortcuts_twice_are_refused():
    _, model = base_and_adapted("llama", "block", 1)
    model.add_adapter("second", ResLoRAConfig(r=3, target_modules=["q_proj"], shortcut="middle"))
    with pytest.raises(ValueError, match=r"a second time\. Use 'cat'"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum", combination_type="svd")
    with pytest.raises(ValueError, match="different shortcuts"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum", combination_type="cat")
    assert "sum" not in model.peft_config


def test_deleting_an_adapter_leaves_nothing_of_it():
    _, model = base_and_adapted("llama", "input", 1)
    model.add_adapter("second", ResLoRAConfig(target_modules=["q_proj"], shortcut="middle"))
    model.delete_adapter("default")
    assert chains_of(model, "default") == []
    assert not any("default" in name for name, _ in model.named_parameters())
    assert not any("default" in name for name, _ in model.named_buffers())
    assert output_of(model, TINY_MODELS["llama"].inputs()).isfinite().all()
