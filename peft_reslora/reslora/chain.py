"""Chains: which target layers hand something to which, found from their names and shapes.

A chain is the ordered list of target layers of one role in consecutive blocks: the same path once block indices are
wildcarded, the same in_features and out_features.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Target:
    """One target layer: its path in the base model, its shape and the rank of its block."""

    name: str
    in_features: int
    out_features: int
    rank: int

    @property
    def shape(self) -> str:
        return f"{self.in_features}->{self.out_features}"


@dataclass(frozen=True)
class MissingLink:
    """Two neighbours in one role that are not linked, and why."""

    before: str
    after: str
    reason: str


@dataclass(frozen=True)
class Role:
    """The target layers that share a role, cut into chains; `missing` explains each cut."""

    name: str
    chains: tuple[tuple[Target, ...], ...]
    missing: tuple[MissingLink, ...]


@dataclass(frozen=True)
class ChainTable:
    """All chains of one adapter. `str()` prints it as a table."""

    shortcut: str
    pre_num: int
    roles: tuple[Role, ...]

    @property
    def chains(self) -> list[tuple[Target, ...]]:
        return [chain for role in self.roles for chain in role.chains]

    @property
    def num_links(self) -> int:
        """How many pairs of a layer and an earlier one that feeds it there are."""
        return sum(reach(n, self.pre_num) for chain in self.chains for n in range(len(chain)))

    @property
    def missing(self) -> list[MissingLink]:
        return [link for role in self.roles for link in role.missing]

    def __str__(self) -> str:
        rows = [("role", "layers", "shape", "r", "links", "first", "last")]
        for role in self.roles:
            for chain in role.chains:
                links = sum(reach(n, self.pre_num) for n in range(len(chain)))
                ranks = sorted({target.rank for target in chain})
                rows.append(
                    (
                        role.name,
                        str(len(chain)),
                        chain[0].shape,
                        "-".join(map(str, dict.fromkeys((ranks[0], ranks[-1])))),
                        str(links),
                        _indices_text(role.name, chain[0]),
                        _indices_text(role.name, chain[-1]),
                    )
                )
        layers = sum(len(chain) for chain in self.chains)
        title = f"shortcut={self.shortcut!r}, pre_num={self.pre_num}: {layers} layers in {len(self.chains)} chains, "
        lines = [title + f"{self.num_links} links", *format_table(rows)]
        if self.missing:
            lines += ["links not made:", *(f"  {m.before} -> {m.after}: {m.reason}" for m in self.missing)]
        return "\n".join(lines)


def format_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lay `rows` (the first is the header) out in columns; numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = "  ".join("-" * width for width in widths)
    lines = ["  ".join(_align(cell, width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], rule, *lines[1:]]


def _align(cell: str, width: int) -> str:
    return cell.rjust(width) if cell.replace(".", "").replace("-", "").isdigit() else cell.ljust(width)


def _indices_text(role: str, target: Target) -> str:
    parts = zip(role.split("."), target.name.split("."), strict=False)
    return ".".join(value for pattern, value in parts if pattern != value) or "-"


def reach(position: int, pre_num: int) -> int:
    """How many earlier layers feed the layer at `position` of its chain."""
    return position if pre_num == -1 else min(position, pre_num)


def find_chains(
    targets: Iterable[Target], shortcut: str, pre_num: int, chain_pattern: Sequence[str] | str | None = None
) -> ChainTable:
    """Group `targets` into chains.

    Layers of one role are ordered by their block indices. Two neighbours are linked if, at the first index in which
    they differ, the later one follows directly (block 3 after block 2), and their shapes agree. Where `chain_pattern`
    made the role, its captured numbers only give the order, so a gap between them is no reason to cut.

    Raises:
        ValueError: if a `chain_pattern` captures no number, or cannot tell two layers apart.
    """
    patterns = [chain_pattern] if isinstance(chain_pattern, str) else list(chain_pattern or ())
    members: dict[tuple[str, bool], list[tuple[tuple[int, ...], Target]]] = {}
    for target in targets:
        role, indices, by_pattern = _role_of(target.name, patterns)
        members.setdefault((role, by_pattern), []).append((indices, target))
    roles = (_cut_into_chains(role, by_pattern, group) for (role, by_pattern), group in members.items())
    return ChainTable(shortcut, pre_num, tuple(roles))


def _role_of(name: str, patterns: Sequence[str]) -> tuple[str, tuple[int, ...], bool]:
    """Split a module name into its role, its block indices, and whether a pattern told them."""
    for pattern in patterns:
        if match := re.search(pattern, name):
            return _role_by_pattern(name, match)
    parts = name.split(".")
    # Experts work side by side, not one after the other: expert 3 is part of the role, not a block index.
    numbers = [i for i, p in enumerate(parts) if p.isdigit() and not (i and "expert" in parts[i - 1].lower())]
    # The last part is the layer's own name within its block (`blocks.3.mlp.0`), unless there is no other number.
    numbers = [i for i in numbers if i < len(parts) - 1] or numbers
    indices = tuple(int(parts[i]) for i in numbers)
    return ".".join("*" if i in numbers else part for i, part in enumerate(parts)), indices, False


def _role_by_pattern(name: str, match: re.Match[str]) -> tuple[str, tuple[int, ...], bool]:
    groups = [i for i, value in enumerate(match.groups(), 1) if value is not None]
    if not groups or not all(match[i].isdigit() for i in groups):
        raise ValueError(
            f"chain_pattern {match.re.pattern!r} matches layer {name!r} but its groups capture "
            f"{[match[i] for i in groups]}; they have to capture the block's number, as in r'lin(\\d+)$'."
        )
    role = name
    for i in reversed(groups):
        role = role[: match.start(i)] + "*" + role[match.end(i) :]
    return role, tuple(int(match[i]) for i in groups), True


def _cut_into_chains(role: str, by_pattern: bool, members: list[tuple[tuple[int, ...], Target]]) -> Role:
    members.sort(key=lambda member: member[0])
    chains = [[members[0][1]]]
    missing = []
    for (before_indices, before), (after_indices, after) in pairwise(members):
        if before_indices == after_indices:
            raise ValueError(
                f"chain_pattern cannot tell the layers {before.name!r} and {after.name!r} apart: both are number "
                f"{before_indices} of role {role!r}. Capture more of the name."
            )
        reason = _reason_against(before_indices, before, after_indices, after, by_pattern)
        if reason is None:
            chains[-1].append(after)
        else:
            chains.append([after])
            missing.append(MissingLink(before.name, after.name, reason))
    return Role(role, tuple(map(tuple, chains)), tuple(missing))


def _reason_against(
    before_indices: tuple[int, ...], before: Target, after_indices: tuple[int, ...], after: Target, by_pattern: bool
) -> str | None:
    """Why two neighbours of one role cannot be linked; None if they can."""
    first, second = next((a, b) for a, b in zip(before_indices, after_indices, strict=True) if a != b)
    if second - first != 1 and not by_pattern:
        return f"blocks {first} and {second} are not consecutive"
    if before.shape != after.shape:
        return f"shapes differ, {before.shape} and {after.shape}"
    return None
