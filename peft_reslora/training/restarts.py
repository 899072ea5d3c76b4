"""Merge and restart: a sum of low-rank updates can reach a rank that none of them has.

ReLoRA (arXiv 2307.05695) trains LoRA in cycles: after each, the update is merged into the base weight, the adapter and
its optimiser state start anew, and the learning rate is warmed up again. After n restarts

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
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import PeftConfig
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from peft_reslora.export.source import config_in_model
from peft_reslora.mora import MoRALinear
from peft_reslora.mora.operators import MoRAType
from peft_reslora.reslora.layer import Linear as ResLoRALinear
from peft_reslora.reslora.linked_chain import planned
from peft_reslora.reslora.linking import chains_of
from peft_reslora.shared.host import has_adapter, own_parameter
from peft_reslora.shared.precision import full_precision

RESTARTS_FILE = "restarts.safetensors"

_LAYERS: dict[str, Any] = {"LORA": LoraLinear, "RESLORA": ResLoRALinear, "MORA": MoRALinear}
_OPERATORS: tuple[MoRAType, ...] = ("rotation", "sharing", "decoupling")
_EXACT_DTYPES = (torch.float32, torch.float64)

_warmups: WeakKeyDictionary[Optimizer, list[RemovableHandle]] = WeakKeyDictionary()
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

    For loops without a Trainer: call it between two steps, after those of the optimiser and the scheduler.

    Args:
        model: the adapted model; to be saved by `merge_and_unload` from now on.
        optimizer: forgets what it knew of the adapter's parameters, and of nothing else.
        adapter_name: the adapter.
        warmup_steps: as of `rewarm`.
        seed: of the new LoRA factors A; under DDP the same on all processes. None draws as initialisation does.

    Raises:
        ValueError: as `check_restartable`, or if the adapter is not finite; nothing is changed then.
    """
    check_restartable(model, adapter_name)
    layers = dict(_adapted(model, adapter_name))
    for name, layer in layers.items():
        if not all(torch.isfinite(p).all() for p in _parameters(layer, adapter_name)):
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
        for parameter in _parameters(layer, adapter_name):
            optimizer.state.pop(parameter, None)
    rewarm(optimizer, warmup_steps)


