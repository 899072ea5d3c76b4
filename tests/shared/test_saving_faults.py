"""Saving and loading where names, wrappers, engines and other programs get in between."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapters import TUNERS, adapted, config_of
from helpers.oracle import randomize_adapters, relative_error
from helpers.tiny_models import Block
from helpers.tolerances import EPS
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter, hotswap_adapter_from_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from peft_reslora import MoRAConfig, ResLoRAConfig, calibrate_merge
from peft_reslora.training.annealing import anneal_shortcuts

WIDTH = 7


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(WIDTH, WIDTH + 3) for _ in range(3))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def net_config(tuner: str, **fields: Any) -> ResLoRAConfig | MoRAConfig:
    window = {} if tuner == "mora" else {"norm_window": 4}
    return config_of(tuner, **{"r": 2, "target_modules": ["up", "down"], **window, **fields})


def net_with(tuner: str, base: nn.Module | None = None, **fields: Any) -> PeftModel:
    """An adapted net, its biases too of random values."""
    model = adapted(Net() if base is None else base, net_config(tuner, **fields))
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.ndim == 1:
            parameter.data += torch.randn(parameter.shape, generator=generator)
    return model


def inputs(seed: int = 5) -> torch.Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(seed))


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert relative_error(actual, expected) < 100 * EPS


# Names of adapters


BAD_NAMES = {
    "0": "part of the name of 'blocks.0'",
    "blocks": "part of the name",
    "up": "part of the name",
    "weight": "part of the name",
    "bias": "part of the name",
    "a.b": "without dots",
    "": "not empty",
    "keys": "containers have an attribute",
    "training": "containers have an attribute",
    "forward": "containers have an attribute",
    "base_layer": "(layers with adapters|part of the name)",
    "modules_to_save": "(layers with adapters|part of the name)",
    "original_module": "(layers with adapters|part of the name)",
    "model": "(layers with adapters|part of the name)",
}


@pytest.mark.parametrize("tuner", TUNERS)
@torch.no_grad()
def test_a_name_that_saving_could_not_tell_apart_is_refused(tuner: str, tmp_path: Path) -> None:
    own = ["mora_M", "mora_dropout", "mora_stamp"] if tuner == "mora" else ["lora_A", "lora_dropout", "lora_norm"]
    base, model = Net(), net_with(tuner)
    model.save_pretrained(tmp_path)
    expected, modules, bare = model(inputs()), list(model.modules()), list(base.modules())
    for name, message in {**BAD_NAMES, **dict.fromkeys(own, "layers with adapters")}.items():
        for act in (
            lambda name=name: get_peft_model(base, net_config(tuner), name),
            lambda name=name: inject_adapter_in_model(net_config(tuner), base, name),
            lambda name=name: model.add_adapter(name, net_config(tuner)),
            lambda name=name: model.load_adapter(tmp_path, name),
        ):
            with pytest.raises(ValueError, match=rf"cannot be called '{name}': .*{message}.*Choose another"):
                act()
            if hasattr(base, "peft_config"):
                del base.peft_config  # PEFT leaves it there, for any refusal
    assert list(base.modules()) == bare
    assert list(model.modules()) == modules
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(inputs()), expected)


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("name", ["lora", "other", "adapter0", "a b", "x-1_y", "10"])
@torch.no_grad()
def test_other_names_are_saved_and_loaded(tuner: str, name: str, tmp_path: Path) -> None:
    model = net_with(tuner)
    expected = model(inputs())
    model.add_adapter(name, net_config(tuner, r=3))
    randomize_adapters(model, seed=8)
    model.set_adapter(name)
    second = model(inputs())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Net(), tmp_path / name, name)
    assert_same(loaded(inputs()), second)
    loaded.load_adapter(tmp_path, "default")
    loaded.set_adapter("default")
    model.set_adapter("default")
    assert_same(loaded(inputs()), model(inputs()))
    assert relative_error(expected, second) > 0.01


# Wrappers


def compiled(block: nn.Module) -> nn.Module:
    return torch.compile(block, backend="eager")


WRAPPERS = {"compile": compiled, "checkpoint": checkpoint_wrapper}


@pytest.mark.quick(tuner=["block", "mora"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("tuner", TUNERS)
@torch.no_grad()
def test_wrapped_blocks_are_saved_by_their_bare_names(tuner: str, wrapper: str, when: str, tmp_path: Path) -> None:
    def wrap(net: nn.Module) -> nn.Module:
        net.blocks = nn.ModuleList(WRAPPERS[wrapper](block) for block in net.blocks)
        return net

    plain = net_with(tuner, bias="all", modules_to_save=["head"])
    expected, tensors = plain(inputs()), get_peft_model_state_dict(plain)
    wrapped = net_with(tuner, wrap(Net()) if when == "before" else None, bias="all", modules_to_save=["head"])
    if when == "after":
        wrap(wrapped.base_model.model)
    assert get_peft_model_state_dict(wrapped).keys() == tensors.keys()
    set_peft_model_state_dict(wrapped, tensors)
    assert_same(wrapped(inputs()), expected)
    wrapped.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved.keys() == tensors.keys()
    assert_same(PeftModel.from_pretrained(Net(), tmp_path)(inputs()), expected)
    assert_same(PeftModel.from_pretrained(wrap(Net()), tmp_path)(inputs()), expected)


class FSDPLike(nn.Module):
    """What FSDP1 does to names: parameters hold its part, the state dict does not."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._fsdp_wrapped_module, name)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self._fsdp_wrapped_module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._fsdp_wrapped_module.load_state_dict(*args, **kwargs)


