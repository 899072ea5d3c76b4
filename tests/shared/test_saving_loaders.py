"""Every program that loads a native adapter gets the adapter that was saved, or an error; and so does who takes it for
a LoRA."""

from __future__ import annotations

import atexit
import copy
import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapters import adapted, config_of
from helpers.calibration import record_norms
from helpers.consumers import CONSUMERS, Refused
from helpers.exports import read_folder
from helpers.oracle import randomize_adapters, relative_error
from helpers.tiny_models import TINY_MODELS, output_of
from helpers.tolerances import EPS
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from peft_reslora import MoRAConfig, ResLoRAConfig, calibrate_merge
from peft_reslora.shared.saving import seal
from peft_reslora.training.annealing import anneal_shortcuts

TINY = TINY_MODELS["llama"]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LORA = "pytorch_lora_weights.safetensors"
KINDS = ["input", "block", "middle", "middle-calibrated", "middle-annealed", "mora", "input-annealed"]


def config_of_kind(kind: str) -> PeftConfig:
    fields = {} if kind == "mora" else {"norm_window": 4, "lora_alpha": 7}
    return config_of(kind.split("-")[0], r=3, target_modules=["q_proj", "v_proj", "down_proj"], **fields)


@functools.cache
def _prepared(kind: str) -> tuple[Path, nn.Module, dict[str, Any], torch.Tensor]:
    folder = Path(tempfile.mkdtemp(prefix="saved-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    torch.manual_seed(0)
    base = TINY.make()
    base.save_pretrained(folder / "base")
    model = adapted(base, config_of_kind(kind))
    if kind not in ("mora", "block"):
        record_norms(model, TINY.batches(1))
    batches = TINY.batches(4)
    if kind.endswith("calibrated"):
        calibrate_merge(model, batches, ridge=1e-2)
    if kind.endswith("annealed"):
        anneal_shortcuts(model, 0.75)
    inputs = TINY.inputs()
    with torch.no_grad():
        expected = output_of(model, inputs)
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapter")
    return folder, model, inputs, expected


def saved(kind: str, folder: Path) -> tuple[nn.Module, nn.Module, dict[str, Any], torch.Tensor]:
    """A bare base, the adapted model that was saved to `folder`/adapter, inputs, and its output for them."""
    prepared, model, inputs, expected = _prepared(kind)
    shutil.copytree(prepared / "adapter", folder / "adapter")
    return TINY.make(), copy.deepcopy(model), inputs, expected


def by_peft(folder: Path, base: nn.Module) -> nn.Module:
    return PeftModel.from_pretrained(base, folder)


def by_peft_on_meta(folder: Path, base: nn.Module) -> nn.Module:
    return PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True)


def by_peft_with_a_config(folder: Path, base: nn.Module) -> nn.Module:
    return PeftModel.from_pretrained(base, folder, config=PeftConfig.from_pretrained(folder))


def by_peft_over_another(folder: Path, base: nn.Module) -> nn.Module:
    model = get_peft_model(base, PeftConfig.from_pretrained(folder))
    model.load_adapter(folder, "default")
    return model


def by_hand(folder: Path, base: nn.Module) -> nn.Module:
    inject_adapter_in_model(PeftConfig.from_pretrained(folder), base)
    set_peft_model_state_dict(base, load_file(folder / WEIGHTS))
    return base


def by_transformers(folder: Path, base: nn.Module) -> nn.Module:
    base.load_adapter(str(folder))
    return base


def by_transformers_for_training(folder: Path, base: nn.Module) -> nn.Module:
    base.load_adapter(str(folder), is_trainable=True)
    return base.eval()


def by_auto_model(folder: Path, base: nn.Module) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder)


LOADERS: list[Callable[[Path, nn.Module], nn.Module]] = [
    by_peft,
    by_peft_on_meta,
    by_peft_with_a_config,
    by_peft_over_another,
    by_hand,
    by_transformers,
    by_transformers_for_training,
    by_auto_model,
]


def few(cases: list[tuple[Any, ...]], every: Callable[..., Any] | None = None) -> list[Any]:
    """By default each loader once, and `every` for all; all combinations in full runs."""
    seen: set[Any] = set()
    marked = []
    for *rest, load in cases:
        first = load not in seen or load is every
        seen.add(load)
        marked.append(pytest.param(*rest, load, marks=() if first else pytest.mark.slow))
    return marked


