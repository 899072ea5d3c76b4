"""Every kind of layer, of block and of shortcut: right, or refused by name. `docs/supported.md` shows the table.

"Right" is the equation: two layers in a chain, each update a dense weight of the base layer's shape that is made here
from the factors, output and all gradients, in float64 (in float32 on quantized layers); and the merge where it is
exact.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.gradients import assert_gradients_close
from helpers.oracle import relative_error
from helpers.refusals import refuse
from helpers.tolerances import FLOAT64, rounding
from peft import PeftModel, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from peft_reslora import ResLoRAConfig
from peft_reslora.training import set_rank

WIDTH = 64  # 4-bit weights come in groups of so many


def eight_bit() -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    linear, quantized = nn.Linear(WIDTH, WIDTH), bnb.nn.Linear8bitLt(WIDTH, WIDTH, has_fp16_weights=False, threshold=6)
    quantized.bias = linear.bias
    quantized.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    return quantized.to("cpu")


def four_bit() -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    linear, quantized = nn.Linear(WIDTH, WIDTH), bnb.nn.Linear4bit(WIDTH, WIDTH, compute_dtype=torch.float32)
    quantized.bias = linear.bias
    quantized.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=quantized)
    return quantized.to("cpu")


class Experts(nn.Module):
    """The weights of all experts in one parameter, as transformers keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,eio->bo", x, self.weight)


class Attention(nn.MultiheadAttention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x, x, x)[0]


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {  # how to make one, and the shape of its input
    "nn.Linear": (lambda: nn.Linear(5, 5), (4, 5)),
    "Conv1D of transformers": (lambda: Conv1D(5, 5), (4, 5)),
    "nn.Conv1d": (lambda: nn.Conv1d(4, 4, 3, padding=1), (2, 4, 6)),
    "nn.Conv2d": (lambda: nn.Conv2d(4, 4, 3, padding=1), (2, 4, 6, 5)),
    "nn.Conv2d in groups": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=2), (2, 4, 6, 5)),
    "nn.Conv3d": (lambda: nn.Conv3d(4, 4, 3, padding=1), (2, 4, 4, 3, 5)),
    "nn.Embedding": (lambda: nn.Embedding(7, 7), (4, 3)),
    "nn.MultiheadAttention": (lambda: Attention(4, 2), (2, 3, 4)),
    "fused experts (target_parameters)": (Experts, (4, 5)),
    "bitsandbytes 8-bit": (eight_bit, (4, WIDTH)),
    "bitsandbytes 4-bit": (four_bit, (4, WIDTH)),
}
BLOCKS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "DoRA": {"use_dora": True},
    "AdaLoRA": {"total_step": 9, "init_r": 4, "target_r": 1},
    "nested ranks": {"nested_ranks": True},
}
IN_USE = 2  # of 4 directions, with nested ranks
SHORTCUTS = ["input", "block", "middle"]
QUANTIZED = ["bitsandbytes 8-bit", "bitsandbytes 4-bit"]


def message_of(layer: str, block: str, shortcut: str) -> str | None:
    """What a refusal says; None where all is right."""
    if layer == "fused experts (target_parameters)" and (block, shortcut) != ("LoRA", "block"):
        field = {"DoRA": "use_dora=True", "AdaLoRA": "total_step", "nested ranks": "nested_ranks=True"}
        of_shortcut = f"shortcut='{shortcut}', .*choose shortcut='block'"
        return rf"target_parameters=\['0.weight', '1.weight'\] with {field.get(block, of_shortcut)}"
    if block == "DoRA" and shortcut != "block":
        return r"use_dora=True with shortcut=.*choose shortcut='block'"
    if layer == "nn.MultiheadAttention" and block == "LoRA" and shortcut != "block":
        return r"cannot adapt .*\(Attention, 2 layers\), .*query, key and value.*shortcut='block'"
    if layer == "nn.Embedding" and shortcut != "block":
        return r"cannot adapt .*\(Embedding, 2 layers\), .*indices.*shortcut='block'"
    if block != "LoRA" and layer == "nn.MultiheadAttention":
        return rf"cannot adapt .*, an attention, which has no blocks of {block}"
    return None


