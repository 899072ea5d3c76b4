"""What other programs make of an export, by a short statement of how each of them reads a LoRA.

Each reader below was written from the source that it names, and computes the update that the program would apply to
each module, or raises `Refused`. The exports have to pass all of them; checkpoints with known faults have to fail in
those where the fault matters, which shows that the readers can fail.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
from helpers.adapters import adapted
from helpers.consumers import CONSUMERS, PEFT_0_10_FIELDS, PEFT_0_13_FIELDS, Updates, pairs, updates_of, verdict
from helpers.exports import CAUSAL, METHODS, gpt2, llama, net, read_folder
from helpers.tolerances import rounding
from peft import LoHaConfig, LoraConfig, PeftModel
from torch import nn

from peft_reslora.export import save_as_lora

pytestmark = pytest.mark.filterwarnings(
    "ignore:The LoRA has r=", "ignore:.*fan_in_fan_out", "ignore:Converting a PEFT"
)


@pytest.mark.parametrize("name", METHODS)
def test_every_consumer_applies_the_same_update(name: str, tmp_path: Path) -> None:
    make_base, config = METHODS[name]
    model = adapted(make_base(), config)
    expected = updates_of(model)
    export = save_as_lora(tmp_path, model)
    narrow = any(min(A.shape[1], B.shape[0]) < export.config.r for A, B in pairs(export.state_dict).values())
    for consumer in CONSUMERS:
        if consumer == "ollama" and narrow:
            continue  # the export warns of it
        assert verdict(consumer, tmp_path, expected) == "right", consumer


@pytest.mark.parametrize("name", METHODS)
def test_configs_load_in_earlier_peft(name: str, tmp_path: Path) -> None:
    make_base, config = METHODS[name]
    save_as_lora(tmp_path, adapted(make_base(), config))
    written = read_folder(tmp_path)[0]
    assert written.keys() <= PEFT_0_10_FIELDS
    assert written.keys() <= PEFT_0_13_FIELDS
    assert LoraConfig(**written).r == written["r"]


def test_a_folder_that_ollama_would_misread_is_warned_of(tmp_path: Path) -> None:
    model = adapted(net(), LoraConfig(r=20, target_modules=["up", "down"]))
    with pytest.warns(UserWarning, match="Ollama's import of an adapter folder would misread"):
        save_as_lora(tmp_path, model)
    assert verdict("ollama", tmp_path, updates_of(model)).startswith("refused")


@pytest.mark.parametrize("make_base", [llama, gpt2])
def test_a_language_models_folder_has_one_file_of_tensors(make_base: Callable[[], nn.Module], tmp_path: Path) -> None:
    """SGLang and Ollama read every `*.safetensors`, and Unsloth takes a `config.json` for a whole model."""
    targets = ["q_proj", "v_proj"] if make_base is llama else ["c_attn"]
    save_as_lora(tmp_path, adapted(make_base(), LoraConfig(target_modules=targets, task_type="CAUSAL_LM")))
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["adapter_model.safetensors"]
    assert not (tmp_path / "config.json").exists()
    assert not (tmp_path / "added_tokens.json").exists()


# Checkpoints that are not standard, and who reads them wrong


def by_peft(folder: Path, config: peft.PeftConfig, rank: float) -> Updates:
    model = adapted(llama(), config)
    peft.save_as_lora(folder, model, rank=rank)
    return updates_of(model)


def native(folder: Path, **fields: Any) -> Updates:
    model = adapted(llama(), LoraConfig(**{"r": 8, "lora_alpha": 8, **CAUSAL, **fields}))
    model.save_pretrained(folder)
    return updates_of(model)


def edited(folder: Path, **fields: Any) -> Updates:
    model = adapted(llama(), LoraConfig(r=8, lora_alpha=8, **CAUSAL))
    save_as_lora(folder, model)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    return updates_of(model)


ALL = set(CONSUMERS)
LOHA = LoHaConfig(r=3, **CAUSAL)
BAD: dict[str, tuple[Callable[[Path], Updates], set[str]]] = {
    "PEFT's conversion by energy": (  # r and alpha are 1, ranks and alphas in the patterns
        lambda folder: by_peft(folder, LOHA, rank=0.999999999),
        {"sglang", "tgi", "lorax", "llama_cpp", "ollama"},
    ),
    "alpha is not r": (lambda folder: native(folder, lora_alpha=16), {"diffusers"}),
    "rsLoRA": (
        lambda folder: native(folder, use_rslora=True),
        {"sglang", "lorax", "llama_cpp", "ollama", "diffusers"},
    ),
    "a rank that is padded": (lambda folder: native(folder, r=5, lora_alpha=5), {"tgi", "lorax"}),
    "patterns": (
        lambda folder: native(folder, rank_pattern={"q_proj": 16}, alpha_pattern={"q_proj": 32}),
        ALL - {"vllm"},
    ),
    "a type that one layer lacks": (
        lambda folder: native(folder, target_modules=r".*\.(q_proj|v_proj|down_proj)", exclude_modules=r".*0\.mlp.*"),
        {"sglang", "tgi", "lorax"},
    ),
    "one layer of three": (lambda folder: native(folder, layers_to_transform=[1]), {"tgi", "lorax"}),
    "q_proj without v_proj": (lambda folder: native(folder, target_modules=["q_proj"]), {"sglang"}),
    "DoRA": (lambda folder: native(folder, use_dora=True, init_lora_weights=True), ALL),
    "a trained bias": (lambda folder: native(folder, lora_bias=True), ALL),
    "alpha is a float": (lambda folder: edited(folder, lora_alpha=8.0), {"ollama"}),
    "another alpha": (lambda folder: edited(folder, lora_alpha=16), ALL - {"diffusers"}),
}


@pytest.mark.parametrize("name", BAD)
def test_a_checkpoint_that_is_not_standard_fails_where_it_matters(name: str, tmp_path: Path) -> None:
    make, fails = BAD[name]
    expected = make(tmp_path)
    verdicts = {consumer: verdict(consumer, tmp_path, expected) for consumer in CONSUMERS}
    assert {consumer for consumer, found in verdicts.items() if found != "right"} == fails, verdicts


def test_pefts_own_configs_do_not_load_in_earlier_peft(tmp_path: Path) -> None:
    by_peft(tmp_path, LOHA, rank=8)
    assert not read_folder(tmp_path)[0].keys() <= PEFT_0_13_FIELDS


def test_the_exports_of_what_others_misread_are_right(tmp_path: Path) -> None:
    """The same adapters, exported by this package."""
    for i, fields in enumerate(
        [{"lora_alpha": 16}, {"use_rslora": True}, {"r": 5, "lora_alpha": 5}, {"alpha_pattern": {"q_proj": 32}}]
    ):
        model = adapted(llama(), LoraConfig(**{"r": 8, "lora_alpha": 8, **CAUSAL, **fields}))
        save_as_lora(tmp_path / str(i), model, base_model=llama())
        expected = updates_of(model)
        assert {verdict(consumer, tmp_path / str(i), expected) for consumer in CONSUMERS} == {"right"}
        assert PeftModel.from_pretrained(llama(), tmp_path / str(i)).peft_config["default"].r == 8


def test_the_readers_agree_with_peft(tmp_path: Path) -> None:
    """PEFT is installed, so its own reading of a checkpoint with every scale in use needs no statement of ours."""
    expected = native(tmp_path, use_rslora=True, rank_pattern={"q_proj": 16}, alpha_pattern={"q_proj": 32})
    loaded = updates_of(PeftModel.from_pretrained(llama(), tmp_path))
    assert all(float((loaded[name] - t).norm()) <= rounding(32) * float(t.norm()) for name, t in expected.items())
    assert verdict("vllm", tmp_path, expected) == "right"
