"""Every benchmark runs, says what it measured, and measures in turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.repository import ROOT

FOLDER = ROOT / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "common")


@pytest.fixture
def common(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import common

    yield common
    del sys.modules["common"]


@pytest.fixture
def gradients(common, monkeypatch):
    import gradients

    yield gradients
    for name in ("gradients", "merge_fidelity"):
        del sys.modules[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_each_runs_and_writes_what_it_measured(name: str, tmp_path: Path) -> None:
    before = sorted((FOLDER / "results").iterdir())
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--quick", "--json", str(tmp_path / "results.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert written["benchmark"] == name
    assert written["options"]["quick"]
    assert {"device", "threads", "python", "torch", "peft", "peft_reslora"} <= set(written["environment"])
    assert written["results"]
    for result in written["results"]:
        assert str(result["variant" if name == "merge_fidelity" else "method"]) in done.stdout
    assert str(tmp_path) not in json.dumps(written)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert sorted((FOLDER / "results").iterdir()) == before


@pytest.mark.slow
def test_the_training_step_knows_autocast_checkpointing_and_half_precision(tmp_path: Path) -> None:
    options = [
        "--dtype",
        "bfloat16",
        "--autocast",
        "bfloat16",
        "--checkpointing",
        "--only",
        "ResLoRA input, pre_num 1",
    ]
    command = [
        sys.executable,
        str(FOLDER / "train_step.py"),
        "--quick",
        *options,
        "--plot",
        str(tmp_path / "plot.png"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line.split("  ")[0] for line in done.stdout.splitlines()[2:]] == [
        "frozen base",
        "LoRA",
        "ResLoRA input, pre_num 1",
    ]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_training_step_is_measured_at_all_pairs_of_batch_and_length_and_compiled(tmp_path: Path) -> None:
    numbers = ["--batch", "1", "2", "--tokens", "4", "--only", "ResLoRA block, pre_num 1"]
    kept = tmp_path / "kept" / "step"
    options = ["--quick", *numbers, "--compile", "eager", "--keep", str(kept)]
    command = [sys.executable, str(FOLDER / "train_step.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in kept.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()]
    pairs = [(line["batch"], line["tokens"]) for line in lines]
    assert pairs == [pair for pair in ((1, 4), (2, 4)) for _ in range(3)]
    text = kept.with_suffix(".md").read_text(encoding="utf-8")
    command_line, _, *table = text.splitlines()
    assert "python benchmarks/train_step.py --quick --batch 1 2 --tokens 4" in command_line
    assert str(tmp_path) not in text
    assert f"{os.cpu_count()} CPU cores" in command_line
    assert len(table) == 2 + len(lines)
    assert {line.count("|") for line in table} == {9}
    assert kept.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_growth_exponent_is_that_of_a_power_law(common) -> None:
    sizes = [4, 8, 16, 64]
    assert common.growth_exponent(sizes, [3 * size**1.5 for size in sizes]) == pytest.approx(1.5)


def test_jobs_take_turns_in_changing_order(common) -> None:
    calls: list[str] = []
    jobs = {name: lambda name=name: calls.append(name) or float(len(calls)) for name in "abc"}
    times = common.in_turns(jobs, rounds=8, warmups=1)
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(rounds) == 9
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(map(tuple, rounds))) > 1
    assert times["b"] == [3 * n + order.index("b") + 1 for n, order in enumerate(rounds)][1:]


def test_a_ratio_is_of_the_minima_with_the_quartiles_of_the_rounds(common) -> None:
    ratio = common.Ratio.of([2.0, 3.0, 4.0, 8.0, 10.0], [4.0, 2.0, 2.0, 2.0, 2.0])
    assert (ratio.minima, ratio.low, ratio.median, ratio.high) == (1.0, 1.5, 2.0, 4.0)
    assert str(ratio) == "1.00 (1.50-4.00)"


def test_twins_share_weights_and_nothing_else(common) -> None:
    import torch
    from peft import get_peft_model

    from peft_reslora import ResLoRAConfig

    base = common.llama(16, 2, heads=2, kv_heads=2, vocab=10)
    ids = torch.tensor([[1, 2, 3]])
    expected = base(input_ids=ids).logits
    adapted = get_peft_model(common.twin(base), ResLoRAConfig(target_modules="all-linear", init_lora_weights=False))
    assert not torch.equal(adapted(input_ids=ids).logits, expected)
    assert torch.equal(base(input_ids=ids).logits, expected)
    places = {parameter.data_ptr() for parameter in base.parameters()}
    assert places <= {parameter.data_ptr() for parameter in adapted.parameters()}


@pytest.mark.parametrize("method", ["LoRA", "input", "block, m=all", "middle, m=1"])
def test_norms_by_block_are_those_of_the_gradients_and_no_method_starts_elsewhere(gradients, method: str) -> None:
    """Against the norms of torch.autograd.grad: in a first pass, in which B is zero, and with random factors."""
    import torch
    from peft import get_peft_model

    base = gradients.llama(16, 3, vocab=20, heads=2, kv_heads=2).double().requires_grad_(False)
    batch = gradients.as_batch(torch.arange(36).view(3, 12) % 20)
    model = get_peft_model(gradients.twin(base), gradients.config_of(method, 2)).double().train()
    loss, norms = gradients.look(model, batch, 3)
    assert loss == pytest.approx(float(base(**batch).loss), rel=1e-12)
    assert norms["A"] == [0.0, 0.0, 0.0]
    torch.manual_seed(0)
    gradients.give(model, {name: torch.randn_like(value) for name, value in gradients.factors_of(model).items()})
    _, norms = gradients.look(model, batch, 3)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    found = torch.autograd.grad(model(**batch).loss, [model.get_parameter(name) for name in names])
    for factor, block in ((factor, block) for factor in "AB" for block in range(3)):
        own = [g for n, g in zip(names, found, strict=True) if f".{block}." in n and f"lora_{factor}" in n]
        assert len(own) == 2
        assert norms[factor][block] == pytest.approx(float(torch.cat([g.flatten() for g in own]).norm()), rel=1e-9)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_report_says_which_end_of_the_blocks_gains(gradients) -> None:
    """Of made-up runs: a shortcut that doubles the gradient of the first block, and lowers the loss at each seed."""

    def run(method: str, seed: int, factor: float, loss: float) -> dict:
        norms = {"A": [[0.0] * 3, [factor, 1.0, 1.0]], "B": [[factor, 1.0, 1.0]] * 2}
        setting = {"hidden": 8, "base_steps": 1, "rank": 2, "steps": 1, "probe": 1}
        run = {"method": method, "layers": 3, "seed": seed, "rate": 0.01, "setting": setting}
        return run | {"losses": [3.0, loss], "own": norms, "equal": norms}

    records = [run("LoRA", seed, 0.5, 2.0) for seed in range(3)]
    records += [run("middle, m=1", seed, 1.0, 1.9 + seed / 100) for seed in range(3)]
    text = gradients.report(records, "name")
    assert "fade towards the first blocks (first third over last, B at step 0: 0.50, 0.50 to 0.50)" in text
    assert "a larger share of the gradient of A than under LoRA with `middle, m=1`, a smaller one with none" in text
    assert "the loss is lower than LoRA's at every seed with `middle, m=1`, higher with none" in text
    assert "| middle, m=1 | 2.00 / 1.00 | 2.00 / 1.00 | 2.00 / 1.00 |" in text
    assert "+0.0900, all 3 seeds of one sign" in text


def fill(size: int) -> bytearray:
    return bytearray(os.urandom(1)) * size


@pytest.mark.slow
def test_memory_is_that_of_a_process_of_its_own(common) -> None:
    small, large = 2**10, 2**27
    grown = common.growth_of_process(fill, small, large)
    assert 0.9 * large < grown < 1.5 * large


@pytest.mark.parametrize(
    ("left", "right", "backward", "expected"),
    [
        ((10, 64), (64, 176), False, "base products"),
        ((10, 64), (64, 176), True, "base products"),
        ((10, 64), (64, 8), False, "projections"),
        ((16, 64), (64, 10), False, "projections"),
        ((10, 8), (8, 64), False, "expansions"),
        ((3, 10, 23), (3, 23, 23), False, "expansions"),
        ((8, 64), (64, 10), True, "input gradients"),
        ((10, 8), (8, 176), True, "input gradients"),
        ((8, 10), (10, 64), True, "factor gradients"),
    ],
)
def test_products_are_told_apart_by_their_shapes(
    common, left: tuple[int, ...], right: tuple[int, ...], backward: bool, expected: str
) -> None:
    """Of a model with sides 64 and 176, rank 8 or a square of 23, and 10 rows."""
    import profile_step

    assert profile_step.kind_of_product(left, right, {64, 176}, 10, backward) == expected
    for name in ("profile_step", "train_step"):
        del sys.modules[name]


def test_all_time_of_a_step_is_of_some_kind(common) -> None:
    import profile_step
    import torch

    weight, factor = torch.randn(64, 64), torch.randn(8, 64, requires_grad=True)

    def step() -> None:
        x = torch.randn(10, 64)
        hidden = (x @ weight) @ factor.t()
        (hidden @ factor).sum().backward()

    found = profile_step.work_by_kind(step, {64}, 10)
    assert list(found) == list(profile_step.KINDS)
    assert found["optimizer"] == 0
    assert all(found[kind] > 0 for kind in profile_step.KINDS if kind != "optimizer")
    for name in ("profile_step", "train_step"):
        del sys.modules[name]
