"""State dicts in the format of LMOps' ResLoRA: what is imported computes their training forward, or is refused."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import TINY_MODELS
from helpers.tolerances import MODEL64
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration

from peft_reslora.imports import import_adapter
from peft_reslora_cli.import_ import run

LLAMA, T5, BERT = TINY_MODELS["llama"], TINY_MODELS["t5"], TINY_MODELS["bert"]
Pairs = dict[str, list[tuple[Tensor, Tensor]]]


def config(**fields: Any) -> dict[str, Any]:
    return {
        "rank": 3,
        "lora_alpha": 6,
        "lora_dropout": 0.1,
        "start_index": 0,
        "target_modules": "q.v",
        "lora_num": 1,
        "merge_weights": True,
        "res_flag": 2,
        "merge_flag": 0,
        "pre_num": 1,
        "merge_4_len": 7,
        **fields,
    }


def make_pairs(model: nn.Module, words: list[str], settings: dict[str, Any]) -> Pairs:
    torch.manual_seed(1)
    r = settings["rank"]
    return {
        name: [
            (torch.randn(r, layer.in_features) / 5, torch.randn(layer.out_features, r) / 5)
            for _ in range(settings["lora_num"])
        ]
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and any(word in name for word in words)
    }


def tensors_of(pairs: Pairs) -> dict[str, Tensor]:
    return {
        f"{name}.loras.{i}.lora_{part}": nn.Parameter(tensor)
        for name, several in pairs.items()
        for i, pair in enumerate(several)
        for part, tensor in zip("AB", pair, strict=True)
    }


def write_theirs(folder: Path, pairs: Pairs, settings: dict[str, Any]) -> None:
    """As their `save_checkpoint` does."""
    folder.mkdir()
    torch.save(tensors_of(pairs), folder / "pytorch_model_lora.bin")
    (folder / "reslora_config.json").write_text(json.dumps(settings))


@torch.no_grad()
def their_logits(model: nn.Module, pairs: Pairs, settings: dict[str, Any], inputs: dict) -> Tensor:
    """Their training forward by their description, each layer from what earlier ones of its word saw."""
    flag, reach = settings["res_flag"], settings["pre_num"]
    scaling, active = settings["lora_alpha"] / settings["rank"], settings["start_index"] + 1
    seen: dict[str, list[tuple[Tensor, list[tuple[Tensor, Tensor]]]]] = {}

    def hook(word: str, own: list[tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
        def add(layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
            x = args[0]
            before = seen.setdefault(word, [])
            if before and before[-1][1][0][0].shape != own[0][0].shape:
                before.clear()
            if before and before[-1][1][0][1].shape != own[0][1].shape:
                before.clear()
            earlier = before[::-1][: (reach if flag > 1 else 1)]
            for i in range(active):
                A, B = (factor.double() for factor in own[i])
                if flag == 1:
                    y = x + (earlier[0][0] if earlier else x)
                    output = output + scaling * (y @ A.T @ B.T)
                elif flag == 2:
                    output = output + scaling * (x @ A.T @ B.T)
                    for _, pairs_before in earlier:
                        A, B = (factor.double() for factor in pairs_before[i])
                        output = output + scaling * (x @ A.T @ B.T)
                else:
                    hidden = x @ A.T
                    for x_before, pairs_before in earlier:
                        hidden = hidden + x_before @ pairs_before[i][0].double().T
                    output = output + scaling * (hidden @ B.T)
            before.append((x, own))
            return output

        return add

    hooks = [
        model.get_submodule(name).register_forward_hook(hook(name.split(".")[-1], own)) for name, own in pairs.items()
    ]
    logits = model(**inputs).logits
    for handle in hooks:
        handle.remove()
    return logits


@torch.no_grad()
def imported_logits(model: nn.Module, folder: Path, inputs: dict) -> Tensor:
    loaded = PeftModel.from_pretrained(model, str(folder)).double().eval()
    return loaded(**inputs).logits


@pytest.mark.parametrize(
    "fields",
    [
        {"res_flag": 1, "pre_num": 0},
        {"res_flag": 1, "merge_flag": 4},
        {"res_flag": 2},
        {"res_flag": 2, "pre_num": 999},
        {"res_flag": 3},
        {"res_flag": 3, "pre_num": 2, "merge_flag": 3},
        {"res_flag": 3, "pre_num": 999},
        {"res_flag": 1, "lora_num": 3, "start_index": 1},
        {"res_flag": 2, "lora_num": 2, "start_index": 1},
        {"res_flag": 3, "lora_num": 2, "start_index": 1},
    ],
    ids=str,
)
def test_import_computes_their_forward(tmp_path: Path, fields: dict[str, Any]) -> None:
    model, inputs, settings = LLAMA.make().double(), LLAMA.inputs(), config(**fields)
    model.save_pretrained(tmp_path / "base")
    pairs = make_pairs(model, ["q_proj", "v_proj", "up_proj", "down_proj"], settings)
    write_theirs(tmp_path / "theirs", pairs, settings)
    account = import_adapter(tmp_path / "theirs", tmp_path / "ours", base=str(tmp_path / "base"))
    expected = their_logits(model, pairs, settings, inputs)
    assert (expected - model(**inputs).logits).abs().max() > 0.1
    torch.testing.assert_close(imported_logits(model, tmp_path / "ours", inputs), expected, rtol=MODEL64, atol=MODEL64)
    assert account.layers == 16
    assert any("norms" in row.found for row in account.of("dropped")) == (fields["res_flag"] != 2)


def test_chains_end_where_theirs_do(tmp_path: Path) -> None:
    """Both of BERT's projections have 'out' in their names, and other shapes by turns: they link none of them."""
    model, inputs, settings = BERT.make().double(), BERT.inputs(), config(res_flag=3)
    model.save_pretrained(tmp_path / "base")
    pairs = make_pairs(model, ["output.dense", "query"], settings)
    write_theirs(tmp_path / "theirs", pairs, settings)
    import_adapter(tmp_path / "theirs", tmp_path / "ours", base=str(tmp_path / "base"))
    expected = their_logits(model, pairs, settings, inputs)
    torch.testing.assert_close(imported_logits(model, tmp_path / "ours", inputs), expected, rtol=MODEL64, atol=MODEL64)
    cuts = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["chain_cuts"]
    assert "bert.encoder.layer.1.attention.output.dense" in cuts or "bert.encoder.layer.1.attention.output" in cuts


