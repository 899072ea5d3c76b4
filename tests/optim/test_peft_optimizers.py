"""PEFT's own optimizers on the adapters of this package: which parameters they find, and what they make of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.oracle import factors_of, randomize_adapters, relative_error, run_oracle
from helpers.tiny_models import TINY_MODELS
from helpers.tolerances import MODEL64
from peft import PeftModel, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from torch import nn

from peft_reslora import MoRAConfig, ResLoRAConfig

TUNERS = ["input", "block", "middle", "mora"]
TARGETS = TINY_MODELS["llama"].targets
R, ALPHA = 3, 6


def adapted(tuner: str, **fields: Any) -> PeftModel:
    torch.manual_seed(0)
    fields = {"r": R, "target_modules": TARGETS, **fields}
    config = MoRAConfig(**fields) if tuner == "mora" else ResLoRAConfig(**fields, lora_alpha=ALPHA, shortcut=tuner)
    return get_peft_model(TINY_MODELS["llama"].make(), config).train()


def losses(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> list[float]:
    torch.manual_seed(1)
    ids = TINY_MODELS["llama"].inputs()["input_ids"]
    values = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
    return values


@pytest.mark.parametrize("tuner", TUNERS)
def test_loraplus_gives_each_b_the_ratio_and_all_else_the_rate(tuner):
    model = adapted(tuner)
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=4.0)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert rate.keys() == {id(p) for p in trained.values()}
    assert {name: rate[id(p)] for name, p in trained.items()} == {
        name: 4e-2 if ".lora_B." in name else 1e-2 for name in trained
    }
    assert {name.rsplit(".", 2 if "lora_" in name else 1)[0].rsplit(".")[-1] for name in trained} == (
        {"mora_M"} if tuner == "mora" else {"lora_A", "lora_B"}
    )
    values = losses(model, optimizer)
    assert values[-1] < values[0]


@pytest.mark.parametrize("tuner", TUNERS)
def test_lorafa_freezes_each_a_and_trains_the_rest(tuner):
    model = adapted(tuner)
    optimizer = create_lorafa_optimizer(model, r=R, lora_alpha=ALPHA, lr=1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    values = losses(model, optimizer)
    assert values[-1] < values[0]
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if ".lora_B." in name or ".mora_M." in name}


@pytest.mark.usefixtures("float64")
def test_lorafa_on_mora_is_adamw():
    models = [randomize_adapters(adapted("mora")) for _ in range(2)]
    parameters = [p for p in models[1].parameters() if p.requires_grad]
    losses(models[0], create_lorafa_optimizer(models[0], r=R, lora_alpha=ALPHA, lr=1e-2), steps=3)
    losses(models[1], torch.optim.AdamW(parameters, lr=1e-2, eps=1e-6, weight_decay=0.0), steps=3)
    for name, parameter in models[1].named_parameters():
        if parameter.requires_grad:
            # AdamW corrects the second moment before it adds eps, and LoRA-FA after.
            assert relative_error(models[0].get_parameter(name), parameter) < 1e-2, name


def gradients_of_updates(shortcut: str, model: nn.Module) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The factors and the gradient G of each layer's own update s B A, as if it were one matrix, from the oracle."""
    torch.manual_seed(1)
    ids = TINY_MODELS["llama"].inputs()["input_ids"]

    def loss(base: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        return base(**inputs, labels=ids).loss

    factors = factors_of(model)
    base = TINY_MODELS["llama"].make()
    dense = {  # the same update as a product with the identity: its gradient is G
        name: (torch.eye(A.shape[1]), (s * B @ A).detach().requires_grad_(), 1.0)
        for name, (A, B, s) in factors.items()
    }
    run_oracle(base, {"input_ids": ids}, dense, shortcut, 1, loss).backward()
    return factors, {name: B.grad for name, (_, B, _) in dense.items()}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("shortcut", ["input", "block"])
def test_lorafa_takes_the_gradient_of_b_nearest_to_that_of_the_update(shortcut):
    model = randomize_adapters(adapted(shortcut))
    factors, G = gradients_of_updates(shortcut, model)
    optimizer = create_lorafa_optimizer(model, r=R, lora_alpha=ALPHA, lr=1e-2)
    losses(model, optimizer, steps=1)
    for name, (A, _, s) in factors.items():
        nearest = torch.linalg.lstsq(s * A.detach().T, G[name].T).solution.T  # least ||s h A - G||
        average = optimizer.state[f"base_model.model.{name}.lora"]["exp_avg_B"]  # a tenth of the first gradient
        assert relative_error(average, 0.1 * nearest) < MODEL64, name


@pytest.mark.usefixtures("float64")
def test_lorafa_overshoots_on_middle_where_b_multiplies_several_a():
    """What `peft_reslora.optim` says of it: the nearest gradient of B has the sum of all A A^T in it, PEFT's one."""
    model = randomize_adapters(adapted("middle"))
    torch.manual_seed(1)
    ids = TINY_MODELS["llama"].inputs()["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer = create_lorafa_optimizer(model, r=R, lora_alpha=ALPHA, lr=1e-2)
    optimizer.step()
    ratios = []
    for name, (A, _, s) in factors_of(model).items():
        if ".layers.0." in name:
            continue
        previous = factors_of(model)[name.replace(f".layers.{(n := number(name))}.", f".layers.{n - 1}.")][0].detach()
        A = A.detach()
        grad_B = model.get_parameter(f"base_model.model.{name}.lora_B.default.weight").grad
        nearest = grad_B @ torch.linalg.inv(A @ A.T + previous @ previous.T) / s**2
        own = 10 * optimizer.state[f"base_model.model.{name}.lora"]["exp_avg_B"]
        assert relative_error(own, grad_B @ torch.linalg.inv(A @ A.T) / s**2) < MODEL64
        ratios.append(float(own.norm() / nearest.norm()))
    assert 1.5 < sum(ratios) / len(ratios) < 3
    assert min(ratios) > 1.2


def number(name: str) -> int:
    return int(name.split(".layers.")[1].split(".")[0])
