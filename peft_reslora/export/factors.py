"""The low-rank factors of what an adapter adds to a weight: one rule per tuner layer, and truncation to a lower rank.

The update of a layer is meant as `nn.Linear` holds its weight, `(out_features, in_features)`, with every scale
included, whatever the orientation of the base layer's own weight. Factors of it are `A (R, in_features)` and
`B (out_features, R)` with update = B @ A, in float32, or in float64 where the adapter is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.loha.layer import LoHaLayer
from peft.tuners.lokr.layer import LoKrLayer
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_reslora.shared.host import Convolution


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
            ValueError: if the tensors are not two matrices of one rank, or are not in memory.
        """
        A, B = _widen(A), _widen(B)
        if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
            raise ValueError(
                f"its factors have the shapes {tuple(A.shape)} and {tuple(B.shape)} instead of (r, in_features) and "
                "(out_features, r); if the model is sharded, gather its parameters first"
            )
        used = (A != 0).any(dim=1) & (B != 0).any(dim=0)
        A, B = A[used], scale * B[:, used]
        if A.shape[0] > min(A.shape[1], B.shape[0]):
            return cls(*factorise(B @ A))
        return cls(A, B)

    @property
    def rank(self) -> int:
        """R, the number of directions; the rank of the update, unless they are linearly dependent."""
        return self.A.shape[0]

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
        left, right = self.left.spectrum(), self.right.spectrum()
        S, order = torch.sort(torch.outer(left.S, right.S).flatten(), descending=True)
        return Spectrum(_kron(left.U, right.U)[:, order], S, _kron(left.Vh, right.Vh)[order])


@dataclass(frozen=True)
class Truncation:
    """Factors of lower rank, and what they keep.

    Args:
        factors: the factors; the singular values are split evenly between A and B.
        energy_kept: fraction of the squared singular values that they keep, in [0, 1].
        relative_error: ||update - B @ A||_F / ||update||_F, from the singular values; 0 for an update of zero.
    """

    factors: Factors
    energy_kept: float
    relative_error: float


def truncate(factors: Factors, *, rank: int | None = None, energy: float | None = None) -> Truncation:
    """The best approximation (Frobenius norm) by a lower rank.

    Args:
        factors: what to approximate.
        rank: directions to keep. Factors of at most this rank are returned as they are.
        energy: in (0, 1]; keep the fewest directions with at least this fraction of the squared singular values.

    Raises:
        ValueError: if not exactly one of `rank` and `energy` is given, or it is out of range.
    """
    check_truncation(rank, energy)
    if rank is None and energy is None:
        raise ValueError("truncate needs one of rank and energy.")
    if factors.rank == 0 or (rank is not None and factors.rank <= rank):
        return Truncation(factors, energy_kept=1.0, relative_error=0.0)
    spectrum = factors.spectrum()
    squares = spectrum.S.double().square()
    kept = squares.cumsum(0)
    total = kept[-1]
    k = len(squares) if rank is None else min(rank, len(squares))
    if energy is not None:
        k = int(torch.searchsorted(kept, energy * total)) + 1
    root = spectrum.S[:k].sqrt()
    lost = squares[k:].sum()
    return Truncation(
        Factors(root[:, None] * spectrum.Vh[:k], spectrum.U[:, :k] * root),
        energy_kept=float(kept[k - 1] / total) if total > 0 else 1.0,
        relative_error=float((lost / total).sqrt()) if total > 0 else 0.0,
    )


def check_truncation(rank: int | None, energy: float | None) -> None:
    """Refuse a truncation that means nothing.

    Raises:
        ValueError: if both are given, `rank` is no positive integer or `energy` no number in (0, 1].
    """
    if rank is not None and energy is not None:
        raise ValueError(f"Give rank or energy, not both; got rank={rank!r} and energy={energy!r}.")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank={rank!r} must be a positive integer; for a fraction of the energy give energy=.")
    if energy is not None and (
        isinstance(energy, bool) or not isinstance(energy, (int, float)) or not 0 < energy <= 1
    ):
        raise ValueError(f"energy={energy!r} must be a number in (0, 1]; for a number of directions give rank=.")


def relative_error(update: Factors, other: Factors) -> float:
    """||update - other||_F / ||update||_F from the factors, in float64; 0 for two updates of zero."""
    A, B = torch.cat((update.A.double(), other.A.double())), torch.cat((update.B.double(), -other.B.double()), dim=1)
    norm, distance = _frobenius_norm(update.A.double(), update.B.double()), _frobenius_norm(A, B)
    if norm == 0.0:
        return 0.0 if distance == 0.0 else float("inf")
    return distance / norm


