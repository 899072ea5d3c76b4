"""An independent computation of ResLoRA: hooks on the plain base model in float64, straight from the equations."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

Factors = dict[str, tuple[torch.Tensor, torch.Tensor, float]]
Mask = Callable[[str, torch.Tensor], torch.Tensor]
_FACTOR = re.compile(r"\.(lora|mora|hada|lokr|fourierft)_")  # of LoRA, AdaLoRA, ours, LoHa, LoKr and FourierFT


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """||actual - expected|| / ||expected||, refusing to compare with zero."""
    actual, expected = actual.detach(), expected.detach()
    norm = expected.double().norm()
    if norm == 0:
        raise AssertionError("the expected tensor is zero: the comparison would show nothing")
    return float((actual.double() - expected.double()).norm() / norm)


def randomize_adapters(model: nn.Module, seed: int = 1) -> nn.Module:
    """Give every adapter parameter a random value of a size that matters but does not blow up.

    DoRA's norms stay of the size of those that they have.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_magnitude" in name:
            parameter.data.mul_(1.2 + 0.3 * torch.randn(parameter.shape, generator=generator).sin())
        elif _FACTOR.search(name):
            inputs = parameter[0].numel() if parameter.ndim > 2 else parameter.shape[-1]
            scale = 0.5 / inputs**0.5
            parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def factors_of(model: nn.Module, adapter_name: str = "default") -> Factors:
    """Every layer's A, B and scaling by its name in the base model; A and B are float64 leaves."""
    factors = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and adapter_name in module.lora_A:
            A, B = module.lora_A[adapter_name].weight, module.lora_B[adapter_name].weight
            leaves = [tensor.detach().double().requires_grad_() for tensor in (A, B)]
            factors[name.removeprefix("base_model.model.")] = (*leaves, module.scaling[adapter_name])
    return factors


def chains_by_block(names: list[str], shape_of: Callable[[str], tuple[int, ...]]) -> list[list[str]]:
    """Chains found in the plainest way: each layer joins the one before it with the same name but for the numbers, if
    the first number that differs is one apart and the shape equal."""
    chains: list[list[str]] = []
    latest: dict[str, list[str]] = {}

    def numbers_of(name: str) -> list[int]:
        return [int(p) for p in name.split(".")[:-1] if p.isdigit()]

    for name in sorted(names, key=numbers_of):
        role = re.sub(r"\.\d+(?=\.)", "*", name)
        chain = latest.get(role)
        pairs = zip(numbers_of(chain[-1]), numbers_of(name), strict=True) if chain else []
        step = next((b - a for a, b in pairs if a != b), None)
        if chain and step == 1 and shape_of(chain[-1]) == shape_of(name):
            chain.append(name)
        else:
            latest[role] = [name]
            chains.append(latest[role])
    return chains


def run_oracle(
    base: nn.Module,
    inputs: dict[str, Any],
    factors: Factors,
    shortcut: str,
    pre_num: int,
    run: Callable[[nn.Module, dict[str, Any]], torch.Tensor],
    mask: Mask = lambda name, x: x,
) -> torch.Tensor:
    """The output of the base model with the shortcuts added by hooks; differentiable in `factors`."""
    base = copy.deepcopy(base).double()
    modules = dict(base.named_modules())
    chains = chains_by_block(list(factors), lambda name: (factors[name][0].shape[1], factors[name][1].shape[0]))
    seen: dict[str, torch.Tensor] = {}
    handles = []

    def down(name: str, A: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x @ A.T if A.ndim == 2 else _convolve(modules[name], A, x)

    def up(B: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ B.T if B.ndim == 2 else torch.einsum("or,br...->bo...", B.flatten(1), hidden)

    def delta(chain: list[str], n: int) -> torch.Tensor:
        name, x = chain[n], seen[chain[n]]
        A, B, s = factors[name]
        earlier = chain[max(0, n - pre_num) : n] if pre_num != -1 else chain[:n]
        if shortcut == "input":
            previous = seen[chain[n - 1]] if n else x
            return s * up(B, down(name, A, mask(name, x + previous)))
        if shortcut == "block":
            return sum(s * up(B, down(name, A, mask(name, x))) for A, B, s in (factors[k] for k in [name, *earlier]))
        return s * up(B, sum(down(k, factors[k][0], mask(k, seen[k])) for k in [name, *earlier]))

    for chain in chains:
        for n, name in enumerate(chain):

            def hook(module: nn.Module, args: Any, output: torch.Tensor, chain=chain, n=n) -> torch.Tensor:
                seen[chain[n]] = args[0]
                return output + delta(chain, n)

            handles.append(modules[name].register_forward_hook(hook))
    inputs = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    output = run(base, inputs)
    for handle in handles:
        handle.remove()
    return output


def _convolve(layer: Any, kernel: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """As the layer, of one group and padded with zeros, does it with its own kernel."""
    convolution = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[kernel.ndim]
    return convolution(x, kernel, None, layer.stride, layer.padding, layer.dilation)
