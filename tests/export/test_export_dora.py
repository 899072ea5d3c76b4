"""DoRA checkpoints from ResLoRA's 'block' and from PEFT's own DoRA, for PEFT: only where they are asked for."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapters import tuner_layers
from helpers.exports import IDS, UP_DOWN, gpt2, llama, net, outputs, read_folder
from helpers.oracle import randomize_adapters, relative_error
from helpers.tolerances import MODEL64, half_rounding, rounding
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from peft_reslora import ResLoRAConfig, export_lora, save_as_lora
from peft_reslora.export import combine_as_lora, export_lora_from_files

pytestmark = pytest.mark.filterwarnings(
    "ignore:The LoRA has r=:UserWarning",
    "ignore:The checkpoint is a DoRA:UserWarning",
    "ignore:.*fan_in_fan_out",
    "ignore:Converting a PEFT",
)
CAUSAL = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
GPT2 = {"target_modules": ["c_attn", "c_fc", "lm_head"], "task_type": "CAUSAL_LM"}  # Conv1D and linear layers
METHODS: dict[str, tuple[Any, Any]] = {
    "block": (llama, ResLoRAConfig(r=3, lora_alpha=5, use_dora=True, **CAUSAL)),
    "block-all": (llama, ResLoRAConfig(r=3, lora_alpha=5, use_dora=True, pre_num=-1, use_rslora=True, **CAUSAL)),
    "block-gpt2": (gpt2, ResLoRAConfig(r=2, use_dora=True, **GPT2)),
    "lora": (llama, LoraConfig(r=3, lora_alpha=5, use_dora=True, **CAUSAL)),
    "lora-patterns": (llama, LoraConfig(r=3, use_dora=True, alpha_pattern={"q_proj": 7}, use_rslora=True, **CAUSAL)),
    "lora-gpt2": (gpt2, LoraConfig(r=2, use_dora=True, **GPT2)),
}
every_method = pytest.mark.parametrize("name", METHODS)


def trained(name: str, **changes: Any) -> Any:
    """With random factors, and norms of the size of the weights' that are not theirs."""
    make_base, config = METHODS[name]
    return randomize_dora(get_peft_model(make_base(), copy.deepcopy(config)))


def randomize_dora(model: Any) -> Any:
    starts = {n: p.detach().clone() for n, p in model.named_parameters() if "magnitude" in n}
    randomize_adapters(model)
    for name, parameter in model.named_parameters():
        if name in starts:
            parameter.data = starts[name] * (1.2 + 0.3 * torch.sin(torch.arange(len(parameter)).to(parameter)))
    return model.eval()


@pytest.mark.quick(name=["block", "lora-gpt2"])
@every_method
def test_plain_peft_computes_the_same(name: str, tmp_path: Path) -> None:
    model, base = trained(name), METHODS[name][0]()
    expected = outputs(model)
    export = save_as_lora(tmp_path, model, allow_dora=True, base_model=base)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert relative_error(outputs(loaded), expected) < rounding(base)
    assert relative_error(outputs(base), expected) > 0.01
    config, tensors, header = read_folder(tmp_path)
    assert header == {"format": "pt"}
    assert (config["peft_type"], config["use_dora"], config["use_rslora"]) == ("LORA", True, False)
    assert config["r"] == config["lora_alpha"] == (16 if name == "block-all" else 8)
    assert {key.rpartition(".lora_")[2] for key in tensors} == {"A.weight", "B.weight", "magnitude_vector"}
    assert all(tensor.shape[0] == config["r"] for key, tensor in tensors.items() if key.endswith("A.weight"))
    assert export.report.exact
    assert "as DoRA of r=" in export.report.summary()
    assert "allow_dora=True" in export.report.call
    card = (tmp_path / "README.md").read_text()
    assert "A standard DoRA" in card
    assert "- dora" in card


