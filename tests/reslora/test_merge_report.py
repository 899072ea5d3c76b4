"""What a merge costs: the report against merges done by hand, and that it leaves the model alone."""

from __future__ import annotations

import builtins
import copy
import json
import logging
import math

import pytest
import torch
from helpers.adapters import ESTIMATED, base_and_adapted
from helpers.calibration import batches_of, divergence, log_probabilities, record_norms
from helpers.oracle import randomize_adapters, relative_error
from helpers.tiny_models import TINY_MODELS, bert, output_of
from helpers.tolerances import MODEL64, rounding
from peft import PeftModel, get_peft_model
from torch import nn

from peft_reslora import ResLoRAConfig
from peft_reslora.reslora import calibrate_merge, merge_report
from peft_reslora.reslora.merging.anneal import anneal_shortcuts
from peft_reslora.reslora.merging.report import _Output, _Sums

pytestmark = pytest.mark.usefixtures("float64")


def labeled() -> list[dict[str, torch.Tensor]]:
    return [
        {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}
        for batch in batches_of()
    ]


def ready(shortcut: str, pre_num: int, **fields: object) -> nn.Module:
    _, model = base_and_adapted("llama", shortcut, pre_num, **fields)
    record_norms(model, TINY_MODELS["llama"].batches(3))
    calibrate_merge(model, batches_of(8))
    return model


@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_an_annealed_share_is_no_error_of_a_layer(shortcut: str) -> None:
    """The layers' errors are those of the forward as it is: the whole with no share, the rest, none at 1."""
    model = ready(shortcut, 1)
    errors = []
    for share in (0.0, 0.75, 1.0):
        anneal_shortcuts(model, share)
        costs = merge_report(model, batches_of()).costs
        errors.append(max(costs["exact" if share == 1.0 else "input_norm"].layers.values()))
    assert errors[0] > errors[1] > 0.01
    assert errors[2] <= MODEL64


@pytest.mark.parametrize(("shortcut", "pre_num"), ESTIMATED)
def test_the_report_agrees_with_merges_by_hand(shortcut, pre_num):
    model, batches = ready(shortcut, pre_num), labeled()
    report = merge_report(model, batches)
    assert report.rounded
    assert not report.exact
    expected = log_probabilities(model, batches)
    for estimator, cost in report.costs.items():
        model.peft_config["default"].merge_estimator = estimator
        merged = copy.deepcopy(model).merge_and_unload()
        # The report puts an estimate, which is float32, in place of the shortcut.
        bound = MODEL64 if estimator == "drop" else rounding(model, torch.float32)
        assert math.isclose(cost.kl, divergence(merged, expected, batches), rel_tol=bound)
        kept = (log_probabilities(merged, batches).argmax(-1) == expected.argmax(-1)).double().mean()
        assert math.isclose(cost.agreement, float(kept))
        for loss, which in zip(cost.loss, (model, merged), strict=True):
            with torch.no_grad():
                by_hand = sum(float(which(**batch).loss) for batch in batches) / len(batches)
            assert math.isclose(loss, by_hand, rel_tol=bound)
    assert report.costs["least_squares"].kl == min(cost.kl for cost in report.costs.values())


def test_the_error_of_a_layer_is_that_of_its_update():
    """The second layer of the first chain has the unmerged model's inputs in both models: its error can be seen."""
    model = get_peft_model(
        bert(), ResLoRAConfig(r=3, target_modules=["query"], shortcut="input", merge_estimator="drop")
    )
    randomize_adapters(model).eval()
    name = "bert.encoder.layer.1.attention.self.query"
    layer = model.get_submodule(f"base_model.model.{name}")
    seen = []
    layer.register_forward_hook(
        lambda module, args, output: seen.append((args[0], output - module.base_layer(args[0])))
    )
    batch = {**batches_of(1)[0], "attention_mask": torch.ones(4, 9, dtype=torch.long)}
    with torch.no_grad():
        model(**batch)
    x, update = seen[0]
    layers = merge_report(model, [batch], estimators="drop").costs["drop"].layers
    assert math.isclose(layers[name], relative_error(x @ layer.get_delta_weight("default").T, update), rel_tol=MODEL64)
    assert layers["bert.encoder.layer.0.attention.self.query"] == 0.0
    assert list(layers) == [f"bert.encoder.layer.{n}.attention.self.query" for n in range(4)]


@pytest.mark.parametrize(("shortcut", "pre_num"), ESTIMATED)
def test_an_adapter_is_saved_after_a_report_as_before(shortcut, pre_num, tmp_path):
    base, model = base_and_adapted("llama", shortcut, pre_num)
    record_norms(model, TINY_MODELS["llama"].batches(3))
    inputs = TINY_MODELS["llama"].inputs()
    expected = output_of(model, inputs)
    merge_report(model, labeled())
    assert model.peft_config["default"].estimate is None
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert relative_error(output_of(loaded, inputs), expected) < MODEL64


