"""Configs from anywhere: bounded time and memory, and one clear line."""

from __future__ import annotations

import json
import random
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapters import adapted
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from peft_reslora import MoRAConfig, ResLoRAConfig, describe_chains
from peft_reslora.shared import fields

TUNERS = [ResLoRAConfig, MoRAConfig]
DEEP: list[Any] = []
for _ in range(500):
    DEEP = [DEEP]
NAMES = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]


def base() -> nn.Module:
    torch.manual_seed(0)

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(
                nn.ModuleDict({"up": nn.Linear(6, 9), "down": nn.Linear(9, 6)}) for _ in range(3)
            )
            self.head = nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = x + block["down"](torch.tanh(block["up"](x)))
            return self.head(x)

    return Stack()


NOT_NUMBERS: list[Any] = ["8", [8], {"r": 8}, None, True, float("nan"), float("inf"), 10**400, 10**5000, DEEP]
FIELDS: dict[str, list[Any]] = {
    "r": [*NOT_NUMBERS, 2.0, 10**9],
    "target_modules": [7, [["up"]], [None], {"up": 1}, [""], "", ["x" * 20_000], DEEP, "(" * 3000, r"a{99999999999}"],
    "exclude_modules": [7, [["up"]], "(", DEEP],
    "modules_to_save": ["head", [7], ["(("], [DEEP]],
    "layers_to_transform": ["1", [None], [10**400], 1.5, True, -1],
    "rank_pattern": [[], "up", {"up": "8"}, {"up": 10**9}, {"(": 4}, {7: 4}, {"up": None}, {"up": DEEP}],
    "base_model_name_or_path": [7, ["x"], "x" * 100_000],
    "revision": [7, DEEP],
    "inference_mode": ["no", None, 1],
    "stamped": ["yes", None, 1],
}
OWN: dict[type, dict[str, list[Any]]] = {
    ResLoRAConfig: {
        "norm_window": [*NOT_NUMBERS, 10**9, 0, -1],
        "pre_num": ["1", [1], None, True, 1.0, float("nan"), 0, DEEP],
        "lora_alpha": ["8", [8], None, True, float("nan"), float("inf"), 10**400, DEEP],
        "lora_dropout": ["0.1", None, True, float("nan"), -0.1, 1.5, 10**400],
        "alpha_pattern": [[], {"up": "8"}, {"up": 10**400}, {"up": float("nan")}, {"(?P<": 4}],
        "chain_pattern": [7, [7], [""], "(", [[r"(\d+)"]], {"a": 1}, DEEP],
        "layer_replication": [7, [[0, 10**9]], [[2, 1]], ["ab"], [[0]], DEEP],
        "trainable_token_indices": [7, ["a"], {"e": 7}, [10**400], DEEP],
        "use_rslora": ["no", None, 1],
        "bias": [None, "mora_only", 7, DEEP],
        "shortcut": [None, 7, DEEP, "Block"],
        "merge_estimator": [None, 7, DEEP],
        "estimate": [7, "yes", DEEP],
        "init_lora_weights": [None, 7, "pissa", DEEP],
    },
    MoRAConfig: {
        "mora_dropout": ["0.1", None, True, float("nan"), -0.1, 1.5, 10**400],
        "mora_type": [None, 7, DEEP, "Sharing"],
        "bias": [None, "lora_only", 7, DEEP],
        "init_weights": [None, 1, "pissa", DEEP],
    },
}


@pytest.mark.parametrize("tuner", TUNERS)
def test_a_value_of_another_kind_or_size_is_refused_in_one_line(tuner: type) -> None:
    for field, values in {**FIELDS, **OWN[tuner]}.items():
        for value in values:
            config = {"target_modules": ["up"], "layers_pattern": None, field: value}
            with pytest.raises(ValueError, match=rf"^{tuner.__name__} cannot be used: .*{field}") as info:
                tuner(**config)
            message = str(info.value)
            assert "\n" not in message
            assert len(message) < 1000


