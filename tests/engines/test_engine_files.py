"""Trainer in two processes under each engine: the losses, the files and the resumed run of one process; and what users
call on the trained model gives that model's files, or is refused."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.engine_files_worker import SAVED, STEPS, TUNERS
from helpers.engines import CONFIGS, ENGINES, LABELS, WORKERS, by_engine, environment, free_port, run_together
from helpers.oracle import relative_error
from helpers.tolerances import rounding
from safetensors.torch import load_file

from peft_reslora.shared.stamps import STAMP_NAMES

pytestmark = pytest.mark.long
BOUND = rounding(100)  # models are float64; DeepSpeed averages gradients in float32, and exports are float32

CALLS = ["save_pretrained", "export_lora", "save_as_lora", "calibrate_merge", "merge_report", "merge_adapter"]
FOLDERS = {"save_pretrained": "saved", "export_lora": "exported", "save_as_lora": "as_lora"}
WEIGHTS = "adapter_model.safetensors"
# Where a model is sharded, a call on it is refused in these words.
REFUSAL = r"layer '?model\.layers\.\d.*sharded or offloaded.*(Let the trainer save|Save|Load)"
# PEFT's save_pretrained reads DTensors with an error of torch's, and would write what ZeRO-3 leaves of a tensor.
NO_DIRECT_SAVE = r"data pointer|hold no numbers.*partitioned.*save_model"
UNFIT = r"merges exactly: there is nothing|holds no ResLoRA adapter 'default'"


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder in which an engine, or one process, has trained all tuners."""

    @functools.cache
    def run(engine: str) -> Path:
        if engine.startswith("zero"):
            pytest.importorskip("deepspeed")
        folder = tmp_path_factory.mktemp(f"files_{engine}")
        command = [sys.executable]
        if engine != "one":
            config = str(CONFIGS / f"{engine}.yaml")
            command += ["-m", "accelerate.commands.launch", "--config_file", config]
            command += ["--main_process_port", str(free_port())]
        run_together([([*command, str(WORKERS / "engine_files_worker.py"), str(folder)], environment())])
        return folder

    return run


def results_of(folder: Path, tuner: str) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())[tuner]


def assert_same_files(actual: Path, expected: Path) -> None:
    """Config and factors; each process records norms of its own part of the batch."""
    tensors, wanted = (load_file(folder / WEIGHTS) for folder in (actual, expected))
    assert tensors.keys() == wanted.keys()
    assert any(".lora_B" in name or ".mora_M" in name for name in wanted)
    for name, tensor in wanted.items():
        if name.endswith("lora_norm"):
            assert (tensors[name] >= 0).sum() == (tensor >= 0).sum() > 0
            assert torch.allclose(tensors[name], tensor, rtol=0.5)
        elif name.endswith(STAMP_NAMES):  # digests of all bits
            assert tensors[name].shape == tensor.shape
        else:
            assert relative_error(tensors[name], tensor) < BOUND, name
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (actual, expected)]
    for config in configs:
        config["target_modules"].sort()
    assert configs[0] == configs[1]


def assert_same_updates(actual: Path, expected: Path) -> None:
    """B A of each layer; factors may differ by signs."""
    tensors, wanted = (load_file(folder / WEIGHTS) for folder in (actual, expected))
    assert tensors.keys() == wanted.keys()
    for name in wanted:
        if "lora_A" in name:
            updates = [held[name.replace("lora_A", "lora_B")] @ held[name] for held in (tensors, wanted)]
            assert relative_error(*updates) < BOUND, name


engines = pytest.mark.parametrize("engine", by_engine("files", ENGINES))
tuners = pytest.mark.parametrize("tuner", TUNERS)


@pytest.mark.support(lambda engine, **_: f"Trainer under {LABELS[engine]}: losses, saved files, resumed run")
@engines
@tuners
def test_trainer_gives_the_files_of_one_process(trained, engine, tuner):
    folder, one = trained(engine), trained("one")
    results, expected = results_of(folder, tuner), results_of(one, tuner)
    assert results["engine"] == ENGINES[engine]
    assert expected["engine"] == "NO"
    assert len(expected["losses"]) == STEPS
    assert results["losses"] == pytest.approx(expected["losses"], rel=BOUND)
    assert results["resumed"] == pytest.approx(expected["losses"], rel=BOUND)
    for place in (f"whole/checkpoint-{SAVED}", "final", "final-resumed"):
        assert_same_files(folder / tuner / place, one / tuner / place.removesuffix("-resumed"))


@pytest.mark.support(
    lambda engine, **_: f"export, calibrate and merge on a model that {LABELS[engine]} has trained",
    verdict=lambda engine, **_: "refused" if engine in ("fsdp2", "zero3") else "right",
)
@engines
@tuners
def test_calls_on_a_trained_model_are_right_or_refused(trained, engine, tuner):
    folder, one = trained(engine), trained("one")
    outcomes, expected = (results_of(f, tuner)["attempts"] for f in (folder, one))
    refusals = 0
    for call in CALLS:
        if expected[call] != "right":
            assert re.search(UNFIT, expected[call])
        elif outcomes[call] == "right":
            if call in FOLDERS:
                places = [f / tuner / "rank0" / FOLDERS[call] for f in (folder, one)]
                if call == "save_pretrained":
                    assert_same_files(*places)
                elif tuner in ("block", "mora"):  # norms differ, and so do estimates
                    assert_same_updates(*places)
        else:
            assert re.search(NO_DIRECT_SAVE if call == "save_pretrained" else REFUSAL, outcomes[call]), outcomes[call]
            refusals += 1
    assert (outcomes["save_pretrained"] == "right") or not (folder / tuner / "rank0" / "saved" / WEIGHTS).exists()
    sharded = engine in ("fsdp2", "zero3")
    assert (refusals > 0) == sharded


@pytest.mark.xdist_group("files fsdp2")
@tuners
def test_what_was_trained_in_shards_is_exported_from_its_files(trained, tuner, tmp_path):
    if tuner == "mora":
        pytest.skip("MoRA is exported with its base model")
    saved = trained("fsdp2") / tuner / "final"
    command = [sys.executable, "-m", "peft_reslora", "export", str(saved), str(tmp_path / "lora")]
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "lora" / WEIGHTS).is_file()
