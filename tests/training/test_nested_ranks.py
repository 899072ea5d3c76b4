"""Nested ranks in training: the draws, what Trainer makes of them, and several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.oracle import randomize_adapters
from helpers.tiny_models import llama
from peft import get_peft_model
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_reslora import ResLoRAConfig
from peft_reslora.reslora.linking import chains_of
from peft_reslora.training import NestedRanks, OneDirection, draw_rank, set_rank


class Texts(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        ids = torch.randint(1, 53, (6,), generator=torch.Generator().manual_seed(n))
        return {"input_ids": ids, "labels": ids}


class Watch(TrainerCallback):
    """How many directions are in use in each micro-batch, in evaluations, and after each step."""

    def __init__(self) -> None:
        self.during: list[Any] = []
        self.between: list[Any] = []

    def _in_use(self, model: Any) -> int | None:
        ranks = {chain.directions and chain.directions.rank for chain in chains_of(model, "default")}
        assert len(ranks) == 1  # the same in all chains
        return ranks.pop()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.during.append(self._in_use(kwargs["model"]))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.during.append(self._in_use(kwargs["model"]))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.between.append(self._in_use(kwargs["model"]))


def fresh(shortcut: Any = "middle", **changes: Any) -> Any:
    torch.manual_seed(0)
    fields = {"r": 4, "target_modules": ["q_proj", "v_proj"], "shortcut": shortcut, "nested_ranks": True, **changes}
    return get_peft_model(llama(), ResLoRAConfig(**fields))


def train(model: Any, folder: Path, callback: NestedRanks, resume: str | None = None, **arguments: Any) -> Watch:
    watch = Watch()
    settings = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **{"max_steps": 6, "save_strategy": "no", **arguments},
    )
    trainer = Trainer(model, settings, train_dataset=Texts(), eval_dataset=Texts(), callbacks=[callback, watch])
    trainer.train(resume_from_checkpoint=resume)
    assert watch._in_use(model) is None
    return watch


def test_draws_follow_from_seed_and_step() -> None:
    assert [draw_rank(range(1, 9), seed=0, step=step) for step in range(6)] == [
        3,
        2,
        6,
        4,
        2,
        7,
    ]  # wherever it is drawn
    draws = [draw_rank([2, 4, 8], seed=1, step=step) for step in range(3000)]
    assert all(abs(draws.count(rank) - 1000) < 100 for rank in (2, 4, 8))


def test_a_resumed_run_draws_and_trains_as_the_whole_one(tmp_path: Path) -> None:
    whole, resumed = fresh(), fresh()
    saving = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 2}
    watch = train(whole, tmp_path / "whole", NestedRanks(seed=3), **saving)
    again = train(resumed, tmp_path / "again", NestedRanks(seed=3), str(tmp_path / "whole" / "checkpoint-3"))
    draws = [draw_rank([1, 2, 3, 4], 3, step) for step in range(6)]
    assert watch.during == [rank for rank in draws for _ in range(2)]  # of each step both micro-batches
    assert again.during == watch.during[6:]
    assert watch.between == [None] * 3
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(dict(resumed.named_parameters())[name], parameter, msg=name)


@pytest.mark.slow
def test_ranks_can_be_chosen(tmp_path: Path) -> None:
    watch = train(fresh("input"), tmp_path, NestedRanks(ranks=[2, 4]), max_steps=8)
    assert set(watch.during) == {2, 4}


@pytest.mark.quick(shortcut=["middle"])
@pytest.mark.parametrize("shortcut", ["input", "block", "middle"])
def test_one_step_of_sgd_changes_the_first_directions_or_the_last_of_them(shortcut: Any, tmp_path: Path) -> None:
    """What the paper calls frozen leaves those before it as they are; both use all of them."""
    losses = []
    for last_only in (False, True):
        model = randomize_adapters(fresh(shortcut))
        before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
        callback = NestedRanks(ranks=[3], last_direction_only=last_only)
        settings = {"optim": "sgd", "max_steps": 1, "max_grad_norm": 0.0}
        train(model, tmp_path / str(last_only), callback, **settings)
        for name, old in before.items():
            new = model.get_parameter(name).detach()
            changed = (new != old).any(dim=1 if "lora_A" in name else 0)
            assert changed.tolist() == [not last_only, not last_only, True, False], name
        losses.append({n: (model.get_parameter(n).detach() - old) for n, old in before.items()})
    for name, difference in losses[1].items():  # the same step in that direction
        dim = 0 if "lora_A" in name else 1
        torch.testing.assert_close(difference.select(dim, 2), losses[0][name].select(dim, 2))


@pytest.mark.quick(reentrant=[None], shortcut=["block"])
@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("shortcut", ["input", "block", "middle"])
def test_only_one_direction_has_a_gradient(shortcut: Any, reentrant: bool | None) -> None:
    """It is the gradient of the first directions together; in float64, of layers with several ranks."""
    ranks = {} if shortcut == "middle" else {"v_proj": 2}
    model = randomize_adapters(fresh(shortcut, rank_pattern=ranks).double()).train()
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    ids = torch.randint(1, 53, (2, 6), generator=torch.Generator().manual_seed(0))
    set_rank(model, 3)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(input_ids=ids).logits.square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if "lora_" in name}

    whole, only = gradients(), OneDirection(model)
    only.set(3)
    for name, found in gradients().items():
        dim = 0 if "lora_A" in name else 1
        kept = torch.zeros_like(found)
        last = min(3, found.shape[dim]) - 1
        kept.select(dim, last).copy_(whole[name].select(dim, last))
        torch.testing.assert_close(found, kept, rtol=0, atol=0)
        assert kept.any()
    only.remove()
    assert all(torch.equal(found, whole[name]) for name, found in gradients().items())


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    for ranks in ([], [0], [True], [1.0], [2, -1]):
        with pytest.raises(ValueError, match="must be positive integers, one or more, or None for all"):
            NestedRanks(ranks=ranks)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"ranks=\[2, 8\] has a rank above 4"):
        NestedRanks(ranks=[2, 8]).on_train_begin(None, None, None, model=fresh())
    with pytest.raises(ValueError, match="no ResLoRA adapter with nested_ranks=True"):
        NestedRanks().on_train_begin(None, None, None, model=fresh(nested_ranks=False))


@pytest.mark.slow
def test_trainer_compiles_once(tmp_path: Path) -> None:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        watch = train(
            fresh(), tmp_path, NestedRanks(), max_steps=5, torch_compile=True, torch_compile_backend="aot_eager"
        )
    assert len(set(watch.during)) > 2
    torch._dynamo.reset()
