"""Dropped layers: in each step only some layers have their adapters (CopRA, arXiv 2410.22911; CoTo, 2506.05713).

A layer's adapter is active with a probability that grows linearly from 0 to 1 over the first three quarters of
training, at least one is, and the updates of those that are do not grow for those that are not. The layer computes

    h_n = W_n x_n + d_n (its update),    d_n = 1 if it is active in this step, and else 0.

Under the shortcuts of ResLoRA, d_n multiplies the whole update of layer n, what earlier layers handed it included, and
nothing of what it hands on: for 'input' its x_n, for 'middle' its A_n x_n, for 'block' its A_n and B_n. So

    input     h_n = W_n x_n + d_n s_n B_n A_n (x_n + x_{n-1})
    block     h_n = W_n x_n + d_n sum_k s_{n-k} B_{n-k} A_{n-k} x_n
    middle    h_n = W_n x_n + d_n s_n B_n sum_k A_{n-k} x_{n-k}

That is stochastic depth (arXiv 1603.09382): there, too, the branch of a dropped block is left out and the shortcut
past it stays. If a dropped layer handed on nothing, its neighbors would learn to do without the shortcut instead of
without the layer, and of 'input' and 'middle' no forward pass without the tensor is defined. For 'block' and 'middle'
a dropped layer's factors may thus get gradients from later layers. Those that get none are not changed in the step,
neither by momentum nor by weight decay.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from random import Random
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from peft_reslora.shared.host import has_adapter
from peft_reslora.shared.names import bare_name


class DroppedLayers(TrainerCallback):
    """Drops the adapters of layers while transformers' Trainer trains them: LoRA, ResLoRA, MoRA and others of PEFT.

    Trainer(model, ..., callbacks=[DroppedLayers()])

    Between steps, as in evaluation and in what is saved, all layers have their adapters. Which ones a step has follows
    from the seed and the step's number alone: so the processes of a distributed run draw the same, and a resumed run
    draws what it would have drawn.

    Args:
        until: the fraction of training after which all layers are active.
        seed: of the draws.
        adapter_name: the adapter, which has to be the only active one.

    Raises:
        ValueError: unless 0 < until <= 1.
    """

    def __init__(self, until: float = 0.75, seed: int = 0, adapter_name: str = "default") -> None:
        if not 0.0 < until <= 1.0:
            raise ValueError(f"until={until!r} must be a fraction of training, 0 < until <= 1.")
        self.until = until
        self.seed = seed
        self.adapter_name = adapter_name
        self._gates: LayerGates | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.torch_compile:
            raise ValueError("torch_compile=True would compile the model anew for each draw of layers; leave it off.")
        self.on_train_end(args, state, control)
        self._gates = LayerGates(kwargs["model"], self.adapter_name, in_training_only=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._gates is not None:
            probability = active_probability(state.global_step / state.max_steps, self.until)
            self._gates.set(draw_active(len(self._gates.names), probability, self.seed, state.global_step))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._gates is not None:
            self._gates.forget_zero_gradients()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._gates is not None:
            self._gates.open()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._gates is not None:
            self._gates.remove()
        self._gates = None


def active_probability(progress: float, until: float = 0.75) -> float:
    """p, which grows linearly from 0 to 1 while the fraction of training done grows from 0 to `until`."""
    return min(1.0, max(0.0, progress / until))


def draw_active(number: int, probability: float, seed: int, step: int) -> list[bool]:
    """Which of so many layers are active in a step: each with the probability, and one of them if none would be.

    The same in every process, on every machine, whatever has been drawn before.
    """
    random = Random(f"{seed}, {step}")  # a text is seeded by its SHA-512
    active = [random.random() < probability for _ in range(number)]
    if number and not any(active):
        active[random.randrange(number)] = True
    return active


class _Gate:
    """One layer: whether it adds its update, and while it runs what its base layer has computed."""

    def __init__(self, in_training_only: bool) -> None:
        self.active = True
        self.in_training_only = in_training_only
        self.base: dict[int, torch.Tensor] = {}  # by thread, since replicas of the layer may share the gate

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "base": {}}

    def _closes(self, module: nn.Module) -> bool:
        return not self.active and (module.training or not self.in_training_only)

    def keep_base(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if self._closes(module):  # in the place of one that a recomputation has left, which ends before the layer does
            self.base[threading.get_ident()] = output

    def choose(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        """The base layer's output in the place of the layer's, which has handed on what it does by now.

        The update stays in the graph, with a gradient of zero: what later layers took reaches a layer that is
        checkpointed re-entrantly in the backward of its own update, and DDP waits for all parameters.
        """
        base = self.base.pop(threading.get_ident(), None)
        if base is None:
            return None
        return torch.where(torch.zeros((), dtype=torch.bool, device=base.device), output, base)


class LayerGates:
    """Lets layers of an adapter do without their updates; for training loops other than the Trainer's, and to see
    what a model is worth without some of them.


    Args:
        model: holds the adapter, active and not merged.
        adapter_name: which one.
        in_training_only: leave the model whole in evaluation mode, also where a step broke off.

    Raises:
        ValueError: if no layer has it, it adapts parameters, another adapter is active too, or it is merged.
    """

    def __init__(self, model: nn.Module, adapter_name: str = "default", *, in_training_only: bool = False) -> None:
        layers = {
            bare_name(name, model): module
            for name, module in model.named_modules()
            if isinstance(module, BaseTunerLayer) and has_adapter(module, adapter_name)
        }
        if not layers:
            raise ValueError(f"No layer of the model has an adapter {adapter_name!r}, so there is none to drop.")
        for name, layer in layers.items():
            if isinstance(layer, ParamWrapper):
                raise ValueError(
                    f"Layer {name!r} adapts a parameter (target_parameters), of which no output without the update is "
                    "there to be chosen. Drop layers of adapters with target_modules alone."
                )
            if layer.active_adapters != [adapter_name] or layer.merged:
                raise ValueError(
                    f"Layer {name!r} has the active adapters {layer.active_adapters} and the merged ones "
                    f"{layer.merged_adapters}: only {adapter_name!r} may be active, and none merged, where "
                    "updates are to be dropped. Call set_adapter, unmerge_adapter."
                )
            if isinstance(layer.get_base_layer(), nn.MultiheadAttention):
                raise ValueError(
                    f"Layer {name!r} is an attention, to whose weights the update is added: its base layer has no "
                    "output of its own to take in the place of the whole. Leave it out with exclude_modules, or train "
                    "without dropped layers."
                )
        self.names = list(layers)
        self._layers: list[Any] = list(layers.values())
        self._gates = [_Gate(in_training_only) for _ in layers]
        self._handles: list[RemovableHandle] = []
        for layer, gate in zip(layers.values(), self._gates, strict=True):
            module: Any = layer
            self._handles.append(module.base_layer.register_forward_hook(gate.keep_base))
            self._handles.append(module.register_forward_hook(gate.choose))

    def set(self, active: Sequence[bool]) -> None:
        """Which of the layers, in the order of `names`, add their updates from now on."""
        for gate, is_active in zip(self._gates, active, strict=True):
            gate.active = bool(is_active)
            gate.base.clear()  # of a forward that has not come to its end

    def forget_zero_gradients(self) -> None:
        """Leave the parameters of dropped layers that got no gradient but zero without one, for the optimizer."""
        dropped = (layer for layer, gate in zip(self._layers, self._gates, strict=True) if not gate.active)
        parameters = [p for layer in dropped for p in layer.parameters() if p.grad is not None]
        for parameter, is_needed in [(p, p.grad.any()) for p in parameters]:  # all asked before the first is awaited
            if not is_needed:
                parameter.grad = None

    def open(self) -> None:
        """All layers add their updates."""
        self.set([True] * len(self._gates))

    def remove(self) -> None:
        """All layers add their updates, and nothing of this is left on the model."""
        self.open()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
