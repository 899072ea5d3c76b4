"""Calibration: C_n against a dense least squares on hooked activations; merges, files and refusals around it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.adapters import ESTIMATED, base_and_adapted
from helpers.calibration import batches_of, divergence, log_probabilities, record_norms
from helpers.oracle import chains_by_block, randomize_adapters, relative_error
from helpers.tiny_models import TINY_MODELS, llama, output_of, t5
from helpers.tolerances import FLOAT64, MODEL64, rounding
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_reslora import ResLoRAConfig
from peft_reslora.reslora import calibrate_merge, merge_report
from peft_reslora.reslora.merging.calibrate import RIDGES, Moments, choose_ridge, residual, ridge_regression
from peft_reslora.reslora.merging.plan import merges_from_state_dict

pytestmark = pytest.mark.usefixtures("float64")
ESTIMATE = rounding(40)  # sums over tokens are float64, the solution is stored in float32


def dense_estimates(
    model: nn.Module, batches: list[dict[str, torch.Tensor]], shortcut: str, pre_num: int, ridge: float
) -> dict[str, torch.Tensor]:
    """C_n by a dense least squares in float64 on what hooks see, the ridge as extra rows."""
    layers = {name.removeprefix("base_model.model."): m for name, m in model.named_modules() if hasattr(m, "lora_A")}
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    handles = [
        layer.register_forward_pre_hook(lambda module, args, name=name: seen[name].append(args[0].detach().double()))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    keep = torch.cat([batch["attention_mask"].flatten().bool() for batch in batches])
    x = {name: torch.cat([part.flatten(0, 1) for part in parts])[keep] for name, parts in seen.items()}
    A = {name: layer.lora_A["default"].weight.detach().double() for name, layer in layers.items()}
    expected = {}
    for chain in chains_by_block(list(layers), lambda name: (layers[name].in_features, layers[name].out_features)):
        for n in range(1, len(chain)):
            name, reach = chain[n], n if pre_num == -1 else min(n, pre_num)
            if shortcut == "input":
                term = x[chain[n - 1]] @ A[name].T
            else:
                term = sum(x[k] @ A[k].T for k in chain[n - reach : n])
            X, features = x[name], x[name].shape[1]
            penalty = (ridge * X.square().sum() / features).sqrt() * torch.eye(features, dtype=torch.float64)
            rows = (
                torch.cat([X, penalty]),
                torch.cat([term, torch.zeros(features, term.shape[1], dtype=torch.float64)]),
            )
            expected[name] = torch.linalg.lstsq(*rows).solution.T
    return expected


def estimate_of(model: nn.Module, name: str, adapter: str = "default") -> torch.Tensor:
    return model.get_submodule(f"base_model.model.{name}").lora_shortcut[adapter]


@pytest.mark.parametrize(("shortcut", "pre_num"), ESTIMATED)
@pytest.mark.parametrize("max_memory", [2**30, 1])
def test_estimates_are_those_of_a_dense_least_squares(shortcut, pre_num, max_memory):
    _, model = base_and_adapted("llama", shortcut, pre_num)
    batches = batches_of()
    expected = dense_estimates(model, batches, shortcut, pre_num, 1e-2)
    fits = calibrate_merge(model, iter(batches), ridge=1e-2, max_memory=max_memory)
    assert fits.keys() == expected.keys()
    for name, C in expected.items():
        assert relative_error(estimate_of(model, name), C) < ESTIMATE
        layer = model.get_submodule(f"base_model.model.{name}")
        A, B = (factor["default"].weight for factor in (layer.lora_A, layer.lora_B))
        merged = layer.scaling["default"] * B.double() @ (A + C)
        assert relative_error(layer.get_delta_weight("default"), merged) < ESTIMATE


@pytest.mark.parametrize(("shortcut", "pre_num"), ESTIMATED)
def test_least_squares_beats_the_other_estimators_on_other_data(shortcut, pre_num):
    _, model = base_and_adapted("llama", shortcut, pre_num)
    record_norms(model, TINY_MODELS["llama"].batches(3))
    batches = batches_of(24)
    calibrate_merge(model, batches[:20])
    expected = log_probabilities(model, batches[20:])
    errors = {}
    for estimator in ("least_squares", "drop", "input_norm", "weight_norm"):
        model.peft_config["default"].merge_estimator = estimator
        errors[estimator] = divergence(copy.deepcopy(model).merge_and_unload(), expected, batches[20:])
    assert errors.pop("least_squares") < min(errors.values())


def test_the_ridge_is_the_one_that_errs_least_on_held_out_sequences():
    """A term that is linear in x up to noise: fits on few tokens need a large ridge, fits on many a small one."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(3, 30, generator=generator)
    chosen = []
    for tokens in (40, 4000):
        fit, held_out = Moments(30, 3, torch.device("cpu")), Moments(30, 3, torch.device("cpu"))
        for moments in (fit, held_out):
            x = torch.randn(tokens, 30, generator=generator)
            moments.add(x, x @ truth.T + 3 * torch.randn(tokens, 3, generator=generator))
        errors = {ridge: residual(held_out, ridge_regression(fit, ridge)) for ridge in RIDGES}
        ridge, error = choose_ridge(fit, held_out)
        assert errors[ridge] == error == min(errors.values())
        chosen.append(ridge)
    assert chosen[0] > chosen[1]


