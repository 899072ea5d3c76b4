"""How the factors of a layer's update stand in a LoRA's file, by the kind of layer that they are for.

Everywhere else the factors are matrices, A `(R, in_features)` and B `(out_features, R)`; of a convolution A's columns
are the entries of a patch, channel by channel. PEFT (0.21.2), kohya's scripts and diffusers hold them as kernels, and
PEFT those of an embedding under other names. Those of a parameter, which `target_parameters` adapts, have a dimension
more, for its experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from peft_reslora.reslora.blocks.experts import as_held, folded
from peft_reslora.shared.host import CONVOLUTIONS, Convolution, convolve, is_transposed_parameter


@dataclass(frozen=True)
class Form:
    """The form of one layer's factors.

    Args:
        names: of the two tensors in the file.
        size: of the kernel, if the layer is a convolution.
        groups: of the convolution, among which its rank is divided evenly.
    """

    names: tuple[str, str] = ("lora_A.weight", "lora_B.weight")
    size: tuple[int, ...] = ()
    groups: int = 1

    def needs(self, A: Tensor, B: Tensor) -> int:
        """The least rank that holds the factors."""
        return A.shape[0] if self.groups == 1 else self.groups * max(map(len, self._by_group(B)))

    def tensors(self, A: Tensor, B: Tensor, r: int) -> dict[str, Tensor]:
        """The two tensors of the file by their names, padded with zeros to rank r."""
        if self.groups > 1:
            A, B = self._grouped(A, B, r)
        else:
            A, B = nn.functional.pad(A, (0, 0, 0, r - len(A))), nn.functional.pad(B, (0, r - len(A)))
        if self.size:
            A, B = A.unflatten(1, (-1, *self.size)), B.reshape(*B.shape, *(1 for _ in self.size))
        return dict(zip(self.names, (A.contiguous(), B.contiguous()), strict=True))

    def matrices(self, tensors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """A `(r, in_features)` and B `(out_features, r)` of the file's two tensors."""
        A, B = (tensor.flatten(1) for tensor in tensors)
        return A, torch.block_diag(*B.chunk(self.groups)) if self.groups > 1 else B

    def norms(self, magnitude: Tensor) -> Tensor:
        """DoRA's m `(out_features,)` as the file has it: of a convolution as `(1, out_channels, 1, ...)`."""
        return magnitude.view(1, -1, *(1 for _ in self.size)) if self.size else magnitude

    def _by_group(self, B: Tensor) -> list[list[int]]:
        """The directions of each group: those whose column of B is in its rows.

        Raises:
            ValueError: if one is in several.
        """
        used = (B.unflatten(0, (self.groups, -1)) != 0).any(dim=1)  # (groups, R)
        if (used.sum(dim=0) > 1).any():
            raise ValueError(
                f"its base layer is a convolution in {self.groups} groups, whose factors cannot be truncated; leave "
                "out rank= and energy="
            )
        return [torch.nonzero(row).flatten().tolist() for row in used]

    def _grouped(self, A: Tensor, B: Tensor, r: int) -> tuple[Tensor, Tensor]:
        """A `(r, in_features)` and B `(out_features, r / groups)`, the directions of each group together."""
        if r % self.groups:
            raise ValueError(
                f"its base layer is a convolution in {self.groups} groups, among which the file's rank {r} cannot be "
                "divided; train without it, or use merge_and_unload()"
            )
        rows, columns = [], []
        for group, part in zip(self._by_group(B), B.chunk(self.groups), strict=True):
            missing = r // self.groups - len(group)
            rows.append(nn.functional.pad(A[group], (0, 0, 0, missing)))
            columns.append(nn.functional.pad(part[:, group], (0, missing)))
        return torch.cat(rows), torch.cat(columns)


