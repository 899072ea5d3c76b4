"""MoRA's operators (arXiv 2405.12130): x -> decompress(M compress(x)) with a square M, as pure functions of tensors.

`x` has shape `(..., in_features)`, `M` shape `(q, q)`, the result shape `(..., out_features)`. The input is read in
groups of q: entry p of the row of groups is x[p mod in_features], so that the last group wraps round to the start.
Rows longer or shorter than they should be are likewise repeated or cut.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F

MoRAType = Literal["sharing", "decoupling", "rotation"]


def square_size(in_features: int, out_features: int, r: int, mora_type: MoRAType) -> int:
    """The side q of M that comes nearest to the parameter count of LoRA, q * q = r * (in + out).

    q is the root rounded to the nearest integer, at least 1. Rotation turns pairs of features, so there it is the root
    rounded to the nearest even integer, at least 2. What lies halfway is rounded up.
    """
    step = 2 if mora_type == "rotation" else 1
    root = math.sqrt((in_features + out_features) * r)
    return max(step, step * math.floor(root / step + 0.5))


def sharing(x: torch.Tensor, M: torch.Tensor, out_features: int) -> torch.Tensor:
    """The groups share the rows of M: they are summed, then M h is repeated (Eq. 6)."""
    h = _split(x, M.shape[0], _ceil_div(x.shape[-1], M.shape[0])).sum(-2)
    return _tile(F.linear(h, M), out_features)


def decoupling(x: torch.Tensor, M: torch.Tensor, out_features: int) -> torch.Tensor:
    """Each group is multiplied with M on its own; the results are put side by side."""
    h = _split(x, M.shape[0], _groups_read(x.shape[-1], out_features, M.shape[0]))
    return _tile(F.linear(h, M).flatten(-2), out_features)


def rotation(x: torch.Tensor, M: torch.Tensor, out_features: int) -> torch.Tensor:
    """As decoupling, with group g rotated by g positions first, so that M can tell the groups apart (Eq. 9).

    M R_g is computed in place of R_g h where x has more rows than M.
    """
    q = M.shape[0]
    h = _split(x, q, _groups_read(x.shape[-1], out_features, q))
    if not torch.compiler.is_compiling() and x.numel() > q * x.shape[-1]:
        return _tile(_each_group(h, _turned(M, h.shape[-2])), out_features)
    cos, sin = rotation_table(q, h.shape[-2], h.device, h.dtype)
    return _tile(F.linear(_rotate(h, cos, sin), M).flatten(-2), out_features)


OPERATORS: dict[MoRAType, Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]] = {
    "sharing": sharing,
    "decoupling": decoupling,
    "rotation": rotation,
}


def delta_weight(M: torch.Tensor, in_features: int, out_features: int, mora_type: MoRAType) -> torch.Tensor:
    """The matrix of the operator, shape `(out_features, in_features)`: operator(x) = x @ delta_weight.T."""
    return add_delta_weight(M.new_zeros(out_features, in_features), M, mora_type)


def add_delta_weight(weight: torch.Tensor, M: torch.Tensor, mora_type: MoRAType) -> torch.Tensor:
    """Add `delta_weight` to a weight `(out_features, in_features)` in place, block by block; returns the weight.

    Every block is M, or M R_g for rotation, R_g being the rotation of group g. With sharing, a row of blocks is the
    same for all groups of the output. Otherwise group g of the output has one block, in the columns of group g of the
    input, so that no more of the weight is read and written than there are blocks.
    """
    (out_features, in_features), q = weight.shape, M.shape[0]
    if mora_type == "sharing":
        _add_repeated(weight, _unwrap_columns(M.repeat(1, _ceil_div(in_features, q)), in_features))
        return weight
    groups = _groups_read(in_features, out_features, q)
    for g, block in enumerate(_turned(M, groups) if mora_type == "rotation" else M.expand(groups, q, q)):
        start, period = g * q, groups * q
        columns = weight[:, start : start + q]
        if start + q > in_features:  # the last group wraps round to the start of the row
            block, columns = _unwrap_columns(F.pad(block, (start, 0)), in_features), weight
        for row in range(start, out_features, period):
            rows = columns[row : row + q]
            rows += block[: len(rows)]
    return weight


def sharing_factors(M: torch.Tensor, in_features: int, out_features: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact factors A `(q, in_features)` and B `(out_features, q)`: delta_weight(M, ..., "sharing") = B @ A."""
    q = M.shape[0]
    sums = torch.eye(q, dtype=M.dtype, device=M.device).repeat(1, _ceil_div(in_features, q))
    return _unwrap_columns(sums, in_features), M[_wrapped(out_features, q, M.device)]