def test_a_given_ridge_is_used_on_all_tokens():
    _, model = base_and_adapted("llama", "input", 1)
    errors = [calibrate_merge(model, batches_of(), ridge=ridge) for ridge in (1e-3, 1e-1, 10.0)]
    for name in errors[0]:
        assert [fits[name].ridge for fits in errors] == [1e-3, 1e-1, 10.0]
        assert errors[0][name].error < errors[1][name].error < errors[2][name].error < 1.0


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_does_not_matter(side):
    _, model = base_and_adapted("bert", "input", 1)
    batches = batches_of()
    if side == "left":
        batches = [{name: value.flip(1) for name, value in batch.items()} for batch in batches]
    calibrate_merge(model, batches, ridge=1e-2)
    first = estimate_of(model, "bert.encoder.layer.2.output.dense").clone()
    longer = [{name: F.pad(value, (0, 5)) for name, value in batch.items()} for batch in batches]
    calibrate_merge(
        model, [{**b, "input_ids": b["input_ids"].where(b["attention_mask"] > 0, 7)} for b in longer], ridge=1e-2
    )
    assert relative_error(estimate_of(model, "bert.encoder.layer.2.output.dense"), first) < ESTIMATE
    calibrate_merge(model, [{**b, "attention_mask": torch.ones_like(b["attention_mask"])} for b in longer], ridge=1e-2)
    assert relative_error(estimate_of(model, "bert.encoder.layer.2.output.dense"), first) > 1e-2


def test_encoder_and_decoder_have_their_own_padding():
    model = get_peft_model(t5(), ResLoRAConfig(r=3, target_modules=["q", "v"], shortcut="input"))
    randomize_adapters(model)
    ids = torch.randint(1, 53, (4, 6))
    masks = {"attention_mask": torch.ones(4, 6).tril(2), "decoder_attention_mask": torch.ones(4, 5).tril(1)}
    names = ("encoder.block.1.layer.0.SelfAttention.v", "decoder.block.1.layer.0.SelfAttention.v")
    found = []
    for pad in (0, 9):
        batch = {"input_ids": ids.where(masks["attention_mask"] > 0, pad), **masks}
        batch["decoder_input_ids"] = ids[:, :5].where(masks["decoder_attention_mask"] > 0, pad)
        calibrate_merge(model, [batch], ridge=1e-2)
        found.append([estimate_of(model, name).clone() for name in names])
    for a, b in zip(*found, strict=True):
        assert relative_error(a, b) < ESTIMATE


def hooks_of(model: nn.Module) -> list[dict]:
    return [dict(module._forward_pre_hooks) for module in model.modules()]


def test_the_model_is_left_as_it_came():
    _, model = base_and_adapted("llama", "middle", -1)
    model.train()
    model.get_base_model().model.layers[1].eval()
    modes, hooks = [module.training for module in model.modules()], hooks_of(model)
    parameters = {name: p.clone() for name, p in model.named_parameters()}
    calibrate_merge(model, batches_of())
    assert modes == [module.training for module in model.modules()]
    assert hooks_of(model) == hooks
    for name, p in model.named_parameters():
        assert torch.equal(p, parameters[name])
        assert p.grad is None
    assert not any((layer.lora_norm["default"] >= 0).any() for layer in model.modules() if hasattr(layer, "lora_norm"))


def test_a_failed_calibration_leaves_no_trace():
    _, model = base_and_adapted("llama", "input", 1)
    hooks = hooks_of(model)
    with pytest.raises(ValueError, match="input_ids"):
        calibrate_merge(model, [*batches_of(), {"nonsense": torch.ones(1)}])
    assert hooks_of(model) == hooks
    assert not any("lora_shortcut" in name for name, _ in model.named_buffers())
    assert model.peft_config["default"].merge_estimator == "input_norm"


