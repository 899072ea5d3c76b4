"""What the optimizers over pairs have in common: groups, steps, checkpoints, and AdamW for all that has no pair."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch.optim import Optimizer

from peft_reslora.optim.pairs import FactorPair, refuse_misfit
from peft_reslora.shared.tensors import widen

Groups = Iterable[FactorPair] | Iterable[dict[str, Any]]


class PairOptimizer(Optimizer):
    """An optimizer whose groups hold pairs of factors, or plain parameters that are updated as by AdamW.

    Numbers are kept and computed in float32, in float64 for parameters of float64. Weight decay is decoupled, as in
    AdamW: each parameter shrinks by the factor 1 - lr * weight_decay before its update.
    """

    def __init__(self, params: Groups, defaults: dict[str, Any]) -> None:
        groups: list[Any] = list(params)
        if groups and not isinstance(groups[0], dict):
            groups = [{"pairs": groups}]
        super().__init__(groups, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group `{"pairs": [...]}` of `FactorPair`s, or `{"params": [...]}`, with options of its own.

        Raises:
            ValueError: for pairs that are none, naming the layer, and options out of range, naming the option.
            RuntimeError: for factors that are sharded or offloaded, naming the layer.
        """
        group = dict(param_group)
        if "pairs" in group:
            pairs = list(group.pop("pairs"))
            for pair in pairs:
                if not isinstance(pair, FactorPair):
                    raise ValueError(
                        f"{type(self).__name__} takes pairs, as from factor_pairs(model), and got a "
                        f"{type(pair).__name__}. Put parameters that have no pair into a group {{'params': [...]}}."
                    )
                refuse_misfit(pair)
            group["params"] = [factor for pair in pairs for factor in (pair.A, pair.B)]
            group["layers"] = [pair.layer for pair in pairs]
            group["scalings"] = [pair.scaling for pair in pairs]
        self.check_options({**self.defaults, **group})
        super().add_param_group(group)

    def check_options(self, options: dict[str, Any]) -> None:
        """Refuse options out of range.

        Raises:
            ValueError: naming the option, what came, and what is accepted.
        """
        for name in ("lr", "weight_decay"):
            if not 0 <= options[name] < math.inf:
                raise ValueError(f"{name}={options[name]!r} must be 0 or more, and finite.")
        if len(options["betas"]) != 2 or not all(0 <= beta < 1 for beta in options["betas"]):
            raise ValueError(f"betas={options['betas']!r} must be two numbers from 0 to below 1.")
        if not 0 < options["eps"] < math.inf:
            raise ValueError(f"eps={options['eps']!r} must be above 0, and finite.")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all that has a gradient.

        Args:
            closure: computes the loss and its gradients anew.

        Raises:
            ValueError: before anything is changed, naming the layer, if one factor of a pair has a gradient and the
                other has none, or a number of them is not finite.
            RuntimeError: before anything is changed, naming the layer, if a factor has been sharded or offloaded.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ready = [(group, pair, _gradients(pair)) for group in self.param_groups for pair in _pairs_of(group)]
        _refuse_nonfinite([(pair, gradients) for _, pair, gradients in ready if gradients])
        for group, pair, gradients in ready:
            if gradients:
                self.update_pair(pair, widen(gradients[0]), widen(gradients[1]), group)
        for group in self.param_groups:
            for parameter in () if "layers" in group else group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    direction = adam_direction(widen(parameter.grad), state, group["betas"], group["eps"])
                    decay_and_add(parameter, direction, group)
        return loss

    def update_pair(self, pair: FactorPair, grad_A: torch.Tensor, grad_B: torch.Tensor, group: dict[str, Any]) -> None:
        """Update A and B."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, for the same layers; what is kept in float32 stays so next to half-precision parameters.

        Raises:
            ValueError: before anything is changed, if the state is for other layers.
        """
        groups = state_dict["param_groups"]
        layers, own = ([group.get("layers") for group in all_groups] for all_groups in (groups, self.param_groups))
        if layers != own:
            theirs, ours = next(
                ((a, b) for a, b in zip(_names(layers), _names(own), strict=False) if a != b),
                (f"{len(_names(layers))} layers in {len(layers)} groups", f"{len(_names(own))} in {len(own)}"),
            )
            raise ValueError(
                f"The optimizer's state is for other layers: it has {theirs!r} where this optimizer has {ours!r}. "
                "Make the optimizer from the same model and with the same groups as the one that was saved."
            )
        scalings = [group.get("scalings") for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, own_scalings in zip(self.param_groups, scalings, strict=True):
            if own_scalings is not None:
                group["scalings"] = own_scalings
        keys = chain.from_iterable(group["params"] for group in groups)
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, parameter in zip(keys, parameters, strict=True):  # torch has cast to the parameter's dtype
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, torch.Tensor):
                    self.state[parameter][name] = value.detach().to(parameter.device, copy=True)


