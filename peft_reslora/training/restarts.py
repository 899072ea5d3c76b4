"""Merge and restart: a sum of low-rank updates can reach a rank that none of them has.

ReLoRA (arXiv 2307.05695) trains LoRA in cycles: after each, the update is merged into the base weight, the adapter and
its optimizer state start anew, and the learning rate is warmed up again. After n restarts

    W = W_0 + sum_{i < n} s B_i A_i + s B_n A_n,    rank(W - W_0) <= (n + 1) r.

ReMoRA (arXiv 2405.12130) does so with MoRA. There the operators have to change as well: with the same ones,
decompress(M_1 compress(x)) + decompress(M_2 compress(x)) = decompress((M_1 + M_2) compress(x)) is no more than one M
could have learned. The authors change which features share a row of M; here the adapter goes on to the next of this
package's operators, rotation -> sharing -> decoupling -> rotation (without rotation where a square has an odd side).

    trainer = Trainer(model, ..., callbacks=[MergeAndRestartCallback(every=1000, warmup_steps=50)])
    trainer.train()
    model.merge_and_unload().save_pretrained("trained")  # the adapter alone is the last cycle only

The function computed stays what it was, up to the rounding of the sum: about 1e-6 of float32 logits. Under autocast it
moves by the rounding of the lower precision, in which the base weight now holds what the adapter held.

A restart changes the base weights for good. So `disable_adapter` no longer gives the original model (which DPO without
a reference model relies on), and an adapter saved by itself is of no use.
"""

from __future__ import annotations

import logging
import os
import uuid
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from peft_reslora.export.source import config_in_model
from peft_reslora.mora import MoRALinear
from peft_reslora.mora.operators import MoRAType
from peft_reslora.reslora.linked_chain import planned
from peft_reslora.reslora.linking import chains_of
from peft_reslora.shared.precision import full_precision
from peft_reslora.training.restart_weights import RESTARTS_FILE, load_base_weights, read_metadata, save_base_weights
from peft_reslora.training.restartable import (
    WHOLE_WEIGHTS,
    adapted_layers,
    check_restartable,
    set_operator,
    trained_parameters,
)
from peft_reslora.training.rewarming import rewarm, warmup_factor

_OPERATORS: tuple[MoRAType, ...] = ("rotation", "sharing", "decoupling")
logger = logging.getLogger(__name__)


@full_precision()
def merge_and_restart(
    model: nn.Module,
    optimizer: Optimizer,
    adapter_name: str = "default",
    *,
    warmup_steps: int = 0,
    seed: int | None = None,
) -> None:
    """Merge the adapter into the base weights and start it anew, without a change of what the model computes.

    For loops without a Trainer: call it between two steps, after those of the optimizer and the scheduler.

    Args:
        model: the adapted model; to be saved by `merge_and_unload` from now on.
        optimizer: forgets what it knew of the adapter's parameters, and of nothing else.
        adapter_name: the adapter.
        warmup_steps: as of `rewarm`.
        seed: of the new LoRA factors A; under DDP the same on all processes. None draws as initialization does.

    Raises:
        ValueError: as `check_restartable`, or if the adapter is not finite; nothing is changed then.
    """
    check_restartable(model, adapter_name)
    layers = dict(adapted_layers(model, adapter_name))
    for name, layer in layers.items():
        if not all(torch.isfinite(p).all() for p in trained_parameters(layer, adapter_name)):
            raise ValueError(
                f"Adapter {adapter_name!r} is not finite on layer {name} and cannot be merged: go back to an earlier "
                "checkpoint and lower the learning rate."
            )
    with planned(chains_of(model, adapter_name)):
        for layer in layers.values():  # all before the first factor changes, since ResLoRA reads those of others
            weight = layer.get_base_layer().weight
            weight.add_(layer.get_delta_weight(adapter_name).to(weight.device))
    _start_anew(model, adapter_name, seed)
    for layer in layers.values():
        for parameter in trained_parameters(layer, adapter_name):
            optimizer.state.pop(parameter, None)
    rewarm(optimizer, warmup_steps)


