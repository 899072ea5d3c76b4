"""A few models of the sweep (`tests/helpers/sweep.py` sweeps all of them, and writes docs/models.md)."""

from __future__ import annotations

import re

import diffusers
import pytest
from helpers import diffusers_models
from helpers.repository import ROOT
from helpers.sweep import LIBRARIES, Verdict, page, sweep
from helpers.transformers_models import shrink

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
DIFFUSERS_LINKS = {
    "AutoencoderKL": 6,  # of its convolutions
    "CogVideoXTransformer3DModel": 16,
    "FluxTransformer2DModel": 40,
    "HunyuanDiT2DModel": 33,
    "PixArtTransformer2DModel": 20,
    "QwenImageTransformer2DModel": 28,
    "SD3Transformer2DModel": 24,
    "SanaTransformer2DModel": 16,
    "UNet2DConditionModel": 105,
    "WanTransformer3DModel": 20,
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


@pytest.mark.slow
@pytest.mark.parametrize("name", DIFFUSERS_LINKS)
def test_every_shortcut_computes_what_the_oracle_does_on_diffusers(name):
    verdict = sweep(name, "diffusers")
    assert verdict.skipped == ""
    assert verdict.by_shortcut == dict.fromkeys(LIBRARIES["diffusers"].modes, "right")
    assert verdict.links == DIFFUSERS_LINKS[name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("CogView4Transformer2DModel", "ran again"),
        ("HiDreamImageTransformer2DModel", "experts"),
        ("UNet2DConditionModel, convolutions too", "(2, 32, 2, 2) and (2, 32, 1, 1)"),
    ],
)
def test_what_is_not_right_on_diffusers_names_its_cause(name, cause):
    verdict = sweep(name, "diffusers")
    assert verdict.unclear == []
    assert {m for m, word in verdict.by_shortcut.items() if word == "right"} == {"block", "block of all", "MoRA"}
    assert cause in verdict.by_shortcut["input"]


@pytest.mark.slow
def test_a_class_that_holds_others_or_needs_more_is_not_built():
    with pytest.raises(ValueError, match="several models"):
        diffusers_models.build("FluxMultiControlNetModel")
    with pytest.raises(ValueError, match="UNetMotionModel"):
        diffusers_models.build("MotionAdapter")


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
    text = page("transformers", [swin, Verdict("bark", "ValueError: no")])
    assert "| swin | 20 | 8 | 12 | refused | right | - | refused: windows / Use shortcut='block' |" in text
    assert "1 more were not swept" in text
    assert "preparation: bark." in text


def test_a_page_keeps_what_it_says_of_the_other_library():
    unet = Verdict("UNet", "", 3, 1, 2, dict.fromkeys(LIBRARIES["diffusers"].modes, "right"))
    first = page("diffusers", [unet, Verdict("Vae", "ValueError: no: none")])
    assert "| UNet | 3 | 1 | 2 | right | right | right | right | right |  |" in first
    assert "- Vae: no: none" in first
    both = page("transformers", [Verdict("bert", "", 2, 1, 1, {"block": "right"})], first)
    assert both.index("| bert |") < both.index("| UNet |")
    again = page("transformers", [Verdict("gpt2", "", 2, 1, 1, {"block": "right"})], both)
    assert again == both.replace("bert", "gpt2")


@pytest.mark.slow
def test_the_page_names_every_model_class_of_diffusers():
    text = (ROOT / "docs/models.md").read_text(encoding="utf-8").partition("\n## diffusers\n")[2]
    if f"diffusers {diffusers.__version__}," not in text:
        pytest.skip("the page is of another version")
    swept = re.findall(r"^\| (\w+(?:, convolutions too)?) \| \d", text, re.M)
    others = re.findall(r"^- ([^:]+): .", text, re.M)
    assert sorted(swept + others) == sorted(diffusers_models.names())
