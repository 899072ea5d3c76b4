"""Merging where it used to go wrong without a word: each case against a dense computation in float64."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers.adapters import ONE_OR_ALL, adapted, config_of, tuner_layers
from helpers.calibration import record_norms
from helpers.oracle import relative_error
from helpers.tiny_models import NARROW_IDS, narrow_llama
from peft import PeftModel
from torch import nn

from peft_reslora import calibrate_merge, export_lora, merge_report
from peft_reslora.reslora.layer import Linear
from peft_reslora.training.annealing import anneal_shortcuts
from peft_reslora.training.restarts import merge_and_restart

TARGETS = ["q_proj", "o_proj", "up_proj"]


def adapted_llama(
    tuner: str, pre_num: int = 1, layers: int = 3, dtype: torch.dtype = torch.float32, **fields: Any
) -> PeftModel:
    chain = {} if tuner == "mora" else {"pre_num": pre_num}
    config = config_of(tuner, r=2, target_modules=TARGETS, **chain, **fields)
    return adapted(narrow_llama(layers).to(dtype), config)


def batches(count: int = 6) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(1, 17, (4, 9), generator=generator)} for _ in range(count)]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("shortcut", "pre_num"), ONE_OR_ALL)
def test_each_layer_knows_whether_its_merge_is_exact(shortcut, pre_num, share):
    """What a layer says of itself is what comparing its output, unmerged and merged, at one input shows."""
    model = adapted_llama(shortcut, pre_num, merge_estimator="drop")
    if shortcut != "block":
        anneal_shortcuts(model, share)
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    layers = tuner_layers(model)
    for name, layer in layers.items():
        layer.register_forward_hook(lambda m, args, output, name=name: seen.update({name: (args[0], output)}))
    with torch.no_grad():
        model.double()(input_ids=NARROW_IDS)
    for name, layer in layers.items():
        x, output = seen[name]
        delta = layer.get_delta_weight("default")
        missed = (output - layer.base_layer(x) - x @ delta.T).norm() / (x @ delta.T).norm()
        chain, position = layer.chain_of("default")
        exact, _ = chain.merge().exactness[position]
        assert (missed < 1e-6) == exact, name
        assert exact == (shortcut == "block" or share == 1.0 or ".layers.0." in f".{name}")


# Global settings of torch's, under which a merge has to be what it is without them.


@contextmanager
def matmul_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float16)
    try:
        yield
        assert torch.get_default_dtype() == torch.float16
    finally:
        torch.set_default_dtype(torch.float32)


SETTINGS: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference_mode": torch.inference_mode,
    "default_dtype": default_dtype,
    "matmul_precision": matmul_precision,
}


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if ".lora_" not in name and ".mora_" not in name}


def buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer for name, buffer in model.named_buffers() if ".lora_" in name}


def merge(model: nn.Module) -> dict[str, torch.Tensor]:
    before = {name: p.clone() for name, p in base_weights(model).items()}
    model.merge_adapter()
    merged = {name: p.clone() for name, p in base_weights(model).items()}
    assert not any(p.is_inference() for p in base_weights(model).values())
    model.unmerge_adapter()
    for name, p in base_weights(model).items():
        assert p.dtype == torch.float32
        assert torch.equal(p, before[name])
    return merged


def unload(model: nn.Module) -> dict[str, torch.Tensor]:
    merged = dict(model.merge_and_unload().named_parameters())
    assert not any(p.is_inference() for p in merged.values())
    return merged


def deltas(model: nn.Module) -> dict[str, torch.Tensor]:
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    return {name: layer.get_delta_weight("default") for name, layer in layers.items()}


def export(model: nn.Module) -> dict[str, torch.Tensor]:
    return export_lora(model, rank=12 if "mora" in str(model).lower() else None).state_dict


def restart(model: nn.Module) -> dict[str, torch.Tensor]:
    merge_and_restart(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), seed=3)
    return dict(model.named_parameters())


def calibrate(model: nn.Module) -> dict[str, torch.Tensor]:
    calibrate_merge(model, batches())
    assert not any(buffer.is_inference() for buffer in buffers(model).values())
    return buffers(model)


def anneal(model: nn.Module) -> dict[str, torch.Tensor]:
    model.peft_config["default"].merge_estimator = "weight_norm"
    anneal_shortcuts(model, 0.3)
    assert all(buffer.dtype == torch.float32 for buffer in buffers(model).values())
    return buffers(model)


def report(model: nn.Module) -> dict[str, torch.Tensor]:
    before = {name: p.clone() for name, p in base_weights(model).items()}
    estimator = None if "mora" in str(model).lower() else "weight_norm"
    found = merge_report(model, batches(2), estimators=estimator)
    for name, p in base_weights(model).items():
        assert p.dtype == torch.float32
        assert torch.equal(p, before[name])
    cost = next(iter(found.costs.values()))
    return {"layers": torch.tensor([*cost.layers.values(), cost.kl, cost.agreement], dtype=torch.float64)}


CASES = [
    *((tuner, action) for tuner in ("block", "middle", "mora") for action in (merge, unload)),
    *((tuner, restart) for tuner in ("block", "mora")),
    *(("middle", action) for action in (deltas, export, anneal, report)),
    *((tuner, calibrate) for tuner in ("input", "middle")),
]


@pytest.mark.quick(tuner=["middle", "mora"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("tuner", "action"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_global_settings_change_no_merge(tuner, action, setting):
    """Autocast used to turn the base weights into bfloat16 for good, and to round what is merged and calibrated."""
    if tuner == "mora" and action is restart:
        kwargs = {"mora_type": "sharing"}
    else:
        kwargs = {} if tuner == "mora" else {"merge_estimator": "weight_norm"}
    expected = action(adapted_llama(tuner, **kwargs))
    model = adapted_llama(tuner, **kwargs)
    with SETTINGS[setting]():
        actual = action(model)
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor.nan_to_num(), expected[name].nan_to_num()), name


# What does not fit.


def factor_of(layer: Any) -> torch.Tensor:
    return layer.mora_M["default"] if hasattr(layer, "mora_M") else layer.lora_A["default"].weight


@pytest.mark.parametrize("safe_merge", [True, False])
@pytest.mark.parametrize("tuner", ["input", "block", "middle", "mora"])
def test_a_merge_that_overflows_is_refused_before_anything_is_changed(tuner, safe_merge):
    """The last layer overflows in float16, by a finite adapter."""
    model = adapted_llama(tuner, dtype=torch.float16, **({} if tuner == "mora" else {"merge_estimator": "drop"}))
    layer = model.get_base_model().model.layers[2].mlp.up_proj
    with torch.no_grad():
        layer.base_layer.weight[0] = 60000.0
        factor_of(layer).mul_(3e5)
    before = {name: (p, p.clone()) for name, p in model.named_parameters()}
    message = (
        r"Merging adapter 'default' would make \d+ of 240 entries of the weight of layer 'model\.layers\.2\.mlp\.up"
    )
    words = r"^NaNs detected in the merged weights\. The adapter default seems to be broken\. " if safe_merge else "^"
    for action in (model.merge_adapter, model.merge_and_unload, layer.merge):
        with pytest.raises(ValueError, match=words + message):
            action(safe_merge=safe_merge)
        for name, (parameter, value) in before.items():
            assert model.get_parameter(name) is parameter
            assert torch.equal(parameter, value)
    assert not layer.merged
    model.float().merge_adapter()  # there it fits
    assert layer.base_layer.weight.isfinite().all()


@pytest.mark.parametrize("tuner", ["block", "mora"])
def test_a_broken_base_weight_is_not_blamed_on_the_adapter(tuner):
    model = adapted_llama(tuner, dtype=torch.float16)
    layer = model.get_base_model().model.layers[1].mlp.up_proj
    with torch.no_grad():
        layer.base_layer.weight[0, 0] = torch.inf
        factor_of(layer).mul_(100)
    with pytest.raises(ValueError, match=r"layer 'model\.layers\.1\.mlp\.up_proj' holds NaN or inf already"):
        model.merge_adapter()


@pytest.mark.parametrize("tuner", ["block", "mora"])
def test_an_adapter_that_is_not_there_is_not_merged_as_nothing(tuner):
    model = adapted_llama(tuner)
    for action in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"no adapter 'defualt' to merge; the model has 'default'"):
            action(adapter_names=["defualt"])


@pytest.mark.parametrize("tuner", ["block", "mora"])
def test_a_merge_that_fails_half_way_is_undone(tuner, monkeypatch):
    model = adapted_llama(tuner)
    before = {name: (p, p.clone()) for name, p in model.named_parameters()}
    layers = [m for m in model.modules() if hasattr(m, "get_delta_weight")]
    kind, calls = type(layers[0]), []
    original = kind.merge

    def fails(self: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(self)
        if len(calls) == 4:
            raise MemoryError
        original(self, *args, **kwargs)

    monkeypatch.setattr(kind, "merge", fails)
    with pytest.raises(MemoryError):
        model.merge_adapter()
    for name, (parameter, value) in before.items():
        assert model.get_parameter(name) is parameter
        assert torch.equal(parameter, value)
    assert not any(layer.merged for layer in layers)


# merge_report.


@pytest.mark.parametrize("estimators", [None, "input_norm"])
def test_merge_report_knows_a_merge_that_overflows(estimators):
    """It reported a KL of 0 and an agreement of 1."""
    model = adapted_llama("input", dtype=torch.float16)
    record_norms(model, [{"input_ids": NARROW_IDS}])
    for position, norm in ((0, 1e4), (1, 1e-4)):
        model.get_base_model().model.layers[position].self_attn.o_proj.lora_norm["default"].fill_(norm)
    message = (
        r"Merging adapter 'default' would make .* of layer 'model\.layers\.1\.self_attn\.o_proj' NaN or inf in float16"
    )
    if estimators is not None:
        with pytest.raises(ValueError, match=message):
            merge_report(model, batches(1), estimators=estimators)
        return
    found = merge_report(model, batches(1))
    assert set(found.costs) == {"weight_norm", "drop"}
    assert re.search(message, found.unavailable["input_norm"])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_merge_report_refuses_outputs_that_are_no_numbers(value):
    model = adapted_llama("middle", merge_estimator="drop")
    with torch.no_grad():
        model.get_base_model().lm_head.weight[3, 4] = value
    with pytest.raises(ValueError, match="logits of the unmerged model hold NaN or inf"):
        merge_report(model, batches(1), estimators="drop")


def test_merge_report_takes_classes_that_are_ruled_out():
    model = adapted_llama("middle", merge_estimator="drop")
    expected = merge_report(model, batches(2), estimators="drop").costs["drop"]

    def rule_out(module: nn.Module, args: Any, logits: torch.Tensor) -> torch.Tensor:
        return torch.cat((logits, torch.full_like(logits[..., :2], -torch.inf)), -1)

    model.get_base_model().lm_head.register_forward_hook(rule_out)
    actual = merge_report(model, batches(2), estimators="drop").costs["drop"]
    assert actual.kl > 0.0
    assert abs(actual.kl / expected.kl - 1) < 1e-4
    assert actual.agreement == expected.agreement


def test_merge_report_leaves_out_padding_and_says_when_nothing_is_left():
    model = adapted_llama("middle", merge_estimator="drop")
    ids = NARROW_IDS
    seen = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    padding = {"input_ids": ids, "attention_mask": torch.zeros_like(ids), "labels": torch.full_like(ids, -100)}
    expected = merge_report(model, [seen], estimators="drop").costs["drop"]
    assert merge_report(model, [padding, seen], estimators="drop").costs["drop"] == expected
    for nothing in ([padding], []):
        with pytest.raises(ValueError, match=r"no batches, or nothing but padding"):
            merge_report(model, nothing, estimators="drop")


# Calibration.


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize(("shortcut", "pre_num"), [("input", 1), ("middle", 1), ("middle", -1)])
def test_a_calibration_is_stale_if_any_layer_of_the_chain_has_changed(shortcut, pre_num, position, tmp_path):
    model = adapted_llama(shortcut, pre_num)
    calibrate_merge(model, batches())
    model.save_pretrained(tmp_path)
    changed = model.get_base_model().model.layers[position].mlp.up_proj
    with torch.no_grad():
        changed.lora_A["default"].weight.mul_(1.1)
    for action in (model.merge_adapter, lambda: export_lora(model)):
        with pytest.raises(
            ValueError, match=rf"factors of layer 'model\.layers\.{position}\.mlp\.up_proj' have changed"
        ):
            action()


def test_calibrations_of_the_first_release_are_merged_and_loaded(tmp_path):
    """They have no sketch for the first layer of a chain."""
    from safetensors.torch import load_file, save_file

    model = adapted_llama("middle")
    calibrate_merge(model, batches())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(narrow_llama(), tmp_path)
    expected = deltas(model)
    assert all(torch.equal(delta, expected[name]) for name, delta in deltas(loaded).items())
    first = loaded.get_base_model().model.layers[0].mlp.up_proj
    assert "default" in first.lora_calibrated
    assert "default" not in first.lora_shortcut
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors = {key: t for key, t in tensors.items() if not key.endswith("lora_magnitude_vector")}  # the stamps
    old = {key: t for key, t in tensors.items() if ".layers.0." not in key or not key.endswith("lora_calibrated")}
    assert len(old) == len(tensors) - len(TARGETS)
    save_file(old, tmp_path / "old", metadata={"format": "pt"})
    (tmp_path / "old").replace(file)
    assert all(torch.equal(delta, expected[n]) for n, delta in deltas(_unsealed(narrow_llama(), tmp_path)).items())


def _unsealed(base: nn.Module, folder: Any) -> nn.Module:
    import json

    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "stamped"}))
    return PeftModel.from_pretrained(base, folder)


def test_annealing_after_a_calibration_leaves_none_that_could_be_stale():
    model = adapted_llama("middle")
    calibrate_merge(model, batches())
    anneal_shortcuts(model, 0.5)
    assert not any(len(layer.lora_calibrated) for layer in tuner_layers(model).values())
    with torch.no_grad():
        for layer in tuner_layers(model).values():
            layer.lora_A["default"].weight.mul_(1.5)
    model.merge_adapter()


# One merge per chain.


@pytest.mark.parametrize("way", ["merge_adapter", "merge_and_unload", "export", "report", "anneal"])
@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_each_base_weight_is_read_once(shortcut, way, monkeypatch):
    """weight_norm reads the weights of all earlier layers, and did so again for every layer."""
    model = adapted_llama(shortcut, layers=6, merge_estimator="weight_norm")
    reads: Counter[int] = Counter()
    read = Linear.unmerged_base_weight

    def counted(self: Linear) -> torch.Tensor:
        reads[id(self)] += 1
        return read(self)

    monkeypatch.setattr(Linear, "unmerged_base_weight", counted)
    actions: dict[str, Callable[[], Any]] = {
        "merge_adapter": model.merge_adapter,
        "merge_and_unload": model.merge_and_unload,
        "export": lambda: export_lora(model),
        "report": lambda: merge_report(model, batches(1), estimators="weight_norm"),
        "anneal": lambda: anneal_shortcuts(model, 0.5),
    }
    actions[way]()
    assert len(reads) == 5 * len(TARGETS)  # those of all layers but each chain's last
    assert set(reads.values()) == {1}


@pytest.mark.parametrize("way", ["export", "restart"])
def test_the_factors_of_a_chain_are_read_once(way, monkeypatch):
    from peft_reslora.reslora.linked_chain import Chain

    model = adapted_llama("block", -1)
    calls: Counter[int] = Counter()
    blocks = Chain.blocks

    def counted(self: Chain) -> Any:
        calls[id(self)] += 1
        return blocks(self)

    monkeypatch.setattr(Chain, "blocks", counted)
    export(model) if way == "export" else restart(model)
    assert len(calls) == len(TARGETS)
    assert set(calls.values()) == {1}


@pytest.mark.parametrize(("shortcut", "pre_num"), ONE_OR_ALL)
def test_planned_and_unplanned_delta_weights_are_the_same_in_float64(shortcut, pre_num):
    model = adapted_llama(shortcut, pre_num, merge_estimator="weight_norm")
    alone = deltas(model)
    exported = export_lora(model).state_dict
    for name, delta in alone.items():
        lora_a, lora_b = (exported[f"{name}.lora_{f}.weight"].double() for f in "AB")
        assert relative_error(lora_b @ lora_a, delta) < 1e-5
    merged = copy.deepcopy(model).merge_and_unload()
    for name, delta in alone.items():
        name = name.removeprefix("base_model.model.")
        weight = narrow_llama().get_submodule(name).weight.double()
        assert relative_error(merged.get_submodule(name).weight.double() - weight, delta) < 1e-5
