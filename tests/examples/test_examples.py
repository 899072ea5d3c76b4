"""Every script in `examples` runs on a tiny model, and leaves what it says."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.engines import CONFIGS, WORKERS, environment, free_port
from helpers.repository import ROOT
from helpers.tiny_checkpoints import TEXTS, write_bert, write_images, write_llama, write_pipeline, write_rows
from peft import PeftConfig
from safetensors.torch import load_file

FOLDER = ROOT / "examples"
SCRIPTS = sorted(file.stem for file in FOLDER.glob("*.py"))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Call a script's `main`, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run_script(name: str, *arguments: str) -> None:
        spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
        module: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.main(arguments)

    return run_script


def is_trained(folder: Path) -> bool:
    """Whether the adapter there has B factors, or squares, that are not zero any more."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return any(tensor.any() for name, tensor in tensors.items() if name.endswith(("lora_B.weight", "mora_M")))


def test_the_page_names_all_scripts_and_nothing_else():
    named = re.findall(r"^\| \[(\w+)\.py\]", (FOLDER / "README.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(named) == SCRIPTS


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_help_of_a_script_repeats_its_command(script):
    result = subprocess.run([sys.executable, FOLDER / f"{script}.py", "--help"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"python examples/{script}.py" in result.stdout


@pytest.mark.slow
def test_classification(run, tmp_path):
    data = write_rows(tmp_path / "data", [{"text": text, "label": index % 2} for index, text in enumerate(TEXTS)])
    model = write_bert(tmp_path / "bert", classifier=True)
    run("classification", "--model", model, "--data", data, "--steps", "2", "--shortcut", "middle")
    assert is_trained(tmp_path / "classification")
    assert (tmp_path / "classification/merged/model.safetensors").is_file()


@pytest.mark.slow
def test_sft(run, tmp_path):
    turns = [{"messages": [{"role": "user", "content": t}, {"role": "assistant", "content": "yes"}]} for t in TEXTS]
    run("sft", "--model", write_llama(tmp_path / "llama"), "--data", write_rows(tmp_path / "data", turns), "--steps=2")
    assert is_trained(tmp_path / "sft")
    assert PeftConfig.from_pretrained(tmp_path / "sft").peft_type == "RESLORA"


@pytest.mark.long
def test_sft_under_fsdp2(tmp_path):
    """The command of the page, on CPUs; one process speaks for both, and saves whole factors."""
    rows = [{"prompt": text, "completion": " yes"} for text in 2 * TEXTS]
    data, model = write_rows(tmp_path / "data", rows), write_llama(tmp_path / "llama")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "fsdp2.yaml")]
    launch += ["--main_process_port", str(free_port()), "--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer"]
    script = [
        str(WORKERS / "example_worker.py"),
        str(FOLDER / "sft.py"),
        "--model",
        model,
        "--data",
        data,
        "--steps=2",
    ]
    done = subprocess.run([*launch, *script], capture_output=True, text=True, cwd=tmp_path, env=environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("train_runtime") == 1
    assert is_trained(tmp_path / "sft")
    config = PeftConfig.from_pretrained(tmp_path / "sft")
    tensors = load_file(tmp_path / "sft" / "adapter_model.safetensors")
    assert {t.shape[0] for name, t in tensors.items() if "lora_A" in name} == {config.r}


@pytest.mark.slow
def test_dpo(run, tmp_path):
    rows = [{"prompt": text, "chosen": " yes", "rejected": " no"} for text in TEXTS]
    run("dpo", "--model", write_llama(tmp_path / "llama"), "--data", write_rows(tmp_path / "data", rows), "--steps=2")
    assert is_trained(tmp_path / "dpo")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of bitsandbytes on a CPU
def test_qlora(run, tmp_path):
    pytest.importorskip("bitsandbytes")
    rows = [{"prompt": text, "completion": " yes"} for text in TEXTS]
    data, model = write_rows(tmp_path / "data", rows), write_llama(tmp_path / "llama")
    run("qlora", "--model", model, "--data", data, "--steps", "2")
    assert is_trained(tmp_path / "qlora")
    assert PeftConfig.from_pretrained(tmp_path / "qlora/lora").peft_type == "LORA"
    run("export_and_serve", str(tmp_path / "qlora"), "--model", model)


@pytest.mark.slow
def test_text_to_image(run, tmp_path):
    model, data = write_pipeline(tmp_path / "pipeline"), write_images(tmp_path / "images")
    run("text_to_image", "--model", model, "--data", data, "--size", "16", "--batch", "2", "--steps", "3")
    assert is_trained(tmp_path / "text-to-image")
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(model)
    pipeline.load_lora_weights(str(tmp_path / "text-to-image/lora"))
    assert pipeline.unet.peft_config


@pytest.mark.slow
def test_sentence_embeddings(run, tmp_path):
    pytest.importorskip("sentence_transformers")
    data = write_rows(tmp_path / "data", [{"anchor": text, "positive": text[2:]} for text in TEXTS])
    model = write_bert(tmp_path / "bert", classifier=False)
    run("sentence_embeddings", "--model", model, "--data", data, "--steps", "2")
    assert is_trained(tmp_path / "sentence-embeddings")


@pytest.mark.slow
def test_resume(run, capsys):
    run("resume")
    assert "has the factors of the unbroken one" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_annealing(run, capsys, shortcut):
    run("annealing", "--shortcut", shortcut, "--steps", "12")
    before, after = capsys.readouterr().out.split("annealed", 2)[1:]
    assert "not" not in after.split("\n")[0]
    assert before != after