@pytest.mark.parametrize("bias", ["none", "all", "only"])
@pytest.mark.parametrize("tuner", TUNERS)
@torch.no_grad()
def test_a_model_under_fsdp_is_saved_and_loaded(tuner: str, bias: str) -> None:
    bias = {"only": "mora_only" if tuner == "mora" else "lora_only"}.get(bias, bias)
    model = net_with(tuner, bias=bias, modules_to_save=["head"])
    expected, tensors = model(inputs()), get_peft_model_state_dict(model)
    wrapped = FSDPLike(model)
    found = get_peft_model_state_dict(wrapped)
    assert found.keys() == tensors.keys()
    found = {key: tensor.clone() for key, tensor in found.items()}
    other = net_with(tuner, bias=bias, modules_to_save=["head"])
    for parameter in other.parameters():
        if parameter.requires_grad:
            parameter.zero_()
    result = set_peft_model_state_dict(FSDPLike(other), found)
    assert not result.unexpected_keys
    assert_same(other(inputs()), expected)


def test_a_state_dict_of_parameters_alone_is_completed(tmp_path: Path) -> None:
    """As training scripts for DeepSpeed and FSDP collect it."""
    for tuner in TUNERS:
        model = net_with(tuner)
        model.train()(inputs())
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        model.save_pretrained(tmp_path / tuner, state_dict=parameters)
        loaded = PeftModel.from_pretrained(Net(), tmp_path / tuner)
        assert_same(loaded(inputs()), model.eval()(inputs()))
        some = dict(list(parameters.items())[1:])
        with pytest.raises(ValueError, match=r"on layer '.*blocks\.0\.up' is not in the state dict"):
            model.save_pretrained(tmp_path / "some", state_dict=some)
        model.save_pretrained(tmp_path / "none", state_dict={})  # a process that is not the first


# What else is saved with an adapter


@pytest.mark.parametrize("bias", ["all", "only", "none"])
@pytest.mark.parametrize("tuner", TUNERS)
@torch.no_grad()
def test_biases_and_whole_modules_come_back(tuner: str, bias: str, tmp_path: Path) -> None:
    bias = {"only": "mora_only" if tuner == "mora" else "lora_only"}.get(bias, bias)
    model = net_with(tuner, bias=bias, modules_to_save=["head"])
    model.save_pretrained(tmp_path)
    expected = model(inputs())
    assert_same(PeftModel.from_pretrained(Net(), tmp_path)(inputs()), expected)
    injected = inject_adapter_in_model(net_config(tuner, bias=bias, modules_to_save=["head"]), Net())
    tensors = load_file(tmp_path / "adapter_model.safetensors")  # PEFT finds whole modules by keys without a prefix
    set_peft_model_state_dict(injected, {k.removeprefix("base_model.model."): t for k, t in tensors.items()})
    assert_same(injected.eval()(inputs()), expected)


@pytest.mark.parametrize("tuner", TUNERS)
def test_what_peft_would_drop_is_refused(tuner: str, tmp_path: Path) -> None:
    model = net_with(tuner, bias="all", modules_to_save=["head"])
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    for key in ("neck.weight", "blocks.7.up.base_layer.bias"):
        save_file({**tensors, f"base_model.model.{key}": torch.ones(3)}, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=rf"1 not in the model: {key}"):
            PeftModel.from_pretrained(Net(), tmp_path)


# Combinations


@pytest.mark.parametrize("combination", ["linear", "cat"])
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("shortcut", ["input", "block"])
@torch.no_grad()
def test_a_combination_of_adapters_with_a_rank_pattern_loads(
    shortcut: str, use_rslora: bool, combination: str, tmp_path: Path
) -> None:
    fields = {"rank_pattern": {"blocks.1.up": 1, "down": 1}, "alpha_pattern": {"down": 3}, "use_rslora": use_rslora}
    model = net_with(shortcut, **fields)
    model.add_adapter("second", net_config(shortcut, **fields))
    randomize_adapters(model, seed=4)
    model.add_weighted_adapter(["default", "second"], [0.7, 0.6], "both", combination_type=combination)
    model.set_adapter("both")
    expected = model(inputs())
    assert relative_error(expected, Net()(inputs())) > 0.01
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    assert_same(PeftModel.from_pretrained(Net(), tmp_path / "both")(inputs()), expected)