@pytest.mark.parametrize(
    ("kind", "load"), few([(kind, load) for load in LOADERS for kind in reversed(KINDS)], by_transformers)
)
@torch.no_grad()
def test_every_loader_restores_all_of_it(
    kind: str, load: Callable[..., nn.Module], tmp_path: Path, caplog: Any
) -> None:
    base, model, inputs, expected = saved(kind, tmp_path)
    with caplog.at_level("WARNING"):
        loaded = load(tmp_path / "adapter", base)
    assert "UNEXPECTED" not in caplog.text
    assert "MISSING" not in caplog.text
    assert relative_error(output_of(loaded.eval(), inputs), expected) < 100 * EPS
    adapter = get_peft_model_state_dict(model)
    again = get_peft_model_state_dict(loaded)
    assert {key.removeprefix("base_model.model.") for key in again} == {
        key.removeprefix("base_model.model.") for key in adapter
    }
    for key, tensor in adapter.items():
        other = again.get(key, again.get(key.removeprefix("base_model.model.")))
        assert torch.equal(other.float(), tensor.float()), key


@pytest.mark.parametrize("kind", ["middle-calibrated", "middle-annealed"])
@torch.no_grad()
def test_an_estimate_that_transformers_loads_merges(kind: str, tmp_path: Path) -> None:
    base, model, inputs, _ = saved(kind, tmp_path)
    expected = output_of(model.merge_and_unload(), inputs)
    base.load_adapter(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(TINY.make(), tmp_path / "adapter").merge_and_unload()
    assert relative_error(output_of(loaded, inputs), expected) < 100 * EPS
    for layer in base.modules():
        if hasattr(layer, "lora_A"):
            layer.merge()
    assert relative_error(output_of(base, inputs), expected) < 100 * EPS


# Damage, and another config, by every loader


def damaged(folder: Path, part: str) -> None:
    """One number of one tensor is another; the header's own seal is made anew, or gone."""
    tensors = load_file(folder / WEIGHTS)
    key = sorted(key for key in tensors if part in key)[-1]
    tensors[key].view(-1)[0] += 1e-3
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


PARTS = {"middle-annealed": ["lora_A", "lora_B", "lora_norm", "lora_shortcut", "lora_annealed"], "mora": ["mora_M"]}


@pytest.mark.parametrize(
    ("kind", "part", "load"),
    few([(k, part, load) for load in LOADERS for k, parts in PARTS.items() for part in parts]),
)
def test_damage_is_noticed(kind: str, part: str, load: Callable[..., nn.Module], tmp_path: Path) -> None:
    base, _, inputs, _ = saved(kind, tmp_path)
    damaged(tmp_path / "adapter", part)
    with pytest.raises((ValueError, RuntimeError), match=rf"layer 'model\.layers.*{part} is not what was saved"):
        output_of(load(tmp_path / "adapter", base), inputs)


CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "the shortcut": ("block", {"shortcut": "middle"}),
    "the number of earlier layers": ("block", {"pre_num": 2}),
    "alpha": ("block", {"lora_alpha": 8}),
    "alpha of a layer": ("middle", {"alpha_pattern": {"layers.2.self_attn.q_proj": 9}}),
    "rsLoRA": ("middle", {"use_rslora": True}),
    "the operator": ("mora", {"mora_type": "decoupling"}),
}


@pytest.mark.parametrize(("change", "load"), few([(change, load) for load in LOADERS for change in CHANGES]))
def test_the_config_of_another_adapter_is_noticed(change: str, load: Callable[..., nn.Module], tmp_path: Path) -> None:
    kind, fields = CHANGES[change]
    base, _, inputs, _ = saved(kind, tmp_path)
    file = tmp_path / "adapter" / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    with pytest.raises((ValueError, RuntimeError), match=r"another computation|does not fit|missing"):
        output_of(load(tmp_path / "adapter", base), inputs)


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_loading_over_an_adapter_that_computes_otherwise_is_refused(change: str, tmp_path: Path) -> None:
    kind, fields = CHANGES[change]
    base, _, inputs, expected = saved(kind, tmp_path)
    other = type(config_of_kind(kind))(**{"r": 3, "target_modules": ["q_proj", "v_proj", "down_proj"], **fields})
    model = adapted(base, other)
    before = output_of(model, inputs)
    for load in (
        lambda: model.load_adapter(tmp_path / "adapter", "default"),
        lambda: set_peft_model_state_dict(model, load_file(tmp_path / "adapter" / WEIGHTS)),
    ):
        with pytest.raises(ValueError, match=r"another computation|does not fit|missing|not saved with it"):
            load()
    assert torch.equal(output_of(model, inputs), before)
    model.load_adapter(tmp_path / "adapter", "another")
    model.set_adapter("another")
    assert relative_error(output_of(model, inputs), expected) < 100 * EPS


