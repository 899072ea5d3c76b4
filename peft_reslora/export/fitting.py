"""From exact factors to what a file holds: truncated where asked for, in its dtype, of a rank that can be served."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from peft_reslora.export.factors import Factors, check_truncation, relative_error, truncate

# The ranks that vLLM can be told to serve; TGI and LoRAX take them without padding of their own.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EXACT = "exact"  # of how an adapter became one matrix per layer


@dataclass(frozen=True)
class FittedUpdate:
    """One layer's update as it goes into the file, not padded yet.

    Args:
        factors: in the file's dtype, on the CPU.
        rank_before: directions before truncation.
        energy_kept: fraction of the squared singular values that is left.
        relative_error: ||update - factors||_F / ||update||_F.
        merge: how the adapter became the update, `EXACT` or what estimated it.
    """

    factors: Factors
    rank_before: int
    energy_kept: float
    relative_error: float
    merge: str = EXACT

    @property
    def truncated(self) -> bool:
        return self.factors.rank < self.rank_before


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
        return self.rank is not None or self.energy is not None

    def arguments(self) -> str:
        """The keyword arguments that differ from their defaults, as they are written in a call."""
        dtype = None if self.dtype == torch.float32 else self.dtype
        given = {"rank": self.rank, "energy": self.energy, "dtype": dtype}
        return "".join(f", {name}={value}" for name, value in given.items() if value is not None)

    def update(self, factors: Factors, merge: str = EXACT) -> FittedUpdate:
        """Truncate, cast once, and measure what that cost.

        Raises:
            ValueError: for NaN or inf, or if a rank is left that cannot be served.
        """
        _refuse_nonfinite(factors, "its factors hold NaN or inf, so the adapter is broken")
        kept, energy_kept, error = factors, 1.0, 0.0
        if self.approximate:
            cut = truncate(factors, rank=self.rank, energy=self.energy)
            kept, energy_kept, error = cut.factors, cut.energy_kept, cut.relative_error
        if kept.rank > RANKS[-1]:
            raise ValueError(
                f"its update has rank {kept.rank}, and no LoRA above rank {RANKS[-1]} can be served; pass rank= or a "
                "lower energy= for an approximation, or use merge_and_unload()"
            )
        cast = Factors(kept.A.to(self.dtype), kept.B.to(self.dtype))
        if cast.A.dtype != kept.A.dtype:
            _refuse_nonfinite(
                cast, f"its factors do not fit into {self.dtype}; choose torch.float32 or torch.bfloat16"
            )
            error = relative_error(factors, cast)
        return FittedUpdate(Factors(cast.A.cpu(), cast.B.cpu()), factors.rank, energy_kept, error, merge)

    def file_rank(self, updates: Mapping[str, FittedUpdate]) -> int:
        """The least rank that is served and holds every update; not below the rank that was asked for."""
        needed = max([self.rank or 0, *(update.factors.rank for update in updates.values())])
        return next(size for size in RANKS if size >= needed)


def _refuse_nonfinite(factors: Factors, reason: str) -> None:
    if not (torch.isfinite(factors.A).all() and torch.isfinite(factors.B).all()):
        raise ValueError(reason)
