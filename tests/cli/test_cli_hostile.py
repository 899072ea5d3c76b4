"""Configs and files from somebody who means no good: one line, no traceback, in bounded time; nothing is obeyed."""

from __future__ import annotations

import copy
import json
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapters import adapted
from helpers.command import Done
from helpers.exports import CAUSAL, llama, net, outputs
from helpers.oracle import relative_error
from helpers.tolerances import EPS
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from peft_reslora import MoRAConfig, ResLoRAConfig
from peft_reslora.export import export_lora, export_lora_from_files
from peft_reslora.export.reading import by_pattern
from peft_reslora.shared import fields
from peft_reslora.shared.text import code, code_block, printable, prose

pytestmark = pytest.mark.filterwarnings("ignore")
CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "LORA": lambda: LoraConfig(r=3, **CAUSAL),
    "MORA": lambda: MoRAConfig(r=2, mora_type="sharing", **CAUSAL),
    "RESLORA": lambda: ResLoRAConfig(r=2, shortcut="middle", **CAUSAL),
}
SECONDS = 10  # for what is refused at once, or after a trial, on a machine with other work


@pytest.fixture(autouse=True)
def short_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fields, "_SECONDS", 1.0)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name, config in CONFIGS.items():
        folders[name] = tmp_path_factory.mktemp(name)
        adapted(llama(), config()).save_pretrained(folders[name])
    return folders


def refused_on_one_line(done: Done) -> str:
    assert done.code == 1, done
    assert "Traceback" not in done.err
    error = done.err.splitlines()[-1]
    assert error.startswith("peft-reslora: error: ")
    assert len(error) < 1400
    assert error.isprintable()
    return error


def run_both(command: Callable[..., Done], folder: Path, out: Path) -> list[str]:
    start = time.monotonic()
    errors = [refused_on_one_line(command("export", folder, out)), refused_on_one_line(command("inspect", folder))]
    assert time.monotonic() - start < 2 * SECONDS
    assert not out.exists()
    return errors


CONFIG_TEXTS = {
    "null": b"null",
    "list": b"[]",
    "number": b"3",
    "empty": b"",
    "cut off": b'{"peft_type": "LORA", "r"',
    "deep list": b"[" * 100_000,
    "deep object": b'{"a":' * 100_000,
    "deep field": b'{"peft_type": "LORA", "auto_mapping": ' + b"[" * 5_000 + b"]" * 5_000 + b"}",
    "not UTF-8": b'{"peft_type": "LORA", "r": "\xff\xfe"}',
    "many digits": b'{"peft_type": "LORA", "r": ' + b"9" * 5_000 + b"}",
    "no kind": b"{}",
    "null kind": b'{"peft_type": null}',
    "kind that is a list": b'{"peft_type": [1]}',
    "unknown kind": b'{"peft_type": "\\u001b[31mRED"}',
}


@pytest.mark.parametrize("name", CONFIG_TEXTS)
def test_configs_that_are_none(name: str, command: Callable[..., Done], adapters: dict, tmp_path: Path) -> None:
    folder = shutil.copytree(adapters["LORA"], tmp_path / "adapter")
    (folder / "adapter_config.json").write_bytes(CONFIG_TEXTS[name])
    for error in run_both(command, folder, tmp_path / "out"):
        assert "adapter_config.json" in error


FIELDS: dict[str, Any] = {
    "r-text": {"r": "8"},
    "r-null": {"r": None},
    "r-huge": {"r": 10**400},
    "r-infinite": {"r": float("inf")},
    "alpha-list": {"lora_alpha": [16]},
    "alpha-huge": {"lora_alpha": 10**400},
    "alpha-nan": {"lora_alpha": float("nan")},
    "targets-number": {"target_modules": 5},
    "targets-nested": {"target_modules": [["q_proj"]]},
    "ranks-list": {"rank_pattern": ["q_proj"]},
    "ranks-text": {"rank_pattern": {"q_proj": "8"}},
    "alphas-huge": {"alpha_pattern": {"q_proj": 10**400}},
    "base-number": {"base_model_name_or_path": 5},
    "mapping-number": {"auto_mapping": 5},
    "layers-text": {"layers_to_transform": ["x"]},
    "task-unknown": {"task_type": "<script>alert(1)</script>"},
    "expression-that-is-none": {"rank_pattern": {"(": 3}},
    "slow-ranks": {"rank_pattern": {r"(\w+\.?)+!": 3}},
    "slow-targets": {"target_modules": r"(\w+\.?)+!"},
    "slow-exclude": {"exclude_modules": r"(.*.*)*\d!"},
    "many-patterns": {"rank_pattern": {f"(.*){n}x": 3 for n in range(5_000)}},
}


@pytest.mark.parametrize("kind", ["LORA", "RESLORA"])
@pytest.mark.parametrize("name", FIELDS)
def test_fields_that_no_config_has(
    name: str,
    kind: str,
    command: Callable[..., Done],
    adapters: dict,
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(adapters[kind], tmp_path / "adapter")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **FIELDS[name]}))
    run_both(command, folder, tmp_path / "out")