@pytest.mark.parametrize("tuner", TUNERS)
def test_many_faults_make_a_short_message(tuner: type) -> None:
    with pytest.raises(ValueError, match="and 9989 more") as info:
        tuner(r=0, rank_pattern={f"layer{i}": -1 for i in range(10_000)})
    assert len(str(info.value)) < 2000


SLOW = {
    "target_modules": r"(.*)*(.*)*up!",
    "exclude_modules": r"(\w+\.?)+!",
    "rank_pattern": {r"((\w|\w)+\.?)+!": 3},
    "layers_pattern": r"(\w+\w*)+!",
    "modules_to_save": [r"(\w+\.?)+!"],
}
NAME = "b" * 40


def deep_names() -> nn.Module:
    """Names as long as a model's, on which a catastrophic pattern takes ages."""
    inner = nn.Sequential(*(nn.Linear(6, 6) for _ in range(2)))
    return nn.ModuleDict({NAME: nn.ModuleDict({NAME: inner})})


@pytest.mark.quick(field=["chain_pattern", "rank_pattern"])
@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("field", [*SLOW, "alpha_pattern", "chain_pattern"])
def test_a_catastrophic_pattern_is_refused_in_time(tuner: type, field: str, monkeypatch: Any) -> None:
    if tuner is MoRAConfig and field in ("alpha_pattern", "chain_pattern"):
        pytest.skip("a field of ResLoRA")
    monkeypatch.setattr(fields, "_SECONDS", 1.0)
    value = SLOW.get(field, {r"(\w+\.?)+!": 3} if field == "alpha_pattern" else [r"(\w+\.?)+(\d)!"])
    extra = {"layers_to_transform": [0]} if field == "layers_pattern" else {}
    config = tuner(**{"r": 2, "target_modules": ["0", "1"], field: value, **extra})
    model = deep_names()
    before = list(model.modules())
    began = time.monotonic()
    with pytest.raises(ValueError, match=rf"^{field}: the regular expression .* takes more than 1 seconds"):
        get_peft_model(model, config)
    assert time.monotonic() - began < 8
    assert list(model.modules()) == before
    if tuner is ResLoRAConfig:
        with pytest.raises(ValueError, match="takes more than 1 seconds"):
            describe_chains(model, config)


def test_patterns_as_people_write_them_are_used() -> None:
    patterns = [
        r".*\.(up|down)",
        r"^(?!.*head).*(?:blocks|layers).*(?:up|down)$",
        r"(?:.*\.)?(?:blocks)\.(?:\d+)\.(?:up|down)",
        r"(.*\.)*up|(.*\.)*down",
    ]
    for pattern in patterns:
        for tuner in TUNERS:
            model = get_peft_model(base(), tuner(r=2, target_modules=pattern))
            assert len({n for n, m in model.named_modules() if hasattr(m, "base_layer")}) == 6


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("where", ["r", "rank_pattern"])
def test_a_rank_beyond_the_layer_is_refused_before_memory_is_taken(tuner: type, where: str) -> None:
    config = tuner(**{"target_modules": ["up"], where: 60_000 if where == "r" else {"blocks.2.up": 60_000}})
    model = base()
    before = list(model.modules())
    with pytest.raises(ValueError, match=r"layer 'blocks\.\d\.up': rank 60000 is more than 1024"):
        get_peft_model(model, config)
    assert list(model.modules()) == before


# Fuzz