def rotation_table(q: int, groups: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of the angles g * 10000^(-2j/q), j < q/2, each of shape `(groups, q/2)` (Eq. 9).

    Kept per size, device and dtype, apart from any module: nothing to move, to save or to go stale.
    """
    if torch.compiler.is_compiling():  # traced tensors must not outlive the trace
        return _build_rotation_table(q, groups, device, dtype)
    return _kept_rotation_table(q, groups, device, dtype)


def _build_rotation_table(
    q: int, groups: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    exact = torch.promote_types(dtype, torch.float32)
    frequencies = 10000.0 ** (-2.0 / q * torch.arange(q // 2, device=device, dtype=exact))
    angles = torch.outer(torch.arange(groups, device=device, dtype=exact), frequencies)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@functools.lru_cache(maxsize=128)
def _kept_rotation_table(
    q: int, groups: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode(False):  # or training after a first inference could not save them for backward
        return _build_rotation_table(q, groups, device, dtype)


def _turned(M: torch.Tensor, groups: int) -> torch.Tensor:
    """M R_g `(groups, q, q)` of each group g: row m of it is R_g^T m."""
    cos, sin = rotation_table(M.shape[0], groups, M.device, M.dtype)
    return _rotate(M, cos.unsqueeze(1), -sin.unsqueeze(1))


def _each_group(h: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Group g of h `(..., groups, q)` times the matrix g of `(groups, q, q)`, side by side: `(..., groups * q)`."""
    by_group = h.flatten(0, -3).transpose(0, 1) if h.dim() > 2 else h.unsqueeze(1)
    return torch.bmm(by_group, matrices.transpose(1, 2)).transpose(0, 1).reshape(*h.shape[:-2], -1)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (x[j], x[j + q/2]) of x `(..., groups, q)`: the half-split convention of RoPE in Llama."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _split(x: torch.Tensor, q: int, groups: int) -> torch.Tensor:
    """Read x in `groups` groups of q, shape `(..., groups, q)`."""
    return _tile(x, groups * q).unflatten(-1, (groups, q))


def _groups_read(in_features: int, out_features: int, q: int) -> int:
    """How many groups of the input reach the output where each has an output of its own."""
    return min(_ceil_div(in_features, q), _ceil_div(out_features, q))


def _tile(x: torch.Tensor, length: int) -> torch.Tensor:
    """Repeat or cut the last dimension to `length`: entry p is x[..., p mod size]. A view where it is only cut."""
    size = x.shape[-1]
    whole, rest = divmod(length, size)
    if whole == 0:
        return x[..., :rest]
    repeated = x if whole == 1 else x.unsqueeze(-2).expand(*x.shape[:-1], whole, size).flatten(-2)
    return torch.cat([repeated, x[..., :rest]], dim=-1) if rest else repeated


def _add_repeated(weight: torch.Tensor, rows: torch.Tensor) -> None:
    """Add to row n of a weight the row n mod len(rows), in place."""
    whole = len(weight) // len(rows) * len(rows)
    if whole:
        repeated = weight[:whole].unflatten(0, (-1, len(rows)))
        repeated += rows
    rest = weight[whole:]
    rest += rows[: len(rest)]


def _unwrap_columns(blocks: torch.Tensor, in_features: int) -> torch.Tensor:
    """From columns per entry of the row of groups to columns per input feature: those of one feature add up."""
    if (rest := blocks.shape[1] - in_features) <= in_features:
        rows = blocks[:, :in_features].clone()
        rows[:, :rest] += blocks[:, in_features:]
        return rows
    columns = _wrapped(blocks.shape[1], in_features, blocks.device)
    return blocks.new_zeros(blocks.shape[0], in_features).index_add(1, columns, blocks)


def _wrapped(length: int, size: int, device: torch.device) -> torch.Tensor:
    return torch.arange(length, device=device) % size


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