def rewarm(optimizer: Optimizer, warmup_steps: int, done: int = 0) -> None:
    """Take the optimiser's next steps with (k + 1) / (warmup_steps + 1) of the learning rate, k = 0, 1, ...

    The learning rates are scaled just before a step and put back just after it. So the scheduler, of whatever kind,
    goes on as if nothing had happened, and its learning rate is what the warm-up rises to. A warm-up that is still
    under way ends; `warmup_steps=0` does no more than that.

    Args:
        optimizer: one of torch's, or accelerate's wrapper of it.
        warmup_steps: how many steps are taken with less than the whole learning rate.
        done: how many of them have been taken already.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    for handle in _warmups.pop(inner, []):
        handle.remove()
    if done >= warmup_steps:
        return
    step = done
    rates: list[Any] = []

    def scale(*_: Any) -> None:
        nonlocal step
        rates[:] = [group["lr"] for group in inner.param_groups]
        for group in inner.param_groups:
            group["lr"] = group["lr"] * warmup_factor(step, warmup_steps)
        step += 1

    def put_back(*_: Any) -> None:
        for group, rate in zip(inner.param_groups, rates, strict=True):
            group["lr"] = rate

    # Both stay, with a factor of 1, when the warm-up is over: hooks cannot be removed while torch goes through them.
    _warmups[inner] = [inner.register_step_pre_hook(scale), inner.register_step_post_hook(put_back)]


def warmup_factor(step: int, warmup_steps: int) -> float:
    """By what the learning rate is multiplied `step` steps after a restart."""
    return min(1.0, (step + 1) / (warmup_steps + 1))


def check_restartable(model: nn.Module, adapter_name: str = "default") -> None:
    """Refuse an adapter whose merge is not exact, or which cannot be started anew.

    Raises:
        ValueError: listing the reasons, and what to do about each.
    """
    config = config_in_model(model, adapter_name)
    method = _method(config)
    if method not in _LAYERS:
        raise ValueError(
            f"Adapter {adapter_name!r} is of type {method}, which cannot be merged and restarted. Take LoRA, MoRA or "
            "ResLoRA with shortcut='block', or train without restarts."
        )
    layers = dict(_adapted(model, adapter_name))
    faults = [*_config_faults(config, layers.values(), adapter_name)]
    uses = Counter(_place(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for name, layer in layers.items():
        faults += [f"layer {name} {fault}" for fault in _layer_faults(layer, adapter_name, method, uses)]
    if faults:
        shown = [*faults[:5], *([f"and {len(faults) - 5} more of the kind"] if len(faults) > 5 else [])]
        raise ValueError(f"Adapter {adapter_name!r} cannot be merged and restarted: {'; '.join(shown)}.")


def _place(weight: torch.Tensor) -> int:
    """What two names of one weight have in common, also where they are two parameters that share their memory."""
    return weight.data_ptr() or id(weight)


def _config_faults(config: Any, layers: Collection[Any], adapter_name: str) -> Iterator[str]:
    if not layers:
        yield "it has no layers in this model"
    if (shortcut := getattr(config, "shortcut", "block")) != "block":
        yield (
            f"shortcut={shortcut!r} is merged by an estimate, so that every restart would change the function; take "
            "shortcut='block', whose merge is exact"
        )
    if (init := getattr(config, "init_lora_weights", True)) not in (True, "gaussian"):
        yield f"init_lora_weights={init!r} cannot be repeated at a restart; take True or 'gaussian'"
    if getattr(config, "lora_bias", False):
        yield "lora_bias=True puts a bias into the adapter, which is not merged; leave it unset"
    operators = {layer.mora_type[adapter_name] for layer in layers if isinstance(layer, MoRALinear)}
    if len(operators) > 1:
        yield f"mora_type={config.mora_type!r} takes {' and '.join(sorted(operators))}; name the one to start with"


def _layer_faults(layer: Any, adapter_name: str, method: str, uses: Counter[int]) -> Iterator[str]:
    if type(layer) is not _LAYERS[method]:
        yield (
            f"is a {type(layer).__module__}.{type(layer).__name__}, whose merge is not known to be exact; load the "
            "base model unquantised, and target linear layers only"
        )
        return
    if method == "LORA" and adapter_name in layer.lora_variant:
        yield f"has a {type(layer.lora_variant[adapter_name]).__name__}, more than scaling * B A; take plain LoRA"
    weight = layer.get_base_layer().weight
    if isinstance(weight, DTensor) or weight.is_meta or weight.numel() == 0:
        yield "is sharded or offloaded; train with whole weights, on one device or under DDP"
    elif own_parameter(layer.get_base_layer(), "weight") is None:
        yield "has a base weight that is computed from other tensors at every use; remove its parametrization first"
    elif type(weight) is not nn.Parameter:
        yield f"has a base weight of type {type(weight).__name__}, to which a merge is rounded; load it unquantised"
    elif rounded := {p.dtype for p in (weight, *_parameters(layer, adapter_name))}.difference(_EXACT_DTYPES):
        yield (
            f"has weights in {', '.join(map(str, rounded))}, to which every merge would be rounded; load the base "
            "model in float32 and compute in half precision by bf16=True or fp16=True"
        )
    if uses[_place(weight)] > 1:
        yield "shares its base weight with another module, which a merge would change too; do not target it"
    if layer.merged:
        yield f"has {layer.merged_adapters} merged; call unmerge_adapter first"


def save_base_weights(model: nn.Module, file: Path, adapter_name: str = "default", **metadata: str) -> None:
    """Write the base weights under the adapter, with all that was merged into them; to be read by the function below.

    PEFT's checkpoints hold the adapter only, so that each needs this beside it. It replaces `file` in one go.
    """
    tensors = {}
    for name, layer in _adapted(model, adapter_name):
        tensors[name] = layer.get_base_layer().weight.detach().contiguous()
        if isinstance(layer, MoRALinear):
            metadata["mora_type"] = layer.mora_type[adapter_name]
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        save_file(tensors, unfinished, metadata=metadata)
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


@torch.no_grad()
def load_base_weights(model: nn.Module, file: Path, adapter_name: str = "default") -> None:
    """Put the base weights written by `save_base_weights` back, bit for bit.

    Raises:
        ValueError: if the file is missing, damaged, or of another model; nothing is changed then.
    """
    layers = {name: layer.get_base_layer().weight for name, layer in _adapted(model, adapter_name)}
    metadata = _read_metadata(file)
    with safe_open(file, framework="pt") as opened:
        shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        if wrong := [
            name for name in {**layers, **shapes} if name not in layers or shapes.get(name) != layers[name].shape
        ]:
            raise ValueError(
                f"{file} does not fit adapter {adapter_name!r} on this model: {len(wrong)} layers are missing, extra "
                f"or of another shape, the first {wrong[0]}. Load the base model and config that the run began with."
            )
        for name, weight in layers.items():
            weight.copy_(opened.get_tensor(name))
    if "mora_type" in metadata:
        _set_operator(model, adapter_name, metadata["mora_type"])


class MergeAndRestartCallback(TrainerCallback, ExportableState):
    """Merges and restarts an adapter every so many steps of transformers' Trainer.

    A restart happens at the beginning of step `every`, `2 * every`, ..., counted from 0, if there is such a step: at
    the end of training the adapter holds the last cycle. A checkpoint holds the state before a restart. Beside each,
    `restarts.safetensors` gets the adapted base weights; resuming and `load_best_model_at_end` put them back. So the
    base model is loaded as at the beginning of the run, and a resumed run goes on as one that was never interrupted.

    To save the final model, `trainer.model.merge_and_unload().save_pretrained(...)`; `trainer.save_model` would save
    the last cycle only.

    Args:
        every: steps of the optimiser per cycle, ReLoRA's and ReMoRA's reset interval.
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
        for _, layer in _adapted(kwargs["model"], self.adapter_name):
            if isinstance(layer, MoRALinear):
                layer.restarting.add(self.adapter_name)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.deepspeed or args.fsdp or state.is_hyper_param_search:
            raise ValueError(
                "MergeAndRestartCallback does not support DeepSpeed, FSDP and hyperparameter search: train with whole "
                "weights, on one device or under DDP, in a run of its own."
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
        metadata = _read_metadata(file)
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


def _read_metadata(file: Path) -> dict[str, str]:
    if not file.is_file():
        raise ValueError(
            f"{file} does not exist. It holds the base weights with the updates of earlier cycles, which are not in "
            "the adapter. Pass the folder with it as MergeAndRestartCallback(resume_from=...), resume from another "
            "checkpoint, or start a new run."
        )
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}): resume from another checkpoint.") from error