@pytest.mark.parametrize("kind", ["block", "middle-annealed", "mora"])
@torch.no_grad()
def test_another_rank_over_an_adapter_changes_nothing(kind: str, tmp_path: Path) -> None:
    base, _, inputs, _ = saved(kind, tmp_path)
    config = config_of_kind(kind)
    config.r = 5
    model = adapted(base, config)
    before = output_of(model, inputs)
    with pytest.raises(ValueError, match="does not fit"):
        model.load_adapter(tmp_path / "adapter", "default")
    assert torch.equal(output_of(model, inputs), before)


# What other programs do to state dicts and files


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["block", "middle-calibrated", "mora"])
def test_a_cast_file_loads(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base, _, _, _ = saved(kind, tmp_path)
    file = tmp_path / "adapter" / WEIGHTS
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    loaded = get_peft_model_state_dict(PeftModel.from_pretrained(base, tmp_path / "adapter"))
    for key, tensor in tensors.items():
        if "stamp" not in key and "magnitude" not in key:
            assert torch.equal(loaded[key].double(), tensor.double()), key


def test_means_of_state_dicts_load(tmp_path: Path) -> None:
    """As of federated clients, or of a moving average."""
    _, model, _, _ = saved("block", tmp_path)
    first = get_peft_model_state_dict(model)
    first = {key: tensor.clone() for key, tensor in first.items()}
    randomize_adapters(model, seed=2)
    second = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}
    mean = {key: 0.9 * first[key] + 0.1 * second[key] for key in first}
    set_peft_model_state_dict(model, mean)
    moved = first
    for key in moved:
        moved[key].mul_(0.9).add_(second[key], alpha=0.1)
    set_peft_model_state_dict(model, moved)
    loaded = get_peft_model_state_dict(model)
    assert all(torch.allclose(loaded[key], mean[key]) for key in mean if "lora_A" in key or "lora_B" in key)


@torch.no_grad()
def test_factors_that_were_scaled_on_purpose_say_what_to_do(tmp_path: Path) -> None:
    _, model, _, _ = saved("block", tmp_path)
    scaled = {k: t * 2 if "lora_B" in k else t for k, t in get_peft_model_state_dict(model).items()}
    with pytest.raises(ValueError, match=r"lora_B is not what was saved.*leave out the entries such as '.*magnitude"):
        set_peft_model_state_dict(model, scaled)
    set_peft_model_state_dict(model, {k: t for k, t in scaled.items() if "magnitude" not in k})
    loaded = get_peft_model_state_dict(model)
    assert all(torch.equal(loaded[k], t) for k, t in scaled.items() if "lora_B" in k)


def test_a_pickled_file_is_checked_too(tmp_path: Path) -> None:
    base, model, _, _ = saved("block", tmp_path)
    model.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    file = tmp_path / "pickled" / "adapter_model.bin"
    PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "pickled")
    tensors = torch.load(file, weights_only=True)
    next(t for k, t in tensors.items() if "lora_A" in k)[0, 0] += 1
    torch.save(tensors, file)
    with pytest.raises(ValueError, match="lora_A is not what was saved"):
        PeftModel.from_pretrained(base, tmp_path / "pickled")


@pytest.mark.parametrize("kind", ["block", "middle-annealed", "mora"])
@torch.no_grad()
def test_what_transformers_saves_is_stamped(kind: str, tmp_path: Path) -> None:
    base, _, inputs, expected = saved(kind, tmp_path)
    base.load_adapter(str(tmp_path / "adapter"))
    output_of(base, inputs)
    base.save_pretrained(tmp_path / "again")
    loaded = PeftModel.from_pretrained(TINY.make(), tmp_path / "again")
    assert relative_error(output_of(loaded, inputs), expected) < 100 * EPS
    damaged(tmp_path / "again", "mora_M" if kind == "mora" else "lora_B")
    with pytest.raises(ValueError, match="is not what was saved"):
        PeftModel.from_pretrained(TINY.make(), tmp_path / "again")


@pytest.mark.parametrize("kind", ["input", "block", "middle-annealed", "mora"])
def test_the_header_seal_of_0_1_0_is_still_written_and_checked(kind: str, tmp_path: Path) -> None:
    base, _, _, _ = saved(kind, tmp_path)
    file = tmp_path / "adapter" / WEIGHTS
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="its tensors are not those that were saved"):
        PeftModel.from_pretrained(base, tmp_path / "adapter")
    seal(file)


# Estimates that do not come


