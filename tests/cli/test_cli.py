"""The command line: instant help, clear refusals, and what `export` and `inspect` do with a saved adapter."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from helpers.command import Done
from helpers.oracle import relative_error
from helpers.repository import ROOT
from helpers.tiny_models import TINY_MODELS
from helpers.tolerances import rounding
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import peft_reslora_cli
from peft_reslora import LoraExport, MoRAConfig, ResLoRAConfig
from peft_reslora.reslora.config import Shortcut
from peft_reslora_cli.arguments import DTYPES, SHORTCUTS

LLAMA = TINY_MODELS["llama"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    LLAMA.make().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved ResLoRA adapter with random factors, of a size as after training."""
    return save_adapter(base, tmp_path_factory.mktemp("adapter"), shortcut="block")


def save_adapter(base: Path, folder: Path, **fields: object) -> Path:
    config = ResLoRAConfig(r=4, target_modules=LLAMA.targets, task_type="CAUSAL_LM", **fields)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.train()(**LLAMA.inputs())  # records the norms that an estimated merge needs
    model.save_pretrained(str(folder))
    return folder


COMMAND_NAMES = [command.__name__.rpartition(".")[2].rstrip("_") for command in peft_reslora_cli.COMMANDS]


@pytest.mark.parametrize("level", [[], *([name] for name in COMMAND_NAMES)])
@pytest.mark.parametrize(("option", "code"), [("--help", 0), ("--no-such-option", 2)])
def test_help_and_wrong_usage_of_each_level_import_nothing_heavy(level: list[str], option: str, code: int) -> None:
    argv = [sys.executable, "-X", "importtime", "-m", "peft_reslora_cli", *level, option]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == code
    assert "usage: peft-reslora" in done.stdout + done.stderr
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "numpy", "peft", "transformers", "peft_reslora"}


@pytest.mark.slow
def test_module_runs_the_same_command() -> None:
    done = subprocess.run([sys.executable, "-m", "peft_reslora", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: peft-reslora")


def test_choices_are_those_of_the_library() -> None:
    assert get_args(Shortcut) == SHORTCUTS
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in DTYPES)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "COMMAND"),
        (["tune"], "invalid choice: 'tune'"),
        (["quickstart", "--shortcut", "residual"], "invalid choice: 'residual'"),
        (["quickstart", "--steps", "0"], "'0' is not a positive integer"),
        (["export", "adapter"], "OUT_DIR"),
        (["export", "adapter", "out", "--rank", "2", "--energy", "0.9"], "not allowed with argument --rank"),
        (["export", "adapter", "out", "--rank", "1.5"], "'1.5' is not a positive integer"),
        (["inspect"], "ADAPTER_DIR|MODEL"),
    ],
)
def test_wrong_usage_exits_with_2(command: Callable[..., Done], argv: list[str], said: str) -> None:
    done = command(*argv)
    assert done.code == 2
    assert said in done.err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["export", "nowhere", "out"], "adapter_config.json"),
        (["export", "ADAPTER", "out", "--energy", "2"], "energy=2.0"),
        (["export", "ADAPTER", "ADAPTER/adapter_config.json"], "is a file"),
        (["inspect", "nowhere/at/all"], "nowhere/at/all is no saved adapter"),
        (["inspect", "ADAPTER", "--pre-num", "2"], "leave out --pre-num"),
        (["inspect", "BASE", "--target-modules", "foo"], "choose --target-modules from down_proj, gate_proj"),
        (["inspect", "BASE", "--shortcut", "input", "--pre-num", "2"], "accepts 1 only"),
    ],
)
def test_refusals_are_one_line_and_exit_with_1(
    command: Callable[..., Done], base: Path, adapter: Path, argv: list[str], said: str
) -> None:
    done = command(*(arg.replace("ADAPTER", str(adapter)).replace("BASE", str(base)) for arg in argv))
    assert done.code == 1
    assert done.err.splitlines()[-1].startswith("peft-reslora: error: ")
    assert said in done.err.splitlines()[-1]
    assert "Traceback" not in done.err


