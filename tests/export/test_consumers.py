"""What other programs make of an export, by a short statement of how each of them reads a LoRA.

Each reader below was written from the source that it names, and computes the update that the program would apply to
each module, or raises `Refused`. The exports have to pass all of them; checkpoints with known faults have to fail in
those where the fault matters, which shows that the readers can fail.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers.tolerances import rounding
from peft import LoHaConfig, LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from test_export import CAUSAL, METHODS, adapted, gpt2, llama, net
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_reslora.export import save_as_lora

pytestmark = pytest.mark.filterwarnings(
    "ignore:The LoRA has r=", "ignore:.*fan_in_fan_out", "ignore:Converting a PEFT"
)

Config = Mapping[str, Any]
Tensors = Mapping[str, Tensor]
Updates = dict[str, Tensor]  # (out_features, in_features) by module
PREFIX = "base_model.model."


class Refused(Exception):
    """The program stops with an error."""


def pairs(tensors: Tensors) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) by module, for programs that take no other name than PEFT's for linear layers."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
        if match is None:
            raise Refused(f"unexpected tensor {key}")
        found.setdefault(match[1], {})[match[2]] = tensor.float()
    return {name: (pair["A"], pair["B"]) for name, pair in found.items()}


# vllm-project/vllm: vllm/lora/peft_helper.py, vllm/config/lora.py, vllm/lora/utils.py (0.33)
VLLM_MAX_RANK = 512
VLLM_REFUSED_INITS = ("pissa", "olora", "corda", "loftq", "eva")


def vllm(config: Config, tensors: Tensors) -> Updates:
    if missing := {"r", "lora_alpha", "target_modules"} - config.keys():
        raise Refused(f"missing {missing}")
    if config.get("use_dora") or config.get("bias", "none") != "none" or config.get("modules_to_save"):
        raise Refused("a feature that vLLM does not have")
    if config.get("lora_bias") or config.get("layer_replication") or config.get("alora_invocation_tokens"):
        raise Refused("a feature that vLLM does not have")
    if str(config.get("init_lora_weights")).startswith(VLLM_REFUSED_INITS):
        raise Refused("an initialisation that changes the base model")
    if config["r"] > VLLM_MAX_RANK:
        raise Refused("a rank that no server can be started for")
    root = math.sqrt if config.get("use_rslora") else float
    updates = {}
    for name, (A, B) in pairs(tensors).items():
        rank = pattern(config.get("rank_pattern"), name, config["r"])
        alpha = pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
        updates[name] = alpha / root(rank) * B @ A
    return updates


def pattern(patterns: Config | None, name: str, otherwise: float) -> float:
    return next((v for k, v in (patterns or {}).items() if re.match(rf"(.*\.)?({k})$", name)), otherwise)


# The same before it knew patterns (2025-10): one scale for all; base weights beside the factors are refused.
def vllm_before_patterns(config: Config, tensors: Tensors) -> Updates:
    return vllm({**config, "rank_pattern": {}, "alpha_pattern": {}}, tensors)


# sgl-project/sglang: python/sglang/srt/lora/{lora_config,lora,mem_pool,lora_manager,utils}.py (0.5.23)
def sglang(config: Config, tensors: Tensors) -> Updates:
    if config["peft_type"] != "LORA" or config.get("use_dora"):
        raise Refused("no plain LoRA")
    if isinstance(config["target_modules"], str) and config["target_modules"] not in ("all", "all-linear"):
        raise Refused("target_modules is a regular expression")
    factors = pairs(tensors)
    for name, (A, _) in factors.items():
        if A.shape[0] != config["r"]:
            raise Refused(f"{name} has rank {A.shape[0]} instead of {config['r']}")
        if name.endswith("q_proj") and f"{name.removesuffix('q_proj')}v_proj" not in factors:
            raise Refused("KeyError: v_proj")
    return {name: config["lora_alpha"] / config["r"] * B @ A for name, (A, B) in factors.items()}


# huggingface/text-generation-inference: server/text_generation_server/adapters/lora.py, with the `pad_rank` of
# punica-sgmv; predibase/lorax: server/lorax_server/adapters/lora.py is its origin and knows no rsLoRA. One device.
def tgi(config: Config, tensors: Tensors, knows_rslora: bool = True) -> Updates:
    root = math.sqrt if config.get("use_rslora") and knows_rslora else float
    types: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for name, pair in pairs(tensors).items():
        types.setdefault(re.sub(r"\.\d+\.", ".*.", name), {})[name] = pair
    blocks = 1 + max((int(index) for name in pairs(tensors) for index in re.findall(r"\.(\d+)\.", name)), default=0)
    r = config["r"]
    updates = {}
    for module_type, members in types.items():
        if "*" in module_type and len(members) < blocks:
            continue  # dropped in all layers, without a word
        padded = {8 if A.shape[0] <= 8 else -(-A.shape[0] // 16) * 16 for A, _ in members.values()}
        if len(padded) > 1:
            raise Refused(f"{module_type} has unequal ranks, which do not stack")
        updates.update({name: config["lora_alpha"] / root(r) * B @ A for name, (A, B) in members.items()})
        (r,) = padded  # written back into the config that the next type reads
    return updates


def lorax(config: Config, tensors: Tensors) -> Updates:
    return tgi(config, tensors, knows_rslora=False)


# ggml-org/llama.cpp: convert_lora_to_gguf.py, src/llama-adapter.h (`get_scale`)
def llama_cpp(config: Config, tensors: Tensors) -> Updates:
    kept = {
        key: tensor
        for key, tensor in tensors.items()
        if ".base_layer.weight" not in key and "_layernorm" not in key and ".norm" not in key
    }
    return {name: float(config["lora_alpha"]) / B.shape[-1] * B @ A for name, (A, B) in pairs(kept).items()}


# ollama/ollama: convert/{convert,convert_llama_adapter}.go, the import of a folder
def ollama(config: Config, tensors: Tensors) -> Updates:
    if not isinstance(config["lora_alpha"], int):
        raise Refused("json: cannot unmarshal number into Go struct field of type uint32")
    turned = {}
    for name, (A, B) in pairs(tensors).items():
        A, B = A.T if A.shape[0] > A.shape[1] else A, B.T if B.shape[0] < B.shape[1] else B
        if A.shape[0] != B.shape[1]:
            raise Refused(f"the factors of {name} do not fit")
        turned[name] = config["lora_alpha"] / B.shape[1] * B @ A
    return turned


# huggingface/diffusers: src/diffusers/utils/peft_utils.py (`get_peft_kwargs`): the config is not read, alpha := rank
def diffusers(config: Config, tensors: Tensors) -> Updates:
    return {name: B @ A for name, (A, B) in pairs(tensors).items()}


CONSUMERS: dict[str, Callable[[Config, Tensors], Updates]] = {
    "vllm": vllm,
    "vllm_before_patterns": vllm_before_patterns,
    "sglang": sglang,
    "tgi": tgi,
    "lorax": lorax,
    "llama_cpp": llama_cpp,
    "ollama": ollama,
    "diffusers": diffusers,
}

# huggingface/peft: src/peft/config.py and src/peft/tuners/lora/config.py at the tags v0.10.0 and v0.13.2; both give
# what is in the file to the constructor, so that another field is a TypeError.
PEFT_0_10_FIELDS = {
    *("peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "r"),
    *("target_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save"),
    *("init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
    *("megatron_config", "megatron_core", "loftq_config", "use_dora", "layer_replication"),
}
PEFT_0_13_FIELDS = PEFT_0_10_FIELDS | {"runtime_config"}


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return json.loads((folder / "adapter_config.json").read_text()), tensors


@torch.no_grad()
def updates_of(model: nn.Module) -> Updates:
    """What the adapter of a model adds to each module, from the layers themselves."""
    updates = {}
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, BaseTunerLayer):
            delta = layer.get_delta_weight("default").float()
            updates[name] = delta.T if isinstance(layer.get_base_layer(), Conv1D) else delta
    return updates


def verdict(consumer: str, folder: Path, expected: Updates) -> str:
    """'right', or what is wrong; a module that is not expected has to get zeros."""
    try:
        updates = CONSUMERS[consumer](*read(folder))
    except Refused as error:
        return f"refused: {error}"
    if missing := expected.keys() - updates.keys():
        return f"dropped: {', '.join(sorted(missing))}"
    for name, update in updates.items():
        wanted = expected.get(name, torch.zeros_like(update))
        if float((update - wanted).norm()) > rounding(64) * float(wanted.norm()):
            return f"silently wrong: {name}"
    return "right"


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
    written = read(tmp_path)[0]
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
    assert not read(tmp_path)[0].keys() <= PEFT_0_13_FIELDS


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