CELLS = [(layer, block, shortcut) for layer in LAYERS for block in BLOCKS for shortcut in SHORTCUTS]
RIGHT = [cell for cell in CELLS if message_of(*cell) is None]
REFUSED = [cell for cell in CELLS if message_of(*cell) is not None]


class Net(nn.Sequential):
    """Two layers of a kind, one after the other; of embeddings side by side, since indices come out of none."""

    def __init__(self, layer: str) -> None:
        super().__init__(LAYERS[layer][0](), LAYERS[layer][0]())
        self.is_loaded_in_8bit, self.is_loaded_in_4bit = (layer == quantized for quantized in QUANTIZED)  # PEFT asks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self[0](x)
        return torch.tanh(first) + self[1](torch.tanh(first) if x.is_floating_point() else x)


def prepared(layer: str) -> tuple[Net, torch.Tensor]:
    torch.manual_seed(0)
    dtype = torch.float32 if layer in QUANTIZED else torch.float64
    base = Net(layer) if layer in QUANTIZED else Net(layer).to(dtype)
    shape = LAYERS[layer][1]
    return base, torch.randint(0, 7, shape) if layer == "nn.Embedding" else torch.randn(shape, dtype=dtype)


def config_of(layer: str, block: str, shortcut: str) -> ResLoRAConfig:
    chosen: dict[str, Any] = {"target_modules": ["0", "1"]}
    if layer == "fused experts (target_parameters)":
        chosen = {"target_modules": [], "target_parameters": ["0.weight", "1.weight"]}
    rank = {} if block == "AdaLoRA" else {"r": 4}
    return ResLoRAConfig(shortcut=shortcut, lora_alpha=3, **chosen, **rank, **BLOCKS[block])  # type: ignore[arg-type]


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    named = {name.removeprefix("base_model.model."): p for name, p in model.named_parameters() if p.requires_grad}
    return {name.replace(".default", "").replace("embedding_", ""): p for name, p in named.items()}


def adapted(base: nn.Module, config: ResLoRAConfig) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(1)
    for name, p in trained(model).items():
        drawn = torch.randn(p.shape, generator=generator).to(p)
        p.data = p.data * (1.2 + 0.1 * drawn) if "magnitude" in name else 0.5 * drawn / p[0].numel() ** 0.5
    return model  # in training: in evaluation, bitsandbytes computes in half precision on some processors