@pytest.mark.parametrize(("shortcut", "pre_num"), [("input", 1), ("middle", -1)])
def test_saved_estimates_merge_after_loading_and_from_the_files_alone(shortcut, pre_num, tmp_path):
    base, model = base_and_adapted("llama", shortcut, pre_num)
    calibrate_merge(model, batches_of())
    model.save_pretrained(tmp_path)
    inputs = TINY_MODELS["llama"].inputs()
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    beside = get_peft_model(copy.deepcopy(base), ResLoRAConfig(target_modules=["q_proj"]), adapter_name="other")
    beside.load_adapter(tmp_path, adapter_name="default")
    beside.set_adapter("default")
    merges = merges_from_state_dict(model.peft_config["default"], load_file(tmp_path / "adapter_model.safetensors"))
    for name, (merge, position) in merges.items():
        A, B = merge.factors(position)
        delta = model.get_submodule(f"base_model.model.{name}").get_delta_weight("default")
        assert relative_error(B @ A, delta) < FLOAT64
    expected = output_of(model.merge_and_unload(), inputs)
    for other in (loaded, beside):
        assert relative_error(output_of(other.merge_and_unload(), inputs), expected) < MODEL64


def test_checkpoints_without_estimates_take_them_away_and_damaged_ones_are_refused(tmp_path):
    _, model = base_and_adapted("llama", "input", 1)
    before = get_peft_model_state_dict(model)
    calibrate_merge(model, batches_of())
    after = get_peft_model_state_dict(model)
    set_peft_model_state_dict(model, before)
    assert not any("lora_shortcut" in name for name, _ in model.named_buffers())
    key = "base_model.model.model.layers.1.mlp.up_proj"
    for damaged, message in (
        ({k: v for k, v in after.items() if k != f"{key}.lora_shortcut"}, "1 missing: .*lora_shortcut"),
        ({k: v for k, v in after.items() if k != f"{key}.lora_calibrated"}, "1 missing: .*lora_calibrated"),
        ({**after, f"{key}.lora_shortcut": torch.zeros(2, 24)}, r"of another shape: .*\(2, 24\) instead of \(3, 24\)"),
    ):
        with pytest.raises(ValueError, match=message):
            set_peft_model_state_dict(model, damaged)
    with pytest.raises(ValueError, match=r"layer 'model\.layers\.1.*lora_shortcut has the shape \(2, 24\) instead of"):
        merges_from_state_dict(model.peft_config["default"], {**after, f"{key}.lora_shortcut": torch.zeros(2, 24)})
    set_peft_model_state_dict(model, after)
    assert estimate_of(model, "model.layers.1.mlp.up_proj").any()


def test_factors_that_changed_since_are_refused():
    _, model = base_and_adapted("llama", "middle", 1)
    calibrate_merge(model, batches_of())
    weight = model.get_base_model().model.layers[2].mlp.up_proj.lora_A["default"].weight
    with torch.no_grad():
        weight.mul_(1.0001)
        model.merge_adapter()
        model.unmerge_adapter()
        weight.add_(0.02 * torch.randn_like(weight))
    with pytest.raises(ValueError, match=r"factors of layer 'model\.layers\.2\.mlp\.up_proj' have changed.*again"):
        model.merge_adapter()
    calibrate_merge(model, batches_of())
    model.merge_adapter()


def test_training_after_a_calibration_asks_for_another():
    _, model = base_and_adapted("llama", "input", 1)
    calibrate_merge(model, batches_of())
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    batch = batches_of()[0]
    for _ in range(5):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
    with pytest.raises(ValueError, match="have changed since they were calibrated"):
        model.merge_and_unload()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_estimates_survive_casts_in_float32(dtype):
    _, model = base_and_adapted("llama", "input", 1)
    calibrate_merge(model, batches_of())
    before = estimate_of(model, "model.layers.1.mlp.up_proj").clone()
    model.to(dtype)
    assert torch.equal(estimate_of(model, "model.layers.1.mlp.up_proj"), before)
    assert model.merge_and_unload().dtype == dtype


def test_a_deleted_adapter_takes_its_estimates_along():
    _, model = base_and_adapted("llama", "input", 1)
    model.add_adapter("second", ResLoRAConfig(target_modules=["q_proj"], shortcut="middle"))
    calibrate_merge(model, batches_of())
    model.delete_adapter("default")
    assert not any("default" in name for name, _ in model.named_buffers())


