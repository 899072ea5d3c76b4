"""A folder is written whole or not at all, and read back as proof."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.adapters import adapted
from helpers.exports import UP_DOWN, net
from helpers.tiny_models import Block
from peft import LoHaConfig, LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_reslora import ResLoRAConfig
from peft_reslora.export import LoraExport, export_lora, save_as_lora


def small_export() -> LoraExport:
    return export_lora(adapted(net(), LoraConfig(r=3, target_modules=UP_DOWN)))


@pytest.mark.parametrize("step", ["lora_card", "save_file", "_prove"])
def test_a_failure_while_writing_changes_nothing(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    export = small_export()
    export.save_pretrained(tmp_path / "old")
    before = {p.name: p.read_bytes() for p in (tmp_path / "old").iterdir()}
    monkeypatch.setattr(f"peft_reslora.export.checkpoint.{step}", fail)
    for name in ("old", "new"):
        with pytest.raises(OSError, match="disk full"):
            export_lora(adapted(net(), LoraConfig(r=9, target_modules=UP_DOWN))).save_pretrained(
                tmp_path / name, net()
            )
    assert [p.name for p in tmp_path.iterdir()] == ["old"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "old").iterdir()} == before


def test_what_is_no_export_is_not_replaced(tmp_path: Path) -> None:
    export = small_export()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        export.save_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match=r"holds other files \(file\)"):
        export.save_pretrained(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="notes holds files, and no earlier export"):
        export.save_pretrained(tmp_path / "notes")
    assert (tmp_path / "notes" / "README.md").read_text() == "mine"


@pytest.mark.parametrize("config_class", [LoHaConfig, LoraConfig, ResLoRAConfig])
def test_the_adapter_that_is_exported_is_not_replaced(config_class: type, tmp_path: Path) -> None:
    model = adapted(net(), config_class(r=2, target_modules=UP_DOWN))
    model.save_pretrained(tmp_path / "native")
    before = {p.name: p.read_bytes() for p in (tmp_path / "native").iterdir()}
    with pytest.raises(ValueError, match=r"holds an adapter with peft_type '[A-Z]+', and no earlier export"):
        save_as_lora(tmp_path / "native", model)
    assert {p.name: p.read_bytes() for p in (tmp_path / "native").iterdir()} == before
    save_as_lora(tmp_path / "lora", model)
    again = PeftModel.from_pretrained(net(), tmp_path / "lora")
    save_as_lora(tmp_path / "lora", again)  # an export may be replaced, also by one made from it


# Read back as proof


def test_the_proof_leaves_the_base_model_alone(tmp_path: Path) -> None:
    base = net()
    small_export().save_pretrained(tmp_path, base)
    assert not any(isinstance(module, BaseTunerLayer) for module in base.modules())


def test_the_proof_fails_on_another_base_model(tmp_path: Path) -> None:
    wider = net()
    wider.blocks.append(Block(20, 37))
    with pytest.raises(ValueError, match=r"adapts other layers.*blocks\.3"):
        small_export().save_pretrained(tmp_path / "lora", wider)
    other_shape = net()
    other_shape.blocks[0].up = nn.Linear(20, 38)
    with pytest.raises(ValueError, match="does not load onto the base model"):
        small_export().save_pretrained(tmp_path / "lora", other_shape)
    with pytest.raises(ValueError, match="has an adapter already"):
        small_export().save_pretrained(tmp_path / "lora", adapted(net(), LoraConfig(target_modules=["up"])))
    assert not (tmp_path / "lora").exists()


def test_the_proof_fails_on_another_scale(tmp_path: Path) -> None:
    export = small_export()
    export.config.lora_alpha = 16
    with pytest.raises(ValueError, match=r"layer 'blocks\.0\.up' computes something else"):
        export.save_pretrained(tmp_path / "lora", net())
