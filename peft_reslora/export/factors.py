"""The low-rank factors of what an adapter adds to a weight: one rule per tuner layer.

The update of a layer is meant as `nn.Linear` holds its weight, `(out_features, in_features)`, with every scale
included, whatever the orientation of the base layer's own weight. Factors of it are `A (R, in_features)` and
`B (out_features, R)` with update = B @ A, in float32, or in float64 where the adapter is. A kernel of a convolution is
meant as the matrix `(out_channels, in_channels * positions)`, that of an embedding as `(dimensions, entries)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.loha.layer import LoHaLayer
from peft.tuners.lokr.layer import LoKrLayer
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_reslora.export.forms import NO_ATTENTION, form_of
from peft_reslora.reslora.layer import ResLoRALayer
from peft_reslora.shared.host import CONVOLUTIONS, Convolution
from peft_reslora.shared.tensors import NOT_HERE, is_readable, widen


@dataclass(frozen=True)
class Spectrum:
    """A singular value decomposition: update = U @ diag(S) @ Vh, S descending.

    U is `(out_features, R)`, S `(R,)`, Vh `(R, in_features)`.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor


@dataclass(frozen=True)
class Factors:
    """update = B @ A, with A `(R, in_features)` and B `(out_features, R)`. Make them with `Factors.of`."""

    A: Tensor
    B: Tensor

    @classmethod
    def of(cls, A: Tensor, B: Tensor, scale: float | Tensor = 1.0) -> Factors:
        """The smallest exact factors of `scale * B @ A` that need no decomposition.

        Directions that add nothing (a zero row of A, a zero column of B) are dropped, and a rank above the smaller
        side is brought down to that side.

        Raises:
            ValueError: if the tensors are not two matrices of one rank.
        """
        A, B = widen(A), widen(B)
        if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
            raise ValueError(
                f"its factors have the shapes {tuple(A.shape)} and {tuple(B.shape)} instead of (r, in_features) and "
                "(out_features, r); if the model is sharded, gather its parameters first"
            )
        used = (A != 0).any(dim=1) & (B != 0).any(dim=0)
        A, B = A[used], scale * B[:, used]
        if A.shape[0] > min(A.shape[1], B.shape[0]):
            return cls(*factorize(B @ A))
        return cls(A, B)

    @property
    def rank(self) -> int:
        """R, the number of directions; the rank of the update, unless they are linearly dependent."""
        return self.A.shape[0]

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """A and B."""
        return self.A, self.B

    def spectrum(self) -> Spectrum:
        """By QR of both factors and an SVD of the (R, R) core between them; the update itself is never formed."""
        Q_B, R_B = torch.linalg.qr(self.B)
        Q_A, R_A = torch.linalg.qr(self.A.T)
        U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
        return Spectrum(Q_B @ U, S, Vh @ Q_A.T)


@dataclass(frozen=True)
class KroneckerFactors(Factors):
    """Factors of kron(left, right), whose decomposition is that of its two small parts."""

    left: Factors
    right: Factors

    @classmethod
    def product(cls, left: Factors, right: Factors) -> KroneckerFactors:
        """From (B1 A1) x (B2 A2) = (B1 x B2) (A1 x A2)."""
        return cls(_kron(left.A, right.A), _kron(left.B, right.B), left, right)

    def spectrum(self) -> Spectrum:
        """All products of the two parts' singular values, and of their directions."""
        left, right = self.left.spectrum(), self.right.spectrum()
        S, order = torch.sort(torch.outer(left.S, right.S).flatten(), descending=True)
        return Spectrum(_kron(left.U, right.U)[:, order], S, _kron(left.Vh, right.Vh)[order])