def test_damaged_adapter_is_refused(command: Callable[..., Done], tmp_path: Path, adapter: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    (tmp_path / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes()[:100])
    for argv in (["inspect", tmp_path], ["export", tmp_path, tmp_path / "out"]):
        done = command(*argv)
        assert done.code == 1
        assert "adapter_model.safetensors is" in done.err
        assert "damaged" in done.err


def test_config_of_an_unknown_method_is_refused(command: Callable[..., Done], tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "NOSUCH"}')
    done = command("inspect", tmp_path)
    assert done.code == 1
    assert "cannot be read as an adapter's config: KeyError('NOSUCH')" in done.err


def test_adapter_that_does_not_fit_the_base_is_refused(
    command: Callable[..., Done], tmp_path: Path, adapter: Path, base: Path
) -> None:
    get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(
        str(tmp_path / "lora")
    )
    wider = LlamaConfig.from_pretrained(base, hidden_size=48)
    LlamaForCausalLM(wider).save_pretrained(tmp_path / "wider")
    for other in (adapter, tmp_path / "lora"):
        done = command("export", other, tmp_path / "out", "--base", tmp_path / "wider")
        assert done.code == 1
        assert "base model" in done.err
    assert not (tmp_path / "out").exists()


def merged_logits(base: Path, adapter: Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), str(adapter)).merge_and_unload()
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("shortcut", get_args(Shortcut))
def test_export_computes_what_the_merged_model_does(
    command: Callable[..., Done], base: Path, tmp_path: Path, shortcut: str, with_base: bool
) -> None:
    adapter, out = save_adapter(base, tmp_path / "adapter", shortcut=shortcut), tmp_path / "lora"
    done = command("export", adapter, out, *(["--base", base] if with_base else []))
    assert done.code == 0
    assert f"Written: {out}" in done.out
    exported = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), str(out))
    assert type(exported.peft_config["default"]) is LoraConfig
    inputs = LLAMA.inputs()
    with torch.no_grad():
        logits = exported.eval()(**inputs).logits
    assert relative_error(logits, merged_logits(base, adapter, inputs)) < rounding(exported)


def test_export_names_the_base_it_was_given(
    command: Callable[..., Done], base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base.parent)
    command("export", adapter, tmp_path / "lora", "--base", base.name)
    assert LoraConfig.from_pretrained(str(tmp_path / "lora")).base_model_name_or_path == base.name


def test_export_names_its_command_in_the_card_without_local_folders(
    command: Callable[..., Done], adapter: Path, tmp_path: Path
) -> None:
    command("export", adapter, tmp_path / "lora", "--rank", 3)
    card = (tmp_path / "lora" / "README.md").read_text(encoding="utf-8")
    assert f"peft-reslora export {adapter.name} lora --rank 3" in card
    assert str(tmp_path) not in card