def product(
    values: dict[str, torch.Tensor], a: int | str, b: int | str, rank: int = 4, experts: int = 1
) -> torch.Tensor:
    """B_b E_b A_a of two layers, entry by entry, in the groups that their shapes tell, of the first directions; or of
    each expert."""
    A, B = (values.get(f"{n}.lora_{f}.weight", values.get(f"{n}.lora_{f}")) for n, f in ((a, "A"), (b, "B")))
    if experts > 1:  # A's rows are expert by expert, B's columns direction by direction
        return torch.stack([B[:, e::experts] @ rows for e, rows in enumerate(A.chunk(experts))])
    E = values.get(f"{b}.lora_E", torch.ones(len(A), 1).to(A))[:, 0]
    groups = len(A) // B.shape[1]
    first = slice(rank // groups)
    return torch.cat(
        [
            torch.einsum("or,r,ri...->oi...", right.flatten(1)[:, first], middle[first], left[first])
            for left, middle, right in zip(A.chunk(groups), E.chunk(groups), B.chunk(groups), strict=True)
        ]
    )


def applied(layer: nn.Module, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What a layer without bias makes of x by this weight `(out, in, ...)`, or `(experts, out, in)`."""
    if isinstance(layer, Experts):
        return torch.einsum("bi,eio->bo", x, weight)
    if isinstance(layer, nn.Embedding):
        return F.one_hot(x, layer.num_embeddings).to(weight) @ weight.T
    if weight.ndim == 2:
        return x @ weight.T
    convolution = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[weight.ndim]
    return convolution(x, weight, padding=layer.padding, groups=layer.groups)


def oracle(base: Net, values: dict[str, torch.Tensor], x: torch.Tensor, cell: tuple[str, str, str]) -> torch.Tensor:
    _, block, shortcut = cell
    s = {"AdaLoRA": 3 / (4 + 1e-5), "nested ranks": 3 / IN_USE}.get(block, 3 / 4)
    inputs: list[torch.Tensor] = []

    def update(a: int, b: int) -> torch.Tensor:
        experts = len(base[b].weight) if isinstance(base[b], Experts) else 1
        return s * product(values, a, b, IN_USE if block == "nested ranks" else 4, experts)

    def layer(n: int, x: torch.Tensor) -> torch.Tensor:
        own, result = base[n], base[n](x)
        inputs.append(x)
        if block == "DoRA":
            U = sum(update(k, k) for k in range(n + 1))
            W = dequantize_module_weight(copy.deepcopy(own)).detach()  # on a CPU, PEFT leaves 8 bits unusable
            W = W.T if isinstance(own, Conv1D | nn.Embedding) else W
            channels = (-1, *(1 for _ in W.shape[2:]))
            share = (values[f"{n}.lora_magnitude"] / (W + U.detach()).flatten(1).norm(dim=1)).view(channels)
            bias = 0 if isinstance(own, nn.Embedding) else own.bias.view(channels)
            return share * (result - bias + applied(own, U, x)) + bias
        if isinstance(own, nn.MultiheadAttention):
            weights = {"in_proj_weight": "{}", "out_proj.weight": "{}.base_layer.out_proj"}
            places = {name: [place.format(k) for k in range(n + 1)] for name, place in weights.items()}
            sums = {name: s * sum(product(values, k, k) for k in where) for name, where in places.items()}
            return functional_call(own, {name: own.get_parameter(name) + U for name, U in sums.items()}, (x,))
        if shortcut == "input":
            return result + applied(own, update(n, n), x + inputs[max(n - 1, 0)])
        if shortcut == "middle":
            return result + sum(applied(own, update(k, n), inputs[k]) for k in range(n + 1))
        return result + applied(own, sum(update(k, k) for k in range(n + 1)), x)

    first = layer(0, x)
    return torch.tanh(first) + layer(1, torch.tanh(first) if x.is_floating_point() else x)


def gradients_of(output: torch.Tensor, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    output.square().sum().backward()
    return {name: value.grad for name, value in values.items()}


def marked(cells: list[tuple[str, str, str]], verdict: str) -> list[Any]:
    return [pytest.param(cell, id=", ".join(cell), marks=pytest.mark.layer_support(*cell, verdict)) for cell in cells]


@pytest.mark.quick(cell=[cell for cell in RIGHT if cell[1:] == ("LoRA", "block")])
@pytest.mark.parametrize("cell", marked(RIGHT, "right"))
def test_output_gradients_and_exact_merges(cell):
    layer, _, shortcut = cell
    base, x = prepared(layer)
    model = adapted(copy.deepcopy(base), config_of(*cell))
    if cell[1] == "nested ranks":
        set_rank(model, IN_USE)
    values = {name: p.detach().clone().requires_grad_() for name, p in trained(model).items()}
    expected, actual = oracle(base, values, x, cell), model(x)
    tolerance = rounding(20 * WIDTH) if layer in QUANTIZED else FLOAT64
    assert relative_error(actual, expected) < tolerance
    assert relative_error(actual, base(x)) > 0.01
    assert_gradients_close(gradients_of(actual, trained(model)), gradients_of(expected, values))
    if shortcut == "block" and layer not in QUANTIZED:
        assert relative_error(model.merge_and_unload()(x), expected) < FLOAT64


@pytest.mark.parametrize("cell", marked(REFUSED, "refused"))
def test_what_has_no_meaning_is_refused_by_name(cell):
    base, _ = prepared(cell[0])
    refuse(base, message_of(*cell), lambda: get_peft_model(base, config_of(*cell)))
