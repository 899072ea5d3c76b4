"""Annealing: the forward against its equation, exact merges at the end, resumed runs, and refusals."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from helpers.adapters import ESTIMATED, base_and_adapted
from helpers.calibration import batches_of, record_norms
from helpers.oracle import randomize_adapters, relative_error
from helpers.tiny_models import TINY_MODELS, llama, output_of
from helpers.tolerances import MODEL64, rounding
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments

from peft_reslora import ResLoRAConfig, export_lora
from peft_reslora.reslora import calibrate_merge, merge_report
from peft_reslora.reslora.merging.plan import merges_from_state_dict
from peft_reslora.training.annealing import ShortcutAnnealing, anneal_shortcuts, annealed_share

pytestmark = pytest.mark.usefixtures("float64")
ESTIMATE = rounding(24)  # it is stored in float32
INPUTS = batches_of(1)[0]


def weight_norm_model(shortcut: str, pre_num: int, **fields: object) -> tuple[nn.Module, nn.Module]:
    return base_and_adapted("llama", shortcut, pre_num, merge_estimator="weight_norm", **fields)


@pytest.mark.quick(estimator=["weight_norm", "least_squares"])
@pytest.mark.parametrize(("shortcut", "pre_num"), ESTIMATED)
@pytest.mark.parametrize("estimator", ["drop", "input_norm", "weight_norm", "least_squares"])
def test_an_annealed_adapter_merges_exactly(shortcut, pre_num, estimator, caplog):
    _, model = base_and_adapted("llama", shortcut, pre_num, merge_estimator=estimator)
    record_norms(model, TINY_MODELS["llama"].batches(3))
    batches = batches_of() if estimator == "least_squares" else None
    for share in (0.0, 0.3, 1.0):
        anneal_shortcuts(model, share, batches=batches)
    randomize_adapters(model, seed=4)  # what training did since: no estimate is stale now
    expected = output_of(model, INPUTS)
    assert merge_report(model, batches_of()).exact
    with caplog.at_level(logging.INFO, logger="peft_reslora"):
        merged = copy.deepcopy(model).merge_and_unload()
    assert relative_error(output_of(merged, INPUTS), expected) < MODEL64
    assert "exactly" in caplog.messages[0]


@pytest.mark.parametrize(("shortcut", "pre_num"), ESTIMATED)
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_the_forward_is_the_equation(shortcut, pre_num, share):
    """The second layer of a chain: (1 - t) of the shortcut's update and t of the merged one, on the same inputs."""
    model = get_peft_model(
        llama(),
        ResLoRAConfig(
            r=3, target_modules=["q_proj"], shortcut=shortcut, pre_num=pre_num, merge_estimator="weight_norm"
        ),
    )
    randomize_adapters(model).eval()
    layer = model.get_base_model().model.layers[1].self_attn.q_proj
    seen = []
    layer.register_forward_hook(
        lambda module, args, output: seen.append((args[0], output - module.base_layer(args[0])))
    )
    output_of(model, INPUTS)
    merged = layer.get_delta_weight("default")
    anneal_shortcuts(model, share)
    output_of(model, INPUTS)
    (x, full), (_, annealed) = seen
    assert relative_error(annealed, (1 - share) * full + share * x @ merged.T) < ESTIMATE


def test_the_share_grows_linearly():
    assert [annealed_share(p, 0.5, 0.75) for p in (0.0, 0.5, 0.625, 0.75, 1.0)] == [0.0, 0.0, 0.5, 1.0, 1.0]


def test_half_annealed_adapters_merge_their_annealed_share_exactly():
    _, model = weight_norm_model("input", 1)
    layer = model.get_base_model().model.layers[2].mlp.up_proj
    before = layer.get_delta_weight("default")
    anneal_shortcuts(model, 0.5)
    # The estimate is still the one it froze.
    assert relative_error(layer.get_delta_weight("default"), before) < ESTIMATE
    model.peft_config["default"].merge_estimator = "drop"
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.scaling["default"] * B @ (A + 0.5 * layer.lora_shortcut["default"])
    assert relative_error(layer.get_delta_weight("default"), expected) < MODEL64
    assert not merge_report(model, batches_of()).exact


@pytest.mark.parametrize(("shortcut", "pre_num"), [("input", 1), ("middle", -1)])
def test_saved_and_loaded_adapters_stay_exact_and_export_needs_no_estimator(shortcut, pre_num, tmp_path):
    base, model = weight_norm_model(shortcut, pre_num)
    anneal_shortcuts(model, 1.0)
    model.peft_config["default"].merge_estimator = "least_squares"  # has no data, and needs none
    expected = output_of(model, INPUTS)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert relative_error(output_of(loaded, INPUTS), expected) < MODEL64
    assert export_lora(loaded).state_dict
    merges = merges_from_state_dict(model.peft_config["default"], load_file(tmp_path / "adapter_model.safetensors"))
    assert {merge.factors(position)[0].shape[0] for merge, position in merges.values()} == {3}
    assert relative_error(output_of(loaded.merge_and_unload(), INPUTS), expected) < MODEL64


