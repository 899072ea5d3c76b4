"""The cards of exports and of native adapters, and the report of an export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.adapters import adapted
from helpers.exports import CAUSAL, UP_DOWN, llama, net
from peft import LoHaConfig, LoraConfig, PeftConfig, get_peft_model

from peft_reslora import MoRAConfig, ResLoRAConfig
from peft_reslora.export import export_lora, save_as_lora
from peft_reslora.shared.card import write_native_card


def test_the_card_tells_what_made_the_file(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    base = llama()
    base.name_or_path = "org/model"
    model = adapted(base, ResLoRAConfig(r=2, **CAUSAL))
    export = save_as_lora(tmp_path, model, rank=1)
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.library_name, card.data.base_model, card.data.tags, card.data.pipeline_tag) == (
        "peft",
        "org/model",
        ["lora", "reslora"],
        "text-generation",
    )
    assert "export_lora(model, 'default', rank=1)" in card.text
    assert f"{export.report.worst_error:.2e}" in card.text
    assert all(row.layer in card.text for row in export.report.layers)
    save_as_lora(tmp_path, model, command="peft-reslora export out")
    assert "```sh\npeft-reslora export out\n```" in (tmp_path / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:The base model of the LoRA is the local path:UserWarning")
def test_the_card_names_no_local_path(tmp_path: Path) -> None:
    base = net()
    base.name_or_path = str(tmp_path)
    save_as_lora(tmp_path / "lora", adapted(base, LoraConfig(target_modules=UP_DOWN)))
    assert str(tmp_path) not in (tmp_path / "lora" / "README.md").read_text()


NATIVE = {
    "reslora": ResLoRAConfig(r=2, **CAUSAL),
    "mora": MoRAConfig(r=2, **CAUSAL),
}


@pytest.mark.parametrize("name", NATIVE)
def test_the_native_card_takes_the_place_of_pefts_blanks(name: str, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    base = llama()
    base.config._name_or_path = base.name_or_path = "org/model"
    model = adapted(base, NATIVE[name])
    cards = []
    for _ in range(2):  # as a checkpoint is written over an earlier one
        model.save_pretrained(tmp_path)
        write_native_card(tmp_path, NATIVE[name])
        cards.append((tmp_path / "README.md").read_text())
    assert cards[0] == cards[1]
    card = ModelCard.load(tmp_path / "README.md")
    assert "[More Information Needed]" not in card.text
    assert card.text.count("pip install .") == 1
    assert "save_as_lora" in card.text
    assert "- PEFT " in card.text
    assert (card.data.base_model, card.data.library_name) == ("org/model", "peft")
    assert name in card.data.tags
    assert card.data.pipeline_tag == "text-generation"


def test_the_native_card_leaves_the_users_words(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    config = ResLoRAConfig(r=2, base_model_name_or_path="org/model", **CAUSAL)
    write_native_card(tmp_path, config)
    assert "base_model: org/model" in file.read_text()
    file.write_text("---\nlicense: mit\n---\n# Mine\n")
    for shortcut in ("input", "block"):
        config.shortcut = shortcut
        write_native_card(tmp_path, config)
    file.write_text(file.read_text() + "\n## My results\n")
    write_native_card(tmp_path, config)
    text = file.read_text()
    assert text.startswith("---\nlicense: mit\ntags:\n- reslora\n---\n# Mine\n")
    assert text.endswith("\n## My results\n")
    assert text.count("# ResLoRA (block) adapter") == text.count("pip install .") == 1
    blanks = get_peft_model(net(), LoraConfig(target_modules=UP_DOWN))
    blanks.save_pretrained(tmp_path / "filled")
    filled = tmp_path / "filled" / "README.md"
    filled.write_text(filled.read_text().replace("[More Information Needed]", "My words", 1))
    write_native_card(tmp_path / "filled", config)
    assert "My words" in filled.read_text()


@pytest.mark.parametrize("name", NATIVE)
def test_saving_a_native_adapter_writes_its_card(name: str, tmp_path: Path) -> None:
    adapted(llama(), NATIVE[name]).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "pip install ." in text
    config = PeftConfig.from_pretrained(tmp_path)
    assert f"otherwise says KeyError: '{config.peft_type.value}'" in text


def test_the_report_is_a_table_and_plain_values() -> None:
    report = export_lora(adapted(net(), LoHaConfig(r=3, target_modules=UP_DOWN)), energy=0.8).report
    lines = str(report).splitlines()
    assert len(lines) == 3 + 6 + 1
    assert lines[-1].startswith("rank: directions in the factors of the update; kept: ")
    assert lines[3].startswith("blocks.0.up")
    values = json.loads(json.dumps(report.to_dict()))
    assert values["layers"][0]["rank_before"] == 9
    assert all(0.8 <= row["energy_kept"] <= 1 for row in values["layers"])
