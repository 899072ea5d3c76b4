"""Merge and restart: no jump, the right optimizer state and learning rate, resuming, refusals. Real Trainer runs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import TINY_MODELS
from helpers.tolerances import MODEL64
from helpers.training import losses_of
from peft import AdaLoraConfig, LoHaConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from peft_reslora import MoRAConfig, ResLoRAConfig
from peft_reslora.training import (
    MergeAndRestartCallback,
    check_restartable,
    load_base_weights,
    merge_and_restart,
    rewarm,
    save_base_weights,
)
from peft_reslora.training.restart_weights import RESTARTS_FILE
from peft_reslora.training.rewarming import warmup_factor

pytestmark = pytest.mark.usefixtures("float64")
TARGETS = TINY_MODELS["llama"].targets
CONFIGS: dict[str, Any] = {
    "lora": lambda: LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS),
    "rslora": lambda: LoraConfig(r=4, use_rslora=True, init_lora_weights="gaussian", target_modules=TARGETS),
    "mora sharing": lambda: MoRAConfig(r=3, mora_type="sharing", target_modules=TARGETS),
    "mora rotation": lambda: MoRAConfig(r=3, mora_type="rotation", target_modules=TARGETS),
    "reslora block": lambda: ResLoRAConfig(r=4, lora_alpha=8, pre_num=-1, target_modules=TARGETS),
}
each_method = pytest.mark.parametrize("method", CONFIGS)
TOKENS = torch.randint(1, 53, (48, 8), generator=torch.Generator().manual_seed(0))


def build(config: PeftConfig) -> PeftModel:
    return get_peft_model(TINY_MODELS["llama"].make(), config)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    training = model.training
    output = model.eval()(input_ids=TOKENS[:4]).logits
    model.train(training)
    return output


class Record(TrainerCallback):
    """What a run was like: the learning rates really used, and the logits around each restart."""

    def __init__(self) -> None:
        self.rates: dict[int, float] = {}
        self.jumps: dict[int, float] = {}
        self.losses: list[float] = []  # after each step, on all the data
        self.before: torch.Tensor | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        def note(*_: Any) -> None:
            self.rates[state.global_step] = optimizer.param_groups[0]["lr"]

        optimizer = kwargs["optimizer"].optimizer
        self.handle = optimizer.register_step_pre_hook(lambda *_: None)
        self.note, self.optimizer = note, optimizer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Hooks run in the order in which they were registered: behind the one of a restart that has just been.
        self.handle.remove()
        self.handle = self.optimizer.register_step_pre_hook(self.note)
        if self.before is not None:
            self.jumps[state.global_step] = (logits(kwargs["model"]) - self.before).abs().max().item()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before = logits(kwargs["model"])
        with torch.no_grad():
            self.losses.append(kwargs["model"](input_ids=TOKENS, labels=TOKENS).loss.item())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.handle.remove()


def train(
    model: PeftModel,
    out: Path,
    *callbacks: TrainerCallback,
    steps: int = 9,
    resume: str | None = None,
    **arguments: Any,
) -> Trainer:
    set_seed(0)
    defaults: dict[str, Any] = {"save_strategy": "no", "learning_rate": 5e-3, "lr_scheduler_type": "constant"}
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(out),
            max_steps=steps,
            per_device_train_batch_size=4,
            logging_steps=1,
            label_names=["labels"],
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            **{**defaults, **arguments},
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in TOKENS],
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@each_method
def test_restart_does_not_change_the_function_and_training_goes_on(method: str, tmp_path: Path) -> None:
    model, record = build(CONFIGS[method]()), Record()
    base = {name: p.clone() for name, p in model.named_parameters() if "base_layer.weight" in name}
    train(model, tmp_path, MergeAndRestartCallback(every=3), record, steps=9)
    assert sorted(record.jumps) == list(range(1, 9))
    assert max(record.jumps.values()) < MODEL64
    assert record.losses[8] < record.losses[5] < record.losses[2]  # in every cycle
    # Two restarts are in the base weights, and the last cycle is in the adapter.
    assert all(not torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)
    with model.disable_adapter():
        without = logits(model)
    assert not torch.allclose(without, logits(model), atol=1e-3)


@each_method
def test_adapter_is_as_new_after_a_restart(method: str) -> None:
    model = build(CONFIGS[method]())
    optimizer = train_by_hand(model, steps=2)
    before = logits(model)
    merge_and_restart(model, optimizer)
    assert (logits(model) - before).abs().max() < MODEL64
    with model.disable_adapter():
        assert (logits(model) - before).abs().max() < MODEL64


def train_by_hand(model: PeftModel, steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(steps):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def test_restarts_raise_the_rank_of_the_sum() -> None:
    model = build(CONFIGS["lora"]())
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    weight = layer.get_base_layer().weight.clone()
    optimizer = train_by_hand(model, steps=3)
    for cycle in (1, 2):
        merge_and_restart(model, optimizer)
        difference = layer.get_base_layer().weight - weight
        assert torch.linalg.matrix_rank(difference, rtol=1e-4) == 4 * cycle
        train_by_hand(model, 3, optimizer)


@pytest.mark.parametrize(
    ("r", "types"),
    [(1, ["sharing", "decoupling", "sharing"]), (3, ["rotation", "sharing", "decoupling", "rotation"])],
)
def test_mora_restarts_with_another_operator(r: int, types: list[str]) -> None:
    """With the same one, the sum of two updates would be no more than one of them could be."""
    model = build(MoRAConfig(r=r, mora_type=types[0], target_modules=["q_proj", "o_proj"]))  # squares of 7, of 12
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for mora_type in types:
        layers = [m for m in model.modules() if hasattr(m, "mora_M")]
        assert {layer.mora_type["default"] for layer in layers} == {mora_type}
        assert model.peft_config["default"].mora_type == mora_type
        merge_and_restart(model, optimizer)


def test_only_the_adapters_optimizer_state_is_reset() -> None:
    config = LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["lm_head"], bias="lora_only")
    model = build(config)
    optimizer = train_by_hand(model, steps=2)
    factors = [p for n, p in model.named_parameters() if "lora_" in n]
    others = [p for n, p in model.named_parameters() if "lora_" not in n and p in optimizer.state]
    assert len(others) == 1  # the trained copy of lm_head
    state = {key: value.clone() for key, value in optimizer.state[others[0]].items()}
    merge_and_restart(model, optimizer)
    assert not any(p in optimizer.state for p in factors)
    assert all(torch.equal(value, optimizer.state[others[0]][key]) for key, value in state.items())
    train_by_hand(model, 1, optimizer)
    assert {optimizer.state[p]["step"].item() for p in factors} == {1}
    assert optimizer.state[others[0]]["step"].item() == 3


@pytest.mark.quick(scheduler=["cosine"])
@pytest.mark.parametrize("scheduler", ["constant", "cosine", "reduce_lr_on_plateau"])
def test_learning_rate_is_warmed_up_again_under_any_scheduler(scheduler: str, tmp_path: Path) -> None:
    evaluation = {"eval_strategy": "steps", "eval_steps": 4} if scheduler == "reduce_lr_on_plateau" else {}
    runs = []
    for callbacks in ([], [MergeAndRestartCallback(every=4, warmup_steps=2)]):
        record = Record()
        model = build(CONFIGS["lora"]())
        trainer = train_with_evaluation if evaluation else train
        runs.append((record, trainer(model, tmp_path, *callbacks, record, lr_scheduler_type=scheduler, **evaluation)))
    (plain, _), (warmed, trainer) = runs
    factors = [1, 1, 1, 1, 1 / 3, 2 / 3, 1, 1, 1 / 3]
    assert [warmed.rates[step] for step in range(9)] == pytest.approx(
        [factor * plain.rates[step] for step, factor in enumerate(factors)]
    )
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged == pytest.approx([warmed.rates[step] for step in range(9)])
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks  # nothing stays behind


def train_with_evaluation(model: PeftModel, out: Path, *callbacks: TrainerCallback, **arguments: Any) -> Trainer:
    original = Trainer.__init__

    def with_evaluation_data(self: Trainer, *args: Any, **kwargs: Any) -> None:
        original(self, *args, eval_dataset=kwargs["train_dataset"][:8], **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "__init__", with_evaluation_data)
        return train(model, out, *callbacks, **arguments)


def test_warmup_factor() -> None:
    assert [warmup_factor(k, 3) for k in range(5)] == [0.25, 0.5, 0.75, 1, 1]
    assert warmup_factor(0, 0) == 1


def test_a_warmup_ends_where_the_next_begins() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    rates = []

    def take_steps(count: int) -> list[float]:
        rates.clear()
        handle = optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
        optimizer.register_step_post_hook(lambda *_: None)  # others' hooks come after ours
        for _ in range(count):
            optimizer.step()
        handle.remove()
        return rates

    rewarm(optimizer, 3)
    assert take_steps(2) == [0.25, 0.5]
    rewarm(optimizer, 1)
    assert take_steps(3) == [0.5, 1, 1]
    rewarm(optimizer, 4, done=2)
    assert take_steps(1) == [0.6]
    rewarm(optimizer, 0)
    assert take_steps(1) == [1]


RUN: dict[str, Any] = {"steps": 9, "save_strategy": "steps", "save_steps": 5, "lr_scheduler_type": "cosine"}


@pytest.mark.quick(method=["reslora block"], interrupted=[4])
@pytest.mark.quick(method=["mora sharing"], interrupted=[6])
@pytest.mark.parametrize("method", ["lora", "mora sharing", "reslora block"])
@pytest.mark.parametrize("interrupted", [4, 6])  # within the warm-up after a restart, and where the next is due
def test_resumed_run_equals_the_uninterrupted_one(method: str, interrupted: int, tmp_path: Path) -> None:
    whole = build(CONFIGS[method]())
    run = {**RUN, "save_steps": interrupted}
    uninterrupted = train(whole, tmp_path, MergeAndRestartCallback(every=3, warmup_steps=2), **run)
    resumed = build(CONFIGS[method]())  # as in a new process: the base model as it was at the beginning
    record = Record()
    folder = str(tmp_path / f"checkpoint-{interrupted}")
    trainer = train(resumed, tmp_path, MergeAndRestartCallback(3, warmup_steps=2), record, resume=folder, **run)
    assert sorted(record.rates) == list(range(interrupted, 9))
    assert losses_of(trainer) == pytest.approx(losses_of(uninterrupted), rel=MODEL64)
    assert (logits(resumed) - logits(whole)).abs().max() < MODEL64
    rates = [[e["learning_rate"] for e in t.state.log_history if "loss" in e] for t in (trainer, uninterrupted)]
    assert rates[0] == pytest.approx(rates[1])


def test_checkpoint_elsewhere_is_resumed_where_it_is_named(tmp_path: Path) -> None:
    first = train(build(CONFIGS["lora"]()), tmp_path / "first", MergeAndRestartCallback(3), **RUN)
    moved = shutil.move(tmp_path / "first" / "checkpoint-5", tmp_path / "moved")
    with pytest.raises(ValueError, match=r"does not exist.*resume_from"):
        train(build(CONFIGS["lora"]()), tmp_path / "second", MergeAndRestartCallback(3), resume=str(moved), **RUN)
    callback = MergeAndRestartCallback(3, resume_from=moved)
    second = train(build(CONFIGS["lora"]()), tmp_path / "second", callback, resume=str(moved), **RUN)
    assert losses_of(second) == pytest.approx(losses_of(first), rel=MODEL64)


def test_resuming_refuses_missing_damaged_and_foreign_base_weights(tmp_path: Path) -> None:
    for name in ("run", "other"):
        train(build(CONFIGS["lora"]()), tmp_path / name, MergeAndRestartCallback(3), **{**RUN, "steps": 5})
    checkpoint = tmp_path / "run" / "checkpoint-5"

    def resume(*callbacks: TrainerCallback, config: str = "lora") -> None:
        train(build(CONFIGS[config]()), tmp_path / "run", *callbacks, resume=str(checkpoint), **RUN)

    model = build(CONFIGS["lora"]())
    model.add_adapter("other", CONFIGS["lora"]())
    with pytest.raises(ValueError, match="restarted adapter 'default', not 'other'"):
        train(model, tmp_path / "run", MergeAndRestartCallback(3, adapter_name="other"), resume=str(checkpoint), **RUN)
    shutil.copy(tmp_path / "other" / "checkpoint-5" / RESTARTS_FILE, checkpoint)
    with pytest.raises(ValueError, match="is not of the checkpoint that is resumed"):
        resume(MergeAndRestartCallback(3))
    (checkpoint / RESTARTS_FILE).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="is damaged"):
        resume(MergeAndRestartCallback(3))
    (checkpoint / RESTARTS_FILE).unlink()
    with pytest.raises(ValueError, match="does not exist"):
        resume(MergeAndRestartCallback(3))


@pytest.mark.slow
def test_same_callback_resumes_a_fresh_model(tmp_path: Path) -> None:
    callback = MergeAndRestartCallback(3)
    first = train(build(CONFIGS["lora"]()), tmp_path, callback, **RUN)
    second = train(build(CONFIGS["lora"]()), tmp_path, callback, resume=str(tmp_path / "checkpoint-5"), **RUN)
    assert losses_of(second) == pytest.approx(losses_of(first), rel=MODEL64)


@pytest.mark.slow
def test_restarts_can_begin_at_a_checkpoint_of_a_run_without(tmp_path: Path) -> None:
    train(build(CONFIGS["lora"]()), tmp_path, **{**RUN, "steps": 5})
    record = Record()
    callback = MergeAndRestartCallback(3, warmup_steps=2)
    train(build(CONFIGS["lora"]()), tmp_path, callback, record, resume=str(tmp_path / "checkpoint-5"), **RUN)
    assert callback.last_restart == 6
    assert (tmp_path / "checkpoint-9" / RESTARTS_FILE).is_file()


class Spoil(TrainerCallback):
    """From the sixth step on, each makes the model worse."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for parameter in kwargs["model"].parameters():
            if parameter.requires_grad and state.global_step >= 6:
                parameter.data.add_(torch.randn_like(parameter))