def test_a_slow_chain_pattern(command: Callable[..., Done], adapters: dict, tmp_path: Path) -> None:
    folder = shutil.copytree(adapters["RESLORA"], tmp_path / "adapter")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chain_pattern": r"(\w+\.?)+(\d+)!"}))
    for error in run_both(command, folder, tmp_path / "out"):
        assert "chain_pattern" in error


def test_a_base_of_endless_size(command: Callable[..., Done], adapters: dict, tmp_path: Path) -> None:
    """From its config alone; also where the adapter names it as its base."""
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 10**9}
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    refused_on_one_line(command("inspect", tmp_path / "base"))
    refused_on_one_line(command("export", adapters["LORA"], tmp_path / "out", "--base", tmp_path / "base"))
    folder = shutil.copytree(adapters["MORA"], tmp_path / "adapter")
    file = folder / "adapter_config.json"
    base = {"base_model_name_or_path": str(tmp_path / "base")}
    file.write_text(json.dumps({**json.loads(file.read_text()), **base}))
    assert "hold the shapes" in refused_on_one_line(command("export", folder, tmp_path / "out"))
    (tmp_path / "base" / "config.json").write_bytes(b"[" * 100_000)
    refused_on_one_line(command("inspect", tmp_path / "base"))
    refused_on_one_line(command("export", folder, tmp_path / "out", "--base", tmp_path / "base"))