def adam_direction(
    gradient: torch.Tensor, state: dict[str, Any], betas: tuple[float, float], eps: float
) -> torch.Tensor:
    """m / (sqrt(v) + eps) with Adam's moments, corrected for their start at zero; the state is moved on."""
    if not state:
        state.update(step=0, exp_avg=torch.zeros_like(gradient), exp_avg_sq=torch.zeros_like(gradient))
    state["step"] += 1
    state["exp_avg"].lerp_(gradient, 1 - betas[0])
    state["exp_avg_sq"].mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    correction, correction_sq = (1 - beta ** state["step"] for beta in betas)
    divisor = state["exp_avg_sq"].sqrt().div_(math.sqrt(correction_sq)).add_(eps)
    return torch.div(state["exp_avg"], divisor.mul_(correction), out=divisor)


def decay_and_add(parameter: torch.Tensor, direction: torch.Tensor, group: dict[str, Any]) -> None:
    """parameter <- (1 - lr weight_decay) parameter - lr direction, rounded once."""
    decayed = widen(parameter) * (1 - group["lr"] * group["weight_decay"])
    parameter.copy_(decayed.sub_(direction, alpha=group["lr"]))


def _pairs_of(group: dict[str, Any]) -> Iterator[FactorPair]:
    """The pairs of a group, checked again: engines exchange the parameters of an optimizer for others.

    Raises:
        ValueError, RuntimeError: naming the layer, if they are none any more.
    """
    if "layers" not in group:
        return
    if len(group["params"]) != 2 * len(group["layers"]):
        raise ValueError(
            f"The group of layer {group['layers'][0]!r} has {len(group['params'])} parameters for "
            f"{len(group['layers'])} pairs. Engines that flatten parameters, such as DeepSpeed's ZeRO and FSDP1, "
            "cannot be used: train with DDP or on one device, or use torch.optim.AdamW."
        )
    factors = zip(group["params"][::2], group["params"][1::2], strict=True)
    for layer, (A, B), scaling in zip(group["layers"], factors, group["scalings"], strict=True):
        pair = FactorPair(layer, A, B, scaling)
        refuse_misfit(pair)
        yield pair


def _gradients(pair: FactorPair) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Those of A and B; None, of a pair that took no part.

    Raises:
        ValueError: naming the layer, if only one of them has a gradient.
    """
    if pair.A.grad is not None and pair.B.grad is not None:
        return pair.A.grad, pair.B.grad
    if pair.A.grad is None and pair.B.grad is None:
        return None
    raise ValueError(
        f"Layer {pair.layer!r}: {'A' if pair.A.grad is None else 'B'} has no gradient and the other factor has one. "
        "Let both require gradients and clear both, or use torch.optim.AdamW."
    )


def _refuse_nonfinite(pairs: list[tuple[FactorPair, tuple[torch.Tensor, torch.Tensor]]]) -> None:
    """Refuse numbers of which there is no decomposition, by one look at all of them.

    Raises:
        ValueError: naming the layer.
    """
    norms = [
        torch.stack([torch.linalg.vector_norm(widen(t.detach())).double() for t in (pair.A, pair.B, *gradients)])
        for pair, gradients in pairs
    ]
    devices = {norm.device for norm in norms}
    if all(bool(torch.stack([n for n in norms if n.device == device]).isfinite().all()) for device in devices):
        return
    layer = next(pair.layer for (pair, _), norm in zip(pairs, norms, strict=True) if not norm.isfinite().all())
    raise ValueError(
        f"Layer {layer!r}: a factor or its gradient holds NaN or infinity. Skip such steps (torch's GradScaler "
        "does), or lower the learning rate."
    )


def _names(layers: list[list[str] | None]) -> list[str]:
    return [name for group in layers for name in group or []]