def _method(config: PeftConfig) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _adapted(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and has_adapter(module, adapter_name):
            yield name, module


def _parameters(layer: Any, adapter_name: str) -> list[nn.Parameter]:
    if isinstance(layer, MoRALinear):
        return [layer.mora_M[adapter_name]]
    return [layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight]


@torch.no_grad()
def _start_anew(model: nn.Module, adapter_name: str, seed: int | None) -> None:
    """Make the update zero again, as at initialisation, in the same parameters."""
    layers = [layer for _, layer in _adapted(model, adapter_name)]
    if isinstance(layers[0], MoRALinear):
        even = all(layer.square_size[adapter_name] % 2 == 0 for layer in layers)
        operators = [operator for operator in _OPERATORS if even or operator != "rotation"]
        current = operators.index(layers[0].mora_type[adapter_name])
        for layer in layers:
            layer.mora_M[adapter_name].zero_()
        _set_operator(model, adapter_name, operators[(current + 1) % len(operators)])
        return
    init = config_in_model(model, adapter_name).init_lora_weights  # type: ignore[attr-defined]
    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    with nullcontext() if seed is None else torch.random.fork_rng(devices):
        if seed is not None:
            torch.manual_seed(seed)
        for layer in layers:
            layer.reset_lora_parameters(adapter_name, init)


def _set_operator(model: nn.Module, adapter_name: str, mora_type: str) -> None:
    config_in_model(model, adapter_name).mora_type = mora_type  # type: ignore[attr-defined]
    for _, layer in _adapted(model, adapter_name):
        layer.mora_type[adapter_name] = mora_type
