"""Exports from an adapter's files alone are those of the model, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.adapters import adapted
from helpers.calibration import record_norms
from helpers.exports import CAUSAL, IDS, UP_DOWN, llama, net
from helpers.oracle import relative_error
from helpers.tolerances import rounding
from peft import LoHaConfig, LoraConfig

from peft_reslora import MoRAConfig, ResLoRAConfig
from peft_reslora.export import export_lora, export_lora_from_files


def test_lora_files_give_what_the_model_gives(tmp_path: Path) -> None:
    config = LoraConfig(
        r=3, target_modules=UP_DOWN, rank_pattern={"up": 5}, alpha_pattern={"blocks.1.down": 9}, use_rslora=True
    )
    model = adapted(net(), config)
    model.save_pretrained(tmp_path)
    expected, actual = export_lora(model, rank=2), export_lora_from_files(tmp_path, rank=2)
    assert actual.config == expected.config
    assert all(relative_error(actual.state_dict[name], t) <= rounding(37) for name, t in expected.state_dict.items())
    assert {row.layer: row for row in actual.report.layers} == {row.layer: row for row in expected.report.layers}


@pytest.mark.parametrize("shortcut", ["input", "block", "middle"])
def test_reslora_files_give_what_the_model_gives(shortcut: str, tmp_path: Path) -> None:
    model = adapted(llama(), ResLoRAConfig(r=2, shortcut=shortcut, **CAUSAL))
    record_norms(model, [{"input_ids": IDS}])
    model.save_pretrained(tmp_path)
    expected, actual = export_lora(model), export_lora_from_files(tmp_path)
    assert actual.config == expected.config
    assert all(relative_error(actual.state_dict[name], t) <= rounding(56) for name, t in expected.state_dict.items())
    actual.save_pretrained(tmp_path / "lora", llama())


def test_files_cannot_give_an_estimate_from_base_weights(tmp_path: Path) -> None:
    adapted(llama(), ResLoRAConfig(r=2, shortcut="input", merge_estimator="weight_norm", **CAUSAL)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match=r"weight_norm.*base"):
        export_lora_from_files(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": r"blocks\.\d\.up"},
        {"target_modules": ["up"], "layers_to_transform": [0, 2], "layers_pattern": "blocks"},
    ],
)
def test_files_with_narrowed_targets_give_full_names(fields: dict, tmp_path: Path) -> None:
    adapted(net(), LoraConfig(r=3, **fields)).save_pretrained(tmp_path / "native")
    export = export_lora_from_files(tmp_path / "native")
    assert all(name.startswith("blocks.") for name in export.config.target_modules)
    export.save_pretrained(tmp_path / "lora", net())


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    model = adapted(net(), LoraConfig(r=3, target_modules=UP_DOWN))
    model.save_pretrained(tmp_path)
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    content, text = weights.read_bytes(), config.read_text()
    for damaged in (content[:-7], content[:5], b""):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors is damaged"):
            export_lora_from_files(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors does not exist"):
        export_lora_from_files(tmp_path)
    weights.write_bytes(content)
    for damaged_text in (
        text[:40],
        "[]",
        '{"peft_type": "LORA", "use_rslora": true, "bias": 3, "layers_pattern": "h"}',
    ):
        config.write_text(damaged_text)
        with pytest.raises(ValueError, match=r"adapter_config\.json"):
            export_lora_from_files(tmp_path)
    config.unlink()
    with pytest.raises(ValueError, match=r"adapter_config\.json does not exist"):
        export_lora_from_files(tmp_path)


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    for config, match in [
        (LoHaConfig(r=3, target_modules=UP_DOWN), r"peft_type 'LOHA'.*LORA, MORA, RESLORA.*base model"),
        (MoRAConfig(r=3, target_modules=UP_DOWN), r"MoRA, whose files do not hold the shapes.*hf download"),
    ]:
        adapted(net(), config).save_pretrained(tmp_path / config.peft_type)
        with pytest.raises(ValueError, match=match):
            export_lora_from_files(tmp_path / config.peft_type)
    for name, fields, match in [
        ("dora", {"use_dora": True}, "use_dora makes"),
        ("bias", {"lora_bias": True}, "lora_B.bias"),
        ("saved", {"modules_to_save": ["head"]}, "holds more than LoRA factors"),
        ("embed", {"target_modules": ["embed"]}, "lora_embedding_A"),
    ]:
        adapted(net(), LoraConfig(**{"target_modules": UP_DOWN, **fields})).save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=match):
            export_lora_from_files(tmp_path / name)