@pytest.mark.parametrize(("shortcut", "pre_num"), [("input", 1), ("middle", -1)])
def test_gradients_are_those_of_a_lora_at_the_end(shortcut, pre_num):
    """At t = 1 nothing flows through the shortcut: layer 0's A gets no gradient from layer 1's update."""
    _, model = weight_norm_model(shortcut, pre_num)
    anneal_shortcuts(model, 1.0)
    layers = model.get_base_model().model.layers
    seen = []
    layers[0].self_attn.v_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.train()
    output = layers[1].self_attn.v_proj
    result = []
    output.register_forward_hook(lambda module, args, value: result.append((args[0], value)))
    model(**INPUTS)
    x, value = result[0]
    A, B = output.lora_A["default"].weight, output.lora_B["default"].weight
    C = output.lora_shortcut["default"]
    by_hand = output.base_layer(x) + output.scaling["default"] * x @ (A + C).T @ B.T
    actual = torch.autograd.grad(value.square().sum(), (A, B), retain_graph=True)
    for a, b in zip(actual, torch.autograd.grad(by_hand.square().sum(), (A, B)), strict=True):
        assert relative_error(a, b) < MODEL64


def data() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(1, 53, (96, 9), generator=torch.Generator().manual_seed(2))
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer_for(model: nn.Module, folder, callback: ShortcutAnnealing, **arguments: object) -> Trainer:
    settings = TrainingArguments(
        output_dir=str(folder),
        max_steps=12,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **{"save_strategy": "no", **arguments},
    )
    return Trainer(model, settings, train_dataset=data(), callbacks=[callback])


def fresh(shortcut: str, pre_num: int, estimator: str) -> nn.Module:
    config = ResLoRAConfig(
        r=3, target_modules=TINY_MODELS["llama"].targets, shortcut=shortcut, pre_num=pre_num, merge_estimator=estimator
    )
    torch.manual_seed(0)
    return get_peft_model(TINY_MODELS["llama"].make(), config)


@pytest.mark.parametrize(
    ("shortcut", "pre_num", "estimator"),
    [("input", 1, "input_norm"), ("input", 1, "least_squares"), ("middle", -1, "weight_norm")],
)
def test_a_trained_and_a_resumed_adapter_merge_exactly_and_agree(shortcut, pre_num, estimator, tmp_path):
    def callback() -> ShortcutAnnealing:
        return ShortcutAnnealing(0.4, 0.8, batches=batches_of() if estimator == "least_squares" else None)

    model = fresh(shortcut, pre_num, estimator)
    trainer_for(model, tmp_path, callback(), save_strategy="steps", save_steps=7).train()
    resumed = fresh(shortcut, pre_num, estimator)
    trainer_for(resumed, tmp_path, callback()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    expected = output_of(model.eval(), INPUTS)
    assert relative_error(output_of(resumed.eval(), INPUTS), expected) < MODEL64
    assert relative_error(output_of(resumed.merge_and_unload(), INPUTS), expected) < MODEL64
    assert relative_error(output_of(TINY_MODELS["llama"].make(), INPUTS), expected) > 1e-2


def test_annealed_adapters_are_not_calibrated_again():
    _, model = weight_norm_model("input", 1)
    anneal_shortcuts(model, 0.5)
    with pytest.raises(ValueError, match="has been annealed"):
        calibrate_merge(model, batches_of())


@pytest.mark.parametrize(
    ("shortcut", "estimator", "share", "message"),
    [
        ("block", "drop", 0.5, "shortcut='block', which merges exactly: there is nothing to anneal"),
        ("input", "drop", 1.5, r"share=1\.5 must be between 0"),
        ("input", "input_norm", 0.5, "no norms recorded on layer"),
        ("middle", "least_squares", 0.5, r"calibrate_merge\(model, batches\)"),
    ],
)
def test_what_cannot_be_annealed_is_refused(shortcut, estimator, share, message):
    _, model = base_and_adapted("llama", shortcut, 1, merge_estimator=estimator)
    with pytest.raises(ValueError, match=message):
        anneal_shortcuts(model, share)
    assert not any("lora_annealed" in name for name, _ in model.named_buffers())


def test_annealed_adapters_are_not_combined_into_one_with_shortcuts():
    _, model = weight_norm_model("input", 1)
    model.add_adapter("second", model.peft_config["default"])
    anneal_shortcuts(model, 1.0)
    with pytest.raises(ValueError, match=r"Adapter 'default' has been annealed.*save_as_lora"):
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "sum", combination_type="cat")


@pytest.mark.parametrize(("start", "end"), [(-0.1, 0.5), (0.5, 0.5), (0.5, 1.1)])
def test_a_schedule_that_cannot_be_is_refused(start, end):
    with pytest.raises(ValueError, match="must be fractions of training"):
        ShortcutAnnealing(start, end)