@pytest.mark.slow
def test_best_model_at_end_has_its_own_base_weights(tmp_path: Path) -> None:
    model = build(CONFIGS["mora sharing"]())
    trainer = train_with_evaluation(
        model,
        tmp_path,
        MergeAndRestartCallback(3),
        Spoil(),
        **{**RUN, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1},
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    best = int(trainer.state.best_model_checkpoint.rpartition("-")[2])
    assert best < 6
    evaluated = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluated[best], rel=MODEL64)


def test_merged_model_is_saved_whole(tmp_path: Path) -> None:
    model = build(CONFIGS["lora"]())
    train(model, tmp_path, MergeAndRestartCallback(3))
    trained = logits(model)
    model.merge_and_unload().save_pretrained(tmp_path / "trained")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert (logits(loaded) - trained).abs().max() < MODEL64


def test_base_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    save_base_weights(build(CONFIGS["lora"]()), tmp_path / "weights", step="0")
    other = build(LoraConfig(r=4, target_modules=["q_proj"]))
    before = other.state_dict()
    with pytest.raises(ValueError, match=r"does not fit adapter 'default'.*missing, extra or of another shape"):
        load_base_weights(other, tmp_path / "weights")
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    assert len(load_file(tmp_path / "weights")) == 28
    assert [file.name for file in tmp_path.iterdir()] == ["weights"]


