"""A load hashes each tensor once and draws none at random, and notices all that it noticed when it did more."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft.peft_model
import pytest
import torch
from helpers.adapters import TUNERS, adapted, config_of
from helpers.tiny_models import TINY_MODELS, output_of
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from peft_reslora.shared import digests, files, stamps

TINY = TINY_MODELS["llama"]
INPUTS = {"input_ids": torch.arange(1, 15).view(2, 7)}
WEIGHTS = "adapter_model.safetensors"


def saved(tuner: str, folder: Path, **fields: Any) -> PeftModel:
    torch.manual_seed(0)
    config = config_of(tuner, r=3, target_modules=["q_proj", "v_proj", "down_proj"], **fields)
    model = adapted(TINY.make(), config)
    model.save_pretrained(folder)
    return model


def load_first(base: nn.Module, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(base, folder)


def load_second(base: nn.Module, folder: Path) -> PeftModel:
    model = get_peft_model(base, PeftConfig.from_pretrained(folder))
    model.load_adapter(folder, "second")
    model.set_adapter("second")
    return model.eval()


LOADS = {"from_pretrained": load_first, "load_adapter": load_second}
every_load = pytest.mark.parametrize("load", LOADS)
every_tuner = pytest.mark.parametrize("tuner", TUNERS)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the tensors that are hashed."""
    sizes: list[int] = []
    original = digests.memory_of

    def memory_of(values: torch.Tensor) -> memoryview:
        sizes.append(values.nbytes)
        return original(values)

    for module in (digests, files):
        monkeypatch.setattr(module, "memory_of", memory_of)
    return sizes