def _value(source: random.Random, depth: int = 0) -> Any:
    numbers = [0, 1, -1, 2, 8, 10**9, 10**400, 0.5, -0.5, 1e308, float("nan"), float("inf")]
    words = ["input", "block", "middle", "auto", "sharing", "none", "all", "lora_only", "mora_only", "annealed"]
    patterns = ["", "up", "0", "all-linear", ".*", "(", "(a+)+$", r"blocks\.(\d+)", "calibrated", "gaussian"]
    strange = ["\x1b[31m", "<b>", "x" * 30_000, "../..", "\u202e"]
    plain: list[Any] = [None, True, False, *numbers, *words, *patterns, *strange]
    if depth < 3 and source.random() < 0.35:
        entries = [_value(source, depth + 1) for _ in range(source.randrange(4))]
        return entries if source.random() < 0.5 else {str(_value(source, 3))[:50]: entry for entry in entries}
    return source.choice(plain)


def _run(folder: Path, x: torch.Tensor) -> str:
    model = PeftModel.from_pretrained(base(), folder)
    with torch.no_grad():
        model(x)
    return "loaded"


def _damage(tensors: dict[str, torch.Tensor], source: random.Random) -> None:
    key = source.choice(sorted(tensors))
    tensor = tensors.pop(key)
    changed = [
        {},
        {key: tensor, f"{key}.more": tensor.clone()},
        {key: tensor.flatten()[:-1].clone()},
        {key: torch.full_like(tensor, float("nan"))},
        {key: tensor.to(torch.int64)},
    ]
    tensors |= source.choice(changed)


FUZZED = [pytest.param(100, 0, id="100"), pytest.param(2000, 1, id="2000", marks=pytest.mark.slow)]
ACCEPTED = (ValueError, TypeError, KeyError, RuntimeError, NotImplementedError)  # the last four are PEFT's and torch's


@pytest.mark.parametrize(("count", "seed"), FUZZED)
@pytest.mark.filterwarnings("ignore")
def test_fuzzed_configs_and_files(count: int, seed: int, tmp_path: Path, monkeypatch: Any) -> None:
    """Each loads, or is refused in bounded time and memory by one line; those of ours with a ValueError."""
    monkeypatch.setattr(fields, "_SECONDS", 1.0)
    source, x = random.Random(seed), torch.randn(3, 6)
    folders = []
    for n, config in enumerate(
        (ResLoRAConfig(r=2, target_modules=["up", "down"]), MoRAConfig(r=2, target_modules=["up"]))
    ):
        folders.append(tmp_path / f"saved{n}")
        adapted(base(), config).save_pretrained(folders[-1])
    outcomes: dict[str, int] = {}
    longest = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(count):
        saved = source.choice(folders)
        config = json.loads((saved / "adapter_config.json").read_text())
        tensors = load_file(saved / "adapter_model.safetensors")
        if source.random() < 0.7:
            for key in source.sample(sorted(config.keys() - {"peft_type", "auto_mapping"}), source.choice([1, 1, 2])):
                config[key] = _value(source)
        else:
            _damage(tensors, source)
        folder = tmp_path / "fuzzed"
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        began = time.monotonic()
        try:
            outcome = _run(folder, x)
        except ACCEPTED as error:
            outcome = type(error).__name__
            longest = max(longest, len(str(error)))
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        assert time.monotonic() - began < 20, config
    assert longest < 5000
    assert outcomes["loaded"] > 0.05 * count
    assert outcomes["ValueError"] > 0.3 * count
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000  # KiB


def test_a_state_dict_of_nothing_is_refused() -> None:
    for tuner in TUNERS:
        model = get_peft_model(base(), tuner(r=2, target_modules=["up"]))
        for state_dict in ({}, {"x": torch.ones(2)}, {"": torch.ones(2)}):
            with pytest.raises(ValueError, match="does not fit adapter 'default'"):
                set_peft_model_state_dict(model, state_dict)
        assert get_peft_model_state_dict(model)


def test_configs_that_are_no_config_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "adapter_config.json"
    for text in ('{"peft_type": "RESLORA", "r": null}', '{"peft_type": "MORA", "r": 1e400}'):
        file.write_text(text)
        with pytest.raises(ValueError, match="cannot be used: r="):
            PeftConfig.from_pretrained(tmp_path)