def test_a_file_without_its_estimate_is_refused(tmp_path: Path) -> None:
    base, _, inputs, _ = saved("middle-annealed", tmp_path)
    file = tmp_path / "adapter" / WEIGHTS
    gone = ("lora_shortcut", "lora_annealed")
    left = {k: t for k, t in load_file(file).items() if not k.endswith((*gone, "lora_magnitude_vector"))}
    save_file(left, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"was annealed, but the checkpoint has no estimate for layer 'model\.layers"):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    base.load_adapter(str(tmp_path / "adapter"))
    with pytest.raises(RuntimeError, match="was annealed, and no estimate was loaded"):
        output_of(base, inputs)
    with pytest.raises(RuntimeError, match="was annealed, and no estimate was loaded"):
        get_peft_model_state_dict(base)


@torch.no_grad()
def test_the_config_of_a_saved_adapter_trains_a_new_one(tmp_path: Path) -> None:
    for kind in ("block", "middle-calibrated", "mora"):
        base, _, inputs, _ = saved(kind, tmp_path / kind)
        expected = output_of(base, inputs)
        model = get_peft_model(base, PeftConfig.from_pretrained(tmp_path / kind / "adapter")).train()
        assert relative_error(output_of(model, inputs), expected) < 100 * EPS
        model.save_pretrained(tmp_path / "again")
        PeftModel.from_pretrained(TINY.make(), tmp_path / "again")
    base, _, inputs, _ = saved("middle-annealed", tmp_path / "annealed")
    config = PeftConfig.from_pretrained(tmp_path / "annealed" / "adapter")
    with pytest.raises(RuntimeError, match=r"config\.estimate = None"):
        output_of(get_peft_model(copy.deepcopy(base), config), inputs)
    config.stamped, config.estimate = False, None
    output_of(get_peft_model(base, config), inputs)


# Programs that take a native file for a LoRA's


@pytest.mark.parametrize("kind", ["input", "block", "middle-calibrated", "mora"])
def test_consumers_of_loras_refuse_a_native_folder(kind: str, tmp_path: Path) -> None:
    saved(kind, tmp_path)
    for read_by in CONSUMERS.values():
        with pytest.raises((Refused, KeyError)):
            read_by(*read_folder(tmp_path / "adapter")[:2])


@pytest.mark.quick(low_cpu_mem_usage=[True])
@pytest.mark.parametrize("shortcut", ["input", "block", "middle"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_peft_and_diffusers_do_not_load_it_as_a_lora(shortcut: str, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    tiny = TINY_MODELS["unet"]
    unet = tiny.make()
    unet.add_adapter(ResLoRAConfig(r=3, target_modules=tiny.targets, shortcut=shortcut))
    randomize_adapters(unet)
    tensors = get_peft_model_state_dict(unet)
    save_file({f"unet.{key}": tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / LORA)
    message = "size mismatch|magnitude|meta tensor"
    with pytest.raises((RuntimeError, ValueError, NotImplementedError), match=message):
        tiny.make().load_lora_adapter(tmp_path, weight_name=LORA, prefix="unet", low_cpu_mem_usage=low_cpu_mem_usage)
    plain = tiny.make()
    inject_adapter_in_model(LoraConfig(r=3, use_dora=True, target_modules=tiny.targets), plain)
    with pytest.raises((RuntimeError, ValueError, NotImplementedError), match=message):
        set_peft_model_state_dict(plain, tensors)


def test_a_diffusers_pipeline_does_not_load_it_as_a_lora(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    tiny = TINY_MODELS["unet"]
    unet = tiny.make()
    unet.add_adapter(ResLoRAConfig(r=3, target_modules=tiny.targets, shortcut="block"))
    randomize_adapters(unet)
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(unet))
    state_dict, alphas = StableDiffusionPipeline.lora_state_dict(tmp_path)
    with pytest.raises((RuntimeError, ValueError, NotImplementedError), match=r"size mismatch|magnitude|meta tensor"):
        StableDiffusionPipeline.load_lora_into_unet(state_dict, network_alphas=alphas, unet=tiny.make())


def test_mora_is_no_lora_for_diffusers(tmp_path: Path) -> None:
    tiny = TINY_MODELS["unet"]
    unet = tiny.make()
    unet.add_adapter(MoRAConfig(r=3, target_modules=tiny.targets))
    randomize_adapters(unet)
    tensors = {f"unet.{key}": tensor.contiguous() for key, tensor in get_peft_model_state_dict(unet).items()}
    save_file(tensors, tmp_path / LORA)
    with pytest.raises((IndexError, ValueError, KeyError)):
        tiny.make().load_lora_adapter(tmp_path, weight_name=LORA, prefix="unet")
