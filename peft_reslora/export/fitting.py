"""From exact factors to what a file holds: truncated where asked for, in its dtype, of a rank that can be served."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_reslora.export.factors import Factors
from peft_reslora.export.forms import LINEAR, Form
from peft_reslora.reslora.merging.estimators import Exactness

# The ranks that vLLM can be told to serve; TGI and LoRAX take them without padding of their own.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
AS_TRAINED = Exactness(True, "")  # of updates that are one matrix each, so that nothing was merged before


@dataclass(frozen=True)
class FittedUpdate:
    """One layer's update as it goes into the file, not padded yet.

    Args:
        factors: in the file's dtype, on the CPU.
        rank_before: directions before truncation.
        energy_kept: fraction of the squared singular values that is left; None where another scale goes with what is.
        relative_error: ||update - factors||_F / ||update||_F.
        merge: how the adapter became one matrix on this layer.
        first: of nested ranks, how many of each block's first directions are left; None where no others were cut off.
        magnitude: of DoRA, m `(out_features,)` in the file's dtype; None for others.
        form: in which the file holds the factors.
    """

    factors: Factors
    rank_before: int
    energy_kept: float | None
    relative_error: float
    merge: Exactness = AS_TRAINED
    first: int | None = None
    magnitude: Tensor | None = None
    form: Form = LINEAR

    @property
    def truncated(self) -> bool:
        """Whether directions were cut off."""
        return self.first is not None or self.factors.rank < self.rank_before


@dataclass(frozen=True)
class Fit:
    """How the caller wants the updates: cut to a rank, to an energy, or not at all; and in which dtype.

    Raises:
        ValueError: if an argument is out of range.
    """

    rank: int | None = None
    energy: float | None = None
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        check_truncation(self.rank, self.energy)
        if self.rank is not None and self.rank > RANKS[-1]:
            raise ValueError(f"rank={self.rank} is above {RANKS[-1]}, the largest rank of a LoRA that can be served.")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype} is not written; choose one of {', '.join(map(str, DTYPES))}.")

    @property
    def approximate(self) -> bool:
        """Whether the caller takes less than the whole update."""
        return self.rank is not None or self.energy is not None

    def arguments(self) -> str:
        """The keyword arguments that differ from their defaults, as they are written in a call."""
        dtype = None if self.dtype == torch.float32 else self.dtype
        given = {"rank": self.rank, "energy": self.energy, "dtype": dtype}
        return "".join(f", {name}={value}" for name, value in given.items() if value is not None)

    @property
    def nested_rank(self) -> int | None:
        """The rank at which an adapter with nested ranks is cut off; None for all its directions."""
        return self.rank

    def update(self, factors: Factors, merge: Exactness = AS_TRAINED, form: Form = LINEAR) -> FittedUpdate:
        """Truncate, cast once, and measure what that cost.

        Raises:
            ValueError: for NaN or inf, or if a rank is left that cannot be served.
        """
        _refuse_nonfinite(factors, "its factors hold NaN or inf, so the adapter is broken")
        kept, energy_kept, error = factors, 1.0, 0.0
        if self.approximate:
            cut = truncate(factors, rank=self.rank, energy=self.energy)
            kept, energy_kept, error = cut.factors, cut.energy_kept, cut.relative_error
        if (needed := form.needs(*kept.pair)) > RANKS[-1]:
            raise ValueError(
                f"its update has rank {needed}, and no LoRA above rank {RANKS[-1]} can be served; pass rank= or a "
                "lower energy= for an approximation, or use merge_and_unload()"
            )
        cast = Factors(kept.A.to(self.dtype), kept.B.to(self.dtype))
        if cast.A.dtype != kept.A.dtype:
            _refuse_nonfinite(
                cast, f"its factors do not fit into {self.dtype}; choose torch.float32 or torch.bfloat16"
            )
            error = relative_error(factors, cast)
        return FittedUpdate(Factors(cast.A.cpu(), cast.B.cpu()), factors.rank, energy_kept, error, merge, form=form)

    def dora_update(
        self, factors: Factors, magnitude: Tensor, merge: Exactness = AS_TRAINED, form: Form = LINEAR
    ) -> FittedUpdate:
        """As `update`, with the trained norms `(out_features,)` of the rows of the merged weight.

        Raises:
            ValueError: as `update`.
        """
        update, cast = self.update(factors, merge, form), magnitude.to(self.dtype)
        if not torch.isfinite(cast).all():
            raise ValueError(f"its norms (DoRA's magnitude) hold NaN or inf, or numbers too large for {self.dtype}")
        error = torch.linalg.vector_norm(cast.double() - magnitude.double()) / torch.linalg.vector_norm(
            magnitude.double()
        )
        error = 0.0 if self.dtype == torch.float32 else float(error)
        return dataclasses.replace(update, magnitude=cast.cpu(), relative_error=max(update.relative_error, error))

    def file_rank(self, updates: Mapping[str, FittedUpdate]) -> int:
        """The least rank that is served and holds every update; not below the rank that was asked for."""
        needed = max([self.rank or 0, *(update.form.needs(*update.factors.pair) for update in updates.values())])
        return next(size for size in RANKS if size >= needed)


def _refuse_nonfinite(factors: Factors, reason: str) -> None:
    if not (torch.isfinite(factors.A).all() and torch.isfinite(factors.B).all()):
        raise ValueError(reason)


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
    norm, distance = frobenius_norm(update.A.double(), update.B.double()), frobenius_norm(A, B)
    if norm == 0.0:
        return 0.0 if distance == 0.0 else float("inf")
    return distance / norm


def frobenius_norm(A: Tensor, B: Tensor) -> float:
    """||B @ A||_F from the triangular factors of both, without cancellation."""
    if A.shape[0] == 0:
        return 0.0
    _, R_A = torch.linalg.qr(A.T, mode="r")
    _, R_B = torch.linalg.qr(B, mode="r")
    return float(torch.linalg.matrix_norm(R_B @ R_A.T))