def test_a_combination_of_calibrated_adapters_is_not_calibrated(tmp_path: Path) -> None:
    model = net_with("input")
    model.add_adapter("second", net_config("input"))
    randomize_adapters(model, seed=4)
    calibrate_merge(model, [{"x": torch.randn(30, 2, WIDTH)}], ridge=0.1)
    model.add_weighted_adapter(["default", "second"], [0.7, 0.6], "both", combination_type="cat")
    assert model.peft_config["default"].estimate == "calibrated"
    assert model.peft_config["both"].estimate is None
    model.set_adapter("both")
    with pytest.raises(ValueError, match="needs a calibrated adapter"):
        model.merge_adapter()
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    PeftModel.from_pretrained(Net(), tmp_path / "both")


# Hotswapping


@pytest.mark.parametrize("tuner", TUNERS)
@torch.no_grad()
def test_hotswapping_is_refused(tuner: str, tmp_path: Path) -> None:
    model = net_with(tuner)
    model.save_pretrained(tmp_path)
    expected = model(inputs())
    with pytest.raises(ValueError, match="Hotswapping only supports"):
        hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    named = {key.replace(".weight", ".default.weight"): tensor * 2 for key, tensor in tensors.items()}
    with pytest.raises((RuntimeError, KeyError)):
        hotswap_adapter_from_state_dict(model, named, "default", net_config(tuner))
    assert torch.equal(model(inputs()), expected)


# Numbers that are none


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_memory_that_was_not_written_is_no_record(device: str) -> None:
    model = net_with("input")
    model.train()(inputs())
    assert sum(int((layer.lora_norm["default"] >= 0).sum()) for layer in layers(model)) == 6
    moved = copy.deepcopy(model).to(torch.float64).to("cpu")
    assert sum(int((layer.lora_norm["default"] >= 0).sum()) for layer in layers(moved)) == 6
    if device == "meta":
        model.to("meta")
    model.to_empty(device="cpu")
    assert all((layer.lora_norm["default"] == -1).all() for layer in layers(model))
    for parameter in model.parameters():
        parameter.data.normal_()
    with pytest.raises(ValueError, match="has no norms recorded"):
        model.merge_adapter()


def test_an_estimate_that_was_emptied_is_none() -> None:
    model = net_with("middle")
    calibrate_merge(model, [{"x": torch.randn(30, 2, WIDTH)}], ridge=0.1)
    saved = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.to_empty(device="cpu")
    assert all(layer.lora_shortcut["default"].isnan().all() for layer in layers(model) if layer.lora_shortcut)
    model.load_state_dict(saved)
    model.merge_adapter()


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_norm")]


# An adapter that shares the config of another, as TRL's trainers make their reference


@torch.no_grad()
def test_an_adapter_with_the_config_of_an_annealed_one_is_not_used_without_its_estimate() -> None:
    model = net_with("input")
    model.train()(inputs())
    anneal_shortcuts(model.eval(), 1.0)
    expected = model(inputs())
    model.add_adapter("reference", model.peft_config["default"])
    model.set_adapter("reference")
    with pytest.raises(RuntimeError, match="was annealed, and no estimate was loaded"):
        model(inputs())
    set_peft_model_state_dict(model, get_peft_model_state_dict(model, adapter_name="default"), "reference")
    assert_same(model(inputs()), expected)


@torch.no_grad()
def test_going_back_to_before_the_annealing(tmp_path: Path) -> None:
    """As `load_best_model_at_end` does."""
    model = net_with("input")
    model.train()(inputs())
    model.eval().save_pretrained(tmp_path / "before")
    before = model(inputs())
    anneal_shortcuts(model, 1.0)
    model.save_pretrained(tmp_path / "after")
    after = model(inputs())
    assert json.loads((tmp_path / "after" / "adapter_config.json").read_text())["estimate"] == "annealed"
    assert json.loads((tmp_path / "before" / "adapter_config.json").read_text())["estimate"] is None
    for folder, expected in (("before", before), ("after", after), ("before", before)):
        model.load_adapter(tmp_path / folder, "default")
        assert_same(model(inputs()), expected)
    assert model.peft_config["default"].estimate is None


@pytest.mark.parametrize("tuner", ["middle", "mora"])
@torch.no_grad()
def test_a_model_that_waits_for_stamps_is_compiled_and_copied(tuner: str) -> None:
    """One that was made with the config of a saved adapter."""
    config = net_config(tuner)
    config.stamped = True
    model = adapted(Net(), config)
    assert any(name.endswith(("lora_magnitude_vector.default", "mora_stamp.default")) for name in model.state_dict())
    copied = copy.deepcopy(model)
    run = torch.compile(model, backend="eager", fullgraph=True)
    expected = copied(inputs())
    assert_same(run(inputs()), expected)
    assert_same(model(inputs()), expected)
    for used in (copied, model):
        assert not any(
            name.endswith(("lora_magnitude_vector.default", "mora_stamp.default")) for name in used.state_dict()
        )
        assert not any(module._forward_pre_hooks for module in used.modules() if hasattr(module, "base_layer"))