WEIGHTS = {
    "empty": b"",
    "text": b"this is no file of tensors, but it is longer than its header",
    "endless header": b"\xff" * 64,
    "header that is none": (20).to_bytes(8, "little") + b'{"a": [1, 2, 3, 4]} ',
    "deep header": (40_000).to_bytes(8, "little") + b"[" * 40_000,
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_are_none(name: str, command: Callable[..., Done], adapters: dict, tmp_path: Path) -> None:
    folder = shutil.copytree(adapters["LORA"], tmp_path / "adapter")
    (folder / "adapter_model.safetensors").write_bytes(WEIGHTS[name])
    for error in run_both(command, folder, tmp_path / "out"):
        assert "adapter_model.safetensors" in error


NAME = "base_model.model.model.layers.0.self_attn.q_proj"
TENSORS: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]] = {
    "control characters": lambda t: {key.replace("q_proj", "q\x1b[2J\n\u202eproj"): v for key, v in t.items()},
    "one dimension": lambda t: {**t, f"{NAME}.lora_A.weight": torch.ones(24)},
    "no dimension": lambda t: {**t, f"{NAME}.lora_B.weight": torch.tensor(1.0)},
    "no numbers": lambda t: {**t, f"{NAME}.lora_A.weight": torch.ones(0, 24)},
    "not finite": lambda t: {**t, f"{NAME}.lora_B.weight": t[f"{NAME}.lora_B.weight"] * float("nan")},
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_no_adapter_has(name: str, command: Callable[..., Done], adapters: dict, tmp_path: Path) -> None:
    folder = shutil.copytree(adapters["LORA"], tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    save_file({key: tensor.clone() for key, tensor in TENSORS[name](load_file(file)).items()}, file)
    refused_on_one_line(command("export", folder, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


VALUES: list[Any] = [None, True, -1, 0, 1, 10**400, 1e308, float("nan"), "", "x", "\x1b[0m", [], [1], ["q_proj"], {}]
VALUES += [{"q_proj": 1}, {"q_proj": None}, [[]], {"": {}}, "(a+)+", "all-linear"]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("count", [100, pytest.param(700, marks=pytest.mark.slow)])
def test_fuzzed_configs_and_files_are_exported_or_refused(
    count: int, kind: str, adapters: dict, tmp_path: Path
) -> None:
    """Fields of any kind, damaged bytes: a ValueError, or an export; nothing else."""
    generator = random.Random(f"{kind}{count}")
    config = json.loads((adapters[kind] / "adapter_config.json").read_text())
    weights = (adapters[kind] / "adapter_model.safetensors").read_bytes()
    errors = []
    for _ in range(count):
        changed = copy.deepcopy(config)
        for field in generator.sample(sorted(config), generator.randint(0, 2)):
            changed[field] = generator.choice(VALUES)
        damaged = bytearray(weights)
        for _ in range(generator.randint(0, 3)):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        (tmp_path / "adapter_config.json").write_text(json.dumps(changed))
        (tmp_path / "adapter_model.safetensors").write_bytes(damaged)
        try:
            export_lora_from_files(tmp_path)
        except ValueError as error:
            errors.append(str(error))
    assert len(errors) > count // 2
    assert all(errors)


def test_entries_are_found_by_pattern_as_peft_finds_them() -> None:
    patterns = {"up": 1, r"blocks\.\d+\.(down|gate)": 2, "blocks.1.down": 3, "layers.*.up": 4, "missing|x": 5}
    for name in ("up", "blocks.0.up", "blocks.1.down", "a.blocks.12.gate", "layers.3.up", "other", "x", "xx"):
        key = get_pattern_key(list(patterns), name)
        assert by_pattern(patterns, name, 0) == patterns.get(key, 0)
    assert by_pattern(None, "up", 7) == 7


# What is shown of names


HOSTILE = "a`b|c<script>alert(1)</script>[x](http://e)*b*_i_&amp;$m$\x1b[31m\n# h\u202e"


def rendered(text: str) -> str:
    """Markdown's inline escapes undone, which a reader sees as the plain character."""
    return re.sub(r"\\([\\`*\[\]<>&|~$_])", r"\1", text)


def test_prose_is_escaped_and_reads_as_it_was() -> None:
    assert rendered(prose(HOSTILE)) == printable(HOSTILE)
    bare = re.sub(r"\\.", "", prose(HOSTILE))  # what is left without what is escaped
    assert not set(bare) & set("`*[]<>&|$")
    assert prose("model.layers.0.self_attn.q_proj: 1.2e-03") == "model.layers.0.self_attn.q_proj: 1.2e-03"
    assert printable(HOSTILE).isprintable()


def test_code_ends_where_it_should() -> None:
    assert code("a`b``c|d") == "``` a`b``c\\|d ```"
    assert code("q_proj") == "`q_proj`"
    assert code_block("sh", "a ```` b\n```\n<b>") == "`````sh\na ```` b\\n```\\n<b>\n`````"


def test_cards_and_reports_show_names_and_obey_none(tmp_path: Path) -> None:
    model = net()
    model.add_module(name := HOSTILE.replace(".", ""), model.head)
    model.head = torch.nn.Identity()
    config = LoraConfig(r=3, target_modules=[name], base_model_name_or_path="org/<script>")
    adapter = "</code>```\n<img src=x onerror=alert(1)>"
    export = export_lora(get_peft_model(model, config, adapter_name=adapter), adapter)
    assert all(line.isprintable() for line in str(export.report).splitlines())
    assert len(str(export.report).splitlines()) == 5
    export.save_pretrained(tmp_path / "lora", command=f"peft-reslora export {adapter}")
    card = (tmp_path / "lora" / "README.md").read_text(encoding="utf-8")
    assert all(line.isprintable() for line in card.splitlines())
    outside = re.sub(r"(?ms)^(`{3,})\w+\n.*?\n\1$", "", card)  # without blocks of code
    outside = re.sub(r"(`+) .*? \1", "", outside)  # and code in lines
    assert "script" not in outside
    assert "<img" not in outside


def test_the_terminal_shows_no_control_characters(
    command: Callable[..., Done],
    adapters: dict,
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(adapters["RESLORA"], tmp_path / "adapter")
    file = folder / "adapter_config.json"
    base = "org/model\x1b[2J\rmerge: exact\nmerge: exact"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": base}))
    done = command("inspect", folder)
    assert done.code == 0
    assert all(line.isprintable() for line in done.out.split("\n"))
    assert "merge: exact" not in done.out.splitlines()


# Bases of other classes


def llava() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    text = LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=53,
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text)).eval()


def test_an_adapter_of_a_part_of_its_base_is_exported_from_files(tmp_path: Path) -> None:
    """The base's config is that of both towers, and the adapter was trained on one."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision, text = CLIPVisionConfig(image_size=8, patch_size=4, **sizes), CLIPTextConfig(vocab_size=31, **sizes)
    CLIPConfig(
        vision_config=vision.to_dict(), text_config=text.to_dict(), architectures=["CLIPModel"]
    ).save_pretrained(tmp_path / "base")
    config = MoRAConfig(r=2, mora_type="sharing", target_modules=["q_proj", "fc1"])
    model = adapted(CLIPVisionModel(vision), config)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    assert set(export_lora_from_files(tmp_path / "adapter").shapes()) == set(
        export_lora(model, fill_missing_layers=False).shapes()
    )


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_vision_language_base_is_loaded_as_what_it_was_saved(
    kind: str,
    command: Callable[..., Done],
    tmp_path: Path,
) -> None:
    llava().save_pretrained(tmp_path / "base")
    base = LlavaForConditionalGeneration.from_pretrained(tmp_path / "base").eval()
    config = CONFIGS[kind]()
    if kind == "RESLORA":
        config.shortcut = "block"
    config.target_modules = {"q_proj", "down_proj"}
    model = adapted(base, config)
    model.save_pretrained(tmp_path / "adapter")
    for way in (["--base", tmp_path / "base"], []):  # with the base, and from the files and the base's config
        done = command("export", tmp_path / "adapter", tmp_path / "lora", *way)
        assert done.code == 0, done.err
        loaded = PeftModel.from_pretrained(llava(), tmp_path / "lora").eval()
        effect = outputs(model) - outputs(llava())
        assert relative_error(outputs(loaded) - outputs(llava()), effect) < 1000 * EPS
    done = command("inspect", tmp_path / "base", "--target-modules", "q_proj")
    assert done.code == 0, done.err
    assert "language_model.layers.*.self_attn.q_proj" in done.out
