"""`train` in two processes gives what one gives with the same rows a step; one of them writes, all end together."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.engines import CONFIGS, ENGINES, WORKERS, by_engine, environment, free_port, run_together
from helpers.oracle import relative_error
from helpers.tiny_runs import tiny_run, write_films
from helpers.tolerances import FLOAT64, rounding
from helpers.train_worker import BATCH, NO_DROPOUT, STEPS, TUNERS
from safetensors.torch import load_file

from peft_reslora.experiments import train
from peft_reslora.experiments.processes import main_first, on_main

RUNS = [*TUNERS, "regression", "resumed"]
FACTORS = (".lora_A.", ".lora_B.", ".mora_M")


def launched(config: str, *arguments: str) -> list[str]:
    """`accelerate launch` with one of the package's configs."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
    return [*command, "--main_process_port", str(free_port()), *arguments]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of all runs under an engine, or of one process."""
    films = write_films(tmp_path_factory.mktemp("films"))

    @functools.cache
    def run(engine: str) -> Path:
        if engine.startswith("zero"):
            pytest.importorskip("deepspeed")
        folder = tmp_path_factory.mktemp(f"train_{engine}")
        arguments = [str(WORKERS / "train_worker.py"), str(films), str(folder)]
        layers = ["--fsdp_transformer_layer_cls_to_wrap", "BertLayer"] if engine == "fsdp2" else []
        command = [sys.executable, *arguments] if engine == "one" else launched(engine, *layers, *arguments)
        run_together([(command, environment())])
        return folder

    return run


def metrics_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return found


def assert_same_factors(actual: Path, expected: Path, bound: float) -> None:
    tensors, wanted = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (actual, expected))
    assert tensors.keys() == wanted.keys()
    factors = [name for name in wanted if any(part in name for part in FACTORS)]
    assert factors
    for name in factors:
        assert relative_error(tensors[name], wanted[name]) < bound, name


@pytest.mark.long
@pytest.mark.parametrize("engine", by_engine("train", ENGINES))
@pytest.mark.parametrize("run", RUNS)
def test_two_processes_train_as_one(trained: Callable[[str], Path], engine: str, run: str) -> None:
    """All is float64, but that DeepSpeed averages gradients in float32."""
    actual, expected = trained(engine) / run, trained("one") / run
    bound = rounding(100) if engine.startswith("zero") else FLOAT64
    assert_same_factors(actual, expected, bound)
    found, wanted = metrics_of(actual), metrics_of(expected)
    assert len(wanted["losses"]) == STEPS
    assert found["losses"] == pytest.approx(wanted["losses"], rel=bound, abs=1e-6)  # written with six digits
    for split, metrics in wanted["before_merge"].items():
        assert found["before_merge"][split] == pytest.approx(metrics, rel=100 * bound)
    assert {path.name for path in actual.iterdir()} == {path.name for path in expected.iterdir()}
    processes = [
        json.loads((folder / "run.json").read_text(encoding="utf-8"))["processes"] for folder in (actual, expected)
    ]
    assert processes == [2, 1]


@pytest.mark.slow
def test_the_command_trains_under_accelerate_launch_and_says_so_once(tmp_path: Path) -> None:
    """As the documentation writes it, in float32."""
    settings = tiny_run(write_films(tmp_path / "films"), tmp_path / "one")
    settings["base"] |= NO_DROPOUT
    settings["tuner"]["lora_dropout"] = 0.0
    settings["training"] |= {"max_steps": 2, "optim": "sgd"}
    train(settings)
    changes = {"output_dir": str(tmp_path / "two")}
    changes["training"] = {**settings["training"], "per_device_train_batch_size": BATCH // 2}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**settings, **changes}), encoding="utf-8")
    log = tmp_path / "log.txt"
    command = launched("ddp", "-m", "peft_reslora", "train", str(tmp_path / "run.yaml"))
    run_together([(["sh", "-c", '"$@" > "$0"', str(log), *command], environment())])
    terms = 2 * sum(value.numel() for value in load_file(tmp_path / "one/adapter/adapter_model.safetensors").values())
    assert_same_factors(tmp_path / "two", tmp_path / "one", rounding(terms))
    assert metrics_of(tmp_path / "two")["losses"] == pytest.approx(metrics_of(tmp_path / "one")["losses"], abs=1e-5)
    assert log.read_text(encoding="utf-8").count("everything is in") == 1


def test_a_run_goes_on_in_as_many_processes_only(tmp_path: Path) -> None:
    settings = tiny_run(write_films(tmp_path / "films"), tmp_path / "run")
    train(settings, "training.max_steps=1", "export=false")
    (tmp_path / "run" / "metrics.json").unlink()
    run = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    (tmp_path / "run" / "run.json").write_text(json.dumps({**run, "processes": 2}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"holds a run of 2 processes, and this one has 1.*start as many"):
        train(settings, "training.max_steps=1", "export=false")


def test_one_process_is_the_main_one() -> None:
    calls: list[int] = []
    assert on_main(lambda: 3) == 3
    main_first(lambda: calls.append(1))
    assert calls == [1]
