"""What is not exported, and what is warned of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.adapters import adapted
from helpers.exports import CAUSAL, UP_DOWN, llama, net
from helpers.tolerances import rounding
from peft import (
    FourierFTConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_reslora.export import export_lora, export_lora_from_files, save_as_lora


def refused(base: nn.Module, config: PeftConfig, match: str, **arguments: object) -> None:
    model = get_peft_model(base, config)
    with pytest.raises(ValueError, match=match):
        export_lora(model, **arguments)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"use_dora": True}, "'default' fits into no plain LoRA: use_dora makes.*merge_and_unload"),
        ({"bias": "all"}, "bias='all' trains biases"),
        ({"lora_bias": True}, r"layer 'blocks\.0\.up': it trains a bias \(lora_bias=True\)"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changed the base weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' changed the base weights"),
        ({"init_lora_weights": "mica"}, "variant MiCALinearVariant"),
        ({"modules_to_save": ["head"]}, r"trains the module 'head' itself \(ModulesToSaveWrapper\)"),
        ({"target_modules": [], "target_parameters": ["head.weight"]}, "target_parameters changes more"),
        ({"bias": "all", "use_dora": True}, "bias='all' trains biases.*; use_dora"),
    ],
)
def test_what_a_lora_cannot_hold_is_refused(fields: dict, match: str) -> None:
    refused(net(), LoraConfig(**{"target_modules": UP_DOWN, **fields}), match)


def test_new_tokens_are_refused() -> None:
    refused(llama(), LoraConfig(trainable_token_indices=[3], **CAUSAL), "trainable_token_indices changes more")


def test_other_methods_are_refused() -> None:
    ia3 = IA3Config(target_modules=UP_DOWN, feedforward_modules=["down"])
    refused(net(), ia3, "ia3.layer.Linear is no layer whose update is a matrix added", rank=8)
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    refused(llama(), prompts, "changes the prompt and no weights")


def test_a_full_rank_method_needs_a_rank_or_an_energy() -> None:
    model = adapted(net(), FourierFTConfig(n_frequency=50, target_modules=UP_DOWN))
    with pytest.raises(ValueError, match="no exact factors of low rank; pass rank= or energy="):
        export_lora(model)
    delta = model.base_model.model.blocks[2].up.get_delta_weight("default").detach()
    S = torch.linalg.svdvals(delta)
    row = export_lora(model, rank=4).report.layers[-2]
    assert row.layer == "blocks.2.up"
    assert row.relative_error == pytest.approx(float(S[4:].norm() / S.norm()), rel=rounding(20 * 37))


def test_a_layer_without_factors_of_its_own_gives_its_dense_update(monkeypatch: pytest.MonkeyPatch) -> None:
    def merged_factors(self: BaseTunerLayer, adapter_name: str) -> None:
        raise ValueError("this type is full rank.")

    model = adapted(net(), FourierFTConfig(n_frequency=50, target_modules=UP_DOWN))
    expected = export_lora(model, energy=0.9)
    monkeypatch.setattr(type(model.base_model.model.blocks[0].up), "merged_factors", merged_factors, raising=False)
    with pytest.raises(ValueError, match=r"layer 'blocks\.0\.up': this type is full rank\.$"):
        export_lora(model)
    assert export_lora(model, energy=0.9).report.layers == expected.report.layers


def test_unknown_adapters_and_bare_models_are_refused() -> None:
    model = adapted(net(), LoraConfig(target_modules=UP_DOWN))
    with pytest.raises(ValueError, match="no adapter 'other', it has 'default'"):
        export_lora(model, "other")
    with pytest.raises(ValueError, match="Net has no adapters"):
        export_lora(net())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_factors_are_refused_by_name(value: float) -> None:
    model = adapted(net(), LoHaConfig(r=2, target_modules=UP_DOWN))
    model.base_model.model.blocks[1].down.hada_w1_a["default"].data[0, 0] = value
    with pytest.raises(ValueError, match=r"'default', layer 'blocks\.1\.down': its factors hold NaN or inf"):
        export_lora(model, rank=4)


def test_factors_beyond_half_precision_are_refused() -> None:
    model = adapted(net(), LoraConfig(r=2, target_modules=UP_DOWN))
    model.base_model.model.blocks[1].down.lora_A["default"].weight.data *= 1e6
    with pytest.raises(ValueError, match=r"layer 'blocks\.1\.down': its factors do not fit into torch.float16"):
        export_lora(model, dtype=torch.float16)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"rank": 4, "energy": 0.5}, "not both; got rank=4 and energy=0.5"),
        ({"rank": 0}, "rank=0 must be a positive integer"),
        ({"rank": -1}, "rank=-1"),
        ({"rank": 0.9}, "rank=0.9 must be a positive integer; for a fraction"),
        ({"rank": True}, "rank=True"),
        ({"energy": 0}, r"energy=0 must be a number in \(0, 1\]"),
        ({"energy": 1.5}, "energy=1.5"),
        ({"energy": float("nan")}, "energy=nan"),
        ({"dtype": torch.float64}, "dtype=torch.float64 is not written"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        export_lora(net(), **arguments)


def test_parameters_that_are_elsewhere_are_refused() -> None:
    model = adapted(net(), LoraConfig(target_modules=UP_DOWN))
    model.base_model.model.blocks[0].up.lora_A.to("meta")
    with pytest.raises(ValueError, match=r"layer 'blocks\.0\.up': its parameters are sharded or offloaded"):
        export_lora(model)


# Warnings


@pytest.mark.filterwarnings("ignore:The base model of the LoRA is the local path:UserWarning")
@pytest.mark.parametrize("way", ["export_lora", "save_as_lora", "export_lora_from_files"])
def test_warns_where_other_programs_need_to_know(way: str, tmp_path: Path) -> None:
    base = net()
    base.name_or_path = str(tmp_path)
    model = adapted(base, LoraConfig(r=25, target_modules=[*UP_DOWN, "head"]))
    model.save_pretrained(tmp_path / "native")
    ways: dict[str, Callable[[], object]] = {
        "export_lora": lambda: export_lora(model, rank=20),
        "save_as_lora": lambda: save_as_lora(tmp_path / "lora", model, rank=20),
        "export_lora_from_files": lambda: export_lora_from_files(tmp_path / "native", rank=20),
    }
    with pytest.warns(UserWarning, match="The LoRA has r=32") as caught:
        ways[way]()
    messages = [str(w.message) for w in caught]
    assert len(messages) == 3
    assert "vLLM needs --max-lora-rank 32" in messages[0]
    assert "smaller side of 7 modules (blocks.0." in messages[1]
    assert str(tmp_path) in messages[2]
    assert all(w.filename == __file__ for w in caught)


def test_a_progress_bar_is_shown_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted(net(), LoraConfig(r=3, target_modules=UP_DOWN))
    export_lora(model)
    assert capsys.readouterr().err == ""
    export_lora(model, progressbar=True)
    assert "Exporting as LoRA: 100%" in capsys.readouterr().err


def test_a_small_lora_of_a_hub_model_warns_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    base = net()
    base.name_or_path = "org/model"
    model = adapted(base, LoraConfig(target_modules=UP_DOWN))
    recwarn.clear()
    export_lora(model)
    assert not recwarn.list
