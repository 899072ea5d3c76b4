"""Two processes under each engine train as one process does: losses, gradients and norms."""

from __future__ import annotations

import functools
import re
import sys

import pytest
import torch
from helpers.engine_worker import (
    CASE_OF_EACH,
    CASES,
    CHECKPOINTING,
    KIND_CASES,
    TUNERS,
    Results,
    build,
    case_id,
    plain,
)
from helpers.engines import CONFIGS, ENGINES, LABELS, WORKERS, by_engine, environment, free_port, run_together
from helpers.gradients import assert_gradients_close
from helpers.tolerances import MODEL64, rounding

DIRECT = by_engine("direct", LABELS)
LAUNCHED = by_engine("launched", ENGINES)


@pytest.fixture(scope="session")
def run_engine(tmp_path_factory):
    """The results of all cases under an engine; each engine starts its processes once."""

    @functools.cache
    def run(engine: str) -> dict[str, Results | str]:
        if engine.startswith("zero") or engine == "each":
            pytest.importorskip("deepspeed")
        output = tmp_path_factory.mktemp(engine) / "results.pt"
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
        command = [sys.executable, str(WORKERS / "engine_worker.py"), engine, str(output)]
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        run_together([(command, {**environment(), **where, **rank}) for rank in ranks])
        return torch.load(output)

    return run


@pytest.fixture(scope="session")
def launch(tmp_path_factory):
    """The results of all tuners under `accelerate launch` with one of the configs."""

    @functools.cache
    def run(config: str) -> dict[str, Results | str]:
        if config.startswith("zero"):
            pytest.importorskip("deepspeed")
        output = tmp_path_factory.mktemp(f"launch_{config}") / "results.pt"
        command = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            str(CONFIGS / f"{config}.yaml"),
        ]
        command += [
            "--main_process_port",
            str(free_port()),
            str(WORKERS / "engine_worker.py"),
            "accelerate",
            str(output),
        ]
        run_together([(command, environment())])
        return torch.load(output)

    return run


@functools.cache
def reference(tuner: tuple[str, int]) -> Results:
    return plain(build(tuner, "none"))


def assert_same_training(actual: Results | str, expected: Results, engine: str) -> None:
    """All compute in float64; DeepSpeed averages gradients in float32, of which the second loss is a function."""
    assert not isinstance(actual, str), actual
    terms = 30  # of two processes, of either sign
    bound = rounding(terms) if engine.startswith("zero") else MODEL64
    assert actual["losses"] == pytest.approx(expected["losses"], rel=bound)
    assert actual["losses"][0] == pytest.approx(expected["losses"][0], rel=MODEL64)
    assert actual["evaluated"] == pytest.approx(expected["evaluated"], rel=bound)
    assert actual["evaluated"][0] == pytest.approx(expected["evaluated"][0], rel=MODEL64)
    for found, wanted in zip(actual["gradients"], expected["gradients"], strict=True):
        assert found.keys() == wanted.keys()
        seen = {name for name, grad in found.items() if grad.numel()}  # see `accelerated`
        if not seen:
            continue
        assert seen == wanted.keys()
        if not engine.startswith("zero"):
            assert {grad.dtype for grad in found.values()} == {torch.float64}
        assert_gradients_close(found, wanted, terms)


@pytest.mark.quick(engine=["ddp", "fsdp2"])
@pytest.mark.xdist_group("each engine")
@pytest.mark.parametrize("engine", CASE_OF_EACH)
def test_one_case_trains_as_one_process(run_engine, engine):
    """What the slow tests show of all cases."""
    assert_same_training(run_engine("each")[engine], reference(CASE_OF_EACH[engine][0]), engine)


@pytest.mark.support(lambda engine, **_: f"{LABELS[engine]}, with and without checkpointing")
@pytest.mark.parametrize("engine", DIRECT)
@pytest.mark.parametrize(("tuner", "checkpointing"), CASES)
def test_engine_trains_as_one_process(run_engine, engine, tuner, checkpointing):
    assert_same_training(run_engine(engine)[case_id(tuner, checkpointing)], reference(tuner), engine)


@pytest.mark.parametrize("engine", by_engine("kinds", LABELS))
@pytest.mark.parametrize(("tuner", "checkpointing"), KIND_CASES)
def test_other_kinds_of_blocks_train_or_are_refused(run_engine, engine, tuner, checkpointing):
    """DoRA, a rank in use of an adapter with nested ranks, AdaLoRA, whose ranks need all gradients to allocate, and
    attention, to whose weights the update is added."""
    result = run_engine(f"{engine}-kinds")[case_id(tuner, checkpointing)]
    if tuner[0].endswith("adalora") and engine != "ddp":
        assert isinstance(result, str)
        assert re.search(r"RuntimeError: .*(AdaLoRA|DeepSpeed).*DDP", result)
        return
    assert_same_training(result, reference(tuner), engine)


@pytest.mark.long
@pytest.mark.support("the same through accelerate launch (configs/accelerate)")
@pytest.mark.parametrize("config", LAUNCHED)
@pytest.mark.parametrize("tuner", TUNERS)
def test_accelerate_launch_trains_as_one_process(launch, config, tuner):
    result = launch(config)[case_id(tuner, "non-reentrant")]
    assert_same_training(result, reference(tuner), config)
    assert result["engine"] == ENGINES[config]


@pytest.mark.parametrize("engine", DIRECT)
@pytest.mark.parametrize("tuner", [tuner for tuner in TUNERS if tuner[0] in ("input", "middle")])
def test_norms_are_recorded_once_per_forward(run_engine, engine, tuner):
    """Also where checkpointing computes a forward twice; each process sees its own half of the batch."""
    for checkpointing in CHECKPOINTING:
        norms = run_engine(engine)[case_id(tuner, checkpointing)]["norms"]
        whole = reference(tuner)["norms"]
        assert norms.keys() == whole.keys()
        for name, window in norms.items():
            assert (window >= 0).sum() == 2
            assert torch.allclose(window[-2:], whole[name][-2:], rtol=0.5)  # half the batch