@pytest.mark.quick(name=["block", "lora-gpt2"])
@every_method
def test_from_files_it_is_the_same(name: str, tmp_path: Path) -> None:
    model = trained(name)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    exported = export_lora_from_files(tmp_path, allow_dora=True)
    expected = export_lora(model, allow_dora=True, fill_missing_layers=False)
    assert exported.config.use_dora
    assert exported.state_dict.keys() == expected.state_dict.keys()
    for key, tensor in exported.state_dict.items():
        assert torch.equal(tensor, expected.state_dict[key]), key


@pytest.mark.quick(name=["block-all"])
@pytest.mark.parametrize("name", ["block", "block-all", "block-gpt2"])
def test_the_factors_give_the_same_in_float64(name: str) -> None:
    model = trained(name).double()
    make_base, config = METHODS[name]
    factors = {n: layer.dora_factors("default") for n, layer in tuner_layers(model).items()}
    r = max(len(A) for A, _, _ in factors.values())
    plain = get_peft_model(
        make_base().double(), LoraConfig(r=r, lora_alpha=r, target_modules=config.target_modules, use_dora=True)
    ).double()
    for n, (A, B, m) in factors.items():
        layer: Any = tuner_layers(plain)[n]
        layer.lora_A["default"].weight.data = nn.functional.pad(A, (0, 0, 0, r - len(A)))
        layer.lora_B["default"].weight.data = nn.functional.pad(B, (0, r - len(A)))
        layer.lora_magnitude_vector["default"].weight.data = m
        assert A.dtype == m.dtype == torch.float64
    assert relative_error(outputs(plain.eval()), outputs(model)) < MODEL64


def test_layers_without_an_update_stay_as_they_are(tmp_path: Path) -> None:
    """Filled with zeros and the norms of their weights; or left out."""
    config = ResLoRAConfig(r=2, use_dora=True, target_modules=["q_proj"], layers_to_transform=[0, 1])
    model = randomize_dora(get_peft_model(llama(), config))
    export = save_as_lora(tmp_path, model, allow_dora=True, base_model=llama())
    assert "model.layers.2.self_attn.q_proj" in export.report.filled
    assert "model.layers.0.self_attn.v_proj" in export.report.filled
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert relative_error(outputs(loaded), outputs(model)) < rounding(llama())
    small = export_lora(model, allow_dora=True, fill_missing_layers=False)
    assert len(small.state_dict) == 6