@every_load
@every_tuner
@torch.no_grad()
def test_a_load_hashes_each_tensor_once(tuner: str, load: str, tmp_path: Path, hashed: list[int]) -> None:
    expected = output_of(saved(tuner, tmp_path), INPUTS)
    hashed.clear()
    model = LOADS[load](TINY.make(), tmp_path)
    assert sorted(hashed) == sorted(tensor.nbytes for tensor in load_file(tmp_path / WEIGHTS).values())
    assert torch.equal(output_of(model, INPUTS), expected)
    assert all(config.read_file is None for config in model.peft_config.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_a_sealed_file_in_another_precision_loads(dtype: torch.dtype, tmp_path: Path, hashed: list[int]) -> None:
    """Its tensors were cast, and then sealed; what was hashed serves the stamps where it is in half precision."""
    saved("block", tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    cast = {key: tensor.to(dtype) if ".lora_" in key else tensor for key, tensor in tensors.items()}
    save_file(cast, tmp_path / WEIGHTS, metadata={"format": "pt"})
    files.seal(tmp_path / WEIGHTS)
    hashed.clear()
    PeftModel.from_pretrained(TINY.make(), tmp_path)
    assert (len(hashed) == len(tensors)) == (dtype != torch.float64)


@every_load
@pytest.mark.parametrize("init", [True, False])
@every_tuner
@torch.no_grad()
def test_a_load_draws_nothing(tuner: str, init: bool, load: str, tmp_path: Path) -> None:
    field = {"init_weights" if tuner == "mora" else "init_lora_weights": init}
    expected = output_of(saved(tuner, tmp_path, **field), INPUTS)
    base = TINY.make() if load == "from_pretrained" else load_second(TINY.make(), tmp_path)
    before = torch.get_rng_state()
    model = load_first(base, tmp_path) if load == "from_pretrained" else base
    if load == "load_adapter":
        model.load_adapter(tmp_path, "third")
        model.set_adapter("third")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(output_of(model.eval(), INPUTS), expected)


@pytest.mark.parametrize("tuner", ["block", "mora"])
@torch.no_grad()
def test_a_new_adapter_with_the_config_of_a_saved_one_is_drawn(tuner: str, tmp_path: Path) -> None:
    field = {"init_weights" if tuner == "mora" else "init_lora_weights": False}
    model = saved(tuner, tmp_path, **field)
    config = type(model.peft_config["default"]).from_pretrained(tmp_path)
    assert config.read_file is None
    torch.manual_seed(1)
    new = get_peft_model(TINY.make(), config)
    torch.manual_seed(1)
    expected = get_peft_model(TINY.make(), config_of(tuner, r=3, target_modules=config.target_modules, **field))
    for ours, theirs in zip(new.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.any()


def change_tensor(monkeypatch: pytest.MonkeyPatch, folder: Path, key: str) -> None:
    """After PEFT has read the file, turn a tensor's rows over: the sum of its numbers is as before."""
    original = peft.peft_model.load_peft_weights

    def load_peft_weights(*args: Any, **kwargs: Any) -> Any:
        tensors = original(*args, **kwargs)
        return tensors | {key: tensors[key].flip(0)}

    monkeypatch.setattr(peft.peft_model, "load_peft_weights", load_peft_weights)


def change_file(monkeypatch: pytest.MonkeyPatch, folder: Path, key: str) -> None:
    """Before PEFT reads the tensors, and after the config and the seal have been read, write into the file."""
    original = peft.peft_model.load_peft_weights

    def load_peft_weights(*args: Any, **kwargs: Any) -> Any:
        with (folder / WEIGHTS).open("r+b") as file:
            length = int.from_bytes(file.read(8), "little")
            offset = json.loads(file.read(length))[key]["data_offsets"][0]
            file.seek(8 + length + offset)
            file.write(bytes(4))
        return original(*args, **kwargs)

    monkeypatch.setattr(peft.peft_model, "load_peft_weights", load_peft_weights)


def replace_file(monkeypatch: pytest.MonkeyPatch, folder: Path, key: str) -> None:
    """As above, but put another file in its place."""
    original = peft.peft_model.load_peft_weights

    def load_peft_weights(*args: Any, **kwargs: Any) -> Any:
        tensors = load_file(folder / WEIGHTS)
        save_file(tensors | {key: tensors[key] * 1.01}, folder / "other")
        (folder / "other").replace(folder / WEIGHTS)
        return original(*args, **kwargs)

    monkeypatch.setattr(peft.peft_model, "load_peft_weights", load_peft_weights)


@pytest.mark.parametrize("change", [change_tensor, change_file, replace_file])
@pytest.mark.parametrize("tuner", ["block", "mora"])
@torch.no_grad()
def test_a_change_after_the_hash_is_noticed(
    tuner: str, change: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tuner, tmp_path)
    key = next(key for key in load_file(tmp_path / WEIGHTS) if key.endswith(("lora_A.weight", "mora_M")))
    base = TINY.make()
    model = adapted(copy.deepcopy(base), config_of(tuner, r=2, target_modules=["q_proj"]))
    expected, plain = output_of(model, INPUTS), output_of(base.eval(), INPUTS)
    change(monkeypatch, tmp_path, key)
    with pytest.raises(ValueError, match="is not what was saved"):
        model.load_adapter(tmp_path, "other")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(output_of(model, INPUTS), expected)
    if change is change_tensor:
        with pytest.raises(ValueError, match="is not what was saved"):
            PeftModel.from_pretrained(base, tmp_path)
        assert torch.equal(output_of(base, INPUTS), plain)  # what PEFT leaves in it adds nothing


@torch.no_grad()
def test_what_was_hashed_does_not_stand_for_another_load(tmp_path: Path) -> None:
    model = saved("block", tmp_path)
    loaded = PeftModel.from_pretrained(TINY.make(), tmp_path)
    changed = {k: t * 2 if "lora_B" in k else t for k, t in load_file(tmp_path / WEIGHTS).items()}
    with pytest.raises(ValueError, match="lora_B is not what was saved"):
        set_peft_model_state_dict(loaded, changed)
    assert torch.equal(output_of(loaded, INPUTS), output_of(model, INPUTS))


# The seal of a file


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata())


def test_a_file_has_the_seal_of_0_1_0_beside_the_new_one(tmp_path: Path) -> None:
    saved("block", tmp_path)
    file = tmp_path / WEIGHTS
    tensors, metadata = load_file(file), metadata_of(file)
    assert {"sha256", "sha256_by_tensor"} <= metadata.keys()
    key = next(key for key in tensors if "lora_A" in key)
    for seals in (["sha256"], ["sha256_by_tensor"], ["sha256", "sha256_by_tensor"]):
        kept = {name: value for name, value in metadata.items() if "sha256" not in name or name in seals}
        save_file(tensors, file, metadata=kept)
        if "sha256" in seals:
            files.refuse_damaged(file)
        else:
            with pytest.raises(ValueError, match="its tensors are not those that were saved"):
                files.refuse_damaged(file)
        for changed in (
            tensors | {key: tensors[key] + 1},
            {name: tensor for name, tensor in tensors.items() if name != key},
            {f"{name}x": tensor for name, tensor in tensors.items()},
            tensors | {key: tensors[key].view(torch.int32)},
            tensors | {key: tensors[key].t().contiguous()},
            tensors | {key: tensors[key].reshape(-1)},
        ):
            save_file(changed, file, metadata=kept)
            with pytest.raises(ValueError, match="its tensors are not those that were saved"):
                files.refuse_damaged(file)


@pytest.mark.parametrize("threads", [1, 3])
def test_digests_are_the_same_by_any_number_of_threads(threads: int) -> None:
    tensors = {f"{n}": torch.full((n, 2), float(n)) for n in range(20)} | {
        "": torch.tensor(1.0),
        "e": torch.empty(0, 3),
    }
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert digests.digests_of(tensors) == {key: digests.digest_of(tensor) for key, tensor in tensors.items()}
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_known_digest_says_what_hashing_would_say(dtype: torch.dtype) -> None:
    tensor = torch.randn(5, 3).to(dtype)
    stamp = stamps.make_stamp({"part": tensor}, "sum")
    for given in (tensor, tensor + 1, tensor.double(), tensor.bfloat16(), tensor.half()):
        expected = stamps.fault_against(stamp, {"part": given}, "sum")
        known = {"part": digests.digest_of(given)}
        assert stamps.fault_against(stamp, {"part": given}, "sum", known) == expected


def test_bits_decide_whether_a_tensor_is_the_one_that_was_hashed(tmp_path: Path) -> None:
    """Equal numbers are not enough: 0 and -0; and equal bits are, where numbers are not equal to themselves."""
    held = {"zero": torch.zeros(2), "nan": torch.full((2,), float("nan")), "byte": torch.zeros(2, dtype=torch.uint8)}
    read = digests.ReadFile(tmp_path, (), held, digests.digests_of(held))
    assert all(read.digest_of(key, tensor.clone()) == digests.digest_of(tensor) for key, tensor in held.items())
    assert read.digest_of("zero", -held["zero"]) is None
    assert read.digest_of("zero", held["zero"].double()) is None
    assert read.digest_of("zero", held["zero"].view(2, 1)) is None
    assert read.digest_of("zero", held["zero"].view(torch.int32)) is None
    assert read.digest_of("other", held["zero"]) is None
