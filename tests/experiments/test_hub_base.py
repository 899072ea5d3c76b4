"""A base of the Hub that cannot be reached is named at once, with the way out."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants
from transformers import LlamaConfig

from peft_reslora.experiments import hub_rows
from peft_reslora.experiments.dry_run import base_config
from peft_reslora.experiments.generation import load_generation_base
from peft_reslora.experiments.hub_base import reading_base
from peft_reslora.experiments.image_base import load_pipeline
from peft_reslora.experiments.settings import BaseSettings


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The Hub's address, once for each time that it was asked; it never answers."""
    addresses: list[str] = []

    class Session:
        def head(self, address: str, **_: object) -> None:
            addresses.append(address)
            raise TimeoutError

    monkeypatch.setattr(hub_rows, "get_session", Session)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return addresses


@pytest.mark.parametrize(
    "load",
    [
        lambda name: base_config(BaseSettings(name=name)),
        lambda name: load_generation_base(BaseSettings(name=name)),
        lambda name: load_pipeline(name, "float32"),
    ],
    ids=["config", "generation", "pipeline"],
)
def test_a_base_that_cannot_be_reached_is_named_with_the_way_out(load, asked):
    with pytest.raises(ValueError, match=r"The base org/model is not in the cache .* base\.name to a folder"):
        load("org/model")
    assert len(asked) == 1
    assert constants.HF_HUB_OFFLINE is False


def test_a_folder_asks_nobody(asked, tmp_path):
    LlamaConfig(hidden_size=12, num_attention_heads=4).save_pretrained(tmp_path / "base")
    assert base_config(BaseSettings(name=str(tmp_path / "base"))).hidden_size == 12
    assert asked == []


def test_other_faults_of_a_hub_that_answers_keep_their_text(monkeypatch):
    monkeypatch.setattr("peft_reslora.experiments.hub_base.hub_answers", lambda: True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(OSError, match="no such repository"), reading_base("org/model"):
        raise OSError("no such repository")