@pytest.mark.quick(dtype=[torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_norms_are_rounded_too(dtype: torch.dtype, tmp_path: Path) -> None:
    model = trained("block")
    export = save_as_lora(tmp_path, model, allow_dora=True, dtype=dtype, base_model=llama())
    assert all(tensor.dtype == dtype for tensor in export.state_dict.values())
    assert not export.report.exact
    eps = torch.finfo(dtype).eps
    assert all(eps / 100 < layer.relative_error < eps for layer in export.report.layers)
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert relative_error(outputs(loaded), outputs(model)) < half_rounding(60, dtype)


def test_the_refusal_names_the_way_out(tmp_path: Path) -> None:
    model = trained("block")
    model.save_pretrained(tmp_path)
    message = r"fits into no plain LoRA: use_dora.*DoRA checkpoint for PEFT \(allow_dora=True, --allow-dora\)"
    for export in (lambda: export_lora(model), lambda: export_lora_from_files(tmp_path)):
        with pytest.raises(ValueError, match=message):
            export()
    for options in ({"rank": 2}, {"energy": 0.9}):
        for export in (
            lambda options=options: export_lora(model, allow_dora=True, **options),
            lambda options=options: export_lora_from_files(tmp_path, allow_dora=True, **options),
        ):
            with pytest.raises(ValueError, match=r"use_dora=True, and its norms are those of the whole update"):
                export()


def test_other_adapters_are_exported_as_ever() -> None:
    model = randomize_adapters(get_peft_model(llama(), ResLoRAConfig(r=2, **CAUSAL)))
    allowed, export = export_lora(model, allow_dora=True), export_lora(model)
    assert not allowed.config.use_dora
    assert allowed.report.call == export.report.call
    assert all(torch.equal(tensor, export.state_dict[key]) for key, tensor in allowed.state_dict.items())


def test_who_reads_it_is_told_and_sums_are_refused() -> None:
    model = trained("block")
    with pytest.warns(UserWarning, match=r"is a DoRA.*which PEFT loads; vLLM, SGLang and llama.cpp refuse it"):
        export = export_lora(model, allow_dora=True)
    with pytest.raises(ValueError, match="Export 'a' is a DoRA, whose norms are not those of a sum"):
        combine_as_lora({"a": export}, ["a"], [1.0])


def test_rows_of_zeros_by_whose_norms_peft_would_divide_are_refused() -> None:
    base = net()
    base.blocks[1].up.weight.data[2] = 0
    model = get_peft_model(copy.deepcopy(base), ResLoRAConfig(r=2, target_modules=UP_DOWN, use_dora=True))
    with pytest.raises(ValueError, match=r"'blocks\.1\.up'.*a row of W \+ B A is zero"):
        export_lora(model, allow_dora=True)
    config = ResLoRAConfig(r=2, target_modules=UP_DOWN, use_dora=True, exclude_modules=["blocks.1.up"])
    other = get_peft_model(base, config)
    with pytest.raises(ValueError, match=r"'blocks\.1\.up'.*without an update is zero; pass fill_missing_layers"):
        export_lora(other, allow_dora=True)
    assert export_lora(other, allow_dora=True, fill_missing_layers=False).config.use_dora


def test_files_without_their_norms_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    trained("lora").save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("magnitude_vector"))
    for broken, shape in (({}, "missing"), ({key: torch.ones(3)}, r"\(3,\)")):
        save_file({**{k: t for k, t in tensors.items() if k != key}, **broken}, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"lora_magnitude_vector is {shape} instead of"):
            export_lora_from_files(tmp_path, allow_dora=True)


def test_of_pefts_own_only_linear_layers_are_exported(tmp_path: Path) -> None:
    for layer in (nn.Embedding(9, 6), nn.Conv2d(4, 6, 3)):
        config = LoraConfig(r=2, target_modules=["0"], use_dora=True)
        model = get_peft_model(nn.Sequential(layer), config)
        with pytest.raises(ValueError, match=r"layer '0': .*has no DoRA of a linear layer; use merge_and_unload"):
            export_lora(model, allow_dora=True)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layer '0': its DoRA is of no linear layer.*merge_and_unload"):
        export_lora_from_files(tmp_path, allow_dora=True)


@pytest.mark.quick(with_base=[False])
@pytest.mark.parametrize("with_base", [False, True])
def test_the_command_writes_it(with_base: bool, tmp_path: Path, command: Any) -> None:
    llama().save_pretrained(tmp_path / "base")
    trained("block").save_pretrained(tmp_path / "adapter")
    base = ["--base", tmp_path / "base"] if with_base else []
    refused = command("export", tmp_path / "adapter", tmp_path / "out", *base)
    assert refused.code != 0
    assert "--allow-dora" in refused.err
    done = command("export", "--allow-dora", tmp_path / "adapter", tmp_path / "out", *base)
    assert done.code == 0, done.err
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "out").eval()
    assert relative_error(outputs(loaded), outputs(trained("block"))) < rounding(llama())


WITHOUT_PLUGIN = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/base"), sys.argv[1] + "/dora")
torch.save(model(input_ids=torch.load(sys.argv[1] + "/ids")).logits, sys.argv[1] + "/logits")
sys.exit("peft_reslora" in sys.modules)
"""


@pytest.mark.slow
def test_it_loads_where_the_plugin_is_not_imported(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = trained("block-all")
    torch.save(IDS, tmp_path / "ids")
    save_as_lora(tmp_path / "dora", model, allow_dora=True)
    subprocess.run([sys.executable, "-c", WITHOUT_PLUGIN, str(tmp_path)], check=True, capture_output=True)
    assert relative_error(torch.load(tmp_path / "logits"), outputs(model)) < rounding(llama())