def factorize(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Exact `(A, B)` with B @ A = `matrix`, of its smaller side: one factor is the matrix, the other the identity."""
    rows, columns = matrix.shape
    identity = torch.eye(min(rows, columns), dtype=matrix.dtype, device=matrix.device)
    return (matrix, identity) if rows <= columns else (identity, matrix)


@runtime_checkable
class GivesFactors(Protocol):
    """A tuner's layer that knows the factors of its adapters' updates."""

    def merged_factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """A `(R, in_features)` and B `(out_features, R)`, every scale included.

        Raises:
            ValueError: if the update has none of low rank.
        """


def layer_factors(layer: BaseTunerLayer, adapter_name: str, *, approximate: bool) -> Factors:
    """The factors of one adapter's update of one layer: of PEFT's layers, the rule is here; others give them.

    Args:
        layer: the tuner layer.
        adapter_name: an adapter that it has.
        approximate: the caller will truncate the result. Only then, a layer without exact factors whose
            `get_delta_weight` is its whole update (`supports_lora_conversion`) gives that, as factors of full rank.

    Raises:
        ValueError: with the reason, if the update is no matrix of low rank added to the layer's weight.
    """
    _refuse_other_than_linear(layer)
    if isinstance(layer, GivesFactors):
        return _own_factors(layer, adapter_name, approximate)
    for kind, rule in _RULES.items():
        if isinstance(layer, kind):
            return rule(layer, adapter_name)
    if not layer.supports_lora_conversion(adapter_name):
        raise ValueError(f"{_class_name(layer)} is no layer whose update is a matrix added to the weight")
    if not approximate:
        raise ValueError(
            f"{_class_name(layer)} has no exact factors of low rank; pass rank= or energy= for an approximation, or "
            "use merge_and_unload()"
        )
    return _dense(layer, adapter_name)


def dora_factors(layer: Any, adapter_name: str) -> tuple[Factors, Tensor]:
    """The factors of one adapter with DoRA on one layer, and its norms `(out_features,)`.

    Raises:
        ValueError: with the reason, if PEFT's DoRA cannot hold it.
    """
    _refuse_other_than_linear(layer)
    if isinstance(layer, ResLoRALayer):
        A, B, magnitude = layer.dora_factors(adapter_name)
        return Factors.of(A, B), magnitude
    variant = layer.lora_variant.get(adapter_name) if isinstance(layer, LoraLayer) else None
    if type(variant) is not DoraLinearVariant:  # those of embeddings are its subclass
        raise ValueError(f"{_class_name(layer)} has no DoRA of a linear layer; use merge_and_unload()")
    A, B = (getattr(layer, name)[adapter_name] for name in ("lora_A", "lora_B"))
    magnitude = _numbers(layer.lora_magnitude_vector[adapter_name].weight)
    return Factors.of(_numbers(A.weight), _numbers(B.weight), layer.scaling[adapter_name]), magnitude


def _own_factors(layer: Any, adapter_name: str, approximate: bool) -> Factors:
    """What the layer says itself; the dense update where it has no factors and an approximation will do."""
    try:
        A, B = layer.merged_factors(adapter_name)
    except (ValueError, NotImplementedError) as error:
        if approximate and layer.supports_lora_conversion(adapter_name):
            return _dense(layer, adapter_name)
        raise ValueError(str(error)) from error
    return Factors.of(A, B)


def _lora(layer: Any, adapter_name: str) -> Factors:
    """s B A; `scaling` holds rsLoRA and the patterns already."""
    if (variant := layer.lora_variant.get(adapter_name)) is not None:
        raise ValueError(
            f"it trains the LoRA variant {type(variant).__name__}, whose update is not scaling * B @ A; use "
            "merge_and_unload() where PEFT can merge the variant"
        )
    if adapter_name in layer.lora_embedding_A:
        A, B = (_numbers(held[adapter_name]) for held in (layer.lora_embedding_A, layer.lora_embedding_B))
        return Factors.of(A, B, layer.scaling[adapter_name])
    A, B = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    if not isinstance(A, (nn.Linear, *CONVOLUTIONS)) or type(A) is not type(B):
        raise ValueError(f"its factors are {type(A).__name__} and {type(B).__name__} modules instead of Linear")
    if B.bias is not None:
        raise ValueError("it trains a bias (lora_bias=True), which a plain LoRA cannot hold; use merge_and_unload()")
    form = form_of(layer.get_base_layer())
    return Factors.of(*form.matrices((_numbers(A.weight), _numbers(B.weight))), layer.scaling[adapter_name])


def _adalora(layer: Any, adapter_name: str) -> Factors:
    """s / (ranknum + 1e-5) B (A * E): AdaLoRA divides by the rank it started with; pruned directions have E = 0."""
    A, B, E = (_numbers(getattr(layer, name)[adapter_name]) for name in ("lora_A", "lora_B", "lora_E"))
    scale = layer.scaling[adapter_name] / (float(layer.ranknum[adapter_name]) + 1e-5)
    return Factors.of(A * E, B, scale)


def _loha(layer: Any, adapter_name: str) -> Factors:
    """s (B1 A1) * (B2 A2), elementwise = s (B1 . B2) (A1 . A2), with all r^2 products of a column (row) of each."""
    (B1, A1), (B2, A2) = (_product_of(layer, adapter_name, f"hada_w{n}") for n in (1, 2))
    B = torch.einsum("oi,oj->oij", B1, B2).flatten(1)
    A = torch.einsum("id,jd->ijd", A1, A2).flatten(0, 1)
    return Factors.of(A, B, layer.scaling[adapter_name])


def _lokr(layer: Any, adapter_name: str) -> Factors:
    """s kron(W1, W2), each of them a full matrix or a product of two."""

    def part(name: str, scale: float = 1.0) -> Factors:
        if adapter_name in (whole := getattr(layer, name)):
            if whole[adapter_name].ndim == 3:
                raise ValueError(
                    "of a whole second part over nn.Conv1d, PEFT's LoKr makes no Kronecker product of matrices "
                    "(0.21.2); use merge_and_unload()"
                )
            A, B = factorize(_numbers(whole[adapter_name]).flatten(1))
        else:
            B, A = _product_of(layer, adapter_name, name)
        return Factors.of(A, B, scale)

    return KroneckerFactors.product(part("lokr_w1", layer.scaling[adapter_name]), part("lokr_w2"))


def _product_of(layer: Any, adapter_name: str, name: str) -> tuple[Tensor, Tensor]:
    """B `(out, r)` and A `(r, in)` of one of LoHa's or LoKr's matrices; with a core T of Tucker's decomposition
    (use_effective_conv2d) of what W = sum_ij T[i, j] a[i, out] b[j, in] comes to."""
    a, b = (_numbers(getattr(layer, f"{name}_{side}")[adapter_name]) for side in "ab")
    cores = getattr(layer, name.replace("_w", "_t"), {})
    if adapter_name not in cores:
        return a, b
    return a.T, torch.einsum("ijkl,jn->inkl", _numbers(cores[adapter_name]), b).flatten(1)


# By layer class, the first that fits: AdaLoRA's layers are LoRA's as well.
_RULES: dict[type, Callable[[Any, str], Factors]] = {
    AdaLoraLayer: _adalora,
    LoraLayer: _lora,
    LoHaLayer: _loha,
    LoKrLayer: _lokr,
}


def _dense(layer: Any, adapter_name: str) -> Factors:
    """Factors of full rank, from the update as the layer itself would merge it."""
    delta = widen(layer.get_delta_weight(adapter_name)).flatten(1)
    turned = getattr(layer, "fan_in_fan_out", False) or isinstance(layer.get_base_layer(), Conv1D)
    return Factors.of(*factorize(delta.T if turned else delta))


def _refuse_other_than_linear(layer: BaseTunerLayer) -> None:
    base = layer.get_base_layer()
    if isinstance(layer, ParamWrapper):  # of which ResLoRA's is exported by `experts.py`
        raise ValueError("it adapts a parameter (target_parameters) and not a linear layer; use merge_and_unload()")
    lora = isinstance(layer, (LoraLayer, GivesFactors))
    grouped = isinstance(base, Convolution) and base.groups > 1 and not isinstance(layer, LoraLayer)
    if isinstance(base, nn.MultiheadAttention):
        raise ValueError(f"{NO_ATTENTION}. Train without it, or use merge_and_unload()")
    if grouped or (isinstance(base, nn.Embedding) and not lora):
        kind = f"{type(base).__name__}{' in groups' if grouped else ''}"
        raise ValueError(
            f"its base layer is {kind}, of which {_class_name(layer)} is not exported; train without it, or use "
            "merge_and_unload()"
        )


def _class_name(layer: BaseTunerLayer) -> str:
    return f"{type(layer).__module__}.{type(layer).__qualname__}"


def _kron(first: Tensor, second: Tensor) -> Tensor:
    """`torch.kron` of two matrices, which may be empty."""
    return torch.einsum("ab,cd->acbd", first, second).reshape(
        first.shape[0] * second.shape[0], first.shape[1] * second.shape[1]
    )


def _numbers(tensor: Tensor) -> Tensor:
    """A parameter's numbers, in float32 unless it is wider.

    Raises:
        ValueError: if they are not here.
    """
    if not is_readable(tensor):
        raise ValueError(f"its parameters are {NOT_HERE}; gather them, or load the adapter onto a model in memory")
    return widen(tensor.detach())