class FakeQuantized(nn.Parameter):
    """A weight as quantization libraries have it: a subclass that passes for float32."""


def tie(model: PeftModel) -> None:
    layers = model.base_model.model.model.layers
    layers[0].mlp.up_proj.get_base_layer().weight = layers[1].mlp.gate_proj.weight


def quantize(model: PeftModel) -> None:
    base = model.base_model.model.model.layers[0].mlp.up_proj.get_base_layer()
    base.weight = FakeQuantized(base.weight.data, requires_grad=False)


UP = ["up_proj"]
REFUSED: dict[str, tuple[PeftConfig, Any, str]] = {
    "input": (ResLoRAConfig(shortcut="input", target_modules=UP), None, "shortcut='input'.*take shortcut='block'"),
    "middle": (ResLoRAConfig(shortcut="middle", target_modules=UP), None, "shortcut='middle'.*estimate"),
    "dora": (LoraConfig(use_dora=True, target_modules=UP), None, "DoraLinearVariant.*take plain LoRA"),
    "reslora-adalora": (
        ResLoRAConfig(total_step=9, target_modules=UP),
        None,
        r"AdaLoRA \(total_step\).*leave total_step out",
    ),
    "reslora-dora": (ResLoRAConfig(use_dora=True, target_modules=UP), None, "use_dora=True.*leave it out"),
    "pissa": (LoraConfig(init_lora_weights="pissa", target_modules=UP), None, "init_lora_weights='pissa'.*take True"),
    "random": (LoraConfig(init_lora_weights=False, target_modules=UP), None, "init_lora_weights=False.*take True"),
    "adalora": (AdaLoraConfig(total_step=10, target_modules=UP), None, "type ADALORA.*train without restarts"),
    "loha": (LoHaConfig(target_modules=UP), None, "type LOHA.*Take LoRA"),
    "embedding": (LoraConfig(target_modules=["embed_tokens"]), None, "Embedding.*target linear layers only"),
    "half": (LoraConfig(target_modules=UP), lambda m: m.half(), "torch.float16.*rounded.*float32.*bf16=True"),
    "quantized": (LoraConfig(target_modules=UP), quantize, "type FakeQuantized.*load it unquantized"),
    "tied": (LoraConfig(target_modules=UP), tie, "shares its base weight with another module.*do not target"),
    "merged": (LoraConfig(target_modules=UP), lambda m: m.merge_adapter(), "merged.*unmerge_adapter"),
    "meta": (LoraConfig(target_modules=UP), lambda m: m.to("meta"), "sharded or offloaded"),
    "auto": (
        MoRAConfig(r=8, rank_pattern={"layers.0.mlp.up_proj": 40}, target_modules=UP),
        None,
        "rotation and sharing; name the one",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_reason_and_the_remedy(case: str) -> None:
    config, change, message = REFUSED[case]
    torch.set_default_dtype(torch.float32)  # what PiSSA takes
    model = build(config)
    if change:
        change(model)
    with pytest.raises(ValueError, match=message):
        check_restartable(model)


def test_lora_bias_is_refused() -> None:
    torch.manual_seed(0)
    model = get_peft_model(TINY_MODELS["bert"].make(), LoraConfig(lora_bias=True, target_modules=["query"]))
    with pytest.raises(ValueError, match=r"lora_bias=True.*leave it unset"):
        check_restartable(model)


def test_refusal_comes_at_training_start(tmp_path: Path) -> None:
    record = Record()
    with pytest.raises(ValueError, match="shortcut='input'"):
        train(build(ResLoRAConfig(shortcut="input", target_modules=UP)), tmp_path, MergeAndRestartCallback(3), record)
    assert not record.rates


def test_unknown_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no adapter 'absent', it has 'default'"):
        train(build(CONFIGS["lora"]()), tmp_path, MergeAndRestartCallback(3, adapter_name="absent"))


def test_two_callbacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one MergeAndRestartCallback, and this one has 2"):
        train(build(CONFIGS["lora"]()), tmp_path, MergeAndRestartCallback(3), MergeAndRestartCallback(4))


@pytest.mark.parametrize(("every", "warmup_steps"), [(0, 0), (-1, 0), (3, 3), (3, -1)])
def test_bad_numbers_are_refused(every: int, warmup_steps: int) -> None:
    with pytest.raises(ValueError, match=f"every={every}, warmup_steps={warmup_steps}"):
        MergeAndRestartCallback(every, warmup_steps)


@pytest.mark.parametrize("arguments", [{"fsdp": "full_shard"}, {"deepspeed": {"zero_optimization": {"stage": 3}}}])
def test_sharded_runs_are_refused(arguments: dict[str, Any], tmp_path: Path) -> None:
    callback = MergeAndRestartCallback(3)
    options = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    for name, value in arguments.items():
        setattr(options, name, value)
    state = type("State", (), {"is_hyper_param_search": False})
    with pytest.raises(ValueError, match="does not support DeepSpeed, FSDP"):
        callback.on_train_begin(options, state, None, model=build(CONFIGS["lora"]()))  # type: ignore[arg-type]


def test_broken_adapter_is_refused_before_anything_changes() -> None:
    model = build(CONFIGS["lora"]())
    optimizer = train_by_hand(model, steps=1)
    with torch.no_grad():
        model.base_model.model.model.layers[3].mlp.up_proj.lora_B["default"].weight[0, 0] = torch.nan
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"not finite on layer .*layers\.3\.mlp\.up_proj"):
        merge_and_restart(model, optimizer)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if "layers.3" not in key)
    assert optimizer.state
