"""A few model types of the sweep (`tests/helpers/sweep.py` sweeps all of them, and writes docs/models.md)."""

from __future__ import annotations

import pytest
from helpers.sweep import Verdict, page, shrink, sweep

# The links of all linear layers of the shrunken model; those of attention in hybrids among them.
LINKS = {
    "qwen3_next": 19,
    "qwen3_5_text": 18,
    "lfm2": 7,
    "nemotron_h": 9,
    "jamba": 10,
    "minimax": 7,
    "olmo_hybrid": 20,
    "gemma4_text": 23,
    "llama": 21,
    "qwen3_moe": 12,
    "deberta": 12,
    "modernbert": 12,
    "mamba": 3,
    "t5": 48,
    "vit": 18,
    "wav2vec2": 18,
}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", LINKS)
def test_every_shortcut_computes_what_the_oracle_does(model_type):
    verdict = sweep(model_type)
    assert verdict.skipped == ""
    assert verdict.by_shortcut == dict.fromkeys(("input", "block", "middle"), "right")
    assert verdict.links == LINKS[model_type]


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "cause"), [("gemma3n_text", "modality_router"), ("pegasus_x", "ran again")])
def test_what_is_not_right_names_its_cause(model_type, cause):
    verdict = sweep(model_type)
    assert verdict.unclear == []
    assert verdict.by_shortcut["block"] == "right"
    assert all(cause in verdict.by_shortcut[shortcut] for shortcut in ("input", "middle"))


def test_configs_shrink_to_two_blocks_of_each_kind():
    kinds = ["mamba", "mamba", "attention"] * 4
    values = {"num_hidden_layers": 12, "layer_types": kinds, "widths": list(range(12)), "hidden_size": 4096}
    values |= {"text_config": {"vocab_size": 50_000, "num_hidden_layers": 12}, "eos_token_id": 49_999}
    assert shrink(values) == {
        "num_hidden_layers": 4,
        "layer_types": ["mamba", "attention"] * 2,
        "widths": [0, 1, 2, 3],
        "hidden_size": 32,
        "text_config": {"vocab_size": 99, "num_hidden_layers": 4},
        "eos_token_id": 2,
    }


def test_the_page_has_a_row_for_each_model_and_names_the_others():
    swin = Verdict("swin", "", 20, 8, 12, {"input": "refused: windows | Use shortcut='block'", "block": "right"})
    text = page([swin, Verdict("bark", "ValueError: no")])
    assert "| swin | 20 | 8 | 12 | refused | right | - | refused: windows / Use shortcut='block' |" in text
    assert "1 more types were not swept" in text
    assert "preparation: bark." in text