def test_several_adapters_have_their_own_estimates():
    _, model = base_and_adapted("llama", "input", 1)
    model.add_adapter("second", ResLoRAConfig(r=2, target_modules=["q_proj"], shortcut="middle"))
    randomize_adapters(model, seed=3)
    calibrate_merge(model, batches_of())
    first = estimate_of(model, "model.layers.1.self_attn.q_proj").clone()
    model.set_adapter("second")
    calibrate_merge(model, batches_of(), "second")
    assert torch.equal(estimate_of(model, "model.layers.1.self_attn.q_proj"), first)
    assert estimate_of(model, "model.layers.1.self_attn.q_proj", "second").shape == (2, 24)


def _merged(model: nn.Module) -> None:
    model.merge_adapter()


def _inactive(model: nn.Module) -> None:
    model.add_adapter("second", ResLoRAConfig(target_modules=["q_proj"]))
    model.set_adapter("second")


def _broken(model: nn.Module) -> None:
    model.get_base_model().model.layers[0].mlp.up_proj.lora_A["default"].weight.data.fill_(float("nan"))


@pytest.mark.parametrize(
    ("shortcut", "prepare", "arguments", "message"),
    [
        ("block", None, {}, "shortcut='block', which merges exactly"),
        ("input", None, {"adapter_name": "other"}, r"no ResLoRA adapter 'other'.*it has default \(RESLORA\)"),
        ("input", None, {"ridge": -1.0}, r"ridge=-1\.0 must be a number that is not negative"),
        ("input", None, {"batches": []}, r"No token came through layer 'model\.layers\.1"),
        ("input", None, {"batches": batches_of(1, 2)}, r"Choosing a ridge takes 4 sequences"),
        ("input", None, {"batches": batches_of(1, 2), "ridge": 0.0}, r"With ridge=0\.0 the regression .* singular"),
        ("input", _merged, {}, r"Adapters \['default'\] are merged into layer .*unmerge_adapter"),
        ("input", _inactive, {}, r"not active on layer .*set_adapter\('default'\)"),
        ("middle", _broken, {}, r"NaN or inf in the calibration inputs of layer"),
    ],
)  # fmt: skip
def test_what_cannot_be_calibrated_is_refused(shortcut, prepare, arguments, message):
    _, model = base_and_adapted("llama", shortcut, 1, merge_estimator="weight_norm")
    if prepare is not None:
        prepare(model)
    with pytest.raises(ValueError, match=message):
        calibrate_merge(model, **{"batches": batches_of(), **arguments})


def test_the_progress_bar_counts_batches(capsys):
    model = randomize_adapters(get_peft_model(llama(), ResLoRAConfig(target_modules=["q_proj"], shortcut="input")))
    calibrate_merge(model, batches_of(), progressbar=True)
    assert "4/4" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_quantized_bases_are_calibrated_and_reported_without_a_change():
    bnb = pytest.importorskip("bitsandbytes")
    torch.set_default_dtype(torch.float32)  # what bitsandbytes takes
    config = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 53, "initializer_range": 0.2}
    base = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=3, **config))
    for block in base.model.layers:
        weight = bnb.nn.Params4bit(block.mlp.up_proj.weight.data, requires_grad=False, quant_type="nf4")
        block.mlp.up_proj = bnb.nn.Linear4bit(64, 128, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        block.mlp.up_proj.weight = weight
    base.to("cpu").eval().is_loaded_in_4bit = True
    model = get_peft_model(base, ResLoRAConfig(r=3, target_modules=["up_proj"], shortcut="input"))
    randomize_adapters(model).eval()
    inputs = batches_of(1)[0]
    with torch.no_grad():
        expected = output_of(model, inputs)  # bitsandbytes packs the weights for the CPU now
    weights = [block.mlp.up_proj.base_layer.weight.data.clone() for block in base.model.layers]
    calibrate_merge(model, batches_of())
    report = merge_report(model, batches_of(), estimators=["drop", "least_squares"])
    assert not report.rounded
    assert report.costs["least_squares"].kl < report.costs["drop"].kl
    with torch.no_grad():
        assert torch.equal(output_of(model, inputs), expected)
    for weight, block in zip(weights, base.model.layers, strict=True):
        assert torch.equal(block.mlp.up_proj.base_layer.weight.data, weight)


def test_sharded_or_offloaded_factors_are_refused():
    _, model = base_and_adapted("llama", "input", 1)
    model.get_base_model().model.layers[2].mlp.up_proj.lora_A.to("meta")
    with pytest.raises(
        ValueError, match=r"factors of layer 'model\.layers\.2\.mlp\.up_proj' are sharded or offloaded"
    ):
        calibrate_merge(model, batches_of())