def test_the_model_is_left_as_it_came():
    model = ready("middle", -1)
    model.train()
    hooks = [dict(module._forward_pre_hooks) for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merge_report(model, labeled())
    assert model.training
    assert [dict(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert model.state_dict().keys() == state.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert model.peft_config["default"].merge_estimator == "least_squares"


def test_beside_another_active_adapter_the_merge_is_simulated():
    model = ready("input", 1)
    second = ResLoRAConfig(r=2, target_modules=["q_proj"], shortcut="block")
    model.add_adapter("second", second)
    randomize_adapters(model, seed=3)
    model.base_model.set_adapter(["default", "second"])
    report = merge_report(model, labeled(), estimators="drop")
    assert not report.rounded
    expected = log_probabilities(model, labeled())
    model.peft_config["default"].merge_estimator = "drop"
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=["default", "second"])
    assert math.isclose(report.costs["drop"].kl, divergence(merged, expected, labeled()), rel_tol=MODEL64)


@pytest.mark.parametrize("pre_num", [1, -1])
def test_block_is_exact(pre_num):
    _, model = base_and_adapted("llama", "block", pre_num)
    report = merge_report(model, labeled())
    assert report.exact
    assert list(report.costs) == ["exact"]
    assert report.costs["exact"].kl < MODEL64
    assert "the merge is exact" in str(report)


def test_the_divergence_of_float32_logits_is_that_of_the_logits_and_not_of_its_own_rounding():
    """Logits some roundings apart: about 1e-12, of which a sum in float32 would make about 1e-8."""
    expected = 3 * torch.randn(7, 9, 53, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    actual = expected * (1 + 2**-20)
    p, q = (logits.double().log_softmax(-1) for logits in (expected, actual))
    by_hand = float((p.exp() * (p - q)).sum(-1).mean())
    sums = _Sums()
    outputs = (_Output(logits, None) for logits in (expected, actual))
    sums.add_output(*outputs, torch.ones(63, dtype=torch.bool))
    assert 0 < by_hand < 1e-10
    assert math.isclose(sums.cost([]).kl, by_hand, rel_tol=1e-2)


def test_estimators_without_data_are_listed_and_a_single_one_raises():
    _, model = base_and_adapted("llama", "input", 1)
    report = merge_report(model, batches_of())
    assert report.costs.keys() == {"weight_norm", "drop"}
    assert report.unavailable.keys() == {"input_norm", "least_squares"}
    assert report.costs["drop"].loss is None
    assert "least_squares: not available. " in str(report)
    with pytest.raises(ValueError, match=r"calibrate_merge\(model, batches\)"):
        merge_report(model, batches_of(), estimators="least_squares")


def test_table_dictionary_and_picture(tmp_path):
    report = merge_report(ready("input", 1), labeled(), estimators=["drop", "least_squares"])
    header, *rows = str(report).splitlines()[1:]
    assert header.split()[:2] == ["estimator", "layer"]
    assert [row.split()[0] for row in rows[1:]] == ["drop", "least_squares"]
    assert json.loads(json.dumps(report.to_dict()))["costs"]["drop"]["kl"] == report.costs["drop"].kl
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_matplotlib_names_the_extra(monkeypatch, tmp_path):
    report = merge_report(ready("input", 1), labeled(), estimators="drop")
    real = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'peft_reslora\[demo\]'"):
        report.plot(tmp_path / "report.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"estimators": ["norm"]},
            r"\['norm'\] are unknown, choose from input_norm, weight_norm, least_squares, drop",
        ),
        ({"batches": []}, "got no batches"),
        ({"adapter_name": "other"}, "no ResLoRA adapter 'other'"),
    ],
)
def test_what_cannot_be_reported_is_refused(arguments, message):
    _, model = base_and_adapted("llama", "input", 1)
    with pytest.raises(ValueError, match=message):
        merge_report(model, **{"batches": batches_of(), **arguments})


def test_models_without_logits_are_refused():
    model = get_peft_model(
        TINY_MODELS["llama"].make().model, ResLoRAConfig(target_modules=["q_proj"], shortcut="input")
    )
    with pytest.raises(ValueError, match=r"needs an output with `\.logits`.*returned BaseModelOutputWithPast"):
        merge_report(model, batches_of(), estimators="drop")


@pytest.mark.parametrize(
    ("shortcut", "message"),
    [("block", "(shortcut='block') exactly."), ("input", "by merge_estimator='drop', an estimate on 21 layers")],
)
def test_a_merge_logs_one_line(shortcut, message, caplog):
    _, model = base_and_adapted("llama", shortcut, 1, merge_estimator="drop")
    with caplog.at_level(logging.INFO, logger="peft_reslora"):
        model.merge_and_unload()
    assert len(caplog.messages) == 1
    assert message in caplog.messages[0]
    assert output_of(model, TINY_MODELS["llama"].inputs()).isfinite().all()
