"""Dropped layers: outputs and gradients against the equations, the draws, and what Trainer makes of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.gradients import assert_gradients_close
from helpers.oracle import chains_by_block, factors_of, randomize_adapters, relative_error
from helpers.tiny_models import TINY_MODELS, llama
from helpers.tolerances import FLOAT64, MODEL64
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_reslora import MoRAConfig, ResLoRAConfig
from peft_reslora.training import DroppedLayers, LayerGates, active_probability, draw_active

LLAMA = TINY_MODELS["llama"]
TARGETS = ["q_proj", "v_proj", "down_proj"]
CASES: list[tuple[Any, int]] = [("input", 1), ("block", 1), ("block", -1), ("middle", 1), ("middle", -1), (None, 1)]


def config(shortcut: str | None, pre_num: int) -> Any:
    if shortcut is None:
        return LoraConfig(r=3, target_modules=TARGETS, lora_alpha=5)
    return ResLoRAConfig(r=3, target_modules=TARGETS, lora_alpha=5, shortcut=shortcut, pre_num=pre_num)


def adapted(shortcut: str | None, pre_num: int) -> Any:
    torch.manual_seed(0)
    return randomize_adapters(get_peft_model(LLAMA.make().double(), config(shortcut, pre_num)).double().train())


def loss_of(logits: Tensor) -> Tensor:
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view(logits.shape)
    return (weights * logits.tanh()).sum()


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(5)
    return {"input_ids": torch.randint(1, 53, (2, 7))}


def by_equation(
    model: Any, shortcut: str | None, pre_num: int, dropped: set[str]
) -> tuple[Tensor, dict[tuple[str, int], Tensor]]:
    """Output and gradients from hooks on the bare base model, as the equations in `dropped_layers.py` say."""
    factors = factors_of(model)
    base = copy.deepcopy(model).unload()
    base.gradient_checkpointing_disable()
    chains = chains_by_block(list(factors), lambda n: (factors[n][0].shape[1], factors[n][1].shape[0]))
    seen: dict[str, Tensor] = {}

    def update(chain: list[str], n: int) -> Tensor:
        x, (A, B, s) = seen[chain[n]], factors[chain[n]]
        earlier = chain[max(0, n - pre_num) : n] if pre_num != -1 else chain[:n]
        if shortcut == "input":
            return s * (x + (seen[chain[n - 1]] if n else x)) @ A.T @ B.T
        if shortcut == "block":
            taken = [factors[k] for k in [chain[n], *earlier]]
            return sum(s_k * x @ A_k.T @ B_k.T for A_k, B_k, s_k in taken)
        if shortcut == "middle":
            return s * sum(seen[k] @ factors[k][0].T for k in [chain[n], *earlier]) @ B.T
        return s * x @ A.T @ B.T

    for chain in chains:
        for n, name in enumerate(chain):

            def hook(layer: nn.Module, args: Any, output: Tensor, chain: list[str] = chain, n: int = n) -> Tensor:
                seen[chain[n]] = args[0]
                return output if chain[n] in dropped else output + update(chain, n)

            base.get_submodule(name).register_forward_hook(hook)
    output = base(**inputs()).logits
    leaves = {(name, i): factors[name][i] for name in factors for i in (0, 1)}
    gradients = torch.autograd.grad(loss_of(output), list(leaves.values()), allow_unused=True)
    found = {k: torch.zeros_like(v) if g is None else g for (k, v), g in zip(leaves.items(), gradients, strict=True)}
    return output.detach(), found


def by_gates(model: Any, active: list[bool], gates: LayerGates) -> tuple[Tensor, dict[tuple[str, int], Tensor | None]]:
    gates.set(active)
    model.zero_grad()
    output = model(**inputs()).logits
    loss_of(output).backward()
    layers = dict(model.get_base_model().named_modules())
    pairs: dict[tuple[str, int], Tensor | None] = {}
    for name in gates.names:
        layer: Any = layers[name.removeprefix("base_model.model.")]
        for i, factor in enumerate((layer.lora_A, layer.lora_B)):
            pairs[name.removeprefix("base_model.model."), i] = factor["default"].weight.grad
    return output.detach(), pairs


@pytest.mark.quick(reentrant=[True])
@pytest.mark.parametrize(("shortcut", "pre_num"), CASES)
@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
def test_a_dropped_layer_adds_nothing_and_hands_on(shortcut: Any, pre_num: int, reentrant: bool | None) -> None:
    model = adapted(shortcut, pre_num)
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    gates = LayerGates(model)
    number = len(gates.names)
    patterns = [draw_active(number, p, seed=1, step=n) for n, p in enumerate((0.0, 0.5))]
    patterns.append([True] * number)
    for active in patterns:
        dropped = {n.removeprefix("base_model.model.") for n, on in zip(gates.names, active, strict=True) if not on}
        expected, gradients = by_equation(model, shortcut, pre_num, dropped)
        output, found = by_gates(model, active, gates)
        torch.testing.assert_close(output, expected, rtol=MODEL64, atol=MODEL64)
        filled = {k: torch.zeros_like(gradients[k]) if g is None else g for k, g in found.items()}
        assert_gradients_close(filled, gradients)
        copy.deepcopy(model)  # nothing of a pass is left on it that cannot be copied


def test_mora_layers_are_dropped() -> None:
    model: Any = get_peft_model(LLAMA.make().double(), MoRAConfig(r=2, target_modules=TARGETS)).double()
    randomize_adapters(model)
    with torch.no_grad():
        whole = model(**inputs()).logits
        gates = LayerGates(model)
        active = [n % 2 == 0 for n in range(len(gates.names))]
        gates.set(active)
        output = model(**inputs()).logits
        gates.remove()
        torch.testing.assert_close(model(**inputs()).logits, whole, rtol=0, atol=0)
        for name, on in zip(gates.names, active, strict=True):
            if not on:
                model.get_submodule(name).mora_M["default"].zero_()
        torch.testing.assert_close(output, model(**inputs()).logits, rtol=FLOAT64, atol=FLOAT64)


def test_the_probability_grows_to_1_over_three_quarters() -> None:
    assert [active_probability(n / 8) for n in (0, 3, 6, 8)] == [0.0, 0.5, 1.0, 1.0]


def test_draws_follow_from_seed_and_step() -> None:
    assert draw_active(6, 0.5, seed=0, step=3) == [False, True, False, True, True, True]  # wherever it is drawn
    draws = [draw_active(20, 0.5, seed=0, step=step) for step in range(200)]
    assert draws == [draw_active(20, 0.5, seed=0, step=step) for step in range(200)]
    assert draws != [draw_active(20, 0.5, seed=1, step=step) for step in range(200)]
    assert abs(sum(map(sum, draws)) / 4000 - 0.5) < 0.03
    ones = [draw_active(5, 0.0, seed=0, step=step) for step in range(100)]
    assert all(sum(one) == 1 for one in ones)
    assert {one.index(True) for one in ones} == {0, 1, 2, 3, 4}


class Texts(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        ids = torch.randint(1, 53, (6,), generator=torch.Generator().manual_seed(n))
        return {"input_ids": ids, "labels": ids}


class Watch(TrainerCallback):
    """What the gates are in each step, and between steps."""

    def __init__(self, callback: DroppedLayers) -> None:
        self.callback = callback
        self.during: list[list[bool]] = []
        self.between: list[bool] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.callback._gates is not None
        self.during.append([gate.active for gate in self.callback._gates._gates])

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.callback._gates is not None
        self.between += [gate.active for gate in self.callback._gates._gates]


def train(model: Any, folder: Path, steps: int = 8, resume: str | None = None, **arguments: Any) -> Watch:
    callback = DroppedLayers(seed=3)
    watch = Watch(callback)
    settings = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **{"save_strategy": "no", **arguments},
    )
    trainer = Trainer(model, settings, train_dataset=Texts(), eval_dataset=Texts(), callbacks=[callback, watch])
    trainer.train(resume_from_checkpoint=resume)
    assert callback._gates is None
    return watch


def fresh(shortcut: str | None = "middle") -> Any:
    torch.manual_seed(0)
    return get_peft_model(llama(), config(shortcut, 1))


def test_a_resumed_run_draws_and_trains_as_the_whole_one(tmp_path: Path) -> None:
    whole, resumed = fresh(), fresh()
    watch = train(whole, tmp_path / "whole", save_strategy="steps", save_steps=4, eval_strategy="steps", eval_steps=2)
    again = train(resumed, tmp_path / "again", resume=str(tmp_path / "whole" / "checkpoint-4"))
    assert watch.during[4:] == again.during
    assert watch.during == [draw_active(12, active_probability(n / 8), 3, n) for n in range(8)]
    assert sum(watch.during[0]) == 1
    assert all(map(all, watch.during[6:]))
    assert watch.between
    assert all(watch.between)
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(dict(resumed.named_parameters())[name], parameter, msg=name)
    assert not any(
        hook for module in whole.modules() for hook in module._forward_hooks.values() if "Gate" in str(hook)
    )


def test_factors_without_a_part_in_a_step_are_not_changed_by_it(tmp_path: Path) -> None:
    """One step with one of 12 layers: LoRA's other factors stay, weight decay and all."""
    model = fresh(None)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    watch = train(model, tmp_path, steps=1, weight_decay=0.1)
    changed = {name.split(".lora_")[0] for name, old in before.items() if not model.get_parameter(name).equal(old)}
    assert sum(watch.during[0]) == len(changed) == 1


def test_what_cannot_be_dropped_is_refused(tmp_path: Path) -> None:
    model = fresh()
    with pytest.raises(ValueError, match="No layer of the model has an adapter 'other'"):
        LayerGates(model, "other")
    model.add_adapter("other", config("middle", 1))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="only 'default' may be active"):
        LayerGates(model)
    with pytest.raises(ValueError, match="until=0"):
        DroppedLayers(until=0)
    settings = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", torch_compile=True)
    with pytest.raises(ValueError, match="torch_compile=True"):
        DroppedLayers().on_train_begin(settings, None, None, model=model)


def test_a_step_that_breaks_off_leaves_the_model_whole_in_evaluation() -> None:
    """An exception in the middle of a step: Trainer then calls nothing any more."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model = randomize_adapters(get_peft_model(model, LoraConfig(r=2, target_modules=["0", "1"])))
    x = torch.randn(3, 4)
    expected = model.eval()(x)
    gates = LayerGates(model, in_training_only=True)
    gates.set([False, True])
    assert relative_error(model.train()(x), expected) > 1e-3
    assert torch.equal(model.eval()(x), expected)
    gates.remove()