def test_export_options_reach_the_checkpoint(command: Callable[..., Done], adapter: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    assert command("export", adapter, tmp_path / "lora", "--rank", 2, "--dtype", "bfloat16").code == 0
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(torch.linalg.matrix_rank(tensor.float()) <= 2 for tensor in tensors.values())


def test_export_dry_run_reports_and_writes_nothing(
    command: Callable[..., Done], adapter: Path, tmp_path: Path
) -> None:
    done = command("export", adapter, tmp_path / "lora", "--dry-run")
    assert done.code == 0
    assert "model.layers.0.self_attn.q_proj" in done.out
    assert not list(tmp_path.iterdir())


def test_export_takes_several_adapters_at_once(command: Callable[..., Done], adapter: Path, tmp_path: Path) -> None:
    twin = tmp_path / "twin"
    shutil.copytree(adapter, twin)
    done = command("export", adapter, twin, tmp_path / "out")
    assert done.code == 0, done.err
    for name in (adapter.name, "twin"):
        assert (tmp_path / "out" / name / "adapter_model.safetensors").is_file()
    shutil.copytree(adapter, tmp_path / "other" / "twin")
    done = command("export", twin, tmp_path / "other" / "twin", tmp_path / "out2")
    assert (done.code, (tmp_path / "out2").exists()) == (1, False)
    assert "same name" in done.err


def test_export_pushes_one_adapter_only(
    command: Callable[..., Done], adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[tuple] = []

    def push_to_hub(self: LoraExport, repo_id: str, **options: object) -> str:
        pushed.append((repo_id, options["private"]))
        return f"https://hub/{repo_id}"

    monkeypatch.setattr(LoraExport, "push_to_hub", push_to_hub)
    done = command("export", adapter, tmp_path / "out", "--push-to-hub", "me/mine", "--private")
    assert done.code == 0, done.err
    assert pushed == [("me/mine", True)]
    assert "Pushed: https://hub/me/mine" in done.out
    done = command("export", adapter, adapter, tmp_path / "out2", "--push-to-hub", "me/mine")
    assert done.code == 1
    assert len(pushed) == 1


def test_export_shows_warnings_as_single_lines(command: Callable[..., Done], adapter: Path, tmp_path: Path) -> None:
    done = command("export", adapter, tmp_path / "lora", "--dry-run")
    assert "peft-reslora: warning: The base model of the LoRA is the local path" in done.err
    assert "UserWarning" not in done.err


def test_inspect_describes_a_saved_adapter(command: Callable[..., Done], base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path, shortcut="middle", pre_num=-1)
    parameters = sum(p.numel() for n, p in load(base, adapter).named_parameters() if "lora_" in n)
    done = command("inspect", adapter)
    assert done.code == 0
    assert f"{parameters:,} parameters" in done.out
    assert "norms recorded for 28, calibrated 0 of 28 layers" in done.out
    assert "28 layers in 7 chains, 42 links" in done.out


def load(base: Path, adapter: Path) -> PeftModel:
    return PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), str(adapter))


def test_inspect_tells_an_exact_merge(command: Callable[..., Done], adapter: Path) -> None:
    assert "merge: exact" in command("inspect", adapter).out


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"use_dora": True}, "ResLoRA (block, DoRA)"),
        ({"nested_ranks": True}, "ResLoRA (block, DyLoRA)"),
        ({"total_step": 9, "init_r": 4, "target_r": 2}, "ResLoRA (block, AdaLoRA)"),
    ],
)
def test_inspect_names_the_kind_of_blocks(
    command: Callable[..., Done], base: Path, tmp_path: Path, fields: dict[str, object], name: str
) -> None:
    done = command("inspect", save_adapter(base, tmp_path, **fields))
    assert done.code == 0
    assert f"{name} adapter for" in done.out


def test_inspect_describes_the_adapters_of_others(command: Callable[..., Done], base: Path, tmp_path: Path) -> None:
    get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig()).save_pretrained(str(tmp_path))
    done = command("inspect", tmp_path)
    assert done.code == 0
    assert "LoRA adapter" in done.out
    assert "no chains" in done.out


def test_inspect_shows_the_sizes_of_mora(command: Callable[..., Done], tmp_path: Path) -> None:
    config = MoRAConfig(r=4, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 40})
    get_peft_model(LLAMA.make(), config).save_pretrained(tmp_path)
    done = command("inspect", tmp_path)
    assert done.code == 0, done.err
    rows = [line.split() for line in done.out.splitlines()]
    assert ["model.layers.*.self_attn.q_proj", "rotation", "4", "14", "196", "4"] in rows  # 14 * 14 ~ 4 * (24 + 24)
    assert ["model.layers.*.mlp.up_proj", "sharing", "40", "51", "2601", "4"] in rows  # 51 * 51 ~ 40 * (24 + 40)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| `model.layers.*.mlp.up_proj` | sharing | 40 | 51 | 2601 | 4 |" in card


def test_inspect_shows_the_chains_a_model_would_get(command: Callable[..., Done], base: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())  # no weights needed
    argv = ("inspect", tmp_path, "--shortcut", "middle", "--pre-num", "2", "--target-modules")
    assert "shortcut='middle', pre_num=2: 8 layers in 2 chains, 10 links" in command(*argv, "q_proj", "v_proj").out
    assert "28 layers in 7 chains" in command(*argv, "all-linear").out