def factorise(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Exact `(A, B)` with B @ A = `matrix`, of its smaller side: one factor is the matrix, the other the identity."""
    rows, columns = matrix.shape
    identity = torch.eye(min(rows, columns), dtype=matrix.dtype, device=matrix.device)
    return (matrix, identity) if rows <= columns else (identity, matrix)


def layer_factors(layer: BaseTunerLayer, adapter_name: str, *, approximate: bool) -> Factors:
    """The factors of one adapter's update of one layer.

    A layer that knows its own factors says so with a method `merged_factors(adapter_name) -> (A, B)`; for PEFT's
    layers the rule is here.

    Args:
        layer: the tuner layer.
        adapter_name: an adapter that it has.
        approximate: the caller will truncate the result. Only then, a layer without exact factors whose
            `get_delta_weight` is its whole update (`supports_lora_conversion`) gives that, as factors of full rank.

    Raises:
        ValueError: with the reason, if the update is no matrix of low rank added to a linear layer's weight.
    """
    _refuse_other_than_linear(layer)
    if hasattr(layer, "merged_factors"):
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
    A, B = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    if not (isinstance(A, nn.Linear) and isinstance(B, nn.Linear)):
        raise ValueError(f"its factors are {type(A).__name__} and {type(B).__name__} modules instead of Linear")
    if B.bias is not None:
        raise ValueError("it trains a bias (lora_bias=True), which a plain LoRA cannot hold; use merge_and_unload()")
    return Factors.of(A.weight, B.weight, layer.scaling[adapter_name])


def _adalora(layer: Any, adapter_name: str) -> Factors:
    """s / (ranknum + 1e-5) B (A * E): AdaLoRA divides by the rank it started with; pruned directions have E = 0."""
    A, B, E = (getattr(layer, name)[adapter_name].detach() for name in ("lora_A", "lora_B", "lora_E"))
    scale = layer.scaling[adapter_name] / (float(layer.ranknum[adapter_name]) + 1e-5)
    return Factors.of(_widen(A) * _widen(E), B, scale)


def _loha(layer: Any, adapter_name: str) -> Factors:
    """s (B1 A1) * (B2 A2), elementwise = s (B1 . B2) (A1 . A2), with all r^2 products of a column (row) of each."""
    B1, A1, B2, A2 = (
        _widen(getattr(layer, f"hada_{name}")[adapter_name]) for name in ("w1_a", "w1_b", "w2_a", "w2_b")
    )
    B = torch.einsum("oi,oj->oij", B1, B2).flatten(1)
    A = torch.einsum("id,jd->ijd", A1, A2).flatten(0, 1)
    return Factors.of(A, B, layer.scaling[adapter_name])


def _lokr(layer: Any, adapter_name: str) -> Factors:
    """s kron(W1, W2), each of them a full matrix or a product of two."""

    def part(name: str, scale: float = 1.0) -> Factors:
        if adapter_name in (whole := getattr(layer, name)):
            A, B = factorise(_widen(whole[adapter_name]))
        else:
            A, B = getattr(layer, f"{name}_b")[adapter_name], getattr(layer, f"{name}_a")[adapter_name]
        return Factors.of(A, B, scale)

    return KroneckerFactors.product(part("lokr_w1", layer.scaling[adapter_name]), part("lokr_w2"))


# By layer class, the first that fits: AdaLoRA's layers are LoRA's as well.
_RULES: dict[type, Callable[[Any, str], Factors]] = {
    AdaLoraLayer: _adalora,
    LoraLayer: _lora,
    LoHaLayer: _loha,
    LoKrLayer: _lokr,
}


def _dense(layer: Any, adapter_name: str) -> Factors:
    """Factors of full rank, from the update as the layer itself would merge it."""
    delta = _widen(layer.get_delta_weight(adapter_name))
    turned = getattr(layer, "fan_in_fan_out", False) or isinstance(layer.get_base_layer(), Conv1D)
    return Factors.of(*factorise(delta.T if turned else delta))


def _refuse_other_than_linear(layer: BaseTunerLayer) -> None:
    base = layer.get_base_layer()
    if isinstance(layer, ParamWrapper):
        raise ValueError("it adapts a parameter (target_parameters) and not a linear layer; use merge_and_unload()")
    if isinstance(base, (nn.Embedding, nn.MultiheadAttention, Convolution)):
        raise ValueError(
            f"its base layer is {type(base).__name__}, and only linear layers (nn.Linear, Conv1D) are exported; train "
            "without it, or use merge_and_unload()"
        )


def _class_name(layer: BaseTunerLayer) -> str:
    return f"{type(layer).__module__}.{type(layer).__qualname__}"


def _kron(first: Tensor, second: Tensor) -> Tensor:
    """`torch.kron` of two matrices, which may be empty."""
    return torch.einsum("ab,cd->acbd", first, second).reshape(
        first.shape[0] * second.shape[0], first.shape[1] * second.shape[1]
    )


def _frobenius_norm(A: Tensor, B: Tensor) -> float:
    """||B @ A||_F from the triangular factors of both, without cancellation."""
    if A.shape[0] == 0:
        return 0.0
    _, R_A = torch.linalg.qr(A.T, mode="r")
    _, R_B = torch.linalg.qr(B, mode="r")
    return float(torch.linalg.matrix_norm(R_B @ R_A.T))


def _widen(tensor: Tensor) -> Tensor:
    """Detached, and in float32 unless it is float64.

    Raises:
        ValueError: if the tensor is sharded or offloaded, so that its values are not here.
    """
    if tensor.is_meta or hasattr(tensor, "full_tensor"):
        raise ValueError(
            "its parameters are offloaded or sharded; gather them, or load the adapter onto a model in memory"
        )
    return tensor.detach() if tensor.dtype == torch.float64 else tensor.detach().float()