class MergeAndRestartCallback(TrainerCallback, ExportableState):
    """Merges and restarts an adapter every so many steps of transformers' Trainer.

    A restart happens at the beginning of step `every`, `2 * every`, ..., counted from 0, if there is such a step: at
    the end of training the adapter holds the last cycle. A checkpoint holds the state before a restart. Beside each,
    `restarts.safetensors` gets the adapted base weights; resuming and `load_best_model_at_end` put them back. So the
    base model is loaded as at the beginning of the run, and a resumed run goes on as one that was never interrupted.

    To save the final model, `trainer.model.merge_and_unload().save_pretrained(...)`; `trainer.save_model` would save
    the last cycle only.

    Args:
        every: steps of the optimizer per cycle, ReLoRA's and ReMoRA's reset interval.
        warmup_steps: as of `rewarm`, after every restart. The warm-up at the start of training is the scheduler's.
        adapter_name: the adapter.
        resume_from: the folder that `Trainer.train(resume_from_checkpoint=...)` is given, which it keeps to itself;
            only needed where that is not `checkpoint-<step>` in the output folder.

    Raises:
        ValueError: for an `every` below 1 and `warmup_steps` that do not fit into a cycle; when training begins, as
            `check_restartable`, for runs whose weights are sharded, and for a checkpoint without its base weights.
    """

    def __init__(
        self,
        every: int,
        warmup_steps: int = 0,
        adapter_name: str = "default",
        resume_from: str | os.PathLike[str] | None = None,
    ) -> None:
        if every < 1 or not 0 <= warmup_steps < every:
            raise ValueError(
                f"every={every}, warmup_steps={warmup_steps}: a cycle needs at least one step, and a warm-up of less "
                "than the cycle."
            )
        self.every = every
        self.warmup_steps = warmup_steps
        self.adapter_name = adapter_name
        self.resume_from = resume_from
        self.last_restart = 0  # the step it preceded; 0 for none
        self.run = ""  # a name that ties each checkpoint to the file beside it

    def state(self) -> dict[str, Any]:
        """What Trainer keeps in `trainer_state.json`."""
        args = {"every": self.every, "warmup_steps": self.warmup_steps, "adapter_name": self.adapter_name}
        return {"args": args, "attributes": {"last_restart": self.last_restart, "run": self.run}}

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A checkpoint is loaded before its operator is set (`load_base_weights`)."""
        for _, layer in adapted_layers(kwargs["model"], self.adapter_name):
            if isinstance(layer, MoRALinear):
                layer.restarting.add(self.adapter_name)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.deepspeed or args.fsdp or state.is_hyper_param_search:
            raise ValueError(
                "MergeAndRestartCallback does not support DeepSpeed, FSDP and hyperparameter search: "
                f"{WHOLE_WEIGHTS}, in a run of its own."
            )
        check_restartable(kwargs["model"], self.adapter_name)
        name = type(self).__name__
        callbacks: dict[str, Any] = state.stateful_callbacks  # type: ignore[assignment]  # annotated as what it is made of
        if isinstance(callbacks.get(name), list):
            raise ValueError(
                f"A run can have one {name}, and this one has {len(callbacks[name])}: remove all but one."
            )
        rewarm(kwargs["optimizer"], 0)
        self.last_restart = 0
        self.run = uuid.uuid4().hex
        if name not in callbacks:  # the checkpoint is of a run without restarts, so the base weights are as they were
            callbacks[name] = self.state()
        elif state.global_step > 0:
            self._resume(args, state.global_step, callbacks[name], kwargs["model"], kwargs["optimizer"])

    def _resume(
        self, args: TrainingArguments, step: int, saved: dict[str, Any], model: nn.Module, optimizer: Optimizer
    ) -> None:
        if saved["args"]["adapter_name"] != self.adapter_name:
            raise ValueError(
                f"The checkpoint is of a run that restarted adapter {saved['args']['adapter_name']!r}, not "
                f"{self.adapter_name!r}: name that one, or start a new run."
            )
        folder = _checkpoint(args, step) if self.resume_from is None else Path(self.resume_from)
        file = folder / RESTARTS_FILE
        metadata = read_metadata(file)
        if (metadata.get("run"), metadata.get("step")) != (saved["attributes"]["run"], str(step)):
            raise ValueError(
                f"{file} is not of the checkpoint that is resumed: pass that one's folder as "
                f"{type(self).__name__}(resume_from=...) too."
            )
        load_base_weights(model, file, self.adapter_name)
        self.last_restart = saved["attributes"]["last_restart"]
        if self.last_restart:
            rewarm(optimizer, self.warmup_steps, done=step - self.last_restart)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step and state.global_step % self.every == 0:
            merge_and_restart(
                kwargs["model"],
                kwargs["optimizer"],
                self.adapter_name,
                warmup_steps=self.warmup_steps,
                seed=args.seed + state.global_step,
            )
            self.last_restart = state.global_step

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Correct the logged learning rate, which is the scheduler's, for the warm-up.

        Reporters that come before this callback have read it by then.
        """
        if self.last_restart:
            factor = warmup_factor(state.global_step - 1 - self.last_restart, self.warmup_steps)
            for entry in (kwargs["logs"], *state.log_history[-1:]):
                if "learning_rate" in entry:
                    entry["learning_rate"] *= factor

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.should_save:
            file = _checkpoint(args, state.global_step) / RESTARTS_FILE
            save_base_weights(kwargs["model"], file, self.adapter_name, run=self.run, step=str(state.global_step))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        rewarm(kwargs["optimizer"], 0)
        if args.load_best_model_at_end and state.best_model_checkpoint:
            load_base_weights(kwargs["model"], Path(state.best_model_checkpoint) / RESTARTS_FILE, self.adapter_name)
        if self.last_restart:
            logger.warning(
                "Earlier cycles of adapter %r are merged into the base weights. Save the model by "
                "`merge_and_unload().save_pretrained(...)`; a saved adapter holds the last cycle only.",
                self.adapter_name,
            )


def _checkpoint(args: TrainingArguments, step: int) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


@torch.no_grad()
def _start_anew(model: nn.Module, adapter_name: str, seed: int | None) -> None:
    """Make the update zero again, as at initialization, in the same parameters."""
    layers = [layer for _, layer in adapted_layers(model, adapter_name)]
    if isinstance(layers[0], MoRALinear):
        even = all(layer.square_size[adapter_name] % 2 == 0 for layer in layers)
        operators = [operator for operator in _OPERATORS if even or operator != "rotation"]
        current = operators.index(layers[0].mora_type[adapter_name])
        for layer in layers:
            layer.mora_M[adapter_name].zero_()
        set_operator(model, adapter_name, operators[(current + 1) % len(operators)])
        return
    init = config_in_model(model, adapter_name).init_lora_weights  # type: ignore[attr-defined]
    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    with nullcontext() if seed is None else torch.random.fork_rng(devices):
        if seed is not None:
            torch.manual_seed(seed)
        for layer in layers:
            layer.reset_lora_parameters(adapter_name, init)
