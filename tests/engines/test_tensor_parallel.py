"""transformers' tensor parallelism, two processes: logits and gradients of the whole model."""

from __future__ import annotations

import sys

import pytest
import torch
from helpers.engines import WORKERS, environment, free_port, run_together
from helpers.tiny_models import TINY_MODELS

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("tensor parallel")]
ROW = "tensor parallelism of transformers (training: layers that LoRA trains there)"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tensor_parallel")
    TINY_MODELS["llama"].make().save_pretrained(folder / "base")
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    command = [
        sys.executable,
        str(WORKERS / "tensor_parallel_worker.py"),
        str(folder / "base"),
        str(folder / "results"),
    ]
    run_together(
        [(command, {**environment(), **where, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    )
    return torch.load(folder / "results")


@pytest.mark.support(ROW)
@pytest.mark.parametrize("tuner", ["input", "block", "middle"])
def test_tensor_parallel_layers_compute_what_the_whole_ones_do(results, tuner):
    """As close as LoRA's: the same sums, split over two processes."""
    for mode in ("inference", "training"):
        errors, lora = results[tuner, mode], results["lora", mode]
        assert not isinstance(errors, str), errors
        assert len(errors) == len(lora)
        assert max(errors.values()) < 10 * max(lora.values())


@pytest.mark.support(ROW, verdict="refused", columns=["MoRA"])
def test_mora_refuses_sharded_layers(results):
    for mode in ("inference", "training"):
        assert "tensor parallel" in results["mora", mode], results["mora", mode]