def test_whole_models_are_their_own_base(tmp_path: Path) -> None:
    """As Trainer saves them: all tensors of the model, the config with `resconfig` in it."""
    model, inputs, settings = LLAMA.make().double(), LLAMA.inputs(), config(res_flag=1, merge_flag=3)
    folder = tmp_path / "whole"
    model.save_pretrained(folder)
    pairs = make_pairs(model, ["q_proj", "v_proj"], settings)
    tensors = {key: tensor.detach() for key, tensor in tensors_of(pairs).items()}
    hung = {"model.layers.1.self_attn.q_proj.pre_lora.loras.0.lora_A": torch.zeros(3, 24)}
    save_file(
        {**load_file(folder / "model.safetensors"), **tensors, **hung}, folder / "model.safetensors", {"format": "pt"}
    )
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "resconfig": settings}))
    account = import_adapter(folder, tmp_path / "ours")
    assert "copies of those of earlier layers" in str(account)
    loaded = type(model).from_pretrained(account.base, dtype=torch.float64).eval()
    expected = their_logits(model, pairs, settings, inputs)
    torch.testing.assert_close(
        imported_logits(loaded, tmp_path / "ours", inputs), expected, rtol=MODEL64, atol=MODEL64
    )
    with pytest.raises(ValueError, match=r"merge_flag=3: .* only this folder holds"):
        import_adapter(folder, tmp_path / "other", base=str(tmp_path / "elsewhere"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"res_flag": 0}, "LoRA without any shortcut"),
        ({"res_flag": 3, "pre_num": 0}, "LoRA without any shortcut"),
        ({"res_flag": 4}, "none of 1, 2 and 3"),
        ({"merge_flag": 2}, "none of 0, 3 and 4"),
        ({"start_index": -100}, "no pair, or one too many"),
        ({"rank": "3"}, "no integer"),
        ({"rank": 4}, "do not belong together"),
        ({"lora_num": 2, "start_index": 1}, "added up apart"),
        ({"res_flag": 1, "merge_flag": 3}, "frozen base weights"),
    ],
    ids=str,
)
def test_what_cannot_be_right_is_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    model = LLAMA.make()
    model.save_pretrained(tmp_path / "base")
    write_theirs(tmp_path / "theirs", make_pairs(model, ["q_proj"], config()), config(**fields))
    with pytest.raises(ValueError, match=message):
        import_adapter(tmp_path / "theirs", tmp_path / "ours", base=str(tmp_path / "base"))
    assert not (tmp_path / "ours").exists()


def test_links_between_roles_are_refused(tmp_path: Path) -> None:
    """By the word alone, their program links the last layer of an encoder to the first one of the decoder."""
    model = BartForConditionalGeneration(
        BartConfig(
            d_model=24,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=36,
            decoder_ffn_dim=36,
            vocab_size=53,
            max_position_embeddings=32,
        )
    )
    model.save_pretrained(tmp_path / "base")
    write_theirs(tmp_path / "theirs", make_pairs(model, ["q_proj"], config()), config())
    with pytest.raises(ValueError, match=r"links '.*encoder.layers.1.*' to '.*decoder.layers.0.*'"):
        import_adapter(tmp_path / "theirs", tmp_path / "ours", base=str(tmp_path / "base"))


def test_layers_of_no_known_family_are_refused(tmp_path: Path) -> None:
    model = T5.make()
    model.save_pretrained(tmp_path / "base")
    write_theirs(tmp_path / "theirs", make_pairs(model, ["SelfAttention.q"], config()), config())
    with pytest.raises(ValueError, match="TARGET_MODULES_DICT"):
        import_adapter(tmp_path / "theirs", tmp_path / "ours", base=str(tmp_path / "base"))


def test_broken_tensors_are_refused(tmp_path: Path) -> None:
    model = LLAMA.make()
    model.save_pretrained(tmp_path / "base")
    pairs = make_pairs(model, ["q_proj"], config())
    pairs["model.layers.0.self_attn.q_proj"][0][0][0, 0] = torch.nan
    write_theirs(tmp_path / "theirs", pairs, config())
    with pytest.raises(ValueError, match="NaN or inf"):
        import_adapter(tmp_path / "theirs", tmp_path / "ours", base=str(tmp_path / "base"))


def test_command_prints_the_account(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = LLAMA.make()
    model.save_pretrained(tmp_path / "base")
    write_theirs(tmp_path / "theirs", make_pairs(model, ["q_proj"], config()), config(res_flag=3, pre_num=2))
    out = tmp_path / "ours"
    assert run(Namespace(source=tmp_path / "theirs", out=out, base=str(tmp_path / "base"))) == 0
    printed = capsys.readouterr().out
    for part in ("shortcut='middle'", "pre_num=2", "norm_window=7", "norms of inputs", "dropped", f"Written: {out}"):
        assert part in printed
