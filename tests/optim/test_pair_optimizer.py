"""What an optimizer has to do in a training loop: groups, checkpoints, closures, and work in the Trainer."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from helpers.oracle import randomize_adapters, relative_error
from helpers.tiny_models import TINY_MODELS
from helpers.tolerances import FLOAT64, MODEL64
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from peft_reslora import MoRAConfig, ResLoRAConfig
from peft_reslora.optim import FactorPair, LoRAPro, LoRARite, factor_pairs, remaining_parameters

MAKERS: dict[str, Any] = {
    "LoRA-Pro": LoRAPro,
    "LoRA-Pro sgd": lambda params, **options: LoRAPro(params, update="sgd", **options),
    "LoRA-RITE": LoRARite,
}
all_optimizers = pytest.mark.parametrize("make", list(MAKERS.values()), ids=list(MAKERS))


def adapted(shortcut: str = "block", **fields: Any) -> PeftModel:
    fields = {"r": 3, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"], **fields}
    return get_peft_model(TINY_MODELS["llama"].make(), ResLoRAConfig(**fields, shortcut=shortcut)).train()


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    pairs = factor_pairs(model)
    return [{"pairs": pairs}, {"params": remaining_parameters(model, pairs), "lr": 1e-3}]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 1) -> list[float]:
    torch.manual_seed(seed)
    losses = []
    for _ in range(steps):
        ids = TINY_MODELS["llama"].inputs()["input_ids"]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.quick(kind=["block"])
@all_optimizers
@pytest.mark.parametrize("kind", ["input", "block", "lora", "dora"])
def test_training_learns(make, kind):
    config = LoraConfig(r=3, target_modules=TINY_MODELS["llama"].targets, use_dora=kind == "dora")
    model = adapted(kind) if kind in ("input", "block") else get_peft_model(TINY_MODELS["llama"].make(), config)
    optimizer = make(groups_of(model), lr=1e-2)
    torch.manual_seed(1)
    ids = TINY_MODELS["llama"].inputs()["input_ids"]
    losses = []
    for _ in range(10):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.usefixtures("float64")
@all_optimizers
def test_parameters_without_a_pair_are_updated_as_by_adamw(make):
    model = get_peft_model(TINY_MODELS["llama"].make(), MoRAConfig(r=3, target_modules=["q_proj"]))
    twin = copy.deepcopy(model)
    options = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.9)}
    pair = FactorPair("unused", torch.ones(1, 2, requires_grad=True), torch.ones(3, 1, requires_grad=True), 1.0)
    train(model, make([{"pairs": [pair]}, {"params": remaining_parameters(model, [])}], **options), steps=3)
    train(twin, torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], **options), steps=3)
    for name, expected in trained(twin).items():
        assert relative_error(model.get_parameter(name), expected) < FLOAT64, name
    assert torch.equal(pair.A, torch.ones(1, 2))  # without a gradient, nothing is changed


@pytest.mark.usefixtures("float64")
@all_optimizers
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_resumed_run_is_the_uninterrupted_one(make, dtype):
    whole = randomize_adapters(adapted()).to(dtype)
    optimizer = make(groups_of(whole), lr=1e-2, weight_decay=0.1)
    train(whole, optimizer, steps=3)
    resumed, file = copy.deepcopy(whole), io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    continued = make(groups_of(resumed), lr=5.0)
    continued.load_state_dict(torch.load(file, weights_only=True))
    train(whole, optimizer, steps=3, seed=2)
    train(resumed, continued, steps=3, seed=2)
    for name, expected in trained(whole).items():
        assert torch.equal(resumed.get_parameter(name), expected), name


@pytest.mark.usefixtures("float64")
@all_optimizers
def test_each_group_has_its_options(make):
    model = randomize_adapters(adapted(modules_to_save=None))
    twin = copy.deepcopy(model)
    pairs, alone = factor_pairs(model), factor_pairs(twin)
    optimizer = make([{"pairs": pairs[:3]}], lr=1e-2)
    optimizer.add_param_group({"pairs": pairs[3:], "lr": 0.0, "weight_decay": 0.5})
    train(model, optimizer, steps=1)
    train(twin, make(alone[:3], lr=1e-2), steps=1)
    for name, expected in trained(twin).items():
        assert relative_error(model.get_parameter(name), expected) < MODEL64, name


@all_optimizers
def test_a_closure_computes_the_loss_with_gradients(make):
    model = adapted()
    optimizer = make(groups_of(model), lr=1e-2)
    ids = TINY_MODELS["llama"].inputs()["input_ids"]

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(5)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("optimizer", [LoRAPro, LoRARite])
def test_the_trainer_trains_and_resumes(optimizer, tmp_path):
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(4, 53, (8, 6))]

    def trainer(folder: str) -> Trainer:
        model = adapted()
        arguments = TrainingArguments(
            output_dir=str(tmp_path / folder), max_steps=4, per_device_train_batch_size=2, logging_steps=1,
            save_strategy="steps", save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        return Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer(groups_of(model), lr=1e-2), None))

    whole, resumed = trainer("whole"), trainer("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    start = trained(adapted())
    for name, expected in trained(whole.model).items():
        assert relative_error(resumed.model.get_parameter(name), expected) < 1e-5, name
        assert not torch.equal(expected, start[name]), name
    assert whole.optimizer.param_groups[0]["lr"] < 1e-2  # the schedule reached it


BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "lr": ({"lr": -1.0}, "lr=-1.0 must be 0 or more"),
    "nan lr": ({"lr": float("nan")}, "lr=nan must be 0 or more"),
    "weight_decay": ({"weight_decay": -0.1}, "weight_decay=-0.1 must be"),
    "betas": ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\) must be two numbers"),
    "eps": ({"eps": 0.0}, "eps=0.0 must be above 0"),
}


@pytest.mark.parametrize("optimizer", [LoRAPro, LoRARite])
@pytest.mark.parametrize("kind", list(BAD_OPTIONS))
def test_options_out_of_range_are_refused_by_name(optimizer, kind):
    options, message = BAD_OPTIONS[kind]
    pair = FactorPair("layer", torch.ones(1, 2), torch.ones(3, 1), 1.0)
    with pytest.raises(ValueError, match=message):
        optimizer([pair], **options)
    with pytest.raises(ValueError, match=message):
        optimizer([{"pairs": [pair], **options}])


@pytest.mark.parametrize(("option", "message"), [
    ({"update": "adam"}, "update='adam' is not known; choose from adamw, sgd"),
    ({"rtol": 1.0}, "rtol=1.0 must be between 0 and 1"),
])  # fmt: skip
def test_lora_pro_refuses_unknown_updates_and_tolerances(option, message):
    with pytest.raises(ValueError, match=message):
        LoRAPro([FactorPair("layer", torch.ones(1, 2), torch.ones(3, 1), 1.0)], **option)


def bad_gradients(kind: str) -> tuple[list[FactorPair], str]:
    pairs = [
        FactorPair(f"layers.{n}", torch.ones(1, 2, requires_grad=True), torch.ones(3, 1, requires_grad=True), 1.0)
        for n in range(2)
    ]
    for pair in pairs:
        pair.A.grad, pair.B.grad = torch.ones(1, 2), torch.ones(3, 1)
    if kind == "missing":
        pairs[1].A.grad = None
        return pairs, r"'layers.1': A has no gradient.*AdamW"
    pairs[1].B.grad[0] = float(kind)
    return pairs, r"'layers.1': a factor or its gradient holds NaN or infinity.*GradScaler"


@all_optimizers
@pytest.mark.parametrize("kind", ["missing", "nan", "inf"])
def test_bad_gradients_are_refused_before_anything_is_changed(make, kind):
    pairs, message = bad_gradients(kind)
    with pytest.raises(ValueError, match=message):
        make(pairs).step()
    for pair in pairs:
        assert torch.equal(pair.A, torch.ones(1, 2))
        assert torch.equal(pair.B, torch.ones(3, 1))


@all_optimizers
def test_a_state_for_other_layers_is_refused(make):
    first, second, *rest = factor_pairs(adapted())
    optimizer = make([first, second, *rest])
    with pytest.raises(ValueError, match=r"it has '\S*v_proj' where this optimizer has '\S*q_proj'.*same model"):
        optimizer.load_state_dict(make([second, first, *rest]).state_dict())
    with pytest.raises(ValueError, match=r"it has '2 layers in 1 groups' where this optimizer has '8 in 1'"):
        optimizer.load_state_dict(make([first, second]).state_dict())
