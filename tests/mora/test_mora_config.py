"""MoRA's config: its faults, its file, the choice of a type, and default targets."""

from __future__ import annotations

import pytest
from helpers.mora import mlp, mora_config
from helpers.tiny_models import TINY_MODELS
from peft import PeftConfig, get_peft_model

from peft_reslora.mora import AUTO_SHARING_FROM_RANK, MoRAConfig, MoRALayer, layer_sizes


def test_all_faults_are_reported_at_once():
    with pytest.raises(ValueError, match="cannot be used") as info:
        MoRAConfig(
            r=0,
            mora_type="rope",
            mora_dropout=1.0,
            bias="lora_only",
            init_weights="gaussian",
            rank_pattern={"q_proj": -1},
            target_modules=".*q_proj",
            layers_to_transform=[0],
        )
    for part in ("r=0", "'rope'", "'rotation'", "mora_dropout=1.0", "'lora_only'", "'mora_only'", "'gaussian'"):
        assert part in str(info.value)
    assert "rank_pattern['q_proj']=-1" in str(info.value)
    assert "layers_to_transform" in str(info.value)


@pytest.mark.parametrize("r", [True, 2.0, "8", None, -3])
def test_rank_must_be_a_positive_integer(r):
    with pytest.raises(ValueError, match="must be a positive integer"):
        MoRAConfig(r=r)


def test_config_survives_saving(tmp_path):
    MoRAConfig(r=5, target_modules=["q_proj"], rank_pattern={"q_proj": 7}).save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, MoRAConfig)
    assert (loaded.r, loaded.mora_type, loaded.rank_pattern) == (5, "auto", {"q_proj": 7})
    assert loaded.target_modules == {"q_proj"}


def test_auto_is_rotation_for_small_ranks_and_sharing_for_large_ones():
    model = get_peft_model(
        mlp(), mora_config("auto", r=8, rank_pattern={"lin1": AUTO_SHARING_FROM_RANK}, target_modules=["lin0", "lin1"])
    )
    sizes = {size.name.rpartition(".")[2]: size for size in layer_sizes(model)}
    assert sizes["lin0"].mora_type == "rotation"
    assert sizes["lin1"].mora_type == "sharing"
    assert (sizes["lin0"].r, sizes["lin1"].r) == (8, AUTO_SHARING_FROM_RANK)
    assert model.peft_config["default"].r == 8
    assert sizes["lin0"].lora_parameters == 8 * (33 + 17)
    assert sizes["lin0"].parameters == sizes["lin0"].square_size ** 2 == 400


def test_default_targets_are_those_of_lora():
    model = TINY_MODELS["llama"].make()
    get_peft_model(model, MoRAConfig())
    assert {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, MoRALayer)} == {
        "q_proj",
        "v_proj",
    }