@dataclass(frozen=True)
class ParameterForm(Form):
    """The form of the factors of a parameter with so many experts: A `(R, experts, in)` and B `(out, R, experts)`.

    Args:
        path: the parameter's name in the base model, which the file does not tell.
        experts: their number; 1 for a matrix.
    """

    path: str = ""
    experts: int = 1

    def tensors(self, A: Tensor, B: Tensor, r: int) -> dict[str, Tensor]:
        missing = r - A.shape[0]
        A, B = nn.functional.pad(A, (0, 0, 0, 0, 0, missing)), nn.functional.pad(B, (0, 0, 0, missing))
        return dict(zip(self.names, (held.contiguous() for held in as_held(A, B)), strict=True))

    def matrices(self, tensors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return folded(*tensors, self.experts)


LINEAR = Form()
NO_ATTENTION = (
    "its base layer is an attention with weights in place of layers, to whose out_proj PEFT's LoRA adds the update "
    "twice (0.21.2), so that no LoRA is the same in all of its versions"
)
EMBEDDING = Form(("lora_embedding_A", "lora_embedding_B"))


def form_of_adapted(layer: BaseTunerLayer) -> Form:
    """The form of the factors for what a tuner's layer adapts.

    Raises:
        ValueError: as `form_of`.
    """
    if isinstance(layer, ParamWrapper):
        return ParameterForm(path=layer.parameter_name, experts=layer.num_experts)
    return form_of(layer.get_base_layer())


def form_of(base_layer: nn.Module) -> Form:
    """The form of the factors for a layer.

    Raises:
        ValueError: if PEFT's LoRA of the layer would compute something else than they say.
    """
    if isinstance(base_layer, nn.Embedding):
        return EMBEDDING
    if not isinstance(base_layer, Convolution):
        return LINEAR
    if type(base_layer) not in CONVOLUTIONS:
        raise ValueError(f"its base layer is {type(base_layer).__name__}, for which PEFT has no LoRA")
    if set(base_layer.dilation) != {1} or base_layer.padding_mode != "zeros":
        raise ValueError(
            f"its base layer is a convolution with dilation={base_layer.dilation} and "
            f"padding_mode={base_layer.padding_mode!r}, which PEFT's LoRA ignores (0.21.2), so that no LoRA computes "
            "what it does; use merge_and_unload()"
        )
    return Form(size=tuple(base_layer.kernel_size), groups=base_layer.groups)


def dora_form_of(base_layer: nn.Module) -> Form:
    """The form of the factors of a DoRA for a layer.

    Raises:
        ValueError: as `form_of`.
    """
    form = form_of(base_layer)
    if form.groups > 1:
        raise ValueError(
            f"its base layer is a convolution in {form.groups} groups, whose norms PEFT's DoRA takes of other kernels "
            "(0.21.2), so that no DoRA computes what it does; use merge_and_unload()"
        )
    return form


@torch.no_grad()
def reads_back(layer: LoraLayer, A: Tensor, B: Tensor, generator: torch.Generator) -> bool:
    """Whether plain PEFT's layer adds to its output what the matrices A and B say, on a random input."""
    reader = (
        _of_parameter if isinstance(layer, ParamWrapper) else _READERS.get(type(layer.get_base_layer()), _of_linear)
    )
    read, expected = reader(layer, A, B, generator)
    return torch.allclose(read, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def _of_linear(layer: Any, A: Tensor, B: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(4, A.shape[1], generator=generator, dtype=A.dtype)
    lora_A, lora_B = layer.lora_A["default"].float().cpu(), layer.lora_B["default"].float().cpu()
    return layer.scaling["default"] * lora_B(lora_A(x)), x @ A.T @ B.T


def _of_parameter(layer: Any, A: Tensor, B: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Of each expert the matrix B A, in the parameter's own orientation."""
    delta = torch.einsum("ore,rei->eoi", B, A)
    read = layer.get_delta_weight("default").float().cpu()
    return read.view(layer.num_experts, *read.shape[-2:]), delta.mT if is_transposed_parameter(layer) else delta


def _of_embedding(layer: Any, A: Tensor, B: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return layer.get_delta_weight("default").float().cpu(), (B @ A).T


def _of_convolution(layer: Any, A: Tensor, B: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """By the kernel B A in each group of the base, which knows nothing of the factors."""
    base = layer.get_base_layer()
    sizes = [size + 4 for size in base.kernel_size]
    x = torch.randn(2, base.in_channels, *sizes, generator=generator, dtype=A.dtype)
    lora_A, lora_B = layer.lora_A["default"].float().cpu(), layer.lora_B["default"].float().cpu()
    rows, columns = base.out_channels // base.groups, A.shape[1] // base.groups
    delta = B @ A
    own = [delta[i * rows : (i + 1) * rows, i * columns : (i + 1) * columns] for i in range(base.groups)]
    kernel = torch.cat(own).unflatten(1, (-1, *base.kernel_size))
    return layer.scaling["default"] * lora_B(lora_A(x)), convolve(base, x, kernel)


_Reader = Callable[[Any, Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
_READERS: dict[type[nn.Module], _Reader] = dict.fromkeys(CONVOLUTIONS, _of_convolution)
_READERS[nn.Embedding] = _of_embedding
